// Rows by id, entries of the last axis by id. An id outside the table reads zeros and adds nothing, whatever stands there: masks
// choose, they do not multiply, or NaN would pass.
import type { Kernel } from "@switchyard/core";
import { type Device, like, matrixOf, numbers, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { select } from "./elementwise.ts";

type Table = { readonly [P in "takeRows" | "addRows"]: Kernel<TfTensor> } & {
  readonly [fused: string]: Kernel<TfTensor>;
};

export function rowKernels(device: Device): Table {
  const { tf, kernel } = device;
  return {
    takeRows: kernel(({ x, spec }) => {
      const [table, ids] = [x(0), x(1)];
      if (table.size === 0) return zeros(tf, spec());
      const n = table.shape[0] ?? 0;
      return takeRows(device, tf.reshape(table, [n, table.size / n]), tf.reshape(ids, [ids.size]));
    }),

    addRows: kernel<{ readonly rows: number }>(({ x, attrs: { rows }, spec }) => {
      const [updates, ids] = [x(0), x(1)];
      if (updates.size === 0) return zeros(tf, spec());
      return addRows(device, tf.reshape(updates, [ids.size, updates.size / ids.size]), ids, rows);
    }),

    gatherLast: kernel(({ x, spec }) => {
      const [values, ids] = [matrixOf(tf, x(0)), matrixOf(tf, x(1))];
      if (values.size === 0) return zeros(tf, spec());
      return gatherLast(device, values, ids);
    }),

    scatterLast: kernel<{ readonly size: number }>(({ x, attrs: { size }, spec }) => {
      if (x(0).size === 0) return zeros(tf, spec());
      const [values, ids] = [matrixOf(tf, x(0)), matrixOf(tf, x(1))]; // [rows, k]
      const [rows = 0, k = 0] = values.shape;
      const hit = tf.equal(tf.reshape(ids, [rows, k, 1]), tf.range(0, size, 1, "int32")); // [rows, k, size]
      const spread = select(device, hit, tf.reshape(values, [rows, k, 1]), 0, [rows, k, size]);
      return k === 1 ? spread : tf.sum(spread, 1); // [rows, size]
    }),
  };
}

const inside = ({ tf }: Device, ids: TfTensor, n: number): TfTensor =>
  tf.logicalAnd(tf.greaterEqual(ids, like(tf, ids, 0)), tf.less(ids, like(tf, ids, n)));

const allInside = (device: Device, ids: TfTensor, n: number): boolean =>
  device.knownInts(ids)?.every((id) => id >= 0 && id < n) ?? false;

/** table [n, width] by ids [m]: [m, width]. */
export function takeRows(device: Device, table: TfTensor, ids: TfTensor): TfTensor {
  const { tf } = device;
  const [n = 0, width = 0] = table.shape;
  if (allInside(device, ids, n)) return tf.gather(table, ids);
  const valid = inside(device, ids, n);
  const found = tf.gather(table, select(device, valid, ids, 0, ids.shape));
  return select(device, tf.reshape(valid, [ids.size, 1]), found, 0, [ids.size, width]);
}

/** values [rows, n] by ids [rows, k]: [rows, k]. */
export function gatherLast(device: Device, values: TfTensor, ids: TfTensor): TfTensor {
  const { tf } = device;
  const [rows = 0, n = 0] = values.shape;
  const first = device.ints(
    Int32Array.from({ length: rows }, (_, row) => row * n),
    [rows, 1],
  );
  const valid = inside(device, ids, n);
  const safe = select(device, valid, ids, 0, ids.shape);
  const found = tf.gather(tf.reshape(values, [rows * n]), tf.reshape(tf.add(safe, first), [ids.size]));
  return select(device, valid, tf.reshape(found, ids.shape), 0, ids.shape);
}

/** updates [m, width] summed at ids [m] into zeros: [rows, width]. */
export function addRows(device: Device, updates: TfTensor, ids: TfTensor, rows: number): TfTensor {
  const { tf } = device;
  const [m = 0, width = 0] = updates.shape;
  if (device.name === "webgpu") return addRowsByProduct(device, updates, ids, rows);
  const spread = (to: TfTensor, n: number): TfTensor => tf.scatterND(tf.reshape(to, [m, 1]), updates, [n, width]);
  if (allInside(device, ids, rows)) return spread(ids, rows);
  // Rows that are dropped go to one row more, which is cut off.
  const target = select(device, inside(device, ids, rows), ids, rows, ids.shape);
  return tf.slice(spread(target, rows + 1), [0, 0], [rows, width]);
}

/** Entries of a mask matrix at a time, and rows summed at a time: the library splits longer sums over threads in any order. */
const MASK_ENTRIES = 2 ** 24;
const SUMMED_AT_ONCE = 1024;

/**
 * The same as products with 0/1 matrices. TensorFlow.js scatters floats on WebGPU by atomic additions, whose order, and so whose
 * rounding, differs from run to run.
 */
function addRowsByProduct(device: Device, updates: TfTensor, ids: TfTensor, rows: number): TfTensor {
  const { tf } = device;
  const [m = 0, width = 0] = updates.shape;
  const kept = allInside(device, ids, rows)
    ? updates
    : select(device, tf.reshape(inside(device, ids, rows), [m, 1]), updates, 0, [m, width]);
  const targets = tf.reshape(tf.range(0, rows, 1, "int32"), [rows, 1]);
  const step = Math.max(1, Math.min(SUMMED_AT_ONCE, Math.floor(MASK_ENTRIES / rows)));
  let total: TfTensor | undefined;
  for (let from = 0; from < m; from += step) {
    const n = Math.min(step, m - from);
    const mask = numbers(tf, tf.equal(targets, tf.reshape(tf.slice(ids, [from], [n]), [1, n]))); // [rows, n]
    const part = tf.matMul(mask, tf.slice(kept, [from, 0], [n, width]));
    total = total ? tf.add(total, part) : part;
  }
  return total ?? tf.zeros([rows, width]);
}

/** For each place of 0..size-1 the index, plus one, of the id [m] that names it, 0 where none does. No two ids name one place. */
export function inverse(device: Device, ids: TfTensor, size: number): TfTensor {
  const { tf } = device;
  const known = device.knownInts(ids);
  if (known) {
    const places = new Int32Array(size);
    known.forEach((id, i) => {
      if (id >= 0 && id < size) places[id] = i + 1;
    });
    return device.ints(places, [size]);
  }
  const m = ids.size;
  const target = select(device, inside(device, ids, size), ids, size, ids.shape);
  const found = tf.scatterND(tf.reshape(target, [m, 1]), tf.range(1, m + 1, 1, "int32"), [size + 1]);
  return tf.slice(found, [0], [size]);
}
