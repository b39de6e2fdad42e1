// The backends that stand on other libraries, with those libraries as a page loads them.
import { gpujs, loadGpujs } from "@switchyard/kernels/gpujs";
import { tfjs } from "@switchyard/kernels/tfjs";
import * as tf from "@tensorflow/tfjs-core";
import "@tensorflow/tfjs-backend-cpu";
import "@tensorflow/tfjs-backend-webgl";
import "@tensorflow/tfjs-backend-webgpu";
import { GPU } from "gpu.js";

export { fit } from "./layers.js";

/** `forward`: small arrays may be computed on the processor, as they are by default. */
async function onTfjs(name, { forward = true }) {
  if (name !== "cpu") tf.env().set(`${name.toUpperCase()}_CPU_FORWARD`, forward);
  const backend = await tfjs({ tf, backend: name });
  return Object.assign(backend, {
    description: backend.tfBackend,
    memory: () => ({ used: tf.memory().numTensors }),
    lose: () => lose(tf.backend().device ?? tf.backend().gpgpu.gl),
  });
}

async function onGpujs(GPU, mode) {
  let gpu;
  const Watched = class extends GPU {
    constructor(settings) {
      super(settings);
      gpu = this;
    }
  };
  const backend = gpujs({ GPU: Watched, mode });
  return Object.assign(backend, {
    description: await backend.mode,
    memory: async () => ({ used: (await backend.stats()).arrays }),
    lose: () => lose(gpu.kernels[0].context.device ?? gpu.kernels[0].context),
  });
}

/** Takes a WebGPU device or a WebGL context away. */
function lose(device) {
  if (device instanceof GPUDevice) device.destroy();
  else device.getExtension("WEBGL_lose_context").loseContext();
}

export const makers = {
  "tfjs webgl": (options) => onTfjs("webgl", options),
  "tfjs webgpu": (options) => onTfjs("webgpu", options),
  "gpu.js webgl2": async () => onGpujs(await loadGpujs(), "webgl2"),
  "gpu.js webgpu": () => onGpujs(GPU, "webgpu"),
};
