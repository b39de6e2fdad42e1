// xMoE, grin and dynMoLE in a language model: each form is trained at toy size and learns.
import { random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { dynMoLE, grin, xMoE } from "@switchyard/routers";
import { dynMoLEHook } from "@switchyard/routers/dyn-mole";
import { expect, it } from "vitest";
import { makeEngine, smallConfig } from "./models.test-util.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { transformer } from "./transformer.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => value(i, 1)),
  };
};

const learns: readonly [string, RouterPlugin][] = [
  ["xMoE", xMoE()],
  ["xMoE, sigmoid gate", xMoE({ k: 2, gate: "sigmoid" })],
  ["xMoE, torchscale", xMoE({ variant: "torchscale" })],
  ["xMoE, Tutel", xMoE({ variant: "tutel", k: 2 })],
  ["grin", grin({ k: 2 })],
  ["grin, SparseMixer v1", grin({ k: 1, version: "v1" })],
  ["dynMoLE", dynMoLE()],
  ["dynMoLE, Rényi", dynMoLE({ k: 1, entropy: "renyi", q: 2 })],
];
it.each(learns)("%s learns", async (_, router) => {
  const on = makeEngine();
  const model = transformer(on, { ...smallConfig, width: 16, headSize: 4, hidden: 8, router }, random(on, 1));
  const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
  const { loss } = await run.step();
  const live = on.live();
  await run.run({ until: 25 });
  expect(on.live()).toBe(live);
  expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
  run.dispose();
  expect(on.live()).toBe(0);
});

it("dynMoLEHook adds its loss over all layers to the trainer's", async () => {
  const total = async (weight: number): Promise<number> => {
    const on = makeEngine();
    const router = dynMoLE({ entropyLoss: 0, balance: 0 });
    const model = transformer(on, { ...smallConfig, width: 16, headSize: 4, hidden: 8, router }, random(on, 1));
    const hooks = [dynMoLEHook({ entropyLoss: weight, balance: 0 })];
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), hooks });
    const report = await run.step();
    run.dispose();
    expect(on.live()).toBe(0);
    return report.total;
  };
  // At first the router hardly prefers any expert: the entropy, relative to its largest value, is nearly 1.
  const added = (await total(10)) - (await total(0));
  expect(added).toBeGreaterThan(8);
  expect(added).toBeLessThan(10.01);
});
