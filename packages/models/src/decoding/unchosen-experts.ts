// How often the weak pass of self-contrast uses experts that the strong one left alone, over a model (2405.14507, section 2.1).
import { alias, type Tensor, UnsupportedError } from "@switchyard/core";
import type { RoutingTrace } from "../model.ts";
import { bothRoutings, type WeakRouting } from "./both-routings.ts";
import type { DecodingModel } from "./strategy.ts";
import { unchosenRatio } from "./unchosen-ratio.ts";

export interface UnchosenExperts {
  /** Share of tokens and layers, 0..1. */
  readonly ratio: number;
  /** The same for each router of a feed-forward part, in the model's order. */
  readonly layers: readonly number[];
}

/**
 * Share of (token, layer) in which the expert of the weak pass is not among those of the strong pass. Each pass has its own hidden states, so
 * that ranks within the strong set are not always in it. Throws ShapeError for ids or ranks out of range, UnsupportedError for a model without
 * routers, with routers that take no overrides, or that do not choose experts token by token.
 */
export async function unchosenExperts(
  model: DecodingModel,
  ids: ArrayLike<number>,
  options: WeakRouting = {},
): Promise<UnchosenExperts> {
  const places = model.routing.map(({ part }) => part === "feedForward");
  /** Unchosen ones per router. */
  const counts = places.map(() => 0);
  const held: { readonly place: number; readonly experts: Tensor }[] = [];
  const trace: RoutingTrace = {
    record(place, { plan }) {
      if (!places[place]) return;
      if (plan.kind !== "sparse") {
        throw new UnsupportedError(
          `unchosenExperts: router ${place} gave a plan of kind "${plan.kind}"; expected one that lists experts of each token`,
        );
      }
      held.push({ place, experts: alias(plan.experts) });
    },
  };
  const free = (): void => {
    for (const { experts } of held) experts.dispose();
    held.length = 0;
  };
  try {
    await bothRoutings(
      "unchosenExperts",
      { model, ids, options },
      async () => {
        for (const { place, experts } of held) {
          const chosen = Array.from(await experts.data()); // [2 * tokens, slots], the strong row first
          const tokens = (experts.shape[0] ?? 0) / 2;
          const [strong, weak] = [chosen.slice(0, chosen.length / 2), chosen.slice(chosen.length / 2)];
          counts[place] = (counts[place] ?? 0) + unchosenRatio(strong, weak, tokens) * tokens;
        }
        free();
      },
      trace,
    );
  } finally {
    free();
  }
  const layers = counts.filter((_, place) => places[place]).map((count) => count / ids.length);
  return { ratio: layers.reduce((sum, x) => sum + x, 0) / layers.length, layers };
}
