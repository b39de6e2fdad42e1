// The public surface of @switchyard/kernels/wasm.
export { type WasmBackend, type WasmHandle, type WasmOptions, wasm } from "./backend.ts";
export { hasRelaxedSimd, type Variant } from "./loader.ts";
export { exposeInWorker, runInWorker, type WorkerCalls, type WorkerFunctions } from "./run-in-worker.ts";
