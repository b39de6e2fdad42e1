// vqMoE, moge, viMoE and theoryGates in a language model: each form is trained at toy size, with padding, and learns.
import { random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { moge, theoryGates, viMoE, vqMoE } from "@switchyard/routers";
import { expect, it } from "vitest";
import { makeEngine, smallConfig } from "./models.test-util.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { transformer } from "./transformer.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index; the last row ends with padding.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  const real = (i: number): boolean => i < 10;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => (real(i) ? value(i, 1) : -1)),
    mask: Float32Array.from({ length: 12 }, (_, i) => Number(real(i))),
  };
};

const learns: readonly [string, RouterPlugin][] = [
  ["vqMoE", vqMoE({ k: 1 })],
  ["vqMoE as released", vqMoE({ codes: 16, blend: 0.1, normalise: true })],
  ["vqMoE, discrete path alone", vqMoE({ discreteOnly: "always", vqLoss: 1 })],
  ["moge", moge({ k: 2 })],
  [
    "moge as released, on the positive scores",
    moge({ k: 2, penalty: 0.1, scores: "relu", size: 2, kernel: "gaussian", padding: "valid", normalise: true }),
  ],
  ["viMoE", viMoE()],
  ["theoryGates, dense", theoryGates({ gate: "dense" })],
  ["theoryGates, sparse", theoryGates({ k: 2, balance: 0.01 })],
  ["theoryGates, hierarchical", theoryGates({ gate: "hierarchical", groups: 3, outerK: 2, innerK: 1 })],
  ["theoryGates, hierarchical without limits", theoryGates({ gate: "hierarchical" })],
  ["theoryGates, sigmoid over the selected", theoryGates({ gate: "sigmoid", balance: 0.01 })],
  ["theoryGates, sigmoid over all", theoryGates({ gate: "sigmoid", over: "all" })],
];
it.each(learns)("%s learns", async (_, router) => {
  const on = makeEngine();
  const config = { ...smallConfig, width: 16, headSize: 4, hidden: 8, experts: 6, router };
  const model = transformer(on, config, random(on, 1));
  const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
  const { loss } = await run.step();
  const live = on.live();
  await run.run({ until: 25 });
  expect(on.live()).toBe(live);
  expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
  run.dispose();
  expect(on.live()).toBe(0);
});
