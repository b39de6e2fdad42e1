// npm run fuzz -- [--mutants N] [--seed S]: N damaged checkpoints (default a million) through the reader of the models
// package, those of the seeds from S on. Each must be read to a consistent table or refused with a CheckpointError, in
// bounded work and memory. They are read in a thread of its own with a small heap, so that a hang or an outgrown heap is
// noticed and its seed named. Ctrl-C stops it with the figures so far. The exit code is 1 when a mutant failed.
import { parseArgs } from "node:util";
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { judge, mutant, validCheckpoints } from "../packages/models/test/mutants.ts";

/** What the thread reports after each batch; `failure` ends it. */
interface Report {
  /** The first seed that was not tried yet. */
  readonly next: number;
  readonly accepted: number;
  readonly reasons: number;
  readonly slowest: { readonly seed: number; readonly ms: number };
  /** Of one mutant, in parts of its size. */
  readonly read: number;
  readonly largest: number;
  readonly failure?: string;
}

const batch = 500;
/** A mutant has a few kilobytes and takes a fifth of a millisecond; a busy machine may stop a thread for a while. */
const patience = 30_000;
/** MiB: a hundred times what reading the mutants takes. */
const heap = 192;

async function work({ from, to }: { readonly from: number; readonly to: number }): Promise<void> {
  const valid = await validCheckpoints();
  const reasons = new Set<string>();
  let [accepted, read, largest] = [0, 0, 0];
  let slowest = { seed: from, ms: 0 };
  const report = (next: number, failure?: string): void => {
    const figures: Report = { next, accepted, reasons: reasons.size, slowest, read, largest };
    parentPort?.postMessage(failure === undefined ? figures : { ...figures, failure });
  };
  report(from);
  for (let seed = from; seed < to; seed++) {
    const files = mutant(seed, valid);
    const start = performance.now();
    try {
      const verdict = await judge(files);
      reasons.add(verdict.outcome);
      if (verdict.outcome === "accepted") accepted++;
      read = Math.max(read, verdict.read);
      largest = Math.max(largest, verdict.largest);
    } catch (error) {
      report(seed, `mutant ${seed}: ${error instanceof Error ? error.stack : error}`);
      return;
    }
    const ms = performance.now() - start;
    if (ms > slowest.ms) slowest = { seed, ms };
    if ((seed + 1 - from) % batch === 0) report(seed + 1);
  }
  report(to);
}

/** A duration for people. */
const duration = (seconds: number): string =>
  seconds < 90 ? `${Math.round(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
const count = (n: number): string => n.toLocaleString("en-GB");

/** Runs the mutants, says what it sees, and answers the exit code. */
function fuzz({ mutants, seed, say }: { mutants: number; seed: number; say(line: string): void }): Promise<number> {
  const started = performance.now();
  const worker = new Worker(new URL(import.meta.url), {
    workerData: { from: seed, to: seed + mutants },
    resourceLimits: { maxOldGenerationSizeMb: heap },
  });
  let last: Report | undefined;
  let heard = started;
  let said = started;
  let peak = 0;
  let baseline = 0;
  return new Promise((resolve) => {
    let ended = false;
    const end = (code: number, line?: string): void => {
      if (ended) return;
      ended = true;
      clearInterval(timer);
      process.off("SIGINT", interrupt);
      if (line) say(line);
      if (last) {
        const done = last.next - seed;
        say(
          `${count(done)} mutants in ${duration((performance.now() - started) / 1000)}: ${count(last.accepted)} read, ` +
            `${count(Math.max(0, done - last.accepted))} refused for ${last.reasons} kinds of reasons; at most ` +
            `${last.read.toFixed(2)} of the files read and ${last.largest.toFixed(2)} in one array; slowest ` +
            `${last.slowest.ms.toFixed(1)} ms (mutant ${last.slowest.seed}); memory ${baseline} MiB, at most ${peak} MiB`,
        );
      }
      void worker.terminate().then(() => resolve(code));
    };
    const interrupt = (): void => end(130, "stopped");
    process.on("SIGINT", interrupt);
    const timer = setInterval(() => {
      const now = performance.now();
      const memory = Math.round(process.memoryUsage.rss() / 2 ** 20);
      peak = Math.max(peak, memory);
      // The heap has its usual size once the code is compiled.
      if (!last || last.next - seed < 20_000) baseline = memory;
      if (now - heard > patience) {
        const from = last?.next ?? seed;
        end(1, `no answer for ${duration(patience / 1000)}: one of the mutants ${from} to ${from + batch - 1} hangs`);
      } else if (last && now - said > 5000) {
        said = now;
        const done = last.next - seed;
        const left = done ? ((now - started) / done) * (mutants - done) : 0;
        say(`${count(done)} of ${count(mutants)}, about ${duration(left / 1000)} left`);
      }
    }, 100);
    worker.on("message", (report: Report) => {
      last = report;
      heard = performance.now();
      if (report.failure !== undefined) end(1, report.failure);
      else if (report.next === seed + mutants) end(0);
    });
    worker.on("error", (error: Error) => {
      const from = last?.next ?? seed;
      end(1, `the thread ended at one of the mutants ${from} to ${from + batch - 1}: ${error.message}`);
    });
  });
}

/** A whole number from `least`. Throws an Error that names the option. */
function whole(option: string, text: string, least: number): number {
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= least && value <= 2 ** 31) return value;
  throw new Error(`--${option} is ${text}; expected a whole number from ${least} to ${2 ** 31}`);
}

if (!isMainThread) await work(workerData);
else if (import.meta.main) {
  try {
    const { values } = parseArgs({
      options: { mutants: { type: "string", default: "1000000" }, seed: { type: "string", default: "0" } },
    });
    process.exitCode = await fuzz({
      mutants: whole("mutants", values.mutants, 1),
      seed: whole("seed", values.seed, 0),
      say: (line) => console.log(line),
    });
  } catch (error) {
    console.error(`fuzz: ${error instanceof Error ? error.message : error}`);
    process.exitCode = 1;
  }
}
