// Threads: the same bits whatever their number, clear refusals, an end.
import type { Spec, TypedArray } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { assemble, create, type WasmBackend, wasm } from "./backend.ts";
import { call, f32, i32, integers, ints, uniform } from "./call.test-util.ts";
import { createDevice } from "./device.ts";
import { createHeap } from "./heap.ts";
import { SCRATCH } from "./kernels/matmul.ts";
import { compile } from "./loader.ts";
import { createPool, HEAP_START } from "./pool.ts";

/** Kernels whose work is cut into many pieces. */
function everything(backend: WasmBackend): TypedArray[] {
  const results: TypedArray[] = [];
  const run = (name: string, inputs: Parameters<typeof call>[2], specs: readonly Spec[], attrs: object = {}): void => {
    results.push(...call(backend, name, inputs, specs, attrs));
  };
  const [x, w, dy] = [uniform(1, 301, 65), uniform(2, 200, 65), uniform(3, 301, 200)];
  run("linear", [x, w], [f32(301, 200)]);
  run("matmul", [dy, w], [f32(301, 65)]);
  run("matmul", [dy, x], [f32(200, 65)], { transposeA: true });
  run("sumTo", [uniform(4, 70_001)], [f32()], { shape: [] });
  run("sumTo", [x], [f32(65)], { shape: [65] });
  run("rmsNormGrad", [x, uniform(5, 65), x], [f32(301, 65), f32(65)], { eps: 1e-5 });
  run("layerNormGrad", [x, uniform(5, 65), x], [f32(301, 65), f32(65), f32(65)], { eps: 1e-5 });
  run("addRows", [x, integers(6, -1, 20, 301)], [f32(21, 65)], { rows: 21 });
  const ids = integers(7, 0, 3, 301, 2);
  const weights = uniform(8, 301, 2);
  run("moeExperts", [x, uniform(9, 4, 60, 65), uniform(10, 4, 65, 30), ids, weights], [f32(301, 65)]);
  const [rows, slots, ends] = call(backend, "dispatch", [ids], [i32(602), i32(602), i32(4)], { count: 4, bound: 602 });
  const out = uniform(11, 602, 9);
  run("combineRows", [out, weights, ints(slots ?? [], 602)], [f32(301, 9)]);
  run("combineRowsGrad", [out, weights, ints(slots ?? [], 602), uniform(12, 301, 9)], [f32(602, 9), f32(301, 2)]);
  run("groupedOuter", [out, uniform(13, 602, 50), ints(ends ?? [], 4)], [f32(4, 9, 50)]);
  run("takeRows", [x, ints(rows ?? [], 602)], [f32(602, 65)]);
  const q = uniform(14, 2, 70, 4, 8);
  const kv = uniform(15, 2, 70, 2, 8);
  const attrs = { causal: true, scale: 0.5 };
  const [o, lse] = call(backend, "attention", [q, kv, kv], [q, f32(2, 4, 70)], attrs);
  const forward = [o, lse].map((data, i) => ({ ...(i ? f32(2, 4, 70) : q), data: data ?? new Float32Array() }));
  run("attentionGrad", [q, kv, kv, ...forward, q], [q, kv, kv], { ...attrs, mask: false });
  return results;
}

describe("threads", () => {
  it("do not change a single bit", async () => {
    for (const variant of ["relaxed", "plain"] as const) {
      const alone = await wasm({ threads: 1, variant });
      const expected = everything(alone);
      alone.dispose();
      for (const threads of [2, 5]) {
        const many = await create({ threads, variant }, 0);
        expect(many.threads).toBe(threads);
        for (let again = 0; again < 3; again++) expect(everything(many)).toEqual(expected);
        many.dispose();
      }
    }
  });

  it("wake up after having slept", async () => {
    const backend = await create({ threads: 2 }, 0);
    const [a, b] = [uniform(1, 64, 64), uniform(2, 64, 64)];
    const first = call(backend, "matmul", [a, b], [f32(64, 64)]);
    const until = performance.now() + 20;
    while (performance.now() < until);
    expect(call(backend, "matmul", [a, b], [f32(64, 64)])).toEqual(first);
    backend.dispose();
  });

  it("report a kernel that fails in any of them, and go on", async () => {
    const memory = new WebAssembly.Memory({ initial: 64, maximum: 64, shared: true });
    const heap = createHeap(memory, HEAP_START, 64 * 65_536);
    const scratch = [0, 1, 2].map(() => heap.alloc(SCRATCH, () => "scratch").ptr);
    const pool = await createPool({ module: await compile("plain", true), memory, scratch, shareFrom: 0 });
    const device = createDevice(heap, pool);
    const outside = memory.buffer.byteLength;
    // 4096 units: each thread gets some of them.
    expect(() => device.launch("exp", [outside, outside, 0, 0, 0], 4096, 1)).toThrow(/out of bounds|failed in thread/);
    const [x, y] = [heap.alloc(4_000, () => "x"), heap.alloc(4_000, () => "y")];
    heap.f32().fill(0, x.ptr / 4, x.ptr / 4 + 1_000);
    device.launch("exp", [x.ptr, y.ptr, 0, 0, 0], 60, 1);
    expect(heap.f32().subarray(y.ptr / 4, y.ptr / 4 + 960)).toEqual(new Float32Array(960).fill(1));
    pool.dispose();
  });

  it.each([0, -1, 1.5, Number.NaN, 65])("refuses %d of them", async (threads) => {
    await expect(wasm({ threads })).rejects.toThrow(
      `wasm: threads must be a whole number from 1 to 64, not ${threads}`,
    );
  });

  it("are gone after dispose, and say so", async () => {
    const backend = await wasm({ threads: 2 });
    expect(backend.note).toBe("");
    const x = uniform(1, 4);
    const handle = backend.upload(x.data, x);
    backend.dispose();
    expect(() => backend.kernels.exp([{ ...x, handle }], [x], {})).toThrow("was disposed of");
    expect(() => backend.upload(x.data, x)).toThrow("was disposed of");
    expect(() => backend.downloadSync({ ...x, handle })).toThrow("was disposed of");
    backend.free(handle);
  });
});

describe("memory", () => {
  it.each([0, Number.NaN, 1e6])("refuses %d bytes", async (memory) => {
    await expect(wasm({ memory })).rejects.toThrow(`wasm: memory must be at least 32 MB, not ${memory} bytes`);
  });

  it("works above two gigabytes, where addresses no longer fit a signed word", async () => {
    // The gap is never touched, so the system never provides it.
    const memory = new WebAssembly.Memory({ initial: 64, maximum: 65_536 });
    const heap = createHeap(memory, HEAP_START, 65_536 * 65_536);
    const scratch = heap.alloc(SCRATCH, () => "scratch").ptr;
    heap.alloc(2 ** 31, () => "the gap");
    const pool = await createPool({ module: await compile("plain", false), memory, scratch: [scratch], shareFrom: 0 });
    const device = createDevice(heap, pool);
    const high = assemble(heap, pool, "plain", "");
    const low = await wasm({ threads: 1, variant: "plain" });
    expect(device.temporary(4).ptr).toBeGreaterThan(2 ** 31);
    expect(everything(high)).toEqual(everything(low));
    low.dispose();
    high.dispose();
  });

  it("ends with an error that names the tensor, and the backend goes on", async () => {
    const backend = await wasm({ threads: 1, memory: 40e6 });
    const x = uniform(1, 1_000, 1_000);
    const handle = backend.upload(x.data, x);
    const operand = { ...x, handle };
    const wide = (): unknown =>
      backend.kernels.concat(
        Array.from({ length: 12 }, () => operand),
        [f32(12_000, 1_000)],
        { axis: 0 },
      );
    expect(wide).toThrow(
      /out of memory: the result \[12000, 1000\] f32 of concat needs 48\.00 MB; 4\.\d+ MB are in use/,
    );
    expect(() => backend.upload(new Float32Array(10e6), f32(10e6))).toThrow("a tensor [10000000] f32 needs 40.00 MB");
    const used = backend.memory().used;
    const [y] = backend.kernels.add([operand, operand], [x], {});
    if (!y) throw new Error("no result");
    expect(backend.downloadSync({ ...x, handle: y })[7]).toBe(2 * Number(x.data[7]));
    backend.free(y);
    expect(backend.memory().used).toBe(used);
    backend.dispose();
  });
});
