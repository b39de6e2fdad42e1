// Host arrays of every storage type, by the reference backend: uploads, and what the device sees of them.
import type { DType, Spec, TypedArray } from "@switchyard/core";
import { type CpuBackend, type CpuHandle, cpu } from "@switchyard/core/cpu";
import { MOST_ELEMENTS } from "./program.ts";

export const reference: CpuBackend = cpu();

export function contentOf({ data }: CpuHandle): TypedArray {
  if (data === undefined) throw new Error("gpujs: the reference backend gave an empty handle");
  return data;
}

/** The host's storage of an upload, always a copy. @throws ShapeError when the data do not fill the shape. */
export function encode(data: TypedArray, spec: Spec): TypedArray {
  return contentOf(reference.upload(data, spec));
}

/**
 * Numbers as the device holds them. i32 are ids there, and no table has more than 2^24 rows: everything outside is as
 * far outside as -1 and 2^24 are, which are exact in f32.
 */
export function floatsOf(dtype: DType, data: TypedArray): Float32Array {
  if (dtype === "f32" && data instanceof Float32Array) return data;
  if (dtype === "i32") return Float32Array.from(data, (id) => Math.min(Math.max(id, -1), MOST_ELEMENTS));
  if (dtype === "f16" || dtype === "bf16") {
    const shape = [data.length];
    const [handle] = reference.kernels.cast([{ shape, dtype, handle: { data } }], [{ shape, dtype: "f32" }], {});
    if (handle) return Float32Array.from(contentOf(handle));
  }
  return Float32Array.from(data);
}
