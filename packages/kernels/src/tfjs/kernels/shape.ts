// Kernels that move elements and compute nothing.
import type { Kernel } from "@switchyard/core";
import { type Device, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { spread } from "./elementwise.ts";

type Table = { readonly [P in "reshape" | "transpose" | "slice" | "concat"]: Kernel<TfTensor> } & {
  readonly [fused: string]: Kernel<TfTensor>;
};

export function shapeKernels(device: Device): Table {
  const { tf, kernel } = device;
  return {
    // A view: kernels read the shape from the operand, not from the handle.
    reshape: ([x]) => (x ? [x.handle] : []),
    transpose: kernel<{ readonly perm: readonly number[] }>(({ x, attrs: { perm } }) => tf.transpose(x(0), [...perm])),
    slice: kernel<{ readonly start: readonly number[]; readonly size: readonly number[] }>(
      ({ x, attrs: { start, size } }) => tf.slice(x(0), [...start], [...size]),
    ),
    concat: kernel<{ readonly axis: number }>(({ x, count, attrs: { axis } }) => {
      const parts = Array.from({ length: count }, (_, i) => x(i)).filter((part) => part.size > 0);
      return parts.length === 1 && parts[0] ? parts[0] : tf.concat(parts, axis);
    }),
    broadcastTo: kernel(({ x, spec }) => spread(device, x(0), spec().shape)),
    pad: kernel<{ readonly before: readonly number[]; readonly after: readonly number[] }>(
      ({ x, attrs: { before, after }, spec }) => {
        if (x(0).size === 0) return zeros(tf, spec());
        return tf.pad(
          x(0),
          before.map((n, axis) => [n, after[axis] ?? 0]),
        );
      },
    ),
  };
}
