// @switchyard/bench/kernels: the harness that measures things against each other, and what `npm run bench:kernels` measures.
export * from "./cases/data.ts";
export * from "./cases/dense-product.ts";
export * from "./cases/moe-layer.ts";
export * from "./cases/training-step.ts";
export * from "./harness.ts";
