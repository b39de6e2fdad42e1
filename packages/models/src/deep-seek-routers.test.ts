// DeepSeek's routers and GShard in a language model: each is trained at toy size and learns, and DeepSeek-V3's bias moves.
import { leaves, random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { deepSeekV2, deepSeekV3, gshard } from "@switchyard/routers";
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
  ["deepSeekV3", deepSeekV3({ k: 2 })],
  ["deepSeekV3 in groups", deepSeekV3({ k: 2, groups: 2, keptGroups: 1 })],
  ["deepSeekV2", deepSeekV2({ k: 2 })],
  ["deepSeekV2 in groups", deepSeekV2({ k: 2, groups: 2, keptGroups: 1 })],
  ["gshard", gshard({ order: "tokens" })],
];
it.each(learns)("%s learns", async (_, router) => {
  const on = makeEngine();
  const model = transformer(
    on,
    { ...smallConfig, experts: 4, width: 16, headSize: 4, hidden: 8, router },
    random(on, 1),
  );
  const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
  const { loss } = await run.step();
  const live = on.live();
  await run.run({ until: 25 });
  expect(on.live()).toBe(live);
  expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
  run.dispose();
  expect(on.live()).toBe(0);
});

it("deepSeekV3's bias moves by the rate with every step, in each layer by its own loads", async () => {
  const on = makeEngine();
  const router = deepSeekV3({ k: 1, rate: 0.5 });
  const model = transformer(on, { ...smallConfig, router }, random(on, 1));
  const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }) });
  await run.step();
  const biases = await Promise.all(
    run.buffers.flatMap((tree) => leaves(tree)).map(async ([, bias]) => [...(await bias.data())]),
  );
  expect(biases).toHaveLength(smallConfig.layers);
  for (const bias of biases) {
    // 12 tokens over 5 experts: no load is the mean.
    expect(bias.map(Math.abs)).toEqual([0.5, 0.5, 0.5, 0.5, 0.5]);
    expect(new Set(bias).size).toBe(2);
  }
  run.dispose();
  expect(on.live()).toBe(0);
});
