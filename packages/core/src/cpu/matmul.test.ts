// Matrix products against naive loops.
import { describe, expect, it } from "vitest";
import { call, noise, value } from "./call.test-util.ts";

/** y[i, j] = sum over p of a(i, p) b(p, j). */
const naive = (
  m: number,
  k: number,
  n: number,
  a: (i: number, p: number) => number,
  b: (p: number, j: number) => number,
) =>
  Array.from({ length: m * n }, (_, at) => {
    let sum = 0;
    for (let p = 0; p < k; p++) sum += a(Math.floor(at / n), p) * b(p, at % n);
    return sum;
  });

describe("matmul", () => {
  it("by hand", () => {
    const a = value([2, 2], [1, 2, 3, 4]);
    const b = value([2, 2], [5, 6, 7, 8]);
    expect(call("matmul", [a, b], [2, 2])).toEqual([19, 22, 43, 50]);
    expect(call("matmul", [a, b], [2, 2], { transposeA: true })).toEqual([26, 30, 38, 44]);
    expect(call("matmul", [a, b], [2, 2], { transposeB: true })).toEqual([17, 23, 39, 53]);
  });

  it.each([
    [1, 1, 1],
    [3, 5, 7],
    [1, 11, 2],
    [4, 0, 3],
    [0, 3, 2],
    [2, 3, 0],
  ])("[%i, %i] x [.., %i], transposed or not", (m, k, n) => {
    const [a, b] = [noise(m * k), noise(k * n, 2)];
    for (const transposeA of [false, true]) {
      for (const transposeB of [false, true]) {
        const x = value(transposeA ? [k, m] : [m, k], a);
        const w = value(transposeB ? [n, k] : [k, n], b);
        const expected = naive(
          m,
          k,
          n,
          (i, p) => a[transposeA ? p * m + i : i * k + p] as number,
          (p, j) => b[transposeB ? j * k + p : p * n + j] as number,
        );
        expect(call("matmul", [x, w], [m, n], { transposeA, transposeB })).toEqual(expected);
      }
    }
  });

  it("broadcasts batch dimensions", () => {
    const [a, b] = [noise(2 * 1 * 2 * 3), noise(5 * 3 * 4, 2)];
    const y = call("matmul", [value([2, 1, 2, 3], a), value([5, 3, 4], b)], [2, 5, 2, 4]);
    for (let s = 0; s < 2; s++) {
      for (let t = 0; t < 5; t++) {
        const expected = naive(
          2,
          3,
          4,
          (i, p) => a[(s * 2 + i) * 3 + p] as number,
          (p, j) => b[(t * 3 + p) * 4 + j] as number,
        );
        expect(y.slice((s * 5 + t) * 8, (s * 5 + t + 1) * 8)).toEqual(expected);
      }
    }
  });

  it("reads 16-bit weights, and rounds only the finished sum", () => {
    expect(call("matmul", [value([1, 2], [1, 2]), value([2, 1], [3, 4], "bf16")], [1, 1])).toEqual([11]);
    const ones = value([1, 3], [1, 1, 1]);
    const tiny = value([3, 1], [1, 2 ** -24, 2 ** -24]);
    expect(call("matmul", [ones, tiny], [1, 1], { precision: 32 })).toEqual([1 + 2 ** -23]);
  });
});

describe("grouped products", () => {
  // Expert 1 has no row, and the last two of the seven rows belong to nobody.
  const ends = [2, 2, 5];
  const expertOf = (row: number): number => ends.findIndex((end) => row < end);
  const endsValue = value([3], ends, "i32");
  const [n, width, hidden] = [7, 3, 5];
  const [x, dy, w] = [noise(n * width), noise(n * hidden, 2), noise(3 * hidden * width, 3)];

  it("groupedMatmul multiplies each block with its expert", () => {
    const y = call("groupedMatmul", [value([n, width], x), value([3, hidden, width], w), endsValue], [n, hidden]);
    for (let row = 0; row < n; row++) {
      const e = expertOf(row);
      const expected = naive(
        1,
        width,
        hidden,
        (_, p) => x[row * width + p] as number,
        (p, j) => w[(e * hidden + j) * width + p] as number,
      );
      expect(y.slice(row * hidden, (row + 1) * hidden)).toEqual(e < 0 ? [0, 0, 0, 0, 0] : expected);
    }
  });

  it("groupedMatmul transposed goes back through the same weights", () => {
    const inputs = [value([n, hidden], dy), value([3, hidden, width], w), endsValue];
    const dx = call("groupedMatmul", inputs, [n, width], { transposed: true });
    for (let row = 0; row < n; row++) {
      const e = expertOf(row);
      const expected = naive(
        1,
        hidden,
        width,
        (_, p) => dy[row * hidden + p] as number,
        (p, j) => w[(e * hidden + p) * width + j] as number,
      );
      expect(dx.slice(row * width, (row + 1) * width)).toEqual(e < 0 ? [0, 0, 0] : expected);
    }
  });

  it("groupedOuter sums the outer products of each block", () => {
    const dw = call("groupedOuter", [value([n, hidden], dy), value([n, width], x), endsValue], [3, hidden, width]);
    for (let e = 0; e < 3; e++) {
      for (let i = 0; i < hidden; i++) {
        for (let j = 0; j < width; j++) {
          let sum = 0;
          for (let row = 0; row < n; row++) {
            if (expertOf(row) === e) sum += (dy[row * hidden + i] as number) * (x[row * width + j] as number);
          }
          expect(dw[(e * hidden + i) * width + j]).toBe(sum);
        }
      }
    }
  });

  it("no rows at all", () => {
    const none = value([3], [0, 0, 0], "i32");
    expect(call("groupedMatmul", [value([0, 3], []), value([3, 5, 3], w), none], [0, 5])).toEqual([]);
    expect(call("groupedOuter", [value([0, 1], []), value([0, 2], []), none], [3, 1, 2])).toEqual([0, 0, 0, 0, 0, 0]);
  });
});
