// Capacity against the reference vectors, the GShard order against a naive loop, and the cases no vector has.
import { describe, expect, test } from "vitest";
import fixture from "../../test/fixtures/routers-capacity.json" with { type: "json" };
import { autodiff, grad, watch } from "../autodiff.ts";
import { ShapeError } from "../errors.ts";
import { mul } from "../ops/elementwise.ts";
import { softmaxTopk } from "../ops/experts.ts";
import { sum } from "../ops/reduce.ts";
import { scatterLast } from "../ops/rows.ts";
import { applyCapacity, type CapacityOptions, capacityOf, type DropPolicy, padToCapacity } from "./capacity.ts";
import { expertLoad } from "./metrics.ts";
import { close, float64, floats, ids, noise, numbers } from "./moe.test-util.ts";
import type { SparsePlan } from "./plan.ts";

describe.each(fixture.cases)("vectors: $id", ({ config, inputs, expected }) => {
  const e = float64();
  const [tokens, experts] = [inputs.logits.length, inputs.logits[0]?.length ?? 0];
  const { weights, ids: chosen } = softmaxTopk(floats(e, inputs.logits.flat(), [tokens, experts]), {
    k: config.k,
    order: config.softmax === "before_topk" ? "softmax-topk" : "topk-softmax",
  });
  const plan: SparsePlan = { kind: "sparse", experts: chosen, weights };
  const policy: DropPolicy = config.drop_policy === "probs" ? "probability" : "position";
  const options: CapacityOptions = { experts, policy, factor: config.capacity_factor };

  test("the capacity, the loads before, who is kept, the weights left, how many are dropped", async () => {
    const limited = applyCapacity(plan, options);
    expect(limited.capacity).toBe(expected.capacity);
    expect(await numbers(expertLoad(plan, { experts }))).toEqual(expected.tokens_per_expert_before_drop);
    expect(await numbers(scatterLast(limited.kept, plan.experts, experts))).toEqual(expected.kept_mask.flat());
    close(await numbers(scatterLast(limited.plan.weights, limited.plan.experts, experts)), expected.combine.flat());
    close(await numbers(limited.dropped), [expected.dropped / (tokens * config.k)]);
    const load = await numbers(expertLoad(limited.plan, { experts }));
    expect(load).toEqual(expected.tokens_per_expert_before_drop.map((n) => Math.min(n, expected.capacity)));
  });

  test("the same selection in the shape [experts, capacity]", async () => {
    const padded = padToCapacity(plan, options);
    expect(padded.tokens.shape).toEqual([experts, expected.capacity]);
    const [places, weighed] = [await numbers(padded.tokens), await numbers(padded.weights)];
    const dense = new Array<number>(tokens * experts).fill(0);
    places.forEach((t, place) => {
      const expert = Math.floor(place / expected.capacity);
      if (t >= 0) dense[t * experts + expert] = (dense[t * experts + expert] ?? 0) + (weighed[place] ?? 0);
      else expect(weighed[place]).toBe(0);
    });
    close(dense, expected.combine.flat());
  });
});

/** Who is kept, by the plain rule of each policy. */
function kept(
  chosen: number[],
  weights: number[],
  k: number,
  rest: { experts: number; capacity: number; policy: DropPolicy },
): number[] {
  const order = chosen.map((_, slot) => slot);
  if (rest.policy === "choice") order.sort((a, b) => (a % k) - (b % k) || a - b);
  if (rest.policy === "probability") order.sort((a, b) => (weights[b] ?? 0) - (weights[a] ?? 0) || a - b);
  const used = new Array<number>(rest.experts).fill(0);
  const result = chosen.map((id) => (id >= rest.experts ? 1 : 0));
  for (const slot of order) {
    const id = chosen[slot] ?? -1;
    const before = used[id];
    if (before === undefined || before >= rest.capacity) continue;
    used[id] = before + 1;
    result[slot] = 1;
  }
  return result;
}

const policies: DropPolicy[] = ["probability", "position", "choice"];
describe.each(policies)("%s", (policy) => {
  test.each([
    { tokens: 11, k: 3, experts: 4, capacity: 3, nulls: 0 },
    { tokens: 11, k: 3, experts: 4, capacity: 3, nulls: 2 },
    { tokens: 7, k: 2, experts: 3, capacity: 0, nulls: 1 },
    { tokens: 5, k: 1, experts: 1, capacity: 2, nulls: 0 },
    { tokens: 5, k: 2, experts: 4, capacity: 100, nulls: 0 },
    { tokens: 0, k: 2, experts: 3, capacity: 1, nulls: 0 },
  ])(
    "$tokens tokens, k $k, $experts experts + $nulls nulls, capacity $capacity",
    async ({ tokens, k, experts, capacity, nulls }) => {
      const e = float64();
      // Empty slots, null experts, tied and negative weights.
      const chosen = noise(tokens * k, 7).map((x) => Math.floor(((x + 1) / 2) * (experts + nulls + 1)) - 1);
      const weights = noise(tokens * k, 8).map((x) => Math.round(x * 4) / 4);
      const plan: SparsePlan = {
        kind: "sparse",
        experts: ids(e, chosen, [tokens, k]),
        weights: floats(e, weights, [tokens, k]),
        bound: tokens * k,
      };
      const before = e.live();
      const limited = e.scope(() => applyCapacity(plan, { experts, capacity, policy }));
      const expected = kept(chosen, weights, k, { experts, capacity, policy });
      expect(await numbers(limited.kept)).toEqual(expected);
      expect(await numbers(limited.plan.experts)).toEqual(chosen.map((id, slot) => (expected[slot] ? id : -1)));
      expect(await numbers(limited.plan.weights)).toEqual(weights.map((w, slot) => (expected[slot] ? w : 0)));
      expect(limited.plan.bound).toBe(tokens * k);
      const real = chosen.filter((id) => id >= 0 && id < experts).length;
      const left = chosen.filter((id, slot) => id >= 0 && id < experts && expected[slot]).length;
      close(await numbers(limited.dropped), [real === 0 ? 0 : (real - left) / real]);
      for (const x of [limited.plan.experts, limited.plan.weights, limited.kept, limited.dropped]) x.dispose();
      expect(e.live()).toBe(before);
    },
  );
});

test("kept weights have gradient 1, dropped ones 0, also in the padded shape", async () => {
  const e = float64();
  const weights = watch(autodiff(e), floats(e, [0.5, 0.9, 0.7], [3, 1]));
  const plan: SparsePlan = { kind: "sparse", experts: ids(e, [0, 0, 0], [3, 1]), weights };
  const options: CapacityOptions = { experts: 2, capacity: 2, policy: "probability" };
  expect(await numbers(grad(sum(applyCapacity(plan, options).plan.weights), weights))).toEqual([0, 1, 1]);
  const padded = padToCapacity(plan, options);
  expect(await numbers(padded.tokens)).toEqual([1, 2, -1, -1]);
  const scale = floats(e, [2, 3, 5, 7], [2, 2]);
  expect(await numbers(grad(sum(mul(padded.weights, scale)), weights))).toEqual([0, 2, 3]);
});

describe("capacityOf", () => {
  test.each([
    { formula: { tokens: 8, experts: 4, k: 2, factor: 1 }, expected: 4 },
    { formula: { tokens: 7, experts: 4, factor: 1.25 }, expected: 3 },
    { formula: { tokens: 7, experts: 4, factor: 1.25, round: "down" as const }, expected: 2 },
    { formula: { tokens: 100, experts: 10, factor: 1.1 }, expected: 11 }, // 11.000000000000002 in floating point
    { formula: { tokens: 30, experts: 10, factor: 0.7, round: "down" as const }, expected: 2 },
    { formula: { tokens: 100, experts: 1, factor: 0.29, round: "down" as const }, expected: 29 }, // 28.999999999999996
    { formula: { tokens: 3, experts: 64, factor: 1, round: "down" as const, minimum: 4 }, expected: 4 },
    { formula: { tokens: 0, experts: 4, factor: 2 }, expected: 0 },
  ])("$formula gives $expected", ({ formula, expected }) => expect(capacityOf(formula)).toBe(expected));

  test("refuses factors and capacities that are not counts", () => {
    const e = float64();
    const plan: SparsePlan = { kind: "sparse", experts: ids(e, [0], [1, 1]), weights: floats(e, [1], [1, 1]) };
    expect(() => capacityOf({ tokens: 4, experts: 2, factor: -1 })).toThrow(ShapeError);
    expect(() => applyCapacity(plan, { experts: 1, policy: "position", capacity: 1.5 })).toThrow(/1.5 rows per expert/);
  });
});
