// Ragged expert blocks times their experts' weights, against one dense product of as many operations: what sorting the work by
// expert costs a matrix product.
import { groupedMatmul } from "@switchyard/core";
import type { Benchmark } from "../harness.ts";
import { noise } from "./data.ts";

export interface GroupedCase {
  readonly experts: number;
  readonly rows: number;
  readonly inner: number;
  readonly outer: number;
  readonly load: Load;
}
/** balanced: all experts get the same. skewed: as 1, 1/2, 1/3, ... (Zipf), the last one nothing. */
export type Load = "balanced" | "skewed";

/** Rows of each expert. The large blocks do not stand together: experts are ranked by stepping through them. */
export function loadSizes(rows: number, experts: number, load: Load): readonly number[] {
  const share = (rank: number): number =>
    load === "balanced" ? 1 : experts > 1 && rank === experts - 1 ? 0 : 1 / (rank + 1);
  const total = Array.from({ length: experts }, (_, rank) => share(rank)).reduce((a, b) => a + b, 0);
  const sizes = new Array<number>(experts).fill(0);
  const step = stride(experts);
  let [before, assigned] = [0, 0];
  for (let rank = 0; rank < experts; rank++) {
    before += share(rank);
    const end = Math.round((rows * before) / total);
    sizes[(rank * step) % experts] = end - assigned;
    assigned = end;
  }
  return sizes;
}

/** A step through 0..n-1 that meets each once: about 5 n / 8, without a common divisor. */
function stride(n: number): number {
  const common = (a: number, b: number): number => (b === 0 ? a : common(b, a % b));
  let step = Math.max(1, Math.round(n * 0.618));
  while (common(step, n) > 1) step++;
  return step;
}

/** rows [rows, inner], w [experts, outer, inner], ends [experts]. */
export function groupedData({ experts, rows, inner, outer, load }: GroupedCase): {
  readonly rows: Float32Array;
  readonly w: Float32Array;
  readonly ends: Int32Array;
} {
  let end = 0;
  return {
    rows: noise(rows * inner, 1),
    w: noise(experts * outer * inner, 2, Math.sqrt(3 / inner)),
    ends: Int32Array.from(loadSizes(rows, experts, load), (size) => {
      end += size;
      return end;
    }),
  };
}

/** The dense product of as many operations is `denseProduct` with `tokens: rows`. */
export const groupedProduct: Benchmark<GroupedCase> = {
  name: "grouped",
  cases: (["balanced", "skewed"] as const).flatMap((load): GroupedCase[] => [
    { experts: 8, rows: 2048, inner: 1024, outer: 4096, load },
    { experts: 64, rows: 8192, inner: 1024, outer: 1024, load },
  ]),
  setup(engine, one) {
    const { experts, inner, outer } = one;
    const data = groupedData(one);
    const rows = engine.tensor(data.rows, [one.rows, inner]);
    const w = engine.tensor(data.w, [experts, outer, inner]);
    const ends = engine.tensor(data.ends, [experts]);
    return {
      run: () => groupedMatmul(rows, w, ends), // [rows, outer]
      flops: 2 * one.rows * inner * outer,
      bytes: 4 * (one.rows * (inner + outer) + experts * inner * outer),
      dispose() {
        for (const x of [rows, w, ends]) x.dispose();
      },
    };
  },
};
