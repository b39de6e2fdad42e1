// Ensemble routing, a baseline of 2405.14507: another number of experts per token than the model was trained with.
import { ShapeError } from "@switchyard/core";
import { type SampleOptions, sampling } from "./sample.ts";
import type { DecodingStrategy } from "./strategy.ts";

export interface EnsembleRoutingOptions extends Omit<SampleOptions, "routing"> {
  /** Experts per token, from 1 to all. More is not always better: with Mixtral on GSM8K 3 were best (2405.14507). Default 3. */
  readonly k?: number;
}

/**
 * Greedy (default, `temperature: 0`) or sampled decoding with k experts per token. Throws ShapeError for options out of range or more experts
 * than there are, UnsupportedError for a model without routers or with routers that take no overrides.
 */
export function ensembleRouting(options: EnsembleRoutingOptions = {}): DecodingStrategy {
  const { k = 3, temperature = 0, ...rest } = options;
  if (!(Number.isInteger(k) && k > 0))
    throw new ShapeError(`ensembleRouting: k is ${k}; expected a whole number from 1`);
  return sampling("ensembleRouting", { ...rest, temperature, routing: { k } });
}
