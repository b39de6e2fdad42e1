// Weights in few bits: int8, int4, MXFP4 and fp8 codes with a scale per group of neighbours, widened inside the products
// where the backend has kernels for them. Making codes from floats is not done here.
import { vjpOfFallback } from "../autodiff.ts";
import type { Spec } from "../backend.ts";
import { at, type Op, run1 } from "../op.ts";
import { show, type Tensor } from "../tensor.ts";
import { affine, cast, floor, less, mul, sub } from "./elementwise.ts";
import { groupedMatmul } from "./experts.ts";
import { count, dtypes, fail, last, rank, rowsOf, spec } from "./infer.ts";
import { linear, matmul } from "./matmul.ts";
import { takeRows } from "./rows.ts";
import { concat, hostConstant, reshape, slice } from "./shape.ts";

export type QuantizedFormat = "int8" | "int4" | "mxfp4" | "fp8";

/** How the weights are stored: attributes of all three ops. */
export interface Quantized {
  readonly format: QuantizedFormat;
  /**
   * Neighbours along `in` that share one scale; divides `in`, but for fp8, whose last group may be shorter. `in` itself:
   * one scale per row. MXFP4: 32.
   */
  readonly group: number;
  /** fp8: neighbours along `out` that share one scale, the last of them perhaps fewer; default 1. */
  readonly rows?: number;
}

/**
 * Weights [..., out, in] in few bits, out-major as everywhere.
 * - int8: (code - zero) * scale, codes and zeros two's complement bytes; zero is 0 where there are no `zeros`.
 * - int4: (code - zero) * scale, codes 0..15 (offset binary, as GPTQ and compressed-tensors' pack-quantized store
 *   them); zero is 8 where there are no `zeros`.
 * - mxfp4: E2M1 value * 2^(scale - 127) (OCP Microscaling Formats 1.0); scale 255 is NaN. Values below 2^-126 are
 *   subnormal in f32: a device that flushes those gives 0 for them, every other value is exact.
 * - fp8: E4M3 value * scale (OCP 8-bit Floating Point 1.0: bias 7, no infinities, codes 0x7f and 0xff are NaN), a scale
 *   for each block of `rows` x `group`. DeepSeek-V3's `weight_scale_inv` holds such scales, its blocks are 128 x 128.
 */
export interface QuantizedWeights extends Quantized {
  /** u8: int8, fp8 [..., out, in]; the 4-bit formats [..., out, in / 2], element 2 i in the low nibble of byte i. */
  readonly codes: Tensor;
  /**
   * int8, int4: f32 [..., out, in / group]. mxfp4: u8 exponents of the same shape. fp8: f32
   * [..., ceil(out / rows), ceil(in / group)].
   */
  readonly scales: Tensor;
  /** int8, int4: u8 [..., out, in / group]; those of int4 at most 128. */
  readonly zeros?: Tensor;
}

const formats: readonly string[] = ["int8", "int4", "mxfp4", "fp8"] satisfies readonly QuantizedFormat[];
const inBytes = (format: QuantizedFormat): boolean => format === "int8" || format === "fp8";
const perBlock = (n: number, block: number): number => Math.ceil(n / block);

/** Checks stored weights; returns the shape of what they stand for. A refusal prints `inputs`. */
function stored(
  name: string,
  { format, group, rows = 1 }: Quantized,
  [codes, scales, zeros]: readonly [Spec, Spec, (Spec | undefined)?],
  inputs: readonly Spec[],
): readonly number[] {
  const blocks = format === "fp8" ? `blocks of ${rows} x ${group}` : `groups of ${group}`;
  const refuse = (why: string): never => fail(`${name} of ${format} in ${blocks}`, why, inputs);
  if (!formats.includes(format)) refuse(`the format must be one of ${formats.join(", ")}`);
  if (codes.dtype !== "u8" || codes.shape.length < 2) refuse(`codes must be u8 [..., out, in], found ${show(codes)}`);
  const inner = last(codes) * (inBytes(format) ? 1 : 2);
  if (!Number.isInteger(group) || group < 1) refuse("the group must be a whole number from 1 up");
  if (format === "mxfp4" && group !== 32) refuse("mxfp4 has groups of 32");
  if (format !== "fp8" && inner % group !== 0) refuse(`the group must divide in = ${inner}`);
  if (!Number.isInteger(rows) || rows < 1) refuse(`rows must be a whole number from 1 up, not ${rows}`);
  if (format !== "fp8" && rows !== 1) refuse(`only fp8 has a scale for ${rows} rows`);
  const out = at(codes.shape, codes.shape.length - 2);
  const perGroup = [...codes.shape.slice(0, -2), perBlock(out, rows), perBlock(inner, group)];
  const wanted = spec(perGroup, format === "mxfp4" ? "u8" : "f32");
  if (show(scales) !== show(wanted)) refuse(`scales must be ${show(wanted)}, found ${show(scales)}`);
  if (zeros) {
    if (format === "mxfp4" || format === "fp8") refuse(`${format} has no zeros`);
    const expected = spec(perGroup, "u8");
    if (show(zeros) !== show(expected)) refuse(`zeros must be ${show(expected)}, found ${show(zeros)}`);
  }
  return [...codes.shape.slice(0, -1), inner];
}

/** x's last dimension against the weights'; an odd one cannot be held by nibbles. */
function meets(name: string, x: Spec, inner: number, { format }: Quantized, inputs: readonly Spec[]): void {
  if (last(x) === inner) return;
  const odd =
    !inBytes(format) && last(x) % 2 !== 0 ? `; ${format} holds two elements per byte and needs an even in` : "";
  fail(name, `inner sizes differ: ${show(x)} has ${last(x)}, the weights have ${inner}${odd}`, inputs);
}

// ---------------------------------------------------------------- values
/** Two's complement of bytes that were cast to f32. */
const signed = (byte: Tensor): Tensor => sub(byte, mul(less(127, byte), 256));

/** Codes 0..15 as f32 [..., in] from bytes [..., in / 2]. */
const nibbles = (codes: Tensor): Tensor => {
  const byte = cast(codes, "f32");
  const high = floor(mul(byte, 1 / 16));
  const low = sub(byte, mul(high, 16));
  const pairs = [...codes.shape, 1];
  const both = concat([reshape(low, pairs), reshape(high, pairs)], -1); // [..., in / 2, 2]
  return reshape(both, [...codes.shape.slice(0, -1), 2 * last(codes)]);
};

// Sign, two bits of exponent, one of mantissa.
const e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0, -0.5, -1, -1.5, -2, -3, -4, -6];
// exp(x ln 2) is not exact, a table is. 2^-127 is subnormal and might be flushed in it: it is 2^-126 times a half that
// the values take first.
const power = (e: number): number => (e === 255 ? Number.NaN : 2 ** (Math.max(e, 1) - 127));
const half = (e: number): number => (e === 0 ? 0.5 : 1);
/** E4M3, bit by bit. */
const e4m3 = (code: number): number => {
  const [exponent, mantissa] = [(code >> 3) & 15, code & 7];
  if (exponent === 15 && mantissa === 7) return Number.NaN;
  const magnitude = exponent === 0 ? mantissa * 2 ** -9 : (8 + mantissa) * 2 ** (exponent - 10);
  return code > 127 ? -magnitude : magnitude;
};
const look = (ids: Tensor, size: number, value: (i: number) => number): Tensor =>
  takeRows(
    hostConstant(
      ids,
      Float32Array.from({ length: size }, (_, i) => value(i)),
      [size],
    ),
    ids,
  );

/** Each scale as often as its block has elements: [..., out, in] from [..., ceil(out / rows), ceil(in / group)]. */
function spread(scales: Tensor, group: number, rows: number, [out, inner]: readonly [number, number]): Tensor {
  const [lines, across] = [rowsOf(scales), last(scales)];
  const ones = (shape: readonly number[]): Tensor =>
    hostConstant(scales, new Float32Array(shape.reduce((n, d) => n * d, 1)).fill(1), shape);
  let y = scales;
  if (group > 1) {
    const wide = mul(reshape(y, [lines * across, 1]), ones([1, group]));
    y = slice(reshape(wide, [lines, across * group]), [0, 0], [lines, inner]);
  }
  if (rows > 1) {
    const down = at(scales.shape, scales.shape.length - 2);
    const matrices = scales.shape.slice(0, -2).reduce((n, d) => n * d, 1);
    const tall = mul(reshape(y, [lines, 1, inner]), ones([1, rows, 1]));
    y = slice(reshape(tall, [matrices, down * rows, inner]), [0, 0, 0], [matrices, out, inner]);
  }
  return reshape(y, [...scales.shape.slice(0, -2), out, inner]);
}

export const dequantizeOp: Op<Quantized> = {
  name: "dequantize",
  shapes(inputs, attrs) {
    count("dequantize", inputs, 2, 3);
    return [spec(stored("dequantize", attrs, [at(inputs, 0), at(inputs, 1), inputs[2]], inputs))];
  },
  fallback([codes, scales, zeros], { format, group, rows = 1 }) {
    if (!codes || !scales) return [];
    if (format === "fp8") {
      const size = [at(codes.shape, codes.shape.length - 2), last(codes)] as const;
      return [mul(look(cast(codes, "i32"), 256, e4m3), spread(scales, group, rows, size))];
    }
    const lines = rowsOf(codes);
    const groups = last(scales);
    const whole = (x: Tensor): Tensor => reshape(x, [lines, groups, group]);
    const each = (x: Tensor): Tensor => reshape(x, [lines, groups, 1]);
    let values: Tensor; // [lines, groups, group]
    if (format === "mxfp4") {
      const exponents = each(cast(scales, "i32"));
      const codebook = look(cast(nibbles(codes), "i32"), 16, (i) => at(e2m1, i));
      values = mul(mul(whole(codebook), look(exponents, 256, half)), look(exponents, 256, power));
    } else {
      const code = whole(format === "int8" ? signed(cast(codes, "f32")) : nibbles(codes));
      const zero = zeros && each(format === "int8" ? signed(cast(zeros, "f32")) : cast(zeros, "f32"));
      const shifted = zero ? sub(code, zero) : format === "int4" ? affine(code, { scale: 1, shift: -8 }) : code;
      values = mul(shifted, each(scales));
    }
    return [reshape(values, [...codes.shape.slice(0, -1), groups * group])];
  },
};
const dequantized = (codes: Tensor, scales: Tensor, zeros: Tensor | undefined, attrs: Quantized): Tensor =>
  run1(dequantizeOp, zeros ? [codes, scales, zeros] : [codes, scales], attrs);

const attrsOf = ({ format, group, rows }: Quantized): Quantized =>
  rows === undefined ? { format, group } : { format, group, rows };

/**
 * What the weights stand for, f32 [..., out, in]. Scales of int8, int4 and fp8 have a gradient, codes and zeros none.
 * @throws ShapeError when sizes, dtypes or the group do not fit the format.
 */
export const dequantize = ({ codes, scales, zeros, ...how }: QuantizedWeights): Tensor =>
  dequantized(codes, scales, zeros, attrsOf(how));

// ---------------------------------------------------------------- products
export const quantizedLinearOp: Op<Quantized> = {
  name: "quantizedLinear",
  shapes(inputs, attrs) {
    count("quantizedLinear", inputs, 3, 4);
    dtypes("quantizedLinear", inputs, "f?");
    const [x, codes, scales] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    const w = stored("quantizedLinear", attrs, [codes, scales, inputs[3]], inputs);
    if (x.shape.length === 0 || w.length !== 2) fail("quantizedLinear", "x [..., in] x codes of [out, in]", inputs);
    meets("quantizedLinear", x, at(w, 1), attrs, inputs);
    return [spec([...x.shape.slice(0, -1), at(w, 0)])];
  },
  fallback: ([x, codes, scales, zeros], attrs) =>
    x && codes && scales ? [linear(x, dequantized(codes, scales, zeros, attrs))] : [],
  vjp(dys, inputs, _, attrs, [wantX, , wantScales]) {
    const [[dy], [x, codes, scales, zeros]] = [dys, inputs];
    if (!dy || !x || !codes || !scales) return [];
    if (wantScales) return vjpOfFallback(quantizedLinearOp, dys, inputs, attrs);
    const rows = reshape(dy, [rowsOf(dy), last(dy)]);
    return [wantX ? reshape(matmul(rows, dequantized(codes, scales, zeros, attrs)), x.shape) : undefined];
  },
};
/**
 * x [..., in] times wᵀ, w [out, in] stored in few bits: [..., out]. Without a kernel of that name the weights are
 * widened to f32 for the length of the call.
 * @throws ShapeError when sizes, dtypes or the group do not fit.
 */
export const quantizedLinear = (x: Tensor, { codes, scales, zeros, ...how }: QuantizedWeights): Tensor =>
  run1(quantizedLinearOp, zeros ? [x, codes, scales, zeros] : [x, codes, scales], attrsOf(how));

export const quantizedGroupedMatmulOp: Op<Quantized> = {
  name: "quantizedGroupedMatmul",
  shapes(inputs, attrs) {
    const name = "quantizedGroupedMatmul";
    count(name, inputs, 4, 5);
    dtypes(name, inputs, "f??i?");
    rank(name, inputs, [2, 3, 3, 1]);
    const [rows, codes, scales, ends] = [at(inputs, 0), at(inputs, 1), at(inputs, 2), at(inputs, 3)];
    const [experts, out, inner] = stored(name, attrs, [codes, scales, inputs[4]], inputs) as [number, number, number];
    if (experts !== ends.shape[0]) fail(name, "one end per expert", inputs);
    meets(name, rows, inner, attrs, inputs);
    return [spec([at(rows.shape, 0), out])];
  },
  fallback: ([rows, codes, scales, ends, zeros], attrs) =>
    rows && codes && scales && ends ? [groupedMatmul(rows, dequantized(codes, scales, zeros, attrs), ends)] : [],
  vjp(dys, inputs, _, attrs, [wantRows, , wantScales]) {
    const [[dy], [rows, codes, scales, ends, zeros]] = [dys, inputs];
    if (!dy || !rows || !codes || !scales || !ends) return [];
    if (wantScales) return vjpOfFallback(quantizedGroupedMatmulOp, dys, inputs, attrs);
    const w = (): Tensor => dequantized(codes, scales, zeros, attrs);
    return [wantRows ? groupedMatmul(dy, w(), ends, { transposed: true }) : undefined];
  },
};
/**
 * Row i of expert e's block (ends[e-1] <= i < ends[e]) times that expert's weights, stored in few bits: rows [n, in],
 * weights [experts, out, in], ends i32 [experts] -> [n, out]. Rows behind the last block are not read and give zeros.
 * Without a kernel of that name all experts are widened to f32 for the length of the call.
 * @throws ShapeError when sizes, dtypes or the group do not fit.
 */
export const quantizedGroupedMatmul = (
  rows: Tensor,
  { codes, scales, zeros, ...how }: QuantizedWeights,
  ends: Tensor,
): Tensor =>
  run1(
    quantizedGroupedMatmulOp,
    zeros ? [rows, codes, scales, ends, zeros] : [rows, codes, scales, ends],
    attrsOf(how),
  );
