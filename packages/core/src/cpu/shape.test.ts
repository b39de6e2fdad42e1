// Kernels that only move elements, against hand-computed positions.
import { describe, expect, it } from "vitest";
import { cpu } from "./backend.ts";
import { call, noise, value } from "./call.test-util.ts";

const iota = (...shape: number[]) =>
  value(
    shape,
    Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => i),
    "i32",
  );

describe("kernels that move elements", () => {
  it("reshape is a view: the same handle", () => {
    const backend = cpu();
    const spec = { shape: [2, 3], dtype: "f32" as const };
    const handle = backend.upload(new Float32Array(6), spec);
    expect(backend.kernels.reshape([{ ...spec, handle }], [{ shape: [6], dtype: "f32" }], { shape: [6] })).toEqual([
      handle,
    ]);
    expect(backend.live()).toBe(1);
  });

  it("transpose", () => {
    expect(call("transpose", [iota(2, 3)], [3, 2], { perm: [1, 0] })).toEqual([0, 3, 1, 4, 2, 5]);
    // [2, 3, 4] -> [4, 2, 3]: y[c, a, b] = x[a, b, c]
    const y = call("transpose", [iota(2, 3, 4)], [4, 2, 3], { perm: [2, 0, 1] });
    for (let a = 0; a < 2; a++) {
      for (let b = 0; b < 3; b++) for (let c = 0; c < 4; c++) expect(y[(c * 2 + a) * 3 + b]).toBe((a * 3 + b) * 4 + c);
    }
    expect(call("transpose", [iota(0, 3)], [3, 0], { perm: [1, 0] })).toEqual([]);
    expect(call("transpose", [value([], [4])], [], { perm: [] })).toEqual([4]);
  });

  it("slice", () => {
    expect(call("slice", [iota(3, 4)], [2, 2], { start: [1, 1], size: [2, 2] })).toEqual([5, 6, 9, 10]);
    expect(call("slice", [iota(3, 4)], [0, 4], { start: [3, 0], size: [0, 4] })).toEqual([]);
    expect(call("slice", [iota(3, 4)], [3, 4], { start: [0, 0], size: [3, 4] })).toEqual(Array.from(iota(3, 4).data));
  });

  it("concat along every axis, with empty parts", () => {
    const [a, b] = [value([2, 1], [1, 2]), value([2, 2], [3, 4, 5, 6])];
    expect(call("concat", [a, b], [2, 3], { axis: 1 })).toEqual([1, 3, 4, 2, 5, 6]);
    expect(call("concat", [b, value([0, 2], []), b], [4, 2], { axis: 0 })).toEqual([3, 4, 5, 6, 3, 4, 5, 6]);
    expect(call("concat", [a], [2, 1], { axis: 1 })).toEqual([1, 2]);
  });

  it("moves 16-bit patterns untouched", () => {
    const bits = Uint16Array.of(0x7fc1, 0x0001);
    expect(call("transpose", [value([2, 1], bits, "bf16")], [1, 2], { perm: [1, 0] })).toEqual([0x7fc1, 1]);
  });

  it("slicing undoes concatenation", () => {
    const [x, y] = [value([3, 5], noise(15)), value([3, 2], noise(6, 2))];
    const both = value([3, 7], call("concat", [x, y], [3, 7], { axis: 1 }));
    expect(call("slice", [both], [3, 2], { start: [0, 5], size: [3, 2] })).toEqual(Array.from(y.data));
  });
});
