// The case "streaming": a random model of four times the memory that is allowed, run in a process of its own for each way of choosing
// the experts that stay. This file is also what those processes run: `node streaming.ts JOB`.
import { execFile } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import {
  measureStreaming,
  type StreamingReport,
  type StreamingSubject,
  streamingConfig,
  streamingSizes,
  streamingTable,
  type Table,
} from "@switchyard/bench/kernels";
import { engine } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { loadModel, olmoe, openCheckpoint, randomCheckpoint, type StreamPolicy } from "@switchyard/models";

interface Job {
  readonly folder: string;
  readonly bytes: number;
  readonly memory: number;
  readonly threads: number;
  readonly policy: StreamPolicy;
  readonly prompt: number;
  readonly tokens: number;
  readonly vocabulary: number;
}

const policies: readonly StreamPolicy[] = ["lru", "lfu", "prefetch"];

/** The model within its memory, in this process. */
async function report(job: Job): Promise<StreamingReport> {
  const { folder, bytes, memory, policy: streaming, threads, vocabulary, tokens } = job;
  const backend = await wasm({ threads });
  const on = engine(backend);
  const subject: StreamingSubject = {
    async readOnly() {
      const checkpoint = await openCheckpoint(folder);
      for (const name of checkpoint.names) if (!name.includes(".experts.")) await checkpoint.read(name);
      await checkpoint.close();
    },
    async load() {
      const { model, close } = await loadModel(folder, { engine: on, memory, streaming });
      const { streamed } = model;
      if (!streamed) throw new Error(`all of ${bytes} bytes fit into ${memory}`);
      const cache = model.newCache(1);
      return {
        capacity: streamed.capacity,
        expertBytes: streamed.expertBytes,
        counts: () => streamed.counts(),
        async next(ids) {
          const input = on.tensor(Int32Array.from(ids), [1, ids.length]);
          const logits = await model.step(input, { cache });
          const values = await logits.data();
          input.dispose();
          logits.dispose();
          let best = 0;
          for (const [id, value] of values.entries()) if (value > (values[best] as number)) best = id;
          return best;
        },
        async close() {
          cache.dispose();
          await close();
        },
      };
    },
    peak: () => process.resourceUsage().maxRSS * 1024,
  };
  const prompt = Array.from({ length: job.prompt }, (_, i) => (i * 7919) % vocabulary);
  const found = await measureStreaming(subject, { name: streaming, bytes, memory, prompt, tokens });
  backend.dispose();
  return found;
}

/** Writes the model into a temporary folder, and runs it. */
export async function* streaming({
  quick,
  threads,
}: {
  readonly quick: boolean;
  readonly threads: number;
}): AsyncGenerator<Table> {
  const sizes = streamingSizes[quick ? "quick" : "full"];
  const folder = await mkdtemp(join(tmpdir(), "switchyard-streaming-"));
  try {
    const { bytes } = await randomCheckpoint(folder, { config: streamingConfig(sizes), architecture: olmoe });
    const reports: StreamingReport[] = [];
    for (const policy of policies) {
      const [prompt, tokens] = quick ? [16, 16] : [128, 48];
      const { vocabulary } = sizes;
      const job: Job = { folder, bytes, memory: Math.floor(bytes / 4), threads, policy, prompt, tokens, vocabulary };
      const script = fileURLToPath(import.meta.url);
      const { stdout } = await promisify(execFile)(process.execPath, [
        ...process.execArgv,
        script,
        JSON.stringify(job),
      ]);
      reports.push(JSON.parse(stdout));
    }
    yield streamingTable(sizes, reports, { threads });
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

const [, script, job] = process.argv;
if (script === fileURLToPath(import.meta.url) && job !== undefined) {
  console.log(JSON.stringify(await report(JSON.parse(job))));
}
