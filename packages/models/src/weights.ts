// Moving tensors between a model and a checkpoint: reading with the shape checked, and writing without a second copy.
import {
  CheckpointError,
  type DType,
  type Engine,
  type Json,
  type Tensor,
  type TypedArray,
  UnsupportedError,
} from "@switchyard/core";
import type { Checkpoint } from "./model.ts";
import { quote, type TensorSource, toFloat32 } from "./safetensors.ts";

/** What an architecture hands to the writer of a checkpoint. */
export interface CheckpointContent {
  readonly config: { readonly [key: string]: Json };
  readonly tensors: readonly TensorSource[];
}

/** Names of element types in files. */
export const fileTypes: { readonly [D in DType]: string } = {
  f32: "F32",
  bf16: "BF16",
  f16: "F16",
  i32: "I32",
  u8: "U8",
};

/** The bytes of a host array as they stand in a file; f64 storage is rounded to f32. */
export function bytesOf(data: TypedArray): Uint8Array {
  const stored = data instanceof Float64Array ? Float32Array.from(data) : data;
  return new Uint8Array(stored.buffer, stored.byteOffset, stored.byteLength);
}

/** A tensor to be written as it is; read from the device when its turn comes. */
export const stored = (name: string, x: Tensor): TensorSource => ({
  name,
  dtype: fileTypes[x.dtype],
  shape: x.shape,
  bytes: async () => bytesOf(await x.data()),
});

/** Throws CheckpointError unless the checkpoint has a tensor of this name and shape. */
export function expectShape(checkpoint: Checkpoint, name: string, shape: readonly number[]): void {
  const found = checkpoint.stored(name);
  if (found.shape.join() !== shape.join()) {
    throw new CheckpointError(`tensor ${quote(name)} is [${found.shape}], but config.json asks for [${shape}]`);
  }
}

/** A stored float tensor widened to f32 on the host. */
export async function readFloats(
  checkpoint: Checkpoint,
  name: string,
  shape: readonly number[],
): Promise<Float32Array> {
  expectShape(checkpoint, name, shape);
  return toFloat32(await checkpoint.read(name), checkpoint.stored(name).dtype, name);
}

/** A stored tensor on an engine: floats become f32, I32 and U8 stay. */
export async function readTensor(
  engine: Engine,
  checkpoint: Checkpoint,
  name: string,
  shape: readonly number[],
): Promise<Tensor> {
  expectShape(checkpoint, name, shape);
  const { dtype } = checkpoint.stored(name);
  if (dtype === "I32" || dtype === "U8") {
    const bytes = await checkpoint.read(name);
    const data = dtype === "U8" ? bytes : new Int32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
    return engine.tensor(data, shape);
  }
  return engine.tensor(await readFloats(checkpoint, name, shape), shape);
}

/**
 * Throws CheckpointError where config.json asks for more layers or experts than there are tensors: such a number would
 * cost time and memory before the first missing tensor is noticed.
 */
export function checkCounts(checkpoint: Pick<Checkpoint, "names">, counts: Readonly<Record<string, number>>): void {
  for (const [what, count] of Object.entries(counts)) {
    if (count > checkpoint.names.length) {
      throw new CheckpointError(
        `config.json asks for ${count} ${what}, but the checkpoint has only ${checkpoint.names.length} tensors`,
      );
    }
  }
}

/** Throws UnsupportedError where the parameters in f32 would not fit into the memory the caller allows. */
export function checkMemory(shapes: Iterable<readonly number[]>, memory: number | undefined): void {
  if (memory === undefined) return;
  let bytes = 0;
  for (const shape of shapes) bytes += 4 * shape.reduce((n, d) => n * d, 1);
  if (bytes > memory) {
    throw new UnsupportedError(
      `the model needs ${bytes} bytes in f32, but the limit is ${memory}; raise it or take a smaller model`,
    );
  }
}

/** Throws CheckpointError where the checkpoint holds tensors that nobody asked for: it is of another model. */
export function checkAllUsed(
  checkpoint: Checkpoint,
  used: ReadonlySet<string>,
  ignore: (name: string) => boolean,
): void {
  const extra = checkpoint.names.filter((name) => !used.has(name) && !ignore(name));
  if (extra.length === 0) return;
  const some = extra.slice(0, 3).map(quote).join(", ");
  throw new CheckpointError(
    `the checkpoint holds ${extra.length} tensors that its config.json does not call for: ${some}`,
  );
}
