// Eigenvectors against what defines them: orthonormal, and A v = λ v.
import { describe, expect, it } from "vitest";
import { noise } from "../moe/moe.test-util.ts";
import { reflect, symmetricEigenvectors } from "./eigenvectors.ts";

const dense = (n: number, entry: (i: number, j: number) => number): number[][] =>
  Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => entry(Math.min(i, j), Math.max(i, j))));

const check = (a: readonly (readonly number[])[]): void => {
  const n = a.length;
  // What lies below the diagonal is not to be read.
  const upper = a.map((row, i) => Float64Array.from(row, (x, j) => (j < i ? Number.NaN : x)));
  const vectors = symmetricEigenvectors(upper, 1e-150);
  expect(vectors).toHaveLength(n);
  const size = Math.max(...a.flat().map(Math.abs), 1);
  vectors.forEach((x, k) => {
    for (let l = 0; l <= k; l++) {
      const both = x.reduce((sum, value, i) => sum + value * (vectors[l]?.[i] ?? Number.NaN), 0);
      expect(Math.abs(both - Number(k === l))).toBeLessThan(1e-13);
    }
    const image = a.map((row) => row.reduce((sum, value, i) => sum + value * (x[i] ?? Number.NaN), 0));
    const value = image.reduce((sum, y, i) => sum + y * (x[i] ?? Number.NaN), 0);
    image.forEach((y, i) => {
      expect(Math.abs(y - value * (x[i] ?? Number.NaN)) / size).toBeLessThan(1e-13);
    });
  });
};

describe("symmetricEigenvectors", () => {
  it.each([0, 1, 2, 3, 4, 17, 40])("of a random matrix of %i", (n) => {
    const values = noise(n * n, n + 1);
    check(dense(n, (i, j) => values[i * n + j] ?? 0));
  });

  it("of matrices with equal eigenvalues, zeros and separate blocks", () => {
    check(dense(5, () => 1));
    check(dense(6, (i, j) => Number(i === j)));
    check(dense(4, () => 0));
    check(dense(7, (i, j) => (Math.floor(i / 3) === Math.floor(j / 3) ? 1 + i + j : 0)));
    check(dense(6, (i, j) => (j === i + 1 ? 1 : 0))); // zeros on the diagonal
    check(dense(8, (i, j) => 10 ** -(i + j)));
  });
});

describe("reflect", () => {
  it.each([1, 3, 4, 9])("reflects %i columns alike, from the entry and the column that are named", (count) => {
    const h = Float64Array.from([5, 0.6, 0.8]); // of norm 1 from entry 1 on
    const columns = Array.from({ length: count }, (_, k) => Float64Array.from([k + 1, 2, k]));
    reflect(columns, h, 1, 1);
    columns.forEach((column, k) => {
      const share = k === 0 ? 0 : 2 * (0.6 * 2 + 0.8 * k);
      const expected = [k + 1, 2 - 0.6 * share, k - 0.8 * share];
      column.forEach((x, i) => {
        expect(x).toBeCloseTo(expected[i] ?? Number.NaN, 14);
      });
    });
  });
});
