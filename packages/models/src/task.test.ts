// Training a small model with core's trainer: it learns, resumes bit for bit from a file, evaluates, and leaks nothing.
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Engine, random } from "@switchyard/core";
import { adamw, type Trainer, trainer } from "@switchyard/core/train";
import { reMoE } from "@switchyard/routers/re-moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { generate } from "./generate.ts";
import { makeEngine, naiveForward, plainTopK, readAll, smallConfig } from "./models.test-util.ts";
import { readSnapshot, writeSnapshot } from "./snapshot-file.ts";
import { languageModelTask, randomWindows, type TextBatch } from "./task.ts";
import { transformer } from "./transformer.ts";
import type { TransformerConfig } from "./transformer-config.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => value(i, 1)),
  };
};
const config: TransformerConfig = { ...smallConfig, width: 16, headSize: 4, hidden: 8, router: topK({ k: 2 }) };
const start = (on: Engine, router = config.router): Trainer<TextBatch> => {
  const model = transformer(on, { ...config, router }, random(on, 1));
  return trainer(on, languageModelTask(model, { batch }), {
    optimiser: adamw({ learningRate: 0.01 }),
    seed: 3,
    clip: 1,
  });
};

describe("training", () => {
  it("refuses a router that looks ahead before anything changes, in one sentence, unless told otherwise", async () => {
    const on = makeEngine();
    const router = { ...plainTopK(2), name: "peeking", causal: { training: false, evaluation: true } };
    const run = start(on, router);
    const before = await readAll(run.params);
    await expect(run.step()).rejects.toThrow(
      "router peeking chooses experts by looking at later tokens, so training a language model on it leaks the future into the loss; " +
        "use a causal router, or set allowNonCausal: true if that is wanted",
    );
    expect(run.steps).toBe(0);
    expect(await readAll(run.params)).toEqual(before);
    expect((await run.evaluate([batch(0)])).loss).toBeGreaterThan(0);
    const told = transformer(on, { ...config, router, allowNonCausal: true }, random(on, 1));
    const allowed = trainer(on, languageModelTask(told, { batch }), { optimiser: adamw({ learningRate: 0.01 }) });
    expect((await allowed.step()).loss).toBeGreaterThan(0);
  });

  it("learns to count, and then generates it with and without a cache", async () => {
    const on = makeEngine();
    const model = transformer(on, config, random(on, 1));
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
    const first = await run.step();
    expect(first.loss).toBeCloseTo(Math.log(13), 0);
    expect(first.tokens).toBe(12);
    expect(first.loads.map((load) => load.reduce((a, b) => a + b, 0))).toEqual([24, 24]);
    const live = on.live();
    await run.run({ until: 60 });
    expect(on.live()).toBe(live);
    expect(run.history.at(-1)?.loss).toBeLessThan(0.3);
    const trained = model.with({ params: run.params, buffers: run.buffers });
    for (const cache of [true, false]) {
      const ids: number[] = [];
      for await (const { id } of generate(trained, { prompt: [3], maxNew: 5, temperature: 0, cache })) ids.push(id);
      expect(ids).toEqual([4, 5, 6, 7, 8]);
    }
    run.dispose();
    expect(on.live()).toBe(0);
  });

  it("resumes bit for bit from a file", async () => {
    const folder = await mkdtemp(join(tmpdir(), "switchyard-task-"));
    const path = join(folder, "training.safetensors");
    try {
      const on = makeEngine();
      const whole = start(on, reMoE({ k: 2 }));
      await whole.run({ until: 8 });
      const half = start(on, reMoE({ k: 2 }));
      await half.run({ until: 5 });
      await writeSnapshot(path, await half.snapshot());
      await writeSnapshot(path, await half.snapshot());
      expect(await readdir(folder)).toEqual(["training.safetensors"]);
      const resumed = start(on, reMoE({ k: 2 }));
      resumed.restore(await readSnapshot(path));
      await resumed.run({ until: 8 });
      expect(await readAll(resumed.params)).toEqual(await readAll(whole.params));
      expect(await readAll(resumed.buffers)).toEqual(await readAll(whole.buffers));
      const numbers = (run: Trainer<TextBatch>) => run.history.map(({ seconds: _, ...report }) => report);
      expect(numbers(resumed)).toEqual(numbers(whole));

      const bytes = await readFile(path);
      for (const at of [Math.floor(bytes.length / 2), bytes.length - 1]) {
        const flipped = Uint8Array.from(bytes);
        flipped[at] = (flipped[at] ?? 0) ^ 1;
        await writeFile(path, flipped);
        await expect(readSnapshot(path)).rejects.toThrow(/training.safetensors.*damaged/);
      }
      await writeFile(path, bytes.subarray(0, -1));
      await expect(readSnapshot(path)).rejects.toThrow(/training.safetensors: .*cut short or damaged/);
      await expect(readSnapshot(join(folder, "none"))).rejects.toThrow(/there is no such file/);
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  it("evaluates the mean cross entropy over labelled tokens, padding left out", async () => {
    const on = makeEngine(64);
    const model = transformer(on, { ...config, router: plainTopK(2) }, random(on, 1));
    const params = await readAll(model.params);
    const task = languageModelTask(model, { batch });
    const run = trainer(on, task, { optimiser: adamw({ learningRate: 0.01 }) });
    const padded: TextBatch = {
      shape: [1, 4],
      ids: Int32Array.of(1, 2, 3, 0),
      labels: Int32Array.of(2, -1, 4, -1),
      mask: Float32Array.of(1, 1, 1, 0),
    };
    const { loss, tokens } = await run.evaluate([padded]);
    const logits = naiveForward({ ...config, router: plainTopK(2) }, params, [1, 2, 3], 2);
    const nll = (row: number[], label: number): number => {
      const top = Math.max(...row);
      return top + Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0)) - (row[label] ?? 0);
    };
    expect(tokens).toBe(2);
    expect(loss).toBeCloseTo((nll(logits[0] ?? [], 2) + nll(logits[2] ?? [], 4)) / 2, 9);
  });

  it("draws random windows that depend on the index only", () => {
    const on = makeEngine();
    const ids = Int32Array.from({ length: 40 }, (_, i) => i);
    const windows = (sequence: number) => randomWindows(ids, { batch: 3, sequence, random: random(on, 2) });
    const [a, b] = [windows(7).batch(5), windows(7).batch(5)];
    expect(a).toEqual(b);
    expect(a.shape).toEqual([3, 7]);
    expect(a.labels).toEqual(a.ids.map((id) => id + 1));
    const starts = (batch: TextBatch, sequence: number) => [0, 1, 2].map((row) => batch.ids[row * sequence]);
    expect(windows(7).batch(6).ids).not.toEqual(a.ids);
    // Every start is possible: the first, and the last whose label is still inside.
    const seen = new Set(Array.from({ length: 200 }, (_, i) => starts(windows(37).batch(i), 37)).flat());
    expect([...seen].sort()).toEqual([0, 1, 2]);
    expect(() => windows(40)).toThrow(/40 ids are too few for windows of 40/);
  });

  it("refuses batches that do not fit", () => {
    const on = makeEngine();
    const model = transformer(on, config, random(on, 1));
    const task = (bad: Partial<TextBatch>) => languageModelTask(model, { batch: () => ({ ...batch(0), ...bad }) });
    expect(() => task({ ids: new Int32Array(11) }).batch(7)).toThrow(
      /batch 7: \[2,6\] needs 12 ids.*found 11, 12, none/,
    );
    expect(() => task({ ids: new Int32Array(12).fill(13) }).batch(0)).toThrow(/id 13 is not in a vocabulary of 13/);
    expect(() => task({ labels: new Int32Array(12).fill(-2) }).batch(0)).toThrow(/id -2/);
  });
});
