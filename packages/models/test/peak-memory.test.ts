// A real process runs a model of four times the memory it is allowed: the most it ever holds stays near the bound, and its tokens
// are those of the model in memory.
import { execFile } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { expect, it } from "vitest";
import { olmoe } from "../src/architectures/olmoe.ts";
import { randomCheckpoint } from "../src/random-checkpoint.ts";

/** Generates greedily; runs on the sources, as the tests do. Without `memory` there is no limit. */
const program = (folder: string, memory: number | undefined): string => `
  import { existsSync } from "node:fs";
  import { registerHooks } from "node:module";
  const packages = new URL(${JSON.stringify(new URL("../../", import.meta.url).href)});
  registerHooks({
    resolve(name, context, next) {
      const [, own, path] = /^@switchyard\\/([^/]+)(?:\\/(.+))?$/.exec(name) ?? [];
      if (own === undefined) return next(name, context);
      const places = path === undefined ? ["index.ts"] : [path + "/index.ts", path + ".ts"];
      const found = places.map((place) => new URL(own + "/src/" + place, packages)).find((url) => existsSync(url));
      return { url: found.href, shortCircuit: true };
    },
  });
  const { engine } = await import("@switchyard/core");
  const { wasm } = await import("@switchyard/kernels/wasm");
  const { generate, loadModel } = await import("@switchyard/models");
  const backend = await wasm({ threads: 1 });
  const { model, close } = await loadModel(${JSON.stringify(folder)}, {
    engine: engine(backend),
    ${memory === undefined ? "" : `memory: ${memory}`}
  });
  const prompt = Array.from({ length: 24 }, (_, i) => (i * 389) % 2048);
  const ids = [];
  for await (const { id } of generate(model, { prompt, maxNew: 16 })) ids.push(id);
  const streamed = model.streamed && { capacity: model.streamed.capacity, ...model.streamed.counts() };
  await close();
  backend.dispose();
  console.log(JSON.stringify({ ids, streamed, peak: process.resourceUsage().maxRSS * 1024 }));`;

it("keeps to the bound of memory, as the system counts it", async () => {
  const folder = await mkdtemp(join(tmpdir(), "switchyard-peak-"));
  try {
    const config = {
      model_type: "olmoe",
      hidden_size: 256,
      intermediate_size: 1024,
      max_position_embeddings: 256,
      num_attention_heads: 4,
      num_experts: 32,
      num_experts_per_tok: 4,
      num_hidden_layers: 3,
      num_key_value_heads: 4,
      vocab_size: 2048,
    };
    const { bytes } = await randomCheckpoint(folder, { config, architecture: olmoe }, { shardBytes: 5e7 });
    const run = async (memory?: number) => {
      const { stdout } = await promisify(execFile)(process.execPath, [
        "--input-type=module",
        "--eval",
        program(folder, memory),
      ]);
      return JSON.parse(stdout);
    };
    const memory = Math.floor(bytes / 4);
    const [free, bound] = [await run(), await run(memory)];
    expect(free.streamed).toBeUndefined();
    expect(free.peak).toBeGreaterThan(bytes);
    expect(bound.ids).toHaveLength(16);
    expect(bound.ids).toEqual(free.ids);
    expect(bound.streamed.capacity).toBeGreaterThan(3);
    expect(bound.streamed.bytesRead).toBeGreaterThan(memory);
    expect(bound.peak).toBeLessThan(memory + 300e6);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
});
