// A trainer's snapshot as one safetensors file, replaced in one rename, so that an interrupted save leaves the earlier
// one, with a checksum: a flipped bit in a moment or a history would be trained on unnoticed.
import { CheckpointError, type DType, type Json, type TypedArray, UnsupportedError } from "@switchyard/core";
import type { SnapshotArray, TrainerSnapshot } from "@switchyard/core/train";
import { builtIn } from "./built-in.ts";
import { fileSource, saveFiles } from "./files.ts";
import { encodeSafetensors, quote, readHeader } from "./safetensors.ts";

const fileType = (data: TypedArray): string => {
  if (data instanceof Float32Array) return "F32";
  if (data instanceof Float64Array) return "F64";
  if (data instanceof Int32Array) return "I32";
  if (data instanceof Uint8Array) return "U8";
  throw new UnsupportedError("writeSnapshot: training state is f32, i32 or u8");
};
const types: ReadonlyMap<string, readonly [DType, (bytes: Uint8Array) => TypedArray]> = new Map([
  ["F32", ["f32", ({ buffer }) => new Float32Array(buffer)]],
  ["F64", ["f32", ({ buffer }) => new Float64Array(buffer)]],
  ["I32", ["i32", ({ buffer }) => new Int32Array(buffer)]],
  ["U8", ["u8", (bytes) => bytes]],
]);

const bytesOf = (data: TypedArray): Uint8Array => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

/** SHA-256 of the description and of every array, in the order of their names. */
async function checksum(text: string, arrays: TrainerSnapshot["arrays"]): Promise<string> {
  const { createHash } = await builtIn("node:crypto");
  const hash = createHash("sha256").update(text);
  const sorted = Object.entries(arrays).sort(([a], [b]) => (a < b ? -1 : 1));
  for (const [name, { data, shape, dtype }] of sorted) {
    hash.update(`\n${name} ${dtype} [${shape.join()}]\n`).update(bytesOf(data));
  }
  return hash.digest("hex");
}

/**
 * Writes a snapshot to a file (Node). Throws CheckpointError where it cannot be written; the earlier file is then
 * untouched.
 */
export async function writeSnapshot(path: string, snapshot: TrainerSnapshot): Promise<void> {
  const { basename, dirname } = await builtIn("node:path");
  const tensors = Object.entries(snapshot.arrays).map(([name, { data, shape }]) => ({
    name,
    dtype: fileType(data),
    shape,
    bytes: () => bytesOf(data),
  }));
  const text = JSON.stringify(snapshot.json);
  const sha256 = await checksum(text, snapshot.arrays);
  const content = () => encodeSafetensors(tensors, { snapshot: text, sha256 });
  await saveFiles(dirname(path), [{ name: basename(path), content }], { last: basename(path) });
}

/**
 * Reads a snapshot back; `trainer.restore` checks that it fits. Throws CheckpointError where the file is missing or
 * damaged.
 */
export async function readSnapshot(path: string): Promise<TrainerSnapshot> {
  const source = await fileSource(path);
  if (!source) throw new CheckpointError(`cannot read ${path}: there is no such file`);
  try {
    const { metadata, tensors } = await readHeader(source);
    const text = metadata.get("snapshot");
    if (text === undefined) throw new CheckpointError(`${path} is no training snapshot`);
    let json: Json;
    try {
      json = JSON.parse(text) as Json;
    } catch (cause) {
      throw new CheckpointError(`${path} is damaged: its description is not valid JSON`, { cause });
    }
    const arrays: Record<string, SnapshotArray> = {};
    for (const [name, { dtype, shape, from, to }] of tensors) {
      const type = types.get(dtype);
      if (!type) throw new CheckpointError(`${path}: array ${quote(name)} is ${dtype}, which is no training state`);
      const [storage, view] = type;
      arrays[name] = { data: view(await source.read(from, to)), shape, dtype: storage };
    }
    if ((await checksum(text, arrays)) !== metadata.get("sha256")) {
      throw new CheckpointError(`${path}: the snapshot is damaged (its checksum does not fit); start the run anew`);
    }
    return { arrays, json };
  } finally {
    await source.close();
  }
}
