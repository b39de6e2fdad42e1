import { ShapeError } from "@switchyard/core";
import { expect, it } from "vitest";
import { unchosenRatio } from "./unchosen-ratio.ts";

it("counts the weak choices that the strong pass did not make, token by token", () => {
  expect(unchosenRatio([0, 1, 2, 3, 4, 5], [1, 0, 4], 3)).toBeCloseTo(1 / 3, 14);
  expect(unchosenRatio(Int32Array.of(5, 4), Int32Array.of(4), 1)).toBe(0);
  expect(unchosenRatio([0, 1], [2, 1], 2)).toBe(0.5);
});

it("counts no empty slot, on neither side", () => {
  expect(unchosenRatio([3, -1], [-1, 3, 2, -1], 1)).toBe(0.5);
  expect(unchosenRatio([0], [-1], 1)).toBe(0);
  expect(unchosenRatio([], [], 0)).toBe(0);
});

it("refuses what is not as many ids of each token", () => {
  expect(() => unchosenRatio([0, 1, 2], [0, 1], 2)).toThrow(/3 strong ids of 2 tokens/);
  expect(() => unchosenRatio([0, 1], [0, 1, 2], 2)).toThrow(/3 weak ids/);
  for (const tokens of [0, -1, 1.5]) expect(() => unchosenRatio([0, 1, 2], [0], tokens)).toThrow(ShapeError);
});
