// The public surface of @switchyard/core.
export type { Backend, DType, Kernel, Operand, PrimitiveName, Spec, TypedArray } from "./backend.ts";
export { alias, type Engine, engine } from "./engine.ts";
export { CheckpointError, MissingPackageError, ShapeError, UnsupportedError } from "./errors.ts";
export { customGrad, autodiff, grad, lower, straightThrough, valueAndGrad, watch } from "./autodiff.ts";
export { type Op, run } from "./op.ts";
export { type Random, random } from "./random.ts";
export { dispose, isTensor, leaves, mapTree, type Tensor, type Tree } from "./tensor.ts";
export * from "./ops/elementwise.ts";
export * from "./ops/shape.ts";
export * from "./ops/reduce.ts";
export * from "./ops/rows.ts";
export * from "./ops/matmul.ts";
export * from "./ops/normalise.ts";
export * from "./ops/attention.ts";
export * from "./ops/experts.ts";
export * from "./ops/optimiser.ts";
export { counted, type OpCount } from "./counted.ts";
export { type AdamwOptions, adamw, type Optimiser, type SgdOptions, sgd, type UpdateInfo } from "./optim.ts";
export { constantRate, cosineDecay, linearDecay, type Schedule, warmUp, wsd } from "./schedule.ts";
export type { Json, SnapshotArray, TrainerSnapshot } from "./snapshot.ts";
export {
  type BatchInfo,
  type Evaluation,
  type PassInfo,
  type RunOptions,
  type StepReport,
  type Task,
  type Trainer,
  type TrainerOptions,
  trainer,
} from "./train.ts";
export type * from "./moe/plan.ts";
export * from "./moe/capacity.ts";
export * from "./moe/dispatch.ts";
export * from "./moe/experts.ts";
export * from "./moe/layer.ts";
export * from "./moe/losses.ts";
export * from "./moe/metrics.ts";
