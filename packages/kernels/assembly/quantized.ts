// Weights of few bits: their values, and products that widen them on the way. One row reads codes straight into dot products (for int8 and int4
// as integers, see there); a few rows widen eight lines at a time into scratch; many rows widen them into the panels of the register tile.
// Activations are not rounded to fewer bits than f32 has.
import { dots1, dots2, finish, multiplyBlock, packPanel, panelStride, Product, rowOf, Task } from "./matmul";
import { lane0, madd, maxLanes, sumLanes4, zero } from "./simd";

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
  if (format == MXFP4) return powerOf(load<u8>(job.scales + index));
  return load<f32>(job.scales + (index << 2));
}

/** 2^(e - 127); NaN for 255. */
@inline
function powerOf(e: u32): f32 {
  // 2^-127 is subnormal.
  return reinterpret<f32>(e == 0 ? 0x00400000 : e == 255 ? 0x7fc00000 : e << 23);
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

// ---------------------------------------------------------------- one row, codes that are floats

/** acc + x[0..15] times 16 weights, less their scale. */
@inline
function dot16(format: i32, constants: usize, p: usize, x0: v128, x1: v128, x2: v128, x3: v128, acc: v128): v128 {
  const codes = codes16(format, constants, p);
  const magnitude = magnitudes(format, constants, codes);
  const low = lower(format, constants, codes, magnitude);
  const high = upper(format, constants, codes, magnitude, zero());
  const a = firstHalves(low, high), b = lastHalves(low, high);
  let t = f32x4.mul(x0, firstFour(format, a, zero()));
  t = madd(x1, lastFour(format, a, zero()), t);
  t = madd(x2, firstFour(format, b, zero()), t);
  t = madd(x3, lastFour(format, b, zero()), t);
  return f32x4.add(acc, t);
}

/** total + scale times a group's sum. */
@inline
function scaled(format: i32, powers: usize, job: Stored, index: usize, sum: v128, total: v128): v128 {
  const scale = format == MXFP4 ? powers + ((<usize>load<u8>(job.scales + index)) << 2) : job.scales + (index << 2);
  return madd(v128.load_splat<f32>(scale), sum, total);
}

/** c[n] (+)= elements from..to of one row times n lines; groups are whole chunks of 16, from and to too. In scratch: the scales of MXFP4. */
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
      let t0 = zero(), t1 = zero(), t2 = zero(), t3 = zero();
      for (; i < end; i += 16) {
        const x0 = v128.load(x), x1 = v128.load(x, 16), x2 = v128.load(x, 32), x3 = v128.load(x, 48);
        t0 = dot16(format, constants, p0, x0, x1, x2, x3, t0);
        t1 = dot16(format, constants, p1, x0, x1, x2, x3, t1);
        t2 = dot16(format, constants, p2, x0, x1, x2, x3, t2);
        t3 = dot16(format, constants, p3, x0, x1, x2, x3, t3);
        x += 64;
        p0 += step;
        p1 += step;
        p2 += step;
        p3 += step;
      }
      s0 = scaled(format, constants - CONSTANTS_OFFSET, job, i0 + at, t0, s0);
      s1 = scaled(format, constants - CONSTANTS_OFFSET, job, i1 + at, t1, s1);
      s2 = scaled(format, constants - CONSTANTS_OFFSET, job, i2 + at, t2, s2);
      s3 = scaled(format, constants - CONSTANTS_OFFSET, job, i3 + at, t3, s3);
    }
    finish(c, sumLanes4(s0, s1, s2, s3), count, add);
    c += 16;
  }
}

function dotMxfp4(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(MXFP4, constants, job, task, a, from, to, c, add);
}
function dotFp8(constants: usize, job: Stored, task: Task, a: usize, from: i32, to: i32, c: usize, add: bool): void {
  dotLines(FP8, constants, job, task, a, from, to, c, add);
}

// ---------------------------------------------------------------- one row, codes that are integers
// The row becomes integers of 31 bits times one power of two, and each of those two digits of 16 bits with sign: exact but for what lies
// below 2^-30 of the largest element. Products of digits and codes are summed as integers, exactly, and become floats once for each group.

/** Elements of a block of digits, and the most of a sum: more would not be held by 32 bits. */
const KI: i32 = 16384;
const SEGMENT: i32 = 1024;
/** In scratch, where packed blocks of many rows would be: digits, four bytes for an element; then 32 bytes for each sum. */
const SUMS_OFFSET: usize = <usize>(KI * 4);

/** Four elements as integers. Their range holds: rounding to it is relaxed SIMD's too. */
@inline
function integers(x: usize, factor: v128): v128 {
  const y = f32x4.nearest(f32x4.mul(v128.load(x), factor));
  if (ASC_FEATURE_RELAXED_SIMD) return i32x4.relaxed_trunc_f32x4_s(y);
  return i32x4.trunc_sat_f32x4_s(y);
}
/** The upper, then the lower digits of eight integers. */
@inline
function storeDigits(a: v128, b: v128, to: usize): void {
  const carry = i32x4.splat(0x8000);
  v128.store(to, v128.shuffle<u16>(i32x4.add(a, carry), i32x4.add(b, carry), 1, 3, 5, 7, 9, 11, 13, 15));
  v128.store(to, v128.shuffle<u16>(a, b, 0, 2, 4, 6, 8, 10, 12, 14), 16);
}

/**
 * Writes the digits of x[0..k], k a multiple of 16, in the order of the codes: of nibbles, those of even elements come first. Gives what they
 * are to be multiplied by; NaN where x has no digits: it holds infinity or NaN, or nothing above 2^-96.
 */
function digitize(nibbles: bool, x: usize, k: i32, to: usize): f32 {
  const end = x + ((<usize>k) << 2);
  let most = zero();
  for (let p = x; p < end; p += 16) most = f32x4.max(most, f32x4.abs(v128.load(p)));
  const largest = maxLanes(most);
  if (!(largest < f32.POSITIVE_INFINITY) || (largest < reinterpret<f32>(0x0f800000) && largest > 0)) return f32.NaN;
  // The power of two that makes it 2^29 to 2^30.
  const exponent = min(252, 283 - <i32>(reinterpret<u32>(largest) >> 23));
  const factor = f32x4.splat(reinterpret<f32>(exponent << 23));
  for (; x < end; x += 64) {
    const a = integers(x, factor), b = integers(x + 16, factor), c = integers(x + 32, factor), d = integers(x + 48, factor);
    if (nibbles) {
      storeDigits(v128.shuffle<u32>(a, b, 0, 2, 4, 6), v128.shuffle<u32>(c, d, 0, 2, 4, 6), to);
      storeDigits(v128.shuffle<u32>(a, b, 1, 3, 5, 7), v128.shuffle<u32>(c, d, 1, 3, 5, 7), to + 32);
    } else {
      storeDigits(a, b, to);
      storeDigits(c, d, to + 32);
    }
    to += 64;
  }
  return reinterpret<f32>((254 - exponent) << 23);
}

/** Sums of the upper and the lower digits times `code`, group by group. */
function sumDigits(code: i32, group: i32, from: i32, to: i32, digits: usize, sums: usize): void {
  const codes = i16x8.splat(<i16>code);
  let end = (from / group + 1) * group;
  for (let i = from; i < to; ) {
    const stop = min(min(i + SEGMENT, end), to);
    let high = zero(), low = zero();
    for (; i < stop; i += 8) {
      high = i32x4.add(high, i32x4.dot_i16x8_s(codes, v128.load(digits)));
      low = i32x4.add(low, i32x4.dot_i16x8_s(codes, v128.load(digits, 16)));
      digits += 32;
    }
    v128.store(sums, high);
    v128.store(sums, low, 16);
    sums += 32;
    if (i == end) end += group;
  }
}

/** total + scale times the sum of a group, whose digits are summed in `high` and `low`, without its zero. */
@inline
function scaledDigits(format: i32, job: Stored, index: usize, sums: usize, high: v128, low: v128, total: v128): v128 {
  if (format == INT4 && !job.zeros) {
    // They are sums of eights.
    high = i32x4.sub(high, v128.load(sums));
    low = i32x4.sub(low, v128.load(sums, 16));
  } else if (format != INT8) {
    const zeros = i32x4.splat(zeroAt(format, job, index));
    high = i32x4.sub(high, i32x4.mul(zeros, v128.load(sums)));
    low = i32x4.sub(low, i32x4.mul(zeros, v128.load(sums, 16)));
  }
  const sum = madd(f32x4.convert_i32x4_s(high), f32x4.splat(65536), f32x4.convert_i32x4_s(low));
  return madd(v128.load_splat<f32>(job.scales + (index << 2)), sum, total);
}

/** c[n] (+)= elements from..to of a row, whose digits times `factor` they are, times n lines; from, to and groups are whole chunks of 16. */
@inline
function digitLines(format: i32, job: Stored, task: Task, from: i32, to: i32, digits: usize, factor: f32, add: bool): void {
  const ldb = <usize>job.ldb;
  const group = job.group;
  const step: usize = isNibble(format) ? 8 : 16;
  const first = <usize>(from / group);
  const across = <usize>job.across;
  const by = f32x4.splat(factor);
  let c = task.c;
  for (let j = 0; j < task.n; j += 4) {
    const count = task.n - j;
    // Lines past the last are copies of the first.
    const one: usize = count > 1 ? 1 : 0, two: usize = count > 2 ? 2 : 0, three: usize = count > 3 ? 3 : 0;
    let p0 = codesAt(format, task.b + <usize>j * ldb, from);
    let p1 = p0 + one * ldb;
    let p2 = p0 + two * ldb;
    let p3 = p0 + three * ldb;
    // A scale serves one line.
    let g = <usize>(<i32>task.bias + j) * across + first;
    let s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    let x = digits;
    let sums = digits + SUMS_OFFSET;
    let end = (<i32>first + 1) * group;
    for (let i = from; i < to; ) {
      const stop = min(min(i + SEGMENT, end), to);
      let h0 = zero(), h1 = zero(), h2 = zero(), h3 = zero();
      let l0 = zero(), l1 = zero(), l2 = zero(), l3 = zero();
      for (; i < stop; i += 16) {
        let high = v128.load(x), low = v128.load(x, 16);
        let w = eightCodes(format, p0, false);
        h0 = i32x4.add(h0, i32x4.dot_i16x8_s(w, high));
        l0 = i32x4.add(l0, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p1, false);
        h1 = i32x4.add(h1, i32x4.dot_i16x8_s(w, high));
        l1 = i32x4.add(l1, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p2, false);
        h2 = i32x4.add(h2, i32x4.dot_i16x8_s(w, high));
        l2 = i32x4.add(l2, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p3, false);
        h3 = i32x4.add(h3, i32x4.dot_i16x8_s(w, high));
        l3 = i32x4.add(l3, i32x4.dot_i16x8_s(w, low));
        high = v128.load(x, 32);
        low = v128.load(x, 48);
        w = eightCodes(format, p0, true);
        h0 = i32x4.add(h0, i32x4.dot_i16x8_s(w, high));
        l0 = i32x4.add(l0, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p1, true);
        h1 = i32x4.add(h1, i32x4.dot_i16x8_s(w, high));
        l1 = i32x4.add(l1, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p2, true);
        h2 = i32x4.add(h2, i32x4.dot_i16x8_s(w, high));
        l2 = i32x4.add(l2, i32x4.dot_i16x8_s(w, low));
        w = eightCodes(format, p3, true);
        h3 = i32x4.add(h3, i32x4.dot_i16x8_s(w, high));
        l3 = i32x4.add(l3, i32x4.dot_i16x8_s(w, low));
        x += 64;
        p0 += step;
        p1 += step;
        p2 += step;
        p3 += step;
      }
      s0 = scaledDigits(format, job, g, sums, h0, l0, s0);
      s1 = scaledDigits(format, job, g + one * across, sums, h1, l1, s1);
      s2 = scaledDigits(format, job, g + two * across, sums, h2, l2, s2);
      s3 = scaledDigits(format, job, g + three * across, sums, h3, l3, s3);
      sums += 32;
      if (i == end) {
        end += group;
        g++;
      }
    }
    finish(c, f32x4.mul(sumLanes4(s0, s1, s2, s3), by), count, add);
    c += 16;
  }
}

/** The first or the second eight codes of a chunk; of nibbles, those of even or odd elements. */
@inline
function eightCodes(format: i32, p: usize, second: bool): v128 {
  if (!isNibble(format)) return second ? v128.load_ext<i8>(p, 8) : v128.load_ext<i8>(p);
  const pairs = v128.load_ext<u8>(p);
  return second ? i16x8.shr_u(pairs, 4) : v128.and(pairs, i16x8.splat(15));
}

function digitInt8(job: Stored, task: Task, from: i32, to: i32, digits: usize, factor: f32, add: bool): void {
  digitLines(INT8, job, task, from, to, digits, factor, add);
}
function digitInt8Zeros(job: Stored, task: Task, from: i32, to: i32, digits: usize, factor: f32, add: bool): void {
  digitLines(INT8_ZEROS, job, task, from, to, digits, factor, add);
}
function digitInt4(job: Stored, task: Task, from: i32, to: i32, digits: usize, factor: f32, add: bool): void {
  digitLines(INT4, job, task, from, to, digits, factor, add);
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
  const format = job.kind;
  // One row reads chunks of 16 within groups; what is left of a line is widened.
  const chunks = job.group % 16 == 0 || job.across == 1;
  if (format == MXFP4) {
    // To be looked up.
    for (let e = 0; e < 256; e++) store<f32>(scratch + ((<usize>e) << 2), powerOf(e));
  }
  // The row whose digits are in scratch, and what they are to be multiplied by.
  let known: usize = 0;
  let factor: f32 = 0;
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
      if (isFloatFormat(format)) {
        for (; i < whole; i += KD_FEW) {
          const end = min(whole, i + KD_FEW);
          if (format == MXFP4) dotMxfp4(constants, job, task, row, i, end, task.c, i > 0);
          else dotFp8(constants, job, task, row, i, end, task.c, i > 0);
        }
        i = whole;
      } else {
        while (i < whole) {
          const end = min(whole, i + KI);
          const x = row + ((<usize>i) << 2);
          if (known != x) {
            factor = digitize(format == INT4, x, end - i, scratch);
            const code = format == INT4 && !job.zeros ? 8 : 1;
            if (format != INT8) sumDigits(code, job.group, i, end, scratch, scratch + SUMS_OFFSET);
            known = x;
          }
          if (factor != factor) break; // no digits
          if (format == INT8) digitInt8(job, task, i, end, scratch, factor, i > 0);
          else if (format == INT8_ZEROS) digitInt8Zeros(job, task, i, end, scratch, factor, i > 0);
          else digitInt4(job, task, i, end, scratch, factor, i > 0);
          i = end;
        }
      }
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
