// For tests of products: naive loops in float64, and the numbers behind narrow storage types.
import type { TypedArray } from "@switchyard/core";
import { type Host, host } from "../call.test-util.ts";
import { encodeData } from "../formats.ts";

/** Element i of an array as a number; bits of f16 and bf16 are decoded. */
export function numberOf(x: Host, i: number): number {
  const value = Number(x.data[i]);
  if (x.dtype !== "bf16" && x.dtype !== "f16") return value;
  const [mantissa, bias] = x.dtype === "bf16" ? [7, 127] : [10, 15];
  const exponent = (value & 0x7fff) >> mantissa;
  const fraction = (value & ((1 << mantissa) - 1)) / 2 ** mantissa;
  const magnitude = exponent === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (exponent - bias);
  return value & 0x8000 ? -magnitude : magnitude;
}

export type Side = (i: number, j: number) => number;
/** y[i, j] = sum over l of a(i, l) b(l, j) */
export function product(m: number, n: number, k: number, a: Side, b: Side): Float64Array {
  const y = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += a(i, l) * b(l, j);
      y[i * n + j] = sum;
    }
  }
  return y;
}

/** Largest difference, as a share of the largest expected magnitude; NaN and differing lengths are infinitely far. */
export function worst(found: TypedArray | undefined, expected: Float64Array): number {
  if (found?.length !== expected.length) return Number.POSITIVE_INFINITY;
  const scale = expected.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30);
  return expected.reduce((most, value, i) => {
    const difference = Math.abs(Number(found[i]) - value) / scale;
    return Number.isNaN(difference) ? Number.POSITIVE_INFINITY : Math.max(most, difference);
  }, 0);
}

export const addBias = (y: Float64Array, bias: Host): void => {
  y.forEach((value, i) => {
    y[i] = value + numberOf(bias, i % bias.data.length);
  });
};
/** f32 numbers in another storage type. */
export const stored = (x: Host, dtype: "f32" | "bf16" | "f16"): Host =>
  dtype === "f32" ? x : host(new Uint16Array(encodeData(x.data, dtype).buffer), x.shape, dtype);
