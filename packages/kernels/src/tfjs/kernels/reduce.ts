// Sums, maxima and running sums.
import type { Kernel } from "@switchyard/core";
import { type Device, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { select } from "./elementwise.ts";

type Table = { readonly [P in "sumTo" | "sumSquares" | "maxLast" | "cumsum"]: Kernel<TfTensor> };

export function reduceKernels(device: Device): Table {
  const { tf, kernel } = device;
  return {
    sumTo: kernel(({ x, spec }) => {
      if (x(0).size === 0) return zeros(tf, spec());
      return sumTo(device, x(0), spec().shape);
    }),
    sumSquares: kernel(({ x }) => sumSquares(device, x(0))),
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

const BLOCK = 64;
/**
 * Sum over the last axis of [rows, n], [rows]. TensorFlow.js adds one number after the other on the processor, which loses digits in long
 * sums, the norm of a gradient above all: there they go in blocks. Its GPU kernels add in a tree by themselves.
 */
function sumRows(device: Device, x: TfTensor): TfTensor {
  const { tf, name } = device;
  const [rows = 0, n = 0] = x.shape;
  if (n <= 2 * BLOCK || name === "webgl" || name === "webgpu") return tf.sum(x, 1);
  const blocks = Math.floor(n / BLOCK);
  const whole = blocks * BLOCK;
  const head = whole === n ? x : tf.slice(x, [0, 0], [rows, whole]);
  const sums = tf.reshape(tf.sum(tf.reshape(head, [rows * blocks, BLOCK]), 1), [rows, blocks]);
  const total = sumRows(device, sums);
  return whole === n ? total : tf.add(total, tf.sum(tf.slice(x, [0, whole], [rows, n - whole]), 1));
}

/** Sum of all squares, []. */
function sumSquares(device: Device, x: TfTensor): TfTensor {
  const { tf } = device;
  if (x.size === 0) return tf.zeros([]);
  return tf.reshape(sumRows(device, tf.reshape(tf.square(x), [1, x.size])), []);
}

/** Sums down to a shape that broadcasts to x's. */
export function sumTo(device: Device, x: TfTensor, shape: readonly number[]): TfTensor {
  const { tf } = device;
  const missing = x.shape.length - shape.length;
  const axes = x.shape.flatMap((d, axis) => (axis < missing || (shape[axis - missing] === 1 && d !== 1) ? [axis] : []));
  if (axes.length === 0) return x;
  const kept = x.shape.length - axes.length;
  const trailing = x.size > 0 && axes[0] === kept;
  if (!trailing) return tf.sum(x, axes, true);
  const rows = x.shape.slice(0, kept).reduce((n, d) => n * d, 1);
  return tf.reshape(sumRows(device, tf.reshape(x, [rows, x.size / rows])), [...shape]);
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
