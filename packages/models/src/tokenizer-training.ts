// Trains a byte-level BPE vocabulary (Sennrich et al., arXiv:1508.07909; byte alphabet of GPT-2) and describes it as a
// standard tokenizer.json. Ties are broken by the smaller pair of ids, as the Rust library does, so merges are equal.
import type { Json } from "@switchyard/core";
import { ShapeError } from "@switchyard/core";
import { characters, pause, pieces, wordPattern } from "./byte-level.ts";
import { Heap } from "./heap.ts";

export interface TokenizerProgress {
  /** "words": done and total are characters of text; "merges": entries of the vocabulary. */
  readonly phase: "words" | "merges";
  readonly done: number;
  /** Unknown while words are read from a stream. */
  readonly total?: number;
}

export interface TokenizerTrainingOptions {
  /**
   * Size of the vocabulary, special tokens and the 256 bytes included. Fewer are made where the text has no more pairs.
   */
  readonly vocabulary: number;
  /** They get the first ids. The first of them separates documents. */
  readonly specialTokens?: readonly string[];
  /** Pairs seen less often are not merged. */
  readonly minimumCount?: number;
  readonly onProgress?: (progress: TokenizerProgress) => void;
  readonly signal?: AbortSignal;
}

/** The content of tokenizer.json and tokenizer_config.json. */
export interface TokenizerFiles {
  readonly tokenizer: { readonly [key: string]: Json };
  readonly config: { readonly [key: string]: Json };
}

type Defaulted = "specialTokens" | "minimumCount";

/**
 * Two neighbouring tokens: how often they occur and where. A position goes stale when a merge takes one of its ends.
 */
interface Pair {
  readonly a: number;
  readonly b: number;
  count: number;
  readonly positions: number[];
}

/** A pair in the queue with the count it had when it was put there; an entry that is out of date is put in again. */
interface Queued {
  readonly pair: Pair;
  readonly count: number;
}

const before = (x: Queued, y: Queued): boolean =>
  x.count !== y.count ? x.count > y.count : x.pair.a !== y.pair.a ? x.pair.a < y.pair.a : x.pair.b < y.pair.b;

/** Counts words; gives control back between pieces, so that a run can be aborted. */
async function countWords(
  texts: Iterable<string> | AsyncIterable<string>,
  { onProgress, signal }: TokenizerTrainingOptions,
): Promise<Map<string, number>> {
  const counts = new Map<string, number>();
  const total = Array.isArray(texts) ? texts.reduce((sum: number, text: string) => sum + text.length, 0) : undefined;
  let done = 0;
  for await (const text of texts) {
    for (const piece of pieces(text)) {
      for (const word of piece.match(wordPattern) ?? []) counts.set(word, (counts.get(word) ?? 0) + 1);
      done += piece.length;
      onProgress?.({ phase: "words", done, ...(total === undefined ? {} : { total }) });
      await pause();
      signal?.throwIfAborted();
    }
  }
  return counts;
}

/**
 * The merges of byte-pair encoding, best first; adds the tokens they make to `tokens`. Words lie one after another in
 * one array with links between the tokens that are left, so that a merge costs only its own occurrences.
 */
async function learnMerges(
  words: ReadonlyMap<string, number>,
  tokens: string[],
  {
    vocabulary,
    specialTokens,
    minimumCount,
    onProgress,
    signal,
  }: Required<Pick<TokenizerTrainingOptions, Defaulted>> & TokenizerTrainingOptions,
): Promise<(readonly [a: number, b: number])[]> {
  const encoder = new TextEncoder();
  const ids = new Map(tokens.map((token, id) => [token, id]));
  const byteIds = characters.map((character) => ids.get(character) as number);
  const encoded = [...words].map(([word, count]) => ({ bytes: encoder.encode(word), count }));
  const size = encoded.reduce((sum, { bytes }) => sum + bytes.length, 0);
  const token = new Int32Array(size); // -1: merged into the token before it
  const next = new Int32Array(size).fill(-1);
  const previous = new Int32Array(size).fill(-1);
  const weight = new Float64Array(size); // how often the word at this position occurs
  const pairs = new Map<number, Pair>();
  // Ids stay below 2^21, so that a pair of them is one exact number.
  const find = (a: number, b: number): Pair => {
    const key = a * 2 ** 21 + b;
    let pair = pairs.get(key);
    if (!pair) {
      pair = { a, b, count: 0, positions: [] };
      pairs.set(key, pair);
    }
    return pair;
  };
  const add = (position: number, a: number, b: number): Pair => {
    const pair = find(a, b);
    pair.count += weight[position] as number;
    pair.positions.push(position);
    return pair;
  };

  let at = 0;
  for (const { bytes, count } of encoded) {
    for (let i = 0; i < bytes.length; i++, at++) {
      token[at] = byteIds[bytes[i] as number] as number;
      weight[at] = count;
      if (i > 0) {
        previous[at] = at - 1;
        next[at - 1] = at;
        add(at - 1, token[at - 1] as number, token[at] as number);
      }
    }
  }

  const queue = new Heap<Queued>(before);
  const enqueue = (pair: Pair): void => {
    if (pair.count >= minimumCount) queue.push({ pair, count: pair.count });
  };
  for (const pair of pairs.values()) enqueue(pair);

  const merges: (readonly [number, number])[] = [];
  let lastPause = performance.now();
  while (tokens.length < vocabulary) {
    const best = queue.pop();
    if (!best) break;
    if (best.count !== best.pair.count) {
      enqueue(best.pair);
      continue;
    }
    const { a, b, positions } = best.pair;
    merges.push([a, b]);
    // Two ways to the same text (a + bc, ab + c) are two merges but one token.
    const text = (tokens[a] as string) + (tokens[b] as string);
    let merged = ids.get(text);
    if (merged === undefined) {
      merged = tokens.length;
      tokens.push(text);
      ids.set(text, merged);
    } else if (merged < specialTokens.length) {
      throw new ShapeError(
        `trainTokenizer: the special token ${JSON.stringify(text)} is part of the text; choose another`,
      );
    }
    // In a run such as "aaa" the leftmost pair goes first. Only a token made twice can have brought them out of order.
    if (a === b) positions.sort((x, y) => x - y);
    const created = new Set<Pair>();
    for (const i of positions) {
      const j = next[i] as number;
      if (token[i] !== a || j < 0 || token[j] !== b) continue;
      const count = weight[i] as number;
      const left = previous[i] as number;
      const right = next[j] as number;
      token[i] = merged;
      token[j] = -1;
      next[i] = right;
      if (left >= 0) {
        find(token[left] as number, a).count -= count;
        created.add(add(left, token[left] as number, merged));
      }
      if (right >= 0) {
        previous[right] = i;
        find(b, token[right] as number).count -= count;
        created.add(add(i, merged, token[right] as number));
      }
    }
    best.pair.count = 0;
    pairs.delete(a * 2 ** 21 + b);
    for (const pair of created) enqueue(pair);
    if (performance.now() - lastPause > 50) {
      onProgress?.({ phase: "merges", done: tokens.length, total: vocabulary });
      await pause();
      signal?.throwIfAborted();
      lastPause = performance.now();
    }
  }
  onProgress?.({ phase: "merges", done: tokens.length, total: tokens.length });
  return merges;
}

/**
 * Trains a byte-level BPE tokenizer on texts. Deterministic: same texts in the same order, same files.
 * Throws ShapeError where the vocabulary cannot hold the bytes and special tokens; the signal's reason when aborted.
 *
 * @example const files = await trainTokenizer([text], { vocabulary: 2048 });
 */
export async function trainTokenizer(
  texts: Iterable<string> | AsyncIterable<string>,
  options: TokenizerTrainingOptions,
): Promise<TokenizerFiles> {
  const { vocabulary, specialTokens = ["<|endoftext|>"] } = options;
  const first = specialTokens.length + 256;
  if (!Number.isInteger(vocabulary) || vocabulary < first || vocabulary > 2 ** 20) {
    throw new ShapeError(
      `trainTokenizer: vocabulary is ${vocabulary}; it must be a whole number from ${first} ` +
        `(256 bytes and ${specialTokens.length} special tokens) to ${2 ** 20}`,
    );
  }
  // The Rust trainer numbers the alphabet by code point: special tokens, then characters, then merges.
  const tokens = [...specialTokens, ...[...characters].sort((x, y) => (x < y ? -1 : 1))];
  if (new Set(tokens).size !== first || specialTokens.includes("")) {
    const found = JSON.stringify(specialTokens);
    throw new ShapeError(`trainTokenizer: special tokens must differ and be longer than one byte, got ${found}`);
  }
  const words = await countWords(texts, options);
  const merges = await learnMerges(words, tokens, { minimumCount: 2, ...options, specialTokens });

  const vocab = Object.fromEntries(tokens.map((token, id) => [token, id]));
  const separator = specialTokens[0] ?? null;
  return {
    tokenizer: {
      version: "1.0",
      truncation: null,
      padding: null,
      added_tokens: specialTokens.map((content, id) => ({
        id,
        content,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
        special: true,
      })),
      normalizer: null,
      pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
      post_processor: null,
      decoder: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
      model: {
        type: "BPE",
        dropout: null,
        unk_token: null,
        continuing_subword_prefix: null,
        end_of_word_suffix: null,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        vocab,
        // No token of this alphabet holds a space, and older readers know only this form.
        merges: merges.map(([a, b]) => `${tokens[a]} ${tokens[b]}`),
      },
    },
    config: {
      tokenizer_class: "PreTrainedTokenizerFast",
      add_prefix_space: false,
      clean_up_tokenization_spaces: false,
      bos_token: separator,
      eos_token: separator,
      unk_token: null,
      pad_token: separator,
    },
  };
}
