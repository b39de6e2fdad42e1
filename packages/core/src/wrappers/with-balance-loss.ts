// The balance loss of Switch Transformer (2101.03961, eqs. 4-6) around a router that has none.
import { ShapeError, UnsupportedError } from "../errors.ts";
import { tokenMask } from "../moe/dispatch.ts";
import { switchBalance } from "../moe/losses.ts";
import type { RouterPlugin } from "../moe/plan.ts";
import { needGift, needNoLoss, needSparse, refuse, withLoss, wrap } from "./wrap.ts";

export interface WithBalanceLossOptions {
  /** Weight of the loss E Σ f P of each layer, the f summing to k; above 0, default 0.01. */
  readonly balance?: number;
  /** Divides it by k; default false. */
  readonly normalizeByK?: boolean;
}

const whyNot = {
  sparse: "",
  dense: "every expert sees every token, so loads are even",
  "expert-choice": "experts choose equally many tokens, so loads are even",
  slots: "every expert has equally many slots, so loads are even",
  merge: "every token sees one mixture of experts, so there are no loads to even out",
};

/**
 * The router with a loss named "balance" in training, over all its experts, null ones included. With `globalLoad` in the input the loads of
 * the whole step count. Throws UnsupportedError where there is nothing to balance: other plans than sparse ones, routers that even
 * out or drop by themselves, or that have the loss already.
 *
 * @example withBalanceLoss(topK({ k: 2, balance: 0 }), { balance: 0.02 })
 */
export function withBalanceLoss(plugin: RouterPlugin, options: WithBalanceLossOptions = {}): RouterPlugin {
  const { balance = 0.01, normalizeByK = false } = options;
  const name = "withBalanceLoss";
  needSparse(name, plugin, whyNot);
  needNoLoss(name, plugin, "balance");
  needGift(name, plugin, "probabilities", "the loss multiplies loads by mean probabilities");
  if (!plugin.gives?.includes("choices")) {
    refuse(
      name,
      plugin,
      "its plan is not what tokens chose by these probabilities (it evens loads out itself, drops some, or chooses by something else), " +
        "so the loss would push at nothing; a capacity belongs around this wrapper, not inside",
    );
  }
  if (!(balance > 0 && Number.isFinite(balance))) {
    throw new ShapeError(`${name}: balance = ${balance}; expected a finite number above 0`);
  }
  return wrap(plugin, {
    name: "balanceLoss",
    options: { balance, normalizeByK },
    stages: () => ({
      after(routed, { training, layout, globalLoad: load }) {
        if (!training) return routed;
        const { plan, probabilities } = routed;
        if (plan.kind !== "sparse" || !probabilities) {
          throw new UnsupportedError(
            `${name}: ${plugin.name} declares a sparse plan and probabilities, and did not return them`,
          );
        }
        const mask = tokenMask(layout);
        const parts = { probabilities, experts: plan.experts, normalizeByK, ...(mask ? { mask } : {}) };
        return withLoss(routed, "balance", {
          value: switchBalance({ ...parts, ...(load ? { load } : {}) }),
          weight: balance,
        });
      },
    }),
  });
}
