// The text of a fine-tuning run in tokens: what is trained on, and the end of each text that is held out.
import { createHash } from "node:crypto";
import { basename } from "node:path";
import { trainingBatches } from "@switchyard/bench";
import { ShapeError, UnsupportedError } from "@switchyard/core";
import type { TextBatch, Tokenizer } from "@switchyard/models";
import { count, tokenIds } from "../arguments.ts";
import { readText } from "../text-file.ts";
import { type Settings, shown } from "./settings.ts";

/** Files as they were read. */
export interface Material {
  readonly files: readonly { readonly name: string; readonly content: string | readonly number[] }[];
  /** SHA-256 of all of it: a resumed run must see the same. */
  readonly sha256: string;
}

/** @throws CheckpointError, UnsupportedError that name the file. */
export function readMaterial({ text = [], ids }: Pick<Settings, "text" | "ids">): Material {
  const hash = createHash("sha256");
  const read = (path: string): string => {
    const found = readText(shown(path));
    hash.update(`${Buffer.byteLength(found)}\n`).update(found);
    return found;
  };
  const files: Material["files"] =
    ids === undefined
      ? text.map((path) => ({ name: basename(path), content: read(path) }))
      : [{ name: basename(ids), content: tokenIds(shown(ids), read(ids)) }];
  return { files, sha256: hash.digest("hex") };
}

export interface TuningText {
  /** All files, one behind the other, without what is held out. */
  readonly training: Int32Array;
  /** The ends of the files. */
  readonly heldOut: readonly HeldOut[];
  readonly files: readonly { readonly name: string; readonly tokens: number; readonly heldOut: number }[];
}

interface HeldOut {
  readonly ids: Int32Array;
  /** Bytes of text that the ids from the second one on stand for; absent where only ids are known. */
  readonly bytes?: number;
}

/** Bytes behind ids; undefined for tokens that are no bytes (WordPiece). */
function bytesOf(ids: Int32Array, tokenizer: Tokenizer): number | undefined {
  const special = new Set(tokenizer.special.values());
  try {
    return tokenizer.bytes(ids.filter((id) => !special.has(id))).length;
  } catch (error) {
    if (ShapeError.isInstance(error)) return undefined;
    throw error;
  }
}

/**
 * Cuts the texts: `share` of each is held out at its end, at least one window of `length` tokens and the one that is foretold last.
 * @throws UnsupportedError where that leaves no window to train on, saying what would fit; for ids that the model does not have.
 */
export function cutText(
  { files }: Material,
  options: {
    readonly share: number;
    readonly length: number;
    readonly vocabulary: number;
    readonly tokenizer?: Tokenizer | undefined;
  },
): TuningText {
  const { share, length, vocabulary, tokenizer } = options;
  const streams = files.map(({ name, content }) => {
    const ids =
      typeof content !== "string"
        ? Int32Array.from(content)
        : (tokenizer?.encode(content, { addSpecial: true }) ?? Int32Array.of());
    const wrong = ids.find((id) => id >= vocabulary);
    if (wrong === undefined) return { name, ids };
    throw new UnsupportedError(`${name}: id ${wrong} is not in the model's vocabulary of ${vocabulary}`);
  });
  const total = streams.reduce((sum, { ids }) => sum + ids.length, 0);
  const window = length + 1;
  const held = streams.map(({ ids }) => {
    const end = Math.round(share * ids.length);
    // Of a single token nothing can be foretold.
    return end < 2 ? 0 : end;
  });
  const missing = window - held.reduce((sum, n) => sum + n, 0);
  if (missing > 0) {
    const largest = streams.reduce((best, { ids }, i) => (ids.length > (streams[best]?.ids.length ?? 0) ? i : best), 0);
    held[largest] = (held[largest] ?? 0) + missing;
  }
  const rest = total - held.reduce((sum, n) => sum + n, 0);
  const longest = Math.max(...streams.map(({ ids }) => ids.length));
  if (rest < window || streams.some(({ ids }, i) => (held[i] ?? 0) > ids.length)) {
    throw new UnsupportedError(tooShort({ total, longest }, { share, length }));
  }
  const parts = streams.map(({ name, ids }, i) => {
    const cut = ids.length - (held[i] ?? 0);
    return { name, ids, cut };
  });
  const training = new Int32Array(rest);
  let at = 0;
  for (const { ids, cut } of parts) {
    training.set(ids.subarray(0, cut), at);
    at += cut;
  }
  return {
    training,
    heldOut: parts.flatMap(({ ids, cut }) => {
      const end = ids.slice(cut);
      if (end.length === 0) return [];
      const bytes = tokenizer && bytesOf(end.subarray(1), tokenizer);
      return [{ ids: end, ...(bytes === undefined ? {} : { bytes }) }];
    }),
    files: parts.map(({ name, ids, cut }) => ({ name, tokens: ids.length, heldOut: ids.length - cut })),
  };
}

function tooShort(
  { total, longest }: { readonly total: number; readonly longest: number },
  { share, length }: { readonly share: number; readonly length: number },
): string {
  // The longest window of which one stays to train on and one to measure.
  const fits = Math.min(Math.floor(total / 2), total - Math.round(share * total), longest) - 1;
  const found = `the text is too short: it has ${count(total, "token")}`;
  if (fits < 2) return `${found}, and even the shortest windows need 6; give more text`;
  const next = `--length ${fits} would fit`;
  if (total < 2 * (length + 1)) {
    return `${found}, windows of ${length} need ${2 * (length + 1)} (one to train on, one held out); ${next}, or give more text`;
  }
  if (longest <= length)
    return `${found}, but the longest file only ${longest}, too few for windows of ${length}; ${next}`;
  return `${found}, of which --hold-out ${share} leaves too few to train on windows of ${length}; ${next}, or hold out less`;
}

/** Steps that go once through the text. */
export const stepsOfEpoch = (tokens: number, { rows, length }: Pick<Settings, "rows" | "length">): number =>
  Math.max(1, (tokens - 1) / (rows * length));

/** Batches by index: every window once per round through the text, in a new order and with a new offset each time. */
export function batchesOf(
  { training }: TuningText,
  { rows, length, seed }: Pick<Settings, "rows" | "length" | "seed">,
): (index: number) => TextBatch {
  return trainingBatches([training], { rows, length, seed });
}
