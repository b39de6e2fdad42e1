// Noise around a router: in training its scores get a normal number each, so that experts near the edge are tried too. V-MoE
// (2106.05974, section 2.1) takes a deviation of 1 / experts.
import { ShapeError } from "../errors.ts";
import type { RouterPlugin } from "../moe/plan.ts";
import { add, mul } from "../ops/elementwise.ts";
import { needGift, wrap } from "./wrap.ts";

export interface WithNoiseOptions {
  /** Standard deviation, above 0; default 1 / experts. */
  readonly deviation?: number;
}

/**
 * The router with normal noise on its scores in training; `logits` and losses are those of the noisy scores.
 * Throws UnsupportedError where the router does not tell `score` and `select` apart.
 *
 * @example withNoise(topK({ k: 2 }), { deviation: 0.1 })
 */
export function withNoise(plugin: RouterPlugin, { deviation }: WithNoiseOptions = {}): RouterPlugin {
  needGift("withNoise", plugin, "scores", "noise stands between score and select, the two halves that give scores");
  if (deviation !== undefined && !(deviation > 0 && Number.isFinite(deviation))) {
    throw new ShapeError(`withNoise: deviation = ${deviation}; expected a finite number above 0`);
  }
  const key = `noise of ${plugin.name}`;
  return wrap(plugin, {
    name: "noise",
    options: { deviation: deviation ?? null },
    // Every token gets its own.
    changes: plugin.perSample ? { perSample: false } : {},
    stages: ({ experts }) => ({
      between: (scores, { training, random, layer }) =>
        training ? add(scores, mul(random.at(layer, key).normal(scores.shape), deviation ?? 1 / experts)) : scores,
    }),
  });
}
