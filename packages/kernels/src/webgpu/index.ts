export { type WebgpuBackend, type WebgpuOptions, webgpu } from "./backend.ts";
export type { Limits, WebgpuHandle } from "./device.ts";
export type { ShapeClass } from "./kernels/tiles.ts";
export { type DeviceOptions, requestDevice } from "./request.ts";
export { type Outcome, type TuneOptions, type TuneProgress, tune } from "./tune.ts";
export type { TileTable } from "./tuned.ts";
