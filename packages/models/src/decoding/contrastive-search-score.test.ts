import { ShapeError } from "@switchyard/core";
import { expect, it } from "vitest";
import { contrastiveSearchScore } from "./contrastive-search-score.ts";

it("takes the most similar of the earlier tokens, by direction", () => {
  const candidate = { probability: 0.5, hidden: [3, 4] };
  const earlier = [
    [-1, 0],
    [0, 10],
    [1, 0],
  ];
  expect(contrastiveSearchScore(candidate, earlier)).toBeCloseTo(0.4 * 0.5 - 0.6 * 0.8, 14);
  expect(contrastiveSearchScore(candidate, earlier, 0.3)).toBeCloseTo(0.7 * 0.5 - 0.3 * 0.8, 14);
  expect(contrastiveSearchScore(candidate, [[-6, -8]])).toBeCloseTo(0.2 + 0.6, 14);
});

it("is the probability where alpha is 0; without earlier tokens, or for zeros, nothing is taken off", () => {
  expect(contrastiveSearchScore({ probability: 0.25, hidden: [1] }, [[1]], 0)).toBe(0.25);
  expect(contrastiveSearchScore({ probability: 0.25, hidden: [1] }, [], 0.5)).toBe(0.125);
  expect(contrastiveSearchScore({ probability: 0.25, hidden: [0, 0] }, [[1, 2]], 0.5)).toBe(0.125);
});

it("refuses other widths and numbers out of range", () => {
  expect(() => contrastiveSearchScore({ probability: 0.5, hidden: [1] }, [[1, 2]])).toThrow(/of 1 and 2 numbers/);
  expect(() => contrastiveSearchScore({ probability: 1.5, hidden: [1] }, [])).toThrow(/probability is 1.5/);
  expect(() => contrastiveSearchScore({ probability: 0.5, hidden: [1] }, [], Number.NaN)).toThrow(ShapeError);
});
