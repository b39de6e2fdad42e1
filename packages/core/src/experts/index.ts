// The public surface of @switchyard/core/experts: expert sets beyond the feed-forward ones of ../moe.

export * from "./adapter.ts";
export * from "./conv-adapter.ts";
export type { FactorError } from "./dense.ts";
export * from "./heterogeneous.ts";
export * from "./lora.ts";
export * from "./low-dimensional.ts";
export * from "./molae.ts";
export * from "./mpo.ts";
export {
  type MpoCore,
  type MpoDecomposition,
  type MpoDims,
  type MpoSizes,
  mpoDecompose,
  mpoParameterCount,
  mpoReconstruct,
} from "./mpo-decompose.ts";
export * from "./mu-moe.ts";
export * from "./prompt.ts";
