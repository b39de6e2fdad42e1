import { dispose } from "@switchyard/core";
import { layerInput, layerParams, moe, moeLayer } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { foundingFamilies } from "../test/families/founding.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import {
  circleGate,
  type ExpressiveGate,
  expressiveGates,
  interpolantExperts,
  intervalGate,
  reluInterpolant,
} from "./expressive-gates.ts";

const kinds: readonly ExpressiveGate[] = [
  "linear",
  "affine",
  "quadratic",
  "mlp",
  "cosine",
  "distance",
  "interval",
  "circle",
];
for (const gate of kinds) {
  testRouter({ plugin: ({ k = 2 }) => expressiveGates({ k, gate, hidden: 16, balance: 0.1 }), weights: "sum to 1" });
}
testRouter({ plugin: ({ k = 2 }) => expressiveGates({ k, weights: "all", zLoss: 0.1 }), weights: "sum to at most 1" });
testRouter({ plugin: ({ k = 1 }) => expressiveGates({ k, weights: "anneal" }), weights: "sum to 1" });

describe("expressiveGates meets its vectors", () => {
  const { family, cases, tolerance } = readVectors("main-expressive");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(foundingFamilies, family), one, tolerance)).toEqual([]);
  });
});

describe("expressiveGates", () => {
  const on = float64();

  it("a single weight is exactly 1, and with the whole softmax it is the probability", async () => {
    const weight = async (weights: "selected" | "all"): Promise<number[]> => {
      const { found } = await results(on, () => {
        const select = selecting(on, expressiveGates({ k: 1, weights }), 3);
        return { found: sparse(select(tensor(on, [[1, 0, -2]]), { training: true })).weights };
      });
      return flat(found);
    };
    expect(await weight("selected")).toEqual([1]);
    expect((await weight("all"))[0]).toBeCloseTo(Math.E / (Math.E + 1 + Math.exp(-2)), 12);
  });
  it("annealing runs every expert in training, ever more like the best one, and the best in evaluation", async () => {
    const weights = async (step: number, totalSteps: number | undefined): Promise<number[]> => {
      const { found } = await results(on, () => {
        const select = selecting(on, expressiveGates({ k: 1, weights: "anneal" }), 2);
        const progress = { training: true, step, ...(totalSteps === undefined ? {} : { totalSteps }) };
        const { plan } = select(tensor(on, [[0.2, 0]]), { ...progress });
        if (plan.kind !== "dense") throw new Error(`a plan of kind ${plan.kind}`);
        return { found: plan.weights };
      });
      return flat(found);
    };
    const expected = (temperature: number): number => 1 / (1 + Math.exp(-0.2 / temperature));
    expect((await weights(0, 11))[0]).toBeCloseTo(expected(1), 12);
    expect((await weights(5, 11))[0]).toBeCloseTo(expected(Math.sqrt(0.1)), 12);
    expect((await weights(10, 11))[0]).toBeCloseTo(expected(0.1), 12);
    expect((await weights(99, 11))[0]).toBeCloseTo(expected(0.1), 12);
    expect((await weights(0, 1))[0]).toBeCloseTo(expected(1), 12);
    on.scope(() => {
      const found = selecting(on, expressiveGates({ k: 1, weights: "anneal" }), 2)(tensor(on, [[0.2, 0]]), {});
      expect(found.plan.kind).toBe("sparse");
      return undefined;
    });
  });
  it("the distance gate takes the nearest centre", async () => {
    const { ids } = await results(on, () => {
      const router = expressiveGates({ k: 1, gate: "distance" }).init(routerContext(on, { experts: 3, width: 2 }));
      const centres = tensor(on, [
        [0, 0],
        [4, 0],
        [0, 4],
      ]);
      const hidden = tensor(on, [
        [1, 1.5],
        [2.5, 0],
        [-9, 3],
      ]);
      return { ids: sparse(router.route({ centres }, routerInput(on, { hidden }))).experts };
    });
    expect(flat(ids)).toEqual([0, 1, 2]);
  });
  it("the cosine gate does not mind the length of a token, and its factor sharpens it", async () => {
    const weights = async (hidden: number[][], scale: number): Promise<number[]> => {
      const { found } = await results(on, () => {
        const router = expressiveGates({ k: 2, gate: "cosine", scale }).init(
          routerContext(on, { experts: 2, width: 2 }),
        );
        const weight = tensor(on, [
          [1, 0],
          [0, 3],
        ]);
        return { found: sparse(router.route({ weight }, routerInput(on, { hidden: tensor(on, hidden) }))).weights };
      });
      return flat(found);
    };
    const [one = 0, , long = 0] = await weights(
      [
        [3, 4],
        [30, 40],
      ],
      1,
    );
    expect(one).toBeCloseTo(1 / (1 + Math.exp(-0.2)), 9);
    expect(long).toBeCloseTo(one, 9);
    expect((await weights([[3, 4]], 10))[0]).toBeCloseTo(1 / (1 + Math.exp(-2)), 9);
  });
  it("fixed gates learn nothing", () => {
    const router = expressiveGates({ k: 1, gate: "circle" }).init(routerContext(on));
    expect(router.params).toEqual({});
    expect(Object.keys(router.buffers)).toEqual(["weight", "bias"]);
    dispose(router.buffers);
  });
  it("refuses options that cannot be", () => {
    expect(() => expressiveGates({ k: 1, gate: "cubic" as "linear" })).toThrow('gate = "cubic"; expected "linear" or');
    expect(() => expressiveGates({ k: 1, cold: 0 })).toThrow("cold = 0; expected a number above 0");
    expect(() => expressiveGates({ k: 1, hidden: -1 })).toThrow("hidden = -1; expected a whole number from 0");
    expect(() => expressiveGates({ k: 6 }).init(routerContext(on))).toThrow("k = 6 of 5 experts");
    const interval = expressiveGates({ k: 1, gate: "interval", coordinate: 6 });
    expect(() => interval.init(routerContext(on))).toThrow("coordinate 6 of 6; expected 0 to 5");
    const circle = expressiveGates({ k: 1, gate: "circle" });
    expect(() => circle.init(routerContext(on, { width: 1 }))).toThrow("a circle needs 2 coordinates");
  });
});

describe("constructions", () => {
  const on = float64();
  const best = ({ weight, bias }: ReturnType<typeof circleGate>, x: readonly number[]): number => {
    const scores = [...bias].map((b, e) => x.reduce((sum, v, i) => sum + v * (weight[e * x.length + i] ?? 0), b));
    return scores.indexOf(Math.max(...scores));
  };

  it("the interval gate gives each unit interval to its expert", () => {
    const gate = intervalGate({ experts: 4, width: 2, coordinate: 1 });
    for (const t of [0, 0.4, 0.99, 1.01, 2.5, 3.001, 4]) {
      expect(best(gate, [7, t])).toBe(Math.min(Math.floor(t), 3));
    }
  });
  it("the circle gate gives each sector to its expert", () => {
    const gate = circleGate({ experts: 5, width: 3 });
    for (let i = 0; i < 40; i++) {
      const angle = (2 * Math.PI * (i + 0.5)) / 40;
      const sector = Math.round((angle * 5) / (2 * Math.PI)) % 5;
      expect(best(gate, [Math.cos(angle), Math.sin(angle), 3])).toBe(sector);
    }
  });
  it("an interpolant meets f at its knots, errs by the bound, and by a quarter with twice the neurons", () => {
    const worst = (neurons: number): number => {
      const { at, knots } = reluInterpolant(Math.sin, { from: -1, to: 2, neurons });
      expect(knots).toHaveLength(neurons);
      for (const z of [...knots, 2]) expect(at(z)).toBeCloseTo(Math.sin(z), 12);
      const errors = Array.from({ length: 601 }, (_, i) => -1 + i / 200).map((z) => Math.abs(at(z) - Math.sin(z)));
      return Math.max(...errors);
    };
    expect(worst(10)).toBeLessThanOrEqual(0.3 ** 2 / 8);
    expect(worst(10) / worst(20)).toBeGreaterThan(3.5);
    expect(worst(1)).toBeGreaterThan(0.1);
    expect(() => reluInterpolant(Math.sin, { from: 1, to: 1, neurons: 3 })).toThrow("3 neurons on [1, 1]");
  });
  it("the error on the circle does not depend on the dimension it lies in", async () => {
    const error = async (width: number): Promise<number> => {
      const pieces = Array.from({ length: 4 }, (_, e) => {
        const angle = (Math.PI * e) / 2;
        const f = (z: number): number => Math.sin(5 * Math.cos(angle + Math.asin(z)));
        const reach = Math.sin(Math.PI / 4);
        const direction = Array.from({ length: width }, (_, i) => [-Math.sin(angle), Math.cos(angle)][i] ?? 0);
        return { ...reluInterpolant(f, { from: -reach, to: reach, neurons: 10 }), direction };
      });
      const angles = Array.from({ length: 97 }, (_, i) => (2 * Math.PI * i) / 97);
      const { y } = await results(on, () => {
        const experts = interpolantExperts(on, { pieces, coordinate: 0, keep: false });
        const layer = moeLayer(expressiveGates({ k: 1, gate: "circle" }), { engine: on, width }, { experts });
        const points = angles.map((a) => Array.from({ length: width }, (_, i) => [Math.cos(a), Math.sin(a)][i] ?? 0));
        return { y: moe(layer, layerParams(layer), layerInput(layer, tensor(on, points))).output };
      });
      const values = flat(y);
      return Math.max(...angles.map((a, i) => Math.abs((values[i * width] ?? 0) - Math.sin(5 * Math.cos(a)))));
    };
    const small = await error(2);
    expect(small).toBeGreaterThan(0.01);
    expect(small).toBeLessThan(0.15);
    for (const width of [16, 64, 128]) expect(await error(width)).toBeCloseTo(small, 12);
  });
  it("L layers of E experts make E^L pieces", async () => {
    const [experts, layers] = [3, 2];
    const codes = new Set<string>();
    const points = Array.from({ length: 144 }, (_, i) => [((i % 12) + 0.5) / 4, (Math.floor(i / 12) + 0.5) / 4]);
    const paths = points.map(() => [] as number[]);
    for (let layer = 0; layer < layers; layer++) {
      const { ids } = await results(on, () => {
        const plugin = expressiveGates({ k: 1, gate: "interval", coordinate: layer });
        const router = plugin.init(routerContext(on, { experts, width: layers }));
        const input = routerInput(on, { hidden: tensor(on, points), buffers: router.buffers });
        return { ids: sparse(router.route(router.params, input)).experts };
      });
      for (const [t, e] of flat(ids).entries()) paths[t]?.push(e);
    }
    for (const path of paths) codes.add(path.join());
    expect(codes.size).toBe(experts ** layers);
  });
  it("experts of different shapes are refused", () => {
    const piece = (neurons: number) => ({
      ...reluInterpolant(Math.sin, { from: 0, to: 1, neurons }),
      direction: [1, 0],
    });
    expect(() => interpolantExperts(on, { pieces: [piece(2), piece(3)], coordinate: 0 })).toThrow(
      "pieces differ in width or neurons",
    );
  });
});
