import { dispose, type Tensor } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { fixedNormal, noisyTopKFamily } from "../test/families/classic.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { expectedLoad, type NoisyTopKOptions, noisyTopK } from "./noisy-top-k.ts";

testRouter({ plugin: ({ k = 2 }) => noisyTopK({ k, start: "normal" }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 3 }) => noisyTopK({ k, sampleVariance: true, importance: 0.5 }),
  weights: "sum to 1",
  skip: [
    {
      reason: "with weights of zero every expert ties in evaluation, and ties go by number",
      tests: ["permuting the experts permutes the answer"],
    },
  ],
});

describe("noisyTopK meets its vectors", () => {
  const { cases, tolerance } = readVectors("noisy-topk");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(noisyTopKFamily, one, tolerance)).toEqual([]);
  });
});

describe("noisyTopK", () => {
  it("the expected load is the chance of being chosen again, by drawing the noise of one expert many times", async () => {
    const on = float64();
    const [clean, deviation, noise] = [
      [0.5, 0.2, -0.3, 0.1],
      [0.4, 0.9, 0.6, 0.3],
      [0.1, -0.2, 0.9, 0.4],
    ];
    const noisy = clean.map((c, e) => c + (noise[e] ?? 0) * (deviation[e] ?? 0));
    for (const k of [1, 2, 3]) {
      const { load } = await results(on, () => ({
        load: expectedLoad({
          clean: tensor(on, [clean]),
          noisy: tensor(on, [noisy]),
          deviation: tensor(on, [deviation]),
          k,
        }),
      }));
      const draws = routerContext(on).random.at("monte carlo").host("normal", 20000);
      for (let e = 0; e < 4; e++) {
        const others = noisy.filter((_, i) => i !== e).sort((a, b) => b - a);
        const bar = others[k - 1] ?? Number.NaN;
        const share = draws.filter((z) => (clean[e] ?? 0) + z * (deviation[e] ?? 0) > bar).length / draws.length;
        expect(Math.abs((flat(load)[e] ?? Number.NaN) - share)).toBeLessThan(0.015);
      }
    }
  });

  /** Losses in training and choices of one router with given logits: width = experts, weight = identity. */
  async function run(
    options: NoisyTopKOptions,
    rows: readonly (readonly number[])[],
    { training = true, mask }: { readonly training?: boolean; readonly mask?: readonly number[] } = {},
  ): Promise<{ ids: number[]; losses: Record<string, number> }> {
    const on = float64();
    const experts = rows[0]?.length ?? 0;
    const router = noisyTopK({ start: "normal", ...options }).init(routerContext(on, { experts, width: experts }));
    dispose(router.params);
    const names: string[] = [];
    const found = await results(on, (): Record<string, Tensor> => {
      const identity = Array.from({ length: experts }, (_, i) =>
        Array.from({ length: experts }, (__, j) => +(i === j)),
      );
      const params = {
        weight: tensor(on, identity),
        noise: tensor(
          on,
          identity.map((row) => row.map(() => 0)),
        ),
      };
      const routed = router.route(params, {
        ...routerInput(on, { hidden: tensor(on, rows), training, ...(mask ? { mask } : {}) }),
        // Without noise, so that the answer can be told by hand.
        random: fixedNormal(() =>
          tensor(
            on,
            rows.map((row) => row.map(() => 0)),
          ),
        ),
      });
      names.push(...Object.keys(routed.losses));
      return {
        ids: sparse(routed).experts,
        ...Object.fromEntries(Object.entries(routed.losses).map(([name, { value }]) => [name, value])),
      };
    });
    expect(on.live()).toBe(0);
    const losses = Object.fromEntries(names.map((name) => [name, flat(found[name] ?? [])[0] ?? Number.NaN]));
    return { ids: flat(found.ids ?? []), losses };
  }

  it("even routing costs nothing, uneven routing does, and padding is not counted", async () => {
    const even = [
      [1, 0],
      [0, 1],
    ];
    expect((await run({ k: 1 }, even)).losses).toEqual({
      importance: 0,
      load: expect.closeTo(0, 12),
    });
    const uneven = await run({ k: 1 }, [
      [1, 0],
      [1, 0],
    ]);
    expect(uneven.losses.importance).toBeCloseTo(1, 8);
    expect(uneven.losses.load).toBeGreaterThan(0.1);
    const padded = [...even, [9, 0], [9, 0]];
    expect((await run({ k: 1 }, padded, { mask: [1, 1, 0, 0] })).losses).toEqual({
      importance: 0,
      load: expect.closeTo(0, 12),
    });
  });
  it("with all experts per token the loads are even", async () => {
    const { losses } = await run({ k: 2 }, [
      [3, 0],
      [2, 1],
    ]);
    expect(losses.load).toBe(0);
    expect(losses.importance).toBeGreaterThan(0.1);
  });
  it("has losses in training only, and none whose weight is 0", async () => {
    const rows = [[1, 2, 3]];
    expect(Object.keys((await run({ k: 1 }, rows)).losses)).toEqual(["importance", "load"]);
    expect(Object.keys((await run({ k: 1, load: 0 }, rows)).losses)).toEqual(["importance"]);
    expect(Object.keys((await run({ k: 1, importance: 0 }, rows)).losses)).toEqual(["load"]);
    expect(Object.keys((await run({ k: 1 }, rows, { training: false })).losses)).toEqual([]);
  });
  it("starts with weights of zero: noise spreads the tokens in training, the first experts get them in evaluation", async () => {
    const on = float64();
    const router = noisyTopK({ k: 1 }).init(routerContext(on, { experts: 4 }));
    const hidden = Array.from({ length: 40 }, (_, i) => [1, i, 0, -i, 2, 1]);
    const { trained, evaluated } = await results(on, () => {
      const ids = (training: boolean): Tensor =>
        sparse(router.route(router.params, routerInput(on, { hidden: tensor(on, hidden), training }))).experts;
      return { trained: ids(true), evaluated: ids(false) };
    });
    expect(new Set(flat(trained)).size).toBe(4);
    expect(new Set(flat(evaluated))).toEqual(new Set([0]));
    dispose(router.params);
    expect(on.live()).toBe(0);
  });
  it("ties go to the lower expert", async () => {
    const { ids } = await run({ k: 2 }, [[1, 3, 3, 3]], { training: false });
    expect(ids).toEqual([1, 2]);
  });
  it("refuses options that cannot be", () => {
    expect(() => noisyTopK({ k: 3 }).init(routerContext(float64(), { experts: 2 }))).toThrow(
      "noisyTopK: k = 3 of 2 experts; expected a whole number from 1 to 2",
    );
    expect(() => noisyTopK({ k: 2, noiseFloor: 0 })).toThrow("noiseFloor = 0; expected a number above 0");
    expect(() => noisyTopK({ k: 2, load: -1 })).toThrow("load = -1");
    // As a command line would give it.
    expect(() => noisyTopK(JSON.parse('{ "k": 2, "start": "one" }'))).toThrow(
      'start = "one"; expected "zero" or "normal"',
    );
  });
});
