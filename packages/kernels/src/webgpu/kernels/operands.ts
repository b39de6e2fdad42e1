// How products read their two sides: one WGSL loader for every storage format. Tiles, few-row products and grouped
// products are written against these functions only, so each of them takes every format; narrow weights are widened
// here, on the way in.
import type { QuantizedFormat as StoredFormat } from "@switchyard/core";
import type { Element, ParamType } from "../program.ts";
import { memo } from "./parts.ts";

/** What core stores in few bits, and kernels here read; the others take core's composite. */
export type QuantizedFormat = Exclude<StoredFormat, "fp8">;
export type Format = "f32" | "f16" | "bf16" | QuantizedFormat;

/**
 * One side of a product, seen as lines of `length` neighbouring elements. Layout "k": a line is a row of A (a column of
 * B) and runs along the inner dimension k. Layout "r": there is a line for every k, which runs along the rows of A (the
 * columns of B).
 */
export interface Operand {
  readonly name: "a" | "b";
  readonly layout: "k" | "r";
  readonly format: Format;
  /** Elements fetched at once, dividing the length of a line; 1: element by element, wherever lines begin. */
  readonly step: 1 | 4 | 8 | 16;
  /** Quantised: neighbours that share a scale; 0: the whole line. `step` divides it, unless it is 1. */
  readonly group: number;
  /** Quantised: there are zeros. */
  readonly zeros: boolean;
  /** Lines go through a list of ids. */
  readonly gathered: boolean;
  /** f16 is read as f16 ("shader-f16"), not through its bits. */
  readonly native: boolean;
}

const bits: { readonly [F in Format]: number } = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, mxfp4: 4 };
export const isQuantized = (format: Format): format is QuantizedFormat => bits[format] < 16;

/** One key per variant. */
export const keyOf = ({ layout, format, step, group, zeros, gathered, native }: Operand): string => {
  const scales = isQuantized(format) ? `:${group}${zeros ? "z" : ""}` : "";
  return `${layout}:${format}:${step}${scales}${gathered ? ":ids" : ""}${native ? ":native" : ""}`;
};

/**
 * The widest fetch that suits a line of `length` elements, at most `most`: whole words, and groups of one scale.
 * @param aligned false where a range along the line starts or ends off a multiple of 4
 */
export function stepFor(
  format: Format,
  length: number,
  group: number,
  most: 4 | 8 | 16,
  aligned = true,
): 1 | 4 | 8 | 16 {
  // 16 bytes at most.
  const widest = Math.min(most, 128 / bits[format]);
  for (const step of [16, 8, 4] as const) {
    if (step <= widest && aligned && length % step === 0 && (group === 0 || group % step === 0)) return step;
  }
  return 1;
}

/** Type of one fetch: words, of which 16 bits are half of one. */
function fetchType({ format, step }: Operand): Element {
  if (format === "f32") return step === 1 ? "f32" : "vec4<f32>";
  const words = (bits[format] * step) / 32;
  return step === 1 || words <= 1 ? "u32" : `vec${words}<u32>`;
}

export function operandReads(x: Operand): Record<string, Element> {
  const { name, format } = x;
  return {
    [name]: fetchType(x),
    ...(isQuantized(format) ? { [`${name}_scales`]: format === "mxfp4" ? "u32" : "f32" } : {}),
    ...(x.zeros ? { [`${name}_zeros`]: "u32" } : {}),
    ...(x.gathered ? { [`${name}_ids`]: "i32" } : {}),
  };
}

/** Lines of scales and zeros may lie elsewhere in their buffers than those of the codes: shifts, which wrap around. */
export function operandParams({ name, format, zeros }: Operand): Record<string, ParamType> {
  return {
    [`${name}_length`]: "u32",
    ...(isQuantized(format) ? { [`${name}_scale_shift`]: "u32" } : {}),
    ...(zeros ? { [`${name}_zero_shift`]: "u32" } : {}),
  };
}

/** Four codes, in the low bits of the word `w` or its half, as numbers. */
const codeTexts: { readonly [F in QuantizedFormat]: string } = {
  int8: `fn four_int8(w: u32) -> vec4<f32> {
  return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(w << 24u, w << 16u, w << 8u, w)) >> vec4<u32>(24u));
}`,
  int4: `fn four_int4(w: u32) -> vec4<f32> {
  return vec4<f32>((vec4<u32>(w) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u));
}`,
  // Twice the value: 0 1 2 3 4 6 8 12 in the nibbles of one constant.
  mxfp4: `fn four_mxfp4(w: u32) -> vec4<f32> {
  let code = (vec4<u32>(w) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u);
  let twice = vec4<f32>((vec4<u32>(0xc8643210u) >> ((code & vec4<u32>(7u)) * 4u)) & vec4<u32>(15u));
  return select(twice, -twice, code > vec4<u32>(7u));
}`,
};

/** `scale`: what turns codes into values; `widened` is the value of codes `c`. */
function scaleText({ name, format, group, zeros }: Operand): string {
  const at = (shift: string): string =>
    group === 0 ? `line + p.${shift}` : `(line + p.${shift}) * (p.${name}_length / ${group}u) + i / ${group}u`;
  const byte = (buffer: string, shift: string): string => `
  let ${buffer}_at = ${at(shift)};
  let ${buffer}_byte = (${name}_${buffer}[${buffer}_at >> 2u] >> ((${buffer}_at & 3u) * 8u)) & 255u;`;
  if (format === "mxfp4") {
    // 2^-127 is subnormal: 2^-126 times a half that the codes, which stand for twice their value, take first. 255 is
    // NaN.
    return `fn ${name}_scale(line: u32, i: u32) -> vec2<f32> {${byte("scales", `${name}_scale_shift`)}
  let power = select(float_of(max(scales_byte, 1u) << 23u), not_a_number(), scales_byte == 255u);
  return vec2<f32>(power, select(0.5, 0.25, scales_byte == 0u));
}
fn ${name}_widened(c: vec4<f32>, s: vec2<f32>) -> vec4<f32> { return (c * s.y) * s.x; }`;
  }
  const signed = format === "int8" ? "bitcast<i32>(zeros_byte << 24u) >> 24u" : "zeros_byte";
  const zero = zeros ? `f32(${signed})` : format === "int8" ? "0.0" : "8.0";
  return `fn ${name}_scale(line: u32, i: u32) -> vec2<f32> {${zeros ? byte("zeros", `${name}_zero_shift`) : ""}
  return vec2<f32>(${name}_scales[${at(`${name}_scale_shift`)}], ${zero});
}
fn ${name}_widened(c: vec4<f32>, s: vec2<f32>) -> vec4<f32> { return (c - s.y) * s.x; }`;
}

/** One element at a time. */
function singleText({ name, format, native }: Operand): string {
  const head = `fn ${name}_one(line: u32, i: u32) -> f32 {`;
  switch (format) {
    case "f32":
      return `${head} return ${name}[line * p.${name}_length + i]; }`;
    case "f16":
    case "bf16": {
      const value =
        format === "bf16" ? "float_of(h << 16u)" : native ? "f32(bitcast<vec2<f16>>(h).x)" : "unpack2x16float(h).x";
      return `${head}
  let at = line * p.${name}_length + i;
  let h = ${name}[at >> 1u] >> ((at & 1u) * 16u);
  return ${value};
}`;
    }
    case "int8":
    case "int4":
    case "mxfp4": {
      const [perByte, nibble] = format === "int8" ? [1, "0u"] : [2, "(i & 1u) * 4u"];
      return `${head}
  let at = line * (p.${name}_length / ${perByte}u) + i / ${perByte}u;
  let code = ${name}[at >> 2u] >> ((at & 3u) * 8u + ${nibble});
  return ${name}_widened(four_${format}(code), ${name}_scale(line, i)).x;
}`;
    }
    default:
      return format satisfies never;
  }
}

/** Quad v of one fetch. */
function widenText(x: Operand): string[] {
  const { name, format, step, native } = x;
  const word = (i: number): string => ((bits[format] * step) / 32 > 1 ? `w.${"xyzw"[i]}` : "w");
  return Array.from({ length: step / 4 }, (_, v) => {
    const value = (): string => {
      switch (format) {
        case "f32":
          return "w";
        case "f16": {
          const [low, high] = [word(2 * v), word(2 * v + 1)];
          if (native) return `vec4<f32>(bitcast<vec4<f16>>(vec2<u32>(${low}, ${high})))`;
          return `vec4<f32>(unpack2x16float(${low}), unpack2x16float(${high}))`;
        }
        case "bf16": {
          const [low, high] = [word(2 * v), word(2 * v + 1)];
          const halves = [`${low} << 16u`, `${low} & 0xffff0000u`, `${high} << 16u`, `${high} & 0xffff0000u`];
          return `bitcast<vec4<f32>>(vec4<u32>(${halves.join(", ")}))`;
        }
        case "int8":
          return `${name}_widened(four_int8(${word(v)}), s)`;
        case "int4":
        case "mxfp4":
          return `${name}_widened(four_${format}(${word(v >> 1)} >> ${(v & 1) * 16}u), s)`;
        default:
          return format satisfies never;
      }
    };
    return `fn ${name}_widen${v}(w: ${fetchType(x)}, s: vec2<f32>) -> vec4<f32> { return ${value()}; }`;
  });
}

/**
 * WGSL of a side: `a_line(line)` looks a gathered line up; `a_four(line, i, end)` gives elements i .. i+3 of a line,
 * zeros from `end` on, `a_inside` the same for i < end; where step > 1 also `a_fetch(line, i)`, `a_scale(line, i)` and
 * `a_widen0(fetched, scale)` ..., for those who fetch more at once.
 */
export function operandText(x: Operand): string {
  const { name, format, step } = x;
  const line = x.gathered ? `u32(max(${name}_ids[line], 0))` : "line";
  const head = `fn ${name}_line(line: u32) -> u32 { return ${line}; }
${isQuantized(format) ? `${codeTexts[format]}\n${scaleText(x)}` : ""}`;
  const signature = `fn ${name}_four(line: u32, i: u32, end: u32) -> vec4<f32> {`;
  if (step === 1) {
    return `${head}
${singleText(x)}
${signature}
  var x = vec4<f32>();
  if (i < end) { x.x = ${name}_one(line, i); }
  if (i + 1u < end) { x.y = ${name}_one(line, i + 1u); }
  if (i + 2u < end) { x.z = ${name}_one(line, i + 2u); }
  if (i + 3u < end) { x.w = ${name}_one(line, i + 3u); }
  return x;
}
fn ${name}_inside(line: u32, i: u32, end: u32) -> vec4<f32> { return ${name}_four(line, i, end); }`;
  }
  const type = fetchType(x);
  const half = bits[format] * step < 32;
  const at = `line * (p.${name}_length / ${step}u) + i / ${step}u`;
  return `${head}
fn ${name}_fetch(line: u32, i: u32) -> ${type} {
  let at = ${at};
  return ${half ? `${name}[at >> 1u] >> ((at & 1u) * 16u)` : `${name}[at]`};
}
${isQuantized(format) ? "" : `fn ${name}_scale(line: u32, i: u32) -> vec2<f32> { return vec2<f32>(); }`}
${widenText(x).join("\n")}
fn ${name}_inside(line: u32, i: u32, end: u32) -> vec4<f32> {
  return ${name}_widen0(${name}_fetch(line, i), ${name}_scale(line, i));
}
${signature}
  // Not a branch: software drivers are slow at those. Reads past the end of a buffer are safe in WebGPU.
  return select(${name}_inside(line, i, end), vec4<f32>(), i >= end);
}`;
}

const plain = memo(
  (name: "a" | "b", layout: "k" | "r", step: 1 | 4): Operand => ({
    name,
    layout,
    format: "f32",
    step,
    group: 0,
    zeros: false,
    gathered: false,
    native: false,
  }),
);
/** A side of f32 numbers. */
export const floats = (name: "a" | "b", layout: "k" | "r", step: 1 | 4): Operand => plain(name, layout, step);
