// The products of a Mixture-of-Experts layer over ragged blocks of rows, and the way back to the tokens.
//
// Where shapes cost nothing (cpu, wasm, tensorflow) each expert's block is sliced out by ends that the host reads. On WebGL and
// WebGPU every new shape would compile new programs, and WebGPU cannot be read: there the rows are laid out in tiles of one size,
// each of one expert, padded with zeros, whose number depends on sizes alone; one batched product serves them all.
import type { Kernel } from "@switchyard/core";
import { type Device, like, matrixOf, numbers, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { select } from "./elementwise.ts";
import { inverse, takeRows } from "./rows.ts";

export function expertKernels(device: Device): { readonly [fused: string]: Kernel<TfTensor> } {
  const { tf, kernel } = device;
  return {
    groupedMatmul: kernel<{ readonly transposed?: boolean }>(({ x, attrs: { transposed = false }, spec }) => {
      const [rows, w, ends] = [x(0), x(1), x(2)];
      if (rows.size === 0 || w.size === 0) return zeros(tf, spec());
      return device.compiles
        ? groupedByTiles(device, rows, w, ends, transposed)
        : groupedByBlocks(device, rows, w, ends, transposed);
    }),

    groupedOuter: kernel(({ x, spec }) => {
      const [a, b, ends] = [x(0), x(1), x(2)];
      if (a.size === 0 || b.size === 0) return zeros(tf, spec());
      return device.compiles ? outerByTiles(device, a, b, ends) : outerByBlocks(device, a, b, ends);
    }),

    combineRows: kernel(({ x, spec }) => {
      const [out, weights, slots] = [x(0), x(1), x(2)];
      const [tokens = 0, k = 0] = weights.shape;
      const width = out.shape[1] ?? 0;
      if (out.size === 0 || weights.size === 0) return zeros(tf, spec());
      const places = rowOfSlot(device, slots, tokens * k); // [tokens * k], 0 = none
      // A gather, not a scatter: every slot has one row at most, row 0 is zero.
      const rows = tf.gather(
        tf.pad(out, [
          [1, 0],
          [0, 0],
        ]),
        places,
      ); // [tokens * k, width]
      const none = tf.equal(places, like(tf, places, 0));
      const used = select(device, none, 0, tf.reshape(weights, [tokens * k]), [tokens * k]);
      return tf.matMul(tf.reshape(used, [tokens, 1, k]), tf.reshape(rows, [tokens, k, width])); // [tokens, 1, width]
    }),

    combineRowsGrad: kernel(({ x, spec }) => {
      const [out, weights, slots, dy] = [x(0), x(1), x(2), x(3)];
      const [tokens = 0, k = 0] = weights.shape;
      if (out.size === 0 || weights.size === 0) return [zeros(tf, spec(0)), zeros(tf, spec(1))];
      const perSlot = takeRows(device, tf.reshape(weights, [tokens * k, 1]), slots); // [bound, 1]
      const g = takeRows(device, dy, tokenOfSlot(device, slots, k)); // [bound, width]
      const dots = tf.sum(tf.mul(out, g), 1); // [bound]
      const places = rowOfSlot(device, slots, tokens * k);
      return [tf.mul(g, perSlot), tf.gather(tf.pad(dots, [[1, 0]]), places)];
    }),
  };
}

/** The row that serves each slot, plus one; 0 where none does. Made once for the forward and the backward pass. */
function rowOfSlot(device: Device, slots: TfTensor, size: number): TfTensor {
  return one(device.derived(slots, `inverse ${size}`, () => [inverse(device, slots, size)]));
}

/** floor(slot / k); -1 stays -1. */
function tokenOfSlot(device: Device, slots: TfTensor, k: number): TfTensor {
  const { tf } = device;
  const known = device.knownInts(slots);
  if (known) {
    return device.ints(
      known.map((slot) => Math.floor(slot / k)),
      slots.shape,
    );
  }
  // Half a step keeps the quotient clear of whole numbers, whatever way it is rounded.
  return tf.cast(tf.floor(tf.div(tf.add(tf.cast(slots, "float32"), 0.5), k)), "int32");
}

const one = (list: readonly TfTensor[]): TfTensor => {
  const [x] = list;
  if (!x) throw new RangeError("an empty list");
  return x;
};

// ---------------------------------------------------------------- blocks
interface Block {
  readonly expert: number;
  readonly start: number;
  readonly size: number;
}
const blocksOf = (ends: Int32Array): Block[] =>
  Array.from(ends, (end, expert) => {
    const start = expert === 0 ? 0 : (ends[expert - 1] ?? 0);
    return { expert, start, size: end - start };
  });

function groupedByBlocks(device: Device, rows: TfTensor, w: TfTensor, ends: TfTensor, transposed: boolean): TfTensor {
  const { tf } = device;
  const [n = 0, width = 0] = rows.shape;
  const [, p = 0, q = 0] = w.shape;
  const closed = device.readInts(ends);
  const parts = blocksOf(closed)
    .filter(({ size }) => size > 0)
    .map(({ expert, start, size }) => {
      const own = tf.reshape(tf.slice(w, [expert, 0, 0], [1, p, q]), [p, q]);
      return tf.matMul(tf.slice(rows, [start, 0], [size, width]), own, false, !transposed);
    });
  const rest = n - (closed.at(-1) ?? 0);
  if (rest > 0) parts.push(tf.zeros([rest, transposed ? q : p]));
  return parts.length === 1 ? one(parts) : tf.concat(parts, 0);
}

function outerByBlocks(device: Device, a: TfTensor, b: TfTensor, ends: TfTensor): TfTensor {
  const { tf } = device;
  const [p = 0, q = 0] = [a.shape[1], b.shape[1]];
  const parts = blocksOf(device.readInts(ends)).map(({ start, size }) => {
    if (size === 0) return tf.zeros([1, p, q]);
    const outer = tf.matMul(tf.slice(a, [start, 0], [size, p]), tf.slice(b, [start, 0], [size, q]), true);
    return tf.reshape(outer, [1, p, q]);
  });
  return parts.length === 1 ? one(parts) : tf.concat(parts, 0);
}

// ---------------------------------------------------------------- tiles
interface Tiles {
  readonly size: number;
  readonly count: number;
  /** i32 `[count * size]`: the row at each place, n = none. */
  readonly rows: TfTensor;
  /** i32 `[count]`: the expert of each tile. */
  readonly experts: TfTensor;
  /** i32 `[n]`: the place of each row, count * size behind the last block. */
  readonly places: TfTensor;
}

/** Half of an even share: twice the smallest tile's padding costs less than reading the weights twice as often. */
const tileSize = (n: number, experts: number): number => 2 ** Math.max(2, Math.ceil(Math.log2(n / experts / 2)));

/** Where the rows of each block lie among tiles. All numbers are f32, exact up to 2^24 rows. */
function tilesOf(device: Device, ends: TfTensor, n: number): Tiles {
  const { tf } = device;
  const experts = ends.size;
  const size = tileSize(n, experts);
  const count = Math.floor(n / size) + experts;
  const list = device.derived(ends, `tiles ${n}`, () => {
    const closed = tf.cast(ends, "float32"); // [experts]
    const starts = tf.slice(tf.pad(closed, [[1, 0]]), [0], [experts]);
    const needed = tf.floor(tf.mul(tf.add(tf.sub(closed, starts), size - 1), 1 / size));
    const closedTiles = tf.cumsum(needed);
    const firstTile = tf.sub(closedTiles, needed);
    /** The expert whose block holds each position: how many blocks end at or before it. */
    const owner = (ends: TfTensor, positions: TfTensor): TfTensor => {
      const passed = tf.lessEqual(tf.reshape(ends, [1, experts]), tf.reshape(positions, [positions.size, 1]));
      return tf.cast(tf.minimum(tf.sum(numbers(tf, passed), 1), experts - 1), "int32");
    };

    const tile = tf.range(0, count, 1, "float32");
    const ofTile = owner(closedTiles, tile); // [count]
    const offset = tf.mul(tf.sub(tile, tf.gather(firstTile, ofTile)), size);
    const first = tf.reshape(tf.add(tf.gather(starts, ofTile), offset), [count, 1]);
    const row = tf.add(first, tf.range(0, size, 1, "float32")); // [count, size]
    const filled = tf.less(row, tf.reshape(tf.gather(closed, ofTile), [count, 1]));
    const rows = select(device, filled, row, n, [count, size]);

    const position = tf.range(0, n, 1, "float32");
    const ofRow = owner(closed, position); // [n]
    const inBlock = tf.sub(position, tf.gather(starts, ofRow));
    const place = tf.add(tf.mul(tf.gather(firstTile, ofRow), size), inBlock);
    const taken = tf.less(position, tf.slice(closed, [experts - 1], [1]));
    const places = select(device, taken, place, count * size, [n]);
    return [tf.cast(tf.reshape(rows, [count * size]), "int32"), ofTile, tf.cast(places, "int32")];
  });
  const [rows, owners, places] = list;
  if (!rows || !owners || !places) throw new RangeError("three tensors describe the tiles");
  return { size, count, rows, experts: owners, places };
}

/** The rows of x [n, width] laid out in tiles: [count, size, width]. */
function intoTiles({ tf }: Device, x: TfTensor, { count, size, rows }: Tiles): TfTensor {
  const padded = tf.pad(x, [
    [0, 1],
    [0, 0],
  ]);
  return tf.reshape(tf.gather(padded, rows), [count, size, x.shape[1] ?? 0]);
}

function groupedByTiles(device: Device, rows: TfTensor, w: TfTensor, ends: TfTensor, transposed: boolean): TfTensor {
  const { tf } = device;
  const tiles = tilesOf(device, ends, rows.shape[0] ?? 0);
  const products = tf.matMul(intoTiles(device, rows, tiles), tf.gather(w, tiles.experts), false, !transposed);
  return tf.gather(
    tf.pad(matrixOf(tf, products), [
      [0, 1],
      [0, 0],
    ]),
    tiles.places,
  );
}

function outerByTiles(device: Device, a: TfTensor, b: TfTensor, ends: TfTensor): TfTensor {
  const { tf } = device;
  const tiles = tilesOf(device, ends, a.shape[0] ?? 0);
  const [p = 0, q = 0] = [a.shape[1], b.shape[1]];
  const outers = tf.matMul(intoTiles(device, a, tiles), intoTiles(device, b, tiles), true); // [count, p, q]
  const experts = ends.size;
  const own = tf.equal(
    tf.reshape(tf.range(0, experts, 1, "int32"), [experts, 1]),
    tf.reshape(tiles.experts, [1, tiles.count]),
  );
  const sums = tf.matMul(numbers(tf, own), tf.reshape(outers, [tiles.count, p * q])); // [experts, p * q]
  return tf.reshape(sums, [experts, p, q]);
}
