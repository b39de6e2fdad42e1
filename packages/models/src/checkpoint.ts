// A checkpoint in the Hugging Face layout: config.json beside model.safetensors, or beside shards and their index.
// Lazy: opening reads headers only, and `read` fetches just the bytes asked for.
import type { Json } from "@switchyard/core";
import { CheckpointError } from "@switchyard/core";
import { folderFiles, isPlainName } from "./files.ts";
import { type JsonLimits, parseUntrusted } from "./json.ts";
import type { Checkpoint } from "./model.ts";
import { readPlaced } from "./read-parts.ts";
import {
  type ByteSource,
  maximumTensors,
  pickleAdvice,
  quote,
  readExactly,
  readHeader,
  type StoredTensor,
} from "./safetensors.ts";

/** A checkpoint that holds files open until it is closed. */
export interface OpenCheckpoint extends Checkpoint {
  close(): Promise<void>;
  /** A JSON file beside the weights (tokenizer.json); undefined where there is none. */
  json(name: string): Promise<{ readonly [key: string]: Json } | undefined>;
  /** A text beside the weights (chat_template.jinja); undefined where there is none. */
  text(name: string): Promise<string | undefined>;
  /** Whether there is such a file beside the weights. */
  has(name: string): Promise<boolean>;
}

/** Opens a file of the checkpoint by its name; undefined where there is none. */
export type OpenFile = (name: string) => Promise<ByteSource | undefined>;

/** In bytes. A vocabulary of a million entries takes about 50 MB, a config hardly ever more than 100 kB. */
const maximumJson = 200_000_000;
const maximumConfig = 16_000_000;
const maximumText = 16_000_000;
const maximumShards = 10_000;

async function decodeText(source: ByteSource, size: number, what: string): Promise<string> {
  if (source.size > size) {
    throw new CheckpointError(`${source.name} has ${source.size} bytes; at most ${size} are allowed`);
  }
  const bytes = await readExactly(source, 0, source.size);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new CheckpointError(`${source.name} is not ${what}: it is not UTF-8`, { cause });
  }
}

async function parseJson(
  source: ByteSource,
  { size, ...limits }: JsonLimits & { readonly size: number },
): Promise<{ readonly [key: string]: Json }> {
  const value = parseUntrusted(await decodeText(source, size, "valid JSON"), source.name, limits);
  if (!isRecord(value)) throw new CheckpointError(`${source.name} must hold a JSON object`);
  return value;
}

/** Whether a JSON value is an object, not a list. */
export const isRecord = (value: Json | undefined): value is { readonly [key: string]: Json } =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const pickle = /\.(bin|ckpt|pickle|pkl|pt|pth)$/i;
/** Where the names of a folder cannot be listed, these are asked for. */
const usualPickles = [
  "pytorch_model.bin.index.json",
  "pytorch_model.bin",
  "consolidated.00.pth",
  "model.pt",
  "model.pth",
];
const isPickle = (name: string): boolean => pickle.test(name) || name === "pytorch_model.bin.index.json";

async function readText(open: OpenFile, name: string): Promise<string | undefined> {
  const source = await open(name);
  if (!source) return undefined;
  try {
    return await decodeText(source, maximumText, "a text");
  } finally {
    await source.close?.();
  }
}

async function readJson(
  open: OpenFile,
  name: string,
  limits: JsonLimits & { readonly size: number },
): Promise<{ readonly [key: string]: Json } | undefined> {
  const source = await open(name);
  if (!source) return undefined;
  try {
    return await parseJson(source, limits);
  } finally {
    await source.close?.();
  }
}

export const indexName = "model.safetensors.index.json";

/** The index of a checkpoint's shards, undefined where it has none. */
export const readIndex = (open: OpenFile): Promise<{ readonly [key: string]: Json } | undefined> =>
  readJson(open, indexName, { size: maximumJson });

/** Which tensor lies in which file: { file: names or undefined for all }. */
export async function weightFiles(open: OpenFile, where: string): Promise<Map<string, Set<string> | undefined>> {
  const index = await readIndex(open);
  if (!index) return new Map([["model.safetensors", undefined]]);
  const map = index.weight_map;
  if (!isRecord(map)) throw new CheckpointError(`${where}: model.safetensors.index.json has no weight_map`);
  const entries = Object.entries(map);
  if (entries.length > maximumTensors) {
    throw new CheckpointError(`${where}: the index lists more than ${maximumTensors} tensors`);
  }
  const files = new Map<string, Set<string> | undefined>();
  for (const [name, file] of entries) {
    if (typeof file === "string" && pickle.test(file)) {
      throw new CheckpointError(`${where}: the index places ${quote(name)} in ${quote(file)}. ${pickleAdvice}`);
    }
    // The name comes from a download: it must not lead out of the folder.
    if (typeof file !== "string" || !isPlainName(file) || !file.endsWith(".safetensors")) {
      const found = quote(JSON.stringify(file));
      throw new CheckpointError(`${where}: the index places ${quote(name)} in ${found}, which is no file name`);
    }
    const names = files.get(file) ?? new Set<string>();
    files.set(file, names.add(name));
    if (files.size > maximumShards) throw new CheckpointError(`${where}: the index lists over ${maximumShards} files`);
  }
  return files;
}

export interface ReadOptions {
  /** Names of the files that `open` knows; without it only the usual names of pickles are tried for the error. */
  list?(): Promise<readonly string[]>;
}

/** What to say where there are no weights: the reason, if they are there as pickles. */
async function withoutWeights(open: OpenFile, where: string, { list }: ReadOptions): Promise<CheckpointError> {
  const pickles = list ? (await list()).filter(isPickle).sort() : [];
  for (const name of list ? [] : usualPickles) {
    const source = await open(name);
    await source?.close?.();
    if (source) pickles.push(name);
  }
  const [first] = pickles;
  if (first === undefined) return new CheckpointError(`${where} has no model.safetensors`);
  return new CheckpointError(`${where} has no safetensors files, only ${quote(first)}. ${pickleAdvice}`);
}

function checkRange(
  name: string,
  { start, end, size }: { readonly start: number; readonly end: number; readonly size: number },
): void {
  if (Number.isSafeInteger(start) && Number.isSafeInteger(end) && start >= 0 && start <= end && end <= size) return;
  throw new CheckpointError(`cannot read bytes ${start} to ${end} of tensor ${quote(name)}: it has ${size}`);
}

/**
 * A checkpoint over any set of files, for example downloads in a browser. `where` is shown in errors.
 * Throws CheckpointError where config.json or the weights are missing, damaged or do not fit their index, where JSON has
 * equal keys, `__proto__` or endless nesting, where a shard's name leads out of the folder, and for pickles.
 */
export async function readCheckpoint(
  open: OpenFile,
  where: string,
  options: ReadOptions = {},
): Promise<OpenCheckpoint> {
  const config = await readJson(open, "config.json", { size: maximumConfig });
  if (!config) {
    throw new CheckpointError(`${where} has no config.json: it is no checkpoint, or a save was interrupted`);
  }
  const sources: ByteSource[] = [];
  const tensors = new Map<string, StoredTensor & { readonly source: ByteSource }>();
  const close = async (): Promise<void> => {
    for (const source of sources.splice(0)) await source.close?.();
  };
  try {
    for (const [file, expected] of await weightFiles(open, where)) {
      const source = await open(file);
      if (!source)
        throw expected ? new CheckpointError(`${where} has no ${file}`) : await withoutWeights(open, where, options);
      sources.push(source);
      const header = await readHeader(source);
      for (const name of expected ?? []) {
        if (!header.tensors.has(name)) {
          throw new CheckpointError(`${source.name} lacks the tensor ${quote(name)} that the index places there`);
        }
      }
      for (const [name, stored] of header.tensors) {
        if (expected && !expected.has(name)) {
          throw new CheckpointError(
            `${source.name} holds the tensor ${quote(name)}, which the index does not place there`,
          );
        }
        tensors.set(name, { ...stored, source });
      }
    }
  } catch (error) {
    await close();
    throw error;
  }
  const find = (name: string): StoredTensor & { readonly source: ByteSource } => {
    const found = tensors.get(name);
    if (!found) throw new CheckpointError(`${where} has no tensor ${quote(name)}; it has ${tensors.size} others`);
    return found;
  };
  return {
    config,
    names: [...tensors.keys()],
    stored(name) {
      const { shape, dtype, from, to } = find(name);
      return { shape, dtype, bytes: to - from };
    },
    async read(name, range) {
      const { from, to, source } = find(name);
      const [start, end] = range ?? [0, to - from];
      checkRange(name, { start, end, size: to - from });
      return readExactly(source, from + start, from + end);
    },
    async readInto(target, name, start) {
      const { from, to, source } = find(name);
      checkRange(name, { start, end: start + target.length, size: to - from });
      if (source.readInto) await source.readInto(target, from + start);
      else target.set(await readExactly(source, from + start, from + start + target.length));
    },
    readParts: async (parts) =>
      readPlaced(
        parts.map(({ name, from: start, to: end, put, into }) => {
          const { from, to, source } = find(name);
          checkRange(name, { start, end, size: to - from });
          return { source, from: from + start, to: from + end, put, ...(into ? { into } : {}) };
        }),
      ),
    // A vocabulary may hold the word __proto__; as a key of its own it does no harm.
    json: (name) => readJson(open, name, { size: maximumJson, anyKey: true }),
    text: (name) => readText(open, name),
    async has(name) {
      const source = await open(name);
      await source?.close?.();
      return source !== undefined;
    },
    close,
  };
}

/**
 * Opens the checkpoint in a folder (Node). Close it when done; nothing but headers is read until asked. Links that lead
 * out of the folder are refused unless `followLinks` (default false); those of the Hugging Face Hub's cache are known.
 * Throws CheckpointError as `readCheckpoint` does.
 */
export async function openCheckpoint(
  folder: string,
  options: { readonly followLinks?: boolean } = {},
): Promise<OpenCheckpoint> {
  const { open, list } = await folderFiles(folder, options);
  return readCheckpoint(open, folder, { list });
}
