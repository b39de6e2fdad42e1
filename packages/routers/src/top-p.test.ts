import type { Tensor } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { selecting } from "../test/families/parts.ts";
import {
  dense,
  differences,
  flat,
  float64,
  given,
  number,
  readVectors,
  results,
  shapeOf,
  sparse,
  tensor,
} from "../test/vectors.ts";
import { type TopPOptions, topP } from "./top-p.ts";

testRouter({ plugin: () => topP(), weights: "sum to at most 1" });
testRouter({ plugin: ({ k = 3 }) => topP({ p: 0.9, most: k, renormalise: true, entropy: 0.5 }), weights: "sum to 1" });

const on = float64();
/** Choices of `select` for logits [tokens, experts]. */
const run = async (
  options: TopPOptions,
  logits: readonly (readonly number[])[],
): Promise<{ ids: number[][]; weights: number[][] }> => {
  const found = await results(on, () => {
    const { experts, weights } = sparse(selecting(on, topP(options), logits[0]?.length ?? 0)(tensor(on, logits), {}));
    return { ids: experts, weights };
  });
  return { ids: (found.ids as number[][]).map(flat), weights: (found.weights as number[][]).map(flat) };
};

describe("topP meets the top-p vectors", () => {
  const { cases, tolerance } = readVectors("topk");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    const logits = given(one.inputs, "logits") as number[][];
    const experts = shapeOf(logits)[1] ?? 0;
    const p = number(one, "top_p");
    for (const [renormalise, name] of [
      [false, "top_p_weights_unnormalised"],
      [true, "top_p_weights_renormalised"],
    ] as const) {
      const { ids, weights } = await run({ p, renormalise }, logits);
      expect(differences(given(one.expected, name), dense(ids, weights, experts), tolerance)).toEqual([]);
      expect(ids.map((row) => row.filter((e) => e >= 0).length)).toEqual(given(one.expected, "top_p_count"));
    }
  });
});

describe("topP", () => {
  it("gives few experts to a certain token and all to an uncertain one, never none", async () => {
    const logits = [
      [0, 9, 0, 0],
      [0, 0, 0, 0],
    ];
    const experts = async (options: TopPOptions): Promise<number[][]> =>
      (await run(options, logits)).ids.map((row) => row.filter((e) => e >= 0));
    expect(await experts({ p: 0.9 })).toEqual([[1], [0, 1, 2, 3]]);
    expect(await experts({ p: 0.5 })).toEqual([[1], [0, 1]]);
    expect(await experts({ p: 1e-9 })).toEqual([[1], [0]]);
    expect(await experts({ p: 0.9, most: 2 })).toEqual([[1], [0, 1]]);
  });

  const losses = async (options: TopPOptions, training = true, mask?: number[]): Promise<Record<string, number>> => {
    const found = await results(on, (): Record<string, Tensor> => {
      const logits = tensor(on, [
        [0, 0, 0, 0],
        [0, 20, 0, 0],
      ]);
      const input = routerInput(on, { hidden: logits, training, ...(mask ? { mask } : {}) });
      const routed = selecting(on, topP(options), 4)(logits, input);
      return Object.fromEntries(Object.entries(routed.losses).map(([name, { value }]) => [name, value]));
    });
    return Object.fromEntries(Object.entries(found).map(([name, value]) => [name, flat(value)[0] ?? Number.NaN]));
  };
  it("the entropy loss is the mean entropy of the real tokens", async () => {
    expect((await losses({})).entropy).toBeCloseTo(Math.log(4) / 2, 5);
    expect((await losses({}, true, [1, 0])).entropy).toBeCloseTo(Math.log(4), 12);
  });
  it("has losses in training only, and none whose weight is 0", async () => {
    expect(Object.keys(await losses({}))).toEqual(["balance", "entropy"]);
    expect(Object.keys(await losses({ zLoss: 0.1, balance: 0, entropy: 0 }))).toEqual(["zLoss"]);
    expect(Object.keys(await losses({}, false))).toEqual([]);
  });
  it("refuses options that cannot be", () => {
    for (const p of [0, -1, 1.1, Number.NaN]) expect(() => topP({ p })).toThrow(`topP: p = ${p}; expected a sum`);
    expect(() => topP({ entropy: -1 })).toThrow("entropy = -1");
    for (const most of [0, 1.5, 6]) {
      expect(() => topP({ most }).init(routerContext(on))).toThrow(`topP: most = ${most} of 5 experts`);
    }
  });
});
