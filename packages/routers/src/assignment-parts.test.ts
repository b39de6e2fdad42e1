// Balanced assignment against all possibilities, and the auction against the exact one.
import { generator } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { auctionAssignment, auctionStep, exactAssignment } from "./assignment-parts.ts";

const draws = (key: string, tokens: number, experts: number, skew = 0): Float64Array => {
  const draw = generator(key);
  return Float64Array.from({ length: tokens * experts }, (_, i) => 2 * draw() - 1 + skew * (i % experts));
};
const total = (scores: ArrayLike<number>, experts: number, chosen: ArrayLike<number>): number =>
  Array.from(chosen).reduce((sum, e, t) => sum + (scores[t * experts + e] ?? Number.NaN), 0);
function checkBalance(chosen: Int32Array, tokens: number, experts: number): void {
  const load = new Array<number>(experts).fill(0);
  for (const e of chosen) load[e] = (load[e] ?? Number.NaN) + 1;
  expect(chosen).toHaveLength(tokens);
  expect(Math.min(...load)).toBeGreaterThanOrEqual(Math.floor(tokens / experts));
  expect(Math.max(...load)).toBeLessThanOrEqual(Math.ceil(tokens / experts));
  expect(load.filter((n) => n > tokens / experts)).toHaveLength(tokens % experts);
}
/** The best sum over every assignment with floor or ceil places, by trying all. */
function best(scores: ArrayLike<number>, tokens: number, experts: number): number {
  const load = new Array<number>(experts).fill(0);
  const [floor, more] = [Math.floor(tokens / experts), tokens % experts];
  const visit = (token: number): number => {
    if (token === tokens) return 0;
    let found = Number.NEGATIVE_INFINITY;
    for (let e = 0; e < experts; e++) {
      const full = load.filter((n) => n > floor).length;
      const n = load[e] ?? 0;
      if (n > floor || (n === floor && full >= more)) continue;
      load[e] = n + 1;
      found = Math.max(found, (scores[token * experts + e] ?? Number.NaN) + visit(token + 1));
      load[e] = n;
    }
    return found;
  };
  return visit(0);
}

describe("exactAssignment", () => {
  it.each([
    [8, 4],
    [7, 3],
    [5, 5],
    [3, 5],
    [9, 2],
    [1, 4],
    [6, 1],
    [0, 3],
  ])("%i tokens, %i experts: the best of all assignments, balanced", (tokens, experts) => {
    for (const skew of [0, 1, -3]) {
      for (let round = 0; round < 20; round++) {
        const scores = draws(`exact ${tokens} ${experts} ${skew} ${round}`, tokens, experts, skew);
        const chosen = exactAssignment(scores, { tokens, experts });
        checkBalance(chosen, tokens, experts);
        expect(total(scores, experts, chosen)).toBeCloseTo(best(scores, tokens, experts), 10);
      }
    }
  });
  it("ties and equal tokens still come out balanced", () => {
    checkBalance(exactAssignment(new Float64Array(40), { tokens: 10, experts: 4 }), 10, 4);
    const same = Float64Array.from({ length: 36 }, (_, i) => [3, 1, 2][i % 3] ?? 0);
    checkBalance(exactAssignment(same, { tokens: 12, experts: 3 }), 12, 3);
  });
  it("scores that are not numbers count as the lowest", () => {
    const scores = [Number.NaN, 5, 1, 5, 2, Number.NEGATIVE_INFINITY, 1, Number.POSITIVE_INFINITY];
    expect([...exactAssignment(scores, { tokens: 4, experts: 2 })]).toEqual([1, 1, 0, 0]);
    checkBalance(exactAssignment(new Float64Array(8).fill(Number.NaN), { tokens: 4, experts: 2 }), 4, 2);
  });
});

describe("auctionAssignment", () => {
  it.each([
    [8, 4],
    [7, 3],
    [3, 5],
    [64, 8],
    [61, 7],
    [257, 16],
    [6, 1],
    [0, 3],
  ])("%i tokens, %i experts: balanced, and within its bound of the best", (tokens, experts) => {
    for (const skew of [0, 0.5, 2]) {
      for (const precision of [0.1, 1e-2, 1e-4]) {
        const scores = draws(`auction ${tokens} ${experts} ${skew}`, tokens, experts, skew);
        const found = auctionAssignment(scores, { tokens, experts, precision });
        checkBalance(found, tokens, experts);
        const gap =
          total(scores, experts, exactAssignment(scores, { tokens, experts })) - total(scores, experts, found);
        expect(gap).toBeGreaterThan(-1e-9);
        expect(gap).toBeLessThanOrEqual((tokens + experts) * auctionStep(scores, precision) + 1e-9);
      }
    }
  });
  it("is the best one where the sums of assignments differ by more than the bound", () => {
    const scores = Float64Array.from(draws("whole", 30, 5), (x) => Math.round(10 * x));
    const chosen = auctionAssignment(scores, { tokens: 30, experts: 5, precision: 1e-3 });
    const exact = exactAssignment(scores, { tokens: 30, experts: 5 });
    expect(31 * auctionStep(scores, 1e-3)).toBeLessThan(1);
    expect(total(scores, 5, chosen)).toBe(total(scores, 5, exact));
  });
  it("ends where all scores are equal, or no numbers at all", () => {
    for (const value of [0, 7, Number.NaN])
      checkBalance(
        auctionAssignment(new Float64Array(96).fill(value), { tokens: 24, experts: 4, precision: 1e-4 }),
        24,
        4,
      );
  });
  it("2048 tokens that nearly all want one expert", () => {
    const scores = draws("crowd", 2048, 8).map((x, i) => (i % 8 === 3 ? x + 5 : x));
    const chosen = auctionAssignment(scores, { tokens: 2048, experts: 8, precision: 1e-4 });
    checkBalance(chosen, 2048, 8);
    const gap = total(scores, 8, exactAssignment(scores, { tokens: 2048, experts: 8 })) - total(scores, 8, chosen);
    expect(gap).toBeLessThanOrEqual(2048 * auctionStep(scores, 1e-4));
  });
});
