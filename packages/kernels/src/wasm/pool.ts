// Runs kernels over ranges of their units, on one thread or on several that share the memory. The calling thread always takes part; helpers
// draw pieces from a ticket in shared memory, so a helper that is late or asleep costs nothing but speed. What is computed by a unit does not
// depend on who computes it.
import { UnsupportedError } from "@switchyard/core";
import { workerSource } from "./worker-source.ts";

/** Where the control words stand in the wasm memory, and the arguments of the running job. The first kilobyte stays unused. */
const CONTROL = 1_024;
export const JOB = 2_048;
export const JOB_WORDS = 4_096;
/** First address of the heap. */
export const HEAP_START = 65_536;

// Control words. TICKET: a running number above, the pieces not yet taken in the low 12 bits.
const TICKET = 0;
const KERNEL = 1;
const ADDRESS = 2;
const UNITS = 3;
const PIECES = 4;
const DONE = 5;
const SLEEPERS = 6;
const WAITING = 7;
const FAILED = 8;

/** Below this estimated time on one thread (nanoseconds) a job is not worth a wake-up. */
export const WORTH_SHARING = 30_000;
const PIECE = 15_000;
const MAX_PIECES = 4_000;
/** How long, in milliseconds, a thread looks for the next job before it sleeps. */
const SPIN = 0.05;

/** A kernel as the binary exports it. */
export type WasmKernel = (job: number, from: number, to: number, scratch: number) => void;

export interface Pool {
  readonly threads: number;
  /** Runs `units` of a kernel whose arguments stand at JOB; `cost`: estimated nanoseconds on one thread. Returns when all is done. */
  run(kernel: string, units: number, cost: number): void;
  dispose(): void;
}

export interface PoolOptions {
  readonly module: WebAssembly.Module;
  readonly memory: WebAssembly.Memory;
  /** One address per thread. */
  readonly scratch: readonly number[];
  /** Estimated nanoseconds from which a job is shared. */
  readonly shareFrom: number;
}

interface Helper {
  end(): void;
}

/** Starts the helpers and waits until they can work. Rejects when a worker cannot be started. */
export async function createPool({ module, memory, scratch, shareFrom }: PoolOptions): Promise<Pool> {
  const exports = new WebAssembly.Instance(module, { env: { memory } }).exports;
  const names = Object.keys(exports).filter((name) => typeof exports[name] === "function");
  const ids = new Map(names.map((name, i) => [name, i]));
  const kernels = names.map((name) => exports[name] as WasmKernel);
  const own = scratch[0] ?? 0;
  let helpers: readonly Helper[] = [];
  let open = true;

  const words = new Int32Array(memory.buffer, CONTROL, 16);
  const started = scratch
    .slice(1)
    .map((address, i) =>
      startWorker({ module, memory, control: CONTROL, index: i + 1, scratch: address, names, spin: SPIN }),
    );
  try {
    helpers = await Promise.all(started);
  } catch (error) {
    for (const one of await Promise.allSettled(started)) if (one.status === "fulfilled") one.value.end();
    throw error;
  }
  const threads = helpers.length + 1;

  const alone = (kernel: WasmKernel, units: number): void => kernel(JOB, 0, units, own);

  const together = (id: number, kernel: WasmKernel, units: number, pieces: number): void => {
    words[KERNEL] = id;
    words[ADDRESS] = JOB;
    words[UNITS] = units;
    words[PIECES] = pieces;
    Atomics.store(words, DONE, 0);
    const number = (Atomics.load(words, TICKET) >>> 12) + 1;
    Atomics.store(words, TICKET, (number << 12) | pieces);
    if (Atomics.load(words, SLEEPERS) > 0) Atomics.notify(words, TICKET, pieces - 1);
    let failure: unknown;
    for (;;) {
      const ticket = Atomics.load(words, TICKET);
      const left = ticket & 4095;
      if (left === 0) break;
      if (Atomics.compareExchange(words, TICKET, ticket, ticket - 1) !== ticket) continue;
      try {
        kernel(JOB, Math.floor((units * (left - 1)) / pieces), Math.floor((units * left) / pieces), own);
      } catch (error) {
        failure = error;
      }
      Atomics.add(words, DONE, 1);
    }
    waitFor(pieces);
    const failed = Atomics.exchange(words, FAILED, 0);
    if (failure !== undefined) throw failure;
    if (failed !== 0) throw new Error(`wasm: kernel ${names[id]} failed in thread ${failed}`);
  };
  const waitFor = (pieces: number): void => {
    for (let i = 0; i < 2_000; i++) if (Atomics.load(words, DONE) === pieces) return;
    Atomics.store(words, WAITING, 1);
    for (let done = Atomics.load(words, DONE); done !== pieces; done = Atomics.load(words, DONE)) {
      Atomics.wait(words, DONE, done, 100);
    }
    Atomics.store(words, WAITING, 0);
  };

  return {
    threads,
    run(name, units, cost) {
      const id = ids.get(name);
      const kernel = id === undefined ? undefined : kernels[id];
      if (id === undefined || !kernel) throw new Error(`wasm: the binary has no kernel "${name}"`);
      if (!open) throw new UnsupportedError("wasm: this backend was disposed of");
      if (units <= 0) return;
      if (threads === 1 || units === 1 || cost < shareFrom) return alone(kernel, units);
      together(
        id,
        kernel,
        units,
        Math.min(units, MAX_PIECES, Math.max(threads, Math.min(Math.ceil(cost / PIECE), threads * 8))),
      );
    },
    dispose() {
      open = false;
      for (const helper of helpers) helper.end();
    },
  };
}

/** True where threads may share memory and this thread may wait for others. */
export function threadsPossible(): { readonly possible: boolean; readonly why: string } {
  if (typeof SharedArrayBuffer === "undefined" || (isBrowser() && globalThis.crossOriginIsolated !== true)) {
    return {
      possible: false,
      why: "one thread: the page is not cross-origin isolated (send Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp)",
    };
  }
  if (isBrowser() && typeof document !== "undefined") {
    return { possible: false, why: "one thread: a page's main thread must not wait; use runInWorker()" };
  }
  return { possible: true, why: "" };
}

const isNode = (): boolean => globalThis.process?.versions?.node !== undefined;
const isBrowser = (): boolean => !isNode();

async function startWorker(data: Readonly<Record<string, unknown>>): Promise<Helper> {
  if (isNode()) {
    // Not a literal: bundlers for the browser leave it alone.
    const specifier = "node:worker_threads";
    const threads: typeof import("node:worker_threads") = await import(/* @vite-ignore */ specifier);
    const worker = new threads.Worker(workerSource, { eval: true, workerData: data, name: "switchyard" });
    await new Promise<void>((resolve, reject) => {
      worker.once("message", () => resolve());
      worker.once("error", reject);
    });
    worker.unref();
    return { end: () => void worker.terminate() };
  }
  const url = URL.createObjectURL(new Blob([workerSource], { type: "text/javascript" }));
  const worker = new Worker(url);
  try {
    await new Promise<void>((resolve, reject) => {
      worker.onmessage = () => resolve();
      worker.onerror = (event) => reject(new UnsupportedError(`wasm: a worker did not start: ${event.message}`));
      worker.postMessage(data);
    });
  } finally {
    URL.revokeObjectURL(url);
  }
  return { end: () => worker.terminate() };
}
