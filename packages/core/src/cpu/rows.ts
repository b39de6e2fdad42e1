// Reading and adding whole rows by id, and counting ids. An id outside the table reads zeros and adds nothing.
import type { Kernel } from "../backend.ts";
import { type CpuHandle, input, raw, resultSpec, type Storage, sizeOf } from "./storage.ts";

type Family = "takeRows" | "addRows" | "blockEnds";

export const rows = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => ({
  takeRows(inputs, results) {
    const x = input(inputs, 0); // [n, ...r]
    const table = raw(x);
    const ids = raw(input(inputs, 1)); // [...m]
    const y = storage.zeros(resultSpec(results)); // [...m, ...r]
    const n = x.shape[0] as number;
    const width = sizeOf(x.shape.slice(1));
    for (let i = 0; i < ids.length; i++) {
      const id = ids[i] as number;
      if (id >= 0 && id < n) y.set(table.subarray(id * width, (id + 1) * width), i * width);
    }
    return [storage.hold(y)];
  },

  addRows(inputs, results) {
    const x = raw(input(inputs, 0)); // [m, ...r]
    const ids = raw(input(inputs, 1)); // [m]
    const spec = resultSpec(results); // [n, ...r]
    const n = spec.shape[0] as number;
    const width = sizeOf(spec.shape.slice(1));
    const sums = new Float64Array(sizeOf(spec.shape));
    for (let i = 0; i < ids.length; i++) {
      const id = ids[i] as number;
      if (id < 0 || id >= n) continue;
      for (let j = 0; j < width; j++)
        sums[id * width + j] = (sums[id * width + j] as number) + (x[i * width + j] as number);
    }
    return [storage.hold(storage.encode(sums, spec.dtype))];
  },

  blockEnds(inputs, results) {
    const ids = raw(input(inputs, 0)); // [m]
    const ends = storage.zeros(resultSpec(results)); // [count]
    const count = ends.length;
    for (let i = 0; i < ids.length; i++) {
      const id = ids[i] as number;
      if (id >= 0 && id < count) ends[id] = (ends[id] as number) + 1;
    }
    for (let e = 1; e < count; e++) ends[e] = (ends[e] as number) + (ends[e - 1] as number);
    return [storage.hold(ends)];
  },
});
