// Orders, counts and the counting sort that sends tokens to experts. Where the host can read, it decides there, in plain loops:
// TensorFlow.js itself sorts on the host on every backend but WebGPU, and not always stably. On WebGPU everything stays on the
// device.
import type { Kernel } from "@switchyard/core";
import { type Device, like, matrixOf, numbers, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { select } from "./elementwise.ts";

type Table = { readonly [P in "topkIndices" | "argsort" | "blockEnds"]: Kernel<TfTensor> } & {
  readonly [fused: string]: Kernel<TfTensor>;
};
interface Argsort {
  readonly descending?: boolean;
  readonly bound?: number;
}
interface Dispatch {
  readonly count: number;
  readonly bound: number;
}

export function orderKernels(device: Device): Table {
  const { tf, kernel, canRead } = device;
  return {
    topkIndices: kernel<{ readonly k: number }>(({ x, attrs: { k }, spec }) => {
      const rows = matrixOf(tf, x(0));
      if (canRead) return device.ints(topkOnHost(readFloats(rows), rows.shape[1] ?? 0, k), spec().shape);
      return tf.slice(sortOnDevice(device, floatKeys(device, rows, true)), [0, 0], [rows.shape[0] ?? 0, k]);
    }),

    argsort: kernel<Argsort>(({ x, attrs: { descending = false, bound }, spec }) => {
      const rows = matrixOf(tf, x(0));
      const n = rows.shape[1] ?? 0;
      const integers = rows.dtype === "int32";
      const known = integers ? device.knownInts(rows) : undefined;
      if (known || canRead) {
        const data = known ?? (integers ? device.readInts(rows) : readFloats(rows));
        const order =
          bound === undefined ? argsortOnHost(data, n, descending) : countingSort(data, n, bound, descending);
        return device.ints(order, spec().shape);
      }
      // WebGPU computes with integers as f32 numbers, exact up to 2^24.
      return sortOnDevice(
        device,
        integers ? integerKeys(device, rows, descending) : floatKeys(device, rows, descending),
      );
    }),

    blockEnds: kernel<{ readonly count: number }>(({ x, attrs: { count }, spec }) => {
      const ids = x(0);
      if (ids.size === 0) return zeros(tf, spec());
      if (canRead) return device.ints(endsOnHost(device.readInts(ids), count), [count]);
      const valid = tf.greaterEqual(ids, like(tf, ids, 0));
      const until = tf.lessEqual(
        tf.reshape(ids, [1, ids.size]),
        tf.reshape(tf.range(0, count, 1, "int32"), [count, 1]),
      );
      const counted = tf.logicalAnd(until, tf.reshape(valid, [1, ids.size])); // [count, m]
      return tf.cast(tf.sum(numbers(tf, counted), 1), "int32");
    }),

    dispatch: kernel<Dispatch>(({ x, attrs, spec }) => {
      const ids = x(0); // [tokens, k]
      if (ids.size === 0) return [zeros(tf, spec(0)), zeros(tf, spec(1)), zeros(tf, spec(2))];
      if (!canRead) return dispatchOnDevice(device, ids, attrs);
      const { rows, slots, ends } = dispatchOnHost(device.readInts(ids), ids.shape[1] ?? 1, attrs);
      return [device.ints(rows, spec(0).shape), device.ints(slots, spec(1).shape), device.ints(ends, spec(2).shape)];
    }),
  };
}

// ---------------------------------------------------------------- on the host
const readFloats = (x: TfTensor): Float32Array => {
  const values = x.dataSync();
  if (!(values instanceof Float32Array)) throw new Error(`expected float32, found ${x.dtype}`);
  return values;
};

/** Whether a comes before b in descending order; NaN comes last, equal values keep their order. */
const before = (a: number, b: number): boolean => a > b || (Number.isNaN(b) && !Number.isNaN(a));

/** Ids of the k largest of each row of n. */
function topkOnHost(data: Float32Array, n: number, k: number): Int32Array {
  // Insertion costs n k, a sort n log n.
  if (k > 32) {
    const whole = argsortOnHost(data, n, true);
    return k === n
      ? whole
      : Int32Array.from({ length: (data.length / n) * k }, (_, i) => whole[Math.floor(i / k) * n + (i % k)] ?? 0);
  }
  const rows = data.length / n;
  const best = new Int32Array(rows * k);
  for (let row = 0; row < rows; row++) {
    const [from, out] = [row * n, row * k];
    for (let i = 0, filled = 0; i < n; i++) {
      const value = data[from + i] as number;
      const at = (place: number): number => data[from + (best[out + place] as number)] as number;
      if (filled === k && !before(value, at(k - 1))) continue;
      let place = filled < k ? filled++ : k - 1;
      for (; place > 0 && before(value, at(place - 1)); place--) best[out + place] = best[out + place - 1] as number;
      best[out + place] = i;
    }
  }
  return best;
}

/** Ids that sort each row of n, stable. */
function argsortOnHost(data: Float32Array | Int32Array, n: number, descending: boolean): Int32Array {
  const order = new Int32Array(data.length);
  for (let from = 0; from < data.length; from += n) {
    const at = (i: number): number => data[from + i] as number;
    const row = order.subarray(from, from + n);
    for (let i = 0; i < n; i++) row[i] = i;
    row.sort((i, j) => {
      const [a, b] = [at(i), at(j)];
      if (a === b) return i - j;
      if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || i - j;
      return a < b === descending ? 1 : -1;
    });
  }
  return order;
}

/** The same for integers in [0, bound). */
function countingSort(data: Float32Array | Int32Array, n: number, bound: number, descending: boolean): Int32Array {
  const order = new Int32Array(data.length);
  const next = new Int32Array(bound + 1);
  for (let from = 0; from < data.length; from += n) {
    next.fill(0);
    const key = (i: number): number =>
      descending ? bound - 1 - (data[from + i] as number) : (data[from + i] as number);
    for (let i = 0; i < n; i++) next[key(i) + 1] = (next[key(i) + 1] as number) + 1;
    for (let e = 1; e <= bound; e++) next[e] = (next[e] as number) + (next[e - 1] as number);
    for (let i = 0; i < n; i++) {
      const place = next[key(i)] as number;
      next[key(i)] = place + 1;
      order[from + place] = i;
    }
  }
  return order;
}

function endsOnHost(ids: Int32Array, count: number): Int32Array {
  const ends = new Int32Array(count);
  for (const id of ids) if (id >= 0 && id < count) ends[id] = (ends[id] as number) + 1;
  for (let e = 1; e < count; e++) ends[e] = (ends[e] as number) + (ends[e - 1] as number);
  return ends;
}

function dispatchOnHost(
  ids: Int32Array,
  k: number,
  { count, bound }: Dispatch,
): { readonly rows: Int32Array; readonly slots: Int32Array; readonly ends: Int32Array } {
  const all = endsOnHost(ids, count);
  const next = Int32Array.from(all, (_, e) => (e === 0 ? 0 : (all[e - 1] as number)));
  const [rows, slots] = [new Int32Array(bound).fill(-1), new Int32Array(bound).fill(-1)];
  ids.forEach((e, slot) => {
    if (e < 0 || e >= count) return;
    const place = next[e] as number;
    next[e] = place + 1;
    if (place >= bound) return;
    slots[place] = slot;
    rows[place] = Math.floor(slot / k);
  });
  return { rows, slots, ends: all.map((end) => Math.min(end, bound)) };
}

// ---------------------------------------------------------------- on the device (WebGPU)
/**
 * Numbers whose descending order is the order asked for, NaN last: halving is exact and leaves room at the lower end, so that -inf
 * becomes the lowest finite number and NaN takes the place of -inf.
 */
function floatKeys(device: Device, x: TfTensor, descending: boolean): TfTensor {
  const { tf } = device;
  const key = tf.maximum(tf.mul(x, descending ? 0.5 : -0.5), -3.4028234663852886e38);
  return select(device, tf.isNaN(x), Number.NEGATIVE_INFINITY, key, x.shape);
}

const integerKeys = ({ tf }: Device, x: TfTensor, descending: boolean): TfTensor =>
  tf.cast(descending ? x : tf.sub(like(tf, x, 0), x), "float32");

/**
 * Ids that sort each row of keys [rows, n] in descending order, stable. All n are asked for even where fewer are wanted: the
 * library's top-k compares ids where values are equal in its sort, but not in the merge that a smaller k takes.
 */
function sortOnDevice({ tf }: Device, keys: TfTensor): TfTensor {
  const [rows = 0, n = 0] = keys.shape;
  // The library hands its input on as a result there, and counts it once.
  if (n === 1) return tf.zeros([rows, 1], "int32");
  return tf.topk(keys, n, true).indices;
}

/** The counting sort as running sums over a 0/1 matrix [experts, slots]. Counts are f32 there, exact up to 2^24. */
function dispatchOnDevice(device: Device, ids: TfTensor, { count, bound }: Dispatch): readonly TfTensor[] {
  const { tf } = device;
  const [slots, k] = [ids.size, ids.shape[1] ?? 1];
  const experts = tf.reshape(tf.range(0, count, 1, "int32"), [count, 1]);
  const hot = numbers(tf, tf.equal(experts, tf.reshape(ids, [1, slots]))); // [count, slots]
  const running = tf.cumsum(hot, 1);
  const sizes = tf.slice(running, [0, slots - 1], [count, 1]); // [count, 1]
  const ends = tf.cumsum(sizes, 0);
  const starts = tf.sub(ends, sizes);
  const place = tf.sum(tf.mul(hot, tf.sub(tf.add(running, starts), 1)), 0); // [slots]
  const kept = tf.greater(tf.sum(hot, 0), 0);
  const target = tf.cast(select(device, kept, place, slots, [slots]), "int32");
  // Every place but the last, which collects what is left out, is written at most once.
  const found = tf.scatterND(tf.reshape(target, [slots, 1]), tf.range(1, slots + 1, 1, "int32"), [slots + 1]);
  const sorted = tf.sub(tf.cast(tf.slice(found, [0], [bound]), "float32"), 1); // slot or -1
  const rows = tf.floor(tf.div(tf.add(sorted, 0.5), k));
  return [tf.cast(rows, "int32"), tf.cast(sorted, "int32"), tf.cast(tf.minimum(ends, bound), "int32")];
}
