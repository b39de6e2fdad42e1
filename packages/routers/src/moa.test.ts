import { add, alias, random, type Tensor, type Tree } from "@switchyard/core";
import { adaptedLinear, adapter, heterogeneous, lora, planPart } from "@switchyard/core/experts";
import { type Experts, layerInput, layerParams, moe, moeLayer, type Routed } from "@switchyard/core/moe";
import { generator, routerContext, routerInput, testRouter, uniform } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { adapterFamilies } from "../test/families/adapters.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type MoAOptions, moa } from "./moa.ts";

const gate = (weights: readonly number[]): boolean => weights.every((w) => w > 0 && w < 1);
testRouter({ plugin: () => moa(), weights: gate });
testRouter({ plugin: () => moa({ mode: "soft" }), weights: gate });
testRouter({
  plugin: () => moa({ threshold: 0.5, logits: "linear" }),
  weights: (row) => row.every((w) => w >= 0.5 && w < 1),
});
testRouter({ plugin: () => moa({ mode: "soft", logits: "linear", hiddenPerExpert: 1 }), weights: gate });

describe.each(["moa", "lora-experts"])("the vectors %s are met", (file) => {
  const { family, cases, tolerance } = readVectors(file);
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(adapterFamilies, family), one, tolerance)).toEqual([]);
  });
});

const on = float64();
const rows = (x: Values | undefined): number[][] => (x as readonly Values[]).map(flat);
/** A linear router whose logits are the hidden states themselves. */
const run = async (options: MoAOptions, logits: readonly (readonly number[])[]) => {
  const experts = logits[0]?.length ?? 0;
  const found = await results(on, (): Record<string, Tensor> => {
    const router = moa({ logits: "linear", ...options }).init(routerContext(on, { experts, width: experts }));
    const identity = Array.from({ length: experts }, (_, i) => Array.from({ length: experts }, (_, j) => +(i === j)));
    const params: Tree = {
      ...(router.params as Readonly<Record<string, Tensor>>),
      weight: tensor(on, identity),
      bias: tensor(on, new Array<number>(experts).fill(0)),
      threshold: tensor(on, [new Array<number>(experts).fill(0)]),
      thresholdBias: tensor(on, [0]),
    };
    const { experts: ids, weights } = sparse(
      router.route(params, routerInput(on, { hidden: tensor(on, logits), experts })),
    );
    return { ids, weights };
  });
  return { ids: rows(found.ids), weights: rows(found.weights) };
};

describe("moa", () => {
  it("keeps the gates that reach the threshold, the threshold itself included, with their weight", async () => {
    // sigmoid(0) = 0.5 is the threshold.
    const found = await run({ threshold: 0.5 }, [
      [0, 2, -2],
      [-1, -1, -1],
    ]);
    expect(found.ids).toEqual([
      [0, 1, -1],
      [-1, -1, -1],
    ]);
    expect(found.weights[0]?.[0]).toBe(0.5);
    expect(found.weights[0]?.[1]).toBeCloseTo(1 / (1 + Math.exp(-2)), 12);
    expect(found.weights[1]).toEqual([0, 0, 0]);
  });
  it("a learned threshold starts in the middle of 0 and its largest value", async () => {
    // 0.5 sigmoid(0) = 0.25 = sigmoid(-1.0986...)
    const found = await run({}, [[-1.09, -1.1, 5]]);
    expect(found.ids).toEqual([[0, -1, 2]]);
    expect((await run({ maxThreshold: 1 }, [[-1.09, 0.01, 5]])).ids).toEqual([[-1, 1, 2]]);
  });
  it("threshold 0 keeps all, 1 none", async () => {
    expect((await run({ threshold: 0 }, [[-9, 0, 9]])).ids).toEqual([[0, 1, 2]]);
    expect((await run({ threshold: 1 }, [[-9, 0, 9]])).ids).toEqual([[-1, -1, -1]]);
  });
  it("refuses options that cannot be", () => {
    expect(() => moa({ threshold: 1.5 })).toThrow('moa: threshold = 1.5; expected "learned" or a number from 0 to 1');
    expect(() => moa({ threshold: Number.NaN })).toThrow("threshold = NaN");
    expect(() => moa({ maxThreshold: 0 })).toThrow("maxThreshold = 0");
    expect(() => moa({ hiddenPerExpert: 1.5 })).toThrow("hiddenPerExpert = 1.5");
    expect(() => moa({ mode: "soft", threshold: 0.5 })).toThrow('mode "soft" has no threshold');
    expect(() => moa({ mode: "hard" as "soft" })).toThrow('mode = "hard"');
  });
});

describe("moa over different adapters", () => {
  const width = 4;
  const tokens = 5;
  const sets = (seed: number): Readonly<Record<string, Experts>> => {
    const from = (name: string) => ({ engine: on, random: random(on, seed).at(name) });
    return {
      lora: lora({ count: 2, width, rank: 2, params: filled({ a: [2, 2, width], b: [2, width, 2] }) }),
      adapter: adapter({ count: 1, width, hidden: 3, gain: 1, ...from("adapter") }),
    };
  };
  const filled = (shapes: Readonly<Record<string, readonly number[]>>): Tree =>
    Object.fromEntries(
      Object.entries(shapes).map(([name, shape]) => [name, on.tensor(uniform(generator(name), shape).data, shape)]),
    );
  const hidden = uniform(generator("moa hidden"), [tokens, width]);

  it.each(["soft", "sparse"] as const)("%s: one layer equals each adapter with its part of the plan", async (mode) => {
    const found = await results(on, () => {
      const parts = sets(3);
      const experts = heterogeneous(parts);
      const layer = moeLayer(moa({ mode }), { engine: on, width }, { experts });
      const x = on.tensor(hidden.data, hidden.shape);
      const { output, routed } = moe(layer, layerParams(layer), layerInput(layer, x));
      const { plan }: Routed = routed;
      if (plan.kind !== "sparse" && plan.kind !== "dense") throw new Error(`found a plan of kind ${plan.kind}`);
      const layout = { batch: 1, sequence: tokens, past: 0 };
      const base = { weight: on.tensor(new Float64Array(width * width), [width, width]) };
      const each = (["lora", "adapter"] as const).map((name) => {
        const own = parts[name];
        if (!own) throw new Error(`no ${name}`);
        const part = planPart(plan, { first: name === "lora" ? 0 : 2, count: own.count });
        return adaptedLinear(x, base, { experts: own, params: own.params, plan: part, layout }).output;
      });
      const [first, second] = each;
      if (!first || !second) throw new Error("two adapters");
      return { whole: alias(output), parts: add(first, second) };
    });
    const [whole, parts] = [flat(found.whole), flat(found.parts)];
    expect(whole.some((value) => Math.abs(value) > 0.1)).toBe(true);
    for (const [i, value] of whole.entries()) expect(value).toBeCloseTo(parts[i] ?? Number.NaN, 12);
  });
});
