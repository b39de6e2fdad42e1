import { dispose, type Tensor, type Tree } from "@switchyard/core";
import type { Layout, Routed, StepStatistics } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { deepseekFamilies } from "../test/families/deepseek.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type DeepSeekV3Options, deepSeekV3 } from "./deep-seek-v3.ts";
import { leaf } from "./parts.ts";

// A heavy loss, so that its gradient is not lost beside that of the weights.
testRouter({ plugin: ({ k = 2 }) => deepSeekV3({ k, scale: 1, balance: 1 }), weights: "sum to 1" });
// Six experts: the suite's cyclic shift by two moves whole groups.
testRouter({
  plugin: ({ experts, k = 3 }) => {
    const groups = experts % 3 === 0 ? 3 : 1;
    const keptGroups = Math.min(k === experts ? groups : 2, groups);
    return deepSeekV3({ k: Math.min(k, experts), groups, keptGroups, normalise: false, balance: 0 });
  },
  sizes: { experts: 6, width: 5 },
  weights: "not negative",
});

describe("deepSeekV3 meets its vectors", () => {
  const { cases, tolerance } = readVectors("deepseek");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(deepseekFamilies, "deepseek"), one, tolerance)).toEqual([]);
  });
});

describe("deepSeekV3", () => {
  const logit = (s: number): number => Math.log(s / (1 - s));
  interface Call {
    /** Sigmoids of the logits. */
    readonly scores: readonly (readonly number[])[];
    readonly bias?: readonly number[];
    readonly layout?: Layout;
    readonly training?: boolean;
  }
  const route = async (
    options: DeepSeekV3Options,
    { scores, bias, layout, training = false }: Call,
  ): Promise<{ ids: number[]; weights: number[]; loss: number[] }> => {
    const on = float64();
    const experts = scores[0]?.length ?? 0;
    const router = deepSeekV3(options).init(routerContext(on, { experts }));
    const { ids, weights, loss } = await results(on, () => {
      const logits = tensor(
        on,
        scores.map((row) => row.map(logit)),
      );
      const buffers = bias ? { bias: tensor(on, bias) } : router.buffers;
      const base = routerInput(on, { hidden: logits, training, buffers });
      const routed = router.select?.(logits, { ...base, ...(layout ? { layout } : {}) }) as Routed;
      const none = on.tensor(Float64Array.of(-1), []);
      return {
        ids: sparse(routed).experts,
        weights: sparse(routed).weights,
        loss: routed.losses.balance?.value ?? none,
      };
    });
    dispose([router.params, router.buffers]);
    return { ids: flat(ids), weights: flat(weights), loss: flat(loss) };
  };
  const close = (found: readonly number[], expected: readonly number[]): void =>
    expect(found.map((x) => x.toFixed(12))).toEqual(expected.map((x) => x.toFixed(12)));

  it("the bias chooses, and does not weigh", async () => {
    const found = await route({ k: 2, scale: 1 }, { scores: [[0.8, 0.6, 0.2, 0.4]], bias: [0, 0, 0.7, 0] });
    expect(found.ids).toEqual([2, 0]);
    close(found.weights, [0.2, 0.8]);
  });
  it("weights are multiplied by 2.5 unless told otherwise, and can stay undivided", async () => {
    const scores = [[0.75, 0.25]];
    close((await route({ k: 2 }, { scores })).weights, [0.75 * 2.5, 0.25 * 2.5]);
    close((await route({ k: 2, scale: 2, normalise: false }, { scores: [[0.5, 0.25]] })).weights, [1, 0.5]);
  });
  it("a group is judged by its two best, and the best expert may lie outside", async () => {
    // Groups {0, 1, 2} and {3, 4, 5}: 0.9 + 0.1 against 0.6 + 0.5.
    const call = { scores: [[0.9, 0.1, 0.1, 0.6, 0.5, 0.4]] };
    expect((await route({ k: 3, groups: 2, keptGroups: 1 }, call)).ids).toEqual([3, 4, 5]);
    expect((await route({ k: 3, groups: 2 }, call)).ids).toEqual([0, 3, 4]);
  });
  it("groups of one expert are judged by that expert", async () => {
    const found = await route({ k: 2, groups: 4, keptGroups: 2 }, { scores: [[0.1, 0.8, 0.3, 0.7]] });
    expect(found.ids).toEqual([1, 3]);
  });
  it("ties go to the lower group and the lower expert", async () => {
    const found = await route({ k: 2, groups: 2, keptGroups: 1 }, { scores: [[0.5, 0.5, 0.5, 0.5]] });
    expect(found.ids).toEqual([0, 1]);
  });
  it("an excluded expert is taken only with hfCompat, where all eligible ones are below 0", async () => {
    const call = { scores: [[0.3, 0.3, 0.2, 0.2]], bias: [-0.9, -0.8, -0.9, -0.9] };
    const options = { k: 2, groups: 2, keptGroups: 1 };
    expect((await route(options, call)).ids).toEqual([1, 0]);
    expect((await route({ ...options, hfCompat: true }, call)).ids).toEqual([2, 3]);
  });
  it("the balance loss is per sequence, and its counts follow the choice", async () => {
    // Two sequences of one token with k = 1 of 2 experts: f = 2 for the chosen, P = its share.
    const layout = { batch: 2, sequence: 1, past: 0 };
    const scores = [
      [0.75, 0.25],
      [0.2, 0.6],
    ];
    const found = await route({ k: 1 }, { scores, layout, training: true });
    close(found.loss, [(2 * 0.75 + 2 * 0.75) / 2]);
    const together = await route({ k: 1 }, { scores, training: true });
    close(together.loss, [1]); // even loads: f = 1
    expect((await route({ k: 1 }, { scores })).loss).toEqual([-1]);
    expect((await route({ k: 1, balance: 0 }, { scores, training: true })).loss).toEqual([-1]);
  });
  it("routes no tokens", async () => {
    const on = float64();
    const router = deepSeekV3({ k: 2, groups: 2, keptGroups: 1 }).init(routerContext(on, { experts: 4 }));
    const { ids, loss } = await results(on, () => {
      const hidden = on.tensor(new Float64Array(0), [0, 6]);
      const routed = router.route(router.params, routerInput(on, { hidden, training: true, buffers: router.buffers }));
      return { ids: sparse(routed).experts, loss: routed.losses.balance?.value as Tensor };
    });
    expect(ids).toEqual([]);
    expect(loss).toBe(0);
    dispose([router.params, router.buffers]);
  });

  const biasAfter = async (
    options: DeepSeekV3Options,
    load: readonly number[],
    more: Partial<StepStatistics> = {},
  ): Promise<number[]> => {
    const on = float64();
    const router = deepSeekV3(options).init(routerContext(on, { experts: 3 }));
    const statistics = { step: 0, tokens: 6, load: Float64Array.from(load), metrics: {}, ...more };
    const { bias } = await results(on, () => ({
      bias: leaf(router.afterStep?.([statistics], { bias: tensor(on, [0.5, 0.5, 0.5]) }) as Tree, "bias"),
    }));
    dispose([router.params, router.buffers]);
    return flat(bias);
  };
  it("after a step the bias of busy experts falls by the rate, that of idle ones rises, that at the mean stays", async () => {
    close(await biasAfter({ k: 1, rate: 0.25 }, [4, 2, 0]), [0.25, 0.5, 0.75]);
    close(await biasAfter({ k: 1 }, [4, 2, 0]), [0.499, 0.5, 0.501]);
  });
  it("load of null experts behind the real ones does not count", async () => {
    close(await biasAfter({ k: 1, rate: 0.25 }, [2, 2, 2, 90]), [0.5, 0.5, 0.5]);
  });
  it("toward the end of training and without tokens the bias stays", async () => {
    const at = (step: number, totalSteps: number): Promise<number[]> =>
      biasAfter({ k: 1, rate: 0.25, biasUntil: 0.9 }, [4, 2, 0], { step, totalSteps });
    close(await at(89, 100), [0.25, 0.5, 0.75]);
    close(await at(90, 100), [0.5, 0.5, 0.5]);
    close(await at(1000, Number.POSITIVE_INFINITY), [0.25, 0.5, 0.75]);
    close(await biasAfter({ k: 1, rate: 0.25 }, [0, 0, 0], { tokens: 0 }), [0.5, 0.5, 0.5]);
  });
  it("reads the statistics of its own layer, and says when there are none", () => {
    const on = float64();
    const router = deepSeekV3({ k: 1 }).init(routerContext(on, { experts: 3, layer: 1 }));
    const statistics = { step: 0, tokens: 0, load: Float64Array.of(1, 1, 1), metrics: {} };
    expect(() => router.afterStep?.([statistics], router.buffers)).toThrow(
      "statistics of 1 layers for the router of layer 1",
    );
    expect(router.afterStep?.([{ ...statistics, tokens: 9 }, statistics], router.buffers)).toBe(router.buffers);
    dispose([router.params, router.buffers]);
  });
  it("the bias evens out a skewed stream", async () => {
    const [tokens, experts] = [64, 8];
    const on = float64();
    const router = deepSeekV3({ k: 2, rate: 0.02 }).init(routerContext(on, { experts }));
    let bias: Values = new Array<number>(experts).fill(0);
    const violations: number[] = [];
    for (let step = 0; step < 60; step++) {
      const load = new Float64Array(experts);
      const found = await results(on, () => {
        const draws = routerContext(on)
          .random.at("stream", step)
          .host("normal", tokens * experts);
        // Later experts are ever more popular.
        const logits = on.tensor(
          draws.map((z, i) => 0.5 * z + 0.3 * (i % experts)),
          [tokens, experts],
        );
        const input = routerInput(on, { hidden: logits, buffers: { bias: tensor(on, bias) } });
        return { ids: sparse(router.select?.(logits, input) as Routed).experts };
      });
      for (const e of flat(found.ids)) load[e] = (load[e] ?? 0) + 1;
      violations.push(Math.max(...load) / ((tokens * 2) / experts) - 1);
      const statistics = { step, tokens, load, metrics: {} };
      const before = bias;
      const next: { bias: Values } = await results(on, () => ({
        bias: leaf(router.afterStep?.([statistics], { bias: tensor(on, before) }) as Tree, "bias"),
      }));
      bias = next.bias;
    }
    const mean = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0) / xs.length;
    expect(mean(violations.slice(0, 5))).toBeGreaterThan(1.2);
    expect(mean(violations.slice(-10))).toBeLessThan(0.6);
    dispose([router.params, router.buffers]);
  });
  it("refuses options that cannot be", () => {
    const init = (options: DeepSeekV3Options, experts = 8): unknown =>
      deepSeekV3(options).init(routerContext(float64(), { experts }));
    expect(() => deepSeekV3({ k: 2, groups: 0 })).toThrow("deepSeekV3: groups = 0; expected a whole number from 1");
    expect(() => deepSeekV3({ k: 2, groups: 2, keptGroups: 3 })).toThrow("keptGroups = 3 of 2 groups");
    expect(() => deepSeekV3({ k: 2, scale: 0 })).toThrow("scale = 0; expected a finite number above 0");
    expect(() => deepSeekV3({ k: 2, rate: -1 })).toThrow("rate = -1");
    expect(() => deepSeekV3({ k: 2, biasUntil: 2 })).toThrow("biasUntil = 2; expected a share of the training, 0 to 1");
    expect(() => init({ k: 9 })).toThrow("deepSeekV3: k = 9 of 8 experts");
    expect(() => init({ k: 2, groups: 3 })).toThrow("8 experts do not split into 3 groups");
    expect(() => init({ k: 5, groups: 4, keptGroups: 2 })).toThrow("2 of 4 groups hold only 4 experts");
  });
});
