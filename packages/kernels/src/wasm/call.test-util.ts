// For tests: calls kernels of a backend's table with host arrays, and makes inputs from fixed seeds.
import type { DType, Spec, TypedArray } from "@switchyard/core";
import type { WasmBackend } from "./backend.ts";

export interface Host extends Spec {
  readonly data: TypedArray;
}

/** Uniform numbers from -1 to 1, rounded to f32; the same for the same seed. */
export function uniform(seed: number, ...shape: readonly number[]): Host {
  let state = (seed * 2654435761 + 1) | 0;
  const data = Float32Array.from({ length: size(shape) }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    return state / 2 ** 31;
  });
  return { shape, dtype: "f32", data };
}

/** Integers from `low` to `high`, both included. */
export function integers(seed: number, low: number, high: number, ...shape: readonly number[]): Host {
  const { data } = uniform(seed, ...shape);
  return ints(
    Int32Array.from(data, (x) => Math.min(high, low + Math.floor(((x + 1) / 2) * (high - low + 1)))),
    ...shape,
  );
}

export const ints = (data: ArrayLike<number>, ...shape: readonly number[]): Host => ({
  shape,
  dtype: "i32",
  data: Int32Array.from(data),
});
export const floats = (data: ArrayLike<number>, ...shape: readonly number[]): Host => ({
  shape,
  dtype: "f32",
  data: Float32Array.from(data),
});
export const f32 = (...shape: readonly number[]): Spec => ({ shape, dtype: "f32" });
export const i32 = (...shape: readonly number[]): Spec => ({ shape, dtype: "i32" });
export const size = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** Uploads, runs a kernel, downloads its results, frees everything; fails when the heap is not as full as before. */
export function call(
  backend: WasmBackend,
  name: string,
  inputs: readonly Host[],
  results: readonly Spec[],
  attrs: object = {},
): TypedArray[] {
  const before = backend.memory().used;
  const kernel = backend.kernels[name];
  if (!kernel) throw new Error(`no kernel ${name}`);
  const operands = inputs.map((x) => ({ ...x, handle: backend.upload(x.data, x) }));
  const handles = kernel(operands, results, attrs);
  const data = handles.map((handle, i) => backend.downloadSync({ ...(results[i] as Spec), handle }));
  for (const handle of handles) backend.free(handle);
  for (const x of operands) backend.free(x.handle);
  const after = backend.memory().used;
  if (after !== before) throw new Error(`${name} left ${after - before} bytes behind`);
  return data;
}

/** Converts on the device, for storage types the host cannot write. */
export function converted(backend: WasmBackend, x: Host, dtype: DType): Host {
  const spec: Spec = { shape: x.shape, dtype };
  return { ...spec, data: call(backend, "cast", [x], [spec], { dtype })[0] as TypedArray };
}

/** Largest difference to the expected values, over the largest of them. */
export function worst(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (found.length !== expected.length) throw new Error(`${found.length} values, expected ${expected.length}`);
  let error = 0;
  let scale = 0;
  for (let i = 0; i < expected.length; i++) {
    const [x, y] = [found[i] as number, expected[i] as number];
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.POSITIVE_INFINITY;
    if (Object.is(x, y) || x === y) continue;
    error = Math.max(error, Math.abs(x - y));
    scale = Math.max(scale, Math.abs(y));
  }
  return error === 0 ? 0 : error / scale;
}

/** Distance of an f32 to the exact value, in units of the last place of the f32 nearest to it. */
export function ulps(found: number, exact: number): number {
  const near = Math.fround(exact);
  if (Object.is(found, near) || (Number.isNaN(found) && Number.isNaN(near)) || found === near) return 0;
  if (!Number.isFinite(near) || !Number.isFinite(found)) return Number.POSITIVE_INFINITY;
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(near) || 2 ** -149)), -126);
  return Math.abs(found - exact) / 2 ** (exponent - 23);
}
