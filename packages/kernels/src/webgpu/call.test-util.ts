// For tests of kernel families: a device of Dawn with limits of one's own, and kernels called with host arrays.
import type { DType, Kernel, Spec, TypedArray } from "@switchyard/core";
import { findGpu } from "../../test/gpu.ts";
import { createGpu, type Limits, type OwnedGpu, type WebgpuHandle } from "./device.ts";
import { requestDevice } from "./request.ts";

export interface Host extends Spec {
  readonly data: TypedArray;
}

const gpu = await findGpu();
export const hasGpu: boolean = gpu !== undefined;
const device = gpu ? await requestDevice({ gpu }) : undefined;

/** A pool and pipelines of its own on one shared device; `limits` may be lower than the device's. */
export function testGpu(limits: Partial<Limits> = {}): OwnedGpu {
  if (!device) throw new Error("no WebGPU adapter: guard the suite with describe.skipIf(!hasGpu)");
  return createGpu(device, { idle: 2 ** 24, limits });
}

const size = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
export const host = (data: TypedArray, shape: readonly number[], dtype: DType): Host => ({ data, shape, dtype });
export const floats = (shape: readonly number[], data: ArrayLike<number>): Host =>
  host(Float32Array.from(data), shape, "f32");
export const ints = (shape: readonly number[], data: ArrayLike<number>): Host =>
  host(Int32Array.from(data), shape, "i32");

/** Uniform numbers from -1 to 1, rounded to f32; the same for the same seed. */
export function uniform(seed: number, shape: readonly number[]): Host {
  let state = (seed * 2654435761 + 1) | 0;
  return floats(
    shape,
    Float32Array.from({ length: size(shape) }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      return state / 2 ** 31;
    }),
  );
}

/** Uploads, runs a kernel, downloads its results and frees everything; fails when storage is left behind. */
export async function call(
  on: OwnedGpu,
  kernel: Kernel<WebgpuHandle> | undefined,
  inputs: readonly Host[],
  results: readonly Spec[],
  attrs: object = {},
): Promise<TypedArray[]> {
  if (!kernel) throw new Error("there is no such kernel");
  const before = on.memory().used;
  const operands = inputs.map((x) => ({ shape: x.shape, dtype: x.dtype, handle: on.upload(x.data, x) }));
  const refused = kernel.unsupported?.(operands, attrs);
  if (refused !== undefined) throw new Error(`the kernel refuses: ${refused}`);
  const handles = kernel(operands, results, attrs);
  const data = await Promise.all(
    results.map((spec, i) => on.download({ ...spec, handle: handles[i] as WebgpuHandle })),
  );
  for (const handle of new Set([...handles, ...operands.map((x) => x.handle)])) on.free(handle);
  const after = on.memory().used;
  if (after !== before) throw new Error(`${after - before} bytes were left behind`);
  return data;
}
