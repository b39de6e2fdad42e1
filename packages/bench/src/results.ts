// The record of a comparison: what `results.json` holds, as types and as a schema that checks a file before anything relies on it.
import { CheckpointError } from "@switchyard/core";
import * as v from "valibot";

/** One MoE layer on the probe: the held-out tokens whose routing is followed through training. */
export interface LayerRouting {
  /** Share of the assignments: [domain][expert]; each row sums to 1. */
  readonly load: readonly (readonly number[])[];
  /** Entropy of a token's distribution over the experts over ln(experts): 0 certain, 1 undecided. */
  readonly entropy: number;
  /** Load of the busiest expert over the mean load: 1 is even. */
  readonly imbalance: number;
  /** Experts that no probe token chose. */
  readonly dead: number;
  /** Normalised mutual information of expert and domain, 0 to 1. */
  readonly specialisation: number;
  /** Experts a token went to, mean. */
  readonly expertsPerToken: number;
  /** The same for the tokens of each domain: [domain]. */
  readonly expertsByDomain: readonly number[];
  /** Share of the probe tokens whose set of experts changed since the checkpoint before; absent at the first. */
  readonly fluctuation?: number;
}

/** A checkpoint of a run: held-out loss and routing after `step` steps. */
export interface CheckpointRecord {
  readonly step: number;
  /** Equal-weight mean over the domains. */
  readonly bitsPerByte: number;
  /** In the order of `domains`. */
  readonly perDomain: readonly number[];
  readonly layers: readonly LayerRouting[];
  /** The probe's routing trace, relative to the results, with "/" between folders; absent where none was kept. */
  readonly trace?: string;
}

/** One MoE layer at the end of training, on the probe. */
export interface FinalLayer {
  /** Of the tokens that the first expert sees, the share that the second sees too: [expert][expert]; a dead expert's row is 0. */
  readonly together: readonly (readonly number[])[];
  /** Share of the pairs of experts, most frequent first, before 95 % of all meetings in a token are reached (2503.16057). */
  readonly combinations: number;
  /** How many tokens route differently when some others of their text are replaced. */
  readonly noised: {
    /** Share of the tokens whose set of experts is another one. */
    readonly sets: number;
    /** Mean share of a token's experts that are others. */
    readonly overlap: number;
    /** Share of the tokens whose first expert is another one. */
    readonly firsts: number;
  };
}

/** What is measured once, at the end of a run. */
export interface FinalRouting {
  /** Share of the tokens replaced in the noised probe. */
  readonly noise: number;
  /** Loss on the probe, and on the noised probe: same text to predict, some of the input replaced. */
  readonly bitsPerByte: { readonly clean: number; readonly noised: number };
  readonly layers: readonly FinalLayer[];
}

export interface SampleToken {
  readonly text: string;
  /** Per MoE layer: the experts chosen and their weights. */
  readonly layers: readonly { readonly experts: readonly number[]; readonly weights: readonly number[] }[];
}

export interface Sample {
  readonly prompt: string;
  /** What the model wrote after the prompt. */
  readonly text: string;
  /** Share of the words of `text` that occur in the training text. */
  readonly knownWords: number;
  /** The tokens of prompt and text. */
  readonly tokens: readonly SampleToken[];
}

/** One training run: one router, one seed. */
export interface RunResult {
  readonly router: string;
  readonly seed: number;
  readonly experts: number;
  readonly expertWidth: number;
  readonly parameters: { readonly total: number; readonly active: number };
  readonly steps: number;
  readonly tokens: number;
  /** Wall time of the training steps alone. */
  readonly seconds: number;
  readonly tokensPerSecond: number;
  /** One entry per step: loss in bits per byte of that step's batch, and the learning rate. */
  readonly training: { readonly bitsPerByte: readonly number[]; readonly learningRate: readonly number[] };
  readonly checkpoints: readonly CheckpointRecord[];
  readonly final: FinalRouting;
  readonly samples: readonly Sample[];
  /** The folder of the saved model, relative to the results. */
  readonly model: string;
  /** Why the run has no routing traces, where its router is the reason. */
  readonly untraced?: string;
}

/** A number over the seeds: the mean and, with two or more seeds, half the width of the 95 % interval. */
export interface OverSeeds {
  readonly mean: number;
  readonly halfWidth?: number;
}

/** One row of the table: a router over its seeds, at the end of training. */
export interface SummaryRow {
  readonly router: string;
  readonly seeds: number;
  readonly parameters: { readonly total: number; readonly active: number };
  readonly bitsPerByte: OverSeeds;
  readonly tokensPerSecond: OverSeeds;
  readonly imbalance: OverSeeds;
  /** Summed over the layers. */
  readonly dead: OverSeeds;
  readonly entropy: OverSeeds;
  readonly fluctuation: OverSeeds;
  /** Share of the tokens whose experts change under noise, mean over the layers. */
  readonly noised: OverSeeds;
  readonly specialisation: OverSeeds;
}

export interface Baseline {
  readonly name: string;
  readonly order: number;
  readonly bitsPerByte: number;
  readonly perDomain: readonly number[];
}

export interface DomainRecord {
  readonly name: string;
  readonly files: number;
  readonly trainingBytes: number;
  readonly validationBytes: number;
}

export interface Results {
  readonly schema: "switchyard/results/1";
  readonly name: string;
  /** ISO 8601, when the comparison was first started. */
  readonly created: string;
  /** False while runs are missing: the comparison was interrupted. */
  readonly complete: boolean;
  /** Wall time of the whole command, all parts of a resumed run added up. */
  readonly seconds: number;
  readonly versions: { readonly [name: string]: string };
  readonly machine: { readonly [name: string]: string | number };
  readonly settings: { readonly [name: string]: string | number | readonly string[] | readonly number[] };
  readonly domains: readonly DomainRecord[];
  readonly baselines: readonly Baseline[];
  readonly runs: readonly RunResult[];
  readonly summary: readonly SummaryRow[];
}

const count = v.pipe(v.number(), v.integer(), v.minValue(0));
const size = v.pipe(v.number(), v.finite(), v.minValue(0));
const share = v.pipe(v.number(), v.minValue(0), v.maxValue(1 + 1e-6));
const overSeeds = v.object({ mean: v.number(), halfWidth: v.exactOptional(size) });
const parameters = v.object({ total: count, active: count });

const layerRouting = v.object({
  load: v.array(v.array(share)),
  entropy: share,
  imbalance: size,
  dead: count,
  specialisation: share,
  expertsPerToken: size,
  expertsByDomain: v.array(size),
  fluctuation: v.exactOptional(share),
});

export const checkpointSchema: v.GenericSchema<CheckpointRecord> = v.object({
  step: count,
  bitsPerByte: size,
  perDomain: v.array(size),
  layers: v.array(layerRouting),
  trace: v.exactOptional(v.string()),
});

const final: v.GenericSchema<FinalRouting> = v.object({
  noise: share,
  bitsPerByte: v.object({ clean: size, noised: size }),
  layers: v.array(
    v.object({
      together: v.array(v.array(share)),
      combinations: share,
      noised: v.object({ sets: share, overlap: share, firsts: share }),
    }),
  ),
});

const sample = v.object({
  prompt: v.string(),
  text: v.string(),
  knownWords: share,
  tokens: v.array(
    v.object({
      text: v.string(),
      layers: v.array(v.object({ experts: v.array(count), weights: v.array(v.number()) })),
    }),
  ),
});

export const runSchema: v.GenericSchema<RunResult> = v.object({
  router: v.string(),
  seed: v.number(),
  experts: count,
  expertWidth: count,
  parameters,
  steps: count,
  tokens: count,
  seconds: size,
  tokensPerSecond: size,
  training: v.object({ bitsPerByte: v.array(size), learningRate: v.array(size) }),
  checkpoints: v.array(checkpointSchema),
  final,
  samples: v.array(sample),
  model: v.string(),
  untraced: v.exactOptional(v.string()),
});

export const resultsSchema: v.GenericSchema<Results> = v.object({
  schema: v.literal("switchyard/results/1"),
  name: v.string(),
  created: v.pipe(v.string(), v.isoTimestamp()),
  complete: v.boolean(),
  seconds: size,
  versions: v.record(v.string(), v.string()),
  machine: v.record(v.string(), v.union([v.string(), v.number()])),
  settings: v.record(v.string(), v.union([v.string(), v.number(), v.array(v.string()), v.array(v.number())])),
  domains: v.array(v.object({ name: v.string(), files: count, trainingBytes: count, validationBytes: count })),
  baselines: v.array(v.object({ name: v.string(), order: count, bitsPerByte: size, perDomain: v.array(size) })),
  runs: v.array(runSchema),
  summary: v.array(
    v.object({
      router: v.string(),
      seeds: count,
      parameters,
      bitsPerByte: overSeeds,
      tokensPerSecond: overSeeds,
      imbalance: overSeeds,
      dead: overSeeds,
      entropy: overSeeds,
      fluctuation: overSeeds,
      noised: overSeeds,
      specialisation: overSeeds,
    }),
  ),
});

/** The value, if it fits. @throws CheckpointError that names the file and the first place that does not. */
export function checked<T>(schema: v.GenericSchema<T>, value: unknown, file: string): T {
  const found = v.safeParse(schema, value);
  if (found.success) return found.output;
  const [issue] = found.issues;
  throw new CheckpointError(`${file}: ${v.getDotPath(issue) ?? "the whole"}: ${issue.message}`);
}

/** Reads JSON and checks it. @throws CheckpointError that names the file and the first place that does not fit. */
export function parseJson<T>(schema: v.GenericSchema<T>, text: string, file: string): T {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new CheckpointError(`${file}: not valid JSON (${error.message})`, { cause: error });
  }
  return checked(schema, value, file);
}

/** Reads `results.json`. @throws CheckpointError for text that is no JSON or does not fit the schema. */
export function parseResults(text: string, file = "results.json"): Results {
  return parseJson(resultsSchema, text, file);
}
