// What deepSeekV2 and deepSeekV3 share: experts lie in groups of neighbours (one group per device), and a token may only take
// experts of its best groups.
import {
  full,
  gatherLast,
  reshape,
  ShapeError,
  scatterLast,
  sumLast,
  type Tensor,
  topkIndices,
  where,
} from "@switchyard/core";

export interface GroupLimit {
  /** Groups of equally many neighbouring experts. */
  readonly groups: number;
  /** Groups that a token may use. */
  readonly keptGroups: number;
  /** A group is judged by the sum of this many of its best scores (all, where it has fewer): 1 in V2, 2 in V3. */
  readonly best: number;
  /** What the scores of the other groups become; default -Infinity, which is never chosen. */
  readonly excluded?: number;
}

export interface GroupLimited {
  /** `[tokens, groups]`. */
  readonly groupScores: Tensor;
  /** The groups a token may use, best first: i32 `[tokens, keptGroups]`. */
  readonly kept: Tensor;
  /** The same as 0 and 1, `[tokens, groups]`. */
  readonly mask: Tensor;
  /** The scores, those of excluded groups replaced: `[tokens, experts]`. */
  readonly scores: Tensor;
}

/** Keeps the scores `[tokens, experts]` of each token's best groups, for choosing among them. */
export function limitToGroups(scores: Tensor, limit: GroupLimit): GroupLimited {
  const { groups, keptGroups, best, excluded = Number.NEGATIVE_INFINITY } = limit;
  const [tokens = 0, experts = 0] = scores.shape;
  const size = experts / groups;
  const grouped = reshape(scores, [tokens, groups, size]);
  const top = gatherLast(grouped, topkIndices(grouped, Math.min(best, size))); // [tokens, groups, best]
  const groupScores = reshape(sumLast(top), [tokens, groups]);
  const kept = topkIndices(groupScores, keptGroups); // [tokens, keptGroups]
  const mask = scatterLast(full(scores, [tokens, keptGroups], 1), kept, groups); // [tokens, groups]
  const limited = where(reshape(mask, [tokens, groups, 1]), grouped, excluded);
  return { groupScores, kept, mask, scores: reshape(limited, [tokens, experts]) };
}

/**
 * Ids i32 `[tokens, k]` of the k largest scores `[tokens, experts]`. A score of -Infinity is never taken while another is left,
 * so with the limit kept by `checkGroups` none is.
 */
export function bestInGroups(scores: Tensor, k: number, limit: GroupLimit): Tensor {
  return topkIndices(eligible(scores, limit).order, k);
}

/** The scores by which experts are taken, and how many of them a token can reach. */
export function eligible(scores: Tensor, limit: GroupLimit): { readonly order: Tensor; readonly reachable: number } {
  const { groups, keptGroups, excluded = Number.NEGATIVE_INFINITY } = limit;
  const experts = scores.shape[1] ?? 0;
  if (keptGroups === groups) return { order: scores, reachable: experts };
  const reachable = Number.isFinite(excluded) ? experts : (experts / groups) * keptGroups;
  return { order: limitToGroups(scores, limit).scores, reachable };
}

/** Checks what can be checked without knowing the experts: throws ShapeError unless 1 <= keptGroups <= groups, whole numbers. */
export function checkLimit(router: string, groups: number, keptGroups: number): void {
  if (!Number.isInteger(groups) || groups < 1) {
    throw new ShapeError(`${router}: groups = ${groups}; expected a whole number from 1`);
  }
  if (!Number.isInteger(keptGroups) || keptGroups < 1 || keptGroups > groups) {
    throw new ShapeError(
      `${router}: keptGroups = ${keptGroups} of ${groups} groups; expected a whole number from 1 to ${groups}`,
    );
  }
}

/** Throws ShapeError unless the experts split evenly into the groups, and the kept ones hold k. */
export function checkGroups(
  router: string,
  { groups, keptGroups, k }: { readonly groups: number; readonly keptGroups: number; readonly k: number },
  experts: number,
): void {
  if (experts % groups !== 0) {
    throw new ShapeError(
      `${router}: ${experts} experts do not split into ${groups} groups; choose a number of groups that divides them`,
    );
  }
  const reachable = (experts / groups) * keptGroups;
  if (k > reachable) {
    throw new ShapeError(
      `${router}: k = ${k}, but ${keptGroups} of ${groups} groups hold only ${reachable} experts; keep more groups or lower k`,
    );
  }
}
