// How far what a model says moves when every token gets one expert of another rank (2405.14507, section 2.2).
import { ShapeError } from "@switchyard/core";
import { bothRoutings, type WeakRouting } from "./both-routings.ts";
import { klDivergence } from "./kl-divergence.ts";
import type { DecodingModel } from "./strategy.ts";

export interface RoutingDivergenceOptions extends WeakRouting {
  /** The first token that counts: the answer after a question. From 1; default 1, all that have something before them. */
  readonly from?: number;
}

export interface RoutingDivergence {
  /** Mean over the tokens, in nats. */
  readonly mean: number;
  /** For each token from `from` on: KL(strong || weak) of what is said before it. */
  readonly perToken: Float64Array;
}

/**
 * KL(strong || rank-k) of the next token along a given text. The paper finds it smallest for rank 1 and growing from rank 2 on.
 * Throws ShapeError for ids, `from` or ranks out of range, UnsupportedError for a model without routers or with routers that take no overrides.
 *
 * @example (await routingDivergence(model, ids, { rank: 3, from: question.length })).mean
 */
export async function routingDivergence(
  model: DecodingModel,
  ids: ArrayLike<number>,
  options: RoutingDivergenceOptions = {},
): Promise<RoutingDivergence> {
  const { from = 1 } = options;
  if (!(Number.isInteger(from) && from >= 1 && from < ids.length)) {
    throw new ShapeError(
      `routingDivergence: from is ${from} with ${ids.length} tokens; expected the place of a token that has one before it`,
    );
  }
  const { vocabulary } = model;
  const perToken = new Float64Array(ids.length - from);
  // The last token has nothing after it to say.
  const said = { model, ids: Array.from(ids).slice(0, -1), options };
  await bothRoutings("routingDivergence", said, async (logits, start) => {
    const [, positions = 0] = logits.shape;
    const data = Float64Array.from(await logits.data());
    const row = (which: number, i: number): Float64Array => {
      const at = (which * positions + i) * vocabulary;
      return data.subarray(at, at + vocabulary);
    };
    for (let i = 0; i < positions; i++) {
      const place = start + i + 1 - from;
      if (place >= 0) perToken[place] = klDivergence(row(0, i), row(1, i));
    }
  });
  return { mean: perToken.reduce((sum, x) => sum + x, 0) / perToken.length, perToken };
}
