import { idCounts } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { sinkhornFamily } from "../test/families/classic.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type SinkhornPlanOptions, sinkhorn, sinkhornPlan } from "./sinkhorn.ts";

testRouter({ plugin: ({ k = 2 }) => sinkhorn({ k }), weights: "sum to at most 1" });
testRouter({ plugin: ({ k = 1 }) => sinkhorn({ k, iterations: 3, zLoss: 0.01 }), weights: "sum to at most 1" });

describe("sinkhorn meets its vectors", () => {
  const { cases, tolerance } = readVectors("sinkhorn");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(sinkhornFamily, one, tolerance)).toEqual([]);
  });
});

describe("sinkhorn", () => {
  const on = float64();
  const draws = (rows: number, columns: number): number[][] => {
    const values = routerContext(on)
      .random.at("logits")
      .host("normal", rows * columns);
    return Array.from({ length: rows }, (_, t) => [...values.subarray(t * columns, (t + 1) * columns)]);
  };
  const run = async (
    logits: Values,
    options: Omit<SinkhornPlanOptions, "mask"> & { readonly mask?: number[] } = {},
  ): Promise<{ plan: number[][]; iterations: number }> => {
    const { mask, ...rest } = options;
    const found = await results(on, () =>
      sinkhornPlan(tensor(on, logits), { ...rest, ...(mask ? { mask: tensor(on, mask) } : {}) }),
    );
    return { plan: (found.plan as readonly Values[]).map(flat), iterations: flat(found.iterations)[0] ?? Number.NaN };
  };
  const total = (row: readonly number[]): number => row.reduce((a, b) => a + b, 0);
  const column = (plan: readonly number[][], e: number): number => total(plan.map((row) => row[e] ?? 0));

  it("every token and every expert get the same mass", async () => {
    const { plan } = await run(draws(11, 5), { iterations: 200, tolerance: 0 });
    for (const row of plan) expect(total(row)).toBeCloseTo(1 / 11, 7);
    for (let e = 0; e < 5; e++) expect(column(plan, e)).toBeCloseTo(1 / 5, 7);
  });
  it("iterations after the tolerance change nothing", async () => {
    const logits = draws(7, 3);
    const enough = await run(logits, { iterations: 30 });
    expect(enough.iterations).toBeGreaterThan(2);
    expect(enough.iterations).toBeLessThan(30);
    expect(await run(logits, { iterations: enough.iterations })).toEqual(enough);
    expect((await run(logits, { iterations: enough.iterations - 1 })).plan).not.toEqual(enough.plan);
    expect((await run(logits, { iterations: 4, tolerance: 0 })).iterations).toBe(4);
  });
  it("large and small logits neither overflow nor change the plan of a row", async () => {
    const logits = draws(6, 3);
    const { plan } = await run(logits, { iterations: 100, tolerance: 0 });
    const moved = logits.map((row, t) => row.map((value) => value + (t % 2 === 0 ? 900 : 3)));
    const far = await run(moved, { iterations: 100, tolerance: 0 });
    far.plan.forEach((row, t) => {
      row.forEach((value, e) => {
        expect(value).toBeCloseTo(plan[t]?.[e] ?? Number.NaN, 7);
      });
    });
  });
  it("a token whose logits are all very low still tells its experts apart", async () => {
    const { plan } = await run([
      [-1001, -1000],
      [1, 0],
    ]);
    expect(plan.flat().every(Number.isFinite)).toBe(true);
    expect(plan[0]?.[0]).toBeLessThan(plan[0]?.[1] ?? 0);
  });
  it("however large the logits of padding are, the plan of the others is the same", async () => {
    const rows = [...draws(4, 3), [0, 900, -900]];
    const mask = [1, 1, 1, 1, 0];
    expect(await run(rows, { mask })).toEqual(await run([...rows.slice(0, 4), [0, 0, 0]], { mask }));
  });
  it("padding has no mass", async () => {
    const logits = draws(6, 3);
    const alone = await run(logits.slice(0, 4));
    const padded = await run(logits, { mask: [1, 1, 1, 1, 0, 0] });
    expect(padded.plan.slice(4)).toEqual([
      [0, 0, 0],
      [0, 0, 0],
    ]);
    padded.plan.slice(0, 4).forEach((row, t) => {
      row.forEach((value, e) => {
        expect(value).toBeCloseTo(alone.plan[t]?.[e] ?? Number.NaN, 12);
      });
    });
    expect(padded.iterations).toBe(alone.iterations);
  });
  it("tokens that all prefer one expert are spread in training, and not in evaluation", async () => {
    const logits = draws(40, 4).map((row) => row.map((value, e) => value + (e === 2 ? 6 : 0)));
    const loads = async (training: boolean): Promise<number[]> => {
      const { load } = await results(on, () => {
        const select = selecting(on, sinkhorn({ k: 1, iterations: 50 }), 4);
        return { load: idCounts(sparse(select(tensor(on, logits), { training })).experts, 4) };
      });
      return flat(load);
    };
    expect((await loads(false))[2]).toBe(40);
    for (const load of await loads(true)) expect(Math.abs(load - 10)).toBeLessThanOrEqual(5);
  });
  it("ties go to the lower expert", async () => {
    const { ids } = await results(on, () => {
      const select = selecting(on, sinkhorn({ k: 2 }), 4);
      return { ids: sparse(select(tensor(on, [[0, 0, 0, 0]]), { training: true })).experts };
    });
    expect(flat(ids)).toEqual([0, 1]);
  });
  it("has a z-loss where asked for, in training only", async () => {
    const names = (zLoss: number, training: boolean): string[] =>
      on.scope(() => {
        const router = sinkhorn({ k: 1, zLoss }).init(routerContext(on));
        const routed = router.route(router.params, routerInput(on, { hidden: tensor(on, draws(3, 6)), training }));
        return Object.keys(routed.losses);
      });
    expect(names(0.1, true)).toEqual(["zLoss"]);
    expect(names(0.1, false)).toEqual([]);
    expect(names(0, true)).toEqual([]);
  });
  it("refuses options that cannot be", () => {
    expect(() => sinkhorn({ k: 6 }).init(routerContext(on))).toThrow("sinkhorn: k = 6 of 5 experts");
    for (const iterations of [0, 2.5]) {
      expect(() => sinkhorn({ k: 1, iterations })).toThrow(
        `iterations = ${iterations}; expected a whole number from 1`,
      );
    }
    expect(() => sinkhorn({ k: 1, tolerance: -1 })).toThrow("tolerance = -1");
  });
});
