import { dispose, type Tensor } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { maskMoEFamily } from "../test/families/lookup.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { visibleExperts } from "./hash-parts.ts";
import { maskMoE } from "./mask-moe.ts";

testRouter({ plugin: ({ k = 1 }) => maskMoE({ k }), weights: "sum to at most 1" });
testRouter({
  plugin: ({ experts, k = 2 }) => maskMoE({ k, visible: Math.min(3, experts), renormalize: true, seed: 5 }),
  weights: "sum to 1",
});

describe("maskMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("maskmoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(maskMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("maskMoE", () => {
  const on = float64();
  const rows = (values: Values): number[][] => (values as readonly Values[]).map(flat);
  const counts = Float64Array.of(50, 1, 30, 2, 9, 8); // at 0.6 of 100: ids 0 and 2 are frequent

  it("frequent ids see some experts, rare ones a single one, in each layer others, the same for a seed", async () => {
    const table = async (layer: number, seed = 3): Promise<number[][]> => {
      const plugin = maskMoE({ visible: 4, frequentMass: 0.6, seed });
      const router = plugin.init(routerContext(on, { experts: 7, layer, tokenCounts: counts }));
      const { visible } = router.buffers as { visible: Tensor };
      expect(visible.shape).toEqual([6, 7]);
      const data = [...(await visible.data())];
      dispose([router.params, router.buffers]);
      return Array.from(counts, (_, id) => data.slice(7 * id, 7 * id + 7));
    };
    const first = await table(0);
    expect(first.map((row) => row.reduce((a, b) => a + b, 0))).toEqual([4, 1, 4, 1, 1, 1]);
    const seen = (first[2] ?? []).flatMap((x, e) => (x === 1 ? [e] : []));
    expect(seen).toEqual(visibleExperts(2, { experts: 7, visible: 4, seed: 3, layer: 0 }));
    expect(await table(0)).toEqual(first);
    expect(await table(1)).not.toEqual(first);
    expect(await table(0, 4)).not.toEqual(first);
  });
  it("routes every token among the experts it sees; an id outside the table gets none", async () => {
    const router = maskMoE({ k: 2, visible: 3, frequentMass: 0.6 }).init(
      routerContext(on, { experts: 5, width: 2, tokenCounts: counts }),
    );
    const ids = [0, 1, 2, 5, 6, -1, 0];
    const found = await results(on, () => {
      const hidden = tensor(
        on,
        ids.map((_, t) => [Math.sin(t), Math.cos(2 * t)]),
      );
      const input = routerInput(on, { hidden, buffers: router.buffers });
      const routed = router.route(router.params, {
        ...input,
        tokenIds: on.tensor(Int32Array.from(ids), [ids.length]),
      });
      return { experts: sparse(routed).experts, weights: sparse(routed).weights, p: routed.probabilities as Tensor };
    });
    const { visible } = router.buffers as { visible: Tensor };
    const open = [...(await visible.data())];
    const [experts, weights, p] = [rows(found.experts), rows(found.weights), rows(found.p)];
    ids.forEach((id, t) => {
      const sees = [0, 1, 2, 3, 4].filter((e) => open[5 * id + e] === 1);
      expect((experts[t] ?? []).filter((e) => e >= 0)).toHaveLength(Math.min(2, sees.length));
      for (const e of experts[t] ?? []) if (e >= 0) expect(sees).toContain(e);
      const total = (p[t] ?? []).reduce((a, b) => a + b, 0);
      expect(total).toBeCloseTo(sees.length === 0 ? 0 : 1, 12);
      expect((p[t] ?? []).every((x, e) => x === 0 || sees.includes(e))).toBe(true);
      if (sees.length === 1) expect(weights[t]).toEqual([1, 0]);
    });
    expect(experts[4]).toEqual([-1, -1]);
    expect(experts[5]).toEqual([-1, -1]);
    dispose([router.params, router.buffers]);
    expect(on.live()).toBe(0);
  });
  it("the balance loss counts tokens that see several experts, padding left out, and nothing else", async () => {
    const router = maskMoE({ visible: 4, frequentMass: 0.6, balance: 0.5 }).init(
      routerContext(on, { experts: 4, width: 2, tokenCounts: counts }),
    );
    // By hand: only tokens 0, 2 and 3 are frequent and real.
    const ids = [0, 1, 2, 0, 2, 3];
    const mask = [1, 1, 1, 1, 0, 1];
    const found = await results(on, () => {
      const hidden = tensor(
        on,
        ids.map((_, t) => [Math.sin(t), Math.cos(2 * t)]),
      );
      const input = routerInput(on, { hidden, buffers: router.buffers, training: true, mask });
      const routed = router.route(router.params, { ...input, tokenIds: on.tensor(Int32Array.from(ids), [6]) });
      expect(Object.keys(routed.losses)).toEqual(["balance"]);
      expect(routed.losses.balance?.weight).toBe(0.5);
      return { p: routed.probabilities as Tensor, loss: routed.losses.balance?.value as Tensor };
    });
    const p = [0, 2, 3].map((t) => rows(found.p)[t] ?? []);
    const share = (e: number): number => p.filter((row) => row.indexOf(Math.max(...row)) === e).length / 3;
    const mean = (e: number): number => p.reduce((sum, row) => sum + (row[e] ?? 0), 0) / 3;
    const expected = 4 * [0, 1, 2, 3].reduce((sum, e) => sum + share(e) * mean(e), 0);
    expect(found.loss).toBeCloseTo(expected, 12);
    dispose([router.params, router.buffers]);
  });
  it("refuses what it cannot do, and says what is missing", () => {
    const { tokenCounts: _, ...bare } = routerContext(on);
    expect(() => maskMoE().init(bare)).toThrow("put the token counts of the corpus into the context");
    expect(() => maskMoE({ k: 6 }).init(routerContext(on))).toThrow("k = 6 of 5 experts");
    expect(() => maskMoE({ visible: 6 }).init(routerContext(on))).toThrow("visible = 6 of 5 experts");
    expect(() => maskMoE({ visible: 0 })).toThrow("visible = 0");
    expect(() => maskMoE({ frequentMass: 1.5 })).toThrow("frequentMass = 1.5");
    expect(() => maskMoE({ seed: 0.5 })).toThrow("seed = 0.5");
    on.scope(() => {
      const router = maskMoE().init(routerContext(on));
      const { tokenIds: __, ...input } = routerInput(on, { hidden: tensor(on, [[1]]), buffers: router.buffers });
      expect(() => router.route(router.params, input)).toThrow("hand them over as input.tokenIds");
      const ids = { ...input, tokenIds: on.tensor(new Int32Array(2), [1, 2]) };
      expect(() => router.route(router.params, ids)).toThrow("token ids are [1, 2], expected one for each of 1 tokens");
      return undefined;
    });
  });
});
