// How well a model foretells a text: perplexity, bits per token and per byte, over windows that slide along it.
import type { Engine } from "@switchyard/core";
import { ShapeError } from "@switchyard/core";
import type { Model } from "./model.ts";
import { sequenceTensor } from "./record-logits.ts";
import type { Tokenizer } from "./tokenizer.ts";

export interface EvaluateOptions {
  /** Tokens of a window; default: the context of the model. At least 2. */
  readonly context?: number;
  /**
   * Tokens from the start of one window to the next, up to `context`; default half of it. Smaller ones give every token more to
   * go by and cost more passes.
   */
  readonly stride?: number;
  /** Tokens per pass, to bound memory; default 128. */
  readonly chunk?: number;
  readonly allowNonCausal?: boolean;
  /** Asked between passes. */
  readonly signal?: AbortSignal;
  /** After every pass. */
  onProgress?(progress: EvaluateProgress): void;
}

export interface EvaluateProgress {
  /** What has been found so far. */
  readonly sofar: Evaluation;
  /** Tokens run and to be run, those that are only there to be seen included. */
  readonly done: number;
  readonly total: number;
}

export interface Evaluation {
  /** Ids that were given. */
  readonly tokens: number;
  /** Tokens that were foretold: all but the first of the text, or of each window where `stride` is `context`. */
  readonly scored: number;
  readonly windows: number;
  /** Of the foretold tokens; absent where only ids are known, and for tokenizers of words (WordPiece). */
  readonly bytes?: number;
  /** Negative log-likelihood of the foretold tokens, natural logarithm. */
  readonly nats: number;
  /** exp(nats / scored). NaN where nothing was foretold. */
  readonly perplexity: number;
  readonly bitsPerToken: number;
  /** Where bytes are known. */
  readonly bitsPerByte?: number;
  /** Of a text: why they are not. */
  readonly withoutBytes?: string;
}

function evaluationOf(sums: {
  tokens: number;
  scored: number;
  windows: number;
  nats: number;
  bytes: number | undefined;
  withoutBytes: string | undefined;
}): Evaluation {
  const { tokens, scored, windows, nats, bytes, withoutBytes } = sums;
  return {
    ...{ tokens, scored, windows, nats },
    perplexity: Math.exp(nats / scored),
    bitsPerToken: nats / scored / Math.LN2,
    ...(bytes === undefined ? {} : { bytes, bitsPerByte: nats / bytes / Math.LN2 }),
    ...(withoutBytes === undefined ? {} : { withoutBytes }),
  };
}

/** Natural logarithm of the softmax at `id`, of one row of logits. */
function logProbability(
  logits: ArrayLike<number>,
  from: number,
  { vocabulary, id }: { vocabulary: number; id: number },
): number {
  let top = Number.NEGATIVE_INFINITY;
  for (let i = from; i < from + vocabulary; i++) top = Math.max(top, logits[i] as number);
  let sum = 0;
  for (let i = from; i < from + vocabulary; i++) sum += Math.exp((logits[i] as number) - top);
  return (logits[from + id] as number) - top - Math.log(sum);
}

/**
 * How well a model foretells ids. Windows of `context` tokens begin at every multiple of `stride`; each computes its tokens from its
 * own beginning, and counts those that no earlier window has foretold. This is the usual recipe of sliding windows, which
 * Hugging Face's guide to perplexity gives.
 * `bytesOf` says how many bytes of text an id stands for.
 * Throws ShapeError for fewer than two ids, ids that the model does not have, and options out of range; UnsupportedError for a router
 * that looks ahead; an Error for logits that are no numbers; the signal's reason when aborted.
 *
 * @example const { perplexity } = await evaluateTokens(model, ids, { stride: 512 });
 */
export async function evaluateTokens(
  model: Model & { readonly engine: Engine },
  ids: ArrayLike<number>,
  options: EvaluateOptions & { bytesOf?(id: number, position: number): number } = {},
): Promise<Evaluation> {
  return evaluateIds(model, ids, options);
}

interface IdsOptions extends EvaluateOptions {
  bytesOf?(id: number, position: number): number;
  readonly withoutBytes?: string;
}

async function evaluateIds(
  model: Model & { readonly engine: Engine },
  ids: ArrayLike<number>,
  { bytesOf, withoutBytes, ...options }: IdsOptions,
): Promise<Evaluation> {
  const { vocabulary } = model;
  const { context = model.context, chunk = 128, signal, allowNonCausal, onProgress } = options;
  const { stride = Math.max(1, Math.floor(context / 2)) } = options;
  const check = (name: string, value: number, from: number, to: number): void => {
    if (Number.isInteger(value) && value >= from && value <= to) return;
    throw new ShapeError(`evaluate: ${name} is ${value}, expected a whole number from ${from} to ${to}`);
  };
  check("context", context, 2, model.context);
  check("stride", stride, 1, context);
  check("chunk", chunk, 1, Number.MAX_SAFE_INTEGER);
  const count = ids.length;
  if (count < 2) throw new ShapeError(`evaluate: a text of ${count} tokens has nothing to foretell; give at least two`);
  const wrong = Array.from(ids).find((id) => !Number.isInteger(id) || id < 0 || id >= vocabulary);
  if (wrong !== undefined) throw new ShapeError(`evaluate: id ${wrong} is not in a vocabulary of ${vocabulary}`);

  const starts: number[] = [];
  for (let start = 0; ; start += stride) {
    starts.push(start);
    if (start + context >= count) break;
  }
  /** The last token of a window is foretold, not run. */
  const runOf = (start: number): number => Math.min(context, count - start) - 1;
  const total = starts.reduce((sum, start) => sum + runOf(start), 0);
  const sums = { tokens: count, scored: 0, windows: 0, nats: 0, bytes: bytesOf ? 0 : undefined, withoutBytes };
  let done = 0;
  /** Ids before this one have had their turn. */
  let next = 1;
  for (const start of starts) {
    const length = runOf(start);
    const cache = model.newCache(1);
    try {
      for (let at = 0; at < length; ) {
        signal?.throwIfAborted();
        // Tokens that are only seen need no logits: they run apart from those that count.
        const silent = Math.max(0, Math.min(length, next - 1 - start) - at);
        const size = Math.min(chunk, silent > 0 ? silent : length - at);
        const piece = Array.from({ length: size }, (_, i) => ids[start + at + i] as number);
        const input = sequenceTensor(model, piece, "evaluate");
        let logits: ArrayLike<number>;
        try {
          const y = await model.step(input, {
            cache,
            positions: silent > 0 ? "last" : "all",
            // The window's last token counts for its length.
            length: length + 1,
            ...(allowNonCausal === undefined ? {} : { allowNonCausal }),
          });
          try {
            logits = silent > 0 ? [] : await y.data();
          } finally {
            y.dispose();
          }
        } finally {
          input.dispose();
        }
        for (let i = 0; silent === 0 && i < size; i++) {
          const position = start + at + i + 1;
          const id = ids[position] as number;
          const nats = -logProbability(logits, i * vocabulary, { vocabulary, id });
          if (!Number.isFinite(nats))
            throw new Error(`evaluate: the model's logits at position ${position} are not finite`);
          sums.nats += nats;
          sums.scored++;
          if (bytesOf) sums.bytes = (sums.bytes ?? 0) + bytesOf(id, position);
          next = position + 1;
        }
        at += size;
        done += size;
        onProgress?.({ sofar: evaluationOf(sums), done, total });
      }
    } finally {
      cache.dispose();
    }
    sums.windows++;
    next = Math.max(next, Math.min(start + context, count));
  }
  return evaluationOf(sums);
}

/**
 * How well a model foretells a text, with the tokenizer of its checkpoint. Special tokens that the checkpoint wants at the ends of a
 * text are put there; they have no bytes. With one at the beginning the whole text is foretold, else all but the first token. Where tokens
 * are words and not bytes (WordPiece), there are no bits per byte, and `withoutBytes` says so.
 * Throws as `evaluateTokens` does.
 *
 * @example const { bitsPerByte } = await evaluateText(model, tokenizer, await readFile("novel.txt", "utf8"));
 */
export async function evaluateText(
  model: Model & { readonly engine: Engine },
  tokenizer: Tokenizer,
  text: string,
  options: EvaluateOptions = {},
): Promise<Evaluation> {
  const bare = tokenizer.encode(text);
  const ids = tokenizer.encode(text, { addSpecial: true });
  // Where the text begins between the special tokens around it.
  let first = 0;
  while (first < ids.length - bare.length && !bare.every((id, i) => ids[first + i] === id)) first++;
  const sizes = byteSizes(tokenizer, bare);
  if (!sizes) {
    const withoutBytes =
      "the tokens of this tokenizer are words: how many bytes of the text each stands for is not known";
    return evaluateIds(model, ids, { ...options, withoutBytes });
  }
  const bytesOf = (id: number, position: number): number =>
    position < first || position >= first + bare.length ? 0 : (sizes.get(id) ?? 0);
  return evaluateIds(model, ids, { ...options, bytesOf });
}

/** Bytes of each id; undefined where a token is not made of bytes. */
function byteSizes(tokenizer: Tokenizer, ids: ArrayLike<number>): ReadonlyMap<number, number> | undefined {
  const sizes = new Map<number, number>();
  for (const id of new Set(Array.from(ids))) {
    try {
      sizes.set(id, tokenizer.bytes([id]).length);
    } catch (error) {
      if (ShapeError.isInstance(error)) return undefined;
      throw error;
    }
  }
  return sizes;
}
