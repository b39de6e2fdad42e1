// Finds the device to measure on, and gives everyone the same one: the peers look for `navigator.gpu`, which Node does not have.
import { existsSync } from "node:fs";
import { requestDevice } from "@switchyard/kernels/webgpu";

/** Chromium's own software driver, as Debian's package installs it. */
export const softwareDriver = "/usr/lib/chromium/vk_swiftshader_icd.json";

/** What is printed and recorded of a device. */
export interface DeviceInfo {
  readonly name: string;
  readonly vendor: string;
  readonly architecture: string;
  /** It computes on the processor: figures say whether things work, not how fast a GPU is. */
  readonly software: boolean;
  readonly features: readonly string[];
  readonly limits: Readonly<Record<string, number>>;
}

/** Of several adapters the fast one; `requestDevice` asks for it too. */
const preference = { powerPreference: "high-performance" } as const;

/** What this needs of the npm package `webgpu`. */
export interface Dawn {
  create(flags: string[]): GPU;
  readonly globals: object;
}

/**
 * A WebGPU with an adapter. Where no driver was chosen and none answers, Chromium's software driver is tried, if it is there.
 * @throws Error that says what to install.
 */
export async function findGpu(dawn: Dawn, say: (line: string) => void, driver: string = softwareDriver): Promise<GPU> {
  const { env } = process;
  const gpu = dawn.create([]);
  if (await gpu.requestAdapter(preference)) return gpu;
  const asked = env.VK_ICD_FILENAMES ?? env.VK_DRIVER_FILES;
  if (asked === undefined && existsSync(driver)) {
    say(`No GPU driver answers; trying the software driver ${driver}`);
    env.VK_ICD_FILENAMES = driver;
    env.XDG_RUNTIME_DIR ??= "/tmp";
    const software = dawn.create([]);
    if (await software.requestAdapter(preference)) return software;
  }
  throw new Error(
    `no WebGPU device was found${asked === undefined ? "" : ` with the driver ${asked}`}. A Vulkan, Metal or D3D12 driver is needed: ` +
      "on Linux install libvulkan1 and the driver of your GPU, or, to see that it runs, a software driver " +
      "(apt-get install chromium libvulkan1)",
  );
}

/**
 * Gives scripts of this process what a browser would: `navigator.gpu` and the names of WebGPU's flags. Whatever they ask for, they
 * get the adapter that we measure on.
 */
export function publish(gpu: GPU, globals: Dawn["globals"]): void {
  Object.assign(globalThis, globals);
  const same = {
    requestAdapter: (asked?: GPURequestAdapterOptions) => gpu.requestAdapter({ ...asked, ...preference }),
    getPreferredCanvasFormat: () => gpu.getPreferredCanvasFormat(),
    wgslLanguageFeatures: gpu.wgslLanguageFeatures,
  };
  const navigator = { gpu: same, userAgent: "node", language: "en" };
  Object.defineProperty(globalThis, "navigator", { value: navigator, configurable: true });
}

/** The limits that decide what fits and how fast. */
const limitNames = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupsPerDimension",
] as const;

export function describe(device: GPUDevice): DeviceInfo {
  const { vendor, architecture, description, device: model, isFallbackAdapter } = device.adapterInfo;
  const name = [description || model, vendor, architecture].filter((word) => word);
  return {
    name: name[0] ?? "unnamed adapter",
    vendor,
    architecture,
    software: isFallbackAdapter,
    features: [...device.features].sort(),
    limits: Object.fromEntries(limitNames.map((limit) => [limit, device.limits[limit]])),
  };
}

export interface Found {
  readonly device: GPUDevice;
  readonly info: DeviceInfo;
}

/** The device that everything is measured on. @throws Error where there is none. */
export async function findDevice(say: (line: string) => void): Promise<Found> {
  const dawn: Dawn = await import("webgpu");
  const gpu = await findGpu(dawn, say);
  publish(gpu, dawn.globals);
  const device = await requestDevice({ gpu });
  return { device, info: describe(device) };
}
