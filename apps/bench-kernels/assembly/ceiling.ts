// What this machine allows: arithmetic in registers, and reading memory. Ten chains hide the latency of a multiply-add.
// The factors are arguments because constants would be rebuilt for every operation. Compiled by src/ceiling.ts at start.

/** Fused multiply-adds of relaxed SIMD: 80 floating-point operations per round. */
export function relaxed(rounds: i32, scale: f32, shift: f32): f32 {
  const x = f32x4.splat(scale);
  const y = f32x4.splat(shift);
  let a = f32x4.splat(0), b = x, c = y, d = a, e = b, f = c, g = d, h = e, i = f, j = g;
  for (let round = 0; round < rounds; round++) {
    a = f32x4.relaxed_madd(a, x, y);
    b = f32x4.relaxed_madd(b, x, y);
    c = f32x4.relaxed_madd(c, x, y);
    d = f32x4.relaxed_madd(d, x, y);
    e = f32x4.relaxed_madd(e, x, y);
    f = f32x4.relaxed_madd(f, x, y);
    g = f32x4.relaxed_madd(g, x, y);
    h = f32x4.relaxed_madd(h, x, y);
    i = f32x4.relaxed_madd(i, x, y);
    j = f32x4.relaxed_madd(j, x, y);
  }
  return sum(a, b, c, d, e) + sum(f, g, h, i, j);
}

/** The same with plain SIMD: a multiplication and an addition. */
export function plain(rounds: i32, scale: f32, shift: f32): f32 {
  const x = f32x4.splat(scale);
  const y = f32x4.splat(shift);
  let a = f32x4.splat(0), b = x, c = y, d = a, e = b, f = c, g = d, h = e, i = f, j = g;
  for (let round = 0; round < rounds; round++) {
    a = f32x4.add(f32x4.mul(a, x), y);
    b = f32x4.add(f32x4.mul(b, x), y);
    c = f32x4.add(f32x4.mul(c, x), y);
    d = f32x4.add(f32x4.mul(d, x), y);
    e = f32x4.add(f32x4.mul(e, x), y);
    f = f32x4.add(f32x4.mul(f, x), y);
    g = f32x4.add(f32x4.mul(g, x), y);
    h = f32x4.add(f32x4.mul(h, x), y);
    i = f32x4.add(f32x4.mul(i, x), y);
    j = f32x4.add(f32x4.mul(j, x), y);
  }
  return sum(a, b, c, d, e) + sum(f, g, h, i, j);
}

/** Grows the memory to `pages` and touches all of it: untouched pages are no memory at all. */
export function fill(pages: i32): void {
  memory.grow(pages - memory.size());
  for (let at: usize = 0, end = (<usize>pages) << 16; at < end; at += 16) v128.store(at, f32x4.splat(1));
}

/** Adds up the first `bytes`, a multiple of 128. */
export function read(bytes: usize): f32 {
  let a = f32x4.splat(0), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  for (let at: usize = 0; at < bytes; at += 128) {
    a = f32x4.add(a, v128.load(at));
    b = f32x4.add(b, v128.load(at, 16));
    c = f32x4.add(c, v128.load(at, 32));
    d = f32x4.add(d, v128.load(at, 48));
    e = f32x4.add(e, v128.load(at, 64));
    f = f32x4.add(f, v128.load(at, 80));
    g = f32x4.add(g, v128.load(at, 96));
    h = f32x4.add(h, v128.load(at, 112));
  }
  return sum(a, b, c, d, e) + sum(f, g, h, f32x4.splat(0), f32x4.splat(0));
}

function sum(a: v128, b: v128, c: v128, d: v128, e: v128): f32 {
  const y = f32x4.add(f32x4.add(f32x4.add(a, b), f32x4.add(c, d)), e);
  return (
    f32x4.extract_lane(y, 0) + f32x4.extract_lane(y, 1) + f32x4.extract_lane(y, 2) + f32x4.extract_lane(y, 3)
  );
}
