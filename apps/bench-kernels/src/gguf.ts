// A GGUF file (version 3) of f32 tensors: what llama.cpp loads. Only as much of the format as the benchmark needs.
import { closeSync, openSync, writeSync } from "node:fs";

export type GgufValue = string | number | { readonly float: number } | readonly string[] | readonly number[];
export interface GgufTensor {
  readonly name: string;
  /** Row-major, as everywhere here; the file lists sizes the other way round. */
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

const types = { u32: 4, i32: 5, f32: 6, string: 8, array: 9 } as const;
const alignment = 32;
const aligned = (n: number): number => Math.ceil(n / alignment) * alignment;

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
  for (const { name, shape } of tensors) {
    head.text(name);
    head.u32(shape.length);
    for (const size of shape.toReversed()) head.u64(size);
    head.u32(0); // f32
    head.u64(offset);
    offset = aligned(offset + 4 * shape.reduce((product, size) => product * size, 1));
  }
  head.add(Buffer.alloc(aligned(head.size) - head.size));
  return Buffer.concat(head.parts);
}

export function writeGguf(
  path: string,
  keys: Readonly<Record<string, GgufValue>>,
  tensors: readonly GgufTensor[],
): void {
  const file = openSync(path, "w");
  try {
    writeSync(file, ggufHeader(keys, tensors));
    for (const { data } of tensors) {
      writeSync(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
      writeSync(file, Buffer.alloc(aligned(data.byteLength) - data.byteLength));
    }
  } finally {
    closeSync(file);
  }
}
