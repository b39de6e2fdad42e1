// @jax-js/jax on its WebAssembly device. It has no ragged product: rows are sorted on the host, each expert is one compiled function.
// Weights stay [out, in] and are transposed lazily: it multiplies that layout faster than [in, out].
import { type Contender, hostDispatch, layerData, productData } from "@switchyard/bench/kernels";
import type { PeerSource } from "./peer.ts";

/** Arrays are counted: every use but the last takes `.ref`. */
interface JaxArray {
  readonly ref: JaxArray;
  add(x: JaxArray): JaxArray;
  mul(x: JaxArray): JaxArray;
  reshape(shape: readonly number[]): JaxArray;
  dataSync(): ArrayLike<number>;
  data(): Promise<ArrayLike<number>>;
  blockUntilReady(): Promise<JaxArray>;
  dispose(): void;
}
interface Jax {
  init(device: string): Promise<readonly string[]>;
  defaultDevice(device: string): void;
  jit<F>(f: F): F;
  readonly lax: { topK(x: JaxArray, k: number): readonly [JaxArray, JaxArray] };
  readonly nn: { silu(x: JaxArray): JaxArray; softmax(x: JaxArray, axis: number): JaxArray };
  readonly numpy: {
    array(data: Float32Array | Int32Array): JaxArray;
    matmul(a: JaxArray, b: JaxArray): JaxArray;
    transpose(x: JaxArray): JaxArray;
    take(x: JaxArray, ids: JaxArray, axis: number): JaxArray;
    concatenate(xs: readonly JaxArray[], axis: number): JaxArray;
    sum(x: JaxArray, axis: number): JaxArray;
    split(x: JaxArray, at: readonly number[], axis: number): readonly JaxArray[];
  };
}

const name = "@jax-js/jax";

/** Node has no Worker of the web's kind, but other peers define one, which jax-js then tries to start and fails. */
async function withoutWorker<R>(body: () => Promise<R>): Promise<R> {
  const { Worker: hidden } = globalThis;
  Reflect.deleteProperty(globalThis, "Worker");
  try {
    return await body();
  } finally {
    if (hidden !== undefined) globalThis.Worker = hidden;
  }
}

export const jax: PeerSource = {
  name,
  packages: { [name]: "^0.1.25" },
  async open({ load, version }) {
    const { init, defaultDevice, jit, lax, nn, numpy: np } = (await withoutWorker(() => load(name))) as Jax;
    const devices = await withoutWorker(() => init("wasm"));
    if (!devices.includes("wasm")) throw new Error(`it has no wasm device here, only: ${devices.join(", ")}`);
    defaultDevice("wasm");
    const array = (data: Float32Array | Int32Array, shape: readonly number[]): JaxArray =>
      np.array(data).reshape(shape);
    const linear = jit((x: JaxArray, w: JaxArray): JaxArray => np.matmul(x, np.transpose(w)));

    const contender = (run: () => JaxArray, constants: readonly JaxArray[]): Contender => ({
      name,
      run: () =>
        withoutWorker(async () => {
          const y = run();
          await y.blockUntilReady();
          y.dispose();
        }),
      output: () => withoutWorker(() => run().data()),
      dispose: () => {
        for (const x of constants) x.dispose();
      },
    });

    return {
      name,
      version: version(name),
      threads: 1, // its workers need the browser's Worker
      async product(one) {
        const data = productData(one);
        const x = array(data.x, [one.tokens, one.inner]);
        const w = array(data.w, [one.outer, one.inner]);
        return contender(() => linear(x.ref, w.ref), [x, w]);
      },
      async layer(one) {
        const { experts, width, hidden, k, tokens } = one;
        const data = layerData(one);
        const x = array(data.x, [tokens, width]);
        const logits = array(data.logits, [tokens, experts]);
        const part = (from: Float32Array, e: number, rows: number, columns: number): JaxArray =>
          array(from.slice(e * rows * columns, (e + 1) * rows * columns), [rows, columns]);
        const weights = Array.from({ length: experts }, (_, e) => ({
          gateUp: part(data.gateUp, e, 2 * hidden, width),
          down: part(data.down, e, width, hidden),
        }));
        // Renormalised softmax over the chosen = softmax of the chosen logits.
        const choose = jit((scores: JaxArray): readonly [JaxArray, JaxArray] => {
          const [best, ids] = lax.topK(scores, k);
          return [nn.softmax(best, -1), ids];
        });
        const expert = jit((rows: JaxArray, gateUp: JaxArray, down: JaxArray): JaxArray => {
          const [gate, up] = np.split(linear(rows, gateUp), [hidden], 1);
          if (gate === undefined || up === undefined) throw new Error("split gave no halves");
          return linear(nn.silu(gate).mul(up), down);
        });
        const combine = jit(
          (sorted: JaxArray, places: JaxArray, shares: JaxArray): JaxArray =>
            np.sum(
              np
                .take(sorted, places, 0)
                .reshape([tokens, k, width])
                .mul(shares.reshape([tokens, k, 1])),
              1,
            ),
        );
        const run = (): JaxArray => {
          const [shares, ids] = choose(logits.ref);
          const { tokens: rows, places, sizes } = hostDispatch(ids.dataSync(), experts, k);
          const outputs: JaxArray[] = [];
          let start = 0;
          for (const [e, size] of sizes.entries()) {
            const own = weights[e];
            if (size === 0 || own === undefined) continue;
            const block = np.take(x.ref, np.array(rows.slice(start, start + size)), 0);
            outputs.push(expert(block, own.gateUp.ref, own.down.ref));
            start += size;
          }
          return combine(np.concatenate(outputs, 0), np.array(places), shares);
        };
        return contender(run, [x, logits, ...weights.flatMap(({ gateUp, down }) => [gateUp, down])]);
      },
    };
  },
};
