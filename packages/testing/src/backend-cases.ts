// The backend suite as data: everything testBackend runs, for authors who want to run one case, or run them without
// vitest.
import type { Backend, Kernel, PrimitiveName } from "@switchyard/core";
import type { BackendCase } from "./cases/case.ts";
import { engineCases } from "./cases/engine.ts";
import { fusedCases } from "./cases/fused.ts";
import { primitiveCases } from "./cases/primitives.ts";
import { quantizedCases } from "./cases/quantized.ts";

/**
 * Every case of the backend suite, in order. Each has a stable name ("matmul/transposeB 5x7x3") and a `run(engine)`
 * that rejects with the reason when the backend is wrong.
 *
 * @example
 * const one = backendCases().find(({ name }) => name === "matmul/plain 5x7x3");
 * await one?.run(engine(myBackend()));
 */
export function backendCases(): readonly BackendCase[] {
  return [...primitiveCases(), ...fusedCases(), ...quantizedCases(), ...engineCases()];
}

const names: { readonly [P in PrimitiveName]: true } = {
  add: true,
  mul: true,
  maximum: true,
  less: true,
  where: true,
  recip: true,
  exp: true,
  log: true,
  sqrt: true,
  tanh: true,
  erf: true,
  floor: true,
  cast: true,
  reshape: true,
  transpose: true,
  slice: true,
  concat: true,
  takeRows: true,
  addRows: true,
  sumTo: true,
  maxLast: true,
  cumsum: true,
  matmul: true,
  topkIndices: true,
  argsort: true,
  blockEnds: true,
};
/** The names of the kernels that every backend has. */
export const primitiveNames: readonly PrimitiveName[] = Object.keys(names) as PrimitiveName[];

/**
 * The same backend without its fused kernels: core's fallbacks run in their place. Testing both tells a wrong kernel
 * from a wrong primitive.
 */
export function primitivesOnly<H>(backend: Backend<H>): Backend<H> {
  const kernels = Object.fromEntries(primitiveNames.map((name) => [name, backend.kernels[name]])) as {
    [P in PrimitiveName]: Kernel<H>;
  };
  return new Proxy(backend, { get: (from, key) => (key === "kernels" ? kernels : Reflect.get(from, key)) });
}

/** Kernels of a backend that no case runs: neither under their own name nor as the gradient of an op with cases. */
export function uncoveredKernels<H>(backend: Backend<H>): readonly string[] {
  const covered = new Set(backendCases().map(({ op }) => op));
  return Object.keys(backend.kernels).filter((name) => !covered.has(name.replace(/Grad$/, "")));
}
