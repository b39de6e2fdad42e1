// Contrastive decoding (2210.15097): a model against a smaller one of the same vocabulary.
import { ShapeError } from "@switchyard/core";
import { type ContrastOptions, contrast } from "./contrast.ts";
import { Passes } from "./passes.ts";
import { picker } from "./pick.ts";
import { checkContrast } from "./self-contrast.ts";
import type { DecodingModel, DecodingStrategy } from "./strategy.ts";
import { tokenByToken } from "./token-by-token.ts";

/** Defaults as in `contrast`: alpha 0.1, beta 0.5, temperatures 1; "weak" is the amateur. */
export interface ContrastiveOptions extends ContrastOptions {
  /** The smaller model; it may be on another engine. */
  readonly amateur: DecodingModel;
  /** Draws from the softmax of what the contrast gives; default false: takes the largest. */
  readonly sample?: boolean;
}

/**
 * Each token from `contrast(model, amateur)`. Reported probabilities are the model's.
 * Throws ShapeError for options out of range, for vocabularies that differ, and where the text outgrows the amateur's context.
 */
export function contrastive({ amateur, sample = false, ...contrasting }: ContrastiveOptions): DecodingStrategy {
  const name = "contrastive";
  checkContrast(contrasting);
  const pick = picker(name, { temperature: sample ? 1 : 0 });
  return {
    name,
    start(model, rows, decoding) {
      if (model.vocabulary !== amateur.vocabulary) {
        throw new ShapeError(
          `${name}: the model has a vocabulary of ${model.vocabulary}, the amateur one of ${amateur.vocabulary}; both must share a tokenizer`,
        );
      }
      const prompts = rows.map(({ prompt }) => prompt);
      const expert = new Passes(model, prompts, { name, ...decoding });
      // What texts leave behind is the model's.
      const { prefix: _, numbers: __, ...alone } = decoding;
      const other = new Passes(amateur, prompts, { name: `${name} (amateur)`, ...alone });
      const source = {
        get sequences() {
          return expert.sequences;
        },
        async advance(ids?: readonly number[]) {
          const strong = await expert.advance(ids);
          const weak = await other.advance(ids);
          return strong.map((logits, row) => ({
            logits,
            choice: contrast(logits, weak[row] as Float64Array, contrasting).logits,
          }));
        },
        keep(kept: readonly number[]) {
          expert.keep(kept);
          other.keep(kept);
        },
        dispose() {
          expert.dispose();
          other.dispose();
        },
      };
      return tokenByToken(rows, decoding, { source, pick });
    },
  };
}
