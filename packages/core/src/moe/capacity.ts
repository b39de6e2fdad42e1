// Capacity: a limit on the tokens of each expert, and which ones are dropped. Functions of plans, all on the device.
import { ShapeError } from "../errors.ts";
import { add, cast, div, less, maximum, mul, sub, where } from "../ops/elementwise.ts";
import { dispatch } from "../ops/experts.ts";
import { sum } from "../ops/reduce.ts";
import { addRows, argsort, takeRows } from "../ops/rows.ts";
import { concat, hostConstant, reshape, slice, transpose } from "../ops/shape.ts";
import type { Tensor } from "../tensor.ts";
import { checkPlan, inside } from "./parts.ts";
import type { ExpertChoicePlan, SparsePlan } from "./plan.ts";

/**
 * Which assignments an expert keeps. "probability": the largest combine weights (Megatron's `probs`); "position": the first in token
 * order; "choice": all first choices in token order, then all second choices, and so on (GShard 2006.16668). Ties: lower token.
 */
export type DropPolicy = "probability" | "position" | "choice";

export interface CapacityFormula {
  readonly tokens: number;
  readonly experts: number;
  /** Choices per token; default 1. */
  readonly k?: number;
  /** 1 = exactly enough for even loads. */
  readonly factor: number;
  /** At least this many (tensor2tensor: 4); default 0. */
  readonly minimum?: number;
  /** Switch and Megatron round up (default), GShard and Expert Choice down. */
  readonly round?: "up" | "down";
}

/** factor * tokens * k / experts, rounded. */
export function capacityOf({ tokens, experts, k = 1, factor, minimum = 0, round = "up" }: CapacityFormula): number {
  if (!(factor >= 0) || !Number.isFinite(factor) || experts < 1) {
    throw new ShapeError(
      `capacity: factor ${factor} with ${experts} experts; expected a factor from 0 and at least one expert`,
    );
  }
  const exact = (factor * tokens * k) / experts;
  // 1.1 * 100 / 10 is 11.000000000000002 in floating point and must not round up to 12.
  const slack = 1e-9 * Math.max(exact, 1);
  return Math.max(round === "up" ? Math.ceil(exact - slack) : Math.floor(exact + slack), minimum);
}

export type CapacityOptions = {
  /** Real experts; ids from here on (null experts) have no limit. */
  readonly experts: number;
  readonly policy: DropPolicy;
} & ({ readonly capacity: number } | Omit<CapacityFormula, "tokens" | "experts">);

export interface Limited {
  readonly plan: SparsePlan;
  /** Rows per expert. */
  readonly capacity: number;
  /** `[tokens, k]`: 1 where the slot is still filled (null experts included). */
  readonly kept: Tensor;
  /** []: share of the assignments to real experts that was dropped, 0 when there were none. */
  readonly dropped: Tensor;
}

/**
 * Empties the slots that exceed the capacity of their expert: id -1, weight 0, no gradient; kept weights are not rescaled. Apply
 * `maskPlan` first, so that padding takes no place. Without `capacity` it is capacityOf(factor, ...) with k from the plan.
 * Throws ShapeError when the capacity is not a whole number from 0.
 */
export function applyCapacity(plan: SparsePlan, options: CapacityOptions): Limited {
  checkPlan(plan);
  const { experts, policy } = options;
  const capacity = limit(plan, options);
  const { place, slots, real } = places(plan, experts, policy);
  const fits = mul(less(place, capacity), less(-1, slots)); // [slots], in sorted order
  const n = plan.experts.size;
  const keptReal = reshape(addRows(reshape(fits, [n, 1]), slots, n), plan.experts.shape);
  const beyond = less(experts - 1, plan.experts); // null experts
  const kept = add(keptReal, beyond);
  const total = sum(real);
  const dropped = div(sub(total, sum(fits)), maximum(total, 1));
  return {
    plan: { ...plan, experts: where(kept, plan.experts, -1), weights: where(kept, plan.weights, 0) },
    capacity,
    kept,
    dropped,
  };
}

/**
 * The same selection in the fixed shape `[experts, capacity]` (Megatron's pad-to-capacity): free places hold -1. Null experts are left
 * out. Weights keep their gradient.
 */
export function padToCapacity(plan: SparsePlan, options: CapacityOptions): ExpertChoicePlan {
  checkPlan(plan);
  const { experts, policy } = options;
  const capacity = limit(plan, options);
  const { place, slots, expert } = places(plan, experts, policy);
  const fits = mul(less(place, capacity), less(-1, slots));
  const target = where(fits, add(mul(expert, capacity), place), -1); // [slots] -> flat [experts * capacity]
  const [, k = 1] = plan.experts.shape;
  const n = plan.experts.size;
  const token = hostConstant(
    plan.experts,
    Float32Array.from({ length: n }, (_, i) => Math.floor(i / k) + 1),
    [n, 1],
  );
  const shape = [experts, capacity];
  // One more than the token, so that a free place becomes -1.
  const tokens = addRows(takeRows(token, slots), target, experts * capacity);
  const weights = addRows(takeRows(reshape(plan.weights, [n, 1]), slots), target, experts * capacity);
  return {
    kind: "expert-choice",
    tokens: reshape(cast(sub(tokens, 1), "i32"), shape),
    weights: reshape(weights, shape),
  };
}

function limit(plan: SparsePlan, options: CapacityOptions): number {
  const [tokens = 0, k = 1] = plan.experts.shape;
  const capacity = "capacity" in options ? options.capacity : capacityOf({ k, ...options, tokens });
  if (!Number.isInteger(capacity) || capacity < 0) {
    throw new ShapeError(`capacity: ${capacity} rows per expert; expected a whole number from 0`);
  }
  return capacity;
}

/** The slots sorted by expert and, inside an expert, by policy: i32 `[tokens * k]` each; -1 in `slots` and `expert` at the end. */
function places(plan: SparsePlan, experts: number, policy: DropPolicy) {
  const [tokens = 0, k = 0] = plan.experts.shape;
  const n = tokens * k;
  const flat = reshape(plan.experts, [n]);
  const order = orderOf(plan, policy); // [n]: flat slots in the order in which they are served
  const served = order ? takeRows(flat, order) : flat;
  const sorted = dispatch(reshape(served, [n, 1]), { count: experts, bound: n });
  const filled = less(-1, sorted.slots);
  const slots = order ? where(filled, takeRows(order, sorted.slots), -1) : sorted.slots;
  const expert = where(filled, takeRows(flat, slots), -1);
  // First sorted position of each expert: [0, ends without the last].
  const starts = slice(concat([hostConstant(flat, new Int32Array(1), [1]), sorted.ends], 0), [0], [experts]);
  const position = hostConstant(
    flat,
    Int32Array.from({ length: n }, (_, i) => i),
    [n],
  );
  return { slots, expert, place: sub(position, takeRows(starts, expert)), real: inside(flat, experts) };
}

function orderOf(plan: SparsePlan, policy: DropPolicy): Tensor | undefined {
  const [tokens = 0, k = 0] = plan.experts.shape;
  switch (policy) {
    case "position":
      return undefined;
    case "choice": {
      const ids = hostConstant(
        plan.experts,
        Int32Array.from({ length: tokens * k }, (_, i) => i),
        [tokens, k],
      );
      return reshape(transpose(ids), [tokens * k]);
    }
    case "probability":
      return argsort(reshape(plan.weights, [tokens * k]), { descending: true });
    default:
      return policy satisfies never;
  }
}
