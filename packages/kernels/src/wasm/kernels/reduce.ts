// Sums, maxima, running sums, stable orders. Long sums go in fixed blocks, so that their value does not depend on the number of threads.
import type { Kernel } from "@switchyard/core";
import { at, type Device, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";

/** Elements summed by one unit when a single long row is summed; rows summed by one unit when columns are. */
const LONG = 4_096;
const BLOCK_ROWS = 64;
const BAND = 1_024;
/** Up to this k, top-k looks k times through the row; beyond, it sorts. */
const FEW_BEST = 32;
/** Working memory of one launch of argsort. */
const SORT_BYTES = 2 ** 25;

/** y [outer, inner] = sums over the middle of x [outer, n, inner]. */
export function sumMiddle(device: Device, x: number, y: number, outer: number, n: number, inner: number): void {
  if (inner === 1) {
    sumRows(device, x, y, outer, n, false);
    return;
  }
  let [from, rows] = [x, n];
  for (;;) {
    const blocks = rows > 2 * BLOCK_ROWS ? Math.ceil(rows / BLOCK_ROWS) : 1;
    const bands = Math.ceil(inner / BAND);
    const to = blocks === 1 ? y : device.temporary(outer * blocks * inner * 4).ptr;
    const job = [from, to, rows, inner, blocks === 1 ? rows : BLOCK_ROWS, blocks, bands];
    device.launch("columnSums", job, outer * blocks * bands, outer * rows * inner * 0.3);
    if (blocks === 1) return;
    [from, rows] = [to, blocks];
  }
}

/** y [rows] = sums of the rows of x [rows, n], or of their squares. */
function sumRows(device: Device, x: number, y: number, rows: number, n: number, square: boolean): void {
  const launch = (from: number, to: number, count: number, length: number, squares: boolean): void =>
    device.launch("rowSums", [from, to, length, squares ? 1 : 0], count, count * (length * 0.3 + 5));
  if (rows > 1 || n <= 2 * LONG) {
    launch(x, y, rows, n, square);
    return;
  }
  const whole = Math.floor(n / LONG);
  const rest = n - whole * LONG;
  const partial = device.temporary((whole + 1) * 4).ptr;
  launch(x, partial, whole, LONG, square);
  launch(x + whole * LONG * 4, partial + whole * 4, 1, rest, square);
  launch(partial, y, 1, whole + 1, false);
}

function sumTo(device: Device, x: number, y: number, shape: readonly number[], target: readonly number[]): void {
  const groups: { size: number; summed: boolean }[] = [];
  shape.forEach((size, axis) => {
    if (size === 1) return;
    const summed = (target[axis - shape.length + target.length] ?? 1) !== size;
    const before = groups.at(-1);
    if (before?.summed === summed) before.size *= size;
    else groups.push({ size, summed });
  });
  let from = x;
  const summed = groups.filter((g) => g.summed);
  if (summed.length === 0) {
    device.heap.u8().copyWithin(y, x, x + sizeOf(shape) * 4);
    return;
  }
  // The last group first; what was summed has size 1 afterwards.
  for (const group of summed.reverse()) {
    const i = groups.indexOf(group);
    const outer = groups.slice(0, i).reduce((n, g) => n * g.size, 1);
    const inner = groups.slice(i + 1).reduce((n, g) => n * g.size, 1);
    const to = group === summed.at(-1) ? y : device.temporary(outer * inner * 4).ptr;
    sumMiddle(device, from, to, outer, group.size, inner);
    group.size = 1;
    from = to;
  }
}

type Primitive = "sumTo" | "maxLast" | "cumsum" | "topkIndices" | "argsort";

export function reduceKernels(
  device: Device,
): Readonly<Record<string, Kernel<Block>>> & { readonly [P in Primitive]: Kernel<Block> } {
  const sort = (
    x: number,
    y: number,
    rows: number,
    n: number,
    { k, descending, whole }: { k: number; descending: boolean; whole: boolean },
  ): void => {
    const bytes = 16 * n + 1_024;
    const step = Math.max(1, Math.min(rows, Math.floor(SORT_BYTES / bytes)));
    const work = device.temporary(step * bytes).ptr;
    for (let r = 0; r < rows; r += step) {
      const job = [x + r * n * 4, y + r * k * 4, n, k, descending ? 1 : 0, whole ? 1 : 0, work];
      const count = Math.min(step, rows - r);
      device.launch("argsort", job, count, count * (n * 15 + 500));
    }
  };
  const perRow = (name: string, cost: number): Kernel<Block> =>
    device.kernel(
      name,
      ([x], [spec]) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        device.launch(name, [x.handle.ptr, y.ptr, lastOf(x)], rowsOf(x), sizeOf(x.shape) * cost);
        return [y];
      },
      only("f"),
    );

  return {
    sumTo: device.kernel(
      "sumTo",
      ([x], [spec]) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        sumTo(device, x.handle.ptr, y.ptr, x.shape, spec.shape);
        return [y];
      },
      only("f"),
    ),
    sumSquares: device.kernel(
      "sumSquares",
      ([x], [spec]) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        sumRows(device, x.handle.ptr, y.ptr, 1, sizeOf(x.shape), true);
        return [y];
      },
      only("f"),
    ),
    maxLast: perRow("maxLast", 0.3),
    logSumExp: perRow("logSumExp", 1.5),
    cumsum: device.kernel(
      "cumsum",
      ([x], [spec], { axis, exclusive, reverse }: { axis: number; exclusive?: boolean; reverse?: boolean }) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        const n = at(x.shape, axis);
        const inner = sizeOf(x.shape.slice(axis + 1));
        const lines = sizeOf(x.shape.slice(0, axis)) * inner;
        const job = [x.handle.ptr, y.ptr, n, inner, exclusive ? 1 : 0, reverse ? 1 : 0, x.dtype === "i32" ? 1 : 0];
        device.launch("cumsum", job, lines, lines * n * 2);
        return [y];
      },
      only("n"),
    ),
    topkIndices: device.kernel(
      "topkIndices",
      ([x], [spec], { k }: { k: number }) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        const [rows, n] = [rowsOf(x), lastOf(x)];
        if (k > FEW_BEST) sort(x.handle.ptr, y.ptr, rows, n, { k, descending: true, whole: false });
        else device.launch("topkIndices", [x.handle.ptr, y.ptr, n, k], rows, rows * n * k * 2);
        return [y];
      },
      only("f"),
    ),
    argsort: device.kernel(
      "argsort",
      ([x], [spec], { descending = false }: { descending?: boolean }) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        const [rows, n] = [rowsOf(x), lastOf(x)];
        sort(x.handle.ptr, y.ptr, rows, n, { k: n, descending, whole: x.dtype === "i32" });
        return [y];
      },
      only("n"),
    ),
  };
}
