// Jitter around a router: in training it sees every hidden state times a number near 1 (Switch Transformer 2101.03961, section 2.2).
import { ShapeError } from "../errors.ts";
import type { RouterPlugin } from "../moe/plan.ts";
import { affine, mul } from "../ops/elementwise.ts";
import { refuse, wrap } from "./wrap.ts";

export interface WithJitterOptions {
  /** Factors are uniform in [1 - amount, 1 + amount); above 0 and below 1, default 0.01. */
  readonly amount?: number;
}

/**
 * The router, its view of the hidden states jittered in training; experts see them as they are. Works with every router that scores
 * hidden states; throws UnsupportedError for one that does not say so.
 *
 * @example withJitter(topK({ k: 2 }), { amount: 0.01 })
 */
export function withJitter(plugin: RouterPlugin, { amount = 0.01 }: WithJitterOptions = {}): RouterPlugin {
  if (!plugin.gives?.some((gift) => gift === "scores" || gift === "logits" || gift === "probabilities")) {
    const found = plugin.gives
      ? "it does not score hidden states"
      : "it does not say that it does (RouterPlugin.gives)";
    refuse("withJitter", plugin, `jitter is for routers that score hidden states, and ${found}`);
  }
  if (!(amount > 0 && amount < 1)) {
    throw new ShapeError(`withJitter: amount = ${amount}; expected a number above 0 and below 1`);
  }
  // The name of what is inside keeps the draws of two wrappers apart.
  const key = `jitter of ${plugin.name}`;
  return wrap(plugin, {
    name: "jitter",
    options: { amount },
    // Every token gets its own.
    changes: plugin.perSample ? { perSample: false } : {},
    stages: () => ({
      before(input) {
        const { hidden, training, random, layer } = input;
        if (!training) return input;
        const factors = affine(random.at(layer, key).uniform(hidden.shape), { scale: 2 * amount, shift: 1 - amount });
        return { ...input, hidden: mul(hidden, factors) };
      },
    }),
  });
}
