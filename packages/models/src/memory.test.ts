// The plan of memory against sums by hand, and what running within it gives: the numbers of the resident model, bit for bit.
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { dispose, type Engine, engine, UnsupportedError } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { wasm } from "@switchyard/kernels/wasm";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { architectures } from "./architectures/families.ts";
import { mixtral } from "./architectures/mixtral.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { generate } from "./generate.ts";
import { parseBytes, planMemory, promptChunk, showBytes, workingBytes } from "./memory.ts";
import type { LanguageModel } from "./model.ts";
import { loudModel, smallConfig } from "./models.test-util.ts";
import { type LoadedModel, loadModel } from "./pretrained.ts";
import { randomCheckpoint } from "./random-checkpoint.ts";
import { bytesSource } from "./safetensors.ts";
import type { CheckpointIndex } from "./source.ts";
import type { StreamPolicy } from "./streamed-experts.ts";
import { expertRequests, simulateCache } from "./trace/cache-sim.ts";
import { readTrace } from "./trace/reader.ts";
import { traceRecorder } from "./trace/recorder.ts";
import { traced } from "./trace/traced.ts";

const fixtures = fileURLToPath(new URL("../test/fixtures/", import.meta.url));
const folders = readdirSync(fixtures).filter((name) => existsSync(join(fixtures, name, "config.json")));

const backends = await Promise.all([wasm({ threads: 1 }), wasm({ threads: 2 })]);
let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "memory-"));
});
afterAll(() => {
  for (const backend of backends) backend.dispose();
  rmSync(folder, { recursive: true, force: true });
});
const engines: readonly [string, Engine][] = [
  ["wasm, 1 thread", engine(backends[0] as (typeof backends)[0])],
  ["wasm, 2 threads", engine(backends[1] as (typeof backends)[0])],
  ["cpu", engine(cpu())],
];
const [, on] = engines[0] as [string, Engine];

const planOf = async (path: string, given: Engine) => {
  const checkpoint = await openCheckpoint(path);
  try {
    const architecture = architectures.find(({ modelTypes }) =>
      modelTypes.includes(String(checkpoint.config.model_type)),
    );
    if (!architecture) throw new Error("no architecture");
    return planMemory(given, checkpoint, architecture.describe(checkpoint));
  } finally {
    await checkpoint.close();
  }
};

/** A prompt of two rows, some of it padding, then tokens one by one, then two at once: all logits, as bits. */
async function run(
  model: LanguageModel,
  more: { past(n: number): object } = { past: () => ({}) },
): Promise<Uint32Array[]> {
  const cache = model.newCache(2);
  const found: Uint32Array[] = [];
  const parts = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    [20, 30],
    [21, 31],
    [7, 7],
    [1, 2, 3, 4],
  ];
  let past = 0;
  for (const ids of parts) {
    const sequence = ids.length / 2;
    const tensor = model.engine.tensor(Int32Array.from(ids), [2, sequence]);
    const logits = await model.step(tensor, { cache, padding: [0, 2], ...more.past(past) });
    found.push(new Uint32Array(Float32Array.from(await logits.data()).buffer));
    dispose([tensor, logits]);
    past += sequence;
  }
  cache.dispose();
  return found;
}

describe.each(engines)("a model in less memory on %s", (_, given) => {
  it.each(folders)("computes what it computes in memory, bit for bit: %s", async (name) => {
    const path = join(fixtures, name);
    const live = given.live();
    const resident = await loadModel(path, { engine: given });
    expect(resident.model.streamed).toBeUndefined();
    const expected = await run(resident.model);
    await resident.close();
    const { least, expertBytes } = await planOf(path, given);
    const cases: readonly [StreamPolicy, number][] = [
      ["lru", 0],
      ["lfu", 1],
      ["prefetch", 3],
    ];
    for (const [streaming, capacity] of cases) {
      const memory = least + capacity * expertBytes;
      const loaded = await loadModel(path, { engine: given, memory, streaming });
      const { streamed } = loaded.model;
      expect(streamed?.capacity).toBe(capacity);
      expect(await run(loaded.model)).toEqual(expected);
      expect(streamed?.counts().requests).toBeGreaterThan(10);
      await loaded.close();
    }
    expect(given.live()).toBe(live);
  });
});

describe("a recorded trace", () => {
  // JetMoE routes attention heads, too, whose experts stay in memory.
  const families: readonly [StreamPolicy, string, object][] = [
    ["lru", "mixtral", { num_hidden_layers: 4, num_local_experts: 9, num_experts_per_tok: 2 }],
    ["lfu", "mixtral", { num_hidden_layers: 4, num_local_experts: 9, num_experts_per_tok: 2 }],
    ["prefetch", "mixtral", { num_hidden_layers: 4, num_local_experts: 9, num_experts_per_tok: 2 }],
    ["lru", "jetmoe", { num_local_experts: 9 }],
    ["prefetch", "jetmoe", { num_local_experts: 9 }],
  ];
  it.each(families)("foretells the hits and the bytes of a real run: %s, %s", async (streaming, name, sizes) => {
    const config = { ...JSON.parse(readFileSync(join(fixtures, name, "config.json"), "utf8")), ...sizes };
    const path = join(folder, name);
    const architecture = architectures.find(({ modelTypes }) => modelTypes.includes(name)) ?? mixtral;
    await randomCheckpoint(path, { config, architecture }, { dtype: "BF16", scale: 0.2 });
    const { least, expertBytes, experts } = await planOf(path, on);
    for (const capacity of [0, 3, 8, Math.min(20, experts - 6)]) {
      const { model, close } = await loadModel(path, { engine: on, memory: least + capacity * expertBytes, streaming });
      const parts: Uint8Array[] = [];
      const sink = {
        async write(bytes: Uint8Array) {
          parts.push(bytes);
        },
      };
      const { routing, streamed } = model;
      const recorder = traceRecorder(sink, {
        model: { name: "random" },
        routing,
        expertBytes: streamed?.expertBytes ?? 0,
      });
      const watched = traced(model, recorder);
      const cache = model.newCache(1);
      for (const ids of [[1, 2, 3], ...Array.from({ length: 20 }, (_, i) => [(i * 37) % 200])]) {
        const tensor = on.tensor(Int32Array.from(ids), [1, ids.length]);
        dispose([await watched.step(tensor, { cache }), tensor]);
      }
      cache.dispose();
      await recorder.close();
      const { header, chunks } = await readTrace(bytesSource("trace", new Uint8Array(Buffer.concat(parts))));
      const requests = await expertRequests(header, chunks());
      const size = { memory: capacity * expertBytes };
      const { total } = simulateCache(header.layers, requests, { policy: streaming, size });
      const { requests: asked, hits, prefetches, bytesRead } = total;
      expect(streamed?.counts()).toEqual({ requests: asked, hits, prefetches, bytesRead });
      if (capacity > 10) expect(hits).toBeGreaterThan(asked / 4);
      await close();
    }
  });
});

describe("planMemory", () => {
  it("keeps what every token uses, and as many experts as fit", async () => {
    const path = join(fixtures, "mixtral");
    const checkpoint = await openCheckpoint(path);
    const { config, names } = checkpoint;
    const sizeOf = (pick: (name: string) => boolean): number =>
      names.filter(pick).reduce((n, name) => n + checkpoint.stored(name).bytes, 0);
    const experts = sizeOf((name) => name.includes(".experts."));
    const count = Number(config.num_hidden_layers) * Number(config.num_local_experts);
    const description = mixtral.describe(checkpoint);
    const working = workingBytes(description.blueprint);
    const all = planMemory(on, checkpoint, description);
    const total = sizeOf(() => true);
    const expertBytes = experts / count;
    const whole = { experts: count, capacity: count, expertBytes };
    expect(all).toMatchObject({ kind: "resident", resident: total, working, ...whole });
    const least = total - experts + working + 4 * expertBytes;
    const plan = (memory: number) => planMemory(on, checkpoint, description, { memory });
    expect(plan(total + working)).toEqual({ ...all, least: Math.min(least, total + working) });
    const streamed = { kind: "streamed", resident: total - experts, working, least, experts: count, expertBytes };
    expect(plan(least)).toEqual({ ...streamed, capacity: 0 });
    expect(plan(least + 3 * expertBytes - 1)).toEqual({ ...streamed, capacity: 2 });
    expect(plan(least + 3 * expertBytes)).toEqual({ ...streamed, capacity: 3 });
    expect(() => plan(least - 1)).toThrow(UnsupportedError);
    const [needed, allowed] = [showBytes(least), showBytes(least - 10_000)];
    expect(() => plan(least - 10_000)).toThrow(`the model needs ${needed} of memory, and ${allowed} are allowed`);
    expect(() => plan(0)).toThrow(/memory is 0/);
    const wide = planMemory(on, checkpoint, description, { weights: "f32", memory: 1e12 });
    expect(wide.resident).toBe(
      names.reduce((n, name) => n + 4 * checkpoint.stored(name).shape.reduce((a, b) => a * b, 1), 0),
    );
    await checkpoint.close();
  });

  it("is refused before anything is read", async () => {
    let failure: unknown;
    const loaded: LoadedModel | undefined = await loadModel(join(fixtures, "olmoe"), {
      engine: on,
      memory: 1000,
    }).catch((error: unknown) => {
      failure = error;
      return undefined;
    });
    expect(loaded).toBeUndefined();
    expect(String(failure)).toMatch(
      /the model needs .* of memory, and 1.00 kB are allowed; even with its experts read/,
    );
  });

  it("refuses what no heap of wasm can hold, however much memory is allowed", () => {
    const config = { model_type: "mixtral", hidden_size: 16384, num_hidden_layers: 8, num_key_value_heads: 32 };
    const shapes = new Map<string, readonly number[]>();
    const index: CheckpointIndex = {
      config,
      names: Array.from({ length: 500 }, (_, i) => `tensor ${i}`),
      stored: (name) => ({ shape: shapes.get(name) ?? [], dtype: "BF16", bytes: 0 }),
    };
    const description = mixtral.describe(index);
    for (const source of description.sources.values()) {
      const experts = source.kind === "whole" ? [] : Array.from({ length: source.shape[0] ?? 0 }, (_, e) => e);
      const pieces = source.kind === "whole" ? source.pieces : experts.flatMap(source.expert);
      for (const { name, shape } of pieces) shapes.set(name, shape);
    }
    const whole = { ...index, names: [...shapes.keys()] };
    for (const memory of [undefined, 1e12]) {
      expect(() => planMemory(on, whole, description, { memory })).toThrow(
        /needs 19\.\d+ GB on the device beside its experts, and the wasm backend has a heap of 4\.29 GB/,
      );
    }
    expect(planMemory(engine(cpu()), whole, description, { memory: 1e12 }).kind).toBe("resident");
  });

  it("refuses passes that streamed experts cannot serve", async () => {
    const path = join(fixtures, "mixtral");
    const { least } = await planOf(path, on);
    const { model, close } = await loadModel(path, { engine: on, memory: least });
    const ids = on.tensor(Int32Array.of(1, 2), [1, 2]);
    expect(() => model.forward(model.params, ids)).toThrow(UnsupportedError);
    await close();
    await expect(model.step(ids)).rejects.toThrow();
    ids.dispose();
  });
});

describe("prompts", () => {
  it("go through the model in the passes that were planned for", async () => {
    const model = loudModel(on, { ...smallConfig, context: 700 });
    const sizes: number[] = [];
    const counting: LanguageModel = {
      ...model,
      step(ids, options) {
        sizes.push(ids.shape[1] ?? 0);
        return model.step(ids, options);
      },
    };
    const prompt = Array.from({ length: 600 }, (_, i) => i % 13);
    for await (const { id } of generate(counting, { prompt, maxNew: 2 })) expect(id).toBeLessThan(13);
    expect(sizes).toEqual([promptChunk, 600 - promptChunk, 1]);
    dispose([model.params, ...model.buffers]);
  });
});

describe("parseBytes", () => {
  it.each([
    ["3GB", 3e9],
    ["1.5 gb", 1.5e9],
    ["512MiB", 512 * 2 ** 20],
    ["0.1KiB", 102],
    [" 4096 ", 4096],
    ["12b", 12],
    ["2TB", 2e12],
  ])("reads %s", (text, bytes) => expect(parseBytes(text)).toBe(bytes));
  it.each(["", "GB", "3 G", "-1GB", "1e9", "3GBs", "1.GB", "99999999TB", "NaN"])("refuses %j", (text) =>
    expect(() => parseBytes(text)).toThrow(/write it like 3GB/),
  );
  it("shows bytes", () => expect([1500, 2.5e6, 3e9].map(showBytes)).toEqual(["1.50 kB", "2.50 MB", "3.00 GB"]));
});
