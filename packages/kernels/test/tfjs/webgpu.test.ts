// TensorFlow.js's WebGPU backend in Node, on the adapter of gpu.ts: the cases whose kernels take a way of their own there, with
// the library's habit of computing small things on the host switched off. A browser runs the whole suite.
import { DeviceError, type Engine, engine, mul } from "@switchyard/core";
import { backendCases } from "@switchyard/testing";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type TfjsBackend, tfjs } from "../../src/tfjs/backend.ts";
import { findGpu } from "../gpu.ts";

const gpu = await findGpu();

describe.skipIf(!gpu)("tfjs on WebGPU in Node", () => {
  let library: typeof import("@tensorflow/tfjs-core");
  let subject: TfjsBackend;
  let on: Engine;
  let start = 0;
  beforeAll(async () => {
    // The library registers the backend at its import, and only where it finds navigator.gpu.
    const navigator = { gpu, userAgent: "node", language: "en" };
    Object.defineProperty(globalThis, "navigator", { value: navigator, configurable: true });
    library = await import("@tensorflow/tfjs-core");
    await import("@tensorflow/tfjs-backend-webgpu");
    library.env().set("WEBGPU_CPU_FORWARD", false);
    subject = await tfjs({ tf: library, backend: "webgpu" });
    on = engine(subject);
    start = library.memory().numTensors;
  });
  afterAll(() => subject?.dispose());

  const own =
    /^(topkIndices|argsort|blockEnds|dispatch|groupedMatmul|groupedOuter|combineRows|addRows|takeRows|scatterLast|where|cast|log|cumsum)\//;
  const whole = /^engine\/(a Mixture|gradients of|the same work|a read keeps|infinities)/;
  const cases = backendCases().filter(({ name }) => (own.test(name) || whole.test(name)) && !name.includes("several"));

  it("keeps tensors on the device", () => {
    expect([on.name, on.canBlock]).toEqual(["tfjs-webgpu", false]);
    expect(cases.length).toBeGreaterThan(300);
  });
  for (const one of cases) it(one.name, () => one.run(on));
  it("leaves nothing behind", () => {
    expect([on.live(), library.memory().numTensors]).toEqual([0, start]);
  });

  it("gives an error, and no numbers, once the device is lost", async () => {
    const x = on.tensor(Float32Array.of(1, 2), [2]);
    const y = mul(x, x);
    const device: unknown = Reflect.get(library.backend(), "device");
    (device as GPUDevice).destroy();
    await (device as GPUDevice).lost;
    await expect(y.data()).rejects.toThrow(DeviceError);
    await expect(y.data()).rejects.toThrow(/tfjs-webgpu: the WebGPU device was lost \(destroyed: /);
    expect(() => mul(x, x)).toThrow(DeviceError);
  });
});
