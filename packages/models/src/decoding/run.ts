// Runs a strategy over rows until each has ended: the loop behind `generate`, `generateBatch` and self-consistency. Private.
import type { Tokenizer } from "../tokenizer.ts";
import { type StopStrings, stopStrings } from "./stop-strings.ts";
import type { DecodedToken, DecodingModel, DecodingOptions, DecodingRow, DecodingStrategy } from "./strategy.ts";

/** Why a text ended: at a stop id, at a stop string, at its limit, or because the strategy says that nothing follows. */
export type EndReason = "stopId" | "stopString" | "limit" | "strategy";

export interface RunToken extends DecodedToken {
  readonly row: number;
  /** With a tokenizer: the text that became complete with this token. */
  readonly text: string;
}

export interface RunEnd {
  readonly reason: EndReason;
  /** All that was made, also what a stop took away. */
  readonly tokens: readonly DecodedToken[];
}

interface LiveRow {
  readonly row: number;
  readonly limit: number;
  readonly tokens: DecodedToken[];
  readonly textOf: ((id: number) => string) | undefined;
  readonly stops: StopStrings<RunToken>;
}

/** Yields tokens as they become certain, row by row in each step; returns how each row ended. */
export async function* run(
  model: DecodingModel,
  rows: readonly DecodingRow[],
  strategy: DecodingStrategy,
  options: DecodingOptions,
): AsyncGenerator<RunToken, readonly RunEnd[], undefined> {
  const { tokenizer, stopStrings: strings, signal } = options;
  const stopIds = new Set(options.stopIds);
  const ends: RunEnd[] = [];
  let live = rows.map(
    ({ prompt, limit }, row): LiveRow => ({
      row,
      limit,
      tokens: [],
      textOf: tokenizer && textStream(tokenizer, prompt),
      stops: stopStrings(strings),
    }),
  );
  if (live.length === 0) return ends;
  const state = strategy.start(model, rows, options);
  try {
    while (live.length > 0) {
      signal?.throwIfAborted();
      const steps = await state.next();
      const staying: number[] = [];
      for (const [i, one] of live.entries()) {
        const { row, limit, tokens, textOf, stops } = one;
        const { tokens: made, done } = steps[i] ?? { tokens: [], done: true };
        let reason: EndReason | undefined;
        for (const token of made) {
          tokens.push(token);
          if (stopIds.has(token.id)) {
            reason = "stopId";
            break;
          }
          const { released, ended } = stops.push({ row, ...token, text: textOf?.(token.id) ?? "" });
          yield* released;
          if (ended) reason = "stopString";
          else if (tokens.length >= limit) reason = "limit";
          if (reason) break;
        }
        if (!reason && done) reason = "strategy";
        if (reason === undefined) staying.push(i);
        else {
          yield* stops.flush();
          ends[row] = { reason, tokens };
        }
      }
      if (staying.length === live.length) continue;
      live = staying.map((i) => live[i] as LiveRow);
      if (live.length > 0) state.keep(staying);
    }
    return ends;
  } finally {
    state.dispose();
  }
}

/** The text that becomes complete with each id. Models may have more ids than their tokenizer: those have no text. */
function textStream(tokenizer: Tokenizer, prompt: readonly number[]): (id: number) => string {
  const stream = tokenizer.stream({ after: prompt });
  return (id) => (id < tokenizer.vocabulary ? stream.push(id) : "");
}
