// Every recorded checkpoint on the reference backend: all tensors on the way, routing, and greedy tokens with and without a cache.
import { readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { dispose } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { compareGolden, openGolden, readGoldenModel } from "../golden.test-util.ts";
import { makeEngine } from "../models.test-util.ts";
import { architectures } from "./families.ts";

const fixtures = fileURLToPath(new URL("../../test/fixtures/", import.meta.url));
const folders = readdirSync(fixtures, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);

describe("recorded checkpoints", () => {
  it.each(folders)("%s gives what was recorded, and frees all", async (name) => {
    const engine = makeEngine();
    const folder = await openGolden(`${fixtures}/${name}`);
    try {
      const model = await readGoldenModel(folder, engine);
      const held = engine.live();
      const { failures, largest } = await compareGolden(folder, model);
      expect(failures).toEqual([]);
      expect(largest.logits).toBeLessThan(2e-4);
      expect(engine.live()).toBe(held);
      dispose([model.params, ...model.buffers]);
      expect(engine.live()).toBe(0);
    } finally {
      await folder.close();
    }
  });

  it("are of every architecture", async () => {
    const types = folders.map((name) => name.replace(/_(fp8|mxfp4)$/, ""));
    expect([...new Set(types)].sort()).toEqual(architectures.flatMap(({ modelTypes }) => modelTypes).sort());
  });
});
