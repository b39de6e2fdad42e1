// Steps for a time. The measuring itself is tested with the comparison.
import { describe, expect, test } from "vitest";
import type { NoisedBatch, TokenBatch } from "./batches.ts";
import { extrasOf, stepsThatFit } from "./speed.ts";

const batches = (count: number) => Array.from({ length: count }, () => ({}) as TokenBatch);
const noised = [batches(3) as NoisedBatch[], batches(2) as NoisedBatch[]];
const prepared = { heldOut: { all: [batches(30), batches(10)], probe: [batches(3), batches(2)], noised } };

test("a run looks at all held-out text once, at the probe at every checkpoint, at clean and noised at the end, and writes a sample per domain", () => {
  expect(extrasOf(prepared, { checkpoints: 4, sampleTokens: 50 })).toEqual({ batches: 40 + 5 * 5 + 10, tokens: 100 });
  expect(extrasOf(prepared, {})).toEqual({ batches: 40 + 9 * 5 + 10, tokens: 200 });
});

describe("stepsThatFit", () => {
  const speeds = [
    { step: 0.1, evaluation: 0.02, token: 0.004 },
    { step: 0.15, evaluation: 0.03, token: 0.006 },
  ];
  const extras = { batches: 80, tokens: 200 };

  test("the steps that fit leave room for evaluations and samples", () => {
    const fixed = 1.1 * (80 * 0.05 + 200 * 0.01);
    expect(stepsThatFit(100, speeds, { seeds: 2, extras })).toBe(Math.floor((97 - 2 * fixed) / (2 * 0.25)));
    expect(stepsThatFit(100, speeds, { seeds: 1, extras })).toBe(Math.floor((97 - fixed) / 0.25));
  });

  test("too little time is refused with what is needed", () => {
    const few = () => stepsThatFit(5, speeds, { seeds: 1, extras });
    expect(few).toThrow(/5 seconds are too short for 2 runs: .* need 10;/);
    expect(() => stepsThatFit(-3, speeds, { seeds: 1, extras })).toThrow("0 seconds are too short");
  });
});
