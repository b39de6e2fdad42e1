// The public surface of @switchyard/core.

export { autodiff, customGrad, grad, lower, recomputed, straightThrough, valueAndGrad, watch } from "./autodiff.ts";
export type { Backend, DType, HostRoom, Kernel, Operand, PrimitiveName, Spec, TypedArray } from "./backend.ts";
export { counted, type OpCount } from "./counted.ts";
export { alias, type Engine, engine } from "./engine.ts";
export { CheckpointError, DeviceError, MissingPackageError, ShapeError, UnsupportedError } from "./errors.ts";
export type { Json } from "./json.ts";
export { type Op, run } from "./op.ts";
export * from "./ops/attention.ts";
export * from "./ops/elementwise.ts";
export * from "./ops/entmax.ts";
export * from "./ops/experts.ts";
export * from "./ops/matmul.ts";
export * from "./ops/normalise.ts";
export * from "./ops/optimiser.ts";
export * from "./ops/quantized.ts";
export * from "./ops/reduce.ts";
export * from "./ops/rows.ts";
export * from "./ops/shape.ts";
export { type Random, random } from "./random.ts";
export { dispose, isTensor, leaves, mapTree, type Tensor, type Tree } from "./tensor.ts";
