// Divergence and unchosen experts over a model, against full passes with and without the override.
import { type Tensor, UnsupportedError } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { loudModel, makeEngine, plainTopK, smallConfig } from "../models.test-util.ts";
import { logSoftmax, scriptedModel } from "./decoding.test-util.ts";
import { routingDivergence } from "./routing-divergence.ts";
import { unchosenExperts } from "./unchosen-experts.ts";

const on = makeEngine(64);
const model = loudModel(on, { ...smallConfig, context: 80, router: topK({ k: 2 }) });
// More than one pass of 64.
const ids = Array.from({ length: 70 }, (_, i) => (i * i + 3 * i) % 13);

/** Logits per position and experts per router and token, in one pass without a cache. */
async function pass(override?: RoutingOverride) {
  const input = on.tensor(Int32Array.from(ids), [1, ids.length]);
  const { logits, routed } = on.scope(() =>
    model.forward(model.params, input, override ? { override: [override] } : {}),
  );
  const rows = async (x: Tensor, count: number): Promise<number[][]> => {
    const data = Array.from(await x.data());
    const each = data.length / count;
    return Array.from({ length: count }, (_, i) => data.slice(i * each, (i + 1) * each));
  };
  const experts: number[][][] = [];
  for (const { plan } of routed) if (plan.kind === "sparse") experts.push(await rows(plan.experts, ids.length));
  return { logits: await rows(logits, ids.length), experts };
}

describe("routingDivergence", () => {
  it("is the mean divergence of what is said before each token", async () => {
    const strong = await pass();
    for (const rank of [1, 2, 5]) {
      const weak = await pass({ ranks: [rank - 1] });
      const live = on.live();
      const { mean, perToken } = await routingDivergence(model, ids, { rank, from: 3 });
      expect(on.live()).toBe(live);
      expect(perToken).toHaveLength(67);
      const expected = ids.slice(3).map((_, i) => {
        const [p, q] = [logSoftmax(strong.logits[i + 2] ?? []), logSoftmax(weak.logits[i + 2] ?? [])];
        return p.reduce((sum, x, j) => sum + Math.exp(x) * (x - (q[j] ?? 0)), 0);
      });
      for (const [i, x] of expected.entries()) expect(perToken[i]).toBeCloseTo(x, 9);
      expect(mean).toBeCloseTo(expected.reduce((a, b) => a + b, 0) / 67, 9);
      expect(mean).toBeGreaterThan(0.01);
    }
  });

  it("is nothing where the weak routing is the strong one", async () => {
    const single = loudModel(on, { ...smallConfig, router: topK({ k: 1 }) });
    expect((await routingDivergence(single, [1, 2, 3], { rank: 1 })).mean).toBeCloseTo(0, 12);
    expect((await routingDivergence(model, [1, 2, 3], { rank: 3, strong: { ranks: [2] } })).mean).toBeCloseTo(0, 12);
  });

  it("refuses places, ranks and models out of range", async () => {
    await expect(routingDivergence(model, [1, 2], { from: 2 })).rejects.toThrow(/from is 2 with 2 tokens/);
    await expect(routingDivergence(model, [1, 2], { from: 0 })).rejects.toThrow(/from is 0/);
    await expect(routingDivergence(model, [1, 2], { rank: 0 })).rejects.toThrow(/rank is 0/);
    await expect(routingDivergence(model, new Array(90).fill(1))).rejects.toThrow(/89 tokens; expected 1 to 80/);
    const dense = scriptedModel(on, { routers: false, say: () => [1, 2, 3, 4] });
    await expect(routingDivergence(dense, [1, 2])).rejects.toThrow(UnsupportedError);
    dense.dispose();
  });
});

describe("unchosenExperts", () => {
  it("counts weak experts that the strong pass did not choose, per layer", async () => {
    const strong = await pass();
    for (const rank of [1, 2, 4]) {
      const weak = await pass({ ranks: [rank - 1] });
      const shares = strong.experts.map((tokens, layer) => {
        const unchosen = tokens.filter((own, t) => !own.includes(weak.experts[layer]?.[t]?.[0] ?? -1));
        return unchosen.length / ids.length;
      });
      const live = on.live();
      const { ratio, layers } = await unchosenExperts(model, ids, { rank });
      expect(on.live()).toBe(live);
      expect(layers).toHaveLength(2);
      for (const [i, share] of shares.entries()) expect(layers[i]).toBeCloseTo(share, 12);
      expect(ratio).toBeCloseTo(((shares[0] ?? 0) + (shares[1] ?? 0)) / 2, 12);
      // In the first layer both passes still see the same.
      expect(layers[0]).toBe(rank > 2 ? 1 : 0);
    }
  });

  it("frees what it holds where a pass fails", async () => {
    const live = on.live();
    await expect(unchosenExperts(model, [1, 2], { rank: 9 })).rejects.toThrow(/ranks name 8 of 5/);
    expect(on.live()).toBe(live);
    const stubborn = loudModel(on, { ...smallConfig, router: plainTopK(2) });
    await expect(unchosenExperts(stubborn, [1, 2])).rejects.toThrow(/router of layer 0 takes no overrides/);
  });
});
