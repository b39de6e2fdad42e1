// Batches with left padding on a checkpoint of every family: attention of all kinds, shared experts, quantised weights. Each row must be what
// it is alone, and greedy ids those that Hugging Face recorded.
import { existsSync, readdirSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { expect, it } from "vitest";
import { generateBatch } from "../generate.ts";
import { makeEngine } from "../models.test-util.ts";
import { loadModel } from "../pretrained.ts";
import { collect, collectRows } from "./decoding.test-util.ts";
import { selfContrast } from "./self-contrast.ts";

const fixtures = fileURLToPath(new URL("../../test/fixtures/", import.meta.url));
const folders = readdirSync(fixtures).filter((name) => existsSync(`${fixtures}/${name}/golden.json`));

it("has a checkpoint of every family", () => {
  expect(folders.length).toBeGreaterThanOrEqual(12);
});

it.each(folders)("%s", async (name) => {
  const folder = `${fixtures}/${name}`;
  const golden: { readonly prompts: readonly { readonly input_ids: number[]; readonly greedy_ids: number[] }[] } =
    JSON.parse(await readFile(`${folder}/golden.json`, "utf8"));
  const [short = [], long = []] = golden.prompts.map((one) => one.input_ids);
  const on = makeEngine();
  const loaded = await loadModel(folder, { engine: on });
  const { model } = loaded;
  const live = on.live();
  const [maxNew, temperature] = [8, 0];
  const prompts = [short, long, long.slice(0, 1)];
  const batch = await collectRows(generateBatch(model, { prompts, maxNew, temperature, prefillChunk: 5 }), 3);
  expect(on.live()).toBe(live);
  for (const [row, { greedy_ids }] of golden.prompts.entries())
    expect(batch.ids[row]).toEqual(greedy_ids.slice(0, maxNew));
  const alone = await collect(model, { prompt: prompts[2] ?? [], maxNew, temperature });
  expect(batch.ids[2]).toEqual(alone.ids);
  for (const [i, { logProbability }] of alone.tokens.entries()) {
    expect(Math.abs((batch.tokens[2]?.[i]?.logProbability ?? 0) - logProbability)).toBeLessThan(1e-5);
  }

  const strategy = selfContrast({ beta: 0.7 });
  const contrasted = collectRows(generateBatch(model, { prompts, maxNew: 4, strategy }), 3);
  if (name === "phimoe") {
    // Its router perturbs what it compares, so that its experts have no one order.
    await expect(contrasted).rejects.toThrow(/selfContrast: .* the router of layer 0 takes no overrides/);
  } else {
    const { ids } = await contrasted;
    for (const [row, prompt] of prompts.entries()) {
      expect(ids[row]).toEqual((await collect(model, { prompt, maxNew: 4, strategy })).ids);
    }
    expect(ids).not.toEqual(batch.ids.map((row) => row.slice(0, 4)));
  }
  expect(on.live()).toBe(live);
  await loaded.close();
});
