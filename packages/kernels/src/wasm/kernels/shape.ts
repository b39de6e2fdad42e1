// Kernels that move data: transpose, slice, concat, rows by id, elements of the last axis by id. Any storage type.
import type { Kernel } from "@switchyard/core";
import { at, type Device, elementBytes, type Input, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";

interface Runs {
  readonly dims: readonly number[];
  /** Bytes from run to run in each dimension. */
  readonly x: readonly number[];
  readonly y: readonly number[];
  readonly bytes: number;
}

function copyRuns(device: Device, x: number, y: number, { dims, x: sx, y: sy, bytes }: Runs): void {
  const rows = sizeOf(dims);
  if (rows * bytes === 0) return;
  const table = dims.length === 0 ? 0 : device.table([...dims, ...sx, ...sy]);
  device.launch("copyRuns", [x, y, dims.length, table, bytes], rows, (rows * bytes) / 6 + rows * 5 * dims.length);
}

/** Bytes from element to element in each dimension of a row-major tensor. */
function strides(shape: readonly number[], size: number): number[] {
  const list: number[] = [];
  let step = size;
  for (const d of [...shape].reverse()) {
    list.unshift(step);
    step *= d;
  }
  return list;
}

function transpose(device: Device, x: Input, y: Block, perm: readonly number[]): void {
  const size = elementBytes(x.dtype);
  const steps = strides(x.shape, size);
  // Axes of the result from outside to inside, with their step in x; neighbours that are neighbours in x too become one.
  const axes: { size: number; step: number }[] = [];
  for (const axis of perm) {
    const next = { size: at(x.shape, axis), step: at(steps, axis) };
    if (next.size === 1) continue;
    const before = axes.at(-1);
    if (before && before.step === next.step * next.size) {
      before.size *= next.size;
      before.step = next.step;
    } else axes.push(next);
  }
  const total = sizeOf(x.shape);
  if (total === 0) return;
  const inner = axes.pop() ?? { size: 1, step: size };
  const dims = axes.map((a) => a.size);
  const ys = strides([...dims, inner.size], size).slice(0, -1);
  const xs = axes.map((a) => a.step);
  if (inner.step === size) {
    copyRuns(device, x.handle.ptr, y.ptr, { dims, x: xs, y: ys, bytes: inner.size * size });
    return;
  }
  // [batch, columns, rows] from [batch, rows, columns]
  const [columns, batch] = [axes.at(-1), axes.at(-2)];
  const plane = inner.size * inner.step;
  if (
    size === 4 &&
    columns &&
    columns.step === 4 &&
    inner.step === columns.size * 4 &&
    (!batch || batch.step === plane)
  ) {
    if (axes.length <= 2) {
      const bands = Math.ceil(columns.size / 16);
      const job = [x.handle.ptr, y.ptr, inner.size, columns.size, bands];
      device.launch("flip", job, bands * (batch?.size ?? 1), total * 0.6);
      return;
    }
  }
  const table = dims.length === 0 ? 0 : device.table([...dims, ...xs, ...ys]);
  const job = [x.handle.ptr, y.ptr, dims.length, table, inner.size, inner.step, size];
  device.launch("gatherStrided", job, sizeOf(dims), total * 1.5);
}

const growing = (kernel: Kernel<Block>): Kernel<Block> => Object.assign(kernel, { grows: true as const });

type Primitive = "reshape" | "transpose" | "slice" | "concat" | "takeRows" | "addRows";

export function shapeKernels(
  device: Device,
): Readonly<Record<string, Kernel<Block>>> & { readonly [P in Primitive]: Kernel<Block> } {
  return {
    reshape: Object.assign<Kernel<Block>, { view: true }>(([x]) => (x ? [x.handle] : []), { view: true }),

    transpose: device.kernel("transpose", ([x], [spec], { perm }) => {
      if (!x || !spec) return [];
      const y = device.result(spec);
      transpose(device, x, y, perm);
      return [y];
    }),

    slice: device.kernel(
      "slice",
      ([x], [spec], { start, size }: { start: readonly number[]; size: readonly number[] }) => {
        if (!x || !spec) return [];
        const y = device.result(spec);
        const element = elementBytes(x.dtype);
        const [xs, ys] = [strides(x.shape, element), strides(size, element)];
        // The run takes in all last axes that are kept whole, and the part of the one before.
        let axis = size.length;
        while (axis > 0 && size[axis - 1] === x.shape[axis - 1]) axis--;
        const first = Math.max(0, axis - 1);
        const from = start.reduce((sum, s, i) => sum + s * at(xs, i), x.handle.ptr);
        copyRuns(device, from, y.ptr, {
          dims: size.slice(0, first),
          x: xs.slice(0, first),
          y: ys.slice(0, first),
          bytes: sizeOf(size.slice(first)) * element,
        });
        return [y];
      },
    ),

    concat: growing(
      device.kernel("concat", (inputs, [spec], { axis }: { axis: number }) => {
        if (!spec) return [];
        const outer = sizeOf(spec.shape.slice(0, axis));
        const inner = sizeOf(spec.shape.slice(axis + 1)) * elementBytes(spec.dtype);
        const line = at(spec.shape, axis) * inner;
        const { reuse, ...rest } = spec;
        const sizes = inputs.map((x) => at(x.shape, axis) * inner);
        const alone = inputs.every(({ handle }, i) => i === 0 || handle !== reuse);
        if (reuse !== undefined && alone && reuse.bytes >= outer * line) {
          // Lines behind the first move apart, the last one first. Nothing is allocated, so nothing fails half-way.
          const heap = device.heap.u8();
          const move = (from: number, to: number, bytes: number): void => {
            heap.copyWithin(to, from, from + bytes);
          };
          const own = at(sizes, 0);
          for (let i = outer - 1; i > 0; i--) move(reuse.ptr + i * own, reuse.ptr + i * line, own);
          let to = reuse.ptr + own;
          for (const [i, { handle }] of inputs.entries()) {
            if (i === 0) continue;
            const bytes = at(sizes, i);
            for (let row = 0; row < outer; row++) move(handle.ptr + row * bytes, to + row * line, bytes);
            to += bytes;
          }
          return [reuse];
        }
        // What grows once will grow again: half as much more, so that n appends of one line copy O(n) and not O(n^2) bytes.
        const y = device.result(rest, reuse ? 1.5 * outer * line : 0);
        let to = y.ptr;
        for (const [i, x] of inputs.entries()) {
          const bytes = at(sizes, i);
          copyRuns(device, x.handle.ptr, to, { dims: [outer], x: [bytes], y: [line], bytes });
          to += bytes;
        }
        return [y];
      }),
    ),

    takeRows: device.kernel(
      "takeRows",
      ([x, ids], [spec]) => {
        if (!x || !ids || !spec) return [];
        const y = device.result(spec);
        const bytes = sizeOf(x.shape.slice(1)) * elementBytes(x.dtype);
        const rows = sizeOf(ids.shape);
        const job = [x.handle.ptr, y.ptr, ids.handle.ptr, at(x.shape, 0), bytes, 0, 0];
        device.launch("takeRows", job, bytes === 0 ? 0 : rows, rows * (bytes / 6 + 5));
        return [y];
      },
      only("?i"),
    ),

    addRows: device.kernel(
      "addRows",
      ([x, ids], [spec], { rows }: { rows: number }) => {
        if (!x || !ids || !spec) return [];
        const y = device.result(spec);
        const [m, bytes] = [sizeOf(ids.shape), sizeOf(x.shape.slice(1)) * 4];
        // Each unit reads all ids: few units.
        const block = Math.max(1, Math.ceil(rows / (4 * device.threads)));
        const job = [x.handle.ptr, y.ptr, ids.handle.ptr, rows, bytes, m, block];
        device.launch("addRows", job, Math.ceil(rows / block), (m * bytes) / 8 + (rows * bytes) / 8);
        return [y];
      },
      only("fi"),
    ),

    gatherLast: device.kernel(
      "gatherLast",
      ([x, ids], [spec]) => {
        if (!x || !ids || !spec) return [];
        const y = device.result(spec);
        const job = [x.handle.ptr, y.ptr, ids.handle.ptr, lastOf(x), lastOf(ids)];
        device.launch("gatherLast", job, rowsOf(ids), sizeOf(ids.shape) * 2);
        return [y];
      },
      only("ni"),
    ),

    scatterLast: device.kernel(
      "scatterLast",
      ([x, ids], [spec], { size }: { size: number }) => {
        if (!x || !ids || !spec) return [];
        const y = device.result(spec);
        const job = [x.handle.ptr, y.ptr, ids.handle.ptr, size, lastOf(ids)];
        device.launch("scatterLast", job, rowsOf(spec), sizeOf(ids.shape) * 2 + sizeOf(spec.shape) / 2);
        return [y];
      },
      only("fi"),
    ),
  };
}
