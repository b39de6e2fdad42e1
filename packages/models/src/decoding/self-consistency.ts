// Self-consistency (2203.11171): several samples of one prompt, and the answer that most of them give.
import { type Random, ShapeError } from "@switchyard/core";
import { majorityVote, type Vote } from "./majority-vote.ts";
import { run } from "./run.ts";
import { sample } from "./sample.ts";
import type { DecodedToken, DecodingModel, DecodingOptions, DecodingRow, DecodingStrategy } from "./strategy.ts";
import { type RowState, rowByRow } from "./token-by-token.ts";

export interface ConsistencySample {
  /** Without a stop id or a stop string at the end. */
  readonly ids: readonly number[];
  /** Empty without a tokenizer. */
  readonly text: string;
}

export interface ConsistencyReport {
  /** undefined where no sample has an answer. */
  readonly vote: Vote | undefined;
  readonly samples: readonly (ConsistencySample & { readonly answer: string | undefined })[];
}

export interface SelfConsistencyOptions {
  /** The answer in a sample; undefined: it has none, and does not vote. */
  readonly answer: (sample: ConsistencySample) => string | undefined;
  /** Default 20. */
  readonly samples?: number;
  /** How each sample is made; default `sample({ temperature: 0.7 })`. One that draws, such as `selfContrast({ sample: true })`. */
  readonly strategy?: DecodingStrategy;
  /** Is told all samples and the vote, once per prompt. */
  readonly report?: (report: ConsistencyReport) => void;
}

/**
 * Gives the tokens of the first sample that has the winning answer, all at once; of the very first where none has an answer. Sample i draws from
 * `random.at("sample", i)`, and all samples of a prompt are rows of one batch. Throws ShapeError for options out of range.
 *
 * @example
 * const answer = ({ text }) => text.match(/-?\d+(?!.*\d)/s)?.[0];
 * generate(model, { prompt, tokenizer, maxNew: 200, strategy: selfConsistency({ answer, samples: 5 }) });
 */
export function selfConsistency(options: SelfConsistencyOptions): DecodingStrategy {
  const { samples = 20 } = options;
  if (!(Number.isInteger(samples) && samples > 0)) {
    throw new ShapeError(`selfConsistency: samples is ${samples}; expected a whole number from 1`);
  }
  return {
    name: "selfConsistency",
    start: (model, rows, decoding) =>
      rowByRow(rows, decoding, (row, own) => consistent(model, row, { options, samples, decoding: own })),
  };
}

function consistent(
  model: DecodingModel,
  row: DecodingRow,
  settings: {
    readonly options: SelfConsistencyOptions;
    readonly samples: number;
    readonly decoding: DecodingOptions;
  },
): RowState {
  const { options, samples, decoding } = settings;
  const { strategy = sample({ temperature: 0.7 }), answer, report } = options;
  const randomOf = (i: number): Random => row.random.at("sample", i);
  return {
    async next() {
      const copies = Array.from({ length: samples }, (_, i) => ({ ...row, random: randomOf(i) }));
      const made = copies.map(() => ({ ids: [] as number[], text: "" }));
      const running = run(model, copies, strategy, decoding);
      let all: readonly (readonly DecodedToken[])[] = [];
      // Not for await: what is returned at the end counts as well.
      for (;;) {
        const { value, done } = await running.next();
        if (done) {
          all = value.map(({ tokens }) => tokens);
          break;
        }
        const one = made[value.row];
        one?.ids.push(value.id);
        if (one) one.text += value.text;
      }
      const answered = made.map((one) => ({ ...one, answer: answer(one) }));
      const vote = majorityVote(answered.map((one) => one.answer));
      report?.({ vote, samples: answered });
      const winner = vote ? answered.findIndex((one) => one.answer === vote.answer) : 0;
      return { tokens: all[winner] ?? [], done: true };
    },
    // A run that fails or ends frees what it held; between steps there is nothing.
    dispose: () => undefined,
  };
}
