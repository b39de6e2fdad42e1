// Beyond the shared cases: exact values of every code, and that a row of a product depends on nothing but itself, its
// weights and how many rows stand beside it.
import type { Quantized, QuantizedFormat } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { create, type WasmBackend } from "../backend.ts";
import { call, f32, floats, type Host, ints, uniform, worst } from "../call.test-util.ts";
import { FEW_ROWS } from "./matmul.ts";

const every = Uint8Array.from({ length: 256 }, (_, i) => i);
const u8 = (data: Uint8Array, ...shape: readonly number[]): Host => ({ shape, dtype: "u8", data });

/** Code i of bytes, 8 or 4 bits wide. */
const codeAt = (format: QuantizedFormat, data: ArrayLike<number>, i: number): number =>
  format === "int8" || format === "fp8" ? (data[i] as number) : ((data[i >> 1] as number) >> (4 * (i & 1))) & 15;

/** What a code stands for, before its scale. */
function meaning(format: QuantizedFormat, code: number, zero: number | undefined): number {
  switch (format) {
    case "int8":
      return ((code << 24) >> 24) - (((zero ?? 0) << 24) >> 24);
    case "int4":
      return code - (zero ?? 8);
    case "mxfp4":
      return (code & 8 ? -1 : 1) * ([0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7] as number);
    case "fp8": {
      const [exponent, fraction] = [(code >> 3) & 15, (code & 7) / 8];
      if ((code & 127) === 127) return Number.NaN;
      return (code & 128 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -6 : (1 + fraction) * 2 ** (exponent - 7));
    }
    default:
      return format satisfies never;
  }
}

interface Weights {
  readonly attrs: Quantized;
  readonly codes: Host;
  readonly scales: Host;
  readonly zeros?: Host;
}
/** Reproducible weights [experts, lines, k], finite. */
function weights(attrs: Quantized, zeros: boolean, experts: number, lines: number, k: number): Weights {
  const { format, group, rows = 1 } = attrs;
  const perByte = format === "int4" || format === "mxfp4" ? 2 : 1;
  const noise = uniform(7, (experts * lines * k) / perByte).data;
  const codes = Uint8Array.from(noise, (x) => {
    const byte = Math.floor((x + 1) * 127.5);
    return format === "fp8" && (byte & 127) === 127 ? byte ^ 1 : byte;
  });
  const across = Math.ceil(k / group);
  const shape = [experts, Math.ceil(lines / rows), across] as const;
  const many = shape.reduce((n, d) => n * d, 1);
  const scales =
    format === "mxfp4"
      ? u8(
          Uint8Array.from({ length: many }, (_, i) => 120 + (i % 9)),
          ...shape,
        )
      : floats(
          uniform(9, many).data.map((x) => 0.01 + x / 200),
          ...shape,
        );
  return {
    attrs,
    codes: u8(codes, experts, lines, k / perByte),
    scales,
    ...(zeros
      ? {
          zeros: u8(
            Uint8Array.from({ length: many }, (_, i) => (i * 7) % 16),
            ...shape,
          ),
        }
      : {}),
  };
}
/** Line `line` of expert e times x, in double precision. */
function product({ attrs, codes, scales, zeros }: Weights, e: number, line: number, x: ArrayLike<number>): number {
  const { format, group, rows = 1 } = attrs;
  const lines = codes.shape[1] as number;
  const across = scales.shape[2] as number;
  let sum = 0;
  for (let p = 0; p < x.length; p++) {
    const at = (e * (scales.shape[1] as number) + Math.floor(line / rows)) * across + Math.floor(p / group);
    const stored = scales.data[at] as number;
    const scale = format === "mxfp4" ? 2 ** (stored - 127) : stored;
    const code = codeAt(format, codes.data, (e * lines + line) * x.length + p);
    sum += (x[p] as number) * meaning(format, code, zeros?.data[at]) * scale;
  }
  return sum;
}

const kinds: readonly (readonly [Quantized, boolean, number])[] = [
  [{ format: "int8", group: 32 }, false, 96],
  [{ format: "int8", group: 16 }, true, 96],
  [{ format: "int4", group: 32 }, false, 96],
  [{ format: "int4", group: 6 }, true, 90],
  [{ format: "mxfp4", group: 32 }, false, 96],
  [{ format: "fp8", group: 32, rows: 32 }, false, 101],
  [{ format: "fp8", group: 5, rows: 2 }, false, 37],
];

describe.each([
  ["relaxed", 1],
  ["plain", 1],
  ["relaxed", 2],
  ["plain", 2],
] as const)("weights of few bits, %s, %i threads", (variant, threads) => {
  let backend: WasmBackend;
  beforeAll(async () => {
    backend = await create({ threads, variant }, 0);
  });
  afterAll(() => backend.dispose());

  it.each<[QuantizedFormat, number]>([
    ["int8", 256],
    ["int4", 512],
    ["mxfp4", 512],
    ["fp8", 256],
  ])("%s: every code, to the last bit and the sign of zero", (format, n) => {
    const perLine = format === "mxfp4" ? 32 : n;
    const lines = n / perLine;
    for (const group of format === "mxfp4" ? [32] : [perLine, 2, 1]) {
      const many = lines * (perLine / group);
      const scales =
        format === "mxfp4"
          ? u8(new Uint8Array(many).fill(127), lines, 1)
          : floats(new Float32Array(many).fill(1), lines, many);
      const codes = u8(every, lines, (256 / n) * perLine);
      const [found] = call(backend, "dequantize", [codes, scales], [f32(lines, perLine)], { format, group });
      const expected = Array.from({ length: n }, (_, i) => meaning(format, codeAt(format, every, i), undefined));
      expect([...(found ?? [])]).toEqual(expected);
    }
  });

  it.each(kinds)("%o, zeros %s: products are those of the weights", (attrs, zeros, k) => {
    const w = weights(attrs, zeros, 4, 37, k);
    const ends = [1, 1, 1 + FEW_ROWS + 3, 9 + FEW_ROWS];
    const total = (ends.at(-1) as number) + 2;
    const rows = uniform(3, total, k);
    const inputs = [rows, w.codes, w.scales, ints(ends, 4), ...(w.zeros ? [w.zeros] : [])];
    const [found] = call(backend, "quantizedGroupedMatmul", inputs, [f32(total, 37)], attrs);
    const expected = Array.from({ length: total * 37 }, (_, i) => {
      const [row, line] = [Math.floor(i / 37), i % 37];
      const e = ends.findIndex((end) => row < end);
      return e < 0 ? 0 : product(w, e, line, rows.data.subarray(row * k, (row + 1) * k));
    });
    expect(worst(found ?? [], expected)).toBeLessThan(2e-6);
  });

  describe("one row of int8 and int4, which is summed as integers", () => {
    const lines = 6;
    /** Lines of the product of one row, and in double precision these and the sums of magnitudes. */
    const one = (w: Weights, x: Float32Array) => {
      const k = x.length;
      const parts = [w.codes, w.scales, ...(w.zeros ? [w.zeros] : [])].map((host) => ({
        ...host,
        shape: host.shape.slice(1),
      }));
      const [found] = call(backend, "quantizedLinear", [floats(x, 1, k), ...parts], [f32(1, lines)], w.attrs);
      const magnitudes = Float64Array.from(x, Math.abs);
      // No code differs by more than 255 from its zero.
      const most = Array.from({ length: lines }, () => magnitudes.reduce((sum, value) => sum + value, 0) * 255 * 0.015);
      return {
        found: [...(found ?? [])],
        exact: Array.from({ length: lines }, (_, line) => product(w, 0, line, x)),
        most,
      };
    };
    const forms: readonly (readonly [Quantized, boolean, number])[] = [
      [{ format: "int8", group: 48 }, false, 96],
      [{ format: "int8", group: 2080 }, true, 4160], // sums of more than 1024 are cut
      [{ format: "int8", group: 16_557 }, false, 16_557], // more than one block of digits, and a rest
      [{ format: "int8", group: 5 }, true, 45], // no whole chunks
      [{ format: "int4", group: 16 }, false, 16_400],
      [{ format: "int4", group: 1056 }, true, 2112],
      [{ format: "int4", group: 70 }, true, 70],
    ];
    it.each(forms)("%o, zeros %s, %i elements: elements of all sizes", (attrs, zeros, k) => {
      const w = weights(attrs, zeros, 1, lines, k);
      const noise = uniform(17, k).data;
      for (const [scale, outlier] of [
        [1, 1],
        [1, 3e4],
        [1e-41, 1],
        [3e34, 1],
        [0, 1],
      ] as const) {
        const x = Float32Array.from(noise, (value, i) => value * scale * (i % 29 === 3 ? outlier : 1));
        const { found, exact, most } = one(w, x);
        found.forEach((value, line) => {
          const bound = 1e-7 * (most[line] as number) + 2 ** -140;
          expect(Math.abs(value - (exact[line] as number))).toBeLessThanOrEqual(bound);
        });
      }
    });

    it.each([
      ["int8", 0x80, undefined, -128],
      ["int8", 0x80, 0x7f, -255],
      ["int8", 0x7f, 0x80, 255],
      ["int4", 0xff, undefined, 7],
      ["int4", 0x00, 15, -15],
    ] as const)("%s: sums of the largest codes (%i, zero %i) do not run over", (format, code, zero, value) => {
      const k = 4096;
      const line = format === "int4" ? k / 2 : k;
      const w: Weights = {
        attrs: { format, group: k },
        codes: u8(new Uint8Array(lines * line).fill(code), 1, lines, line),
        scales: floats(new Float32Array(lines).fill(1), 1, lines, 1),
        ...(zero === undefined ? {} : { zeros: u8(new Uint8Array(lines).fill(zero), 1, lines, 1) }),
      };
      // The lower digit of the last is -32768, its upper one as large as they get.
      for (const x of [1, -1, 1 - 2 ** -24, -(1 - 2 ** -24), 2 ** -15, 1 - 2 ** -15]) {
        const row = new Float32Array(k).fill(x);
        row[0] = Math.fround(1 - 2 ** -24);
        const exact = value * ((k - 1) * x + (row[0] as number));
        for (const found of one(w, row).found) expect(Math.abs(found / exact - 1)).toBeLessThan(3e-7);
      }
    });

    it.each(forms)("%o, zeros %s, %i elements: NaN and infinity", (attrs, zeros, k) => {
      const w = weights(attrs, zeros, 1, lines, k);
      for (const special of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
        for (const at of [0, k - 1]) {
          const x = Float32Array.from(uniform(19, k).data);
          x[at] = special;
          const { found, exact } = one(w, x);
          expect(found).toEqual(exact);
        }
      }
    });
  });

  it.each(kinds)("%o, zeros %s: an expert alone gives the bytes it gives among others", (attrs, zeros, k) => {
    const w = weights(attrs, zeros, 3, 41, k);
    // One row, a few, many.
    const sizes = [1, 5, FEW_ROWS + 4];
    const ends = sizes.map((_, e) => sizes.slice(0, e + 1).reduce((n, m) => n + m, 0));
    const total = ends[2] as number;
    const rows = uniform(5, total, k);
    const rest = (x: Host): readonly number[] => x.shape.slice(1);
    const inputs = [rows, w.codes, w.scales, ints(ends, 3), ...(w.zeros ? [w.zeros] : [])];
    const [together] = call(backend, "quantizedGroupedMatmul", inputs, [f32(total, 41)], attrs);
    const own = (x: Host, e: number): Host => {
      const n = x.data.length / 3;
      return { shape: rest(x), dtype: x.dtype, data: x.data.slice(e * n, (e + 1) * n) };
    };
    sizes.forEach((m, e) => {
      const from = (ends[e] as number) - m;
      const x = floats(rows.data.slice(from * k, (from + m) * k), m, k);
      const parts = [w.codes, w.scales, ...(w.zeros ? [w.zeros] : [])].map((part) => own(part, e));
      const [alone] = call(backend, "quantizedLinear", [x, ...parts], [f32(m, 41)], attrs);
      expect([...(alone ?? [])]).toEqual([...(together ?? []).slice(from * 41, (from + m) * 41)]);
    });
  });

  it.each(kinds)("%o, zeros %s: a row does not notice what its neighbours hold", (attrs, zeros, k) => {
    const w = weights(attrs, zeros, 1, 19, k);
    const parts = [w.codes, w.scales, ...(w.zeros ? [w.zeros] : [])].map((x) => ({ ...x, shape: x.shape.slice(1) }));
    for (const m of [2, 3, FEW_ROWS, FEW_ROWS + 1]) {
      const x = uniform(11, m, k);
      const other = floats(
        Float32Array.from(x.data, (value, i) => (i < k ? value : Number.NaN)),
        m,
        k,
      );
      const run = (rows: Host): number[] => [
        ...(call(backend, "quantizedLinear", [rows, ...parts], [f32(m, 19)], attrs)[0] ?? []).slice(0, 19),
      ];
      expect(run(other)).toEqual(run(x));
    }
  });
});

it.each(kinds)("%o, zeros %s: two threads give the bytes of one", async (attrs, zeros, k) => {
  const w = weights(attrs, zeros, 1, 301, k);
  const parts = [w.codes, w.scales, ...(w.zeros ? [w.zeros] : [])].map((x) => ({ ...x, shape: x.shape.slice(1) }));
  const [one, two] = [await create({ threads: 1 }, 0), await create({ threads: 2 }, 0)];
  for (const m of [1, 7, 60]) {
    const run = (on: WasmBackend): number[] => [
      ...(call(on, "quantizedLinear", [uniform(13, m, k), ...parts], [f32(m, 301)], attrs)[0] ?? []),
    ];
    expect(run(two)).toEqual(run(one));
  }
  for (const backend of [one, two]) backend.dispose();
});
