// Rows by id and counts of ids, against hand-computed values.
import { describe, expect, it } from "vitest";
import { call, value } from "./call.test-util.ts";

const ids = (shape: number[], data: number[]) => value(shape, data, "i32");

describe("rows by id", () => {
  const table = value([3, 2], [1, 2, 3, 4, 5, 6]);

  it("takeRows copies rows; ids outside the table give zeros", () => {
    expect(call("takeRows", [table, ids([5], [2, -1, 0, 3, 2])], [5, 2])).toEqual([5, 6, 0, 0, 1, 2, 0, 0, 5, 6]);
    expect(call("takeRows", [table, ids([2, 1], [1, 0])], [2, 1, 2])).toEqual([3, 4, 1, 2]);
    expect(call("takeRows", [value([3], [7, 8, 9]), ids([2], [2, 1])], [2])).toEqual([9, 8]);
    expect(call("takeRows", [value([0, 2], []), ids([1], [0])], [1, 2])).toEqual([0, 0]);
    expect(call("takeRows", [table, ids([0], [])], [0, 2])).toEqual([]);
  });

  it("takeRows keeps 16-bit tables as they are", () => {
    expect(call("takeRows", [value([2, 1], [1, -2], "bf16"), ids([1], [1])], [1, 1])).toEqual([0xc000]);
  });

  it("addRows sums rows with one id and drops ids outside", () => {
    const x = value([4, 2], [1, 2, 10, 20, 100, 200, 1000, 2000]);
    expect(call("addRows", [x, ids([4], [2, 0, 2, -1])], [3, 2], { rows: 3 })).toEqual([10, 20, 0, 0, 101, 202]);
    expect(call("addRows", [x, ids([4], [3, 3, 3, 3])], [3, 2], { rows: 3 })).toEqual([0, 0, 0, 0, 0, 0]);
    expect(call("addRows", [value([0, 2], []), ids([0], [])], [1, 2], { rows: 1 })).toEqual([0, 0]);
  });

  it("addRows rounds only the finished sum", () => {
    const x = value([3, 1], [1, 2 ** -24, 2 ** -24]);
    expect(call("addRows", [x, ids([3], [0, 0, 0])], [1, 1], { rows: 1, precision: 32 })).toEqual([1 + 2 ** -23]);
  });

  it("blockEnds counts ids below and at e, and leaves out ids outside", () => {
    expect(call("blockEnds", [ids([7], [3, 0, 3, -1, 4, 1, 9])], [4], { count: 4 })).toEqual([1, 2, 2, 4]);
    expect(call("blockEnds", [ids([0], [])], [2], { count: 2 })).toEqual([0, 0]);
    expect(call("blockEnds", [ids([1], [0])], [0], { count: 0 })).toEqual([]);
  });
});
