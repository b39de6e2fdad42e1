// Calls one kernel of the reference backend directly, without an engine. For tests.
import type { DType, PrimitiveName, Spec, TypedArray } from "../backend.ts";
import { cpu } from "./backend.ts";
import { type CpuOperand, sizeOf } from "./storage.ts";

export interface Value extends Spec {
  readonly data: TypedArray;
}

export const value = (shape: readonly number[], data: readonly number[] | TypedArray, dtype: DType = "f32"): Value => ({
  shape,
  dtype,
  data: Array.isArray(data) ? Float64Array.from(data) : (data as TypedArray),
});

/** Runs `kernel` and downloads the first result; checks that nothing but the results stays alive. */
export const call = (
  kernel: PrimitiveName | "groupedMatmul" | "groupedOuter",
  inputs: readonly Value[],
  result: readonly number[] | Spec,
  { precision = 64, ...attrs }: { precision?: 32 | 64; [attr: string]: unknown } = {},
): number[] => {
  const backend = cpu({ precision });
  const operands: CpuOperand[] = inputs.map((x) => ({
    shape: x.shape,
    dtype: x.dtype,
    handle: backend.upload(x.data, x),
  }));
  const spec: Spec = "shape" in result ? result : { shape: result, dtype: operands[0]?.dtype ?? "f32" };
  const run = backend.kernels[kernel];
  if (run === undefined) throw new Error(`no kernel ${kernel}`);
  const [handle, ...more] = run(operands, [spec], attrs);
  if (handle === undefined || more.length > 0) throw new Error(`${kernel} must return one handle`);
  const y = backend.downloadSync({ ...spec, handle });
  if (y.length !== sizeOf(spec.shape)) throw new Error(`${kernel} returned ${y.length} values`);
  for (const h of new Set([handle, ...operands.map((x) => x.handle)])) backend.free(h);
  if (backend.live() !== 0) throw new Error(`${kernel} left ${backend.live()} handles alive`);
  return Array.from(y);
};

/** Reproducible values in [-1, 1) with no structure that could hide a swapped index. */
export const noise = (n: number, seed = 1): number[] => {
  let state = seed;
  return Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32) * 2 - 1;
  });
};
