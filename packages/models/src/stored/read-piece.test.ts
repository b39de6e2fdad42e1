// Pieces of checkpoints in every form and every way of lying there, against naive decoders; how much of a file is read for them; and
// every way in which a form can be malformed, refused by name before it is read.
import { CheckpointError, dequantize, dispose, engine, type QuantizedWeights } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { Piece } from "../source.ts";
import { bytesOfHost, type HostCodes, type HostMatrix } from "./host-matrix.ts";
import { checkPiece, pieceNames, readPiece } from "./read-piece.ts";
import {
  type Config,
  checkpointOf,
  draws,
  element,
  microscaled,
  packedCode,
  type RawTensor,
  type RawTensors,
  sameNumbers,
  wellFormed,
} from "./stored.test-util.ts";
import { planUpload } from "./upload.ts";
import { widen } from "./widen.ts";

const ceil = (n: number, d: number): number => Math.ceil(n / d);
const elementBytes: Readonly<Record<string, number>> = { F64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, I64: 8 };
const raw = (draw: ReturnType<typeof draws>, dtype: string, ...shape: number[]): RawTensor => ({
  dtype,
  shape,
  bytes: draw.bits((elementBytes[dtype] ?? 1) * shape.reduce((n, d) => n * d, 1)),
});
/** Numbers of a usual size: random bits would be huge, and products of theirs infinite. */
const scales = (draw: ReturnType<typeof draws>, dtype: string, ...shape: number[]): RawTensor => {
  const n = shape.reduce((product, d) => product * d, 1);
  const values = Float32Array.from({ length: n }, () => (1 + draw.below(1000)) / 512);
  if (dtype === "F32") return { dtype, shape, bytes: new Uint8Array(values.buffer) };
  if (dtype === "F8_E8M0") return { dtype, shape, bytes: Uint8Array.from(values, () => 120 + draw.below(16)) };
  const half = (x: number): number => {
    const exponent = Math.floor(Math.log2(x));
    const [bias, bits] = dtype === "F16" ? [15, 10] : [127, 7];
    return (exponent + bias) * 2 ** bits + Math.floor((x / 2 ** exponent - 1) * 2 ** bits);
  };
  return { dtype, shape, bytes: new Uint8Array(Uint16Array.from(values, half).buffer) };
};
const size = (...values: number[]): RawTensor => ({
  dtype: "I64",
  shape: [values.length],
  bytes: new Uint8Array(BigInt64Array.from(values, BigInt).buffer),
});

const compressed = (weights: Config, more: Config = {}): Config => ({
  quantization_config: {
    quant_method: "compressed-tensors",
    format: "pack-quantized",
    config_groups: { group_0: { targets: ["Linear"], weights } },
    ...more,
  },
});
const fp8 = (block: readonly number[] | null): Config => ({
  quantization_config: { quant_method: "fp8", fmt: "e4m3", weight_block_size: block },
});
const mxfp4: Config = { quantization_config: { quant_method: "mxfp4" } };

/** A stored matrix [entries?][rows, in] and the number that stands for each of its elements. */
interface Stored {
  readonly tensors: RawTensors;
  readonly config: Config;
  at(entry: number, row: number, column: number): number;
  readonly form: RegExp;
}
interface Sizes {
  /** Stacked experts; undefined: no such axis. */
  readonly of: number | undefined;
  readonly total: number;
  readonly inner: number;
  readonly seed: number;
}
const stacked = (of: number | undefined, ...shape: number[]): number[] => (of === undefined ? shape : [of, ...shape]);

const floats =
  (dtype: string) =>
  ({ of, total, inner, seed }: Sizes): Stored => {
    const w = raw(draws(seed), dtype, ...stacked(of, total, inner));
    return {
      tensors: { "a.weight": w },
      config: {},
      at: (e, r, c) => Math.fround(element(w, (e * total + r) * inner + c)),
      form: new RegExp(`^${dtype === "F64" ? "f32" : dtype.toLowerCase()}$`),
    };
  };

interface GridOf {
  readonly rows: number;
  readonly group: number;
  readonly scale: string;
}
const blockwise =
  ({ rows, group, scale }: GridOf, config: Config, suffix: string) =>
  ({ of, total, inner, seed }: Sizes): Stored => {
    const draw = draws(seed);
    const [r, g] = [Math.min(rows, total), Math.min(group, inner)];
    const [down, across] = [ceil(total, r), ceil(inner, g)];
    const w = raw(draw, "F8_E4M3", ...stacked(of, total, inner));
    const s = scales(draw, scale, ...stacked(of, down, across));
    return {
      tensors: { "a.weight": w, [`a.weight${suffix}`]: s },
      config,
      at: (e, row, c) =>
        Math.fround(
          element(w, (e * total + row) * inner + c) *
            element(s, (e * down + Math.floor(row / r)) * across + Math.floor(c / g)),
        ),
      form: /^fp8\/\d+x\d+$/,
    };
  };

const bytewise =
  ({ rows, group, scale }: GridOf, config: Config, zeros: boolean) =>
  ({ of, total, inner, seed }: Sizes): Stored => {
    const draw = draws(seed);
    const [r, g] = [Math.min(rows, total), Math.min(group, inner)];
    const [down, across] = [ceil(total, r), ceil(inner, g)];
    const w = raw(draw, "I8", ...stacked(of, total, inner));
    const s = scales(draw, scale, ...stacked(of, down, across));
    const z = zeros ? raw(draw, "I8", ...stacked(of, down, across)) : undefined;
    return {
      tensors: { "a.weight": w, "a.weight_scale": s, ...(z ? { "a.weight_zero_point": z } : {}) },
      config,
      at(e, row, c) {
        const place = (e * down + Math.floor(row / r)) * across + Math.floor(c / g);
        const zero = z ? element(z, place) : 0;
        return Math.fround((element(w, (e * total + row) * inner + c) - zero) * element(s, place));
      },
      form: /^int8\/\d+$/,
    };
  };

const packed =
  (bits: number, { rows, group, scale }: GridOf, config: Config, zeros: boolean) =>
  ({ total, inner, seed }: Sizes): Stored => {
    const draw = draws(seed);
    const [r, g] = [Math.min(rows, total), Math.min(group, inner)];
    const [down, across] = [ceil(total, r), ceil(inner, g)];
    const each = Math.floor(32 / bits);
    const words = ceil(inner, each);
    const w = raw(draw, "I32", total, words);
    const s = scales(draw, scale, down, across);
    const z = zeros ? raw(draw, "I32", ceil(down, each), across) : undefined;
    return {
      tensors: {
        "a.weight_packed": w,
        "a.weight_scale": s,
        "a.weight_shape": size(total, inner),
        ...(z ? { "a.weight_zero_point": z } : {}),
      },
      config,
      at(_, row, c) {
        const [line, across1] = [Math.floor(row / r), Math.floor(c / g)];
        const zero = z ? packedCode(z, Math.floor(line / each) * across + across1, line % each, bits) : 0;
        const code = packedCode(w, row * words + Math.floor(c / each), c % each, bits);
        return Math.fround((code - zero) * element(s, line * across + across1));
      },
      form: bits <= 4 && inner % 2 === 0 ? /^int4\/\d+$/ : /^int8\/\d+$/,
    };
  };

const blocksOf32 = ({ of, total, inner, seed }: Sizes): Stored => {
  const draw = draws(seed);
  const groups = inner / 32;
  const blocks = raw(draw, "U8", ...stacked(of, total, groups, 16));
  const s = raw(draw, "U8", ...stacked(of, total, groups));
  return {
    tensors: { "a.weight_blocks": blocks, "a.weight_scales": s },
    config: mxfp4,
    at: (e, r, c) => microscaled(blocks, s, e * total + r, c),
    form: /^mxfp4$/,
  };
};

const all = Number.POSITIVE_INFINITY;
const int = (num_bits: number, symmetric: boolean, more: Config): Config =>
  compressed({ num_bits, type: "int", symmetric, ...more });
interface Kind {
  readonly make: (sizes: Sizes) => Stored;
  /** Columns are multiples of this. */
  readonly step?: number;
  readonly stacks: boolean;
  readonly turns?: boolean;
}
const kinds: Readonly<Record<string, Kind>> = {
  F32: { make: floats("F32"), stacks: true, turns: true },
  F16: { make: floats("F16"), stacks: true, turns: true },
  BF16: { make: floats("BF16"), stacks: true, turns: true },
  F64: { make: floats("F64"), stacks: true, turns: true },
  "fp8 in blocks of 4 x 6": {
    make: blockwise({ rows: 4, group: 6, scale: "F32" }, fp8([4, 6]), "_scale_inv"),
    stacks: true,
  },
  "fp8 in blocks of 5 x 3, scales powers of two": {
    make: blockwise({ rows: 5, group: 3, scale: "F8_E8M0" }, fp8([5, 3]), "_scale_inv"),
    stacks: true,
  },
  "fp8 with one scale": {
    make: blockwise({ rows: all, group: all, scale: "F32" }, fp8(null), "_scale_inv"),
    stacks: true,
  },
  "float-quantized by channel": {
    make: blockwise(
      { rows: 1, group: all, scale: "BF16" },
      compressed({ num_bits: 8, type: "float", strategy: "channel" }),
      "_scale",
    ),
    stacks: true,
  },
  "float-quantized in blocks": {
    make: blockwise(
      { rows: 3, group: 4, scale: "F16" },
      compressed({ num_bits: 8, type: "float", strategy: "block", block_structure: "3x4" }),
      "_scale",
    ),
    stacks: true,
  },
  "int-quantized by channel": {
    make: bytewise({ rows: 1, group: all, scale: "F32" }, int(8, true, { strategy: "channel" }), false),
    stacks: true,
  },
  "int-quantized by group, with zero points": {
    make: bytewise({ rows: 1, group: 4, scale: "BF16" }, int(8, false, { group_size: 4 }), true),
    stacks: true,
  },
  "int-quantized with one scale": {
    make: bytewise({ rows: all, group: all, scale: "F32" }, int(8, true, { strategy: "tensor" }), false),
    stacks: true,
  },
  "packed int4": {
    make: packed(4, { rows: 1, group: 8, scale: "BF16" }, int(4, true, { group_size: 8 }), false),
    stacks: false,
  },
  "packed int4 with zero points": {
    make: packed(4, { rows: 1, group: 6, scale: "F16" }, int(4, false, { group_size: 6 }), true),
    stacks: false,
  },
  "packed int4 by channel, with zero points": {
    make: packed(4, { rows: 1, group: all, scale: "F32" }, int(4, false, { strategy: "channel" }), true),
    stacks: false,
  },
  "packed int8": {
    make: packed(8, { rows: 1, group: 4, scale: "F32" }, int(8, true, { group_size: 4 }), false),
    stacks: false,
  },
  "packed int8 with zero points": {
    make: packed(8, { rows: 1, group: 5, scale: "BF16" }, int(8, false, { group_size: 5 }), true),
    stacks: false,
  },
  "packed int2 with zero points": {
    make: packed(2, { rows: 1, group: 4, scale: "F32" }, int(2, false, { group_size: 4 }), true),
    stacks: false,
  },
  "packed int3": {
    make: packed(3, { rows: 1, group: 4, scale: "F32" }, int(3, true, { group_size: 4 }), false),
    stacks: false,
  },
  "packed int6 with zero points": {
    make: packed(6, { rows: 1, group: 4, scale: "F32" }, int(6, false, { group_size: 4 }), true),
    stacks: false,
  },
  MXFP4: { make: blocksOf32, step: 32, stacks: true },
};

/** Element [i, j] of a piece of a stored matrix, as its definition says. */
function expected(stored: Stored, piece: Piece): Float32Array {
  const [out = 0, inner = 0] = piece.shape;
  const { from, total } = piece.rows ?? { from: 0, total: out };
  return Float32Array.from({ length: out * inner }, (_, n) => {
    const used = from + Math.floor(n / inner);
    const isGate = used < total / 2;
    const row = piece.alternating ? (isGate ? 2 * used : 2 * (used - total / 2) + 1) : used;
    const column = n % inner;
    return piece.transposed ? stored.at(piece.index ?? 0, column, row) : stored.at(piece.index ?? 0, row, column);
  });
}

const anyCase = fc
  .record({
    seed: fc.integer(),
    of: fc.option(fc.integer({ min: 1, max: 3 }), { nil: undefined }),
    half: fc.integer({ min: 1, max: 9 }),
    odd: fc.boolean(),
    columns: fc.integer({ min: 1, max: 23 }),
    cut: fc.boolean(),
    alternating: fc.boolean(),
    transposed: fc.boolean(),
  })
  .map(({ half, odd, ...rest }) => ({ ...rest, total: 2 * half + (odd ? 1 : 0) }));

describe.each(Object.entries(kinds))("%s", (_, { make, step = 1, stacks, turns = false }) => {
  it("is read as its definition says, wherever it lies in its tensor", async () => {
    await fc.assert(
      fc.asyncProperty(anyCase, async ({ seed, of: entries, total, columns, cut, ...ways }) => {
        const draw = draws(seed);
        const of = stacks ? entries : undefined;
        const inner = step * (step > 1 ? 1 + (columns % 3) : columns);
        const alternating = ways.alternating && total % 2 === 0;
        const transposed = ways.transposed && turns;
        const stored = transposed ? make({ of, total: inner, inner: total, seed }) : make({ of, total, inner, seed });
        const from = cut ? draw.below(total) : 0;
        const out = cut ? 1 + draw.below(total - from) : total;
        const piece: Piece = {
          name: "a.weight",
          shape: [out, inner],
          ...(of === undefined ? {} : { of, index: draw.below(of) }),
          ...(cut ? { rows: { from, total } } : {}),
          ...(alternating ? { alternating } : {}),
          ...(transposed ? { transposed } : {}),
        };
        const { checkpoint } = await checkpointOf(stored.tensors, stored.config);
        const form = checkPiece(checkpoint, piece);
        const host = await readPiece(checkpoint, piece);
        expect(wellFormed(host)).toBe(true);
        const { data: _data, codes: _codes, scales: _scales, zeros, ...rest }: Record<string, unknown> = { ...host };
        expect(form).toEqual(host.kind === "codes" ? { ...rest, zeros: zeros !== undefined } : rest);
        const plan = planUpload(engine(cpu()), form);
        expect(plan.widened?.from ?? plan.form).toMatch(stored.form);
        expect(plan.widened?.bytes ?? plan.bytes).toBe(bytesOfHost(host));
        const found = widen(host);
        if (!sameNumbers(found, expected(stored, piece))) expect([...found]).toEqual([...expected(stored, piece)]);
        expect([...pieceNames(piece, checkpoint)].sort()).toEqual(Object.keys(stored.tensors).sort());
      }),
      { numRuns: 60 },
    );
  });

  if (!stacks) return;
  it("is read of a stacked tensor without the other entries", async () => {
    const [of, total, inner] = [7, 6, 32];
    const stored = make({ of, total, inner, seed: 3 });
    const { checkpoint, reads } = await checkpointOf(stored.tensors, stored.config);
    await readPiece(checkpoint, { name: "a.weight", shape: [total, inner], of, index: 4 });
    for (const [name, { bytes }] of Object.entries(stored.tensors))
      expect([name, reads.get(name)]).toEqual([name, bytes.length / of]);
  });
});

describe("what is read", () => {
  it("of some rows is those rows and the scales of their blocks", async () => {
    const stored = blockwise(
      { rows: 4, group: 8, scale: "F32" },
      fp8([4, 8]),
      "_scale_inv",
    )({ of: undefined, total: 20, inner: 16, seed: 1 });
    const { checkpoint, reads } = await checkpointOf(stored.tensors, stored.config);
    await readPiece(checkpoint, { name: "a.weight", shape: [5, 16], rows: { from: 6, total: 20 } });
    // Rows 6 to 11 touch the blocks 1 and 2.
    expect([...reads]).toEqual([
      ["a.weight", 5 * 16],
      ["a.weight_scale_inv", 2 * 2 * 4],
    ]);
  });

  it("of packed zero points are the words of those rows; the stored shape is read once", async () => {
    const stored = packed(
      4,
      { rows: 1, group: 8, scale: "F32" },
      int(4, false, { group_size: 8 }),
      true,
    )({
      of: undefined,
      total: 40,
      inner: 16,
      seed: 1,
    });
    const { checkpoint, reads } = await checkpointOf(stored.tensors, stored.config);
    const piece: Piece = { name: "a.weight", shape: [3, 16], rows: { from: 15, total: 40 } };
    for (let i = 0; i < 2; i++) await readPiece(checkpoint, piece);
    expect(Object.fromEntries(reads)).toEqual({
      "a.weight_packed": 2 * 3 * 8,
      "a.weight_scale": 2 * 3 * 2 * 4,
      "a.weight_zero_point": 2 * 2 * 2 * 4, // the words of rows 8..15 and 16..23
      "a.weight_shape": 16,
    });
  });
});

/** Core's fields of codes on an engine. */
async function throughCore(host: HostCodes): Promise<ArrayLike<number>> {
  const on = engine(cpu());
  const [out = 0, inner = 0] = host.shape;
  const grid = [Math.ceil(out / host.rows), Math.ceil(inner / host.group)];
  const half = host.format === "int4" || host.format === "mxfp4";
  const y = on.scope(() => {
    const weights: QuantizedWeights = {
      format: host.format,
      group: host.group,
      ...(host.format === "fp8" ? { rows: host.rows } : {}),
      codes: on.tensor(host.codes, [out, half ? inner / 2 : inner]),
      scales: on.tensor(host.scales, grid),
      ...(host.zeros ? { zeros: on.tensor(host.zeros, grid) } : {}),
    };
    return dequantize(weights);
  });
  const data = await y.data();
  dispose(y);
  return data;
}

it.each(Object.entries(kinds).filter(([name]) => !/^[BF]+\d+$/.test(name)))(
  "%s has the layout that core expects",
  async (_, { make }) => {
    const stored = make({ of: undefined, total: 7, inner: 32, seed: 11 });
    const { checkpoint } = await checkpointOf(stored.tensors, stored.config);
    const host: HostMatrix = await readPiece(checkpoint, { name: "a.weight", shape: [7, 32] });
    if (host.kind !== "codes") throw new Error("codes were expected");
    // Scales of MXFP4 that are random bytes give numbers that devices may flush; all others are compared.
    const core = Array.from(await throughCore(host), (x) => x + 0);
    expect(core).toEqual(Array.from(widen(host), (x) => x + 0));
  },
);

it("other shapes than matrices are read as floats: vectors, entries of stacked vectors, rows of higher rank", async () => {
  const draw = draws(5);
  const tensors = {
    "a.bias": raw(draw, "BF16", 4, 6),
    "b.norm": raw(draw, "F16", 5),
    "c.conv": raw(draw, "F32", 4, 3, 2),
  };
  const { checkpoint } = await checkpointOf(tensors);
  const numbers = async (piece: Piece) => [...widen(await readPiece(checkpoint, piece))];
  const of = (name: keyof typeof tensors, ids: readonly number[]) => ids.map((i) => element(tensors[name], i));
  expect(await numbers({ name: "b.norm", shape: [5] })).toEqual(of("b.norm", [0, 1, 2, 3, 4]));
  const gate = await numbers({ name: "a.bias", shape: [6], of: 4, index: 2, alternating: true });
  expect(gate).toEqual(of("a.bias", [12, 14, 16, 13, 15, 17]));
  const rows = await numbers({ name: "c.conv", shape: [2, 3, 2], rows: { from: 1, total: 4 } });
  expect(rows).toEqual(of("c.conv", [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]));
});

describe("MXFP4 lies out-major, whether the float form would be transposed or not", () => {
  it.each([true, false])("transposed: %s", async (transposed) => {
    const stored = blocksOf32({ of: 2, total: 4, inner: 32, seed: 2 });
    const { checkpoint } = await checkpointOf(stored.tensors, stored.config);
    const piece: Piece = { name: "a.weight", shape: [4, 32], of: 2, index: 1, transposed };
    expect(
      sameNumbers(widen(await readPiece(checkpoint, piece)), expected(stored, { ...piece, transposed: false })),
    ).toBe(true);
  });
});

describe("columns in another order", () => {
  const g_idx = (values: readonly number[]): RawTensor => ({
    dtype: "I32",
    shape: [values.length],
    bytes: new Uint8Array(Int32Array.from(values).buffer),
  });
  const make = packed(
    4,
    { rows: 1, group: 8, scale: "F32" },
    int(4, true, { group_size: 8, actorder: "group" }),
    false,
  );
  const stored = make({ of: undefined, total: 3, inner: 16, seed: 4 });
  const piece: Piece = { name: "a.weight", shape: [3, 16] };
  const inOrder = Array.from({ length: 16 }, (_, i) => Math.floor(i / 8));
  it.each([
    ["groups in order", inOrder],
    ["-1 for all", inOrder.map(() => -1)],
  ])("are none: %s", async (_, order) => {
    const { checkpoint } = await checkpointOf({ ...stored.tensors, "a.weight_g_idx": g_idx(order) }, stored.config);
    expect(sameNumbers(widen(await readPiece(checkpoint, piece)), expected(stored, piece))).toBe(true);
    expect(pieceNames(piece, checkpoint)).toContain("a.weight_g_idx");
  });
  it("are refused by name", async () => {
    const { checkpoint } = await checkpointOf(
      { ...stored.tensors, "a.weight_g_idx": g_idx([...inOrder].reverse()) },
      stored.config,
    );
    await expect(readPiece(checkpoint, piece)).rejects.toThrow('"a.weight_g_idx" reorders its columns');
    // And again: what was refused is not taken for seen.
    await expect(readPiece(checkpoint, piece)).rejects.toThrow(CheckpointError);
  });
});

it("several entries of config.json are told apart by the shapes of the tensors", async () => {
  const weights = (num_bits: number, group_size: number): Config => ({
    weights: { num_bits, type: "int", symmetric: true, group_size },
  });
  const config = compressed(
    {},
    { config_groups: { a: weights(4, 8), b: weights(8, 16), c: weights(4, 32), d: { weights: null } } },
  );
  const four = packed(
    4,
    { rows: 1, group: 8, scale: "F32" },
    config,
    false,
  )({ of: undefined, total: 3, inner: 32, seed: 4 });
  const eight = packed(
    8,
    { rows: 1, group: 16, scale: "F32" },
    config,
    false,
  )({ of: undefined, total: 3, inner: 32, seed: 5 });
  const piece: Piece = { name: "a.weight", shape: [3, 32] };
  for (const [stored, form] of [
    [four, { format: "int4", group: 8 }],
    [eight, { format: "int8", group: 16 }],
  ] as const) {
    const { checkpoint } = await checkpointOf(stored.tensors, config);
    expect(checkPiece(checkpoint, piece)).toMatchObject(form);
  }
});

// ---------------------------------------------------------------------------------------------- refusals

describe("refused by name, before anything is read:", () => {
  const draw = draws(9);
  const plain = { "a.weight": raw(draw, "F32", 4, 6) };
  const [pack, packConfig] = [
    kinds["packed int4"]?.make({ of: undefined, total: 4, inner: 16, seed: 1 }),
    int(4, true, { group_size: 8 }),
  ];
  const packTensors = pack?.tensors ?? {};
  const asymmetric = int(4, false, { group_size: 8 });
  const blockTensors = { "a.weight": raw(draw, "F8_E4M3", 4, 6), "a.weight_scale_inv": scales(draw, "F32", 2, 3) };
  const four = { "a.weight_blocks": raw(draw, "U8", 4, 1, 16), "a.weight_scales": raw(draw, "U8", 4, 1) };
  const bytes = { "a.weight": raw(draw, "I8", 4, 6), "a.weight_scale": scales(draw, "F32", 4, 1) };
  const channel = int(8, true, { strategy: "channel" });
  const at = (shape: readonly number[], more: Partial<Piece> = {}): Piece => ({ name: "a.weight", shape, ...more });
  const without = (tensors: RawTensors, name: string): RawTensors =>
    Object.fromEntries(Object.entries(tensors).filter(([key]) => key !== name));
  const table: readonly (readonly [what: string, RawTensors, Config, Piece, RegExp])[] = [
    [
      "a tensor that is missing",
      plain,
      {},
      { name: "b.weight", shape: [4, 6] },
      /has no tensor "b\.weight"; it has 1 others/,
    ],
    ["another shape", plain, {}, at([4, 7]), /"a\.weight" is F32 \[4, 6\], but config\.json asks for F32 \[4, 7\]/],
    ["a shape the other way round", plain, {}, at([4, 6], { transposed: true }), /asks for F32 \[6, 4\]/],
    ["fewer rows than stored", plain, {}, at([3, 6]), /asks for F32 \[3, 6\]/],
    ["rows behind the end", plain, {}, at([3, 6], { rows: { from: 2, total: 4 } }), /rows 2 to 5 of 4/],
    ["a negative row", plain, {}, at([3, 6], { rows: { from: -1, total: 4 } }), /rows -1 to 2 of 4/],
    ["an entry that is not there", plain, {}, at([6], { index: 4, of: 4 }), /entry 4 of 4/],
    ["an entry of unknown many", plain, {}, at([6], { index: 1 }), /entry 1 of undefined/],
    ["no shape", plain, {}, at([]), /is no shape of rows/],
    ["a shape of fractions", plain, {}, at([4.5, 6]), /is no shape of rows/],
    [
      "alternating rows of an odd number",
      { "a.weight": raw(draw, "F32", 3, 6) },
      {},
      at([3, 6], { alternating: true }),
      /must be even, not 3/,
    ],
    [
      "alternating rows without end",
      { "a.weight": raw(draw, "F32", 4, 6) },
      {},
      at([2 ** 50, 6], { alternating: true }),
      /is F32 \[4, 6\], but config.json asks for F32 \[1125899906842624, 6\]/,
    ],
    [
      "a vector stored transposed",
      { "a.weight": raw(draw, "F32", 3) },
      {},
      at([3], { transposed: true }),
      /it is no matrix/,
    ],
    ["integers", { "a.weight": raw(draw, "I64", 4, 6) }, {}, at([4, 6]), /stored as I64; supported are F32/],
    [
      "fp8 of five exponent bits",
      { "a.weight": raw(draw, "F8_E5M2", 4, 6) },
      fp8([2, 2]),
      at([4, 6]),
      /F8_E5M2 \(quant_method "fp8"\)/,
    ],
    [
      "floats with scales beside them",
      { ...plain, "a.weight_scale": scales(draw, "F32", 4, 1) },
      {},
      at([4, 6]),
      /it is F32, but "a\.weight_scale" stands beside it/,
    ],
    ["two forms at once", { ...plain, ...four }, mxfp4, at([4, 6]), /more than once: "a\.weight", "a\.weight_blocks"/],
    [
      "GPTQ or AWQ",
      { "a.qweight": raw(draw, "I32", 4, 6) },
      { quantization_config: { quant_method: "gptq" } },
      at([4, 6]),
      /"a\.qweight" is there, of quant_method "gptq"/,
    ],
    [
      "bitsandbytes",
      { "a.weight": raw(draw, "U8", 12, 1), "a.weight.absmax": raw(draw, "F32", 1) },
      { quantization_config: { quant_method: "bitsandbytes" } },
      at([4, 6]),
      /"a\.weight\.absmax" belongs to a form that is not read/,
    ],
    [
      "NVFP4",
      { ...packTensors, "a.weight_global_scale": raw(draw, "F32", 1) },
      packConfig,
      at([4, 16]),
      /"a\.weight_global_scale" belongs to a form that is not read/,
    ],
    // fp8
    [
      "fp8 without scales",
      { "a.weight": raw(draw, "F8_E4M3", 4, 6) },
      fp8([2, 2]),
      at([4, 6]),
      /it is F8_E4M3 and has no "a\.weight_scale_inv"; quant_method is "fp8"/,
    ],
    [
      "fp8 that config.json knows nothing of",
      blockTensors,
      {},
      at([4, 6]),
      /has no "a\.weight_scale" \(there is "a\.weight_scale_inv"\); quant_method is "none"/,
    ],
    [
      "fp8 blocks of another size",
      blockTensors,
      fp8([4, 2]),
      at([4, 6]),
      /"a\.weight_scale_inv" is F32 \[2, 3\], which fits nothing .*float8 symmetric, a scale for 4 rows x 2 columns/,
    ],
    [
      "fp8 that is stored transposed",
      blockTensors,
      fp8([2, 2]),
      at([4, 6], { transposed: true }),
      /matrices \[out, in\] only/,
    ],
    [
      "fp8 that is no matrix",
      { ...blockTensors, "a.weight": raw(draw, "F8_E4M3", 4) },
      fp8([2, 2]),
      at([4]),
      /matrices \[out, in\] only/,
    ],
    ["fp8 codes of another shape", blockTensors, fp8([2, 2]), at([4, 5]), /"a\.weight" is F8_E4M3 \[4, 6\]/],
    [
      "fp8 scales that are integers",
      { ...blockTensors, "a.weight_scale_inv": raw(draw, "I32", 2, 3) },
      fp8([2, 2]),
      at([4, 6]),
      /its scales are I32; supported are F32, BF16, F16, F8_E8M0/,
    ],
    [
      "a block that is no pair",
      blockTensors,
      fp8([2, 2, 2]),
      at([4, 6]),
      /weight_block_size must be two sizes such as \[128, 128\], found/,
    ],
    ["a block of nothing", blockTensors, fp8([0, 2]), at([4, 6]), /weight_block_size must be two sizes/],
    [
      "fp8 with zero points",
      {
        "a.weight": raw(draw, "F8_E4M3", 4, 6),
        "a.weight_scale": scales(draw, "F32", 4, 1),
        "a.weight_zero_point": raw(draw, "I8", 4, 1),
      },
      compressed({ type: "float", strategy: "channel" }),
      at([4, 6]),
      /zero points are read for ints only/,
    ],
    // int8
    [
      "bytes without scales",
      without(bytes, "a.weight_scale"),
      channel,
      at([4, 6]),
      /it is I8 and has no "a\.weight_scale"/,
    ],
    [
      "bytes whose zero points are missing",
      bytes,
      int(8, false, { strategy: "channel" }),
      at([4, 6]),
      /fits nothing in config\.json for \[4, 6\]: int8 with zero points/,
    ],
    [
      "zero points of another shape",
      { ...bytes, "a.weight_zero_point": raw(draw, "I8", 4) },
      channel,
      at([4, 6]),
      /"a\.weight_zero_point" is I8 \[4\], expected I8 \[4, 1\]/,
    ],
    [
      "bytes that config.json calls floats",
      bytes,
      compressed({ type: "float", strategy: "channel" }),
      at([4, 6]),
      /fits nothing in config\.json/,
    ],
    // packed
    [
      "packed codes without scales",
      without(packTensors, "a.weight_scale"),
      packConfig,
      at([4, 16]),
      /has no "a\.weight_scale" beside it/,
    ],
    [
      "packed codes without their shape",
      without(packTensors, "a.weight_shape"),
      packConfig,
      at([4, 16]),
      /has no "a\.weight_shape" beside it/,
    ],
    [
      "packed codes of another method",
      packTensors,
      fp8([2, 2]),
      at([4, 16]),
      /is of compressed-tensors, but config\.json says quant_method "fp8"/,
    ],
    [
      "too few words",
      { ...packTensors, "a.weight_packed": raw(draw, "I32", 4, 1) },
      packConfig,
      at([4, 16]),
      /which fits nothing in config\.json/,
    ],
    [
      "words that are bytes",
      { ...packTensors, "a.weight_packed": raw(draw, "U8", 4, 8) },
      packConfig,
      at([4, 16]),
      /"a\.weight_packed" is U8, of format "pack-quantized"/,
    ],
    [
      "a shape that is no pair",
      { ...packTensors, "a.weight_shape": size(4, 16, 1) },
      packConfig,
      at([4, 16]),
      /"a\.weight_shape" is I64 \[3\], but config\.json asks for I64 or I32 \[2\]/,
    ],
    ["packed zero points that are missing", packTensors, asymmetric, at([4, 16]), /fits nothing in config\.json/],
    [
      "packed zero points of another shape",
      { ...packTensors, "a.weight_zero_point": raw(draw, "I32", 2, 2) },
      asymmetric,
      at([4, 16]),
      /"a\.weight_zero_point" is I32 \[2, 2\], but config\.json asks for I32 \[1, 2\]/,
    ],
    [
      "packed columns of another number",
      { ...packTensors, "a.weight_g_idx": raw(draw, "I32", 15) },
      packConfig,
      at([4, 16]),
      /"a\.weight_g_idx" is I32 \[15\]/,
    ],
    [
      "packed codes that are stacked",
      packTensors,
      packConfig,
      at([16], { of: 4, index: 1 }),
      /single matrices \[out, in\] only/,
    ],
    [
      "two meanings that fit",
      {
        ...packTensors,
        "a.weight_packed": raw(draw, "I32", 4, 1),
        "a.weight_scale": scales(draw, "F32", 4, 1),
        "a.weight_shape": size(4, 4),
      },
      compressed(
        {},
        {
          config_groups: {
            a: { weights: { num_bits: 4, strategy: "channel" } },
            b: { weights: { num_bits: 8, strategy: "channel" } },
          },
        },
      ),
      at([4, 4]),
      /fits several entries of config\.json: int4 symmetric.*; int8 symmetric/,
    ],
    // MXFP4
    [
      "blocks without scales",
      without(four, "a.weight_scales"),
      mxfp4,
      at([4, 32]),
      /has no "a\.weight_scales" beside it/,
    ],
    ["blocks of another method", four, {}, at([4, 32]), /is MXFP4, but config\.json says quant_method "none"/],
    ["blocks of 32 in rows of 40", four, mxfp4, at([4, 40]), /blocks of 32 along the rows/],
    [
      "too few blocks",
      four,
      mxfp4,
      at([4, 64]),
      /"a\.weight_blocks" is U8 \[4, 1, 16\], but config\.json asks for U8 \[4, 2, 16\]/,
    ],
    [
      "too few scales",
      { ...four, "a.weight_scales": raw(draw, "U8", 3, 1) },
      mxfp4,
      at([4, 32]),
      /"a\.weight_scales" is U8 \[3, 1\]/,
    ],
    [
      "blocks that are signed",
      { ...four, "a.weight_blocks": raw(draw, "I8", 4, 1, 16) },
      mxfp4,
      at([4, 32]),
      /"a\.weight_blocks" is I8/,
    ],
  ];
  it.each(table)("%s", async (_, tensors, config, piece, message) => {
    const { checkpoint, reads } = await checkpointOf(tensors, config);
    const failure = (): unknown => {
      try {
        return checkPiece(checkpoint, piece);
      } catch (error) {
        return error;
      }
    };
    const error = failure();
    expect(error).toBeInstanceOf(CheckpointError);
    expect(String(error)).toMatch(message);
    await expect(readPiece(checkpoint, piece)).rejects.toThrow(message);
    expect(reads.size).toBe(0);
  });

  it("a stored shape that is another one, when it is read", async () => {
    const { checkpoint } = await checkpointOf({ ...packTensors, "a.weight_shape": size(16, 4) }, packConfig);
    const piece = at([4, 16]);
    await expect(readPiece(checkpoint, piece)).rejects.toThrow(
      '"a.weight_shape" says [16, 4], but config.json asks for [4, 16]',
    );
  });
});

it("names of tensors for activations belong to their weight", async () => {
  const draw = draws(1);
  const tensors = {
    "a.weight": raw(draw, "F8_E4M3", 4, 6),
    "a.weight_scale": scales(draw, "F32", 1),
    "a.input_scale": scales(draw, "F32", 1),
    "b.input_scale": scales(draw, "F32", 1),
  };
  const { checkpoint } = await checkpointOf(tensors, compressed({ type: "float", strategy: "tensor" }));
  expect(pieceNames({ name: "a.weight", shape: [4, 6] }, checkpoint)).toEqual([
    "a.weight",
    "a.weight_scale",
    "a.input_scale",
  ]);
});
