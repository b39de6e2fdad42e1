import { autodiff, dispose, type Engine, engine, grad, sum, type Tensor, watch } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { ffn, moeLayer } from "@switchyard/core/moe";
import { generator, routerContext, routerInput, testRouter, uniform } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { baseFamily } from "../test/families/lookup.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type BaseOptions, base } from "./base.ts";

const gate = (weights: readonly number[]): boolean => weights.length === 1 && weights.every((w) => w > 0 && w < 1);
testRouter({ plugin: () => base(), weights: gate });
testRouter({ plugin: () => base({ exactUpTo: 0 }), weights: gate });

describe("base meets its vectors", () => {
  const { cases, tolerance } = readVectors("base");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(baseFamily, one, tolerance)).toEqual([]);
  });
});

describe("base", () => {
  const on = float64();
  const route = async (
    { training, mask, options = {} }: { training: boolean; mask?: readonly number[]; options?: BaseOptions },
    hidden: readonly (readonly number[])[],
    experts = 4,
  ): Promise<{ experts: number[]; weights: number[]; logits: number[] }> => {
    const [first] = hidden;
    const router = base(options).init(routerContext(on, { experts, width: first?.length ?? 0 }));
    const found = await results(on, () => {
      const call = { hidden: tensor(on, hidden), training, ...(mask ? { mask } : {}) };
      const routed = router.route(router.params, routerInput(on, call));
      return { experts: sparse(routed).experts, weights: sparse(routed).weights, logits: routed.logits as Tensor };
    });
    dispose(router.params);
    expect(on.live()).toBe(0);
    return { experts: flat(found.experts), weights: flat(found.weights), logits: flat(found.logits) };
  };
  const rows = (key: string, count: number): number[][] => {
    const { data } = uniform(generator(key), [count, 3], -1, 1);
    return Array.from({ length: count }, (_, t) => [...data.subarray(3 * t, 3 * t + 3)]);
  };
  const loads = (experts: readonly number[], count = 4): number[] =>
    Array.from({ length: count }, (_, e) => experts.filter((id) => id === e).length);

  it.each([12, 13, 15, 3, 1])("%i tokens in training: every expert gets the same, up to one", async (count) => {
    for (const options of [{}, { exactUpTo: 0 }]) {
      // Tokens that are all alike would all go to one expert in evaluation.
      const alike = rows("alike", count).map((row) => row.map((x) => 1 + x / 100));
      const { experts, weights, logits } = await route({ training: true, options }, alike);
      const load = loads(experts);
      expect(Math.max(...load) - Math.min(...load)).toBeLessThanOrEqual(1);
      expect(load.reduce((a, b) => a + b, 0)).toBe(count);
      weights.forEach((w, t) => {
        expect(w).toBeCloseTo(1 / (1 + Math.exp(-(logits[4 * t + (experts[t] ?? 0)] ?? 0))), 12);
      });
      expect(loads((await route({ training: false }, alike)).experts).filter((n) => n > 0).length).toBeLessThan(2);
    }
  });
  it("padding takes no place from real tokens", async () => {
    const all = rows("padded", 11);
    const mask = all.map((_, t) => Number(t % 3 !== 1)); // 7 real tokens
    const { experts, weights } = await route({ training: true, mask }, all);
    const real = (list: readonly number[]): number[] => list.filter((_, t) => mask[t] === 1);
    const alone = await route(
      { training: true },
      all.filter((_, t) => mask[t] === 1),
    );
    expect(real(experts)).toEqual(alone.experts);
    expect(real(weights)).toEqual(alone.weights);
    expect(experts.filter((_, t) => mask[t] === 0)).toEqual([-1, -1, -1, -1]);
  });
  it("looks at the whole batch in training, at each token alone in evaluation", async () => {
    const all = rows("batch", 8);
    const alone: number[] = [];
    for (const row of all) alone.push(...(await route({ training: false }, [row])).experts);
    expect((await route({ training: false }, all)).experts).toEqual(alone);
    expect((await route({ training: true }, all)).experts).not.toEqual(alone);
  });
  it("the gate gives a gradient, the assignment none", async () => {
    const router = base().init(routerContext(on, { experts: 2, width: 1 }));
    const slopes = on.scope(() => {
      const weight = tensor(on, [[1], [2]]);
      const watched = watch(autodiff(on), { weight });
      const { weights } = sparse(
        router.route(watched, routerInput(on, { hidden: tensor(on, [[1], [2]]), training: true })),
      );
      return grad(sum(weights), watched);
    });
    // Token 1 has more to lose and goes to expert 1: d sigmoid(2 * 2) * 2, and token 0: d sigmoid(1) * 1.
    const slope = (x: number): number => Math.exp(-x) / (1 + Math.exp(-x)) ** 2;
    const [first, second] = await slopes.weight.data();
    expect(first).toBeCloseTo(slope(1), 12);
    expect(second).toBeCloseTo(2 * slope(4), 12);
    dispose([router.params, slopes]);
  });
  it("is refused on a device that cannot block, with the reason", () => {
    const { downloadSync: _, ...backend } = cpu();
    const device: Engine = engine(backend);
    const make = (host: Engine) =>
      ffn({ count: 2, width: 3, hidden: 2, engine: host, random: routerContext(host).random });
    expect(() => moeLayer(base(), { engine: device, width: 3 }, { experts: make(device) })).toThrow(
      "router base: it needs results on the host inside a step, and cpu cannot block",
    );
  });
  it("refuses options that make no sense", () => {
    expect(() => base({ exactUpTo: 1.5 })).toThrow("exactUpTo = 1.5");
    expect(() => base({ precision: 0 })).toThrow("precision = 0");
    expect(base().options).toEqual({ exactUpTo: 512, precision: 1e-4 });
  });
});
