// Every family of recorded checkpoints under the suite of architectures, in float64, where only the order of sums is left to differ, and
// on wasm; and generation for several prompts at once.
import { readdirSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { wasm } from "@switchyard/kernels/wasm";
import { testArchitecture } from "@switchyard/testing";
import { afterAll, describe, expect, it } from "vitest";
import { generate, generateBatch, loadModel } from "../src/index.ts";

const fixtures = fileURLToPath(new URL("fixtures/", import.meta.url));
const folders = readdirSync(fixtures, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);
const backend = await wasm({ threads: 1 });
afterAll(() => backend.dispose());
const engines = [
  { where: "in float64", on: engine(cpu({ precision: 64 })), tolerance: 1e-12 },
  { where: "on wasm", on: engine(backend), tolerance: 1e-5 },
];

/** The longer of the recorded prompts. */
function promptOf(name: string): readonly number[] {
  const { prompts } = JSON.parse(readFileSync(`${fixtures}/${name}/golden.json`, "utf8")) as {
    readonly prompts: readonly { readonly input_ids: readonly number[] }[];
  };
  return prompts[1]?.input_ids ?? [];
}

for (const { where, on, tolerance } of engines) {
  for (const name of folders) {
    const open = (given: Engine) => loadModel(`${fixtures}/${name}`, { engine: given });
    testArchitecture({ name: `${name} ${where}`, engine: on, open, prompt: promptOf(name), tolerance });
  }
}

describe("generateBatch", () => {
  it.each(folders)("makes of several prompts what generate makes of each: %s", async (name) => {
    const on = engine(backend);
    const { model, close } = await loadModel(`${fixtures}/${name}`, { engine: on });
    const prompt = promptOf(name);
    const prompts = [prompt.slice(0, 7), prompt.slice(3, 5), prompt];
    const rows: number[][] = prompts.map(() => []);
    const options = { maxNew: 6, temperature: 0 };
    for await (const { row, id } of generateBatch(model, { ...options, prefillChunk: 4, prompts })) rows[row]?.push(id);
    for (const [i, one] of prompts.entries()) {
      const ids: number[] = [];
      for await (const { id } of generate(model, { ...options, prompt: one })) ids.push(id);
      expect(rows[i]).toEqual(ids);
      expect(ids).toHaveLength(6);
    }
    await close();
    expect(on.live()).toBe(0);
  });
});
