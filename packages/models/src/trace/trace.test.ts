// The routing trace format: bytes laid out by hand, every way a file can be cut or damaged, writing, appending and reading
// while it grows, and what is recorded from real passes.
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError, engine, type Json, ShapeError, UnsupportedError } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import fc from "fast-check";
import { afterAll, describe, expect, it } from "vitest";
import { expertCache, lru } from "../expert-cache.ts";
import { fileSource } from "../files.ts";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { bytesSource } from "../safetensors.ts";
import { expertRequests, simulateCache } from "./cache-sim.ts";
import { checkHeader, crc32, encodeChunk, encodeHeader, type TraceChunk, type TraceHeader } from "./format.ts";
import { readTrace, type TraceEnd } from "./reader.ts";
import { type TraceRecorderOptions, traceRecorder } from "./recorder.ts";
import { chunkOf, headerOf } from "./trace.test-util.ts";
import { appendTrace, type TraceSink, traceFile, traceWriter } from "./writer.ts";

const folder = mkdtempSync(join(tmpdir(), "switchyard-trace-"));
afterAll(() => rmSync(folder, { recursive: true }));

const joined = (parts: readonly Uint8Array[]): Uint8Array => Uint8Array.from(parts.flatMap((part) => [...part]));
const fileOf = (header: TraceHeader, chunks: readonly TraceChunk[]): Uint8Array =>
  joined([encodeHeader(header), ...chunks.map((chunk) => encodeChunk(header, chunk))]);

async function readAll(bytes: Uint8Array): Promise<{ header: TraceHeader; chunks: TraceChunk[]; end: TraceEnd }> {
  const { header, chunks } = await readTrace(bytesSource("a.trace", bytes));
  const found: TraceChunk[] = [];
  const reading = chunks();
  for (;;) {
    const step = await reading.next();
    if (step.done) return { header, chunks: found, end: step.value };
    found.push(step.value);
  }
}

const types = [
  { experts: "i8", weights: null, logits: null },
  { experts: "i16", weights: "bf16", logits: "f32" },
  { experts: "i32", weights: "f32", logits: "bf16" },
] as const satisfies readonly TraceHeader["types"][];

describe("format", () => {
  it("lays a chunk out as documented", () => {
    const header = headerOf({
      layers: [{ index: 2, experts: 3, slots: 1, plan: "sparse" }],
      types: { experts: "i8", weights: "f32", logits: "bf16" },
    });
    const bytes = encodeChunk(header, {
      first: 5,
      tokens: 1,
      pass: Uint32Array.of(9),
      sequence: Uint32Array.of(4),
      position: Int32Array.of(-1),
      token: Int32Array.of(258),
      layers: [{ experts: Int32Array.of(-1), weights: Float32Array.of(1), logits: Float32Array.of(1, -2, 1.00390625) }],
    });
    const payload = [
      ...[9, 0, 0, 0, 0, 0, 0, 0],
      ...[4, 0, 0, 0, 0, 0, 0, 0],
      ...[255, 255, 255, 255, 0, 0, 0, 0],
      ...[2, 1, 0, 0, 0, 0, 0, 0],
      ...[255, 0, 0, 0, 0, 0, 0, 0],
      ...[0, 0, 0x80, 0x3f, 0, 0, 0, 0],
      ...[0x80, 0x3f, 0, 0xc0, 0x80, 0x3f, 0, 0], // the last value lies between two: the even one
    ];
    expect([...bytes.subarray(24)]).toEqual(payload);
    expect(new TextDecoder().decode(bytes.subarray(0, 4))).toBe("CHNK");
    const view = new DataView(bytes.buffer);
    const numbers = [view.getUint32(4, true), Number(view.getBigUint64(8, true)), view.getUint32(16, true)];
    expect(numbers).toEqual([1, 5, payload.length]);
    expect(view.getUint32(20, true)).toBe(crc32(bytes.subarray(24)));
    // The check value of CRC-32.
    expect(crc32(new TextEncoder().encode("123456789"))).toBe(0xcbf43926);
    const head = encodeHeader(header);
    expect(new TextDecoder().decode(head.subarray(0, 8))).toBe("MOETRACE");
    expect([head[8], head.length % 8]).toEqual([1, 0]);
    expect(JSON.parse(new TextDecoder().decode(head.subarray(16)))).toEqual(header);
  });

  it.each(types)("gives back what was written: %j", async (own) => {
    const header = headerOf({
      types: own,
      tokenizer: "0".repeat(64),
      labels: ["prose", "code"],
      sequences: [{ text: "Grüße", label: 1 }, {}],
      extra: { a: [1] },
      tool: "test",
    });
    const chunks = [chunkOf(header, 1), chunkOf(header, 7, 1), chunkOf(header, 2, 8)];
    const found = await readAll(fileOf(header, chunks));
    expect(found.header).toEqual(header);
    expect(found.chunks).toEqual(chunks);
    expect(found.end).toMatchObject({ tokens: 10, pass: 9, left: 0 });
  });

  it("cut anywhere, gives every whole chunk", async () => {
    const header = headerOf({ types: types[1] });
    const chunks = [chunkOf(header, 2), chunkOf(header, 1, 2)];
    const bytes = fileOf(header, chunks);
    const begin = encodeHeader(header).length;
    const second = begin + encodeChunk(header, chunks[0] as TraceChunk).length;
    for (let size = 0; size < bytes.length; size++) {
      const cut = bytes.slice(0, size);
      if (size < begin) {
        await expect(readAll(cut)).rejects.toThrow(CheckpointError);
        continue;
      }
      const { chunks: found, end } = await readAll(cut);
      const whole = size < second ? 0 : 1;
      expect(found).toEqual(chunks.slice(0, whole));
      expect(end.left).toBe(size - (whole ? second : begin));
    }
  });

  it("damaged anywhere, refuses or reads; it never breaks or allocates beyond the file", async () => {
    const header = headerOf({ types: types[2] });
    const bytes = fileOf(header, [chunkOf(header, 3), chunkOf(header, 2, 3)]);
    let refused = 0;
    await fc.assert(
      fc.asyncProperty(fc.nat(bytes.length - 1), fc.nat(255), fc.boolean(), async (at, value, drop) => {
        const mutant = drop ? joined([bytes.subarray(0, at), bytes.subarray(at + 1)]) : bytes.slice();
        if (!drop) mutant[at] = value;
        const source = bytesSource("m", mutant);
        const careful = {
          ...source,
          read(from: number, to: number) {
            expect(from >= 0 && from <= to && to <= mutant.length).toBe(true);
            return source.read(from, to);
          },
        };
        try {
          for await (const chunk of await readTrace(careful)) expect(chunk.tokens).toBeGreaterThan(0);
        } catch (error) {
          if (!CheckpointError.isInstance(error)) throw error;
          refused++;
        }
      }),
      { seed: 6, numRuns: 2000 },
    );
    expect(refused).toBeGreaterThan(1000);
  });

  it("names what is wrong in a chunk", async () => {
    const header = headerOf();
    const good = fileOf(header, [chunkOf(header, 2)]);
    const at = encodeHeader(header).length;
    const changed = (change: (view: DataView, bytes: Uint8Array) => void): Promise<unknown> => {
      const bytes = good.slice();
      change(new DataView(bytes.buffer, at), bytes);
      return readAll(bytes);
    };
    await expect(changed((view) => view.setUint8(0, 1))).rejects.toThrow(/chunk at byte \d+ does not begin with CHNK/);
    await expect(changed((view) => view.setUint32(4, 0, true))).rejects.toThrow(/has 0 tokens, expected 1 to/);
    await expect(changed((view) => view.setUint32(4, 2 ** 31, true))).rejects.toThrow(/has 2147483648 tokens/);
    await expect(changed((view) => view.setUint32(8, 3, true))).rejects.toThrow(
      /token 3, expected 0: chunks are missing/,
    );
    await expect(changed((view) => view.setUint32(16, 8, true))).rejects.toThrow(/says it has 8 bytes; 2 tokens take/);
    await expect(changed((view) => view.setUint8(24, 1))).rejects.toThrow(/is damaged: its checksum differs/);
    const resealed = (offset: number, value: number): Promise<unknown> =>
      changed((view, bytes) => {
        view.setUint8(24 + offset, value);
        view.setUint32(20, crc32(bytes.subarray(at + 24)), true);
      });
    await expect(resealed(0, 7)).rejects.toThrow(/is not valid: pass falls from 7 to 1/);
    await expect(resealed(32, 5)).rejects.toThrow(/layers\[0\] names expert 5, the layer has 5/);
    await expect(resealed(19, 0xf0)).rejects.toThrow(/position holds -\d+, expected -1 or more/);
    const twice = joined([good, encodeChunk(header, { ...chunkOf(header, 1, 2), pass: Uint32Array.of(0) })]);
    await expect(readAll(twice)).rejects.toThrow(/pass falls from 1 to 0/);
  });

  it.each([
    [{ format: "x" }, /"format" is "\\"x\\"", expected moe-routing-trace/],
    [{ version: 2 }, /"version" is "2"; this package reads version 1/],
    [{ surplus: 1 }, /unknown key "surplus"; put further fields into "extra"/],
    [{ model: {} }, /"model.name" is missing, expected a text/],
    [{ model: { name: "a", type: 1 } }, /"model.type" is "1"/],
    [{ layers: [] }, /"layers" has 0 entries, expected 1 to 4096/],
    [{ layers: [{ index: 0, experts: 0, slots: 1, plan: "sparse" }] }, /layers\[0\].experts is "0"/],
    [{ layers: [{ index: 0, experts: 2, slots: 1e9, plan: "sparse" }] }, /layers\[0\].slots is "1000000000"/],
    [{ layers: [{ index: 0, experts: 2, slots: 1, plan: "merge" }] }, /layers\[0\].plan is .* expected sparse, dense/],
    [{ layers: [{ index: 0, experts: 100, nulls: 29, slots: 1, plan: "sparse" }] }, /129 experts, more than .* "i8"/],
    [{ layers: [{ index: 0, name: 1, experts: 2, slots: 1, plan: "sparse" }] }, /layers\[0\].name/],
    [{ layers: [{ index: 0, experts: 2, slots: 1, plan: "sparse", expertBytes: -1 }] }, /layers\[0\].expertBytes/],
    [{ tokenizer: "abc" }, /"tokenizer" is .* expected a SHA-256/],
    [{ tokenizer: undefined }, /"tokenizer" is missing/],
    [{ labels: [1] }, /labels\[0\] is "1"/],
    [{ sequences: [{ label: 0 }] }, /sequences\[0\].label is "0"/],
    [{ types: { experts: "i64", weights: null, logits: null } }, /"types.experts" .* expected i8, i16, i32/],
    [{ types: { experts: "i8", weights: "f16", logits: null } }, /"types.weights" .* expected f32, bf16, null/],
    [{ extra: [] }, /"extra" is "\[\]", expected an object/],
  ] as [object, RegExp][])("refuses a header with %j", (more, message) => {
    const header = { ...headerOf(), ...more } as TraceHeader;
    expect(() => encodeHeader(header)).toThrow(message);
    expect(() => checkHeader(JSON.parse(JSON.stringify(header)) as Json, "b.trace")).toThrow(CheckpointError);
  });

  it("agrees with the JSON schema on what must and may be there", () => {
    interface Schema {
      readonly required?: readonly string[];
      readonly properties?: Readonly<Record<string, Schema>>;
      readonly items?: Schema;
    }
    const schema = JSON.parse(
      readFileSync(new URL("../../../../docs/routing-trace.schema.json", import.meta.url), "utf8"),
    ) as Schema;
    const layer = { index: 0, name: "a", experts: 2, nulls: 1, slots: 1, plan: "sparse", expertBytes: 3 };
    const full = {
      ...{ format: "moe-routing-trace", version: 1, model: { name: "a", type: "b" }, layers: [layer] },
      ...{ tokenizer: null, labels: ["x"], sequences: [{ text: "t", label: 0 }], tool: "t", extra: {} },
      types: { experts: "i8", weights: "f32", logits: "bf16" },
    };
    expect(checkHeader(full, "a")).toEqual(full);
    let checked = 0;
    /** Every object of the header, with a way to put another in its place. */
    const visit = (own: Schema, value: Json, put: (value: Json) => Json): void => {
      if (Array.isArray(value)) {
        visit(own.items ?? {}, value[0] as Json, (one) => put([one]));
        return;
      }
      if (!own.properties || typeof value !== "object" || value === null) return;
      const fields = value as { readonly [key: string]: Json };
      expect(Object.keys(fields).sort()).toEqual(Object.keys(own.properties).sort());
      for (const key of Object.keys(fields)) {
        const { [key]: _, ...rest } = fields;
        const check = () => checkHeader(put(rest), "a");
        if (own.required?.includes(key)) expect(check, key).toThrow(CheckpointError);
        else if (key !== "nulls") expect(check, key).not.toThrow();
        checked++;
        visit(own.properties[key] ?? {}, fields[key] as Json, (one) => put({ ...fields, [key]: one }));
      }
    };
    visit(schema, full, (value) => value);
    expect(checked).toBe(24);
  });

  it("refuses files that are something else", async () => {
    const wrong = async (change: (bytes: Uint8Array, view: DataView) => void): Promise<unknown> => {
      const bytes = encodeHeader(headerOf());
      change(bytes, new DataView(bytes.buffer));
      return readTrace(bytesSource("a.trace", bytes));
    };
    await expect(wrong((bytes) => bytes.fill(1))).rejects.toThrow(/does not begin with MOETRACE/);
    await expect(wrong((_, view) => view.setUint32(8, 2, true))).rejects.toThrow(/version 2; this package reads/);
    await expect(wrong((_, view) => view.setUint32(12, 7, true))).rejects.toThrow(/7 bytes long, expected a multiple/);
    await expect(wrong((_, view) => view.setUint32(12, 2 ** 31, true))).rejects.toThrow(/2147483648 bytes long/);
    await expect(wrong((_, view) => view.setUint32(12, 8000, true))).rejects.toThrow(/8000 bytes long, but the file/);
    await expect(wrong((bytes) => bytes.fill(0xff, 16))).rejects.toThrow(/the header is not valid JSON/);
    await expect(wrong((bytes) => bytes.set([0x5b], 16))).rejects.toThrow(CheckpointError);
    await expect(readTrace(bytesSource("a.trace", new Uint8Array(3)))).rejects.toThrow(/3 bytes are too few/);
  });
});

describe("writing", () => {
  const header = headerOf({ types: types[1] });
  const content = (tokens: number, first: number) => chunkOf(header, tokens, first);

  it("makes one write per chunk, in order, and waits for the sink", async () => {
    const open: (() => void)[] = [];
    const written: Uint8Array[] = [];
    let closed = 0;
    const sink: TraceSink = {
      async write(bytes) {
        if (written.push(bytes) > 1) await new Promise<void>((resolve) => open.push(resolve));
      },
      async close() {
        closed++;
      },
    };
    const writer = await traceWriter(sink, header);
    const first = writer.write(content(2, 0));
    let done = false;
    const second = writer.write(content(1, 2)).then(() => {
      done = true;
    });
    await new Promise((resolve) => setImmediate(resolve));
    expect([written.length, done]).toEqual([2, false]);
    open[0]?.();
    await first;
    await new Promise((resolve) => setImmediate(resolve));
    expect([written.length, done]).toEqual([3, false]);
    open[1]?.();
    await second;
    await writer.close();
    expect([closed, writer.tokens, writer.pass]).toEqual([1, 3, 2]);
    expect((await readAll(joined(written))).chunks).toEqual([content(2, 0), content(1, 2)]);
    await expect(writer.write({ ...content(1, 3), pass: Uint32Array.of(1) })).rejects.toThrow(/pass falls from 2 to 1/);
    await expect(writer.write({ ...content(1, 3), tokens: 2 })).rejects.toThrow(/pass has 1 entries for 2 tokens/);
    const few = content(1, 3);
    await expect(writer.write({ ...few, layers: few.layers.slice(1) })).rejects.toThrow(/1 layers, the header has 2/);
    await expect(writer.write({ ...few, layers: few.layers.map(({ experts }) => ({ experts })) })).rejects.toThrow(
      ShapeError,
    );
  });

  it("fails for good once a write has failed", async () => {
    let count = 0;
    const sink: TraceSink = {
      async write() {
        if (++count === 2) throw new Error("disk full");
      },
    };
    const writer = await traceWriter(sink, header);
    await expect(writer.write(content(1, 0))).rejects.toThrow("disk full");
    await expect(writer.write(content(1, 1))).rejects.toThrow("disk full");
    await expect(writer.close()).rejects.toThrow("disk full");
    expect(count).toBe(2);
  });

  it("is read while it grows, and continued after a cut", async () => {
    const path = join(folder, "grow.trace");
    const sink = await traceFile(path);
    const writer = await traceWriter(sink, header);
    await writer.write(content(2, 0));
    const read = async (from?: TraceEnd): Promise<{ chunks: TraceChunk[]; end: TraceEnd }> => {
      const source = await fileSource(path);
      if (!source) throw new Error("no file");
      try {
        const trace = await readTrace(source);
        const chunks: TraceChunk[] = [];
        const reading = trace.chunks(from);
        for (;;) {
          const step = await reading.next();
          if (step.done) return { chunks, end: step.value };
          chunks.push(step.value);
        }
      } finally {
        await source.close();
      }
    };
    const early = await read();
    expect(early.chunks).toEqual([content(2, 0)]);
    await writer.write(content(3, 2));
    expect((await read(early.end)).chunks).toEqual([content(3, 2)]);
    await writer.close();
    truncateSync(path, readFileSync(path).length - 5);
    const again = await appendTrace(path);
    expect([again.tokens, again.pass, again.header]).toEqual([2, 1, header]);
    await again.write(content(1, 2));
    await again.close();
    expect((await read()).chunks).toEqual([content(2, 0), content(1, 2)]);
    expect((await read()).end.left).toBe(0);
    await expect(traceFile(path)).rejects.toThrow(CheckpointError);
    await expect(appendTrace(join(folder, "none.trace"))).rejects.toThrow(/there is no such file/);
    const damaged = join(folder, "damaged.trace");
    const bytes = readFileSync(path);
    bytes[bytes.length - 1] = 1;
    writeFileSync(damaged, bytes);
    await expect(appendTrace(damaged)).rejects.toThrow(/is damaged/);
    expect(readFileSync(damaged)).toEqual(bytes);
  });
});

describe("recording", () => {
  const memory = (): TraceSink & { bytes(): Uint8Array; closed: number } => {
    const parts: Uint8Array[] = [];
    return {
      closed: 0,
      async write(bytes) {
        parts.push(bytes);
      },
      async close() {
        this.closed++;
      },
      bytes: () => joined(parts),
    };
  };
  const options: TraceRecorderOptions = { model: { name: "small" }, experts: 5 };

  it("holds what the model decided, in batches with padding and with a cache", async () => {
    const on = makeEngine();
    const model = loudModel(on, smallConfig);
    const prompts = [
      [0, 0, 1, 2],
      [3, 4, 5, 6],
    ];
    const mask = [
      [0, 0, 1, 1],
      [1, 1, 1, 1],
    ];
    const tensor = (rows: readonly number[][]) => on.tensor(Int32Array.from(rows.flat()), [2, rows[0]?.length ?? 0]);
    const masks = (extra: number) => {
      const rows = mask.map((row) => [...row, ...Array<number>(extra).fill(1)]);
      return { rows, tensor: on.tensor(Float32Array.from(rows.flat()), [2, 4 + extra]) };
    };
    const sink = memory();
    const recorder = traceRecorder(sink, { ...options, chunkTokens: 3, expertBytes: 99, tool: "test" });
    const cache = model.newCache(2);
    const plans: number[][][] = [];
    const run = async (ids: number[][], past: number): Promise<void> => {
      const { rows, tensor: seen } = masks(past === 0 ? 0 : past - 3);
      const pass = recorder.pass({ ids, past, mask: rows, sequences: [7, 8] });
      const reads: Promise<number[]>[] = [];
      const y = await model.step(tensor(ids), {
        cache,
        mask: seen,
        trace: {
          record(layer, routed) {
            pass.record(layer, routed);
            if (routed.plan.kind === "sparse") reads.push(routed.plan.experts.data().then((x) => Array.from(x)));
          },
        },
      });
      y.dispose();
      await pass.done();
      plans.push(await Promise.all(reads));
    };
    await run(prompts, 0);
    await run([[7], [8]], 4);
    await recorder.close();
    expect(sink.closed).toBe(1);
    const { header, chunks } = await readAll(sink.bytes());
    expect(chunks.map(({ tokens }) => tokens)).toEqual([3, 3, 2, 2]);
    const layer = { experts: 5, slots: 2, plan: "sparse", expertBytes: 99 };
    expect(header.layers).toEqual([
      { index: 0, ...layer },
      { index: 1, ...layer },
    ]);
    const all = <T extends ArrayLike<number>>(pick: (chunk: TraceChunk) => T): number[] =>
      chunks.flatMap((chunk) => Array.from(pick(chunk)));
    expect(all(({ pass }) => pass)).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    expect(all(({ sequence }) => sequence)).toEqual([7, 7, 7, 7, 8, 8, 8, 8, 7, 8]);
    expect(all(({ position }) => position)).toEqual([-1, -1, 0, 1, 0, 1, 2, 3, 2, 4]);
    expect(all(({ token }) => token)).toEqual([...prompts.flat(), 7, 8]);
    for (const i of [0, 1]) {
      expect(all(({ layers }) => layers[i]?.experts ?? [])).toEqual([
        ...(plans[0]?.[i] ?? []),
        ...(plans[1]?.[i] ?? []),
      ]);
      const weights = all(({ layers }) => layers[i]?.weights ?? []);
      // The layer gives no expert to padding.
      for (let t = 0; t < 10; t++) {
        expect((weights[2 * t] ?? 0) + (weights[2 * t + 1] ?? 0)).toBeCloseTo(t < 2 ? 0 : 1, 6);
      }
    }
  });

  it("foretells the hits of a run that decides with the same cache", async () => {
    const on = makeEngine();
    const model = loudModel(on, smallConfig);
    const sink = memory();
    const recorder = traceRecorder(sink, { ...options, chunkTokens: 2 });
    const cache = model.newCache(1);
    const real = [0, 1].map(() => expertCache({ capacity: 2, policy: lru() }));
    const hits = [0, 0];
    for (const [past, ids] of [[1, 2, 3], [4], [5], [4], [6], [1]].map((ids, i) => [i ? i + 2 : 0, ids] as const)) {
      const pass = recorder.pass({ ids: [ids], past });
      const needed: [number, Promise<ArrayLike<number>>][] = [];
      const record: typeof pass.record = (layer, routed) => {
        pass.record(layer, routed);
        if (routed.plan.kind === "sparse") needed.push([layer, routed.plan.experts.data()]);
      };
      (await model.step(on.tensor(Int32Array.from(ids), [1, ids.length]), { cache, trace: { record } })).dispose();
      await pass.done();
      for (const [layer, reading] of needed) {
        hits[layer] = (hits[layer] ?? 0) + (real[layer]?.need(Array.from(await reading)).hits.length ?? 0);
      }
    }
    await recorder.close();
    const { header, chunks } = await readAll(sink.bytes());
    const requests = await expertRequests(header, chunks);
    const { layers } = simulateCache(header.layers, requests, { policy: "lru", size: { expertsPerLayer: 2 } });
    expect(layers.map((one) => one.hits)).toEqual(hits);
    expect(hits.reduce((a, b) => a + b)).toBeGreaterThan(0);
  });

  it("takes dense, expert-choice and several plans, null experts and logits", async () => {
    const on = engine(cpu());
    const sink = memory();
    const recorder = traceRecorder(sink, { ...options, experts: 3, nulls: 1, slots: 4, logits: "f32" });
    const f = (values: number[], shape: number[]) => on.tensor(Float32Array.from(values), shape);
    const i = (values: number[], shape: number[]) => on.tensor(Int32Array.from(values), shape);
    const logits = f([1, 2, 3, 4, 5, 6, 7, 8], [2, 4]);
    const pass = recorder.pass({ ids: [[11, 12]] });
    pass.record(0, {
      plan: { kind: "sparse", experts: i([3, -1, 0, 1], [2, 2]), weights: f([1, 9, 0.5, 0.25], [2, 2]) },
      more: [{ plan: { kind: "sparse", experts: i([2, 1], [2, 1]), weights: f([0.5, 2], [2, 1]) } }],
      logits,
      losses: {},
    });
    pass.record(1, { plan: { kind: "dense", weights: f([0, 1, 0, 2, 0, 3, 0, 0], [2, 4]) }, logits, losses: {} });
    const chosen = { kind: "expert-choice", tokens: i([1, -1, 0, 1, -1, -1], [3, 2]) } as const;
    pass.record(2, { plan: { ...chosen, weights: f([4, 0, 5, 6, 0, 0], [3, 2]) }, logits, losses: {} });
    await pass.done();
    await recorder.close();
    const { header, chunks } = await readAll(sink.bytes());
    expect(header.layers.map(({ plan, nulls }) => [plan, nulls])).toEqual([
      ["sparse", 1],
      ["dense", 1],
      ["sparse", 1],
    ]);
    const found = chunks[0]?.layers.map(({ experts, weights }) => [[...experts], [...(weights ?? [])]]);
    expect(found).toEqual([
      [
        [3, -1, 2, -1, 0, 1, 1, -1],
        [1, 0, 0.5, 0, 0.5, 0.25, 2, 0],
      ],
      [
        [-1, 1, -1, 3, -1, 1, -1, -1],
        [0, 1, 0, 2, 0, 3, 0, 0],
      ],
      [
        [-1, 1, -1, -1, 0, 1, -1, -1],
        [0, 5, 0, 0, 4, 6, 0, 0],
      ],
    ]);
    expect([...(chunks[0]?.layers[1]?.logits ?? [])]).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
  });

  it("refuses what cannot be recorded", async () => {
    const on = engine(cpu());
    const zeros = (...shape: number[]) => on.tensor(new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
    const sparse = (...shape: number[]) =>
      ({
        kind: "sparse",
        experts: on.tensor(new Int32Array(zeros(...shape).size), shape),
        weights: zeros(...shape),
      }) as const;
    const one = async (
      plan: Parameters<ReturnType<ReturnType<typeof traceRecorder>["pass"]>["record"]>[1]["plan"],
      more: Partial<TraceRecorderOptions> = {},
    ): Promise<void> => {
      const pass = traceRecorder(memory(), { ...options, ...more }).pass({ ids: [[1, 2]] });
      pass.record(0, { plan, losses: {} });
      await pass.done();
    };
    await expect(one({ kind: "slots", dispatch: zeros(1, 2, 5), combine: zeros(1, 2, 5) })).rejects.toThrow(
      /a plan of kind "slots" does not/,
    );
    await expect(one(sparse(2, 1), { logits: "f32" })).rejects.toThrow(UnsupportedError);
    await expect(one(sparse(3, 1))).rejects.toThrow(/routed other tokens than the 2 of the pass/);
    await expect(one(sparse(2, 2), { slots: 1 })).rejects.toThrow(
      /with 2 experts per token, the trace .* 1; set slots/,
    );
    await expect(one({ ...sparse(2, 1), experts: on.tensor(Int32Array.of(5, 0), [2, 1]) })).rejects.toThrow(
      /layer 0 chose expert 5, but the trace has 5/,
    );
    const recorder = traceRecorder(memory(), options);
    await expect(recorder.pass({ ids: [[1]] }).done()).rejects.toThrow(/no layer was recorded/);
    expect(() => recorder.pass({ ids: [[1], [1, 2]] })).toThrow(ShapeError);
    expect(() => recorder.pass({ ids: [[1]], mask: [[1, 1]] })).toThrow(/a mask of 2 entries, expected 1 and 1/);
    expect(() => traceRecorder(memory(), { ...options, chunkTokens: 0 })).toThrow(/chunkTokens is 0/);
    await recorder.close();
  });
});
