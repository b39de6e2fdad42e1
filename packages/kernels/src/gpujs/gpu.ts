// What this adapter needs of gpu.js, as its own small interfaces, and the helper that finds the package.
import { MissingPackageError } from "@switchyard/core";

/** Where gpu.js runs kernels. */
export type GpujsMode = "webgpu" | "webgl2" | "webgl" | "webasm" | "cpu";

export interface GpuKernelSettings {
  readonly output: number[];
  readonly pipeline: boolean;
  readonly immutable: boolean;
  readonly precision: "single";
  readonly tactic: "precision";
  readonly loopMaxIterations: number;
  readonly argumentTypes?: Record<string, string>;
  readonly constants?: Record<string, number>;
  readonly constantTypes?: Record<string, string>;
  readonly dynamicOutput?: boolean;
  readonly dynamicArguments?: boolean;
  readonly asyncMode?: boolean;
}

/** A compiled kernel, called through `apply`. Version 2 answers at once in some modes, version 3 with promises only. */
export interface GpuKernel {
  // biome-ignore lint/suspicious/noExplicitAny: as Function declares it
  apply(self: undefined, args: any): unknown;
  setOutput(output: number[]): unknown;
  destroy(removeCanvasReferences?: boolean): void;
  /** The kernel at work; another one after gpu.js fell back to another mode. */
  readonly kernel: object;
}

export interface GpuInstance {
  // biome-ignore lint/suspicious/noExplicitAny: gpu.js types settings and kernels by its own unions
  createKernel(source: string, settings: any): any;
  destroy(): Promise<void>;
}

/** The class `GPU` of gpu.js. */
export type GpuClass = new (settings: { readonly mode: GpujsMode }) => GpuInstance;

const advice =
  "npm install gpu.js (its own dependencies, an OpenGL binding to compile and a second WebGPU, are best replaced by " +
  '"overrides": { "gpu.js": { "gl": "npm:empty-npm-package@1.0.0", "webgpu": "^0.6.2" } } in your package.json)';

/**
 * The class `GPU` of the installed package gpu.js.
 * @example const backend = gpujs({ GPU: await loadGpujs() });
 * @throws MissingPackageError where it is not installed.
 */
export function loadGpujs(): Promise<GpuClass> {
  return findGpujs(() => import("gpu.js"));
}

/** `loadGpujs` with the import as a parameter. */
export async function findGpujs(load: () => Promise<unknown>): Promise<GpuClass> {
  let found: unknown;
  try {
    found = await load();
  } catch (cause) {
    throw new MissingPackageError(`gpujs: the package gpu.js could not be loaded; ${advice}`, { cause });
  }
  // A CommonJS package: bundlers put its exports under `default`.
  const GPU = member(found, "GPU") ?? member(member(found, "default"), "GPU") ?? member(found, "default");
  if (typeof GPU !== "function") {
    throw new MissingPackageError(`gpujs: the package gpu.js has no class GPU; version 2.24 is needed: ${advice}`);
  }
  return GPU as GpuClass;
}

/** A property of anything; undefined where there is none. */
export const member = (of: unknown, name: string): unknown =>
  (typeof of === "object" && of !== null) || typeof of === "function" ? Reflect.get(of, name) : undefined;
