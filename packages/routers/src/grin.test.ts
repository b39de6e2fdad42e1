import { dispose, random, sum, type Tensor } from "@switchyard/core";
import { glu, layerInput, layerParams, moe, moeLayer } from "@switchyard/core/moe";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { grinFamily } from "../test/families/field.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, readVectors, results, slopes, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type GrinOptions, grin, scaledExperts, sparseMixer } from "./grin.ts";

const probabilities = (weights: readonly number[]): boolean => weights.every((weight) => weight > 0 && weight <= 1);
for (const version of ["v2", "v1"] as const)
  testRouter({
    plugin: ({ k = 2 }) => grin({ k, version, jitter: 0.4, zLoss: 0.001 }),
    weights: probabilities,
    skip: [
      {
        reason: "the gradient is an estimate for the sampled choice, by design not the slope of the weights",
        tests: ["gradients of weights and losses agree with central differences"],
      },
    ],
  });

describe("grin meets its vectors", () => {
  const { cases, tolerance } = readVectors("grin");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(grinFamily, one, tolerance)).toEqual([]);
  });
});

describe("sparseMixer", () => {
  const on = float64();
  const scores = [[2, 1.9, -3]];
  const p = 1 / (1 + Math.exp(-0.1));
  /** Noise under which the second expert is sampled. */
  const second = [[1, 1e-3, 1]];
  const mixed = (
    x: Tensor,
    { version, u, exponential = second }: { version: "v1" | "v2"; u: number; exponential?: number[][] },
  ) =>
    sparseMixer(x, {
      k: 1,
      jitter: 0.1,
      version,
      noise: [{ exponential: tensor(on, exponential), uniform: tensor(on, [[u]]) }],
    });
  const read = async (
    options: Parameters<typeof mixed>[1],
  ): Promise<{ expert: Values; weight: number; slope: Values }> => {
    const found = await results(on, () => {
      const { experts, weights } = mixed(tensor(on, scores), options);
      return { experts, weights };
    });
    const slope = await slopes(on, scores, (x) => sum(mixed(x, options).weights));
    return { expert: found.experts, weight: flat(found.weights)[0] ?? Number.NaN, slope };
  };

  it.each([
    ["v2", 0.7, 0.3333, 1],
    ["v2", 0.8, 1, 1],
    ["v1", 0.4, 0.5, 2],
    ["v1", 0.6, 1, 2],
  ] as const)(
    "%s with u = %d: weight %d of the probability, gradient %d times its slope",
    async (version, u, h, times) => {
      const { expert, weight, slope } = await read({ version, u });
      expect(expert).toEqual([[1]]);
      expect(weight).toBeCloseTo(h * (1 - p), 12);
      const [a = 0, b = 0, c] = flat(slope);
      expect(a).toBeCloseTo(-times * (1 - p) * p, 12);
      expect(b).toBeCloseTo(times * (1 - p) * p, 12);
      expect(c).toBe(0);
    },
  );
  it("the best expert keeps its whole probability, whatever u", async () => {
    for (const version of ["v1", "v2"] as const) {
      const { expert, weight } = await read({ version, u: 0, exponential: [[1e-3, 1, 1]] });
      expect(expert).toEqual([[0]]);
      expect(weight).toBeCloseTo(p, 12);
    }
  });
  it("an expert far below the best is never sampled, even by noise of 0", async () => {
    expect((await read({ version: "v2", u: 0, exponential: [[1, 1, 0]] })).expert).toEqual([[0]]);
  });
  it("scores of zero and equal scores are all open, ties go to the lower expert", async () => {
    const found = await results(on, () => {
      const flatScores = tensor(on, [
        [0, 0, 0],
        [-1, -1, -1],
      ]);
      const { experts, weights } = sparseMixer(flatScores, { k: 2, jitter: 0.1, version: "v2" });
      return { experts, weights };
    });
    expect(flat(found.experts)).toEqual([0, 1, 0, 1]);
    expect(flat(found.weights).map((x) => x.toFixed(12))).toEqual(
      [1 / 3, 1 / 2, 1 / 3, 1 / 2].map((x) => x.toFixed(12)),
    );
  });
  it("samples by the probabilities", async () => {
    const tokens = 4000;
    const { experts } = await results(on, () => {
      const input = { training: true, random: random(on, 5) };
      const logits = tensor(
        on,
        Array.from({ length: tokens }, () => [2, 1.9, -3]),
      );
      return { experts: sparse(selecting(on, grin({ k: 1 }), 3)(logits, input)).experts };
    });
    const share = flat(experts).filter((e) => e === 0).length / tokens;
    expect(Math.abs(share - p)).toBeLessThan(0.03);
    expect(flat(experts)).not.toContain(2);
  });
  it("refuses noise for another number of picks", () => {
    on.scope(() => {
      const noise = [{ exponential: tensor(on, second), uniform: tensor(on, [[0]]) }];
      expect(() => sparseMixer(tensor(on, scores), { k: 2, jitter: 0.1, version: "v2", noise })).toThrow(
        "noise for 1 picks, expected one of each of the 2",
      );
      return undefined;
    });
  });
});

describe("grin", () => {
  const on = float64();
  it("the balance loss takes the load of the global batch where there is one", async () => {
    const loss = async (load?: number[]): Promise<number> => {
      const { value } = await results(on, () => {
        const globalLoad = load ? { globalLoad: tensor(on, load) } : {};
        const logits = tensor(on, [[1, 1]]);
        const routed = selecting(on, grin({ k: 2 }), 2)(logits, { training: true, ...globalLoad });
        return { value: routed.losses.balance?.value as Tensor };
      });
      return flat(value)[0] ?? Number.NaN;
    };
    expect(await loss()).toBeCloseTo(2, 12);
    expect(await loss([0.5, 0.3])).toBeCloseTo(2 * 0.5 * 0.8, 12);
  });
  it("v1's experts are multiplied by omega, ones at first, which learns", async () => {
    const make = (scaled: boolean) => {
      const experts = glu({ count: 3, width: 4, hidden: 2, engine: on, random: random(on, 3) });
      return moeLayer(
        grin({ k: 2, version: "v1" }),
        { engine: on, width: 4 },
        { experts: scaled ? scaledExperts(experts, { engine: on, width: 4 }) : experts },
      );
    };
    const [plain, scaled] = [make(false), make(true)];
    const x = [[0.3, -0.2, 1, 0.5]];
    const output = async (layer: typeof plain, omega?: number[]): Promise<number[]> => {
      const { y } = await results(on, () => {
        const given = layerParams(layer) as { router: Tensor; experts: Record<string, Tensor> };
        const experts = omega ? { ...given.experts, shared: { omega: tensor(on, omega) } } : given.experts;
        return { y: moe(layer, { ...given, experts }, layerInput(layer, tensor(on, x))).output };
      });
      return flat(y);
    };
    const before = await output(plain);
    expect(await output(scaled)).toEqual(before);
    const after = await output(scaled, [1, 2, -1, 0]);
    expect(after.map((value) => value + 0)).toEqual([before[0], 2 * (before[1] ?? 0), -(before[2] ?? 0), 0]);
    const slope = await slopes(on, [1, 1, 1, 1], (omega) => {
      const given = layerParams(scaled) as { router: Tensor; experts: Record<string, Tensor> };
      const experts = { ...given.experts, shared: { omega } };
      return sum(moe(scaled, { ...given, experts }, layerInput(scaled, tensor(on, x))).output);
    });
    flat(slope).forEach((value, i) => {
      expect(value).toBeCloseTo(before[i] ?? Number.NaN, 12);
    });
    dispose([layerParams(plain), layerParams(scaled)]);
  });
  it("scaledExperts refuses parameters without omega", () => {
    const experts = scaledExperts(glu({ count: 2, width: 4, hidden: 2, engine: on, random: random(on, 3) }), {
      engine: on,
      width: 4,
    });
    on.scope(() => {
      const [rows, ends] = [tensor(on, [[1, 2, 3, 4]]), on.tensor(Int32Array.of(1, 1), [2])];
      const { shared: _, ...rest } = experts.params as Record<string, Tensor>;
      const layout = { batch: 1, sequence: 1, past: 0 };
      expect(() => experts.apply(rest, rows, ends, layout)).toThrow('there is no tensor "omega", found nothing');
      return undefined;
    });
    dispose(experts.params);
  });
  it("refuses options that cannot be", () => {
    const make = (options: GrinOptions) => () => grin(options).init(routerContext(on));
    expect(make({ k: 6 })).toThrow("grin: k = 6 of 5 experts");
    expect(make({ jitter: -1 })).toThrow("jitter = -1");
    expect(make({ version: "v3" as "v2" })).toThrow('version = "v3"; expected "v1" or "v2"');
  });
});
