// Host numbers to and from the bytes of each storage type. On the device f16 and bf16 lie two to a word, u8 four.
import type { DType, TypedArray } from "@switchyard/core";

export const bytesPerElement = (dtype: DType): number =>
  dtype === "u8" ? 1 : dtype === "f16" || dtype === "bf16" ? 2 : 4;
export const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** The bytes of host numbers in a storage type. A Uint16Array for f16 or bf16 holds bits already. */
export function encodeData(data: TypedArray, dtype: DType): Uint8Array<ArrayBuffer> {
  const view = (x: ArrayBufferView): Uint8Array<ArrayBuffer> =>
    new Uint8Array(x.buffer as ArrayBuffer, x.byteOffset, x.byteLength);
  switch (dtype) {
    case "f32":
      return view(data instanceof Float32Array ? unshared(data) : Float32Array.from(data));
    case "i32":
      return view(data instanceof Int32Array ? unshared(data) : Int32Array.from(data));
    case "u8":
      return view(data instanceof Uint8Array ? unshared(data) : Uint8Array.from(data));
    case "f16":
      return view(data instanceof Uint16Array ? unshared(data) : Uint16Array.from(data, toHalf));
    case "bf16":
      return view(data instanceof Uint16Array ? unshared(data) : Uint16Array.from(data, toBrain));
    default:
      return dtype satisfies never;
  }
}
/** writeBuffer refuses shared memory. */
const unshared = <T extends TypedArray>(x: T): T =>
  typeof SharedArrayBuffer !== "undefined" && x.buffer instanceof SharedArrayBuffer ? (x.slice() as T) : x;

export function decodeData(bytes: Uint8Array<ArrayBuffer>, dtype: DType): TypedArray {
  switch (dtype) {
    case "f32":
      return new Float32Array(bytes.buffer);
    case "i32":
      return new Int32Array(bytes.buffer);
    case "u8":
      return bytes;
    case "f16":
    case "bf16":
      return new Uint16Array(bytes.buffer);
    default:
      return dtype satisfies never;
  }
}

const word = new DataView(new ArrayBuffer(4));
/** Bits of the nearest bfloat16, ties to even; NaN stays NaN. */
function toBrain(x: number): number {
  word.setFloat32(0, x);
  const bits = word.getUint32(0);
  if (Number.isNaN(x)) return (bits >>> 16) | 0x40;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}
/** Bits of the nearest half, ties to even. */
function toHalf(x: number): number {
  word.setFloat32(0, x);
  const bits = word.getUint32(0);
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = Math.abs(Math.fround(x));
  if (Number.isNaN(x)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  // Below 2^-14 halves are multiples of 2^-24; above, of 2^(exponent - 10).
  const exponent = Math.max(Math.floor(Math.log2(magnitude || 1e-30)), -14);
  const unit = 2 ** (exponent - 10);
  const scaled = magnitude / unit;
  const floor = Math.floor(scaled);
  const rest = scaled - floor;
  const rounded = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
  // A carry out of the fraction adds one to the exponent by itself.
  return sign | ((exponent + 15) * 1024 + (rounded - 1024));
}
