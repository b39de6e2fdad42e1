// The optimisers the trainer takes: options bound to the fused op that updates one parameter (the formulas are in
// ops/optimiser.ts).
import { ShapeError } from "../errors.ts";
import { run } from "../op.ts";
import { adamwOp, sgdOp } from "../ops/optimiser.ts";
import type { Tensor } from "../tensor.ts";

/** What one parameter's update may depend on beside its gradient. */
export interface UpdateInfo {
  /** One number on the device, shape [], that multiplies the gradient first (clipping). */
  readonly scale: Tensor;
  /** The optimiser's rate times the schedule's factor. */
  readonly learningRate: number;
  /** Whether weight decay applies to this parameter. */
  readonly decay: boolean;
  /** Which update of this parameter it is, from 1. */
  readonly update: number;
}

/** How parameters change. The state of a parameter is one tensor of its shape per slot; it starts at zero. */
export interface Optimiser {
  readonly name: string;
  readonly learningRate: number;
  readonly slots: readonly string[];
  /** Returns the new parameter, then its new slots. Inputs that were given away are overwritten. */
  update(param: Tensor, gradient: Tensor, slots: readonly Tensor[], info: UpdateInfo): readonly Tensor[];
}

export interface AdamwOptions {
  readonly learningRate?: number;
  readonly beta1?: number;
  readonly beta2?: number;
  readonly eps?: number;
  readonly weightDecay?: number;
}

/**
 * AdamW (1711.05101, algorithm 2): m' = b1 m + (1-b1) g, v' = b2 v + (1-b2) g²,
 * p' = p - lr (m' / (1-b1^t) / (sqrt(v' / (1-b2^t)) + eps) + decay p). Throws ShapeError for options out of range.
 */
export function adamw({
  learningRate = 1e-3,
  beta1 = 0.9,
  beta2 = 0.999,
  eps = 1e-8,
  weightDecay = 0.01,
}: AdamwOptions = {}): Optimiser {
  check("adamw", { learningRate, eps, weightDecay }, { beta1, beta2 });
  return {
    name: "adamw",
    learningRate,
    slots: ["m", "v"],
    update: (param, gradient, slots, { scale, learningRate: lr, decay, update }) =>
      run(adamwOp, [param, gradient, ...slots, scale], {
        lr,
        beta1,
        beta2,
        eps,
        weightDecay: decay ? weightDecay : 0,
        correction1: 1 - beta1 ** update,
        correction2: 1 - beta2 ** update,
      }),
  };
}

export interface SgdOptions {
  readonly learningRate?: number;
  readonly momentum?: number;
  readonly weightDecay?: number;
  readonly nesterov?: boolean;
}

/**
 * SGD with momentum: g' = g + decay p, v' = momentum v + g', p' = p - lr v' (nesterov: g' + momentum v' in place of
 * v'). With SGD decay and an L2 loss are one thing, so it enters through the gradient, after clipping. Throws
 * ShapeError for options out of range.
 */
export function sgd({
  learningRate = 0.01,
  momentum = 0.9,
  weightDecay = 0,
  nesterov = false,
}: SgdOptions = {}): Optimiser {
  check("sgd", { learningRate, weightDecay }, { momentum });
  return {
    name: "sgd",
    learningRate,
    slots: ["momentum"],
    update: (param, gradient, slots, { scale, learningRate: lr, decay }) =>
      run(sgdOp, [param, gradient, ...slots, scale], { lr, momentum, weightDecay: decay ? weightDecay : 0, nesterov }),
  };
}

function check(name: string, rates: Record<string, number>, shares: Record<string, number>): void {
  for (const [option, value] of Object.entries(rates)) {
    if (!(value >= 0 && value < Infinity))
      throw new ShapeError(`${name}: ${option} must be a finite number from 0 up, found ${value}`);
  }
  for (const [option, value] of Object.entries(shares)) {
    if (!(value >= 0 && value < 1))
      throw new ShapeError(`${name}: ${option} must be at least 0 and below 1, found ${value}`);
  }
}
