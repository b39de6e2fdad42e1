// Rows by id on both code paths, against plain loops: all storage types, split tables and results, long lists of ids, and the order
// of sums, which is that of the input bit by bit.
import type { DType } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, host, ints, testGpu, uniform } from "../call.test-util.ts";
import { rowKernels } from "./rows.ts";

const size = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
const n = (x: Host, i: number): number => Number(x.data[i] ?? 0);
const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
/** Integers from `low` up to `high`, without it. */
const integers = (seed: number, shape: readonly number[], low: number, high: number): Host =>
  ints(
    shape,
    Array.from(uniform(seed, shape).data, (x) => Math.min(high - 1, low + Math.floor(((x + 1) / 2) * (high - low)))),
  );
/** Any bits of a storage type; rows are only copied. */
function anything(dtype: DType, shape: readonly number[]): Host {
  const bits = Array.from({ length: size(shape) }, (_, i) => (i * 2654435761 + 12345) % 65521);
  if (dtype === "u8") return host(Uint8Array.from(bits), shape, dtype);
  if (dtype === "f16" || dtype === "bf16") return host(Uint16Array.from(bits), shape, dtype);
  return dtype === "i32" ? ints(shape, bits) : floats(shape, bits);
}
const empty = (x: Host, length: number): Host["data"] => new (x.data.constructor as Float32ArrayConstructor)(length);

function taken(x: Host, ids: Host): Host["data"] {
  const width = size(x.shape.slice(1));
  const y = empty(x, ids.data.length * width);
  ids.data.forEach((id, i) => {
    if (id >= 0 && id < (x.shape[0] ?? 0)) y.set(x.data.subarray(id * width, (id + 1) * width), i * width);
  });
  return y;
}
/** In f32 and in the order of the input, as the kernel must. */
function added(x: Host, ids: Host, rows: number): Float32Array {
  const width = size(x.shape.slice(1));
  const y = new Float32Array(rows * width);
  ids.data.forEach((id, i) => {
    if (id < 0 || id >= rows) return;
    for (let c = 0; c < width; c++) y[id * width + c] = (y[id * width + c] ?? 0) + n(x, i * width + c);
  });
  return y;
}
const close = (found: ArrayLike<number> | undefined, expected: ArrayLike<number>): void => {
  expect(found?.length).toBe(expected.length);
  for (let i = 0; i < expected.length; i++) expect(Math.abs((found?.[i] ?? 0) - (expected[i] ?? 0))).toBeLessThan(2e-6);
};

describe.skipIf(!hasGpu).each([true, false])("rows, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
  const small = testGpu({ maxStorageBufferBindingSize: 256 });
  const kernels = rowKernels({ ...on, software });
  const split = rowKernels({ ...small, software });

  it.each(["f32", "i32", "f16", "bf16", "u8"] as const)("takes rows of %s", async (dtype) => {
    for (const [shape, idShape] of [
      [[9, 4], [5]],
      [
        [7, 3],
        [2, 3],
      ],
      [[6, 1], [5]],
      [[5, 2, 8], [40]],
      [[0, 3], [2]],
      [[4, 3], [0]],
    ]) {
      const x = anything(dtype, shape ?? []);
      const ids = integers(3, idShape ?? [], -2, (shape?.[0] ?? 0) + 2);
      const spec = { shape: [...ids.shape, ...x.shape.slice(1)], dtype };
      expect((await call(on, kernels.takeRows, [x, ids], [spec]))[0], `${shape}`).toEqual(taken(x, ids));
    }
  });

  it.each(["f32", "f16", "u8"] as const)("takes rows of %s from a split table into a split result", async (dtype) => {
    for (const [rows, width] of [
      [150, 4],
      [300, 3],
      [511, 1],
    ] as const) {
      const x = anything(dtype, [rows, width]);
      const ids = integers(rows, [48], -3, rows + 3);
      const spec = { shape: [48, width], dtype };
      expect((await call(small, split.takeRows, [x, ids], [spec]))[0], `${rows} ${width}`).toEqual(taken(x, ids));
    }
  });

  it.each([
    [5, 3, 4],
    [64, 17, 9],
    [65, 4, 9],
    [900, 8, 50],
    [1200, 3, 30_000],
    [3000, 1, 2],
    [0, 3, 2],
    [3, 2, 0],
  ])("adds %i rows of %i into %i, in their order", async (m, width, rows) => {
    const [x, ids] = [uniform(m, [m, width]), integers(m + 1, [m], -2, rows + 2)];
    const [found] = await call(on, kernels.addRows, [x, ids], [f32(rows, width)], { rows });
    expect(found).toEqual(added(x, ids, rows));
  });

  it("adds into a split result", async () => {
    const [x, ids] = [uniform(1, [16, 4]), integers(2, [16], 0, 100)];
    const [found] = await call(small, split.addRows, [x, ids], [f32(100, 4)], { rows: 100 });
    expect(found).toEqual(added(x, ids, 100));
  });

  it.each([
    [[3, 2], 5],
    [[2, 3, 7], 4],
    [[2, 0], 3],
    [[0, 2], 3],
    [[3, 40], 300],
    [[2, 200], 1],
  ] as const)("gathers and scatters along the last axis, %j of %i", async (shape, last) => {
    const rows = size(shape.slice(0, -1));
    const k = shape.at(-1) ?? 0;
    const ids = integers(9, shape, -2, last + 2);
    const flat = ints(
      [rows * k],
      Array.from(ids.data, (id, i) => (id < 0 || id >= last ? -1 : Math.floor(i / k) * last + id)),
    );
    for (const dtype of ["f32", "f16", "u8"] as const) {
      const x = anything(dtype, [...shape.slice(0, -1), last]);
      const [found] = await call(on, kernels.gatherLast, [x, ids], [{ shape, dtype }]);
      expect(found, dtype).toEqual(taken({ ...x, shape: [rows * last, 1] }, flat));
    }
    const y = uniform(4, shape);
    const spec = f32(...shape.slice(0, -1), last);
    const [sums] = await call(on, kernels.scatterLast, [y, ids], [spec], { size: last });
    expect(sums).toEqual(added({ ...y, shape: [rows * k, 1] }, flat, rows * last));
  });

  it.each([
    [1, 1, 1, 1],
    [8, 3, 15, 5],
    [40, 2, 80, 64],
    [5, 2, 3, 33],
    [6, 1, 6, 5000],
    [4, 2, 0, 3],
    [0, 2, 0, 3],
  ])("combines %i tokens of %i slots, %i rows of %i", async (tokens, k, bound, width) => {
    // A permutation of the slots, every fifth row without one: 7 is prime to the sizes above.
    const count = tokens * k;
    const slots = ints(
      [bound],
      Array.from({ length: bound }, (_, i) => (i % 5 === 4 ? -1 : (i * 7 + 3) % count)),
    );
    const [x, weights, dy] = [uniform(1, [bound, width]), uniform(2, [tokens, k]), uniform(3, [tokens, width])];
    // Rows without a slot are not read.
    slots.data.forEach((slot, i) => {
      if (slot < 0) x.data.fill(Number.NaN, i * width, (i + 1) * width);
    });
    const y = new Float64Array(tokens * width);
    const [dx, dweights] = [new Float64Array(bound * width), new Float64Array(count)];
    slots.data.forEach((slot, i) => {
      if (slot < 0) return;
      for (let c = 0; c < width; c++) {
        const at = Math.floor(slot / k) * width + c;
        y[at] = (y[at] ?? 0) + n(weights, slot) * n(x, i * width + c);
        dx[i * width + c] = n(weights, slot) * n(dy, at);
        dweights[slot] = (dweights[slot] ?? 0) + (n(x, i * width + c) * n(dy, at)) / width;
      }
    });
    close((await call(on, kernels.combineRows, [x, weights, slots], [f32(tokens, width)]))[0], y);
    const specs = [f32(bound, width), f32(tokens, k)];
    const [foundX, foundWeights] = await call(on, kernels.combineRowsGrad, [x, weights, slots, dy], specs);
    close(foundX, dx);
    close(
      Array.from(foundWeights ?? [], (value) => value / width),
      dweights,
    );
  });
});
