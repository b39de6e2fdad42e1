// Floats on the way into a file: rounding f32 to the shorter formats. The way back is `toFloat32`.
import { CheckpointError } from "@switchyard/core";

/** Bits of the nearest bfloat16, ties to even; NaN stays NaN. */
function toBrain(bits: number): number {
  const nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? (bits >>> 16) | 0x40 : ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** Bits of the nearest half, ties to even; beyond 65519 infinity, NaN stays NaN. */
function toHalf(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  // From 65520 on.
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude >= 0x38800000) {
    // A carry out of the fraction adds one to the exponent by itself.
    const moved = magnitude - 0x38000000; // exponents count from -14 instead of -126
    return sign | ((moved + 0xfff + ((moved >>> 13) & 1)) >>> 13);
  }
  // Below 2^-14 halves are multiples of 2^-24; up to half of one is zero.
  if (magnitude <= 0x33000000) return sign;
  const shift = 126 - (magnitude >>> 23);
  const fraction = (magnitude & 0x7fffff) | 0x800000;
  const floor = fraction >>> shift;
  const rest = fraction & ((1 << shift) - 1);
  const middle = 1 << (shift - 1);
  return sign | (rest > middle || (rest === middle && (floor & 1) === 1) ? floor + 1 : floor);
}

/** A plain loop: `from` with a function is ten times slower. */
function narrowed(values: Float32Array, convert: (bits: number) => number): Uint8Array {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const result = new Uint16Array(bits.length);
  for (let i = 0; i < bits.length; i++) result[i] = convert(bits[i] as number);
  return new Uint8Array(result.buffer);
}

/**
 * The bytes of floats as a file of this dtype holds them, rounded to nearest, ties to even.
 * Throws CheckpointError for a dtype that is not F32, F16 or BF16.
 */
export function fromFloat32(values: Float32Array, dtype: string): Uint8Array {
  switch (dtype) {
    case "F32":
      return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    case "BF16":
      return narrowed(values, toBrain);
    case "F16":
      return narrowed(values, toHalf);
    default:
      throw new CheckpointError(`cannot store floats as ${dtype}; expected F32, F16 or BF16`);
  }
}
