import { dispose, type Tensor, type Tree } from "@switchyard/core";
import type { Routed, RouterInput, StepStatistics } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { foundingFamilies } from "../test/families/founding.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type ExpertRaceOptions, expertRace } from "./expert-race.ts";
import { leaf } from "./parts.ts";
import { compete, type RaceStrategy } from "./race-parts.ts";

// Losses large enough for their gradients to show.
const loud = { similarity: 0.5, balance: 0.5 };
testRouter({ plugin: ({ k = 2 }) => expertRace({ k, ...loud }), weights: "any" });
testRouter({ plugin: ({ k = 2 }) => expertRace({ k, training: "threshold", tau: 0.2, ...loud }), weights: "any" });
testRouter({
  plugin: ({ k = 2 }) => expertRace({ k, strategy: "token", gate: "softmax" }),
  weights: "sum to at most 1",
});
testRouter({
  plugin: ({ k = 2 }) =>
    expertRace({ k, strategy: "bl", uneven: "floor", gate: "sigmoid", router: "linear", tau: 0.6 }),
  weights: "not negative",
});
testRouter({ plugin: ({ k = 2 }) => expertRace({ k, strategy: "expert", uneven: "floor" }), weights: "any" });
testRouter({ plugin: ({ k = 2 }) => expertRace({ k, strategy: "be", evaluation: "compete" }), weights: "any" });
testRouter({
  plugin: ({ k = 2 }) => expertRace({ k, strategy: "le", target: 3, perLayer: 1 }),
  weights: "any",
  input: ({ hidden }) => {
    const tokens = hidden.shape[0] ?? 0;
    return {
      target: hidden.engine.root.tensor(
        Float64Array.from({ length: tokens * 3 }, (_, i) => Math.sin(i)),
        [tokens, 3],
      ),
    };
  },
});

describe("expertRace meets its vectors", () => {
  const { family, cases, tolerance } = readVectors("main-expert-race");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(foundingFamilies, family), one, tolerance)).toEqual([]);
  });
});

const on = float64();
const draws = (tokens: number, experts: number, seed: number): number[][] => {
  let state = seed;
  const next = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.round((state / 2 ** 32) * 8 - 4) / 2; // coarse, so that there are ties
  };
  return Array.from({ length: tokens }, () => Array.from({ length: experts }, next));
};

describe("the competition", () => {
  /** The rule in loops: the entries of each group, in order, of which the best are kept. */
  function oracle(
    logits: number[][],
    { batch, sequence, real }: { batch: number; sequence: number; real: readonly number[] },
    { strategy, k }: { strategy: RaceStrategy; k: number },
  ): number[] {
    const experts = logits[0]?.length ?? 0;
    const names: Record<RaceStrategy, (b: number, l: number, e: number) => string> = {
      token: (b, l) => `${b} ${l}`,
      expert: (b, _, e) => `${b} ${e}`,
      bl: (_, __, e) => `${e}`,
      be: (_, l) => `${l}`,
      le: (b) => `${b}`,
      race: () => "",
    };
    const groups = new Map<string, { at: number; value: number }[]>();
    // Inside a group the first of equals is the one with the lower batch row, position, expert, in this order.
    for (let b = 0; b < batch; b++)
      for (let l = 0; l < sequence; l++)
        for (let e = 0; e < experts; e++) {
          const token = b * sequence + l;
          if (real[token] !== 1) continue;
          const name = names[strategy](b, l, e);
          groups.set(name, [...(groups.get(name) ?? []), { at: token * experts + e, value: logits[token]?.[e] ?? 0 }]);
        }
    const won = new Array<number>(batch * sequence * experts).fill(0);
    for (const entries of groups.values()) {
      const places = Math.floor((k * entries.length) / experts);
      for (const { at } of entries.sort((a, b) => b.value - a.value || a.at - b.at).slice(0, places)) won[at] = 1;
    }
    return won;
  }
  const strategies = ["race", "token", "expert", "bl", "be", "le"] as const;

  it.each(strategies)("%s keeps the best of each group, ties in order, padding left out", async (strategy) => {
    for (const [batch, sequence, experts, k] of [
      [2, 6, 3, 1],
      [3, 5, 5, 2],
      [1, 1, 4, 4],
      [4, 1, 2, 1],
      [1, 7, 1, 1],
    ] as const)
      for (const holes of [0, 3]) {
        const tokens = batch * sequence;
        const logits = draws(tokens, experts, tokens * 10 + experts);
        const real = Array.from({ length: tokens }, (_, t) => Number(holes === 0 || t % holes !== 1));
        const { chosen } = await results(on, () => {
          const mask = tensor(
            on,
            Array.from({ length: batch }, (_, b) => real.slice(b * sequence, (b + 1) * sequence)),
          );
          const layout = { batch, sequence, past: 0, ...(holes === 0 ? {} : { mask }) };
          return { chosen: compete(tensor(on, logits), layout, { strategy, k, uneven: "floor" }).chosen };
        });
        expect(flat(chosen)).toEqual(oracle(logits, { batch, sequence, real }, { strategy, k }));
      }
  });
  it("groups without a whole number of places are refused", () => {
    on.scope(() => {
      const layout = { batch: 1, sequence: 7, past: 0 };
      expect(() => compete(tensor(on, draws(7, 5, 1)), layout, { strategy: "bl", k: 2, uneven: "refuse" })).toThrow(
        '7 entries at k = 2 of 5 experts make 2.8 places per group of strategy "bl"',
      );
      return undefined;
    });
  });
});

describe("expertRace", () => {
  const make = (options: Partial<ExpertRaceOptions> = {}, experts = 4): ReturnType<typeof build> =>
    build(options, experts);
  const build = (options: Partial<ExpertRaceOptions>, experts: number) => {
    const router = expertRace({ k: 2, ...options }).init(routerContext(on, { experts }));
    const route = (logits: Values, input: Partial<RouterInput> = {}): Routed => {
      const x = tensor(on, logits);
      const hidden = on.tensor(new Float64Array(x.shape[0] ?? 0), [x.shape[0] ?? 0, 1]);
      return router.select?.(x, { ...routerInput(on, { hidden, buffers: router.buffers }), ...input }) as Routed;
    };
    return { router, route };
  };
  const planOf = async (f: () => Routed): Promise<{ ids: number[][]; weights: number[][] }> => {
    const { ids, weights } = await results(on, () => {
      const plan = sparse(f());
      return { ids: plan.experts, weights: plan.weights };
    });
    return { ids: (ids as readonly Values[]).map(flat), weights: (weights as readonly Values[]).map(flat) };
  };
  const statistics = (kth: number[], races: number[], tokens = 8): StepStatistics => ({
    step: 0,
    tokens,
    load: new Float64Array(4),
    metrics: { kth: Float64Array.from(kth), races: Float64Array.from(races) },
  });
  const buffer = async (tree: Tree, name: string): Promise<number[]> => {
    const { x } = await results(on, () => ({ x: leaf(tree, name) }));
    return flat(x);
  };
  const logits = [
    [3, 2.5, 2, 1],
    [-1, -2, -3, -4],
    [0.5, -0.5, -1.5, -2.5],
  ];

  it("hard tokens win more experts, and the plan says how many rows there are at most", async () => {
    const { route } = make();
    const { ids, weights } = await planOf(() => route(logits, { training: true }));
    expect(ids).toEqual([
      [0, 1, 2, 3],
      [-1, -1, -1, -1],
      [0, 1, -1, -1],
    ]);
    // The raw logit is the weight, negative ones too.
    expect(weights[2]).toEqual([0.5, -0.5, 0, 0]);
    on.scope(() => {
      const { plan } = route(logits, { training: true });
      expect(plan.kind === "sparse" && plan.bound).toBe(6);
      // A threshold promises nothing about their number.
      const evaluated = route(logits).plan;
      expect("bound" in evaluated).toBe(false);
      return undefined;
    });
  });
  it("takes each token's k best until a threshold is known, then those that reach it", async () => {
    const { router, route } = make({ momentum: 0.9 });
    expect((await planOf(() => route(logits))).ids).toEqual([
      [0, 1, -1, -1],
      [0, 1, -1, -1],
      [0, 1, -1, -1],
    ]);
    const first = router.afterStep?.([statistics([0.5], [1])], router.buffers) as Tree;
    const next = router.afterStep?.([statistics([3], [2])], first) as Tree;
    expect((await planOf(() => route(logits, { buffers: first }))).ids).toEqual([
      [0, 1, 2, 3],
      [-1, -1, -1, -1],
      [0, -1, -1, -1],
    ]);
    expect(await buffer(next, "tau")).toEqual([0.9 * 0.5 + 0.1 * 1.5].map((x) => expect.closeTo(x, 12)));
    expect(await buffer(first, "tau")).toEqual([0.5]);
  });
  it("on fresh batches the threshold keeps the budget within 5 %", async () => {
    const { router, route } = make({ momentum: 0.9 });
    const batch = (seed: number): number[][] => {
      const noise = draws(256, 4, seed).map((row, t) => row.map((x, e) => x + Math.sin(t * 4 + e + seed)));
      return noise;
    };
    let { buffers } = router;
    for (let step = 0; step < 30; step++) {
      const { kth, races } = await results(on, () => {
        const { metrics } = route(batch(step + 1), { training: true, buffers });
        return { kth: metrics?.kth as Tensor, races: metrics?.races as Tensor };
      });
      buffers = router.afterStep?.([statistics(flat(kth), flat(races))], buffers) as Tree;
    }
    const { ids } = await planOf(() => route(batch(1000), { buffers }));
    const perToken = ids.flat().filter((e) => e >= 0).length / 256;
    expect(Math.abs(perToken - 2)).toBeLessThan(0.1);
  });
  it("where experts choose, each has its own threshold", async () => {
    const { router, route } = make({ strategy: "bl", uneven: "floor" });
    const { kth, races } = await results(on, () => {
      const { metrics } = route(logits.concat([[0, 0, 0, 0]]), { training: true });
      return { kth: metrics?.kth as Tensor, races: metrics?.races as Tensor };
    });
    // The second best of each column.
    expect(kth).toEqual([0.5, 0, 0, 0]);
    expect(races).toEqual([1, 1, 1, 1]);
    const next = router.afterStep?.([statistics([0.5, 0, -1, -2], [1, 1, 1, 1])], router.buffers) as Tree;
    expect(await planOf(() => route([[0.4, 0.4, -0.9, -2.1]], { buffers: next }))).toEqual({
      ids: [[-1, 1, 2, -1]],
      weights: [[0, 0.4, -0.9, 0]],
    });
  });
  it("a step without tokens, or without a place, leaves the threshold alone", () => {
    const { router } = make();
    expect(router.afterStep?.([statistics([1], [1], 0)], router.buffers)).toBe(router.buffers);
    expect(router.afterStep?.([statistics([0], [0])], router.buffers)).toBe(router.buffers);
    expect(() => router.afterStep?.([], router.buffers)).toThrow("statistics of 0 layers for the router of layer 0");
  });
  it("softmax gates compete by probability, or by logit when asked", async () => {
    const two = [
      [4, 3.9, 3.8, 3.7],
      [2, -5, -5, -5],
    ];
    const chosen = async (compare: "gates" | "logits"): Promise<number[][]> =>
      (await planOf(() => make({ k: 1, gate: "softmax", compare }).route(two, { training: true }))).ids;
    expect(await chosen("logits")).toEqual([
      [0, 1, -1, -1],
      [-1, -1, -1, -1],
    ]);
    expect(await chosen("gates")).toEqual([
      [0, -1, -1, -1],
      [0, -1, -1, -1],
    ]);
  });
  it("says when it is causal", () => {
    const causal = (options: Partial<ExpertRaceOptions>) => expertRace({ k: 1, ...options }).causal;
    expect(causal({})).toEqual({ training: false, evaluation: true });
    expect(causal({ training: "threshold" })).toEqual({ training: true, evaluation: true });
    expect(causal({ evaluation: "compete" })).toEqual({ training: false, evaluation: false });
    expect(causal({ strategy: "token", evaluation: "compete" })).toEqual({ training: true, evaluation: true });
    expect(expertRace({ k: 1, target: 4 }).needs).toEqual(["target"]);
  });
  it("refuses to let new tokens compete with cached ones", () => {
    const { route } = make({ evaluation: "compete" });
    on.scope(() => {
      expect(() => route(logits, { layout: { batch: 3, sequence: 1, past: 2 } })).toThrow(
        'asked to route 3 new tokens after 2 cached ones by strategy "race"',
      );
      return undefined;
    });
  });
  it("without the target it learns to predict it says so", () => {
    const router = expertRace({ k: 1, target: 2 }).init(routerContext(on, { experts: 3, width: 2 }));
    expect(router.score).toBeUndefined();
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, [[1, 2]]), training: true, buffers: router.buffers });
      expect(() => router.route(router.params, input)).toThrow("needs the training target [1, 2], found none");
      return undefined;
    });
    dispose([router.params, router.buffers]);
  });
  it("tokens that choose for themselves keep no threshold", () => {
    const { router } = make({ strategy: "token" });
    expect(router.buffers).toEqual({});
    expect(router.afterStep).toBeUndefined();
  });
  it("the similarity loss of uniform scores is 1, and is not there in evaluation", async () => {
    const even = Array.from({ length: 4 }, () => [1, 1, 1, 1]);
    const { value } = await results(on, () => ({
      value: make().route(even, { training: true }).losses.similarity?.value as Tensor,
    }));
    expect(flat(value)[0]).toBeCloseTo(1, 12);
    on.scope(() => {
      expect(make().route(even).losses).toEqual({});
      expect(make({ similarity: 0 }).route(even, { training: true }).losses).toEqual({});
      return undefined;
    });
  });
  it("refuses options that cannot be", () => {
    expect(() => expertRace({ k: 1, momentum: 2 })).toThrow("momentum = 2; expected 0 to 1");
    expect(() => expertRace({ k: 1, tau: Number.NaN })).toThrow("tau = NaN; expected a finite number");
    expect(() => expertRace({ k: 1, target: 1.5 })).toThrow("target = 1.5; expected a whole number");
    expect(() => expertRace({ k: 1, strategy: "all" as "race" })).toThrow('strategy = "all"; expected "token" or');
    expect(() => make({ k: 5 })).toThrow("expertRace: k = 5 of 4 experts");
  });
});
