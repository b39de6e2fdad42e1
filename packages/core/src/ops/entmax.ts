// entmax with alpha = 1.5 (1905.05702): a softmax that gives exact zeros. Composite of sorting and running sums, with
// the gradient as an op of its own.
import { at, type Op, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { cast, div, less, maximum, mul, sqrt, square, stopGradient, sub, where } from "./elementwise.ts";
import { count, fail, last, likeFirst, same } from "./infer.ts";
import { cumsum, maxLast, sumLast } from "./reduce.ts";
import { argsort, gatherLast } from "./rows.ts";
import { hostConstant } from "./shape.ts";

export const entmax15GradOp: Op = {
  name: "entmax15Grad",
  shapes(inputs) {
    count("entmax15Grad", inputs, 2);
    if (!same(at(inputs, 0).shape, at(inputs, 1).shape)) fail("entmax15Grad", "shapes differ", inputs);
    return likeFirst("entmax15Grad")(inputs);
  },
  fallback([y, dy]) {
    if (!y || !dy) return [];
    const root = sqrt(y); // the Jacobian is diag(s) - s sᵀ / Σ s with s = √y
    return [mul(root, sub(dy, div(sumLast(mul(root, dy)), maximum(sumLast(root), 1e-30))))];
  },
};

export const entmax15Op: Op = {
  name: "entmax15",
  shapes: likeFirst("entmax15"),
  fallback([x]) {
    if (!x) return [];
    if (x.size === 0) return [x];
    const n = last(x);
    const masked = less(x, -3e38);
    const top = stopGradient(maxLast(x));
    // Half the distance to the largest. Below -1 the answer is 0; cut at -2, such entries add no rounding to the sums.
    const z = maximum(mul(sub(where(masked, -1e30, x), where(less(top, -3e38), 0, top)), 0.5), -2);
    const sorted = gatherLast(z, argsort(z, { descending: true }));
    const rank = hostConstant(
      x,
      Float64Array.from({ length: n }, (_, i) => i + 1),
      [n],
    );
    const sums = cumsum(sorted, { axis: -1 });
    const mean = div(sums, rank);
    const spread = sub(cumsum(square(sorted), { axis: -1 }), mul(sums, mean)); // k (mean of squares - mean²)
    const threshold = sub(mean, sqrt(maximum(div(sub(1, spread), rank), 0))); // τ if the k largest were the support
    const beyond = sumLast(less(sorted, threshold)); // [..., 1]
    const tau = gatherLast(threshold, cast(sub(n - 1, beyond), "i32"));
    return [where(masked, 0, square(maximum(sub(z, tau), 0)))];
  },
  vjp: ([dy], _, [y]) => [dy && y && run1(entmax15GradOp, [y, dy], {})],
};

/**
 * 1.5-entmax over the last axis (1905.05702): [x/2 - τ]₊², τ so that it sums to 1. Like softmax with exact zeros for
 * what lies far below the largest; a row of -inf only gives zeros.
 */
export const entmax15 = (x: Tensor): Tensor => run1(entmax15Op, [x], {});
