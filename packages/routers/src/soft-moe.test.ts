import {
  autodiff,
  dispose,
  grad,
  leaves,
  mapTree,
  mul,
  random,
  square,
  sub,
  sum,
  type Tensor,
  watch,
} from "@switchyard/core";
import { ffn, layerInput, layerParams, moe, moeLayer } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { softMoEFamily } from "../test/families/field.ts";
import { flat, float64, readVectors, results, tensor, unmet } from "../test/vectors.ts";
import { type SoftMoEOptions, softMoE } from "./soft-moe.ts";

testRouter({ plugin: () => softMoE(), weights: "sum to 1" });
testRouter({ plugin: () => softMoE({ slots: 3, normalise: false }), weights: "sum to 1" });

describe("softMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("soft-moe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(softMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("softMoE", () => {
  const on = float64();
  const rows = [
    [1, 0.5],
    [-1, 2],
    [0.3, -0.7],
    [2, 1],
  ];
  /** Dispatch and combine as [batch * sequence][experts * slots]. */
  const route = async (
    options: SoftMoEOptions,
    { x = rows, batch = 1, mask }: { x?: number[][]; batch?: number; mask?: number[] } = {},
  ): Promise<{ dispatch: number[]; combine: number[] }> => {
    const router = softMoE(options).init(routerContext(on, { experts: 3, width: 2 }));
    const found = await results(on, () => {
      const input = routerInput(on, { hidden: tensor(on, x), batch, ...(mask ? { mask } : {}) });
      const { plan } = router.route(router.params, input);
      if (plan.kind !== "slots") throw new Error(`found a plan of kind ${plan.kind}`);
      return { dispatch: plan.dispatch, combine: plan.combine };
    });
    dispose(router.params);
    return { dispatch: flat(found.dispatch), combine: flat(found.combine) };
  };
  const close = (a: readonly number[], b: readonly number[]): void => {
    expect(a).toHaveLength(b.length);
    a.forEach((value, i) => {
      expect(value).toBeCloseTo(b[i] ?? Number.NaN, 12);
    });
  };

  it("every slot is a mean of tokens, every token a mean of slots", async () => {
    const { dispatch, combine } = await route({ slots: 2 });
    for (let slot = 0; slot < 6; slot++) {
      const column = [0, 1, 2, 3].map((token) => dispatch[token * 6 + slot] ?? 0);
      expect(column.reduce((a, b) => a + b)).toBeCloseTo(1, 12);
    }
    for (let token = 0; token < 4; token++)
      expect(combine.slice(token * 6, token * 6 + 6).reduce((a, b) => a + b)).toBeCloseTo(1, 12);
  });
  it("samples do not see each other", async () => {
    const both = await route({ slots: 2 }, { batch: 2 });
    const [one, two] = [
      await route({ slots: 2 }, { x: rows.slice(0, 2) }),
      await route({ slots: 2 }, { x: rows.slice(2) }),
    ];
    close(both.dispatch, [...one.dispatch, ...two.dispatch]);
    close(both.combine, [...one.combine, ...two.combine]);
  });
  it("padding enters no slot", async () => {
    const { dispatch, combine } = await route({ slots: 2 }, { mask: [1, 1, 1, 0] });
    const alone = await route({ slots: 2 }, { x: rows.slice(0, 3) });
    close(dispatch, [...alone.dispatch, 0, 0, 0, 0, 0, 0]);
    close(combine, [...alone.combine, 0, 0, 0, 0, 0, 0]);
  });
  it("normalised, the length of the tokens does not count", async () => {
    const long = rows.map((row) => row.map((value) => 1e4 * value));
    const longer = rows.map((row) => row.map((value) => 1e5 * value));
    close((await route({}, { x: long })).dispatch, (await route({}, { x: longer })).dispatch);
    const [a, b] = [await route({ normalise: false }, { x: rows }), await route({ normalise: false }, { x: long })];
    expect(Math.abs((a.dispatch[0] ?? 0) - (b.dispatch[0] ?? 0))).toBeGreaterThan(0.01);
  });
  it("learns: a gradient step on a layer lowers its loss", async () => {
    const experts = ffn({ count: 3, width: 2, hidden: 4, engine: on, random: random(on, 1) });
    const layer = moeLayer(softMoE({ slots: 2 }), { engine: on, width: 2 }, { experts });
    const loss = (params: ReturnType<typeof layerParams>): Tensor => {
      const { output } = moe(layer, params, layerInput(layer, tensor(on, rows)));
      return sum(square(sub(output, tensor(on, [...rows].reverse()))));
    };
    const found = await results(on, () => {
      const params = watch(autodiff(on), layerParams(layer));
      const slopes = new Map(leaves(grad(loss(params), params)));
      const moved = mapTree(layerParams(layer), (x, path) => sub(x, mul(slopes.get(path) as Tensor, 0.01)));
      return { before: loss(layerParams(layer)), after: loss(moved) };
    });
    expect(flat(found.after)[0]).toBeLessThan(0.99 * (flat(found.before)[0] ?? 0));
    dispose(layerParams(layer));
  });
  it("refuses to decode with a cache, unless asked, and rows of several samples", () => {
    const router = softMoE().init(routerContext(on, { experts: 3, width: 2 }));
    const asked = softMoE({ decoding: true }).init(routerContext(on, { experts: 3, width: 2 }));
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, [[1, 2]]), past: 3 });
      expect(() => router.route(router.params, input)).toThrow(/1 new tokens after 3 cached ones.*decoding: true/);
      expect(() => asked.route(asked.params, input)).not.toThrow();
      const several = routerInput(on, { hidden: tensor(on, rows) });
      const samples = on.tensor(Int32Array.of(0, 0, 1, 1), [4]);
      const layout = { ...several.layout, samples };
      expect(() => router.route(router.params, { ...several, layout })).toThrow("put one sample into each row");
      return undefined;
    });
    dispose([router.params, asked.params]);
  });
  it("refuses options that cannot be", () => {
    expect(() => softMoE({ slots: 0 })).toThrow("softMoE: slots = 0; expected a whole number from 1");
    expect(() => softMoE({ scale: Number.NaN })).toThrow("scale = NaN; expected a finite number other than 0");
  });
});
