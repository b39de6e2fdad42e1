import { describe, expect, it } from "vitest";
import { constantRate, cosineDecay, linearDecay, type Schedule, warmUp, wsd } from "./schedule.ts";

const over = (schedule: Schedule, steps: number): number[] =>
  Array.from({ length: steps }, (_, i) => schedule(i, steps));
const close = (found: readonly number[], wanted: readonly number[]): void => {
  expect(found.length).toBe(wanted.length);
  found.forEach((x, i) => void expect(x).toBeCloseTo(wanted[i] as number, 12));
};

describe("schedules", () => {
  it("constantRate is 1", () => close(over(constantRate(), 3), [1, 1, 1]));

  it("linearDecay falls in equal parts and stays at final afterwards", () => {
    close(over(linearDecay(), 4), [1, 0.75, 0.5, 0.25]);
    expect(linearDecay({ final: 0.2 })(4, 4)).toBeCloseTo(0.2, 12);
    expect(linearDecay({ final: 0.2 })(9, 4)).toBeCloseTo(0.2, 12);
  });

  it("cosineDecay is half a cosine from 1 to final", () => {
    const half = Math.SQRT1_2;
    close(over(cosineDecay(), 4), [1, (1 + half) / 2, 0.5, (1 - half) / 2]);
    expect(cosineDecay({ final: 0.1 })(2, 4)).toBeCloseTo(0.55, 12);
    expect(cosineDecay({ final: 0.1 })(4, 4)).toBeCloseTo(0.1, 12);
  });

  it("wsd is flat, then decays over the last share", () => {
    close(over(wsd({ decay: 0.4, shape: "linear" }), 10), [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]);
    close(
      over(wsd({ decay: 0.4, final: 0.1 }), 10).slice(6),
      [0, 1, 2, 3].map((i) => 1 - 0.9 * Math.sqrt(i / 4)),
    );
    close(over(wsd({ decay: 0 }), 3), [1, 1, 1]);
  });

  it("warmUp rises to 1 and hands the remaining steps on", () => {
    close(over(warmUp(4, linearDecay()), 8), [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]);
    close(over(warmUp(0, linearDecay()), 2), [1, 0.5]);
    close(over(warmUp(5), 3), [0.2, 0.4, 0.6]);
  });

  it("stays at its plateau while the number of steps is unknown", () => {
    for (const schedule of [
      linearDecay(),
      cosineDecay(),
      wsd(),
      wsd({ decay: 1 }),
      warmUp(3, wsd()),
      warmUp(3, cosineDecay()),
    ]) {
      expect(schedule(1000, Infinity)).toBe(1);
    }
  });

  it("is total: no steps at all, one step, the warm-up longer than the run", () => {
    for (const schedule of [
      linearDecay(),
      cosineDecay(),
      wsd(),
      warmUp(10, cosineDecay()),
      warmUp(10, wsd({ decay: 1 })),
    ]) {
      for (const total of [0, 1, 7]) {
        for (let step = 0; step <= 20; step++) {
          const factor = schedule(step, total);
          expect(factor).toBeGreaterThanOrEqual(0);
          expect(factor).toBeLessThanOrEqual(1);
        }
      }
    }
  });

  it("refuses what makes no sense", () => {
    expect(() => warmUp(-1)).toThrow("warmUp: needs a whole number of steps from 0 up, found -1");
    expect(() => warmUp(1.5)).toThrow("found 1.5");
    expect(() => cosineDecay({ final: 2 })).toThrow("cosineDecay: final must lie in 0..1, found 2");
    expect(() => wsd({ decay: Number.NaN })).toThrow("wsd: decay must lie in 0..1, found NaN");
  });
});
