// The public surface of @switchyard/kernels/gpujs.
export { type GpujsBackend, type GpujsHandle, type GpujsOptions, gpujs } from "./backend.ts";
export { type GpuClass, type GpuInstance, type GpujsMode, loadGpujs } from "./gpu.ts";
