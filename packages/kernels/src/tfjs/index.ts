// The public surface of @switchyard/kernels/tfjs.
export { type TfjsBackend, type TfjsHandle, type TfjsOptions, tfjs } from "./backend.ts";
export { fromTfjs, toTfjs } from "./interop.ts";
export { createMoE, type MoEArgs, type MoELibrary, type RouterFactory } from "./moe-layer.ts";
export { tfjsNodeGpu } from "./node-gpu.ts";
export type { TfNamespace, TfTensor } from "./tf.ts";
