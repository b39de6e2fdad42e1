import { add, linear, mul, random, square, sub, sum, type Tensor, type Tree } from "@switchyard/core";
import { muMoEExperts } from "@switchyard/core/experts";
import {
  type Experts,
  glu,
  layerInput,
  layerParams,
  moe,
  moeLayer,
  type Router,
  type StepStatistics,
} from "@switchyard/core/moe";
import { adamw, type Task, trainer } from "@switchyard/core/train";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { muMoEFamily } from "../test/families/factorised.ts";
import { flat, float64, readVectors, results, tensor, unmet } from "../test/vectors.ts";
import { muMoE } from "./mu-moe.ts";
import { leaf } from "./parts.ts";

testRouter({ plugin: muMoE({ norm: "layer", deviation: 1 }), weights: "sum to 1" });
testRouter({ plugin: muMoE({ norm: "batch", deviation: 1, momentum: 0.3 }), weights: "sum to 1" });
testRouter({ plugin: () => muMoE(), weights: "sum to 1" });

describe("muMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("mumoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(muMoEFamily, one, tolerance)).toEqual([]);
  });
});

const rows = (n: number, width: number): number[][] =>
  Array.from({ length: n }, (_, t) => Array.from({ length: width }, (_, i) => Math.sin(3 * t * t + 5 * i + 1)));

describe("muMoE", () => {
  it("starts with equal shares of all experts", async () => {
    const on = float64();
    for (const norm of ["batch", "layer"] as const) {
      const router = muMoE({ norm }).init(routerContext(on, { experts: 5, width: 3 }));
      for (const training of [true, false]) {
        const { a } = await results(on, () => {
          const input = routerInput(on, { hidden: tensor(on, rows(4, 3)), training, buffers: router.buffers });
          return { a: coefficients(router, input)[0] as Tensor };
        });
        for (const share of flat(a)) expect(share).toBeCloseTo(0.2, 12);
      }
    }
  });

  it("gives two levels their own coefficients, and probabilities that are their products", async () => {
    const on = float64();
    const plugin = muMoE({ modes: [2, 3], norm: "layer", deviation: 1 });
    const router = plugin.init(routerContext(on, { experts: 6, width: 4 }));
    const alone = (from: number, n: number): Router => {
      const one = muMoE({ norm: "layer" }).init(routerContext(on, { experts: n, width: 4 }));
      return {
        ...one,
        route: (_, input) => {
          const whole = leaf(router.params, "weight");
          const part = on.tensor(Float64Array.from(parts.slice(from * 4, (from + n) * 4)), [n, 4]);
          expect(whole.shape).toEqual([5, 4]);
          return one.route({ weight: part }, input);
        },
      };
    };
    const parts = [...(await leaf(router.params, "weight").data())];
    const found = await results(on, () => {
      const input = routerInput(on, { hidden: tensor(on, rows(3, 4)) });
      const routed = router.route(router.params, input);
      const [first, second] = coefficients(router, input) as [Tensor, Tensor];
      return {
        first,
        second,
        probabilities: routed.probabilities as Tensor,
        alone0: coefficients(alone(0, 2), input)[0] as Tensor,
        alone1: coefficients(alone(2, 3), input)[0] as Tensor,
      };
    });
    expect(found.first).toEqual(found.alone0);
    expect(found.second).toEqual(found.alone1);
    const [a, b] = [found.first, found.second] as [number[][], number[][]];
    (found.probabilities as number[][]).forEach((row, t) => {
      row.forEach((p, e) => {
        expect(p).toBeCloseTo((a[t]?.[Math.floor(e / 3)] ?? NaN) * (b[t]?.[e % 3] ?? NaN), 14);
      });
    });
    expect(() => plugin.init(routerContext(on, { experts: 5, width: 4 }))).toThrow("modes 2 x 3 for 5 experts");
  });

  it("moves running statistics as momentum and the unbiased variance of real tokens say, and evaluates by them", async () => {
    const on = float64();
    const router = muMoE({ deviation: 1, momentum: 0.25 }).init(routerContext(on, { experts: 3, width: 2, layer: 1 }));
    const x = rows(6, 2);
    const mask = [1, 1, 0, 1, 1, 1];
    const w = [...(await leaf(router.params, "weight").data())];
    const score = (row: readonly number[], e: number): number =>
      (w[2 * e] ?? 0) * (row[0] ?? 0) + (w[2 * e + 1] ?? 0) * (row[1] ?? 0);
    const { mean, variance } = await results(on, () => {
      const input = routerInput(on, { hidden: tensor(on, x), training: true, buffers: router.buffers, mask });
      const { metrics = {} } = router.route(router.params, input);
      return { mean: metrics.mean as Tensor, variance: metrics.variance as Tensor };
    });
    const real = x.filter((_, t) => mask[t] === 1);
    const expected = [0, 1, 2].map((e) => {
      const scores = real.map((row) => score(row, e));
      const center = scores.reduce((a, b) => a + b, 0) / 5;
      return [center, scores.reduce((a, b) => a + (b - center) ** 2, 0) / 4] as const;
    });
    expected.forEach(([m, v], e) => {
      expect(flat(mean)[e]).toBeCloseTo(m, 12);
      expect(flat(variance)[e]).toBeCloseTo(v, 12);
    });
    const statistics = (tokens: number): StepStatistics => ({
      step: 0,
      tokens,
      load: new Float64Array(3),
      metrics: { mean: Float64Array.from(flat(mean)), variance: Float64Array.from(flat(variance)) },
    });
    const other = { ...statistics(5), metrics: { mean: new Float64Array(3).fill(9), variance: new Float64Array(3) } };
    const next = on.scope(() => router.afterStep?.([other, statistics(5)], router.buffers)) as Tree;
    const [m, v] = [[...(await leaf(next, "mean").data())], [...(await leaf(next, "variance").data())]];
    expected.forEach(([center, spread], e) => {
      expect(m[e]).toBeCloseTo(0.25 * center, 12);
      expect(v[e]).toBeCloseTo(0.75 + 0.25 * spread, 12);
    });
    expect(router.afterStep?.([other, statistics(0)], router.buffers)).toBe(router.buffers);
    expect(() => router.afterStep?.([other], router.buffers)).toThrow("statistics of 1 layers");
    // Evaluation: logits are (score - mean) / sqrt(variance + eps).
    const { logits } = await results(on, () => ({
      logits: router.route(router.params, routerInput(on, { hidden: tensor(on, x), buffers: next })).logits as Tensor,
    }));
    x.forEach((row, t) => {
      for (let e = 0; e < 3; e++) {
        const z = (score(row, e) - (m[e] ?? NaN)) / Math.sqrt((v[e] ?? NaN) + 1e-5);
        expect((logits as number[][])[t]?.[e]).toBeCloseTo(z, 11);
      }
    });
  });

  it("does in a layer of factorised experts what one product with the mixed tensor does", async () => {
    const on = float64();
    const [width, experts, tokens] = [3, 4, 5];
    const made = muMoEExperts({ count: experts, width, output: 2, rank: 3, engine: on, random: random(on, 4) });
    const layer = moeLayer(muMoE({ norm: "layer", deviation: 1 }), { engine: on, width }, { experts: made });
    const matrices = Array.from({ length: experts }, (_, e) => made.expertMatrix(made.params, e));
    const found = await results(on, () => {
      const hidden = tensor(on, rows(tokens, width));
      const { output, routed } = moe(layer, layerParams(layer), layerInput(layer, hidden));
      // Σ_e a_e (W_e x + b_e): the layer is linear in its tensor.
      let expected: Tensor | undefined;
      matrices.forEach(({ matrix, bias }, e) => {
        const pick = on.tensor(
          Float64Array.from({ length: experts }, (_, i) => Number(i === e)),
          [1, experts],
        );
        const share = linear(routed.probabilities as Tensor, pick); // [tokens, 1]
        const y = linear(hidden, matrix, bias);
        const term = mul(y, share);
        expected = expected ? add(expected, term) : term;
      });
      return { output, expected: expected as Tensor };
    });
    const [y, z] = [flat(found.output), flat(found.expected)];
    y.forEach((value, i) => {
      expect(value).toBeCloseTo(z[i] ?? NaN, 12);
    });
  });

  it.each([
    ["batch", undefined],
    ["layer", undefined],
    ["batch", [2, 3]],
  ] as const)("is trained for real: %s normalisation, levels %s", async (norm, modes) => {
    const on = float64();
    const [width, count] = [4, 6];
    const more = modes ? { modes } : {};
    const experts = muMoEExperts({ count, width, hidden: 6, rank: 4, ...more, engine: on, random: random(on, 4) });
    const layer = moeLayer(muMoE({ norm, ...more }), { engine: on, width }, { experts });
    const task: Task<number> = {
      params: layerParams(layer),
      routers: [layer.router],
      batch: (index) => index,
      forward(params, buffers, index, info) {
        const x = rows(12, width).map((row) => row.map((v, i) => v + Math.cos(index + i)));
        const target = x.map((row) => row.map((v, i) => Math.abs(v) - (row[(i + 1) % width] ?? 0)));
        const hidden = tensor(on, x);
        const input = layerInput(layer, hidden, {
          ...info,
          globalLoad: undefined as never,
          buffers: buffers[0] as Tree,
        });
        const { output, routed } = moe(layer, params, input);
        const loss = sum(square(sub(output, tensor(on, target))));
        return { loss, logits: output, layers: [routed] };
      },
    };
    const run = trainer(on, task, { optimiser: adamw({ learningRate: 0.03 }), totalSteps: 60 });
    await run.run();
    const [first, last] = [run.history[0], run.history.at(-1)];
    expect(last?.loss).toBeLessThan(0.85 * (first?.loss ?? 0));
    if (norm === "batch") {
      const [mean, variance] = await Promise.all(
        ["mean", "variance"].map((name) => leaf(run.buffers[0] as Tree, name).data()),
      );
      expect(mean?.some((x) => x !== 0)).toBe(true);
      expect(variance?.some((x) => Math.abs(x - 1) > 0.01)).toBe(true);
      const evaluated = await run.evaluate([1, 2]);
      expect(evaluated.loss).toBeLessThan(0.9 * (first?.loss ?? 0));
    }
    // The load counts every expert: its shares add up to those of the tokens.
    expect(last?.loads[0]?.length).toBe(count);
    expect(last?.loads[0]?.reduce((a, b) => a + b, 0)).toBeCloseTo(12, 6);
    expect(last?.loads[0]?.filter((x) => x > 0).length).toBeGreaterThan(3);
    run.dispose();
  });

  it("is refused for experts that cannot be mixed, and its options are checked", () => {
    const on = float64();
    const unmixable: Experts = (({ mixed: _, ...rest }) => rest)(
      glu({ count: 2, width: 3, hidden: 2, engine: on, random: random(on, 1) }),
    );
    expect(() => moeLayer(muMoE(), { engine: on, width: 3 }, { experts: unmixable })).toThrow("have no mixed()");
    expect(() => muMoE({ norm: "none" as "layer" })).toThrow('norm = "none"');
    expect(() => muMoE({ momentum: 1.5 })).toThrow("momentum = 1.5");
    expect(() => muMoE({ eps: 0 })).toThrow("eps = 0");
    expect(() => muMoE({ modes: [] })).toThrow("modes []");
    expect(() => muMoE({ modes: [2, 0] })).toThrow("modes [2, 0]");
  });
});

function coefficients(router: Router, input: Parameters<Router["route"]>[1]): readonly Tensor[] {
  const { plan } = router.route(router.params, input);
  if (plan.kind !== "merge") throw new Error(`a merge plan was expected, found ${plan.kind}`);
  return plan.coefficients;
}
