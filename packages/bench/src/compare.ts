// The comparison: every router trains the same model on the same batches, and what its routing did is recorded on the way.
// Nothing here knows a model, a router or a backend: they come in as values. Runs in Node (files, memory for all records).
import { join } from "node:path";
import { type Engine, type Tree, UnsupportedError } from "@switchyard/core";
import {
  type Optimiser,
  type Schedule,
  type Task,
  type Trainer,
  type TrainerSnapshot,
  trainer,
} from "@switchyard/core/train";
import * as v from "valibot";
import {
  countedBytes,
  countedTokens,
  heldOutWindows,
  inBatches,
  spreadOut,
  type TokenBatch,
  tokenStream,
  trainingBatches,
} from "./batches.ts";
import { byteLength, type Domain } from "./corpus.ts";
import { knownWords, words } from "./metrics.ts";
import { joined, type LayerChoices, layerRouting, type Moment, onlyTokens, watch } from "./probe.ts";
import {
  type CheckpointRecord,
  checkpointSchema,
  type DomainRecord,
  type RunResult,
  type Sample,
  type SampleToken,
} from "./results.ts";
import { readSnapshot, removeFile, writeSnapshot } from "./store.ts";

/** A fresh model with one router, made for one run. */
export interface Subject {
  readonly task: Task<TokenBatch>;
  /** `active`: those that work on one token. */
  readonly parameters: { readonly total: number; readonly active: number };
  /** `count` ids that follow the prompt, drawn with the seed. */
  generate(
    params: Tree,
    buffers: readonly Tree[],
    prompt: Int32Array,
    count: number,
    seed: number,
  ): Promise<Int32Array>;
  /** Saves the trained model into a folder, whole or not at all. */
  save(params: Tree, buffers: readonly Tree[], folder: string): Promise<void>;
}

/** What takes part: a router with its model's sizes. */
export interface Contender {
  /** Label, unique in the comparison: "topK", "topK:k=1". */
  readonly name: string;
  readonly experts: number;
  readonly expertWidth: number;
  subject(seed: number, batch: (index: number) => TokenBatch): Subject;
}

/** Text to ids and back, for all models alike. */
export interface Codec {
  readonly vocabulary: number;
  /** Id that stands before a text. */
  readonly separator: number;
  encode(text: string): Int32Array;
  bytes(ids: ArrayLike<number>): Uint8Array;
}

/** How every contender is trained. */
export interface TrainingSettings {
  readonly rows: number;
  /** Tokens in a row. */
  readonly length: number;
  readonly clip: number;
  readonly optimiser: () => Optimiser;
  readonly schedule: (totalSteps: number) => Schedule;
}

export interface ComparisonOptions {
  readonly engine: Engine;
  readonly contenders: readonly Contender[];
  readonly seeds: readonly number[];
  readonly domains: readonly Domain[];
  readonly codec: Codec;
  readonly training: TrainingSettings;
  /** Steps of every run. */
  readonly steps: number;
  /** Records of loss and routing per run, beside the one before training; default 8. */
  readonly checkpoints?: number;
  /** Tokens to write for every sample; default 100. 0: no samples. */
  readonly sampleTokens?: number;
  /** Where models and snapshots go. */
  readonly folder: string;
  /** Aborting it ends the comparison after the current step, with a snapshot. */
  readonly signal?: AbortSignal;
  /** Runs that are done, from an earlier session. */
  readonly done?: readonly RunResult[];
  readonly onStep?: (progress: Progress) => void;
  readonly onRun?: (run: RunResult) => void;
}

export interface Progress {
  readonly router: string;
  readonly seed: number;
  /** Which run of how many, from 0. */
  readonly run: number;
  readonly runs: number;
  /** Steps done of this run. */
  readonly step: number;
  readonly steps: number;
  readonly loss: number;
  readonly tokensPerSecond: number;
  /** Seconds this run still needs. */
  readonly secondsLeft: number;
}

export interface Comparison {
  readonly status: "complete" | "interrupted";
  readonly runs: readonly RunResult[];
}

const snapshotName = "interrupted.snapshot";
const saveEvery = 60; // seconds between snapshots that nobody asked for

/** What a snapshot holds beside the trainer's own state. */
interface RunState {
  readonly router: string;
  readonly seed: number;
  readonly seconds: number;
  readonly checkpoints: readonly CheckpointRecord[];
}

const stateSchema: v.GenericSchema<RunState> = v.object({
  router: v.string(),
  seed: v.number(),
  seconds: v.number(),
  checkpoints: v.array(checkpointSchema),
});

/** Held-out text as every run sees it. */
interface HeldOut {
  /** Per domain: all windows. */
  readonly all: readonly (readonly TokenBatch[])[];
  /** Per domain: windows spread over them, for the checkpoints on the way. */
  readonly probe: readonly (readonly TokenBatch[])[];
}

export interface Prepared {
  readonly streams: readonly Int32Array[];
  readonly heldOut: HeldOut;
  readonly tokenBytes: Uint16Array;
}

const decode = (bytes: Uint8Array): string => new TextDecoder().decode(bytes);

/** Encodes all text. `probeTokens`: about how many tokens of each domain the checkpoints look at; default 2048. */
export function prepare(
  domains: readonly Domain[],
  codec: Codec,
  { rows, length }: TrainingSettings,
  probeTokens = 2048,
): Prepared {
  const encode = (blocks: readonly Uint8Array[]): Int32Array[] => blocks.map((block) => codec.encode(decode(block)));
  const windows = domains.map(({ validation }) => heldOutWindows(encode(validation), codec.separator, length));
  const probeWindows = Math.max(1, Math.round(probeTokens / Math.ceil(0.75 * length)));
  return {
    streams: domains.map(({ training }) => tokenStream(encode(training), codec.separator)),
    heldOut: {
      all: windows.map((list) => inBatches(list, rows)),
      probe: windows.map((list) => inBatches(spreadOut(list, probeWindows), rows)),
    },
    tokenBytes: Uint16Array.from({ length: codec.vocabulary }, (_, id) =>
      id === codec.separator ? 0 : codec.bytes([id]).length,
    ),
  };
}

/** Seconds that a step of each contender takes, and that one batch of held-out text takes. */
export interface Speed {
  readonly step: number;
  readonly evaluation: number;
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;

async function timed(body: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await body();
  return (performance.now() - start) / 1000;
}

/** Trains throw-away models for a few steps each, on the first batches, and measures. Runs that follow start anew. */
export async function measureSpeed(
  options: Pick<ComparisonOptions, "engine" | "contenders" | "training" | "signal">,
  prepared: Prepared,
): Promise<readonly Speed[]> {
  const { engine, contenders, training, signal } = options;
  const speeds: Speed[] = [];
  for (const contender of contenders) {
    const subject = contender.subject(0, trainingBatches(prepared.streams, { ...training, seed: 0 }));
    const run = startTrainer(engine, subject, training, 0, 1000);
    try {
      for (let warm = 0; warm < 2 && !signal?.aborted; warm++) await run.step();
      const steps: number[] = [];
      for (let i = 0; i < 5 && !signal?.aborted; i++) steps.push(await timed(() => run.step()));
      const batch = prepared.heldOut.all[0]?.[0];
      const evaluations: number[] = [];
      for (let i = 0; i < 3 && batch !== undefined && !signal?.aborted; i++) {
        evaluations.push(await timed(() => run.evaluate([batch])));
      }
      speeds.push({ step: median(steps), evaluation: median(evaluations) });
    } finally {
      run.dispose();
    }
  }
  return speeds;
}

/**
 * Steps per run that fill `seconds` for all runs together, evaluations and samples included.
 * @throws UnsupportedError when not even ten steps fit.
 */
export function stepsThatFit(
  seconds: number,
  speeds: readonly Speed[],
  seeds: number,
  { heldOut }: Pick<Prepared, "heldOut">,
  checkpoints = 8,
): number {
  const batches = (list: HeldOut["all"]): number => list.reduce((sum, domain) => sum + domain.length, 0);
  const looks = batches(heldOut.all) + checkpoints * batches(heldOut.probe);
  const fixed = speeds.reduce((sum, { evaluation }) => sum + 1.15 * looks * evaluation, 0) * seeds;
  const perStep = speeds.reduce((sum, { step }) => sum + step, 0) * seeds;
  const steps = Math.floor((0.96 * seconds - fixed) / perStep);
  if (!(steps >= 10)) {
    throw new UnsupportedError(
      `${Math.max(0, Math.round(seconds))} seconds are too short for ${speeds.length * seeds} runs: ten steps and the evaluations need ` +
        `${Math.ceil((fixed + 10 * perStep) / 0.96)}; give more time, fewer routers or seeds, or a smaller size`,
    );
  }
  return steps;
}

function startTrainer(
  engine: Engine,
  subject: Subject,
  { optimiser, schedule, clip }: TrainingSettings,
  seed: number,
  totalSteps: number,
): Trainer<TokenBatch> {
  return trainer(engine, subject.task, {
    optimiser: optimiser(),
    schedule: schedule(totalSteps),
    clip,
    seed,
    totalSteps,
  });
}

/** The steps after which loss and routing are recorded: 0, the last one, and evenly between. */
export function checkpointSteps(steps: number, checkpoints: number): readonly number[] {
  return [...new Set(Array.from({ length: checkpoints + 1 }, (_, i) => Math.round((i * steps) / checkpoints)))];
}

/** Trains and measures every router with every seed; continues an interrupted comparison from its snapshot. */
export async function compareRouters(options: ComparisonOptions, prepared: Prepared): Promise<Comparison> {
  const { contenders, seeds, folder, signal, done = [] } = options;
  const runs: RunResult[] = [];
  const pairs = contenders.flatMap((contender) => seeds.map((seed) => ({ contender, seed })));
  for (const [index, { contender, seed }] of pairs.entries()) {
    const earlier = done.find((run) => run.router === contender.name && run.seed === seed);
    const run = earlier ?? (await oneRun(options, prepared, contender, seed, { index, count: pairs.length }));
    if (run === undefined) return { status: "interrupted", runs };
    runs.push(run);
    if (earlier === undefined) {
      options.onRun?.(run);
      removeFile(join(folder, snapshotName));
      if (signal?.aborted && index + 1 < pairs.length) return { status: "interrupted", runs };
    }
  }
  return { status: "complete", runs };
}

/** The folder of a run's model: letters, digits and what else every file system takes. */
export const modelFolder = (router: string, seed: number): string => `${router.replace(/[^\w.=-]+/g, "_")}-seed${seed}`;

async function oneRun(
  options: ComparisonOptions,
  prepared: Prepared,
  contender: Contender,
  seed: number,
  place: { readonly index: number; readonly count: number },
): Promise<RunResult | undefined> {
  const { engine, training, steps, folder, signal, checkpoints: wanted = 8 } = options;
  const batch = trainingBatches(prepared.streams, { ...training, seed });
  const subject = contender.subject(seed, batch);
  const run = startTrainer(engine, subject, training, seed, steps);
  const file = join(folder, snapshotName);
  try {
    let before: readonly LayerChoices[] | undefined;
    const records: CheckpointRecord[] = [];
    let seconds = 0;
    const resumed = resumable(file, contender.name, seed);
    if (resumed !== undefined) {
      run.restore(resumed.trainer);
      before = resumed.choices;
      records.push(...resumed.state.checkpoints);
      seconds = resumed.state.seconds;
    }
    const moment = (): Moment => ({
      engine,
      task: subject.task,
      params: run.params,
      buffers: run.buffers,
      experts: contender.experts,
      step: run.steps,
      totalSteps: steps,
    });
    let saved = performance.now();
    const save = async (): Promise<void> => {
      const state: RunState = { router: contender.name, seed, seconds, checkpoints: records };
      writeSnapshot(file, withChoices(await run.snapshot(), before ?? []), state);
      saved = performance.now();
    };
    let stepSeconds = 0;
    for (const until of checkpointSteps(steps, wanted)) {
      if (records.some(({ step }) => step >= until)) continue;
      if (run.steps < until) {
        const status = await run.run({
          until,
          ...(signal === undefined ? {} : { signal }),
          onStep: (report) => {
            seconds += report.seconds;
            stepSeconds = stepSeconds === 0 ? report.seconds : 0.9 * stepSeconds + 0.1 * report.seconds;
            options.onStep?.({
              router: contender.name,
              seed,
              run: place.index,
              runs: place.count,
              step: report.step + 1,
              steps,
              loss: report.loss,
              tokensPerSecond: report.tokens / Math.max(1e-9, stepSeconds),
              secondsLeft: (steps - report.step - 1) * stepSeconds,
            });
          },
        });
        if (status === "aborted") {
          await save();
          return undefined;
        }
      }
      const last = until === steps;
      const look = await lookAt(moment(), prepared, prepared.heldOut.probe, before);
      before = look.choices;
      const loss = last ? await measured(run, prepared) : look;
      records.push({ step: until, bitsPerByte: loss.bitsPerByte, perDomain: loss.perDomain, layers: look.layers });
      if (signal?.aborted && !last) {
        await save();
        return undefined;
      }
      if (!last && performance.now() - saved > saveEvery * 1000) await save();
    }
    const samples = await writeSamples(options, subject, moment(), seed);
    const model = modelFolder(contender.name, seed);
    await subject.save(run.params, run.buffers, join(folder, model));
    const tokens = run.history.reduce((sum, report) => sum + report.tokens, 0);
    return {
      router: contender.name,
      seed,
      experts: contender.experts,
      expertWidth: contender.expertWidth,
      parameters: subject.parameters,
      steps,
      tokens,
      seconds: rounded(seconds, 3),
      tokensPerSecond: rounded(tokens / Math.max(1e-9, seconds), 1),
      training: {
        bitsPerByte: run.history.map(({ loss, step }) => {
          const one = batch(step);
          return rounded(bits(loss * countedTokens(one), countedBytes(one, prepared.tokenBytes)), 5);
        }),
        learningRate: run.history.map(({ learningRate }) => rounded(learningRate, 8)),
      },
      checkpoints: records,
      samples,
      model,
    };
  } finally {
    run.dispose();
  }
}

const rounded = (x: number, digits: number): number => Number(x.toFixed(digits));
const bits = (nats: number, bytes: number): number => nats / Math.LN2 / Math.max(1, bytes);
const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / Math.max(1, values.length);

interface Loss {
  readonly bitsPerByte: number;
  readonly perDomain: readonly number[];
}

function lossOf(nats: readonly number[], batches: HeldOut["all"], { tokenBytes }: Prepared): Loss {
  const perDomain = nats.map((sum, d) => {
    const bytes = (batches[d] ?? []).reduce((total, batch) => total + countedBytes(batch, tokenBytes), 0);
    return rounded(bits(sum, bytes), 5);
  });
  return { bitsPerByte: rounded(mean(perDomain), 5), perDomain };
}

/** Loss on all held-out text: nats of the tokens over the bytes of the text they stand for, every domain weighing the same. */
async function measured(run: Trainer<TokenBatch>, prepared: Prepared): Promise<Loss> {
  const nats: number[] = [];
  for (const batches of prepared.heldOut.all) {
    let sum = 0;
    for (const batch of batches) sum += (await run.evaluate([batch])).loss * countedTokens(batch);
    nats.push(sum);
  }
  return lossOf(nats, prepared.heldOut.all, prepared);
}

/** Loss and routing on the probe, compared with the choices at the checkpoint before. */
async function lookAt(
  moment: Moment,
  prepared: Prepared,
  batches: HeldOut["probe"],
  before: readonly LayerChoices[] | undefined,
): Promise<Loss & Pick<CheckpointRecord, "layers"> & { readonly choices: readonly LayerChoices[] }> {
  const nats: number[] = [];
  const labels: number[] = [];
  const parts: LayerChoices[][] = moment.task.routers.map(() => []);
  for (const [domain, list] of batches.entries()) {
    let sum = 0;
    for (const batch of list) {
      const watched = await watch(moment, batch);
      sum += watched.nats;
      const counted = (token: number): boolean => (batch.labels[token] ?? -1) >= 0;
      for (const [layer, choices] of watched.layers.entries()) parts[layer]?.push(onlyTokens(choices, counted));
      for (let token = 0; token < batch.labels.length; token++) if (counted(token)) labels.push(domain);
    }
    nats.push(sum);
  }
  const choices = parts.map(joined);
  const domains = Uint8Array.from(labels);
  const layers = choices.map((now, layer) => layerRouting(now, domains, batches.length, before?.[layer]));
  return { ...lossOf(nats, batches, prepared), layers, choices };
}

const choicesName = "comparison.choices.";

/** The choices of the last checkpoint travel with the snapshot: fluctuation compares with them. */
function withChoices(snapshot: TrainerSnapshot, choices: readonly LayerChoices[]): TrainerSnapshot {
  const extra = choices.map(({ ids, k, experts }, layer) => [
    `${choicesName}${layer}`,
    { data: Int32Array.of(experts, k, ...ids), shape: [ids.length + 2], dtype: "i32" as const },
  ]);
  return { json: snapshot.json, arrays: { ...snapshot.arrays, ...Object.fromEntries(extra) } };
}

function resumable(file: string, router: string, seed: number) {
  const found = readSnapshot(file);
  if (found === undefined) return undefined;
  const state = v.parse(stateSchema, found.more);
  if (state.router !== router || state.seed !== seed) return undefined;
  const entries = Object.entries(found.snapshot.arrays);
  const choices = entries
    .filter(([name]) => name.startsWith(choicesName))
    .map(([, { data }]): LayerChoices => {
      const [experts = 0, k = 0] = data;
      const ids = Int32Array.from(data.subarray(2));
      return { experts, k, ids, weights: new Float32Array(ids.length), probabilities: new Float32Array(0) };
    });
  const arrays = Object.fromEntries(entries.filter(([name]) => !name.startsWith(choicesName)));
  return { state, trainer: { json: found.snapshot.json, arrays }, choices: choices.length === 0 ? undefined : choices };
}

const characters = (text: string, most: number): string => [...text].slice(0, most).join("");

/** Six words or less of a held-out block, from the first line that begins with fifteen characters of text: no model has seen them. */
export function promptFrom(block: Uint8Array): string {
  const lines = decode(block).split("\n").slice(1);
  for (const [i] of lines.entries()) {
    const [words] = /^\S+(?:\s\S+){0,5}/.exec(lines.slice(i, i + 3).join("\n")) ?? [""];
    if (words.length >= 15) return characters(words, 80);
  }
  return characters(decode(block).trimStart(), 40).trimEnd();
}

/** Texts of tokens; a character split over tokens goes to the last of them. */
function tokenTexts(ids: Int32Array, codec: Codec): readonly string[] {
  const decoder = new TextDecoder();
  const texts = [...ids].map((id) =>
    id === codec.separator ? "" : decoder.decode(codec.bytes([id]), { stream: true }),
  );
  const rest = decoder.decode();
  return texts.map((text, i) => (i === texts.length - 1 ? text + rest : text));
}

async function writeSamples(
  { domains, codec, sampleTokens = 100 }: ComparisonOptions,
  subject: Subject,
  moment: Moment,
  seed: number,
): Promise<readonly Sample[]> {
  if (sampleTokens === 0) return [];
  const vocabulary = new Set(domains.flatMap(({ training }) => training.flatMap((block) => words(decode(block)))));
  const samples: Sample[] = [];
  for (const [index, { validation }] of domains.entries()) {
    const prompt = promptFrom(validation[0] ?? new Uint8Array(0));
    const start = Int32Array.of(codec.separator, ...codec.encode(prompt));
    const { params, buffers } = moment;
    const written = await subject.generate(params, buffers, start, sampleTokens, seed * 1000 + index);
    const ids = Int32Array.of(...start, ...written);
    const { layers } = await watch(moment, {
      shape: [1, ids.length],
      ids,
      labels: new Int32Array(ids.length).fill(-1),
    });
    const tokens = tokenTexts(ids, codec).map(
      (text, token): SampleToken => ({
        text,
        layers: layers.map(({ k, experts, ids: chosen, weights }) => {
          const slots = Array.from({ length: k }, (_, j) => token * k + j).filter((at) => {
            const id = chosen[at] ?? -1;
            return id >= 0 && id < experts;
          });
          return {
            experts: slots.map((at) => chosen[at] ?? 0),
            weights: slots.map((at) => rounded(weights[at] ?? 0, 4)),
          };
        }),
      }),
    );
    const text = decode(codec.bytes(written.filter((id) => id !== codec.separator)));
    samples.push({ prompt, text, knownWords: rounded(knownWords(text, vocabulary), 4), tokens: tokens.slice(1) });
  }
  return samples;
}

/** Sizes of the domains as they were used. */
export function domainRecords(domains: readonly Domain[]): readonly DomainRecord[] {
  return domains.map(({ name, files, training, validation }) => ({
    name,
    files,
    trainingBytes: byteLength(training),
    validationBytes: byteLength(validation),
  }));
}
