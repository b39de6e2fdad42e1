// The public surface of @switchyard/core/factors: matrices in factors, on the host, and trained experts as factorised ones.
export type { FactorError } from "./dense.ts";
export { denseToMoLAE, type MoLAEError } from "./dense-to-molae.ts";
export { denseToMpo, type MpoError } from "./dense-to-mpo.ts";
export {
  type MpoCore,
  type MpoDecomposition,
  type MpoDims,
  type MpoSizes,
  mpoDecompose,
  mpoParameterCount,
  mpoReconstruct,
} from "./mpo-decompose.ts";
export { type HostMatrix, type Svd, svd } from "./svd.ts";
