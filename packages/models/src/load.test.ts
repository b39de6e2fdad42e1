// Loading from a description that somebody else wrote: what does not fit is refused, and all that was read is freed.
import { fileURLToPath } from "node:url";
import { CheckpointError, leaves, engine as makeEngineOf } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { expect, it } from "vitest";
import { architecture } from "./architectures/architecture.ts";
import { mixtral } from "./architectures/mixtral.ts";
import { openCheckpoint } from "./checkpoint.ts";
import type { LanguageModel } from "./model.ts";
import { makeEngine } from "./models.test-util.ts";
import { loadModel, readModel } from "./pretrained.ts";
import type { Source } from "./source.ts";

const folder = fileURLToPath(new URL("../test/fixtures/mixtral", import.meta.url));

/** Every parameter by its path, with its type. */
async function contents(model: LanguageModel): Promise<Map<string, readonly [string, unknown]>> {
  const found = new Map<string, readonly [string, unknown]>();
  for (const [path, x] of leaves(model.params)) found.set(path, [x.dtype, await x.data()]);
  return found;
}

it.each(["mixtral", "gpt_oss", "jetmoe", "deepseek_v3"])(
  "reads %s alike in few reads and tensor by tensor",
  async (name) => {
    const where = fileURLToPath(new URL(`../test/fixtures/${name}`, import.meta.url));
    const backend = await wasm({ threads: 1 });
    const on = makeEngineOf(backend);
    const used = backend.memory().used;
    const checkpoint = await openCheckpoint(where);
    const { readParts, ...plain } = checkpoint;
    expect(readParts).toBeDefined();
    const together = await readModel(checkpoint, { engine: on });
    const apart = await readModel(plain, { engine: on });
    expect(await contents(together.model)).toEqual(await contents(apart.model));
    await together.close();
    await apart.close();
    expect([on.live(), backend.memory().used]).toEqual([0, used]);
    backend.dispose();
  },
);

it("frees what was read where a read fails", async () => {
  const backend = await wasm({ threads: 1 });
  const on = makeEngineOf(backend);
  const used = backend.memory().used;
  const checkpoint = await openCheckpoint(folder);
  const failing = { ...checkpoint, readParts: () => Promise.reject(new CheckpointError("the disk is gone")) };
  await expect(readModel(failing, { engine: on })).rejects.toThrow("the disk is gone");
  expect([on.live(), backend.memory().used]).toEqual([0, used]);
  await checkpoint.close();
  backend.dispose();
});

it.each<[string, (sources: Map<string, Source>) => void, RegExp]>([
  [
    "a router without its weight",
    (sources) => sources.delete("layers.1.moe.router.weight"),
    /the router's "layers.1.moe.router.weight" \[4,64\] has no source in this checkpoint/,
  ],
  [
    "a bias for a router that has none",
    (sources) => sources.set("layers.1.moe.router.bias", sources.get("norm") as Source),
    /has a source for "layers.1.moe.router.bias", which the model has not/,
  ],
  [
    "a parameter without a source",
    (sources) => sources.delete("layers.0.attention.q"),
    /the parameter "layers.0.attention.q" \[64,64\] has no source/,
  ],
])("refuses %s", async (_, change, message) => {
  const engine = makeEngine();
  const mine = architecture({
    modelTypes: ["mixtral"],
    describe(checkpoint) {
      const description = mixtral.describe(checkpoint);
      const sources = new Map(description.sources);
      change(sources);
      return { ...description, sources, ignores: () => true };
    },
  });
  await expect(loadModel(folder, { engine, architectures: [mine] })).rejects.toThrow(message);
  expect(engine.live()).toBe(0);
});
