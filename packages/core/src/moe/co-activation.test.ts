// Pairs of experts, the measures built on them and the router similarity loss, against loops and numbers counted by hand.
import { expect, test } from "vitest";
import {
  assignments,
  byGroup,
  coActivation,
  combinationUsage,
  expertsPerToken,
  maxViolation,
  routerSimilarity,
  similarityWeights,
} from "./co-activation.ts";
import type { TokenPlan } from "./dispatch.ts";
import { close, compare, float64, floats, ids, numbers } from "./moe.test-util.ts";

const e = float64();

test("who meets whom, for every plan that names tokens and experts", async () => {
  const sizes = { tokens: 3, experts: 3 };
  const met = async (plan: TokenPlan): Promise<number[]> => numbers(assignments(plan, sizes));
  // Id 3 is a null expert, -1 an empty slot.
  expect(
    await met({
      kind: "sparse",
      experts: ids(e, [0, 3, -1, -1, 2, 0], [3, 2]),
      weights: floats(e, [0.5, 0.25, 0, 0, -1, 2], [3, 2]),
    }),
  ).toEqual([1, 0, 0, 0, 0, 0, 1, 0, 1]);
  expect(await met({ kind: "dense", weights: floats(e, [0.5, 0, -1, 0, 0, 0, 1, 2, 3], [3, 3]) })).toEqual([
    1, 0, 1, 0, 0, 0, 1, 1, 1,
  ]);
  expect(
    await met({
      kind: "expert-choice",
      tokens: ids(e, [2, -1, 0, 2, -1, -1], [3, 2]),
      weights: floats(e, [1, 0, 1, 1, 0, 0], [3, 2]),
    }),
  ).toEqual([0, 1, 0, 0, 0, 0, 1, 1, 0]);
  expect(() => assignments({ kind: "dense", weights: floats(e, [1, 2], [1, 2]) }, sizes)).toThrow(
    "dense weights are f32 [1, 2]",
  );
});

test("no token and a single expert", async () => {
  const none = floats(e, [], [0, 2]);
  expect(await numbers(coActivation(none))).toEqual([0, 0, 0, 0]);
  expect(await numbers(maxViolation(floats(e, [0, 0], [2])))).toEqual([0]);
  expect(await numbers(combinationUsage(coActivation(none)))).toEqual([0]);
  expect(await numbers(combinationUsage(floats(e, [4], [1, 1])))).toEqual([0]);
  expect(await numbers(routerSimilarity({ logits: none, assigned: none }))).toEqual([0]);
  const one = floats(e, [1, 1, 1], [3, 1]);
  expect(await numbers(routerSimilarity({ logits: one, assigned: one }))).toEqual([1]);
});

test("loads and pairs", async () => {
  const assigned = floats(e, [1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0], [4, 3]);
  expect(await numbers(coActivation(assigned))).toEqual([2, 2, 0, 2, 4, 1, 0, 1, 1]);
  expect(await numbers(expertsPerToken(assigned))).toEqual([2, 2, 2, 1]);
  close(await numbers(maxViolation(floats(e, [2, 4, 1], [3]))), [4 / (7 / 3) - 1]);
  // Meetings 2, 1, 0: after the first pair 2/3 is reached, after the second all.
  close(await numbers(combinationUsage(coActivation(assigned))), [1 / 3]);
  close(await numbers(combinationUsage(coActivation(assigned), { reach: 0.6 })), [0]);
});

test("by group: mean, share of the sum, and groups nobody is in", async () => {
  const { mean, share } = byGroup(floats(e, [1, 2, 3, 9], [4]), ids(e, [0, 2, 2, -1], [4]), 3);
  expect(await numbers(mean)).toEqual([1, 0, 2.5]);
  close(await numbers(share), [1 / 6, 0, 5 / 6]);
  const idle = byGroup(floats(e, [0, 0], [2]), ids(e, [0, 1], [2]), 2);
  expect(await numbers(idle.share)).toEqual([0, 0]);
  expect(() => byGroup(floats(e, [1], [1]), floats(e, [0], [1]), 1)).toThrow("expected [tokens] and i32 [tokens]");
});

const [tokens, experts] = [5, 3];
const assigned = [1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0];
/** The loss in loops, over the tokens that are real. */
function similarity(logits: readonly number[], real: readonly number[]): number {
  const rows = Array.from({ length: tokens }, (_, t) => t).filter((t) => real[t] === 1);
  const p = rows.map((t) => {
    const exps = Array.from({ length: experts }, (_, i) => Math.exp(logits[t * experts + i] ?? 0));
    const total = exps.reduce((sum, x) => sum + x, 0);
    return exps.map((x) => x / total);
  });
  const pairs = Array.from({ length: experts * experts }, (_, i) => [Math.floor(i / experts), i % experts] as const);
  const met = pairs.map(([i, j]) =>
    rows.reduce((n, t) => n + (assigned[t * experts + i] ?? 0) * (assigned[t * experts + j] ?? 0), 0),
  );
  const sumOf = (own: boolean): number =>
    pairs.reduce((sum, [i, j], at) => sum + ((i === j) === own ? (met[at] ?? 0) : 0), 0);
  return pairs.reduce((loss, [i, j], at) => {
    const scale = i === j ? experts : experts * experts - experts;
    const weight = (scale * (met[at] ?? 0)) / sumOf(i === j);
    return loss + (weight * p.reduce((sum, row) => sum + (row[i] ?? 0) * (row[j] ?? 0), 0)) / rows.length;
  }, 0);
}

test.each([
  ["all tokens", [1, 1, 1, 1, 1]],
  ["padding left out", [1, 0, 1, 1, 0]],
])("router similarity and its gradient: %s", async (_, real) => {
  await compare({
    shapes: { logits: [tokens, experts] },
    forward: ({ logits }, on) =>
      routerSimilarity({
        logits,
        assigned: floats(on, assigned, [tokens, experts]),
        ...(real.includes(0) ? { mask: floats(on, real, [tokens]) } : {}),
      }),
    oracle: ({ logits }) => [similarity(logits, real)],
  });
});

test("router similarity is 1 for uniform probabilities, whoever is chosen, and tells collapsed pairs from diverse ones", async () => {
  const uniform = floats(e, new Array(15).fill(0.3), [5, 3]);
  close(await numbers(routerSimilarity({ logits: uniform, assigned: floats(e, assigned, [5, 3]) })), [1]);
  // Nobody meets anybody: only the diagonal is left.
  const alone = floats(e, [1, 0, 1, 0, 0, 1], [3, 2]);
  close(await numbers(similarityWeights(coActivation(alone))), [4 / 3, 0, 0, 2 / 3]);
  const two = [4, 4, 0, 0, 0, 0, 4, 4];
  const collapsed = floats(e, two, [2, 4]);
  const pairs = floats(
    e,
    two.map((x) => x / 4),
    [2, 4],
  );
  const [loss = 0] = await numbers(routerSimilarity({ logits: collapsed, assigned: pairs }));
  expect(loss).toBeGreaterThan(1.9);
  expect(() => routerSimilarity({ logits: uniform, assigned: pairs })).toThrow("expected [tokens, experts] twice");
});
