// Products of a Mixture-of-Experts layer over ragged blocks: rows by their expert's weights, the gradient of those
// weights, and whole SwiGLU experts. Block ends stay on the device: a plan kernel turns them into work lists and
// indirect dispatches (plan.ts).
import type { Kernel, MoeExperts, Spec } from "@switchyard/core";
import type { Bound, Gpu, WebgpuHandle } from "../device.ts";
import { bytesPerElement, sizeOf } from "../formats.ts";
import type { Program } from "../program.ts";
import { FEW_ROWS, fewColumns, fewProgram } from "./few.ts";
import { cuts, fewFetch, formatOf, type Lines, type Matrix, operandOf, partAt, quantizedReads } from "./matmul.ts";
import { floats, type Operand } from "./operands.ts";
import { at, type Input, lastOf, only } from "./parts.ts";
import { headerOf, type Plan, recordPlan } from "./plan.ts";
import { recordCombine } from "./rows.ts";
import { recordDispatch } from "./sort.ts";
import { columnsOf, type Epilogue, plainly, singleRow, type Tile, tileFor, tileProgram } from "./tiles.ts";

/** Most rows of a block that the few-row kernel takes on software drivers, where it is a tile of one row. */
const FEW_ON_SOFTWARE = 2;
/** Row counts of a block with code of their own. */
const COUNTS = [1, 4, FEW_ROWS] as const;

/** One product of all blocks: y[i] = rows[i] times the weights of the expert whose block holds i. */
export interface BlockProduct {
  readonly rows: Bound;
  /** Ids of the rows to take instead of 0, 1, 2, ... */
  readonly ids?: Bound;
  /** A matrix per expert. */
  readonly w: Matrix;
  readonly y: Bound;
  /** Columns of y, inner size. */
  readonly n: number;
  readonly k: number;
  /** w has 2 n lines, gates first: y = silu(gate) * up. */
  readonly swiglu: boolean;
}
export interface Blocks {
  readonly ends: Bound;
  readonly rows: number;
  readonly experts: number;
  /** Rows behind the last block become zeros; else they stay as they are. */
  readonly tail: boolean;
}

/** A program for a product of blocks, and how many workgroups wide it is. */
interface BlockKernel {
  readonly program: Program;
  readonly columns: number;
}
function blockKernels(
  gpu: Gpu,
  { ids, w, n, k, swiglu }: BlockProduct,
  tile: Tile,
): { few: BlockKernel; tiles: BlockKernel } {
  const epilogue: Epilogue = { ...plainly, swiglu };
  const rows: Matrix = { handle: w.handle, layout: "k", format: "f32", length: k, lines: 0, lineBytes: 0 };
  const a = operandOf(gpu, "a", rows, 4, true, ids !== undefined);
  const b = operandOf(gpu, "b", w, 4, true);
  const half = gpu.arithmetic === "f16";
  const tiled = (one: Tile, narrow: boolean): BlockKernel => ({
    program: tileProgram({ tile: one, a, b, place: "blocks", epilogue, half: narrow }),
    columns: Math.ceil(n / columnsOf(one, epilogue)),
  });
  const tiles = tiled(tile, half);
  if (gpu.software) return { few: tiled(singleRow, false), tiles };
  const wide = w.layout === "k" ? operandOf(gpu, "b", w, fewFetch(k), true) : b;
  const program = fewProgram({ a, b: wide, place: "blocks", epilogue, counts: COUNTS });
  return { few: { program, columns: Math.ceil(n / fewColumns(wide)) }, tiles };
}

/** Runs both kernels of the plan's product `i`, for the experts of the plan, the first of which is `first`. */
function runBlocks(
  gpu: Gpu,
  product: BlockProduct,
  kernels: ReturnType<typeof blockKernels>,
  plan: Plan,
  i: number,
  first: number,
): void {
  const { rows, ids, w, y, n, k, swiglu } = product;
  const codes = partAt(w, first * w.lines);
  const besides = quantizedReads(w, "b", first * w.lines, codes.first);
  const reads: Record<string, Bound> = { a: rows, b: codes.part, plan: plan.handle, ...besides.reads };
  if (ids) reads.a_ids = ids;
  for (const which of ["few", "tiles"] as const) {
    const { program, columns } = kernels[which];
    const header = headerOf(i, which);
    const params: Record<string, number> = {
      header,
      list: which === "few" ? plan.fewList : plan.tileList,
      tiles_n: columns,
      n1: n,
      inner: k,
      b_lines: w.lines,
      // Lines are counted over all experts; a buffer that begins behind the first takes a shift, which wraps around.
      b_first: -codes.first >>> 0,
      a_length: k,
      b_length: w.length,
      y_length: n,
      ...besides.params,
    };
    if (swiglu) params.units = n;
    gpu.run(program, reads, { y }, params, { indirect: plan.handle, offset: 16 * header });
  }
}

/** Records products over the same blocks, one after the other. Their weights may be split between experts. */
export function recordBlocks(gpu: Gpu, products: readonly BlockProduct[], { ends, rows, experts, tail }: Blocks): void {
  const first = at(products, 0);
  const { format, layout } = first.w;
  const m = Math.ceil(rows / Math.max(experts, 1));
  const tile = tileFor(gpu, {
    kind: "blocks",
    layouts: `k${layout}`,
    format,
    m,
    n: first.n,
    k: first.k,
    count: experts,
  });
  const few = gpu.software ? FEW_ON_SOFTWARE : FEW_ROWS;
  const fewRows = gpu.software ? 1 : FEW_ROWS;
  const planOf = (kernels: readonly ReturnType<typeof blockKernels>[], start: number, end: number): Plan =>
    recordPlan(gpu, ends, {
      rows,
      first: start,
      last: end,
      experts,
      few,
      fewRows,
      tileRows: tile.rows,
      tail,
      columns: kernels.map((one) => ({ few: one.few.columns, tiles: one.tiles.columns })),
    });
  const kernels = products.map((product) => blockKernels(gpu, product, tile));
  const pieces = products.map(({ w }) => cuts(experts, buffersOf(w)));
  if (pieces.every((list) => list.length === 1)) {
    const plan = planOf(kernels, 0, experts);
    products.forEach((product, i) => {
      runBlocks(gpu, product, at(kernels, i), plan, i, 0);
    });
    gpu.free(plan.handle);
    return;
  }
  products.forEach((product, i) => {
    for (const { start, end } of at(pieces, i)) {
      const plan = planOf([at(kernels, i)], start, end);
      runBlocks(gpu, product, at(kernels, i), plan, 0, start);
      gpu.free(plan.handle);
    }
  });
}
/** The buffers of weights, seen as one line per expert. */
function buffersOf({ handle, lines, lineBytes, quantized }: Matrix): Lines[] {
  const all = [{ handle, lineBytes }, quantized?.scales, quantized?.zeros];
  return all.filter((x) => x !== undefined).map((x) => ({ handle: x.handle, lineBytes: x.lineBytes * lines }));
}

/** Weights [experts, lines, length] that are not quantised. */
const weights = (w: Input, layout: "k" | "r"): Matrix => {
  const length = lastOf(w);
  const lineBytes = length * bytesPerElement(w.dtype);
  return { handle: w.handle, layout, format: formatOf(w), length, lines: at(w.shape, 1), lineBytes };
};

/** Records y [n, out] = rows [n, in] by blocks; what lies behind the last block becomes zeros. */
export function recordGrouped(gpu: Gpu, rows: Input, w: Matrix, ends: Input, n: number, y: WebgpuHandle): void {
  const [total, experts] = [at(rows.shape, 0), at(ends.shape, 0)];
  if (total === 0 || n === 0) return;
  if (experts === 0) {
    gpu.clear(y);
    return;
  }
  const product: BlockProduct = { rows: rows.handle, w, y, n, k: lastOf(rows), swiglu: false };
  recordBlocks(gpu, [product], { ends: ends.handle, rows: total, experts, tail: true });
}

/** Records y [experts, m, n] = sum over the rows of each block of a_rowᵀ b_row: a [rows, m], b [rows, n]. */
export function recordOuter(
  gpu: Gpu,
  a: Bound,
  b: Bound,
  { handle: ends, rows }: { readonly handle: Bound; readonly rows: number },
  { experts, m, n }: { readonly experts: number; readonly m: number; readonly n: number },
  y: WebgpuHandle,
): void {
  if (experts * m * n === 0) return;
  const k = Math.ceil(rows / experts);
  const tile = tileFor(gpu, { kind: "outer", layouts: "rr", format: "f32", m, n, k, count: experts });
  const side = (name: "a" | "b", length: number): Operand => floats(name, "r", length % 4 === 0 ? 4 : 1);
  const one = tileProgram({ tile, a: side("a", m), b: side("b", n), place: "outer", epilogue: plainly, half: false });
  const params = { rows, m1: m, n1: n, a_length: m, b_length: n, y_length: n };
  const [tilesM, tilesN] = [Math.ceil(m / tile.rows), Math.ceil(n / tile.columns)];
  const target = { handle: y, lineBytes: 4 * m * n };
  for (const { start, end } of cuts(experts, [target])) {
    const place = { expert: start, tiles_m: tilesM, tiles_n: tilesN };
    gpu.run(
      one,
      { a, b, ends },
      { y: partAt(target, start).part },
      { ...params, ...place },
      tilesM * tilesN * (end - start),
    );
  }
}

// ---------------------------------------------------------------- kernels
type Family = "groupedMatmul" | "groupedOuter" | "moeExperts";

export function expertKernels(gpu: Gpu): { readonly [F in Family]: Kernel<WebgpuHandle> } {
  const groupedMatmul: Kernel<WebgpuHandle> = ([rows, w, ends], [result], { transposed = false }) => {
    if (!rows || !w || !ends || !result) return [];
    const y = gpu.alloc(result);
    recordGrouped(gpu, rows, weights(w, transposed ? "r" : "k"), ends, lastOf(result), y);
    return [y];
  };

  const groupedOuter: Kernel<WebgpuHandle> = ([a, b, ends], [result]) => {
    if (!a || !b || !ends || !result) return [];
    const y = gpu.alloc(result);
    const sizes = { experts: at(result.shape, 0), m: at(result.shape, 1), n: at(result.shape, 2) };
    recordOuter(gpu, a.handle, b.handle, { handle: ends.handle, rows: at(a.shape, 0) }, sizes, y);
    return [y];
  };

  const moeExperts: Kernel<WebgpuHandle> = ([hidden, gateUp, down, ids, routing], [result], { bound }: MoeExperts) => {
    if (!hidden || !gateUp || !down || !ids || !routing || !result) return [];
    const y = gpu.alloc(result);
    const [tokens, width] = [at(hidden.shape, 0), lastOf(hidden)];
    const [experts, units] = [at(down.shape, 0), lastOf(down)];
    const slots = sizeOf(ids.shape);
    const filled = bound ?? slots;
    if (tokens * width === 0) return [y];
    if (filled * units * experts === 0) {
      gpu.clear(y);
      return [y];
    }
    const k = lastOf(ids);
    const sorted = recordDispatch(gpu, ids.handle, { slots, k, count: experts, bound: filled });
    const inner = gpu.scratch(filled * units);
    const out = gpu.scratch(filled * width);
    const gates: BlockProduct = {
      rows: hidden.handle,
      ids: sorted.rows,
      w: weights(gateUp, "k"),
      y: inner,
      n: units,
      k: width,
      swiglu: true,
    };
    const back: BlockProduct = { rows: inner, w: weights(down, "k"), y: out, n: width, k: units, swiglu: false };
    // Rows behind the last block belong to no slot: nobody reads them.
    recordBlocks(gpu, [gates, back], { ends: sorted.ends, rows: filled, experts, tail: false });
    recordCombine(gpu, out, routing.handle, sorted.slots, y, { bound: filled, tokens, k, width });
    for (const handle of [inner, out, sorted.rows, sorted.slots, sorted.ends]) gpu.free(handle);
    return [y];
  };

  const fused = only("fwwif");
  return {
    groupedMatmul: Object.assign(groupedMatmul, { unsupported: only("fwi") }),
    groupedOuter: Object.assign(groupedOuter, { unsupported: only("ffi") }),
    moeExperts: Object.assign(moeExperts, {
      unsupported(inputs: readonly Spec[], attrs: MoeExperts): string | undefined {
        const [, gateUp, down, ids] = inputs;
        const filled = attrs.bound ?? sizeOf(ids?.shape ?? []);
        const widest = Math.max(down?.shape[1] ?? 0, down?.shape[2] ?? 0, gateUp?.shape[2] ?? 0);
        const most = gpu.limits.maxStorageBufferBindingSize;
        if (4 * filled * widest > most)
          return `${filled} rows of ${widest} numbers do not fit in one binding of ${most} bytes`;
        return fused(inputs, attrs);
      },
    }),
  };
}
