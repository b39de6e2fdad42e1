// Which experts work together, and for whom: pairs of experts that meet in the same tokens, how evenly pairs and experts are used
// (Expert Race 2503.16057), the loss built on them, and the share of the work that a group of tokens gets (2601.15370).
import { ShapeError } from "../errors.ts";
import { add, div, less, maximum, mul, neg, stopGradient, where } from "../ops/elementwise.ts";
import { matmul } from "../ops/matmul.ts";
import { softmax } from "../ops/normalise.ts";
import { cumsum, maxLast, sum } from "../ops/reduce.ts";
import { addRows, scatterLast, takeRows, topkIndices } from "../ops/rows.ts";
import { constant, hostConstant, reshape, transpose } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";
import type { TokenPlan } from "./dispatch.ts";
import { checkPlan, filled, inside } from "./parts.ts";

/**
 * Who meets whom: f32 `[tokens, experts]`, 1 where a real expert sees the token, without gradient. A dense plan meets where its weight
 * is not 0. Apply `maskPlan` first, so that padding meets nobody.
 */
export function assignments(
  plan: TokenPlan,
  { tokens, experts }: { readonly tokens: number; readonly experts: number },
): Tensor {
  checkPlan(plan);
  switch (plan.kind) {
    case "sparse": {
      const real = where(inside(plan.experts, experts), plan.experts, -1); // [tokens, k]
      return scatterLast(filled(plan.weights, real.shape, 1), real, experts);
    }
    case "dense": {
      const { weights } = plan;
      if (weights.shape[1] !== experts) {
        throw new ShapeError(`assignments: dense weights are ${show(weights)}, expected [${tokens}, ${experts}]`);
      }
      return stopGradient(maximum(less(weights, 0), less(0, weights)));
    }
    case "expert-choice": {
      const places = filled(plan.weights, plan.tokens.shape, 1); // [experts, capacity]
      return transpose(scatterLast(places, plan.tokens, tokens), [1, 0]);
    }
    default:
      return plan satisfies never;
  }
}

/** `assigned [tokens, experts]` -> `[experts, experts]`: tokens that both experts see; the diagonal is each expert's load. */
export function coActivation(assigned: Tensor): Tensor {
  return matmul(assigned, assigned, { transposeA: true });
}

/** MaxVio of `load [experts]`, []: how far the busiest expert is above the mean, in units of the mean; 0 without load. */
export function maxViolation(load: Tensor): Tensor {
  const total = sum(load); // []
  const mean = mul(total, 1 / Math.max(load.size, 1));
  const worst = reshape(maxLast(reshape(load, [1, load.size])), []);
  return div(add(worst, neg(mean)), where(less(0, total), mean, 1));
}

/**
 * How many of the pairs of experts are in use, [], 0 to 1 (2503.16057): pairs sorted by how often they meet, the share of them before
 * which less than `reach` of all meetings lies. `together [experts, experts]` is `coActivation`; 0 for a single expert.
 */
export function combinationUsage(together: Tensor, { reach = 0.95 }: { readonly reach?: number } = {}): Tensor {
  const [experts = 0] = together.shape;
  const above = Array.from({ length: experts * experts }, (_, i) => i).filter((i) => i % experts > i / experts);
  const n = above.length;
  if (n === 0) return filled(together, [], 0);
  const at = hostConstant(together, Int32Array.from(above), [n]);
  const pairs = takeRows(reshape(together, [experts * experts]), at); // [pairs]
  const sorted = takeRows(pairs, topkIndices(pairs, n));
  const total = sum(pairs);
  const reached = cumsum(div(sorted, maximum(total, 1)), { axis: 0 });
  return mul(mul(sum(less(reached, reach)), less(0, total)), 1 / n);
}

/**
 * The weights W of the router similarity loss (2503.16057), `[experts, experts]`, without gradient: on the diagonal
 * E M_ii / Σ_i M_ii, off it (E² - E) M_ij / Σ_{i≠j} M_ij, M = `together`; zeros where a sum is 0.
 */
export function similarityWeights(together: Tensor): Tensor {
  const [experts = 0] = together.shape;
  const own = hostConstant(
    together,
    Float32Array.from({ length: experts * experts }, (_, i) => Number(i % experts === Math.floor(i / experts))),
    [experts, experts],
  );
  const counts = stopGradient(together);
  const loads = where(own, counts, 0);
  const meetings = where(own, 0, counts);
  const share = (part: Tensor, scale: number): Tensor => mul(div(part, maximum(sum(part), 1)), scale);
  return add(share(loads, experts), share(meetings, experts * experts - experts));
}

/**
 * Router similarity loss of Expert Race (2503.16057), []: (1/T) Σ_ij W_ij (PᵀP)_ij with P = softmax of `logits [tokens, experts]` and W
 * from who was chosen together in `assigned [tokens, experts]`. The diagonal balances the loads; the rest keeps experts apart
 * that have alike scores and are chosen together, which a balance loss cannot see. Uniform P gives 1. `mask [tokens]`: 1 = real token.
 */
export function routerSimilarity(options: {
  readonly logits: Tensor;
  readonly assigned: Tensor;
  readonly mask?: Tensor;
}): Tensor {
  const { logits, assigned, mask } = options;
  const [tokens = 0] = logits.shape;
  if (logits.shape.length !== 2 || assigned.shape.join() !== logits.shape.join()) {
    throw new ShapeError(
      `routerSimilarity: logits ${show(logits)} and assigned ${show(assigned)}; expected [tokens, experts] twice`,
    );
  }
  const column = mask && reshape(mask, [tokens, 1]);
  const real = (x: Tensor): Tensor => (column ? where(column, x, 0) : x);
  const probabilities = real(softmax(logits)); // [tokens, experts]
  const alike = matmul(probabilities, probabilities, { transposeA: true }); // [experts, experts]
  const weights = similarityWeights(coActivation(real(assigned)));
  const count = mask ? maximum(sum(mask), 1) : constant(logits, Math.max(tokens, 1));
  return div(sum(mul(weights, alike)), count);
}

/** How many real experts see each token, f32 `[tokens]`, from `assigned [tokens, experts]`. */
export function expertsPerToken(assigned: Tensor): Tensor {
  return sum(assigned, [1]);
}

/** What the tokens of each group cost, `[groups]` each. */
export interface Shares {
  /** Mean over the group's tokens; 0 for an empty group. */
  readonly mean: Tensor;
  /** The group's part of the sum over all groups, 0 to 1. */
  readonly share: Tensor;
}

/**
 * A quantity per token, such as `expertsPerToken`, by group (modality, domain, difficulty): `perToken [tokens]`, `groups` i32 `[tokens]`
 * with ids from 0 to count - 1, others count nowhere. 2601.15370 calls mean / k a modality's compute intensity.
 */
export function byGroup(perToken: Tensor, groups: Tensor, count: number): Shares {
  const n = perToken.size;
  if (groups.dtype !== "i32" || groups.shape.join() !== perToken.shape.join() || perToken.shape.length !== 1) {
    throw new ShapeError(`byGroup: ${show(perToken)} by ${show(groups)}; expected [tokens] and i32 [tokens]`);
  }
  const total = (x: Tensor): Tensor => reshape(addRows(reshape(x, [n, 1]), groups, count), [count]);
  const sums = total(stopGradient(perToken));
  const tokens = total(filled(perToken, [n], 1));
  const all = sum(sums);
  return { mean: div(sums, maximum(tokens, 1)), share: div(sums, where(less(0, all), all, 1)) };
}
