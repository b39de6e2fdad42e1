// Kernels that only move elements. They work on the stored array, so every dtype passes through unchanged.
import type { Kernel } from "../backend.ts";
import { positions, stridesOf } from "./index-math.ts";
import { type CpuHandle, type CpuOperand, input, raw, resultSpec, type Storage, sizeOf } from "./storage.ts";

type Family = "reshape" | "transpose" | "slice" | "concat";

export const shape = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => {
  const pick = (x: CpuOperand, at: Int32Array, dtype: CpuOperand["dtype"]): CpuHandle => {
    const data = raw(x);
    const y = storage.zeros({ shape: [at.length], dtype });
    for (let i = 0; i < y.length; i++) y[i] = data[at[i] as number] as number;
    return storage.hold(y);
  };

  return {
    reshape: (inputs) => [input(inputs, 0).handle],

    transpose(inputs, results, { perm }: { perm: readonly number[] }) {
      const x = input(inputs, 0);
      const spec = resultSpec(results);
      const strides = stridesOf(x.shape);
      const permuted = perm.map((axis) => strides[axis] as number);
      return [pick(x, positions(spec.shape, permuted), spec.dtype)];
    },

    slice(inputs, results, { start }: { start: readonly number[] }) {
      const x = input(inputs, 0);
      const spec = resultSpec(results);
      const strides = stridesOf(x.shape);
      const first = start.reduce((sum, from, axis) => sum + from * (strides[axis] as number), 0);
      return [pick(x, positions(spec.shape, strides, first), spec.dtype)];
    },

    concat(inputs, results, { axis }: { axis: number }) {
      const spec = resultSpec(results);
      const y = storage.zeros(spec);
      const along = axis < 0 ? axis + spec.shape.length : axis;
      const outer = sizeOf(spec.shape.slice(0, along));
      const row = sizeOf(spec.shape.slice(along));
      let start = 0;
      for (const x of inputs) {
        const data = raw(x);
        const length = sizeOf(x.shape.slice(along));
        for (let o = 0; o < outer; o++) y.set(data.subarray(o * length, (o + 1) * length), o * row + start);
        start += length;
      }
      return [storage.hold(y)];
    },
  };
};
