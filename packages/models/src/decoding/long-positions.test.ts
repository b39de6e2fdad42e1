// Rotary positions that depend on the length of the sequence (longrope): how a text is cut into passes must not show.
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { evaluateTokens } from "../evaluate.ts";
import { generateBatch } from "../generate.ts";
import { makeEngine } from "../models.test-util.ts";
import { type LoadedModel, loadModel } from "../pretrained.ts";
import { collect, collectRows } from "./decoding.test-util.ts";

/** Its factors change after 64 positions. */
const folder = fileURLToPath(new URL("../../test/fixtures/phimoe", import.meta.url));
const text = (length: number): number[] => Array.from({ length }, (_, i) => (i * 37 + 11) % 256);
const temperature = 0;

describe("longrope", () => {
  let loaded: LoadedModel;
  beforeAll(async () => {
    loaded = await loadModel(folder, { engine: makeEngine() });
  });
  afterAll(() => loaded.close());

  it.each([
    ["a prompt beyond the first length", 70],
    ["a text that grows beyond it", 61],
  ])("%s gives with a cache and in chunks what whole passes give", async (_, length) => {
    const given = { prompt: text(length), maxNew: 8, temperature };
    const whole = await collect(loaded.model, { ...given, cache: false });
    for (const prefillChunk of [7, 64, 512]) {
      const { tokens } = await collect(loaded.model, { ...given, prefillChunk });
      expect(tokens.map(({ id }) => id)).toEqual(whole.ids);
      for (const [i, { logProbability }] of tokens.entries())
        expect(logProbability).toBeCloseTo(whole.tokens[i]?.logProbability ?? Number.NaN, 5);
    }
  });

  it("in a batch every row has the positions that it has alone", async () => {
    const { engine } = loaded.model;
    const live = engine.live();
    const prompts = [text(62), text(70), text(59), text(50)];
    const running = generateBatch(loaded.model, { prompts, maxNew: 8, temperature, prefillChunk: 5 });
    const { tokens } = await collectRows(running, 4);
    for (const [row, prompt] of prompts.entries()) {
      const alone = await collect(loaded.model, { prompt, maxNew: 8, temperature });
      expect(tokens[row]?.map(({ id }) => id)).toEqual(alone.ids);
      for (const [i, { logProbability }] of alone.tokens.entries())
        expect(tokens[row]?.[i]?.logProbability).toBeCloseTo(logProbability, 5);
    }
    expect(engine.live()).toBe(live);
  });

  it("perplexity does not depend on the tokens of a pass", async () => {
    const ids = text(120);
    const [one, many] = await Promise.all(
      [100, 9].map((chunk) => evaluateTokens(loaded.model, ids, { chunk, context: 100, stride: 50 })),
    );
    expect(many?.nats).toBeCloseTo(one?.nats ?? Number.NaN, 4);
  });

  it("refuses a length that the pass exceeds, and one beyond the context", async () => {
    const { model } = loaded;
    const ids = model.engine.tensor(Int32Array.of(1, 2, 3), [1, 3]);
    for (const length of [2, 2.5, model.context + 1, Number.NaN])
      await expect(model.step(ids, { length })).rejects.toThrow(/length is .*, expected a whole number from 3/);
    ids.dispose();
  });
});
