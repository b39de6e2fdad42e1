// The job behind `switchyard train`: text, tokenizer, yardsticks, one run per router and seed, table, report. It only wires packages together.
import { createHash } from "node:crypto";
import { existsSync, readdirSync, rmdirSync } from "node:fs";
import { createRequire } from "node:module";
import { availableParallelism, cpus, totalmem } from "node:os";
import { basename, join, relative, resolve } from "node:path";
import {
  type Baseline,
  byteModel,
  byteModelBits,
  type Codec,
  type Contender,
  type Corpus,
  compareRouters,
  type Domain,
  domainRecords,
  extrasOf,
  measureSpeed,
  parseJson,
  parseResults,
  prepare,
  type Results,
  type RunResult,
  readCorpus,
  readText,
  renderReport,
  splitCorpora,
  stepsThatFit,
  summarise,
  type TrainingSettings,
  writableFolder,
  writeWhole,
} from "@switchyard/bench";
import { type Engine, random, UnsupportedError } from "@switchyard/core";
import { adamw, cosineDecay, warmUp } from "@switchyard/core/train";
import {
  generate,
  languageModelTask,
  parameterCounts,
  readSnapshot,
  saveModel,
  type Tokenizer,
  tokenizer,
  trainTokenizer,
  transformer,
  writeSnapshot,
} from "@switchyard/models";
import { count } from "./arguments.ts";
import { openBackend } from "./backends.ts";
import { type RunFile, type RunSettings, runFileSchema, type TrainArgs } from "./options.ts";
import { probeTraces } from "./probe-traces.ts";
import { allNamed, expertSizes, type NamedRouter, routersFrom } from "./routers.ts";
import { type Size, sizes } from "./sizes.ts";
import { parseSpecification } from "./specification.ts";
import type { Display } from "./terminal.ts";

export interface TrainContext {
  /** Text to take when no path is given. */
  readonly corpora?: () => readonly Corpus[];
  /** How the user started this, for the line that says how to resume: "switchyard train". */
  readonly command: string;
  readonly display: Display;
  readonly signal: AbortSignal;
}

export interface Outcome {
  /** "stopped": before anything could be saved. */
  readonly status: "complete" | "interrupted" | "stopped";
  readonly folder: string;
  readonly results?: Results;
}

const require = createRequire(import.meta.url);

export function versions(): Record<string, string> {
  const packages = ["core", "routers", "kernels", "models", "bench"].map((name) => `@switchyard/${name}`);
  const version = (name: string): string => (require(`${name}/package.json`) as { version: string }).version;
  return { node: process.versions.node, ...Object.fromEntries(packages.map((name) => [name, version(name)])) };
}

export function machine(): Record<string, string | number> {
  return {
    processor: cpus()[0]?.model.trim() ?? "unknown",
    cores: availableParallelism(),
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    system: `${process.platform} ${process.arch}`,
  };
}

/** One hash over the text as it was split: a resumed run must see the same. */
function fingerprint(domains: readonly Domain[]): string {
  const hash = createHash("sha256");
  for (const { name, training, validation } of domains) {
    hash.update(JSON.stringify([name, training.length, validation.length]));
    for (const block of [...training, ...validation]) hash.update(block);
  }
  return hash.digest("hex");
}

const runFileName = "run.json";

const portable = (specification: string): string => parseSpecification(specification).portable;

/** Where the run lives and what it was told, from the command line or from the run that is resumed. */
function plan(
  args: TrainArgs,
  paths: readonly string[],
  now: Date,
): { folder: string; settings: RunSettings; earlier?: RunFile } {
  if (args.resume !== undefined) {
    const folder = args.resume;
    const file = join(folder, runFileName);
    if (!existsSync(file)) {
      const found = existsSync(folder) ? `${folder} holds no ${runFileName}` : `there is no folder ${folder}`;
      throw new UnsupportedError(`--resume: ${found}; give the folder of a run, such as runs/${defaultName(now)}`);
    }
    const earlier = parseJson(runFileSchema, readText(file), file);
    if (paths.length > 0) {
      const own = earlier.settings.paths?.join(" ") ?? "the text that came with the program";
      throw new UnsupportedError(`--resume takes the run's own text (${own}); leave out ${paths.join(" ")}`);
    }
    return { folder, settings: earlier.settings, earlier };
  }
  const folder = join(args.out, args.name ?? defaultName(now));
  if (existsSync(folder) && readdirSync(folder).length > 0) {
    throw new UnsupportedError(
      `${folder} is not empty; choose another --name, or continue that run with --resume ${folder}`,
    );
  }
  const { size, router: routers, backend, seed, seeds } = args;
  const where = paths.length === 0 ? {} : { paths: paths.map((path) => resolve(path)) };
  return { folder, settings: { ...where, size, routers: allNamed(routers).map(portable), backend, seed, seeds } };
}

/** A resumed run must find the routers of files and packages as they were. */
function samePlugins(routers: readonly NamedRouter[], { plugins = {} }: RunFile): void {
  for (const { label, digest } of routers) {
    if (digest === plugins[label]) continue;
    throw new UnsupportedError(
      `--resume: the file of router "${label}" has changed since this run was started; start a new run`,
    );
  }
}

/** Seconds for all runs where nothing is said: three minutes for up to five routers, and as much for each further one. */
export const defaultTime = (routers: number): number => 36 * Math.max(5, routers);

/** "2026-01-02-0304": when it began, in local time. */
function defaultName(now: Date): string {
  const two = (x: number): string => String(x).padStart(2, "0");
  return `${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}`;
}

function trainingOf(size: Size): TrainingSettings {
  const { rows, length, learningRate, weightDecay, warmUp: share } = size;
  return {
    rows,
    length,
    clip: 1,
    optimiser: () => adamw({ learningRate, weightDecay, beta1: 0.9, beta2: 0.98 }),
    schedule: (totalSteps) => warmUp(Math.max(1, Math.round(share * totalSteps)), cosineDecay({ final: 0.02 })),
  };
}

/** How often each id occurs in the training text. */
function countTokens(streams: readonly Int32Array[], vocabulary: number): Float64Array {
  const counts = new Float64Array(vocabulary);
  for (const stream of streams) for (const id of stream) counts[id] = (counts[id] ?? 0) + 1;
  return counts;
}

/** What the comparison trains for one router. */
export function contenderOf(
  host: Engine,
  { label, plugin, hooks }: NamedRouter,
  size: Size,
  { text, tokenCounts }: { readonly text: Tokenizer; readonly tokenCounts: Float64Array },
): Contender {
  const sized = expertSizes(plugin, size);
  const config = {
    vocabulary: text.vocabulary,
    tokenCounts,
    width: size.width,
    layers: size.layers,
    heads: size.heads,
    kvHeads: size.kvHeads,
    experts: sized.experts,
    hidden: sized.expertWidth,
    router: plugin,
    context: 2 * size.length,
    tieEmbeddings: size.tieEmbeddings,
    qkNorm: "projection" as const, // as OLMoE has it, so that a top-k model can be saved in its layout
  };
  const { total, active } = parameterCounts(config);
  return {
    ...(hooks ? { hooks: () => hooks(size.layers) } : {}),
    name: label,
    ...sized,
    subject(seed, batch) {
      const model = transformer(host, config, random(host, seed));
      return {
        task: languageModelTask(model, { batch }),
        parameters: { total, active: Math.round(active) },
        async generate(params, buffers, prompt, count, start) {
          const ids: number[] = [];
          const written = generate(model.with({ params, buffers }), {
            prompt,
            maxNew: count,
            seed: start,
            temperature: 0.7,
            topP: 0.9,
          });
          for await (const { id } of written) ids.push(id);
          return Int32Array.from(ids);
        },
        async save(params, buffers, folder) {
          await saveModel(model.with({ params, buffers }), folder, { tokenizer: text });
        },
      };
    },
  };
}

function codecOf(text: Tokenizer): Codec {
  const [separator = 0] = text.special.values();
  return {
    vocabulary: text.vocabulary,
    separator,
    encode: (part) => text.encode(part),
    bytes: (ids) => text.bytes(ids),
  };
}

function baselinesOf(domains: readonly Domain[]): readonly Baseline[] {
  const model = byteModel(
    domains.flatMap(({ training }) => training),
    3,
  );
  return [2, 3].map((order) => {
    const perDomain = domains.map(({ validation }) => Number(byteModelBits(model, validation, order).toFixed(5)));
    const bitsPerByte = Number((perDomain.reduce((sum, x) => sum + x, 0) / perDomain.length).toFixed(5));
    return { name: `order-${order} byte model`, order, bitsPerByte, perDomain };
  });
}

/** Trains, measures, saves; everything it leaves lies in the run's folder. @throws the packages' errors, each one clear line. */
export async function train(args: TrainArgs, paths: readonly string[], context: TrainContext): Promise<Outcome> {
  const started = performance.now();
  const { folder, settings, earlier } = plan(args, paths, new Date());
  const routers = await routersFrom(settings.routers);
  if (earlier !== undefined) samePlugins(routers, earlier);
  const size: Size = sizes[settings.size];
  for (const { plugin } of routers) expertSizes(plugin, size);
  const corpora = corporaOf(settings, context);
  const domains = splitCorpora(corpora, { seed: settings.seed });
  const text = fingerprint(domains);
  if (earlier !== undefined && earlier.text !== text) {
    throw new UnsupportedError(`--resume: the text has changed since ${folder} was started; start a new run`);
  }
  const before = earlier === undefined ? undefined : earlierResults(folder);
  if (before?.complete) return { status: "complete", folder, results: before };
  const fresh = !existsSync(folder);
  writableFolder(folder);
  try {
    return await inFolder(args, context, {
      folder,
      settings,
      routers,
      size,
      corpora,
      domains,
      text,
      started,
      ...(earlier ? { earlier } : {}),
    });
  } finally {
    // A folder made for a run that never began is not left behind.
    if (fresh && readdirSync(folder).length === 0) rmdirSync(folder);
  }
}

function corporaOf({ paths }: RunSettings, { corpora, command }: TrainContext): readonly Corpus[] {
  if (paths !== undefined) return paths.map((path) => readCorpus(path));
  const given = corpora?.();
  if (given !== undefined) return given;
  throw new UnsupportedError(`no text: give files or folders, for example ${command} novel.txt speeches/`);
}

interface Job {
  readonly folder: string;
  readonly settings: RunSettings;
  readonly routers: readonly NamedRouter[];
  readonly size: Size;
  readonly corpora: readonly Corpus[];
  readonly domains: readonly Domain[];
  readonly text: string;
  readonly earlier?: RunFile;
  /** On the clock of performance.now(). */
  readonly started: number;
}

async function inFolder(args: TrainArgs, context: TrainContext, job: Job): Promise<Outcome> {
  const { folder, settings, routers, size, domains, earlier, started } = job;
  const { display, signal } = context;
  const elapsed = (): number => (earlier?.seconds ?? 0) + (performance.now() - started) / 1000;
  const done = (earlier === undefined ? undefined : earlierResults(folder))?.runs ?? [];
  const seeds = Array.from({ length: settings.seeds }, (_, i) => settings.seed + i);
  display.note(describe(job));

  const baselines = baselinesOf(domains);
  const files = await trainTokenizer(
    domains.flatMap(({ training }) => training.map((block) => new TextDecoder().decode(block))),
    { vocabulary: size.vocabulary },
  );
  const words = tokenizer(files);
  const training = trainingOf(size);
  const sampleTokens = Math.min(100, size.length);
  const prepared = prepare(domains, codecOf(words), training);
  if (signal.aborted) return { status: "stopped", folder };

  const host = await openBackend(settings.backend, args.threads);
  try {
    const tokenCounts = countTokens(prepared.streams, words.vocabulary);
    const contenders = routers.map((router) => contenderOf(host, router, size, { text: words, tokenCounts }));
    const created = earlier?.created ?? new Date().toISOString();
    let steps = earlier?.steps ?? args.steps;
    if (steps === undefined) {
      display.note("Measuring the speed of each router ...");
      const speeds = await measureSpeed({ engine: host, contenders, training, signal }, prepared);
      if (signal.aborted) return { status: "stopped", folder };
      steps = stepsThatFit((args.time ?? defaultTime(routers.length)) - elapsed(), speeds, {
        seeds: seeds.length,
        extras: extrasOf(prepared, { sampleTokens }),
      });
    }
    const each = `${count(steps, "step")}, ${size.rows} x ${size.length} tokens each`;
    display.note(`${count(routers.length * seeds.length, "run")} of ${each}`);
    const plugins = Object.fromEntries(routers.flatMap(({ label, digest }) => (digest ? [[label, digest]] : [])));
    const runFile = (): RunFile => ({
      schema: "switchyard/run/1",
      name: basename(resolve(folder)),
      created,
      settings,
      steps: steps ?? 0,
      text: job.text,
      ...(Object.keys(plugins).length > 0 ? { plugins } : {}),
      seconds: elapsed(),
    });
    const write = (runs: readonly RunResult[], complete: boolean): Results => {
      const results: Results = {
        schema: "switchyard/results/1",
        name: basename(resolve(folder)),
        created,
        complete,
        seconds: Number(elapsed().toFixed(1)),
        versions: versions(),
        machine: machine(),
        settings: settingsRecord(job, steps ?? 0, seeds, host.name, words.vocabulary, args.threads),
        domains: domainRecords(domains),
        baselines,
        runs,
        summary: summarise(runs),
      };
      writeWhole(join(folder, "report.html"), [renderReport(results)]);
      writeWhole(join(folder, runFileName), [`${JSON.stringify(runFile(), null, 2)}\n`]);
      // Last: what says "complete" must not stand beside a missing report.
      writeWhole(join(folder, "results.json"), [`${JSON.stringify(results)}\n`]);
      return results;
    };
    const finished: RunResult[] = [...done];
    writeWhole(join(folder, runFileName), [`${JSON.stringify(runFile(), null, 2)}\n`]);
    const { status, runs } = await compareRouters(
      {
        engine: host,
        contenders,
        seeds,
        domains,
        codec: codecOf(words),
        training,
        steps,
        sampleTokens,
        folder,
        snapshots: { write: writeSnapshot, read: readSnapshot },
        traces: probeTraces(words),
        signal,
        done,
        onStep: (progress) => display.step(progress),
        onRun: (run) => {
          display.run(run);
          finished.push(run);
          write(finished, false);
        },
      },
      prepared,
    );
    return { status, folder, results: write(runs, status === "complete") };
  } finally {
    display.end();
    host.close();
  }
}

/** What the run wrote before it was resumed. */
function earlierResults(folder: string): Results | undefined {
  const file = join(folder, "results.json");
  return existsSync(file) ? parseResults(readText(file), file) : undefined;
}

function describe({ corpora, domains, routers, settings }: Job): string {
  const parts = domains.map(({ name, training, validation }, i) => {
    const bytes = [...training, ...validation].reduce((sum, block) => sum + block.length, 0);
    const skipped = corpora[i]?.skipped ?? 0;
    return `${name} ${(bytes / 1e6).toFixed(2)} MB${skipped > 0 ? ` (${count(skipped, "file")} without text passed over)` : ""}`;
  });
  return `Text: ${parts.join(", ")}\nRouters: ${routers.map(({ label }) => label).join(", ")}; size ${settings.size}`;
}

function settingsRecord(
  { settings, size, routers }: Job,
  steps: number,
  seeds: readonly number[],
  backend: string,
  vocabulary: number,
  threads: number | undefined,
): Results["settings"] {
  const { rows, length, width, layers, heads, kvHeads, learningRate, weightDecay, warmUp: share } = size;
  return {
    size: settings.size,
    routers: routers.map(({ label }) => label),
    seeds,
    steps,
    batch: `${rows} x ${length} tokens`,
    model: `width ${width}, ${layers} layers, ${heads} heads (${kvHeads} for keys and values), vocabulary ${vocabulary}`,
    experts: `${size.experts} of ${size.expertWidth} at two per token, others at equal active parameters`,
    optimiser: `AdamW, learning rate ${learningRate}, weight decay ${weightDecay}, betas 0.9 and 0.98, clipped at 1`,
    schedule: `${100 * share} % warm-up, then a cosine to 2 %`,
    sampling: "temperature 0.7, top-p 0.9",
    backend,
    ...(threads === undefined ? {} : { threads }),
    text: settings.paths ?? "built in",
  };
}

/** The folder as the user would type it. */
export const shownPath = (folder: string): string => relative(process.cwd(), resolve(folder)) || ".";
