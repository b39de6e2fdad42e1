// The wrappers of @switchyard/core/wrappers around real routers: each over the shared suite, what they change and what they leave alone, their
// order, and every combination that makes no sense.
import { dispose, engine, random, type Tensor, UnsupportedError } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { glu, layerInput, layerParams, moe, moeLayer, type Routed, type RouterPlugin } from "@switchyard/core/moe";
import {
  withBalanceLoss,
  withCapacity,
  withJitter,
  withNoise,
  withNullExperts,
  withSharedExperts,
  withZLoss,
} from "@switchyard/core/wrappers";
import { generator, type RouterCall, routerContext, routerInput, testRouter, uniform } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import * as all from "../src/index.ts";
import {
  adaMoE,
  deepSeekV3,
  expertChoice,
  expertRace,
  expressiveGates,
  grin,
  hash,
  noisyTopK,
  reMoE,
  similarityAware,
  sinkhorn,
  softMoE,
  switchRouter,
  topK,
  topP,
} from "../src/index.ts";

const bare = (k = 2): RouterPlugin => topK({ k, balance: 0, zLoss: 0 });
const float64 = cpu({ precision: 64 });

// ---------------------------------------------------------------- the shared suite
testRouter({ plugin: ({ k = 2 }) => withCapacity(topK({ k }), { factor: 0.5 }), weights: "sum to at most 1" });
testRouter({
  plugin: ({ k = 2 }) => withCapacity(topK({ k }), { factor: 0.5, policy: "probability" }),
  weights: "sum to 1",
});
testRouter({ plugin: ({ k = 2 }) => withCapacity(topK({ k }), { policy: "choice", minimum: 1 }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => withJitter(topK({ k }), { amount: 0.2 }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => withJitter(similarityAware({ k })), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => withNoise(topK({ k }), { deviation: 0.5 }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => withNoise(sinkhorn({ k })), weights: "sum to at most 1" });
testRouter({ plugin: () => withNoise(softMoE({ slots: 2 }), { deviation: 0.1 }), weights: "not negative" });
// Null experts three at rho 5/8: eight columns, no other size of the suite.
testRouter({ plugin: ({ k = 2 }) => withNullExperts(topK({ k }), { rho: 0.625 }), weights: "any" });
testRouter({
  plugin: ({ k = 2 }) => withNullExperts(deepSeekV3({ k, rate: 0.1 }), { rho: 0.625, renormalise: false }),
  weights: "any",
});
testRouter({ plugin: ({ k = 2 }) => withBalanceLoss(bare(k), { balance: 0.5 }), weights: "sum to 1" });
testRouter({ plugin: () => withZLoss(expertChoice(), { zLoss: 0.1 }), weights: "not negative" });
testRouter({ plugin: ({ k = 2 }) => withSharedExperts(topK({ k }), { count: 2 }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) =>
    withSharedExperts(
      withCapacity(withZLoss(withBalanceLoss(withNullExperts(withNoise(withJitter(bare(k)))))), { factor: 0.7 }),
    ),
  weights: "any",
});

// ---------------------------------------------------------------- what they do
const tokens = 12;
const context = { experts: 4, width: 6 };

/** Routes 12 tokens, and reads what is named. */
async function decide(
  plugin: RouterPlugin,
  look: (routed: Routed) => readonly (Tensor | undefined)[],
  call: Partial<RouterCall> = {},
): Promise<number[][]> {
  const on = engine(float64);
  const router = plugin.init(routerContext(on, context));
  const hidden = uniform(generator("wrappers"), [tokens, context.width], -2, 2);
  const found = on.scope(() =>
    look(router.route(router.params, routerInput(on, { hidden, buffers: router.buffers, experts: 4, ...call }))),
  );
  const read = await Promise.all(found.map(async (x) => (x ? [...(await x.data())] : [])));
  return read;
}
const plan = ({ plan }: Routed): Tensor[] => {
  if (plan.kind !== "sparse") throw new Error(`a ${plan.kind} plan`);
  return [plan.experts, plan.weights];
};
const everything = (routed: Routed): (Tensor | undefined)[] => [
  ...plan(routed),
  routed.logits,
  routed.probabilities,
  ...Object.values(routed.losses).map(({ value }) => value),
];
const training = { training: true };

describe("withCapacity", () => {
  it("of infinity drops nothing, and changes nothing", async () => {
    const open = withCapacity(topK({ k: 2 }), { factor: Number.POSITIVE_INFINITY });
    for (const call of [training, {}]) {
      expect(await decide(open, everything, call)).toEqual(await decide(topK({ k: 2 }), everything, call));
    }
    expect(open.options).toMatchObject({ factor: null, evaluation: null });
    expect(open.gives).toContain("choices");
  });
  it("leaves no expert more than its places, counts what is dropped, and does so only where asked", async () => {
    const limited = withCapacity(topK({ k: 2 }), { factor: 0.5 });
    const [ids = [], dropped = []] = await decide(limited, (r) => [plan(r)[0], r.metrics?.dropped], training);
    const [before = []] = await decide(topK({ k: 2 }), plan, training);
    const places = Math.ceil((0.5 * tokens * 2) / 4);
    const loads = (x: number[]): number[] => [0, 1, 2, 3].map((e) => x.filter((id) => id === e).length);
    expect(loads(ids)).toEqual(loads(before).map((n) => Math.min(n, places)));
    expect(dropped[0]).toBeCloseTo(1 - ids.filter((id) => id >= 0).length / before.length, 12);
    expect(dropped[0]).toBeGreaterThan(0);
    expect(await decide(limited, everything)).toEqual(await decide(topK({ k: 2 }), everything));
    const both = withCapacity(topK({ k: 2 }), { factor: 0.5, evaluation: 0.5 });
    expect((await decide(both, (r) => [r.metrics?.dropped]))[0]).toEqual(dropped);
  });
  it("is as causal as its policy", () => {
    const causal = (options: object): object => withCapacity(topK({ k: 2 }), options).causal;
    expect(causal({})).toEqual({ training: true, evaluation: true });
    expect(causal({ policy: "probability" })).toEqual({ training: false, evaluation: true });
    expect(causal({ policy: "choice", evaluation: 2 })).toEqual({ training: false, evaluation: false });
    expect(causal({ policy: "choice", factor: Number.POSITIVE_INFINITY })).toEqual({
      training: true,
      evaluation: true,
    });
    expect(withCapacity(sinkhorn({ k: 1 })).causal).toEqual({ training: false, evaluation: true });
  });
  it("in another adds up what both have dropped", async () => {
    const twice = withCapacity(withCapacity(topK({ k: 2 }), { factor: 0.8 }), { factor: 0.4 });
    const [ids = [], dropped = []] = await decide(twice, (r) => [plan(r)[0], r.metrics?.dropped], training);
    expect(dropped[0]).toBeCloseTo(ids.filter((id) => id < 0).length / ids.length, 12);
  });
});

describe("noise and jitter", () => {
  it.each([withNoise(topK({ k: 2 }), { deviation: 1 }), withJitter(topK({ k: 2 }), { amount: 0.9 })])(
    "$name: changes training by the seed, and nothing in evaluation",
    async (plugin) => {
      const plain = await decide(topK({ k: 2 }), everything);
      expect(await decide(plugin, everything)).toEqual(plain);
      const noisy = await decide(plugin, everything, { ...training, seed: 5 });
      expect(noisy).not.toEqual(await decide(topK({ k: 2 }), everything, { ...training, seed: 5 }));
      expect(noisy).toEqual(await decide(plugin, everything, { ...training, seed: 5 }));
      expect(noisy).not.toEqual(await decide(plugin, everything, { ...training, seed: 6 }));
    },
  );
  it("is normal, with the deviation asked for", async () => {
    const deviation = 0.25;
    const logits = async (plugin: RouterPlugin): Promise<number[]> =>
      (await decide(plugin, (r) => [r.logits], training))[0] ?? [];
    const [clean, noisy] = [await logits(bare()), await logits(withNoise(bare(), { deviation }))];
    const z = noisy.map((x, i) => (x - (clean[i] ?? 0)) / deviation);
    const variance = z.reduce((sum, x) => sum + x * x, 0) / z.length;
    expect(variance).toBeGreaterThan(0.5);
    expect(variance).toBeLessThan(2);
    // 1 / experts unless told otherwise
    const usual = await logits(withNoise(bare()));
    for (const [i, x] of usual.entries()) expect(x - (clean[i] ?? 0)).toBeCloseTo((z[i] ?? 0) / 4, 10);
  });
  it("leaves no router that sends whole samples to the same experts as it was", () => {
    const whole: RouterPlugin = { ...bare(), perSample: true };
    for (const one of [withNoise(whole), withJitter(whole)]) expect(one.perSample).toBe(false);
    expect(withNoise(bare()).perSample).toBeUndefined();
  });
  it("drawn twice is drawn anew", async () => {
    const logits = (plugin: RouterPlugin): Promise<number[][]> => decide(plugin, (r) => [r.logits], training);
    const [clean = []] = await logits(bare());
    const [once = []] = await logits(withNoise(bare()));
    const [twice = []] = await logits(withNoise(withNoise(bare())));
    const double = once.map((x, i) => 2 * x - (clean[i] ?? 0));
    expect(twice.every((x, i) => Math.abs(x - (double[i] ?? 0)) < 1e-9)).toBe(false);
  });
});

describe("withNullExperts", () => {
  it("sends slots to null experts, and their weights to the real ones", async () => {
    const plugin = withNullExperts(bare(3), { rho: 0.5 });
    const [ids = [], weights = [], probabilities = []] = await decide(plugin, (r) => [...plan(r), r.probabilities]);
    expect(probabilities).toHaveLength(tokens * 8);
    expect(ids.some((id) => id >= 4)).toBe(true);
    for (let t = 0; t < tokens; t++) {
      const own = [0, 1, 2].map((j) => [ids[3 * t + j] ?? 0, weights[3 * t + j] ?? 0] as const);
      const real = own.filter(([id]) => id < 4);
      expect(own.every(([id, w]) => id < 4 || w === 0)).toBe(true);
      const total = real.reduce((sum, [, w]) => sum + w, 0);
      expect(total).toBeCloseTo(real.length > 0 ? 1 : 0, 12);
      const raw = real.map(([id]) => probabilities[8 * t + id] ?? 0);
      const sum = raw.reduce((a, b) => a + b, 0);
      for (const [i, [, w]] of real.entries()) expect(w).toBeCloseTo((raw[i] ?? 0) / sum, 12);
    }
    const lost = await decide(withNullExperts(bare(3), { rho: 0.5, renormalise: false }), plan);
    expect(lost[0]).toEqual(ids);
    expect(lost[1]?.reduce((a, b) => a + b, 0)).toBeLessThan(weights.reduce((a, b) => a + b, 0));
  });
  it("declares what real experts a token uses, and at rho 1 is the router alone", async () => {
    expect(withNullExperts(topK({ k: 4 }), { rho: 0.25 }).expertsPerToken).toBe(1);
    expect(withNullExperts(topP()).expertsPerToken).toBeUndefined();
    const whole = withNullExperts(topK({ k: 2 }), { rho: 1 });
    const [plain, same] = [
      await decide(topK({ k: 2 }), everything, training),
      await decide(whole, everything, training),
    ];
    for (const [i, x] of plain.entries())
      for (const [j, value] of x.entries()) expect(same[i]?.[j]).toBeCloseTo(value, 12);
  });
});

describe("losses", () => {
  it("are those that the router has itself", async () => {
    const named = (r: Routed): Tensor[] =>
      [r.losses.balance, r.losses.zLoss].flatMap((one) => (one ? [one.value] : []));
    const wrapped = withZLoss(withBalanceLoss(bare(), { balance: 0.01 }), { zLoss: 0.001 });
    expect(await decide(wrapped, named, training)).toEqual(await decide(topK({ k: 2 }), named, training));
    expect(await decide(wrapped, named)).toEqual([]);
  });
  it("count real tokens only", async () => {
    const mask = Array.from({ length: tokens }, (_, t) => Number(t < 5));
    const hidden = uniform(generator("wrappers"), [tokens, context.width], -2, 2);
    const short = { shape: [5, context.width], data: hidden.data.slice(0, 5 * context.width) };
    const losses = (r: Routed): Tensor[] => Object.values(r.losses).map(({ value }) => value);
    const plugin = withZLoss(withBalanceLoss(bare()));
    const [padded, alone] = [
      await decide(plugin, losses, { ...training, mask }),
      await decide(plugin, losses, { ...training, hidden: short }),
    ];
    expect(alone).toHaveLength(2);
    for (const [i, [value = 0]] of alone.entries()) expect(padded[i]?.[0]).toBeCloseTo(value, 12);
  });
});

describe("the order of wrappers", () => {
  it("stands in the name and in the options", () => {
    const one = withNoise(withCapacity(topK({ k: 2 }), { factor: 2 }), { deviation: 0.1 });
    expect(one.name).toBe("topK+capacity+noise");
    expect(one.options).toEqual({
      router: {
        name: "topK+capacity",
        options: {
          router: { name: "topK", options: topK({ k: 2 }).options },
          factor: 2,
          evaluation: null,
          policy: "position",
          minimum: 0,
        },
      },
      deviation: 0.1,
    });
  });
  it("decides whether null experts have a capacity", async () => {
    const loads = async (plugin: RouterPlugin): Promise<number> =>
      ((await decide(plugin, plan, training))[0] ?? []).filter((id) => id >= 4).length;
    const [limit, nulls] = [{ factor: 0.01, minimum: 0 }, { rho: 0.5 }];
    // One place each: outside, null experts have no limit; inside, they are experts like others.
    const outside = await loads(withCapacity(withNullExperts(bare(), nulls), limit));
    const inside = await loads(withNullExperts(withCapacity(bare(), limit), nulls));
    expect(outside).toBe(await loads(withNullExperts(bare(), nulls)));
    expect(inside).toBeLessThan(outside);
  });
  it("does not decide whether losses see the noise: scores have no other form", async () => {
    const value = (r: Routed): (Tensor | undefined)[] => [r.losses.zLoss?.value];
    const clean = await decide(withZLoss(bare()), value, training);
    for (const plugin of [withZLoss(withNoise(bare())), withNoise(withZLoss(bare()))]) {
      expect(await decide(plugin, value, training)).not.toEqual(clean);
      expect(await decide(plugin, (r) => [r.logits])).toEqual(await decide(bare(), (r) => [r.logits]));
    }
  });
});

describe("withSharedExperts", () => {
  it("asks the layer for them, which refuses to do without and runs them on every token", async () => {
    const on = engine(float64);
    const plugin = withSharedExperts(topK({ k: 1 }), { count: 1 });
    expect(plugin.sharedExperts).toBe(1);
    expect(withSharedExperts(plugin, { count: 2 }).sharedExperts).toBe(3);
    const make = (count: number, seed: number) =>
      glu({ count, width: 4, hidden: 3, engine: on, random: random(on, seed) });
    const [experts, shared] = [make(3, 1), make(1, 2)];
    expect(() => moeLayer(plugin, { engine: on, width: 4 }, { experts })).toThrow(
      /topK\+sharedExperts: it asks for 1 shared expert, and the layer has none; pass them as shared/,
    );
    const both = moeLayer(plugin, { engine: on, width: 4 }, { experts, shared: [{ experts: shared }] });
    const alone = moeLayer(topK({ k: 1 }), { engine: on, width: 4 }, { experts });
    const x = on.tensor(
      Float64Array.from({ length: 8 }, (_, i) => Math.sin(i)),
      [2, 4],
    );
    const one = await moe(both, layerParams(both), layerInput(both, x)).output.data();
    const two = await moe(alone, layerParams(alone), layerInput(alone, x)).output.data();
    expect([...one]).not.toEqual([...two]);
    dispose([experts.params, shared.params]);
  });
});

// ---------------------------------------------------------------- what makes no sense
describe("wrong combinations are refused at construction, with the reason", () => {
  const undeclared: RouterPlugin = (({ gives: _, ...rest }) => rest)(topK({ k: 2 }));
  const merge: RouterPlugin = { ...bare(), name: "smear", plans: ["merge"] };
  const everyExpert: RouterPlugin = { ...bare(), name: "compete", needs: ["everyExpert"] };
  const dense = expressiveGates({ k: 2, weights: "anneal" });
  it.each<[string, () => RouterPlugin, RegExp]>([
    [
      "capacity, dense",
      () => withCapacity(dense),
      /withCapacity\(expressiveGates\): its plan is "dense": every token goes to every/,
    ],
    [
      "capacity, slots",
      () => withCapacity(softMoE()),
      /withCapacity\(softMoE\): its plan is "slots": slots are a capacity already/,
    ],
    [
      "capacity, expert choice",
      () => withCapacity(expertChoice()),
      /experts choose their tokens, so they have a capacity already/,
    ],
    ["capacity, merge", () => withCapacity(merge), /one mixture of experts, so there is nothing to drop/],
    ["capacity, every expert", () => withCapacity(everyExpert), /runs every expert on every token anyway/],
    ["null experts, slots", () => withNullExperts(softMoE()), /withNullExperts\(softMoE\): its plan is "slots"/],
    ["null experts, expert choice", () => withNullExperts(expertChoice()), /a null expert that chooses does nothing/],
    [
      "null experts, table",
      () => withNullExperts(hash({ vocabulary: 13 })),
      /learned through.*this router declares neither/,
    ],
    ["null experts, every expert", () => withNullExperts(everyExpert), /null ones have none/],
    [
      "noise, one piece",
      () => withNoise(noisyTopK({ k: 2 })),
      /withNoise\(noisyTopK\): noise stands between score and select/,
    ],
    ["noise, cache", () => withNoise(similarityAware({ k: 2 })), /and this router does not give them/],
    ["noise, undeclared", () => withNoise(undeclared), /this router declares nothing \(RouterPlugin.gives\)/],
    [
      "jitter, table",
      () => withJitter(hash({ vocabulary: 13 })),
      /for routers that score hidden states, and it does not score/,
    ],
    ["jitter, undeclared", () => withJitter(undeclared), /it does not say that it does/],
    [
      "balance, sinkhorn",
      () => withBalanceLoss(sinkhorn({ k: 2 })),
      /withBalanceLoss\(sinkhorn\): its plan is not what tokens chose/,
    ],
    ["balance, bias", () => withBalanceLoss(deepSeekV3({ k: 2, balance: 0 })), /evens loads out itself/],
    [
      "balance, twice",
      () => withBalanceLoss(topK({ k: 2 })),
      /topK has that loss already \(balance: 0.01\); make it with balance: 0/,
    ],
    [
      "balance, within",
      () => withBalanceLoss(withNoise(withBalanceLoss(bare()))),
      /topK\+balanceLoss has that loss already/,
    ],
    [
      "balance, dropped",
      () => withBalanceLoss(withCapacity(bare())),
      /a capacity belongs around this wrapper, not inside/,
    ],
    ["balance, switch", () => withBalanceLoss(switchRouter({ balance: 0 })), /drops some/],
    ["balance, race", () => withBalanceLoss(expertRace({ k: 2 })), /chooses by something else/],
    [
      "balance, shares",
      () => withBalanceLoss(reMoE({ k: 2 })),
      /mean probabilities, and this router does not give them/,
    ],
    ["balance, expert choice", () => withBalanceLoss(expertChoice()), /experts choose equally many tokens/],
    ["z-loss, twice", () => withZLoss(topK({ k: 2 })), /topK has that loss already \(zLoss: 0.001\)/],
    ["z-loss, slots", () => withZLoss(softMoE()), /the loss is of logits, and this router does not give them/],
  ])("%s", (_, make, message) => {
    expect(make).toThrow(UnsupportedError);
    expect(make).toThrow(message);
  });
  it.each<[string, () => RouterPlugin, RegExp]>([
    ["factor", () => withCapacity(bare(), { factor: -1 }), /factor = -1; expected a number from 0/],
    ["evaluation", () => withCapacity(bare(), { evaluation: Number.NaN }), /evaluation = NaN/],
    ["minimum", () => withCapacity(bare(), { minimum: 0.5 }), /minimum = 0.5/],
    ["policy", () => withCapacity(bare(), { policy: "luck" as "choice" }), /policy = "luck"/],
    ["amount", () => withJitter(bare(), { amount: 1 }), /amount = 1; expected a number above 0 and below 1/],
    ["deviation", () => withNoise(bare(), { deviation: 0 }), /deviation = 0/],
    ["rho", () => withNullExperts(bare(), { rho: 0 }), /rho = 0; expected the share/],
    ["balance", () => withBalanceLoss(bare(), { balance: 0 }), /balance = 0/],
    ["zLoss", () => withZLoss(bare(), { zLoss: Number.POSITIVE_INFINITY }), /zLoss = Infinity/],
    ["count", () => withSharedExperts(bare(), { count: 0 }), /count = 0/],
  ])("the option %s", (_, make, message) => expect(make).toThrow(message));

  it("and others are not", () => {
    const fine = [
      withNoise(grin({ k: 2 })),
      withNullExperts(reMoE({ k: 2 })),
      withZLoss(similarityAware({ k: 2, zLoss: 0 })),
    ];
    expect(fine.map(({ name }) => name)).toEqual(["grin+noise", "reMoE+nullExperts", "similarityAware+zLoss"]);
    expect(withCapacity(hash({ vocabulary: 13 })).needs).toEqual(["tokenIds"]);
    expect(withCapacity(adaMoE({ k: 3 })).expertsPerToken).toBe(1);
  });
  it("a loss that the options did not tell is found when it is made", async () => {
    const lying: RouterPlugin = { ...topK({ k: 2 }), options: {} };
    await expect(decide(withZLoss(lying), plan, training)).rejects.toThrow(/returned a loss "zLoss" itself/);
  });
});

// ---------------------------------------------------------------- every router with every wrapper
const wrappers: readonly (readonly [string, (plugin: RouterPlugin) => RouterPlugin])[] = [
  ["capacity", (plugin) => withCapacity(plugin, { factor: 0.5 })],
  ["jitter", withJitter],
  ["noise", withNoise],
  ["nullExperts", withNullExperts],
  ["balanceLoss", withBalanceLoss],
  ["zLoss", withZLoss],
  ["sharedExperts", withSharedExperts],
];
const factories = Object.entries<unknown>(all).filter(
  (entry): entry is [string, (options: object) => RouterPlugin] => typeof entry[1] === "function",
);
describe.each(factories)("%s", (name, factory) => {
  const silent = factory({ k: 2, vocabulary: 13, balance: 0, zLoss: 0 });
  it.each(wrappers)("with %s routes, or is refused with the reason when it is made", async (wrapper, wrap) => {
    let plugin: RouterPlugin;
    try {
      plugin = wrap(silent);
    } catch (error) {
      expect(error).toBeInstanceOf(UnsupportedError);
      expect((error as Error).message).toMatch(new RegExp(`^with${wrapper}\\(${name}\\): `, "i"));
      return;
    }
    expect(plugin.name).toBe(`${name}+${wrapper}`);
    const on = engine(float64);
    const router = plugin.init(routerContext(on, { ...context, vocabulary: 13 }));
    const hidden = uniform(generator("every router"), [tokens, context.width], -2, 2);
    for (const training of [true, false]) {
      const routed = on.scope(() => {
        const given = routerInput(on, { hidden, buffers: router.buffers, experts: 4, training, sequence: tokens });
        const { plan } = router.route(router.params, given);
        return plan.kind === "slots" ? plan.combine : plan.kind === "merge" ? plan.groups : plan.weights;
      });
      expect([...(await routed.data())].every(Number.isFinite)).toBe(true);
      routed.dispose();
    }
    dispose([router.params, router.buffers]);
  });
});
