// Loops of more than 1000 rounds, where gpu.js stops unless told otherwise, and indices where f32 is no longer exact.
import {
  add,
  addRows,
  type Engine,
  groupedMatmul,
  groupedOuter,
  linear,
  matmul,
  softmax,
  sum,
  takeRows,
} from "@switchyard/core";
import { expect } from "vitest";

const wave = (n: number, step: number): Float32Array => Float32Array.from({ length: n }, (_, i) => Math.sin(step * i));

/** Every loop of the kernels with 1500 rounds, against sums in double precision. */
export async function checkLongLoops(on: Engine): Promise<void> {
  const k = 1500;
  const [m, n] = [3, 2];
  const [a, b] = [wave(m * k, 0.37), wave(n * k, 0.91)];
  const expected = Array.from({ length: m * n }, (_, i) => {
    const [row, column] = [Math.floor(i / n), i % n];
    let total = 0;
    for (let p = 0; p < k; p++) total += (a[row * k + p] ?? 0) * (b[column * k + p] ?? 0);
    return total;
  });
  const [x, w] = [on.tensor(a, [m, k]), on.tensor(b, [n, k])];
  const tensors = on.scope(() => {
    const ends = on.tensor(Int32Array.of(m), [1]);
    const column = on.tensor(
      Float32Array.from({ length: k }, (_, i) => i),
      [k, 1],
    );
    const zeros = on.tensor(new Int32Array(k), [k]);
    const tall = [on.tensor(transposed(a, m, k), [k, m]), on.tensor(transposed(b, n, k), [k, n])] as const;
    return {
      matmul: matmul(x, w, { transposeB: true }),
      linear: linear(x, w),
      grouped: groupedMatmul(x, on.tensor(b, [1, n, k]), ends),
      // Sums over 1500 rows of one expert.
      outer: groupedOuter(tall[0], tall[1], on.tensor(Int32Array.of(k), [1])),
      rows: addRows(column, zeros, 1),
      sum: sum(column),
      softmax: sum(softmax(x), [1]),
    };
  });
  const read = async (name: keyof typeof tensors): Promise<number[]> => [...(await tensors[name].data())];
  for (const name of ["matmul", "linear", "grouped", "outer"] as const) {
    for (const [i, value] of (await read(name)).entries())
      expect(value, `${name} ${i}`).toBeCloseTo(expected[i] ?? 0, 2);
  }
  expect(await read("rows")).toEqual([(k * (k - 1)) / 2]);
  expect(await read("sum")).toEqual([(k * (k - 1)) / 2]);
  for (const value of await read("softmax")) expect(value).toBeCloseTo(1, 4);
  for (const x of Object.values(tensors)) x.dispose();
  for (const one of [x, w]) one.dispose();
}

const transposed = (x: Float32Array, rows: number, columns: number): Float32Array =>
  Float32Array.from(x, (_, i) => x[(i % rows) * columns + Math.floor(i / rows)] ?? 0);

/** Integers that f32 does not hold, as numbers and as ids. */
export async function checkLargeIntegers(on: Engine): Promise<void> {
  const large = Int32Array.of(16_777_217, -16_777_217, 2_147_483_647, -2_147_483_648, 5);
  const tensors = on.scope(() => {
    const ids = on.tensor(large, [5]);
    const rows = on.tensor(Float32Array.of(1, 2, 3, 4, 5, 6), [6]);
    return { sums: add(ids, on.tensor(Int32Array.of(2, -2, 0, 0, 1), [5])), picked: takeRows(rows, ids) };
  });
  expect([...(await tensors.sums.data())]).toEqual([16_777_219, -16_777_219, 2_147_483_647, -2_147_483_648, 6]);
  expect([...(await tensors.picked.data())]).toEqual([0, 0, 0, 0, 6]);
  for (const x of Object.values(tensors)) x.dispose();
}
