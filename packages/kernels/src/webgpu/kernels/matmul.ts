// Dense products: matmul and linear. A product becomes one dispatch: of tiles, or of the few-row kernel where either
// side is small; two where k is cut into slices; one per range where tensors are split over buffers.
import { type Kernel, UnsupportedError } from "@switchyard/core";
import type { Gpu, Part, WebgpuHandle } from "../device.ts";
import { bytesPerElement } from "../formats.ts";
import { type Program, program } from "../program.ts";
import { FEW_ROWS, fewColumns, fewProgram, fewSpan } from "./few.ts";
import { type Format, floats, type Operand, stepFor } from "./operands.ts";
import { at, broadcastDims, type Input, lastOf, memo, only, rowsOf } from "./parts.ts";
import { type Epilogue, singleRow, tileFor, tileProgram } from "./tiles.ts";

/** One side of a product in storage: one matrix, or one for each expert or entry of a batch. */
export interface Matrix extends Lines {
  readonly layout: "k" | "r";
  readonly format: Format;
  /** Elements of a line, and lines of one matrix. */
  readonly length: number;
  readonly lines: number;
  readonly quantized?: { readonly scales: Lines; readonly zeros?: Lines; readonly group: number };
}

/**
 * Matrices of a batch, outermost dimension first: how many, and how many matrices of each side lie from one to the
 * next.
 */
export interface BatchDim {
  readonly size: number;
  readonly a: number;
  readonly b: number;
}
export interface DenseProduct {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly a: Matrix;
  readonly b: Matrix;
  readonly y: WebgpuHandle;
  readonly batch: readonly BatchDim[];
  readonly bias?: WebgpuHandle;
  /** Products of tiles in f16, where the user asked for that. */
  readonly half: boolean;
}
/** A range of a product in which every tensor lies in one buffer. */
interface Piece {
  readonly m: Range;
  readonly n: Range;
  readonly k: Range;
}
interface Range {
  readonly start: number;
  readonly end: number;
}
const sizeOfRange = ({ start, end }: Range): number => end - start;

// ---------------------------------------------------------------- split tensors
/**
 * A tensor as lines of so many bytes. A view may count its leading dimension otherwise than the tensor that was split:
 * bytes count.
 */
export interface Lines {
  readonly handle: WebgpuHandle;
  readonly lineBytes: number;
}
/** Ranges of lines in which none of the tensors changes its buffer. */
export function cuts(total: number, split: readonly Lines[]): Range[] {
  const edges = new Set([0, total]);
  for (const { handle, lineBytes } of split) {
    let bytes = 0;
    for (const part of handle.parts.slice(0, -1)) {
      bytes += part.bytes;
      if (bytes % lineBytes !== 0) {
        throw new UnsupportedError(
          `webgpu: a product over a view of a split tensor: a line of ${lineBytes} bytes lies in two buffers, because ` +
            "this device binds too few bytes at once; use the tensor in the shape it was made in",
        );
      }
      edges.add(bytes / lineBytes);
    }
  }
  const sorted = [...edges].sort((x, y) => x - y);
  return sorted.slice(1).map((end, i) => ({ start: at(sorted, i), end }));
}
/** The part of a tensor that holds a line, and the line it begins with. */
export function partAt({ handle, lineBytes }: Lines, line: number): { readonly part: Part; readonly first: number } {
  let bytes = 0;
  for (const part of handle.parts) {
    if (handle.parts.length === 1 || line * lineBytes < bytes + part.bytes)
      return { part, first: bytes && bytes / lineBytes };
    bytes += part.bytes;
  }
  throw new RangeError(`webgpu: line ${line} lies behind a tensor of ${handle.bytes / lineBytes} lines`);
}

// ---------------------------------------------------------------- slices of k
const SLICE = 256;
const LONG = 1024;
/** Workgroups that keep a GPU busy. */
const BUSY = 128;
/**
 * In how many slices k is cut, so that products with few workgroups and long sums fill a GPU. By sizes alone: not by
 * the tile.
 */
function slicesOf(m: number, n: number, k: number, count: number, columns: number): { slices: number; slice: number } {
  const groups = count * Math.ceil(m / 64) * Math.ceil(n / columns);
  const wanted = k < LONG || groups >= BUSY ? 1 : Math.min(Math.floor(k / (2 * SLICE)), Math.ceil((2 * BUSY) / groups));
  const slice = Math.ceil(k / Math.max(wanted, 1) / SLICE) * SLICE;
  return wanted <= 1 ? { slices: 1, slice: k } : { slices: Math.ceil(k / slice), slice };
}
const sumSlices = memo((bias: boolean): Program => {
  const reads: Record<string, string> = bias ? { x: "f32", bias: "f32" } : { x: "f32" };
  return program({
    key: `sum of slices${bias ? " bias" : ""}`,
    reads,
    writes: { y: "f32" },
    params: { total: "u32", matrix: "u32", slices: "u32", columns: "u32", add: "u32" },
    lanes: 64,
    code: () => `
fn main(group: u32, lane: u32) {
  let i = group * 64u + lane;
  if (i >= p.total) { return; }
  let first = (i / p.matrix) * p.slices * p.matrix + i % p.matrix;
  var sum = x[first];
  for (var s = 1u; s < p.slices; s++) { sum += x[first + s * p.matrix]; }
  ${bias ? `sum += bias[i % p.columns];` : ""}
  if (p.add != 0u) { sum += y[i]; }
  y[i] = sum;
}`,
  });
});

// ---------------------------------------------------------------- one product
const isMultipleOf4 = ({ start, end }: Range, length: number): boolean =>
  start % 4 === 0 && (end % 4 === 0 || end === length);

/** The loader of a matrix, for fetches of at most `most` elements inside ranges that begin as told. */
export function operandOf(
  gpu: Gpu,
  name: "a" | "b",
  x: Matrix,
  most: 4 | 8 | 16,
  aligned: boolean,
  gathered = false,
): Operand {
  const { layout, format, length, quantized } = x;
  const group = quantized?.group ?? 0;
  const step = stepFor(format, length, group, most, aligned);
  if (format === "f32" && !gathered) return floats(name, layout, step === 1 ? 1 : 4);
  // One scale per line needs no division.
  const own = group === length ? 0 : group;
  return {
    name,
    layout,
    format,
    step,
    group: own,
    zeros: quantized?.zeros !== undefined,
    gathered,
    native: format === "f16" && gpu.f16,
  };
}
/** The buffers of a weight beside the codes; `line` is any line of the range that is worked on. */
export function quantizedReads(
  { quantized }: Matrix,
  name: "a" | "b",
  line: number,
  first: number,
): { readonly reads: Record<string, Part>; readonly params: Record<string, number> } {
  if (!quantized) return { reads: {}, params: {} };
  const scales = partAt(quantized.scales, line);
  const zeros = quantized.zeros && partAt(quantized.zeros, line);
  // Lines are counted in the codes' buffer.
  const shift = (to: number): number => (first - to) >>> 0;
  return {
    reads: { [`${name}_scales`]: scales.part, ...(zeros ? { [`${name}_zeros`]: zeros.part } : {}) },
    params: {
      [`${name}_scale_shift`]: shift(scales.first),
      ...(zeros ? { [`${name}_zero_shift`]: shift(zeros.first) } : {}),
    },
  };
}

/** The widest fetch of the few-row kernel that leaves no lane of a team without work. */
export function fewFetch(k: number): 4 | 8 | 16 {
  for (const step of [16, 8] as const) if (fewSpan(step) <= k) return step;
  return 4;
}

const rowCounts = [[1], [2], [4], [FEW_ROWS]] as const;

/** Matrices that a piece begins with, counted over the whole batch. */
interface Start {
  readonly a: number;
  readonly b: number;
  readonly y: number;
}

const linesOfResult = ({ y, n }: DenseProduct): Lines => ({ handle: y, lineBytes: 4 * n });

/** Records one product y[m, n] (+)= a b: a piece of each matrix of up to two batch dimensions. */
function recordPiece(gpu: Gpu, product: DenseProduct, piece: Piece, start: Start, dims: readonly BatchDim[]): void {
  const { bias, half } = product;
  const [m, n, k] = [sizeOfRange(piece.m), sizeOfRange(piece.n), sizeOfRange(piece.k)];
  const inner = at(dims, dims.length - 1);
  const outer = dims.length > 1 ? at(dims, 0) : undefined;
  const count = inner.size * (outer?.size ?? 1);

  // Few columns are the few rows of the product with its sides swapped.
  const swapped = !gpu.software && n <= FEW_ROWS && m > FEW_ROWS && product.b.format === "f32";
  const [sideA, sideB] = swapped ? (["b", "a"] as const) : (["a", "b"] as const);
  const [a, b] = [product[sideA], product[sideB]];
  const [rows, columns] = swapped ? [piece.n, piece.m] : [piece.m, piece.n];
  const [height, width] = swapped ? [n, m] : [m, n];
  const few = height <= FEW_ROWS && !gpu.software;

  const aligned = (x: Matrix, along: Range): boolean => isMultipleOf4(x.layout === "k" ? piece.k : along, x.length);
  const wide = few && b.layout === "k" && k === product.k;
  const left = operandOf(gpu, "a", a, 4, aligned(a, rows));
  const right = operandOf(gpu, "b", b, wide ? fewFetch(k) : 4, aligned(b, columns));

  // Slices are summed over whole results only.
  const complete = m === product.m && n === product.n && dims === product.batch;
  const { slices, slice } =
    complete && !gpu.software
      ? slicesOf(height, width, k, count, few ? fewColumns(right) : 64)
      : { slices: 1, slice: k };
  const partial = slices > 1 ? gpu.scratch(slices * count * m * n) : undefined;
  const add = piece.k.start > 0;
  const withBias = bias !== undefined && !add;
  const epilogue: Epilogue = { bias: withBias && !partial, swiglu: false, across: swapped, adding: add && !partial };

  const beginning = (x: Matrix, along: Range, matrix: number): { readonly part: Part; readonly first: number } =>
    partAt(x, matrix * x.lines + (x.layout === "k" ? along : piece.k).start);
  const fromA = beginning(a, rows, start[sideA]);
  const fromB = beginning(b, columns, start[sideB]);
  const target = partAt(linesOfResult(product), start.y * product.m + piece.m.start);
  const codes = quantizedReads(b, "b", columns.start, fromB.first);

  const reads: Record<string, Part | WebgpuHandle> = { a: fromA.part, b: fromB.part, ...codes.reads };
  if (epilogue.bias && bias) reads.bias = bias;
  const params: Record<string, number> = {
    m0: rows.start,
    m1: rows.end,
    n0: columns.start,
    n1: columns.end,
    k0: piece.k.start,
    k1: piece.k.end,
    slices,
    slice: Math.max(slice, 1),
    batch: inner.size,
    a_outer: (outer?.[sideA] ?? 0) * a.lines,
    a_batch: inner[sideA] * a.lines,
    b_outer: (outer?.[sideB] ?? 0) * b.lines,
    b_batch: inner[sideB] * b.lines,
    // Lines are counted over whole tensors; a buffer that begins behind line 0 takes a shift, which wraps around.
    a_first: (start[sideA] * a.lines - fromA.first) >>> 0,
    b_first: (start[sideB] * b.lines - fromB.first) >>> 0,
    y_first: partial ? 0 : (start.y * product.m - target.first) >>> 0,
    y_lines: product.m,
    a_length: a.length,
    b_length: b.length,
    y_length: product.n,
    add: 1,
    ...codes.params,
  };
  const y = partial ?? target.part;
  if (few) {
    const counts = rowCounts.find(([most]) => height <= most) ?? rowCounts[3];
    params.tiles_m = 1;
    params.tiles_n = Math.ceil(width / fewColumns(right));
    const one = fewProgram({ a: left, b: right, place: "dense", epilogue, counts });
    gpu.run(one, reads, { y }, params, params.tiles_n * slices * count);
  } else {
    const layouts = left.layout + right.layout;
    const shape = { kind: "dense", layouts, format: right.format, m: height, n: width, k, count } as const;
    const tile = gpu.software && height === 1 && left.layout === "k" ? singleRow : tileFor(gpu, shape);
    params.tiles_m = Math.ceil(height / tile.rows);
    params.tiles_n = Math.ceil(width / tile.columns);
    const one = tileProgram({ tile, a: left, b: right, place: "dense", epilogue, half });
    gpu.run(one, reads, { y }, params, params.tiles_m * params.tiles_n * slices * count);
  }
  if (!partial) return;
  const total = count * m * n;
  const sum = { total, matrix: m * n, slices, columns: n, add: add ? 1 : 0 };
  const groups = Math.ceil(total / 64);
  if (withBias) gpu.run(sumSlices(true), { x: partial, bias }, { y: target.part }, sum, groups);
  else gpu.run(sumSlices(false), { x: partial }, { y: target.part }, sum, groups);
  gpu.free(partial);
}

/** Records y = a b + bias. */
export function recordDense(gpu: Gpu, product: DenseProduct): void {
  const { m, n, k, a, b, y, batch } = product;
  if (m === 0 || n === 0 || batch.some(({ size }) => size === 0)) return;
  const besides = [b.quantized?.scales, b.quantized?.zeros].filter((x) => x !== undefined);
  const isWhole = (x: Lines): boolean => x.handle.parts.length === 1;
  if (y.parts.length === 1 && isWhole(a) && isWhole(b) && besides.every(isWhole)) {
    const piece = { m: { start: 0, end: m }, n: { start: 0, end: n }, k: { start: 0, end: k } };
    if (batch.length <= 2) {
      recordPiece(gpu, product, piece, { a: 0, b: 0, y: 0 }, batch);
      return;
    }
    // More than two batch dimensions that cannot be merged: the outer ones here.
    const [dims, rest] = [batch.slice(-2), batch.slice(0, -2)];
    const each = dims.reduce((total, { size }) => total * size, 1);
    const walk = (axis: number, start: { a: number; b: number; y: number }): void => {
      const dim = rest[axis];
      if (!dim) {
        recordPiece(gpu, product, piece, start, dims);
        return;
      }
      const step = rest.slice(axis + 1).reduce((total, { size }) => total * size, each);
      for (let i = 0; i < dim.size; i++) {
        walk(axis + 1, { a: start.a + i * dim.a, b: start.b + i * dim.b, y: start.y + i * step });
      }
    };
    walk(0, { a: 0, b: 0, y: 0 });
    return;
  }
  // Split tensors: their leading dimension is the batch, or a side of the one product.
  if (batch.some(({ size }) => size > 1)) for (const handle of [a.handle, b.handle, y]) gpu.whole("matmul", handle);
  const rows = cuts(m, [linesOfResult(product), ...(a.layout === "k" ? [a] : [])]);
  const columns = cuts(n, b.layout === "k" ? [b, ...besides] : []);
  const inner = cuts(k, [...(a.layout === "r" ? [a] : []), ...(b.layout === "r" ? [b] : [])]);
  if (inner.length === 0) inner.push({ start: 0, end: 0 });
  for (const pieceM of rows) {
    for (const pieceN of columns) {
      for (const pieceK of inner)
        recordPiece(gpu, product, { m: pieceM, n: pieceN, k: pieceK }, { a: 0, b: 0, y: 0 }, batch);
    }
  }
}

export const oneMatrix: readonly BatchDim[] = [{ size: 1, a: 0, b: 0 }];
/** Records x [..., in] times wᵀ, w [out, in] in any format, plus bias [out]. */
export function recordLinear(gpu: Gpu, x: Input, w: Matrix, n: number, y: WebgpuHandle, bias?: WebgpuHandle): void {
  const [m, k] = [rowsOf(x), w.length];
  const a: Matrix = { handle: x.handle, layout: "k", format: "f32", length: k, lines: m, lineBytes: 4 * k };
  const product: DenseProduct = { m, n, k, a, b: w, y, batch: oneMatrix, half: gpu.arithmetic === "f16" };
  recordDense(gpu, bias ? { ...product, bias } : product);
}

/** Storage type of a weight that is not quantised. */
export const formatOf = ({ dtype }: { readonly dtype: string }): "f32" | "f16" | "bf16" =>
  dtype === "f16" || dtype === "bf16" ? dtype : "f32";

// ---------------------------------------------------------------- kernels
export function matmulKernels(gpu: Gpu): {
  readonly matmul: Kernel<WebgpuHandle>;
  readonly linear: Kernel<WebgpuHandle>;
} {
  const matmul: Kernel<WebgpuHandle> = ([a, b], [result], { transposeA = false, transposeB = false }) => {
    if (!a || !b || !result) return [];
    const y = gpu.alloc(result);
    let m = at(result.shape, result.shape.length - 2);
    const n = lastOf(result);
    const [rowsA, rowsB] = [a, b].map(({ shape }) => at(shape, shape.length - 2)) as [number, number];
    const k = transposeA ? rowsA : lastOf(a);
    const dims = broadcastDims(
      result.shape.slice(0, -2),
      [a, b].map(({ shape }) => shape.slice(0, -2)),
    );
    let batch: readonly BatchDim[] = dims.map(({ size, strides }) => ({
      size,
      a: strides[0] ?? 0,
      b: strides[1] ?? 0,
    }));
    let linesA = rowsA;
    const first = at(batch, 0);
    if (batch.length === 1 && first.size > 1 && !transposeA && first.a === 1 && first.b === 0) {
      // One matrix b for all: the batch is just more rows.
      m *= first.size;
      linesA = m;
      batch = oneMatrix;
    }
    const side = (x: Input, layout: "k" | "r", lines: number): Matrix => {
      const length = lastOf(x);
      return { handle: x.handle, layout, format: "f32", length, lines, lineBytes: 4 * length };
    };
    const left = side(a, transposeA ? "r" : "k", linesA);
    const right = side(b, transposeB ? "k" : "r", rowsB);
    recordDense(gpu, { m, n, k, a: left, b: right, y, batch, half: false });
    return [y];
  };
  const linear: Kernel<WebgpuHandle> = ([x, w, bias], [result]) => {
    if (!x || !w || !result) return [];
    const y = gpu.alloc(result);
    const [out, inner] = [at(w.shape, 0), lastOf(w)];
    const lineBytes = inner * bytesPerElement(w.dtype);
    const matrix: Matrix = { handle: w.handle, layout: "k", format: formatOf(w), length: inner, lines: out, lineBytes };
    recordLinear(gpu, x, matrix, out, y, bias?.handle);
    return [y];
  };
  return {
    matmul: Object.assign(matmul, { unsupported: only("f") }),
    linear: Object.assign(linear, { unsupported: only("fwf") }),
  };
}
