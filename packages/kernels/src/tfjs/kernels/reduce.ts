// Sums, maxima and running sums.
import type { Kernel } from "@switchyard/core";
import { type Device, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { select } from "./elementwise.ts";

type Table = { readonly [P in "sumTo" | "maxLast" | "cumsum"]: Kernel<TfTensor> };

export function reduceKernels(device: Device): Table {
  const { tf, kernel } = device;
  return {
    sumTo: kernel(({ x, spec }) => {
      if (x(0).size === 0) return zeros(tf, spec());
      return sumTo(device, x(0), spec().shape);
    }),
    maxLast: kernel(({ x }) => maxLast(device, x(0))),
    cumsum: kernel<{ readonly axis: number; readonly exclusive?: boolean; readonly reverse?: boolean }>(
      ({ x, attrs: { axis, exclusive = false, reverse = false } }) => {
        // TensorFlow.js writes the length of a reversed sum into its WebGPU program, but not into the program's key.
        if (reverse && device.name === "webgpu") {
          return tf.reverse(tf.cumsum(tf.reverse(x(0), axis), axis, exclusive), axis);
        }
        return tf.cumsum(x(0), axis, exclusive, reverse);
      },
    ),
  };
}

/** Sums down to a shape that broadcasts to x's. */
export function sumTo({ tf }: Device, x: TfTensor, shape: readonly number[]): TfTensor {
  const missing = x.shape.length - shape.length;
  const axes = x.shape.flatMap((d, axis) => (axis < missing || (shape[axis - missing] === 1 && d !== 1) ? [axis] : []));
  return axes.length === 0 ? x : tf.sum(x, axes, true);
}

/** Maximum over the last axis, which stays as 1. */
export function maxLast(device: Device, x: TfTensor): TfTensor {
  const { tf } = device;
  const top = tf.max(x, -1, true);
  if (device.name !== "webgl") return top;
  // TensorFlow.js's WebGL reduction starts from -1e20: what lies below is looked for once more, 2^64 times smaller.
  const small = tf.max(tf.mul(x, 2 ** -64), -1, true);
  const below = select(device, tf.lessEqual(small, -1e20), Number.NEGATIVE_INFINITY, tf.mul(small, 2 ** 64), top.shape);
  return select(device, tf.lessEqual(top, -1e20), below, top, top.shape);
}
