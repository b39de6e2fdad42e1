// Routing overrides through the routers that take them, against plain loops over their equations: all orders of topK, switchRouter, topP,
// the DeepSeek routers with groups, and the wrappers around them.
import type { Engine, Tensor } from "@switchyard/core";
import type { Routed, RouterPlugin, RoutingOverride } from "@switchyard/core/moe";
import { withCapacity, withNoise, withNullExperts } from "@switchyard/core/wrappers";
import { routerContext, routerInput } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { deepSeekV2 } from "../src/deep-seek-v2.ts";
import { deepSeekV3 } from "../src/deep-seek-v3.ts";
import { moge } from "../src/moge.ts";
import { switchRouter } from "../src/switch-router.ts";
import { type TopKOrder, topK } from "../src/top-k.ts";
import { topP } from "../src/top-p.ts";
import { flat, float64, results, sparse, tensor, type Values } from "./vectors.ts";

const rows = (values: Values): number[][] => (values as readonly Values[]).map(flat);

const experts = 8;
const tokens = 6;
// Distinct, of mixed signs, without structure.
const logits = Array.from({ length: tokens }, (_, t) =>
  Array.from({ length: experts }, (_, i) => 2.5 * Math.sin(1 + 3.7 * i + 11.3 * t + ((i * i * (t + 2)) % 7))),
);
const bias = [0.3, -0.2, 0.1, 0, 0.25, -0.3, 0.05, -0.1];

const softmax = (row: readonly number[]): number[] => {
  const total = row.reduce((sum, x) => sum + Math.exp(x), 0);
  return row.map((x) => Math.exp(x) / total);
};
const sigmoid = (row: readonly number[]): number[] => row.map((x) => 1 / (1 + Math.exp(-x)));

/** What a router ranks by and weighs with, as its paper says, for one token. */
interface Rules {
  readonly plugin: RouterPlugin;
  readonly k: number;
  readonly weights: (row: readonly number[]) => number[];
  /** Default: the logits. */
  readonly order?: (row: readonly number[]) => number[];
  readonly normalised: boolean;
  readonly scale?: number;
}

/** Keeps the two best of four groups of two, each judged by the sum of its `best` largest; the others are never taken. */
const groupLimited = (scores: readonly number[], best: number): number[] => {
  const sums = [0, 1, 2, 3].map((g) =>
    [scores[2 * g] ?? 0, scores[2 * g + 1] ?? 0]
      .sort((a, b) => b - a)
      .slice(0, best)
      .reduce((a, b) => a + b),
  );
  const kept = [0, 1, 2, 3].sort((a, b) => (sums[b] ?? 0) - (sums[a] ?? 0)).slice(0, 2);
  return scores.map((x, i) => (kept.includes(Math.floor(i / 2)) ? x : Number.NEGATIVE_INFINITY));
};

const biased = (row: readonly number[]): number[] => sigmoid(row).map((s, i) => s + (bias[i] ?? 0));
const orders: readonly TopKOrder[] = ["softmax-topk-renormalise", "softmax-topk", "topk-softmax", "sigmoid"];
const routers: Readonly<Record<string, Rules>> = {
  ...Object.fromEntries(
    orders.map((order): [string, Rules] => [
      `topK, ${order}`,
      {
        plugin: topK({ k: 2, order }),
        k: 2,
        weights: order === "sigmoid" ? sigmoid : softmax,
        normalised: order !== "softmax-topk",
      },
    ]),
  ),
  switchRouter: { plugin: switchRouter(), k: 1, weights: softmax, normalised: false },
  "deepSeekV2 without groups": {
    plugin: deepSeekV2({ k: 3, scale: 16 }),
    k: 3,
    weights: softmax,
    normalised: false,
    scale: 16,
  },
  "deepSeekV2 with groups": {
    plugin: deepSeekV2({ k: 3, groups: 4, keptGroups: 2, normalise: true }),
    k: 3,
    weights: softmax,
    order: (row) => groupLimited(softmax(row), 1),
    normalised: true,
  },
  "deepSeekV3 with groups": {
    plugin: deepSeekV3({ k: 2, groups: 4, keptGroups: 2 }),
    k: 2,
    weights: sigmoid,
    order: (row) => groupLimited(biased(row), 2),
    normalised: true,
    scale: 2.5,
  },
  "deepSeekV3 without division": {
    plugin: deepSeekV3({ k: 2, normalise: false, scale: 1 }),
    k: 2,
    weights: sigmoid,
    order: biased,
    normalised: false,
  },
  "moge, which is topK inside": { plugin: moge({ k: 2 }), k: 2, weights: softmax, normalised: true },
};

/** `experts [tokens, slots]` and `weights` of a plugin on the logits above, two tokens per row of the batch. */
async function route(on: Engine, plugin: RouterPlugin, override: readonly (RoutingOverride | undefined)[]) {
  const router = plugin.init(routerContext(on, { experts }));
  expect(router.overrides).toBe(true);
  const own = "bias" in router.buffers ? { bias: tensor(on, bias) } : router.buffers;
  const nulls = Object.values(router.params)[0] as Tensor;
  const wide = logits.map((row, t) =>
    Array.from({ length: nulls.shape[0] ?? 0 }, (_, i) => row[i] ?? 0.3 * Math.cos(i + t)),
  );
  const found = await results(on, () => {
    const select = router.select as (scores: Tensor, input: ReturnType<typeof routerInput>) => Routed;
    const input = routerInput(on, { hidden: tensor(on, logits), batch: 3, buffers: own });
    const { experts: ids, weights } = sparse(select(tensor(on, wide), { ...input, override }));
    return { ids, weights };
  });
  return { ids: rows(found.ids), weights: rows(found.weights), logits: wide };
}

const rules: readonly RoutingOverride[] = [
  { ranks: [0] },
  { ranks: [1] },
  { ranks: [0, 1] },
  { ranks: [2, 0] },
  { k: 1 },
  { k: 4 },
  { threshold: 0.3 },
  { threshold: 0.6 },
  { threshold: 0.6, k: 2 },
  { masked: [3], k: 2 },
  { masked: [1], ranks: [2] },
  { forced: [6], k: 2 },
  { forced: [6], masked: [2], k: 2 },
];

function naive({ weights, order, normalised, scale = 1 }: Rules, row: readonly number[], rule: RoutingOverride) {
  const own = weights(row);
  const scores = (order?.(row) ?? [...row]).map((x, i) =>
    rule.masked?.includes(i) ? Number.NEGATIVE_INFINITY : rule.forced?.includes(i) ? 1e9 : x,
  );
  const line = scores
    .map((_, i) => i)
    .filter((i) => scores[i] !== Number.NEGATIVE_INFINITY)
    .sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b);
  const taken: number[] = [];
  let sum = 0;
  const all = own.reduce((a, b) => a + b);
  for (const i of rule.ranks ? rule.ranks.map((at) => line[at] ?? -1) : line.slice(0, rule.k ?? line.length)) {
    if (rule.threshold !== undefined && sum > rule.threshold) break;
    taken.push(i);
    sum += (own[i] ?? 0) / all;
  }
  const total = normalised || rule.threshold !== undefined ? taken.reduce((a, i) => a + (own[i] ?? 0), 0) : 1;
  return taken.map((i) => [i, (scale * (own[i] ?? 0)) / total] as const);
}

describe.each(Object.entries(routers))("%s", (_, one) => {
  it("chooses and weighs as its equations say, by rank, k, threshold, mask and force", async () => {
    const on = float64();
    for (const rule of rules) {
      const { ids, weights } = await route(on, one.plugin, [rule, rule, rule]);
      for (const [t, row] of logits.entries()) {
        const expected = naive(one, row, rule);
        const filled = (ids[t] ?? []).map((_, j) => j).filter((j) => (ids[t]?.[j] ?? -1) >= 0);
        const why = `${JSON.stringify(rule)}, token ${t}`;
        expect(
          filled.map((j) => ids[t]?.[j]),
          why,
        ).toEqual(expected.map(([i]) => i));
        for (const [n, j] of filled.entries()) {
          expect(weights[t]?.[j], why).toBeCloseTo(expected[n]?.[1] ?? Number.NaN, 10);
        }
      }
    }
  });

  it("keeps its own choice in rows without an override, and ranks 0..k-1 give the same", async () => {
    const on = float64();
    const strong = { ranks: Array.from({ length: one.k }, (_, i) => i) };
    const own = await route(on, one.plugin, [undefined, undefined, undefined]);
    const again = await route(on, one.plugin, [strong, strong, strong]);
    expect(again.ids).toEqual(own.ids);
    for (const [i, weight] of flat(again.weights).entries()) expect(weight).toBeCloseTo(flat(own.weights)[i] ?? 0, 10);
    const mixed = await route(on, one.plugin, [undefined, { ranks: [1] }, undefined]);
    for (const t of [0, 1, 4, 5]) {
      expect(mixed.ids[t]).toEqual([...(own.ids[t] ?? []), ...new Array<number>(Math.max(0, 1 - one.k)).fill(-1)]);
      expect(mixed.weights[t]).toEqual(own.weights[t]);
    }
    const alone = await route(on, one.plugin, [{ ranks: [1] }, { ranks: [1] }, { ranks: [1] }]);
    for (const t of [2, 3]) {
      expect([mixed.ids[t]?.[0], mixed.weights[t]?.[0]]).toEqual([alone.ids[t]?.[0], alone.weights[t]?.[0]]);
    }
  });
});

describe("a number of experts that varies", () => {
  it.each([
    ["topP", topP({ p: 0.5 })],
    ["topK with topP", topK({ k: 4, topP: 0.5 })],
  ])("%s: takes ranks, k and thresholds; a mask alone does not say how many", async (_, plugin) => {
    const on = float64();
    const { ids } = await route(on, plugin, [{ ranks: [1] }, { k: 2 }, { threshold: 0.9 }]);
    const places = logits.map((row, t) =>
      (ids[t] ?? []).filter((i) => i >= 0).map((i) => row.filter((x) => x > (row[i] ?? 0)).length),
    );
    expect(places.slice(0, 4)).toEqual([[1], [1], [0, 1], [0, 1]]);
    for (const line of places.slice(4)) expect(line).toEqual(line.map((_, i) => i));
    await expect(route(on, plugin, [{ masked: [1] }, undefined, undefined])).rejects.toThrow(/as it needs; say k/);
  });
});

describe("wrapped", () => {
  it("null experts are ranked like others, and weigh nothing", async () => {
    const on = float64();
    const {
      ids,
      weights,
      logits: wide,
    } = await route(on, withNullExperts(topK({ k: 2 })), [{ ranks: [0, 3] }, { k: 5 }, { forced: [9], k: 2 }]);
    for (const [t, row] of ids.entries()) {
      const ranked = (wide[t] ?? []).map((x, i) => [x, i] as const).sort((a, b) => b[0] - a[0]);
      const line = ranked.map(([, i]) => i);
      const expected = t < 2 ? [line[0], line[3]] : t < 4 ? line.slice(0, 5) : [9, line.find((i) => i !== 9)];
      expect(row.slice(0, expected.length)).toEqual(expected);
      for (const [j, i] of row.entries()) expect((weights[t]?.[j] ?? 0) > 0).toBe(i >= 0 && i < experts);
    }
    expect(ids.flat().some((i) => i >= experts)).toBe(true);
  });

  it("noise leaves evaluation alone, and a capacity counts what the override asks for", async () => {
    const on = float64();
    const override = [{ ranks: [1] }, undefined, { k: 3 }];
    const plain = await route(on, topK({ k: 2 }), override);
    expect((await route(on, withNoise(topK({ k: 2 })), override)).ids).toEqual(plain.ids);
    const force = { forced: [5], k: 1 };
    const { ids } = await route(on, withCapacity(topK({ k: 2 }), { evaluation: 0, minimum: 3 }), [force, force, force]);
    expect(ids).toEqual([[5], [5], [5], [-1], [-1], [-1]]);
  });
});

it("groups limit how deep a rank may be, forced experts break the limit", async () => {
  const on = float64();
  const plugin = deepSeekV2({ k: 3, groups: 4, keptGroups: 2 });
  const rule = (one: RoutingOverride) => route(on, plugin, [one, one, one]);
  await expect(rule({ ranks: [4] })).rejects.toThrow(/rank 4, but only 4 of 8 experts can be taken/);
  await expect(rule({ masked: [0, 1], k: 3 })).rejects.toThrow(/k = 3, but only 2 of 8 experts can be taken/);
  const { ids } = await rule({ forced: [0, 2, 4, 6, 7], k: 5 });
  for (const row of ids) expect(row).toEqual([0, 2, 4, 6, 7]);
});
