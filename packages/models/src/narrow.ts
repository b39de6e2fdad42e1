// Floats on the way into a file: rounding f32 to the shorter formats. The way back is `toFloat32`.
import { CheckpointError } from "@switchyard/core";

const word = new DataView(new ArrayBuffer(4));

/** Bits of the nearest bfloat16, ties to even; NaN stays NaN. */
function toBrain(bits: number): number {
  const nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? (bits >>> 16) | 0x40 : ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** Bits of the nearest half, ties to even; beyond 65519 infinity, NaN stays NaN. */
function toHalf(x: number): number {
  word.setFloat32(0, x);
  const sign = (word.getUint32(0) >>> 16) & 0x8000;
  const magnitude = Math.abs(x);
  if (Number.isNaN(x)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  // Below 2^-14 halves are multiples of 2^-24; above, of 2^(exponent - 10).
  const exponent = Math.max(((word.getUint32(0) >>> 23) & 255) - 127, -14);
  const scaled = magnitude / 2 ** (exponent - 10);
  const floor = Math.floor(scaled);
  const rest = scaled - floor;
  const rounded = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
  // A carry out of the fraction adds one to the exponent by itself.
  return sign | ((exponent + 15) * 1024 + (rounded - 1024));
}

/**
 * The bytes of floats as a file of this dtype holds them, rounded to nearest, ties to even.
 * Throws CheckpointError for a dtype that is not F32, F16 or BF16.
 */
export function fromFloat32(values: Float32Array, dtype: string): Uint8Array {
  switch (dtype) {
    case "F32":
      return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    case "BF16": {
      const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
      return new Uint8Array(Uint16Array.from(bits, toBrain).buffer);
    }
    case "F16":
      return new Uint8Array(Uint16Array.from(values, toHalf).buffer);
    default:
      throw new CheckpointError(`cannot store floats as ${dtype}; expected F32, F16 or BF16`);
  }
}
