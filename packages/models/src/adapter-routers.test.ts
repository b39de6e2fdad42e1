// MoA's router in a language model: each form is trained at toy size and learns.
import { random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { moa } from "@switchyard/routers";
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
  ["soft", moa({ mode: "soft" })],
  ["sparse", moa()],
  ["sparse, constant threshold, linear logits", moa({ threshold: 0.5, logits: "linear" })],
];
it.each(learns)("moa, %s, learns", async (_, router) => {
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
