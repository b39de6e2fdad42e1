// @switchyard/bench/kernels: the harness that measures things against each other, and what `npm run bench:kernels` and
// `npm run bench:gpu` measure.
export * from "./cases/data.ts";
export * from "./cases/decode.ts";
export * from "./cases/dense-product.ts";
export * from "./cases/grouped-product.ts";
export * from "./cases/host-dispatch.ts";
export * from "./cases/moe-gradients.ts";
export * from "./cases/moe-layer.ts";
export * from "./cases/routing.ts";
export * from "./cases/streaming.ts";
export * from "./cases/training-step.ts";
export * from "./harness.ts";
export * from "./table.ts";
