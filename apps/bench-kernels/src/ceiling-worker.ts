// One thread of the ceiling loops: instantiates the module it is given and runs one loop per message.
import { parentPort, workerData } from "node:worker_threads";

const { module, pages } = workerData as { readonly module: WebAssembly.Module; readonly pages: number };
const { exports } = new WebAssembly.Instance(module);

const call = (name: string, argument: number): unknown => {
  const loop = exports[name];
  if (typeof loop !== "function") throw new Error(`the module has no loop "${name}"`);
  return loop(argument, 0.999, 0.001); // the read loop takes only the first
};

call("fill", pages);
// Engines compile a loop well only after it was entered often: these short calls are its warm-up.
for (let i = 0; i < 2000; i++) for (const name of ["relaxed", "plain", "read"]) call(name, 2560);
parentPort?.on("message", ([name, argument]: readonly [string, number]) =>
  parentPort?.postMessage(call(name, argument)),
);
parentPort?.postMessage("ready");
