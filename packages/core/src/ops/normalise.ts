// Softmax and its relatives, cross entropy, RMS norm and layer norm, each with its gradient as an op of its own.

import { vjpOfFallback } from "../autodiff.ts";
import { at, type Op, run, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { add, div, exp, less, log, maximum, mul, neg, recip, sqrt, stopGradient, sub, where } from "./elementwise.ts";
import { count, dtypes, fail, last, likeFirst, rowsOf, same, spec } from "./infer.ts";
import { maxLast, sumLast } from "./reduce.ts";
import { gatherLast, oneHot } from "./rows.ts";
import { reduceTo, reshape } from "./shape.ts";

const twoAlike =
  (name: string): Op["shapes"] =>
  (inputs) => {
    count(name, inputs, 2);
    if (!same(at(inputs, 0).shape, at(inputs, 1).shape)) fail(name, "shapes differ", inputs);
    return likeFirst(name)(inputs);
  };
const isEmpty = (x: Tensor): boolean => x.size === 0;
const meanLast = (x: Tensor): Tensor => mul(sumLast(x), 1 / last(x));
// Of a row of -inf only: 0, so that subtracting it gives -inf and not NaN.
const safeMax = (x: Tensor): Tensor => {
  const top = stopGradient(maxLast(x));
  return where(less(top, -3e38), 0, top);
};

export const softmaxGradOp: Op = {
  name: "softmaxGrad",
  shapes: twoAlike("softmaxGrad"),
  fallback: ([y, dy]) => (y && dy ? [mul(y, sub(dy, sumLast(mul(y, dy))))] : []),
};
export const softmaxOp: Op = {
  name: "softmax",
  shapes: likeFirst("softmax"),
  fallback([x]) {
    if (!x) return [];
    if (isEmpty(x)) return [x];
    const e = exp(sub(x, safeMax(x)));
    return [div(e, maximum(sumLast(e), 1e-30))];
  },
  vjp: ([dy], _, [y]) => [dy && y && run1(softmaxGradOp, [y, dy], {})],
};
/** Softmax over the last axis; a row of -inf only gives zeros. */
export const softmax = (x: Tensor): Tensor => run1(softmaxOp, [x], {});

export const logSoftmaxGradOp: Op = {
  name: "logSoftmaxGrad",
  shapes: twoAlike("logSoftmaxGrad"),
  fallback: ([y, dy]) => (y && dy ? [sub(dy, mul(exp(y), sumLast(dy)))] : []),
};
export const logSoftmaxOp: Op = {
  name: "logSoftmax",
  shapes: likeFirst("logSoftmax"),
  fallback: ([x]) => (x ? [isEmpty(x) ? x : sub(x, logSumExp(x))] : []),
  vjp: ([dy], _, [y]) => [dy && y && run1(logSoftmaxGradOp, [y, dy], {})],
};
/** log(softmax(x)) over the last axis. */
export const logSoftmax = (x: Tensor): Tensor => run1(logSoftmaxOp, [x], {});

export const logSumExpOp: Op = {
  name: "logSumExp",
  shapes(inputs) {
    dtypes("logSumExp", inputs, "f");
    const x = at(inputs, 0);
    if (x.shape.length === 0 || last(x) === 0) fail("logSumExp", "of nothing", inputs);
    return [spec([...x.shape.slice(0, -1), 1])];
  },
  fallback([x]) {
    if (!x) return [];
    const top = safeMax(x);
    return [add(log(sumLast(exp(sub(x, top)))), top)];
  },
  vjp: ([dy], [x]) => [dy && x && mul(softmax(x), dy)],
};
/** log of the sum of exponentials over the last axis, which stays as 1. */
export const logSumExp = (x: Tensor): Tensor => run1(logSumExpOp, [x], {});

// ---------------------------------------------------------------- cross entropy
export const crossEntropyGradOp: Op = {
  name: "crossEntropyGrad",
  shapes(inputs) {
    count("crossEntropyGrad", inputs, 4);
    return [spec(at(inputs, 0).shape)];
  },
  fallback([logits, labels, lse, dloss]) {
    if (!logits || !labels || !lse || !dloss) return [];
    const p = exp(sub(logits, reshape(lse, [-1, 1])));
    const known = isLabel(labels, last(logits));
    return [mul(sub(p, oneHot(labels, last(logits))), reshape(mul(dloss, known), [-1, 1]))];
  },
};
const isLabel = (labels: Tensor, vocabulary: number): Tensor => mul(less(-1, labels), less(labels, vocabulary));
export const crossEntropyOp: Op = {
  name: "crossEntropy",
  shapes(inputs) {
    count("crossEntropy", inputs, 2);
    dtypes("crossEntropy", inputs, "fi");
    const [logits, labels] = [at(inputs, 0), at(inputs, 1)];
    if (logits.shape.length !== 2 || !same(labels.shape, logits.shape.slice(0, 1))) {
      fail("crossEntropy", "logits [n, vocabulary] and labels [n]", inputs);
    }
    return [spec(labels.shape), spec(labels.shape)];
  },
  fallback([logits, labels]) {
    if (!logits || !labels) return [];
    const n = rowsOf(logits);
    const lse = n === 0 ? reshape(logits, [0]) : reshape(logSumExp(logits), [n]);
    const known = isLabel(labels, last(logits));
    const picked = reshape(gatherLast(logits, reshape(where(known, labels, -1), [n, 1])), [n]);
    return [where(known, sub(lse, picked), 0), lse];
  },
  vjp(dys, inputs, [, lse], attrs) {
    const [dloss, dlse] = dys;
    const [logits, labels] = inputs;
    if (dlse) return vjpOfFallback(crossEntropyOp, dys, inputs, attrs);
    return [dloss && logits && labels && lse && run1(crossEntropyGradOp, [logits, labels, lse, dloss], {})];
  },
};
/** Losses [n] of logits [n, vocabulary] for labels [n], and the log-sum-exp [n]. A label outside the vocabulary (-1) costs nothing. */
export const crossEntropy = (logits: Tensor, labels: Tensor): { readonly losses: Tensor; readonly lse: Tensor } => {
  const ys = run(crossEntropyOp, [logits, labels], {});
  return { losses: at(ys, 0), lse: at(ys, 1) };
};

// ---------------------------------------------------------------- norms
export interface Norm {
  readonly eps: number;
}
const perColumn = (name: string, vectors: number): Op<Norm>["shapes"] => {
  return (inputs) => {
    dtypes(name, inputs, "f");
    const x = at(inputs, 0);
    for (const w of inputs.slice(1, 1 + vectors)) {
      if (x.shape.length === 0 || w.shape.length !== 1 || last(x) !== last(w))
        fail(name, "x [..., n] with vectors [n]", inputs);
    }
    return [spec(x.shape)];
  };
};
export const rmsNormGradOp: Op<Norm> = {
  name: "rmsNormGrad",
  shapes: (inputs) => [spec(at(inputs, 0).shape), spec(at(inputs, 1).shape)],
  fallback([x, w, dy], { eps }) {
    if (!x || !w || !dy) return [];
    const scale = recip(sqrt(add(meanLast(mul(x, x)), eps))); // [..., 1]
    const unit = mul(x, scale);
    const g = mul(dy, w);
    return [mul(sub(g, mul(unit, meanLast(mul(g, unit)))), scale), reduceTo(mul(dy, unit), w.shape)];
  },
};
export const rmsNormOp: Op<Norm> = {
  name: "rmsNorm",
  shapes: perColumn("rmsNorm", 1),
  fallback: ([x, w], { eps }) => (x && w ? [mul(mul(x, recip(sqrt(add(meanLast(mul(x, x)), eps)))), w)] : []),
  vjp: ([dy], [x, w], _, attrs) => (dy && x && w ? run(rmsNormGradOp, [x, w, dy], attrs) : []),
};
/** x / sqrt(mean(x²) + eps) * w over the last axis (1910.07467). */
export const rmsNorm = (x: Tensor, w: Tensor, attrs: Norm): Tensor => run1(rmsNormOp, [x, w], attrs);

export const layerNormGradOp: Op<Norm> = {
  name: "layerNormGrad",
  shapes: ([x, w]) => (x && w ? [spec(x.shape), spec(w.shape), spec(w.shape)] : []),
  fallback([x, w, dy], { eps }) {
    if (!x || !w || !dy) return [];
    const centred = sub(x, meanLast(x));
    const scale = recip(sqrt(add(meanLast(mul(centred, centred)), eps)));
    const unit = mul(centred, scale);
    const g = mul(dy, w);
    const dx = mul(sub(sub(g, meanLast(g)), mul(unit, meanLast(mul(g, unit)))), scale);
    return [dx, reduceTo(mul(dy, unit), w.shape), reduceTo(dy, w.shape)];
  },
};
export const layerNormOp: Op<Norm> = {
  name: "layerNorm",
  shapes: perColumn("layerNorm", 2),
  fallback([x, w, b], { eps }) {
    if (!x || !w || !b) return [];
    const centred = sub(x, meanLast(x));
    const scale = recip(sqrt(add(meanLast(mul(centred, centred)), eps)));
    return [add(mul(mul(centred, scale), w), b)];
  },
  vjp: ([dy], [x, w], _, attrs) => (dy && x && w ? run(layerNormGradOp, [x, w, dy], attrs) : []),
};
/** (x - mean) / sqrt(variance + eps) * w + b over the last axis (1607.06450). */
export const layerNorm = (x: Tensor, w: Tensor, b: Tensor, attrs: Norm): Tensor => run1(layerNormOp, [x, w, b], attrs);

/** The sum of -p log p over the last axis, which disappears; p log p is 0 at 0. */
export const entropyLast = (p: Tensor): Tensor =>
  reshape(neg(sumLast(mul(p, log(maximum(p, 1e-30))))), p.shape.slice(0, -1));
