// Text from files and folders, cut into blocks of which whole ones are held out. Runs in Node (node:fs).
import { readdirSync, readFileSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { UnsupportedError } from "@switchyard/core";

/** One labelled domain. */
export interface Corpus {
  readonly name: string;
  /** One per file, in the order of their paths: UTF-8 with line feeds only. */
  readonly texts: readonly Uint8Array[];
  /** Files of a folder that hold no text (binary or empty) and were passed over. */
  readonly skipped: number;
}

export interface CorpusOptions {
  /** Label; default: the last part of the path. */
  readonly name?: string;
  /** Chooses files of a folder by their path inside it, with forward slashes. */
  readonly accept?: (path: string) => boolean;
  /** Stop reading a folder here; default 64 MiB. */
  readonly maxBytes?: number;
}

/** One domain's blocks, in the order of the text. Every block begins and ends on a whole character. */
export interface Domain {
  readonly name: string;
  /** Files that the blocks come from. */
  readonly files: number;
  readonly training: readonly Uint8Array[];
  readonly validation: readonly Uint8Array[];
}

const lineFeed = 10;
const carriageReturn = 13;

/** The text with line feeds only and no byte-order mark, or the reason why it is none. */
function asText(bytes: Uint8Array): Uint8Array | string {
  if (bytes.length === 0) return "empty";
  if (bytes.includes(0)) return "binary: it holds zero bytes";
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    if (error instanceof TypeError) return "not UTF-8 text";
    throw error;
  }
  const start = bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? 3 : 0;
  const text = bytes.slice(start).filter((byte, i, all) => byte !== carriageReturn || all[i + 1] !== lineFeed);
  return text.some((byte) => byte > 32) ? text : "empty: it holds white space only";
}

function* filesBelow(folder: string, inside = ""): Generator<string> {
  const entries = readdirSync(folder, { withFileTypes: true });
  entries.sort((a, b) => (a.name < b.name ? -1 : 1));
  for (const entry of entries) {
    if (entry.name.startsWith(".") || entry.name === "node_modules") continue;
    const path = inside === "" ? entry.name : `${inside}/${entry.name}`;
    if (entry.isDirectory()) yield* filesBelow(join(folder, entry.name), path);
    else if (entry.isFile()) yield path;
  }
}

/**
 * Reads a text file, or all text files of a folder in the order of their paths (hidden ones and node_modules left out).
 * @throws UnsupportedError for a path that does not exist, a file that is empty or binary, a folder without text.
 */
export function readCorpus(path: string, options: CorpusOptions = {}): Corpus {
  const { name = basename(resolve(path)), accept = () => true, maxBytes = 64 * 2 ** 20 } = options;
  const found = statSync(path, { throwIfNoEntry: false });
  if (found === undefined) throw new UnsupportedError(`corpus ${path}: no such file or folder`);
  if (!found.isDirectory()) {
    const text = asText(readFileSync(path));
    if (typeof text === "string") throw new UnsupportedError(`corpus ${path}: ${text}; give a text file in UTF-8`);
    return { name, texts: [text], skipped: 0 };
  }
  const texts: Uint8Array[] = [];
  let bytes = 0;
  let skipped = 0;
  for (const file of filesBelow(path)) {
    if (!accept(file)) continue;
    const text = asText(readFileSync(join(path, file)));
    if (typeof text === "string") {
      skipped++;
      continue;
    }
    texts.push(text);
    bytes += text.length;
    if (bytes >= maxBytes) break;
  }
  if (texts.length === 0) {
    const reason = skipped === 0 ? "no files" : `none of its ${skipped} files is text in UTF-8`;
    throw new UnsupportedError(`corpus ${path}: ${reason}; give a folder with text files`);
  }
  return { name, texts, skipped };
}

/** Gives corpora of equal names the numbers 2, 3, ... */
export function distinctNames(corpora: readonly Corpus[]): readonly Corpus[] {
  const seen = new Map<string, number>();
  return corpora.map((corpus) => {
    const times = (seen.get(corpus.name) ?? 0) + 1;
    seen.set(corpus.name, times);
    return times === 1 ? corpus : { ...corpus, name: `${corpus.name} ${times}` };
  });
}

/** A small generator of numbers in [0, 1) for orders and choices on the host (mulberry32). */
export function hostRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** 0 ... count-1 in a random order (Fisher-Yates). */
export function shuffled(count: number, random: () => number): Int32Array {
  const order = Int32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    const kept = order[i] ?? 0;
    order[i] = order[j] ?? 0;
    order[j] = kept;
  }
  return order;
}

/** A byte that continues a character of UTF-8: 10xxxxxx. */
const isContinuation = (byte: number | undefined): boolean => ((byte ?? 0) & 0xc0) === 0x80;

/** Cuts text into blocks of about `size` bytes, each cut moved on to the next whole character; a short rest joins the last. */
export function cutBlocks(text: Uint8Array, size: number): readonly Uint8Array[] {
  const blocks: Uint8Array[] = [];
  let from = 0;
  while (from < text.length) {
    let to = text.length - from < 1.5 * size ? text.length : from + size;
    while (to < text.length && isContinuation(text[to])) to++;
    blocks.push(text.subarray(from, to));
    from = to;
  }
  return blocks;
}

export interface SplitOptions {
  readonly seed: number;
  /** Most bytes used of one corpus: whole files in an order that the seed decides, the last one cut; default 1.5 MB. */
  readonly limit?: number;
  /** Bytes in a block; default 10 kB, less for a corpus of under ten blocks. */
  readonly block?: number;
  /** Share of the blocks held out; default 0.02, at least one block. */
  readonly held?: number;
}

/** Files up to the limit, in the order of their paths, as one text. Files that do not end in a line feed get one. */
function chosenText(
  texts: readonly Uint8Array[],
  limit: number,
  random: () => number,
): { text: Uint8Array; files: number } {
  const taken = new Map<number, Uint8Array>();
  let room = limit;
  for (const id of shuffled(texts.length, random)) {
    if (room <= 0) break;
    const all = texts[id] ?? new Uint8Array(0);
    let end = Math.min(all.length, room);
    while (end < all.length && isContinuation(all[end])) end--;
    taken.set(id, all.subarray(0, end));
    room -= end;
    if (end < all.length) break;
  }
  const parts = [...taken].sort(([a], [b]) => a - b).map(([, part]) => part);
  const pieces = parts.flatMap((part, i) =>
    i + 1 < parts.length && part[part.length - 1] !== lineFeed ? [part, Uint8Array.of(lineFeed)] : [part],
  );
  return { text: Buffer.concat(pieces), files: parts.length };
}

/**
 * Holds out whole blocks of every corpus. The same seed gives the same blocks, and a corpus is split alike whatever stands beside it.
 * @throws UnsupportedError for a corpus of less than 2 kB, too little to train and measure on.
 */
export function splitCorpora(corpora: readonly Corpus[], options: SplitOptions): readonly Domain[] {
  const { seed, limit = 1_500_000, block = 10_000, held = 0.02 } = options;
  return distinctNames(corpora).map(({ name, texts }) => {
    const random = hostRandom(seed);
    const { text, files } = chosenText(texts, limit, random);
    if (text.length < 2000) {
      throw new UnsupportedError(
        `corpus ${name}: ${text.length} bytes are too little; give at least 2000 bytes of text`,
      );
    }
    const blocks = cutBlocks(text, Math.min(block, Math.floor(text.length / 10)));
    const order = shuffled(blocks.length, random);
    const out = Math.max(1, Math.round(held * blocks.length));
    const pick = (ids: Int32Array): Uint8Array[] => [...ids].sort((a, b) => a - b).map((id) => blocks[id] ?? text);
    return { name, files, training: pick(order.subarray(out)), validation: pick(order.subarray(0, out)) };
  });
}

/** Bytes in a list of blocks. */
export function byteLength(blocks: readonly Uint8Array[]): number {
  return blocks.reduce((sum, block) => sum + block.length, 0);
}
