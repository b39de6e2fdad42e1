// Sums and maxima along axes, each by the thread of its result. Long sums go in pieces.
import type { Kernel } from "@switchyard/core";
import { type Calls, type GpujsHandle, lastOf, only, rowsOf, sizeOf, type Value, type Work } from "../calls.ts";
import { onHost } from "../host.ts";
import { divide, type Program, split } from "../program.ts";

const sumAxis: Program = {
  name: "sumAxis",
  arrays: ["x"],
  sizes: ["n", "inner"],
  body: `
  ${split("outer", "column", "i", "inner")}
  const first = outer * n * inner + column;
  let sum = 0;
  for (let p = 0; p < n; p++) { sum += x[first + p * inner]; }
  return sum;`,
};

/** Sums of pieces of `piece` elements, `pieces` of them along an axis of n. */
const sumPieces = (name: string, term: string): Program => ({
  name,
  arrays: ["x"],
  sizes: ["n", "inner", "piece", "pieces"],
  body: `
  ${split("line", "column", "i", "inner")}
  ${divide("outer", "line", "pieces")}
  const from = (line - outer * pieces) * piece;
  let count = piece;
  if (from + count > n) { count = n - from; }
  const first = (outer * n + from) * inner + column;
  let sum = 0;
  for (let p = 0; p < count; p++) {
    const v = x[first + p * inner];
    sum += ${term};
  }
  return sum;`,
});
const plainPieces = sumPieces("sumPieces", "v");
const squarePieces = sumPieces("sumSquares", "v * v");

const maximum: Program = {
  name: "maxLast",
  arrays: ["x"],
  sizes: ["n"],
  body: `
  let m = x[i * n];
  for (let p = 1; p < n; p++) { m = Math.max(m, x[i * n + p]); }
  return m;`,
};

/** The longest sum that one thread does alone. */
const LONG = 256;
const pieceOf = (n: number): number => Math.max(16, Math.ceil(Math.sqrt(n)));

/** x [outer, n, inner] -> [outer, inner] */
export async function sumOver(work: Work, x: Value, outer: number, n: number, inner: number): Promise<Value> {
  if (n <= LONG) return work.run(sumAxis, outer * inner, [x], { n, inner });
  const piece = pieceOf(n);
  const pieces = Math.ceil(n / piece);
  const parts = await work.run(plainPieces, outer * pieces * inner, [x], { n, inner, piece, pieces });
  return sumOver(work, parts, outer, pieces, inner);
}

/** Maxima of the rows of x [rows, n]. */
export const maxOver = (work: Work, x: Value, rows: number, n: number): Promise<Value> =>
  work.run(maximum, rows, [x], { n });

export function reduceKernels(calls: Calls): Readonly<Record<string, Kernel<GpujsHandle>>> & {
  readonly [P in "sumTo" | "maxLast" | "cumsum"]: Kernel<GpujsHandle>;
} {
  return {
    sumTo: calls.kernel(
      "sumTo",
      async ([x], [y], _, work) => {
        if (!x || !y) return [];
        const missing = x.shape.length - y.shape.length;
        const summed = x.shape.map((size, axis) => axis < missing || (y.shape[axis - missing] === 1 && size !== 1));
        let [value, shape] = [x.value, [...x.shape]];
        // Neighbours that are summed both are one axis; the last ones go first.
        for (let end = shape.length; end > 0; ) {
          let start = end - 1;
          if (!summed[start]) {
            end = start;
            continue;
          }
          while (start > 0 && summed[start - 1]) start--;
          const [outer, inner] = [sizeOf(shape.slice(0, start)), sizeOf(shape.slice(end))];
          value = await sumOver(work, value, outer, sizeOf(shape.slice(start, end)), inner);
          shape = [...shape.slice(0, start), ...shape.slice(start, end).map(() => 1), ...shape.slice(end)];
          end = start;
        }
        // Nothing to sum: still a value of its own.
        return [value === x.value ? await sumOver(work, value, 1, 1, value.length) : value];
      },
      only("f"),
    ),
    maxLast: calls.kernel(
      "maxLast",
      async ([x], _, __, work) => (x ? [await maxOver(work, x.value, rowsOf(x), lastOf(x))] : []),
      only("f"),
    ),
    cumsum: calls.kernel("cumsum", onHost("cumsum")),
    sumSquares: calls.kernel(
      "sumSquares",
      async ([x], _, __, work) => {
        if (!x) return [];
        const n = x.value.length;
        const piece = pieceOf(n);
        const pieces = Math.max(1, Math.ceil(n / piece));
        const parts = await work.run(squarePieces, pieces, [x.value], { n, inner: 1, piece, pieces });
        return [await sumOver(work, parts, 1, pieces, 1)];
      },
      only("f"),
    ),
  };
}
