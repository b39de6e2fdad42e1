// The layer in models of tf.layers: gradients against core's and against differences, training, the router's losses, masks, saving
// and loading, and that nothing is left behind.
import * as tf from "@tensorflow/tfjs-core";
import "@tensorflow/tfjs-backend-cpu";
import "@tensorflow/tfjs-backend-wasm";
import { linear, mul, ShapeError, softmaxTopk, type Tensor, type Tree } from "@switchyard/core";
import { type RouterPlugin, switchBalance, zLoss } from "@switchyard/core/moe";
import { generator, uniform } from "@switchyard/testing";
import * as tfl from "@tensorflow/tfjs-layers";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { createMoE, type MoEArgs } from "./moe-layer.ts";

interface Options {
  readonly k: number;
  readonly balance?: number;
  readonly zLoss?: number;
}
/** The usual router, small. */
function small(options: Options): RouterPlugin {
  const { k, balance = 0.01, zLoss: z = 0 } = options;
  const weightOf = (params: Tree): Tensor => (params as { readonly weight: Tensor }).weight;
  return {
    name: "small",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    options: { k, balance, zLoss: z, note: null },
    init: ({ engine, experts, width, random }) => ({
      params: { weight: engine.scope(() => mul(random.at("weight").normal([experts, width]), 0.3)) },
      buffers: {},
      route(params, { hidden }) {
        const logits = linear(hidden, weightOf(params));
        const { weights, ids, probabilities } = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
        return {
          plan: { kind: "sparse", experts: ids, weights },
          logits,
          probabilities,
          losses: {
            balance: { value: switchBalance({ probabilities, experts: ids }), weight: balance },
            zLoss: { value: zLoss(logits), weight: z },
          },
        };
      },
    }),
  };
}

const moe = createMoE({ tf, layers: tfl.layers, routers: { small } });
const values = (shape: number[], key: string): tf.Tensor =>
  tf.tensor(Float32Array.from(uniform(generator(key), shape, -1, 1).data), shape);
const only = (x: tf.Tensor): number => x.dataSync()[0] ?? Number.NaN;
const numbers = (x: tf.Tensor): number[] => Array.from(x.dataSync());

const startBackend = async (name: string): Promise<void> => {
  await tf.setBackend(name);
  await tf.ready();
};

describe.each(["cpu", "wasm"])("MoE in tf.layers on %s", (backend) => {
  beforeAll(() => startBackend(backend));
  afterAll(() => tf.disposeVariables());

  /** A layer that was applied once, so that it has weights. */
  const built = (args: Partial<MoEArgs> = {}, width = 5): tfl.layers.Layer => {
    const layer = moe({ experts: 4, hidden: 3, router: small({ k: 2 }), ...args });
    const input = tf.zeros([1, width]);
    tf.dispose([layer.apply(input) as tf.Tensor, input]);
    return layer;
  };

  describe.each([
    ["[batch, width]", [7, 5], {}],
    ["[batch, sequence, width]", [2, 3, 5], {}],
    ["plain experts with biases", [6, 5], { gated: false, bias: true, activation: "gelu" as const }],
  ])("%s", (_, shape, args) => {
    it.each([false, true])("gradients equal central differences (training: %s)", (training) => {
      const start = tf.memory().numTensors;
      tf.tidy(() => {
        const layer = built({ ...args, router: small({ k: 2, balance: 0.3, zLoss: 0.2 }) });
        const x = values(shape, `x ${shape}`);
        const dy = values(shape, "dy");
        const weights = layer.getWeights();
        const inner = (input: tf.Tensor): tf.Scalar =>
          tf.sum(tf.mul(layer.apply(input, { training }) as tf.Tensor, dy));
        const variables = layer.trainableWeights.map((weight) => weight.read() as tf.Variable);
        const { grads } = tf.variableGrads(() => inner(x), variables);
        const dx = tf.grad(inner)(x);

        // In training the router's losses count too. They are no part of the output, so they are computed here.
        const routerLoss = (input: tf.Tensor): number => {
          if (!training) return 0;
          const logits = tf.matMul(tf.reshape(input, [-1, 5]), layer.getWeights()[0] as tf.Tensor, false, true);
          const p = tf.softmax(logits);
          const ids = tf.reshape(tf.topk(p, 2).indices, [-1]);
          const share = tf.mul(tf.sum(tf.oneHot(ids, 4), 0), 1 / (logits.shape[0] ?? 1));
          const balance = tf.mul(tf.sum(tf.mul(share, tf.mean(p, 0))), 4);
          const z = tf.mean(tf.square(tf.logSumExp(logits, 1)));
          return 0.3 * only(balance) + 0.2 * only(z);
        };
        const total = (input: tf.Tensor): number => only(inner(input)) + routerLoss(input);
        const slope = (data: Float32Array, i: number, measure: () => number): number => {
          const [old, step] = [data[i] ?? 0, 2e-3];
          data[i] = old + step;
          const up = measure();
          data[i] = old - step;
          const down = measure();
          data[i] = old;
          return (up - down) / (2 * step);
        };

        const input = Float32Array.from(x.dataSync());
        numbers(dx).forEach((found, i) => {
          expect(found).toBeCloseTo(
            slope(input, i, () => tf.tidy(() => total(tf.tensor(input, shape)))),
            2,
          );
        });
        weights.forEach((weight, which) => {
          const data = Float32Array.from(weight.dataSync());
          const found = numbers(grads[variables[which]?.name ?? ""] as tf.Tensor);
          // A few entries of each matrix; every entry would take long on the JavaScript backend.
          for (let i = 0; i < data.length; i += Math.max(1, Math.floor(data.length / 7))) {
            const measure = (): number =>
              tf.tidy(() => {
                layer.setWeights(weights.map((w, j) => (j === which ? tf.tensor(data, w.shape) : w)));
                return total(x);
              });
            expect(found[i]).toBeCloseTo(slope(data, i, measure), 2);
          }
        });
        layer.dispose();
      });
      expect(tf.memory().numTensors).toBe(start);
    });
  });

  it("computes what the experts compute", () => {
    tf.tidy(() => {
      const layer = built({ router: small({ k: 1 }) });
      const x = values([6, 5], "one expert each");
      const [router, gateUp, down] = layer.getWeights() as [tf.Tensor2D, tf.Tensor3D, tf.Tensor3D];
      const matrix = (w: tf.Tensor3D, e: number): tf.Tensor => tf.reshape(tf.slice(w, e, 1), w.shape.slice(1));
      // With k = 1 the weight is 1: the output is that of the best expert.
      const best = numbers(tf.argMax(tf.matMul(x, router, false, true), 1));
      const expected = best.flatMap((e, row) => {
        const both = tf.matMul(tf.slice(x, row, 1), matrix(gateUp, e), false, true); // [1, 6]
        const gate = tf.slice(both, [0, 0], [1, 3]);
        const hidden = tf.mul(tf.mul(gate, tf.sigmoid(gate)), tf.slice(both, [0, 3], [1, 3]));
        return numbers(tf.matMul(hidden, matrix(down, e), false, true));
      });
      const found = numbers(layer.apply(x) as tf.Tensor);
      expected.forEach((y, i) => {
        expect(found[i]).toBeCloseTo(y, 5);
      });
      layer.dispose();
    });
  });

  /** Which of four prototypes a noisy point came from, as a class that no linear map gives. */
  const task = (): { readonly x: tf.Tensor; readonly y: tf.Tensor } => {
    const next = generator("task");
    const rows = Array.from({ length: 64 }, () => {
      const [a, b] = [next() < 0.5 ? -1 : 1, next() < 0.5 ? -1 : 1];
      return { x: [a + 0.2 * next(), b + 0.2 * next()], y: a * b > 0 ? 1 : 0 };
    });
    return { x: tf.tensor2d(rows.map((row) => row.x)), y: tf.tensor2d(rows.map((row) => [row.y])) };
  };
  const classifier = (args: Partial<MoEArgs> = {}): tfl.Sequential => {
    const model = tfl.sequential({
      layers: [
        tfl.layers.dense({ units: 8, inputShape: [2], kernelInitializer: tfl.initializers.glorotUniform({ seed: 1 }) }),
        moe({ experts: 4, hidden: 6, router: small({ k: 2 }), seed: 3, ...args }),
        tfl.layers.dense({
          units: 1,
          activation: "sigmoid",
          kernelInitializer: tfl.initializers.glorotUniform({ seed: 2 }),
        }),
      ],
    });
    model.compile({ optimizer: tf.train.adam(0.03), loss: "binaryCrossentropy", metrics: ["accuracy"] });
    return model;
  };

  it("learns by fit what a linear model cannot, and leaves nothing behind", async () => {
    const start = tf.memory().numTensors;
    const model = classifier();
    const { x, y } = task();
    // The optimiser's moments are made by the first step.
    await model.fit(x, y, { epochs: 1, batchSize: 32, shuffle: false, verbose: 0 });
    const before = tf.memory().numTensors;
    const { history } = await model.fit(x, y, { epochs: 30, batchSize: 32, shuffle: false, verbose: 0 });
    expect(tf.memory().numTensors).toBe(before);
    const [losses, accuracy] = [history.loss as number[], history.acc as number[]];
    expect(losses.at(-1)).toBeLessThan(0.2 * (losses[0] ?? 0));
    expect(accuracy.at(-1)).toBe(1);

    const predicted = model.predict(x) as tf.Tensor;
    const right = numbers(predicted).filter((p, i) => p > 0.5 === (numbers(y)[i] ?? 0) > 0.5);
    expect(right.length).toBe(64);
    tf.dispose([predicted, x, y]);
    model.dispose();
    model.optimizer.dispose();
    expect(tf.memory().numTensors).toBe(start);
  });

  it("the router's balance loss spreads the tokens over the experts", async () => {
    const { x, y } = task();
    /** Largest share of the 128 slots that one expert gets, after training. */
    const largest = async (balance: number): Promise<number> => {
      const model = classifier({ experts: 8, router: small({ k: 1, balance }) });
      const layer = model.layers[1] as tfl.layers.Layer;
      // All tokens start at one expert.
      const [router, ...rest] = layer.getWeights() as [tf.Tensor, ...tf.Tensor[]];
      layer.setWeights([tf.mul(router, 0.01), ...rest]);
      await model.fit(x, y, { epochs: 25, batchSize: 64, shuffle: false, verbose: 0 });
      const share = tf.tidy(() => {
        const hidden = (model.layers[0] as tfl.layers.Layer).apply(x) as tf.Tensor;
        const logits = tf.matMul(hidden, layer.getWeights()[0] as tf.Tensor, false, true);
        return Math.max(...numbers(tf.sum(tf.oneHot(tf.argMax(logits, 1), 8), 0))) / 64;
      });
      model.dispose();
      return share;
    };
    const [without, withLoss] = [await largest(0), await largest(1)];
    expect(withLoss).toBeLessThan(0.75 * without);
    tf.dispose([x, y]);
  });

  it("is saved and loaded with its model", async () => {
    const { x, y } = task();
    const options = { k: 3, balance: 0.05, zLoss: 0.125 };
    const model = classifier({ router: small(options), activation: "gelu-tanh", bias: true });
    await model.fit(x, y, { epochs: 2, verbose: 0 });
    let saved: tf.io.ModelArtifacts | undefined;
    await model.save(
      tf.io.withSaveHandler(async (artifacts) => {
        saved = artifacts;
        return { modelArtifactsInfo: { dateSaved: new Date(0), modelTopologyType: "JSON" } };
      }),
    );
    if (!saved) throw new Error("nothing was saved");
    // Through text, as a file would hold it.
    const artifacts: tf.io.ModelArtifacts = {
      ...saved,
      modelTopology: JSON.parse(JSON.stringify(saved.modelTopology)),
    };
    const loaded = await tfl.loadLayersModel(tf.io.fromMemory(artifacts));
    const [before, after] = [model.predict(x) as tf.Tensor, loaded.predict(x) as tf.Tensor];
    expect(numbers(after)).toEqual(numbers(before));
    expect(loaded.layers[1]?.getConfig()).toEqual(model.layers[1]?.getConfig());
    const { settings } = (loaded.layers[1] as tfl.layers.Layer).getConfig() as { settings: { name: string } };
    expect(JSON.parse(settings.name)).toEqual({
      experts: 4,
      hidden: 6,
      activation: "gelu-tanh",
      gated: true,
      bias: true,
      seed: 3,
      router: { name: "small", options: { ...options, note: null } },
    });
    tf.dispose([before, after, x, y]);
    model.dispose();
    loaded.dispose();
  });

  it("reads sequences behind an embedding, and leaves padding out", async () => {
    const ids = tf.tensor2d(
      [
        [1, 2, 3, 0, 0],
        [4, 5, 0, 0, 0],
      ],
      [2, 5],
      "int32",
    );
    const layers = [
      tfl.layers.embedding({
        inputDim: 7,
        outputDim: 4,
        inputLength: 5,
        maskZero: true,
        embeddingsInitializer: tfl.initializers.randomUniform({ minval: -1, maxval: 1, seed: 4 }),
      }),
      moe({ experts: 3, hidden: 4, router: small({ k: 1 }), name: "experts" }),
    ];
    const model = tfl.sequential({ layers });
    const out = model.predict(ids) as tf.Tensor;
    expect(out.shape).toEqual([2, 5, 4]);
    const rows = tf.tidy(() => numbers(tf.sum(tf.abs(out), 2)));
    rows.forEach((row, i) => {
      if ([3, 4, 7, 8, 9].includes(i)) expect(row).toBe(0);
      else expect(row).toBeGreaterThan(0);
    });
    tf.dispose(out);
    // TensorFlow.js's wasm backend has no gradient of an embedding.
    if (backend === "cpu") {
      const target = tf.ones([2, 5, 4]);
      model.compile({ optimizer: tf.train.adam(0.05), loss: "meanSquaredError" });
      const { history } = await model.fit(ids, target, { epochs: 30, verbose: 0 });
      expect(history.loss?.at(-1)).toBeLessThan(0.9 * (history.loss?.[0] as number));
      target.dispose();
    }
    ids.dispose();
    model.dispose();
  });

  it("a frozen layer passes gradients on and keeps its weights", async () => {
    const { x, y } = task();
    const model = classifier({ trainable: false });
    const layer = model.layers[1] as tfl.layers.Layer;
    const [before, first] = [layer.getWeights().map(numbers), numbers(model.getWeights()[0] as tf.Tensor)];
    const { history } = await model.fit(x, y, { epochs: 4, verbose: 0 });
    expect(layer.getWeights().map(numbers)).toEqual(before);
    expect(numbers(model.getWeights()[0] as tf.Tensor)).not.toEqual(first);
    expect(history.loss?.at(-1)).toBeLessThan(history.loss?.[0] as number);
    tf.dispose([x, y]);
    model.dispose();
  });

  it("says what it cannot take", () => {
    const args = { experts: 4, hidden: 3 };
    const needy: RouterPlugin = { ...small({ k: 1 }), needs: ["tokenIds"] };
    expect(() => moe({ ...args, router: needy })).toThrow(/the router small needs tokenIds/);
    expect(() => moe({ ...args, router: { ...small({ k: 1 }), name: "other" } })).toThrow(
      /router "other" is not among the routers small; createMoE\({ ..., routers: { other } }\)/,
    );
    expect(() => moe({ ...args, router: { ...small({ k: 1 }), options: { k: 2 } } })).toThrow(
      /hand in the factory that made the router/,
    );
    const stepping: RouterPlugin = {
      ...small({ k: 1 }),
      init: (context) => ({ ...small({ k: 1 }).init(context), afterStep: (_, buffers) => buffers }),
    };
    tf.tidy(() => {
      expect(() => moe({ ...args, router: stepping }).apply(tf.zeros([2, 5]))).toThrow(
        /the router small changes its state after each optimiser step/,
      );
      const layer = built();
      expect(() => layer.apply(tf.zeros([2, 5], "int32"))).toThrow(/the input is int32 \[2, 5\], expected float32/);
      expect(() => layer.apply(tf.zeros([2, 6]))).toThrow(ShapeError);
      expect(() => layer.apply([tf.zeros([2, 5]), tf.zeros([2, 5])])).toThrow(
        "2 inputs; concatenate or add them first",
      );
      expect(() => moe({ ...args, router: small({ k: 1 }) }).apply(tf.zeros([5]))).toThrow(
        /the input is \[5\], expected \[batch, width\]/,
      );
      layer.dispose();
    });
  });
});
