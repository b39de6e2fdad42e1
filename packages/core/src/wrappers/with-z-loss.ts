// The router z-loss (ST-MoE 2202.08906, eq. 5) around a router that has none.
import { ShapeError, UnsupportedError } from "../errors.ts";
import { tokenMask } from "../moe/dispatch.ts";
import { zLoss as squaredLogSum } from "../moe/losses.ts";
import type { RouterPlugin } from "../moe/plan.ts";
import { needGift, needNoLoss, withLoss, wrap } from "./wrap.ts";

export interface WithZLossOptions {
  /** Weight of the mean squared log-sum-exp of the logits of each layer; above 0, default 0.001. */
  readonly zLoss?: number;
}

/**
 * The router with a loss named "zLoss" in training, which keeps its logits small. Throws UnsupportedError for routers without logits or
 * with the loss already.
 *
 * @example withZLoss(expertChoice(), { zLoss: 0.001 })
 */
export function withZLoss(plugin: RouterPlugin, { zLoss = 0.001 }: WithZLossOptions = {}): RouterPlugin {
  needNoLoss("withZLoss", plugin, "zLoss");
  needGift("withZLoss", plugin, "logits", "the loss is of logits");
  if (!(zLoss > 0 && Number.isFinite(zLoss))) {
    throw new ShapeError(`withZLoss: zLoss = ${zLoss}; expected a finite number above 0`);
  }
  return wrap(plugin, {
    name: "zLoss",
    options: { zLoss },
    stages: () => ({
      after(routed, { training, layout }) {
        if (!training) return routed;
        if (!routed.logits) {
          throw new UnsupportedError(`withZLoss: ${plugin.name} declares logits, and did not return them`);
        }
        return withLoss(routed, "zLoss", { value: squaredLogSum(routed.logits, tokenMask(layout)), weight: zLoss });
      },
    }),
  });
}
