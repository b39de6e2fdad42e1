import { dispose, type Tensor } from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { floats, routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { switchFamily } from "../test/families/first.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { type SwitchOptions, switchRouter } from "./switch-router.ts";

testRouter({ plugin: () => switchRouter(), weights: "sum to at most 1" });
testRouter({
  plugin: () => switchRouter({ capacityFactor: 0.5, evaluationCapacityFactor: 1, jitter: 0.1, zLoss: 0.01 }),
  weights: "sum to at most 1",
  skip: [
    {
      reason: "with a capacity in evaluation, places follow from the length of the batch",
      tests: ["decoding token by token equals the whole sequence", "a padded sequence equals the sequence alone"],
    },
  ],
});

describe("switchRouter meets its vectors", () => {
  const { cases, tolerance } = readVectors("switch");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(switchFamily, one, tolerance)).toEqual([]);
  });
});

describe("switchRouter", () => {
  const read = async (
    options: SwitchOptions,
    { logits, training = true, mask }: { logits: number[][]; training?: boolean; mask?: number[] },
  ): Promise<{ ids: number[]; weights: number[]; dropped: number[] }> => {
    const on = float64();
    const { ids, weights, dropped } = await results(on, () => {
      const router = switchRouter(options).init(routerContext(on, { experts: logits[0]?.length ?? 0 }));
      const input = routerInput(on, { hidden: tensor(on, logits), training, ...(mask ? { mask } : {}) });
      const routed = router.select?.(tensor(on, logits), input) as Routed;
      const metric = routed.metrics?.dropped ?? on.tensor(Float64Array.of(-1), []);
      return { ids: sparse(routed).experts, weights: sparse(routed).weights, dropped: metric };
    });
    return { ids: flat(ids), weights: flat(weights), dropped: flat(dropped) };
  };
  const skewed = [
    [2, 0],
    [2, 0],
    [2, 0],
    [0, 2],
  ];

  it("serves the first of an expert and drops the rest, with weight 0", async () => {
    // capacity = ceil(1 * 4 / 2) = 2
    const { ids, weights, dropped } = await read({ capacityFactor: 1 }, { logits: skewed });
    expect(ids).toEqual([0, 0, -1, 1]);
    const p = Math.exp(2) / (Math.exp(2) + 1);
    expect(weights.map((w) => w.toFixed(12))).toEqual([p, p, 0, p].map((w) => w.toFixed(12)));
    expect(dropped[0]).toBeCloseTo(0.25, 12);
  });
  it("padding takes no place and is not counted as dropped", async () => {
    const { ids, dropped } = await read({ capacityFactor: 1 }, { logits: skewed, mask: [0, 1, 1, 1] });
    expect(ids).toEqual([-1, 0, 0, 1]);
    expect(dropped).toEqual([0]);
  });
  it("a capacity of 0 drops all, Infinity none", async () => {
    expect((await read({ capacityFactor: 0 }, { logits: skewed })).ids).toEqual([-1, -1, -1, -1]);
    const free = await read({ capacityFactor: Number.POSITIVE_INFINITY }, { logits: skewed });
    expect(free.ids).toEqual([0, 0, 0, 1]);
    expect(free.dropped).toEqual([-1]);
  });
  it("evaluation drops nothing, unless asked", async () => {
    expect((await read({}, { logits: skewed, training: false })).ids).toEqual([0, 0, 0, 1]);
    const asked = await read({ evaluationCapacityFactor: 0.5 }, { logits: skewed, training: false });
    expect(asked.ids).toEqual([0, -1, -1, 1]);
  });
  it("jitter multiplies the input by 1 - jitter to 1 + jitter, in training only", async () => {
    const on = float64();
    const width = 50;
    const router = switchRouter({ jitter: 0.1 }).init(routerContext(on, { experts: width, width }));
    // The identity as weight and ones as input show the noise itself as logits.
    const identity = Array.from({ length: width }, (_, i) => Array.from({ length: width }, (_, j) => Number(i === j)));
    const logits = async (training: boolean, seed: number): Promise<number[]> => {
      const found = await results(on, () => ({
        logits: router.route(
          { weight: tensor(on, identity) },
          routerInput(on, {
            hidden: floats([4, width], new Float64Array(4 * width).fill(1)),
            training,
            seed,
            experts: width,
          }),
        ).logits as Tensor,
      }));
      return flat(found.logits);
    };
    const noise = await logits(true, 1);
    expect(Math.min(...noise)).toBeGreaterThanOrEqual(0.9);
    expect(Math.max(...noise)).toBeLessThan(1.1);
    expect(Math.min(...noise)).toBeLessThan(0.92);
    expect(Math.max(...noise)).toBeGreaterThan(1.08);
    expect(await logits(true, 2)).not.toEqual(noise);
    expect(new Set(await logits(false, 1))).toEqual(new Set([1]));
    dispose(router.params);
  });
  it("starts from a truncated normal of variance 0.1 / width", async () => {
    const on = float64();
    const router = switchRouter().init(routerContext(on, { experts: 40, width: 100 }));
    const scaled = [...(await leaf(router.params, "weight").data())].map((value) => value / Math.sqrt(0.1 / 100));
    expect(Math.max(...scaled.map(Math.abs))).toBeLessThanOrEqual(2);
    // The variance of a normal cut at two standard deviations is 0.774.
    const variance = scaled.reduce((total, value) => total + value * value, 0) / scaled.length;
    expect(variance).toBeGreaterThan(0.72);
    expect(variance).toBeLessThan(0.83);
    dispose(router.params);
  });
  it("refuses options that cannot be", () => {
    expect(() => switchRouter({ capacityFactor: -1 })).toThrow(
      "switchRouter: capacityFactor = -1; expected a number from 0, or Infinity",
    );
    expect(() => switchRouter({ evaluationCapacityFactor: Number.NaN })).toThrow(/evaluationCapacityFactor = NaN/);
    expect(() => switchRouter({ jitter: -0.1 })).toThrow(/jitter = -0.1/);
  });
});
