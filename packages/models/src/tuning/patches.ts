// Where changed parameters lie in the tensors of a checkpoint: the stored rows that each of their parts fills, and the bytes of a tensor
// with its new values, a few rows at a time.
import { CheckpointError, reshape, ShapeError, slice, type Tensor, UnsupportedError } from "@switchyard/core";
import type { Origin, SourceTensor } from "../conversion/origin.ts";
import type { Checkpoint } from "../model.ts";
import { quote } from "../safetensors.ts";
import type { Description, Piece, Source } from "../source.ts";
import { checkPiece, pieceNames, readPiece, rowsOf, widen } from "../stored-matrix.ts";
import { type Codec, codecs, type MergeCounts, merged, type Numbers, same } from "./merge.ts";

/** A part of a changed parameter and the stored rows that it fills. */
export interface Slot {
  readonly path: string;
  /** The whole parameter. */
  readonly values: Tensor;
  readonly piece: Piece;
  /** The first of the piece's rows, of all rows of the parameter. */
  readonly row: number;
}

/** A stored tensor of plain numbers, and what fills it. */
export interface Patch {
  readonly tensor: SourceTensor;
  readonly codec: Codec;
  /** One, or that of stacked experts. */
  readonly entries: number;
  /** Of an entry, in the file's order: [rows, inner], transposed [inner, rows]. */
  readonly rows: number;
  readonly inner: number;
  readonly transposed: boolean;
  /** By entry. */
  readonly slots: ReadonlyMap<number, readonly Slot[]>;
}

export type Changed = ReadonlyMap<string, Tensor>;

const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
const rowsIn = (shape: readonly number[]): number => shape[0] ?? 1;
const innerOf = (shape: readonly number[]): number => sizeOf(shape.slice(1));

/** The parts of a parameter, from its first row on. */
function slotsOf(path: string, values: Tensor, source: Source): Slot[] {
  const lists =
    source.kind === "whole"
      ? [source.pieces]
      : Array.from({ length: source.shape[0] ?? 0 }, (_, e) => source.expert(e));
  let row = 0;
  return lists.flat().map((piece) => {
    const slot = { path, values, piece, row };
    row += rowsIn(piece.shape);
    return slot;
  });
}

/**
 * All parts of the changed parameters: those that lie in plain numbers, tensor by tensor, and those that are quantised.
 * Throws CheckpointError for a parameter that the model has not, ShapeError for one of another shape or type.
 */
export function patchesOf(
  { tensors, checkpoint }: Origin,
  { sources, copies = new Map<string, string>() }: Description,
  changed: Changed,
): { readonly patches: ReadonlyMap<string, Patch>; readonly quantized: readonly Slot[] } {
  const stored = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const known = new Set([...changed].flatMap(([path, x]) => (sources.has(path) ? [x] : [])));
  const slots: Slot[] = [];
  for (const [path, values] of changed) {
    const source = sources.get(path);
    if (!source) {
      // What layers share is stored once, under its first path.
      if (known.has(values)) continue;
      const some = [...sources.keys()].slice(0, 3).map(quote).join(", ");
      throw new CheckpointError(
        `saveTuned: the checkpoint has no parameter ${quote(path)}; it has ${sources.size}, such as ${some}`,
      );
    }
    if (source.shape.join() !== values.shape.join()) {
      throw new ShapeError(`saveTuned: ${quote(path)} is [${values.shape}], and [${source.shape}] in the checkpoint`);
    }
    slots.push(...slotsOf(path, values, source));
  }
  for (const [name, path] of copies) {
    const [values, source] = [changed.get(path), sources.get(path)];
    if (!values || !source || !stored.has(name)) continue;
    const piece = { name, shape: source.shape };
    checkPiece(checkpoint, piece);
    slots.push({ path, values, piece, row: 0 });
  }
  const quantized: Slot[] = [];
  const patches = new Map<string, Patch & { readonly slots: Map<number, Slot[]> }>();
  for (const slot of slots) {
    const { name, shape, index = 0, of = 1, rows, transposed = false } = slot.piece;
    const tensor = stored.get(name);
    const codec = tensor && codecs.get(tensor.dtype);
    const type = codec?.values ?? "f32";
    if (slot.values.dtype !== type) {
      throw new ShapeError(
        `saveTuned: ${quote(slot.path)} is ${slot.values.dtype}; give its values in ${type}${type === "f32" ? ', as a model loaded with weights: "f32" has them' : ""}`,
      );
    }
    if (!tensor || !codec) {
      quantized.push(slot);
      continue;
    }
    const patch = patches.get(name) ?? {
      ...{ tensor, codec, entries: of, rows: rows?.total ?? rowsIn(shape), inner: innerOf(shape), transposed },
      slots: new Map<number, Slot[]>(),
    };
    patches.set(name, patch);
    patch.slots.set(index, [...(patch.slots.get(index) ?? []), slot]);
  }
  return { patches, quantized };
}

/** Values of the piece's rows, from row `first` on. */
export async function valuesOf({ values, piece, row }: Slot, first: number, count: number): Promise<Numbers> {
  const inner = innerOf(piece.shape);
  const part = values.engine.scope(() =>
    slice(reshape(values, [values.size / Math.max(1, inner), inner]), [row + first, 0], [count, inner]),
  );
  try {
    const data = await part.data();
    return data instanceof Float32Array
      ? data
      : values.dtype === "f32"
        ? Float32Array.from(data)
        : Float64Array.from(data);
  } finally {
    // It is the parameter itself where that is asked for as it is.
    if (part !== values) part.dispose();
  }
}

/** Numbers of a tensor that are in memory at once, unless a row, or a matrix that is stored transposed, has more. */
const chunkSize = 1 << 22;

/** Stored rows of an entry, some at a time. */
export function* chunksOf({ rows, inner, transposed }: Patch): Generator<readonly [from: number, to: number]> {
  const step = transposed ? rows : Math.max(1, Math.floor(chunkSize / Math.max(1, inner)));
  for (let from = 0; from < rows; from += step) yield [from, Math.min(rows, from + step)];
}

/** Bytes of these rows in the tensor. */
export function bytesOfRows(
  { rows, inner, codec }: Patch,
  entry: number,
  [from, to]: readonly [from: number, to: number],
): [from: number, to: number] {
  const line = inner * codec.bytes;
  return [(entry * rows + from) * line, (entry * rows + to) * line];
}

/** Runs of a piece's rows that lie in the stored rows from..to: all, or those of gate and those of up where the two alternate. */
function runsIn(
  { shape, rows, alternating = false }: Piece,
  from: number,
  to: number,
): readonly (readonly [number, number])[] {
  const out = rowsIn(shape);
  const { from: start, total } = rows ?? { from: 0, total: out };
  const half = total / 2;
  const spans = alternating
    ? [
        [Math.ceil(from / 2), Math.ceil(to / 2)],
        [half + Math.floor(from / 2), half + Math.floor(to / 2)],
      ]
    : [[from, to]];
  return spans.flatMap(([a = 0, b = 0]) => {
    const [first, end] = [Math.max(0, a - start), Math.min(out, b - start)];
    return first < end ? [[first, end] as const] : [];
  });
}

/** The bytes of stored rows of an entry with their new values; what did not change has its own bytes. */
export async function patched(
  checkpoint: Checkpoint,
  patch: Patch,
  { entry, chunk, counts }: { entry: number; chunk: readonly [from: number, to: number]; counts?: MergeCounts },
): Promise<{ readonly stored: Uint8Array; readonly bytes: Uint8Array }> {
  const { tensor, codec, rows, inner, transposed, slots } = patch;
  const [from, to] = chunk;
  const stored = await checkpoint.read(tensor.name, bytesOfRows(patch, entry, chunk));
  const before = codec.read(stored);
  const values = before.slice();
  for (const slot of slots.get(entry) ?? []) {
    const { piece } = slot;
    const place = piece.shape.length === 0 ? (i: number): number => i : rowsOf(piece).place;
    for (const [first, end] of runsIn(piece, from, to)) {
      const given = await valuesOf(slot, first, end - first);
      for (let i = first; i < end; i++) {
        const row = given.subarray((i - first) * inner, (i - first + 1) * inner);
        const at = place(i);
        if (!transposed) values.set(row, (at - from) * inner);
        else for (let j = 0; j < inner; j++) values[j * rows + at] = row[j] as number;
      }
    }
  }
  const { name, dtype } = tensor;
  return { stored, bytes: merged(stored, { before, values }, { codec, name, dtype, ...(counts ? { counts } : {}) }) };
}

/** Throws UnsupportedError where values of quantised parts are not those that are stored. */
export async function checkQuantized(
  checkpoint: Checkpoint,
  slots: readonly Slot[],
  advance: (bytes: number) => void,
): Promise<void> {
  for (const slot of slots) {
    const { path, piece } = slot;
    const old = widen(await readPiece(checkpoint, piece));
    const values = await valuesOf(slot, 0, rowsIn(piece.shape));
    const names = pieceNames(piece, checkpoint);
    advance(old.byteLength);
    if (values.every((x, i) => same(x, old[i] as number))) continue;
    const forms = [...new Set(names.map((name) => checkpoint.stored(name).dtype))].join(", ");
    throw new UnsupportedError(
      `saveTuned: ${quote(path)} was changed, and ${quote(names[0] ?? piece.name)} stores it quantised (${forms}), which is not written. ` +
        "Train other parts, or start from a checkpoint of the same model in floats; nothing was written",
    );
  }
}

/** Bytes that `checkQuantized` will count. */
export const quantizedBytes = (slots: readonly Slot[]): number =>
  slots.reduce((sum, { piece }) => sum + 4 * sizeOf(piece.shape), 0);

/** Some rows of a piece, and what a loader reads there. */
export interface RowsBack {
  readonly first: number;
  readonly count: number;
  read(checkpoint: Checkpoint): Promise<Numbers>;
}

/** All rows of a piece, some at a time. */
export function* rowsBack({ piece }: Slot, { codec, transposed }: Patch): Generator<RowsBack> {
  const { name, shape, rows, ...form } = piece;
  const [out = 1, ...rest] = shape;
  if (shape.length === 0 || codec.values !== "f32") {
    // Buffers of routers in our own layout: a tensor is a parameter.
    yield { first: 0, count: out, read: async (checkpoint) => codec.read(await checkpoint.read(name)) };
    return;
  }
  const { from, total } = rows ?? { from: 0, total: out };
  const step = transposed ? out : Math.max(1, Math.floor(chunkSize / Math.max(1, sizeOf(rest))));
  for (let first = 0; first < out; first += step) {
    const count = Math.min(step, out - first);
    const part = { ...form, name, shape: [count, ...rest], rows: { from: from + first, total } };
    yield { first, count, read: async (checkpoint) => widen(await readPiece(checkpoint, part)) };
  }
}
