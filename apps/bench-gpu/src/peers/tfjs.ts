// TensorFlow.js on its WebGPU backend. It has no ragged product, so the layer is written in the ways its users have, each with a
// backward pass by hand (tfjs-core registers no gradients in Node), and whichever is fastest here is measured:
// - sorted: the chosen ids come to the host, rows are sorted by expert there, one product per expert;
// - dense: every expert works on every token in batched products, weights 0 where not chosen; nothing comes to the host;
// - gathered: for one token, the weights of its experts are copied together and multiplied in one batch.
import {
  type Contender,
  hostDispatch,
  type LayerCase,
  type LayerGradientsData,
  layerGradientsData,
  transposed,
} from "@switchyard/bench/kernels";
import type * as TensorFlow from "@tensorflow/tfjs-core";
import { fastest, type PeerSource } from "./peer.ts";

type Tf = typeof TensorFlow;
type T = TensorFlow.Tensor;

const name = "tfjs-webgpu";

/**
 * The ways worth trying. Where arithmetic is dear, as on a driver that computes on the processor, so are hundreds of dispatches:
 * there a little dense work settles it, and much of it is hopeless.
 */
export function waysFor({ experts, width, hidden, tokens }: LayerCase, software: boolean): Ways {
  const denseFlops = 2 * 3 * width * hidden * experts * tokens;
  const dense = software ? denseFlops < 6e7 : tokens <= 256;
  return { dense, sorted: !dense || !software || experts <= 8, gathered: tokens === 1 };
}
interface Ways {
  readonly dense: boolean;
  readonly sorted: boolean;
  readonly gathered: boolean;
}

/** TensorFlow.js on WebGPU. @throws Error where its backend does not start. */
export async function startTfjs(): Promise<Tf> {
  // The backend registers itself only where navigator.gpu is there when it is imported.
  const tf: Tf = await import("@tensorflow/tfjs-core");
  await import("@tensorflow/tfjs-backend-webgpu");
  tf.enableProdMode();
  if (!(await tf.setBackend("webgpu"))) throw new Error("its webgpu backend did not start");
  await tf.ready();
  return tf;
}

export const tfjs: PeerSource = {
  name,
  async open({ software }) {
    const tf = await startTfjs();
    return {
      name,
      version: tf.version_core,
      layer: (one) => fastest(waysToLayer(tf, one, waysFor(one, software))),
      gradients: (one) => fastest(waysToGradients(tf, one, waysFor(one, software))),
    };
  },
};

/** What one way gives: the layer's output, or the gradients of x, logits, gateUp and down. */
type Result = readonly T[];

interface Way {
  readonly note: string;
  /** Enqueues the work. `tf.tidy` cannot span the wait for the ids, so each way frees what it makes. */
  run(on: Operands): Promise<Result>;
  /** The results as our layouts have them. */
  read(results: Result): Promise<readonly Float32Array[]>;
  /** Expert matrices one by one, or stacked. */
  readonly stacked: boolean;
}

interface Operands {
  readonly x: T;
  readonly logits: T;
  readonly dy: T;
  /** Gate, up [width, hidden] and down [hidden, width] of each expert: 2-D, or one 3-D tensor each. */
  readonly gate: readonly T[];
  readonly up: readonly T[];
  readonly down: readonly T[];
}

const at = <V>(list: readonly V[], i: number): V => {
  const value = list[i];
  if (value === undefined) throw new RangeError(`entry ${i} of ${list.length} is missing`);
  return value;
};

function operands(tf: Tf, one: LayerCase, data: LayerGradientsData, stacked: boolean): Operands {
  const { experts, width, hidden, tokens } = one;
  /** Rows `first` to `first + rows` of each expert's matrix, turned to [in, out]. */
  const matrices = (from: Float32Array, all: number, first: number, rows: number, columns: number): T[] => {
    const each = Array.from({ length: experts }, (_, e) => {
      const start = (e * all + first) * columns;
      return transposed(from.subarray(start, start + rows * columns), rows, columns);
    });
    if (!stacked) return each.map((matrix) => tf.tensor2d(matrix, [columns, rows]));
    const stack = new Float32Array(experts * rows * columns);
    for (const [e, matrix] of each.entries()) stack.set(matrix, e * rows * columns);
    return [tf.tensor3d(stack, [experts, columns, rows])];
  };
  return {
    x: tf.tensor2d(data.x, [tokens, width]),
    logits: tf.tensor2d(data.logits, [tokens, experts]),
    dy: tf.tensor2d(data.dy, [tokens, width]),
    gate: matrices(data.gateUp, 2 * hidden, 0, hidden, width),
    up: matrices(data.gateUp, 2 * hidden, hidden, hidden, width),
    down: matrices(data.down, width, 0, width, hidden),
  };
}

/** Each way as something to open; the peer's data is made once for all. */
function openers(tf: Tf, one: LayerCase, ways: readonly Way[]): readonly (() => Promise<Contender>)[] {
  const data = layerGradientsData(one);
  return ways.map((way) => async (): Promise<Contender> => {
    const on = operands(tf, one, data, way.stacked);
    const wait = async (results: Result): Promise<void> => {
      // The queue is in order: one element that has arrived stands for everything before it.
      const corner = tf.tidy(() => tf.slice(tf.reshape(at(results, 0), [-1]), [0], [1]));
      await corner.data();
      tf.dispose([corner, ...results]);
    };
    return {
      name,
      note: way.note,
      run: async () => wait(await way.run(on)),
      async many(runs) {
        for (let run = 1; run < runs; run++) tf.dispose([...(await way.run(on))]);
        await wait(await way.run(on));
        return undefined;
      },
      async output() {
        const results = await way.run(on);
        const arrays = await way.read(results);
        tf.dispose([...results]);
        return arrays;
      },
      dispose: () => tf.dispose(Object.values(on)),
    };
  });
}

const floats = async (x: T): Promise<Float32Array> => Float32Array.from(await x.data());

const readOutput = async (results: Result): Promise<readonly Float32Array[]> => [await floats(at(results, 0))];

/** The layer's output in each of the ways. */
export function waysToLayer(tf: Tf, one: LayerCase, possible: Ways): ReturnType<typeof openers> {
  const ways: Way[] = [];
  if (possible.sorted)
    ways.push({
      note: "sorted on the host",
      stacked: false,
      run: (on) => sorted(tf, one, on, false),
      read: readOutput,
    });
  if (possible.dense)
    ways.push({ note: "all experts", stacked: true, run: async (on) => [dense(tf, one, on)], read: readOutput });
  if (possible.gathered)
    ways.push({
      note: "weights gathered",
      stacked: true,
      run: async (on) => [gathered(tf, one, on)],
      read: readOutput,
    });
  return openers(tf, one, ways);
}

/** The gradients of x, logits, gateUp and down in each of the ways. */
export function waysToGradients(tf: Tf, one: LayerCase, possible: Ways): ReturnType<typeof openers> {
  const { experts, width, hidden } = one;
  /** x, logits, then gates, ups and downs [in, out], one by one or stacked, to x, logits, gateUp and down of ours. */
  const read = async (results: Result): Promise<readonly Float32Array[]> => {
    const stacked = results.length === 5;
    const each = stacked ? 1 : experts;
    const matrices = async (first: number, rows: number, columns: number): Promise<Float32Array[]> => {
      const arrays: Float32Array[] = [];
      for (const x of results.slice(first, first + each)) {
        const all = await floats(x);
        for (let start = 0; start < all.length; start += rows * columns)
          arrays.push(transposed(all.subarray(start, start + rows * columns), rows, columns));
      }
      return arrays;
    };
    const gates = await matrices(2, width, hidden);
    const ups = await matrices(2 + each, width, hidden);
    const downs = await matrices(2 + 2 * each, hidden, width);
    const [gateUp, down] = [new Float32Array(2 * experts * hidden * width), new Float32Array(experts * hidden * width)];
    for (let e = 0; e < experts; e++) {
      gateUp.set(at(gates, e), 2 * e * hidden * width);
      gateUp.set(at(ups, e), (2 * e + 1) * hidden * width);
      down.set(at(downs, e), e * hidden * width);
    }
    return [await floats(at(results, 0)), await floats(at(results, 1)), gateUp, down];
  };
  const ways: Way[] = [];
  if (possible.sorted)
    ways.push({ note: "sorted on the host", stacked: false, run: (on) => sorted(tf, one, on, true), read });
  if (possible.dense)
    ways.push({ note: "all experts", stacked: true, run: async (on) => denseGradients(tf, one, on), read });
  return openers(tf, one, ways);
}

/** Forward of one block or batch of experts, with what the backward pass needs. */
function experts(tf: Tf, x: T, gate: T, up: T, down: T) {
  const g = tf.matMul(x, gate);
  const u = tf.matMul(x, up);
  const s = tf.sigmoid(g);
  const silu = tf.mul(g, s);
  const a = tf.mul(silu, u);
  return { x, gate, up, down, g, u, s, silu, a, y: tf.matMul(a, down) };
}

/** Gradients of the block's rows and matrices from the gradient of its output. */
function expertGradients(tf: Tf, { x, gate, up, down, g, u, s, silu, a }: ReturnType<typeof experts>, dy: T) {
  const da = tf.matMul(dy, down, false, true);
  const du = tf.mul(da, silu);
  const dg = tf.mul(tf.mul(da, u), tf.mul(s, tf.add(1, tf.mul(g, tf.sub(1, s)))));
  return {
    gate: tf.matMul(x, dg, true),
    up: tf.matMul(x, du, true),
    down: tf.matMul(a, dy, true),
    x: tf.add(tf.matMul(dg, gate, false, true), tf.matMul(du, up, false, true)),
  };
}

/** d logits [tokens, experts] from the gradient of the chosen experts' shares [tokens, k]: a softmax over the chosen. */
function logitGradients(tf: Tf, shares: T, dShares: T, picked: T): T {
  const inner = tf.sum(tf.mul(shares, dShares), -1, true);
  const chosen = tf.mul(shares, tf.sub(dShares, inner)); // [tokens, k]
  return tf.sum(tf.mul(tf.expandDims(chosen, -1), picked), 1);
}

async function sorted(tf: Tf, one: LayerCase, on: Operands, backward: boolean): Promise<Result> {
  const { width, k, tokens } = one;
  const { values, indices } = tf.topk(on.logits, k);
  const ids = await indices.data();
  const { tokens: rows, places, sizes } = hostDispatch(ids, one.experts, k);
  const results = tf.tidy((): T[] => {
    const tensor = (list: Int32Array): T => tf.tensor1d(list, "int32");
    const present = sizes.flatMap((size, e) => (size > 0 ? [e] : []));
    const blockSizes = present.map((e) => at(sizes, e));
    const blocks = (x: T): T[] => tf.split(x, blockSizes, 0);
    const joined = (xs: T[]): T => (xs.length === 1 ? at(xs, 0) : tf.concat(xs, 0));
    const rowIds = tensor(rows);
    const placeIds = tensor(places);
    const shares = tf.softmax(values); // [tokens, k]
    const inputs = blocks(tf.gather(on.x, rowIds));
    const forward = present.map((e, i) => experts(tf, at(inputs, i), at(on.gate, e), at(on.up, e), at(on.down, e)));
    const outputs = tf.reshape(tf.gather(joined(forward.map(({ y }) => y)), placeIds), [tokens, k, width]);
    if (!backward) return [tf.sum(tf.mul(outputs, tf.expandDims(shares, -1)), 1)];

    const dShares = tf.sum(tf.mul(outputs, tf.expandDims(on.dy, 1)), -1); // [tokens, k]
    const slots = new Int32Array(places.length);
    for (const [slot, place] of places.entries()) slots[place] = slot;
    const shareOfRow = tf.gather(tf.reshape(shares, [-1, 1]), tensor(slots));
    const dys = blocks(tf.mul(tf.gather(on.dy, rowIds), shareOfRow));
    const gradients = forward.map((block, i) => expertGradients(tf, block, at(dys, i)));
    const dRows = tf.gather(joined(gradients.map(({ x }) => x)), placeIds);
    const dx = tf.sum(tf.reshape(dRows, [tokens, k, width]), 1);
    const dLogits = logitGradients(tf, shares, dShares, tf.oneHot(tf.cast(indices, "int32"), one.experts));
    const all = (which: "gate" | "up" | "down"): T[] =>
      sizes.map((_, e) => {
        const gradient = gradients[present.indexOf(e)];
        return gradient ? gradient[which] : tf.zerosLike(at(on[which], e));
      });
    return [dx, dLogits, ...all("gate"), ...all("up"), ...all("down")];
  });
  tf.dispose([values, indices]);
  return results;
}

/** Shares of all experts [experts, tokens, 1], with what chose them. */
function denseShares(tf: Tf, one: LayerCase, logits: T) {
  const { values, indices } = tf.topk(logits, one.k);
  const shares = tf.softmax(values);
  const picked = tf.cast(tf.oneHot(tf.cast(indices, "int32"), one.experts), "float32"); // [tokens, k, experts]
  const weights = tf.sum(tf.mul(tf.expandDims(shares, -1), picked), 1); // [tokens, experts]
  return { shares, picked, weights: tf.expandDims(tf.transpose(weights), -1) };
}

const dense = (tf: Tf, one: LayerCase, on: Operands): T =>
  tf.tidy(() => {
    const { weights } = denseShares(tf, one, on.logits);
    const { y } = experts(tf, tf.expandDims(on.x, 0), at(on.gate, 0), at(on.up, 0), at(on.down, 0));
    return tf.sum(tf.mul(y, weights), 0);
  });

const denseGradients = (tf: Tf, one: LayerCase, on: Operands): T[] =>
  tf.tidy(() => {
    const { shares, picked, weights } = denseShares(tf, one, on.logits);
    // Every expert gets its copy of the rows: products of broadcast operands have no gradient to each expert otherwise.
    const x = tf.tile(tf.expandDims(on.x, 0), [one.experts, 1, 1]);
    const forward = experts(tf, x, at(on.gate, 0), at(on.up, 0), at(on.down, 0));
    const dy = tf.expandDims(on.dy, 0);
    const dWeights = tf.transpose(tf.sum(tf.mul(forward.y, dy), -1)); // [tokens, experts]
    const dShares = tf.sum(tf.mul(picked, tf.expandDims(dWeights, 1)), -1); // [tokens, k]
    const gradients = expertGradients(tf, forward, tf.mul(dy, weights));
    return [
      tf.sum(gradients.x, 0),
      logitGradients(tf, shares, dShares, picked),
      gradients.gate,
      gradients.up,
      gradients.down,
    ];
  });

/** One token. */
const gathered = (tf: Tf, one: LayerCase, on: Operands): T =>
  tf.tidy(() => {
    const { values, indices } = tf.topk(on.logits, one.k);
    const ids = tf.reshape(tf.cast(indices, "int32"), [one.k]);
    const own = (stack: readonly T[]): T => tf.gather(at(stack, 0), ids);
    const { y } = experts(tf, tf.expandDims(on.x, 0), own(on.gate), own(on.up), own(on.down)); // [k, 1, width]
    return tf.sum(tf.mul(y, tf.reshape(tf.softmax(values), [one.k, 1, 1])), 0);
  });
