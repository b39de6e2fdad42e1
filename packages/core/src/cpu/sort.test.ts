// Stable orders, ties and NaN, against hand-computed orders.
import { describe, expect, it } from "vitest";
import { call, noise, value } from "./call.test-util.ts";

const { NaN: nan, POSITIVE_INFINITY: inf } = Number;
const sorted = (x: number[], descending: boolean) =>
  call("argsort", [value([x.length], x)], { shape: [x.length], dtype: "i32" }, { descending });

describe("argsort", () => {
  it("is stable in both directions", () => {
    expect(sorted([2, 1, 2, 1, 3], false)).toEqual([1, 3, 0, 2, 4]);
    expect(sorted([2, 1, 2, 1, 3], true)).toEqual([4, 0, 2, 1, 3]);
    expect(sorted([0, -0, 0], true)).toEqual([0, 1, 2]);
  });

  it("puts NaN last in both directions, after the infinities", () => {
    const x = [nan, inf, 0, nan, -inf];
    expect(sorted(x, false)).toEqual([4, 2, 1, 0, 3]);
    expect(sorted(x, true)).toEqual([1, 2, 4, 0, 3]);
  });

  it("sorts rows apart, also integers with a bound", () => {
    const ids = value([2, 4], [3, 0, 3, 1, 0, 0, 2, 1], "i32");
    expect(call("argsort", [ids], [2, 4], { bound: 4 })).toEqual([1, 3, 0, 2, 0, 1, 3, 2]);
    expect(call("argsort", [value([3, 0], [], "i32")], [3, 0])).toEqual([]);
  });
});

describe("topkIndices", () => {
  const topk = (x: number[], k: number) =>
    call("topkIndices", [value([1, x.length], x)], { shape: [1, k], dtype: "i32" }, { k });

  it("lower index first on ties, NaN last", () => {
    expect(topk([1, 3, 2, 3, 3], 2)).toEqual([1, 3]);
    expect(topk([nan, -inf, 1], 3)).toEqual([2, 1, 0]);
    expect(topk([5, 5, 5], 3)).toEqual([0, 1, 2]);
    expect(topk([5, 4], 0)).toEqual([]);
    expect(topk([7], 1)).toEqual([0]);
  });

  it("agrees with picking the largest again and again", () => {
    const [rows, n, k] = [5, 13, 4];
    const data = noise(rows * n).map((x) => Math.round(x * 4)); // many ties
    const y = call("topkIndices", [value([rows, n], data)], { shape: [rows, k], dtype: "i32" }, { k });
    for (let row = 0; row < rows; row++) {
      const taken = new Set<number>();
      for (let j = 0; j < k; j++) {
        let best = -1;
        for (let i = 0; i < n; i++) {
          if (taken.has(i)) continue;
          if (best < 0 || (data[row * n + i] as number) > (data[row * n + best] as number)) best = i;
        }
        taken.add(best);
        expect(y[row * k + j]).toBe(best);
      }
    }
  });
});
