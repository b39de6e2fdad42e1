import { dispose, random, sum } from "@switchyard/core";
import { ffn, layerParams, moeLayer, type Routed } from "@switchyard/core/moe";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { selecting } from "../test/families/parts.ts";
import { sharedExpertsFamily } from "../test/families/structured.ts";
import { learn } from "../test/learning.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { classSpecialisation, layerSpecialisation, layersToKeep, routingHeatMap, viMoE } from "./vi-moe.ts";

testRouter({ plugin: ({ k = 1 }) => viMoE({ k, zLoss: 0.001 }), weights: "sum to at most 1" });

describe("viMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("shared-experts");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(sharedExpertsFamily, one, tolerance)).toEqual([]);
  });
});

const on = float64();

describe("viMoE", () => {
  it("gives the best expert its probability", async () => {
    const found = await results(on, () => {
      const { experts, weights } = sparse(selecting(on, viMoE(), 3)(tensor(on, [[0, Math.log(2), 0]]), {}));
      return { experts, weights };
    });
    expect(found.experts).toEqual([[1]]);
    expect(flat(found.weights)[0]).toBeCloseTo(0.5, 12);
  });
  it("learns beside a shared expert", async () => {
    const sizes = { width: 3, hidden: 4, engine: on };
    const experts = ffn({ count: 4, ...sizes, random: random(on, 1) });
    const shared = [{ experts: ffn({ count: 1, ...sizes, random: random(on, 2) }) }];
    const layer = moeLayer(viMoE(), { engine: on, width: 3 }, { experts, shared });
    const x = Array.from({ length: 10 }, (_, i) => [Math.sin(2 * i), Math.cos(i), 1]);
    const also = ({ probabilities }: Routed) => sum(probabilities ?? tensor(on, 0));
    const found = await learn(on, layer, { x, target: x, steps: 40, rate: 0.3, also });
    expect(found.error.at(-1)).toBeLessThan(0.8 * (found.error[0] ?? 0));
    expect(found.also[0]).toBeCloseTo(10, 9);
  });
  it("asks for one shared expert, as many as told, or none", () => {
    expect(viMoE().sharedExperts).toBe(1);
    const sizes = { engine: on, width: 3 };
    const experts = ffn({ count: 4, hidden: 4, random: random(on, 1), ...sizes });
    expect(() => moeLayer(viMoE(), sizes, { experts })).toThrow("it asks for 1 shared expert, and the layer has none");
    expect(() => moeLayer(viMoE({ shared: 2 }), sizes, { experts })).toThrow("it asks for 2 shared experts");
    dispose(layerParams(moeLayer(viMoE({ shared: 0 }), sizes, { experts })));
    expect(() => viMoE({ shared: 0.5 })).toThrow("viMoE: shared = 0.5");
  });
  it("refuses k that no layer has", () => {
    expect(() => viMoE({ k: 4 }).init(routerContext(on, { experts: 3 }))).toThrow("viMoE: k = 4 of 3 experts");
    expect(() => viMoE({ balance: -1 })).toThrow("balance = -1");
  });
});

describe("the analysis of a layer", () => {
  const heat = (rows: readonly (readonly number[])[], labels: readonly number[], experts = 3, classes = 3) => {
    const k = rows[0]?.length ?? 1;
    const ids = on.tensor(Int32Array.from(rows.flat()), [rows.length, k]);
    return routingHeatMap(ids, on.tensor(Int32Array.from(labels), [labels.length]), { experts, classes });
  };
  const read = (rows: readonly (readonly number[])[], labels: readonly number[], experts = 3, classes = 3) =>
    results(on, () => {
      const map = heat(rows, labels, experts, classes);
      return { map, each: classSpecialisation(map), layer: layerSpecialisation(map) };
    });

  it("counts choices by class, without empty slots, unknown classes and null experts", async () => {
    const rows = [
      [0, 1],
      [0, -1],
      [2, 3],
      [1, 2],
    ];
    const { map } = await read(rows, [1, 1, 0, -1]);
    const wanted = [
      [0, 0, 1],
      [2 / 3, 1 / 3, 0],
      [0, 0, 0],
    ];
    flat(map).forEach((value, i) => {
      expect(value).toBeCloseTo(wanted.flat()[i] ?? Number.NaN, 12);
    });
  });
  it("says 1 for one expert, 0 for all alike, and leaves classes without tokens out of the layer's mean", async () => {
    const { each, layer } = await read([[0], [0], [0], [1], [2]], [0, 0, 2, 2, 2]);
    const [one, none, even] = flat(each);
    expect([one, none]).toEqual([1, 0]);
    expect(even).toBeCloseTo(0, 12);
    expect(flat(layer)[0]).toBeCloseTo(0.5, 12);
  });
  it("one expert, no tokens and no classes say nothing", async () => {
    expect((await read([[0]], [0], 1, 1)).each).toEqual([0]);
    expect((await read([], [], 2, 2)).layer).toBe(0);
    expect((await read([[0]], [0], 2, 0)).layer).toBe(0);
  });
  it("keeps the layers above the threshold", () => {
    expect(layersToKeep([0.1, 0.5, 0.3, 0.31])).toEqual([1, 3]);
    expect(layersToKeep(Float64Array.of(0.1, 0.5), { threshold: 0.05 })).toEqual([0, 1]);
    expect(layersToKeep([])).toEqual([]);
  });
  it("refuses labels of other tokens", () => {
    on.scope(() => {
      expect(() => heat([[0], [1]], [0])).toThrow(
        "routingHeatMap: experts [2, 1] and labels [1]; expected i32 [tokens, k] and i32 [tokens]",
      );
      return undefined;
    });
  });
});
