import { dispose, engine, random, type Tensor } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { ffn, moeLayer } from "@switchyard/core/moe";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { selecting } from "../test/families/parts.ts";
import { gatingFamily } from "../test/families/structured.ts";
import { learn } from "../test/learning.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { hierarchicalGate, hierarchicalLogits, type TheoryGatesOptions, theoryGates } from "./theory-gates.ts";

const losses = { balance: 0.01, zLoss: 0.001 };
testRouter({ plugin: () => theoryGates({ gate: "dense", ...losses }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => theoryGates({ k, ...losses }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => theoryGates({ gate: "sigmoid", k, ...losses }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => theoryGates({ gate: "sigmoid", k, over: "all", ...losses }),
  weights: "sum to at most 1",
});
testRouter({ plugin: () => theoryGates({ gate: "sigmoid", k: 0 }), weights: "sum to 1" });
const groups = {
  reason: "experts belong to groups of neighbours, which a permutation of the experts alone breaks",
  tests: ["permuting the experts permutes the answer"],
};
for (const levels of [{}, { outerK: 1 }, { innerK: 1 }, { outerK: 2, innerK: 1 }])
  testRouter({
    plugin: ({ experts }) =>
      theoryGates({
        gate: "hierarchical",
        balance: 0.01,
        ...(experts === 6 ? { groups: 3, ...levels } : { groups: 1 }),
      }),
    sizes: { experts: 6, width: 5 },
    weights: "sum to 1",
    skip: [groups],
  });

describe("theoryGates meets its vectors", () => {
  const { cases, tolerance } = readVectors("gating");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(gatingFamily, one, tolerance)).toEqual([]);
  });
});

const on = float64();
const close = (found: readonly number[], wanted: readonly number[]): void => {
  expect(found).toHaveLength(wanted.length);
  found.forEach((value, i) => {
    expect(value).toBeCloseTo(wanted[i] ?? Number.NaN, 10);
  });
};
const softmax = (row: readonly number[]): number[] => {
  const total = row.reduce((sum, value) => sum + Math.exp(value), 0);
  return row.map((value) => Math.exp(value) / total);
};
const logits = [
  [0.5, -1, 2, 0.25, 1.5, -0.75],
  [3, -2, 0.1, 0.9, -0.3, 1.1],
];

describe("the hierarchical gate", () => {
  const outer = [
    [0.3, -1, 2],
    [0, -0.4, 5],
  ];
  const members = (row: readonly number[], group: number): number[] => row.slice(2 * group, 2 * group + 2);
  /** Loops over tokens, groups and members: `[tokens][experts]`, 0 where a level leaves an expert out. */
  const oracle = (outerK: number, innerK: number): number[][] =>
    logits.map((row, t) => {
      const top = (values: readonly number[], k: number): number[] => {
        const kept = values.filter((value) => values.filter((other) => other > value).length < k);
        return values.map((value) => (kept.includes(value) ? value : Number.NEGATIVE_INFINITY));
      };
      return softmax(top(outer[t] ?? [], outerK)).flatMap((own, group) =>
        softmax(top(members(row, group), innerK)).map((inner) => own * inner),
      );
    });
  const scores = (): Tensor => hierarchicalLogits(tensor(on, outer), tensor(on, logits));
  const route = (options: TheoryGatesOptions, x: () => Tensor = scores) =>
    results(on, (): Readonly<Record<string, Tensor>> => {
      const { plan } = selecting(on, theoryGates({ gate: "hierarchical", groups: 3, ...options }), 6)(x(), {});
      if (plan.kind === "dense") return { weights: plan.weights };
      if (plan.kind !== "sparse") throw new Error(`found a ${plan.kind} plan`);
      return { ids: plan.experts, weights: plan.weights };
    });

  it("without limits is the product of both levels, and both come back from it", async () => {
    close(flat((await route({})).weights ?? []), oracle(3, 2).flat());
    const found = await results(on, () => ({ ...hierarchicalGate(scores(), 3) }));
    close(flat(found.outer), outer.flatMap(softmax));
    close(
      flat(found.inner),
      logits.flatMap((row) => [0, 1, 2].flatMap((group) => softmax(members(row, group)))),
    );
  });
  it.each([
    [1, 2],
    [2, 2],
    [3, 1],
    [2, 1],
    [1, 1],
  ])("keeps %i groups and %i members of each", async (outerK, innerK) => {
    const { ids = [], weights = [] } = await route({ outerK, innerK });
    oracle(outerK, innerK).forEach((row, t) => {
      const own = flat((ids as number[][])[t] ?? []);
      expect(own.toSorted()).toEqual(row.flatMap((weight, e) => (weight > 0 ? [e] : [])));
      close(
        flat((weights as number[][])[t] ?? []),
        own.map((e) => row[e] ?? Number.NaN),
      );
    });
  });
  it("a limit of 0 stands for all of its level", async () => {
    expect(await route({ outerK: 1 })).toEqual(await route({ outerK: 1, innerK: 2 }));
    expect(await route({ innerK: 1 })).toEqual(await route({ outerK: 3, innerK: 1 }));
  });
  it("ties go to the lower group and the lower member", async () => {
    const zeros = (): Tensor => tensor(on, [[0, 0, 0, 0, 0, 0]]);
    expect((await route({ outerK: 2, innerK: 1 }, zeros)).ids).toEqual([[0, 2]]);
  });
});

describe("the normalised sigmoid", () => {
  const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
  it("is divided by the selected, or by all", async () => {
    const [row = []] = logits;
    const all = row.reduce((total, value) => total + sigmoid(value), 0);
    const best = [2, 4];
    const two = best.reduce((total, e) => total + sigmoid(row[e] ?? 0), 0);
    for (const [over, divisor] of [
      ["selected", two],
      ["all", all],
    ] as const) {
      const found = await results(on, () => {
        const { experts, weights } = sparse(
          selecting(on, theoryGates({ gate: "sigmoid", over }), 6)(tensor(on, [row]), {}),
        );
        return { experts, weights };
      });
      expect(found.experts).toEqual([best]);
      close(
        flat(found.weights),
        best.map((e) => sigmoid(row[e] ?? 0) / divisor),
      );
    }
  });
  it("is even where a softmax has long decided", async () => {
    const found = await results(on, () => ({
      ...sparsePart(theoryGates({ gate: "sigmoid" })),
    }));
    expect(flat(found.weights)[1]).toBeGreaterThan(0.49);
    const soft = await results(on, () => ({ ...sparsePart(theoryGates()) }));
    expect(flat(soft.weights)[1]).toBeLessThan(1e-4);
  });
  it("is defined where every sigmoid is too small for a number", async () => {
    const single = engine(cpu());
    const found = await results(single, () => {
      const routed = selecting(
        single,
        theoryGates({ gate: "sigmoid" }),
        3,
      )(single.tensor(Float32Array.of(-300, -300, -302), [1, 3]), {});
      return { weights: sparse(routed).weights, probabilities: routed.probabilities as Tensor };
    });
    expect(flat(found.weights)).toEqual([0.5, 0.5]);
    expect(flat(found.probabilities)[2]).toBeCloseTo(1 / (1 + 2 * Math.exp(2)), 6);
  });
  const sparsePart = (plugin: ReturnType<typeof theoryGates>) => {
    const { experts, weights } = sparse(selecting(on, plugin, 3)(tensor(on, [[30, 20, 0]]), {}));
    return { experts, weights };
  };
});

describe("theoryGates", () => {
  it.each([
    { gate: "dense" },
    { gate: "sparse" },
    { gate: "sigmoid" },
    { gate: "hierarchical", groups: 2, outerK: 1, innerK: 1 },
  ] satisfies TheoryGatesOptions[])("learns: %j", async (options) => {
    const experts = ffn({ count: 4, width: 3, hidden: 4, engine: on, random: random(on, 1) });
    const layer = moeLayer(theoryGates({ ...options, balance: 0.01 }), { engine: on, width: 3 }, { experts });
    const x = Array.from({ length: 10 }, (_, i) => [Math.sin(2 * i), Math.cos(i), 1]);
    const { error } = await learn(on, layer, { x, target: x, steps: 40, rate: 0.3 });
    expect(error.at(-1)).toBeLessThan(0.85 * (error[0] ?? 0));
  });
  it("says how many experts a token uses where that is fixed", () => {
    const uses = (options: TheoryGatesOptions) => theoryGates(options).expertsPerToken;
    expect(uses({})).toBe(2);
    expect(uses({ gate: "sigmoid", k: 3 })).toBe(3);
    expect(uses({ gate: "hierarchical", groups: 4, outerK: 2, innerK: 3 })).toBe(6);
    for (const options of [
      { gate: "dense" },
      { gate: "sigmoid", k: 0 },
      { gate: "hierarchical" },
      { gate: "hierarchical", outerK: 1 },
    ] satisfies TheoryGatesOptions[])
      expect(uses(options)).toBeUndefined();
  });
  it("refuses options that cannot be", () => {
    const init = (options: TheoryGatesOptions): void => {
      const { params } = theoryGates(options).init(routerContext(on, { experts: 6 }));
      dispose(params);
    };
    expect(() => init({ gate: "soft" as "dense" })).toThrow('gate = "soft"');
    expect(() => init({ over: "none" as "all" })).toThrow('over = "none"');
    expect(() => init({ k: 0.5 })).toThrow("k = 0.5");
    expect(() => init({ k: 0 })).toThrow("k = 0 of 6 experts");
    expect(() => init({ k: 7 })).toThrow("k = 7 of 6 experts");
    expect(() => init({ gate: "hierarchical", groups: 4 })).toThrow("groups = 4; expected a divisor of 6 experts");
    expect(() => init({ gate: "hierarchical", groups: 0 })).toThrow("groups = 0; expected a divisor");
    expect(() => init({ gate: "hierarchical", outerK: 3 })).toThrow("outerK = 3 of 2 groups");
    expect(() => init({ gate: "hierarchical", innerK: 4 })).toThrow("innerK = 4 of 3 members");
    expect(() => init({ gate: "hierarchical", zLoss: 1 })).toThrow("whose z-loss is always 0");
  });
});
