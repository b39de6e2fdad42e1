// The public surface of @switchyard/testing.
export { primitiveCases } from "./cases/primitives.ts";
export { fusedCases } from "./cases/fused.ts";
