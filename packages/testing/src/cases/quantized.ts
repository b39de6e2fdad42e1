// Weights in few bits against bytes taken apart by hand: their values, and products that widen them.
import {
  dequantize,
  mul,
  type Quantized,
  type QuantizedFormat,
  quantizedGroupedMatmul,
  quantizedLinear,
  type Tensor,
} from "@switchyard/core";
import { bytes, floats, generator, type HostArray, integers, ints, sizeOf, uniform } from "../arrays.ts";
import * as oracle from "../oracles.ts";
import { type BackendCase, compare } from "./case.ts";

const formats: readonly QuantizedFormat[] = ["int8", "int4", "mxfp4"];

/** The stored weights among the inputs of a case, which start with `before` others. Zeros come last. */
function take<T>(xs: readonly T[], before: number, zeros: boolean): { codes: T; scales: T; zeros?: T } {
  const get = (i: number): T => {
    const x = xs[i];
    if (x === undefined) throw new RangeError(`case: input ${i} is missing`);
    return x;
  };
  const codes = get(before);
  const scales = get(before + 1);
  return zeros ? { codes, scales, zeros: get(xs.length - 1) } : { codes, scales };
}
const input = <T>(xs: readonly T[], i: number): T => {
  const x = xs[i];
  if (x === undefined) throw new RangeError(`case: input ${i} is missing`);
  return x;
};

interface Arrays {
  readonly codes: HostArray;
  readonly scales: HostArray;
  readonly zeros?: HostArray;
}
/** Codes of every value (of fp8, finite ones) and scales of both signs for weights of `shape`, values up to about 6. */
function draw(key: string, shape: readonly number[], { format, group, rows = 1 }: Quantized, zeros: boolean): Arrays {
  const next = generator(`quantised ${key}`);
  const inner = shape.at(-1) ?? 0;
  const lead = shape.slice(0, -1);
  const stored = [...lead, format === "int8" || format === "fp8" ? inner : inner / 2];
  const perGroup = [...shape.slice(0, -2), Math.ceil((shape.at(-2) ?? 0) / rows), Math.ceil(inner / group)];
  const byte = (at: readonly number[], from: number, to: number): HostArray =>
    bytes(at, integers(next, at, from, to).data);
  const codes = byte(stored, 0, 256);
  if (format === "fp8") {
    const finite = bytes(
      stored,
      Uint8Array.from(codes.data, (code) => ((code & 0x7f) === 0x7f ? code ^ 1 : code)),
    );
    return { codes: finite, scales: uniform(next, perGroup, -0.02, 0.02) };
  }
  const most = format === "int8" ? 0.05 : 0.4;
  const scales = format === "mxfp4" ? byte(perGroup, 121, 129) : uniform(next, perGroup, -most, most);
  if (!zeros) return { codes, scales };
  return { codes, scales, zeros: byte(perGroup, 0, format === "int8" ? 256 : 16) };
}

const label = (format: QuantizedFormat, group: number, zeros: boolean, rows = 1): string =>
  `${format} by ${rows > 1 ? `${rows}x` : ""}${group}${zeros ? " with zeros" : ""}`;
const howOf = (format: QuantizedFormat, group: number, rows: number): Quantized =>
  format === "fp8" ? { format, group, rows } : { format, group };

// ---------------------------------------------------------------- values
function value(name: string, attrs: Quantized, arrays: Arrays, times = 1, gradient?: readonly number[]): BackendCase[] {
  const zeros = arrays.zeros !== undefined;
  const scaled = (y: Tensor): Tensor => (times === 1 ? y : mul(y, times));
  return compare(`dequantize/${name}`, {
    inputs: [arrays.codes, arrays.scales, ...(arrays.zeros ? [arrays.zeros] : [])],
    run: (xs) => scaled(dequantize({ ...attrs, ...take(xs, 0, zeros) })),
    expect: (xs) => {
      const y = oracle.dequantize({ ...attrs, ...take(xs, 0, zeros) });
      return oracle.unary(y, (x) => x * times);
    },
    ...(gradient ? { gradient } : {}),
  });
}

function values(): BackendCase[] {
  const shapes: readonly (readonly [QuantizedFormat, readonly number[], number, boolean, number?])[] = [
    ["int8", [3, 32], 32, false],
    ["int8", [5, 96], 32, true],
    ["int8", [2, 3, 64], 16, true],
    ["int8", [3, 7], 7, false],
    ["int8", [7, 3], 1, true],
    ["int8", [1, 1], 1, false],
    ["int8", [0, 32], 32, true],
    ["int8", [0, 3, 32], 32, false],
    ["int8", [3, 0], 32, false],
    ["int4", [3, 32], 32, false],
    ["int4", [5, 96], 32, true],
    ["int4", [2, 3, 64], 64, true],
    ["int4", [3, 2], 2, false],
    // A group ends inside a byte, a row inside a word.
    ["int4", [5, 6], 3, true],
    ["int4", [0, 32], 32, true],
    ["int4", [0, 3, 32], 16, false],
    ["mxfp4", [1, 32], 32, false],
    ["mxfp4", [3, 96], 32, false],
    ["mxfp4", [2, 3, 64], 32, false],
    ["mxfp4", [0, 32], 32, false],
    ["mxfp4", [0, 3, 64], 32, false],
    ["fp8", [1, 1], 1, false],
    ["fp8", [3, 7], 7, false],
    ["fp8", [5, 9], 2, false, 3],
    // Blocks that end inside the matrix, along both sides.
    ["fp8", [7, 45], 32, false, 32],
    ["fp8", [33, 65], 32, false, 32],
    ["fp8", [2, 37, 64], 32, false, 32],
    ["fp8", [0, 32], 32, false, 32],
    ["fp8", [0, 3, 32], 32, false, 2],
    ["fp8", [3, 0], 32, false, 32],
  ];
  const all = Uint8Array.from({ length: 256 }, (_, i) => i);
  const next = generator("every byte");
  const scales = uniform(next, [4, 2], 0.01, 0.02);
  const every = (attrs: Quantized): BackendCase[] =>
    attrs.format === "mxfp4"
      ? value("mxfp4 every byte 4x128", attrs, {
          codes: bytes([4, 64], all),
          scales: bytes(
            [4, 4],
            all.subarray(0, 16).map((i) => 116 + i),
          ),
        })
      : [false, true].flatMap((zeros) =>
          value(`${attrs.format} every byte ${zeros ? "with zeros " : ""}4x${attrs.group * 2}`, attrs, {
            codes: bytes([4, 64], all),
            scales,
            ...(zeros
              ? {
                  zeros: bytes(
                    [4, 2],
                    attrs.format === "int8" ? [0, 1, 127, 128, 129, 200, 254, 255] : [0, 1, 7, 8, 9, 14, 15, 3],
                  ),
                }
              : {}),
          }),
        );
  return [
    ...shapes.flatMap(([format, shape, group, zeros, lines = 1]) => {
      const name = `${label(format, group, zeros, lines)} ${shape.join("x")}`;
      const gradient = format !== "mxfp4" && sizeOf(shape) <= 45 ? [1] : undefined;
      const attrs = howOf(format, group, lines);
      return value(name, attrs, draw(name, shape, attrs, zeros), 1, gradient);
    }),
    ...value(
      "fp8 every byte 4x64",
      { format: "fp8", group: 64 },
      { codes: bytes([4, 64], all), scales: floats([4, 1], [1, -0.5, 2 ** -9, 3]) },
    ),
    ...every({ format: "int8", group: 32 }),
    ...every({ format: "int4", group: 64 }),
    ...every({ format: "mxfp4", group: 32 }),
    ...exponents(),
  ];
}

/** One exponent at a time, scaled to about 1: products of powers of two are exact. */
function exponents(): BackendCase[] {
  const attrs: Quantized = { format: "mxfp4", group: 32 };
  /** The first eight without a sign, the others with one. */
  const pick = (from: readonly number[], i: number): number => input(from, i % from.length) | (i < 8 ? 0 : 8);
  const one = (exponent: number, nibbles: readonly number[], times: number): BackendCase[] => {
    const codes = Uint8Array.from({ length: 16 }, (_, i) => pick(nibbles, i) | (pick(nibbles, 15 - i) << 4));
    const arrays = { codes: bytes([1, 16], codes), scales: bytes([1, 1], [exponent]) };
    return value(`mxfp4 exponent ${exponent} 1x32`, attrs, arrays, times);
  };
  const magnitudes = [0, 1, 2, 3, 4, 5, 6, 7];
  return [
    // Results below 2^-126 may be flushed to 0: these exponents are asked for normal ones only.
    ...one(0, [0, 4, 5, 6, 7], 2 ** 126),
    ...one(1, [0, 2, 3, 4, 5, 6, 7], 2 ** 126),
    ...[2, 63, 64, 126, 127, 128, 191, 252].flatMap((e) => one(e, magnitudes, 2 ** Math.max(127 - e, -126))),
    // And these for finite ones.
    ...one(253, [0, 1, 2, 3, 4, 5], 2 ** -126),
    ...one(254, [0, 1, 2, 3], 2 ** -126),
    ...value("mxfp4 exponent 255 is NaN 1x64", attrs, {
      codes: bytes(
        [1, 32],
        Uint8Array.from({ length: 32 }, (_, i) => i * 7),
      ),
      scales: bytes([1, 2], [255, 127]),
    }),
  ];
}

// ---------------------------------------------------------------- products
function linears(): BackendCase[] {
  /** x, out, group; zeros where the format has them. */
  const table: readonly (readonly [readonly number[], number, number, boolean])[] = [
    [[1, 32], 33, 32, false],
    [[1, 96], 7, 32, true],
    [[3, 64], 7, 32, true],
    [[3, 32], 1, 32, false],
    [[17, 96], 33, 32, false],
    [[17, 160], 1, 32, true],
    [[1, 160], 33, 32, false],
    [[0, 32], 7, 32, true],
    [[64], 7, 32, true],
    [[2, 3, 64], 33, 32, false],
    [[3, 160], 0, 32, false],
  ];
  const wide: readonly (readonly [readonly number[], number, number, boolean])[] = [
    [[3, 64], 7, 64, true],
    [[1, 96], 33, 96, false],
    [[17, 128], 7, 16, true],
    [[2, 34], 5, 2, true],
  ];
  /** Groups that are no multiple of a vector, lines that are none of a group (fp8 alone), one row and a few. */
  const odd: readonly (readonly [QuantizedFormat, readonly number[], number, number, boolean, number?])[] = [
    ["int8", [1, 7], 5, 7, true],
    ["int8", [2, 33], 3, 11, false],
    ["int8", [1, 2064], 3, 2064, true],
    ["int4", [1, 30], 3, 3, true],
    ["int4", [1, 50], 6, 50, false],
    ["int4", [1, 2080], 5, 2080, true],
    ["int4", [25, 48], 9, 16, true],
    ["mxfp4", [1, 2080], 5, 32, false],
    ["fp8", [1, 1], 1, 1, false],
    ["fp8", [1, 13], 7, 32, false, 32],
    ["fp8", [1, 45], 33, 32, false, 32],
    ["fp8", [1, 2071], 5, 128, false, 128],
    ["fp8", [1, 45], 5, 7, false, 2],
    ["fp8", [2, 45], 37, 32, false, 32],
    ["fp8", [3, 97], 67, 32, false, 32],
    ["fp8", [25, 67], 41, 32, false, 32],
    ["fp8", [26, 300], 9, 128, false, 128],
    ["fp8", [0, 45], 5, 32, false, 32],
    ["fp8", [3, 45], 0, 32, false, 32],
    ["fp8", [2, 0], 5, 32, false, 32],
    ["fp8", [31], 1, 32, false, 32],
  ];
  const sizes = [
    ...formats.flatMap((format) =>
      [...table, ...(format === "mxfp4" ? [] : wide)].map(([shape, out, group, offset]) => {
        return [format, shape, out, group, offset && format !== "mxfp4"] as const;
      }),
    ),
    ...odd,
  ];
  const products = sizes.flatMap(([format, shape, out, group, zeros, lines = 1]) => {
    const inner = shape.at(-1) ?? 0;
    const name = `${label(format, group, zeros, lines)} ${shape.join("x")} to ${out}`;
    const attrs = howOf(format, group, lines);
    const arrays = draw(name, [out, inner], attrs, zeros);
    const work = sizeOf(shape) ** 2 * out;
    return compare(`quantizedLinear/${name}`, {
      inputs: [
        uniform(generator(name), shape, -1, 1),
        arrays.codes,
        arrays.scales,
        ...(arrays.zeros ? [arrays.zeros] : []),
      ],
      run: (xs) => quantizedLinear(input(xs, 0), { ...attrs, ...take(xs, 1, zeros) }),
      expect: (xs) => oracle.quantizedLinear(input(xs, 0), { ...attrs, ...take(xs, 1, zeros) }),
      ...(work <= 300_000 ? { gradient: work <= 40_000 && format !== "mxfp4" ? [0, 2] : [0] } : {}),
      slack: 2,
    });
  });
  return products;
}

function grouped(): BackendCase[] {
  const blocks: readonly (readonly [string, number, readonly number[]])[] = [
    ["values", 7, [2, 3, 7]],
    ["an expert without rows", 6, [2, 2, 6]],
    ["all to one", 5, [0, 5, 5]],
    ["rows beyond the ends", 8, [1, 3, 5]],
    ["one row each", 4, [1, 2, 3, 4]],
    ["no rows taken", 4, [0, 0]],
    ["no rows", 0, [0, 0, 0]],
    ["one expert", 3, [3]],
    ["more rows than a tile", 41, [1, 18, 18, 37]],
  ];
  /** in, out, group, zeros where the format has them; taken in turn. */
  const sizes: readonly (readonly [number, number, number, boolean])[] = [
    [32, 7, 32, false],
    [64, 33, 32, true],
    [96, 1, 32, false],
    [32, 5, 16, true],
  ];
  /** Those of fp8, with lines that share a scale. */
  const partial: readonly (readonly [number, number, number, boolean, number])[] = [
    [45, 7, 32, false, 32],
    [64, 33, 32, false, 32],
    [97, 5, 128, false, 2],
    [13, 1, 4, false, 1],
  ];
  return [...formats, "fp8" as const].flatMap((format, turn) =>
    blocks.flatMap(([what, n, closed], i) => {
      const own = format === "fp8" ? partial : sizes.map((size) => [...size, 1] as const);
      const [inner, out, asked, offset, lines] = input(own, (i + turn) % own.length);
      const group = format === "mxfp4" ? 32 : asked;
      const zeros = offset && format !== "mxfp4";
      const attrs = howOf(format, group, lines);
      const name = `${label(format, group, zeros, lines)} ${what} ${n}x${inner} to ${out}`;
      const arrays = draw(name, [closed.length, out, inner], attrs, zeros);
      const ends = ints([closed.length], closed);
      const rows = uniform(generator(name), [n, inner], -1, 1);
      const run = (xs: readonly Tensor[]): Tensor =>
        quantizedGroupedMatmul(input(xs, 0), { ...attrs, ...take(xs, 1, zeros) }, input(xs, 3));
      const expect = (xs: readonly HostArray[]): HostArray =>
        oracle.quantizedGroupedMatmul(input(xs, 0), { ...attrs, ...take(xs, 1, zeros) }, input(xs, 3));
      const inputs = [rows, arrays.codes, arrays.scales, ends, ...(arrays.zeros ? [arrays.zeros] : [])];
      const work = (n * inner) ** 2 * out;
      const behind = closed.at(-1) ?? 0;
      const poisoned = floats(rows.shape, rows.data);
      poisoned.data.fill(Number.NaN, behind * inner);
      return [
        ...compare(`quantizedGroupedMatmul/${name}`, {
          inputs,
          run,
          expect,
          ...(work > 0 && work <= 300_000 ? { gradient: [0] } : {}),
          slack: 2,
        }),
        ...(behind < n
          ? compare(`quantizedGroupedMatmul/NaN, ${name}`, {
              inputs: [poisoned, ...inputs.slice(1)],
              run,
              expect,
              slack: 2,
            })
          : []),
      ];
    }),
  );
}

export const quantizedCases = (): BackendCase[] => [...values(), ...linears(), ...grouped()];
