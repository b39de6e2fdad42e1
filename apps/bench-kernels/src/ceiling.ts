// The machine's limits as contenders: the same loop on each of some threads. Our kernels are judged against these, not against wishes.
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { Worker } from "node:worker_threads";
import type { Contender } from "@switchyard/bench/kernels";
import asc from "assemblyscript/asc";

export interface Loop extends Contender {
  /** Operations, or bytes read, per run. */
  readonly amount: number;
}

export interface Ceiling {
  /** 128-bit multiply-adds in registers. */
  arithmetic(variant: "relaxed" | "plain"): Loop;
  /** Sequential reading of `bytes`, divided among the threads. */
  memory(): Loop;
  close(): Promise<void>;
}

async function loops(): Promise<WebAssembly.Module> {
  const source = readFileSync(new URL("../assembly/ceiling.ts", import.meta.url), "utf8");
  const files = new Map<string, string | Uint8Array>([["ceiling.ts", source]]);
  const { error, stderr } = await asc.main(
    ["ceiling.ts", "--outFile", "out.wasm", "-O3", "--runtime", "stub", "--enable", "relaxed-simd"],
    {
      readFile: (name) => (files.get(name) as string | undefined) ?? null,
      writeFile: (name, contents) => void files.set(name, contents),
      listFiles: () => [],
    },
  );
  const binary = files.get("out.wasm");
  if (error || !(binary instanceof Uint8Array)) throw new Error(`ceiling loops do not compile: ${stderr.toString()}`);
  return WebAssembly.compile(Uint8Array.from(binary));
}

export async function ceiling(threads: number, bytes: number): Promise<Ceiling> {
  const module = await loops();
  const share = Math.floor(bytes / threads / 65536) * 65536; // whole pages
  const workers = Array.from(
    { length: threads },
    () => new Worker(new URL("./ceiling-worker.ts", import.meta.url), { workerData: { module, pages: share / 65536 } }),
  );
  await Promise.all(workers.map((worker) => once(worker, "message")));
  const everywhere = async (loop: string, n: number): Promise<void> => {
    const answers = workers.map((worker) => once(worker, "message"));
    for (const worker of workers) worker.postMessage([loop, n]);
    await Promise.all(answers);
  };
  const rounds = 10_000_000;
  return {
    arithmetic: (variant) => ({
      name: `${variant} multiply-add loop`,
      amount: 80 * rounds * threads,
      run: () => everywhere(variant, rounds),
    }),
    memory: () => ({ name: "memory read loop", amount: share * threads, run: () => everywhere("read", share) }),
    async close() {
      await Promise.all(workers.map((worker) => worker.terminate()));
    },
  };
}
