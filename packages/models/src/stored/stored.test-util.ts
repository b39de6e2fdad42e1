// What the tests of stored matrices share: checkpoints in memory that note what is read of them, random matrices in every form, and
// naive decoders, element by element, from the definitions of the forms.
import type { Json } from "@switchyard/core";
import { type OpenCheckpoint, readCheckpoint } from "../checkpoint.ts";
import { bytesSource, encodeSafetensors } from "../safetensors.ts";
import type { HostMatrix } from "./host-matrix.ts";

export interface RawTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}
export type RawTensors = Readonly<Record<string, RawTensor>>;
export type Config = { readonly [key: string]: Json };

export interface Watched {
  readonly checkpoint: OpenCheckpoint;
  /** Bytes read of each tensor since the checkpoint was opened. */
  readonly reads: ReadonlyMap<string, number>;
}

/** A checkpoint of these tensors, through the real writer and reader. */
export async function checkpointOf(tensors: RawTensors, config: Config = {}): Promise<Watched> {
  const pieces: Uint8Array[] = [];
  const sources = Object.entries(tensors).map(([name, { dtype, shape, bytes }]) => ({
    name,
    dtype,
    shape,
    bytes: () => bytes,
  }));
  for await (const piece of encodeSafetensors(sources)) pieces.push(piece);
  const files = new Map([
    ["model.safetensors", Buffer.concat(pieces)],
    ["config.json", Buffer.from(JSON.stringify(config))],
  ]);
  const open = await readCheckpoint(async (name) => {
    const bytes = files.get(name);
    return bytes && bytesSource(name, new Uint8Array(bytes));
  }, "memory");
  const reads = new Map<string, number>();
  const checkpoint: OpenCheckpoint = {
    ...open,
    async read(name, range) {
      const bytes = await open.read(name, range);
      reads.set(name, (reads.get(name) ?? 0) + bytes.length);
      return bytes;
    },
  };
  return { checkpoint, reads };
}

/** Numbers that are the same in every run (mulberry32). */
export function draws(seed: number): { bits(n: number): Uint8Array; below(n: number): number } {
  let state = seed | 0;
  const next = (): number => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return (x ^ (x >>> 14)) >>> 0;
  };
  return { bits: (n) => Uint8Array.from({ length: n }, () => next() & 255), below: (n) => next() % n };
}

// ---------------------------------------------------------------------------------------------- naive decoders

const power = (e: number): number => 2 ** e;

/** Sign, exponent and fraction of an IEEE-like number; `special`: the highest exponent holds infinity and NaN. */
function ieee(bits: number, exponentBits: number, fractionBits: number, special: boolean): number {
  const fraction = bits % power(fractionBits);
  const exponent = Math.floor(bits / power(fractionBits)) % power(exponentBits);
  const sign = Math.floor(bits / power(fractionBits + exponentBits)) === 1 ? -1 : 1;
  const bias = power(exponentBits - 1) - 1;
  if (special && exponent === power(exponentBits) - 1) return fraction === 0 ? sign * Infinity : Number.NaN;
  if (exponent === 0) return sign * (fraction / power(fractionBits)) * power(1 - bias);
  return sign * (1 + fraction / power(fractionBits)) * power(exponent - bias);
}

/** Element i of a stored tensor of floats. */
export function element({ dtype, bytes }: RawTensor, i: number): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  switch (dtype) {
    case "F64":
      return view.getFloat64(8 * i, true);
    case "F32":
      return view.getFloat32(4 * i, true);
    case "F16":
      return ieee(view.getUint16(2 * i, true), 5, 10, true);
    case "BF16":
      return ieee(view.getUint16(2 * i, true), 8, 7, true);
    case "F8_E4M3": {
      const code = view.getUint8(i);
      return code % 128 === 127 ? Number.NaN : ieee(code, 4, 3, false);
    }
    case "F8_E8M0":
      return view.getUint8(i) === 255 ? Number.NaN : power(view.getUint8(i) - 127);
    case "I8":
      return view.getInt8(i);
    default:
      throw new Error(`no decoder for ${dtype}`);
  }
}

/** Code c of a line of words: the first in the lowest bits, as many as fit whole, offset by half their range. */
export function packedCode(words: RawTensor, word: number, c: number, bits: number): number {
  const view = new DataView(words.bytes.buffer, words.bytes.byteOffset);
  const value = BigInt.asUintN(32, BigInt(view.getInt32(4 * word, true)));
  const code = (value >> BigInt(bits * c)) & (2n ** BigInt(bits) - 1n);
  return Number(code) - power(bits - 1);
}

const e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
/** Value of element i of a row of MXFP4 blocks. */
export function microscaled(blocks: RawTensor, scales: RawTensor, row: number, i: number): number {
  const groups = scales.shape.at(-1) ?? 0;
  const byte = blocks.bytes[(row * groups + Math.floor(i / 32)) * 16 + Math.floor((i % 32) / 2)] ?? Number.NaN;
  const nibble = i % 2 === 0 ? byte % 16 : Math.floor(byte / 16);
  const exponent = scales.bytes[row * groups + Math.floor(i / 32)] ?? Number.NaN;
  const magnitude = e2m1[nibble % 8] ?? Number.NaN;
  return (nibble < 8 ? magnitude : -magnitude) * (exponent === 255 ? Number.NaN : power(exponent - 127));
}

/** The same numbers: NaN for NaN, and zeros of the same sign. */
export const sameNumbers = (a: ArrayLike<number>, b: ArrayLike<number>): boolean =>
  a.length === b.length && Array.prototype.every.call(a, (x: number, i: number) => Object.is(x, b[i]));

/** Whether arrays have the lengths that the shape and the groups ask for. */
export function wellFormed(host: HostMatrix): boolean {
  const size = host.shape.reduce((n, d) => n * d, 1);
  if (host.kind === "floats") {
    const type = host.dtype === "f32" ? Float32Array : Uint16Array;
    return host.data instanceof type && host.data.length === size;
  }
  const { format, shape, group, rows, codes, scales, zeros } = host;
  const [out = 0, inner = 0] = shape.slice(-2);
  const outer = shape.slice(0, -2).reduce((n, d) => n * d, 1);
  const grid = outer * Math.ceil(out / rows) * Math.ceil(inner / group);
  const packed = format === "int4" || format === "mxfp4";
  return (
    codes.length === (packed ? size / 2 : size) &&
    scales.length === grid &&
    scales instanceof (format === "mxfp4" ? Uint8Array : Float32Array) &&
    (zeros === undefined || zeros.length === grid) &&
    (format === "fp8" || (rows === 1 && inner % group === 0))
  );
}
