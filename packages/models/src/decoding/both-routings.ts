// A text through the strong and the weak routing of one model at once, for analysis. Private.
import { ShapeError, type Tensor } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import type { RoutingTrace } from "../model.ts";
import { requireRouting } from "./routing.ts";
import type { DecodingModel } from "./strategy.ts";

export interface WeakRouting {
  /** The weak pass uses only the expert of this rank, counted from 1; default 2. */
  readonly rank?: number;
  /** Routing of the strong pass; default: as trained. */
  readonly strong?: RoutingOverride;
}

/** Positions per pass: bounds the logits that are held at once. */
const chunk = 64;

/**
 * Runs `ids` as two rows, strong and weak, each with activations of its own. `visit` gets the logits `[2, positions, vocabulary]` of `from` and what
 * follows; it does not keep them. Throws ShapeError for no or too many ids and a rank below 1.
 */
export async function bothRoutings(
  name: string,
  {
    model,
    ids,
    options: { rank = 2, strong },
  }: { readonly model: DecodingModel; readonly ids: ArrayLike<number>; readonly options: WeakRouting },
  visit: (logits: Tensor, from: number) => Promise<void>,
  trace?: RoutingTrace,
): Promise<void> {
  if (!(Number.isInteger(rank) && rank > 0)) {
    throw new ShapeError(`${name}: rank is ${rank}; expected a whole number from 1, the best expert`);
  }
  if (ids.length === 0 || ids.length > model.context) {
    throw new ShapeError(`${name}: ${ids.length} tokens; expected 1 to ${model.context}, the context of the model`);
  }
  const override = [strong, { ranks: [rank - 1] }];
  requireRouting(name, model, override);
  const how = { override, positions: "all", length: ids.length } as const;
  const cache = model.newCache(2);
  try {
    for (let from = 0; from < ids.length; from += chunk) {
      const some = Array.from(ids).slice(from, from + chunk);
      const input = model.engine.tensor(Int32Array.from([...some, ...some]), [2, some.length]);
      try {
        const logits = await model.step(input, { ...how, cache, ...(trace ? { trace } : {}) });
        try {
          await visit(logits, from);
        } finally {
          logits.dispose();
        }
      } finally {
        input.dispose();
      }
    }
  } finally {
    cache.dispose();
  }
}
