// What a fine-tuning run tells: finetune.json, and the lines for people.
import type { Tensor, Tree } from "@switchyard/core";
import { leaves } from "@switchyard/core";
import type { ExpertConfig, StepReport } from "@switchyard/core/train";
import {
  isLora,
  layerOf,
  partOf,
  type TunedCertificate,
  type TuningPart,
  tuningParts,
} from "@switchyard/models/tuning";
import { count, table } from "../arguments.ts";
import { clock } from "../terminal.ts";
import { machine, versions } from "../train.ts";
import type { TuningText } from "./data.ts";
import type { Settings } from "./settings.ts";
import type { Measured, State } from "./state.ts";

export const finetuneFile = "finetune.json";

/** What was trained. */
export interface Trained {
  /** Parameters that learned: of chosen experts only theirs, of adapters their own. */
  readonly parameters: number;
  /** Of the model. */
  readonly of: number;
  readonly parts: readonly { readonly part: TuningPart; readonly tensors: number; readonly parameters: number }[];
  /** Paths of the trained tensors in the model. */
  readonly tensors: readonly string[];
  /** By layer, where not all were. */
  readonly experts?: ExpertConfig["experts"];
}

/** Counts the parameters of a task. */
export function trainedParts(
  params: Tree,
  { experts, total }: { readonly experts: ExpertConfig | undefined; readonly total: number },
): Trained {
  const found = new Map<TuningPart, { tensors: number; parameters: number }>();
  const tensors: string[] = [];
  const seen = new Set<Tensor>();
  for (const [path, x] of leaves(params)) {
    // What layers share is one parameter.
    if (seen.has(x)) continue;
    seen.add(x);
    const { size, shape } = x;
    const part = partOf(path);
    const chosen = experts && part === "experts" ? experts.experts[layerOf(path) ?? ""] : undefined;
    const share = chosen ? chosen.length / (shape[0] ?? 1) : 1;
    if (share === 0) continue;
    const own = found.get(part) ?? { tensors: 0, parameters: 0 };
    found.set(part, { tensors: own.tensors + 1, parameters: own.parameters + size * share });
    tensors.push(path);
  }
  const parts = tuningParts.flatMap((part) => {
    const own = found.get(part);
    return own ? [{ part, ...own }] : [];
  });
  return {
    parameters: parts.reduce((sum, { parameters }) => sum + parameters, 0),
    of: total,
    parts,
    tensors,
    ...(experts ? { experts: experts.experts } : {}),
  };
}

/** The file finetune.json, and what --json prints. */
export interface FinetuneResult {
  readonly schema: "switchyard/finetune/1";
  readonly model: string;
  readonly source: string;
  readonly target: string;
  readonly created: string;
  readonly seconds: number;
  readonly settings: Settings & { readonly steps: number; readonly threads?: number; readonly optimiser: string };
  readonly text: {
    readonly files: TuningText["files"];
    readonly training: number;
    readonly heldOut: number;
    readonly sha256: string;
  };
  readonly trained: Trained;
  readonly before: Measured;
  readonly after: Measured;
  /** By step. */
  readonly training: { readonly loss: readonly number[]; readonly learningRate: readonly number[] };
  readonly tokens: number;
  readonly tokensPerSecond: number;
  readonly certificate: Pick<TunedCertificate, "changed" | "totals" | "values" | "tensors"> & {
    readonly files: TunedCertificate["files"]["target"];
  };
  readonly versions: Readonly<Record<string, string>>;
  readonly machine: Readonly<Record<string, string | number>>;
}

/** What training leaves for after the model is closed. */
export interface Done {
  readonly state: State;
  readonly trained: Trained;
  readonly history: readonly StepReport[];
  readonly certificate: TunedCertificate;
  readonly model: string;
  readonly text: TuningText;
}

export function resultOf(
  run: Done & {
    readonly target: string;
    readonly after: Measured;
    readonly seconds: number;
    readonly threads: number | undefined;
  },
): FinetuneResult {
  const { state, trained, history, certificate, model, text, target, after, threads } = run;
  const tokens = history.reduce((sum, step) => sum + step.tokens, 0);
  const seconds = history.reduce((sum, step) => sum + step.seconds, 0);
  const { changed, totals, values, tensors, files } = certificate;
  const { settings, steps } = state;
  return {
    schema: "switchyard/finetune/1",
    model,
    source: settings.source,
    target,
    created: state.created,
    seconds: Number(run.seconds.toFixed(1)),
    settings: {
      ...settings,
      steps,
      ...(threads === undefined ? {} : { threads }),
      optimiser:
        "AdamW, betas 0.9 and 0.999, no weight decay, clipped at 1; 5 % warm-up, then a cosine to 10 % of the learning rate",
    },
    text: {
      files: text.files,
      training: text.training.length,
      heldOut: text.files.reduce((sum, { heldOut }) => sum + heldOut, 0),
      sha256: state.text,
    },
    trained,
    before: state.before,
    after,
    training: {
      loss: history.map(({ loss }) => Number(loss.toPrecision(7))),
      learningRate: history.map(({ learningRate }) => Number(learningRate.toPrecision(4))),
    },
    tokens,
    tokensPerSecond: Number((tokens / Math.max(1e-9, seconds)).toFixed(1)),
    certificate: { changed, totals, values, tensors, files: files.target },
    versions: versions(),
    machine: machine(),
  };
}

const shownCount = (n: number): string =>
  n >= 1e9 ? `${(n / 1e9).toFixed(2)} billion` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} million` : `${Math.round(n)}`;

/** "0, 1, 5" of every layer, equal layers together. */
function expertLines(experts: ExpertConfig["experts"]): string[] {
  const groups = new Map<string, string[]>();
  for (const [layer, ids] of Object.entries(experts)) {
    const text = ids.length === 0 ? "none" : [...ids].sort((a, b) => a - b).join(", ");
    groups.set(text, [...(groups.get(text) ?? []), layer]);
  }
  return [...groups].map(
    ([ids, layers]) => `  ${layers.length === 1 ? "layer" : "layers"} ${layers.join(", ")}: ${ids}`,
  );
}

/** What a person should know about the numbers. */
function hints({ before, after, certificate: { values }, settings }: FinetuneResult): string[] {
  const unshown = values.unshown / Math.max(1, values.changed);
  return [
    ...(after.loss > before.loss
      ? ["The loss on the held-out text rose: try fewer steps, a lower --lr or more text."]
      : []),
    ...(unshown > 0.5
      ? [
          `Most changes were lost in that rounding: try a higher --lr than ${settings.learningRate}, or tune a copy in f32 ` +
            "(switchyard convert DIR COPY --dtype f32).",
        ]
      : []),
  ];
}

/** `out` as it was typed. */
export function resultText(result: FinetuneResult, out: string): string {
  const { before, after, trained, certificate, settings, seconds, tokens } = result;
  const { totals, values } = certificate;
  const row = (name: string, of: (measured: Measured) => number | undefined, digits: number): string[][] => {
    const [then, now] = [of(before), of(after)];
    return then === undefined || now === undefined ? [] : [[name, then.toFixed(digits), now.toFixed(digits)]];
  };
  const rows = [
    ["held-out text", "before", "after"],
    ...row("loss", ({ loss }) => loss, 4),
    ...row("perplexity", ({ perplexity }) => perplexity, 3),
    ...row("bits per byte", ({ bitsPerByte }) => bitsPerByte, 4),
  ];
  const share = (100 * trained.parameters) / trained.of;
  const adapters = trained.tensors.some(isLora);
  const model = `${shownCount(trained.of)} parameters`;
  const whole = adapters
    ? `${shownCount(trained.parameters)} parameters of low-rank matrices (rank ${settings.rank}) beside ${model}`
    : `${shownCount(trained.parameters)} of ${model} (${share.toFixed(share < 1 ? 2 : 0)} %)`;
  const unshown = (100 * values.unshown) / Math.max(1, values.changed);
  const parts = trained.parts.map(({ part, tensors, parameters }) => [
    `  ${part}`,
    shownCount(parameters),
    `in ${count(tensors, "tensor")}`,
  ]);
  return `${[
    `${result.model}: ${count(settings.steps, "step")}, ${tokens} tokens, ${clock(seconds)}`,
    "",
    table(rows),
    "",
    `trained  ${whole}`,
    table(parts),
    ...(trained.experts ? ["chosen experts", ...expertLines(trained.experts)] : []),
    `kept     ${totals.kept} of ${count(totals.tensors, "tensor")} byte-identical`,
    `rounded  ${unshown.toFixed(1)} % of ${shownCount(values.changed)} changes are too small for the stored type`,
    ...hints(result),
    "",
    `Saved: ${out}`,
  ].join("\n")}\n`;
}
