// @switchyard/core/cpu: the reference backend. Runs anywhere JavaScript does.
export { type CpuBackend, cpu } from "./backend.ts";
export type { CpuHandle } from "./storage.ts";
