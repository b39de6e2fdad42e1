// Puts the WebGPU backend together: device, kernel tables, upload and download.
import { type Backend, type Operand, type TypedArray, UnsupportedError } from "@switchyard/core";
import { createGpu, type Limits, type WebgpuHandle } from "./device.ts";
import { kernels } from "./kernels/table.ts";
import { requestDevice } from "./request.ts";
import { describe, type TileTable, tilesFor } from "./tuned.ts";

export interface WebgpuOptions {
  /**
   * The device, or a function that asks for one: with a function `recover()` can ask again. Default: `requestDevice()`.
   * A device that was passed in stays the caller's: `dispose` leaves it alone.
   */
  readonly device?: GPUDevice | (() => Promise<GPUDevice>);
  /** Lower limits than the device's own, for tests of what a smaller device would do. */
  readonly limits?: Partial<Limits>;
  /** Bytes of unused buffers that are kept for reuse; default 256 MB. */
  readonly idle?: number;
  /**
   * "f16": tile products with weights (linear layers, experts, quantised or not) multiply in f16, sums of 16 products at a time, and
   * add those up in f32: for inference on devices with "shader-f16". Default "f32".
   */
  readonly arithmetic?: "f32" | "f16";
  /**
   * Whether the driver computes on the processor (SwiftShader, lavapipe), where registers beat workgroup memory: chooses between two
   * forms of many kernels. Default: what the adapter says of itself.
   */
  readonly software?: boolean;
  /** Tile sizes measured by `tune`; they go before the table that comes with this package. */
  readonly tiles?: TileTable;
}

export interface WebgpuBackend extends Backend<WebgpuHandle> {
  readonly device: GPUDevice;
  readonly limits: Limits;
  /** Vendor, architecture and description of the adapter, for reports. */
  readonly description: string;
  /** Bytes in tensors; bytes held on the device, unused buffers included. */
  memory(): { readonly used: number; readonly held: number };
  /** The same backend on a new device, after this one was lost. Tensors do not come along: go on from a snapshot. */
  recover(device?: GPUDevice): Promise<WebgpuBackend>;
  flush(): void;
  dispose(): void;
}

/**
 * A backend of hand-written WGSL kernels on a WebGPU device.
 * @example const gpu = engine(await webgpu({ device: await requestDevice() }));
 * @throws MissingPackageError, UnsupportedError where no device is given and none is found (see `requestDevice`), and
 * UnsupportedError where f16 arithmetic is asked of a device without "shader-f16".
 */
export async function webgpu(options: WebgpuOptions = {}): Promise<WebgpuBackend> {
  const { device: given = () => requestDevice() } = options;
  const device = typeof given === "function" ? await given() : given;
  const description = describe(device);
  const tiles = tilesFor(description, options.tiles);
  const gpu = createGpu(device, {
    idle: options.idle ?? 2 ** 28,
    arithmetic: options.arithmetic ?? "f32",
    ...(options.limits ? { limits: options.limits } : {}),
    ...(options.software === undefined ? {} : { software: options.software }),
    ...(tiles ? { tiles } : {}),
  });
  return {
    name: "webgpu",
    device,
    limits: gpu.limits,
    description,
    kernels: kernels(gpu),
    upload: gpu.upload,
    download: (x: Operand<WebgpuHandle>): Promise<TypedArray> => gpu.download(x),
    free: gpu.free,
    flush: gpu.flush,
    memory: gpu.memory,
    async recover(renewed) {
      if (!renewed && typeof given !== "function") {
        throw new UnsupportedError(
          "webgpu: recover: this backend was given a device, so it cannot ask for another; pass one, recover(device), or make the " +
            "backend with a function, webgpu({ device: () => requestDevice() })",
        );
      }
      gpu.dispose();
      return webgpu(renewed ? { ...options, device: renewed } : options);
    },
    dispose() {
      gpu.dispose();
      if (typeof given === "function") device.destroy();
    },
  };
}
