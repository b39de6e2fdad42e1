import { ShapeError } from "@switchyard/core";
import { expect, it } from "vitest";
import { jensenShannon } from "./jensen-shannon.ts";
import { klDivergence } from "./kl-divergence.ts";

const none = Number.NEGATIVE_INFINITY;

it("is half of both divergences from the middle, and the same both ways", () => {
  const [p, q] = [
    [0.7, 0.2, 0.1],
    [0.1, 0.1, 0.8],
  ] as const;
  const middle = p.map((x, i) => Math.log((x + (q[i] ?? 0)) / 2));
  const [a, b] = [p.map(Math.log), q.map((x) => Math.log(x) + 5)];
  const expected = (klDivergence(a, middle) + klDivergence(b, middle)) / 2;
  expect(jensenShannon(a, b)).toBeCloseTo(expected, 14);
  expect(jensenShannon(b, a)).toBeCloseTo(expected, 14);
});

it("is 0 for equal passes and ln 2 for passes that share no token, masked or improbable", () => {
  expect(jensenShannon([1, 2, none], [3, 4, none])).toBeCloseTo(0, 14);
  expect(jensenShannon([0, none], [none, 0])).toBeCloseTo(Math.log(2), 14);
  expect(jensenShannon([0, -5000], [-5000, 0])).toBeCloseTo(Math.log(2), 14);
});

it("refuses other vocabularies and what is no number", () => {
  expect(() => jensenShannon([1], [1, 2])).toThrow(/1 and 2 logits/);
  expect(() => jensenShannon([1, Number.POSITIVE_INFINITY], [1, 2])).toThrow(ShapeError);
});
