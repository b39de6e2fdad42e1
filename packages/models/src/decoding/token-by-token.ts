// What most strategies have in common: each row gets one token per pass, chosen from logits that the strategy makes. And its opposite:
// strategies that work on one row at a time. Private.
import type { Random } from "@switchyard/core";
import { decoded, type Pick } from "./pick.ts";
import type { DecodedStep, DecodingOptions, DecodingRow, DecodingState, SequenceNumbers } from "./strategy.ts";

/** What is known of the next token of a row, `[vocabulary]` each. */
export interface Said {
  /** What the model says. */
  readonly logits: Float64Array;
  /** What to choose from. */
  readonly choice: Float64Array;
}

export interface TokenSource {
  /** Ids so far, prompt included, per row. */
  readonly sequences: readonly (readonly number[])[];
  /** Goes on with one id per row; the first call is without. */
  advance(ids?: readonly number[]): Promise<readonly Said[]>;
  keep(rows: readonly number[]): void;
  dispose(): void;
}

export function tokenByToken(
  rows: readonly DecodingRow[],
  { topLogProbabilities }: DecodingOptions,
  { source, pick }: { readonly source: TokenSource; readonly pick: Pick },
): DecodingState {
  let randoms: readonly Random[] = rows.map(({ random }) => random);
  let chosen: readonly number[] | undefined;
  let made = 0;
  return {
    async next() {
      const said = await source.advance(chosen);
      const ids = said.map(({ choice }, row) =>
        pick(choice, source.sequences[row] ?? [], () => {
          const [uniform = 0] = (randoms[row] as Random).at("generate", made).host("uniform", 1);
          return uniform;
        }),
      );
      chosen = ids;
      made++;
      return said.map(({ logits }, row) => ({
        tokens: [decoded(logits, ids[row] as number, { count: topLogProbabilities })],
      }));
    },
    keep(kept) {
      source.keep(kept);
      randoms = kept.map((row) => randoms[row] as Random);
      chosen = chosen && kept.map((row) => chosen?.[row] as number);
    },
    dispose: () => source.dispose(),
  };
}

/** The state of one row alone. */
export interface RowState {
  next(): Promise<DecodedStep>;
  dispose(): void;
}

/** Runs rows one after the other, each with a state of its own, which gets options that tell traces its rows from those of the others. */
export function rowByRow(
  rows: readonly DecodingRow[],
  decoding: DecodingOptions,
  start: (row: DecodingRow, decoding: DecodingOptions) => RowState,
): DecodingState {
  let taken = 0;
  const counted: SequenceNumbers = {
    take(count) {
      taken += count;
      return taken - count;
    },
  };
  const { numbers = counted } = decoding;
  let states: readonly RowState[] = rows.map((row) => start(row, { ...decoding, numbers }));
  return {
    async next() {
      const steps: DecodedStep[] = [];
      for (const state of states) steps.push(await state.next());
      return steps;
    },
    keep(kept) {
      for (const [row, state] of states.entries()) if (!kept.includes(row)) state.dispose();
      states = kept.map((row) => states[row] as RowState);
    },
    dispose() {
      for (const state of states) state.dispose();
    },
  };
}
