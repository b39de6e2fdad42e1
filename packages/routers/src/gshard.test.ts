import { dispose } from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { deepseekFamilies } from "../test/families/deepseek.ts";
import { fixedUniform, flat, float64, given, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type GShardOptions, gshard, type SecondExpert } from "./gshard.ts";

testRouter({ plugin: () => gshard(), weights: "sum to at most 1" });
testRouter({
  plugin: () =>
    gshard({
      second: "random",
      evaluationSecond: "threshold",
      threshold: 0.4,
      capacityFactor: 1,
      minimumCapacity: 2,
      balance: 1,
      scaledBalance: false,
      zLoss: 0.1,
    }),
  weights: "sum to at most 1",
});
testRouter({
  plugin: () => gshard({ order: "tokens", second: "all", capacityFactor: 0.5 }),
  weights: "sum to at most 1",
});
testRouter({
  plugin: () => gshard({ second: "none", capacityFactor: 0.5, evaluationSecond: "none", evaluationCapacityFactor: 1 }),
  weights: "sum to at most 1",
  skip: [
    {
      reason: "with a capacity in evaluation, places follow from the length of the batch",
      tests: ["decoding token by token equals the whole sequence", "a padded sequence equals the sequence alone"],
    },
  ],
});

describe("gshard meets its vectors", () => {
  const { cases, tolerance } = readVectors("gshard");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(deepseekFamilies, "gshard"), one, tolerance)).toEqual([]);
  });
});

describe("gshard", () => {
  interface Call {
    readonly probabilities: readonly (readonly number[])[];
    /** One per token. */
    readonly uniform?: readonly number[];
    readonly mask?: readonly number[];
    readonly training?: boolean;
  }
  const route = async (
    options: GShardOptions,
    { probabilities, uniform, mask, training = true }: Call,
  ): Promise<{ ids: number[]; weights: number[]; dropped: number; balance: number }> => {
    const on = float64();
    const router = gshard(options).init(routerContext(on, { experts: probabilities[0]?.length ?? 0 }));
    const { ids, weights, dropped, balance } = await results(on, () => {
      const logits = tensor(
        on,
        probabilities.map((row) => row.map(Math.log)),
      );
      const base = routerInput(on, { hidden: logits, training, ...(mask ? { mask } : {}) });
      const input = { ...base, ...(uniform ? { random: fixedUniform(on, uniform) } : {}) };
      const routed = router.select?.(logits, input) as Routed;
      const none = on.tensor(Float64Array.of(-1), []);
      return {
        ids: sparse(routed).experts,
        weights: sparse(routed).weights,
        dropped: routed.metrics?.dropped ?? none,
        balance: routed.losses.balance?.value ?? none,
      };
    });
    dispose([router.params, router.buffers]);
    const [share = Number.NaN] = flat(dropped);
    const [loss = Number.NaN] = flat(balance);
    return { ids: flat(ids), weights: flat(weights), dropped: share, balance: loss };
  };
  const close = (found: readonly number[], expected: readonly number[]): void => {
    expect(found).toHaveLength(expected.length);
    for (const [i, value] of expected.entries()) expect(found[i]).toBeCloseTo(value, 8);
  };
  const free = { capacityFactor: Number.POSITIVE_INFINITY };
  // Second weights 0.1, 0.25 and 0.4.
  const rows = [
    [0.9, 0.1],
    [0.75, 0.25],
    [0.4, 0.6],
  ];

  it.each<[SecondExpert, number[], number[]]>([
    ["all", [0.99, 0.99, 0.99], [0, 1, 0, 1, 1, 0]],
    ["none", [0, 0, 0], [0, -1, 0, -1, 1, -1]],
    ["threshold", [0.99, 0.99, 0.99], [0, -1, 0, 1, 1, 0]],
    // 2 g2 = 0.2, 0.5, 0.8
    ["chance", [0.19, 0.51, 0.79], [0, 1, 0, -1, 1, 0]],
    ["chance", [0.21, 0.49, 0.81], [0, -1, 0, 1, 1, -1]],
    // g2 / 0.2 = 0.5, 1.25, 2
    ["random", [0.49, 0.99, 0.99], [0, 1, 0, 1, 1, 0]],
    ["random", [0.51, 0, 0], [0, -1, 0, 1, 1, 0]],
  ])("second expert by %s with u = %j", async (second, uniform, ids) => {
    const found = await route({ second, ...free }, { probabilities: rows, uniform });
    expect(found.ids).toEqual(ids);
    // What is left out takes nothing from the first expert.
    const g = [0.9, 0.1, 0.75, 0.25, 0.6, 0.4];
    close(
      found.weights,
      g.map((weight, i) => ((ids[i] ?? -1) < 0 ? 0 : weight)),
    );
  });
  it("the second expert is taken as often as twice its weight says", async () => {
    const probabilities = Array.from({ length: 2000 }, () => [0.85, 0.15]);
    const { ids } = await route(free, { probabilities });
    const taken = ids.filter((e, i) => i % 2 === 1 && e === 1).length;
    // Binomial with p = 0.3: four standard deviations are 82.
    expect(Math.abs(taken - 600)).toBeLessThan(82);
  });
  it("weights are those of the two best, divided by their sum", async () => {
    const { ids, weights } = await route({ second: "all", ...free }, { probabilities: [[0.5, 0.1, 0.3, 0.1]] });
    expect(ids).toEqual([0, 2]);
    close(weights, [0.625, 0.375]);
  });
  it("all first choices are served before any second one", async () => {
    // Two places each (2 tokens per expert, rounded down from 4.5 / 2): the second choice of token 0 comes too late.
    const probabilities = [
      [0.6, 0.4],
      [0.3, 0.7],
      [0.2, 0.8],
    ];
    const found = await route({ second: "all", capacityFactor: 1.5 }, { probabilities });
    expect(found.ids).toEqual([0, -1, 1, 0, 1, -1]);
    close(found.weights, [0.6, 0, 0.7, 0.3, 0.8, 0]);
    expect(found.dropped).toBeCloseTo(2 / 6, 12);
  });
  it("places by choice look ahead, places by token do not", async () => {
    const first = [0.6, 0.4];
    const two = async (order: "choices" | "tokens", later: readonly number[]): Promise<number[]> =>
      (await route({ second: "all", capacityFactor: 1, order }, { probabilities: [first, later] })).ids.slice(0, 2);
    // One place each. Whether the first token keeps its second expert depends on the next token.
    expect(await two("choices", [0.7, 0.3])).toEqual([0, 1]);
    expect(await two("choices", [0.3, 0.7])).toEqual([0, -1]);
    expect(await two("tokens", [0.7, 0.3])).toEqual([0, 1]);
    expect(await two("tokens", [0.3, 0.7])).toEqual([0, 1]);
  });
  it("says when it looks ahead", () => {
    const causal = (options: GShardOptions): boolean[] => Object.values(gshard(options).causal);
    expect(causal({})).toEqual([false, true]);
    expect(causal({ order: "tokens", evaluationCapacityFactor: 2 })).toEqual([true, true]);
    expect(causal({ second: "none", evaluationCapacityFactor: 2 })).toEqual([true, false]);
    expect(causal({ ...free, evaluationSecond: "none", evaluationCapacityFactor: 2 })).toEqual([true, true]);
  });
  it("a minimum of places holds where the factor gives fewer", async () => {
    const found = await route({ second: "all", capacityFactor: 0, minimumCapacity: 1 }, { probabilities: rows });
    expect(found.ids).toEqual([0, -1, -1, -1, 1, -1]);
    expect((await route({ second: "all", capacityFactor: 0 }, { probabilities: rows })).ids).toEqual([
      -1, -1, -1, -1, -1, -1,
    ]);
  });
  it("padding takes no place", async () => {
    const options = { second: "none", capacityFactor: 0.7 } as const; // one place each
    expect((await route(options, { probabilities: rows })).ids).toEqual([0, -1, -1, -1, 1, -1]);
    const padded = await route(options, { probabilities: rows, mask: [0, 1, 1] });
    expect(padded.ids).toEqual([-1, -1, 0, -1, 1, -1]);
    expect(padded.dropped).toBe(0);
  });
  it("evaluation takes every second expert and drops nothing, unless asked", async () => {
    const call = { probabilities: rows, training: false };
    const found = await route({}, call);
    expect(found.ids).toEqual([0, 1, 0, 1, 1, 0]);
    expect([found.dropped, found.balance]).toEqual([-1, -1]);
    const asked = await route({ evaluationSecond: "threshold", evaluationCapacityFactor: 0.7 }, call);
    expect(asked.ids).toEqual([0, -1, -1, -1, 1, -1]);
  });
  it("the balance loss counts first choices; even loads give 1, or 1 / E² in the paper's form", async () => {
    const even = [
      [0.75, 0.25],
      [0.25, 0.75],
    ];
    expect((await route({}, { probabilities: even })).balance).toBeCloseTo(1, 12);
    expect((await route({ scaledBalance: false }, { probabilities: even })).balance).toBeCloseTo(0.25, 12);
    // 2 * (1 * 0.75 + 0 * 0.25)
    expect((await route({}, { probabilities: [[0.75, 0.25]] })).balance).toBeCloseTo(1.5, 12);
    expect((await route({ balance: 0 }, { probabilities: even })).balance).toBe(-1);
  });
  it("one expert has no second, and a draw is not needed", async () => {
    const { ids, weights } = await route(free, { probabilities: [[1], [1]] });
    expect(ids).toEqual([0, 0]);
    close(weights, [1, 1]);
  });
  it("routes no tokens", async () => {
    const on = float64();
    const router = gshard().init(routerContext(on, { experts: 3 }));
    const { ids } = await results(on, () => {
      const hidden = on.tensor(new Float64Array(0), [0, 6]);
      return { ids: sparse(router.route(router.params, routerInput(on, { hidden, training: true }))).experts };
    });
    expect(ids).toEqual([]);
    dispose([router.params, router.buffers]);
  });
  it("refuses options that cannot be", () => {
    const wrong =
      (options: object): (() => unknown) =>
      () =>
        gshard(options);
    expect(wrong({ second: "sometimes" })).toThrow(/gshard: second = "sometimes"; expected "chance" or "random"/);
    expect(wrong({ order: "random" })).toThrow(/gshard: order = "random"; expected "choices" or "tokens"/);
    expect(wrong({ evaluationSecond: "chance" })).toThrow(/evaluationSecond = "chance"/);
    expect(wrong({ threshold: 0 })).toThrow("gshard: threshold = 0; expected a weight, above 0 and at most 1");
    expect(wrong({ minimumCapacity: 0.5 })).toThrow("minimumCapacity = 0.5; expected a whole number from 0");
    expect(wrong({ capacityFactor: -1 })).toThrow("capacityFactor = -1; expected a number from 0, or Infinity");
    expect(wrong({ balance: -1 })).toThrow("balance = -1");
  });
});
