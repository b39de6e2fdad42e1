// Steps for a time. The measuring itself is tested with the comparison.
import { describe, expect, test } from "vitest";
import type { TokenBatch } from "./batches.ts";
import { stepsThatFit } from "./speed.ts";

describe("stepsThatFit", () => {
  const batches = (count: number) => Array.from({ length: count }, () => ({}) as TokenBatch);
  const prepared = { heldOut: { all: [batches(30), batches(10)], probe: [batches(3), batches(2)] } };
  const speeds = [
    { step: 0.1, evaluation: 0.02 },
    { step: 0.15, evaluation: 0.03 },
  ];

  test("the steps that fit leave room for the evaluations", () => {
    const looks = 1.15 * (40 + 8 * 5);
    const steps = Math.floor((0.96 * 100 - 2 * looks * 0.05) / (2 * 0.25));
    expect(stepsThatFit(100, speeds, 2, prepared)).toBe(steps);
  });

  test("too little time is refused with what is needed", () => {
    expect(() => stepsThatFit(5, speeds, 1, prepared)).toThrow(/5 seconds are too short for 2 runs: .* need 8;/);
    expect(() => stepsThatFit(-3, speeds, 1, prepared)).toThrow("0 seconds are too short");
  });
});
