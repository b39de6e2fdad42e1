// Elementwise kernels: a table of formulas, and one template that spreads any of them over operands that NumPy broadcasting lays side by
// side. Four elements per invocation wherever the operands allow it. Also swiglu and cast.
import type { DType, Kernel } from "@switchyard/core";
import type { Gpu, Part, WebgpuHandle } from "../device.ts";
import { bytesPerElement, sizeOf } from "../formats.ts";
import { type ParamType, type Program, program } from "../program.ts";
import { erfText, expText, formatText, logText, sigmoidText, tanhText } from "./math.ts";
import {
  at,
  broadcastDims,
  type Dim,
  eachRange,
  FLAT_LANES,
  flatGroups,
  flatSteps,
  flatText,
  type Input,
  lastOf,
  memo,
  only,
  produce,
  type Result,
} from "./parts.ts";

type Scalar = "f32" | "i32" | "u32";
interface Formula {
  /** Element types of the operands a, b, c and of the result. */
  readonly inputs: readonly Scalar[];
  readonly result: Scalar;
  /** Numbers the value reads as p.name. */
  readonly params?: Readonly<Record<string, ParamType>>;
  /** Functions the value calls. */
  readonly text?: string;
  readonly value: string;
  /** The value is also right for vec4s of operands. */
  readonly wide?: true;
}

const f = (value: string, text = "", operands = 1): Formula => ({
  inputs: Array.from({ length: operands }, () => "f32"),
  result: "f32",
  text,
  value,
});
const wide = (value: string, type: Scalar = "f32"): Formula => ({
  inputs: [type, type],
  result: type,
  value,
  wide: true,
});

const gelu = {
  inner: "let inner = 0.7978845608 * a * (1.0 + 0.044715 * a * a); let t = tanh_of(inner);",
  text: expText + tanhText,
};
const formulas = {
  add: wide("a + b"),
  mul: wide("a * b"),
  sub: wide("a - b"),
  div: wide("a / b"),
  maximum: f("select(max(a, b), not_a_number(), is_nan(a) || is_nan(b))", "", 2),
  less: f("select(0.0, 1.0, a < b && !is_nan(a) && !is_nan(b))", "", 2),
  addInt: wide("a + b", "i32"),
  mulInt: wide("a * b", "i32"),
  subInt: wide("a - b", "i32"),
  maximumInt: wide("max(a, b)", "i32"),
  lessInt: { inputs: ["i32", "i32"], result: "f32", value: "select(0.0, 1.0, a < b)" },
  // By bits: f32 and i32 alike, NaN untouched; neither 0 nor -0 is true.
  where: { inputs: ["u32", "u32", "u32"], result: "u32", value: "select(c, b, (a << 1u) != 0u)" },

  recip: f("select(1.0 / a, float_of((bitcast<u32>(a) & 0x80000000u) | 0x7f800000u), a == 0.0)"),
  exp: f("exp_of(a)", expText),
  log: f("log_of(a)", logText),
  // WGSL derives sqrt from inverseSqrt: 0 and infinity are looked after here.
  sqrt: f("select(select(sqrt(a), a, a == 0.0 || is_infinite(a) || is_nan(a)), not_a_number(), a < 0.0)"),
  tanh: f("tanh_of(a)", expText + tanhText),
  erf: f("erf_of(a)", expText + erfText),
  floor: f("floor(a)"),

  affine: {
    inputs: ["f32"],
    result: "f32",
    params: { scale: "f32", shift: "f32" },
    value: "a * p.scale + p.shift",
    wide: true,
  },
  relu: f("select(max(a, 0.0), a, is_nan(a))"),
  sigmoid: f("sigmoid_of(a)", expText + sigmoidText),
  silu: f("a * sigmoid_of(a)", expText + sigmoidText),
  // log(1 + e) = 2 artanh(e / (2 + e)), whose series has no cancellation: its argument is at most 1/3.
  softplus: f(
    "max(a, 0.0) + log1p_of(exp_term(-abs(a)))",
    `${expText}
fn log1p_of(e: f32) -> f32 {
  let s = e / (2.0 + e);
  let z = s * s;
  var q = 1.0 / 15.0;
  q = q * z + 1.0 / 13.0;
  q = q * z + 1.0 / 11.0;
  q = q * z + 1.0 / 9.0;
  q = q * z + 1.0 / 7.0;
  q = q * z + 1.0 / 5.0;
  q = q * z + 1.0 / 3.0;
  return 2.0 * s * (1.0 + q * z);
}`,
  ),
  gelu: f("a * normal_cdf(a)", expText + erfText),
  geluTanh: f("gelu_of(a)", `${gelu.text} fn gelu_of(a: f32) -> f32 { ${gelu.inner} return 0.5 * a * (1.0 + t); }`),

  reluGrad: f("select(0.0, b, a > 0.0)", "", 2),
  siluGrad: f(
    "b * silu_slope(a)",
    `${expText}${sigmoidText} fn silu_slope(a: f32) -> f32 { let s = sigmoid_of(a); return s * (1.0 + a * (1.0 - s)); }`,
    2,
  ),
  // Φ(x) + x φ(x); the square is bounded so that x * 0 does not meet an infinity.
  geluGrad: f("b * (normal_cdf(a) + a * 0.3989422804 * exp_term(-0.5 * min(a * a, 1000.0)))", expText + erfText, 2),
  geluTanhGrad: f(
    "b * gelu_slope(a)",
    `${gelu.text}
fn gelu_slope(a: f32) -> f32 {
  ${gelu.inner}
  return 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * 0.7978845608 * (1.0 + 3.0 * 0.044715 * a * a);
}`,
    2,
  ),
} satisfies Readonly<Record<string, Formula>>;
type FormulaName = keyof typeof formulas;

/**
 * How an operand is walked: "x" like the result, "1" one element for all, "b" along the innermost dimension with the result but with
 * strides of its own outside, "c" one element per innermost row.
 */
type Mode = "x" | "1" | "b" | "c";
const names = ["a", "b", "c"] as const;

/**
 * @param modes one Mode per operand
 * @param rank dimensions after merging; with modes x and 1 always 1
 * @param width elements per invocation, 4 or 1: what n, inner, the strides of "b" and all offsets are counted in
 * @param shifted operands and the result begin at offsets (ranges of split tensors)
 * @param inPlace operand a is the result's own storage
 * @param steps flatSteps
 */
const spreadProgram = memo(
  (
    name: FormulaName,
    modes: string,
    rank: number,
    width: number,
    shifted: boolean,
    inPlace: boolean,
    steps: number,
  ): Program => {
    const formula: Formula = formulas[name];
    const vector = (type: Scalar): string => (width === 4 ? `vec4<${type}>` : type);
    const operands = formula.inputs.map((type, i) => ({ type, name: at(names, i), mode: modes[i] as Mode }));
    const walked = operands.filter(({ mode }) => mode === "b" || mode === "c");
    const outer = Array.from({ length: rank - 1 }, (_, d) => d);

    const reads: Record<string, string> = {};
    for (const { name: own, type, mode } of operands) {
      if (!(inPlace && own === "a")) reads[own] = mode === "x" || mode === "b" ? vector(type) : type;
    }
    const params: Record<string, ParamType> = { n: "u32", ...formula.params };
    if (rank > 1) params.inner = "u32";
    for (const d of outer) params[`size${d}`] = "u32";
    for (const { name: own } of walked) for (const d of outer) params[`${own}${d}`] = "u32";
    if (shifted) {
      params.base = params.yAt = "u32";
      for (const { name: own, mode } of operands) if (mode === "x") params[`${own}At`] = "u32";
    }
    const shift = (own: string): string => (shifted ? ` + p.${own}At` : "");
    const load = ({ name: own, type, mode }: (typeof operands)[number]): string => {
      const splat = (value: string): string => (width === 4 ? `vec4<${type}>(${value})` : value);
      if (mode === "x") return inPlace && own === "a" ? `y[i${shift("y")}]` : `${own}[i${shift(own)}]`;
      if (mode === "1") return splat(`${own}[0]`);
      return mode === "b" ? `${own}[${own}Row + column]` : splat(`${own}[${own}Row]`);
    };
    const call = (component: string): string => `value(${operands.map((x) => `${x.name}_${component}`).join(", ")})`;
    const parameters = operands.map(({ name: own, type }) => `${own}: ${formula.wide ? vector(type) : type}`);
    const result = formula.wide ? vector(formula.result) : formula.result;
    const position =
      walked.length === 0
        ? ""
        : `var rest = i${shifted ? " + p.base" : ""};
  let column = rest % p.inner;
  rest /= p.inner;
  ${walked.map(({ name: own }) => `var ${own}Row = 0u;`).join(" ")}
  ${outer
    .map((_, k) => rank - 2 - k)
    .map(
      (d) => `{ let j = ${d === 0 ? "rest" : `rest % p.size${d}`}; ${d === 0 ? "" : `rest /= p.size${d};`}
    ${walked.map(({ name: own }) => `${own}Row += j * p.${own}${d};`).join(" ")} }`,
    )
    .join("\n  ")}`;
    const each = `vec4<${formula.result}>(${[".x", ".y", ".z", ".w"].map(call).join(", ")})`;
    const body = `${position}
  ${operands.map((operand) => `let ${operand.name}_ = ${load(operand)};`).join("\n  ")}
  y[i${shift("y")}] = ${formula.wide || width === 1 ? call("") : each};`;
    return program({
      key: `${name} ${modes}${rank} x${width}, ${steps} steps${shifted ? " shifted" : ""}${inPlace ? " in place" : ""}`,
      reads,
      writes: { y: vector(formula.result) },
      params,
      lanes: FLAT_LANES,
      code: () => `${formula.text ?? ""}
fn value(${parameters.join(", ")}) -> ${result} { return ${formula.value}; }
${flatText(steps, body)}`,
    });
  },
);

const sameShape = (a: readonly number[], b: readonly number[]): boolean => {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
};
const noNumbers: Readonly<Record<string, number>> = {};

/** Runs a formula over all elements of the result. */
function spread(
  gpu: Gpu,
  name: FormulaName,
  inputs: readonly Input[],
  result: Result,
  attrs: Readonly<Record<string, number>> = noNumbers,
): WebgpuHandle {
  const total = sizeOf(result.shape);
  let modes = "";
  let dims: readonly Dim[] | undefined;
  for (const x of inputs) modes += sameShape(x.shape, result.shape) ? "x" : sizeOf(x.shape) === 1 ? "1" : "?";
  if (modes.includes("?") && total > 0) {
    dims = broadcastDims(
      result.shape,
      inputs.map((x) => x.shape),
    );
    const inner = at(dims, dims.length - 1);
    modes = inputs
      .map((x, i) =>
        sizeOf(x.shape) === total ? "x" : modes[i] === "1" ? "1" : at(inner.strides, i) === 0 ? "c" : "b",
      )
      .join("");
    if (dims.length === 1) dims = undefined;
  }

  const { reuse } = result;
  const full = inputs.filter((_, i) => modes[i] === "x").map((x) => x.handle);
  const inPlace =
    reuse !== undefined &&
    modes[0] === "x" &&
    inputs[0]?.handle === reuse &&
    inputs.every((x, i) => i === 0 || x.handle !== reuse) &&
    full.every(
      (x) => x.parts.length === reuse.parts.length && x.parts.every((part, i) => part.bytes === reuse.parts[i]?.bytes),
    );
  const one = !dims && full.every((x) => x.parts.length === 1);
  const fill = (y: WebgpuHandle): void => {
    if (total === 0) return;
    if (one && y.parts.length === 1) spreadWhole(gpu, { name, modes, inputs, attrs, inPlace }, y, total);
    else spreadRanges(gpu, { name, modes, inputs, attrs, inPlace }, y, full, dims);
  };
  if (!inPlace) return produce(gpu, result, fill);
  fill(reuse);
  return reuse;
}

interface Spread {
  readonly name: FormulaName;
  readonly modes: string;
  readonly inputs: readonly Input[];
  readonly attrs: Readonly<Record<string, number>>;
  readonly inPlace: boolean;
}

/** Operands like the result or of one element, none of them split: by far the most calls. */
function spreadWhole(gpu: Gpu, { name, modes, inputs, attrs, inPlace }: Spread, y: WebgpuHandle, total: number): void {
  const [a, b, c] = inputs;
  const n = Math.ceil(total / 4);
  const steps = flatSteps(gpu);
  const reads: Record<string, WebgpuHandle> = {};
  if (a && !inPlace) reads.a = a.handle;
  if (b) reads.b = b.handle;
  if (c) reads.c = c.handle;
  const params = attrs === noNumbers ? { n } : { n, ...attrs };
  gpu.run(spreadProgram(name, modes, 1, 4, false, inPlace, steps), reads, { y }, params, flatGroups(n, steps));
}

/** Operands with strides of their own, and tensors split over buffers: y and `full` (those of mode x) are walked range by range. */
function spreadRanges(
  gpu: Gpu,
  { name, modes, inputs, attrs, inPlace }: Spread,
  y: WebgpuHandle,
  full: readonly WebgpuHandle[],
  dims: readonly Dim[] = [],
): void {
  const rank = Math.max(1, dims.length);
  const inner = dims.at(-1)?.size ?? 4;
  const steps = flatSteps(gpu);
  const ranged = [y, ...full];
  eachRange(
    ranged,
    ranged.map(() => "f32" as const),
    (parts, offsets, first, count) => {
      const shifted = first > 0 || offsets.some((offset) => offset > 0);
      const width = inner % 4 === 0 && first % 4 === 0 && offsets.every((offset) => offset % 4 === 0) ? 4 : 1;
      // A last vec4 may reach into the next range: that one is written later.
      const n = Math.ceil(count / width);
      const params: Record<string, number> = { n, ...attrs };
      const reads: Record<string, Part> = {};
      if (shifted) {
        params.base = first / width;
        params.yAt = at(offsets, 0) / width;
      }
      if (rank > 1) params.inner = inner / width;
      for (let d = 0; d < rank - 1; d++) params[`size${d}`] = at(dims, d).size;
      let next = 1;
      inputs.forEach((x, i) => {
        const own = at(names, i);
        const mode = modes[i];
        if (mode === "x") {
          if (!(inPlace && i === 0)) reads[own] = at(parts, next);
          if (shifted) params[`${own}At`] = at(offsets, next) / width;
          next++;
          return;
        }
        reads[own] = gpu.whole(name, x.handle);
        if (mode === "1") return;
        for (let d = 0; d < rank - 1; d++) {
          params[`${own}${d}`] = at(at(dims, d).strides, i) / (mode === "b" ? width : 1);
        }
      });
      const one = spreadProgram(name, modes, rank, width, shifted, inPlace, steps);
      gpu.run(one, reads, { y: at(parts, 0) }, params, flatGroups(n, steps));
    },
  );
}

// ---------------------------------------------------------------- swiglu
/** x [rows, 2 h] = [gate | up]; n = rows * h and h count vec4s where `width` is 4. */
const swigluProgram = memo((width: number, steps: number) => {
  const type = width === 4 ? "vec4<f32>" : "f32";
  const each = (body: (component: string) => string): string =>
    width === 4 ? `vec4<f32>(${["x", "y", "z", "w"].map((c) => body(`.${c}`)).join(", ")})` : body("");
  return {
    forward: program({
      key: `swiglu x${width}, ${steps} steps`,
      reads: { x: type },
      writes: { y: type },
      params: { n: "u32", h: "u32" },
      lanes: FLAT_LANES,
      code: () => `${expText}${sigmoidText}
${flatText(
  steps,
  `let at = i + i / p.h * p.h; // row * 2 h + column
  let gate = x[at];
  let s = ${each((c) => `sigmoid_of(gate${c})`)};
  y[i] = gate * s * x[at + p.h];`,
)}`,
    }),
    backward: program({
      key: `swigluGrad x${width}, ${steps} steps`,
      reads: { x: type, dy: type },
      writes: { dx: type },
      params: { n: "u32", h: "u32" },
      lanes: FLAT_LANES,
      code: () => `${expText}${sigmoidText}
${flatText(
  steps,
  `let at = i + i / p.h * p.h;
  let gate = x[at];
  let d = dy[i];
  let s = ${each((c) => `sigmoid_of(gate${c})`)};
  dx[at] = d * x[at + p.h] * s * (1.0 + gate * (1.0 - s));
  dx[at + p.h] = d * gate * s;`,
)}`,
    }),
  };
});

// ---------------------------------------------------------------- cast
/** WGSL from an element of one type to another, both as words. */
function conversion(from: DType, to: DType, x: string): string {
  if (from === to) return x;
  if (from === "i32" || from === "u8") {
    if (to === "i32") return x;
    if (to === "u8") return `byte_of(${x})`;
    // Integers that f16 cannot hold are larger than its largest number: no second rounding happens on the way through f32.
    const float = `float_of_int(${x}, ${to === "bf16" ? 8 : 24}u)`;
    return to === "f32" ? float : to === "f16" ? `half_of(${float})` : `brain_of(${float})`;
  }
  const bits = from === "f16" ? `float_of_half(${x})` : from === "bf16" ? `float_of_brain(${x})` : x;
  if (to === "f32") return bits;
  if (to === "f16") return `half_of(${bits})`;
  if (to === "bf16") return `brain_of(${bits})`;
  return to === "i32" ? `int_of(${bits})` : `byte_of(int_of(${bits}))`;
}
/** The type that holds four elements, and how element k is taken out of one / four of them are put in. */
const fours = {
  4: {
    type: "vec4<u32>",
    take: (k: number) => `v[${k}]`,
    pack: (e: readonly string[]) => `vec4<u32>(${e.join(", ")})`,
  },
  2: {
    type: "vec2<u32>",
    take: (k: number) => `((v[${k >> 1}] >> ${(k & 1) * 16}u) & 0xffffu)`,
    pack: ([a, b, c, d]: readonly string[]) => `vec2<u32>(${a} | (${b} << 16u), ${c} | (${d} << 16u))`,
  },
  1: {
    type: "u32",
    take: (k: number) => `((v >> ${k * 8}u) & 0xffu)`,
    pack: ([a, b, c, d]: readonly string[]) => `${a} | (${b} << 8u) | (${c} << 16u) | (${d} << 24u)`,
  },
} as const;
const foursOf = (dtype: DType) => fours[bytesPerElement(dtype) as 1 | 2 | 4];

/** Four elements per invocation; offsets count fours. */
const castProgram = memo((from: DType, to: DType, steps: number) => {
  const [source, target] = [foursOf(from), foursOf(to)];
  const elements = [0, 1, 2, 3].map((k) => `convert(${source.take(k)})`);
  return program({
    key: `cast ${from} ${to}, ${steps} steps`,
    reads: { x: source.type },
    writes: { y: target.type },
    params: { n: "u32", xAt: "u32", yAt: "u32" },
    lanes: FLAT_LANES,
    code: () => `${formatText}
fn convert(x: u32) -> u32 { return ${conversion(from, to, "x")}; }
${flatText(steps, `let v = x[i + p.xAt]; y[i + p.yAt] = ${target.pack(elements)};`)}`,
  });
});
/** One word of y per invocation, from word `word` on; elements outside [yAt, yAt + n) stay. For ranges that begin anywhere. */
const castRangeProgram = memo((from: DType, to: DType) => {
  const [wide, narrow] = [bytesPerElement(from), bytesPerElement(to)];
  const [perX, perY] = [4 / wide, 4 / narrow];
  const mask = (bytes: number): string => (bytes === 4 ? "0xffffffffu" : bytes === 2 ? "0xffffu" : "0xffu");
  return program({
    key: `cast range ${from} ${to}`,
    reads: { x: "u32" },
    writes: { y: "u32" },
    params: { n: "u32", xAt: "u32", yAt: "u32", word: "u32", words: "u32" },
    lanes: FLAT_LANES,
    code: () => `${formatText}
fn convert(x: u32) -> u32 { return ${conversion(from, to, "x")}; }
fn main(group: u32, lane: u32) {
  let i = group * ${FLAT_LANES}u + lane;
  if (i >= p.words) { return; }
  let w = i + p.word;
  var old = y[w];
  for (var k = 0u; k < ${perY}u; k++) {
    let j = w * ${perY}u + k - p.yAt; // wraps round before the range
    if (j >= p.n) { continue; }
    let e = j + p.xAt;
    let value = convert((x[e / ${perX}u] >> (e % ${perX}u * ${wide * 8}u)) & ${mask(wide)});
    let at = k * ${narrow * 8}u;
    old = (old & ~(${mask(narrow)} << at)) | (value << at);
  }
  y[w] = old;
}`,
  });
});

function cast(gpu: Gpu, x: Input, result: Result): WebgpuHandle {
  const y = gpu.alloc(result);
  const [from, to] = [x.dtype, result.dtype];
  const steps = flatSteps(gpu);
  eachRange([y, x.handle], [to, from], (parts, offsets, _, count) => {
    const [yAt, xAt] = [at(offsets, 0), at(offsets, 1)];
    const bound = [{ x: at(parts, 1) }, { y: at(parts, 0) }] as const;
    if (yAt % 4 === 0 && xAt % 4 === 0) {
      const n = Math.ceil(count / 4);
      gpu.run(castProgram(from, to, steps), ...bound, { n, xAt: xAt / 4, yAt: yAt / 4 }, flatGroups(n, steps));
    } else {
      const each = 4 / bytesPerElement(to);
      const word = Math.floor(yAt / each);
      const words = Math.ceil((yAt + count) / each) - word;
      const params = { n: count, xAt, yAt, word, words };
      gpu.run(castRangeProgram(from, to), ...bound, params, flatGroups(words, 1));
    }
  });
  return y;
}

// ---------------------------------------------------------------- the table
type Primitive =
  | "add"
  | "mul"
  | "maximum"
  | "less"
  | "where"
  | "recip"
  | "exp"
  | "log"
  | "sqrt"
  | "tanh"
  | "erf"
  | "floor"
  | "cast";

export function elementwiseKernels(
  gpu: Gpu,
): Readonly<Record<string, Kernel<WebgpuHandle>>> & { readonly [P in Primitive]: Kernel<WebgpuHandle> } {
  const steps = flatSteps(gpu);
  const kernel = (body: Kernel<WebgpuHandle>, letters: string): Kernel<WebgpuHandle> =>
    Object.assign(body, { unsupported: only(letters) });
  const over = (name: FormulaName): Kernel<WebgpuHandle> =>
    kernel((inputs, [result]) => (result ? [spread(gpu, name, inputs, result)] : []), "f");
  const arithmetic = (name: FormulaName, integers: FormulaName): Kernel<WebgpuHandle> =>
    kernel(
      (inputs, [result]) => (result ? [spread(gpu, inputs[0]?.dtype === "i32" ? integers : name, inputs, result)] : []),
      "n",
    );
  const approximated = (exact: FormulaName, byTanh: FormulaName): Kernel<WebgpuHandle> =>
    kernel(
      (inputs, [result], { approximate }) =>
        result ? [spread(gpu, approximate === "tanh" ? byTanh : exact, inputs, result)] : [],
      "f",
    );

  return {
    add: arithmetic("add", "addInt"),
    mul: arithmetic("mul", "mulInt"),
    maximum: arithmetic("maximum", "maximumInt"),
    less: arithmetic("less", "lessInt"),
    sub: arithmetic("sub", "subInt"),
    div: over("div"),
    where: kernel((inputs, [result]) => (result ? [spread(gpu, "where", inputs, result)] : []), "fn"),
    recip: over("recip"),
    exp: over("exp"),
    log: over("log"),
    sqrt: over("sqrt"),
    tanh: over("tanh"),
    erf: over("erf"),
    floor: over("floor"),
    affine: kernel(
      (inputs, [result], { scale, shift }) => (result ? [spread(gpu, "affine", inputs, result, { scale, shift })] : []),
      "f",
    ),
    relu: over("relu"),
    sigmoid: over("sigmoid"),
    silu: over("silu"),
    softplus: over("softplus"),
    gelu: approximated("gelu", "geluTanh"),
    reluGrad: over("reluGrad"),
    siluGrad: over("siluGrad"),
    geluGrad: approximated("geluGrad", "geluTanhGrad"),

    swiglu: kernel(([x], [result]) => {
      if (!x || !result) return [];
      const width = lastOf(result) % 4 === 0 ? 4 : 1;
      const n = sizeOf(result.shape) / width;
      const params = { n, h: lastOf(result) / width };
      const reads = { x: x.handle };
      const fill = (y: WebgpuHandle): void =>
        gpu.run(swigluProgram(width, steps).forward, reads, { y }, params, flatGroups(n, steps));
      return [produce(gpu, result, fill)];
    }, "f"),
    swigluGrad: kernel(([x, dy], [result]) => {
      if (!x || !dy || !result) return [];
      const width = lastOf(dy) % 4 === 0 ? 4 : 1;
      const n = sizeOf(dy.shape) / width;
      const params = { n, h: lastOf(dy) / width };
      const reads = { x: x.handle, dy: dy.handle };
      const fill = (dx: WebgpuHandle): void =>
        gpu.run(swigluProgram(width, steps).backward, reads, { dx }, params, flatGroups(n, steps));
      return [produce(gpu, result, fill)];
    }, "f"),

    cast: kernel(([x], [result]) => (x && result ? [cast(gpu, x, result)] : []), "?"),
  };
}
