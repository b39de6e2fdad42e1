// Loads, importance and untouched tokens of every kind of plan, against numbers counted by hand.
import { expect, test } from "vitest";
import { autodiff, grad, watch } from "../autodiff.ts";
import { mul } from "../ops/elementwise.ts";
import { sum } from "../ops/reduce.ts";
import { expertImportance, expertLoad, jainIndex, routingMetrics, untouchedTokens } from "./metrics.ts";
import { close, float64, floats, ids, numbers } from "./moe.test-util.ts";
import type { DensePlan, ExpertChoicePlan, Plan, SparsePlan } from "./plan.ts";

const e = float64();
const mask = floats(e, [1, 0, 1], [3]);
const sparse: SparsePlan = {
  kind: "sparse",
  experts: ids(e, [0, 3, -1, -1, 2, 0], [3, 2]),
  weights: floats(e, [0.5, 0.25, 9, 9, -1, 2], [3, 2]),
};
const dense: DensePlan = { kind: "dense", weights: floats(e, [1, 2, 3, 4, 5, 6], [3, 2]) };
const choice: ExpertChoicePlan = {
  kind: "expert-choice",
  tokens: ids(e, [2, -1, 0, 2], [2, 2]),
  weights: floats(e, [0.5, 9, 0.25, 1], [2, 2]),
};
const slots: Plan = {
  kind: "slots",
  dispatch: floats(e, new Array(12).fill(1 / 3), [1, 3, 4]),
  combine: floats(e, [0.1, 0.2, 0.3, 0.4, 1, 0, 0, 0, 0, 0, 0.5, 0.5], [1, 3, 4]),
};
const merge: Plan = {
  kind: "merge",
  groups: ids(e, [1, -1, 1], [3]),
  coefficients: [floats(e, [1, 0, 0.25, 0.75], [2, 2])],
};

test("load", async () => {
  const load = async (plan: Plan, sizes: Parameters<typeof expertLoad>[1]) => numbers(expertLoad(plan, sizes));
  expect(await load(sparse, { experts: 3 })).toEqual([2, 0, 1]);
  expect(await load(sparse, { experts: 3, nulls: 1 })).toEqual([2, 0, 1, 1]);
  expect(await load(sparse, { experts: 3, mask: floats(e, [0, 1, 1], [3]) })).toEqual([1, 0, 1]);
  expect(await load(dense, { experts: 2 })).toEqual([3, 3]);
  expect(await load(dense, { experts: 1, nulls: 2, mask })).toEqual([2, 2, 0]);
  expect(await load(choice, { experts: 2 })).toEqual([1, 2]);
  expect(await load(choice, { experts: 1 })).toEqual([1]);
  close(await load(slots, { experts: 2 }), [1.3, 1.7]);
  expect(await load(merge, { experts: 2 })).toEqual([0.5, 1.5]);
  const levels = {
    ...merge,
    coefficients: [floats(e, [1, 0, 0.25, 0.75], [2, 2]), floats(e, [1, 0, 0.5, 0.5], [2, 2])],
  };
  expect(await load(levels, { experts: 4 })).toEqual([0.25, 0.25, 0.75, 0.75]);
  const none: Plan = { kind: "sparse", experts: ids(e, [], [0, 2]), weights: floats(e, [], [0, 2]) };
  expect(await load(none, { experts: 2 })).toEqual([0, 0]);
});

test("importance, with gradient", async () => {
  const nulls = { experts: 3, nulls: 1 };
  expect(await numbers(expertImportance(sparse, nulls))).toEqual([2.5, 0, -1, 0.25]);
  expect(await numbers(expertImportance(dense, { experts: 2 }))).toEqual([9, 12]);
  expect(await numbers(expertImportance(choice, { experts: 2 }))).toEqual([0.5, 1.25]);
  const weights = watch(autodiff(e), sparse.weights);
  const scale = floats(e, [2, 3, 5, 7], [4]);
  const gradient = grad(sum(mul(expertImportance({ ...sparse, weights }, nulls), scale)), weights);
  expect(await numbers(gradient)).toEqual([2, 7, 0, 0, 5, 2]);
});

test("untouched tokens", async () => {
  const untouched = async (plan: Plan, sizes: Parameters<typeof untouchedTokens>[1]) =>
    numbers(untouchedTokens(plan, sizes, 3));
  expect(await untouched(sparse, { experts: 3 })).toEqual([1]);
  expect(await untouched(sparse, { experts: 3, mask })).toEqual([0]);
  // With two real experts the last token keeps its 0, with none every token is left out.
  expect(await untouched(sparse, { experts: 0 })).toEqual([3]);
  expect(await untouched(choice, { experts: 2 })).toEqual([1]);
  expect(await untouched(choice, { experts: 2, mask })).toEqual([0]);
  expect(await untouched(dense, { experts: 2 })).toEqual([0]);
  expect(await untouched(slots, { experts: 2 })).toEqual([0]);
  expect(await untouched(merge, { experts: 2 })).toEqual([0]);
});

test("routing metrics leave no gradient behind and know entropy only from probabilities", async () => {
  const probabilities = watch(autodiff(e), floats(e, [0.5, 0.5, 1, 0, 0.5, 0.5], [3, 2]));
  const metrics = routingMetrics({ plan: dense, probabilities, losses: {} }, { experts: 2, mask }, 3);
  close(await numbers(metrics.entropy ?? mask), [Math.log(2)]);
  close(await numbers(metrics.entropyOfMean ?? mask), [Math.log(2)]);
  expect(await numbers(grad(sum(metrics.entropy ?? mask), probabilities))).toEqual([0, 0, 0, 0, 0, 0]);
  expect(Object.keys(routingMetrics({ plan: dense, losses: {} }, { experts: 2 }, 3)).sort()).toEqual([
    "load",
    "untouched",
  ]);
});

test("Jain's index goes from one in E to 1, whatever the number of tokens", async () => {
  const index = async (load: readonly number[]) => (await numbers(jainIndex(floats(e, load, [load.length]))))[0];
  expect(await index([5, 5, 5])).toBeCloseTo(1, 12);
  expect(await index([0, 7, 0, 0])).toBeCloseTo(1 / 4, 12);
  expect(await index([1, 2, 3])).toBeCloseTo(36 / (3 * 14), 12);
  expect(await index([10, 20, 30])).toBeCloseTo(36 / (3 * 14), 12);
  expect(await index([4])).toBe(1);
  expect(await index([0, 0])).toBe(0);
  expect(await index([])).toBe(0);
});
