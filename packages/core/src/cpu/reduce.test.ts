// Sums, maxima and running sums against hand-computed values.
import { describe, expect, it } from "vitest";
import { call, noise, value } from "./call.test-util.ts";

const x = value([2, 3], [1, 2, 3, 4, 5, 6]);

describe("sumTo", () => {
  it.each([
    [
      [2, 1],
      [6, 15],
    ],
    [
      [1, 3],
      [5, 7, 9],
    ],
    [[3], [5, 7, 9]],
    [[1], [21]],
    [[], [21]],
    [
      [2, 3],
      [1, 2, 3, 4, 5, 6],
    ],
  ])("[2, 3] to %j", (shape, y) => expect(call("sumTo", [x], shape, { shape })).toEqual(y));

  it("sums a middle axis", () => {
    const data = noise(2 * 5 * 3);
    const y = call("sumTo", [value([2, 5, 3], data)], [2, 1, 3], { shape: [2, 1, 3] });
    for (let a = 0; a < 2; a++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let b = 0; b < 5; b++) sum += data[(a * 5 + b) * 3 + c] as number;
        expect(y[a * 3 + c]).toBe(sum);
      }
    }
  });

  it("the empty sum is zero, and rounding happens once", () => {
    expect(call("sumTo", [value([0, 2], [])], [2], { shape: [2] })).toEqual([0, 0]);
    const tiny = value([3], [1, 2 ** -24, 2 ** -24]);
    expect(call("sumTo", [tiny], [], { shape: [], precision: 32 })).toEqual([1 + 2 ** -23]);
  });
});

describe("maxLast", () => {
  it("takes the maximum of each row", () => {
    expect(call("maxLast", [value([2, 3], [1, 9, 3, -4, -5, -6])], [2, 1])).toEqual([9, -4]);
    expect(call("maxLast", [value([2, 1], [1, 2])], [2, 1])).toEqual([1, 2]);
    expect(call("maxLast", [value([0, 3], [])], [0, 1])).toEqual([]);
    const { NEGATIVE_INFINITY: low, NaN: nan } = Number;
    expect(call("maxLast", [value([2, 2], [low, low, 1, nan])], [2, 1])).toEqual([low, nan]);
  });
});

describe("cumsum", () => {
  it.each([
    [{ axis: 1 }, [1, 3, 6, 4, 9, 15]],
    [{ axis: -1, exclusive: true }, [0, 1, 3, 0, 4, 9]],
    [{ axis: 1, reverse: true }, [6, 5, 3, 15, 11, 6]],
    [{ axis: 1, reverse: true, exclusive: true }, [5, 3, 0, 11, 6, 0]],
    [{ axis: 0 }, [1, 2, 3, 5, 7, 9]],
  ])("%j", (attrs, y) => {
    expect(call("cumsum", [x], [2, 3], attrs)).toEqual(y);
    expect(call("cumsum", [value([2, 3], [1, 2, 3, 4, 5, 6], "i32")], [2, 3], attrs)).toEqual(y);
  });

  it("of nothing is nothing", () => {
    expect(call("cumsum", [value([0], [])], [0], { axis: 0 })).toEqual([]);
    expect(call("cumsum", [value([2, 0], [])], [2, 0], { axis: 0 })).toEqual([]);
  });
});
