// The shared suite on WebGPU: Dawn in Node, on whatever driver there is, with the kernels for processors and with those for GPUs.
import { testBackend } from "@switchyard/testing";
import { describe } from "vitest";
import { findGpu } from "../../test/gpu.ts";
import { webgpu } from "./backend.ts";
import { requestDevice } from "./request.ts";

const gpu = await findGpu();
describe.skipIf(gpu === undefined)("WebGPU", () => {
  for (const software of [true, false]) {
    testBackend({
      name: `webgpu, kernels for ${software ? "processors" : "GPUs"}`,
      backend: () => webgpu({ device: () => requestDevice(gpu ? { gpu } : {}), software }),
    });
  }
});
