import { ShapeError } from "@switchyard/core";
import { expect, it } from "vitest";
import { klDivergence } from "./kl-divergence.ts";

const none = Number.NEGATIVE_INFINITY;

it("is the sum over probabilities, whatever constant is added to the logits", () => {
  const [p, q] = [
    [0.5, 0.3, 0.2],
    [0.25, 0.25, 0.5],
  ] as const;
  const expected = 0.5 * Math.log(2) + 0.3 * Math.log(1.2) + 0.2 * Math.log(0.4);
  const logits = (x: readonly number[], by: number) => x.map((value) => Math.log(value) + by);
  expect(klDivergence(logits(p, 0), logits(q, 0))).toBeCloseTo(expected, 14);
  expect(klDivergence(logits(p, 900), logits(q, -900))).toBeCloseTo(expected, 11);
  expect(klDivergence(logits(q, 0), logits(p, 0))).not.toBeCloseTo(expected, 3);
});

it("is 0 for equal passes, infinite where q excludes what p does not, and blind to what p excludes", () => {
  expect(klDivergence([1, 2, 3], [4, 5, 6])).toBe(0);
  expect(klDivergence([0, 0], [0, none])).toBe(Number.POSITIVE_INFINITY);
  expect(klDivergence([0, none], [0, 0])).toBeCloseTo(Math.log(2), 14);
  expect(klDivergence([7], [-3])).toBe(0);
});

it("refuses other vocabularies and what is no number", () => {
  expect(() => klDivergence([1], [1, 2])).toThrow(/1 and 2 logits/);
  expect(() => klDivergence([Number.NaN, 1], [1, 2])).toThrow(ShapeError);
  expect(() => klDivergence([1, 2], [none, none])).toThrow(/largest logit of 2 is -Infinity/);
});
