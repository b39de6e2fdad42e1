// Elementwise ops: arithmetic with broadcasting, functions of one variable, activations and their gradients.
import type { DType, Spec } from "../backend.ts";
import { at, type Op, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { broadcast, count, dtypes, fail, last, likeFirst, same, spec } from "./infer.ts";
import { concat, constant, reduceTo, slice } from "./shape.ts";

const arithmetic = (name: string): ((inputs: readonly Spec[]) => readonly Spec[]) => {
  return (inputs) => {
    count(name, inputs, 2);
    const [a, b] = [at(inputs, 0), at(inputs, 1)];
    if (a.dtype !== b.dtype || (a.dtype !== "f32" && a.dtype !== "i32")) fail(name, "needs two f32 or two i32", inputs);
    return [spec(broadcast(name, inputs), a.dtype)];
  };
};

export const addOp: Op = {
  name: "add",
  shapes: arithmetic("add"),
  vjp: ([dy], [a, b], _, __, [wantA, wantB]) =>
    dy && a && b ? [wantA ? reduceTo(dy, a.shape) : undefined, wantB ? reduceTo(dy, b.shape) : undefined] : [],
  reuses: [0],
};
export const mulOp: Op = {
  name: "mul",
  shapes: arithmetic("mul"),
  vjp: ([dy], [a, b], _, __, [wantA, wantB]) =>
    dy && a && b
      ? [wantA ? reduceTo(mul(dy, b), a.shape) : undefined, wantB ? reduceTo(mul(dy, a), b.shape) : undefined]
      : [],
  reuses: [0],
};
export const maximumOp: Op = {
  name: "maximum",
  shapes: arithmetic("maximum"),
  // Where both are equal the gradient goes to the first.
  vjp: ([dy], [a, b]) => {
    if (!dy || !a || !b) return [];
    const second = less(a, b);
    return [reduceTo(mul(dy, affine(second, { scale: -1, shift: 1 })), a.shape), reduceTo(mul(dy, second), b.shape)];
  },
};
export const lessOp: Op = {
  name: "less",
  shapes: (inputs) => arithmetic("less")(inputs).map((x) => spec(x.shape)),
};
export const whereOp: Op = {
  name: "where",
  shapes(inputs) {
    count("where", inputs, 3);
    const [condition, a, b] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    if (condition.dtype !== "f32") fail("where", "the condition must be an f32 mask", inputs);
    if (a.dtype !== b.dtype) fail("where", "both branches must have one dtype", inputs);
    return [spec(broadcast("where", inputs), a.dtype)];
  },
  vjp: ([dy], [condition, a, b], _, __, [, wantA, wantB]) =>
    dy && condition && a && b
      ? [
          undefined,
          wantA ? reduceTo(where(condition, dy, 0), a.shape) : undefined,
          wantB ? reduceTo(where(condition, 0, dy), b.shape) : undefined,
        ]
      : [],
};
export const subOp: Op = {
  name: "sub",
  shapes: arithmetic("sub"),
  fallback: ([a, b]) => (a && b ? [add(a, a.dtype === "i32" ? mul(b, -1) : affine(b, { scale: -1, shift: 0 }))] : []),
  vjp: ([dy], [a, b], _, __, [wantA, wantB]) =>
    dy && a && b ? [wantA ? reduceTo(dy, a.shape) : undefined, wantB ? reduceTo(neg(dy), b.shape) : undefined] : [],
  reuses: [0],
};
export const divOp: Op = {
  name: "div",
  shapes(inputs) {
    dtypes("div", inputs, "ff");
    return [spec(broadcast("div", inputs))];
  },
  fallback: ([a, b]) => (a && b ? [mul(a, recip(b))] : []),
  vjp: ([dy], [a, b], [y], _, [wantA, wantB]) => {
    if (!dy || !a || !b || !y) return [];
    const da = div(dy, b);
    return [wantA ? reduceTo(da, a.shape) : undefined, wantB ? reduceTo(neg(mul(da, y)), b.shape) : undefined];
  },
};

/** a + b with NumPy broadcasting; a number counts as a tensor of that value. */
export const add = (a: Tensor, b: Tensor | number): Tensor =>
  typeof b === "number" ? shifted(a, b) : run1(addOp, [a, b], {});
/** a - b. */
export const sub = (a: Tensor | number, b: Tensor | number): Tensor => {
  if (typeof b === "number") return typeof a === "number" ? fail("sub", "needs a tensor", []) : shifted(a, -b);
  if (typeof a === "number") return b.dtype === "f32" ? affine(b, { scale: -1, shift: a }) : sub(constant(b, a), b);
  return run1(subOp, [a, b], {});
};
/** a * b. */
export const mul = (a: Tensor, b: Tensor | number): Tensor => {
  if (typeof b !== "number") return run1(mulOp, [a, b], {});
  return a.dtype === "f32" ? affine(a, { scale: b, shift: 0 }) : run1(mulOp, [a, constant(a, b)], {});
};
/** a / b. */
export const div = (a: Tensor | number, b: Tensor | number): Tensor => {
  if (typeof b === "number") return typeof a === "number" ? fail("div", "needs a tensor", []) : mul(a, 1 / b);
  return typeof a === "number" ? mul(recip(b), a) : run1(divOp, [a, b], {});
};
/** The larger of both, elementwise. */
export const maximum = (a: Tensor, b: Tensor | number): Tensor => run1(maximumOp, [a, asTensor(b, a)], {});
/** The smaller of both, elementwise. */
export const minimum = (a: Tensor, b: Tensor | number): Tensor => {
  const other = asTensor(b, a);
  return where(less(other, a), other, a);
};
/** 1 where a < b, else 0. No gradient. */
export const less = (a: Tensor | number, b: Tensor | number): Tensor => {
  if (typeof a === "number")
    return typeof b === "number" ? fail("less", "needs a tensor", []) : run1(lessOp, [constant(b, a), b], {});
  return run1(lessOp, [a, asTensor(b, a)], {});
};
/** `a` where the mask is not 0, else `b`. */
export const where = (condition: Tensor, a: Tensor | number, b: Tensor | number): Tensor => {
  const like = typeof a !== "number" ? a : typeof b !== "number" ? b : condition;
  return run1(whereOp, [condition, asTensor(a, like), asTensor(b, like)], {});
};

const asTensor = (x: Tensor | number, like: Tensor): Tensor => (typeof x === "number" ? constant(like, x) : x);
const shifted = (a: Tensor, shift: number): Tensor =>
  a.dtype === "f32" ? affine(a, { scale: 1, shift }) : run1(addOp, [a, constant(a, shift)], {});

/** x * scale + shift with numbers known on the host: no constant is uploaded where the backend has the kernel. */
export interface Affine {
  readonly scale: number;
  readonly shift: number;
}
export const affineOp: Op<Affine> = {
  name: "affine",
  shapes: likeFirst("affine"),
  fallback: ([x], { scale, shift }) =>
    x ? [run1(addOp, [run1(mulOp, [x, constant(x, scale)], {}), constant(x, shift)], {})] : [],
  vjp: ([dy], _, __, { scale }) => [dy && (scale === 1 ? dy : affine(dy, { scale, shift: 0 }))],
  reuses: [0],
};
export const affine = (x: Tensor, attrs: Affine): Tensor => run1(affineOp, [x], attrs);
export const neg = (x: Tensor): Tensor => affine(x, { scale: -1, shift: 0 });

type Derivative = (dy: Tensor, x: Tensor, y: Tensor) => Tensor;
const unary = (name: string, derivative?: Derivative, fallback?: (x: Tensor) => Tensor): Op => ({
  name,
  shapes: likeFirst(name),
  ...(fallback ? { fallback: ([x]: readonly Tensor[]) => (x ? [fallback(x)] : []) } : {}),
  ...(derivative
    ? {
        vjp: ([dy]: readonly (Tensor | undefined)[], [x]: readonly Tensor[], [y]: readonly Tensor[]) =>
          dy && x && y ? [derivative(dy, x, y)] : [],
      }
    : {}),
});

export const recipOp: Op = unary("recip", (dy, _, y) => neg(mul(dy, mul(y, y))));
export const expOp: Op = unary("exp", (dy, _, y) => mul(dy, y));
export const logOp: Op = unary("log", (dy, x) => div(dy, x));
export const sqrtOp: Op = unary("sqrt", (dy, _, y) => div(mul(dy, 0.5), y));
export const tanhOp: Op = unary("tanh", (dy, _, y) => mul(dy, sub(1, mul(y, y))));
export const erfOp: Op = unary("erf", (dy, x) => mul(dy, mul(exp(neg(mul(x, x))), 2 / Math.sqrt(Math.PI))));
export const floorOp: Op = unary("floor");
/** Value without gradient. */
export const stopGradientOp: Op = {
  name: "stopGradient",
  shapes: ([x]) => (x ? [x] : []),
  fallback: ([x]) => (x ? [x] : []),
  vjp: () => [],
};

export const recip = (x: Tensor): Tensor => run1(recipOp, [x], {});
export const exp = (x: Tensor): Tensor => run1(expOp, [x], {});
export const log = (x: Tensor): Tensor => run1(logOp, [x], {});
export const sqrt = (x: Tensor): Tensor => run1(sqrtOp, [x], {});
export const tanh = (x: Tensor): Tensor => run1(tanhOp, [x], {});
export const erf = (x: Tensor): Tensor => run1(erfOp, [x], {});
/** Largest integer not above x. No gradient. */
export const floor = (x: Tensor): Tensor => run1(floorOp, [x], {});
export const stopGradient = (x: Tensor): Tensor => run1(stopGradientOp, [x], {});
export const square = (x: Tensor): Tensor => mul(x, x);

export const castOp: Op<{ readonly dtype: DType }> = {
  name: "cast",
  shapes: ([x], { dtype }) => (x ? [spec(x.shape, dtype)] : []),
  vjp: ([dy], [x], _, { dtype }) => [dy && x && dtype !== "i32" && dtype !== "u8" ? cast(dy, x.dtype) : undefined],
};
/** Converts the storage type; floats become i32 by dropping the fraction. */
export const cast = (x: Tensor, dtype: DType): Tensor => (x.dtype === dtype ? x : run1(castOp, [x], { dtype }));

// ---------------------------------------------------------------- activations
/** An activation whose gradient is an op of (x, dy): one pass over memory where the backend has the kernel. */
const activation = (
  name: string,
  value: (x: Tensor) => Tensor,
  derivative: (x: Tensor) => Tensor,
): { readonly op: Op; readonly gradOp: Op } => {
  const gradOp: Op = {
    name: `${name}Grad`,
    shapes(inputs) {
      count(`${name}Grad`, inputs, 2);
      if (!same(at(inputs, 0).shape, at(inputs, 1).shape)) fail(`${name}Grad`, "shapes differ", inputs);
      return likeFirst(`${name}Grad`)(inputs);
    },
    fallback: ([x, dy]) => (x && dy ? [mul(dy, derivative(x))] : []),
  };
  const op = unary(name, (dy, x) => run1(gradOp, [x, dy], {}), value);
  return { op, gradOp };
};

const positive = (x: Tensor): Tensor => less(0, x);
const reluPair = activation(
  "relu",
  (x) => maximum(x, 0),
  (x) => positive(x),
);
const sigmoidOfTanh = (x: Tensor): Tensor => affine(tanh(mul(x, 0.5)), { scale: 0.5, shift: 0.5 });
export const sigmoidOp: Op = unary("sigmoid", (dy, _, y) => mul(dy, mul(y, sub(1, y))), sigmoidOfTanh);
const siluPair = activation(
  "silu",
  (x) => mul(x, sigmoid(x)),
  (x) => {
    const s = sigmoid(x);
    return mul(s, add(mul(x, sub(1, s)), 1));
  },
);
/** max(x, 0) + log(1 + exp(-|x|)): no overflow. */
export const softplusOp: Op = unary(
  "softplus",
  (dy, x) => mul(dy, sigmoid(x)),
  (x) => add(maximum(x, 0), log(add(exp(neg(maximum(x, neg(x)))), 1))),
);

export const reluOp: Op = reluPair.op;
export const siluOp: Op = siluPair.op;

/** max(x, 0); the gradient at 0 is 0. */
export const relu = (x: Tensor): Tensor => run1(reluOp, [x], {});
/** 1 / (1 + exp(-x)). */
export const sigmoid = (x: Tensor): Tensor => run1(sigmoidOp, [x], {});
/** x * sigmoid(x). */
export const silu = (x: Tensor): Tensor => run1(siluOp, [x], {});
/** log(1 + exp(x)). */
export const softplus = (x: Tensor): Tensor => run1(softplusOp, [x], {});

export interface Gelu {
  readonly approximate?: "none" | "tanh";
}
const root2 = Math.SQRT1_2;
const tanhScale = Math.sqrt(2 / Math.PI);
const geluInner = (x: Tensor): Tensor => mul(mul(x, add(mul(mul(x, x), 0.044715), 1)), tanhScale);
const geluGradOp: Op<Gelu> = {
  name: "geluGrad",
  shapes: likeFirst("geluGrad"),
  fallback([x, dy], { approximate = "none" }) {
    if (!x || !dy) return [];
    if (approximate === "none") {
      const below = affine(erf(mul(x, root2)), { scale: 0.5, shift: 0.5 });
      const density = mul(exp(mul(mul(x, x), -0.5)), 1 / Math.sqrt(2 * Math.PI));
      return [mul(dy, add(below, mul(x, density)))];
    }
    const t = tanh(geluInner(x));
    const inner = mul(affine(mul(x, x), { scale: 3 * 0.044715, shift: 1 }), tanhScale);
    const slope = mul(mul(x, 0.5), mul(sub(1, mul(t, t)), inner));
    return [mul(dy, add(affine(t, { scale: 0.5, shift: 0.5 }), slope))];
  },
};
export const geluOp: Op<Gelu> = {
  name: "gelu",
  shapes: likeFirst("gelu"),
  fallback: ([x], { approximate = "none" }) => {
    if (!x) return [];
    const below = approximate === "none" ? erf(mul(x, root2)) : tanh(geluInner(x));
    return [mul(x, affine(below, { scale: 0.5, shift: 0.5 }))];
  },
  vjp: ([dy], [x], _, attrs) => (dy && x ? [run1(geluGradOp, [x, dy], attrs)] : []),
};
/** x * Φ(x), exactly or by the tanh approximation. */
export const gelu = (x: Tensor, attrs: Gelu = {}): Tensor => run1(geluOp, [x], attrs);

const swigluGradOp: Op = {
  name: "swigluGrad",
  shapes: likeFirst("swigluGrad"),
  fallback([x, dy]) {
    if (!x || !dy) return [];
    const [gate, up] = halves(x);
    return [concat([run1(siluPair.gradOp, [gate, mul(dy, up)], {}), mul(dy, silu(gate))], -1)];
  },
};
export const swigluOp: Op = {
  name: "swiglu",
  shapes(inputs) {
    dtypes("swiglu", inputs, "f");
    const x = at(inputs, 0);
    if (x.shape.length === 0 || last(x) % 2 !== 0)
      fail("swiglu", "the last dimension must be even (gate, then up)", inputs);
    return [spec([...x.shape.slice(0, -1), last(x) / 2])];
  },
  fallback([x]) {
    if (!x) return [];
    const [gate, up] = halves(x);
    return [mul(silu(gate), up)];
  },
  vjp: ([dy], [x]) => (dy && x ? [run1(swigluGradOp, [x, dy], {})] : []),
};
const halves = (x: Tensor): [gate: Tensor, up: Tensor] => {
  const half = last(x) / 2;
  const start = x.shape.map(() => 0);
  const size = [...x.shape.slice(0, -1), half];
  return [slice(x, start, size), slice(x, [...start.slice(0, -1), half], size)];
};
/** silu(gate) * up for x [..., 2 hidden] = [gate | up]; gives [..., hidden]. */
export const swiglu = (x: Tensor): Tensor => run1(swigluOp, [x], {});
