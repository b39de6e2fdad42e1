// Text generation: prompts go in, tokens come out one after the other, chosen by a decoding strategy.
import { random, ShapeError } from "@switchyard/core";
import type { PrefixCache } from "./decoding/prefix-cache.ts";
import { run } from "./decoding/run.ts";
import { type SampleOptions, sample } from "./decoding/sample.ts";
import type { DecodedToken, DecodingModel, DecodingRow, DecodingStrategy } from "./decoding/strategy.ts";
import type { Tokenizer } from "./tokenizer.ts";

/**
 * Ids, or text where a tokenizer is given; at least one token. Text gets the special tokens that the checkpoint wants at its ends
 * (`<s>`): what a chat template made has them already and is given as ids, `tokenizer.encode(text)`.
 */
export type Prompt = ArrayLike<number> | string;

export interface GenerationOptions extends SampleOptions {
  /** How tokens are chosen, instead of the options of `sample`, which stand here as well. */
  readonly strategy?: DecodingStrategy;
  readonly tokenizer?: Tokenizer;
  /** Tokens to make at most; default, and Infinity: until the context is full. */
  readonly maxNew?: number;
  /** Default 0. Row i of a batch draws as if it were generated alone with `seed + i`. */
  readonly seed?: number;
  /**
   * Ids and strings that end the text. An id is not yielded. Of a string nothing is yielded, though it be spread over tokens: tokens that may be its
   * beginning are held back, and the token in which it begins keeps only the text before it. Strings need a tokenizer, ids must be in the vocabulary.
   */
  readonly stop?: readonly (number | string)[];
  /** Asked between passes. */
  readonly signal?: AbortSignal;
  /** How many of the most likely tokens to report with each token; default 0. */
  readonly topLogProbabilities?: number;
  /** Prompt tokens per pass, to bound memory; default 512. In a batch the first pass reaches into the shortest prompt. */
  readonly prefillChunk?: number;
  /** false recomputes the whole sequence for each token; default true. */
  readonly cache?: boolean;
  /** Spares what earlier texts with the same beginning have run: see `prefixCache`. */
  readonly prefix?: PrefixCache;
  /**
   * Accepts a router that looks at later tokens: while generating there are none, so it decides otherwise than in the text it was
   * trained on. Default: what the model's config says.
   */
  readonly allowNonCausal?: boolean;
}

export interface GenerateOptions extends GenerationOptions {
  readonly prompt: Prompt;
}

export interface GenerateBatchOptions extends GenerationOptions {
  readonly prompts: readonly Prompt[];
}

/** `logProbability` and `top` are what the model says, before temperature, cuts, and what else a strategy does. */
export interface GeneratedToken extends DecodedToken {
  /** With a tokenizer: the text that became complete with this token (a character may be split over tokens). */
  readonly text: string;
}

export interface BatchToken extends GeneratedToken {
  /** Which prompt it follows. */
  readonly row: number;
}

/** Why a text ended; "context": it is full. */
export type Ending = "stopId" | "stopString" | "maxNew" | "context" | "strategy";

/**
 * Generates tokens until `maxNew`, a stop, or a full context, and returns why it ended. Leaving the loop early frees the cache.
 * Throws ShapeError for an empty or too long prompt or options out of range, UnsupportedError for a router that cannot generate
 * or a strategy that does not fit the model, an Error for logits that are no numbers, the signal's reason when aborted.
 *
 * @example for await (const { text } of generate(model, { prompt: "Call me", tokenizer })) process.stdout.write(text);
 */
export async function* generate(
  model: DecodingModel,
  { prompt, ...options }: GenerateOptions,
): AsyncGenerator<GeneratedToken, Ending, undefined> {
  const tokens = generateBatch(model, { ...options, prompts: [prompt] });
  try {
    for (;;) {
      const { value, done } = await tokens.next();
      if (done) return value[0] ?? "maxNew";
      const { row: _, ...token } = value;
      yield token;
    }
  } finally {
    await tokens.return([]);
  }
}

/**
 * The same for several prompts at once: tokens of all rows as they come, and at the end why each row ended. Every row gets the tokens it would get
 * alone; rows that have ended leave the batch.
 *
 * @example for await (const { row, text } of generateBatch(model, { prompts: ["One", "Two"], tokenizer })) texts[row] += text;
 */
export async function* generateBatch(
  model: DecodingModel,
  { prompts, ...options }: GenerateBatchOptions,
): AsyncGenerator<BatchToken, readonly Ending[], undefined> {
  const { tokenizer, seed = 0, stop = [], signal, cache = true, prefix, allowNonCausal } = options;
  const { maxNew = Number.POSITIVE_INFINITY, prefillChunk, topLogProbabilities = 0 } = options;
  if (maxNew !== Number.POSITIVE_INFINITY) check("maxNew", maxNew, { from: 0 });
  check("prefillChunk", prefillChunk, { from: 1 });
  check("seed", seed, { from: Number.MIN_SAFE_INTEGER, to: Number.MAX_SAFE_INTEGER });
  check("topLogProbabilities", topLogProbabilities, { from: 0, to: model.vocabulary });
  const stopIds = stop.filter((one) => typeof one === "number");
  const foreign = stopIds.find((id) => !Number.isInteger(id) || id < 0 || id >= model.vocabulary);
  if (foreign !== undefined) {
    throw new ShapeError(
      `generate: stop id ${foreign} is not in a vocabulary of ${model.vocabulary}: it would never come`,
    );
  }
  const strategy = strategyOf(options);
  const stopStrings = stop.filter((one) => typeof one === "string");
  if (stopStrings.length > 0 && !tokenizer) throw new ShapeError("generate: a stop string needs a tokenizer");
  if (stopStrings.includes("")) throw new ShapeError('generate: the stop string "" is in every text; leave it out');
  const rows = prompts.map((prompt, row): DecodingRow => {
    const ids = promptIds(prompt, tokenizer, model);
    const limit = Math.min(maxNew, model.context - ids.length + 1);
    return { prompt: ids, random: random(model.engine, seed + row), limit };
  });
  if (maxNew === 0) return rows.map(() => "maxNew");
  const ends = yield* run(model, rows, strategy, {
    stopIds,
    stopStrings,
    ...(tokenizer ? { tokenizer } : {}),
    topLogProbabilities,
    ...(prefillChunk === undefined ? {} : { prefillChunk }),
    cache,
    ...(prefix ? { prefix } : {}),
    ...(allowNonCausal === undefined ? {} : { allowNonCausal }),
    ...(signal ? { signal } : {}),
  });
  return ends.map(({ reason }, row) => {
    if (reason !== "limit") return reason;
    return rows[row]?.limit === maxNew ? "maxNew" : "context";
  });
}

const samplingOptions = ["temperature", "topK", "topP", "minP", "repetitionPenalty", "routing"] as const;

function strategyOf({ strategy, ...options }: GenerationOptions): DecodingStrategy {
  const given = samplingOptions.filter((name) => options[name] !== undefined);
  if (!strategy) return sample(Object.fromEntries(given.map((name) => [name, options[name]])));
  if (given.length === 0) return strategy;
  throw new ShapeError(
    `generate: ${given.join(", ")} would not reach the strategy "${strategy.name}"; give its options to the strategy itself`,
  );
}

function check(name: string, value: number | undefined, { from, to = Infinity }: { from: number; to?: number }): void {
  if (value === undefined || (Number.isInteger(value) && value >= from && value <= to)) return;
  const range = to === Infinity ? `from ${from}` : `from ${from} to ${to}`;
  throw new ShapeError(`generate: ${name} is ${value}, expected a whole number ${range}`);
}

function promptIds(prompt: Prompt, tokenizer: Tokenizer | undefined, model: DecodingModel): number[] {
  const { vocabulary, context } = model;
  if (typeof prompt === "string" && !tokenizer) throw new ShapeError("generate: a text prompt needs a tokenizer");
  const ids = Array.from(
    typeof prompt === "string" && tokenizer
      ? tokenizer.encode(prompt, { addSpecial: true })
      : (prompt as ArrayLike<number>),
  );
  if (ids.length === 0) throw new ShapeError("generate: the prompt is empty; begin with at least one token");
  const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (wrong !== undefined) throw new ShapeError(`generate: prompt id ${wrong} is not in a vocabulary of ${vocabulary}`);
  if (ids.length > context) {
    throw new ShapeError(`generate: the prompt has ${ids.length} tokens, but the context is ${context}`);
  }
  return ids;
}
