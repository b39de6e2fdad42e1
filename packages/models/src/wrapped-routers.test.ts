// Routers with wrappers around them in a language model: trained, decoded with a cache, streamed layer by layer, saved and loaded.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import {
  withBalanceLoss,
  withCapacity,
  withJitter,
  withNoise,
  withNullExperts,
  withSharedExperts,
  withZLoss,
} from "@switchyard/core/wrappers";
import { deepSeekV3, similarityAware, topK } from "@switchyard/routers";
import { expect, it } from "vitest";
import { generate } from "./generate.ts";
import { loadSaved, makeEngine, smallConfig } from "./models.test-util.ts";
import { saveModel } from "./pretrained.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { type Transformer, transformer } from "./transformer.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => value(i, 1)),
  };
};
const bare = topK({ k: 2, balance: 0, zLoss: 0 });
const everything = (): RouterPlugin =>
  withSharedExperts(withCapacity(withZLoss(withBalanceLoss(withNullExperts(withNoise(withJitter(bare)))))), {
    count: 1,
  });

async function write(model: Transformer, cache: boolean): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of generate(model, { prompt: [1, 2, 3], maxNew: 6, temperature: 0, cache })) ids.push(id);
  return ids;
}

it.each<[RouterPlugin, string[]]>([
  [withCapacity(topK({ k: 2 })), ["balance", "zLoss"]],
  [withJitter(similarityAware({ k: 2 })), ["balance", "zLoss"]],
  [withNullExperts(deepSeekV3({ k: 2, rate: 0.01 })), ["balance"]],
  [withSharedExperts(topK({ k: 1 })), ["balance", "zLoss"]],
  [everything(), ["balance", "zLoss"]],
])("$name learns, decodes alike with and without a cache, and comes back from its files", async (router, losses) => {
  const on = makeEngine();
  const model = transformer(on, { ...smallConfig, width: 16, headSize: 4, hidden: 8, router }, random(on, 1));
  const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
  const { loss, losses: found } = await run.step();
  expect(Object.keys(found).sort()).toEqual(losses);
  const live = on.live();
  await run.run({ until: 25 });
  expect(on.live()).toBe(live);
  expect(run.history.at(-1)?.loss).toBeLessThan(0.7 * loss);

  const trained = model.with({ params: run.params, buffers: run.buffers });
  const written = await write(trained, true);
  expect(written).toHaveLength(6);
  expect(await write(trained, false)).toEqual(written);

  const folder = await mkdtemp(join(tmpdir(), "switchyard-wrapped-"));
  try {
    expect(await saveModel(trained, folder)).toBe("switchyard");
    const loaded = await loadSaved(folder, { engine: on, routers: [topK({ k: 2 }), router] });
    expect(await write(loaded.model, true)).toEqual(written);
    await expect(loadSaved(folder, { engine: on, routers: [topK({ k: 2 })] })).rejects.toThrow(
      `needs the router ${router.name}(`,
    );
  } finally {
    await rm(folder, { recursive: true });
  }
});
