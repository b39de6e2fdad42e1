// Reductions and scans: sums, means, maxima, cumulative sums.
import { at, type Op, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { mul, square } from "./elementwise.ts";
import { broadcast, dtypes, fail, last, same, spec } from "./infer.ts";
import { scatterLast, topkIndices } from "./rows.ts";
import { broadcastTo, reshape } from "./shape.ts";

export const sumToOp: Op<{ readonly shape: readonly number[] }> = {
  name: "sumTo",
  shapes(inputs, { shape }) {
    dtypes("sumTo", inputs, "f");
    const x = at(inputs, 0);
    if (shape.length > x.shape.length || !same(broadcast("sumTo", [spec(shape), x]), x.shape)) {
      fail("sumTo", `[${shape.join(", ")}] does not broadcast to the input`, inputs);
    }
    return [spec(shape)];
  },
  vjp: ([dy], [x]) => [dy && x && broadcastTo(dy, x.shape)],
};
/** Sums down to a shape that broadcasts to x's. */
export const sumTo = (x: Tensor, shape: readonly number[]): Tensor => run1(sumToOp, [x], { shape });

/** Sum over the given axes (all of them by default), which disappear. */
export const sum = (x: Tensor, axes?: readonly number[]): Tensor => {
  if (axes === undefined) return sumTo(x, []);
  const gone = new Set(axes.map((a) => (a < 0 ? a + x.shape.length : a)));
  const summed = sumTo(
    x,
    x.shape.map((d, i) => (gone.has(i) ? 1 : d)),
  );
  return reshape(
    summed,
    x.shape.filter((_, i) => !gone.has(i)),
  );
};
/** Sum over the last axis, which stays as 1. */
export const sumLast = (x: Tensor): Tensor => sumTo(x, [...x.shape.slice(0, -1), 1]);

/** Mean over the given axes (all of them by default), which disappear. The mean of nothing is 0. */
export const mean = (x: Tensor, axes?: readonly number[]): Tensor => {
  const total = sum(x, axes);
  return mul(total, total.size === 0 ? 1 : 1 / Math.max(x.size / total.size, 1));
};

export const maxLastOp: Op = {
  name: "maxLast",
  shapes(inputs) {
    dtypes("maxLast", inputs, "f");
    const x = at(inputs, 0);
    if (x.shape.length === 0 || last(x) === 0) fail("maxLast", "the maximum of nothing", inputs);
    return [spec([...x.shape.slice(0, -1), 1])];
  },
  // On a tie the gradient goes to the first.
  vjp: ([dy], [x]) => [dy && x && scatterLast(dy, topkIndices(x, 1), last(x))],
};
/** Maximum over the last axis, which stays as 1. */
export const maxLast = (x: Tensor): Tensor => run1(maxLastOp, [x], {});

export interface Cumsum {
  readonly axis: number;
  readonly exclusive?: boolean;
  readonly reverse?: boolean;
}
export const cumsumOp: Op<Cumsum> = {
  name: "cumsum",
  shapes(inputs, { axis }) {
    const x = at(inputs, 0);
    if ((x.dtype !== "f32" && x.dtype !== "i32") || x.shape[axis] === undefined) fail("cumsum", `axis ${axis}`, inputs);
    return [spec(x.shape, x.dtype)];
  },
  vjp: ([dy], _, __, attrs) => [dy && run1(cumsumOp, [dy], { ...attrs, reverse: !attrs.reverse })],
};
/** Running sum along an axis; exclusive: without the element itself; reverse: from the end. */
export const cumsum = (x: Tensor, attrs: Cumsum): Tensor =>
  run1(cumsumOp, [x], { ...attrs, axis: attrs.axis < 0 ? attrs.axis + x.shape.length : attrs.axis });

export const sumSquaresOp: Op = {
  name: "sumSquares",
  shapes(inputs) {
    dtypes("sumSquares", inputs, "f");
    return [spec([])];
  },
  fallback: ([x]) => (x ? [sum(square(x))] : []),
  vjp: ([dy], [x]) => [dy && x && mul(mul(x, dy), 2)],
};
/** Sum of all squares, []. */
export const sumSquares = (x: Tensor): Tensor => run1(sumSquaresOp, [x], {});
