// The contract of decoding strategies: how the next tokens of some rows come from one or more forward passes. Types only.
import type { Engine, Random } from "@switchyard/core";
import type { Router } from "@switchyard/core/moe";
import type { Blueprint } from "../blueprint.ts";
import type { Model } from "../model.ts";
import type { Tokenizer } from "../tokenizer.ts";
import type { PrefixCache } from "./prefix-cache.ts";

/** What a strategy runs: every `LanguageModel` and `Transformer`. */
export interface DecodingModel extends Model {
  readonly engine: Engine;
  /** In the order of `routing`: what does not fit is refused before anything runs. */
  readonly routers?: readonly Pick<Router, "overrides">[];
  /** Says when a cache must be filled anew, and when it is of no use to other texts. */
  readonly blueprint?: Pick<Blueprint, "layers" | "allowNonCausal">;
}

/** A prompt and what goes with it. */
export interface DecodingRow {
  /** Ids, at least one, all in the vocabulary. */
  readonly prompt: readonly number[];
  /** The draw of token n is `random.at("generate", n)`. */
  readonly random: Random;
  /** Tokens that will be asked for at most, from 1; the context has room for them. */
  readonly limit: number;
}

/** The same for all rows. */
export interface DecodingOptions {
  /** Ids that end a text: for strategies that look ahead; the caller ends rows. */
  readonly stopIds: readonly number[];
  /** Text that ends a text; only with a tokenizer. */
  readonly stopStrings: readonly string[];
  readonly tokenizer?: Tokenizer;
  /** How many alternatives to report with each token. */
  readonly topLogProbabilities: number;
  /** Prompt tokens per pass; default 512. */
  readonly prefillChunk?: number;
  /** false recomputes the whole sequence for each token. */
  readonly cache: boolean;
  /** What earlier texts left behind, and where this one leaves its own. */
  readonly prefix?: PrefixCache;
  readonly allowNonCausal?: boolean;
  /** Asked between passes. */
  readonly signal?: AbortSignal;
  /** Numbers of rows in traces, where prompts are run one after the other; default: each run counts from 0. */
  readonly numbers?: SequenceNumbers;
}

export interface SequenceNumbers {
  /** The first of `count` numbers that no other row has. */
  take(count: number): number;
}

export interface TokenProbability {
  readonly id: number;
  /** Natural logarithm of the probability the model gives this token, before anything a strategy does to it. */
  readonly logProbability: number;
}

export interface DecodedToken extends TokenProbability {
  /** The most likely tokens, most likely first, where `topLogProbabilities` asks for some. */
  readonly top?: readonly TokenProbability[];
}

/** What comes next in one row. */
export interface DecodedStep {
  readonly tokens: readonly DecodedToken[];
  /** Nothing follows, whatever the tokens are. */
  readonly done?: boolean;
}

/**
 * How the next tokens come from forward passes: `greedy()`, `beam({ width: 4 })`, ... A new one is an object with these two members.
 * `start` checks what it is given and runs nothing yet. It throws ShapeError for options out of range, UnsupportedError for a model that
 * it cannot work on.
 */
export interface DecodingStrategy {
  readonly name: string;
  start(model: DecodingModel, rows: readonly DecodingRow[], options: DecodingOptions): DecodingState;
}

export interface DecodingState {
  /** The next tokens of every row, at least one each unless it is done. The first call runs the prompts. */
  next(): Promise<readonly DecodedStep[]>;
  /** Goes on with these rows only, in this order, numbered as they are now. */
  keep(rows: readonly number[]): void;
  /** Frees caches and whatever else it holds; calling it again does nothing. */
  dispose(): void;
}
