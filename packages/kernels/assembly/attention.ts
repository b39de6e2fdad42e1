// Attention and its gradient. Rows (query, head) that share a key/value head are taken eight at a time, one per SIMD lane pair: scores stand as
// [key][row], so softmax needs no sums across lanes. Keys pass in blocks with a running maximum; no [sequence, total] matrix is ever stored.
import { expTerm4, lane0, log1, madd, transposeTo, zero } from "./simd";

@unmanaged
class Attention {
  q: usize; // [batch, sequence, heads, d]
  k: usize; // [batch, total, kvHeads, d]
  v: usize; // [batch, total, kvHeads, dv]
  mask: usize; // [batch, total] or 0
  out: usize; // [batch, sequence, heads, dv]
  lse: usize; // [batch, heads, sequence]
  probabilities: usize; // [batch, heads, sequence, total]
  sequence: i32;
  total: i32;
  heads: i32;
  kvHeads: i32;
  d: i32;
  dv: i32;
  scale: f32;
  causal: i32;
  window: i32; // 0: none
  tiles: i32; // tiles of 8 rows for one key/value head
  dout: usize;
  dq: usize;
  dk: usize;
  dv_: usize;
}

const NEGATIVE: f32 = -f32.POSITIVE_INFINITY;
/** Keys of a block: forward, backward. Rows of a group of the backward pass. */
const KEYS: i32 = 512;
const GRAD_KEYS: i32 = 128;
const GRAD_ROWS: i32 = 32;

@inline
function padded(n: i32): usize {
  return <usize>((n + 7) & ~7);
}

// ---------------------------------------------------------------- register tiles

/** c[rows x 8] (+)= a[rows x k] b[k x 8]: a row-major, b `step` bytes from line to line. Rows 1..6, columns 1..8 are written. */
function rowsTile(
  a: usize,
  lda: usize,
  b: usize,
  step: usize,
  k: i32,
  c: usize,
  ldc: usize,
  rows: i32,
  columns: i32,
  add: bool,
): void {
  const p1 = rows > 1 ? a + lda : a;
  const p2 = rows > 2 ? a + 2 * lda : a;
  const p3 = rows > 3 ? a + 3 * lda : a;
  const p4 = rows > 4 ? a + 4 * lda : a;
  const p5 = rows > 5 ? a + 5 * lda : a;
  let c00 = zero(), c01 = zero(), c10 = zero(), c11 = zero(), c20 = zero(), c21 = zero();
  let c30 = zero(), c31 = zero(), c40 = zero(), c41 = zero(), c50 = zero(), c51 = zero();
  const end = <usize>k << 2;
  for (let i: usize = 0; i < end; i += 4) {
    const b0 = v128.load(b);
    const b1 = v128.load(b, 16);
    let x = v128.load_splat<f32>(a + i);
    c00 = madd(x, b0, c00);
    c01 = madd(x, b1, c01);
    x = v128.load_splat<f32>(p1 + i);
    c10 = madd(x, b0, c10);
    c11 = madd(x, b1, c11);
    x = v128.load_splat<f32>(p2 + i);
    c20 = madd(x, b0, c20);
    c21 = madd(x, b1, c21);
    x = v128.load_splat<f32>(p3 + i);
    c30 = madd(x, b0, c30);
    c31 = madd(x, b1, c31);
    x = v128.load_splat<f32>(p4 + i);
    c40 = madd(x, b0, c40);
    c41 = madd(x, b1, c41);
    x = v128.load_splat<f32>(p5 + i);
    c50 = madd(x, b0, c50);
    c51 = madd(x, b1, c51);
    b += step;
  }
  put(c, c00, c01, columns, add);
  if (rows > 1) put(c + ldc, c10, c11, columns, add);
  if (rows > 2) put(c + 2 * ldc, c20, c21, columns, add);
  if (rows > 3) put(c + 3 * ldc, c30, c31, columns, add);
  if (rows > 4) put(c + 4 * ldc, c40, c41, columns, add);
  if (rows > 5) put(c + 5 * ldc, c50, c51, columns, add);
}

/** The first four columns of `rowsTile` for a packed tile of b: where no more rows of queries are left, half the work. */
function rowsTile4(a: usize, lda: usize, b: usize, k: i32, c: usize, ldc: usize, rows: i32): void {
  const p1 = rows > 1 ? a + lda : a;
  const p2 = rows > 2 ? a + 2 * lda : a;
  const p3 = rows > 3 ? a + 3 * lda : a;
  const p4 = rows > 4 ? a + 4 * lda : a;
  const p5 = rows > 5 ? a + 5 * lda : a;
  let c0 = zero(), c1 = zero(), c2 = zero(), c3 = zero(), c4 = zero(), c5 = zero();
  const end = <usize>k << 2;
  for (let i: usize = 0; i < end; i += 4) {
    const x = v128.load(b);
    c0 = madd(v128.load_splat<f32>(a + i), x, c0);
    c1 = madd(v128.load_splat<f32>(p1 + i), x, c1);
    c2 = madd(v128.load_splat<f32>(p2 + i), x, c2);
    c3 = madd(v128.load_splat<f32>(p3 + i), x, c3);
    c4 = madd(v128.load_splat<f32>(p4 + i), x, c4);
    c5 = madd(v128.load_splat<f32>(p5 + i), x, c5);
    b += 32;
  }
  v128.store(c, c0);
  if (rows > 1) v128.store(c + ldc, c1);
  if (rows > 2) v128.store(c + 2 * ldc, c2);
  if (rows > 3) v128.store(c + 3 * ldc, c3);
  if (rows > 4) v128.store(c + 4 * ldc, c4);
  if (rows > 5) v128.store(c + 5 * ldc, c5);
}

function put(c: usize, x: v128, y: v128, columns: i32, add: bool): void {
  if (columns >= 8) {
    v128.store(c, add ? f32x4.add(v128.load(c), x) : x);
    v128.store(c, add ? f32x4.add(v128.load(c, 16), y) : y, 16);
    return;
  }
  for (let j = 0; j < columns; j++) {
    const value = lane0(x);
    store<f32>(c, add ? load<f32>(c) + value : value);
    c += 4;
    x = v128.shuffle<f32>(x, y, 1, 2, 3, 4);
    y = v128.shuffle<f32>(y, y, 1, 2, 3, 3);
  }
}

/** c[4 x 8] += aᵀ b: a [k][4] of lines `stepA` bytes apart, b [k][8] of lines `stepB` bytes apart. c lies in scratch, whole. */
function lanesTile(a: usize, stepA: usize, b: usize, stepB: usize, k: i32, c: usize, ldc: usize): void {
  let d = c;
  let c00 = v128.load(d), c01 = v128.load(d, 16);
  d += ldc;
  let c10 = v128.load(d), c11 = v128.load(d, 16);
  d += ldc;
  let c20 = v128.load(d), c21 = v128.load(d, 16);
  d += ldc;
  let c30 = v128.load(d), c31 = v128.load(d, 16);
  for (let i = 0; i < k; i++) {
    const b0 = v128.load(b);
    const b1 = v128.load(b, 16);
    let x = v128.load_splat<f32>(a);
    c00 = madd(x, b0, c00);
    c01 = madd(x, b1, c01);
    x = v128.load_splat<f32>(a, 4);
    c10 = madd(x, b0, c10);
    c11 = madd(x, b1, c11);
    x = v128.load_splat<f32>(a, 8);
    c20 = madd(x, b0, c20);
    c21 = madd(x, b1, c21);
    x = v128.load_splat<f32>(a, 12);
    c30 = madd(x, b0, c30);
    c31 = madd(x, b1, c31);
    a += stepA;
    b += stepB;
  }
  v128.store(c, c00);
  v128.store(c, c01, 16);
  c += ldc;
  v128.store(c, c10);
  v128.store(c, c11, 16);
  c += ldc;
  v128.store(c, c20);
  v128.store(c, c21, 16);
  c += ldc;
  v128.store(c, c30);
  v128.store(c, c31, 16);
}

/** [keys][8] scores of a packed tile of rows: c = x rows times tile. */
@inline
function scores(x: usize, ldx: usize, keys: i32, tile: usize, d: i32, c: usize, ldc: usize): void {
  for (let t = 0; t < keys; t += 6) {
    rowsTile(x + <usize>t * ldx, ldx, tile, 32, d, c + <usize>t * ldc, ldc, min(6, keys - t), 8, false);
  }
}

/** The first four columns of `scores`. */
@inline
function fewScores(x: usize, ldx: usize, keys: i32, tile: usize, d: i32, c: usize, ldc: usize): void {
  for (let t = 0; t < keys; t += 6) rowsTile4(x + <usize>t * ldx, ldx, tile, d, c + <usize>t * ldc, ldc, min(6, keys - t));
}

/** c[8][columns] += lanesᵀ x for all columns, c in scratch with lines of `ldc` bytes (a multiple of 32); with `few` only c[4]. */
@inline
function mix(few: bool, lanes: usize, step: usize, x: usize, ldx: usize, keys: i32, c: usize, ldc: usize): void {
  for (let j: usize = 0; j < ldc; j += 32) {
    lanesTile(lanes, step, x + j, ldx, keys, c + j, ldc);
    if (!few) lanesTile(lanes + 16, step, x + j, ldx, keys, c + j + 4 * ldc, ldc);
  }
}

// ---------------------------------------------------------------- rows

/** Index of (batch, query, head) of row r of a key/value head: rows run over queries, then over the heads of the group. */
@inline
function rowIndex(job: Attention, batch: i32, kv: i32, r: i32): i32 {
  const group = job.heads / job.kvHeads;
  const query = r / group;
  return (batch * job.sequence + query) * job.heads + kv * group + (r - query * group);
}

/** Where the log-sum-exp of row r stands. */
@inline
function lseAt(job: Attention, batch: i32, kv: i32, r: i32): usize {
  const group = job.heads / job.kvHeads;
  const query = r / group;
  return job.lse + ((<usize>((batch * job.heads + kv * group + (r - query * group)) * job.sequence + query)) << 2);
}

@inline
function positionOf(job: Attention, r: i32): i32 {
  return job.total - job.sequence + r / (job.heads / job.kvHeads);
}

/** [n][8]: channel by channel, eight rows times `scale`. Writes whole groups of four channels where n is not a multiple of 4. */
function pack8(p0: usize, p1: usize, p2: usize, p3: usize, p4: usize, p5: usize, p6: usize, p7: usize, n: i32, scale: f32, to: usize): void {
  const f = f32x4.splat(scale);
  const bytes = <usize>n << 2;
  for (let i: usize = 0; i < bytes; i += 16) {
    transposeTo(scaled(p0 + i, f), scaled(p1 + i, f), scaled(p2 + i, f), scaled(p3 + i, f), to);
    transposeTo(scaled(p4 + i, f), scaled(p5 + i, f), scaled(p6 + i, f), scaled(p7 + i, f), to + 16);
    to += 128;
  }
}
@inline
function scaled(p: usize, f: v128): v128 {
  return f32x4.mul(v128.load(p), f);
}

/** Packs rows r to r + 7 of x; past the last row it repeats that one: nobody reads those lanes. */
function packTile(job: Attention, x: usize, n: i32, batch: i32, kv: i32, r: i32, rows: i32, scale: f32, to: usize): void {
  const bytes = <usize>n << 2;
  pack8(
    x + <usize>rowIndex(job, batch, kv, r) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 1, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 2, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 3, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 4, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 5, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 6, rows - 1)) * bytes,
    x + <usize>rowIndex(job, batch, kv, min(r + 7, rows - 1)) * bytes,
    n,
    scale,
    to,
  );
}

/** Packs eight lines of scratch, `ld` bytes apart. */
@inline
function packScratch(x: usize, ld: usize, n: i32, scale: f32, to: usize): void {
  const y = x + 4 * ld;
  pack8(x, x + ld, x + 2 * ld, x + 3 * ld, y, y + ld, y + 2 * ld, y + 3 * ld, n, scale, to);
}

/** Positions of the rows of a tile, eight i32 at `to`. */
@inline
function packPositions(job: Attention, r: i32, to: usize): void {
  for (let lane = 0; lane < 8; lane++) store<i32>(to + (<usize>lane << 2), positionOf(job, r + lane));
}

/** First key and end of the keys that some row from `first` to `last` sees. */
@inline
function firstKey(job: Attention, first: i32): i32 {
  return job.window ? max(0, positionOf(job, first) - job.window + 1) : 0;
}
@inline
function endKey(job: Attention, last: i32): i32 {
  return job.causal ? min(job.total, positionOf(job, last) + 1) : job.total;
}

/** -infinity where a row does not see a key. s: [keys][8], lines of `ld` bytes. */
function hide(job: Attention, batch: i32, from: i32, keys: i32, positions: usize, s: usize, ld: usize): void {
  const hidden = f32x4.splat(NEGATIVE);
  const p0 = v128.load(positions), p1 = v128.load(positions, 16);
  // With neither limit set every comparison below is true.
  const window = i32x4.splat(job.window ? job.window : i32.MAX_VALUE);
  const forward = job.causal != 0;
  for (let t = from; t < from + keys; t++) {
    const key = i32x4.splat(t);
    let d0 = i32x4.sub(p0, key), d1 = i32x4.sub(p1, key);
    let see0 = i32x4.lt_s(d0, window), see1 = i32x4.lt_s(d1, window);
    if (forward) {
      see0 = v128.and(see0, i32x4.ge_s(d0, i32x4.splat(0)));
      see1 = v128.and(see1, i32x4.ge_s(d1, i32x4.splat(0)));
    }
    if (job.mask && load<f32>(job.mask + ((<usize>(batch * job.total + t)) << 2)) == 0) {
      see0 = i32x4.splat(0);
      see1 = see0;
    }
    v128.store(s, v128.bitselect(v128.load(s), hidden, see0));
    v128.store(s, v128.bitselect(v128.load(s, 16), hidden, see1), 16);
    s += ld;
  }
}

/** Whether every row from `first` to `last` sees every key of the block. */
@inline
function allSeen(job: Attention, first: i32, last: i32, from: i32, keys: i32): bool {
  if (job.mask) return false;
  if (job.causal && from + keys - 1 > positionOf(job, first)) return false;
  return !job.window || positionOf(job, last) - from < job.window;
}

// ---------------------------------------------------------------- forward

/** A unit is a tile of eight rows of one key/value head. */
export function attention(job: Attention, from: i32, to: i32, scratch: usize): void {
  const d = job.d, dv = job.dv;
  const rows = job.sequence * (job.heads / job.kvHeads);
  const ldk = <usize>(job.kvHeads * d) << 2;
  const ldv = <usize>(job.kvHeads * dv) << 2;
  const ldo = padded(dv) << 2;
  const tile = scratch;
  const s = tile + (padded(d) << 5);
  const o = s + <usize>(KEYS * 32);
  const positions = o + 8 * ldo;
  for (let u = from; u < to; u++) {
    const pair = u / job.tiles;
    const r = (u - pair * job.tiles) * 8;
    const batch = pair / job.kvHeads;
    const kv = pair - batch * job.kvHeads;
    const last = min(r + 7, rows - 1);
    // One query with up to four heads for each key/value head, as when decoding: the upper four lanes stay unused.
    const few = last - r < 4;
    packTile(job, job.q, d, batch, kv, r, rows, job.scale, tile);
    packPositions(job, r, positions);
    memory.fill(o, 0, 8 * ldo);
    let m0 = f32x4.splat(NEGATIVE), m1 = m0;
    let l0 = zero(), l1 = zero();
    const end = endKey(job, last);
    for (let t = firstKey(job, r); t < end; t += KEYS) {
      const keys = min(KEYS, end - t);
      const line = <usize>(batch * job.total + t);
      const lines = job.k + line * ldk + (<usize>(kv * d) << 2);
      if (few) fewScores(lines, ldk, keys, tile, d, s, 32);
      else scores(lines, ldk, keys, tile, d, s, 32);
      if (!allSeen(job, r, last, t, keys)) hide(job, batch, t, keys, positions, s, 32);
      let n0 = m0, n1 = m1;
      const stop = s + (<usize>keys << 5);
      for (let p = s; p < stop; p += 32) n0 = f32x4.pmax(n0, v128.load(p));
      if (!few) for (let p = s; p < stop; p += 32) n1 = f32x4.pmax(n1, v128.load(p, 16));
      // A row that has seen nothing yet: subtract 0, all its terms are e^-infinity = 0.
      const shift0 = v128.andnot(n0, f32x4.eq(n0, f32x4.splat(NEGATIVE)));
      const shift1 = v128.andnot(n1, f32x4.eq(n1, f32x4.splat(NEGATIVE)));
      const keep0 = expTerm4(f32x4.sub(m0, shift0)), keep1 = expTerm4(f32x4.sub(m1, shift1));
      l0 = f32x4.mul(l0, keep0);
      l1 = f32x4.mul(l1, keep1);
      for (let p = s; p < stop; p += 32) {
        const e0 = expTerm4(f32x4.sub(v128.load(p), shift0));
        l0 = f32x4.add(l0, e0);
        v128.store(p, e0);
        if (few) continue;
        const e1 = expTerm4(f32x4.sub(v128.load(p, 16), shift1));
        l1 = f32x4.add(l1, e1);
        v128.store(p, e1, 16);
      }
      rescale(o, ldo, keep0);
      rescale(o + 4 * ldo, ldo, keep1);
      m0 = n0;
      m1 = n1;
      mix(few, s, 32, job.v + line * ldv + (<usize>(kv * dv) << 2), ldv, keys, o, ldo);
    }
    // One over the sum; 0 for rows that see nothing.
    const one = f32x4.splat(1);
    rescale(o, ldo, v128.and(f32x4.div(one, l0), f32x4.ne(l0, zero())));
    rescale(o + 4 * ldo, ldo, v128.and(f32x4.div(one, l1), f32x4.ne(l1, zero())));
    v128.store(positions, m0);
    v128.store(positions, m1, 16);
    v128.store(s, l0);
    v128.store(s, l1, 16);
    for (let lane = 0; lane <= last - r; lane++) {
      const at = <usize>lane << 2;
      const sum = load<f32>(s + at);
      store<f32>(lseAt(job, batch, kv, r + lane), sum != 0 ? load<f32>(positions + at) + log1(sum) : NEGATIVE);
      memory.copy(job.out + ((<usize>rowIndex(job, batch, kv, r + lane) * <usize>dv) << 2), o + <usize>lane * ldo, <usize>dv << 2);
    }
  }
}

/** Four lines of o times one lane each. */
@inline
function rescale(o: usize, ldo: usize, by: v128): void {
  scaleLine(o, ldo, f32x4.extract_lane(by, 0));
  scaleLine(o + ldo, ldo, f32x4.extract_lane(by, 1));
  scaleLine(o + 2 * ldo, ldo, f32x4.extract_lane(by, 2));
  scaleLine(o + 3 * ldo, ldo, f32x4.extract_lane(by, 3));
}
function scaleLine(o: usize, bytes: usize, by: f32): void {
  if (by == 1) return;
  const f = f32x4.splat(by);
  for (let i: usize = 0; i < bytes; i += 16) v128.store(o + i, f32x4.mul(v128.load(o + i), f));
}

/** The probabilities themselves, from the log-sum-exp of the forward pass. Units as in `attention`; the result starts as zeros. */
export function attentionProbabilities(job: Attention, from: i32, to: i32, scratch: usize): void {
  const d = job.d;
  const group = job.heads / job.kvHeads;
  const rows = job.sequence * group;
  const ldk = <usize>(job.kvHeads * d) << 2;
  const tile = scratch;
  const s = tile + (padded(d) << 5);
  const positions = s + <usize>(KEYS * 32);
  for (let u = from; u < to; u++) {
    const pair = u / job.tiles;
    const r = (u - pair * job.tiles) * 8;
    const batch = pair / job.kvHeads;
    const kv = pair - batch * job.kvHeads;
    const last = min(r + 7, rows - 1);
    packTile(job, job.q, d, batch, kv, r, rows, job.scale, tile);
    packPositions(job, r, positions);
    const end = endKey(job, last);
    for (let t = firstKey(job, r); t < end; t += KEYS) {
      const keys = min(KEYS, end - t);
      scores(job.k + <usize>(batch * job.total + t) * ldk + (<usize>(kv * d) << 2), ldk, keys, tile, d, s, 32);
      hide(job, batch, t, keys, positions, s, 32);
      for (let lane = 0; lane <= last - r; lane++) {
        const at = lseAt(job, batch, kv, r + lane);
        const lse = load<f32>(at);
        if (lse == NEGATIVE) continue;
        let p = s + (<usize>lane << 2);
        const line = <usize>((at - job.lse) >> 2) * <usize>job.total + <usize>t;
        const y = job.probabilities + (line << 2);
        for (let i: usize = 0; i < <usize>keys << 2; i += 4) {
          store<f32>(y + i, lane0(expTerm4(f32x4.sub(v128.load_splat<f32>(p), f32x4.splat(lse)))));
          p += 32;
        }
      }
    }
  }
}

// ---------------------------------------------------------------- backward

/**
 * A unit is one key/value head of one batch row: all its gradients are summed by one thread, in one order. For each block of keys and group
 * of rows: p = e^(s - lse), ds = p (dout vᵀ - delta) scale, with delta = sum(dout out) per row; dq += ds k, dk += dsᵀ q, dv += pᵀ dout.
 */
export function attentionGrad(job: Attention, from: i32, to: i32, scratch: usize): void {
  const d = job.d, dv = job.dv;
  const group = job.heads / job.kvHeads;
  const rows = job.sequence * group;
  const ldk = <usize>(job.kvHeads * d) << 2;
  const ldv = <usize>(job.kvHeads * dv) << 2;
  const ldq = padded(d) << 2;
  const ldo = padded(dv) << 2;
  const ld: usize = GRAD_ROWS * 4;
  // [channel][8], [row][d], [row][dv], [key][row] twice, [8][d], and per row: position, lse, delta.
  const packed = scratch;
  const linesQ = packed + 8 * max(ldq, ldo);
  const linesO = linesQ + <usize>GRAD_ROWS * ldq;
  const s = linesO + <usize>GRAD_ROWS * ldo;
  const ds = s + <usize>GRAD_KEYS * ld;
  const dq = ds + <usize>GRAD_KEYS * ld;
  const positions = dq + 8 * ldq;
  const lse = positions + ld;
  const delta = lse + ld;
  const scale = f32x4.splat(job.scale);
  for (let u = from; u < to; u++) {
    const batch = u / job.kvHeads;
    const kv = u - batch * job.kvHeads;
    for (let r = 0; r < rows; r++) {
      memory.fill(job.dq + ((<usize>rowIndex(job, batch, kv, r) * <usize>d) << 2), 0, <usize>d << 2);
    }
    for (let i = 0; i < job.total; i++) {
      const line = <usize>(batch * job.total + i);
      memory.fill(job.dk + line * ldk + (<usize>(kv * d) << 2), 0, <usize>d << 2);
      memory.fill(job.dv_ + line * ldv + (<usize>(kv * dv) << 2), 0, <usize>dv << 2);
    }
    for (let block = 0; block < job.total; block += GRAD_KEYS) {
      for (let r = 0; r < rows; r += GRAD_ROWS) {
        const count = min(GRAD_ROWS, rows - r);
        const last = r + count - 1;
        // Only the keys of the block that some row of the group sees.
        const t = max(block, firstKey(job, r));
        const keys = min(min(block + GRAD_KEYS, job.total), endKey(job, last)) - t;
        if (keys <= 0) continue;
        const line = <usize>(batch * job.total + t);
        const offsetK = line * ldk + (<usize>(kv * d) << 2);
        const offsetV = line * ldv + (<usize>(kv * dv) << 2);
        const used = (count + 7) & ~7;
        packLines(job, batch, kv, r, count, used, linesQ, ldq, linesO, ldo, lse, delta);
        for (let tile = 0; tile < used; tile += 8) {
          const at = <usize>tile << 2;
          packScratch(linesQ + <usize>tile * ldq, ldq, d, job.scale, packed);
          scores(job.k + offsetK, ldk, keys, packed, d, s + at, ld);
          packScratch(linesO + <usize>tile * ldo, ldo, dv, 1, packed);
          scores(job.v + offsetV, ldv, keys, packed, dv, ds + at, ld);
          packPositions(job, r + tile, positions + at);
          if (!allSeen(job, r + tile, min(r + tile + 7, last), t, keys)) {
            hide(job, batch, t, keys, positions + at, s + at, ld);
          }
          const lse0 = v128.load(lse + at), lse1 = v128.load(lse + at, 16);
          const delta0 = v128.load(delta + at), delta1 = v128.load(delta + at, 16);
          let p = s + at, q = ds + at;
          for (let i = 0; i < keys; i++) {
            const p0 = expTerm4(f32x4.sub(v128.load(p), lse0));
            const p1 = expTerm4(f32x4.sub(v128.load(p, 16), lse1));
            v128.store(p, p0);
            v128.store(p, p1, 16);
            v128.store(q, f32x4.mul(f32x4.mul(p0, f32x4.sub(v128.load(q), delta0)), scale));
            v128.store(q, f32x4.mul(f32x4.mul(p1, f32x4.sub(v128.load(q, 16), delta1)), scale), 16);
            p += ld;
            q += ld;
          }
          memory.fill(dq, 0, 8 * ldq);
          mix(false, ds + at, ld, job.k + offsetK, ldk, keys, dq, ldq);
          for (let lane = 0; lane < 8 && tile + lane < count; lane++) {
            const to = job.dq + ((<usize>rowIndex(job, batch, kv, r + tile + lane) * <usize>d) << 2);
            addLine(to, dq + <usize>lane * ldq, <usize>d << 2);
          }
        }
        addOuter(ds, ld, keys, used, linesQ, ldq, d, job.dk + offsetK, ldk);
        addOuter(s, ld, keys, used, linesO, ldo, dv, job.dv_ + offsetV, ldv);
      }
    }
  }
}

/** Rows of q and dout as padded lines, and per row the log-sum-exp (+infinity: sees nothing) and delta. */
function packLines(
  job: Attention,
  batch: i32,
  kv: i32,
  r: i32,
  count: i32,
  used: i32,
  linesQ: usize,
  ldq: usize,
  linesO: usize,
  ldo: usize,
  lse: usize,
  delta: usize,
): void {
  const d = <usize>job.d << 2, dv = <usize>job.dv << 2;
  memory.fill(linesQ, 0, <usize>used * ldq);
  memory.fill(linesO, 0, <usize>used * ldo);
  for (let i: usize = 0; i < <usize>used; i++) {
    let l: f32 = 0, sum: f32 = 0;
    if (<i32>i < count) {
      const row = <usize>rowIndex(job, batch, kv, r + <i32>i);
      const dout = job.dout + row * dv, out = job.out + row * dv;
      memory.copy(linesQ + i * ldq, job.q + row * d, d);
      memory.copy(linesO + i * ldo, dout, dv);
      for (let j: usize = 0; j < dv; j += 4) sum += load<f32>(dout + j) * load<f32>(out + j);
      l = load<f32>(lseAt(job, batch, kv, r + <i32>i));
      if (l == NEGATIVE) l = f32.POSITIVE_INFINITY;
    }
    store<f32>(lse + (i << 2), l);
    store<f32>(delta + (i << 2), sum);
  }
}

/** y[keys x n] += lanes[keys x used] lines[used x n] */
@inline
function addOuter(
  lanes: usize,
  ld: usize,
  keys: i32,
  used: i32,
  lines: usize,
  ldl: usize,
  n: i32,
  y: usize,
  ldy: usize,
): void {
  for (let t = 0; t < keys; t += 6) {
    for (let j = 0; j < n; j += 8) {
      const at = <usize>j << 2;
      const to = y + <usize>t * ldy + at;
      rowsTile(lanes + <usize>t * ld, ld, lines + at, ldl, used, to, ldy, min(6, keys - t), min(8, n - j), true);
    }
  }
}

function addLine(y: usize, x: usize, bytes: usize): void {
  let i: usize = 0;
  for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.add(v128.load(y + i), v128.load(x + i)));
  for (; i < bytes; i += 4) store<f32>(y + i, load<f32>(y + i) + load<f32>(x + i));
}
