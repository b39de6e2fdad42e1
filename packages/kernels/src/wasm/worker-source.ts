// The program of a helper thread, as text: started from a string (Node) or a Blob (browsers), so that no bundler has to find a second file.
// It must stay self-contained. Layout of the control words: pool.ts.
export const workerSource = `
const work = ({ module, memory, control, index, scratch, names, spin }, ready) => {
  const exports = new WebAssembly.Instance(module, { env: { memory } }).exports;
  const kernels = names.map((name) => exports[name]);
  const words = new Int32Array(memory.buffer, control, 16);
  const pause = Atomics.pause ?? (() => {});
  ready();
  for (;;) {
    const ticket = Atomics.load(words, 0);
    const left = ticket & 4095;
    if (left === 0) {
      const until = performance.now() + spin;
      let idle = true;
      while (idle && performance.now() < until) {
        for (let i = 0; idle && i < 32; i++) {
          pause();
          idle = (Atomics.load(words, 0) & 4095) === 0;
        }
      }
      if (!idle) continue;
      Atomics.add(words, 6, 1);
      Atomics.wait(words, 0, ticket);
      Atomics.sub(words, 6, 1);
      continue;
    }
    // Who takes the ticket down by one owns that piece; the job cannot end, nor its words change, before the piece is counted as done.
    if (Atomics.compareExchange(words, 0, ticket, ticket - 1) !== ticket) continue;
    const kernel = words[1], job = words[2], units = words[3], pieces = words[4];
    try {
      kernels[kernel](job, Math.floor((units * (left - 1)) / pieces), Math.floor((units * left) / pieces), scratch);
    } catch (error) {
      Atomics.store(words, 8, index);
    }
    if (Atomics.add(words, 5, 1) + 1 === pieces && Atomics.load(words, 7) === 1) Atomics.notify(words, 5);
  }
};
if (typeof process === "object" && process.versions?.node) {
  const { parentPort, workerData } = require("node:worker_threads");
  work(workerData, () => parentPort.postMessage("ready"));
} else {
  self.onmessage = ({ data }) => work(data, () => self.postMessage("ready"));
}
`;
