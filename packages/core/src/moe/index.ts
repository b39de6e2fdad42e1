// The public surface of @switchyard/core/moe: plans, dispatch, experts, layers, capacity, losses, metrics.
export * from "./capacity.ts";
export * from "./co-activation.ts";
export * from "./define-router.ts";
export * from "./dispatch.ts";
export * from "./experts.ts";
export * from "./fluctuation.ts";
export * from "./layer.ts";
export * from "./losses.ts";
export * from "./metrics.ts";
export { overridePlan, type Ranking, requireOverrides } from "./override.ts";
export type * from "./plan.ts";
export * from "./upcycle.ts";
