// Shapes and copies: reshape, transpose, slice, concat, broadcasting, constants.
import type { TypedArray } from "../backend.ts";
import { ShapeError } from "../errors.ts";
import { at, type Op, run1 } from "../op.ts";
import { show, sizeOf, type Tensor } from "../tensor.ts";
import { add } from "./elementwise.ts";
import { broadcast, count, fail, same, spec } from "./infer.ts";
import { sumTo } from "./reduce.ts";

export const reshapeOp: Op<{ readonly shape: readonly number[] }> = {
  name: "reshape",
  shapes(inputs, { shape }) {
    const x = at(inputs, 0);
    if (sizeOf(shape) !== sizeOf(x.shape)) fail("reshape", `cannot become [${shape.join(", ")}]`, inputs);
    return [spec(shape, x.dtype)];
  },
  vjp: ([dy], [x]) => [dy && x && reshape(dy, x.shape)],
};
/** The same elements in another shape, without a copy. One dimension may be -1. */
export const reshape = (x: Tensor, shape: readonly number[]): Tensor => {
  if (same(shape, x.shape)) return x;
  let [known, open, wrong] = [1, 0, false];
  for (const d of shape) {
    if (d === -1) open++;
    else known *= d;
    wrong ||= d !== -1 && !(Number.isInteger(d) && d >= 0);
  }
  const left = known === 0 ? 0 : x.size / known;
  if (wrong || open > 1 || (open === 1 && !Number.isInteger(left))) {
    throw new ShapeError(`reshape: ${show(x)} cannot become [${shape.join(", ")}]`);
  }
  const full = shape.map((d) => (d === -1 ? left : d));
  return open === 1 && same(full, x.shape) ? x : run1(reshapeOp, [x], { shape: full });
};

export const transposeOp: Op<{ readonly perm: readonly number[] }> = {
  name: "transpose",
  shapes(inputs, { perm }) {
    const x = at(inputs, 0);
    const order = [...perm].sort((a, b) => a - b);
    if (perm.length !== x.shape.length || order.some((axis, i) => axis !== i)) {
      fail("transpose", `[${perm.join(", ")}] is not an order of the axes`, inputs);
    }
    return [
      spec(
        perm.map((axis) => at(x.shape, axis)),
        x.dtype,
      ),
    ];
  },
  vjp: ([dy], _, __, { perm }) => [
    dy &&
      transpose(
        dy,
        perm.map((_, i) => perm.indexOf(i)),
      ),
  ],
};
/** Axes in another order: axis i of the result is axis perm[i] of x. Without `perm` the last two are exchanged. */
export const transpose = (x: Tensor, perm?: readonly number[]): Tensor => {
  const r = x.shape.length;
  return run1(transposeOp, [x], { perm: perm ?? x.shape.map((_, i) => (i < r - 2 ? i : 2 * r - 3 - i)) });
};

export interface Slice {
  readonly start: readonly number[];
  readonly size: readonly number[];
}
export const sliceOp: Op<Slice> = {
  name: "slice",
  shapes(inputs, { start, size }) {
    const x = at(inputs, 0);
    const fits = x.shape.every((d, i) => {
      const [from, n] = [start[i] ?? -1, size[i] ?? -1];
      return Number.isInteger(from) && Number.isInteger(n) && from >= 0 && n >= 0 && from + n <= d;
    });
    if (!fits || start.length !== x.shape.length || size.length !== x.shape.length) {
      fail("slice", `start [${start.join(", ")}], size [${size.join(", ")}] does not fit`, inputs);
    }
    return [spec(size, x.dtype)];
  },
  vjp: ([dy], [x], _, { start, size }) => [
    dy &&
      x &&
      pad(
        dy,
        start,
        x.shape.map((d, i) => d - at(start, i) - at(size, i)),
      ),
  ],
};
/** A block of x: from `start`, of the given size, one number per axis. */
export const slice = (x: Tensor, start: readonly number[], size: readonly number[]): Tensor =>
  same(size, x.shape) && start.every((d) => d === 0) ? x : run1(sliceOp, [x], { start, size });

export interface Pad {
  readonly before: readonly number[];
  readonly after: readonly number[];
}
export const padOp: Op<Pad> = {
  name: "pad",
  shapes: ([x], { before, after }) =>
    x
      ? [
          spec(
            x.shape.map((d, i) => d + at(before, i) + at(after, i)),
            x.dtype,
          ),
        ]
      : [],
  fallback([x], { before, after }) {
    if (!x) return [];
    let y = x;
    x.shape.forEach((_, axis) => {
      const zeros = (n: number) =>
        full(
          x,
          y.shape.map((d, i) => (i === axis ? n : d)),
          0,
        );
      const [front, back] = [at(before, axis), at(after, axis)];
      if (front + back > 0) y = concat([...(front ? [zeros(front)] : []), y, ...(back ? [zeros(back)] : [])], axis);
    });
    return [y];
  },
  vjp: ([dy], [x], _, { before }) => [dy && x && slice(dy, before, x.shape)],
};
/** Zeros before and after, so many per axis. */
export const pad = (x: Tensor, before: readonly number[], after: readonly number[]): Tensor =>
  before.every((d) => d === 0) && after.every((d) => d === 0) ? x : run1(padOp, [x], { before, after });

export const concatOp: Op<{ readonly axis: number }> = {
  name: "concat",
  // A cache that was given away grows in place where the backend left room behind it.
  reuses: [0],
  shapes(inputs, { axis }) {
    const x = at(inputs, 0);
    const fits = inputs.every(
      (y) =>
        y.dtype === x.dtype &&
        y.shape.length === x.shape.length &&
        y.shape.every((d, i) => i === axis || d === x.shape[i]),
    );
    if (!fits || x.shape[axis] === undefined) fail("concat", `axis ${axis}: shapes or dtypes differ`, inputs);
    return [
      spec(
        x.shape.map((d, i) => (i === axis ? inputs.reduce((n, y) => n + at(y.shape, axis), 0) : d)),
        x.dtype,
      ),
    ];
  },
  vjp([dy], inputs, _, { axis }) {
    if (!dy) return [];
    let from = 0;
    return inputs.map((x) => {
      const start = x.shape.map((_, i) => (i === axis ? from : 0));
      from += at(x.shape, axis);
      return slice(dy, start, x.shape);
    });
  },
};
/** Tensors one after the other along an axis (negative: from the end). */
export const concat = (xs: readonly Tensor[], axis: number): Tensor => {
  const x = at(xs, 0);
  return xs.length === 1 ? x : run1(concatOp, xs, { axis: axis < 0 ? axis + x.shape.length : axis });
};

export const broadcastToOp: Op<{ readonly shape: readonly number[] }> = {
  name: "broadcastTo",
  shapes(inputs, { shape }) {
    count("broadcastTo", inputs, 1);
    const x = at(inputs, 0);
    if (!same(broadcast("broadcastTo", [x, spec(shape)]), shape))
      fail("broadcastTo", `cannot become [${shape.join(", ")}]`, inputs);
    return [spec(shape, x.dtype)];
  },
  fallback: ([x], { shape }) => (x ? [add(x, full(x, shape, 0))] : []),
  vjp: ([dy], [x]) => [dy && x && reduceTo(dy, x.shape)],
};
/** x repeated to a shape it broadcasts to. */
export const broadcastTo = (x: Tensor, shape: readonly number[]): Tensor =>
  same(x.shape, shape) ? x : run1(broadcastToOp, [x], { shape });

/** The inverse of broadcasting: sums down to `shape`. */
export const reduceTo = (x: Tensor, shape: readonly number[]): Tensor => (same(x.shape, shape) ? x : sumTo(x, shape));

/** A constant [] of x's dtype on the engine that owns the backend. */
export const constant = (x: Tensor, value: number): Tensor => full(x, [], value);

/** A constant tensor of x's dtype, made on the engine that owns the backend. */
export const full = (x: Tensor, shape: readonly number[], value: number): Tensor => {
  const n = sizeOf(shape);
  const data: TypedArray = x.dtype === "i32" ? new Int32Array(n).fill(value) : new Float64Array(n).fill(value);
  return x.engine.root.tensor(data, shape, x.dtype);
};

/** A host array as a constant on the engine that owns x's backend. */
export const hostConstant = (x: Tensor, data: TypedArray, shape: readonly number[]): Tensor =>
  x.engine.root.tensor(data, shape);
