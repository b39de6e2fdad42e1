// Bit patterns of f16 and bf16, on the host: TensorFlow.js has no 16-bit storage, so such a tensor is held as float32 values
// that have been rounded, and its bits are made and read at the border.

export type Half = "f16" | "bf16";

interface Format {
  /** Bits of the fraction. */
  readonly fraction: number;
  readonly bias: number;
  /** Largest finite value. */
  readonly most: number;
}
export const formats: { readonly [D in Half]: Format } = {
  f16: { fraction: 10, bias: 15, most: 65_504 },
  bf16: { fraction: 7, bias: 127, most: 255 * 2 ** 120 },
};

const word = new DataView(new ArrayBuffer(8));

/** The bits of x in a 16-bit format, rounded to nearest, ties to even. */
export function toBits(x: number, dtype: Half): number {
  const { fraction, bias } = formats[dtype];
  word.setFloat64(0, x);
  const sign = word.getUint16(0) & 0x8000;
  const infinity = (2 * bias + 1) << fraction;
  if (Number.isNaN(x)) return infinity | (1 << (fraction - 1));
  // Numbers below the smallest normal one share its exponent: that is what subnormal means.
  const exponent = Math.max(((word.getUint16(0) >>> 4) & 0x7ff) - 1023, 1 - bias);
  if (exponent > bias) return sign | infinity;
  const units = Math.abs(x) * 2 ** (fraction - exponent);
  const whole = Math.floor(units);
  const rest = units - whole;
  const up = rest > 0.5 || (rest === 0.5 && whole % 2 === 1) ? 1 : 0;
  // A carry out of the fraction raises the exponent by itself, up to infinity.
  return sign | (((exponent + bias - 1) << fraction) + whole + up);
}

/** The number that 16 bits stand for. */
export function fromBits(bits: number, dtype: Half): number {
  const { fraction, bias } = formats[dtype];
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits & 0x7fff) >>> fraction;
  const rest = bits & ((1 << fraction) - 1);
  if (exponent === 2 * bias + 1) return rest === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  const whole = exponent === 0 ? 0 : 1 << fraction;
  return sign * (whole + rest) * 2 ** (Math.max(exponent, 1) - bias - fraction);
}
