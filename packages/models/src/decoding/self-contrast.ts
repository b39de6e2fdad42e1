// Self-contrast decoding (SCMoE, 2405.14507): the trained routing against a weak one of the same model, by default the expert of the second
// rank alone. Both are rows of one batched pass with one cache, so that attention and dense weights are read once.
import { ShapeError } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { type ContrastOptions, contrast } from "./contrast.ts";
import { Passes } from "./passes.ts";
import { picker } from "./pick.ts";
import { requireRouting } from "./routing.ts";
import type { DecodingStrategy } from "./strategy.ts";
import { tokenByToken } from "./token-by-token.ts";

/** Defaults: alpha 0.1, beta 0.5, temperatures 1. */
export interface SelfContrastOptions extends ContrastOptions {
  /** The weak pass uses only the expert of this rank, counted from 1; default 2. */
  readonly weakRank?: number;
  /** Routing of the weak pass, instead of `weakRank`; `{ random: 1 }` is the paper's random-1, with this seed. */
  readonly weak?: RoutingOverride;
  /** Routing of the strong pass, such as `{ k: 3 }`; default: as trained. */
  readonly strong?: RoutingOverride;
  /** Draws from the softmax of what the contrast gives, as for self-consistency; default false: takes the largest. */
  readonly sample?: boolean;
  /** Never takes a stop id, so that only stop strings and `maxNew` end a text: as the paper's own code does; default false. */
  readonly forbidStopIds?: boolean;
}

/**
 * Each token from `contrast(strong, weak)`. Reported probabilities are those of the strong pass. Costs two rows per prompt.
 * Throws ShapeError for options out of range or a rank that the model does not have, UnsupportedError for a model without routers or with
 * routers that take no overrides.
 *
 * @example generate(model, { prompt, strategy: selfContrast({ beta: 0.3 }) })
 */
export function selfContrast(options: SelfContrastOptions = {}): DecodingStrategy {
  const name = "selfContrast";
  const { weakRank, weak, strong, sample = false, forbidStopIds = false, ...contrasting } = options;
  if (weakRank !== undefined && weak !== undefined) {
    throw new ShapeError(`${name}: weakRank and weak both say how the weak pass routes; give one of them`);
  }
  if (weakRank !== undefined && !(Number.isInteger(weakRank) && weakRank > 0)) {
    throw new ShapeError(`${name}: weakRank is ${weakRank}; expected a whole number from 1, the best expert`);
  }
  checkContrast(contrasting);
  const pick = picker(name, { temperature: sample ? 1 : 0 });
  const weakly = weak ?? { ranks: [(weakRank ?? 2) - 1] };
  return {
    name,
    start(model, rows, decoding) {
      requireRouting(name, model, [strong, weakly]);
      const prompts = rows.map(({ prompt }) => prompt);
      const override = [...rows.map(() => strong), ...rows.map(() => weakly)];
      // Strong rows first, then the weak ones in the same order.
      const passes = new Passes(model, [...prompts, ...prompts], { name, ...decoding, override });
      let count = rows.length;
      const source = {
        get sequences() {
          return passes.sequences.slice(0, count);
        },
        async advance(ids?: readonly number[]) {
          const logits = await passes.advance(ids && [...ids, ...ids]);
          return logits.slice(0, count).map((said, row) => {
            const allowed = forbidStopIds ? without(said, decoding.stopIds) : said;
            return { logits: said, choice: contrast(allowed, logits[count + row] as Float64Array, contrasting).logits };
          });
        },
        keep(kept: readonly number[]) {
          passes.keep([...kept, ...kept.map((row) => count + row)]);
          count = kept.length;
        },
        dispose: () => passes.dispose(),
      };
      return tokenByToken(rows, decoding, { source, pick });
    },
  };
}

/** Throws what `contrast` throws for options out of range, before any pass. */
export function checkContrast(options: ContrastOptions): void {
  contrast([0], [0], options);
}

function without(logits: Float64Array, ids: readonly number[]): Float64Array {
  const rest = logits.slice();
  for (const id of ids) rest[id] = Number.NEGATIVE_INFINITY;
  return rest;
}
