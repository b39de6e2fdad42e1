// From a plan to the rows each expert sees, and back: masks, the counting sort, combining. Everything stays on the device.
import { ShapeError } from "../errors.ts";
import { add, less, mul, where } from "../ops/elementwise.ts";
import { combineRows, dispatch } from "../ops/experts.ts";
import { matmul } from "../ops/matmul.ts";
import { addRows, takeRows } from "../ops/rows.ts";
import { hostConstant, reshape, slice } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";
import { checkPlan, everyId, inside } from "./parts.ts";
import type { DensePlan, Dispatch, ExpertChoicePlan, Layout, Plan, SparsePlan } from "./plan.ts";

/** The plans that send single tokens to single experts. */
export type TokenPlan = SparsePlan | DensePlan | ExpertChoicePlan;

/** The mask of the layer's own tokens, `[tokens]` (1 = real), without the part that lies in the cache; undefined: all are real. */
export function tokenMask(layout: Layout): Tensor | undefined {
  const { batch, sequence, past, mask } = layout;
  if (mask === undefined) return undefined;
  if (mask.shape.length !== 2 || mask.shape[0] !== batch || mask.shape[1] !== past + sequence) {
    throw new ShapeError(
      `layout.mask is ${show(mask)}, expected [batch, past + sequence] = [${batch}, ${past + sequence}]`,
    );
  }
  return reshape(slice(mask, [0, past], [batch, sequence]), [batch * sequence]);
}

/**
 * The same plan without padding: where `mask [tokens]` is 0, a token has no expert and weight 0, so it enters no load, no
 * capacity and no expert. The weights of real tokens keep their gradient.
 */
export function maskPlan<P extends Plan>(plan: P, mask: Tensor): P;
export function maskPlan(plan: Plan, mask: Tensor): Plan {
  switch (plan.kind) {
    case "sparse": {
      const real = reshape(mask, [mask.size, 1]); // [tokens, 1]
      return { ...plan, experts: where(real, plan.experts, -1), weights: where(real, plan.weights, 0) };
    }
    case "dense":
      return { ...plan, weights: where(reshape(mask, [mask.size, 1]), plan.weights, 0) };
    case "expert-choice": {
      const real = takeRows(mask, plan.tokens); // [experts, capacity]; an empty slot stays empty
      return { ...plan, tokens: where(real, plan.tokens, -1), weights: where(real, plan.weights, 0) };
    }
    case "slots": {
      const [batch = 0, sequence = 0] = plan.dispatch.shape;
      const real = reshape(mask, [batch, sequence, 1]);
      return { ...plan, dispatch: where(real, plan.dispatch, 0), combine: where(real, plan.combine, 0) };
    }
    case "merge":
      return { ...plan, groups: where(mask, plan.groups, -1) };
    default:
      return plan satisfies never;
  }
}

/**
 * Lowers a plan to the one form the grouped kernels take: rows sorted by expert, inside an expert by token (sparse, dense) or by
 * place (expert-choice). Ids outside 0..count-1 (empty slots, null experts) are left out. `mask [tokens]` drops the padded
 * tokens of a dense plan; the other kinds drop theirs in `maskPlan`.
 */
export function dispatchPlan(plan: TokenPlan, count: number, mask?: Tensor): Dispatch {
  checkPlan(plan);
  switch (plan.kind) {
    case "sparse": {
      const { experts, bound = experts.size } = plan;
      return dispatch(experts, { count, bound: Math.min(bound, experts.size) });
    }
    case "dense": {
      const [tokens = 0, experts = 0] = plan.weights.shape;
      const all = everyId(plan.weights, tokens, experts); // [tokens, experts]
      const ids = mask ? where(reshape(mask, [tokens, 1]), all, -1) : all;
      return dispatch(ids, { count, bound: tokens * experts });
    }
    case "expert-choice": {
      const [experts = 0, capacity = 0] = plan.tokens.shape;
      const places = experts * capacity;
      const own = hostConstant(
        plan.tokens,
        Int32Array.from({ length: experts }, (_, e) => e),
        [experts, 1],
      );
      const ids = where(less(plan.tokens, 0), -1, own); // [experts, capacity]; the sort only closes the gaps
      const { slots, ends } = dispatch(reshape(ids, [places, 1]), { count, bound: places });
      const rows = takeRows(reshape(plan.tokens, [places]), slots);
      return { rows: where(less(slots, 0), -1, rows), slots, ends };
    }
    default:
      return plan satisfies never;
  }
}

/** What the experts see: `hidden [tokens, width]` -> `[bound, width]`, zeros beyond the last filled row. */
export function gatherRows(hidden: Tensor, dispatched: Dispatch): Tensor {
  return takeRows(hidden, dispatched.rows);
}

/** The weighted sum of the experts' rows: `output [bound, width]` -> `[tokens, width]`; a token without expert gets zeros. */
export function combine(plan: TokenPlan, dispatched: Dispatch, output: Tensor, tokens: number): Tensor {
  if (plan.kind !== "expert-choice") return combineRows(output, plan.weights, dispatched.slots);
  const weights = takeRows(reshape(plan.weights, [plan.weights.size, 1]), dispatched.slots); // [bound, 1]
  return addRows(mul(output, weights), dispatched.rows, tokens);
}

/** The experts' rows in the order of the plan's slots, unweighted: `output [bound, width]` -> `[tokens, k, width]`. */
export function outputsPerSlot(plan: SparsePlan | DensePlan, dispatched: Dispatch, output: Tensor): Tensor {
  const [tokens = 0, k = 0] = plan.weights.shape;
  const width = output.shape[1] ?? 0;
  return reshape(addRows(output, dispatched.slots, tokens * k), [tokens, k, width]);
}

/** Like `combine`, for outputs that every expert computed for every token: `outputs [tokens, experts, width]` -> `[tokens, width]`. */
export function combineOutputs(plan: TokenPlan, outputs: Tensor): Tensor {
  checkPlan(plan);
  const [tokens = 0, count = 0, width = 0] = outputs.shape;
  const flat = reshape(outputs, [tokens * count, width]);
  switch (plan.kind) {
    case "sparse": {
      const first = hostConstant(
        outputs,
        Int32Array.from({ length: tokens }, (_, t) => t * count),
        [tokens, 1],
      );
      const chosen = takeRows(flat, where(inside(plan.experts, count), add(plan.experts, first), -1)); // [tokens, k, width]
      return weighted(plan.weights, chosen);
    }
    case "dense": {
      const real = Math.min(count, plan.weights.shape[1] ?? 0);
      return weighted(slice(plan.weights, [0, 0], [tokens, real]), slice(outputs, [0, 0, 0], [tokens, real, width]));
    }
    case "expert-choice": {
      const [experts = 0, capacity = 0] = plan.tokens.shape;
      const own = hostConstant(
        outputs,
        Int32Array.from({ length: experts }, (_, e) => e),
        [experts, 1],
      );
      const filled = mul(inside(plan.tokens, tokens), inside(own, count));
      const ids = where(filled, add(mul(plan.tokens, count), own), -1); // [experts, capacity]
      const rows = mul(
        takeRows(flat, reshape(ids, [experts * capacity])),
        reshape(plan.weights, [experts * capacity, 1]),
      );
      return addRows(rows, reshape(plan.tokens, [experts * capacity]), tokens);
    }
    default:
      return plan satisfies never;
  }
}

// weights [tokens, k], rows [tokens, k, width] -> [tokens, width]
function weighted(weights: Tensor, rows: Tensor): Tensor {
  const [tokens = 0, k = 0, width = 0] = rows.shape;
  return reshape(matmul(reshape(weights, [tokens, 1, k]), rows), [tokens, width]);
}
