// Sampling from what the model says, after temperature and cuts; also under another routing than the trained one.
import type { RoutingOverride } from "@switchyard/core/moe";
import { Passes } from "./passes.ts";
import { picker, type SamplingOptions } from "./pick.ts";
import { requireRouting } from "./routing.ts";
import type { DecodingStrategy } from "./strategy.ts";
import { tokenByToken } from "./token-by-token.ts";

export interface SampleOptions extends SamplingOptions {
  /** Other routing than the trained one; default: nothing changes. */
  readonly routing?: RoutingOverride;
}

/**
 * Samples each token. Throws ShapeError for options out of range.
 *
 * @example generate(model, { prompt, strategy: sample({ temperature: 0.7, topP: 0.9 }) })
 */
export const sample = (options: SampleOptions = {}): DecodingStrategy => sampling("sample", options);

/** `sample` by another name. */
export function sampling(name: string, { routing, ...options }: SampleOptions): DecodingStrategy {
  const pick = picker(name, options);
  return {
    name,
    start(model, rows, decoding) {
      if (routing) requireRouting(name, model, [routing]);
      const passes = new Passes(
        model,
        rows.map(({ prompt }) => prompt),
        { name, ...decoding, ...(routing ? { override: rows.map(() => routing) } : {}) },
      );
      const source = {
        get sequences() {
          return passes.sequences;
        },
        advance: async (ids?: readonly number[]) =>
          (await passes.advance(ids)).map((logits) => ({ logits, choice: logits })),
        keep: (kept: readonly number[]) => passes.keep(kept),
        dispose: () => passes.dispose(),
      };
      return tokenByToken(rows, decoding, { source, pick });
    },
  };
}
