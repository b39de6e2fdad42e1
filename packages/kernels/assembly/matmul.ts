// Matrix products. Many rows: a block of B is packed into panels, and a 6 x 8 register tile walks over them and six rows of A. Few rows: dot
// products straight from row-major weights, nothing is packed. The host cuts every product (plain, batched, grouped by expert) into tasks; kernels only run tasks.
import { BF16, BF16_KIND, F16, F16_KIND, F32_KIND, load1, load4, loadTail, madd, silu4, storeTail, sumLanes4, transposeTo, zero } from "./simd";

/** Rows and columns of the register tile. */
const MR: i32 = 6;
const NR: i32 = 8;
/** The sum over k is cut into blocks of this length: panels stay in the first cache, and long sums lose less precision. */
const KC: i32 = 256;
/** Most columns of one task; the host knows it as MAX_COLUMNS. */
const NC: i32 = 128;
/** Scratch of a thread: one packed block of B, one edge tile, then gates and ups of a SwiGLU task. The host knows the total. */
const TILE_OFFSET: usize = <usize>(KC * NC * 4 + (NC / NR) * 64);
const BLOCK_OFFSET: usize = TILE_OFFSET + <usize>(MR * NR * 4);

// ---------------------------------------------------------------- packing of a transposed A

@unmanaged
class PackColumns {
  panels: usize; // of Panel
  lda: i32; // bytes from line to line of A, stored [k, rows]
}
@unmanaged
class Panel {
  columns: usize; // address of the first of six neighbours in the first line
  k: i32;
  to: usize;
}

/** Panels [k][6] of a transposed A. Lanes past its last row hold whatever follows; nobody reads them. */
export function packColumns(job: PackColumns, from: i32, to: i32, scratch: usize): void {
  for (let i = from; i < to; i++) {
    const panel = changetype<Panel>(job.panels + (<usize>i) * offsetof<Panel>());
    const lda = <usize>job.lda;
    let p = panel.columns;
    let out = panel.to;
    const end = out + (<usize>panel.k) * (MR * 4);
    while (out < end) {
      v128.store(out, v128.load(p));
      store<u64>(out, load<u64>(p, 16), 16);
      p += lda;
      out += MR * 4;
    }
  }
}

// ---------------------------------------------------------------- packing of B

/** Panels [k][8] of B stored [n, k] (weights, out-major): n <= 8 rows from `b`. */
export function packPanel<T>(b: usize, ldb: usize, n: i32, k: i32, to: usize): void {
  const p0 = b;
  const p1 = n > 1 ? b + ldb : b;
  const p2 = n > 2 ? b + 2 * ldb : b;
  const p3 = n > 3 ? b + 3 * ldb : b;
  const p4 = n > 4 ? b + 4 * ldb : b;
  const p5 = n > 5 ? b + 5 * ldb : b;
  const p6 = n > 6 ? b + 6 * ldb : b;
  const p7 = n > 7 ? b + 7 * ldb : b;
  const whole = (<usize>(k & ~3)) * sizeof<T>();
  let i: usize = 0;
  for (; i < whole; i += 4 * sizeof<T>()) {
    transposeTo(load4<T>(p0 + i), load4<T>(p1 + i), load4<T>(p2 + i), load4<T>(p3 + i), to);
    transposeTo(load4<T>(p4 + i), load4<T>(p5 + i), load4<T>(p6 + i), load4<T>(p7 + i), to + 16);
    to += 128;
  }
  const bytes = (<usize>k) * sizeof<T>();
  for (; i < bytes; i += sizeof<T>()) {
    store<f32>(to, load1<T>(p0 + i));
    store<f32>(to, load1<T>(p1 + i), 4);
    store<f32>(to, load1<T>(p2 + i), 8);
    store<f32>(to, load1<T>(p3 + i), 12);
    store<f32>(to, load1<T>(p4 + i), 16);
    store<f32>(to, load1<T>(p5 + i), 20);
    store<f32>(to, load1<T>(p6 + i), 24);
    store<f32>(to, load1<T>(p7 + i), 28);
    to += 32;
  }
}

/** Bytes from panel to panel: one cache line more than a panel has, or all panels would fall into the same sets of the cache. */
@inline
export function panelStride(k: i32): usize {
  return (<usize>k) * (NR * 4) + 64;
}

function packBlockRows<T>(b: usize, ldb: usize, n: i32, k: i32, to: usize): void {
  for (let j = 0; j < n; j += NR) {
    packPanel<T>(b + (<usize>j) * ldb, ldb, min(n - j, NR), k, to);
    to += panelStride(k);
  }
}

/** Panels [k][8] of B stored [k, n]. Lanes past n hold whatever follows. Line by line: B is read in long stretches. */
function packBlockColumns<T>(b: usize, ldb: usize, n: i32, k: i32, to: usize): void {
  const stride = panelStride(k);
  const panels = <usize>((n + NR - 1) / NR) * stride;
  for (let i = 0; i < k; i++) {
    let p = b;
    const end = to + panels;
    for (let q = to; q < end; q += stride) {
      v128.store(q, load4<T>(p));
      v128.store(q, load4<T>(p + 4 * sizeof<T>()), 16);
      p += 8 * sizeof<T>();
    }
    b += ldb;
    to += NR * 4;
  }
}

// ---------------------------------------------------------------- the register tile

/**
 * c[rows x 8] (+)= A times a panel of B. Row-major A: p0..p5 are its rows (`step6` 4). Packed A: they are six neighbours of a panel [k][6]
 * (`step6` 24), and one address serves them all. `rows` and `packed` are constants: the compiler drops the branches.
 */
@inline
function tile(
  rows: i32,
  packed: bool,
  p0: usize,
  p1: usize,
  p2: usize,
  p3: usize,
  p4: usize,
  p5: usize,
  b: usize,
  step: usize,
  k: i32,
  c: usize,
  ldc: usize,
  add: bool,
): void {
  let c00 = zero(), c01 = zero(), c10 = zero(), c11 = zero(), c20 = zero(), c21 = zero();
  let c30 = zero(), c31 = zero(), c40 = zero(), c41 = zero(), c50 = zero(), c51 = zero();
  const lane = packed ? <usize>(MR * 4) : 4; // bytes from one k to the next in A
  const end = <usize>k * lane;
  for (let i: usize = 0; i < end; i += lane) {
    const b0 = v128.load(b);
    const b1 = v128.load(b, 16);
    let x = v128.load_splat<f32>(p0 + i);
    c00 = madd(x, b0, c00);
    c01 = madd(x, b1, c01);
    x = packed ? v128.load_splat<f32>(p0 + i, 4) : v128.load_splat<f32>(p1 + i);
    c10 = madd(x, b0, c10);
    c11 = madd(x, b1, c11);
    if (rows > 2) {
      x = packed ? v128.load_splat<f32>(p0 + i, 8) : v128.load_splat<f32>(p2 + i);
      c20 = madd(x, b0, c20);
      c21 = madd(x, b1, c21);
      x = packed ? v128.load_splat<f32>(p0 + i, 12) : v128.load_splat<f32>(p3 + i);
      c30 = madd(x, b0, c30);
      c31 = madd(x, b1, c31);
    }
    if (rows > 4) {
      x = packed ? v128.load_splat<f32>(p0 + i, 16) : v128.load_splat<f32>(p4 + i);
      c40 = madd(x, b0, c40);
      c41 = madd(x, b1, c41);
      x = packed ? v128.load_splat<f32>(p0 + i, 20) : v128.load_splat<f32>(p5 + i);
      c50 = madd(x, b0, c50);
      c51 = madd(x, b1, c51);
    }
    b += step;
  }
  put(c, c00, c01, add);
  put(c + ldc, c10, c11, add);
  if (rows > 2) {
    put(c + 2 * ldc, c20, c21, add);
    put(c + 3 * ldc, c30, c31, add);
  }
  if (rows > 4) {
    put(c + 4 * ldc, c40, c41, add);
    put(c + 5 * ldc, c50, c51, add);
  }
}

@inline
function put(c: usize, x: v128, y: v128, add: bool): void {
  if (add) {
    x = f32x4.add(v128.load(c), x);
    y = f32x4.add(v128.load(c, 16), y);
  }
  v128.store(c, x);
  v128.store(c, y, 16);
}

function packedTile(a: usize, b: usize, step: usize, k: i32, c: usize, ldc: usize, add: bool): void {
  tile(6, true, a, a, a, a, a, a, b, step, k, c, ldc, add);
}
function tile6(
  p0: usize,
  p1: usize,
  p2: usize,
  p3: usize,
  p4: usize,
  p5: usize,
  b: usize,
  step: usize,
  k: i32,
  c: usize,
  ldc: usize,
  add: bool,
): void {
  tile(6, false, p0, p1, p2, p3, p4, p5, b, step, k, c, ldc, add);
}
function tile4(
  p0: usize,
  p1: usize,
  p2: usize,
  p3: usize,
  b: usize,
  step: usize,
  k: i32,
  c: usize,
  ldc: usize,
  add: bool,
): void {
  tile(4, false, p0, p1, p2, p3, p0, p0, b, step, k, c, ldc, add);
}
function tile2(p0: usize, p1: usize, b: usize, step: usize, k: i32, c: usize, ldc: usize, add: bool): void {
  tile(2, false, p0, p1, p0, p0, p0, p0, b, step, k, c, ldc, add);
}

/**
 * c[m x n] (+)= A times one block of B, `k` long from `first` on. Edge tiles are computed whole in `buffer`; rows past the last are its copies.
 * B: panels `panelBytes` apart, lines `step` bytes apart.
 */
export function multiplyBlock(
  job: Product,
  task: Task,
  first: i32,
  k: i32,
  b: usize,
  n: i32,
  panelBytes: usize,
  step: usize,
  c: usize,
  ldc: usize,
  add: bool,
  buffer: usize,
): void {
  const m = task.m;
  const packed = job.packed != 0;
  const at = <usize>first << 2;
  for (let i = 0; i < m; i += MR) {
    const rows = min(m - i, MR);
    let p0: usize, p1: usize = 0, p2: usize = 0, p3: usize = 0, p4: usize = 0, p5: usize = 0;
    if (packed) p0 = task.a + <usize>((i * task.k + first * MR) * 4);
    else {
      p0 = rowOf(job, task, i) + at;
      p1 = rows > 1 ? rowOf(job, task, i + 1) + at : p0;
      p2 = rows > 2 ? rowOf(job, task, i + 2) + at : p0;
      p3 = rows > 3 ? rowOf(job, task, i + 3) + at : p0;
      p4 = rows > 4 ? rowOf(job, task, i + 4) + at : p0;
      p5 = rows > 5 ? rowOf(job, task, i + 5) + at : p0;
    }
    let panel = b;
    for (let j = 0; j < n; j += NR) {
      const columns = min(n - j, NR);
      const direct = columns == NR && (rows == MR || ((rows & 1) == 0 && !packed));
      const whole = c + ((<usize>j) << 2);
      const to = direct ? whole : buffer;
      const ld = direct ? ldc : <usize>(NR * 4);
      const sum = direct && add;
      if (packed) packedTile(p0, panel, step, k, to, ld, sum);
      else if (rows > 4) tile6(p0, p1, p2, p3, p4, p5, panel, step, k, to, ld, sum);
      else if (rows > 2) tile4(p0, p1, p2, p3, panel, step, k, to, ld, sum);
      else tile2(p0, p1, panel, step, k, to, ld, sum);
      if (!direct) copyTile(buffer, whole, ldc, rows, columns, add);
      panel += panelBytes;
    }
    c += (<usize>MR) * ldc;
  }
}

function copyTile(from: usize, c: usize, ldc: usize, rows: i32, columns: i32, add: bool): void {
  for (let r = 0; r < rows; r++) {
    for (let j: usize = 0; j < (<usize>columns) << 2; j += 4) {
      const x = load<f32>(from + j);
      store<f32>(c + j, add ? load<f32>(c + j) + x : x);
    }
    from += NR * 4;
    c += ldc;
  }
}

// ---------------------------------------------------------------- kernels over tasks

@unmanaged
export class Product {
  tasks: usize; // of Task
  lda: i32; // bytes from row to row
  ldb: i32;
  ldc: i32;
  kind: i32; // storage of B: F32_KIND, BF16_KIND, F16_KIND; other numbers in quantized.ts
  columns: i32; // 0: B stored [n, k]; 1: B stored [k, n]
  packed: i32; // 1: A in panels [k][6]
  gathered: usize; // 0, or the address of row 0 where task.a is a list of row ids
  half: i32; // SwiGLU: bytes from a gate row of B to its up row
  part: i32; // dots: columns of a unit, a multiple of 8
  parts: i32; // dots: units of a task
}
@unmanaged
export class Task {
  a: usize; // rows, ids of rows, or panels
  m: i32;
  k: i32;
  b: usize;
  n: i32; // at most NC, of dots any number
  c: usize;
  bias: usize; // 0: none; quantized.ts counts lines with it
}

@inline
export function rowOf(job: Product, task: Task, i: i32): usize {
  const lda = <usize>job.lda;
  return job.gathered ? job.gathered + <usize>load<i32>(task.a + ((<usize>i) << 2)) * lda : task.a + <usize>i * lda;
}

function packBlock(b: usize, ldb: usize, kind: i32, columns: i32, n: i32, k: i32, to: usize): void {
  if (columns) {
    if (kind == BF16_KIND) packBlockColumns<BF16>(b, ldb, n, k, to);
    else if (kind == F16_KIND) packBlockColumns<F16>(b, ldb, n, k, to);
    else packBlockColumns<f32>(b, ldb, n, k, to);
  } else {
    if (kind == BF16_KIND) packBlockRows<BF16>(b, ldb, n, k, to);
    else if (kind == F16_KIND) packBlockRows<F16>(b, ldb, n, k, to);
    else packBlockRows<f32>(b, ldb, n, k, to);
  }
}

@inline
function elementSize(kind: i32): i32 {
  return kind == F32_KIND ? 4 : 2;
}

/** Bytes from element (n, k) to element (n, k + by) of B. */
@inline
function alongK(job: Product, by: i32): usize {
  return <usize>by * <usize>(job.columns ? job.ldb : elementSize(job.kind));
}

/** Products of many rows: c = a b (+ bias). */
export function multiply(job: Product, from: i32, to: i32, scratch: usize): void {
  for (let t = from; t < to; t++) {
    const task = changetype<Task>(job.tasks + (<usize>t) * offsetof<Task>());
    const m = task.m, n = task.n, k = task.k;
    const ldc = <usize>job.ldc;
    if (k == 0 || task.bias) fillRows(task.c, ldc, m, n, task.bias);
    // B stored [k, n] and few rows: packing would cost more than the strided reads of the tile.
    const straight = job.columns && job.kind == F32_KIND && m <= 4;
    for (let i = 0; i < k; i += KC) {
      const length = min(k - i, KC);
      const add = i > 0 || task.bias != 0;
      const b = task.b + alongK(job, i);
      if (straight) multiplyBlock(job, task, i, length, b, n, NR * 4, <usize>job.ldb, task.c, ldc, add, scratch + TILE_OFFSET);
      else {
        packBlock(b, <usize>job.ldb, job.kind, job.columns, n, length, scratch);
        const panel = panelStride(length);
        multiplyBlock(job, task, i, length, scratch, n, panel, NR * 4, task.c, ldc, add, scratch + TILE_OFFSET);
      }
    }
  }
}

function fillRows(c: usize, ldc: usize, m: i32, n: i32, bias: usize): void {
  for (let i = 0; i < m; i++) {
    if (bias) memory.copy(c, bias, (<usize>n) << 2);
    else memory.fill(c, 0, (<usize>n) << 2);
    c += ldc;
  }
}

/** The first half of a SwiGLU expert, many rows: `n` hidden units, the gate row and the up row of each; c = silu(gates) * ups. */
export function multiplySwiglu(job: Product, from: i32, to: i32, scratch: usize): void {
  const block = scratch + BLOCK_OFFSET;
  for (let t = from; t < to; t++) {
    const task = changetype<Task>(job.tasks + (<usize>t) * offsetof<Task>());
    const n = task.n, k = task.k;
    const padded = (n + NR - 1) & -NR;
    const ld = <usize>(padded * 8);
    if (k == 0) memory.fill(block, 0, <usize>task.m * ld);
    for (let i = 0; i < k; i += KC) {
      const length = min(k - i, KC);
      const b = task.b + alongK(job, i);
      const panel = panelStride(length);
      packBlock(b, <usize>job.ldb, job.kind, 0, n, length, scratch);
      packBlock(b + <usize>job.half, <usize>job.ldb, job.kind, 0, n, length, scratch + <usize>(padded / NR) * panel);
      multiplyBlock(job, task, i, length, scratch, 2 * padded, panel, NR * 4, block, ld, i > 0, scratch + TILE_OFFSET);
    }
    gate(block, block + ((<usize>padded) << 2), ld, task.m, n, task.c, <usize>job.ldc);
  }
}

/** y[m x n] = silu(gates) * ups */
function gate(gates: usize, ups: usize, ld: usize, m: i32, n: i32, y: usize, ldy: usize): void {
  for (let r = 0; r < m; r++) {
    for (let j = 0; j < n; j += 4) {
      const at = (<usize>j) << 2;
      storeTail(y + at, f32x4.mul(silu4(v128.load(gates + at)), v128.load(ups + at)), n - j);
    }
    gates += ld;
    ups += ld;
    y += ldy;
  }
}

// ---------------------------------------------------------------- few rows: dot products

/** Block of k for dots: one row of A reads long stretches of B, several rows want their block in the first cache. */
const KD_FEW: i32 = 2048;
const KD: i32 = 512;

/** c0[n] and, with `two`, c1[n] (+)= rows a0, a1 times n rows of B, k long. */
@inline
function dotRows<T>(
  two: bool,
  a0: usize,
  a1: usize,
  b: usize,
  ldb: usize,
  n: i32,
  k: i32,
  c0: usize,
  c1: usize,
  add: bool,
): void {
  const whole = (<usize>(k & ~3)) << 2;
  for (let j = 0; j < n; j += 4) {
    const count = n - j;
    const p0 = b;
    const p1 = count > 1 ? b + ldb : b;
    const p2 = count > 2 ? b + 2 * ldb : b;
    const p3 = count > 3 ? b + 3 * ldb : b;
    let s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    let t0 = zero(), t1 = zero(), t2 = zero(), t3 = zero();
    let i: usize = 0;
    for (; i < whole; i += 16) {
      const x = v128.load(a0 + i);
      const at = isFloat<T>() ? i : i >> 1;
      const y = two ? v128.load(a1 + i) : x;
      let w = load4<T>(p0 + at);
      s0 = madd(x, w, s0);
      if (two) t0 = madd(y, w, t0);
      w = load4<T>(p1 + at);
      s1 = madd(x, w, s1);
      if (two) t1 = madd(y, w, t1);
      w = load4<T>(p2 + at);
      s2 = madd(x, w, s2);
      if (two) t2 = madd(y, w, t2);
      w = load4<T>(p3 + at);
      s3 = madd(x, w, s3);
      if (two) t3 = madd(y, w, t3);
    }
    if (k & 3) {
      const rest = k & 3;
      const at = isFloat<T>() ? i : i >> 1;
      const x = loadTail<f32>(a0 + i, rest);
      const y = two ? loadTail<f32>(a1 + i, rest) : x;
      let w = loadTail<T>(p0 + at, rest);
      s0 = madd(x, w, s0);
      if (two) t0 = madd(y, w, t0);
      w = loadTail<T>(p1 + at, rest);
      s1 = madd(x, w, s1);
      if (two) t1 = madd(y, w, t1);
      w = loadTail<T>(p2 + at, rest);
      s2 = madd(x, w, s2);
      if (two) t2 = madd(y, w, t2);
      w = loadTail<T>(p3 + at, rest);
      s3 = madd(x, w, s3);
      if (two) t3 = madd(y, w, t3);
    }
    finish(c0, sumLanes4(s0, s1, s2, s3), count, add);
    c0 += 16;
    if (two) {
      finish(c1, sumLanes4(t0, t1, t2, t3), count, add);
      c1 += 16;
    }
    b += ldb << 2;
  }
}

/** c[count] (+)= the first lanes of x, four at most. */
@inline
export function finish(c: usize, x: v128, count: i32, add: bool): void {
  putLanes(c, x, count, add);
}

/** Not inlined: it comes once per four lines, and its code is long. */
function putLanes(c: usize, x: v128, count: i32, add: bool): void {
  if (!add) storeTail(c, x, count);
  else if (count > 3) v128.store(c, f32x4.add(v128.load(c), x));
  else storeTail(c, f32x4.add(loadTail<f32>(c, count), x), count);
}

export function dots1<T>(a: usize, b: usize, ldb: usize, n: i32, k: i32, c: usize, add: bool): void {
  dotRows<T>(false, a, a, b, ldb, n, k, c, c, add);
}
export function dots2<T>(
  a0: usize,
  a1: usize,
  b: usize,
  ldb: usize,
  n: i32,
  k: i32,
  c0: usize,
  c1: usize,
  add: bool,
): void {
  dotRows<T>(true, a0, a1, b, ldb, n, k, c0, c1, add);
}

/**
 * c[8] (+)= row a times 8 rows of B, k long. One row alone waits for memory: eight streams of reads keep more of them under way than four,
 * and every sum is the one that dots1 makes. f16 waits for its widening, and the plain build does without: bytes count.
 */
function dots8<T>(a: usize, b: usize, ldb: usize, k: i32, c: usize, add: bool): void {
  const p1 = b + ldb;
  const p2 = p1 + ldb;
  const p3 = p2 + ldb;
  const p4 = p3 + ldb;
  const p5 = p4 + ldb;
  const p6 = p5 + ldb;
  const p7 = p6 + ldb;
  let s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  let s4 = zero(), s5 = zero(), s6 = zero(), s7 = zero();
  const end = (<usize>k) << 2;
  for (let i: usize = 0; i < end; i += 16) {
    const x = v128.load(a + i);
    const at = isFloat<T>() ? i : i >> 1;
    s0 = madd(x, load4<T>(b + at), s0);
    s1 = madd(x, load4<T>(p1 + at), s1);
    s2 = madd(x, load4<T>(p2 + at), s2);
    s3 = madd(x, load4<T>(p3 + at), s3);
    s4 = madd(x, load4<T>(p4 + at), s4);
    s5 = madd(x, load4<T>(p5 + at), s5);
    s6 = madd(x, load4<T>(p6 + at), s6);
    s7 = madd(x, load4<T>(p7 + at), s7);
  }
  finish(c, sumLanes4(s0, s1, s2, s3), 4, add);
  finish(c + 16, sumLanes4(s4, s5, s6, s7), 4, add);
}

/** c[m x n] (+)= rows of A times n rows of B. */
function dotBlock<T>(job: Product, task: Task, b: usize, n: i32, c: usize, ldc: usize, add: bool): void {
  const m = task.m, k = task.k;
  const block = m > 2 ? KD : KD_FEW;
  for (let i = 0; i < k; i += block) {
    const length = min(k - i, block);
    const sum = add || i > 0;
    const at = (<usize>i) << 2;
    const rows = b + <usize>i * sizeof<T>();
    // Few rows of B at a time, so that they stay near while all rows of A pass.
    for (let j = 0; j < n; j += 8) {
      const p = rows + <usize>j * <usize>job.ldb;
      const count = min(n - j, 8);
      let to = c + ((<usize>j) << 2);
      let r = 0;
      for (; r + 1 < m; r += 2) {
        dots2<T>(rowOf(job, task, r) + at, rowOf(job, task, r + 1) + at, p, <usize>job.ldb, count, length, to, to + ldc, sum);
        to += ldc << 1;
      }
      if (r < m) {
        const a = rowOf(job, task, r) + at;
        if (ASC_FEATURE_RELAXED_SIMD && (isFloat<T>() || !isSigned<T>()) && count == 8 && (length & 3) == 0) dots8<T>(a, p, <usize>job.ldb, length, to, sum);
        else dots1<T>(a, p, <usize>job.ldb, count, length, to, sum);
      }
    }
  }
}

function dotAny(job: Product, task: Task, b: usize, n: i32, c: usize, ldc: usize, bias: usize): void {
  if (task.k == 0 || bias) fillRows(c, ldc, task.m, n, bias);
  const add = bias != 0;
  if (job.kind == BF16_KIND) dotBlock<BF16>(job, task, b, n, c, ldc, add);
  else if (job.kind == F16_KIND) dotBlock<F16>(job, task, b, n, c, ldc, add);
  else dotBlock<f32>(job, task, b, n, c, ldc, add);
}

/** Products of few rows with B stored [n, k]: c = a b (+ bias). A unit is a part of a task's columns. */
export function dots(job: Product, from: i32, to: i32, scratch: usize): void {
  for (let unit = from; unit < to; unit++) {
    const task = taskOf(job, unit);
    const j = firstOf(job, unit);
    const at = (<usize>j) << 2;
    const bias = task.bias ? task.bias + at : 0;
    dotAny(job, task, task.b + <usize>j * <usize>job.ldb, min(task.n - j, job.part), task.c + at, <usize>job.ldc, bias);
  }
}

@inline
function taskOf(job: Product, unit: i32): Task {
  return changetype<Task>(job.tasks + <usize>(unit / job.parts) * offsetof<Task>());
}

/** First column of a unit of dots. */
@inline
function firstOf(job: Product, unit: i32): i32 {
  return (unit % job.parts) * job.part;
}

/** The first half of a SwiGLU expert for few rows: c = silu(gates) * ups, row-major. */
export function dotsSwiglu(job: Product, from: i32, to: i32, scratch: usize): void {
  for (let unit = from; unit < to; unit++) {
    const task = taskOf(job, unit);
    const j = firstOf(job, unit);
    const n = min(task.n - j, job.part);
    const b = task.b + <usize>j * <usize>job.ldb;
    const ld = <usize>((n + 3) & ~3) << 2;
    const ups = scratch + <usize>task.m * ld;
    dotAny(job, task, b, n, scratch, ld, 0);
    dotAny(job, task, b + <usize>job.half, n, ups, ld, 0);
    gate(scratch, ups, ld, task.m, n, task.c + ((<usize>j) << 2), <usize>job.ldc);
  }
}
