// Experiment I of the expressive-power paper (2505.24205, section 6): a function on a circle, learned by one layer of four
// experts of width 10, of which each point takes the best. The error must not grow with the dimension that the circle lies
// in, and be below that of one expert. Weights are the probabilities of the chosen experts: with weights of 1 a gate of k = 1
// gets no gradient.
import { add, type Engine, engine, mean, neg, random, slice, square, type Tensor } from "@switchyard/core";
import { ffn, layerInput, layerParams, moe, moeLayer } from "@switchyard/core/moe";
import { adamw, type Task, trainer, wsd } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { expressiveGates } from "@switchyard/routers";
import { expect, test } from "vitest";

const [steps, points] = [1000, 256];
const f = (x: number, y: number): number => Math.sin(5 * x) + Math.cos(3 * y);

interface Batch {
  readonly inputs: Float32Array;
  readonly targets: Float32Array;
}

/** Root mean squared error on the whole circle in `width` dimensions. */
async function error(on: Engine, { experts, width, seed }: Record<"experts" | "width" | "seed", number>) {
  const draws = random(on, seed);
  const circle = (angles: readonly number[]): Batch => ({
    inputs: Float32Array.from({ length: angles.length * width }, (_, i) => {
      const angle = angles[Math.floor(i / width)] ?? 0;
      return i % width === 0 ? Math.cos(angle) : i % width === 1 ? Math.sin(angle) : 0;
    }),
    targets: Float32Array.from(angles, (angle) => f(Math.cos(angle), Math.sin(angle))),
  });
  const made = ffn({ count: experts, width, hidden: 10, bias: true, engine: on, random: draws.at("experts") });
  const plugin = expressiveGates({ k: 1, gate: "affine", weights: "all", balance: 0.02 });
  const layer = moeLayer(plugin, { engine: on, width, random: draws.at("gate") }, { experts: made });
  const task: Task<Batch> = {
    params: layerParams(layer),
    routers: [layer.router],
    batch: (index) => circle(Array.from(draws.at("batch", index).host("uniform", points), (u) => 2 * Math.PI * u)),
    forward(params, [buffers = {}], { inputs, targets }, { training }) {
      const n = targets.length;
      const hidden = on.tensor(inputs, [n, width]);
      const { output, routed } = moe(layer, params, layerInput(layer, hidden, { training, buffers }));
      const found = slice(output, [0, 0], [n, 1]);
      const miss: Tensor = add(found, neg(on.tensor(targets, [n, 1])));
      return { loss: mean(square(miss)), logits: found, layers: [routed] };
    },
    info: ({ targets }) => ({ tokens: targets.length }),
  };
  const run = trainer(on, task, {
    optimiser: adamw({ learningRate: 1e-2, weightDecay: 0 }),
    schedule: wsd({ decay: 0.2, final: 0.1 }),
    totalSteps: steps,
  });
  await run.run();
  const all = circle(Array.from({ length: 2000 }, (_, i) => (2 * Math.PI * i) / 2000));
  const { loss } = await run.evaluate([all]);
  run.dispose();
  return Math.sqrt(loss);
}

test("four experts learn a function on a circle, as well in 128 dimensions as in 16, and better than one", {
  timeout: 300_000,
}, async () => {
  const on = engine(await wasm({ threads: 1 }));
  const median = async (experts: number, width: number): Promise<number> => {
    const errors: number[] = [];
    for (const seed of [1, 2, 3, 4, 5]) errors.push(await error(on, { experts, width, seed }));
    return errors.sort((a, b) => a - b)[2] ?? Number.NaN;
  };
  const [narrow, wide, single] = [await median(4, 16), await median(4, 128), await median(1, 16)];
  expect(wide).toBeLessThanOrEqual(1.5 * narrow);
  expect(narrow).toBeLessThan(single);
  expect(wide).toBeLessThan(single);
  expect(on.live()).toBe(0);
});
