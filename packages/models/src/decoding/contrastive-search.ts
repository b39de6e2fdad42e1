// Contrastive search (2202.06417): of the most likely tokens, the one that is probable and unlike what stands there already, by the hidden
// states after the final norm, as Hugging Face compares them.
import { ShapeError } from "@switchyard/core";
import { contrastiveSearchScore } from "./contrastive-search-score.ts";
import { logProbabilities } from "./distributions.ts";
import { HiddenStates } from "./hidden-states.ts";
import { Passes } from "./passes.ts";
import { decoded, descending } from "./pick.ts";
import type { DecodingModel, DecodingOptions, DecodingRow, DecodingStrategy } from "./strategy.ts";
import { type RowState, rowByRow } from "./token-by-token.ts";

export interface ContrastiveSearchOptions {
  /** Weight of the penalty for likeness, 0..1; default 0.6. 2405.14507 searches 0.3 to 0.6. */
  readonly alpha?: number;
  /** Candidates for each token; default 5. */
  readonly candidates?: number;
}

/**
 * The candidates are rows of one pass, of which the best goes on. The token that the context has no position for is the most likely one.
 * Throws ShapeError for options out of range.
 */
export function contrastiveSearch(options: ContrastiveSearchOptions = {}): DecodingStrategy {
  const { alpha = 0.6, candidates = 5 } = options;
  const name = "contrastiveSearch";
  if (!(alpha >= 0 && alpha <= 1)) throw new ShapeError(`${name}: alpha is ${alpha}; expected 0 to 1`);
  if (!(Number.isInteger(candidates) && candidates > 0)) {
    throw new ShapeError(`${name}: candidates is ${candidates}; expected a whole number from 1`);
  }
  return {
    name,
    start: (model, rows, decoding) =>
      rowByRow(rows, decoding, (row, own) => search(model, row, { ...own, name, alpha, candidates })),
  };
}

interface Settings extends DecodingOptions {
  readonly name: string;
  readonly alpha: number;
  readonly candidates: number;
}

function search(model: DecodingModel, { prompt }: DecodingRow, settings: Settings): RowState {
  const { alpha, candidates, topLogProbabilities } = settings;
  const passes = new Passes(model, [prompt], settings);
  /** One for each token so far, `[width]`. */
  const earlier: Float64Array[] = [];
  let logits: Float64Array | undefined;

  /** A pass with the hidden states it shows, `[positions][width]` per row. */
  const advance = async (ids?: readonly number[]) => {
    const hidden = new HiddenStates((what) => what === "finalNorm", "all");
    try {
      const said = await passes.advance(ids, hidden.watch);
      const states: Float64Array[][] = said.map(() => []);
      for (const { x } of hidden.tensors) {
        const [batch = 0, sequence = 0, width = 0] = x.shape;
        const data = Float64Array.from(await x.data());
        for (let i = 0; i < batch * sequence; i++) {
          states[Math.floor(i / sequence)]?.push(data.slice(i * width, (i + 1) * width));
        }
      }
      return { said, states };
    } finally {
      hidden.dispose();
    }
  };

  return {
    async next() {
      if (logits === undefined) {
        const { said, states } = await advance();
        logits = said[0] as Float64Array;
        earlier.push(...(states[0] ?? []));
      }
      const before = logits;
      const logs = logProbabilities(settings.name, before);
      const ids: number[] = [];
      for (const id of descending(before)) {
        if (ids.length === candidates || before[id] === Number.NEGATIVE_INFINITY) break;
        ids.push(id);
      }
      let best = 0;
      if ((passes.sequences[0]?.length ?? 0) < model.context) {
        passes.keep(ids.map(() => 0));
        const { said, states } = await advance(ids);
        const hidden = states.map((row) => row.at(-1) as Float64Array);
        const scores = ids.map((id, i) => {
          const probability = Math.exp(logs[id] as number);
          return contrastiveSearchScore({ probability, hidden: hidden[i] as Float64Array }, earlier, alpha);
        });
        best = scores.reduce((top, score, i) => (score > (scores[top] as number) ? i : top), 0);
        passes.keep([best]);
        logits = said[best];
        earlier.push(hidden[best] as Float64Array);
      }
      return { tokens: [decoded(before, ids[best] as number, { count: topLogProbabilities })] };
    },
    dispose: () => passes.dispose(),
  };
}
