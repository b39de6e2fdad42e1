// The stages between plan and experts: order of the sorted rows against the reference vectors, masks, bounds.
import { describe, expect, test } from "vitest";
import fixture from "../../test/fixtures/routers-dispatch.json" with { type: "json" };
import { ShapeError } from "../errors.ts";
import { mul } from "../ops/elementwise.ts";
import { takeRows } from "../ops/rows.ts";
import { reshape } from "../ops/shape.ts";
import { combine, dispatchPlan, gatherRows, maskPlan, tokenMask } from "./dispatch.ts";
import { close, float64, floats, ids, noise, numbers } from "./moe.test-util.ts";
import type { Plan, SparsePlan } from "./plan.ts";

describe.each(fixture.cases)("vectors: $id", ({ config, inputs, expected }) => {
  const e = float64();
  const tokens = inputs.x.length;
  const plan: SparsePlan = {
    kind: "sparse",
    experts: ids(e, inputs.indices.flat(), [tokens, config.k]),
    weights: floats(e, inputs.weights.flat(), [tokens, config.k]),
  };
  const x = floats(e, inputs.x.flat(), [tokens, 3]);
  const dispatched = dispatchPlan(plan, inputs.expert_scale.length);
  const filled = expected.token_index.length;

  test("sorted by expert, then token, then slot; empty slots at the end", async () => {
    const [rows, slots, ends] = await Promise.all([dispatched.rows, dispatched.slots, dispatched.ends].map(numbers));
    expect([0, ...(ends ?? [])]).toEqual(expected.expert_offsets);
    expect(rows?.slice(0, filled)).toEqual(expected.token_index);
    expect(slots?.slice(0, filled).map((slot) => slot % config.k)).toEqual(expected.slot_index);
    expect(rows?.slice(filled).every((row) => row === -1)).toBe(true);
    expect(slots?.slice(filled)).toEqual(new Array(tokens * config.k - filled).fill(-1));
    const weights = takeRows(reshape(plan.weights, [plan.weights.size]), dispatched.slots);
    close((await numbers(weights)).slice(0, filled), expected.weight);
  });

  test("gathered rows, and their weighted sum", async () => {
    const rows = gatherRows(x, dispatched); // [bound, 3]
    close((await numbers(rows)).slice(0, filled * 3), expected.gathered.flat());
    const scale = expected.expert_offsets.slice(1).flatMap((end, expert) => {
      const size = end - (expected.expert_offsets[expert] ?? 0);
      return new Array<number>(size).fill(inputs.expert_scale[expert] ?? Number.NaN);
    });
    const bound = tokens * config.k;
    const scales = floats(e, [...scale, ...new Array<number>(bound - scale.length).fill(5)], [bound, 1]);
    close(await numbers(combine(plan, dispatched, mul(rows, scales), tokens)), expected.output.flat());
  });
});

test("a bound cuts the results to its length", async () => {
  const e = float64();
  const plan: SparsePlan = {
    kind: "sparse",
    experts: ids(e, [-1, 2, 0, -1, -1, 2], [3, 2]),
    weights: floats(e, noise(6), [3, 2]),
    bound: 4,
  };
  const { rows, slots, ends } = dispatchPlan(plan, 3);
  expect(await numbers(rows)).toEqual([1, 0, 2, -1]);
  expect(await numbers(slots)).toEqual([2, 1, 5, -1]);
  expect(await numbers(ends)).toEqual([1, 1, 3]);
});

test("expert-choice: empty places are closed up, slots still name the place", async () => {
  const e = float64();
  const plan: Plan = {
    kind: "expert-choice",
    tokens: ids(e, [-1, 4, 2, -1, 0, 1], [3, 2]),
    weights: floats(e, noise(6), [3, 2]),
  };
  const { rows, slots, ends } = dispatchPlan(plan, 2); // the third expert is a null one
  expect(await numbers(rows)).toEqual([4, 2, -1, -1, -1, -1]);
  expect(await numbers(slots)).toEqual([1, 2, -1, -1, -1, -1]);
  expect(await numbers(ends)).toEqual([1, 2]);
});

test("dense: every token to every expert, columns beyond the experts and masked tokens left out", async () => {
  const e = float64();
  const plan: Plan = { kind: "dense", weights: floats(e, noise(9), [3, 3]) };
  const { rows, slots, ends } = dispatchPlan(plan, 2, floats(e, [1, 0, 1], [3]));
  expect((await numbers(rows)).slice(0, 5)).toEqual([0, 2, 0, 2, -1]);
  expect((await numbers(slots)).slice(0, 5)).toEqual([0, 6, 1, 7, -1]);
  expect(await numbers(ends)).toEqual([2, 4]);
});

describe("masks", () => {
  const e = float64();
  const mask = floats(e, [1, 0, 1], [3]);

  test("tokenMask takes this step's columns", async () => {
    const layout = { batch: 2, sequence: 2, past: 1, mask: floats(e, [9, 1, 0, 9, 0, 1], [2, 3]) };
    expect(await numbers(tokenMask(layout) ?? mask)).toEqual([1, 0, 0, 1]);
    expect(tokenMask({ batch: 1, sequence: 3, past: 0 })).toBeUndefined();
  });

  test("every kind of plan loses its padded tokens and nothing else", async () => {
    const one = (n: number) => floats(e, new Array<number>(n).fill(1), [3, n / 3]);
    const sparse = maskPlan(
      { kind: "sparse", experts: ids(e, [0, 1, 2, 3, 4, 5], [3, 2]), weights: one(6), bound: 3 },
      mask,
    );
    expect(await numbers(sparse.experts)).toEqual([0, 1, -1, -1, 4, 5]);
    expect(await numbers(sparse.weights)).toEqual([1, 1, 0, 0, 1, 1]);
    expect(sparse.bound).toBe(3);
    expect(await numbers(maskPlan({ kind: "dense", weights: one(6) }, mask).weights)).toEqual([1, 1, 0, 0, 1, 1]);
    const choice = maskPlan(
      { kind: "expert-choice", tokens: ids(e, [1, 0, -1, 2], [2, 2]), weights: floats(e, [1, 1, 1, 1], [2, 2]) },
      mask,
    );
    expect(await numbers(choice.tokens)).toEqual([-1, 0, -1, 2]);
    expect(await numbers(choice.weights)).toEqual([0, 1, 0, 1]);
    const weights = reshape(one(6), [1, 3, 2]);
    const slots = maskPlan({ kind: "slots", dispatch: weights, combine: weights }, mask);
    expect(await numbers(slots.dispatch)).toEqual([1, 1, 0, 0, 1, 1]);
    expect(await numbers(slots.combine)).toEqual([1, 1, 0, 0, 1, 1]);
    expect(
      await numbers(maskPlan({ kind: "merge", groups: ids(e, [4, 5, 6], [3]), coefficients: [] }, mask).groups),
    ).toEqual([4, -1, 6]);
  });
});

test("plans whose parts do not fit are refused with their shapes", () => {
  const e = float64();
  const weights = floats(e, [1, 1], [2, 1]);
  expect(() => dispatchPlan({ kind: "sparse", experts: ids(e, [0, 1], [1, 2]), weights }, 2)).toThrow(ShapeError);
  expect(() => dispatchPlan({ kind: "dense", weights: floats(e, [1], []) }, 2)).toThrow(/two dimensions/);
});
