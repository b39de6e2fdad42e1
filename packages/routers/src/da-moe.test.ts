import { dispose, type Tensor } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { daMoEFamily } from "../test/families/lookup.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type DAMoEOptions, daMoE, expertCounts, importanceOf } from "./da-moe.ts";

testRouter({ plugin: ({ experts, k = Math.min(4, experts) }) => daMoE({ k }), weights: "sum to 1" });
testRouter({
  plugin: ({ experts, k = Math.min(3, experts) }) => daMoE({ k, asDecoded: true, heads: "max" }),
  weights: "sum to 1",
});
testRouter({
  plugin: ({ k = 3 }) => daMoE({ k, fewest: Math.min(2, k), mapping: "quantile", attention: "bidirectional" }),
  weights: "sum to 1",
  sizes: { experts: 5 },
});
testRouter({
  plugin: ({ k = 2 }) => daMoE({ k, mapping: "minmax", decodeK: "min", asDecoded: true }),
  weights: "sum to 1",
});

describe("daMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("damoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(daMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("daMoE", () => {
  const on = float64();
  const row = async (f: () => Tensor): Promise<number[]> => flat((await results(on, () => ({ x: f() }))).x);

  it("maps attention received to importance by ratio, place or rank, padding left out", async () => {
    const received = [[0.2, 0.4, 0.1, 0.4, 0]];
    const mask = [[1, 1, 1, 1, 0]];
    const map = (how: "ratio" | "minmax" | "quantile", padded: boolean): Promise<number[]> =>
      row(() => importanceOf(tensor(on, received), how, padded ? tensor(on, mask) : undefined));
    const expectClose = (found: readonly number[], wanted: readonly number[]): void => {
      expect(found).toHaveLength(wanted.length);
      for (const [i, x] of found.entries()) expect(x).toBeCloseTo(wanted[i] ?? Number.NaN, 12);
    };
    expectClose(await map("ratio", true), [0.5, 1, 0.25, 1, 0]);
    expectClose(await map("minmax", true), [1 / 3, 1, 0, 1, 0]);
    expectClose(await map("minmax", false), [0.5, 1, 0.25, 1, 0]);
    expectClose(await map("quantile", true), [0.5, 1, 0.25, 1, 0]);
    expectClose(await map("quantile", false), [0.6, 1, 0.4, 1, 0.2]);
  });
  it("rounds importance up to whole experts between the fewest and the most", async () => {
    const counts = await row(() =>
      expertCounts(tensor(on, [0, 0.1, 0.25, 0.26, 0.5, 0.75, 0.76, 1]), { k: 4, fewest: 1 }),
    );
    expect(counts).toEqual([1, 1, 1, 2, 2, 3, 4, 4]);
    expect(await row(() => expertCounts(tensor(on, [0, 1 / 3, 2 / 3, 1]), { k: 3, fewest: 2 }))).toEqual([2, 2, 2, 3]);
  });

  const experts = async (
    options: DAMoEOptions,
    attention: readonly (readonly number[])[],
    past = 0,
  ): Promise<number[]> => {
    const router = daMoE({ k: 4, ...options }).init(routerContext(on, { width: 2 }));
    const found = await results(on, () => {
      const hidden = tensor(
        on,
        attention.map((_, t) => [Math.sin(t), Math.cos(t)]),
      );
      const input = routerInput(on, { hidden, past });
      const routed = router.route(router.params, { ...input, attention: () => tensor(on, [[attention]]) });
      return { ids: sparse(routed).experts, mean: routed.metrics?.expertsPerToken as Tensor };
    });
    dispose(router.params);
    expect(on.live()).toBe(0);
    const ids = flat(found.ids);
    const counts = attention.map((_, t) => ids.slice(4 * t, 4 * t + 4).filter((e) => e >= 0).length);
    expect(found.mean).toBeCloseTo(counts.reduce((a, b) => a + b, 0) / counts.length, 12);
    return counts;
  };
  it("gives the token that all attend to most experts", async () => {
    const attention = [
      [1, 0, 0],
      [0.25, 0.75, 0],
      [0.1, 0.85, 0.05],
    ];
    // Received 1.35/3, 1.6/2 and 0.05: 2.25, 4 and 0.25 of 4.
    expect(await experts({}, attention)).toEqual([3, 4, 1]);
    // All together 3 queries: 1.35, 1.6 and 0.05.
    expect(await experts({ attention: "bidirectional" }, attention)).toEqual([4, 4, 1]);
    expect(await experts({ fewest: 2 }, attention)).toEqual([3, 4, 2]);
  });
  it("while decoding, gives the fewest, or as many as the token looks widely", async () => {
    const last = [[0.25, 0.25, 0.25, 0.25]];
    expect(await experts({ decodeK: "min", fewest: 2 }, last, 3)).toEqual([2]);
    expect(await experts({ decodeK: "entropy" }, last, 3)).toEqual([4]);
    expect(await experts({ decodeK: "entropy" }, [[0, 0, 1, 0]], 3)).toEqual([1]);
    expect(await experts({ decodeK: "entropy" }, [[0.5, 0.5, 0, 0]], 3)).toEqual([2]);
    const whole = [
      [1, 0, 0],
      [0.5, 0.5, 0],
      [0, 1, 0],
    ];
    expect(await experts({ asDecoded: true }, whole)).toEqual([1, 4, 1]);
  });
  it("is causal only where every token is treated as if it were the last", () => {
    expect(daMoE().causal).toEqual({ training: false, evaluation: false });
    expect(daMoE({ asDecoded: true }).causal).toEqual({ training: true, evaluation: true });
    expect(daMoE({ asDecoded: true, attention: "bidirectional" }).causal.training).toBe(false);
  });
  it("refuses what it cannot do, and says why", () => {
    expect(() => daMoE({ k: 0 })).toThrow("daMoE: k = 0; expected a whole number from 1");
    expect(() => daMoE({ k: 2, fewest: 3 })).toThrow("fewest = 3; expected a whole number from 1 to k = 2");
    expect(() => daMoE(JSON.parse('{ "mapping": "log" }'))).toThrow('expected "ratio" or "minmax" or "quantile"');
    expect(() => daMoE({ k: 6 }).init(routerContext(on))).toThrow("k = 6 of 5 experts");
    on.scope(() => {
      const router = daMoE({ k: 2 }).init(routerContext(on));
      const { attention: _, ...input } = routerInput(on, { hidden: tensor(on, [[1, 2, 3, 4, 5, 6]]) });
      expect(() => router.route(router.params, input)).toThrow("got no attention");
      const wrong = { ...input, attention: () => tensor(on, [[[1]]]) };
      expect(() => router.route(router.params, wrong)).toThrow("attention is [1,1,1], expected");
      return undefined;
    });
  });
});
