// What the conformance cases of the testing package do not ask: refusals, engines with and without kernels, gradients
// of scales, counting.
import { describe, expect, it } from "vitest";
import type { Backend } from "../backend.ts";
import { cpu } from "../cpu/backend.ts";
import type { CpuHandle } from "../cpu/storage.ts";
import {
  autodiff,
  counted,
  dequantize,
  dequantizeOp,
  type Engine,
  engine,
  grad,
  groupedMatmul,
  linear,
  mean,
  type QuantizedFormat,
  type QuantizedWeights,
  quantizedGroupedMatmul,
  quantizedLinear,
  quantizedLinearOp,
  ShapeError,
  type Tensor,
  watch,
} from "../index.ts";

const list = async (x: Tensor): Promise<number[]> => [...(await x.data())];
const bytes = (on: Engine, shape: readonly number[], step = 37): Tensor =>
  on.tensor(
    Uint8Array.from({ length: shape.reduce((n, d) => n * d, 1) }, (_, i) => i * step + 3),
    shape,
  );
const floats = (on: Engine, shape: readonly number[]): Tensor =>
  on.tensor(
    Float32Array.from({ length: shape.reduce((n, d) => n * d, 1) }, (_, i) => Math.sin(1 + i) / 8),
    shape,
  );

describe("stored weights", () => {
  it("are worked out by hand", async () => {
    const on = engine(cpu());
    const codes = on.tensor(Uint8Array.of(0x12, 0xf8), [1, 2]);
    const half = on.tensor(Float32Array.of(0.5), [1, 1]);
    const zeros = on.tensor(Uint8Array.of(2), [1, 1]);
    const int4 = { format: "int4", group: 4, codes, scales: half } as const;
    expect(await list(dequantize(int4))).toEqual([-3, -3.5, 0, 3.5]);
    expect(await list(dequantize({ ...int4, zeros }))).toEqual([0, -0.5, 3, 6.5]);
    const int8 = { format: "int8", group: 1, codes, scales: on.tensor(Float32Array.of(1, 2), [1, 2]) } as const;
    expect(await list(dequantize(int8))).toEqual([18, -16]);
    const minus = on.tensor(Uint8Array.of(254, 1), [1, 2]);
    expect(await list(dequantize({ ...int8, zeros: minus }))).toEqual([20, -18]);
    const block = on.tensor(Uint8Array.of(0x12, 0xf8, ...new Uint8Array(14)), [1, 16]);
    const mxfp4 = { format: "mxfp4", group: 32, codes: block, scales: on.tensor(Uint8Array.of(128), [1, 1]) } as const;
    expect((await list(dequantize(mxfp4))).slice(0, 4)).toEqual([2, 1, -0, -12]);
  });

  it("of fp8 have a scale per block, the last ones cut off", async () => {
    const on = engine(cpu());
    // 1, -1, 1.125, 2^-9, 0, 448; twice, the second line and half of the third in blocks of their own.
    const line = [0x38, 0xb8, 0x39, 0x01, 0x00];
    const codes = on.tensor(Uint8Array.of(...line, ...line, ...line.slice(0, 4), 0x7e), [3, 5]);
    const scales = on.tensor(Float32Array.of(1, 2, 4, 0.5, 3, -1), [2, 3]);
    const found = await list(dequantize({ format: "fp8", group: 2, rows: 2, codes, scales }));
    expect(found).toEqual([
      ...[1, -1, 2.25, 2 ** -8, 0, 1, -1, 2.25, 2 ** -8, 0],
      ...[0.5, -0.5, 3.375, 3 * 2 ** -9, -448],
    ]);
    const nan = on.tensor(Uint8Array.of(0x7f, 0xff, 0x80), [1, 3]);
    const three = { format: "fp8", group: 3, codes: nan, scales: on.tensor(Float32Array.of(1), [1, 1]) } as const;
    expect(await list(dequantize(three))).toEqual([Number.NaN, Number.NaN, -0]);
  });

  it("of exponent 0 keep every bit where the device has subnormals", async () => {
    const on = engine(cpu());
    const codes = on.tensor(
      Uint8Array.from({ length: 16 }, (_, i) => i),
      [1, 16],
    );
    const small = dequantize({ format: "mxfp4", group: 32, codes, scales: on.tensor(Uint8Array.of(0), [1, 1]) });
    const even = (await list(small)).filter((_, i) => i % 2 === 0);
    const e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
    expect(even).toEqual([...e2m1, ...e2m1.map((x) => -x)].map((x) => x * 2 ** -127));
  });

  it("leave no tensor behind", () => {
    const on = engine(cpu());
    const w = { format: "int4", group: 32, codes: bytes(on, [2, 3, 16]), scales: floats(on, [2, 3, 1]) } as const;
    const rows = floats(on, [4, 32]);
    const ends = on.tensor(Int32Array.of(1, 3), [2]);
    const before = on.live();
    quantizedGroupedMatmul(rows, w, ends).dispose();
    dequantize(w).dispose();
    expect(on.live()).toBe(before);
  });
});

describe("refusals", () => {
  const on = engine(cpu());
  const w = (format: QuantizedFormat, group: number, codes: number[], scales: number[]): QuantizedWeights => ({
    format,
    group,
    codes: bytes(on, codes),
    scales: format === "mxfp4" ? bytes(on, scales) : floats(on, scales),
  });
  const x = (...shape: number[]) => floats(on, shape);
  const ends = on.tensor(Int32Array.of(1, 2), [2]);
  const good = w("int4", 32, [7, 32], [7, 2]);
  const cases: [string, () => Tensor, string][] = [
    [
      "a group that does not divide in",
      () => dequantize(w("int8", 24, [7, 64], [7, 2])),
      "dequantize of int8 in groups of 24: the group must divide in = 64: u8 [7, 64] x f32 [7, 2]",
    ],
    ["a group of nothing", () => dequantize(w("int8", 0, [7, 64], [7, 2])), "a whole number from 1 up"],
    ["half a group", () => dequantize(w("int8", 1.5, [7, 3], [7, 2])), "a whole number from 1 up"],
    [
      "MXFP4 in other groups",
      () => dequantize(w("mxfp4", 16, [7, 16], [7, 2])),
      "dequantize of mxfp4 in groups of 16: mxfp4 has groups of 32: u8 [7, 16] x u8 [7, 2]",
    ],
    ["too few scales", () => dequantize(w("int4", 16, [7, 32], [7, 2])), "scales must be f32 [7, 4], found f32 [7, 2]"],
    [
      "MXFP4 scales that are numbers",
      () => dequantize({ ...w("mxfp4", 32, [7, 16], [7, 1]), scales: x(7, 1) }),
      "scales must be u8 [7, 1], found f32 [7, 1]",
    ],
    [
      "codes that are numbers",
      () => dequantize({ ...good, codes: x(7, 32) }),
      "codes must be u8 [..., out, in], found f32 [7, 32]",
    ],
    ["one row without a dimension of its own", () => dequantize(w("int8", 7, [7], [1])), "found u8 [7]"],
    [
      "zeros of another shape",
      () => dequantize({ ...good, zeros: bytes(on, [7, 1]) }),
      "zeros must be u8 [7, 2], found u8 [7, 1]",
    ],
    ["zeros that are numbers", () => dequantize({ ...good, zeros: x(7, 2) }), "zeros must be u8 [7, 2], found f32"],
    [
      "zeros of MXFP4",
      () => dequantize({ ...w("mxfp4", 32, [7, 16], [7, 1]), zeros: bytes(on, [7, 1]) }),
      "mxfp4 has no zeros",
    ],
    [
      "too few scales of fp8",
      () => dequantize({ ...w("fp8", 32, [7, 45], [1, 1]), rows: 32 }),
      "dequantize of fp8 in blocks of 32 x 32: scales must be f32 [1, 2], found f32 [1, 1]: u8 [7, 45] x f32 [1, 1]",
    ],
    [
      "blocks without lines",
      () => dequantize({ ...w("fp8", 32, [7, 32], [7, 1]), rows: 0 }),
      "rows must be a whole number from 1 up, not 0",
    ],
    [
      "blocks of int8",
      () => dequantize({ ...w("int8", 32, [7, 32], [1, 1]), rows: 7 }),
      "only fp8 has a scale for 7 rows",
    ],
    [
      "zeros of fp8",
      () => dequantize({ ...w("fp8", 32, [7, 32], [7, 1]), zeros: bytes(on, [7, 1]) }),
      "fp8 has no zeros",
    ],
    [
      "an unknown format",
      () => dequantize({ ...good, format: "nf4" as "int4" }),
      "dequantize of nf4 in groups of 32: the format must be one of int8, int4, mxfp4, fp8",
    ],
    [
      "x of another width",
      () => quantizedLinear(x(3, 32), good),
      "quantizedLinear: inner sizes differ: f32 [3, 32] has 32, the weights have 64: f32 [3, 32] x u8 [7, 32]",
    ],
    [
      "an odd in",
      () => quantizedLinear(x(3, 63), good),
      "has 63, the weights have 64; int4 holds two elements per byte and needs an even in",
    ],
    ["a number", () => quantizedLinear(x(), good), "x [..., in] x codes of [out, in]"],
    ["stacked weights", () => quantizedLinear(x(3, 64), w("int8", 64, [2, 7, 64], [2, 7, 1])), "codes of [out, in]"],
    ["rows of bytes", () => quantizedLinear(bytes(on, [3, 64]), good), "input 0 must be f32"],
    [
      "one end too many",
      () => quantizedGroupedMatmul(x(3, 64), w("int8", 64, [3, 7, 64], [3, 7, 1]), ends),
      "quantizedGroupedMatmul: one end per expert: f32 [3, 64] x u8 [3, 7, 64] x f32 [3, 7, 1] x i32 [2]",
    ],
    [
      "rows of another width",
      () => quantizedGroupedMatmul(x(3, 32), w("int8", 64, [2, 7, 64], [2, 7, 1]), ends),
      "quantizedGroupedMatmul: inner sizes differ: f32 [3, 32] has 32, the weights have 64",
    ],
    ["experts in one matrix", () => quantizedGroupedMatmul(x(3, 64), good, ends), "input 1 must have 3 dimensions"],
  ];
  it.each(cases)("%s", (_, attempt, message) => {
    expect(attempt).toThrow(ShapeError);
    expect(attempt).toThrow(message);
  });
});

describe("engines", () => {
  /** A backend that has a kernel for the product of rows, made of the reference's own ops. */
  const withKernel = (seen: unknown[]): Backend<CpuHandle> => {
    const backend = cpu();
    return {
      ...backend,
      kernels: {
        ...backend.kernels,
        quantizedLinear: Object.assign(
          (inputs: readonly unknown[], [y]: readonly { readonly shape: readonly number[] }[], attrs: unknown) => {
            seen.push(inputs.length, attrs);
            return [backend.upload(new Float32Array(6).fill(7), { shape: y?.shape ?? [], dtype: "f32" })];
          },
          {
            unsupported: (_: unknown, { format }: { format: string }) => (format === "mxfp4" ? "no mxfp4" : undefined),
          },
        ),
      },
    };
  };

  it("use a kernel of the op's name, and the fallback where it refuses", async () => {
    const seen: unknown[] = [];
    const on = engine(withKernel(seen));
    const x = floats(on, [2, 32]);
    const int4: QuantizedWeights = { format: "int4", group: 16, codes: bytes(on, [3, 16]), scales: floats(on, [3, 2]) };
    expect(await list(quantizedLinear(x, int4))).toEqual([7, 7, 7, 7, 7, 7]);
    await list(quantizedLinear(x, { ...int4, zeros: bytes(on, [3, 2], 1) }));
    expect(seen).toEqual([3, { format: "int4", group: 16 }, 4, { format: "int4", group: 16 }]);
    const codes = bytes(on, [3, 16]);
    const mxfp4: QuantizedWeights = { format: "mxfp4", group: 32, codes, scales: bytes(on, [3, 1], 1) };
    expect(on.explain(quantizedLinearOp, [x, codes, mxfp4.scales], mxfp4)).toBe("fallback: no mxfp4");
    const expected = linear(x, dequantize(mxfp4));
    expect(await list(quantizedLinear(x, mxfp4))).toEqual(await list(expected));
    expect(on.explain(dequantizeOp, [codes, mxfp4.scales], mxfp4)).toBe('fallback: cpu has no kernel "dequantize"');
  });

  it("differentiate x alone, or scales too", async () => {
    const root = engine(cpu({ precision: 64 }));
    const codes = bytes(root, [2, 3, 4]);
    const ends = root.tensor(Int32Array.of(1, 3), [2]);
    for (const watched of ["rows", "both"] as const) {
      const on = autodiff(root);
      const [rows, scales] = [floats(on, [4, 8]), watched === "both" ? floats(on, [2, 3, 2]) : floats(root, [2, 3, 2])];
      const w: QuantizedWeights = { format: "int4", group: 4, codes, scales };
      const found = grad(mean(quantizedGroupedMatmul(rows, w, ends)), {
        rows,
        ...(scales.engine === on ? { scales } : {}),
      });
      const expected = grad(mean(groupedMatmul(rows, dequantize(w), ends)), found.scales ? { rows, scales } : { rows });
      const [a, b] = [await list(found.rows), await list(expected.rows)];
      a.forEach((x, i) => void expect(x).toBeCloseTo(b[i] as number, 12));
      if (watched === "rows") continue;
      const [c, d] = [await list(found.scales as Tensor), await list((expected as typeof found).scales as Tensor)];
      expect(Math.max(...c.map(Math.abs))).toBeGreaterThan(0.01);
      c.forEach((x, i) => void expect(x).toBeCloseTo(d[i] as number, 12));
    }
    const on = autodiff(root);
    const blocks = { format: "fp8", group: 4, rows: 2, codes: bytes(root, [3, 7], 5) } as const;
    const [few, spread] = [floats(on, [2, 2]), floats(root, [4, 7])];
    const { scales: slopes } = grad(mean(quantizedLinear(spread, { ...blocks, scales: few })), { scales: few });
    const values = dequantize({ ...blocks, scales: root.tensor(new Float32Array(4).fill(1), [2, 2]) });
    const [plain, rows] = [await list(values), await list(spread)];
    const byHand = [0, 0, 0, 0];
    for (let i = 0; i < 21; i++) {
      const at = 2 * Math.floor(i / 14) + Math.floor((i % 7) / 4);
      for (let row = 0; row < 4; row++)
        byHand[at] = (byHand[at] ?? 0) + ((plain[i] as number) * (rows[7 * row + (i % 7)] as number)) / 12;
    }
    (await list(slopes as Tensor)).forEach((value, i) => void expect(value).toBeCloseTo(byHand[i] as number, 12));
    const x = watch(on, floats(root, [8]));
    const w = { format: "int8", group: 8, codes: bytes(root, [3, 8]), scales: floats(root, [3, 1]) } as const;
    const { x: slope } = grad(mean(quantizedLinear(x, w)), { x });
    const { x: same } = grad(mean(linear(x, dequantize(w))), { x });
    const expected = await list(same);
    (await list(slope)).forEach((value, i) => void expect(value).toBeCloseTo(expected[i] as number, 12));
  });

  it("count the work of the product and the bytes as they are stored", async () => {
    const root = engine(cpu());
    const c = counted(root);
    const codes = bytes(c, [2, 7, 32]);
    const scales = floats(c, [2, 7, 2]);
    const ends = c.tensor(Int32Array.of(1, 4), [2]);
    quantizedGroupedMatmul(floats(c, [5, 64]), { format: "int4", group: 32, codes, scales }, ends);
    const flat: QuantizedWeights = { format: "int8", group: 64, codes: bytes(c, [7, 64]), scales: floats(c, [7, 1]) };
    quantizedLinear(floats(c, [5, 64]), flat);
    await c.settle();
    expect(c.counts.get("quantizedGroupedMatmul")).toEqual({
      calls: 1,
      flops: 4 * 2 * 64 * 7,
      bytes: 4 * 5 * 64 + 2 * 7 * 32 + 4 * 28 + 8 + 4 * 5 * 7,
    });
    expect(c.counts.get("quantizedLinear")).toEqual({
      calls: 1,
      flops: 2 * 5 * 64 * 7,
      bytes: 4 * 5 * 64 + 7 * 64 + 4 * 7 + 4 * 5 * 7,
    });
    expect(c.counts.has("linear")).toBe(false);
  });
});
