import { add, dispose, mul, random, type Tensor } from "@switchyard/core";
import { ffn, layerInput, layerParams, moe, moeLayer, type Pass, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { thorFamily } from "../test/families/ensemble.ts";
import { flat, float64, readVectors, results, slopes, sparse, tensor, unmet } from "../test/vectors.ts";
import { type ThorOptions, thor, thorConsistency, thorHook } from "./thor.ts";

const unlearned = {
  reason: "nothing is learned, so that no gradient is recorded",
  tests: ["gradients of weights and losses agree with central differences"],
};
const named = {
  reason: "experts are drawn by number, and there are no parameters to permute",
  tests: ["permuting the experts permutes the answer"],
};
testRouter({ plugin: () => thor(), weights: "sum to 1", skip: [unlearned, named] });
testRouter({ plugin: () => thor({ dispatch: "sequence", seed: 4 }), weights: "sum to 1", skip: [unlearned, named] });
testRouter({ plugin: () => thor({ evaluation: "ensemble" }), weights: "sum to 1", skip: [unlearned] });

describe("thor meets its vectors", () => {
  const { cases, tolerance } = readVectors("thor");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(thorFamily, one, tolerance)).toEqual([]);
  });
});

describe("thor", () => {
  const on = float64();
  const experts = 4;
  const route = async (
    options: ThorOptions,
    call: { batch?: number; tokens?: number; training?: boolean; seed?: number; layer?: number; past?: number } = {},
  ): Promise<number[]> => {
    const { batch = 2, tokens = 12, layer = 0, ...rest } = call;
    const router = thor(options).init(routerContext(on, { experts }));
    const { ids } = await results(on, () => {
      const hidden = on.tensor(new Float64Array(2 * tokens), [tokens, 2]);
      return { ids: sparse(router.route({}, { ...routerInput(on, { hidden, batch, ...rest }), layer })).experts };
    });
    expect(on.live()).toBe(0);
    return flat(ids);
  };

  it("training sends the whole batch to one expert, each in turn", async () => {
    const times = new Array<number>(experts).fill(0);
    for (let seed = 0; seed < 80; seed++) {
      const [first = -1, ...others] = await route({}, { training: true, seed });
      expect(others.every((e) => e === first)).toBe(true);
      times[first] = (times[first] ?? 0) + 1;
    }
    expect(Math.min(...times)).toBeGreaterThan(8);
    expect(times.reduce((a, b) => a + b)).toBe(80);
  });
  it("layers draw by themselves", async () => {
    const drawn = await Promise.all([0, 1, 2, 3, 4, 5].map((layer) => route({}, { training: true, layer })));
    expect(new Set(drawn.map(([e]) => e)).size).toBeGreaterThan(1);
  });
  it("dispatch draws for each token, evenly, by the seed", async () => {
    const ids = await route({}, { tokens: 2000 });
    for (let e = 0; e < experts; e++) {
      expect(ids.filter((id) => id === e).length).toBeGreaterThan(400);
    }
    expect(ids.slice(0, 1000)).not.toEqual(ids.slice(1000)); // rows of the batch differ
    expect(await route({}, { tokens: 2000 })).toEqual(ids);
    expect(await route({ seed: 1 }, { tokens: 2000 })).not.toEqual(ids);
    expect(await route({}, { tokens: 2000, layer: 1 })).not.toEqual(ids);
  });
  it("padding takes no place: a token draws by its number among the real ones, decoding with a cache too", async () => {
    const padded = async (call: { past?: number; mask: number[] }): Promise<number[][]> => {
      const router = thor().init(routerContext(on, { experts }));
      const { ids } = await results(on, () => {
        const rows = call.mask.length - 2 * (call.past ?? 0);
        const input = routerInput(on, { hidden: on.tensor(new Float64Array(2 * rows), [rows, 2]), batch: 2, ...call });
        return { ids: sparse(router.route({}, input)).experts };
      });
      const all = flat(ids);
      return [all.slice(0, all.length / 2), all.slice(all.length / 2)];
    };
    const ids = await route({}, { tokens: 12 });
    const alone = [ids.slice(0, 6), ids.slice(6)];
    expect(await padded({ mask: [0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0] })).toEqual([
      [-1, -1, ...(alone[0]?.slice(0, 4) ?? [])],
      [-1, ...(alone[1]?.slice(0, 4) ?? []), -1],
    ]);
    expect(await padded({ past: 4, mask: [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] })).toEqual([
      alone[0]?.slice(2, 4),
      alone[1]?.slice(4, 6),
    ]);
  });
  it("dispatch by sequence gives a sequence one expert, also when it goes on", async () => {
    const ids = await route({ dispatch: "sequence" }, { batch: 40, tokens: 120 });
    for (let row = 0; row < 40; row++) expect(new Set(ids.slice(3 * row, 3 * row + 3)).size).toBe(1);
    expect(new Set(ids).size).toBe(experts);
    const later = await route({ dispatch: "sequence" }, { batch: 40, tokens: 40, past: 3 });
    expect(later).toEqual(Array.from({ length: 40 }, (_, row) => ids[3 * row]));
  });
  it("the ensemble is the mean of the experts, the same as dispatching to each of them", async () => {
    const made = ffn({ count: 3, width: 2, hidden: 4, engine: on, random: random(on, 1) });
    const layer = moeLayer(thor({ evaluation: "ensemble" }), { engine: on, width: 2 }, { experts: made });
    const found = await results(on, () => {
      const x = tensor(on, [
        [1, -2],
        [0.5, 3],
      ]);
      const params = layerParams(layer);
      const each = [0, 1, 2].map((e) => {
        const plan = {
          kind: "sparse" as const,
          experts: on.tensor(Int32Array.of(e, e), [2, 1]),
          weights: tensor(on, [[1], [1]]),
        };
        const route = (): Routed => ({ plan, losses: {} });
        return moe({ ...layer, router: { ...layer.router, route } }, params, layerInput(layer, x)).output;
      });
      return {
        ensemble: moe(layer, params, layerInput(layer, x)).output,
        mean: mul(
          each.reduce((a, b) => add(a, b)),
          1 / 3,
        ),
      };
    });
    flat(found.mean).forEach((value, i) => {
      expect(flat(found.ensemble)[i]).toBeCloseTo(value, 12);
    });
    dispose(layerParams(layer));
  });
  it("refuses options that cannot be", () => {
    expect(() => thor({ evaluation: "mean" as "ensemble" })).toThrow('evaluation = "mean"; expected "dispatch" or');
    expect(() => thor({ dispatch: "word" as "token" })).toThrow('dispatch = "word"');
    expect(() => thor({ seed: 0.5 })).toThrow("seed = 0.5; expected a whole number");
  });
});

describe("thorHook", () => {
  const on = float64();
  const [a, b] = [
    [
      [1, 0, -1],
      [0.5, 2, 0],
      [3, -1, 1],
    ],
    [
      [0, 1, 0.5],
      [0.5, 2, 0],
      [-2, 0, 1],
    ],
  ];
  /** From the definition, in plain numbers. */
  const divergence = (row: number): number => {
    const p = (logits: readonly number[]): number[] => {
      const e = logits.map(Math.exp);
      const total = e.reduce((x, y) => x + y);
      return e.map((x) => x / total);
    };
    const [u, v] = [p(a[row] ?? []), p(b[row] ?? [])];
    const kl = (x: number[], y: number[]): number => x.reduce((sum, xi, i) => sum + xi * Math.log(xi / (y[i] ?? 0)), 0);
    return (kl(u, v) + kl(v, u)) / 2;
  };
  const combined = async (
    alpha: number,
    info: { labels?: readonly number[]; mask?: readonly number[] } = {},
  ): Promise<number> => {
    const { total } = await results(on, () => {
      const pass = (logits: readonly number[][], loss: number): Pass => ({
        loss: tensor(on, loss),
        logits: tensor(on, [logits]), // [1, 3, vocabulary]
        layers: [],
      });
      const { labels, mask } = info;
      const given = {
        step: 0,
        ...(labels ? { labels: on.tensor(Int32Array.from(labels), [1, 3]) } : {}),
        ...(mask ? { mask: tensor(on, [mask]) } : {}),
      };
      const value = thorHook({ alpha }).combine?.([pass(a, 1.5), pass(b, 2.25)], given);
      if (!value) throw new Error("the hook combines");
      return { total: value };
    });
    return flat(total)[0] ?? Number.NaN;
  };

  it("adds alpha times the mean over the counted tokens to both losses", async () => {
    const [d0, d1, d2] = [divergence(0), divergence(1), divergence(2)];
    expect(d0).toBeGreaterThan(0.1);
    expect(d1).toBe(0);
    expect(await combined(0)).toBe(3.75);
    expect(await combined(2)).toBeCloseTo(3.75 + (2 * (d0 + d1 + d2)) / 3, 12);
    expect(await combined(2, { mask: [1, 1, 0] })).toBeCloseTo(3.75 + (2 * (d0 + d1)) / 2, 12);
    expect(await combined(2, { labels: [-1, 0, 2] })).toBeCloseTo(3.75 + (2 * (d1 + d2)) / 2, 12);
    expect(await combined(2, { labels: [-1, 3, 2] })).toBeCloseTo(3.75 + 2 * d2, 12);
    expect(await combined(2, { labels: [-1, 0, 2], mask: [1, 1, 0] })).toBeCloseTo(3.75 + 2 * d1, 12);
    expect(await combined(2, { mask: [0, 0, 0] })).toBe(3.75);
  });
  it("the consistency has a gradient to both passes, none where a token is not counted", async () => {
    const mask = (): Tensor => tensor(on, [1, 1, 0]);
    const first = flat(await slopes(on, a, (x) => thorConsistency(x, tensor(on, b), mask()).mean));
    const second = flat(await slopes(on, b, (x) => thorConsistency(tensor(on, a), x, mask()).mean));
    for (const slope of [first, second]) {
      expect(slope.slice(0, 3).every((value) => Math.abs(value) > 1e-3)).toBe(true);
      expect(slope.slice(6).map(Math.abs)).toEqual([0, 0, 0]);
    }
  });
  it("compares two passes, of equal shape", () => {
    const hook = thorHook();
    expect(hook.passes).toBe(2);
    on.scope(() => {
      const pass = { loss: tensor(on, 1), logits: tensor(on, a), layers: [] };
      expect(() => hook.combine?.([pass, pass, pass], { step: 0 })).toThrow(
        "compares two passes of a batch, there are 3",
      );
      expect(() => hook.combine?.([pass], { step: 0 })).toThrow("there are 1");
      expect(() => thorConsistency(tensor(on, a), tensor(on, [[1, 2, 3]]))).toThrow("expected two of equal shape");
      expect(() => thorConsistency(tensor(on, a), tensor(on, b), tensor(on, [1, 1]))).toThrow("mask [2]");
      return undefined;
    });
    expect(() => thorHook({ alpha: -1 })).toThrow("alpha = -1");
  });
});
