// TensorFlow.js on its WebAssembly backend, used the way that is fastest there: products never ask for a transposed operand (ten times
// slower than transposing first), rows are sorted on the host, and gradients whose kernels the backend lacks are written by hand.
import {
  adamwOptions,
  type Contender,
  hostDispatch,
  type LanguageModelCase,
  languageModelData,
  layerData,
  normEps,
  productData,
  transposed,
} from "@switchyard/bench/kernels";
import type { PeerSource } from "./peer.ts";

type Shape = readonly number[];
interface TfTensor {
  readonly shape: number[];
  add(x: TfTensor | number): TfTensor;
  sub(x: TfTensor | number): TfTensor;
  mul(x: TfTensor | number): TfTensor;
  div(x: TfTensor | number): TfTensor;
  sqrt(): TfTensor;
  square(): TfTensor;
  neg(): TfTensor;
  rsqrt(): TfTensor;
  sigmoid(): TfTensor;
  reshape(shape: Shape): TfTensor;
  mean(axis?: number, keep?: boolean): TfTensor;
  sum(axis?: number, keep?: boolean): TfTensor;
  logSumExp(axis: number): TfTensor;
  expandDims(axis: number): TfTensor;
  dataSync(): Float32Array | Int32Array;
  dispose(): void;
}
type Saved = (tensors: TfTensor[]) => void;
interface CustomGradient {
  readonly value: TfTensor;
  gradFunc(dy: TfTensor, saved: TfTensor[]): TfTensor | TfTensor[];
}
interface Tf {
  setBackend(name: string): Promise<boolean>;
  ready(): Promise<void>;
  enableProdMode(): void;
  tidy<R>(body: () => R): R;
  dispose(tree: unknown): void;
  tensor(data: Float32Array | Int32Array, shape: Shape, dtype?: "int32"): TfTensor;
  zeros(shape: Shape): TfTensor;
  zerosLike(x: TfTensor): TfTensor;
  matMul(a: TfTensor, b: TfTensor): TfTensor;
  transpose(x: TfTensor, perm?: Shape): TfTensor;
  gather(x: TfTensor, ids: TfTensor): TfTensor;
  scatterND(ids: TfTensor, rows: TfTensor, shape: Shape): TfTensor;
  concat(xs: readonly TfTensor[], axis: number): TfTensor;
  split(x: TfTensor, sizes: number | readonly number[], axis: number): TfTensor[];
  topk(x: TfTensor, k: number): { readonly values: TfTensor; readonly indices: TfTensor };
  softmax(x: TfTensor): TfTensor;
  oneHot(ids: TfTensor, depth: number): TfTensor;
  customGrad(f: (...args: [...TfTensor[], Saved]) => CustomGradient): (...xs: TfTensor[]) => TfTensor;
  valueAndGrads(f: (...xs: TfTensor[]) => TfTensor): (xs: TfTensor[]) => { value: TfTensor; grads: TfTensor[] };
}
interface TfWasm {
  setThreadsCount(n: number): void;
  getThreadsCount(): number;
}

const name = "tfjs-backend-wasm";

export const tfjs: PeerSource = {
  name,
  // The union package registers the gradients; tfjs-core alone has none.
  packages: { "@tensorflow/tfjs": "^4.22.0", "@tensorflow/tfjs-backend-wasm": "^4.22.0" },
  async open({ threads, load, version }) {
    const unwrap = <T>(module: unknown): T => (module as { default?: T }).default ?? (module as T);
    const tf = unwrap<Tf>(await load("@tensorflow/tfjs"));
    const wasm = unwrap<TfWasm>(await load("@tensorflow/tfjs-backend-wasm"));
    wasm.setThreadsCount(threads);
    tf.enableProdMode();
    if (!(await tf.setBackend("wasm"))) throw new Error("its wasm backend did not start");
    await tf.ready();
    const ops = operations(tf);

    return {
      name,
      version: version("@tensorflow/tfjs-backend-wasm"),
      threads: wasm.getThreadsCount(),
      async product(one) {
        const data = productData(one);
        const x = tf.tensor(data.x, [one.tokens, one.inner]);
        const w = tf.tensor(transposed(data.w, one.outer, one.inner), [one.inner, one.outer]);
        return contender(tf, () => tf.matMul(x, w), [x, w]);
      },
      async layer(one) {
        const { experts, width, hidden, k, tokens } = one;
        const data = layerData(one);
        const x = tf.tensor(data.x, [tokens, width]);
        const logits = tf.tensor(data.logits, [tokens, experts]);
        const part = (from: Float32Array, e: number, rows: number, columns: number): TfTensor =>
          tf.tensor(transposed(from.subarray(e * rows * columns, (e + 1) * rows * columns), rows, columns), [
            columns,
            rows,
          ]);
        const gateUp = Array.from({ length: experts }, (_, e) => part(data.gateUp, e, 2 * hidden, width));
        const down = Array.from({ length: experts }, (_, e) => part(data.down, e, width, hidden));
        const run = (): TfTensor => {
          const { values, indices } = tf.topk(logits, k);
          return ops.layer(x, gateUp, down, indices.dataSync(), tf.softmax(values));
        };
        return contender(tf, run, [x, logits, ...gateUp, ...down]);
      },
      training: async (one) => training(tf, one),
    };
  },
};

/** The backend computes while it is called, so a run is over when it returns. */
const contender = (tf: Tf, run: () => TfTensor, constants: readonly TfTensor[]): Contender => ({
  name,
  run: () => tf.tidy(run).dispose(),
  async output() {
    const y = tf.tidy(run);
    const data = y.dataSync();
    y.dispose();
    return data;
  },
  dispose: () => tf.dispose(constants),
});

/** Composites with gradients that need no kernel the wasm backend lacks. */
function operations(tf: Tf) {
  const ids32 = (ids: Int32Array): TfTensor => tf.tensor(ids, [ids.length], "int32");
  const flip = (x: TfTensor): TfTensor => {
    const order = x.shape.map((_, axis) => axis);
    return tf.transpose(x, [...order.slice(0, -2), order.length - 1, order.length - 2]);
  };
  const product = tf.customGrad((...args) => {
    const [a, b, save] = args as [TfTensor, TfTensor, Saved];
    save([a, b]);
    return {
      value: tf.matMul(a, b),
      gradFunc: (dy, saved) => {
        const [x, w] = saved as [TfTensor, TfTensor];
        return [tf.matMul(dy, flip(w)), tf.matMul(flip(x), dy)];
      },
    };
  });
  /** Rows by id; the gradient adds rows, which tf.gather's own gradient cannot do on this backend. */
  const takeRows = (x: TfTensor, ids: TfTensor): TfTensor =>
    tf.customGrad((...args) => {
      const [table, save] = args as [TfTensor, Saved];
      save([ids]); // or it is gone when the gradient is computed
      const { shape } = table;
      return {
        value: tf.gather(table, ids),
        gradFunc: (dy, [at]) => tf.scatterND((at as TfTensor).expandDims(1), dy, shape),
      };
    })(x);
  /** x [tokens, width]; expert matrices [in, out]; chosen ids of each token; shares [tokens, k] -> [tokens, width]. */
  const layer = (
    x: TfTensor,
    gateUp: readonly TfTensor[],
    down: readonly TfTensor[],
    chosen: ArrayLike<number>,
    shares: TfTensor,
  ): TfTensor => {
    const [tokens, width] = x.shape as [number, number];
    const k = shares.shape[1] as number;
    const { tokens: rows, places, sizes } = hostDispatch(chosen, gateUp.length, k);
    const present = sizes.flatMap((size, e) => (size > 0 ? [e] : []));
    const blocks = tf.split(
      takeRows(x, ids32(rows)),
      present.map((e) => sizes[e] as number),
      0,
    );
    const outputs = present.map((e, i) => {
      const [gate, up] = tf.split(product(blocks[i] as TfTensor, gateUp[e] as TfTensor), 2, 1) as [TfTensor, TfTensor];
      return product(gate.mul(gate.sigmoid()).mul(up), down[e] as TfTensor);
    });
    const back = takeRows(tf.concat(outputs, 0), ids32(places)); // [tokens * k, width]
    return back
      .reshape([tokens, k, width])
      .mul(shares.reshape([tokens, k, 1]))
      .sum(1);
  };
  const rmsNorm = (x: TfTensor, w: TfTensor): TfTensor => x.mul(x.square().mean(-1, true).add(normEps).rsqrt()).mul(w);
  /** Mean cross-entropy; the gradient is softmax minus one-hot. */
  const crossEntropy = (logits: TfTensor, target: TfTensor): TfTensor =>
    tf.customGrad((...args) => {
      const [x, save] = args as [TfTensor, Saved];
      save([x]);
      return {
        value: x.logSumExp(-1).sub(x.mul(target).sum(-1)).mean(),
        gradFunc: (dy, [y]) =>
          tf
            .softmax(y as TfTensor)
            .sub(target)
            .mul(dy.div(target.shape[0] as number)),
      };
    })(logits);
  return { ids32, flip, product, takeRows, layer, rmsNorm, crossEntropy };
}

function training(tf: Tf, one: LanguageModelCase): Contender {
  const { layers, width, heads, experts, k, vocabulary, batch, sequence } = one;
  const { ids32, flip, product, takeRows, layer, rmsNorm, crossEntropy } = operations(tf);
  const data = languageModelData(one);
  // Matrices are held as [in, out]; an expert stack becomes one matrix per expert.
  const initial: [string, TfTensor][] = Object.entries(data.params).flatMap(([key, { shape, data: values }]) => {
    const [rows, columns] = shape.slice(-2) as [number, number];
    const matrix = (from: Float32Array): TfTensor => tf.tensor(transposed(from, rows, columns), [columns, rows]);
    if (shape.length === 1 || key === "embedding") return [[key, tf.tensor(values, shape)]];
    if (shape.length === 2) return [[key, matrix(values)]];
    return Array.from({ length: experts }, (_, e): [string, TfTensor] => [
      `${key}.${e}`,
      matrix(values.subarray(e * rows * columns, (e + 1) * rows * columns)),
    ]);
  });
  const names = initial.map(([key]) => key);
  let params = initial.map(([, x]) => x);
  let m = params.map((x) => tf.zerosLike(x));
  let v = params.map((x) => tf.zerosLike(x));
  const ids = ids32(data.ids);
  const target = tf.tidy(() => tf.oneHot(ids32(data.labels), vocabulary).mul(1)); // f32 [tokens, vocabulary]
  const d = width / heads;
  const table = (x: Float32Array): TfTensor => tf.tensor(x, [1, sequence, 1, d / 2]);
  const [cos, sin] = [table(data.cos), table(data.sin)];
  const future = tf.tensor(
    Float32Array.from({ length: sequence * sequence }, (_, i) => (i % sequence > Math.floor(i / sequence) ? -1e30 : 0)),
    [1, 1, sequence, sequence],
  );

  const loss = (...xs: TfTensor[]): TfTensor => {
    const p = (key: string): TfTensor => xs[names.indexOf(key)] as TfTensor;
    let x = takeRows(p("embedding"), ids); // [tokens, width]
    for (let l = 0; l < layers; l++) {
      const normed = rmsNorm(x, p(`${l}.attentionNorm`));
      const head = (key: string): TfTensor => product(normed, p(`${l}.${key}`)).reshape([batch, sequence, heads, d]);
      const turn = (t: TfTensor): TfTensor => {
        const [a, b] = tf.split(t, 2, 3) as [TfTensor, TfTensor];
        return tf.concat([a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin))], 3);
      };
      const byHead = (t: TfTensor): TfTensor => tf.transpose(t, [0, 2, 1, 3]); // [batch, heads, sequence, d]
      const scores = product(byHead(turn(head("q"))), flip(byHead(turn(head("k")))))
        .mul(d ** -0.5)
        .add(future);
      const mixed = byHead(product(tf.softmax(scores), byHead(head("v")))).reshape([batch * sequence, width]);
      x = x.add(product(mixed, p(`${l}.o`)));
      const rows = rmsNorm(x, p(`${l}.moeNorm`));
      const logits = product(rows, p(`${l}.router`));
      const { indices } = tf.topk(logits, k);
      const chosen = indices.dataSync();
      // Softmax of the chosen logits = renormalised softmax; picked by one-hot because gather along the last axis has no gradient.
      const picked = tf.oneHot(ids32(Int32Array.from(chosen)), experts).reshape([batch * sequence, k, experts]);
      const shares = tf.softmax(logits.expandDims(1).mul(picked).sum(2));
      const stack = (key: string): TfTensor[] => Array.from({ length: experts }, (_, e) => p(`${l}.${key}.${e}`));
      const [gateUp, down] = [stack("gateUp"), stack("down")];
      x = x.add(layer(rows, gateUp, down, chosen, shares));
      // A parameter the loss does not touch is an error in tfjs: experts without a token join with weight 0.
      const present = new Set(chosen);
      for (let e = 0; e < experts; e++) {
        for (const idle of present.has(e) ? [] : [gateUp[e], down[e]]) if (idle) x = x.add(idle.sum().mul(0));
      }
    }
    return crossEntropy(product(rmsNorm(x, p("norm")), p("head")), target);
  };

  const valueAndGrads = tf.valueAndGrads(loss);
  let step = 0;
  const run = (): TfTensor => {
    step++;
    const { lr, beta1, beta2, eps, weightDecay } = adamwOptions;
    const next = tf.tidy(() => {
      const { value, grads } = valueAndGrads(params);
      const m2 = grads.map((g, i) => (m[i] as TfTensor).mul(beta1).add(g.mul(1 - beta1)));
      const v2 = grads.map((g, i) => (v[i] as TfTensor).mul(beta2).add(g.square().mul(1 - beta2)));
      const moved = params.map((x, i) => {
        const scale = (v2[i] as TfTensor)
          .div(1 - beta2 ** step)
          .sqrt()
          .add(eps);
        return x.mul(1 - lr * weightDecay).sub((m2[i] as TfTensor).div(scale).mul(lr / (1 - beta1 ** step)));
      });
      return { value, params: moved, m: m2, v: v2 };
    });
    tf.dispose([params, m, v]);
    ({ params, m, v } = next);
    return next.value;
  };
  return {
    name,
    run: () => run().dispose(),
    /** The losses of the first three steps. */
    async output() {
      return Array.from({ length: 3 }, () => {
        const value = run();
        const [number] = value.dataSync();
        value.dispose();
        return number as number;
      });
    },
    dispose: () => tf.dispose([params, m, v, ids, target, cos, sin, future]),
  };
}
