// Kernels that take whole rows: softmax and its relatives, norms, cross entropy, rotary positions, routing. Rows stay in the first cache
// between the passes over them.
import { rowLogSumExp, rowTop, selectTop } from "./row-parts";
import { expTerm4, lane0, madd, sumLanes, zero } from "./simd";

@unmanaged
class Softmax {
  x: usize; // [rows, n]; gradients: the forward result
  y: usize;
  n: i32;
  dy: usize;
}

/** y = scale * e^(x - shift) */
@inline
function expRow(x: usize, y: usize, bytes: usize, shift: f32, scale: f32): void {
  const s = f32x4.splat(shift);
  const f = f32x4.splat(scale);
  let i: usize = 0;
  for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.mul(expTerm4(f32x4.sub(v128.load(x + i), s)), f));
  for (; i < bytes; i += 4) store<f32>(y + i, lane0(expTerm4(f32x4.sub(v128.load_splat<f32>(x + i), s))) * scale);
}

/** Sum of x over a row, and of x * y. */
@inline
function rowSum(x: usize, bytes: usize): f32 {
  let sum = zero();
  let i: usize = 0;
  for (; i + 16 <= bytes; i += 16) sum = f32x4.add(sum, v128.load(x + i));
  let total = sumLanes(sum);
  for (; i < bytes; i += 4) total += load<f32>(x + i);
  return total;
}

@inline
function rowDot(x: usize, y: usize, bytes: usize): f32 {
  let a = zero(), b = zero();
  let i: usize = 0;
  for (; i + 32 <= bytes; i += 32) {
    a = madd(v128.load(x + i), v128.load(y + i), a);
    b = madd(v128.load(x + i, 16), v128.load(y + i, 16), b);
  }
  let total = sumLanes(f32x4.add(a, b));
  for (; i < bytes; i += 4) total += load<f32>(x + i) * load<f32>(y + i);
  return total;
}

function softmaxRow(x: usize, y: usize, n: i32): void {
  const bytes = <usize>n << 2;
  if (n == 0) return;
  const top = rowTop(x, n);
  if (top == -f32.POSITIVE_INFINITY) {
    memory.fill(y, 0, bytes);
    return;
  }
  expRow(x, y, bytes, top, 1);
  const scale = f32x4.splat(1 / rowSum(y, bytes));
  let i: usize = 0;
  for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.mul(v128.load(y + i), scale));
  for (; i < bytes; i += 4) store<f32>(y + i, load<f32>(y + i) * lane0(scale));
}

/** Rows of -infinity only become zeros. */
export function softmax(job: Softmax, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) softmaxRow(job.x + r * bytes, job.y + r * bytes, job.n);
}

/** dx = y * (dy - sum(y dy)) */
export function softmaxGrad(job: Softmax, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const y = job.x + r * bytes;
    const dy = job.dy + r * bytes;
    const dx = job.y + r * bytes;
    const s = f32x4.splat(rowDot(y, dy, bytes));
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) {
      v128.store(dx + i, f32x4.mul(v128.load(y + i), f32x4.sub(v128.load(dy + i), s)));
    }
    for (; i < bytes; i += 4) store<f32>(dx + i, load<f32>(y + i) * (load<f32>(dy + i) - lane0(s)));
  }
}

export function logSoftmax(job: Softmax, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.x + r * bytes;
    const y = job.y + r * bytes;
    const lse = f32x4.splat(rowLogSumExp(x, job.n));
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.sub(v128.load(x + i), lse));
    for (; i < bytes; i += 4) store<f32>(y + i, load<f32>(x + i) - lane0(lse));
  }
}

/** dx = dy - e^y * sum(dy) */
export function logSoftmaxGrad(job: Softmax, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const y = job.x + r * bytes;
    const dy = job.dy + r * bytes;
    const dx = job.y + r * bytes;
    const s = f32x4.splat(rowSum(dy, bytes));
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) {
      v128.store(dx + i, f32x4.sub(v128.load(dy + i), f32x4.mul(expTerm4(v128.load(y + i)), s)));
    }
    for (; i < bytes; i += 4) {
      store<f32>(dx + i, load<f32>(dy + i) - lane0(f32x4.mul(expTerm4(v128.load_splat<f32>(y + i)), s)));
    }
  }
}

// ---------------------------------------------------------------- cross entropy

@unmanaged
class CrossEntropy {
  logits: usize; // [rows, n]
  labels: usize; // [rows]
  lse: usize; // [rows]
  loss: usize; // [rows]; gradient: dloss
  dlogits: usize;
  n: i32;
}

export function crossEntropy(job: CrossEntropy, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.logits + r * bytes;
    const lse = rowLogSumExp(x, job.n);
    const label = load<i32>(job.labels + (r << 2));
    store<f32>(job.lse + (r << 2), lse);
    store<f32>(job.loss + (r << 2), <u32>label < <u32>job.n ? lse - load<f32>(x + (<usize>label << 2)) : 0);
  }
}

export function crossEntropyGrad(job: CrossEntropy, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const dx = job.dlogits + r * bytes;
    const label = load<i32>(job.labels + (r << 2));
    const d = load<f32>(job.loss + (r << 2));
    if (<u32>label >= <u32>job.n) {
      memory.fill(dx, 0, bytes);
      continue;
    }
    expRow(job.logits + r * bytes, dx, bytes, load<f32>(job.lse + (r << 2)), d);
    const at = dx + (<usize>label << 2);
    store<f32>(at, load<f32>(at) - d);
  }
}

// ---------------------------------------------------------------- norms

@unmanaged
class Norm {
  x: usize; // [rows, n]
  w: usize; // [n]
  b: usize; // [n]; 0: RMS norm
  y: usize; // result, or dx
  n: i32;
  rows: i32;
  eps: f32;
  dy: usize;
  dw: usize; // [blocks, n]: one partial sum per block of NORM_BLOCK rows
  db: usize; // the same; 0: RMS norm
}
/** Rows whose contributions to dw are summed by one unit. The host knows it. */
const NORM_BLOCK: i32 = 32;

/** Sum of (x - mean)^2 over a row. */
@inline
function rowSquares(x: usize, bytes: usize, mean: f32): f32 {
  const m = f32x4.splat(mean);
  let a = zero(), b = zero();
  let i: usize = 0;
  for (; i + 32 <= bytes; i += 32) {
    const u = f32x4.sub(v128.load(x + i), m);
    const v = f32x4.sub(v128.load(x + i, 16), m);
    a = madd(u, u, a);
    b = madd(v, v, b);
  }
  let total = sumLanes(f32x4.add(a, b));
  for (; i < bytes; i += 4) {
    const u = load<f32>(x + i) - mean;
    total += u * u;
  }
  return total;
}

/** RMS norm (b = 0) and layer norm. */
export function norm(job: Norm, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  const w = job.w, b = job.b;
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.x + r * bytes;
    const y = job.y + r * bytes;
    const mean: f32 = b ? rowSum(x, bytes) / <f32>job.n : 0;
    const scale: f32 = 1 / sqrt<f32>(rowSquares(x, bytes, mean) / <f32>job.n + job.eps);
    const vm = f32x4.splat(mean);
    const vs = f32x4.splat(scale);
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) {
      const unit = f32x4.mul(f32x4.sub(v128.load(x + i), vm), vs);
      const v = f32x4.mul(unit, v128.load(w + i));
      v128.store(y + i, b ? f32x4.add(v, v128.load(b + i)) : v);
    }
    for (; i < bytes; i += 4) {
      const v = (load<f32>(x + i) - mean) * scale * load<f32>(w + i);
      store<f32>(y + i, b ? v + load<f32>(b + i) : v);
    }
  }
}

/** dx, and the sums over each block of rows that dw and db are made of. With u the normalised row and g = dy w:
 *  dx = scale * (g - mean(g) - u mean(g u)), without the second term for RMS norm; dw = sum of dy u, db = sum of dy. */
export function normGrad(job: Norm, from: i32, to: i32, scratch: usize): void {
  const n = job.n;
  const bytes = <usize>n << 2;
  const w = job.w;
  const centred = job.db != 0;
  for (let block = from; block < to; block++) {
    const dw = job.dw + <usize>block * bytes;
    const db = job.db + <usize>block * bytes;
    memory.fill(dw, 0, bytes);
    if (centred) memory.fill(db, 0, bytes);
    const last = min((block + 1) * NORM_BLOCK, job.rows);
    for (let row = block * NORM_BLOCK; row < last; row++) {
      const at = <usize>row * bytes;
      const x = job.x + at, dy = job.dy + at, dx = job.y + at;
      const mean: f32 = centred ? rowSum(x, bytes) / <f32>n : 0;
      const scale: f32 = 1 / sqrt<f32>(rowSquares(x, bytes, mean) / <f32>n + job.eps);
      const vm = f32x4.splat(mean);
      const vs = f32x4.splat(scale);
      let sumG = zero(), sumGU = zero();
      let i: usize = 0;
      for (; i + 16 <= bytes; i += 16) {
        const u = f32x4.mul(f32x4.sub(v128.load(x + i), vm), vs);
        const d = v128.load(dy + i);
        const g = f32x4.mul(d, v128.load(w + i));
        sumG = f32x4.add(sumG, g);
        sumGU = madd(g, u, sumGU);
        v128.store(dw + i, madd(d, u, v128.load(dw + i)));
        if (centred) v128.store(db + i, f32x4.add(v128.load(db + i), d));
      }
      let g1 = sumLanes(sumG), g2 = sumLanes(sumGU);
      for (; i < bytes; i += 4) {
        const u = (load<f32>(x + i) - mean) * scale;
        const d = load<f32>(dy + i);
        const g = d * load<f32>(w + i);
        g1 += g;
        g2 += g * u;
        store<f32>(dw + i, load<f32>(dw + i) + d * u);
        if (centred) store<f32>(db + i, load<f32>(db + i) + d);
      }
      g1 = centred ? g1 / <f32>n : 0;
      g2 = g2 / <f32>n;
      const v1 = f32x4.splat(g1), v2 = f32x4.splat(-g2);
      for (i = 0; i + 16 <= bytes; i += 16) {
        const u = f32x4.mul(f32x4.sub(v128.load(x + i), vm), vs);
        const g = f32x4.mul(v128.load(dy + i), v128.load(w + i));
        v128.store(dx + i, f32x4.mul(madd(u, v2, f32x4.sub(g, v1)), vs));
      }
      for (; i < bytes; i += 4) {
        const u = (load<f32>(x + i) - mean) * scale;
        store<f32>(dx + i, (load<f32>(dy + i) * load<f32>(w + i) - g1 - u * g2) * scale);
      }
    }
  }
}

// ---------------------------------------------------------------- rotary positions

@unmanaged
class Rope {
  x: usize; // [batch, sequence, heads, d]
  y: usize;
  cos: usize; // [positions, half], positions = sequence or batch * sequence
  sin: usize;
  positions: i32;
  heads: i32;
  d: i32;
  half: i32;
  interleaved: i32;
  sign: f32; // -1: inverse
}

/** A unit is one token: all its heads turn by the same angles. */
export function rope(job: Rope, from: i32, to: i32, scratch: usize): void {
  const half = <usize>job.half << 2;
  const d = <usize>job.d << 2;
  const sign = f32x4.splat(job.sign);
  for (let token = from; token < to; token++) {
    const cos = job.cos + <usize>(token % job.positions) * half;
    const sin = job.sin + <usize>(token % job.positions) * half;
    for (let h = 0; h < job.heads; h++) {
      const at = <usize>(token * job.heads + h) * d;
      const x = job.x + at, y = job.y + at;
      let i: usize = 0;
      if (job.interleaved) {
        for (; i < half; i += 4) {
          const c = load<f32>(cos + i), s = load<f32>(sin + i) * job.sign;
          const a = load<f32>(x + 2 * i), b = load<f32>(x + 2 * i, 4);
          store<f32>(y + 2 * i, a * c - b * s);
          store<f32>(y + 2 * i, b * c + a * s, 4);
        }
      } else {
        for (; i + 16 <= half; i += 16) {
          const c = v128.load(cos + i), s = f32x4.mul(v128.load(sin + i), sign);
          const a = v128.load(x + i), b = v128.load(x + half + i);
          v128.store(y + i, f32x4.sub(f32x4.mul(a, c), f32x4.mul(b, s)));
          v128.store(y + half + i, f32x4.add(f32x4.mul(b, c), f32x4.mul(a, s)));
        }
        for (; i < half; i += 4) {
          const c = load<f32>(cos + i), s = load<f32>(sin + i) * job.sign;
          const a = load<f32>(x + i), b = load<f32>(x + half + i);
          store<f32>(y + i, a * c - b * s);
          store<f32>(y + half + i, b * c + a * s);
        }
      }
      const turned = half << 1;
      if (turned < d) memory.copy(y + turned, x + turned, d - turned);
    }
  }
}

// ---------------------------------------------------------------- routing

@unmanaged
class Route {
  logits: usize; // [rows, n]
  weights: usize; // [rows, k]
  ids: usize; // [rows, k]
  probabilities: usize; // [rows, n]
  n: i32;
  k: i32;
  order: i32; // 0: softmax, top-k, renormalise; 1: softmax, top-k; 2: top-k, softmax
}

export function softmaxTopk(job: Route, from: i32, to: i32, scratch: usize): void {
  const n = job.n, k = job.k;
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.logits + r * (<usize>n << 2);
    const p = job.probabilities + r * (<usize>n << 2);
    const ids = job.ids + r * (<usize>k << 2);
    const weights = job.weights + r * (<usize>k << 2);
    softmaxRow(x, p, n);
    selectTop(x, n, k, ids);
    const source = job.order == 2 ? x : p;
    let total: f32 = 0;
    for (let j: usize = 0; j < <usize>k << 2; j += 4) {
      const w = load<f32>(source + (<usize>load<i32>(ids + j) << 2));
      store<f32>(weights + j, w);
      total += w;
    }
    if (job.order == 2) softmaxRow(weights, weights, k);
    else if (job.order == 0) {
      for (let j: usize = 0; j < <usize>k << 2; j += 4) store<f32>(weights + j, load<f32>(weights + j) / total);
    }
  }
}

// ---------------------------------------------------------------- combination of expert outputs

@unmanaged
class Combine {
  out: usize; // [bound, n]
  weights: usize; // [tokens * k]
  slots: usize; // [bound]
  y: usize; // [tokens, n]; gradient: dy
  n: i32;
  k: i32;
  bound: i32;
  tokens: i32;
  block: i32; // tokens per unit
  dout: usize;
  dweights: usize;
}

/** y[slot / k] += weights[slot] out[i], in the order of i. A unit owns a block of tokens and looks through all slots. */
export function combineRows(job: Combine, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  const first = from * job.block;
  const last = min(to * job.block, job.tokens);
  memory.fill(job.y + <usize>first * bytes, 0, <usize>(last - first) * bytes);
  for (let i = 0; i < job.bound; i++) {
    const slot = load<i32>(job.slots + (<usize>i << 2));
    if (slot < first * job.k || slot >= last * job.k) continue;
    const y = job.y + <usize>(slot / job.k) * bytes;
    const out = job.out + <usize>i * bytes;
    const w = v128.load_splat<f32>(job.weights + (<usize>slot << 2));
    let c: usize = 0;
    for (; c + 16 <= bytes; c += 16) v128.store(y + c, madd(w, v128.load(out + c), v128.load(y + c)));
    for (; c < bytes; c += 4) store<f32>(y + c, load<f32>(y + c) + lane0(w) * load<f32>(out + c));
  }
}

/** dout[i] = weights[slot] dy[slot / k], dweights[slot] += out[i] . dy[slot / k]. Units as above; the first also clears rows without a slot. */
export function combineRowsGrad(job: Combine, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  const first = from * job.block * job.k;
  const last = min(to * job.block, job.tokens) * job.k;
  const slots = job.tokens * job.k;
  memory.fill(job.dweights + (<usize>first << 2), 0, <usize>(last - first) << 2);
  for (let i: usize = 0; i < <usize>job.bound; i++) {
    const slot = load<i32>(job.slots + (i << 2));
    const dout = job.dout + i * bytes;
    if (from == 0 && <u32>slot >= <u32>slots) memory.fill(dout, 0, bytes);
    if (slot < first || slot >= last) continue;
    const dy = job.y + <usize>(slot / job.k) * bytes;
    const w = v128.load_splat<f32>(job.weights + (<usize>slot << 2));
    let c: usize = 0;
    for (; c + 16 <= bytes; c += 16) v128.store(dout + c, f32x4.mul(w, v128.load(dy + c)));
    for (; c < bytes; c += 4) store<f32>(dout + c, lane0(w) * load<f32>(dy + c));
    const at = job.dweights + (<usize>slot << 2);
    store<f32>(at, load<f32>(at) + rowDot(job.out + i * bytes, dy, bytes));
  }
}
