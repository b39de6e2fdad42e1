// Files of a run: written whole or not at all, and a file for a trainer's snapshot that notices damage. Runs in Node.
import { createHash, randomUUID } from "node:crypto";
import {
  closeSync,
  existsSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { CheckpointError, type DType, type TypedArray } from "@switchyard/core";
import type { TrainerSnapshot } from "@switchyard/core/train";
import * as v from "valibot";
import { parseJson } from "./results.ts";

const reasons: ReadonlyMap<string, string> = new Map([
  ["ENOSPC", "the disk is full"],
  ["EDQUOT", "the disk quota is used up"],
  ["EFBIG", "the file would be larger than this disk or user may have"],
  ["EACCES", "permission denied"],
  ["EPERM", "permission denied"],
  ["EROFS", "the file system is read-only"],
  ["ENOTDIR", "a part of the path is a file"],
  ["EEXIST", "a file of that name is in the way"],
  ["ENOENT", "no such file or folder"],
  ["EISDIR", "it is a folder"],
]);

/** What went wrong with a file, in words; errors without a system code are passed on. */
function explained(what: string, error: unknown): unknown {
  const code = error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
  if (code === undefined) return error;
  return new CheckpointError(`${what}: ${reasons.get(code) ?? code}`, { cause: error });
}

/** Writes a file beside its place, syncs it and renames it. A failure leaves what was there before and no other file. */
export function writeWhole(path: string, pieces: readonly (string | Uint8Array)[]): void {
  const fresh = join(dirname(path), `.${basename(path)}.${randomUUID().slice(0, 8)}.new`);
  try {
    const file = openSync(fresh, "wx");
    try {
      for (const piece of pieces) {
        const bytes = typeof piece === "string" ? Buffer.from(piece) : piece;
        let done = 0;
        while (done < bytes.length) done += writeSync(file, bytes, done, bytes.length - done);
      }
      fsyncSync(file);
    } finally {
      closeSync(file);
    }
    renameSync(fresh, path);
  } catch (error) {
    rmSync(fresh, { force: true });
    throw explained(`cannot write ${path}`, error);
  }
}

/** Makes a folder, with a trial file, so that a place which cannot be written to is noticed before any work is done. */
export function writableFolder(path: string): void {
  try {
    mkdirSync(path, { recursive: true });
  } catch (error) {
    throw explained(`cannot make the folder ${path}`, error);
  }
  const trial = join(path, ".trial");
  writeWhole(trial, ["x"]);
  rmSync(trial);
}

/** Text of a file. @throws CheckpointError with the reason. */
export function readText(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw explained(`cannot read ${path}`, error);
  }
}

const magic = "switchyard snapshot 1\n";
const bytesOf = (array: TypedArray): Uint8Array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

const kinds = {
  f32: Float32Array,
  f64: Float64Array,
  i32: Int32Array,
  u8: Uint8Array,
  u16: Uint16Array,
} as const;
type Kind = keyof typeof kinds;

function kindOf(array: TypedArray): Kind {
  if (array instanceof Float32Array) return "f32";
  if (array instanceof Float64Array) return "f64";
  if (array instanceof Int32Array) return "i32";
  return array instanceof Uint8Array ? "u8" : "u16";
}

const dtypes = ["f32", "f16", "bf16", "i32", "u8"] as const satisfies readonly DType[];
const headSchema = v.object({
  json: v.unknown(),
  more: v.unknown(),
  arrays: v.array(
    v.object({
      name: v.string(),
      kind: v.picklist(["f32", "f64", "i32", "u8", "u16"]),
      dtype: v.picklist(dtypes),
      shape: v.array(v.pipe(v.number(), v.integer(), v.minValue(0))),
      bytes: v.pipe(v.number(), v.integer(), v.minValue(0)),
    }),
  ),
});

/**
 * Saves a trainer's snapshot and more JSON beside it. Layout: a line of text, the SHA-256 of what follows, the head's length
 * (8 bytes, little-endian), the head as JSON, the arrays one after another as they lie in memory.
 */
export function writeSnapshot(path: string, snapshot: TrainerSnapshot, more: unknown): void {
  const arrays = Object.entries(snapshot.arrays);
  const head = {
    json: snapshot.json,
    more,
    arrays: arrays.map(([name, { data, shape, dtype }]) => ({
      name,
      kind: kindOf(data),
      dtype,
      shape,
      bytes: data.byteLength,
    })),
  };
  const text = Buffer.from(JSON.stringify(head));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const pieces = [length, text, ...arrays.map(([, { data }]) => bytesOf(data))];
  const hash = createHash("sha256");
  for (const piece of pieces) hash.update(piece);
  writeWhole(path, [magic, hash.digest(), ...pieces]);
}

/** Reads a snapshot back; undefined where there is none. @throws CheckpointError for a file that is damaged or something else. */
export function readSnapshot(path: string): { readonly snapshot: TrainerSnapshot; readonly more: unknown } | undefined {
  if (!existsSync(path)) return undefined;
  let file: Buffer;
  try {
    file = readFileSync(path);
  } catch (error) {
    throw explained(`cannot read ${path}`, error);
  }
  const start = magic.length + 32;
  if (file.length < start + 8 || file.subarray(0, magic.length).toString("latin1") !== magic) {
    throw new CheckpointError(`${path}: not a snapshot of this version of Switchyard`);
  }
  const body = file.subarray(start);
  if (!createHash("sha256").update(body).digest().equals(file.subarray(magic.length, start))) {
    throw new CheckpointError(`${path}: the snapshot is damaged (its checksum does not fit); start the run anew`);
  }
  const length = Number(body.readBigUInt64LE());
  const head = parseJson(headSchema, body.subarray(8, 8 + length).toString(), path);
  let at = 8 + length;
  const arrays = Object.fromEntries(
    head.arrays.map(({ name, kind, dtype, shape, bytes }) => {
      const copy = body.buffer.slice(body.byteOffset + at, body.byteOffset + at + bytes);
      at += bytes;
      return [name, { data: new kinds[kind](copy as ArrayBuffer), shape, dtype }];
    }),
  );
  return { snapshot: { json: head.json as TrainerSnapshot["json"], arrays }, more: head.more };
}

/** Removes a file if it is there. */
export function removeFile(path: string): void {
  if (existsSync(path)) rmSync(path);
}
