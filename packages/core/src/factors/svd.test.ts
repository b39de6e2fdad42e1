// The decomposition against what defines it: the product, orthonormal columns, descending values, and values known beforehand.
import { describe, expect, it } from "vitest";
import { ShapeError } from "../errors.ts";
import { noise } from "../moe/moe.test-util.ts";
import { type HostMatrix, type Svd, svd } from "./svd.ts";

const product = ({ u, s, v, rank }: Svd, rows: number, columns: number): number[] =>
  Array.from({ length: rows * columns }, (_, i) => {
    const [r, c] = [Math.floor(i / columns), i % columns];
    let sum = 0;
    for (let k = 0; k < rank; k++) sum += (u[r * rank + k] ?? NaN) * (s[k] ?? NaN) * (v[c * rank + k] ?? NaN);
    return sum;
  });
const orthonormal = (x: Float64Array, rank: number): void => {
  const n = x.length / Math.max(rank, 1);
  for (let a = 0; a < rank; a++) {
    for (let b = 0; b <= a; b++) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += (x[i * rank + a] ?? NaN) * (x[i * rank + b] ?? NaN);
      expect(Math.abs(sum - Number(a === b))).toBeLessThan(1e-13);
    }
  }
};
const near = (found: Float64Array, expected: readonly number[]): void => {
  expect(found.length).toBe(expected.length);
  for (const [k, value] of expected.entries()) {
    expect(Math.abs((found[k] ?? NaN) - value)).toBeLessThanOrEqual(1e-14 * value);
  }
};
const check = (matrix: HostMatrix): Svd => {
  const found = svd(matrix);
  const { rows, columns } = matrix;
  expect(found.rank).toBe(Math.min(rows, columns));
  expect([found.u.length, found.s.length, found.v.length]).toEqual(
    [rows, 1, columns].map((n) => n * Math.min(rows, columns)),
  );
  orthonormal(found.u, found.rank);
  orthonormal(found.v, found.rank);
  for (const [k, value] of found.s.entries()) {
    expect(value).toBeGreaterThanOrEqual(0);
    if (k > 0) expect(value).toBeLessThanOrEqual(found.s[k - 1] ?? NaN);
  }
  const size = Math.max(...Array.from(matrix.data, Math.abs), 1e-300);
  for (const [i, x] of product(found, rows, columns).entries()) {
    expect(Math.abs(x - (matrix.data[i] ?? NaN)) / size).toBeLessThan(1e-13);
  }
  return found;
};

describe("svd", () => {
  it.each([
    [1, 1],
    [1, 7],
    [7, 1],
    [2, 2],
    [5, 5],
    [13, 6],
    [6, 13],
    [41, 23],
    [30, 30],
  ])("reconstructs a random matrix of %i x %i", (rows, columns) => {
    check({ data: noise(rows * columns, rows + columns), rows, columns });
  });

  it.each([
    [4, 4, 1],
    [9, 5, 2],
    [5, 9, 3],
    [8, 8, 0],
    [3, 5, 0],
  ])("handles %i x %i of rank %i", (rows, columns, rank) => {
    const [left, right] = [noise(rows * rank, 3), noise(columns * rank, 4)];
    const data = Array.from({ length: rows * columns }, (_, i) => {
      let sum = 0;
      for (let k = 0; k < rank; k++) {
        sum += (left[Math.floor(i / columns) * rank + k] ?? NaN) * (right[(i % columns) * rank + k] ?? NaN);
      }
      return sum;
    });
    const { s } = check({ data, rows, columns });
    s.forEach((value, k) => {
      if (k < rank) expect(value).toBeGreaterThan(1e-3);
      else expect(value).toBeLessThan(1e-14);
    });
  });

  it("finds singular values that are known", () => {
    near(check({ data: [3, 0, 0, 0, -4, 0], rows: 2, columns: 3 }).s, [4, 3]);
    // [[4, 0], [3, -5]]: AᵀA has the eigenvalues 40 and 10.
    const { s } = check({ data: [4, 0, 3, -5], rows: 2, columns: 2 });
    expect(s[0]).toBeCloseTo(Math.sqrt(40), 13);
    expect(s[1]).toBeCloseTo(Math.sqrt(10), 13);
    // All ones: one value, sqrt(rows * columns).
    const ones = check({ data: new Float32Array(12).fill(1), rows: 3, columns: 4 });
    expect(ones.s[0]).toBeCloseTo(Math.sqrt(12), 13);
    // Equal values, duplicated columns.
    near(check({ data: [0, 2, 2, 0], rows: 2, columns: 2 }).s, [2, 2]);
    check({ data: [1, 1, 2, 2, 3, 3], rows: 3, columns: 2 });
  });

  it("keeps the digits of small values beside large ones, and works at any scale", () => {
    const graded = check({ data: [1e8, 0, 0, 0, 1, 0, 0, 0, 1e-8], rows: 3, columns: 3 });
    near(graded.s, [1e8, 1, 1e-8]);
    for (const scale of [1e-200, 1e200]) {
      const { s } = check({ data: noise(20, 5).map((x) => x * scale), rows: 5, columns: 4 });
      const plain = svd({ data: noise(20, 5), rows: 5, columns: 4 }).s;
      s.forEach((value, k) => {
        expect(value / scale).toBeCloseTo(plain[k] ?? NaN, 12);
      });
    }
    // Hilbert's matrix: condition 1e13.
    check({
      data: Array.from({ length: 100 }, (_, i) => 1 / (1 + Math.floor(i / 10) + (i % 10))),
      rows: 10,
      columns: 10,
    });
  });

  it("keeps the digits of values over twenty powers of ten where the columns are graded", () => {
    const n = 8;
    // Lower times upper triangles of ones: determinant 1. Column j is 1000^-j times that.
    const data = Array.from({ length: n * n }, (_, i) => {
      const [r, c] = [Math.floor(i / n), i % n];
      return (1 + Math.min(r, c)) * 1000 ** -((c * 3) % n);
    });
    const { s } = check({ data, rows: n, columns: n });
    const determinant = s.reduce((product, value, k) => product * value * 1000 ** k, 1);
    expect(Math.abs(determinant - 1)).toBeLessThan(1e-12);
  });

  it("takes matrices without rows or columns", () => {
    expect(svd({ data: [], rows: 0, columns: 3 })).toMatchObject({ rank: 0 });
    expect(svd({ data: [], rows: 2, columns: 0 })).toMatchObject({ rank: 0 });
  });

  it("gives the best approximation of a rank: the error is what was cut off", () => {
    const [rows, columns, kept] = [7, 6, 3];
    const data = noise(rows * columns, 8);
    const found = check({ data, rows, columns });
    const cut = { ...found, s: found.s.map((x, k) => (k < kept ? x : 0)) };
    const error = product(cut, rows, columns).reduce((sum, x, i) => sum + (x - (data[i] ?? NaN)) ** 2, 0);
    expect(error).toBeCloseTo(
      found.s.slice(kept).reduce((sum, x) => sum + x * x, 0),
      12,
    );
  });

  it("refuses wrong lengths and numbers that are not finite", () => {
    expect(() => svd({ data: [1, 2, 3], rows: 2, columns: 2 })).toThrow(ShapeError);
    expect(() => svd({ data: [1, 2, 3], rows: 2, columns: 2 })).toThrow("3 numbers for a matrix of 2 x 2");
    expect(() => svd({ data: [1, NaN], rows: 1, columns: 2 })).toThrow("entry 1 is NaN");
    expect(() => svd({ data: [], rows: -1, columns: 0 })).toThrow(ShapeError);
  });
});
