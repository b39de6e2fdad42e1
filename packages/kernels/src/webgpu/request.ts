// Finds a WebGPU device: the browser's, or in Node the one of the npm package `webgpu` (Dawn). Nothing global is touched.
import { MissingPackageError, UnsupportedError } from "@switchyard/core";

export interface DeviceOptions {
  /** Where to ask; default: `navigator.gpu`, else the npm package `webgpu`. */
  readonly gpu?: GPU;
  readonly powerPreference?: GPUPowerPreference;
}

/** Limits that kernels profit from: all that the adapter has of them is asked for. */
const wantedLimits = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupsPerDimension",
] as const;
const wantedFeatures: readonly GPUFeatureName[] = ["shader-f16", "timestamp-query"];

/** A device of Dawn dies with the object that made its adapter: that object lives as long as the device. */
const makers = new WeakMap<GPUDevice, GPU>();

/**
 * A device with the adapter's full limits, and f16 arithmetic where it has it.
 * @throws MissingPackageError in Node without the package `webgpu`; UnsupportedError where there is no adapter.
 */
export async function requestDevice({
  gpu,
  powerPreference = "high-performance",
}: DeviceOptions = {}): Promise<GPUDevice> {
  const source = gpu ?? globalThis.navigator?.gpu ?? (await dawn());
  const adapter = await source.requestAdapter({ powerPreference });
  if (!adapter) {
    throw new UnsupportedError(
      "webgpu: no adapter was found. In Node a Vulkan, Metal or D3D12 driver is needed (on Linux: libvulkan1 and the driver of " +
        "the GPU; for a software driver set VK_ADD_DRIVER_FILES to its .json file); in a browser WebGPU must be switched on and the " +
        "page be served from https or localhost. The wasm backend runs everywhere",
    );
  }
  const requiredLimits: Record<string, number> = {};
  for (const name of wantedLimits) requiredLimits[name] = adapter.limits[name];
  const device = await adapter.requestDevice({
    requiredLimits,
    requiredFeatures: wantedFeatures.filter((feature) => adapter.features.has(feature)),
  });
  makers.set(device, source);
  return device;
}

async function dawn(): Promise<GPU> {
  // A name in a variable: bundlers leave it alone, and a browser never comes here.
  const name: string = "webgpu";
  let module: { readonly create: (flags: string[]) => GPU };
  try {
    module = await import(/* @vite-ignore */ /* webpackIgnore: true */ name);
  } catch (cause) {
    throw new MissingPackageError(
      "webgpu: this environment has no navigator.gpu; in Node install the package that brings one: npm install webgpu",
      { cause },
    );
  }
  return module.create([]);
}
