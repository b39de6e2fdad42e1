// The shared suite in mode "webgpu", in Node on Dawn, where the machine has a driver; then what only a device shows.
import { add, affine, DeviceError, engine, softmax, type Tensor } from "@switchyard/core";
import { testBackend } from "@switchyard/testing";
import * as gpujsPackage from "gpu.js";
import { afterAll, describe, expect, it, vi } from "vitest";
import { member } from "../../src/gpujs/gpu.ts";
import { gpujs } from "../../src/gpujs/index.ts";
import { findGpu } from "../gpu.ts";
import { checkLargeIntegers, checkLongLoops } from "./long-loops.ts";
import { wrapped } from "./wrap.ts";

const { GPU } = gpujsPackage;
const gpu = await findGpu();
// gpu.js looks for WebGPU here alone.
if (gpu) Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });

/** The device that all instances of gpu.js share; its types leave it out. */
const context = member(gpujsPackage, "WebGPUContext") as {
  acquire(): Promise<{ device: GPUDevice }>;
  destroy(): Promise<void>;
};
const mode = "webgpu";
const ones = Float32Array.of(1, 2, 3);

if (gpu) testBackend({ name: "gpujs webgpu", backend: () => gpujs({ GPU, mode }) });

describe.skipIf(!gpu)("gpujs webgpu", () => {
  afterAll(() => context.destroy());

  it("runs loops to their end and keeps integers exact", async () => {
    const backend = gpujs({ GPU, mode });
    await checkLongLoops(engine(backend));
    await checkLargeIntegers(engine(backend));
    expect(await backend.mode).toBe("webgpu");
    await backend.dispose();
  });

  it("compiles one kernel for all sizes", async () => {
    const backend = gpujs({ GPU, mode });
    const on = engine(backend);
    const run = async (rows: number): Promise<number> => {
      const y = on.scope(() =>
        add(softmax(on.tensor(new Float32Array(rows * 5), [rows, 5])), on.tensor(new Float32Array(5), [5])),
      );
      expect([...(await y.data())]).toEqual(Array.from({ length: rows * 5 }, () => Math.fround(0.2)));
      y.dispose();
      return (await backend.stats()).compiled;
    };
    const compiled = await run(3);
    for (const rows of [2, 7, 64, 3]) expect(await run(rows)).toBe(compiled);
    await backend.dispose();
  });

  it("deletes every array once", async () => {
    const deleted = new Map<object, number>();
    const backend = gpujs({
      GPU: wrapped({
        async call(_, run) {
          const result = await run();
          const remove = member(result, "delete");
          if (typeof result !== "object" || result === null || typeof remove !== "function") return result;
          deleted.set(result, 0);
          const count = (): void => {
            deleted.set(result, (deleted.get(result) ?? 0) + 1);
            remove.call(result);
          };
          return Object.assign(result, { delete: count });
        },
      }),
      mode,
    });
    const on = engine(backend);
    const kept = on.scope(() => softmax(affine(on.tensor(ones, [3]), { scale: 2, shift: 0 })));
    const alive = (): number => [...deleted.values()].filter((times) => times === 0).length;
    expect((await backend.stats()).arrays).toBe(1);
    expect(alive()).toBe(1);
    const left = on.tensor(ones, [3]);
    const sum = add(left, kept);
    await sum.data();
    for (const x of [kept, left, sum]) x.dispose();
    expect((await backend.stats()).arrays).toBe(0);
    expect(deleted.size).toBeGreaterThan(7);
    expect([...new Set(deleted.values())]).toEqual([1]);
    // What its owner forgot goes with the backend.
    await add(on.tensor(ones, [3]), on.tensor(ones, [3])).data();
    expect(alive()).toBe(3);
    await backend.dispose();
    expect([...new Set(deleted.values())]).toEqual([1]);
  });

  it("delivers nothing after an error of the device, or its loss", async () => {
    const said = vi.spyOn(console, "error").mockImplementation(() => undefined);
    const failing = gpujs({ GPU, mode });
    const lost = gpujs({ GPU, mode });
    const tensors = [failing, lost].map((backend): Tensor => {
      const on = engine(backend);
      return add(on.tensor(ones, [3]), on.tensor(ones, [3]));
    });
    for (const x of tensors) expect([...(await x.data())]).toEqual([2, 4, 6]);
    const { device } = await context.acquire();
    // A buffer with uses that exclude each other.
    device.createBuffer({ size: 4, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.MAP_WRITE });
    await device.queue.onSubmittedWorkDone();
    await new Promise((resolve) => setTimeout(resolve, 50));
    const [first, second] = tensors;
    if (!first || !second) throw new Error("two tensors were made");
    await expect(first.data()).rejects.toThrow(/gpujs: the device of mode "webgpu" failed/);
    device.destroy();
    await device.lost;
    const late = add(second, second);
    for (const x of [second, late]) await expect(x.data()).rejects.toSatisfy(DeviceError.isInstance);
    for (const x of [...tensors, late]) x.dispose();
    await failing.dispose();
    await lost.dispose();
    expect(said).toHaveBeenCalled();
    said.mockRestore();
  });
});
