// Balance asked of the whole step (2501.11873; GRIN 2409.12136): Switch Transformer's loss E Σ_e f_e P_e (2101.03961, eq. 4)
// with f counted over all micro-batches, so that a small micro-batch may be one-sided. A hook, for routers that have no
// such loss of their own; those that do take `RouterInput.globalLoad` from the trainer without it.
import { ShapeError } from "../../errors.ts";
import { meanOverTokens } from "../../moe/losses.ts";
import type { Routed, StepInfo, TrainingHook } from "../../moe/plan.ts";
import { add, div, maximum, mul } from "../../ops/elementwise.ts";
import { sum } from "../../ops/reduce.ts";
import { reshape } from "../../ops/shape.ts";
import type { Tensor } from "../../tensor.ts";

export interface GlobalBalanceOptions {
  /** Weight of the loss, summed over the layers; default 0.01. */
  readonly weight?: number;
  /** Divides the loads by the experts per token, so that uniform routing gives 1 per layer; default false: k. */
  readonly normalizeByK?: boolean;
}

/**
 * Adds E Σ_e f_e P_e of every MoE layer that has probabilities. f comes from the trainer: with `globalBalance: "exact"`
 * from all micro-batches of the step, so that loss and gradient equal those of the undivided batch (a further forward
 * pass); with `true` from the micro-batches before; otherwise, and in the first micro-batch, from the micro-batch itself.
 * Null experts take part in the balance. Layers without probabilities are left out.
 *
 * @throws ShapeError for a weight below 0, or when no layer has probabilities.
 * @example trainer(engine, task, { optimiser, accumulate: 8, globalBalance: "exact", hooks: [globalBalance()] })
 */
export function globalBalance({ weight = 0.01, normalizeByK = false }: GlobalBalanceOptions = {}): TrainingHook {
  if (!(weight >= 0) || !Number.isFinite(weight))
    throw new ShapeError(`globalBalance: weight = ${weight}; expected a finite number from 0`);
  return {
    name: "globalBalance",
    loss(layers, info) {
      const losses = layers.flatMap((layer, i) => balanceOf(layer, info, { layer: i, normalizeByK }) ?? []);
      const [first, ...rest] = losses;
      if (first === undefined)
        throw new ShapeError(
          "globalBalance: no layer has probabilities; use a router that gives them, or leave it out",
        );
      return mul(rest.reduce(add, first), weight);
    },
  };
}

function balanceOf(
  { probabilities, metrics }: Routed,
  { globalLoad, mask }: StepInfo,
  { layer, normalizeByK }: { readonly layer: number; readonly normalizeByK: boolean },
): Tensor | undefined {
  if (probabilities === undefined) return undefined;
  const [tokens = 0, experts = 0] = probabilities.shape;
  const real = mask && reshape(mask, [tokens]);
  const load = globalLoad?.[layer] ?? metrics?.load;
  if (load?.size !== experts)
    throw new ShapeError(
      `globalBalance: layer ${layer} has probabilities of ${experts} experts and a load of ${load?.size ?? "none"}; ` +
        "run it through moe(), which adds metrics.load",
    );
  const share = globalLoad?.[layer] ? load : div(load, real ? maximum(sum(real), 1) : Math.max(tokens, 1));
  const f = normalizeByK ? div(share, maximum(sum(share), 1e-20)) : share; // [experts]
  return mul(sum(mul(f, meanOverTokens(probabilities, real))), experts);
}
