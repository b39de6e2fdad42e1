// Recording whatever a model does: loaded checkpoints with dense layers and with two routers per layer, batches with padding.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { decodingStrategies } from "../decoding/strategies.ts";
import { fileSource } from "../files.ts";
import { type GenerationOptions, generate, generateBatch } from "../generate.ts";
import { makeEngine } from "../models.test-util.ts";
import { loadModel } from "../pretrained.ts";
import { readTrace } from "./reader.ts";
import { traceRecorder } from "./recorder.ts";
import { traced } from "./traced.ts";
import { traceFile } from "./writer.ts";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-traced-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));
const fixture = (name: string): string => fileURLToPath(new URL(`../../test/fixtures/${name}`, import.meta.url));

async function record(
  name: string,
  prompts: readonly (readonly number[])[],
  ends?: number,
  strategy: Partial<GenerationOptions> = { temperature: 0 },
) {
  const engine = makeEngine();
  const { model, close } = await loadModel(fixture(name), { engine });
  const stop = ends === undefined ? [] : [ends];
  const path = join(await mkdtemp(join(folder, "run-")), "run.trace");
  const recorder = traceRecorder(await traceFile(path), { model: { name }, routing: model.routing });
  const held = engine.live();
  const made: number[][] = prompts.map(() => []);
  const recording = traced(model, recorder);
  for await (const { row, id } of generateBatch(recording, { prompts, maxNew: 4, stop, ...strategy }))
    made[row]?.push(id);
  await recorder.close();
  expect(engine.live()).toBe(held);
  const source = await fileSource(path);
  if (!source) throw new Error("the trace was not written");
  const trace = await readTrace(source);
  const tokens: { sequence: number; position: number; token: number; experts: number[][] }[] = [];
  for await (const chunk of trace.chunks()) {
    for (let i = 0; i < chunk.tokens; i++) {
      tokens.push({
        sequence: chunk.sequence[i] as number,
        position: chunk.position[i] as number,
        token: chunk.token[i] as number,
        experts: chunk.layers.map(({ experts }) => {
          const slots = experts.length / chunk.tokens;
          return Array.from(experts.subarray(i * slots, (i + 1) * slots));
        }),
      });
    }
  }
  await source.close?.();
  return { model, header: trace.header, tokens, made, close };
}

describe("traced", () => {
  it("numbers layers as the model does: dense ones are left out, attention is named", async () => {
    const latent = await record("deepseek_v2", [[1, 2, 3]]);
    expect(latent.header.layers.map(({ index, name, experts, slots }) => [index, name, experts, slots])).toEqual([
      [1, undefined, 8, 3],
      [2, undefined, 8, 3],
    ]);
    await latent.close();
    const mixed = await record("jetmoe", [[1, 2, 3]]);
    expect(mixed.header.layers.map(({ index, name }) => [index, name])).toEqual([
      [0, "attention"],
      [0, undefined],
      [1, "attention"],
      [1, undefined],
    ]);
    await mixed.close();
  });

  it("gives a padded batch the experts and tokens of each row alone", async () => {
    const prompts = [
      [5, 6, 7, 8, 9],
      [10, 11],
      [12, 13, 14],
    ];
    // The second row ends after two tokens and leaves the batch.
    const end = (await record("mixtral", [prompts[1] ?? []])).made[0]?.[2];
    const together = await record("mixtral", prompts, end);
    expect(together.made.map(({ length }) => length)).toEqual([4, 2, 4]);
    for (const [row, prompt] of prompts.entries()) {
      const alone = await record("mixtral", [prompt], end);
      expect(together.made[row]).toEqual(alone.made[0]);
      const own = together.tokens.filter(({ sequence, position }) => sequence === row && position >= 0);
      expect(own.map(({ token }) => token)).toEqual([...prompt, ...(alone.made[0] ?? []).slice(0, row === 1 ? 2 : -1)]);
      expect(own.map(({ experts }) => experts)).toEqual(alone.tokens.map(({ experts }) => experts));
      expect(own.map(({ position }) => position)).toEqual(own.map((_, i) => i));
      await alone.close();
    }
    await together.close();
  });

  it("runs equal prompts once, under the number of the first, and leaves the others theirs", async () => {
    const prompts = [
      [5, 6, 7],
      [5, 6, 7],
      [10, 11],
    ];
    const { tokens, made, close } = await record("mixtral", prompts);
    const of = (row: number): number[] =>
      tokens.filter(({ sequence, position }) => sequence === row && position >= 0).map(({ token }) => token);
    expect(of(2)).toEqual([10, 11, ...(made[2] ?? []).slice(0, -1)]);
    expect(of(1)).toEqual([]);
    // The prompt once, what follows for each.
    expect(of(0)).toEqual([5, 6, 7, ...(made[0] ?? []).slice(0, -1).flatMap((id) => [id, id])]);
    await close();
  });

  it("numbers prompts that run one after the other, and all samples of each", async () => {
    const prompts = [
      [5, 6, 7],
      [10, 11],
    ];
    const { beam, contrastiveSearch, selfConsistency, selfContrast } = decodingStrategies;
    // Of each number, the ids at the first positions.
    const starts = async (options: Partial<GenerationOptions>): Promise<Record<number, number[]>> => {
      const { tokens, close } = await record("mixtral", prompts, undefined, options);
      await close();
      const found: Record<number, number[]> = {};
      for (const { sequence, position, token } of tokens) {
        const own = found[sequence] ?? [];
        found[sequence] = own;
        if (position >= 0 && position < 2) own[position] = token;
      }
      return found;
    };
    for (const strategy of [beam({ width: 2 }), contrastiveSearch({ candidates: 2 })]) {
      expect(await starts({ strategy })).toEqual({ 0: [5, 6], 1: [10, 11] });
      expect(await starts({ strategy, cache: false })).toEqual({ 0: [5, 6], 1: [10, 11] });
    }
    const answer = () => "same";
    // Samples begin alike, and have the number of the first one.
    expect(await starts({ strategy: selfConsistency({ answer, samples: 3 }) })).toEqual({ 0: [5, 6], 3: [10, 11] });
    // Strong and weak rows of two samples.
    const strategy = selfConsistency({ answer, samples: 2, strategy: selfContrast({ sample: true }) });
    expect(await starts({ strategy })).toEqual({ 0: [5, 6], 2: [5, 6], 4: [10, 11], 6: [10, 11] });
  });

  it("refuses a step that is recorded otherwise", async () => {
    const { model, close } = await record("mixtral", [[1]]);
    const recorder = traceRecorder({ write: async () => undefined }, { model: { name: "x" }, routing: model.routing });
    const ids = model.engine.tensor(Int32Array.of(1), [1, 1]);
    const pass = recorder.pass({ ids: [[1]] });
    await expect(traced(model, recorder).step(ids, { trace: pass })).rejects.toThrow(/a trace or a mask of its own/);
    await recorder.close();
    await close();
  });

  it("says what it would have to know", async () => {
    const { model, close } = await record("mixtral", [[1]]);
    const recorder = traceRecorder({ write: async () => undefined }, { model: { name: "x" } });
    const tokens = generate(traced(model, recorder), { prompt: [1], maxNew: 1 });
    await expect(tokens.next()).rejects.toThrow(/how many experts has layer 0\? Set experts, or routing/);
    await recorder.close();
    await close();
  });
});
