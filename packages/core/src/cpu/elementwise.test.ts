// Elementwise kernels against hand-computed values.
import { describe, expect, it } from "vitest";
import { call, value } from "./call.test-util.ts";

const { NaN: nan, POSITIVE_INFINITY: inf } = Number;

describe("binary kernels", () => {
  const a = value([2, 1, 3], [1, 2, 3, 4, 5, 6]);
  const b = value([2, 1], [10, 20]);

  it("broadcast as NumPy does", () => {
    expect(call("add", [a, b], [2, 2, 3])).toEqual([11, 12, 13, 21, 22, 23, 14, 15, 16, 24, 25, 26]);
    expect(call("mul", [b, a], [2, 2, 3])).toEqual([10, 20, 30, 20, 40, 60, 40, 50, 60, 80, 100, 120]);
    expect(call("add", [value([], [5]), value([1], [2])], [1])).toEqual([7]);
    expect(call("add", [value([0, 3], []), value([3], [1, 2, 3])], [0, 3])).toEqual([]);
    expect(call("add", [value([0], []), value([1], [1])], [0])).toEqual([]);
  });

  it("maximum lets NaN through, less is false for it", () => {
    const x = value([4], [1, nan, -inf, 3]);
    const y = value([4], [2, 0, nan, 3]);
    expect(call("maximum", [x, y], [4])).toEqual([2, nan, nan, 3]);
    expect(call("less", [x, y], [4])).toEqual([1, 0, 0, 0]);
  });

  it("i32 arithmetic wraps at 32 bits and stays exact below", () => {
    const x = value([2], [2147483647, 123456789], "i32");
    const y = value([2], [1, 987654321], "i32");
    expect(call("add", [x, y], [2])).toEqual([-2147483648, 1111111110]);
    expect(call("mul", [x, y], [2])).toEqual([2147483647, Number(BigInt.asIntN(32, 123456789n * 987654321n))]);
    expect(call("less", [x, y], { shape: [2], dtype: "f32" })).toEqual([0, 1]);
    expect(call("maximum", [x, y], [2])).toEqual([2147483647, 987654321]);
  });

  it("where broadcasts its three operands and keeps the dtype of the branches", () => {
    const condition = value([2, 1], [1, 0]);
    const yes = value([3], [1, 2, 3], "i32");
    const no = value([], [-1], "i32");
    expect(call("where", [condition, yes, no], { shape: [2, 3], dtype: "i32" })).toEqual([1, 2, 3, -1, -1, -1]);
    // The branch not taken must not leak: that is what masks rely on.
    expect(call("where", [value([1], [0]), value([1], [nan]), value([1], [4])], [1])).toEqual([4]);
  });

  it("refuses arithmetic on 16-bit floats", () => {
    const x = value([1], [1], "bf16");
    expect(() => call("add", [x, x], [1])).toThrow("add: arithmetic is f32, found a bf16 operand");
  });
});

describe("unary kernels", () => {
  it.each([
    ["recip", [2, -4, 0], [0.5, -0.25, inf]],
    ["exp", [0, 1, -inf, 710], [1, Math.E, 0, inf]],
    ["log", [1, Math.E, 0, -1], [0, 1, -inf, nan]],
    ["sqrt", [4, 2, 0, -1], [2, Math.SQRT2, 0, nan]],
    ["tanh", [0, Math.atanh(0.5), 50], [0, 0.5, 1]],
    ["erf", [0, 1, -1], [0, 0.8427007929497149, -0.8427007929497149]],
    ["floor", [1.5, -1.5, 3, -0.1], [1, -2, 3, -1]],
  ] as const)("%s", (name, x, y) => {
    const found = call(name, [value([x.length], [...x])], [x.length]);
    for (const [i, expected] of y.entries()) {
      if (Number.isFinite(expected)) expect(found[i]).toBeCloseTo(expected, 14);
      else expect(found[i]).toBe(expected);
    }
    expect(call(name, [value([0, 2], [])], [0, 2])).toEqual([]);
  });

  it("precision 32 rounds each result once", () => {
    expect(call("exp", [value([1], [1])], [1], { precision: 32 })).toEqual([Math.fround(Math.E)]);
  });
});

describe("cast", () => {
  it.each([
    ["f32", "i32", [1.9, -1.9, 0.5, 3e9, -3e9, nan], [1, -1, 0, 2147483647, -2147483648, 0]],
    ["f32", "u8", [1.9, 255.5, 300, -5], [1, 255, 255, 0]],
    ["i32", "f32", [7, -7], [7, -7]],
    ["u8", "i32", [255, 0], [255, 0]],
    ["f32", "f16", [1, 1 + 2 ** -11, -0.5], [0x3c00, 0x3c00, 0xb800]],
    ["f32", "bf16", [1, 1 + 2 ** -8, 1 + 3 * 2 ** -8], [0x3f80, 0x3f80, 0x3f82]],
    ["f16", "f32", [1.5, -65504], [1.5, -65504]],
    ["bf16", "f16", [1.5], [0x3e00]],
    ["i32", "i32", [3], [3]],
  ] as const)("%s to %s", (from, to, x, y) => {
    expect(call("cast", [value([x.length], [...x], from)], { shape: [x.length], dtype: to }, { dtype: to })).toEqual([
      ...y,
    ]);
  });
});
