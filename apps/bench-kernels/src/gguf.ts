// A GGUF file (version 3) of f32 and q8_0 tensors: what llama.cpp loads. Only as much of the format as the benchmark needs.
import { closeSync, openSync, writeSync } from "node:fs";
import { groupSize, quantize } from "./int8.ts";

export type GgufValue = string | number | { readonly float: number } | readonly string[] | readonly number[];
/** Of a tensor: ggml's number, and the bytes of a block of so many elements of a row. q8_0: a half, then 32 codes. */
const tensorTypes = {
  f32: { code: 0, block: 1, bytes: 4 },
  q8_0: { code: 8, block: groupSize, bytes: 2 + groupSize },
} as const;

export interface GgufTensor {
  readonly name: string;
  /** Row-major, as everywhere here; the file lists sizes the other way round. */
  readonly shape: readonly number[];
  /** Default f32. */
  readonly type?: keyof typeof tensorTypes;
  /** All of it, or parts one behind the other; made when it is written. */
  readonly data: Float32Array | (() => AsyncIterable<Float32Array>);
}

const types = { u32: 4, i32: 5, f32: 6, string: 8, array: 9 } as const;
const alignment = 32;
const aligned = (n: number): number => Math.ceil(n / alignment) * alignment;

function byteSize({ name, shape, type = "f32" }: Omit<GgufTensor, "data">): number {
  const { block, bytes } = tensorTypes[type];
  if ((shape.at(-1) ?? 0) % block !== 0)
    throw new Error(`GGUF tensor ${name} [${shape}]: ${type} needs rows of a multiple of ${block} elements`);
  return (shape.reduce((product, size) => product * size, 1) / block) * bytes;
}

/** Blocks of q8_0 from numbers whose count is a multiple of 32. */
export function q8(values: Float32Array): Uint8Array {
  const { codes, scales } = quantize(values);
  const { bytes } = tensorTypes.q8_0;
  const blocks = new Uint8Array(scales.length * bytes);
  const view = new DataView(blocks.buffer);
  for (const [i, scale] of scales.entries()) {
    view.setUint16(i * bytes, scale, true);
    blocks.set(codes.subarray(i * groupSize, (i + 1) * groupSize), i * bytes + 2);
  }
  return blocks;
}

class Bytes {
  readonly parts: Buffer[] = [];
  size = 0;
  add(part: Buffer): void {
    this.parts.push(part);
    this.size += part.length;
  }
  u32(x: number): void {
    const part = Buffer.alloc(4);
    part.writeUInt32LE(x);
    this.add(part);
  }
  i32(x: number): void {
    const part = Buffer.alloc(4);
    part.writeInt32LE(x);
    this.add(part);
  }
  f32(x: number): void {
    const part = Buffer.alloc(4);
    part.writeFloatLE(x);
    this.add(part);
  }
  u64(x: number): void {
    const part = Buffer.alloc(8);
    part.writeBigUInt64LE(BigInt(x));
    this.add(part);
  }
  text(x: string): void {
    const part = Buffer.from(x);
    this.u64(part.length);
    this.add(part);
  }
  value(x: GgufValue): void {
    if (typeof x === "string") {
      this.u32(types.string);
      this.text(x);
    } else if (typeof x === "number") {
      this.u32(types.u32);
      this.u32(x);
    } else if ("float" in x) {
      this.u32(types.f32);
      this.f32(x.float);
    } else {
      const strings = typeof x[0] === "string";
      this.u32(types.array);
      this.u32(strings ? types.string : types.i32);
      this.u64(x.length);
      for (const item of x) typeof item === "string" ? this.text(item) : this.i32(item);
    }
  }
}

/** The bytes before the tensors' data. Numbers are u32, { float } f32; lists hold strings or i32. */
export function ggufHeader(
  keys: Readonly<Record<string, GgufValue>>,
  tensors: readonly Omit<GgufTensor, "data">[],
): Buffer {
  const head = new Bytes();
  head.add(Buffer.from("GGUF"));
  head.u32(3);
  head.u64(tensors.length);
  head.u64(Object.keys(keys).length);
  for (const [key, value] of Object.entries(keys)) {
    head.text(key);
    head.value(value);
  }
  let offset = 0;
  for (const tensor of tensors) {
    const { name, shape, type = "f32" } = tensor;
    head.text(name);
    head.u32(shape.length);
    for (const size of shape.toReversed()) head.u64(size);
    head.u32(tensorTypes[type].code);
    head.u64(offset);
    offset = aligned(offset + byteSize(tensor));
  }
  head.add(Buffer.alloc(aligned(head.size) - head.size));
  return Buffer.concat(head.parts);
}

/** Throws an Error where a tensor does not have as many elements as its shape says. */
export async function writeGguf(
  path: string,
  keys: Readonly<Record<string, GgufValue>>,
  tensors: readonly GgufTensor[],
): Promise<void> {
  const file = openSync(path, "w");
  try {
    writeSync(file, ggufHeader(keys, tensors));
    for (const tensor of tensors) {
      const { name, shape, type = "f32", data } = tensor;
      let written = 0;
      for await (const part of data instanceof Float32Array ? [data] : data()) {
        const bytes = type === "q8_0" ? q8(part) : new Uint8Array(part.buffer, part.byteOffset, part.byteLength);
        written += writeSync(file, bytes);
      }
      if (written !== byteSize(tensor))
        throw new Error(`GGUF tensor ${name} [${shape}] has ${written} bytes of ${type}, expected ${byteSize(tensor)}`);
      writeSync(file, Buffer.alloc(aligned(written) - written));
    }
  } finally {
    closeSync(file);
  }
}
