// How the reference backend holds numbers: one plain typed array per handle, and the conversions between storage types.
import type { DType, Operand, Spec, TypedArray } from "../backend.ts";
import { ShapeError } from "../errors.ts";

/** One array on the host. `data` is undefined once the handle was freed. */
export interface CpuHandle {
  data: TypedArray | undefined;
}

export type CpuOperand = Operand<CpuHandle>;
export type Floats = Float32Array | Float64Array;

/** Allocates results; the one thing in which the two precisions differ. */
export interface Storage {
  /** A zero-filled array for `spec`. */
  zeros(spec: Spec): TypedArray;
  /** Makes a handle that owns `data`. */
  hold(data: TypedArray): CpuHandle;
  /** Converts `values` to the storage type of `dtype`; always a copy. */
  encode(values: TypedArray, dtype: DType): TypedArray;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((product, n) => product * n, 1);

export const input = (inputs: readonly CpuOperand[], i: number): CpuOperand => {
  const x = inputs[i];
  if (x === undefined) throw new ShapeError(`cpu: operand ${i} is missing, ${inputs.length} were given`);
  return x;
};

export const resultSpec = (results: readonly Spec[], i = 0): Spec => {
  const spec = results[i];
  if (spec === undefined) throw new ShapeError(`cpu: the spec of result ${i} is missing, ${results.length} were given`);
  return spec;
};

/** The stored array, as it is: 16-bit floats are bit patterns. */
export const raw = (x: CpuOperand): TypedArray => {
  if (x.handle.data === undefined) {
    throw new Error(`cpu: a ${x.dtype} operand [${x.shape.join(", ")}] was freed before this use`);
  }
  return x.handle.data;
};

/** The stored numbers: 16-bit floats are decoded, everything else is the stored array itself (do not write to it). */
export const numbers = (x: CpuOperand): TypedArray => {
  const data = raw(x);
  return x.dtype === "f16" || x.dtype === "bf16" ? decode16(data, x.dtype) : data;
};

// ---------------------------------------------------------------- 16-bit floats
interface Format16 {
  readonly mantissa: number;
  readonly bias: number;
}
const formats: { readonly [D in "f16" | "bf16"]: Format16 } = {
  f16: { mantissa: 10, bias: 15 },
  bf16: { mantissa: 7, bias: 127 },
};

const word = new DataView(new ArrayBuffer(8));

/** The bit pattern of `x` in a 16-bit format, rounded once to nearest, ties to even. */
export const encode16 = (x: number, dtype: "f16" | "bf16"): number => {
  const { mantissa, bias } = formats[dtype];
  word.setFloat64(0, x);
  const high = word.getUint16(0);
  const sign = high & 0x8000;
  const infinity = (2 * bias + 1) << mantissa;
  if (Number.isNaN(x)) return infinity | (1 << (mantissa - 1));
  // Numbers below the smallest normal one share its exponent: that is what subnormal means.
  const exponent = Math.max(((high >>> 4) & 0x7ff) - 1023, 1 - bias);
  if (exponent > bias) return sign | infinity;
  const units = Math.abs(x) * 2 ** (mantissa - exponent);
  let q = Math.floor(units);
  const rest = units - q;
  if (rest > 0.5 || (rest === 0.5 && q % 2 === 1)) q++;
  // A carry out of the mantissa raises the exponent by itself, up to infinity.
  return sign | (((exponent + bias) << mantissa) + q - (1 << mantissa));
};

/** The number a 16-bit pattern stands for. */
export const decode16Bits = (bits: number, dtype: "f16" | "bf16"): number => {
  const { mantissa, bias } = formats[dtype];
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits & 0x7fff) >>> mantissa;
  const fraction = bits & ((1 << mantissa) - 1);
  if (exponent === 2 * bias + 1) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  const whole = exponent === 0 ? 0 : 1 << mantissa;
  return sign * (whole + fraction) * 2 ** (Math.max(exponent, 1) - bias - mantissa);
};

const decode16 = (data: TypedArray, dtype: "f16" | "bf16"): Float32Array => {
  const values = new Float32Array(data.length);
  for (let i = 0; i < data.length; i++) values[i] = decode16Bits(data[i] as number, dtype);
  return values;
};

// ---------------------------------------------------------------- storage
// Towards zero, saturating, NaN becomes 0: what WebAssembly's trunc_sat does.
const truncate = (x: number, low: number, high: number): number =>
  Number.isNaN(x) ? 0 : Math.min(Math.max(Math.trunc(x), low), high);

export const storage = (precision: 32 | 64, onHold: () => void): Storage => {
  const Float: new (n: number) => Floats = precision === 64 ? Float64Array : Float32Array;
  const empty = (n: number, dtype: DType): TypedArray => {
    switch (dtype) {
      case "f32":
        return new Float(n);
      case "i32":
        return new Int32Array(n);
      case "u8":
        return new Uint8Array(n);
      case "f16":
      case "bf16":
        return new Uint16Array(n);
      default:
        throw new ShapeError(`cpu: unknown dtype "${dtype satisfies never}"`);
    }
  };
  return {
    zeros: (spec) => empty(sizeOf(spec.shape), spec.dtype),
    hold(data) {
      onHold();
      return { data };
    },
    encode(values, dtype) {
      const data = empty(values.length, dtype);
      for (let i = 0; i < values.length; i++) {
        const x = values[i] as number;
        if (dtype === "f16" || dtype === "bf16") data[i] = encode16(x, dtype);
        else if (dtype === "i32") data[i] = truncate(x, -(2 ** 31), 2 ** 31 - 1);
        else if (dtype === "u8") data[i] = truncate(x, 0, 255);
        else data[i] = x;
      }
      return data;
    },
  };
};
