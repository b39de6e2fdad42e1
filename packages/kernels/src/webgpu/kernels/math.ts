// WGSL text that several kernels include: functions of one f32 with a known accuracy on every driver, and the 16-bit formats by integer
// arithmetic. WGSL itself promises little (exp: 3 + 2|x| ulp, log: 2^-21 near 1, tanh: may overflow, no erf, NaN and infinities optional).

/**
 * `exp_of`: e^x to about 4 ulp; 0 below -104, infinity above 88.73, NaN stays NaN.
 * `exp_term`: the same without the ends: x from -87 to 88; below, 0. For terms of sums and 1 + e^x.
 */
export const expText = `
fn exp_reduced(x: f32, n: f32) -> f32 {
  // The high part of ln 2 has few bits: n * high is exact.
  return exp((x - n * 0.693359375) + n * 2.12194440e-4);
}
fn exp_term(x: f32) -> f32 {
  let a = clamp(x, -87.0, 88.0);
  let n = floor(a * 1.44269504 + 0.5);
  let y = exp_reduced(a, n) * float_of(u32(i32(n) + 127) << 23u);
  return select(y, 0.0, x < -87.0);
}
fn exp_of(x: f32) -> f32 {
  let a = clamp(x, -104.0, 89.0);
  let n = floor(a * 1.44269504 + 0.5);
  // 2^n in two factors: 2^128 and subnormal results need it.
  let whole = i32(n);
  let half = whole >> 1u;
  var y = exp_reduced(a, n) * float_of(u32(half + 127) << 23u) * float_of(u32(whole - half + 127) << 23u);
  y = select(y, infinity(), x > 88.7228394);
  y = select(y, 0.0, x < -103.972084);
  return select(y, x, is_nan(x));
}
`;

/** `log_of`: ln x to about 1 ulp; -infinity at 0, NaN below. */
export const logText = `
fn log_of(x: f32) -> f32 {
  let given = bitcast<u32>(x);
  // Subnormal numbers are their bits times 2^-149.
  let tiny = given < 0x00800000u;
  let bits = select(given, bitcast<u32>(f32(given & 0x7fffffu)), tiny) - 0x3f3504f3u;
  let e = f32(bitcast<i32>(bits) >> 23u) - select(0.0, 149.0, tiny);
  let f = float_of((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0;
  let z = f * f;
  var q = 7.0376836292e-2;
  q = q * f - 1.1514610310e-1;
  q = q * f + 1.1676998740e-1;
  q = q * f - 1.2420140846e-1;
  q = q * f + 1.4249322787e-1;
  q = q * f - 1.6668057665e-1;
  q = q * f + 2.0000714765e-1;
  q = q * f - 2.4999993993e-1;
  q = q * f + 3.3333331174e-1;
  var y = (f - 0.5 * z) + (q * f * z - 2.12194440e-4 * e) + 0.693359375 * e;
  y = select(y, x, given >= 0x7f800000u);
  y = select(y, not_a_number(), given > 0x80000000u);
  return select(y, -infinity(), (given & 0x7fffffffu) == 0u);
}
`;

/** `tanh_of`, about 2 ulp (needs expText). */
export const tanhText = `
fn tanh_of(x: f32) -> f32 {
  let a = abs(x);
  let z = x * x;
  var q = -5.70498872745e-3;
  q = q * z + 2.06390887954e-2;
  q = q * z - 5.37397155531e-2;
  q = q * z + 1.33314422036e-1;
  q = q * z - 3.33332819422e-1;
  let small = q * z * x + x;
  let large = 1.0 - 2.0 / (exp_term(2.0 * min(a, 10.0)) + 1.0);
  let y = select(select(large, -large, x < 0.0), small, a < 0.625);
  return select(y, x, is_nan(x));
}
`;

/**
 * `erf_of`, about 2 ulp; `normal_cdf`: (1 + erf(x / sqrt 2)) / 2 without cancellation for negative x (both need expText).
 */
export const erfText = `
fn erf_small(x: f32) -> f32 {
  let s = x * x;
  var q = -5.96761703e-4;
  q = q * s + 4.99119423e-3;
  q = q * s - 2.67681349e-2;
  q = q * s + 1.12819925e-1;
  q = q * s - 3.76125336e-1;
  q = q * s + 1.28379166e-1;
  return q * x + x;
}
// 1 - erf(t) for 0.92 < t; beyond 4, where the polynomial would turn around, 0.
fn erfc_large(t: f32) -> f32 {
  let a = min(t, 4.0);
  let q = a * a;
  var r = (-1.7285347e-5 * a + 3.83197126e-4) * q + (-3.88396438e-3 * a + 2.42546219e-2);
  r = r * a - 1.06777877e-1;
  r = r * a - 6.34846687e-1;
  r = r * a - 1.28717512e-1;
  r = r * a - a;
  return select(exp_term(r), 0.0, t >= 4.0);
}
fn erf_of(x: f32) -> f32 {
  let t = abs(x);
  let large = 1.0 - erfc_large(t);
  let y = select(select(large, -large, x < 0.0), erf_small(x), t <= 0.927734375);
  return select(y, x, is_nan(x));
}
fn normal_cdf(x: f32) -> f32 {
  let u = x * 0.70710678;
  let t = abs(u);
  let tail = 0.5 * erfc_large(t);
  let y = select(select(1.0 - tail, tail, x < 0.0), 0.5 + 0.5 * erf_small(u), t <= 0.927734375);
  return select(y, x, is_nan(x));
}
`;

/** `sigmoid_of`: 1 / (1 + e^-x), accurate in both tails (needs expText). */
export const sigmoidText = `
fn sigmoid_of(x: f32) -> f32 {
  let e = exp_term(-abs(x));
  let y = select(1.0, e, x < 0.0) / (1.0 + e);
  return select(y, x, is_nan(x));
}
`;

/**
 * The storage types through the bits of an f32, exactly: `float_of_half`, `float_of_brain`, `float_of_int` widen to f32 bits (integers
 * round to nearest even); `half_of`, `brain_of` round f32 bits to nearest even, keeping NaN and infinities; `int_of`, `byte_of` drop the
 * fraction and saturate, NaN gives 0.
 */
export const formatText = `
fn float_of_half(h: u32) -> u32 {
  let sign = (h & 0x8000u) << 16u;
  let exponent = (h >> 10u) & 31u;
  let fraction = h & 0x3ffu;
  // Subnormal halves are multiples of 2^-24.
  let small = bitcast<u32>(f32(fraction) * 5.9604644775390625e-8);
  let normal = ((exponent + 112u) << 23u) | (fraction << 13u);
  let special = 0x7f800000u | (fraction << 13u);
  return sign | select(select(normal, special, exponent == 31u), small, exponent == 0u);
}
fn float_of_brain(b: u32) -> u32 { return b << 16u; }
fn half_of(bits: u32) -> u32 {
  let sign = (bits >> 16u) & 0x8000u;
  let m = bits & 0x7fffffffu;
  if (m > 0x7f800000u) { return sign | 0x7e00u; }
  if (m >= 0x477ff000u) { return sign | 0x7c00u; }
  if (m >= 0x38800000u) {
    let r = m - 0x38000000u;
    return sign | ((r + 0xfffu + ((r >> 13u) & 1u)) >> 13u);
  }
  if (m <= 0x33000000u) { return sign; }
  // Between 2^-25 and 2^-14: the fraction with its leading one, in units of 2^-24.
  let shift = 126u - (m >> 23u);
  let fraction = (m & 0x7fffffu) | 0x800000u;
  let q = fraction >> shift;
  return sign | ((fraction + (1u << (shift - 1u)) - 1u + (q & 1u)) >> shift);
}
fn brain_of(bits: u32) -> u32 {
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return (bits >> 16u) | 0x40u; }
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
// The nearest integer with so many significant bits, ties to even.
fn keep_bits(m: u32, significant: u32) -> u32 {
  let length = 32u - countLeadingZeros(m);
  if (length <= significant) { return m; }
  let shift = length - significant;
  return ((m + (1u << (shift - 1u)) - 1u + ((m >> shift) & 1u)) >> shift) << shift;
}
fn float_of_int(x: u32, significant: u32) -> u32 {
  let negative = (x >> 31u) == 1u;
  let magnitude = select(x, ~x + 1u, negative);
  return bitcast<u32>(f32(keep_bits(magnitude, significant))) | (x & 0x80000000u);
}
fn int_of(bits: u32) -> u32 {
  let m = bits & 0x7fffffffu;
  let negative = (bits >> 31u) == 1u;
  if (m > 0x7f800000u || m < 0x3f800000u) { return 0u; }
  if (m >= 0x4f000000u) { return select(0x7fffffffu, 0x80000000u, negative); }
  let whole = u32(float_of(m));
  return select(whole, ~whole + 1u, negative);
}
fn byte_of(x: u32) -> u32 { return u32(clamp(bitcast<i32>(x), 0, 255)); }
`;
