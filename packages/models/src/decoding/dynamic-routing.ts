// Dynamic routing (2403.07652), a baseline of 2405.14507: as many experts as a token's router needs to be sure of them.
import { ShapeError } from "@switchyard/core";
import { type SampleOptions, sampling } from "./sample.ts";
import type { DecodingStrategy } from "./strategy.ts";

export interface DynamicRoutingOptions extends Omit<SampleOptions, "routing"> {
  /**
   * The fewest experts whose probabilities sum to more than this, 0..1; their weights are divided by their sum. Default 0.5; 2405.14507 searches 0.2
   * to 0.6.
   */
  readonly threshold?: number;
  /** Experts at most; default: all. */
  readonly k?: number;
}

/**
 * Greedy (default, `temperature: 0`) or sampled decoding under routing by a threshold. Throws ShapeError for options out of range,
 * UnsupportedError for a model without routers or with routers that take no overrides.
 */
export function dynamicRouting(options: DynamicRoutingOptions = {}): DecodingStrategy {
  const { threshold = 0.5, k, temperature = 0, ...rest } = options;
  if (!(threshold >= 0 && threshold <= 1)) {
    throw new ShapeError(`dynamicRouting: threshold is ${threshold}; expected a sum of probabilities, 0 to 1`);
  }
  const routing = { threshold, ...(k === undefined ? {} : { k }) };
  return sampling("dynamicRouting", { ...rest, temperature, routing });
}
