// The public surface of @switchyard/core/experts: expert sets beyond the feed-forward ones of ../moe.

export * from "./adapter.ts";
export * from "./conv-adapter.ts";
export * from "./heterogeneous.ts";
export * from "./lora.ts";
export * from "./low-dimensional.ts";
export { type MoLAEOptions, molae, molaeToDense } from "./molae.ts";
export { type MpoForm, type MpoOptions, mpo, mpoToDense } from "./mpo.ts";
export * from "./mu-moe.ts";
export * from "./prompt.ts";
