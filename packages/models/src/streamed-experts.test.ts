// Streamed experts against the same experts in memory, bit for bit; their cache against its simulation; failures and ends.
import {
  CheckpointError,
  combineRows,
  dispatch,
  dispose,
  type Engine,
  engine,
  type Json,
  type Tensor,
  takeRows,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { Experts } from "@switchyard/core/moe";
import { wasm } from "@switchyard/kernels/wasm";
import { afterAll, describe, expect, it } from "vitest";
import type { ByteSource } from "./safetensors.ts";
import { type Sample, type SampleOptions, sample } from "./streamed-experts.test-util.ts";
import { type ExpertStoreOptions, expertStore, expertsOnTheWay } from "./streamed-experts.ts";
import { type CachePolicy, type ExpertRequest, simulateCache } from "./trace/cache-sim.ts";

const backends = await Promise.all([wasm({ threads: 1 }), wasm({ threads: 2 })]);
afterAll(() => {
  for (const backend of backends) backend.dispose();
});
const engines: readonly [string, Engine][] = [
  ["wasm, 1 thread", engine(backends[0] as (typeof backends)[0])],
  ["wasm, 2 threads", engine(backends[1] as (typeof backends)[0])],
  ["cpu", engine(cpu())],
];
const layout = { batch: 1, sequence: 1, past: 0 };

/** Numbers from -1 to 1 without a pattern. */
const noise = (count: number, seed = 1): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => (Math.sin(seed * 12.9898 + i * 78.233) * 43758.5453) % 1);

/** Rows per expert, and rows behind the last block. */
interface Asked {
  readonly counts: readonly number[];
  readonly behind?: number;
}
function rowsFor(on: Engine, width: number, { counts, behind = 0 }: Asked): { rows: Tensor; ends: Tensor } {
  let end = 0;
  const ends = Int32Array.from(counts, (count) => (end += count));
  return {
    rows: on.tensor(noise((end + behind) * width), [end + behind, width]),
    ends: on.tensor(ends, [counts.length]),
  };
}

const bits = async (x: Tensor): Promise<Uint32Array> => {
  const data = await x.data();
  return new Uint32Array(Float32Array.from(data).buffer);
};
const streamOf = (experts: Experts | undefined): NonNullable<Experts["stream"]> => {
  if (!experts?.stream) throw new Error("these experts are not streamed");
  return experts.stream;
};
const storeOf = (from: Sample, on: Engine, more: Partial<ExpertStoreOptions> = {}) =>
  expertStore({ checkpoint: from.checkpoint, engine: on, description: from.description, capacity: 2, ...more });

const fp8 = { quant_method: "fp8", weight_block_size: [16, 32] };
const mxfp4 = { quant_method: "mxfp4" };
const packed = (bits: number, more: { readonly [key: string]: Json }): { readonly [key: string]: Json } => ({
  quant_method: "compressed-tensors",
  format: "pack-quantized",
  config_groups: { group_0: { weights: { num_bits: bits, ...more } } },
});
const forms: readonly [string, SampleOptions][] = [
  ["F32", { dtype: "F32" }],
  ["BF16", { dtype: "BF16" }],
  ["F16", { dtype: "F16" }],
  ["fp8", { quantization: fp8 }],
  ["MXFP4", { quantization: mxfp4, stacked: true, width: 64, hidden: 32, bias: true }],
  ["int8", { quantization: packed(8, { strategy: "channel" }) }],
  ["int4", { quantization: packed(4, { group_size: 8 }) }],
  [
    "stacked, biases",
    { dtype: "BF16", stacked: true, bias: true, activation: { kind: "clamped", limit: 7, alpha: 1.7 } },
  ],
  ["gelu of odd sizes", { dtype: "F32", activation: "gelu", width: 33, hidden: 17 }],
];

describe.each(engines)("streamed experts on %s", (_, on) => {
  it.each(forms)("give what resident ones give, bit for bit: %s", async (_, options) => {
    const given = await sample(options);
    const { width } = given.description.blueprint;
    const live = on.live();
    const resident = await given.resident(on, 0);
    const store = storeOf(given, on);
    const stream = streamOf(store.experts(0, given.part));
    // Up to 24 rows go one way through the kernels and more another; 1 and 2 are special; the tile has 6 rows.
    for (const asked of [
      { counts: [1, 0, 2, 0, 0], behind: 3 },
      { counts: [0, 24, 25, 3, 31] },
      { counts: [7, 1, 1, 1, 50], behind: 1 },
      { counts: [0, 0, 0, 0, 13] },
      { counts: [0, 0, 0, 0, 0], behind: 2 },
      { counts: [0, 0, 0, 0, 0] },
    ]) {
      const { rows, ends } = rowsFor(on, width, asked);
      const streamed = await stream(rows, ends);
      const expected = on.scope(() => resident.apply(resident.params, rows, ends, layout).output);
      expect(streamed.shape).toEqual(expected.shape);
      expect(await bits(streamed), asked.counts.join()).toEqual(await bits(expected));
      dispose([rows, ends, streamed, expected]);
    }
    dispose(resident.params);
    await store.close();
    expect(on.live()).toBe(live);
  });

  it("also as one fused op, and with weights widened", async () => {
    const given = await sample({ dtype: "BF16", width: 132, hidden: 70, experts: 5 });
    const { width } = given.description.blueprint;
    const resident = await given.resident(on, 0);
    const [tokens, k] = [41, 2];
    const ids = on.tensor(
      Int32Array.from({ length: tokens * k }, (_, i) => (i < 60 ? 3 : (i * i) % 5)),
      [tokens, k],
    );
    const weights = on.tensor(noise(tokens * k, 2), [tokens, k]);
    const hidden = on.tensor(noise(tokens * width, 3), [tokens, width]);
    const fused = on.scope(() => resident.fused?.(resident.params, hidden, { kind: "sparse", experts: ids, weights }));
    for (const how of ["stored", "f32"] as const) {
      const store = storeOf(given, on, { weights: how });
      const { rows, slots, ends } = on.scope(() => {
        const sorted = dispatch(ids, { count: 5, bound: tokens * k });
        return { ...sorted, rows: takeRows(hidden, sorted.rows) };
      });
      const output = await streamOf(store.experts(0, given.part))(rows, ends);
      const combined = on.scope(() => combineRows(output, weights, slots));
      expect(await bits(combined)).toEqual(await bits(fused as Tensor));
      await store.close();
    }
  });
});

describe("the cache of streamed experts", () => {
  const [, on] = engines[0] as [string, Engine];
  const layers = 3;

  /** Passes through all layers; which experts each asks for. */
  async function run(given: Sample, stores: ReturnType<typeof expertStore>, passes: number): Promise<ExpertRequest[]> {
    const requests: ExpertRequest[] = [];
    const { width } = given.description.blueprint;
    const { experts } = given.part;
    for (let pass = 0; pass < passes; pass++) {
      for (let layer = 0; layer < layers; layer++) {
        // Some experts are asked for again and again; the first pass is a prompt that needs more than fit.
        const counts = Array.from({ length: experts }, (_, e) =>
          pass === 0 ? (e + layer) % 3 : Number((e * 7 + pass * pass + layer * 3) % 11 < 3),
        );
        const { rows, ends } = rowsFor(on, width, { counts });
        (await streamOf(stores.experts(layer, given.part))(rows, ends)).dispose();
        dispose([rows, ends]);
        const ids = counts.flatMap((count, e) => (count > 0 ? [e] : []));
        if (ids.length > 0) requests.push({ layer, experts: ids });
      }
    }
    return requests;
  }

  it.each(["lru", "lfu", "prefetch"] as const)("does what a simulation of %s foretells", async (policy) => {
    for (const capacity of [0, 1, 4, 7, 11, 40]) {
      let read = 0;
      const given = await sample({ dtype: "BF16", layers, experts: 11, width: 16, hidden: 8 }, (source) => ({
        ...source,
        read(from, to) {
          read += to - from;
          return source.read(from, to);
        },
      }));
      read = 0;
      const store = storeOf(given, on, { capacity, policy });
      expect([store.capacity, store.expertBytes]).toEqual([capacity, 3 * 16 * 8 * 2]);
      expect(read).toBe(0);
      const requests = await run(given, store, 9);
      await store.close();
      const traced = Array.from({ length: layers }, () => ({ experts: 11, expertBytes: store.expertBytes }));
      const size = { memory: capacity * store.expertBytes };
      const { total } = simulateCache(traced, requests, { policy: policy satisfies CachePolicy, size });
      const { requests: asked, hits, prefetches, bytesRead } = total;
      expect(store.counts()).toEqual({ requests: asked, hits, prefetches, bytesRead });
      expect(read).toBe(bytesRead);
      if (capacity === 40) expect(hits).toBeGreaterThan(asked / 2);
    }
  });

  it("keeps no more than it may, and experts on their way beside", async () => {
    const inUse = new Set<string>();
    let [most, at] = [0, 0];
    const given = await sample({ layers, experts: 11, width: 16, hidden: 8 }, (source) => ({
      ...source,
      async read(from, to) {
        const key = `${at++}`;
        inUse.add(key);
        most = Math.max(most, inUse.size);
        const bytes = await source.read(from, to);
        await new Promise((resolve) => setImmediate(resolve));
        inUse.delete(key);
        return bytes;
      },
    }));
    const store = storeOf(given, on, { capacity: 3 });
    const stream = streamOf(store.experts(0, given.part));
    const { rows, ends } = rowsFor(on, 16, { counts: Array<number>(11).fill(1) });
    (await stream(rows, ends)).dispose();
    // Two experts of three matrices each are read at a time.
    expect(most).toBe(6);
    await store.close();
  });

  it("reads into the same buffers again and again", async () => {
    const given = await sample({ layers, experts: 11, width: 16, hidden: 8, dtype: "BF16" });
    const buffers = new Set<ArrayBufferLike>();
    const checkpoint = {
      ...given.checkpoint,
      readInto(target: Uint8Array, name: string, from: number) {
        buffers.add(target.buffer);
        return given.checkpoint.readInto?.(target, name, from) ?? Promise.reject(new Error("no readInto"));
      },
    };
    for (const policy of ["lru", "prefetch"] as const) {
      buffers.clear();
      const store = storeOf(given, on, { checkpoint, capacity: 4, policy });
      await run(given, store, 12);
      expect(store.counts().bytesRead / store.expertBytes).toBeGreaterThan(60);
      // Those kept, two that are read, and one that computes.
      expect(buffers.size).toBeLessThanOrEqual(4 + expertsOnTheWay);
      expect(buffers.size).toBeGreaterThanOrEqual(4);
      await store.close();
    }
  });

  it("serves passes that run at the same time", async () => {
    const given = await sample({ layers, experts: 11, width: 16, hidden: 8 });
    const store = storeOf(given, on, { capacity: 4, policy: "prefetch" });
    const residents = await Promise.all([0, 1, 2].map((layer) => given.resident(on, layer)));
    await Promise.all(
      Array.from({ length: 12 }, async (_, i) => {
        const layer = i % 3;
        const { rows, ends } = rowsFor(on, 16, { counts: Array.from({ length: 11 }, (_, e) => (e * i) % 4) });
        const streamed = await streamOf(store.experts(layer, given.part))(rows, ends);
        const resident = residents[layer] as Experts;
        const expected = on.scope(() => resident.apply(resident.params, rows, ends, layout).output);
        expect(await bits(streamed)).toEqual(await bits(expected));
      }),
    );
    await store.close();
  });

  it("does not believe that it holds what could not be read", async () => {
    let failing: (from: number) => boolean = () => false;
    const broken = (source: ByteSource): ByteSource => ({
      ...source,
      read: async (from, to) => {
        await new Promise((resolve) => setImmediate(resolve));
        if (failing(from)) throw new CheckpointError("the disk is on fire");
        return source.read(from, to);
      },
    });
    for (const policy of ["lru", "prefetch"] as const) {
      const given = await sample({ layers, experts: 11, width: 16, hidden: 8 }, broken);
      const live = on.live();
      const store = storeOf(given, on, { capacity: 4, policy });
      const resident = await given.resident(on, 0);
      const stream = streamOf(store.experts(0, given.part));
      const pass = async (counts: readonly number[]): Promise<void> => {
        const { rows, ends } = rowsFor(on, 16, { counts });
        try {
          const streamed = await stream(rows, ends);
          const expected = on.scope(() => resident.apply(resident.params, rows, ends, layout).output);
          expect(await bits(streamed)).toEqual(await bits(expected));
          dispose([streamed, expected]);
        } finally {
          dispose([rows, ends]);
        }
      };
      const first = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0];
      const all = Array<number>(11).fill(1);
      await pass(first);
      // Every place in the order of reads fails once.
      for (let nth = 0; nth < 24; nth += 5) {
        let count = 0;
        failing = () => count++ === nth;
        const failure = await pass(all).then(
          () => undefined,
          (error: unknown) => error,
        );
        expect(String(failure)).toContain("the disk is on fire");
        failing = () => false;
        await pass(all);
        await pass(first);
        const { hits } = store.counts();
        await pass(first);
        expect(store.counts().hits - hits).toBe(4);
      }
      dispose(resident.params);
      await store.close();
      expect(on.live()).toBe(live);
    }
  });

  it("survives what fails while it is loaded ahead", async () => {
    let broken = false;
    let failed = 0;
    const given = await sample({ layers, experts: 11, width: 16, hidden: 8 }, (source) => ({
      ...source,
      read: async (from, to) => {
        if (broken) {
          failed++;
          throw new CheckpointError("no");
        }
        return source.read(from, to);
      },
    }));
    const store = storeOf(given, on, { capacity: 4, policy: "prefetch" });
    const ask = async (layer: number, wanted: readonly number[]): Promise<void> => {
      const { rows, ends } = rowsFor(on, 16, {
        counts: Array.from({ length: 11 }, (_, e) => Number(wanted.includes(e))),
      });
      (await streamOf(store.experts(layer, given.part))(rows, ends)).dispose();
      dispose([rows, ends]);
    };
    // Layer 1 wants 5 and 6 after 0 and 1 of layer 0; layer 2 takes their places.
    for (let pass = 0; pass < 2; pass++) {
      await ask(0, [0, 1]);
      await ask(1, [5, 6]);
      await ask(2, [2, 3]);
    }
    await ask(0, [0, 1]);
    await ask(2, [2, 3]);
    const before = store.counts();
    broken = true;
    await ask(0, [0, 1]); // both are there: only what is expected next cannot be read
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(failed).toBe(6);
    expect(store.counts()).toMatchObject({ hits: before.hits + 2, prefetches: before.prefetches + 2 });
    broken = false;
    await ask(1, [5, 6]);
    expect(store.counts().hits).toBe(before.hits + 2);
    await ask(1, [5, 6]);
    expect(store.counts().hits).toBe(before.hits + 4);
    await store.close();
  });

  it("ends: what is under way is waited for, later passes are refused", async () => {
    let open = true;
    const given = await sample({ layers, experts: 11, width: 16, hidden: 8 }, (source) => ({
      ...source,
      async read(from, to) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        if (!open) throw new Error("read after the end");
        return source.read(from, to);
      },
    }));
    const live = on.live();
    const store = storeOf(given, on, { capacity: 4, policy: "prefetch" });
    const stream = streamOf(store.experts(0, given.part));
    const { rows, ends } = rowsFor(on, 16, { counts: Array<number>(11).fill(1) });
    const results = Promise.allSettled([stream(rows, ends), stream(rows, ends)]);
    await new Promise((resolve) => setTimeout(resolve, 2));
    await store.close();
    open = false;
    const [first, second] = await results;
    expect([first?.status, second?.status]).toEqual(["fulfilled", "rejected"]);
    expect(String(second?.status === "rejected" && second.reason)).toMatch(/was closed; load it again/);
    if (first?.status === "fulfilled") first.value.dispose();
    await expect(stream(rows, ends)).rejects.toThrow(/was closed/);
    dispose([rows, ends]);
    expect(on.live()).toBe(live);
    const experts = store.experts(0, given.part);
    expect(() => experts?.apply({}, rows, ends, layout)).toThrow(/run in step\(\) only/);
    expect(store.experts(3, given.part)).toBeUndefined();
  });

  it("refuses blocks that are none", async () => {
    const given = await sample({});
    const store = storeOf(given, on);
    const stream = streamOf(store.experts(0, given.part));
    const rows = on.tensor(noise(2 * 48), [2, 48]);
    await expect(stream(rows, on.tensor(Int32Array.of(1, 0, 1, 1, 1), [5]))).rejects.toThrow(/block 1 ends at row 0/);
    await expect(stream(rows, on.tensor(Int32Array.of(1, 2, 3, 3, 3), [5]))).rejects.toThrow(/block 2 ends at row 3/);
    await store.close();
  });
});
