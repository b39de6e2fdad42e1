// A real process that saves over a checkpoint again and again and is killed at a moment nobody chose.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import { openCheckpoint } from "../src/checkpoint.ts";
import { finishSave } from "../src/files.ts";

/** Saves one after the other; says each time when it begins. Runs on the sources, as the tests do. */
const program = (folder: string): string => `
  import { registerHooks } from "node:module";
  const core = ${JSON.stringify(new URL("../../core/src/index.ts", import.meta.url).href)};
  registerHooks({
    resolve: (name, context, next) => name === "@switchyard/core" ? { url: core, shortCircuit: true } : next(name, context),
  });
  const { saveFiles } = await import(${JSON.stringify(new URL("../src/files.ts", import.meta.url).href)});
  const { encodeSafetensors } = await import(${JSON.stringify(new URL("../src/safetensors.ts", import.meta.url).href)});
  for (let save = 1; ; save++) {
    const shards = 1 + (save % 3);
    const names = Array.from({ length: shards }, (_, i) => "model-" + i + "-of-" + shards + ".safetensors");
    const json = (name, value) => ({ name, content: () => [Buffer.from(JSON.stringify(value))] });
    const weights = (name, i) => ({
      name,
      content: () => encodeSafetensors([
        { name: "x" + i, dtype: "F64", shape: [5000], bytes: () => new Uint8Array(new Float64Array(5000).fill(save).buffer) },
      ]),
    });
    await saveFiles(${JSON.stringify(folder)}, [
      ...names.map(weights),
      json("model.safetensors.index.json", { weight_map: Object.fromEntries(names.map((name, i) => ["x" + i, name])) }),
      json("config.json", { save, shards }),
    ], { last: "config.json", isStale: (name) => name.startsWith("model-") });
    if (save === 1) console.log("saved");
  }`;

it("leaves one whole checkpoint, wherever it is killed", async () => {
  const folder = await mkdtemp(join(tmpdir(), "switchyard-process-"));
  try {
    for (let round = 0; round < 6; round++) {
      const child = spawn(process.execPath, ["--input-type=module", "--eval", program(folder)], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      await once(child.stdout, "data");
      // Not a wait for something to happen: the moment is meant to be anywhere.
      await new Promise((resolve) => setTimeout(resolve, 37 + 31 * round));
      child.kill("SIGKILL");
      await once(child, "close");
      const checkpoint = await openCheckpoint(folder);
      const { save, shards } = checkpoint.config;
      expect(checkpoint.names).toHaveLength(Number(shards));
      for (const name of checkpoint.names) {
        expect(new Set(new Float64Array((await checkpoint.read(name)).buffer))).toEqual(new Set([save]));
      }
      await checkpoint.close();
    }
    await finishSave(folder);
    expect(await readdir(folder)).toContain("config.json");
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
});
