// Elementwise kernels: arithmetic with broadcasting, functions of one variable, activations with their gradients, conversions, optimisers.
// Contiguous kernels work on units of 16 elements (64 bytes, the grain of the heap) and may fill the padding of the last one.
import {
  BF16,
  BF16_KIND,
  erf4,
  exp4,
  expTerm4,
  F16,
  F16_KIND,
  F32_KIND,
  lane0,
  load4,
  log4,
  madd,
  sigmoid4,
  silu4,
  tanh4,
  zero,
} from "./simd";

const UNIT: usize = 64; // bytes

// ---------------------------------------------------------------- two inputs, broadcast

const ADD: i32 = 0;
const MUL: i32 = 1;
const MAXIMUM: i32 = 2;
const LESS: i32 = 3;
const SUB: i32 = 4;
const DIV: i32 = 5;

@unmanaged
class Binary {
  y: usize;
  total: i32; // elements
  inner: i32; // length of a row
  rank: i32; // outer dimensions
  inputs: i32;
  dims: usize; // rank sizes, then for each input: rank strides in elements
  a: usize;
  stepA: i32; // along the row: 0 or 1
  b: usize;
  stepB: i32;
  c: usize;
  stepC: i32;
}

/** Offset in bytes of a row of an input, four bytes an element. */
function offsetOf(job: Binary, row: i32, input: i32): usize {
  let offset = 0;
  const strides = job.dims + <usize>((input + 1) * job.rank * 4);
  for (let d = job.rank - 1; d >= 0; d--) {
    const size = load<i32>(job.dims + <usize>(d * 4));
    const next = row / size;
    offset += (row - next * size) * load<i32>(strides + <usize>(d * 4));
    row = next;
  }
  return <usize>offset << 2;
}

@inline
function combine<T>(op: i32, x: v128, y: v128): v128 {
  if (isFloat<T>()) {
    if (op == ADD) return f32x4.add(x, y);
    if (op == MUL) return f32x4.mul(x, y);
    if (op == MAXIMUM) return f32x4.max(x, y);
    if (op == LESS) return v128.and(f32x4.lt(x, y), f32x4.splat(1));
    if (op == SUB) return f32x4.sub(x, y);
    return f32x4.div(x, y);
  }
  if (op == ADD) return i32x4.add(x, y);
  if (op == MUL) return i32x4.mul(x, y);
  if (op == MAXIMUM) return i32x4.max_s(x, y);
  if (op == LESS) return v128.and(i32x4.lt_s(x, y), f32x4.splat(1));
  return i32x4.sub(x, y);
}

@inline
function binary<T>(op: i32, job: Binary, from: i32, to: i32): void {
  let at = from * 16;
  const end = min(to * 16, job.total);
  while (at < end) {
    const row = at / job.inner;
    const column = at - row * job.inner;
    const count = min(job.inner - column, end - at);
    let y = job.y + (<usize>at << 2);
    let a = job.a + offsetOf(job, row, 0) + <usize>(column * job.stepA * 4);
    let b = job.b + offsetOf(job, row, 1) + <usize>(column * job.stepB * 4);
    const stepA = job.stepA << 4;
    const stepB = job.stepB << 4;
    let va = v128.load_splat<u32>(a);
    let vb = v128.load_splat<u32>(b);
    const whole = y + (<usize>(count & ~3) << 2);
    while (y < whole) {
      if (stepA) va = v128.load(a);
      if (stepB) vb = v128.load(b);
      v128.store(y, combine<T>(op, va, vb));
      a += stepA;
      b += stepB;
      y += 16;
    }
    const rest = y + (<usize>(count & 3) << 2);
    while (y < rest) {
      const z = combine<T>(op, v128.load_splat<u32>(a), v128.load_splat<u32>(b));
      v128.store_lane<u32>(y, z, 0);
      a += job.stepA << 2;
      b += job.stepB << 2;
      y += 4;
    }
    at += count;
  }
}

export function add(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(ADD, job, from, to);
}
export function mul(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(MUL, job, from, to);
}
export function maximum(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(MAXIMUM, job, from, to);
}
export function less(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(LESS, job, from, to);
}
export function sub(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(SUB, job, from, to);
}
export function div(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<f32>(DIV, job, from, to);
}
export function addInt(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<i32>(ADD, job, from, to);
}
export function mulInt(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<i32>(MUL, job, from, to);
}
export function maximumInt(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<i32>(MAXIMUM, job, from, to);
}
export function lessInt(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<i32>(LESS, job, from, to);
}
export function subInt(job: Binary, from: i32, to: i32, scratch: usize): void {
  binary<i32>(SUB, job, from, to);
}

/** a where c is not 0, else b; any type of four bytes. */
export function where(job: Binary, from: i32, to: i32, scratch: usize): void {
  let at = from * 16;
  const end = min(to * 16, job.total);
  while (at < end) {
    const row = at / job.inner;
    const column = at - row * job.inner;
    const count = min(job.inner - column, end - at);
    let y = job.y + (<usize>at << 2);
    const stepA = job.stepA << 2;
    const stepB = job.stepB << 2;
    const stepC = job.stepC << 2;
    let a = job.a + offsetOf(job, row, 0) + <usize>(column * stepA);
    let b = job.b + offsetOf(job, row, 1) + <usize>(column * stepB);
    let c = job.c + offsetOf(job, row, 2) + <usize>(column * stepC);
    let va = v128.load_splat<u32>(a);
    let vb = v128.load_splat<u32>(b);
    let vc = v128.load_splat<u32>(c);
    const whole = y + (<usize>(count & ~3) << 2);
    while (y < whole) {
      if (stepA) va = v128.load(a);
      if (stepB) vb = v128.load(b);
      if (stepC) vc = v128.load(c);
      v128.store(y, v128.bitselect(va, vb, f32x4.ne(vc, zero())));
      a += stepA << 2;
      b += stepB << 2;
      c += stepC << 2;
      y += 16;
    }
    const rest = y + (<usize>(count & 3) << 2);
    while (y < rest) {
      store<u32>(y, load<f32>(c) != 0 ? load<u32>(a) : load<u32>(b));
      a += stepA;
      b += stepB;
      c += stepC;
      y += 4;
    }
    at += count;
  }
}

// ---------------------------------------------------------------- one input

@unmanaged
class Unary {
  x: usize;
  y: usize;
  p: f32;
  q: f32;
  dy: usize; // gradients: y = dy * f'(x)
}

const RECIP: i32 = 0;
const EXP: i32 = 1;
const LOG: i32 = 2;
const SQRT: i32 = 3;
const TANH: i32 = 4;
const ERF: i32 = 5;
const FLOOR: i32 = 6;
const AFFINE: i32 = 7;
const RELU: i32 = 8;
const SIGMOID: i32 = 9;
const SILU: i32 = 10;
const SOFTPLUS: i32 = 11;
const GELU: i32 = 12;
const GELU_TANH: i32 = 13;
const RELU_GRAD: i32 = 14;
const SILU_GRAD: i32 = 15;
const GELU_GRAD: i32 = 16;
const GELU_TANH_GRAD: i32 = 17;

@inline
function unary(op: i32, job: Unary, from: i32, to: i32): void {
  const at = <usize>from * UNIT;
  let x = job.x + at;
  let y = job.y + at;
  let dy = job.dy + at;
  const end = job.y + <usize>to * UNIT;
  const p = f32x4.splat(job.p);
  const q = f32x4.splat(job.q);
  while (y < end) {
    const v = v128.load(x);
    if (op >= RELU_GRAD) v128.store(y, f32x4.mul(v128.load(dy), evaluate(op, v, p, q)));
    else v128.store(y, evaluate(op, v, p, q));
    x += 16;
    y += 16;
    dy += 16;
  }
}

@inline
function evaluate(op: i32, x: v128, p: v128, q: v128): v128 {
  const one = f32x4.splat(1);
  const half = f32x4.splat(0.5);
  if (op == RECIP) return f32x4.div(one, x);
  if (op == EXP) return exp4(x);
  if (op == LOG) return log4(x);
  if (op == SQRT) return f32x4.sqrt(x);
  if (op == TANH) return tanh4(x);
  if (op == ERF) return erf4(x);
  if (op == FLOOR) return f32x4.floor(x);
  if (op == AFFINE) return f32x4.add(f32x4.mul(x, p), q);
  if (op == RELU) return f32x4.max(x, zero());
  if (op == SIGMOID) return sigmoid4(x);
  if (op == SILU) return silu4(x);
  if (op == SOFTPLUS) {
    // log1p(e) for e = exp(-|x|) in (0, 1]: log(1 + e), with what the addition lost put back.
    const e = exp4(f32x4.neg(f32x4.abs(x)));
    const u = f32x4.add(one, e);
    const lost = f32x4.div(f32x4.sub(e, f32x4.sub(u, one)), u);
    return f32x4.add(f32x4.max(x, zero()), f32x4.add(log4(u), lost));
  }
  if (op == GELU) return f32x4.mul(x, madd(erf4(f32x4.mul(x, f32x4.splat(0.70710678118654752))), half, half));
  if (op == RELU_GRAD) return v128.and(f32x4.gt(x, zero()), one);
  if (op == SILU_GRAD) {
    const s = sigmoid4(x);
    return f32x4.mul(s, madd(x, f32x4.sub(one, s), one));
  }
  if (op == GELU_GRAD) {
    const below = madd(erf4(f32x4.mul(x, f32x4.splat(0.70710678118654752))), half, half);
    const density = f32x4.mul(expTerm4(f32x4.mul(f32x4.mul(x, x), f32x4.splat(-0.5))), f32x4.splat(0.3989422804014327));
    return madd(x, density, below);
  }
  // The tanh approximation: t = tanh(s (x + c x^3))
  const square = f32x4.mul(x, x);
  const s = f32x4.splat(0.7978845608028654);
  const c = f32x4.splat(0.044715);
  const t = tanh4(f32x4.mul(f32x4.mul(x, madd(square, c, one)), s));
  const below = madd(t, half, half);
  if (op == GELU_TANH) return f32x4.mul(x, below);
  const inner = f32x4.mul(madd(square, f32x4.splat(3 * 0.044715), one), s);
  return madd(f32x4.mul(f32x4.mul(x, half), f32x4.sub(one, f32x4.mul(t, t))), inner, below);
}

export function recip(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(RECIP, job, from, to);
}
export function exp(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(EXP, job, from, to);
}
export function log(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(LOG, job, from, to);
}
export function sqrt(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(SQRT, job, from, to);
}
export function tanh(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(TANH, job, from, to);
}
export function erf(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(ERF, job, from, to);
}
export function floor(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(FLOOR, job, from, to);
}
export function affine(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(AFFINE, job, from, to);
}
export function relu(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(RELU, job, from, to);
}
export function sigmoid(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(SIGMOID, job, from, to);
}
export function silu(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(SILU, job, from, to);
}
export function softplus(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(SOFTPLUS, job, from, to);
}
export function gelu(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(GELU, job, from, to);
}
export function geluTanh(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(GELU_TANH, job, from, to);
}
export function reluGrad(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(RELU_GRAD, job, from, to);
}
export function siluGrad(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(SILU_GRAD, job, from, to);
}
export function geluGrad(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(GELU_GRAD, job, from, to);
}
export function geluTanhGrad(job: Unary, from: i32, to: i32, scratch: usize): void {
  unary(GELU_TANH_GRAD, job, from, to);
}

// ---------------------------------------------------------------- SwiGLU over rows [gate | up]

@unmanaged
class Gated {
  x: usize; // [rows, 2 n]
  y: usize; // [rows, n], or the gradient [rows, 2 n]
  n: i32;
  dy: usize; // [rows, n]
}

export function swiglu(job: Gated, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.x + 2 * r * bytes;
    const y = job.y + r * bytes;
    let i: usize = 0;
    for (; i + 16 <= bytes; i += 16) v128.store(y + i, f32x4.mul(silu4(v128.load(x + i)), v128.load(x + bytes + i)));
    for (; i < bytes; i += 4) {
      store<f32>(y + i, lane0(silu4(v128.load_splat<f32>(x + i))) * load<f32>(x + bytes + i));
    }
  }
}

export function swigluGrad(job: Gated, from: i32, to: i32, scratch: usize): void {
  const bytes = <usize>job.n << 2;
  const one = f32x4.splat(1);
  for (let r = <usize>from; r < <usize>to; r++) {
    const x = job.x + 2 * r * bytes;
    const dx = job.y + 2 * r * bytes;
    const dy = job.dy + r * bytes;
    for (let i: usize = 0; i < bytes; i += 16) {
      const rest = bytes - i;
      const whole = rest >= 16;
      if (whole) {
        const g = v128.load(x + i);
        const d = v128.load(dy + i);
        const s = sigmoid4(g);
        const slope = f32x4.mul(s, madd(g, f32x4.sub(one, s), one));
        v128.store(dx + i, f32x4.mul(f32x4.mul(d, v128.load(x + bytes + i)), slope));
        v128.store(dx + bytes + i, f32x4.mul(d, f32x4.mul(g, s)));
      } else {
        for (let j = i; j < bytes; j += 4) {
          const g = v128.load_splat<f32>(x + j);
          const d = load<f32>(dy + j);
          const s = sigmoid4(g);
          const slope = lane0(f32x4.mul(s, madd(g, f32x4.sub(one, s), one)));
          const up = load<f32>(x + bytes + j);
          store<f32>(dx + j, d * up * slope);
          store<f32>(dx + bytes + j, d * lane0(f32x4.mul(g, s)));
        }
      }
    }
  }
}

// ---------------------------------------------------------------- conversions

@unmanaged
class Cast {
  x: usize;
  y: usize;
  n: i32;
  source: i32; // F32_KIND, BF16_KIND, F16_KIND, INT_KIND, BYTE_KIND
  target: i32;
}
const INT_KIND: i32 = 3;
const BYTE_KIND: i32 = 4;

/** Nearest bf16, ties to even; NaN stays NaN. */
@inline
function toBf16(x: f32): u16 {
  const u = reinterpret<u32>(x);
  if (x != x) return <u16>((u >> 16) | 0x40);
  return <u16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/** Nearest f16, ties to even; too large becomes infinity. */
@inline
function toF16(x: f32): u16 {
  const u = reinterpret<u32>(x);
  const sign = (u >> 16) & 0x8000;
  const a = u & 0x7fffffff;
  if (a > 0x7f800000) return <u16>(sign | 0x7e00);
  if (a >= 0x47800000) return <u16>(sign | 0x7c00); // 65536 and above
  // Subnormal halves: adding 0.5 lines the last bit up with 2^-24.
  if (a < 0x38800000) return <u16>(sign | (reinterpret<u32>(reinterpret<f32>(a) + 0.5) - 0x3f000000));
  return <u16>(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
}

export function cast(job: Cast, from: i32, to: i32, scratch: usize): void {
  const end = min(to * 16, job.n);
  const source = job.source;
  const target = job.target;
  for (let i = from * 16; i < end; i++) {
    const at = <usize>i;
    let int: i32 = 0;
    let float: f32 = 0;
    const whole = source >= INT_KIND;
    if (source == F32_KIND) float = load<f32>(job.x + (at << 2));
    else if (source == BF16_KIND) float = reinterpret<f32>((<u32>load<u16>(job.x + (at << 1))) << 16);
    else if (source == F16_KIND) float = lane0(load4<F16>(job.x + (at << 1)));
    else if (source == INT_KIND) int = load<i32>(job.x + (at << 2));
    else int = load<u8>(job.x + at);
    if (target >= INT_KIND) {
      if (!whole) int = <i32>float;
      if (target == INT_KIND) store<i32>(job.y + (at << 2), int);
      else store<u8>(job.y + at, <u8>max(0, min(255, int))); // saturating, like the conversion to i32
    } else {
      if (whole) float = <f32>int;
      if (target == F32_KIND) store<f32>(job.y + (at << 2), float);
      else store<u16>(job.y + (at << 1), target == BF16_KIND ? toBf16(float) : toF16(float));
    }
  }
}

/** Whole vectors of the conversion that inference repeats: bf16 or f16 weights to f32. */
@inline
function widen<T>(job: Cast, from: i32, to: i32): void {
  let x = job.x + <usize>from * 32;
  let y = job.y + <usize>from * 64;
  const end = job.y + <usize>to * 64;
  while (y < end) {
    v128.store(y, load4<T>(x));
    x += 8;
    y += 16;
  }
}
export function widenBf16(job: Cast, from: i32, to: i32, scratch: usize): void {
  widen<BF16>(job, from, to);
}
export function widenF16(job: Cast, from: i32, to: i32, scratch: usize): void {
  widen<F16>(job, from, to);
}

// ---------------------------------------------------------------- optimisers

@unmanaged
class AdamW {
  param: usize;
  grad: usize;
  m: usize;
  v: usize;
  scale: usize; // one float: gradient clipping
  newParam: usize;
  newM: usize;
  newV: usize;
  lr: f32;
  beta1: f32;
  rest1: f32; // 1 - beta1
  beta2: f32;
  rest2: f32;
  eps: f32;
  decay: f32; // 1 - lr * weightDecay
  step: f32; // lr / correction1
  root2: f32; // 1 / correction2
}

export function adamw(job: AdamW, from: i32, to: i32, scratch: usize): void {
  const scale = v128.load_splat<f32>(job.scale);
  const beta1 = f32x4.splat(job.beta1);
  const rest1 = f32x4.splat(job.rest1);
  const beta2 = f32x4.splat(job.beta2);
  const rest2 = f32x4.splat(job.rest2);
  const eps = f32x4.splat(job.eps);
  const decay = f32x4.splat(job.decay);
  const step = f32x4.splat(-job.step);
  const root2 = f32x4.splat(job.root2);
  const end = <usize>to * UNIT;
  for (let i = <usize>from * UNIT; i < end; i += 16) {
    const g = f32x4.mul(v128.load(job.grad + i), scale);
    const m = madd(beta1, v128.load(job.m + i), f32x4.mul(rest1, g));
    const v = madd(beta2, v128.load(job.v + i), f32x4.mul(rest2, f32x4.mul(g, g)));
    const update = f32x4.div(m, f32x4.add(f32x4.sqrt(f32x4.mul(v, root2)), eps));
    v128.store(job.newParam + i, madd(step, update, f32x4.mul(v128.load(job.param + i), decay)));
    v128.store(job.newM + i, m);
    v128.store(job.newV + i, v);
  }
}

@unmanaged
class Sgd {
  param: usize;
  grad: usize;
  momentum: usize;
  scale: usize;
  newParam: usize;
  newMomentum: usize;
  lr: f32;
  mu: f32;
  weightDecay: f32;
  nesterov: i32;
}

export function sgd(job: Sgd, from: i32, to: i32, scratch: usize): void {
  const scale = v128.load_splat<f32>(job.scale);
  const mu = f32x4.splat(job.mu);
  const decay = f32x4.splat(job.weightDecay);
  const step = f32x4.splat(-job.lr);
  const end = <usize>to * UNIT;
  for (let i = <usize>from * UNIT; i < end; i += 16) {
    const p = v128.load(job.param + i);
    const g = madd(decay, p, f32x4.mul(v128.load(job.grad + i), scale));
    const m = madd(mu, v128.load(job.momentum + i), g);
    v128.store(job.newParam + i, madd(step, job.nesterov ? madd(mu, m, g) : m, p));
    v128.store(job.newMomentum + i, m);
  }
}
