// What similarity-aware routing (2505.00792) is for, trained at toy size: tokens that one can hardly tell apart by
// themselves, in sequences of two topics. Its error, also under more noise, must not be worse than that of topK.
import { add, type Engine, engine, mul, neg, random, square, sum, type Tensor } from "@switchyard/core";
import { ffn, layerInput, layerParams, moe, moeLayer, type RouterPlugin } from "@switchyard/core/moe";
import { adamw, type Task, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { similarityAware, topK } from "@switchyard/routers";
import { expect, test } from "vitest";

const [width, experts, length] = [12, 8, 16];

interface Batch {
  readonly inputs: Float32Array;
  readonly targets: Float32Array;
  readonly sequences: number;
}

/** Sequences of two of eight topics: a token is a topic's centre and noise, its target the topic's matrix times it. */
function topics(on: Engine, seed: number): (key: number | string, sequences: number, corruption?: number) => Batch {
  const draw = random(on, seed);
  const centres = draw.at("centres").host("normal", experts * width);
  const matrices = draw
    .at("matrices")
    .host("normal", experts * width * width)
    .map((x) => x / Math.sqrt(width));
  return (key, sequences, corruption = 0) => {
    const own = draw.at("batch", key);
    const pairs = own.at("pairs").host("uniform", 2 * sequences);
    const sides = own.at("sides").host("uniform", sequences * length);
    const size = sequences * length * width;
    const [noise, more] = [own.at("noise").host("normal", size), own.at("more").host("normal", size)];
    const inputs = new Float32Array(size);
    const targets = new Float32Array(size);
    for (const [token, side] of sides.entries()) {
      const pair = 2 * Math.floor(token / length) + (side < 0.5 ? 0 : 1);
      const topic = Math.floor((pairs[pair] ?? 0) * experts);
      const x = Array.from(
        { length: width },
        (_, d) => (centres[topic * width + d] ?? 0) + 1.3 * (noise[token * width + d] ?? 0),
      );
      for (let d = 0; d < width; d++) {
        const row = matrices.subarray((topic * width + d) * width, (topic * width + d + 1) * width);
        targets[token * width + d] = x.reduce((total, value, i) => total + value * (row[i] ?? 0), 0);
        inputs[token * width + d] = (x[d] ?? 0) + corruption * (more[token * width + d] ?? 0);
      }
    }
    return { inputs, targets, sequences };
  };
}

/** Mean squared errors on fresh sequences, clean and with noise added, after 900 steps. */
async function trained(on: Engine, plugin: RouterPlugin, seed: number): Promise<{ clean: number; noisy: number }> {
  const batch = topics(on, seed);
  const draws = random(on, 100 + seed);
  const made = ffn({ count: experts, width, hidden: 16, engine: on, random: draws });
  const layer = moeLayer(plugin, { engine: on, width, random: draws }, { experts: made });
  const task: Task<Batch> = {
    params: layerParams(layer),
    routers: [layer.router],
    batch: (index) => batch(index, 24),
    forward(params, [buffers = {}], { inputs, targets, sequences }, { training }) {
      const shape = [sequences * length, width];
      const layout = { batch: sequences, sequence: length, past: 0 };
      const input = layerInput(layer, on.tensor(inputs, shape), { training, buffers, layout });
      const { output, routed } = moe(layer, params, input);
      const error: Tensor = add(output, neg(on.tensor(targets, shape)));
      return { loss: mul(sum(square(error)), 1 / error.size), logits: output, layers: [routed] };
    },
    info: ({ sequences }) => ({ tokens: sequences * length }),
  };
  const run = trainer(on, task, { optimiser: adamw({ learningRate: 4e-3, weightDecay: 0 }) });
  const first = await run.step();
  await run.run({ until: 900 });
  expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * first.loss);
  const clean = await run.evaluate([batch("test", 128)]);
  const noisy = await run.evaluate([batch("test", 128, 0.3)]);
  run.dispose();
  return { clean: clean.loss, noisy: noisy.loss };
}

test("similarityAware learns ambiguous tokens at least as well as topK, also under noise", {
  timeout: 300_000,
}, async () => {
  const on = engine(await wasm({ threads: 1 }));
  const seeds = [1, 2, 3];
  const mean = async (plugin: () => RouterPlugin): Promise<{ clean: number; noisy: number }> => {
    const total = { clean: 0, noisy: 0 };
    for (const seed of seeds) {
      const { clean, noisy } = await trained(on, plugin(), seed);
      total.clean += clean / seeds.length;
      total.noisy += noisy / seeds.length;
    }
    return total;
  };
  const losses = { k: 2, balance: 0.02, zLoss: 0 };
  const plain = await mean(() => topK(losses));
  const aware = await mean(() => similarityAware({ ...losses, temperature: 3, causal: false }));
  expect(plain.noisy).toBeGreaterThan(plain.clean);
  expect(aware.noisy).toBeLessThan(1.02 * plain.noisy);
  expect(aware.clean).toBeLessThan(1.02 * plain.clean);
  expect(on.live()).toBe(0);
});
