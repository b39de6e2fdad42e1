// The public surface of @switchyard/core/moe: plans, dispatch, experts, layers, capacity, losses, metrics.
export * from "./capacity.ts";
export * from "./dispatch.ts";
export * from "./experts.ts";
export * from "./layer.ts";
export * from "./losses.ts";
export * from "./metrics.ts";
export type * from "./plan.ts";
