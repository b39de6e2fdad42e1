// Every differentiable op against central finite differences in float64, over awkward sizes.
import { describe, expect, it } from "vitest";
import { gradientError, numbers } from "../finite-difference.test-util.ts";
import * as ops from "../index.ts";
import type { Tensor } from "../tensor.ts";

const positive = (n: number): Float64Array => numbers(n, 5).map((x) => Math.abs(x) + 0.3);
const ints = (like: Tensor, data: readonly number[], shape: readonly number[] = [data.length]): Tensor =>
  like.engine.root.tensor(Int32Array.from(data), shape);
const table = (like: Tensor, shape: readonly number[], f: (x: number) => number): Tensor =>
  like.engine.root.tensor(
    Float64Array.from({ length: shape.reduce((n, d) => n * d, 1) }, (_, i) => f(i * 0.37)),
    shape,
  );

interface Case {
  readonly shapes: readonly (readonly number[])[];
  readonly f: (...inputs: Tensor[]) => Tensor | readonly Tensor[];
  readonly values?: readonly Float64Array[];
}
const unary = (f: (x: Tensor) => Tensor): Case => ({ shapes: [[3, 5]], f });

const cases: Record<string, Case> = {
  "add broadcast": {
    shapes: [
      [3, 1, 5],
      [2, 5],
    ],
    f: ops.add,
  },
  "add number": unary((x) => ops.add(x, 3)),
  "mul broadcast": {
    shapes: [
      [3, 1],
      [1, 5],
    ],
    f: ops.mul,
  },
  "mul twice the same": unary((x) => ops.mul(x, x)),
  maximum: { shapes: [[7], [7]], f: ops.maximum },
  minimum: { shapes: [[7], [7]], f: ops.minimum },
  where: {
    shapes: [[2, 3], [3]],
    f: (a, b) => ops.where(ops.less(a.engine.root.tensor(numbers(6, 9), [2, 3]), 0), a, b),
  },
  "sub broadcast": { shapes: [[4, 3], [3]], f: ops.sub },
  "sub from number": unary((x) => ops.sub(2, x)),
  div: { shapes: [[4, 3], [3]], f: ops.div, values: [numbers(12), positive(3)] },
  affine: unary((x) => ops.affine(x, { scale: -2.5, shift: 1 })),
  recip: { shapes: [[5]], f: ops.recip, values: [positive(5)] },
  exp: unary(ops.exp),
  log: { shapes: [[5]], f: ops.log, values: [positive(5)] },
  sqrt: { shapes: [[5]], f: ops.sqrt, values: [positive(5)] },
  tanh: unary(ops.tanh),
  erf: unary(ops.erf),
  relu: unary(ops.relu),
  sigmoid: unary(ops.sigmoid),
  silu: unary(ops.silu),
  softplus: unary(ops.softplus),
  gelu: unary((x) => ops.gelu(x)),
  "gelu tanh": unary((x) => ops.gelu(x, { approximate: "tanh" })),
  swiglu: { shapes: [[3, 10]], f: ops.swiglu },
  reshape: unary((x) => ops.mul(ops.reshape(x, [5, 3]), ops.reshape(x, [5, 3]))),
  transpose: { shapes: [[2, 3, 5]], f: (x) => ops.transpose(x, [2, 0, 1]) },
  slice: { shapes: [[4, 5]], f: (x) => ops.slice(x, [1, 2], [2, 3]) },
  pad: { shapes: [[2, 3]], f: (x) => ops.pad(x, [1, 0], [0, 2]) },
  concat: {
    shapes: [
      [2, 3],
      [2, 1],
      [2, 2],
    ],
    f: (...xs) => ops.concat(xs, 1),
  },
  broadcastTo: { shapes: [[3, 1]], f: (x) => ops.broadcastTo(x, [2, 3, 4]) },
  sumTo: { shapes: [[2, 3, 4]], f: (x) => ops.sumTo(x, [3, 1]) },
  "sum axes": { shapes: [[2, 3, 4]], f: (x) => ops.sum(x, [0, -1]) },
  mean: { shapes: [[2, 3, 4]], f: (x) => ops.mean(x, [1]) },
  maxLast: unary(ops.maxLast),
  cumsum: { shapes: [[3, 5]], f: (x) => ops.cumsum(x, { axis: 0, exclusive: true }) },
  "cumsum reverse": { shapes: [[3, 5]], f: (x) => ops.cumsum(x, { axis: 1, reverse: true }) },
  sumSquares: unary(ops.sumSquares),
  takeRows: { shapes: [[4, 3]], f: (x) => ops.takeRows(x, ints(x, [2, -1, 2, 0, 3, 9], [2, 3])) },
  addRows: { shapes: [[5, 2]], f: (x) => ops.addRows(x, ints(x, [1, 1, -1, 0, 7]), 3) },
  gatherLast: { shapes: [[2, 4]], f: (x) => ops.gatherLast(x, ints(x, [3, -1, 0, 1, 1, 2], [2, 3])) },
  scatterLast: { shapes: [[2, 3]], f: (x) => ops.scatterLast(x, ints(x, [3, -1, 0, 1, 1, 2], [2, 3]), 4) },
  linear: { shapes: [[2, 3, 5], [7, 5], [7]], f: ops.linear },
  softmax: unary(ops.softmax),
  logSoftmax: unary(ops.logSoftmax),
  logSumExp: unary(ops.logSumExp),
  crossEntropy: { shapes: [[4, 5]], f: (x) => ops.crossEntropy(x, ints(x, [2, -1, 0, 4])).losses },
  "crossEntropy with lse": {
    shapes: [[3, 5]],
    f: (x) => {
      const { losses, lse } = ops.crossEntropy(x, ints(x, [2, 1, 0]));
      return [losses, lse];
    },
  },
  entropyLast: { shapes: [[3, 5]], f: (x) => ops.entropyLast(ops.softmax(x)) },
  rmsNorm: { shapes: [[2, 3, 5], [5]], f: (x, w) => ops.rmsNorm(x, w, { eps: 1e-5 }) },
  layerNorm: { shapes: [[2, 3, 5], [5], [5]], f: (x, w, b) => ops.layerNorm(x, w, b, { eps: 1e-5 }) },
  rope: {
    shapes: [[2, 3, 2, 6]],
    f: (x) => ops.rope(x, table(x, [3, 3], Math.cos), table(x, [3, 3], Math.sin)),
  },
  "rope partial interleaved": {
    shapes: [[2, 3, 2, 6]],
    f: (x) => ops.rope(x, table(x, [2, 3, 2], Math.cos), table(x, [2, 3, 2], Math.sin), { interleaved: true }),
  },
  "softmaxTopk renormalised": { shapes: [[3, 5]], f: (x) => topkParts(x, "softmax-topk-renormalise") },
  "softmaxTopk raw": { shapes: [[3, 5]], f: (x) => topkParts(x, "softmax-topk") },
  "softmaxTopk after": { shapes: [[3, 5]], f: (x) => topkParts(x, "topk-softmax") },
  groupedMatmul: {
    shapes: [
      [7, 3],
      [4, 5, 3],
    ],
    f: (x, w) => ops.groupedMatmul(x, w, ints(x, [2, 2, 3, 6])),
  },
  "groupedMatmul transposed": {
    shapes: [
      [7, 5],
      [4, 5, 3],
    ],
    f: (x, w) => ops.groupedMatmul(x, w, ints(x, [2, 2, 3, 6]), { transposed: true }),
  },
  groupedOuter: {
    shapes: [
      [7, 3],
      [7, 5],
    ],
    f: (a, b) => ops.groupedOuter(a, b, ints(a, [2, 2, 3, 6])),
  },
  combineRows: {
    shapes: [
      [5, 3],
      [4, 2],
    ],
    f: (out, weights) => ops.combineRows(out, weights, ints(out, [6, 1, 3, 0, -1])),
  },
  moeExperts: {
    shapes: [
      [5, 4],
      [3, 6, 4],
      [3, 4, 3],
      [5, 2],
    ],
    f: (hidden, gateUp, down, weights) =>
      ops.moeExperts(
        hidden,
        { gateUp, down },
        { ids: ints(hidden, [0, 2, 2, 0, -1, 0, 3, -1, 2, 0], [5, 2]), weights },
      ),
  },
  stopGradient: {
    shapes: [[4]],
    f: (x) => ops.mul(x, ops.stopGradient(ops.affine(ops.mul(x, 0), { scale: 1, shift: 2 }))),
  },
  customGrad: {
    shapes: [[4]],
    f: (x) =>
      ops.customGrad(
        [x],
        (v) => ops.mul(v, ops.mul(v, v)),
        (dy, [v]) => [v && ops.mul(dy, ops.mul(ops.mul(v, v), 3))],
      ),
  },
  recomputed: {
    shapes: [
      [3, 4],
      [5, 4],
    ],
    f: (x, w) => ops.recomputed([x, w], (a, b) => ops.softmax(ops.mul(ops.linear(a, b), 2))),
  },
};
function topkParts(x: Tensor, order: "softmax-topk-renormalise" | "softmax-topk" | "topk-softmax"): readonly Tensor[] {
  const { weights, probabilities } = ops.softmaxTopk(x, { k: 2, order });
  return [weights, probabilities];
}

for (const transposeA of [false, true]) {
  for (const transposeB of [false, true]) {
    cases[`matmul ${transposeA ? "Aᵀ" : "A"} ${transposeB ? "Bᵀ" : "B"}`] = {
      shapes: [transposeA ? [2, 1, 5, 3] : [2, 1, 3, 5], transposeB ? [3, 4, 5] : [3, 5, 4]],
      f: (a, b) => ops.matmul(a, b, { transposeA, transposeB }),
    };
  }
}
const attentionCases: Record<string, Omit<ops.Attention, "scale">> = {
  full: { causal: false },
  causal: { causal: true },
  window: { causal: true, window: 2 },
  "causal with probabilities": { causal: true, probabilities: true },
};
for (const [name, attrs] of Object.entries(attentionCases)) {
  for (const masked of [false, true]) {
    cases[`attention ${name}${masked ? ", masked" : ""}`] = {
      shapes: [
        [2, 3, 4, 3],
        [2, 5, 2, 3],
        [2, 5, 2, 2],
      ],
      f: (q, k, v) => {
        const mask = q.engine.root.tensor(Float64Array.of(1, 1, 1, 1, 1, 0, 0, 1, 1, 1), [2, 5]);
        const { output, probabilities } = ops.attention(q, k, v, { ...attrs, scale: 0.7, ...(masked ? { mask } : {}) });
        return probabilities ? [output, probabilities] : output;
      },
    };
  }
}

describe("gradients", () => {
  it.each(Object.entries(cases))("%s", async (_, { shapes, f, values }) => {
    expect(await gradientError(shapes, f, values ? { values } : {})).toBeLessThan(1e-8);
  });
});
