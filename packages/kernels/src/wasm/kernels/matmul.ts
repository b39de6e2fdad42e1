// Matrix products: matmul, linear, groupedMatmul, groupedOuter. Every one becomes a list of tasks, (rows of A) x (at most 128 columns of B),
// that ../../../assembly/matmul.ts runs. How a block is computed depends on its own sizes alone, never on its neighbours or the threads.
import type { Kernel } from "@switchyard/core";
import { at, type Device, elementBytes, type Input, lastOf, only, rowsOf, sizeOf } from "../device.ts";
import type { Block } from "../heap.ts";

/** As in assembly/matmul.ts: rows of the register tile; most columns of a task. */
export const PANEL = 6;
export const MAX_COLUMNS = 128;
/** Rows of A per task where A is long: one block of packed B serves them all. */
const MAX_ROWS = PANEL * 40;
/** Up to this many rows, products with weights stored [n, k] run on dot products without packing. */
export const FEW_ROWS = 24;
/** Columns of a unit of dot products, a multiple of 8. */
const DOT_COLUMNS = 32;
/** Bytes of scratch a thread needs: a packed block of B, an edge tile, and the SwiGLU block of MAX_ROWS rows. */
export const SCRATCH = 256 * MAX_COLUMNS * 4 + MAX_COLUMNS * 8 + PANEL * 8 * 4 + MAX_ROWS * MAX_COLUMNS * 4 + 1024;

/** Floating-point operations per nanosecond, for the estimates of `launch`. */
const SPEED = 30;
export const kindOf = (x: { readonly dtype: string }): number => (x.dtype === "bf16" ? 1 : x.dtype === "f16" ? 2 : 0);

/** One product of the list: addresses and sizes. Strides are common to all. */
export interface Product {
  readonly a: number;
  readonly b: number;
  readonly c: number;
  readonly m: number;
  readonly k: number;
}
export interface Layout {
  readonly n: number;
  /** Bytes from line to line. */
  readonly lda: number;
  readonly ldb: number;
  readonly ldc: number;
  /** A stored [k, m] instead of [m, k]; B stored [k, n] instead of [n, k]. */
  readonly transposedA: boolean;
  readonly columnsB: boolean;
  readonly kindB: number;
  /** Address of [n] floats, or 0. */
  readonly bias: number;
}

/** What the wasm kernels take beside their tasks. */
export interface Job {
  readonly lda: number;
  readonly ldb: number;
  readonly ldc: number;
  readonly kind: number;
  readonly columns?: boolean;
  readonly packed?: boolean;
  /** Address of row 0 where tasks name rows by lists of ids. */
  readonly gathered?: number;
  /** Bytes from a gate row to its up row. */
  readonly half?: number;
  /** Dot products: columns of all tasks, and of a unit. Without it, a unit is a whole task. */
  readonly split?: { readonly columns: number; readonly part: number };
}
/** Words of a task: a, m, k, b, n, c, bias. */
const TASK = 7;

/** Runs one of the wasm kernels over tasks. */
export function runTasks(device: Device, kernel: string, tasks: readonly number[], job: Job, cost: number): void {
  if (tasks.length === 0) return;
  const { lda, ldb, ldc, kind, columns, packed, gathered = 0, half = 0, split } = job;
  const parts = split ? Math.ceil(split.columns / split.part) : 1;
  const words = [device.table(tasks), lda, ldb, ldc, kind, columns ? 1 : 0, packed ? 1 : 0, gathered, half];
  words.push(split?.part ?? 0, parts);
  device.launch(kernel, words, (tasks.length / TASK) * parts, cost);
}

/** c = a b (+ bias) for every product of the list. */
export function multiply(device: Device, products: readonly Product[], layout: Layout): void {
  const { n, lda, ldb, ldc, transposedA, columnsB, kindB, bias } = layout;
  if (n === 0) return;
  const job: Job = { lda, ldb, ldc, kind: kindB, columns: columnsB };
  const [few, many]: [Product[], Product[]] = [[], []];
  for (const p of products) if (p.m > 0) (p.m <= FEW_ROWS && !transposedA && !columnsB ? few : many).push(p);
  const flops = (list: readonly Product[]): number => list.reduce((sum, p) => sum + 2 * p.m * p.k * n, 0);

  const dots: number[] = [];
  for (const p of few) dots.push(p.a, p.m, p.k, p.b, n, p.c, bias);
  // One row is bound by memory, not by arithmetic.
  runTasks(device, "dots", dots, { ...job, split: { columns: n, part: DOT_COLUMNS } }, flops(few) / 8);
  if (many.length === 0) return;

  const packed = transposedA ? packColumns(device, many, lda) : undefined;
  const stepB = columnsB ? (kindB === 0 ? 4 : 2) : ldb;
  const tasks: number[] = [];
  many.forEach(({ a, b, c, m, k }, i) => {
    const step = rowsPerTask(device, m, n, many.length);
    for (let r = 0; r < m; r += step) {
      const rows = packed ? at(packed, i) + r * k * 4 : a + r * lda;
      for (let j = 0; j < n; j += MAX_COLUMNS) {
        const columns = Math.min(MAX_COLUMNS, n - j);
        tasks.push(rows, Math.min(step, m - r), k, b + j * stepB, columns, c + r * ldc + 4 * j, bias && bias + 4 * j);
      }
    }
  });
  runTasks(device, "multiply", tasks, { ...job, packed: transposedA }, flops(many) / SPEED);
}

/** Rows per task, a multiple of the tile: fewer where otherwise some threads had nothing to do. */
export function rowsPerTask(device: Device, m: number, n: number, products: number): number {
  const columns = Math.ceil(n / MAX_COLUMNS) * products;
  const parts = Math.max(Math.ceil(m / MAX_ROWS), Math.ceil((2 * device.threads) / columns));
  return Math.max(Math.ceil(m / parts / PANEL) * PANEL, 4 * PANEL);
}

/** Packs every transposed A into panels [k][6]; gives the address of each one's first panel. */
function packColumns(device: Device, products: readonly Product[], lda: number): number[] {
  const floats = products.reduce((sum, { m, k }) => sum + Math.ceil(m / PANEL) * PANEL * k, 0);
  let to = device.temporary(floats * 4).ptr;
  const panels: number[] = [];
  const starts = products.map(({ a, m, k }) => {
    const start = to;
    for (let r = 0; r < m; r += PANEL) {
      panels.push(a + r * 4, k, to);
      to += k * PANEL * 4;
    }
    return start;
  });
  device.launch("packColumns", [device.table(panels), lda], panels.length / 3, floats / 2);
  return starts;
}

/** Rows of a grouped op: where each expert's block starts and ends. Reads the block ends on the host, which shares the memory. */
export function blocks(device: Device, ends: Input, rows: number): { readonly from: number; readonly to: number }[] {
  const list = device.heap.i32().subarray(ends.handle.ptr / 4, ends.handle.ptr / 4 + sizeOf(ends.shape));
  let from = 0;
  return Array.from(list, (end) => {
    const to = Math.max(from, Math.min(end, rows));
    const block = { from, to };
    from = to;
    return block;
  });
}

export function matmulKernels(
  device: Device,
): Readonly<Record<string, Kernel<Block>>> & { readonly matmul: Kernel<Block> } {
  return {
    matmul: device.kernel(
      "matmul",
      ([a, b], [spec], { transposeA = false, transposeB = false }) => {
        if (!a || !b || !spec) return [];
        const c = device.result(spec);
        const [m, n] = [at(spec.shape, spec.shape.length - 2), lastOf(spec)];
        const k = transposeA ? at(a.shape, a.shape.length - 2) : lastOf(a);
        const batch = spec.shape.slice(0, -2);
        const offsets = [a, b].map((x) => batchOffsets(x, batch));
        const [stepA, stepB] = [m * k * 4, n * k * elementBytes(b.dtype)];
        let products = Array.from({ length: sizeOf(batch) }, (_, i) => ({
          a: a.handle.ptr + at(at(offsets, 0), i) * stepA,
          b: b.handle.ptr + at(at(offsets, 1), i) * stepB,
          c: c.ptr + i * m * n * 4,
          m,
          k,
        }));
        // One matrix B for all: the batch is just more rows.
        const first = products[0];
        if (
          first &&
          !transposeA &&
          products.length > 1 &&
          at(offsets, 1).every((o) => o === 0) &&
          sizeOf(a.shape.slice(0, -2)) === products.length
        ) {
          products = [{ ...first, m: m * products.length }];
        }
        multiply(device, products, {
          n,
          lda: (transposeA ? m : k) * 4,
          ldb: (transposeB ? k : n) * elementBytes(b.dtype),
          ldc: n * 4,
          transposedA: transposeA,
          columnsB: !transposeB,
          kindB: kindOf(b),
          bias: 0,
        });
        return [c];
      },
      only("fw"),
    ),

    linear: device.kernel(
      "linear",
      ([x, w, bias], [spec]) => {
        if (!x || !w || !spec) return [];
        const y = device.result(spec);
        const [k, n] = [lastOf(w), at(w.shape, 0)];
        multiply(device, [{ a: x.handle.ptr, b: w.handle.ptr, c: y.ptr, m: rowsOf(x), k }], {
          n,
          lda: k * 4,
          ldb: k * elementBytes(w.dtype),
          ldc: n * 4,
          transposedA: false,
          columnsB: false,
          kindB: kindOf(w),
          bias: bias?.handle.ptr ?? 0,
        });
        return [y];
      },
      only("fwf"),
    ),

    groupedMatmul: device.kernel(
      "groupedMatmul",
      ([rows, w, ends], [spec], { transposed = false }) => {
        if (!rows || !w || !ends || !spec) return [];
        const y = device.result(spec);
        const [total, k, n] = [at(rows.shape, 0), lastOf(rows), lastOf(spec)];
        const list = blocks(device, ends, total);
        const matrix = k * n * elementBytes(w.dtype);
        const filled = list.at(-1)?.to ?? 0;
        device.heap.u8().fill(0, y.ptr + filled * n * 4, y.ptr + total * n * 4);
        multiply(
          device,
          list.map(({ from, to }, e) => ({
            a: rows.handle.ptr + from * k * 4,
            b: w.handle.ptr + e * matrix,
            c: y.ptr + from * n * 4,
            m: to - from,
            k,
          })),
          {
            n,
            lda: k * 4,
            ldb: (transposed ? n : k) * elementBytes(w.dtype),
            ldc: n * 4,
            transposedA: false,
            columnsB: transposed,
            kindB: kindOf(w),
            bias: 0,
          },
        );
        return [y];
      },
      only("fwi"),
    ),

    groupedOuter: device.kernel(
      "groupedOuter",
      ([a, b, ends], [spec]) => {
        if (!a || !b || !ends || !spec) return [];
        const c = device.result(spec);
        const [p, q] = [lastOf(a), lastOf(b)];
        multiply(
          device,
          blocks(device, ends, at(a.shape, 0)).map(({ from, to }, e) => ({
            a: a.handle.ptr + from * p * 4,
            b: b.handle.ptr + from * q * 4,
            c: c.ptr + e * p * q * 4,
            m: p,
            k: to - from,
          })),
          { n: q, lda: p * 4, ldb: q * 4, ldc: q * 4, transposedA: true, columnsB: true, kindB: 0, bias: 0 },
        );
        return [c];
      },
      only("ffi"),
    ),
  };
}

/** Which matrix of x each position of the broadcast batch uses. */
function batchOffsets(x: Input, batch: readonly number[]): number[] {
  const own = x.shape.slice(0, -2);
  let list = [0];
  let size = 1;
  for (let axis = batch.length - 1; axis >= 0; axis--) {
    const d = own[axis - batch.length + own.length] ?? 1;
    const step = d === 1 ? 0 : size;
    const inner = list;
    list = Array.from({ length: at(batch, axis) }, (_, i) => inner.map((o) => o + i * step)).flat();
    size *= d;
  }
  return list;
}
