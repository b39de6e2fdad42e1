import { dispose, mul, random, sum, type Tensor } from "@switchyard/core";
import { glu, moeLayer, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { vqMoEFamily } from "../test/families/structured.ts";
import { learn } from "../test/learning.ts";
import { flat, float64, readVectors, results, slopes, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { codeDistances, quantize, type VQMoEOptions, vqMoE } from "./vq-moe.ts";

const estimate = {
  reason: "stopped and straight-through gradients are by design not the slopes of the values",
  tests: ["gradients of weights and losses agree with central differences"],
};
testRouter({ plugin: ({ k = 2 }) => vqMoE({ k }), weights: "sum to at most 1", skip: [estimate] });
testRouter({
  plugin: ({ k = 2 }) => vqMoE({ k, vqLoss: 0, balance: 0.01, zLoss: 0.001, normalise: true, blend: 0.1 }),
  weights: "sum to at most 1",
});
testRouter({ plugin: ({ k = 2 }) => vqMoE({ k, discreteOnly: "always" }), weights: "sum to 1", skip: [estimate] });
testRouter({
  plugin: () => vqMoE({ k: 1, discreteOnly: "evaluation", codes: 7 }),
  weights: "sum to 1",
  skip: [
    estimate,
    {
      reason: "code mod experts ties codes to places, which a permutation of the experts alone breaks",
      tests: ["permuting the experts permutes the answer"],
    },
  ],
});

describe("vqMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("vqmoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(vqMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("quantize", () => {
  const on = float64();
  it("takes the nearest code, the lower one of two alike", async () => {
    const book = [
      [0, 0],
      [2, 0],
      [2, 0],
    ];
    const x = [
      [0.9, 5],
      [1.1, 5],
      [1, -3],
    ];
    const found = await results(on, () => ({
      codes: quantize(tensor(on, x), tensor(on, book)).codes,
      distances: codeDistances(tensor(on, x), tensor(on, book)),
    }));
    expect(flat(found.codes ?? [])).toEqual([0, 1, 0]);
    const wanted = x.flatMap(([a = 0, b = 0]) => book.map(([c = 0, d = 0]) => (a - c) ** 2 + (b - d) ** 2));
    flat(found.distances).forEach((value, i) => {
      expect(value).toBeCloseTo(wanted[i] ?? Number.NaN, 12);
    });
  });
  it("passes the gradient of the rows to x unchanged and none to the codes; the blend scales it", async () => {
    const [x, book] = [[[0.3, 1]], [[1, 1]]];
    const weigh = (rows: Tensor): Tensor => sum(mul(rows, tensor(on, [[2, -3]])));
    for (const [blend, scale] of [
      [0, 1],
      [0.1, 0.9],
    ] as const) {
      const rows = (a: Tensor, b: Tensor): Tensor => weigh(quantize(a, b, { blend }).rows);
      expect(flat(await slopes(on, x, (a) => rows(a, tensor(on, book))))).toEqual([2 * scale, -3 * scale]);
      // The rows do not depend on the codes as far as gradients go.
      expect(flat(await slopes(on, book, (b) => rows(tensor(on, x), b)))).toEqual([0, 0]);
    }
  });
  it("is 0 where every token is a code, whatever stands in padding", async () => {
    const book = [[1, 2]];
    const found = await results(on, () => ({
      none: quantize(tensor(on, [[1, 2]]), tensor(on, book)).loss,
      masked: quantize(
        tensor(on, [
          [1, 2],
          [9, 9],
        ]),
        tensor(on, book),
        { mask: tensor(on, [1, 0]) },
      ).loss,
      far: quantize(tensor(on, [[2, 2]]), tensor(on, book), { commitment: 1 }).loss,
    }));
    expect([found.none, found.masked, found.far]).toEqual([0, 0, 1]);
  });
});

describe("vqMoE", () => {
  const on = float64();
  const rows = [
    [1, 0.5],
    [-1, 2],
    [0.3, -0.7],
  ];
  const route = async (options: VQMoEOptions, training = false) => {
    const router = vqMoE(options).init(routerContext(on, { experts: 4, width: 2 }));
    const found = await results(on, (): Readonly<Record<string, Tensor>> => {
      const routed = router.route(router.params, routerInput(on, { hidden: tensor(on, rows), training }));
      const more = routed.more?.[0]?.plan;
      return {
        weights: sparse(routed).weights,
        experts: sparse(routed).experts,
        codes: routed.metrics?.codes as Tensor,
        ...(more?.kind === "sparse" ? { other: more.weights } : {}),
      };
    });
    dispose(router.params);
    return found;
  };
  it("the weights of both paths sum to 1 for every token", async () => {
    const found = await route({ k: 3 });
    const [weights, other] = [(found.weights ?? []) as number[][], flat(found.other ?? [])];
    expect(other).toHaveLength(3);
    weights.forEach((row, t) => {
      expect(flat(row).reduce((a, b) => a + b) + (other[t] ?? 0)).toBeCloseTo(1, 12);
    });
  });
  it("counts the tokens of every code, and names the code's expert modulo their number", async () => {
    const found = await route({ codes: 9, discreteOnly: "always" });
    expect(flat(found.codes ?? [])).toHaveLength(9);
    expect(flat(found.codes ?? []).reduce((a, b) => a + b)).toBe(3);
    const used = flat(found.codes ?? []).flatMap((n, code) => new Array<number>(n).fill(code % 4));
    expect(flat(found.experts ?? []).sort()).toEqual(used.sort());
  });
  it("discreteOnly leaves one expert where it applies, and both paths elsewhere", async () => {
    expect((await route({ discreteOnly: "evaluation" })).other).toBeUndefined();
    expect((await route({ discreteOnly: "evaluation" }, true)).other).toBeDefined();
    expect((await route({ discreteOnly: "always" }, true)).other).toBeUndefined();
    expect(flat((await route({ discreteOnly: "always" })).weights ?? [])).toEqual([1, 1, 1]);
  });
  it("codes start within 1 / K, and in a layer that learns a task they come nearer to the tokens", async () => {
    const width = 3;
    const experts = glu({ count: 4, width, hidden: 5, engine: on, random: random(on, 3) });
    const layer = moeLayer(vqMoE({ k: 1, vqLoss: 1 }), { engine: on, width }, { experts });
    const first = await leaf(layer.router.params, "codebook").data();
    expect(first.every((v) => Math.abs(v) <= 1 / 4)).toBe(true);
    const x = Array.from({ length: 12 }, (_, i) => [Math.sin(i), Math.cos(3 * i), (i % 3) - 1]);
    const target = x.map((row) => row.map((v) => -v));
    const also = ({ losses }: Routed): Tensor => losses.vq?.value as Tensor;
    const found = await learn(on, layer, { x, target, steps: 60, rate: 0.3, also });
    expect(found.error.at(-1)).toBeLessThan(0.7 * (found.error[0] ?? 0));
    expect(found.also.at(-1)).toBeLessThan(0.7 * (found.also[0] ?? 0));
  });
  it.each([
    [{ k: 9 }, "k = 9 of 4 experts"],
    [{ codes: 1.5 }, "codes = 1.5"],
    [{ blend: 2 }, "blend = 2"],
    [{ vqLoss: -1 }, "vqLoss = -1"],
    [{ discreteOnly: "sometimes" as "never" }, 'discreteOnly = "sometimes"'],
  ])("refuses %j", (options, message) => {
    expect(() => vqMoE(options).init(routerContext(on, { experts: 4, width: 2 }))).toThrow(message);
  });
});
