// A checkpoint in the Hugging Face layout: config.json beside model.safetensors, or beside shards and their index.
// Lazy: opening reads headers only, and `read` fetches just the bytes asked for.
import type { Json } from "@switchyard/core";
import { CheckpointError } from "@switchyard/core";
import { builtIn } from "./built-in.ts";
import { fileSource } from "./files.ts";
import type { Checkpoint } from "./model.ts";
import { type ByteSource, quote, readHeader, type StoredTensor } from "./safetensors.ts";

/** A checkpoint that holds files open until it is closed. */
export interface OpenCheckpoint extends Checkpoint {
  close(): Promise<void>;
  /** A JSON file beside the weights (tokenizer.json); undefined where there is none. */
  json(name: string): Promise<{ readonly [key: string]: Json } | undefined>;
}

/** Opens a file of the checkpoint by its name; undefined where there is none. */
export type OpenFile = (name: string) => Promise<ByteSource | undefined>;

/** A vocabulary of a million entries takes about 50 MB. */
const maximumJson = 200_000_000;

async function parseJson(source: ByteSource): Promise<{ readonly [key: string]: Json }> {
  if (source.size > maximumJson) {
    throw new CheckpointError(`${source.name} has ${source.size} bytes; at most ${maximumJson} are allowed`);
  }
  const bytes = await source.read(0, source.size);
  let value: Json;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)) as Json;
  } catch (cause) {
    throw new CheckpointError(`${source.name} is not valid JSON: ${cause instanceof Error ? cause.message : cause}`, {
      cause,
    });
  }
  if (!isRecord(value)) throw new CheckpointError(`${source.name} must hold a JSON object`);
  return value;
}

/** Whether a JSON value is an object, not a list. */
export const isRecord = (value: Json | undefined): value is { readonly [key: string]: Json } =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const shardName = /^[^/\\:]+\.safetensors$/;

async function readJson(open: OpenFile, name: string): Promise<{ readonly [key: string]: Json } | undefined> {
  const source = await open(name);
  if (!source) return undefined;
  try {
    return await parseJson(source);
  } finally {
    await source.close?.();
  }
}

/** Which tensor lies in which file: { file: names or undefined for all }. */
async function listFiles(open: OpenFile, where: string): Promise<Map<string, Set<string> | undefined>> {
  const index = await readJson(open, "model.safetensors.index.json");
  if (!index) return new Map([["model.safetensors", undefined]]);
  const map = index.weight_map;
  if (!isRecord(map)) throw new CheckpointError(`${where}: model.safetensors.index.json has no weight_map`);
  const files = new Map<string, Set<string> | undefined>();
  for (const [name, file] of Object.entries(map)) {
    // The name comes from a download: it must not lead out of the folder.
    if (typeof file !== "string" || !shardName.test(file)) {
      const found = quote(JSON.stringify(file));
      throw new CheckpointError(`${where}: the index places ${quote(name)} in ${found}, which is no file name`);
    }
    const names = files.get(file) ?? new Set<string>();
    files.set(file, names.add(name));
  }
  return files;
}

/**
 * A checkpoint over any set of files, for example downloads in a browser. `where` is shown in errors.
 * Throws CheckpointError where config.json or the weights are missing, damaged or do not fit their index.
 */
export async function readCheckpoint(open: OpenFile, where: string): Promise<OpenCheckpoint> {
  const config = await readJson(open, "config.json");
  if (!config) {
    throw new CheckpointError(`${where} has no config.json: it is no checkpoint, or a save was interrupted`);
  }
  const sources: ByteSource[] = [];
  const tensors = new Map<string, StoredTensor & { readonly source: ByteSource }>();
  const close = async (): Promise<void> => {
    for (const source of sources.splice(0)) await source.close?.();
  };
  try {
    for (const [file, expected] of await listFiles(open, where)) {
      const source = await open(file);
      if (!source) throw new CheckpointError(`${where} has no ${file}`);
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
      if (
        !(Number.isSafeInteger(start) && Number.isSafeInteger(end) && start >= 0 && start <= end && end <= to - from)
      ) {
        throw new CheckpointError(`cannot read bytes ${start} to ${end} of tensor ${quote(name)}: it has ${to - from}`);
      }
      return source.read(from + start, from + end);
    },
    json: (name) => readJson(open, name),
    close,
  };
}

/** Opens the checkpoint in a folder (Node). Close it when done; nothing but headers is read until asked. */
export async function openCheckpoint(folder: string): Promise<OpenCheckpoint> {
  const { join } = await builtIn("node:path");
  return readCheckpoint((name) => fileSource(join(folder, name)), folder);
}
