// Puts the gpu.js backend together: the device of a mode, the queue, the kernel tables.
import { type Backend, UnsupportedError } from "@switchyard/core";
import { createCalls, type GpujsHandle } from "./calls.ts";
import { type Device, openDevice, startGpu } from "./device.ts";
import type { GpuClass, GpujsMode } from "./gpu.ts";
import { attentionKernels } from "./kernels/attention.ts";
import { elementwiseKernels } from "./kernels/elementwise.ts";
import { matmulKernels } from "./kernels/matmul.ts";
import { normaliseKernels } from "./kernels/normalise.ts";
import { optimiserKernels } from "./kernels/optimiser.ts";
import { reduceKernels } from "./kernels/reduce.ts";
import { rowKernels } from "./kernels/rows.ts";
import { shapeKernels } from "./kernels/shape.ts";

export type { GpujsHandle } from "./calls.ts";

export interface GpujsOptions {
  /** The class `GPU` of gpu.js 2.24 or later; `loadGpujs()` finds it. */
  readonly GPU: GpuClass;
  /** "async" (default): the first of webgpu, webgl2, webgl, webasm and cpu that works. Any other: it or an error. */
  readonly mode?: GpujsMode | "async";
  /** Compiled kernels kept; the ones used longest ago go first. Default 512. */
  readonly kernels?: number;
}

export interface GpujsBackend extends Backend<GpujsHandle> {
  /** The mode at work. Rejects with UnsupportedError where it does not work here, as every read then does. */
  readonly mode: Promise<GpujsMode>;
  /** Why better modes than the one at work were passed over; "" before the start, and when there is nothing to say. */
  readonly note: string;
  /** Settles when everything called so far has run: arrays on the device, kernels held, kernels compiled so far. */
  stats(): Promise<{ readonly arrays: number; readonly kernels: number; readonly compiled: number }>;
  /** Ends gpu.js when everything called so far has run. */
  dispose(): Promise<void>;
}

const best: readonly GpujsMode[] = ["webgpu", "webgl2", "webgl", "webasm", "cpu"];

/**
 * A backend on gpu.js: a portable one for machines without WebGPU, not a fast one.
 * @example const on = engine(gpujs({ GPU: await loadGpujs(), mode: "webgl2" }));
 * @throws UnsupportedError where gpu.js refuses the mode at once; other failures surface when a tensor is read.
 */
export function gpujs({ GPU, mode = "async", kernels: most = 512 }: GpujsOptions): GpujsBackend {
  if (mode !== "async" && !best.includes(mode)) {
    throw new UnsupportedError(`gpujs: there is no mode "${mode}"; the modes are async, ${best.join(", ")}`);
  }
  if (!Number.isInteger(most) || most < 1) {
    throw new UnsupportedError(`gpujs: kernels must be a whole number from 1, not ${most}`);
  }
  const notes: string[] = [];
  const opened = mode === "async" ? openBest(GPU, most, notes) : openDevice(startGpu(GPU, mode), mode, most);
  let open = true;
  const calls = createCalls(opened, () => open);
  const started = opened.then((device) => device.mode);
  // Whoever reads a tensor hears of it.
  for (const promise of [opened, started]) promise.catch(() => undefined);

  return {
    name: "gpujs",
    mode: started,
    get note() {
      return notes.join("; ");
    },
    kernels: {
      ...elementwiseKernels(calls),
      ...shapeKernels(calls),
      ...reduceKernels(calls),
      ...rowKernels(calls),
      ...matmulKernels(calls),
      ...normaliseKernels(calls),
      ...attentionKernels(calls),
      ...optimiserKernels(calls),
    },
    upload: calls.upload,
    download: calls.download,
    free: calls.free,
    stats: () => calls.enqueue(async () => (await opened).stats()),
    dispose() {
      if (!open) return Promise.resolve();
      open = false;
      return calls.enqueue(async () => {
        const device = await opened.catch(() => undefined);
        await device?.close();
      });
    },
  };
}

async function openBest(GPU: GpuClass, most: number, notes: string[]): Promise<Device> {
  for (const mode of best) {
    try {
      return await openDevice(startGpu(GPU, mode), mode, most);
    } catch (error) {
      if (!UnsupportedError.isInstance(error)) throw error;
      notes.push(error.message);
    }
  }
  throw new UnsupportedError(`gpujs: no mode of gpu.js works here: ${notes.join("; ")}`);
}
