// The case "streaming": a random model of four times the memory that is allowed, run in a process of its own for each way of choosing
// the experts that stay, and once with all of it in memory. This file is also what those processes run: `node streaming.ts JOB`.
import { execFile } from "node:child_process";
import { mkdtemp, open, readFile, rm } from "node:fs/promises";
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
import { fileSource, loadModel, olmoe, randomCheckpoint, readHeader, type StreamPolicy } from "@switchyard/models";

interface Job {
  readonly folder: string;
  readonly bytes: number;
  /** Missing: no limit. */
  readonly memory?: number;
  readonly threads: number;
  readonly policy?: StreamPolicy;
  readonly prompt: number;
  readonly tokens: number;
  readonly loads: number;
  readonly vocabulary: number;
}

const policies: readonly StreamPolicy[] = ["lru", "lfu", "prefetch"];

/**
 * Reads what loading must read, by large reads of neighbouring tensors into one buffer that is there already: nothing that loads the
 * model can be faster than that.
 */
async function reading(folder: string, streamed: boolean): Promise<Pick<StreamingSubject, "loadedBytes" | "readOnly">> {
  const file = join(folder, "model.safetensors");
  const source = await fileSource(file);
  if (!source) throw new Error(`there is no ${file}`);
  const { tensors } = await readHeader(source);
  await source.close();
  const wanted = [...tensors].filter(([name]) => !(streamed && name.includes(".experts.")));
  const spans: [from: number, to: number][] = [[0, Math.min(...Array.from(tensors.values(), ({ from }) => from))]];
  for (const [, { from, to }] of wanted.sort(([, a], [, b]) => a.from - b.from)) {
    const last = spans.at(-1);
    if (last?.[1] === from) last[1] = to;
    else spans.push([from, to]);
  }
  const buffer = new Uint8Array(2 ** 24).fill(1);
  return {
    loadedBytes: spans.reduce((n, [from, to]) => n + to - from, 0),
    async readOnly() {
      await readFile(join(folder, "config.json"));
      const handle = await open(file);
      for (const [from, to] of spans) {
        for (let at = from; at < to; at += buffer.length) {
          const length = Math.min(buffer.length, to - at);
          const { bytesRead } = await handle.read(buffer, 0, length, at);
          if (bytesRead !== length) throw new Error(`${file}: ${bytesRead} bytes came of ${length}`);
        }
      }
      await handle.close();
    },
  };
}

/** The model within its memory, in this process. */
async function report(job: Job): Promise<StreamingReport> {
  const { folder, bytes, memory, policy: streaming, threads, vocabulary, tokens, loads } = job;
  const backend = await wasm({ threads });
  const on = engine(backend);
  const subject: StreamingSubject = {
    ...(await reading(folder, memory !== undefined)),
    async load() {
      const how = { ...(memory === undefined ? {} : { memory }), ...(streaming ? { streaming } : {}) };
      const { model, close } = await loadModel(folder, { engine: on, ...how });
      const { streamed } = model;
      if (!streamed && memory !== undefined) throw new Error(`all of ${bytes} bytes fit into ${memory}`);
      const cache = model.newCache(1);
      return {
        ...(streamed ? { streamed } : {}),
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
  const bound = memory === undefined ? {} : { memory };
  const name = streaming ?? "all in memory";
  const found = await measureStreaming(subject, { name, bytes, ...bound, prompt, tokens, loads });
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
    const [prompt, tokens] = quick ? [16, 16] : [128, 48];
    const { vocabulary } = sizes;
    const common = { folder, bytes, threads, prompt, tokens, vocabulary, loads: 20 };
    const jobs: Job[] = policies.map((policy) => ({ ...common, policy, memory: Math.floor(bytes / 4) }));
    for (const job of [...jobs, common]) {
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
