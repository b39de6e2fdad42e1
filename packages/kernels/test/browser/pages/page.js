// The page: what the tests call by name through the browser's debugging port.
import { runInWorker } from "@switchyard/kernels/wasm";
import { job } from "./job.js";

/** Calls a function of the job in a worker of its own; also says what it called back with. */
async function inWorker(name, ...args) {
  const worker = runInWorker(new Worker(new URL("./worker.js", import.meta.url), { type: "module" }));
  const steps = [];
  try {
    const result = await worker.call(name, ...args, (...step) => steps.push(step));
    return { ...result, steps };
  } finally {
    worker.end();
  }
}

/** Loads every subpath of every package; answers the number of exports of each. */
async function everything() {
  const { modules } = await import("./everything.js");
  return Object.fromEntries(Object.entries(modules).map(([name, module]) => [name, Object.keys(module).length]));
}

globalThis.switchyard = { onMainThread: job, inWorker, everything };
