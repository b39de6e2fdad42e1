// Sums, maxima and running sums, accumulated in double precision in the order of the elements.
import type { Kernel } from "../backend.ts";
import { broadcastStrides, positions } from "./index-math.ts";
import { type CpuHandle, input, raw, resultSpec, type Storage, sizeOf } from "./storage.ts";

type Family = "sumTo" | "maxLast" | "cumsum";

export const reduce = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => ({
  sumTo(inputs, results) {
    const x = input(inputs, 0);
    const data = raw(x);
    const spec = resultSpec(results);
    // The mirror image of broadcasting: each element goes where broadcasting would have read it.
    const to = positions(x.shape, broadcastStrides(spec.shape, x.shape));
    const sums = new Float64Array(sizeOf(spec.shape));
    for (let i = 0; i < to.length; i++) sums[to[i] as number] = (sums[to[i] as number] as number) + (data[i] as number);
    return [storage.hold(storage.encode(sums, spec.dtype))];
  },

  maxLast(inputs, results) {
    const x = input(inputs, 0); // [..., n]
    const data = raw(x);
    const n = x.shape.at(-1) as number;
    const y = storage.zeros(resultSpec(results)); // [..., 1]
    for (let row = 0; row < y.length; row++) {
      let max = Number.NEGATIVE_INFINITY;
      for (let i = 0; i < n; i++) max = Math.max(max, data[row * n + i] as number);
      y[row] = max;
    }
    return [storage.hold(y)];
  },

  cumsum(inputs, results, attrs: { axis: number; exclusive?: boolean; reverse?: boolean }) {
    const x = input(inputs, 0);
    const data = raw(x);
    const axis = attrs.axis < 0 ? attrs.axis + x.shape.length : attrs.axis;
    const n = x.shape[axis] as number;
    const inner = sizeOf(x.shape.slice(axis + 1));
    const outer = sizeOf(x.shape.slice(0, axis));
    const y = storage.zeros(resultSpec(results));
    for (let o = 0; o < outer; o++) {
      for (let j = 0; j < inner; j++) {
        let sum = 0;
        for (let step = 0; step < n; step++) {
          const i = (o * n + (attrs.reverse ? n - 1 - step : step)) * inner + j;
          if (attrs.exclusive) y[i] = sum;
          sum += data[i] as number;
          if (!attrs.exclusive) y[i] = sum;
        }
      }
    }
    return [storage.hold(y)];
  },
});
