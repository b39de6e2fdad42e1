// Kernels that only move data: strided copies, transposition, rows by id, elements of the last axis by id.
import { zero } from "./simd";

@unmanaged
class Runs {
  x: usize;
  y: usize;
  rank: i32; // outer dimensions
  dims: usize; // rank sizes, rank strides of x, rank strides of y; strides in bytes
  bytes: i32; // of one run
}

@inline
function offsetOf(dims: usize, rank: i32, row: i32, input: i32): usize {
  let offset: usize = 0;
  const strides = dims + <usize>((input + 1) * rank * 4);
  for (let d = rank - 1; d >= 0; d--) {
    const size = load<i32>(dims + <usize>(d * 4));
    const next = row / size;
    offset += <usize>(row - next * size) * load<u32>(strides + <usize>(d * 4));
    row = next;
  }
  return offset;
}

/** A call of memory.copy costs more than a few words. */
@inline
function copyBytes(y: usize, x: usize, bytes: i32): void {
  if (bytes > 64) {
    memory.copy(y, x, bytes);
    return;
  }
  let i: usize = 0;
  const n = <usize>bytes;
  for (; i + 16 <= n; i += 16) v128.store(y + i, v128.load(x + i));
  for (; i + 4 <= n; i += 4) store<u32>(y + i, load<u32>(x + i));
  for (; i < n; i++) store<u8>(y + i, load<u8>(x + i));
}

/** Contiguous runs from one strided place to another: slice, concat, transpositions that keep the last axis. */
export function copyRuns(job: Runs, from: i32, to: i32, scratch: usize): void {
  for (let r = from; r < to; r++) {
    const x = job.x + offsetOf(job.dims, job.rank, r, 0);
    const y = job.y + offsetOf(job.dims, job.rank, r, 1);
    copyBytes(y, x, job.bytes);
  }
}

@unmanaged
class Gather {
  x: usize;
  y: usize;
  rank: i32;
  dims: usize; // as in Runs
  n: i32; // elements of a row of y
  step: i32; // bytes between them in x
  size: i32; // bytes of an element
}

/** Rows of y whose elements stand apart in x: any transposition. */
export function gatherStrided(job: Gather, from: i32, to: i32, scratch: usize): void {
  const step = <usize>job.step;
  for (let r = from; r < to; r++) {
    let x = job.x + offsetOf(job.dims, job.rank, r, 0);
    let y = job.y + offsetOf(job.dims, job.rank, r, 1);
    const end = y + <usize>(job.n * job.size);
    if (job.size == 4) {
      for (; y < end; y += 4, x += step) store<u32>(y, load<u32>(x));
    } else if (job.size == 2) {
      for (; y < end; y += 2, x += step) store<u16>(y, load<u16>(x));
    } else {
      for (; y < end; y += 1, x += step) store<u8>(y, load<u8>(x));
    }
  }
}

@unmanaged
class Flip {
  x: usize; // [batch, rows, columns]
  y: usize; // [batch, columns, rows]
  rows: i32;
  columns: i32;
  bands: i32; // bands of 16 columns in one matrix
}

/** Exchanges the last two axes, four bytes an element. A unit is a band of 16 columns: one cache line of x, 16 lines of y. */
export function flip(job: Flip, from: i32, to: i32, scratch: usize): void {
  const rows = job.rows, columns = job.columns;
  const ldx = <usize>columns << 2;
  const ldy = <usize>rows << 2;
  for (let u = from; u < to; u++) {
    const batch = u / job.bands;
    const first = (u - batch * job.bands) * 16;
    const last = min(first + 16, columns);
    const x = job.x + <usize>batch * <usize>rows * ldx;
    const y = job.y + <usize>batch * <usize>rows * ldx;
    let r = 0;
    for (; r + 4 <= rows; r += 4) {
      let p = x + <usize>r * ldx + (<usize>first << 2);
      let q = y + <usize>first * ldy + (<usize>r << 2);
      let c = first;
      for (; c + 4 <= last; c += 4) {
        const a0 = v128.load(p);
        const a1 = v128.load(p + ldx);
        const a2 = v128.load(p + 2 * ldx);
        const a3 = v128.load(p + 3 * ldx);
        const l0 = v128.shuffle<f32>(a0, a1, 0, 4, 1, 5);
        const l1 = v128.shuffle<f32>(a2, a3, 0, 4, 1, 5);
        const h0 = v128.shuffle<f32>(a0, a1, 2, 6, 3, 7);
        const h1 = v128.shuffle<f32>(a2, a3, 2, 6, 3, 7);
        v128.store(q, v128.shuffle<f32>(l0, l1, 0, 1, 4, 5));
        v128.store(q + ldy, v128.shuffle<f32>(l0, l1, 2, 3, 6, 7));
        v128.store(q + 2 * ldy, v128.shuffle<f32>(h0, h1, 0, 1, 4, 5));
        v128.store(q + 3 * ldy, v128.shuffle<f32>(h0, h1, 2, 3, 6, 7));
        p += 16;
        q += 4 * ldy;
      }
      for (; c < last; c++) {
        store<u32>(q, load<u32>(p));
        store<u32>(q, load<u32>(p + ldx), 4);
        store<u32>(q, load<u32>(p + 2 * ldx), 8);
        store<u32>(q, load<u32>(p + 3 * ldx), 12);
        p += 4;
        q += ldy;
      }
    }
    for (; r < rows; r++) {
      for (let c = first; c < last; c++) {
        const at = x + <usize>r * ldx + (<usize>c << 2);
        store<u32>(y + <usize>c * ldy + (<usize>r << 2), load<u32>(at));
      }
    }
  }
}

// ---------------------------------------------------------------- rows by id

@unmanaged
class Rows {
  x: usize;
  y: usize;
  ids: usize;
  count: i32; // rows of x (takeRows), rows of y (addRows)
  bytes: i32; // of a row
  m: i32; // ids (addRows)
  block: i32; // rows of y per unit (addRows)
}

/** y[i] = x[ids[i]]; zero where the id is outside. */
export function takeRows(job: Rows, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.bytes;
  for (let i = from; i < to; i++) {
    const id = load<i32>(job.ids + (<usize>i << 2));
    const y = job.y + <usize>i * bytes;
    if (<u32>id < <u32>job.count) copyBytes(y, job.x + <usize>id * bytes, job.bytes);
    else memory.fill(y, 0, bytes);
  }
}

/** y[ids[i]] += x[i] from zero, in the order of x. A unit owns a block of rows of y and looks through all ids. */
export function addRows(job: Rows, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.bytes;
  const first = from * job.block;
  const rows = min(to * job.block, job.count) - first;
  memory.fill(job.y + <usize>first * bytes, 0, <usize>rows * bytes);
  for (let i = 0; i < job.m; i++) {
    const id = load<i32>(job.ids + (<usize>i << 2)) - first;
    if (<u32>id >= <u32>rows) continue;
    addTo(job.y + <usize>(first + id) * bytes, job.x + <usize>i * bytes, bytes);
  }
}

@inline
function addTo(y: usize, x: usize, bytes: usize): void {
  let i: usize = 0;
  for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.add(v128.load(y + i), v128.load(x + i)));
  for (; i < bytes; i += 4) store<f32>(y + i, load<f32>(y + i) + load<f32>(x + i));
}

@unmanaged
class Last {
  x: usize;
  y: usize;
  ids: usize;
  n: i32; // elements of a row of x (gather) or of y (scatter)
  k: i32; // ids of a row
}

/** y[r, j] = x[r, ids[r, j]]; 0 where the id is outside. Any type of four bytes. */
export function gatherLast(job: Last, from: i32, to: i32, scratch: usize): void {
  const k = job.k;
  for (let r = from; r < to; r++) {
    const x = job.x + ((<usize>r * <usize>job.n) << 2);
    const at = (<usize>r * <usize>k) << 2;
    for (let j: usize = 0; j < <usize>k << 2; j += 4) {
      const id = load<i32>(job.ids + at + j);
      store<u32>(job.y + at + j, <u32>id < <u32>job.n ? load<u32>(x + (<usize>id << 2)) : 0);
    }
  }
}

/** y[r, ids[r, j]] += x[r, j] from zero; ids outside are dropped. */
export function scatterLast(job: Last, from: i32, to: i32, scratch: usize): void {
  const k = job.k;
  for (let r = from; r < to; r++) {
    const y = job.y + ((<usize>r * <usize>job.n) << 2);
    memory.fill(y, 0, <usize>job.n << 2);
    const at = (<usize>r * <usize>k) << 2;
    for (let j: usize = 0; j < <usize>k << 2; j += 4) {
      const id = load<i32>(job.ids + at + j);
      if (<u32>id >= <u32>job.n) continue;
      const to = y + (<usize>id << 2);
      store<f32>(to, load<f32>(to) + load<f32>(job.x + at + j));
    }
  }
}
