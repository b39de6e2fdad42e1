// erf against the C library's values, and its smoothness.
import { describe, expect, it } from "vitest";
import { erf } from "./erf.ts";

// From Python 3.11's math.erf (the C library's erf).
const table: readonly [number, number][] = [
  [1e-300, 1.1283791670955126e-300],
  [1e-10, 1.1283791670955126e-10],
  [0.1, 0.1124629160182849],
  [0.5, 0.5204998778130465],
  [1, 0.8427007929497149],
  [1.5, 0.9661051464753108],
  [1.9999999, 0.9953222629522538],
  [2, 0.9953222650189527],
  [2.0000001, 0.9953222670856509],
  [2.5, 0.999593047982555],
  [3, 0.9999779095030014],
  [4, 0.9999999845827421],
  [5.9, 0.9999999999999999],
  [6.5, 1],
];

describe("erf", () => {
  it.each(table)("erf(%f) is right to 1e-15, and odd", (x, expected) => {
    expect(Math.abs(erf(x) - expected)).toBeLessThanOrEqual(1e-15 * Math.abs(expected));
    expect(erf(-x)).toBe(-erf(x));
  });

  it("is smooth enough for finite differences, across the change of expansion too", () => {
    for (const x of [0, 0.3, 1.2, 1.999995, 2.7]) {
      const h = 1e-5;
      const slope = (erf(x + h) - erf(x - h)) / (2 * h);
      expect(Math.abs(slope - (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x))).toBeLessThan(2e-10);
    }
  });

  it("keeps the limits", () => {
    expect(erf(0)).toBe(0);
    expect(erf(Number.POSITIVE_INFINITY)).toBe(1);
    expect(erf(Number.NEGATIVE_INFINITY)).toBe(-1);
    expect(erf(Number.NaN)).toBeNaN();
  });
});
