// entmax15 against a bisection for the threshold, its gradient against central differences.
import { describe, expect, it } from "vitest";
import { cpu } from "../cpu/index.ts";
import { gradientError, numbers, precise } from "../finite-difference.test-util.ts";
import { autodiff, engine, entmax15, grad, mul, softmax, sum, watch } from "../index.ts";

/** Σ [x/2 - τ]₊² falls with τ: bisect until it is 1. */
function oracle(row: readonly number[]): number[] {
  const top = Math.max(...row);
  if (top === Number.NEGATIVE_INFINITY) return row.map(() => 0);
  const z = row.map((x) => (x - top) / 2);
  let [low, high] = [-1, 0];
  for (let i = 0; i < 200; i++) {
    const tau = (low + high) / 2;
    const total = z.reduce((all, v) => all + Math.max(v - tau, 0) ** 2, 0);
    if (total > 1) low = tau;
    else high = tau;
  }
  return z.map((v) => Math.max(v - low, 0) ** 2);
}
const rowsOf = (data: ArrayLike<number>, n: number): number[][] =>
  Array.from({ length: data.length / n }, (_, i) => Array.from(data).slice(i * n, (i + 1) * n));

describe("entmax15", () => {
  const at = async (rows: readonly (readonly number[])[], precision: 32 | 64 = 64): Promise<number[][]> => {
    const on = engine(cpu({ precision }));
    const n = rows[0]?.length ?? 0;
    const y = on.scope(() => entmax15(on.tensor(Float64Array.from(rows.flat()), [rows.length, n])));
    const data = await y.data();
    y.dispose();
    expect(on.live()).toBe(0);
    return rowsOf(data, n);
  };
  const close = (found: number[][], wanted: number[][], error: number): void => {
    for (const [i, row] of wanted.entries())
      for (const [j, value] of row.entries())
        expect(Math.abs((found[i]?.[j] ?? Number.NaN) - value)).toBeLessThan(error);
  };

  it.each([1, 2, 5, 17, 300])("meets the oracle on rows of %i, spread and close together", async (n) => {
    const rows = [0.01, 1, 4, 60].map((scale, i) => [...numbers(n, i + 1)].map((x) => x * scale));
    close(await at(rows), rows.map(oracle), 1e-10);
    close(await at(rows, 32), rows.map(oracle), 2e-5);
  });
  it("a shift changes nothing, rows sum to 1, equal entries share", async () => {
    const [row, shifted, even] = await at([
      [1, 0.2, -3],
      [101, 100.2, 97],
      [7, 7, 7],
    ]);
    close([shifted ?? []], [row ?? []], 1e-12);
    expect(row?.reduce((a, b) => a + b)).toBeCloseTo(1, 12);
    expect(row?.[2]).toBe(0);
    close([even ?? []], [[1 / 3, 1 / 3, 1 / 3]], 1e-12);
  });
  it("two units below the largest the answer is exactly 0, at the boundary and beyond it", async () => {
    for (const precision of [32, 64] as const) {
      const [row = []] = await at([[2, 0, 0, -1e-3, -50]], precision);
      expect(row[0]).toBeCloseTo(1, 6);
      expect(row.slice(1)).toEqual([0, 0, 0, 0]);
    }
  });
  it("-inf is masked out, and a row of nothing else gives zeros", async () => {
    const none = Number.NEGATIVE_INFINITY;
    const rows = [
      [none, 0.5, 0.1],
      [none, none, none],
      [none, none, -4],
    ];
    close(await at(rows), rows.map(oracle), 1e-12);
    close(await at(rows, 32), rows.map(oracle), 1e-6);
  });
  it("no rows and empty rows pass through", async () => {
    const on = precise();
    const shapes = on.scope(() =>
      [
        [0, 3],
        [2, 0],
        [2, 0, 4],
      ].map((shape) => entmax15(on.tensor(new Float64Array(0), shape)).shape.join()),
    );
    expect(shapes).toEqual(["0,3", "2,0", "2,0,4"]);
  });
  it("the gradient agrees with central differences, with zeros in the answer and without", async () => {
    for (const scale of [0.5, 3]) {
      const values = [numbers(24, 9).map((x) => x * scale)];
      expect(await gradientError([[2, 3, 4]], entmax15, { values })).toBeLessThan(1e-6);
    }
  });
  it("a gradient of the gradient agrees too", async () => {
    const slope = (x: Parameters<typeof entmax15>[0]) => {
      const level = autodiff(x.engine);
      const leaf = watch(level, x);
      const [found] = grad(sum(mul(entmax15(leaf), softmax(leaf))), [leaf]);
      if (!found) throw new Error("no gradient");
      return found;
    };
    expect(await gradientError([[2, 3]], slope, { values: [numbers(6, 3)] })).toBeLessThan(1e-6);
  });
});
