import { add, mul, type Tensor } from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { dynMoLEFamily } from "../test/families/field.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, lists, readVectors, results, slopes, sparse, tensor, unmet } from "../test/vectors.ts";
import { type DynMoLEOptions, dynMoLE, dynMoLEHook, dynMoLELosses, dynMoLEPlan } from "./dyn-mole.ts";
import { leaf } from "./parts.ts";

// With losses of weight 1 and a threshold that some tokens pass, so that every path has a gradient.
const loud = { entropyLoss: 1, balance: 1, threshold: 0.95 } as const;
testRouter({ plugin: ({ k = 2 }) => dynMoLE({ k, ...loud }), weights: "sum to at most 1" });
testRouter({ plugin: ({ k = 1 }) => dynMoLE({ k, ...loud, entropy: "renyi", q: 2 }), weights: "sum to at most 1" });
testRouter({ plugin: ({ k = 1 }) => dynMoLE({ k, ...loud, q: 1 }), weights: "sum to at most 1" });

describe("dynMoLE meets its vectors", () => {
  const { cases, tolerance } = readVectors("dynmole");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(dynMoLEFamily, one, tolerance)).toEqual([]);
  });
});

describe("dynMoLE", () => {
  const on = float64();
  const logs = (p: readonly number[]): number[] => p.map(Math.log);
  const route = async (
    p: readonly number[][],
    options: DynMoLEOptions = {},
  ): Promise<{ ids: number[]; weights: number[]; entropy: number[] }> => {
    const found = await results(on, () => {
      const { plan, entropy } = dynMoLEPlan(tensor(on, p.map(logs)), options);
      return { ids: plan.experts, weights: plan.weights, entropy };
    });
    return { ids: flat(found.ids), weights: flat(found.weights), entropy: flat(found.entropy) };
  };

  it("the expert that crosses the sum is not kept, unless it is among the first k", async () => {
    const p = [[0.1, 0.6, 0.3]];
    expect((await route(p, { k: 1, threshold: 1 })).ids).toEqual([1, -1, -1]);
    expect((await route(p, { k: 2, threshold: 1 })).ids).toEqual([1, 2, -1]);
    expect((await route(p, { k: 0, threshold: 1, topP: 0.95 })).ids).toEqual([1, 2, -1]);
    expect((await route(p, { k: 0, threshold: 1, topP: 0.5 })).ids).toEqual([-1, -1, -1]);
  });
  it("weights are the probabilities, not divided by their sum", async () => {
    const { weights } = await route([[0.1, 0.6, 0.3]], { k: 2, threshold: 1 });
    expect(weights.map((w) => w.toFixed(12))).toEqual([0.6, 0.3, 0].map((w) => w.toFixed(12)));
  });
  it.each([
    ["tsallis", 1.1],
    ["tsallis", 0.5],
    ["tsallis", 1],
    ["renyi", 2],
    ["renyi", 0.7],
  ] as const)(
    "%s entropy with q = %d is 1 for the even distribution, 0 for a decided one, between them else",
    async (entropy, q) => {
      const p = [
        [1 / 3, 1 / 3, 1 / 3],
        [1, 1e-30, 1e-30],
        [0.5, 0.3, 0.2],
      ];
      const { ids, entropy: found } = await route(p, { entropy, q, epsilon: 0, threshold: 0.99, k: 1, topP: 0.1 });
      expect(found[0]).toBeCloseTo(1, 8);
      expect(found[1]).toBeCloseTo(0, 8);
      expect(found[2]).toBeGreaterThan(0.5);
      expect(found[2]).toBeLessThan(0.99);
      expect(ids).toEqual([0, 1, 2, 0, -1, -1, 0, -1, -1]); // uncertain: all; ties in the order of the experts
    },
  );
  it("near q = 1 both entropies meet Shannon's", async () => {
    const p = [[0.5, 0.3, 0.2]];
    const shannon = -(0.5 * Math.log(0.5) + 0.3 * Math.log(0.3) + 0.2 * Math.log(0.2)) / Math.log(3);
    for (const [entropy, q] of [
      ["tsallis", 1],
      ["renyi", 1],
      ["tsallis", 1.00001],
      ["renyi", 0.99999],
    ] as const)
      expect((await route(p, { entropy, q, epsilon: 0 })).entropy[0]).toBeCloseTo(shannon, 4);
  });
  it("both factors of the balance loss carry gradient", async () => {
    const logits = [[0.4, -0.3, 0.1]];
    const options = { k: 1, topP: 0.1, threshold: 1 };
    const balance = (x: Tensor): Tensor => dynMoLELosses(x, options).balance;
    const slope = flat(await slopes(on, logits, balance))[0];
    const at = async (by: number): Promise<number> => {
      const moved = await results(on, () => ({ y: balance(tensor(on, [[0.4 + by, -0.3, 0.1]])) }));
      return flat(moved.y)[0] ?? Number.NaN;
    };
    const numeric = ((await at(1e-6)) - (await at(-1e-6))) / 2e-6;
    expect(slope).toBeCloseTo(numeric, 7);
    // One token, one expert: 3 p², of which a constant first factor would give half.
    expect(Math.abs(numeric)).toBeGreaterThan(0.1);
  });
  it("the hook's loss is that of all layers' tokens at once, padding left out", async () => {
    const hook = dynMoLEHook({ entropyLoss: 2, balance: 3 });
    const first = [
      [1, 0, -1],
      [0.2, 0.1, 0],
    ];
    const second = [
      [0, 3, 0],
      [-1, -1, 2],
    ];
    const info = { step: 0 };
    const found = await results(on, () => {
      const select = selecting(on, dynMoLE({ entropyLoss: 0, balance: 0 }), 3);
      const layers: Routed[] = [first, second].map((x) => select(tensor(on, x), { training: true }));
      for (const { losses } of layers) expect(losses).toEqual({});
      const wanted = (rows: number[][]): Tensor => {
        const { entropy, balance } = dynMoLELosses(tensor(on, rows));
        return add(mul(entropy, 2), mul(balance, 3));
      };
      if (!hook.loss) throw new Error("the hook has a loss");
      return {
        all: hook.loss(layers, info),
        masked: hook.loss(layers, { ...info, mask: tensor(on, [[1, 0]]) }),
        wantedAll: wanted([...first, ...second]),
        wantedMasked: wanted([first[0] ?? [], second[0] ?? []]),
      };
    });
    expect(flat(found.all)[0]).toBeCloseTo(flat(found.wantedAll)[0] ?? 0, 12);
    expect(flat(found.masked)[0]).toBeCloseTo(flat(found.wantedMasked)[0] ?? 0, 12);
    expect(() => hook.loss?.([], info)).toThrow("no layer has logits");
  });
  it("tells the share of uncertain tokens, padding left out", async () => {
    const { uncertain } = await results(on, () => {
      const logits = tensor(on, [
        [0, 0, 0],
        [9, 0, 0],
        [0, 0, 0],
      ]);
      const layout = { batch: 1, sequence: 3, past: 0, mask: tensor(on, [[1, 1, 0]]) };
      const routed = selecting(on, dynMoLE(), 3)(logits, { layout });
      expect(sparse(routed).experts.shape).toEqual([3, 3]);
      return { uncertain: routed.metrics?.uncertain as Tensor };
    });
    expect(flat(uncertain)).toEqual([0.5]);
  });
  it("starts from a uniform distribution within 1 / sqrt(width)", async () => {
    const router = dynMoLE().init(routerContext(on, { experts: 40, width: 25 }));
    const values = flat(await lists(leaf(router.params, "weight")));
    expect(Math.max(...values)).toBeLessThanOrEqual(0.2);
    expect(Math.max(...values)).toBeGreaterThan(0.19);
    expect(Math.min(...values)).toBeGreaterThanOrEqual(-0.2);
    expect(Math.min(...values)).toBeLessThan(-0.19);
  });
  it("an option that is undefined has its default", () => {
    expect(dynMoLE({ ...({ k: undefined } as object), topP: 0.5 }).options).toMatchObject({ k: 2, topP: 0.5 });
  });
  it("refuses options that cannot be", () => {
    expect(() => dynMoLE({ k: 0.5 })).toThrow("dynMoLE: k = 0.5; expected a whole number from 0");
    expect(() => dynMoLE({ q: 0 })).toThrow("dynMoLE: q = 0; expected a finite number above 0");
    expect(() => dynMoLE({ topP: -1 })).toThrow("topP = -1");
    expect(() => dynMoLE({ entropy: "shannon" as "renyi" })).toThrow('entropy = "shannon"; expected "tsallis" or');
  });
});
