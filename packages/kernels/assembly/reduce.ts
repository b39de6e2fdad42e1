// Sums, maxima and running sums. Long sums are cut into fixed blocks whose sums are added in a second pass: exact enough, and the same
// whatever the number of threads.
import { rowLogSumExp, rowMax } from "./row-parts";
import { sumLanes, zero } from "./simd";

@unmanaged
class RowSums {
  x: usize; // [rows, n]
  y: usize; // [rows]
  n: i32;
  square: i32; // 1: sums of squares
}

/** Sum of each row. Blocks of 1024 in f32 on 16 lanes, their sums in f64. */
export function rowSums(job: RowSums, from: i32, to: i32, scratch: usize): void {
  const n = job.n;
  for (let r = from; r < to; r++) {
    let x = job.x + ((<usize>r * <usize>n) << 2);
    let total: f64 = 0;
    for (let i = 0; i < n; i += 1024) {
      const count = min(n - i, 1024);
      total += job.square ? blockSum(true, x, count) : blockSum(false, x, count);
      x += 4096;
    }
    store<f32>(job.y + (<usize>r << 2), <f32>total);
  }
}

@inline
function squared(square: bool, x: v128): v128 {
  return square ? f32x4.mul(x, x) : x;
}

@inline
function blockSum(square: bool, x: usize, count: i32): f64 {
  let a = zero(), b = zero(), c = zero(), d = zero();
  const end = x + (<usize>count << 2);
  for (; x + 64 <= end; x += 64) {
    a = f32x4.add(a, squared(square, v128.load(x)));
    b = f32x4.add(b, squared(square, v128.load(x, 16)));
    c = f32x4.add(c, squared(square, v128.load(x, 32)));
    d = f32x4.add(d, squared(square, v128.load(x, 48)));
  }
  let rest: f64 = 0;
  for (; x < end; x += 4) {
    const e = load<f32>(x);
    rest += square ? <f64>e * <f64>e : <f64>e;
  }
  return <f64>sumLanes(f32x4.add(f32x4.add(a, b), f32x4.add(c, d))) + rest;
}

@unmanaged
class ColumnSums {
  x: usize; // [outer, rows, n]
  y: usize; // [outer, blocks, n]
  rows: i32;
  n: i32;
  block: i32; // rows of a block
  blocks: i32;
  bands: i32; // bands of 1024 columns
}

/** Sums over blocks of rows, for each column. A unit is (outer, block, band of columns). */
export function columnSums(job: ColumnSums, from: i32, to: i32, scratch: usize): void {
  const ld = <usize>job.n << 2;
  for (let u = from; u < to; u++) {
    const ob = u / job.bands;
    const band = u - ob * job.bands;
    const outer = ob / job.blocks;
    const block = ob - outer * job.blocks;
    const first = block * job.block;
    const rows = min(job.rows - first, job.block);
    const x = job.x + (<usize>outer * <usize>job.rows + <usize>first) * ld + (<usize>band << 12);
    const y = job.y + <usize>ob * ld + (<usize>band << 12);
    const bytes = <usize>min(job.n - band * 1024, 1024) << 2;
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) {
      let p = x + i;
      let sum = zero();
      for (let r = 0; r < rows; r++) {
        sum = f32x4.add(sum, v128.load(p));
        p += ld;
      }
      v128.store(y + i, sum);
    }
    for (; i < bytes; i += 4) {
      let p = x + i;
      let sum: f32 = 0;
      for (let r = 0; r < rows; r++) {
        sum += load<f32>(p);
        p += ld;
      }
      store<f32>(y + i, sum);
    }
  }
}

@unmanaged
class PerRow {
  x: usize; // [rows, n]
  y: usize; // [rows]
  n: i32;
}

export function maxLast(job: PerRow, from: i32, to: i32, scratch: usize): void {
  for (let r = <usize>from; r < <usize>to; r++) {
    store<f32>(job.y + (r << 2), rowMax(job.x + ((r * <usize>job.n) << 2), job.n));
  }
}

export function logSumExp(job: PerRow, from: i32, to: i32, scratch: usize): void {
  for (let r = <usize>from; r < <usize>to; r++) {
    store<f32>(job.y + (r << 2), rowLogSumExp(job.x + ((r * <usize>job.n) << 2), job.n));
  }
}

@unmanaged
class Running {
  x: usize; // [outer, n, inner]
  y: usize;
  n: i32;
  inner: i32;
  exclusive: i32;
  reverse: i32;
  whole: i32; // i32 elements
}

/** Running sums along the middle axis; floats are added in f64. A unit is one line. */
export function cumsum(job: Running, from: i32, to: i32, scratch: usize): void {
  const n = job.n;
  const step = <usize>job.inner << 2;
  for (let u = from; u < to; u++) {
    const outer = u / job.inner;
    const start = (<usize>outer * <usize>(n * job.inner) + <usize>(u - outer * job.inner)) << 2;
    let float: f64 = 0;
    let int: i32 = 0;
    for (let i = 0; i < n; i++) {
      const at = start + <usize>(job.reverse ? n - 1 - i : i) * step;
      if (job.whole) {
        const x = load<i32>(job.x + at);
        store<i32>(job.y + at, job.exclusive ? int : int + x);
        int += x;
      } else {
        const x = <f64>load<f32>(job.x + at);
        store<f32>(job.y + at, <f32>(job.exclusive ? float : float + x));
        float += x;
      }
    }
  }
}
