// Matrix products, batched and grouped by expert: the textbook loops with double-precision sums.
// The grouped products are kernels here although core has fallbacks, because the fallbacks multiply every row with every expert.
import type { Kernel } from "../backend.ts";
import { broadcastStrides, positions } from "./index-math.ts";
import { type CpuHandle, input, numbers, raw, resultSpec, type Storage, sizeOf } from "./storage.ts";

type Family = "matmul" | "groupedMatmul" | "groupedOuter";

export const matmul = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => ({
  matmul(inputs, results, attrs: { transposeA?: boolean; transposeB?: boolean }) {
    const x = input(inputs, 0);
    const w = input(inputs, 1);
    const spec = resultSpec(results);
    const a = numbers(x);
    const b = numbers(w);
    const y = storage.zeros(spec);
    const [m, n] = spec.shape.slice(-2) as [number, number];
    const k = x.shape.at(attrs.transposeA ? -2 : -1) as number;
    const batch = spec.shape.slice(0, -2);
    const batchesOf = (shape: readonly number[]): Int32Array =>
      positions(batch, broadcastStrides(shape.slice(0, -2), batch));
    const [batchA, batchB] = [batchesOf(x.shape), batchesOf(w.shape)];
    const sum = new Float64Array(n);
    for (let i = 0; i < batchA.length; i++) {
      const startA = (batchA[i] as number) * m * k;
      const startB = (batchB[i] as number) * k * n;
      for (let row = 0; row < m; row++) {
        sum.fill(0);
        for (let p = 0; p < k; p++) {
          const factor = a[startA + (attrs.transposeA ? p * m + row : row * k + p)] as number;
          for (let col = 0; col < n; col++) {
            const entry = b[startB + (attrs.transposeB ? col * k + p : p * n + col)] as number;
            sum[col] = (sum[col] as number) + factor * entry;
          }
        }
        y.set(sum, (i * m + row) * n);
      }
    }
    return [storage.hold(y)];
  },

  groupedMatmul(inputs, results, attrs: { transposed?: boolean }) {
    const x = numbers(input(inputs, 0)); // [n, inner]
    const stack = input(inputs, 1); // [experts, out, in]
    const w = numbers(stack);
    const ends = raw(input(inputs, 2)); // [experts]
    const spec = resultSpec(results);
    const y = storage.zeros(spec); // [n, outer]
    const inner = input(inputs, 0).shape[1] as number;
    const outer = spec.shape[1] as number;
    let row = 0;
    for (let e = 0; e < ends.length; e++) {
      for (; row < (ends[e] as number); row++) {
        for (let o = 0; o < outer; o++) {
          let sum = 0;
          for (let i = 0; i < inner; i++) {
            const at = e * inner * outer + (attrs.transposed ? i * outer + o : o * inner + i);
            sum += (x[row * inner + i] as number) * (w[at] as number);
          }
          y[row * outer + o] = sum;
        }
      }
    }
    return [storage.hold(y)];
  },

  groupedOuter(inputs, results) {
    const a = numbers(input(inputs, 0)); // [n, p]
    const b = numbers(input(inputs, 1)); // [n, q]
    const ends = raw(input(inputs, 2)); // [experts]
    const spec = resultSpec(results); // [experts, p, q]
    const [, p, q] = spec.shape as [number, number, number];
    const sums = new Float64Array(sizeOf(spec.shape));
    let row = 0;
    for (let e = 0; e < ends.length; e++) {
      for (; row < (ends[e] as number); row++) {
        for (let i = 0; i < p; i++) {
          for (let j = 0; j < q; j++) {
            const at = (e * p + i) * q + j;
            sums[at] = (sums[at] as number) + (a[row * p + i] as number) * (b[row * q + j] as number);
          }
        }
      }
    }
    return [storage.hold(storage.encode(sums, spec.dtype))];
  },
});
