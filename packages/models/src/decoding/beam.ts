// Beam search as Hugging Face does it: the `width` likeliest beginnings go on, texts that have ended compete by the sum of their log
// probabilities over length ** lengthPenalty, their stop id included in both.
import { ShapeError } from "@switchyard/core";
import { logProbabilities } from "./distributions.ts";
import { Passes } from "./passes.ts";
import { decoded, descending } from "./pick.ts";
import type {
  DecodedStep,
  DecodedToken,
  DecodingModel,
  DecodingOptions,
  DecodingRow,
  DecodingStrategy,
} from "./strategy.ts";
import { type RowState, rowByRow } from "./token-by-token.ts";

export interface BeamOptions {
  /** Beginnings that are followed at once; default 4. */
  readonly width?: number;
  /** Above 0 favours long texts, below 0 short ones; default 1: the mean log probability counts. */
  readonly lengthPenalty?: number;
  /** Ends as soon as `width` texts have ended; default false: when none that goes on could be better at its present length. */
  readonly earlyStopping?: boolean;
}

/**
 * The best of `width` beams. Its tokens come all at once, when the search has ended: at stop ids or the limit of the row. Stop strings only cut the
 * winner. Throws ShapeError for options out of range.
 */
export function beam({ width = 4, lengthPenalty = 1, earlyStopping = false }: BeamOptions = {}): DecodingStrategy {
  const name = "beam";
  if (!(Number.isInteger(width) && width > 0)) {
    throw new ShapeError(`${name}: width is ${width}; expected a whole number from 1`);
  }
  if (!Number.isFinite(lengthPenalty)) throw new ShapeError(`${name}: lengthPenalty is ${lengthPenalty}`);
  return {
    name,
    start: (model, rows, decoding) =>
      rowByRow(rows, decoding, (row, own) => search(model, row, { ...own, name, width, lengthPenalty, earlyStopping })),
  };
}

interface Settings extends DecodingOptions, Required<BeamOptions> {
  readonly name: string;
}

/** The end of a beginning; the tokens before it hang on it. */
interface Link {
  readonly token: DecodedToken;
  readonly before: Link | undefined;
}
interface Continuation {
  /** Sum of log probabilities. */
  readonly sum: number;
  readonly row: number;
  readonly id: number;
}
interface Ended {
  readonly score: number;
  readonly link: Link;
}

function search(model: DecodingModel, { prompt, limit }: DecodingRow, settings: Settings): RowState {
  // Beams end as many rows, which leave nothing behind: they take nothing either.
  const { prefix: _, ...own } = settings;
  const { name, width, lengthPenalty, earlyStopping, stopIds, topLogProbabilities } = own;
  const passes = new Passes(model, [prompt], own);
  const stops = new Set(stopIds);
  /** Enough that `width` of them go on even if every stop id is among them. */
  const wanted = Math.max(2, 1 + stops.size) * width;

  const run = async (): Promise<DecodedStep> => {
    let beams: readonly { readonly sum: number; readonly link: Link | undefined }[] = [{ sum: 0, link: undefined }];
    let ended: Ended[] = [];
    let ids: readonly number[] | undefined;
    for (let length = 1; ; length++) {
      const logs = (await passes.advance(ids)).map((logits) => logProbabilities(name, logits));
      const best = likeliest(
        beams.map(({ sum }) => sum),
        logs,
        wanted,
      );
      const link = ({ row, id }: Continuation): Link => ({
        token: decoded(logs[row] as Float64Array, id, { count: topLogProbabilities, logSum: 0 }),
        before: beams[row]?.link,
      });
      const last = length === limit;
      const going: Continuation[] = [];
      for (const [place, one] of best.entries()) {
        if (!last && !stops.has(one.id)) {
          if (going.length < width) going.push(one);
        } else if (place < width) ended.push({ score: one.sum / length ** lengthPenalty, link: link(one) });
      }
      // Stable: of equal ones the earlier stays.
      ended = ended.sort((a, b) => b.score - a.score).slice(0, width);
      const full = ended.length === width;
      const hopeful = (going[0]?.sum ?? Number.NEGATIVE_INFINITY) / length ** lengthPenalty;
      const over = full && (earlyStopping || hopeful <= (ended.at(-1) as Ended).score);
      if (going.length === 0 || over) break;
      beams = going.map((one) => ({ sum: one.sum, link: link(one) }));
      passes.keep(going.map(({ row }) => row));
      ids = going.map(({ id }) => id);
    }
    const tokens: DecodedToken[] = [];
    for (let at = ended[0]?.link; at; at = at.before) tokens.push(at.token);
    return { tokens: tokens.reverse(), done: true };
  };

  let result: DecodedStep | undefined;
  return {
    async next() {
      result ??= await run();
      passes.dispose();
      return result;
    },
    dispose: () => passes.dispose(),
  };
}

/** The continuations with the largest sums, falling; of equal ones the lower row, then the lower id. */
function likeliest(sums: readonly number[], logs: readonly Float64Array[], count: number): Continuation[] {
  const all: Continuation[] = [];
  for (const [row, values] of logs.entries()) {
    let taken = 0;
    for (const id of descending(values)) {
      const log = values[id] as number;
      if (taken++ === count || log === Number.NEGATIVE_INFINITY) break;
      all.push({ sum: (sums[row] as number) + log, row, id });
    }
  }
  return all.sort((a, b) => b.sum - a.sum || a.row - b.row || a.id - b.id).slice(0, count);
}
