// Parts of kernels over one row that several files share; none of them is a kernel itself.
import { expTerm4, lane0, log1, maxLanes, sumLanes, zero } from "./simd";

/** Maximum of n >= 1 elements; NaN if there is one. */
@inline
export function rowMax(x: usize, n: i32): f32 {
  let best = v128.load_splat<f32>(x);
  const end = x + (<usize>n << 2);
  for (; x + 16 <= end; x += 16) best = f32x4.max(best, v128.load(x));
  let m = maxLanes(best);
  for (; x < end; x += 4) m = max<f32>(m, load<f32>(x));
  return m;
}

/** The same without care for NaN, in a third of the time: for softmax, whose sum brings a NaN out anyway. */
@inline
export function rowTop(x: usize, n: i32): f32 {
  let best = v128.load_splat<f32>(x), other = best;
  const end = x + (<usize>n << 2);
  for (; x + 32 <= end; x += 32) {
    best = f32x4.pmax(best, v128.load(x));
    other = f32x4.pmax(other, v128.load(x, 16));
  }
  let m = maxLanes(f32x4.max(best, other));
  for (; x < end; x += 4) m = max<f32>(m, load<f32>(x));
  return m;
}

/** Sum of e^(x - shift). */
@inline
export function rowExpSum(x: usize, n: i32, shift: f32): f32 {
  const s = f32x4.splat(shift);
  let sum = zero();
  const end = x + (<usize>n << 2);
  for (; x + 16 <= end; x += 16) sum = f32x4.add(sum, expTerm4(f32x4.sub(v128.load(x), s)));
  let total = sumLanes(sum);
  for (; x < end; x += 4) total += lane0(expTerm4(f32x4.sub(v128.load_splat<f32>(x), s)));
  return total;
}

/** log of the sum of e^x; -infinity for a row of -infinity or without elements. */
@inline
export function rowLogSumExp(x: usize, n: i32): f32 {
  if (n == 0) return -f32.POSITIVE_INFINITY;
  const m = rowTop(x, n);
  if (m == -f32.POSITIVE_INFINITY || m == f32.POSITIVE_INFINITY) return m;
  return m + log1(rowExpSum(x, n, m));
}

/** A key whose unsigned order is the order of the floats; NaN last in either direction; -0 equals 0. */
@inline
export function floatKey(x: f32, descending: bool): u32 {
  if (x != x) return 0xffffffff;
  const u = reinterpret<u32>(x + 0);
  const key = u & 0x80000000 ? ~u : u | 0x80000000;
  return descending ? ~key : key;
}

/** Writes the ids of the k largest, descending, lower id first among equals: k passes, each for the next key after the last one. */
@inline
export function selectTop(x: usize, n: i32, k: i32, y: usize): void {
  let lastKey: u32 = 0;
  let lastId = -1;
  for (let j = 0; j < k; j++) {
    let bestKey: u32 = 0xffffffff;
    let bestId = -1;
    for (let i = 0; i < n; i++) {
      const key = floatKey(load<f32>(x + (<usize>i << 2)), true);
      const later = key > lastKey || (key == lastKey && i > lastId);
      if (later && (key < bestKey || bestId < 0)) {
        bestKey = key;
        bestId = i;
      }
    }
    store<i32>(y + (<usize>j << 2), bestId);
    lastKey = bestKey;
    lastId = bestId;
  }
}
