// Dense matrix products.
import type { Kernel } from "@switchyard/core";
import { type Device, matrixOf, sizeOf, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { spread } from "./elementwise.ts";

interface Transposes {
  readonly transposeA?: boolean;
  readonly transposeB?: boolean;
}

export function matmulKernels(device: Device): { readonly [P in "matmul" | "linear"]: Kernel<TfTensor> } {
  const { tf, kernel } = device;
  return {
    matmul: kernel<Transposes>(({ x, attrs, spec }) => {
      if (x(0).size === 0 || x(1).size === 0) return zeros(tf, spec());
      return product(device, x(0), x(1), spec().shape, attrs);
    }),
    // Weights in f16 and bf16 are held as the numbers they stand for: nothing to widen.
    linear: kernel(({ x, count, spec }) => {
      const [rows, w] = [x(0), x(1)];
      const n = sizeOf(spec().shape) / (spec().shape.at(-1) ?? 1);
      const y = rows.size === 0 ? tf.zeros([n, w.shape[0] ?? 0]) : tf.matMul(matrixOf(tf, rows), w, false, true);
      return count === 3 ? tf.add(y, x(2)) : y; // [rows, out]
    }),
  };
}

/** a [..., m, k] times b [..., k, n] with broadcasting batches, in the three dimensions that every backend handles alike. */
function product(
  device: Device,
  a: TfTensor,
  b: TfTensor,
  shape: readonly number[],
  { transposeA = false, transposeB = false }: Transposes,
): TfTensor {
  const { tf } = device;
  const batch = shape.slice(0, -2);
  const cube = (x: TfTensor): TfTensor => {
    const [own, matrix] = [x.shape.slice(0, -2), x.shape.slice(-2)];
    if (sizeOf(own) === 1) return tf.reshape(x, [1, ...matrix]);
    return tf.reshape(spread(device, x, [...batch, ...matrix]), [sizeOf(batch), ...matrix]);
  };
  return tf.matMul(cube(a), cube(b), transposeA, transposeB);
}
