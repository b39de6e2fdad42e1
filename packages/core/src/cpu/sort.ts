// Orders of the last axis. Stable: equal values keep their order, lower index first. NaN comes last in both directions.
import type { Kernel, TypedArray } from "../backend.ts";
import { type CpuHandle, input, raw, resultSpec, type Storage } from "./storage.ts";

type Family = "topkIndices" | "argsort";

/** Indices that put data[start ... start + n] in order. */
const order = (data: TypedArray, start: number, n: number, descending: boolean): number[] => {
  const at = (i: number): number => data[start + i] as number;
  const compare = (i: number, j: number): number => {
    const [a, b] = [at(i), at(j)];
    if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b));
    // Written with < because infinity - infinity is NaN.
    if (a === b) return 0;
    return a < b === descending ? 1 : -1;
  };
  return Array.from({ length: n }, (_, i) => i).sort(compare);
};

export const sort = (storage: Storage): { readonly [P in Family]: Kernel<CpuHandle> } => ({
  topkIndices(inputs, results, { k }: { k: number }) {
    const x = input(inputs, 0); // [..., n]
    const data = raw(x);
    const n = x.shape.at(-1) as number;
    const y = storage.zeros(resultSpec(results)); // [..., k]
    const rows = k === 0 ? 0 : y.length / k;
    for (let row = 0; row < rows; row++) y.set(order(data, row * n, n, true).slice(0, k), row * k);
    return [storage.hold(y)];
  },

  argsort(inputs, results, { descending = false }: { descending?: boolean }) {
    const x = input(inputs, 0); // [..., n]
    const data = raw(x);
    const n = x.shape.at(-1) as number;
    const y = storage.zeros(resultSpec(results)); // [..., n]
    for (let start = 0; start < y.length; start += n) y.set(order(data, start, n, descending), start);
    return [storage.hold(y)];
  },
});
