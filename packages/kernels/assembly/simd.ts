// The vocabulary of all kernels: fused multiply-add, loads of every storage type, horizontal sums, and the polynomials of exp, log, tanh, erf.
// `madd` is where the two builds differ: one instruction with relaxed SIMD, two without.

/** Storage types as type parameters: f32, BF16 and F16. */
export type BF16 = u16;
export type F16 = i16;

export const F32_KIND: i32 = 0;
export const BF16_KIND: i32 = 1;
export const F16_KIND: i32 = 2;

/** a * b + c */
@inline
export function madd(a: v128, b: v128, c: v128): v128 {
  if (ASC_FEATURE_RELAXED_SIMD) return f32x4.relaxed_madd(a, b, c);
  return f32x4.add(c, f32x4.mul(a, b));
}

@inline
export function zero(): v128 {
  return f32x4.splat(0);
}

@inline
export function lane0(a: v128): f32 {
  return f32x4.extract_lane(a, 0);
}

/** Interleaves bf16 halves with zero bits: four f32. */
@inline
function widenBf16(x: v128): v128 {
  return v128.shuffle<u16>(i32x4.splat(0), x, 0, 8, 1, 9, 2, 10, 3, 11);
}

/** Four halves, sign-extended to 32 bits, to f32: exact, also for subnormals, infinities and NaN. */
@inline
export function halfToFloat(h: v128): v128 {
  // Sign and magnitude in the places of an f32 whose exponent is 112 too small; the three copies of the sign are masked out.
  const bits = v128.and(i32x4.shl(h, 13), i32x4.splat(0x8fffffff));
  const value = f32x4.mul(bits, f32x4.splat(reinterpret<f32>(0x77800000))); // 2^112
  // Exponent 31 (infinity, NaN) has become 2^16; it has to be 255.
  const special = f32x4.ge(f32x4.abs(value), f32x4.splat(65536));
  return v128.or(value, v128.and(special, i32x4.splat(0x7f800000)));
}

/** Four consecutive elements of type T as f32. */
@inline
export function load4<T>(p: usize): v128 {
  if (isFloat<T>()) return v128.load(p);
  if (isSigned<T>()) return halfToFloat(v128.load_ext<i16>(p));
  return widenBf16(v128.load_zero<u64>(p));
}

/** One element of type T in every lane. */
@inline
export function splat1<T>(p: usize): v128 {
  if (isFloat<T>()) return v128.load_splat<f32>(p);
  if (isSigned<T>()) return halfToFloat(i32x4.splat(<i32>load<i16>(p)));
  return i32x4.splat((<i32>load<u16>(p)) << 16);
}

@inline
export function load1<T>(p: usize): f32 {
  if (isFloat<T>()) return load<f32>(p);
  return lane0(splat1<T>(p));
}

/** The `count` (1..3) elements at p, zero in the other lanes. */
@inline
export function loadTail<T>(p: usize, count: i32): v128 {
  let x = f32x4.replace_lane(zero(), 0, load1<T>(p));
  if (count > 1) x = f32x4.replace_lane(x, 1, load1<T>(p + sizeof<T>()));
  if (count > 2) x = f32x4.replace_lane(x, 2, load1<T>(p + 2 * sizeof<T>()));
  return x;
}

/** Writes the first `count` (1..4) lanes. */
@inline
export function storeTail(p: usize, x: v128, count: i32): void {
  if (count > 3) {
    v128.store(p, x);
    return;
  }
  store<f32>(p, lane0(x));
  if (count > 1) store<f32>(p, f32x4.extract_lane(x, 1), 4);
  if (count > 2) store<f32>(p, f32x4.extract_lane(x, 2), 8);
}

@inline
export function sumLanes(a: v128): f32 {
  const b = f32x4.add(a, v128.shuffle<f32>(a, a, 2, 3, 0, 1));
  return lane0(b) + f32x4.extract_lane(b, 1);
}

/** NaN if any lane is NaN, like Math.max. */
@inline
export function maxLanes(a: v128): f32 {
  const b = f32x4.max(a, v128.shuffle<f32>(a, a, 2, 3, 0, 1));
  return max<f32>(lane0(b), f32x4.extract_lane(b, 1));
}

/** [sum a, sum b, sum c, sum d] */
@inline
export function sumLanes4(a: v128, b: v128, c: v128, d: v128): v128 {
  const ab = f32x4.add(v128.shuffle<f32>(a, b, 0, 4, 1, 5), v128.shuffle<f32>(a, b, 2, 6, 3, 7));
  const cd = f32x4.add(v128.shuffle<f32>(c, d, 0, 4, 1, 5), v128.shuffle<f32>(c, d, 2, 6, 3, 7));
  return f32x4.add(v128.shuffle<f32>(ab, cd, 0, 1, 4, 5), v128.shuffle<f32>(ab, cd, 2, 3, 6, 7));
}

const INFINITY_F: f32 = f32.POSITIVE_INFINITY;

/** Four rows of four become four columns, 32 bytes apart. */
@inline
export function transposeTo(a: v128, b: v128, c: v128, d: v128, to: usize): void {
  const ab = v128.shuffle<f32>(a, b, 0, 4, 1, 5);
  const cd = v128.shuffle<f32>(c, d, 0, 4, 1, 5);
  const AB = v128.shuffle<f32>(a, b, 2, 6, 3, 7);
  const CD = v128.shuffle<f32>(c, d, 2, 6, 3, 7);
  v128.store(to, v128.shuffle<f32>(ab, cd, 0, 1, 4, 5));
  v128.store(to, v128.shuffle<f32>(ab, cd, 2, 3, 6, 7), 32);
  v128.store(to, v128.shuffle<f32>(AB, CD, 0, 1, 4, 5), 64);
  v128.store(to, v128.shuffle<f32>(AB, CD, 2, 3, 6, 7), 96);
}

// The parts of e^x = 2^n e^r with |r| <= ln 2 / 2.
const MAGIC: f32 = 12582912; // 1.5 * 2^23: adding it rounds to the nearest integer and leaves that in the low bits

@inline
function expPolynomial(x: v128, n: v128): v128 {
  // The high part of ln 2 has few bits: n * high is exact also without a fused operation.
  let r = madd(n, f32x4.splat(-0.693359375), x);
  r = madd(n, f32x4.splat(2.12194440e-4), r);
  let p = f32x4.splat(1.9875691500e-4);
  p = madd(p, r, f32x4.splat(1.3981999507e-3));
  p = madd(p, r, f32x4.splat(8.3334519073e-3));
  p = madd(p, r, f32x4.splat(4.1665795894e-2));
  p = madd(p, r, f32x4.splat(1.6666665459e-1));
  p = madd(p, r, f32x4.splat(5.0000001201e-1));
  return f32x4.add(madd(f32x4.mul(r, r), p, r), f32x4.splat(1));
}

/** e^x, about 1 ulp; 0 below -104, infinity above 88.73, NaN stays NaN (pmin and pmax keep their first argument then). */
@inline
export function exp4(x: v128): v128 {
  x = f32x4.pmax(f32x4.pmin(x, f32x4.splat(89)), f32x4.splat(-104));
  const shifted = f32x4.add(f32x4.mul(x, f32x4.splat(1.44269504088896341)), f32x4.splat(MAGIC));
  let p = expPolynomial(x, f32x4.sub(shifted, f32x4.splat(MAGIC)));
  // 2^n in two factors: subnormal results and 2^128 need it.
  const i = i32x4.sub(shifted, f32x4.splat(MAGIC));
  const half = i32x4.shr_s(i, 1);
  const one = i32x4.splat(0x3f800000);
  p = f32x4.mul(p, i32x4.add(i32x4.shl(half, 23), one));
  return f32x4.mul(p, i32x4.add(i32x4.shl(i32x4.sub(i, half), 23), one));
}

/** The same with 2^n in one factor: 0 below -87.7 (no subnormal results), infinity above 88.37. For terms of sums, and 1 + e^x. */
@inline
export function expTerm4(x: v128): v128 {
  x = f32x4.pmax(f32x4.pmin(x, f32x4.splat(88.7)), f32x4.splat(-88));
  const shifted = f32x4.add(f32x4.mul(x, f32x4.splat(1.44269504088896341)), f32x4.splat(MAGIC));
  const p = expPolynomial(x, f32x4.sub(shifted, f32x4.splat(MAGIC)));
  return f32x4.mul(p, i32x4.shl(i32x4.sub(shifted, f32x4.splat(MAGIC - 127)), 23));
}

/** ln x, about 1 ulp; -infinity at 0, NaN below. */
@inline
export function log4(x: v128): v128 {
  const tiny = f32x4.lt(x, f32x4.splat(1.17549435e-38));
  const scaled = v128.bitselect(f32x4.mul(x, f32x4.splat(8388608)), x, tiny);
  const bits = i32x4.sub(scaled, i32x4.splat(0x3f3504f3));
  let e = f32x4.convert_i32x4_s(i32x4.shr_s(bits, 23));
  e = f32x4.sub(e, v128.and(tiny, f32x4.splat(23)));
  const f = f32x4.sub(
    i32x4.add(v128.and(bits, i32x4.splat(0x7fffff)), i32x4.splat(0x3f3504f3)),
    f32x4.splat(1),
  );
  const z = f32x4.mul(f, f);
  let p = f32x4.splat(7.0376836292e-2);
  p = madd(p, f, f32x4.splat(-1.1514610310e-1));
  p = madd(p, f, f32x4.splat(1.1676998740e-1));
  p = madd(p, f, f32x4.splat(-1.2420140846e-1));
  p = madd(p, f, f32x4.splat(1.4249322787e-1));
  p = madd(p, f, f32x4.splat(-1.6668057665e-1));
  p = madd(p, f, f32x4.splat(2.0000714765e-1));
  p = madd(p, f, f32x4.splat(-2.4999993993e-1));
  p = madd(p, f, f32x4.splat(3.3333331174e-1));
  let y = f32x4.mul(f32x4.mul(p, f), z);
  y = madd(e, f32x4.splat(-2.12194440e-4), y);
  y = madd(z, f32x4.splat(-0.5), y);
  y = madd(e, f32x4.splat(0.693359375), f32x4.add(f, y));
  y = v128.bitselect(f32x4.splat(INFINITY_F), y, f32x4.eq(x, f32x4.splat(INFINITY_F)));
  y = v128.bitselect(f32x4.splat(-INFINITY_F), y, f32x4.eq(x, zero()));
  const defined = f32x4.ge(x, zero());
  return v128.bitselect(y, f32x4.splat(f32.NaN), defined);
}

/** tanh x, about 2 ulp. */
@inline
export function tanh4(x: v128): v128 {
  const a = f32x4.abs(x);
  const z = f32x4.mul(x, x);
  let p = f32x4.splat(-5.70498872745e-3);
  p = madd(p, z, f32x4.splat(2.06390887954e-2));
  p = madd(p, z, f32x4.splat(-5.37397155531e-2));
  p = madd(p, z, f32x4.splat(1.33314422036e-1));
  p = madd(p, z, f32x4.splat(-3.33332819422e-1));
  const small = madd(f32x4.mul(p, z), x, x);
  const one = f32x4.splat(1);
  const e = expTerm4(f32x4.add(a, a));
  const large = f32x4.sub(one, f32x4.div(f32x4.splat(2), f32x4.add(e, one)));
  const sign = v128.and(x, i32x4.splat(0x80000000));
  return v128.bitselect(small, v128.or(large, sign), f32x4.lt(a, f32x4.splat(0.625)));
}

/** erf x, about 2 ulp: a polynomial near 0, 1 - exp(polynomial) beyond. */
@inline
export function erf4(x: v128): v128 {
  // Beyond 4 the result is 1 in f32, and the polynomial would turn around.
  const t = f32x4.pmin(f32x4.abs(x), f32x4.splat(4));
  const s = f32x4.mul(x, x);
  let p = f32x4.splat(-5.96761703e-4);
  p = madd(p, s, f32x4.splat(4.99119423e-3));
  p = madd(p, s, f32x4.splat(-2.67681349e-2));
  p = madd(p, s, f32x4.splat(1.12819925e-1));
  p = madd(p, s, f32x4.splat(-3.76125336e-1));
  p = madd(p, s, f32x4.splat(1.28379166e-1));
  const small = madd(p, x, x);
  const q = f32x4.mul(t, t);
  let r = madd(f32x4.splat(-1.7285347e-5), t, f32x4.splat(3.83197126e-4));
  const u = madd(f32x4.splat(-3.88396438e-3), t, f32x4.splat(2.42546219e-2));
  r = madd(r, q, u);
  r = madd(r, t, f32x4.splat(-1.06777877e-1));
  r = madd(r, t, f32x4.splat(-6.34846687e-1));
  r = madd(r, t, f32x4.splat(-1.28717512e-1));
  r = madd(r, t, f32x4.neg(t));
  const large = v128.or(f32x4.sub(f32x4.splat(1), expTerm4(r)), v128.and(x, i32x4.splat(0x80000000)));
  return v128.bitselect(large, small, f32x4.gt(t, f32x4.splat(0.927734375)));
}

/** 1 / (1 + e^-x) */
@inline
export function sigmoid4(x: v128): v128 {
  const one = f32x4.splat(1);
  return f32x4.div(one, f32x4.add(one, expTerm4(f32x4.neg(x))));
}

@inline
export function silu4(x: v128): v128 {
  return f32x4.div(x, f32x4.add(f32x4.splat(1), expTerm4(f32x4.neg(x))));
}

@inline
export function log1(x: f32): f32 {
  return lane0(log4(f32x4.splat(x)));
}
