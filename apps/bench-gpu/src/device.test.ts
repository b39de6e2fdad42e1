// Which driver is asked, what is said when none answers, and what is told of a device.
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { type Dawn, describe as describeDevice, findGpu, publish } from "./device.ts";

/** Answers with an adapter from the n-th attempt on. */
const dawn = (from: number): Dawn & { readonly attempts: (string | undefined)[] } => {
  const attempts: (string | undefined)[] = [];
  return {
    attempts,
    globals: {},
    create() {
      attempts.push(process.env.VK_ICD_FILENAMES);
      const adapter = attempts.length >= from ? {} : null;
      return { requestAdapter: async () => adapter } as GPU;
    },
  };
};
const driver = fileURLToPath(import.meta.url); // any file that is there

beforeEach(() => {
  vi.stubEnv("VK_ICD_FILENAMES", undefined);
  vi.stubEnv("VK_DRIVER_FILES", undefined);
});
afterEach(() => {
  vi.unstubAllEnvs();
});

it("takes the driver that answers", async () => {
  const one = dawn(1);
  const said: string[] = [];
  await findGpu(one, (line) => said.push(line), driver);
  expect(one.attempts).toEqual([undefined]);
  expect(said).toEqual([]);
});

it("tries the software driver where none was chosen and none answers, and says so", async () => {
  const one = dawn(2);
  const said: string[] = [];
  await findGpu(one, (line) => said.push(line), driver);
  expect(one.attempts).toEqual([undefined, driver]);
  expect(said).toEqual([`No GPU driver answers; trying the software driver ${driver}`]);
});

it("refuses with what to install when nothing answers", async () => {
  const say = (): void => undefined;
  await expect(findGpu(dawn(9), say, driver)).rejects.toThrow(/no WebGPU device was found.*libvulkan1/);
  await expect(findGpu(dawn(9), say, "/no/such/driver.json")).rejects.toThrow("no WebGPU device was found");
});

it("leaves a chosen driver alone, and names it when it does not answer", async () => {
  vi.stubEnv("VK_ICD_FILENAMES", "/chosen.json");
  const one = dawn(9);
  await expect(findGpu(one, () => undefined, driver)).rejects.toThrow("was found with the driver /chosen.json");
  expect(one.attempts).toEqual(["/chosen.json"]);
});

it("gives every library the adapter that is measured on, whichever it asks for", async () => {
  const asked: unknown[] = [];
  const gpu = {
    requestAdapter: async (options: unknown) => {
      asked.push(options);
      return null;
    },
  };
  const before = Object.getOwnPropertyDescriptor(globalThis, "navigator");
  try {
    publish(gpu as object as GPU, { SomeFlagOfWebGPU: { MAP: 1 } });
    await navigator.gpu.requestAdapter();
    await navigator.gpu.requestAdapter({ powerPreference: "low-power", forceFallbackAdapter: false });
    expect(asked).toEqual([
      { powerPreference: "high-performance" },
      { powerPreference: "high-performance", forceFallbackAdapter: false },
    ]);
    expect(Reflect.get(globalThis, "SomeFlagOfWebGPU")).toEqual({ MAP: 1 });
  } finally {
    if (before) Object.defineProperty(globalThis, "navigator", before);
    Reflect.deleteProperty(globalThis, "SomeFlagOfWebGPU");
  }
});

it("tells name, maker, kind, features and limits of a device", () => {
  const limits = {
    maxBufferSize: 1,
    maxStorageBufferBindingSize: 2,
    maxStorageBuffersPerShaderStage: 3,
    maxComputeWorkgroupStorageSize: 4,
    maxComputeInvocationsPerWorkgroup: 5,
    maxComputeWorkgroupsPerDimension: 6,
  };
  const adapterInfo = {
    vendor: "maker",
    architecture: "tenth",
    device: "0x1",
    description: "",
    isFallbackAdapter: false,
  };
  const device = { adapterInfo, limits: { ...limits, maxTextureArrayLayers: 7 }, features: new Set(["b", "a"]) };
  expect(describeDevice(device as object as GPUDevice)).toEqual({
    name: "0x1",
    vendor: "maker",
    architecture: "tenth",
    software: false,
    features: ["a", "b"],
    limits,
  });
});
