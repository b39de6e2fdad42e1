// The competition of Expert Race (2503.16057, section 3.1): which pairs of token and expert win when scores are split into
// groups and each group keeps its best. Six ways to split, one rule.
import {
  affine,
  broadcastTo,
  gatherLast,
  hostConstant,
  less,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  stopGradient,
  sum,
  sumLast,
  type Tensor,
  topkIndices,
  transpose,
  where,
} from "@switchyard/core";
import { type Layout, tokenMask } from "@switchyard/core/moe";

/**
 * Who competes: the experts for a token ("token"), the tokens of a sequence for an expert ("expert"), those of the batch
 * for an expert ("bl"), all pairs at one position ("be"), all pairs of a sequence ("le"), or all pairs of the batch ("race").
 */
export type RaceStrategy = "race" | "token" | "expert" | "bl" | "be" | "le";

// Of the axes batch, sequence, experts: their order, and how many of them name a group.
const splits: Readonly<Record<RaceStrategy, { readonly order: readonly number[]; readonly named: number }>> = {
  token: { order: [0, 1, 2], named: 2 },
  expert: { order: [0, 2, 1], named: 2 },
  bl: { order: [2, 0, 1], named: 1 },
  be: { order: [1, 0, 2], named: 1 },
  le: { order: [0, 1, 2], named: 1 },
  race: { order: [0, 1, 2], named: 0 },
};
export const strategies = Object.keys(splits);

export interface RaceRules {
  readonly strategy: RaceStrategy;
  /** Experts per token on average. */
  readonly k: number;
  /** What to do when a group's places, k / experts of its entries, are no whole number. */
  readonly uneven: "refuse" | "floor";
}

export interface RaceResult {
  /** f32 `[tokens, experts]`: 1 for the pairs that won, without gradient. */
  readonly chosen: Tensor;
  /** `[groups]`: the lowest score that won, 0 in a group without places. */
  readonly thresholds: Tensor;
  /** f32 `[groups]`: 1 where a group had a place. */
  readonly present: Tensor;
  /** Places of each group, before padding takes some away. */
  readonly places: number;
  readonly groups: number;
}

/**
 * Lets the pairs of `scores [batch * sequence, experts]` compete. Padding does not take part, and a group has places for
 * its real tokens only. Ties: the pair that comes first in the group. Throws ShapeError for an uneven group unless `uneven`
 * is "floor".
 */
export function compete(scores: Tensor, layout: Layout, { strategy, k, uneven }: RaceRules): RaceResult {
  const { batch, sequence } = layout;
  const [tokens = 0, experts = 1] = scores.shape;
  const { order, named } = splits[strategy];
  const sizes = order.map((axis) => [batch, sequence, experts][axis] ?? 1);
  const product = (of: readonly number[]): number => of.reduce((n, d) => n * d, 1);
  const [groups, entries] = [product(sizes.slice(0, named)), product(sizes.slice(named))];
  if (uneven === "refuse" && (k * entries) % experts !== 0) {
    throw new ShapeError(
      `expertRace: ${entries} entries at k = ${k} of ${experts} experts make ${(k * entries) / experts} places per group of ` +
        `strategy "${strategy}"; choose sizes that give a whole number, or uneven: "floor"`,
    );
  }
  const places = Math.floor((k * entries) / experts);
  const grouped = (x: Tensor): Tensor =>
    reshape(transpose(reshape(x, [batch, sequence, experts]), order), [groups, entries]);

  const mask = tokenMask(layout);
  const real = mask && broadcastTo(reshape(mask, [tokens, 1]), [tokens, experts]);
  const fixed = stopGradient(scores);
  const open = grouped(real ? where(real, fixed, Number.NEGATIVE_INFINITY) : fixed);
  const ids = topkIndices(open, places); // [groups, places], best first
  // Place j is there while (j + 1) experts <= k entries, counting real entries; both are whole numbers.
  const line = (next: number): Tensor =>
    hostConstant(
      scores,
      Float32Array.from({ length: places }, (_, j) => (j + next) * experts),
      [1, places],
    );
  const offered = real
    ? affine(sumLast(grouped(real)), { scale: k, shift: 0.5 })
    : hostConstant(scores, new Float32Array(groups).fill(k * entries + 0.5), [groups, 1]);
  const won = less(line(1), offered); // [groups, places]
  const last = mul(won, less(offered, line(2)));
  const byGroup = scatterLast(won, ids, entries); // [groups, entries]
  const back = order.map((_, axis) => order.indexOf(axis));
  return {
    chosen: reshape(transpose(reshape(byGroup, sizes), back), [tokens, experts]),
    thresholds: sum(where(last, gatherLast(open, ids), 0), [1]),
    present: sum(last, [1]),
    places,
    groups,
  };
}
