// What the comparison is told: models, text and settings as values, and the text prepared for every run alike.
import type { Engine, Tree } from "@switchyard/core";
import type { TrainingHook } from "@switchyard/core/moe";
import {
  type Optimiser,
  type Schedule,
  type Task,
  type Trainer,
  type TrainerSnapshot,
  trainer,
} from "@switchyard/core/train";
import {
  heldOutWindows,
  inBatches,
  type NoisedBatch,
  noised,
  spreadOut,
  type TokenBatch,
  tokenStream,
} from "./batches.ts";
import { byteLength, type Domain } from "./corpus.ts";
import type { DomainRecord, RunResult } from "./results.ts";

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
  /** What its method does to training beside routing, made anew for every run. */
  hooks?(): readonly TrainingHook[];
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

/** How a trainer's state goes to a file and back, for example `writeSnapshot` and `readSnapshot` of @switchyard/models. */
export interface SnapshotFiles {
  /** Replaces the file whole or not at all. */
  write(path: string, snapshot: TrainerSnapshot): Promise<void>;
  /** Rejects with a CheckpointError for a damaged file. */
  read(path: string): Promise<TrainerSnapshot>;
}

/** One MoE layer's decisions for a list of tokens; several plans of a layer stand beside each other. */
export interface LayerDecisions {
  /** "dense": the layer needs every expert for every token. */
  readonly plan: "sparse" | "dense";
  /** Real experts; null ones have the ids after theirs. */
  readonly experts: number;
  readonly nulls: number;
  /** Ids per token. */
  readonly slots: number;
  /** `[tokens, slots]`, -1 = empty. */
  readonly ids: Int32Array;
  /** `[tokens, slots]`, 0 where empty. */
  readonly weights: Float32Array;
  /** `[tokens, experts + nulls]`, where the router tells them. */
  readonly probabilities?: Float32Array;
}

/** Where the counted tokens of the probe went at one checkpoint: what a routing trace holds. */
export interface ProbeRouting {
  readonly router: string;
  readonly seed: number;
  readonly step: number;
  readonly totalSteps: number;
  /** Names of the domains. */
  readonly domains: readonly string[];
  /** A place in `domains` for each window of text. */
  readonly windows: readonly number[];
  /** `[tokens]`: which window. */
  readonly window: Uint32Array;
  /** `[tokens]`: which batch, that is tokens that were computed together. */
  readonly batch: Uint32Array;
  /** `[tokens]`: place in the window, from 0. Tokens that only give context are left out. */
  readonly position: Int32Array;
  /** `[tokens]` */
  readonly token: Int32Array;
  readonly layers: readonly LayerDecisions[];
}

/** How the routing of a checkpoint goes to a file. */
export interface TraceFiles {
  /** Replaces the file whole or not at all; its folder exists. */
  write(path: string, routing: ProbeRouting): Promise<void>;
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
  readonly snapshots: SnapshotFiles;
  /** Keeps the probe's routing at every checkpoint, in `traces/` of the folder; default: not kept. */
  readonly traces?: TraceFiles;
  /** Aborting it ends the comparison after the current step, with a snapshot. */
  readonly signal?: AbortSignal;
  /** Runs that were done before an interruption. */
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

/** Held-out text as every run sees it. */
export interface HeldOut {
  /** Per domain: all windows. */
  readonly all: readonly (readonly TokenBatch[])[];
  /** Per domain: windows spread over them, for the checkpoints on the way. */
  readonly probe: readonly (readonly TokenBatch[])[];
  /** The probe with some tokens replaced, batch by batch: how far routes hold when their surroundings change. */
  readonly noised: readonly (readonly NoisedBatch[])[];
}

/** Of the probe's tokens, how many are replaced in its noised copy. */
export const NOISE = 0.05;

/** The text in tokens. */
export interface Prepared {
  readonly streams: readonly Int32Array[];
  readonly heldOut: HeldOut;
  readonly tokenBytes: Uint16Array;
}

export const decodeText = (bytes: Uint8Array): string => new TextDecoder().decode(bytes);

/** Encodes all text. `probeTokens`: about how many tokens of each domain the checkpoints look at; default 576. */
export function prepare(
  domains: readonly Domain[],
  codec: Codec,
  { rows, length }: TrainingSettings,
  probeTokens = 576,
): Prepared {
  const encode = (blocks: readonly Uint8Array[]): Int32Array[] =>
    blocks.map((block) => codec.encode(decodeText(block)));
  const windows = domains.map(({ validation }) => heldOutWindows(encode(validation), codec.separator, length));
  const fewWindows = Math.max(1, Math.round(probeTokens / Math.ceil(0.75 * length)));
  const probe = windows.map((list) => inBatches(spreadOut(list, fewWindows), rows));
  return {
    streams: domains.map(({ training }) => tokenStream(encode(training), codec.separator)),
    heldOut: {
      all: windows.map((list) => inBatches(list, rows)),
      probe,
      noised: probe.map((list, domain) =>
        list.map((batch, i) => noised(batch, { share: NOISE, seed: 1000 * domain + i })),
      ),
    },
    tokenBytes: Uint16Array.from({ length: codec.vocabulary }, (_, id) =>
      id === codec.separator ? 0 : codec.bytes([id]).length,
    ),
  };
}

/** The trainer of one run. */
export function startTrainer(
  engine: Engine,
  subject: Subject,
  { optimiser, schedule, clip }: TrainingSettings,
  {
    seed,
    totalSteps,
    hooks = [],
  }: { readonly seed: number; readonly totalSteps: number; readonly hooks?: readonly TrainingHook[] },
): Trainer<TokenBatch> {
  return trainer(engine, subject.task, {
    hooks,
    optimiser: optimiser(),
    schedule: schedule(totalSteps),
    clip,
    seed,
    totalSteps,
  });
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
