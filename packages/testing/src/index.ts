// The public surface of @switchyard/testing.
export {
  type ArchitectureCache,
  type ArchitectureCase,
  type ArchitectureModel,
  type ArchitectureSuite,
  architectureCases,
} from "./architecture-cases.ts";
export {
  assertClose,
  bytes,
  floats,
  generator,
  type HostArray,
  integers,
  ints,
  type Tolerance,
  uniform,
} from "./arrays.ts";
export { backendCases, primitiveNames, primitivesOnly, uncoveredKernels } from "./backend-cases.ts";
export type { BackendCase } from "./cases/case.ts";
export { type ExpertsCase, type ExpertsOptions, type ExpertsSuite, expertsCases } from "./experts-cases.ts";
export { type GradientCheckOptions, type GradientReport, gradientCheck, type WorstEntry } from "./gradient-check.ts";
export type { WeightRule } from "./router-answer.ts";
export { type RouterCase, type RouterSizes, type RouterSuite, routerCases } from "./router-cases.ts";
export { type RouterCall, routerContext, routerInput } from "./router-input.ts";
export type { Skip } from "./skip.ts";
export { testArchitecture } from "./test-architecture.ts";
export { type BackendSuite, testBackend } from "./test-backend.ts";
export { testExperts } from "./test-experts.ts";
export { testRouter } from "./test-router.ts";
