// What needs a number of each row first: softmax and its relatives, cross entropy, RMS norm. One launch finds the
// numbers, the next one uses them.
import type { Kernel } from "@switchyard/core";
import { type Calls, type GpujsHandle, type Input, lastOf, only, rowsOf, type Value, type Work } from "../calls.ts";
import { logarithm, type Program, split } from "../program.ts";
import { maxOver, sumOver } from "./reduce.ts";

const rowAndColumn = split("row", "column", "i", "n");
// Of a row of -infinity only: 0, so that subtracting it gives -infinity and not NaN.
const safeTop = `let m = top[row];
  if (m < -3e38) { m = 0; }`;

/** Sum of exp(x - maximum) of each row. */
const expSums: Program = {
  name: "expSums",
  arrays: ["x", "top"],
  sizes: ["n"],
  body: `
  const row = i;
  ${safeTop}
  let sum = 0;
  for (let p = 0; p < n; p++) { sum += Math.exp(x[i * n + p] - m); }
  return sum;`,
};
const logSums: Program = {
  name: "logSums",
  arrays: ["sums", "top"],
  body: `
  const row = i;
  ${safeTop}
  const sum = sums[i];
  ${logarithm("y", "sum")}
  return y + m;`,
};
const softmax: Program = {
  name: "softmax",
  arrays: ["x", "top", "sums"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  ${safeTop}
  return Math.exp(x[i] - m) / Math.max(sums[row], 1e-30);`,
};
const minusRow: Program = {
  name: "logSoftmax",
  arrays: ["x", "lse"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return x[i] - lse[row];`,
};
const rowDots: Program = {
  name: "rowDots",
  arrays: ["a", "b"],
  sizes: ["n"],
  body: `
  let sum = 0;
  for (let p = 0; p < n; p++) { sum += a[i * n + p] * b[i * n + p]; }
  return sum;`,
};
const softmaxGrad: Program = {
  name: "softmaxGrad",
  arrays: ["y", "dy", "dots"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return y[i] * (dy[i] - dots[row]);`,
};
const logSoftmaxGrad: Program = {
  name: "logSoftmaxGrad",
  arrays: ["y", "dy", "sums"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return dy[i] - Math.exp(y[i]) * sums[row];`,
};

const losses: Program = {
  name: "crossEntropy",
  arrays: ["x", "labels", "lse"],
  sizes: ["n"],
  body: `
  const label = labels[i];
  let loss = 0;
  if (label >= 0 && label < n) { loss = lse[i] - x[i * n + label]; }
  return loss;`,
};
const lossesGrad: Program = {
  name: "crossEntropyGrad",
  arrays: ["x", "labels", "lse", "dloss"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  const label = labels[row];
  let y = 0;
  if (label >= 0 && label < n) {
    y = Math.exp(x[i] - lse[row]);
    if (label == column) { y -= 1; }
    y = y * dloss[row];
  }
  return y;`,
};

/** 1 / sqrt(mean of squares + eps) of each row. */
const scales: Program = {
  name: "rmsScales",
  arrays: ["x"],
  sizes: ["n"],
  numbers: ["eps"],
  body: `
  let sum = 0;
  for (let p = 0; p < n; p++) { sum += x[i * n + p] * x[i * n + p]; }
  return 1 / Math.sqrt(sum / n + eps);`,
};
const scaled: Program = {
  name: "rmsNorm",
  arrays: ["x", "w", "scale"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return x[i] * scale[row] * w[column];`,
};
/** Mean over each row of dy * w * x * scale. */
const rmsMeans: Program = {
  name: "rmsMeans",
  arrays: ["x", "w", "dy", "scale"],
  sizes: ["n"],
  body: `
  let sum = 0;
  for (let p = 0; p < n; p++) { sum += dy[i * n + p] * w[p] * x[i * n + p]; }
  return sum * scale[i] / n;`,
};
const rmsGrad: Program = {
  name: "rmsNormGrad",
  arrays: ["x", "w", "dy", "scale", "means"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return (dy[i] * w[column] - x[i] * scale[row] * means[row]) * scale[row];`,
};
const rmsTerms: Program = {
  name: "rmsTerms",
  arrays: ["x", "dy", "scale"],
  sizes: ["n"],
  body: `
  ${rowAndColumn}
  return dy[i] * x[i] * scale[row];`,
};

interface Rows {
  readonly rows: number;
  readonly n: number;
  readonly top: Value;
  readonly sums: Value;
}
/** Maximum of each row of x, and the sum of exponentials below it. */
async function rowNumbers(work: Work, x: Input): Promise<Rows> {
  const [rows, n] = [rowsOf(x), lastOf(x)];
  const top = await maxOver(work, x.value, rows, n);
  return { rows, n, top, sums: await work.run(expSums, rows, [x.value, top], { n }) };
}
async function logSumExp(work: Work, x: Input): Promise<Value> {
  const { rows, top, sums } = await rowNumbers(work, x);
  return work.run(logSums, rows, [sums, top]);
}

export function normaliseKernels(calls: Calls): Readonly<Record<string, Kernel<GpujsHandle>>> {
  return {
    softmax: calls.kernel(
      "softmax",
      async ([x], _, __, work) => {
        if (!x) return [];
        const { n, top, sums } = await rowNumbers(work, x);
        return [await work.run(softmax, x.value.length, [x.value, top, sums], { n })];
      },
      only("f"),
    ),
    logSumExp: calls.kernel("logSumExp", async ([x], _, __, work) => (x ? [await logSumExp(work, x)] : []), only("f")),
    logSoftmax: calls.kernel(
      "logSoftmax",
      async ([x], _, __, work) => {
        if (!x) return [];
        const lse = await logSumExp(work, x);
        return [await work.run(minusRow, x.value.length, [x.value, lse], { n: lastOf(x) })];
      },
      only("f"),
    ),
    softmaxGrad: calls.kernel(
      "softmaxGrad",
      async ([y, dy], _, __, work) => {
        if (!y || !dy) return [];
        const n = lastOf(y);
        const dots = await work.run(rowDots, rowsOf(y), [y.value, dy.value], { n });
        return [await work.run(softmaxGrad, y.value.length, [y.value, dy.value, dots], { n })];
      },
      only("ff"),
    ),
    logSoftmaxGrad: calls.kernel(
      "logSoftmaxGrad",
      async ([y, dy], _, __, work) => {
        if (!y || !dy) return [];
        const n = lastOf(y);
        const sums = await sumOver(work, dy.value, rowsOf(y), n, 1);
        return [await work.run(logSoftmaxGrad, y.value.length, [y.value, dy.value, sums], { n })];
      },
      only("ff"),
    ),

    crossEntropy: calls.kernel(
      "crossEntropy",
      async ([x, labels], _, __, work) => {
        if (!x || !labels) return [];
        const lse = await logSumExp(work, x);
        return [await work.run(losses, rowsOf(x), [x.value, labels.value, lse], { n: lastOf(x) }), lse];
      },
      only("fi"),
    ),
    crossEntropyGrad: calls.kernel(
      "crossEntropyGrad",
      async ([x, labels, lse, dloss], _, __, work) => {
        if (!x || !labels || !lse || !dloss) return [];
        const values = [x.value, labels.value, lse.value, dloss.value];
        return [await work.run(lossesGrad, x.value.length, values, { n: lastOf(x) })];
      },
      only("fiff"),
    ),

    rmsNorm: calls.kernel(
      "rmsNorm",
      async ([x, w], _, { eps }: { eps: number }, work) => {
        if (!x || !w) return [];
        const n = lastOf(x);
        const scale = await work.run(scales, rowsOf(x), [x.value], { n, eps });
        return [await work.run(scaled, x.value.length, [x.value, w.value, scale], { n })];
      },
      only("ff"),
    ),
    rmsNormGrad: calls.kernel(
      "rmsNormGrad",
      async ([x, w, dy], _, { eps }: { eps: number }, work) => {
        if (!x || !w || !dy) return [];
        const [rows, n] = [rowsOf(x), lastOf(x)];
        const scale = await work.run(scales, rows, [x.value], { n, eps });
        const means = await work.run(rmsMeans, rows, [x.value, w.value, dy.value, scale], { n });
        const terms = await work.run(rmsTerms, x.value.length, [x.value, dy.value, scale], { n });
        return [
          await work.run(rmsGrad, x.value.length, [x.value, w.value, dy.value, scale, means], { n }),
          await sumOver(work, terms, 1, rows, n),
        ];
      },
      only("fff"),
    ),
  };
}
