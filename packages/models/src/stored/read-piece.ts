// Parts of a checkpoint as matrices in the type in which they are stored. Names, dtypes and shapes are checked from the headers before
// anything is read; read are the rows that are needed and their scales, nothing else.
import { CheckpointError } from "@switchyard/core";
import type { Checkpoint } from "../model.ts";
import { quote } from "../safetensors.ts";
import type { CheckpointIndex, Piece } from "../source.ts";
import { commonStep, type HostCodes, type HostFloats, type HostMatrix } from "./host-matrix.ts";
import { type PackedForm, unpackLines, unpackZeros } from "./pack.ts";
import { quantizationOf, type Scheme } from "./quantization-config.ts";
import { e8m0ToFloat, widenHalves } from "./widen.ts";

/** What a piece will be, known before it is read: takes the place of a HostMatrix in `planUpload`. */
export type StoredForm =
  | Pick<HostFloats, "kind" | "dtype" | "shape">
  | (Pick<HostCodes, "kind" | "format" | "group" | "rows" | "shape"> & { readonly zeros: boolean });

const supported =
  "F32, F16, BF16, F64, F8_E4M3 or I8 with scales, MXFP4 (_blocks and _scales) and pack-quantized ints of compressed-tensors";

const fail = (piece: Piece, what: string): never => {
  throw new CheckpointError(`tensor ${quote(piece.name)}: ${what}`);
};

// ---------------------------------------------------------------------------------------------- what is stored

/** Tensors that may stand beside one of this name and hold what activations would be quantised with: ours stay f32. */
const ofActivations = ["input_scale", "input_zero_point", "output_scale", "output_zero_point"];
const companions = ["_packed", "_shape", "_scale", "_zero_point", "_g_idx", "_scale_inv", "_blocks", "_scales"];
/** Of forms that are not read. */
const foreign = ["_global_scale", ".absmax", ".quant_map", ".SCB", "_bitmask"];
const otherNames = ["qweight", "qzeros"];

/** `weight` of "model.layers.0.mlp.up_proj.weight" replaced. */
const beside = (name: string, other: string): string | undefined =>
  name.endsWith(".weight") ? name.slice(0, -"weight".length) + other : undefined;

const suffixes = [...companions, ...foreign];
const activationEndings: ReadonlySet<string> = new Set(ofActivations.map((one) => `.${one}`));

/** What stands in a checkpoint. Gathered once: a model has tens of thousands of pieces, and a dozen names may stand beside each. */
interface Inventory {
  readonly names: ReadonlySet<string>;
  /** The names that end with a suffix of quantised forms: by what stands before it, and by the suffix. */
  readonly stems: ReadonlyMap<string, ReadonlyMap<string, string>>;
  /** Tensors of activations, by the weight beside which they stand. */
  readonly activations: ReadonlyMap<string, readonly string[]>;
}

const known = new WeakMap<readonly string[], Inventory>();

function inventoryOf({ names }: CheckpointIndex): Inventory {
  const before = known.get(names);
  if (before) return before;
  const stems = new Map<string, Map<string, string>>();
  const activations = new Map<string, string[]>();
  // No suffix has a dot but in front: a name's last part says which it has, and there are few of those.
  const endings = new Map<string, readonly string[]>();
  for (const name of names) {
    const dot = Math.max(name.lastIndexOf("."), 0);
    const last = name.slice(dot);
    let found = endings.get(last);
    if (!found) {
      found = suffixes.filter((suffix) => last.endsWith(suffix));
      endings.set(last, found);
    }
    for (const suffix of found) {
      const stem = name.slice(0, name.length - suffix.length);
      const own = stems.get(stem);
      if (own) own.set(suffix, name);
      else stems.set(stem, new Map([[suffix, name]]));
    }
    if (!activationEndings.has(last)) continue;
    const weight = `${name.slice(0, dot)}.weight`;
    activations.set(weight, [...(activations.get(weight) ?? []), name]);
  }
  const made = { names: new Set(names), stems, activations };
  known.set(names, made);
  return made;
}

const namesOf = (index: CheckpointIndex): ReadonlySet<string> => inventoryOf(index).names;
const nothing: ReadonlyMap<string, string> = new Map();
/** What stands beside a tensor, by suffix. */
const besideOf = (index: CheckpointIndex, name: string): ReadonlyMap<string, string> =>
  inventoryOf(index).stems.get(name) ?? nothing;

/** The stored tensors that belong to a piece: itself, or its codes and scales, with what belongs to its activations. */
export function pieceNames({ name }: Piece, index: CheckpointIndex): string[] {
  const { names, stems, activations } = inventoryOf(index);
  const found = names.has(name) ? [name] : [];
  const here = stems.get(name);
  if (here) {
    for (const suffix of companions) {
      const one = here.get(suffix);
      if (one !== undefined) found.push(one);
    }
  }
  const more = activations.get(name);
  return more ? [...found, ...more] : found;
}

/** Rows of a stored tensor [of?, total, ...] that a piece is made of. */
export interface Rows {
  /** Entries of the first axis before ours, where experts are stacked. */
  readonly entry: number;
  /** Rows of one entry. */
  readonly total: number;
  /** Stored row of used row i. */
  place(i: number): number;
  /** All of them lie in these. */
  readonly from: number;
  readonly to: number;
  /** Whether used row i is stored row from + i. */
  readonly inOrder: boolean;
}

const isCount = (x: number): boolean => Number.isSafeInteger(x) && x >= 0;

/** Where the rows of a piece are stored. Throws CheckpointError for rows and entries that cannot be. */
export function rowsOf(piece: Piece): Rows {
  const { shape, index, of, rows, alternating = false } = piece;
  const [out] = shape;
  if (out === undefined || !shape.every(isCount)) return fail(piece, `[${shape}] is no shape of rows`);
  if ((index === undefined) !== (of === undefined) || (index !== undefined && !(isCount(index) && index < (of ?? 0))))
    return fail(piece, `entry ${index} of ${of} was asked for`);
  const { from, total } = rows ?? { from: 0, total: out };
  if (!isCount(from) || !isCount(total) || from + out > total)
    return fail(piece, `rows ${from} to ${from + out} of ${total} were asked for`);
  const common = { entry: index ?? 0, total };
  if (!alternating) return { ...common, place: (i) => from + i, from, to: from + out, inOrder: true };
  if (total % 2 !== 0) return fail(piece, `gate and up alternate, so rows must be even, not ${total}`);
  const half = total / 2;
  const place = (i: number): number => (from + i < half ? 2 * (from + i) : 2 * (from + i - half) + 1);
  // Rows of gate and those of up both rise, so that the ends of each are the ends of all: `out` is not to be trusted yet.
  const turn = Math.min(Math.max(half - from, 0), out);
  const ends = out === 0 ? [] : [0, turn - 1, turn, out - 1].filter((i) => i >= 0 && i < out).map(place);
  const [first, last] = [Math.min(...ends), Math.max(...ends)];
  const span = out === 0 ? { from: 0, to: 0 } : { from: first, to: last + 1 };
  return { ...common, place, ...span, inOrder: false };
}

/** A checked piece: its form, and how to read it. */
interface Checked {
  readonly form: StoredForm;
  read(checkpoint: Checkpoint): Promise<HostMatrix>;
}

/** The shape a stored tensor must have: with the leading axis of stacked experts where the piece has one. */
const withEntries = ({ of }: Piece, shape: readonly number[]): readonly number[] =>
  of === undefined ? shape : [of, ...shape];

const isEqual = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

function expectStored(
  index: CheckpointIndex,
  piece: Piece,
  name: string,
  dtypes: readonly string[],
  ...shapes: readonly (readonly number[])[]
): Found {
  return expectFound(index.stored(name), piece, name, dtypes, ...shapes);
}

type Found = ReturnType<CheckpointIndex["stored"]>;

function expectFound(
  found: Found,
  piece: Piece,
  name: string,
  dtypes: readonly string[],
  ...shapes: readonly (readonly number[])[]
): Found {
  const wanted = shapes.map((shape) => withEntries(piece, shape));
  if (!dtypes.includes(found.dtype) || !wanted.some((shape) => isEqual(shape, found.shape))) {
    const [types, sizes] = [dtypes.join(" or "), wanted.map((shape) => `[${shape.join(", ")}]`).join(" or ")];
    throw new CheckpointError(
      `tensor ${quote(name)} is ${found.dtype} [${found.shape.join(", ")}], but config.json asks for ${types} ${sizes}`,
    );
  }
  return found;
}

function check(index: CheckpointIndex, piece: Piece): Checked {
  const { name } = piece;
  const { names } = inventoryOf(index);
  const rows = rowsOf(piece);
  const here = besideOf(index, name);
  const has = (suffix: string): boolean => (suffix === "" ? names.has(name) : here.has(suffix));
  // Most pieces: floats with nothing beside them.
  const found = here.size === 0 && names.has(name) ? index.stored(name) : undefined;
  if (found && floatTypes.has(found.dtype)) return floats(index, piece, rows, found);
  const forms = ["", "_packed", "_blocks"].filter(has);
  if (forms.length > 1)
    return fail(piece, `it is stored more than once: ${forms.map((suffix) => quote(name + suffix)).join(", ")}`);
  for (const suffix of foreign)
    if (has(suffix))
      return fail(piece, `${quote(name + suffix)} belongs to a form that is not read; supported: ${supported}`);
  const [form] = forms;
  if (form === undefined) {
    const other = otherNames.map((one) => beside(name, one)).find((one) => one !== undefined && names.has(one));
    const { method } = quantizationOf(index.config);
    const hint = other
      ? `; ${quote(other)} is there, of quant_method ${quote(method)}, which is not read; supported: ${supported}`
      : `; it has ${names.size} others`;
    throw new CheckpointError(`the checkpoint has no tensor ${quote(name)}${hint}`);
  }
  if (form === "_packed") return packed(index, piece, rows);
  if (form === "_blocks") return blocks(index, piece, rows);
  const { dtype } = index.stored(name);
  if (dtype === "F8_E4M3" || dtype === "I8") return scaled(index, piece, rows);
  const stray = companions.find(has);
  if (stray !== undefined && floatTypes.has(dtype))
    return fail(piece, `it is ${dtype}, but ${quote(name + stray)} stands beside it, as for a quantised tensor`);
  return floats(index, piece, rows, index.stored(name));
}

// ---------------------------------------------------------------------------------------------- bytes

/** Stored rows from..to of our entry, `bytes` each. */
function readRows(
  checkpoint: Checkpoint,
  name: string,
  { entry, total }: Pick<Rows, "entry" | "total">,
  { from, to, bytes }: { readonly from: number; readonly to: number; readonly bytes: number },
): Promise<Uint8Array> {
  const start = entry * total * bytes;
  return checkpoint.read(name, [start + from * bytes, start + to * bytes]);
}

/** A view that starts where its element type may. */
const aligned = (bytes: Uint8Array, size: number): Uint8Array =>
  bytes.byteOffset % size === 0 ? bytes : bytes.slice();
const as16 = (given: Uint8Array): Uint16Array => {
  const bytes = aligned(given, 2);
  return new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
};
const as32 = (given: Uint8Array): Uint32Array => {
  const bytes = aligned(given, 4);
  return new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
};
const asFloat32 = (given: Uint8Array): Float32Array => {
  const bytes = aligned(given, 4);
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
};

/** Used rows in order, from bytes that hold the stored rows from..to. */
function inOrder(bytes: Uint8Array, rows: Rows, out: number, rowBytes: number): Uint8Array {
  if (rows.inOrder) return bytes;
  const sorted = new Uint8Array(out * rowBytes);
  for (let i = 0; i < out; i++) {
    const at = (rows.place(i) - rows.from) * rowBytes;
    sorted.set(bytes.subarray(at, at + rowBytes), i * rowBytes);
  }
  return sorted;
}

// ---------------------------------------------------------------------------------------------- floats

const floatTypes: ReadonlyMap<string, { readonly dtype: HostFloats["dtype"]; readonly bytes: 2 | 4 | 8 }> = new Map([
  ["F32", { dtype: "f32", bytes: 4 }],
  ["F16", { dtype: "f16", bytes: 2 }],
  ["BF16", { dtype: "bf16", bytes: 2 }],
  ["F64", { dtype: "f32", bytes: 8 }],
]);

function floats(index: CheckpointIndex, piece: Piece, rows: Rows, stored: Found): Checked {
  const { name, shape, transposed = false } = piece;
  const [out = 0, ...rest] = shape;
  const { dtype: found } = stored;
  const type = floatTypes.get(found);
  if (!type) {
    const { method } = quantizationOf(index.config);
    const how = method === "none" ? "" : ` (quant_method ${quote(method)})`;
    return fail(piece, `it is stored as ${found}${how}; supported are ${supported}`);
  }
  if (transposed && shape.length !== 2) return fail(piece, `[${shape}] cannot be stored transposed: it is no matrix`);
  const inner = rest.reduce((n, d) => n * d, 1);
  expectFound(stored, piece, name, [found], transposed ? [inner, rows.total] : [rows.total, ...rest]);
  const read = async (checkpoint: Checkpoint): Promise<Uint8Array> => {
    if (transposed) {
      const whole = { from: 0, to: inner, bytes: rows.total * type.bytes };
      return columns(await readRows(checkpoint, name, { entry: rows.entry, total: inner }, whole), {
        rows,
        out,
        inner,
        bytes: type.bytes,
      });
    }
    const bytes = inner * type.bytes;
    return inOrder(await readRows(checkpoint, name, rows, { from: rows.from, to: rows.to, bytes }), rows, out, bytes);
  };
  return {
    form: { kind: "floats", dtype: type.dtype, shape },
    async read(checkpoint) {
      const bytes = await read(checkpoint);
      const common = { kind: "floats", dtype: type.dtype, shape } as const;
      if (type.bytes === 2) return { ...common, data: as16(bytes) };
      if (type.bytes === 4) return { ...common, data: asFloat32(bytes) };
      const wide = aligned(bytes, 8);
      return {
        ...common,
        data: Float32Array.from(new Float64Array(wide.buffer, wide.byteOffset, wide.byteLength / 8)),
      };
    },
  };
}

/** Edge of the squares in which a matrix is turned around: both sides of one fit into the fastest cache. */
const tile = 32;

/** The used columns of a stored matrix [in, total], as rows. */
function columns(
  stored: Uint8Array,
  {
    rows,
    out,
    inner,
    bytes,
  }: { readonly rows: Rows; readonly out: number; readonly inner: number; readonly bytes: 2 | 4 | 8 },
): Uint8Array {
  // F64 moves as pairs of words.
  const words = bytes === 8 ? 2 : 1;
  const from = bytes === 2 ? as16(stored) : as32(stored);
  const to = bytes === 2 ? new Uint16Array(out * inner) : new Uint32Array(out * inner * words);
  const places = Int32Array.from({ length: out }, (_, i) => rows.place(i));
  for (let i0 = 0; i0 < inner; i0 += tile) {
    const i1 = Math.min(i0 + tile, inner);
    for (let r0 = 0; r0 < out; r0 += tile) {
      const r1 = Math.min(r0 + tile, out);
      for (let i = i0; i < i1; i++) {
        for (let r = r0; r < r1; r++) {
          for (let w = 0; w < words; w++)
            to[(r * inner + i) * words + w] = from[(i * rows.total + (places[r] as number)) * words + w] as number;
        }
      }
    }
  }
  return new Uint8Array(to.buffer, to.byteOffset, to.byteLength);
}

// ---------------------------------------------------------------------------------------------- MXFP4

/** gpt-oss: `_blocks` u8 [experts, out, in / 32, 16] and `_scales` u8 [experts, out, in / 32], out-major whatever the float form is. */
function blocks(index: CheckpointIndex, piece: Piece, rows: Rows): Checked {
  const { name, shape } = piece;
  const [out = 0, inner = 0] = shape;
  const { method } = quantizationOf(index.config);
  if (method !== "mxfp4")
    return fail(piece, `${quote(`${name}_blocks`)} is MXFP4, but config.json says quant_method ${quote(method)}`);
  if (shape.length !== 2 || inner % 32 !== 0)
    return fail(piece, `MXFP4 has blocks of 32 along the rows of a matrix; config.json asks for [${shape}]`);
  if (!namesOf(index).has(`${name}_scales`))
    return fail(piece, `${quote(`${name}_blocks`)} has no ${quote(`${name}_scales`)} beside it`);
  const groups = inner / 32;
  expectStored(index, piece, `${name}_blocks`, ["U8"], [rows.total, groups, 16]);
  expectStored(index, piece, `${name}_scales`, ["U8"], [rows.total, groups]);
  const common = { kind: "codes", format: "mxfp4", shape, group: 32, rows: 1 } as const;
  const part = async (checkpoint: Checkpoint, suffix: string, bytes: number): Promise<Uint8Array> => {
    const stored = await readRows(checkpoint, name + suffix, rows, { from: rows.from, to: rows.to, bytes });
    return inOrder(stored, rows, out, bytes);
  };
  return {
    form: { ...common, zeros: false },
    async read(checkpoint) {
      const [codes, scales] = await Promise.all([
        part(checkpoint, "_blocks", groups * 16),
        part(checkpoint, "_scales", groups),
      ]);
      return { ...common, codes, scales };
    },
  };
}

// ---------------------------------------------------------------------------------------------- scales

const scaleTypes = ["F32", "BF16", "F16", "F8_E8M0"];
const bytesOfScale = (dtype: string): number => (dtype === "F32" ? 4 : dtype === "F8_E8M0" ? 1 : 2);

function scaleValues(bytes: Uint8Array, dtype: string): Float32Array {
  switch (dtype) {
    case "F32":
      return asFloat32(bytes);
    case "F8_E8M0":
      return Float32Array.from(bytes, e8m0ToFloat);
    default:
      return widenHalves(as16(bytes), dtype === "BF16" ? "bf16" : "f16");
  }
}

/** The grid of scales of a stored matrix [total, in]. */
interface Grid {
  readonly rows: number;
  readonly group: number;
  readonly down: number;
  readonly across: number;
}

const gridOf = (scheme: Scheme, total: number, inner: number): Grid => {
  const [rows, group] = [Math.max(1, Math.min(scheme.rows, total)), Math.max(1, Math.min(scheme.group, inner))];
  return { rows, group, down: Math.ceil(total / rows), across: Math.ceil(inner / group) };
};

/** Shapes in which a grid of scales may be stored: one of one element, or one column, may leave axes out. */
function gridShapes({ down, across, rows, group }: Grid, total: number, inner: number): readonly (readonly number[])[] {
  const shapes: (readonly number[])[] = [[down, across]];
  if (down * across === 1 && rows >= total && group >= inner) shapes.push([], [1]);
  else if (across === 1 && group >= inner) shapes.push([down]);
  return shapes;
}

/** The one scheme of config.json that fits the tensors; throws where none does, or several that mean something else. */
function schemeOf(
  index: CheckpointIndex,
  piece: Piece,
  { total, inner, scale, fits }: { total: number; inner: number; scale: string; fits(scheme: Scheme): boolean },
): Scheme & Grid {
  const { schemes, method } = quantizationOf(index.config);
  const found = index.stored(scale);
  const fitting = new Map<string, Scheme & Grid>();
  for (const scheme of schemes) {
    const grid = gridOf(scheme, total, inner);
    if (!fits(scheme)) continue;
    const shapes = gridShapes(grid, total, inner);
    if (!shapes.some((shape) => isEqual(withEntries(piece, shape), found.shape))) continue;
    fitting.set([scheme.bits, scheme.symmetric, grid.rows, grid.group].join(), { ...scheme, ...grid });
  }
  const [first, ...more] = fitting.values();
  if (first && more.length === 0) return first;
  const what = `${quote(scale)} is ${found.dtype} [${found.shape.join(", ")}]`;
  if (!first)
    return fail(
      piece,
      `${what}, which fits nothing in config.json for [${total}, ${inner}]: ` +
        (schemes.length === 0
          ? `quant_method ${quote(method)} has no scales that are known here`
          : schemes.map(show).join("; ")),
    );
  return fail(
    piece,
    `${what}, which fits several entries of config.json: ${[...fitting.values()].map(show).join("; ")}`,
  );
}

const show = ({ type, bits, symmetric, rows, group }: Scheme): string =>
  `${type}${bits} ${symmetric ? "symmetric" : "with zero points"}, a scale for ` +
  `${Number.isFinite(rows) ? rows : "all"} rows x ${Number.isFinite(group) ? group : "all"} columns`;

/** Scales by grid line and group, f32 [down, across]; only the lines from..to are read. */
async function readScales(
  checkpoint: Checkpoint,
  name: string,
  { down, across }: Grid,
  { entry, from, to }: { readonly entry: number; readonly from: number; readonly to: number },
): Promise<Float32Array> {
  const { dtype } = checkpoint.stored(name);
  const bytes = across * bytesOfScale(dtype);
  return scaleValues(await readRows(checkpoint, name, { entry, total: down }, { from, to, bytes }), dtype);
}

/** The coarsest blocks of used rows that share a line of a grid with blocks of `rows` stored rows. */
function coarsest(rows: Rows, out: number, block: number): number {
  if (rows.inOrder) {
    const first = block - (rows.from % block);
    return commonStep(first >= out ? [] : first + block >= out ? [first] : [first, block], Math.max(1, out));
  }
  const line = (i: number): number => Math.floor(rows.place(i) / block);
  function* changes(): Generator<number> {
    for (let i = 1; i < out; i++) if (line(i) !== line(i - 1)) yield i;
  }
  return commonStep(changes(), Math.max(1, out));
}

// ---------------------------------------------------------------------------------------------- a code per byte

/** F8_E4M3 with `_scale_inv` (DeepSeek-V3) or `_scale` (float-quantized), I8 with `_scale` (int-quantized). */
function scaled(index: CheckpointIndex, piece: Piece, rows: Rows): Checked {
  const { name, shape, transposed = false } = piece;
  const [out = 0, inner = 0] = shape;
  const here = besideOf(index, name);
  const { dtype } = index.stored(name);
  const { method } = quantizationOf(index.config);
  if (shape.length !== 2 || transposed)
    return fail(
      piece,
      `it is ${dtype}; that is supported for matrices [out, in] only, config.json asks for [${shape}]`,
    );
  expectStored(index, piece, name, [dtype], [rows.total, inner]);
  const float = dtype === "F8_E4M3";
  const [suffix, other] = float && method === "fp8" ? ["_scale_inv", "_scale"] : ["_scale", "_scale_inv"];
  const [scale, zero] = [here.get(suffix), here.get("_zero_point") ?? ""];
  if (scale === undefined) {
    const instead = here.has(other) ? ` (there is ${quote(`${name}${other}`)})` : "";
    const wanted = quote(`${name}${suffix}`);
    return fail(piece, `it is ${dtype} and has no ${wanted}${instead}; quant_method is ${quote(method)}`);
  }
  const hasZeros = here.has("_zero_point");
  const scheme = schemeOf(index, piece, {
    total: rows.total,
    inner,
    scale,
    fits: ({ type, bits, symmetric }) =>
      type === (float ? "float" : "int") && (float ? bits === 8 : bits <= 8) && (symmetric || hasZeros),
  });
  const { dtype: scaleType, shape: scaleShape } = index.stored(scale);
  if (!scaleTypes.includes(scaleType))
    return fail(piece, `its scales are ${scaleType}; supported are ${scaleTypes.join(", ")}`);
  if (hasZeros && float) return fail(piece, `it is F8_E4M3 and has ${quote(zero)}; zero points are read for ints only`);
  if (hasZeros) {
    const found = index.stored(zero);
    if (found.dtype !== "I8" || found.shape.join() !== scaleShape.join())
      return fail(
        piece,
        `${quote(zero)} is ${found.dtype} [${found.shape.join(", ")}], expected I8 [${scaleShape.join(", ")}]`,
      );
  }
  const codes = async (checkpoint: Checkpoint): Promise<Uint8Array> => {
    const bytes = inner;
    return inOrder(await readRows(checkpoint, name, rows, { from: rows.from, to: rows.to, bytes }), rows, out, bytes);
  };
  const lines = gridLines(rows, scheme);
  if (float) {
    const common = { kind: "codes", format: "fp8", shape, group: scheme.group } as const;
    const block = coarsest(rows, out, scheme.rows);
    return {
      form: { ...common, rows: block, zeros: false },
      async read(checkpoint) {
        const [bytes, stored] = await Promise.all([codes(checkpoint), readScales(checkpoint, scale, scheme, lines)]);
        const scales = new Float32Array(Math.ceil(out / block) * scheme.across);
        for (let b = 0; b * block < out; b++) {
          const line = Math.floor(rows.place(b * block) / scheme.rows) - lines.from;
          scales.set(stored.subarray(line * scheme.across, (line + 1) * scheme.across), b * scheme.across);
        }
        return { ...common, rows: block, codes: bytes, scales };
      },
    };
  }
  const spread = intGroups(rows, scheme, { out, inner });
  const common = { kind: "codes", format: "int8", shape, group: spread.group, rows: 1 } as const;
  return {
    form: { ...common, zeros: hasZeros },
    async read(checkpoint) {
      const { down, across } = scheme;
      const [bytes, scales, zeros] = await Promise.all([
        codes(checkpoint),
        readScales(checkpoint, scale, scheme, lines),
        hasZeros
          ? readRows(checkpoint, zero, { entry: rows.entry, total: down }, { ...lines, bytes: across })
          : undefined,
      ]);
      return {
        ...common,
        codes: bytes,
        scales: spread.over(scales, lines.from, (n) => new Float32Array(n)),
        ...(zeros ? { zeros: spread.over(zeros, lines.from, (n) => new Uint8Array(n)) } : {}),
      };
    },
  };
}

/** Lines of a grid that the rows of a piece need. */
const gridLines = (rows: Rows, { rows: block }: Grid): { entry: number; from: number; to: number } => ({
  entry: rows.entry,
  from: Math.floor(rows.from / block),
  to: Math.ceil(rows.to / block),
});

/**
 * How a grid becomes one scale per row and group of a used matrix. Ints ask for groups that divide `in`: where those of the file do
 * not, finer ones repeat the scale.
 */
function intGroups(rows: Rows, grid: Grid, { out, inner }: { readonly out: number; readonly inner: number }) {
  const group = inner % grid.group === 0 ? grid.group : commonStep([grid.group, inner], 1);
  const across = inner / group;
  return {
    group,
    /** From grid lines that begin with line `first`: [out, in / group]. */
    over<T extends Float32Array | Uint8Array>(stored: T, first: number, make: (length: number) => T): T {
      if (rows.inOrder && grid.rows === 1 && group === grid.group) return stored;
      const made = make(out * across);
      for (let i = 0; i < out; i++) {
        const line = (Math.floor(rows.place(i) / grid.rows) - first) * grid.across;
        for (let g = 0; g < across; g++)
          made[i * across + g] = stored[line + Math.floor((g * group) / grid.group)] as number;
      }
      return made;
    },
  };
}

// ---------------------------------------------------------------------------------------------- pack-quantized

/** What was found right in small tensors, of each checkpoint: they are read once. */
const verified = new WeakMap<Checkpoint, Set<string>>();

async function once(checkpoint: Checkpoint, name: string, verify: (bytes: Uint8Array) => void): Promise<void> {
  const done = verified.get(checkpoint) ?? new Set();
  verified.set(checkpoint, done);
  if (done.has(name)) return;
  verify(await checkpoint.read(name));
  done.add(name);
}

/**
 * compressed-tensors: `_packed` i32 [out, words], `_scale` [out, groups], `_shape` [2], where asymmetric `_zero_point` i32 [words,
 * groups]; `_g_idx` may be there where it says nothing.
 */
function packed(index: CheckpointIndex, piece: Piece, rows: Rows): Checked {
  const { name, shape, transposed = false } = piece;
  const [out = 0, inner = 0] = shape;
  const names = namesOf(index);
  const [codes, scale, zero, order, size] = ["_packed", "_scale", "_zero_point", "_g_idx", "_shape"].map(
    (suffix) => name + suffix,
  ) as [string, string, string, string, string];
  const { method, format } = quantizationOf(index.config);
  if (method !== "compressed-tensors")
    return fail(piece, `${quote(codes)} is of compressed-tensors, but config.json says quant_method ${quote(method)}`);
  if (shape.length !== 2 || transposed || piece.of !== undefined)
    return fail(
      piece,
      `packed codes are supported for single matrices [out, in] only, config.json asks for [${shape}]`,
    );
  for (const needed of [scale, size])
    if (!names.has(needed)) return fail(piece, `${quote(codes)} has no ${quote(needed)} beside it`);
  const { total } = rows;
  const words = index.stored(codes);
  if (words.dtype !== "I32")
    return fail(
      piece,
      `${quote(codes)} is ${words.dtype}, of format ${quote(format ?? "unknown")}; supported is pack-quantized, I32`,
    );
  const hasZeros = names.has(zero);
  const scheme = schemeOf(index, piece, {
    total,
    inner,
    scale,
    fits: ({ type, bits, symmetric }) =>
      type === "int" &&
      bits <= 8 &&
      (symmetric || hasZeros) &&
      words.shape.join() === [total, Math.ceil(inner / Math.floor(32 / bits))].join(),
  });
  const perWord = Math.floor(32 / scheme.bits);
  const line = Math.ceil(inner / perWord);
  expectStored(index, piece, codes, ["I32"], [total, line]);
  const scaleType = index.stored(scale).dtype;
  if (!scaleTypes.includes(scaleType))
    return fail(piece, `its scales are ${scaleType}; supported are ${scaleTypes.join(", ")}`);
  const sizes = expectStored(index, piece, size, ["I64", "I32"], [2]);
  if (hasZeros) expectStored(index, piece, zero, ["I32"], [Math.ceil(scheme.down / perWord), scheme.across]);
  if (names.has(order)) expectStored(index, piece, order, ["I32"], [inner]);
  const spread = intGroups(rows, scheme, { out, inner });
  // Nibbles come in pairs: a line of odd length needs bytes.
  const how: PackedForm = { bits: scheme.bits, nibbles: scheme.bits <= 4 && inner % 2 === 0 };
  const common = {
    kind: "codes",
    format: how.nibbles ? "int4" : "int8",
    shape,
    group: spread.group,
    rows: 1,
  } as const;
  const lines = gridLines(rows, scheme);
  const sayTheSame = async (checkpoint: Checkpoint): Promise<void> => {
    await once(checkpoint, size, (bytes) => {
      const found =
        sizes.dtype === "I64"
          ? Array.from(new BigInt64Array(bytes.slice().buffer), String)
          : [...as32(bytes)].map(String);
      if (found.join() !== `${total},${inner}`)
        fail(piece, `${quote(size)} says [${found.join(", ")}], but config.json asks for [${total}, ${inner}]`);
    });
    if (!names.has(order)) return;
    await once(checkpoint, order, (bytes) => {
      const groups = as32(bytes);
      // -1 everywhere stands for columns in order.
      const inSequence =
        groups.every((g) => g === 0xffffffff) || groups.every((g, i) => g === Math.floor(i / scheme.group));
      if (!inSequence)
        fail(
          piece,
          `${quote(order)} reorders its columns (actorder "group"), which is not supported; use actorder "weight" or none`,
        );
    });
  };
  const readZeros = async (checkpoint: Checkpoint): Promise<Uint8Array> => {
    const from = Math.floor(lines.from / perWord);
    const to = Math.ceil(lines.to / perWord);
    const whole = { entry: 0, total: Math.ceil(scheme.down / perWord) };
    const bytes = await readRows(checkpoint, zero, whole, { from, to, bytes: 4 * scheme.across });
    // [lines, groups]
    return unpackZeros(as32(bytes), {
      ...how,
      groups: scheme.across,
      from: lines.from - from * perWord,
      count: lines.to - lines.from,
    });
  };
  return {
    form: { ...common, zeros: hasZeros },
    async read(checkpoint) {
      await sayTheSame(checkpoint);
      const bytes = 4 * line;
      const [stored, scales, zeros] = await Promise.all([
        readRows(checkpoint, codes, rows, { from: rows.from, to: rows.to, bytes }),
        readScales(checkpoint, scale, scheme, lines),
        hasZeros ? readZeros(checkpoint) : undefined,
      ]);
      return {
        ...common,
        codes: unpackLines(aligned(inOrder(stored, rows, out, bytes), 4), { ...how, length: inner }),
        scales: spread.over(scales, lines.from, (n) => new Float32Array(n)),
        ...(zeros ? { zeros: spread.over(zeros, lines.from, (n) => new Uint8Array(n)) } : {}),
      };
    },
  };
}

// ---------------------------------------------------------------------------------------------- what others call

/**
 * Checks a piece from the headers alone, and says what it will be.
 * Throws CheckpointError that names the tensor, what was found and what is supported: for a tensor that is missing, of another
 * shape or dtype, with scales that fit nothing in config.json, or of a form that is not read (GPTQ, AWQ, bitsandbytes, NVFP4).
 */
export const checkPiece = (index: CheckpointIndex, piece: Piece): StoredForm => check(index, piece).form;

/**
 * A piece in the type in which it is stored. Reads the byte ranges of its rows and their scales: for an expert of a stacked tensor never
 * the whole tensor. F64 becomes f32; codes of 2 and 3 bits become int4, of 5 to 7 bits int8; nothing else changes.
 * Throws CheckpointError as `checkPiece` does, before anything is allocated, and where columns are reordered (`weight_g_idx`).
 */
export const readPiece = async (checkpoint: Checkpoint, piece: Piece): Promise<HostMatrix> =>
  check(checkpoint, piece).read(checkpoint);
