// The shared suite on WebGPU: Dawn in Node, on whatever driver there is.
import { testBackend } from "@switchyard/testing";
import { describe } from "vitest";
import { findGpu } from "../../test/gpu.ts";
import { webgpu } from "./backend.ts";
import { requestDevice } from "./request.ts";

const gpu = await findGpu();
describe.skipIf(gpu === undefined)("WebGPU", () => {
  testBackend({
    name: "webgpu",
    backend: () => webgpu({ device: () => requestDevice(gpu ? { gpu } : {}) }),
  });
});
