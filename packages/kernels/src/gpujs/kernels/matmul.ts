// Matrix products, dense and by expert: one dot product per thread. Threads share no memory: nothing is used twice.
import type { Kernel, TypedArray } from "@switchyard/core";
import { at, type Calls, type GpujsHandle, type Input, lastOf, only, sizeOf, type Value, type Work } from "../calls.ts";
import { broadcastStrides, type Program, split } from "../program.ts";
import { copy } from "./shape.ts";

/** y [batches, m, n]: element (z, row, column) is a dot product of k terms, which lie a1 and b1 apart. */
const product = (bias: boolean): Program => ({
  name: bias ? "productBias" : "product",
  arrays: bias ? ["a", "b", "bias"] : ["a", "b"],
  // Strides of a: batch, row, term; of b: batch, column, term.
  sizes: ["m", "n", "k", "a0", "ar", "a1", "b0", "bc", "b1"],
  body: `
  ${split("line", "column", "i", "n")}
  ${split("z", "row", "line", "m")}
  let left = z * a0 + row * ar;
  let right = z * b0 + column * bc;
  let sum = ${bias ? "bias[column]" : "0"};
  for (let p = 0; p < k; p++) {
    sum += a[left] * b[right];
    left += a1;
    right += b1;
  }
  return sum;`,
});
const plain = product(false);
const biased = product(true);

/** Row i of x [n, k] with the weights of its expert; -1 is none. */
const grouped: Program = {
  name: "groupedMatmul",
  arrays: ["x", "w", "experts"],
  // Elements of an expert's weights; strides between columns and between terms.
  sizes: ["n", "k", "each", "wc", "w1"],
  body: `
  ${split("row", "column", "i", "n")}
  const e = experts[row];
  let sum = 0;
  if (e >= 0) {
    let left = row * k;
    let right = e * each + column * wc;
    for (let p = 0; p < k; p++) {
      sum += x[left] * w[right];
      left += 1;
      right += w1;
    }
  }
  return sum;`,
};

/** Element (e, r, c): over the rows of expert e, a[row, r] * b[row, c]. */
const outer: Program = {
  name: "groupedOuter",
  arrays: ["a", "b", "starts"],
  sizes: ["p", "q"],
  body: `
  ${split("line", "c", "i", "q")}
  ${split("e", "r", "line", "p")}
  const first = starts[e];
  const count = starts[e + 1] - first;
  let left = first * p + r;
  let right = first * q + c;
  let sum = 0;
  for (let s = 0; s < count; s++) {
    sum += a[left] * b[right];
    left += p;
    right += q;
  }
  return sum;`,
};

/** The expert of each of n rows, -1 behind the last block. */
const expertsOf = (work: Work, ends: Value, n: number): Promise<Value> =>
  work.derive(ends, `experts ${n}`, (closed) => {
    const experts = new Float32Array(n).fill(-1);
    closed.forEach((end, e) => {
      experts.fill(e, closed[e - 1] ?? 0, end);
    });
    return experts;
  });
const startsOf = (work: Work, ends: Value): Promise<Value> =>
  work.derive(ends, "starts", (closed: TypedArray) => Float32Array.of(0, ...closed));

/** The batches of x as one dimension that fits `batch`: copied where it repeats in more than one way. */
async function batches(work: Work, x: Input, batch: readonly number[]): Promise<{ value: Value; stride: number }> {
  const own = x.shape.slice(0, -2);
  const matrix = sizeOf(x.shape.slice(-2));
  if (sizeOf(own) === 1) return { value: x.value, stride: 0 };
  if (sizeOf(own) === sizeOf(batch)) return { value: x.value, stride: matrix };
  const strides = [...broadcastStrides(own, batch).map((stride) => stride * matrix), 1];
  return { value: await copy(work, x.value, [...batch, matrix], strides), stride: matrix };
}

export function matmulKernels(
  calls: Calls,
): Readonly<Record<string, Kernel<GpujsHandle>>> & { readonly matmul: Kernel<GpujsHandle> } {
  return {
    matmul: calls.kernel(
      "matmul",
      async ([x, w], [y], attrs: { transposeA?: boolean; transposeB?: boolean }, work) => {
        if (!x || !w || !y) return [];
        const batch = y.shape.slice(0, -2);
        const [m, n] = [at(y.shape, batch.length), at(y.shape, batch.length + 1)];
        const k = at(x.shape, x.shape.length - (attrs.transposeA ? 2 : 1));
        const [a, b] = [await batches(work, x, batch), await batches(work, w, batch)];
        const [ar, a1] = attrs.transposeA ? [1, m] : [k, 1];
        const [bc, b1] = attrs.transposeB ? [k, 1] : [1, n];
        const sizes = { m, n, k, a0: a.stride, ar, a1, b0: b.stride, bc, b1 };
        return [await work.run(plain, sizeOf(y.shape), [a.value, b.value], sizes)];
      },
      only("ff"),
    ),

    linear: calls.kernel(
      "linear",
      async ([x, w, bias], [y], _, work) => {
        if (!x || !w || !y) return [];
        const [n, k] = [lastOf(y), lastOf(x)];
        const sizes = { m: sizeOf(y.shape) / Math.max(n, 1), n, k, a0: 0, ar: k, a1: 1, b0: 0, bc: k, b1: 1 };
        const values = [x.value, w.value, ...(bias ? [bias.value] : [])];
        return [await work.run(bias ? biased : plain, sizeOf(y.shape), values, sizes)];
      },
      only("fwf"),
    ),

    groupedMatmul: calls.kernel(
      "groupedMatmul",
      async ([x, w, ends], [y], { transposed = false }: { transposed?: boolean }, work) => {
        if (!x || !w || !ends || !y) return [];
        const [n, k] = [lastOf(y), lastOf(x)];
        const experts = await expertsOf(work, ends.value, at(x.shape, 0));
        const [wc, w1] = transposed ? [1, n] : [k, 1];
        return [await work.run(grouped, sizeOf(y.shape), [x.value, w.value, experts], { n, k, each: n * k, wc, w1 })];
      },
      only("fwi"),
    ),

    groupedOuter: calls.kernel(
      "groupedOuter",
      async ([a, b, ends], [y], _, work) => {
        if (!a || !b || !ends || !y) return [];
        const starts = await startsOf(work, ends.value);
        return [await work.run(outer, sizeOf(y.shape), [a.value, b.value, starts], { p: lastOf(a), q: lastOf(b) })];
      },
      only("ffi"),
    ),
  };
}
