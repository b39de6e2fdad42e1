// Weights of few bits: their values, and products that widen them on the way. One row reads codes straight into dot products; a few rows widen
// eight lines at a time into scratch; many rows widen them into the panels of the register tile. Activations stay f32 throughout.
import { dots1, dots2, finish, multiplyBlock, packPanel, panelStride, Product, rowOf, Task } from "./matmul";
import { lane0, madd, sumLanes4, zero } from "./simd";

// Formats, as the host numbers them. int4 always has a zero (8 where none is stored).
const INT8: i32 = 0;
const INT8_ZEROS: i32 = 1;
const INT4: i32 = 2;
const MXFP4: i32 = 3;
const FP8: i32 = 4;

/** Columns of a packed panel, the most of a task, and the blocks of k: as in matmul.ts. */
const NR: i32 = 8;
const NC: i32 = 128;
const KC: i32 = 256;
const KD: i32 = 512;
const KD_FEW: i32 = 2048;
/** Scratch: the packed block of B and an edge tile, as in matmul.ts; then constants and eight widened lines. */
const TILE_OFFSET: usize = <usize>(KC * NC * 4 + (NC / NR) * 64);
const CONSTANTS_OFFSET: usize = TILE_OFFSET + <usize>(6 * NR * 4);
const LINES_OFFSET: usize = CONSTANTS_OFFSET + 128;
/** Bytes from widened line to widened line: one cache line more than a block of k has. */
const LINE: usize = <usize>(KD * 4 + 64);

/** A product whose tasks name, in place of a bias, the first line of B among the lines of all matrices. */
@unmanaged
class Stored extends Product {
  scales: usize;
  zeros: usize; // 0: none
  group: i32; // elements of a line that share a scale
  rows: i32; // lines that share scales
  lines: i32; // of one matrix
  across: i32; // scales of one line
}

@unmanaged
class Widen extends Stored {
  codes: usize;
  k: i32;
  y: usize;
}

/** The first scale of a line, counted in scales. */
@inline
function scaleIndex(job: Stored, line: i32): usize {
  const matrix = line / job.lines;
  const down = (job.lines + job.rows - 1) / job.rows;
  return <usize>(matrix * down + (line - matrix * job.lines) / job.rows) * <usize>job.across;
}

@inline
function scaleAt(format: i32, job: Stored, index: usize): f32 {
  if (format == MXFP4) {
    const e = <u32>load<u8>(job.scales + index);
    // 2^-127 is subnormal.
    return reinterpret<f32>(e == 0 ? 0x00400000 : e == 255 ? 0x7fc00000 : e << 23);
  }
  return load<f32>(job.scales + (index << 2));
}

@inline
function zeroAt(format: i32, job: Stored, index: usize): i32 {
  if (format == INT8_ZEROS) return <i32>load<i8>(job.zeros + index);
  if (format == INT4) return job.zeros ? <i32>load<u8>(job.zeros + index) : 8;
  return 0;
}

// ---------------------------------------------------------------- codes

@inline
function isNibble(format: i32): bool {
  return format == INT4 || format == MXFP4;
}

/** Where element i of a line begins; i is even where two share a byte. */
@inline
function codesAt(format: i32, line: usize, i: i32): usize {
  return line + <usize>(isNibble(format) ? i >> 1 : i);
}

/** 16 codes, one per byte. */
@inline
function codes16(format: i32, constants: usize, p: usize): v128 {
  if (!isNibble(format)) return v128.load(p);
  const b = v128.load_ext<u8>(p); // eight bytes as 16-bit lanes: their nibbles go to the two halves
  return v128.and(v128.or(b, i16x8.shl(b, 4)), v128.load(constants, NIBBLE));
}

/** Code i of a line in every byte. */
@inline
function code1(format: i32, line: usize, i: i32): v128 {
  const byte = <i32>load<u8>(codesAt(format, line, i));
  return i8x16.splat(<i8>(isNibble(format) ? (byte >> ((i & 1) << 2)) & 15 : byte));
}

// Constants of the inner loops. Engines build a vector constant anew wherever it is used, a load is cheaper: every kernel writes them to scratch.
const NIBBLE: usize = 0;
const UPPER_NIBBLE: usize = 16;
const MAGNITUDE: usize = 32;
const UPPER: usize = 48;
const LOWER: usize = 64;
const FIX_UPPER: usize = 80;
const FIX_LOWER: usize = 96;

/** Writes the constants of a format, and gives their address. */
function constantsAt(format: i32, to: usize): usize {
  v128.store(to + NIBBLE, i8x16.splat(15));
  v128.store(to + UPPER_NIBBLE, i8x16.splat(-16));
  v128.store(to + MAGNITUDE, i8x16.splat(0x7f));
  if (format == MXFP4) {
    // The bf16 of the 16 values: upper and lower bytes.
    v128.store(to + UPPER, i8x16(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
    v128.store(to + LOWER, i8x16(0, 0, -128, -64, 0, 0x40, -128, -64, 0, 0, -128, -64, 0, 0x40, -128, -64));
  } else {
    // fp8. By sign and the upper three bits of the exponent: the upper byte of a normal number's bf16. What subnormals and zero add to both.
    v128.store(to + UPPER, i8x16(60, 61, 62, 63, 64, 65, 66, 67, -68, -67, -66, -65, -64, -63, -62, -61));
    v128.store(to + FIX_UPPER, i8x16(-60, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    v128.store(to + FIX_LOWER, i8x16(0, -16, 0x60, -112, -64, -48, -32, -16, 0, 0, 0, 0, 0, 0, 0, 0));
  }
  return to;
}

/** Entries of a table; indices are 0 to 15. */
@inline
function look(table: v128, index: v128): v128 {
  if (ASC_FEATURE_RELAXED_SIMD) return i8x16.relaxed_swizzle(table, index);
  return i8x16.swizzle(table, index);
}

@inline
function isFloatFormat(format: i32): bool {
  return format == MXFP4 || format == FP8;
}

/** fp8 codes without their signs; others do without. */
@inline
function magnitudes(format: i32, constants: usize, codes: v128): v128 {
  return format == FP8 ? v128.and(codes, v128.load(constants, MAGNITUDE)) : codes;
}

/**
 * 16 codes become the upper bytes of 16-bit lanes. MXFP4, fp8: of the exact bf16 (NaN is all ones; the second table gives 0 but for subnormals
 * and zeros). Integers: the number itself.
 */
@inline
function upper(format: i32, constants: usize, codes: v128, magnitude: v128, zeroBytes: v128): v128 {
  if (format == INT4) return i8x16.sub(codes, zeroBytes);
  if (format == MXFP4) return look(v128.load(constants, UPPER), codes);
  if (format != FP8) return codes;
  const head = v128.and(i16x8.shr_u(codes, 4), v128.load(constants, NIBBLE));
  const normal = look(v128.load(constants, UPPER), head);
  const fix = i8x16.swizzle(v128.load(constants, FIX_UPPER), magnitude);
  return v128.or(i8x16.add(normal, fix), i8x16.eq(magnitude, v128.load(constants, MAGNITUDE)));
}

/** Their lower bytes. */
@inline
function lower(format: i32, constants: usize, codes: v128, magnitude: v128): v128 {
  if (format == MXFP4) return look(v128.load(constants, LOWER), codes);
  if (format != FP8) return i32x4.splat(0);
  const normal = v128.and(i16x8.shl(codes, 4), v128.load(constants, UPPER_NIBBLE));
  const fix = i8x16.swizzle(v128.load(constants, FIX_LOWER), magnitude);
  return v128.or(i8x16.add(normal, fix), i8x16.eq(magnitude, v128.load(constants, MAGNITUDE)));
}

@inline
function firstHalves(low: v128, high: v128): v128 {
  return v128.shuffle<u8>(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
@inline
function lastHalves(low: v128, high: v128): v128 {
  return v128.shuffle<u8>(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
/** Four halves, in the upper bits of 32-bit lanes, as f32: of integers 2^24 times the value, and so is `zero`. */
@inline
function firstFour(format: i32, halves: v128, zero: v128): v128 {
  return numbers(format, v128.shuffle<u16>(i32x4.splat(0), halves, 0, 8, 1, 9, 2, 10, 3, 11), zero);
}
@inline
function lastFour(format: i32, halves: v128, zero: v128): v128 {
  return numbers(format, v128.shuffle<u16>(i32x4.splat(0), halves, 4, 12, 5, 13, 6, 14, 7, 15), zero);
}
@inline
function numbers(format: i32, x: v128, zero: v128): v128 {
  if (isFloatFormat(format)) return x;
  const y = f32x4.convert_i32x4_s(x);
  return format == INT8_ZEROS ? f32x4.sub(y, zero) : y;
}

/** What integers have to be multiplied by after that. */
const TOP: f32 = 1.0 / 16777216.0;

// ---------------------------------------------------------------- widening

/** Elements from..to of a line, as f32; `scales` is the index of the line's first scale. */
@inline
function widenLine(format: i32, constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  const group = job.group;
  let i = from;
  while (i < to) {
    const index = scales + <usize>(i / group);
    const end = min(to, (i / group + 1) * group);
    const scale = f32x4.splat(scaleAt(format, job, index));
    const zero = zeroAt(format, job, index);
    const zeroBytes = i8x16.splat(<i8>zero);
    const zeroTop = f32x4.splat(<f32>zero * 16777216.0);
    // Whole chunks begin on whole bytes.
    if (!isNibble(format) || (i & 1) == 0) {
      for (; i + 16 <= end; i += 16) {
        const codes = codes16(format, constants, codesAt(format, line, i));
        const magnitude = magnitudes(format, constants, codes);
        const low = lower(format, constants, codes, magnitude);
        const high = upper(format, constants, codes, magnitude, zeroBytes);
        const a = firstHalves(low, high), b = lastHalves(low, high);
        v128.store(y, times(format, firstFour(format, a, zeroTop), scale));
        v128.store(y, times(format, lastFour(format, a, zeroTop), scale), 16);
        v128.store(y, times(format, firstFour(format, b, zeroTop), scale), 32);
        v128.store(y, times(format, lastFour(format, b, zeroTop), scale), 48);
        y += 64;
      }
    }
    for (; i < end; i++) {
      const codes = code1(format, line, i);
      const magnitude = magnitudes(format, constants, codes);
      const high = upper(format, constants, codes, magnitude, zeroBytes);
      const halves = firstHalves(lower(format, constants, codes, magnitude), high);
      store<f32>(y, lane0(times(format, firstFour(format, halves, zeroTop), scale)));
      y += 4;
    }
  }
}

/** Not by the product of both factors, which may be subnormal. */
@inline
function times(format: i32, x: v128, scale: v128): v128 {
  return f32x4.mul(isFloatFormat(format) ? x : f32x4.mul(x, f32x4.splat(TOP)), scale);
}

function widenInt8(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  widenLine(INT8, constants, job, line, scales, from, to, y);
}
function widenInt8Zeros(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  widenLine(INT8_ZEROS, constants, job, line, scales, from, to, y);
}
function widenInt4(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  widenLine(INT4, constants, job, line, scales, from, to, y);
}
function widenMxfp4(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  widenLine(MXFP4, constants, job, line, scales, from, to, y);
}
function widenFp8(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  widenLine(FP8, constants, job, line, scales, from, to, y);
}

function widenAny(constants: usize, job: Stored, line: usize, scales: usize, from: i32, to: i32, y: usize): void {
  const format = job.kind;
  if (format == INT8) widenInt8(constants, job, line, scales, from, to, y);
  else if (format == INT8_ZEROS) widenInt8Zeros(constants, job, line, scales, from, to, y);
  else if (format == INT4) widenInt4(constants, job, line, scales, from, to, y);
  else if (format == MXFP4) widenMxfp4(constants, job, line, scales, from, to, y);
  else widenFp8(constants, job, line, scales, from, to, y);
}

/** Lines of stored weights as f32; a unit is a line. */
export function widenLines(job: Widen, from: i32, to: i32, scratch: usize): void {
  const constants = constantsAt(job.kind, scratch + CONSTANTS_OFFSET);
  const length = (<usize>job.k) << 2;
  for (let line = from; line < to; line++) {
    const codes = job.codes + <usize>line * <usize>job.ldb;
    widenAny(constants, job, codes, scaleIndex(job, line), 0, job.k, job.y + <usize>line * length);
  }
}

/** `n` lines of a task from `first` on, elements from..to, into scratch. */
function widenBlock(constants: usize, job: Stored, task: Task, first: i32, n: i32, from: i32, to: i32, y: usize): void {
  let codes = task.b + <usize>first * <usize>job.ldb;
  const line = <i32>task.bias + first;
  for (let j = 0; j < n; j++) {
    widenAny(constants, job, codes, scaleIndex(job, line + j), from, to, y);
    codes += <usize>job.ldb;
    y += LINE;
  }
}

// ---------------------------------------------------------------- one row

/** acc + x[0..15] times 16 weights, less their scale (and for integers, 2^24 times too large). */
@inline
function dot16(
  format: i32,
  constants: usize,
  p: usize,
  zeroBytes: v128,
  zeroTop: v128,
  x0: v128,
  x1: v128,
  x2: v128,
  x3: v128,
  acc: v128,
): v128 {
  const codes = codes16(format, constants, p);
  const magnitude = magnitudes(format, constants, codes);
  const low = lower(format, constants, codes, magnitude);
  const high = upper(format, constants, codes, magnitude, zeroBytes);
  const a = firstHalves(low, high), b = lastHalves(low, high);
  let t = f32x4.mul(x0, firstFour(format, a, zeroTop));
  t = madd(x1, lastFour(format, a, zeroTop), t);
  t = madd(x2, firstFour(format, b, zeroTop), t);
  t = madd(x3, lastFour(format, b, zeroTop), t);
  return f32x4.add(acc, t);
}

/** total + scale times a group's sum. */
@inline
function scaled(format: i32, job: Stored, index: usize, sum: v128, total: v128): v128 {
  if (!isFloatFormat(format)) sum = f32x4.mul(sum, f32x4.splat(TOP));
  return madd(f32x4.splat(scaleAt(format, job, index)), sum, total);
}

@inline
function zeroBytesAt(format: i32, job: Stored, index: usize): v128 {
  return format == INT4 ? i8x16.splat(<i8>zeroAt(format, job, index)) : zero();
}
@inline
function zeroTopAt(format: i32, job: Stored, index: usize): v128 {
  return format == INT8_ZEROS ? f32x4.splat(<f32>zeroAt(format, job, index) * 16777216.0) : zero();
}

/** c[n] (+)= elements from..to of one row times n lines; groups are whole chunks of 16, from and to too. */
@inline
function dotLines(format: i32, constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  const ldb = <usize>job.ldb;
  const group = job.group;
  const step: usize = isNibble(format) ? 8 : 16;
  const line = <i32>task.bias;
  for (let j = 0; j < task.n; j += 4) {
    const count = task.n - j;
    const b = task.b + <usize>j * ldb;
    // Lines past the last are copies of the first.
    const one = count > 1 ? 1 : 0, two = count > 2 ? 2 : 0, three = count > 3 ? 3 : 0;
    let p0 = codesAt(format, b, from);
    let p1 = p0 + <usize>one * ldb;
    let p2 = p0 + <usize>two * ldb;
    let p3 = p0 + <usize>three * ldb;
    const i0 = scaleIndex(job, line + j);
    const i1 = scaleIndex(job, line + j + one);
    const i2 = scaleIndex(job, line + j + two);
    const i3 = scaleIndex(job, line + j + three);
    let s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    let x = a + ((<usize>from) << 2);
    let g = from / group;
    for (let i = from; i < to; g++) {
      const end = min(to, (g + 1) * group);
      const at = <usize>g;
      const b0 = zeroBytesAt(format, job, i0 + at), b1 = zeroBytesAt(format, job, i1 + at);
      const b2 = zeroBytesAt(format, job, i2 + at), b3 = zeroBytesAt(format, job, i3 + at);
      const z0 = zeroTopAt(format, job, i0 + at), z1 = zeroTopAt(format, job, i1 + at);
      const z2 = zeroTopAt(format, job, i2 + at), z3 = zeroTopAt(format, job, i3 + at);
      let t0 = zero(), t1 = zero(), t2 = zero(), t3 = zero();
      for (; i < end; i += 16) {
        const x0 = v128.load(x), x1 = v128.load(x, 16), x2 = v128.load(x, 32), x3 = v128.load(x, 48);
        t0 = dot16(format, constants, p0, b0, z0, x0, x1, x2, x3, t0);
        t1 = dot16(format, constants, p1, b1, z1, x0, x1, x2, x3, t1);
        t2 = dot16(format, constants, p2, b2, z2, x0, x1, x2, x3, t2);
        t3 = dot16(format, constants, p3, b3, z3, x0, x1, x2, x3, t3);
        x += 64;
        p0 += step;
        p1 += step;
        p2 += step;
        p3 += step;
      }
      s0 = scaled(format, job, i0 + at, t0, s0);
      s1 = scaled(format, job, i1 + at, t1, s1);
      s2 = scaled(format, job, i2 + at, t2, s2);
      s3 = scaled(format, job, i3 + at, t3, s3);
    }
    finish(c, sumLanes4(s0, s1, s2, s3), count, add);
    c += 16;
  }
}

function dotInt8(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(INT8, constants, job, task, a, from, to, c, add);
}
function dotInt8Zeros(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(INT8_ZEROS, constants, job, task, a, from, to, c, add);
}
function dotInt4(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(INT4, constants, job, task, a, from, to, c, add);
}
function dotMxfp4(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(MXFP4, constants, job, task, a, from, to, c, add);
}
function dotFp8(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(FP8, constants, job, task, a, from, to, c, add);
}

function dotAny(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  const format = job.kind;
  if (format == INT8) dotInt8(constants, job, task, a, from, to, c, add);
  else if (format == INT8_ZEROS) dotInt8Zeros(constants, job, task, a, from, to, c, add);
  else if (format == INT4) dotInt4(constants, job, task, a, from, to, c, add);
  else if (format == MXFP4) dotMxfp4(constants, job, task, a, from, to, c, add);
  else dotFp8(constants, job, task, a, from, to, c, add);
}

// ---------------------------------------------------------------- products

/** Elements from..to of a few rows times n widened lines, eight at a time so that they stay near while all rows pass. */
function dotWidened(constants: usize, job: Stored, task: Task, from: i32, to: i32, add: bool, lines: usize): void {
  const ldc = <usize>job.ldc;
  const at = (<usize>from) << 2;
  for (let j = 0; j < task.n; j += NR) {
    const count = min(task.n - j, NR);
    widenBlock(constants, job, task, j, count, from, to, lines);
    let c = task.c + ((<usize>j) << 2);
    let r = 0;
    for (; r + 1 < task.m; r += 2) {
      const a0 = rowOf(job, task, r) + at, a1 = rowOf(job, task, r + 1) + at;
      dots2<f32>(a0, a1, lines, LINE, count, to - from, c, c + ldc, add);
      c += ldc << 1;
    }
    if (r < task.m) dots1<f32>(rowOf(job, task, r) + at, lines, LINE, count, to - from, c, add);
  }
}

/** Products of few rows: c = a b. */
export function storedDots(job: Stored, from: i32, to: i32, scratch: usize): void {
  const constants = constantsAt(job.kind, scratch + CONSTANTS_OFFSET);
  const lines = scratch + LINES_OFFSET;
  // One row reads chunks of 16 within groups; what is left of a line is widened.
  const chunks = job.group % 16 == 0 || job.across == 1;
  for (let t = from; t < to; t++) {
    const task = changetype<Task>(job.tasks + (<usize>t) * offsetof<Task>());
    const k = task.k;
    if (k == 0) {
      for (let r = 0; r < task.m; r++) memory.fill(task.c + <usize>r * <usize>job.ldc, 0, (<usize>task.n) << 2);
      continue;
    }
    let i = 0;
    if (task.m == 1 && chunks) {
      const whole = k & ~15;
      const row = rowOf(job, task, 0);
      for (; i < whole; i += KD_FEW) dotAny(constants, job, task, row, i, min(whole, i + KD_FEW), task.c, i > 0);
      i = whole;
    }
    for (; i < k; i += KD) dotWidened(constants, job, task, i, min(k, i + KD), i > 0, lines);
  }
}

/** Products of many rows: c = a b. */
export function storedMultiply(job: Stored, from: i32, to: i32, scratch: usize): void {
  const constants = constantsAt(job.kind, scratch + CONSTANTS_OFFSET);
  const lines = scratch + LINES_OFFSET;
  for (let t = from; t < to; t++) {
    const task = changetype<Task>(job.tasks + (<usize>t) * offsetof<Task>());
    const n = task.n, k = task.k;
    const ldc = <usize>job.ldc;
    if (k == 0) {
      for (let r = 0; r < task.m; r++) memory.fill(task.c + <usize>r * ldc, 0, (<usize>n) << 2);
    }
    for (let i = 0; i < k; i += KC) {
      const length = min(k - i, KC);
      const panel = panelStride(length);
      let packed = scratch;
      for (let j = 0; j < n; j += NR) {
        const count = min(n - j, NR);
        widenBlock(constants, job, task, j, count, i, i + length, lines);
        packPanel<f32>(lines, LINE, count, length, packed);
        packed += panel;
      }
      multiplyBlock(job, task, i, length, scratch, n, panel, NR * 4, task.c, ldc, i > 0, scratch + TILE_OFFSET);
    }
  }
}
