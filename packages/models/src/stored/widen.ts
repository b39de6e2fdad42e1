// The numbers that stored matrices stand for, as f32 on the host. Every format is exact, but for a product with a scale, which is
// rounded once.
import type { HostCodes, HostMatrix } from "./host-matrix.ts";

const halfToFloat = (half: number): number => {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
};

/** E4M3 (OCP 8-bit Floating Point 1.0): bias 7, no infinities. */
const e4m3ToFloat = (code: number): number => {
  const [exponent, mantissa] = [(code >> 3) & 15, code & 7];
  if (exponent === 15 && mantissa === 7) return Number.NaN;
  const magnitude = exponent === 0 ? mantissa * 2 ** -9 : (8 + mantissa) * 2 ** (exponent - 10);
  return code > 127 ? -magnitude : magnitude;
};

/** E2M1: sign, two bits of exponent, one of mantissa. */
const e2m1 = Float32Array.of(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6);

/** E8M0: a power of two. */
export const e8m0ToFloat = (exponent: number): number => (exponent === 255 ? Number.NaN : 2 ** (exponent - 127));

const tableOf = (size: number, value: (code: number) => number): (() => Float32Array) => {
  let made: Float32Array | undefined;
  return () => {
    made ??= Float32Array.from({ length: size }, (_, code) => value(code));
    return made;
  };
};
const halves = tableOf(65536, halfToFloat);
const e4m3 = tableOf(256, e4m3ToFloat);
const e8m0 = tableOf(256, e8m0ToFloat);

/** f16 and bf16 bit patterns as f32. */
export function widenHalves(bits: Uint16Array, dtype: "f16" | "bf16"): Float32Array {
  if (dtype === "bf16") {
    const wide = new Uint32Array(bits.length);
    for (let i = 0; i < bits.length; i++) wide[i] = (bits[i] as number) << 16;
    return new Float32Array(wide.buffer);
  }
  const table = halves();
  const wide = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) wide[i] = table[bits[i] as number] as number;
  return wide;
}

/** The elements as f32, row-major; the array of `host` itself where it holds f32. */
export function widen(host: HostMatrix): Float32Array {
  if (host.kind === "codes") return widenCodes(host);
  if (host.data instanceof Float32Array) return host.data;
  return widenHalves(host.data, host.dtype === "bf16" ? "bf16" : "f16");
}

function widenCodes({ format, shape, group, rows, codes, scales, zeros }: HostCodes): Float32Array {
  const [out = 0, inner = 0] = shape.slice(-2);
  const y = new Float32Array(shape.reduce((n, d) => n * d, 1));
  const lines = inner === 0 ? 0 : y.length / inner;
  const across = Math.ceil(inner / group);
  const table = format === "fp8" ? e4m3() : format === "mxfp4" ? e2m1 : undefined;
  const powers = format === "mxfp4" ? e8m0() : undefined;
  const packed = format === "int4" || format === "mxfp4";
  for (let line = 0; line < lines; line++) {
    // Blocks of rows start anew with each matrix.
    const matrix = Math.floor(line / out);
    const scaleLine = matrix * Math.ceil(out / rows) + Math.floor((line - matrix * out) / rows);
    for (let g = 0; g < across; g++) {
      const place = scaleLine * across + g;
      const stored = scales[place] as number;
      const scale = powers ? (powers[stored] as number) : stored;
      const zero = zeroOf(format, zeros?.[place]);
      const from = line * inner + g * group;
      const to = Math.min(from + group, (line + 1) * inner);
      for (let i = from; i < to; i++) {
        const code = packed ? ((codes[i >>> 1] as number) >>> (4 * (i & 1))) & 15 : (codes[i] as number);
        const value = table ? (table[code] as number) : (format === "int8" ? (code << 24) >> 24 : code) - zero;
        y[i] = value * scale;
      }
    }
  }
  return y;
}

function zeroOf(format: HostCodes["format"], zero: number | undefined): number {
  if (format === "int4") return zero ?? 8;
  return zero === undefined ? 0 : (zero << 24) >> 24;
}
