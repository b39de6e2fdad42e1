// How much two routings of the same tokens differ: between two checkpoints of one run (routing fluctuation, as
// StableMoE 2204.08396 and Graph of Tokens 2505.00792 look at it), or between a clean and a noisy input at one.
import { ShapeError } from "../errors.ts";
import { add, affine, div, less, maximum, mul, neg, square, where } from "../ops/elementwise.ts";
import { sum } from "../ops/reduce.ts";
import { scatterLast } from "../ops/rows.ts";
import { constant, reshape, slice } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";
import { filled, inside } from "./parts.ts";

/** Three ways to say how much routing changed, each [] and from 0 (nothing) to 1. */
export interface RoutingChange {
  /** Share of the tokens whose set of experts is another one: the headline rate. */
  readonly sets: Tensor;
  /** Mean over the tokens of 1 - |K ∩ K'| / k, k the larger of the two sets: the router change rate of 2505.10860. */
  readonly overlap: Tensor;
  /** Share of the tokens whose first expert is another one. */
  readonly firsts: Tensor;
}

/**
 * Compares `before` and `after`, i32 `[tokens, k]` and `[tokens, k']`, best expert first, -1 = empty slot, each expert
 * at most once per token. Ids from `experts` on (null experts) count as no expert. A token that has none in both has not
 * changed. `mask [tokens]`: 1 = real token. No token: 0. Throws ShapeError for other shapes.
 */
export function routingChange(
  before: Tensor,
  after: Tensor,
  { experts, mask }: { readonly experts: number; readonly mask?: Tensor },
): RoutingChange {
  const [tokens = 0] = before.shape;
  for (const ids of [before, after]) {
    if (ids.dtype !== "i32" || ids.shape.length !== 2 || ids.shape[0] !== tokens) {
      throw new ShapeError(
        `routingChange: ids are ${show(before)} and ${show(after)}; expected i32 [tokens, k] of the same tokens`,
      );
    }
  }
  if (mask && (mask.shape.length !== 1 || mask.shape[0] !== tokens)) {
    throw new ShapeError(`routingChange: the mask is ${show(mask)}, expected [${tokens}], 1 = real token`);
  }
  const members = (ids: Tensor): Tensor => {
    const kept = where(inside(ids, experts), ids, -1);
    return scatterLast(filled(ids, ids.shape, 1), kept, experts); // [tokens, experts], 0 or 1
  };
  const first = (ids: Tensor): Tensor => members(slice(ids, [0, 0], [tokens, Math.min(ids.shape[1] ?? 0, 1)]));
  const size = (set: Tensor): Tensor => sum(set, [1]); // [tokens]
  const differ = (a: Tensor, b: Tensor): Tensor => less(0, size(square(add(a, neg(b))))); // [tokens], 0 or 1
  const count = mask ? maximum(sum(mask), 1) : constant(filled(before, [], 0), Math.max(tokens, 1));
  const share = (perToken: Tensor): Tensor => reshape(div(sum(mask ? mul(perToken, mask) : perToken), count), []);
  const [a, b] = [members(before), members(after)];
  const larger = maximum(size(a), size(b));
  return {
    sets: share(differ(a, b)),
    overlap: share(div(add(larger, neg(size(mul(a, b)))), maximum(larger, 1))),
    firsts: share(differ(first(before), first(after))),
  };
}

/** How routing settled over the checkpoints of a run, each entry []. */
export interface RoutingHistory {
  /** Router saturation at each checkpoint: mean over the tokens of |K ∩ K_final| / k; 1 at the last. */
  readonly saturation: readonly Tensor[];
  /** Router change rate between each checkpoint and the next: mean of 1 - |K ∩ K_next| / k; one entry less. */
  readonly changeRate: readonly Tensor[];
}

/**
 * Router saturation (2409.02060) and router change rate (2505.10860) of the same tokens' experts at several checkpoints, i32 `[tokens, k]`
 * each, in order of training; the rest as in `routingChange`. Throws ShapeError without a checkpoint.
 */
export function routingHistory(
  checkpoints: readonly Tensor[],
  options: { readonly experts: number; readonly mask?: Tensor },
): RoutingHistory {
  const last = checkpoints.at(-1);
  if (last === undefined) throw new ShapeError("routingHistory: no checkpoints; give the experts of at least one");
  const saturation = checkpoints.map((ids) =>
    affine(routingChange(ids, last, options).overlap, { scale: -1, shift: 1 }),
  );
  const changeRate = checkpoints.slice(1).map((ids, i) => routingChange(checkpoints[i] ?? ids, ids, options).overlap);
  return { saturation, changeRate };
}
