// The suite runs end to end: on the WebAssembly backend with a peer and a copy that are made up, and on the device there is.
import { contender, moeLayer, moeLayerGradients, type Table } from "@switchyard/bench/kernels";
import { type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { wasm } from "@switchyard/kernels/wasm";
import { webgpu } from "@switchyard/kernels/webgpu";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Copy, copyKernel, copyPattern } from "./copy.ts";
import { findTestDevice } from "./device.test-util.ts";
import type { Found } from "./device.ts";
import type { Peer } from "./peers/peer.ts";
import { queueOf } from "./queue.ts";
import { type Context, cases, quick, type Sizes, sizes } from "./suite.ts";

const tiny: Sizes = {
  layers: { A: { experts: 4, width: 16, hidden: 8, k: 2 }, B: { experts: 8, width: 16, hidden: 4, k: 4 } },
  tokens: [1, 5],
  groupedTokens: 6,
  decode: { bytes: 2 ** 13, inner: 256 },
};
const measuring = { repetitions: 2, minimumSeconds: 0, pauseSeconds: 0 };

/** The same layers on the reference backend. */
const reference: Peer = {
  name: "gpu.js",
  version: "1",
  layer: async (one) => contender("gpu.js", moeLayer.setup(engine(cpu()), one)),
  gradients: async (one) => contender("gpu.js", moeLayerGradients.setup(engine(cpu()), one)),
};
/** Without gradients, and with a wrong layer. */
const wrong: Peer = {
  name: "tfjs-webgpu",
  version: "1",
  async layer(one) {
    const layer = contender("tfjs-webgpu", moeLayer.setup(engine(cpu()), { ...one, layer: "wrong" }));
    return { ...layer, output: async () => new Float32Array(one.tokens * one.width) };
  },
};
const hostCopy = async (bytes: number): Promise<Copy> => {
  const [from, to] = [new Uint8Array(bytes), new Uint8Array(bytes)];
  return { name: "copy kernel", bytes: 2 * bytes, run: () => to.set(from) };
};
const contextOn = (on: Engine, judged: boolean): Context => ({
  engine: on,
  queue: { flush: () => undefined },
  peers: [reference, wrong],
  sizes: tiny,
  measuring,
  judged,
  copy: hostCopy,
});

async function tablesOf(name: string, context: Context): Promise<Table[]> {
  const tables: Table[] = [];
  for await (const table of cases[name]?.(context) ?? []) tables.push(table);
  return tables;
}

describe("on the WebAssembly backend", () => {
  let on: Engine;
  let end = (): void => undefined;
  beforeAll(async () => {
    const backend = await wasm({ threads: 1 });
    on = engine(backend);
    end = () => backend.dispose();
  });
  afterAll(() => end());

  it.each(["moe-a", "moe-b"])("%s: forward and backward at every number of tokens, beside the peers", async (name) => {
    const tables = await tablesOf(name, contextOn(on, true));
    expect(tables.map(({ title }) => title.replace(/^.*SwiGLU, /, ""))).toEqual([
      "1 token, f32, forward",
      "1 token, f32, forward and backward",
      "5 tokens, f32, forward",
      "5 tokens, f32, forward and backward",
    ]);
    for (const [i, { entries, figures, amounts, unit }] of tables.entries()) {
      const backward = i % 2 === 1;
      expect(entries.map((entry) => entry.name)).toEqual([
        "switchyard",
        "gpu.js",
        ...(backward ? [] : ["tfjs-webgpu"]),
      ]);
      if (!backward) expect(entries[2]?.failed).toBe("its result differs, relative error 1.0e+0");
      expect(entries[1]?.error).toBeLessThan(1e-5);
      expect(figures).toMatchObject([{ label: "switchyard : gpu.js", goal: { least: 10 } }]);
      expect(unit).toBe("GFLOP/s");
      const { width, hidden, k } = tiny.layers[name === "moe-a" ? "A" : "B"];
      const flops = 2 * 3 * width * hidden * k * (i < 2 ? 1 : 5) * (backward ? 3 : 1);
      expect(amounts.switchyard).toBeCloseTo(flops * 1e-9, 15);
    }
    expect(on.live()).toBe(0);
  });

  it("grouped: both products of both layers, balanced and skewed, against dense", async () => {
    const tables = await tablesOf("grouped", contextOn(on, true));
    expect(tables.map(({ title }) => title)).toEqual([
      "gate and up of layer A: 12 rows over 4 experts, 16 to 16, f32, against one dense product",
      "down of layer A: 12 rows over 4 experts, 8 to 16, f32, against one dense product",
      "gate and up of layer B: 24 rows over 8 experts, 16 to 8, f32, against one dense product",
      "down of layer B: 24 rows over 8 experts, 4 to 16, f32, against one dense product",
    ]);
    for (const { figures, entries, amounts } of tables) {
      expect(entries.map(({ name }) => name)).toEqual(["dense", "grouped, balanced", "grouped, skewed"]);
      expect(new Set(Object.values(amounts)).size).toBe(1);
      expect(figures).toMatchObject([
        { label: "grouped, balanced : dense", goal: { least: 0.6 } },
        { label: "grouped, skewed : dense", goal: { least: 0.6 } },
      ]);
    }
    expect(on.live()).toBe(0);
  });

  it("decode: every storage type and both layers beside the copy", async () => {
    const [products, a, b] = await tablesOf("decode", contextOn(on, true));
    const formats = ["f32", "f16", "bf16", "int8", "int4", "mxfp4"];
    expect(products?.entries.map(({ name }) => name)).toEqual(["copy kernel", ...formats.map((f) => `${f} weights`)]);
    for (const figure of products?.figures ?? []) expect(figure.goal).toEqual({ least: 0.7 });
    // The same bytes in every type; the copy reads and writes as many.
    for (const name of formats)
      expect((products?.amounts[`${name} weights`] ?? 0) / (products?.amounts["copy kernel"] ?? 0)).toBeCloseTo(0.5, 1);
    for (const [i, table] of [a, b].entries()) {
      const { experts, width, hidden, k } = tiny.layers[i === 0 ? "A" : "B"];
      expect(table?.amounts[`layer ${"AB"[i]}`]).toBeCloseTo(4 * experts * 3 * width * hidden * 1e-9, 15);
      expect(table?.title).toContain(`${experts / k} tokens one after another`);
      expect(table?.figures).toHaveLength(1);
      expect(table?.figures[0]?.goal).toBeUndefined();
    }
    expect(on.live()).toBe(0);
  });

  it("judges nothing on a driver that computes on the processor", async () => {
    for (const name of Object.keys(cases))
      for (const { figures } of await tablesOf(name, contextOn(on, false)))
        for (const { goal } of figures) expect(goal).toBeUndefined();
  });

  it("refuses to time one-token products that are wrong", async () => {
    // An engine that loses the row of x.
    const broken: Engine = {
      ...on,
      tensor: (data, shape, dtype) => on.tensor(data.length === 256 ? new Float32Array(256) : data, shape, dtype),
    };
    await expect(tablesOf("decode", contextOn(broken, true))).rejects.toThrow(
      /one-token product with f32 weights is wrong, relative error/,
    );
    expect(on.live()).toBe(0);
  });
});

it("has the sizes it says", () => {
  expect(sizes.full.layers.A).toEqual({ experts: 8, width: 1024, hidden: 2048, k: 2 });
  expect(sizes.full.layers.B).toEqual({ experts: 64, width: 1024, hidden: 512, k: 8 });
  expect(quick(sizes.full).tokens).toEqual([1, 16]);
  expect(quick(sizes.full).decode).toEqual(sizes.full.decode);
  for (const { decode } of Object.values(sizes)) expect(decode.inner % 128).toBe(0);
});

describe("on the device", () => {
  let found: Found | undefined;
  beforeAll(async () => {
    found = await findTestDevice();
  });

  it("runs, and times by the device's own clock where it has one", async ({ skip }) => {
    if (!found) return skip("no WebGPU device");
    const { device } = found;
    const backend = await webgpu({ device });
    const queue = queueOf(device, () => backend.flush());
    const on = engine(backend);
    const context: Context = {
      ...contextOn(on, false),
      queue,
      copy: (bytes) => copyKernel(device, bytes, queue),
      sizes: { ...tiny, tokens: [5] },
    };
    for (const name of ["moe-a", "decode"]) {
      const tables = await tablesOf(name, context);
      expect(tables.length).toBeGreaterThan(1);
      for (const { entries, figures } of tables) {
        for (const { name: who, timing } of entries.filter(({ failed }) => failed === undefined)) {
          expect(timing?.wall.median, who).toBeGreaterThan(0);
          const own = who === "switchyard" || who === "copy kernel" || who.endsWith("weights");
          if (own && device.features.has("timestamp-query")) {
            expect(timing?.device?.median, who).toBeGreaterThan(0);
            expect(timing?.device?.median, who).toBeLessThan(2 * (timing?.wall.max ?? 0));
          }
        }
        for (const { value } of figures) expect(value.median).toBeGreaterThan(0);
      }
    }
    expect(on.live()).toBe(0);
    backend.dispose();
  });

  it("the copy kernel copies all of it, in whole accesses", async ({ skip }) => {
    if (!found) return skip("no WebGPU device");
    const copy = await copyKernel(found.device, 50_007, { flush: () => undefined });
    expect(copy.bytes).toBe(2 * 50_000);
    const words = (await copy.output?.()) as Uint32Array;
    expect(words).toEqual(copyPattern().subarray(0, 12_500));
    await copy.many?.(9);
    await copy.dispose?.();
  });

  it("the device's clock runs as ours does", async ({ skip }) => {
    if (!found) return skip("no WebGPU device");
    const { device } = found;
    const { stopwatch } = queueOf(device, () => undefined);
    if (!stopwatch) return skip("the device has no timestamp-query");
    const watch = stopwatch();
    await device.queue.onSubmittedWorkDone();
    const start = performance.now();
    await new Promise((done) => setTimeout(done, 150));
    const waited = (performance.now() - start) / 1000;
    watch.stop();
    const seconds = await watch.seconds();
    expect(seconds).toBeGreaterThan(0.9 * waited);
    expect(seconds).toBeLessThan(waited + 10);
  });
});
