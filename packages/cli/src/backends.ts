// The backends by name. Those that stand on a library load it when they are chosen; a missing one is named with its npm line.
import { type Backend, type Engine, engine, MissingPackageError, UnsupportedError } from "@switchyard/core";
import type { TfjsOptions, TfNamespace } from "@switchyard/kernels/tfjs";

export const backendNames = ["wasm", "webgpu", "tfjs", "gpujs", "cpu"] as const;
export type BackendName = (typeof backendNames)[number];

/**
 * An engine on a backend. `threads` is for wasm alone.
 * @throws MissingPackageError where its library is not installed, UnsupportedError where it finds no device.
 */
export async function openBackend(name: BackendName, threads: number | undefined): Promise<Engine & { close(): void }> {
  if (threads !== undefined && threads > 1 && name !== "wasm") {
    throw new UnsupportedError(`--threads: the ${name} backend has no threads to set; use --backend wasm`);
  }
  const open = <H>(backend: Backend<H>): Engine & { close(): void } =>
    Object.assign(engine(backend), { close: () => backend.dispose?.() });
  switch (name) {
    case "wasm": {
      const { wasm } = await import("@switchyard/kernels/wasm");
      return open(await wasm(threads === undefined ? {} : { threads }));
    }
    case "webgpu": {
      const { webgpu } = await import("@switchyard/kernels/webgpu");
      return open(await webgpu());
    }
    case "tfjs": {
      const { tfjs } = await import("@switchyard/kernels/tfjs");
      return open(await tfjs(await findTfjs()));
    }
    case "gpujs": {
      const { gpujs, loadGpujs } = await import("@switchyard/kernels/gpujs");
      return open(await gpujs({ GPU: await loadGpujs() }));
    }
    case "cpu": {
      const { cpu } = await import("@switchyard/core/cpu");
      return open(cpu());
    }
    default:
      return name satisfies never;
  }
}

/** The fastest TensorFlow.js that is installed: the native ones first, then WebAssembly and plain JavaScript. */
async function findTfjs(): Promise<TfjsOptions> {
  const { tfjsNodeGpu } = await import("@switchyard/kernels/tfjs");
  // Names in variables: none of these is a dependency.
  const load = async (name: string): Promise<TfNamespace> => await import(name);
  const core = async (backend: string): Promise<TfjsOptions> => {
    await load(`@tensorflow/tfjs-backend-${backend}`);
    return { tf: await load("@tensorflow/tfjs-core"), backend };
  };
  const ways = [
    async () => ({ tf: await tfjsNodeGpu() }),
    async () => ({ tf: await load("@tensorflow/tfjs-node") }),
    () => core("wasm"),
    () => core("cpu"),
  ];
  const reasons: unknown[] = [];
  for (const way of ways) {
    try {
      return await way();
    } catch (error) {
      reasons.push(error);
    }
  }
  throw new MissingPackageError(
    "--backend tfjs: no TensorFlow.js is installed here; npm install @tensorflow/tfjs-node-gpu (CUDA), @tensorflow/tfjs-node, or " +
      "@tensorflow/tfjs-core with @tensorflow/tfjs-backend-wasm",
    { cause: reasons.at(-1) },
  );
}
