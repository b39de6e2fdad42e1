import { dispose, leaves, type Tensor, type Tree } from "@switchyard/core";
import type { Routed, Router, StepStatistics } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { reMoEFamily } from "../test/families/first.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { type ReMoEOptions, reMoE } from "./re-moe.ts";

// A lambda near 1, so that gradients of the loss are not lost beside those of the weights.
testRouter({ plugin: ({ k = 2 }) => reMoE({ k, lambda: 0.5 }), weights: "not negative" });

describe("reMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("remoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(reMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("reMoE", () => {
  const make = (options: ReMoEOptions, experts = 4): { on: ReturnType<typeof float64>; router: Router } => {
    const on = float64();
    return { on, router: reMoE(options).init(routerContext(on, { experts })) };
  };
  const statistics = (active: number, tokens = 10, experts = 4): StepStatistics => ({
    step: 0,
    tokens,
    load: new Float64Array(experts).fill(active / experts),
    metrics: {},
  });
  const lambdaAfter = async (options: ReMoEOptions, layers: readonly StepStatistics[]): Promise<number> => {
    const { on, router } = make(options);
    const { lambda } = await results(on, () => ({
      lambda: leaf(router.afterStep?.(layers, router.buffers) as Tree, "lambda"),
    }));
    dispose(router.params);
    return flat(lambda)[0] ?? Number.NaN;
  };

  it("a token has from none to all experts, weighed by its positive logits", async () => {
    const { on, router } = make({ k: 2 });
    const logits = [
      [-1, -2, 0, -0.5],
      [1, 1, 2, 4],
      [0.5, -1, 0.25, 0],
    ];
    const { ids, weights, shares } = await results(on, () => {
      const input = routerInput(on, { hidden: tensor(on, logits), buffers: router.buffers });
      const routed = router.select?.(tensor(on, logits), input) as Routed;
      return { ids: sparse(routed).experts, weights: sparse(routed).weights, shares: routed.probabilities as Tensor };
    });
    expect(flat(ids)).toEqual([-1, -1, -1, -1, 0, 1, 2, 3, 0, -1, 2, -1]);
    expect(flat(weights)).toEqual([0, 0, 0, 0, 1, 1, 2, 4, 0.5, 0, 0.25, 0]);
    expect(flat(shares).slice(0, 8)).toEqual([0, 0, 0, 0, 0.125, 0.125, 0.25, 0.5]);
    dispose([router.params, router.buffers]);
  });
  it("lambda moves toward the target: up while too many are active, down otherwise and on target", async () => {
    const options = { k: 2, lambda: 1, alpha: 1.25 };
    // 10 tokens and 4 experts: 20 active pairs are the target of k = 2.
    expect(await lambdaAfter(options, [statistics(21)])).toBeCloseTo(1.25, 12);
    expect(await lambdaAfter(options, [statistics(19)])).toBeCloseTo(0.8, 12);
    expect(await lambdaAfter(options, [statistics(20)])).toBeCloseTo(0.8, 12);
  });
  it("the mean over the layers decides", async () => {
    const options = { k: 2, lambda: 1, alpha: 1.25 };
    expect(await lambdaAfter(options, [statistics(30), statistics(12)])).toBeCloseTo(1.25, 12);
    expect(await lambdaAfter(options, [statistics(30), statistics(8)])).toBeCloseTo(0.8, 12);
  });
  it("without tokens lambda stays", async () => {
    const { router } = make({ k: 2, lambda: 0.5 });
    expect(router.afterStep?.([statistics(0, 0)], router.buffers)).toBe(router.buffers);
    dispose([router.params, router.buffers]);
  });
  it("starts at 1e-8, and grows by 1.2", async () => {
    expect(await lambdaAfter({ k: 2 }, [statistics(40)])).toBeCloseTo(1.2e-8, 18);
  });
  it("the loss grows with lambda and is there in training only", async () => {
    const { on, router } = make({ k: 2 });
    const logits = [[1, -1, 2, 0.5]];
    const loss = async (lambda: number): Promise<number> => {
      const { value } = await results(on, () => {
        const input = routerInput(on, {
          hidden: tensor(on, logits),
          training: true,
          buffers: { lambda: tensor(on, lambda) },
        });
        const routed = router.select?.(tensor(on, logits), input) as Routed;
        return { value: routed.losses.sparsity?.value as Tensor };
      });
      return flat(value)[0] ?? Number.NaN;
    };
    // f = 4 / 2 for each of the three active experts: 2 * (1 + 2 + 0.5)
    expect(await loss(1)).toBeCloseTo(7, 12);
    expect(await loss(0.5)).toBeCloseTo(3.5, 12);
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, logits), buffers: router.buffers });
      expect(router.select?.(tensor(on, logits), input).losses).toEqual({});
      return undefined;
    });
    dispose([router.params, router.buffers]);
  });
  it("every layer has a lambda of its own", () => {
    const on = float64();
    const context = routerContext(on);
    const [a, b] = [reMoE({ k: 1 }).init(context), reMoE({ k: 1 }).init({ ...context, layer: 1 })];
    expect(leaves(a.buffers)[0]?.[1]).not.toBe(leaves(b.buffers)[0]?.[1]);
    dispose([a.params, a.buffers, b.params, b.buffers]);
  });
  it("refuses options that cannot be", () => {
    expect(() => reMoE({ k: 2, alpha: 1 })).toThrow("reMoE: alpha = 1; expected a number above 1");
    expect(() => reMoE({ k: 2, lambda: 0 })).toThrow("reMoE: lambda = 0; expected a number above 0");
    expect(() => make({ k: 5 })).toThrow("reMoE: k = 5 of 4 experts");
  });
});
