import { describe, expect, test } from "vitest";
import { ShapeError, UnsupportedError } from "../errors.ts";
import { linear } from "../ops/matmul.ts";
import { logSoftmax, softmax } from "../ops/normalise.ts";
import { gatherLast, topkIndices } from "../ops/rows.ts";
import { isTensor } from "../tensor.ts";
import { withCapacity } from "../wrappers/index.ts";
import { glu } from "./experts.ts";
import { layerInput, layerParams, moe, moeLayer, routeTokens } from "./layer.ts";
import { close, float64, floats, ids, noise, numbers, routerInput } from "./moe.test-util.ts";
import { overridePlan, type Ranking } from "./override.ts";
import type { MoELayer, Routed, RouterInput, RouterPlugin, RoutingOverride, SparsePlan } from "./plan.ts";

const e = float64();

interface Rules extends Omit<Ranking, "order" | "logWeights"> {
  readonly order: readonly (readonly number[])[];
  readonly logWeights: readonly (readonly number[])[];
}

/** The override of one token in plain loops: pairs of expert and weight, in order. */
function naive({ order, logWeights, normalised, scale = 1, k }: Rules, token: number, rule: RoutingOverride) {
  const [scores = [], logs = []] = [order[token], logWeights[token]];
  const forced = rule.forced ?? [];
  const allowed = scores.map((_, i) => i).filter((i) => !(rule.masked ?? []).includes(i));
  const falling = (list: number[]): number[] => list.sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b);
  const free = allowed.filter((i) => !forced.includes(i) && scores[i] !== Number.NEGATIVE_INFINITY);
  const line = [...[...forced].sort((a, b) => a - b), ...falling(free)];
  let taken = rule.ranks
    ? rule.ranks.map((at) => line[at] ?? -1)
    : line.slice(0, rule.k ?? (rule.threshold === undefined ? k : line.length));
  if (rule.threshold !== undefined) {
    const all = logs.reduce((total, x) => total + Math.exp(x), 0);
    let [sum, n] = [0, 0];
    while (n < taken.length && (n < forced.length || sum <= rule.threshold)) {
      sum += Math.exp(logs[taken[n] ?? -1] ?? Number.NaN) / all;
      n++;
    }
    taken = taken.slice(0, n);
  }
  const raw = taken.map((i) => Math.exp(logs[i] ?? Number.NaN));
  const divide = normalised || rule.threshold !== undefined;
  const total = divide ? raw.reduce((sum, w) => sum + w, 0) : 1;
  return taken.map((expert, j): [number, number] => [expert, (scale * (raw[j] ?? 0)) / total]);
}

const experts = 6;
const scoresOf = (tokens: number, seed = 3): number[][] => {
  const flat = noise(tokens * experts, seed).map((x) => 3 * x);
  return Array.from({ length: tokens }, (_, t) => flat.slice(t * experts, (t + 1) * experts));
};
const logSoftmaxOf = (row: readonly number[]): number[] => {
  const total = Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0));
  return row.map((x) => x - total);
};

/** Filled slots of each token: pairs of expert and weight, in order. */
async function pairs(plan: SparsePlan): Promise<[number, number][][]> {
  const [tokens = 0, slots = 0] = plan.experts.shape;
  const [chosen, weights] = [await numbers(plan.experts), await numbers(plan.weights)];
  const found = Array.from({ length: tokens }, (_, t) =>
    Array.from({ length: slots }, (_, j): [number, number] => [
      chosen[t * slots + j] ?? Number.NaN,
      weights[t * slots + j] ?? Number.NaN,
    ]),
  );
  // An empty slot weighs nothing.
  for (const [expert, weight] of found.flat()) if (expert < 0) expect([expert, weight]).toEqual([-1, 0]);
  return found.map((slots) => slots.filter(([expert]) => expert >= 0));
}

async function meets(plan: SparsePlan, expected: readonly (readonly [number, number][])[]): Promise<void> {
  const found = await pairs(plan);
  expect(found.map((line) => line.map(([expert]) => expert))).toEqual(
    expected.map((line) => line.map(([expert]) => expert)),
  );
  close(
    found.flat().map(([, weight]) => weight),
    expected.flat().map(([, weight]) => weight),
  );
}

/** The plan of rows of `sequence` tokens, and of what the router itself chose where there is no override. */
function planned(
  rules: Rules,
  override: readonly (RoutingOverride | undefined)[],
  { own = [4, 1], more = {} }: { own?: readonly number[]; more?: Partial<RouterInput> } = {},
): SparsePlan {
  const tokens = rules.order.length;
  const { order, logWeights, ...rest } = rules;
  const matrix = (rows: readonly (readonly number[])[]) => floats(e, rows.flat(), [tokens, experts]);
  const hidden = floats(e, new Array<number>(tokens).fill(0), [tokens, 1]);
  const repeated = (values: readonly number[]) => new Array<readonly number[]>(tokens).fill(values).flat();
  const plan: SparsePlan = {
    kind: "sparse",
    experts: ids(e, repeated(own), [tokens, own.length]),
    weights: floats(e, repeated(own.map((_, j) => 0.1 + j)), [tokens, own.length]),
  };
  const layout = { batch: override.length, sequence: tokens / Math.max(override.length, 1), past: 0 };
  const input = { ...routerInput(hidden, layout), training: false, layers: 3, override, ...more };
  return overridePlan(plan, input, () => ({ ...rest, order: matrix(order), logWeights: matrix(logWeights) }));
}

const softmaxRules = (tokens: number, more: Partial<Rules> = {}): Rules => {
  const order = scoresOf(tokens);
  return { order, logWeights: order.map(logSoftmaxOf), normalised: true, k: 2, ...more };
};

describe("one row", () => {
  const cases: readonly [string, RoutingOverride][] = [
    ["the trained ranks", { ranks: [0, 1] }],
    ["rank 2 alone", { ranks: [1] }],
    ["the last rank", { ranks: [5] }],
    ["ranks out of order", { ranks: [3, 0, 2] }],
    ["k = 1", { k: 1 }],
    ["k = all", { k: 6 }],
    ["threshold 0: the best alone", { threshold: 0 }],
    ["threshold 0.6", { threshold: 0.6 }],
    ["threshold 0.95, at most 3", { threshold: 0.95, k: 3 }],
    ["threshold 1: all", { threshold: 1 }],
    ["masked", { masked: [0, 4] }],
    ["masked but one", { masked: [0, 1, 2, 4, 5], k: 1 }],
    ["masked, ranks close up", { masked: [5, 2], ranks: [0, 3] }],
    ["masked with a threshold that what is left cannot reach", { masked: [0, 1, 2, 3], threshold: 0.99 }],
    ["forced", { forced: [3] }],
    ["all k forced", { forced: [5, 3] }],
    ["forced, with another k", { forced: [5, 0], k: 4 }],
    ["forced and masked", { forced: [2], masked: [0, 5], k: 3 }],
    ["forced with a threshold they exceed", { forced: [1, 3, 5], threshold: 0 }],
  ];
  describe.each([
    ["divided by their sum", {}],
    ["as they are, scaled", { normalised: false, scale: 2.5 }],
  ] as const)("weights %s", (_, more) => {
    test.each(cases)("%s", async (_, rule) => {
      const rules = softmaxRules(7, more);
      const plan = planned(rules, [rule]);
      await meets(
        plan,
        rules.order.map((_, t) => naive(rules, t, rule)),
      );
    });
  });

  test("one expert of a router that divides has weight 1, however improbable it is", async () => {
    const order = [[200, 0, -200, 10, 20, 30]];
    const rules = { order, logWeights: order.map(logSoftmaxOf), normalised: true, k: 2 };
    expect(await pairs(planned(rules, [{ ranks: [5] }]))).toEqual([[[2, 1]]]);
  });

  test("equal scores go to the lower expert, and order and weight are two things", async () => {
    const rules = {
      order: [[1, 2, 2, 1, 0, 2]],
      logWeights: [[0.5, 0.1, 0.2, 0.3, 0.9, 0.7].map(Math.log)],
      normalised: false,
      k: 2,
    };
    await meets(planned(rules, [{ ranks: [0, 1, 2, 3] }]), [
      [
        [1, 0.1],
        [2, 0.2],
        [5, 0.7],
        [0, 0.5],
      ],
    ]);
  });

  test("experts out of reach are not taken, masked ones close up, forced ones are taken all the same", async () => {
    const order = scoresOf(4).map((row, t) => row.map((x, i) => (i % 2 === t % 2 ? Number.NEGATIVE_INFINITY : x)));
    const rules = { order, logWeights: scoresOf(4).map(logSoftmaxOf), normalised: true, k: 2, reachable: 3 };
    for (const rule of [{ k: 3 }, { threshold: 1 }, { forced: [0], k: 3 }, { masked: [1], threshold: 0.9 }]) {
      await meets(
        planned(rules, [rule]),
        order.map((_, t) => naive(rules, t, rule)),
      );
    }
    expect(() => planned(rules, [{ k: 4 }])).toThrow(/k = 4, but only 3 of 6 experts can be taken/);
    expect(() => planned(rules, [{ ranks: [2], masked: [1] }])).toThrow(/rank 2, but only 2 of 6 experts/);
  });
});

describe("rows of one batch", () => {
  const override = [
    undefined,
    { ranks: [1] },
    { threshold: 0.7 },
    { k: 4, masked: [1] },
    {},
    { forced: [2], layers: [0, 2] },
    { k: 1, layers: [1] },
  ];
  test("differ; those without an override keep what the router chose", async () => {
    const rules = softmaxRules(14, { normalised: false });
    const own: [number, number][] = [
      [4, 0.1],
      [1, 1.1],
    ];
    const plan = planned(rules, override);
    await meets(
      plan,
      rules.order.map((_, t) => {
        const rule = override[Math.floor(t / 2)];
        return rule === undefined || [4, 6].includes(Math.floor(t / 2)) ? own : naive(rules, t, rule);
      }),
    );
    expect(plan.experts.shape).toEqual([14, 6]);
    expect(plan.bound).toBe(2 * (2 + 1 + 6 + 4 + 2 + 2 + 2));
  });

  test("the strong and the weak pass take three slots of two tokens' four", () => {
    const plan = planned(softmaxRules(2), [undefined, { ranks: [1] }]);
    expect([plan.experts.shape, plan.bound]).toEqual([[2, 2], 3]);
    expect(planned(softmaxRules(2), [{ k: 3 }, { ranks: [0, 1, 4] }]).bound).toBeUndefined();
  });

  test("without an override for this layer the plan is the router's own, and the ranking is not asked for", () => {
    const own: SparsePlan = { kind: "sparse", experts: ids(e, [0], [1, 1]), weights: floats(e, [1], [1, 1]) };
    const ranking = (): Ranking => {
      throw new Error("asked");
    };
    const input = { ...routerInput(floats(e, [0], [1, 1])), layers: 2 };
    for (const override of [[undefined], [{}], [{ k: 2, layers: [1] }], [{ layers: [0] }]]) {
      expect(overridePlan(own, { ...input, override }, ranking)).toBe(own);
    }
    expect(overridePlan(own, input, ranking)).toBe(own);
  });

  test("it applies to the feed-forward router alone, unless parts name that of attention", () => {
    const rules = softmaxRules(1);
    const taken = (rule: RoutingOverride, part?: "attention" | "feedForward") =>
      planned(rules, [rule], part ? { more: { part } } : {}).experts.shape[1];
    expect(taken({ k: 1 })).toBe(1);
    expect(taken({ k: 1 }, "feedForward")).toBe(1);
    expect(taken({ k: 1 }, "attention")).toBe(2);
    expect(taken({ k: 1, parts: ["attention"] }, "attention")).toBe(1);
    expect(taken({ k: 1, parts: ["attention"] })).toBe(2);
    expect(taken({ k: 1, parts: ["attention", "feedForward"] })).toBe(1);
    expect(taken({ k: 1, parts: ["attention", "feedForward"] }, "attention")).toBe(1);
    expect(() => taken({ k: 1, parts: [] })).toThrow(/row 0: parts are "attention" and "feedForward", found \[\]/);
    const odd: RoutingOverride = JSON.parse('{ "k": 1, "parts": ["shared"] }');
    expect(() => taken(odd)).toThrow(/parts are .* found "shared"/);
  });

  test("of no token, and no row at all", async () => {
    expect(planned(softmaxRules(0), [{ k: 3 }, undefined]).experts.shape).toEqual([0, 3]);
    expect(planned(softmaxRules(0), []).experts.shape).toEqual([0, 2]);
  });
});

describe("random experts", () => {
  const tokens = 600;
  const rules = softmaxRules(tokens, { normalised: false });
  test("are drawn evenly, token by token, with weight 1 where one is", async () => {
    const found = (await pairs(planned(rules, [{ random: 1 }]))).map((line) => line[0] ?? ([-1, 0] as const));
    const counts = new Array<number>(experts).fill(0);
    for (const [expert = -1, weight] of found) {
      counts[expert] = (counts[expert] ?? 0) + 1;
      expect(weight).toBe(1);
    }
    // 100 of each are expected, with a standard deviation of 9.
    for (const count of counts) expect(Math.abs(count - tokens / experts)).toBeLessThan(40);
    const [again, other] = [planned(rules, [{ random: 1 }]), planned(rules, [{ random: 2 }])];
    expect((await pairs(again)).map((line) => line[0])).toEqual(found);
    expect((await pairs(other)).map((line) => line[0])).not.toEqual(found);
  });
  test("several differ, share a weight of 1, and keep to what can be taken", async () => {
    const order = rules.order.map((row) => row.map((x, i) => (i === 5 ? Number.NEGATIVE_INFINITY : x)));
    const plan = planned({ ...rules, order, reachable: 5 }, [{ random: 1, k: 3, masked: [0], forced: [2] }]);
    for (const [t, line] of (await pairs(plan)).entries()) {
      const taken = line.map(([expert]) => expert);
      expect([new Set(taken).size, taken[0]]).toEqual([3, 2]);
      expect(taken.some((expert) => expert === 0 || expert === 5)).toBe(false);
      const raw = taken.map((expert) => Math.exp(rules.logWeights[t]?.[expert] ?? Number.NaN));
      const total = raw.reduce((sum, w) => sum + w, 0);
      close(
        line.map(([, weight]) => weight),
        raw.map((w) => w / total),
      );
    }
  });
  test("contradict ranks and thresholds, and need a whole number", () => {
    const refuse = (rule: RoutingOverride) => expect(() => planned(softmaxRules(2, {}), [rule]));
    refuse({ random: 1, ranks: [1] }).toThrow(/and random would say it again/);
    refuse({ random: 1, threshold: 0.5 }).toThrow(/random and a threshold exclude/);
    refuse({ random: 0.5 }).toThrow(/random = 0.5; expected a whole number/);
    refuse({ random: 1, k: 7 }).toThrow(/k = 7, but only 6 of 6/);
  });
});

describe("refused are", () => {
  const refuse = (rule: RoutingOverride, more: Partial<Rules> = {}) =>
    expect(() => planned(softmaxRules(2, more), [rule]));
  test("contradictions", () => {
    refuse({ forced: [1, 2], masked: [0, 2] }).toThrow(/row 0: expert 2 is both forced and masked; choose one/);
    refuse({ ranks: [1], k: 1 }).toThrow(/ranks say which places are taken, and k would say it again/);
    refuse({ ranks: [1], threshold: 0.5 }).toThrow(/and threshold would/);
    refuse({ ranks: [1], forced: [0] }).toThrow(/and forced would/);
    refuse({ forced: [0, 1, 2] }).toThrow(/3 experts are forced, and k = 2; raise k/);
    refuse({ ranks: [] }).toThrow(UnsupportedError);
  });
  test("numbers out of range", () => {
    for (const rule of [
      { k: 0 },
      { k: 1.5 },
      { k: 7 },
      { ranks: [6] },
      { ranks: [-1] },
      { ranks: [1, 1] },
      { masked: [6] },
      { forced: [0.5] },
      { threshold: -0.1 },
      { threshold: 1.1 },
      { threshold: Number.NaN },
      { layers: [3] },
      { k: 1, layers: [-1] },
    ]) {
      refuse(rule).toThrow(ShapeError);
    }
    refuse({ ranks: [1, 1] }).toThrow(/ranks name 1 twice/);
    refuse({ layers: [3], k: 1 }).toThrow(/layers name 3 of 3/);
  });
  test("masks that leave fewer than k", () => {
    refuse({ masked: [0, 1, 2, 3, 4] }).toThrow(/k = 2, but only 1 of 6 experts can be taken; lower k/);
    refuse({ masked: [0, 1, 2, 3, 4, 5], threshold: 0.5 }).toThrow(/threshold 0.5, but only 0 of 6/);
  });
  test("a router without a k of its own that is not told one", () => {
    const { k: _, ...vague } = softmaxRules(2);
    expect(() => planned(vague, [{ masked: [1] }])).toThrow(/as many experts as it needs; say k, ranks or a threshold/);
    expect(planned(vague, [{ masked: [1], k: 2 }]).experts.shape).toEqual([2, 2]);
  });
  test("lists of another length than the batch, training, and rankings of another size", () => {
    const layout = { batch: 2, sequence: 1, past: 0 };
    expect(() => planned(softmaxRules(2), [{ k: 1 }], { more: { layout } })).toThrow(/1 entries for a batch of 2/);
    expect(() => planned(softmaxRules(2), [{ k: 1 }], { more: { training: true } })).toThrow(/is in training/);
    const wide = { batch: 1, sequence: 3, past: 0 };
    expect(() => planned(softmaxRules(2), [{ k: 1 }], { more: { layout: wide } })).toThrow(/expected \[batch \* seq/);
  });
});

describe("a layer", () => {
  const [width, count, hidden] = [3, 5, 4];
  const weight = floats(e, noise(count * width, 5), [count, width]);
  const topTwo = (overrides: boolean): RouterPlugin => ({
    name: "topTwo",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits"],
    expertsPerToken: 2,
    init: () => {
      const select = (logits: Routed["logits"] & object, input: RouterInput): Routed => {
        const chosen = topkIndices(logits, 2);
        const own = { kind: "sparse", experts: chosen, weights: softmax(gatherLast(logits, chosen)) } as const;
        const ranking = { order: logits, logWeights: logSoftmax(logits), normalised: true, k: 2 };
        return { plan: overridePlan(own, input, () => ranking), logits, losses: {} };
      };
      const score: NonNullable<MoELayer["router"]["score"]> = (params, { hidden: x }) => {
        if (isTensor(params) || Array.isArray(params)) throw new Error("one weight");
        return linear(x, (params as { weight: typeof weight }).weight);
      };
      const route: MoELayer["router"]["route"] = (params, input) => select(score(params, input), input);
      return { params: { weight }, buffers: {}, score, select, route, ...(overrides ? { overrides } : {}) };
    },
  });
  const set = glu({
    count,
    width,
    hidden,
    params: {
      gateUp: floats(e, noise(count * 2 * hidden * width, 6), [count, 2 * hidden, width]),
      down: floats(e, noise(count * width * hidden, 7), [count, width, hidden]),
    },
  });
  const layer = moeLayer(topTwo(true), { engine: e, width }, { experts: set });
  const x = noise(3 * 4 * width, 8);
  const rules: readonly (RoutingOverride | undefined)[] = [undefined, { ranks: [1] }, { threshold: 0.5, masked: [0] }];
  const outputs = (data: readonly number[], override: readonly (RoutingOverride | undefined)[], mask?: number[]) => {
    const sequence = data.length / width / override.length;
    const given = mask ? { mask: floats(e, mask, [override.length, sequence]) } : {};
    const layout = { batch: override.length, sequence, past: 0, ...given };
    return e.scope(() => {
      const tokens = floats(e, data, [data.length / width, width]);
      return moe(layer, layerParams(layer), layerInput(layer, tokens, { layout, override })).output;
    });
  };

  test("gives each row what it gives that row alone, and no handle stays", async () => {
    const before = e.live();
    const together = outputs(x, rules);
    const all = await numbers(together);
    for (const [row, rule] of rules.entries()) {
      const own = x.slice(row * 4 * width, (row + 1) * 4 * width);
      const alone = outputs(own, [rule]);
      close(all.slice(row * 4 * width, (row + 1) * 4 * width), await numbers(alone), { absolute: 1e-14, relative: 0 });
      alone.dispose();
    }
    together.dispose();
    expect(e.live()).toBe(before);
  });

  test("leaves padding out", async () => {
    const mask = [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1];
    const found = await numbers(outputs(x, rules, mask));
    const full = await numbers(outputs(x, rules));
    close(
      found,
      full.map((value, i) => value * (mask[Math.floor(i / width)] ?? 0)),
    );
  });

  test("under a capacity: what the override asks for is what finds room or not", async () => {
    const capped = moeLayer(
      withCapacity(topTwo(true), { evaluation: 0, minimum: 1 }),
      { engine: e, width },
      { experts: set },
    );
    const tokens = floats(e, [1, 0, 0, 1, 0, 0], [2, width]);
    const route = (override: readonly RoutingOverride[]) =>
      routeTokens(capped, layerParams(capped), layerInput(capped, tokens, { override })).plan as SparsePlan;
    const [first = [], second = []] = await pairs(route([{ forced: [3], masked: [0], k: 1 }]));
    expect([first, second]).toEqual([[[3, 1]], []]);
  });

  test("whose router takes no overrides refuses them, in whatever it is wrapped", () => {
    for (const plugin of [topTwo(false), withCapacity(topTwo(false))]) {
      const deaf = moeLayer(plugin, { engine: e, width }, { experts: set });
      const tokens = floats(e, x.slice(0, width), [1, width]);
      const call = (override: readonly RoutingOverride[]) =>
        moe(deaf, layerParams(deaf), layerInput(deaf, tokens, { override }));
      expect(() => call([{ k: 1 }])).toThrow(UnsupportedError);
      expect(() => call([{ k: 1 }])).toThrow(/token by token in the order of its scores, or does not say so/);
      expect(call([{}]).output.shape).toEqual([1, width]);
    }
  });
});
