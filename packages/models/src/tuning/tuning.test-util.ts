// What the tests of fine-tuning share: the recorded checkpoints of all families, text for them, and reading parameters.
import { readdirSync } from "node:fs";
import { type Engine, leaves, random, type Tree } from "@switchyard/core";
import { mixtral } from "../architectures/mixtral.ts";
import { openCheckpoint } from "../checkpoint.ts";
import { openGolden, readGoldenModel } from "../golden.test-util.ts";
import { planMemory } from "../memory.ts";
import type { LanguageModel, ReadModelOptions } from "../model.ts";
import { type LoadedModel, loadModel } from "../pretrained.ts";
import { randomWindows, type TextBatch } from "../task.ts";

export const fixtures = new URL("../../test/fixtures/", import.meta.url).pathname;
export const families: readonly string[] = readdirSync(fixtures, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);

export async function familyModel(
  name: string,
  on: Engine,
  options: ReadModelOptions = { weights: "f32" },
): Promise<LanguageModel> {
  const folder = await openGolden(`${fixtures}/${name}`);
  try {
    return await readGoldenModel(folder, on, options);
  } finally {
    await folder.close();
  }
}

/** A model whose experts are read when they are needed. */
export async function streamedModel(on: Engine): Promise<LoadedModel> {
  const folder = `${fixtures}/mixtral`;
  const checkpoint = await openCheckpoint(folder);
  const { least: memory } = planMemory(on, checkpoint, mixtral.describe(checkpoint));
  await checkpoint.close();
  return loadModel(folder, { engine: on, memory });
}

/** Two rows of seven ids below 256: longer than any window of these models. The second ends with padding, and one label is left out. */
export const batch: TextBatch = {
  shape: [2, 7],
  ids: Int32Array.of(3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 0),
  labels: Int32Array.of(141, 59, 26, 53, -1, 97, 93, 238, 46, 26, 43, 38, -1, -1),
  mask: Float32Array.of(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0),
};

/** Windows of a text of these ids that repeats itself: it can be learnt. */
export const text = (on: Engine): { batch(index: number): TextBatch } => {
  const ids = Int32Array.from({ length: 200 }, (_, i) => batch.ids[i % 7] ?? 0);
  return randomWindows(ids, { batch: 2, sequence: 8, random: random(on, 4) });
};

/** The elements of every leaf; bit patterns compare equal. */
export async function contents(tree: Tree): Promise<Map<string, readonly number[]>> {
  const read = leaves(tree).map(async ([path, x]) => [path, Array.from(await x.data())] as const);
  return new Map(await Promise.all(read));
}
