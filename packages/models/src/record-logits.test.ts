// What is recorded has the names, shapes and numbers that were recorded from Hugging Face Transformers.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { random } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { makeEngine, plainTopK, smallConfig } from "./models.test-util.ts";
import { loadModel } from "./pretrained.ts";
import { recordedSources, recordLogits } from "./record-logits.ts";
import { bytesSource, encodeSafetensors, readHeader, toFloat32 } from "./safetensors.ts";
import { transformer } from "./transformer.ts";

const folder = (name: string): string => join(import.meta.dirname, "..", "test", "fixtures", name);
const tolerances = { logits: 2e-4, router_logits: 1e-4, topk_weights: 2e-5, topk_indices: 0 };

describe("recordLogits", () => {
  // One plain model, one with dense layers first, one with routed attention, one with tied embeddings and attention sinks.
  it.each(["olmoe", "deepseek_v3", "jetmoe", "gpt_oss"])(
    "%s: all that was recorded, and nothing else",
    async (name) => {
      const bytes = new Uint8Array(await readFile(join(folder(name), "golden.safetensors")));
      const recorded = bytesSource("golden", bytes);
      const { tensors } = await readHeader(recorded);
      const { prompts } = JSON.parse(await readFile(join(folder(name), "golden.json"), "utf8"));
      const engine = makeEngine();
      const { model, close } = await loadModel(folder(name), { engine });
      const before = engine.live();
      const found = await recordLogits(model, prompts[0].input_ids);
      expect(engine.live()).toBe(before);
      const expected = [...tensors.keys()].filter(
        (key) => key.startsWith("prompt0.") && !key.endsWith("greedy_logits"),
      );
      expect(found.map((one) => `prompt0.${one.name}`).sort()).toEqual(expected.sort());
      for (const { name: what, shape, data } of found) {
        const stored = tensors.get(`prompt0.${what}`);
        expect(shape, what).toEqual(stored?.shape);
        const raw = await recorded.read(stored?.from ?? 0, stored?.to ?? 0);
        const values = stored?.dtype === "I32" ? new Int32Array(raw.buffer) : toFloat32(raw, "F32", what);
        const kind = what.split(".").at(-1) as keyof typeof tolerances;
        let largest = 0;
        for (const [i, x] of values.entries()) largest = Math.max(largest, Math.abs(x - (data[i] ?? Number.NaN)));
        expect(data.length, what).toBe(values.length);
        expect(largest, what).toBeLessThanOrEqual(tolerances[kind] ?? 2e-4);
      }
      await close();
      expect(engine.live()).toBe(0);
    },
  );

  it("is written as a file that reads back", async () => {
    const engine = makeEngine();
    const model = transformer(engine, smallConfig, random(engine, 1));
    const found = await recordLogits(model, [3, 1]);
    const pieces: Uint8Array[] = [];
    for await (const piece of encodeSafetensors(recordedSources(found))) pieces.push(piece);
    const { tensors } = await readHeader(bytesSource("x", new Uint8Array(Buffer.concat(pieces))));
    expect([...tensors].map(([name, { dtype, shape }]) => [name, dtype, shape])).toEqual(
      found.map(({ name, shape }) => [name, name.endsWith("indices") ? "I32" : "F32", shape]),
    );
  });

  it("refuses ids that the model does not have, and frees what it made when a pass fails", async () => {
    const engine = makeEngine();
    const model = transformer(engine, smallConfig, random(engine, 1));
    await expect(recordLogits(model, [])).rejects.toThrow(/no ids; give at least one/);
    await expect(recordLogits(model, [1, 13])).rejects.toThrow(/id 13 is not in a vocabulary of 13/);
    await expect(recordLogits(model, Array(13).fill(0))).rejects.toThrow(/13 ids, but the context of the model is 12/);
    const ahead = { ...plainTopK(2), causal: { training: false, evaluation: false } };
    const looking = transformer(engine, { ...smallConfig, router: ahead }, random(engine, 1));
    const before = engine.live();
    await expect(recordLogits(looking, [1])).rejects.toThrow(/looking at later tokens/);
    expect(engine.live()).toBe(before);
    await expect(recordLogits(looking, [1], { allowNonCausal: true })).resolves.toHaveLength(2 * 6 + 3);
  });
});
