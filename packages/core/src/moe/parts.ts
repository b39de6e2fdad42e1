// Small pieces that expert sets and the files of this folder share: activations, biases, constants, ids and the check of a plan's shapes. Not exported by the package.
import { ShapeError } from "../errors.ts";
import { gelu, less, mul, relu, silu } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import { full, hostConstant, reshape } from "../ops/shape.ts";
import { isTensor, show, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import type { Activation } from "./experts.ts";
import type { DensePlan, ExpertChoicePlan, SparsePlan } from "./plan.ts";

export const activations: { readonly [A in Activation]: (x: Tensor) => Tensor } = {
  silu,
  gelu: (x) => gelu(x),
  "gelu-tanh": (x) => gelu(x, { approximate: "tanh" }),
  relu,
};

/** The bias `[experts, out]` of each row's expert, zero beyond the last block: a grouped product with a column of ones. */
export function biasRows(bias: Tensor, ends: Tensor, n: number): Tensor {
  return groupedMatmul(full(bias, [n, 1], 1), reshape(bias, [...bias.shape, 1]), ends); // [n, out]
}

/** An f32 constant on the engine of `like`, whatever the dtype of that. */
export function filled(like: Tensor, shape: readonly number[], value: number): Tensor {
  return hostConstant(like, new Float32Array(sizeOf(shape)).fill(value), shape);
}

/** i32 ids 0..experts-1 for every token, `[tokens, experts]`. */
export function everyId(like: Tensor, tokens: number, experts: number): Tensor {
  return hostConstant(
    like,
    Int32Array.from({ length: tokens * experts }, (_, i) => i % experts),
    [tokens, experts],
  );
}

/** 1 where 0 <= id < count, else 0. */
export function inside(ids: Tensor, count: number): Tensor {
  return mul(less(-1, ids), less(ids, count));
}

/** The branch or leaf of a record or list, undefined where there is none of that name. */
export function child(tree: Tree, name: string): Tree | undefined {
  return isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
}

/** Throws ShapeError where ids and weights of a plan do not belong together, or not to the tokens of `rows [tokens, width]`. */
export function checkPlan(plan: SparsePlan | DensePlan | ExpertChoicePlan, rows?: Tensor): void {
  const ids = plan.kind === "sparse" ? plan.experts : plan.kind === "expert-choice" ? plan.tokens : undefined;
  const { weights } = plan;
  if (weights.shape.length !== 2) {
    throw new ShapeError(`${plan.kind} plan: weights are ${show(weights)}, expected two dimensions`);
  }
  if (rows && plan.kind !== "expert-choice" && weights.shape[0] !== rows.shape[0]) {
    throw new ShapeError(
      `${plan.kind} plan: weights are ${show(weights)} for tokens ${show(rows)}; expected one row per token`,
    );
  }
  if (ids === undefined) return;
  if (ids.dtype !== "i32" || ids.shape.join() !== weights.shape.join()) {
    throw new ShapeError(
      `${plan.kind} plan: ids are ${show(ids)}, weights ${show(weights)}; expected i32 ids of the weights' shape`,
    );
  }
}
