// The page: what the tests call by name through the browser's debugging port.
import { runInWorker } from "@switchyard/kernels/wasm";
import { makers } from "./backends.js";
import { makeJob } from "./job.js";

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

let jobWithPeers;
/** Calls a function of the job, with the backends that stand on other libraries, on the main thread. */
async function withPeers(name, ...args) {
  const { makers: more, fit } = await import("./peers.js");
  jobWithPeers ??= { ...makeJob({ ...makers, ...more }), fit };
  return jobWithPeers[name](...args);
}

/** Loads every subpath of every package; answers the number of exports of each. */
async function everything() {
  const { modules } = await import("./everything.js");
  return Object.fromEntries(Object.entries(modules).map(([name, module]) => [name, Object.keys(module).length]));
}

const onMainThread = makeJob(makers);

/** Runs recorded checkpoints, each from the files chosen in an input of the page. */
function withChosenFiles(where, name, options, requests) {
  const inputs = [...document.querySelectorAll("input[type=file]")];
  const all = requests.map((request, i) => ({ ...request, files: [...inputs[i].files] }));
  return where === "worker"
    ? inWorker("checkpoints", name, options, all)
    : onMainThread.checkpoints(name, options, all);
}

globalThis.switchyard = { onMainThread, inWorker, withPeers, withChosenFiles, everything };
