// What a fine-tuning run is told: the options of the command, and the settings that they make together with the model.
import { relative, resolve } from "node:path";
import { UnsupportedError } from "@switchyard/core";
import { type TuningPart, tuningParts } from "@switchyard/models/tuning";
import type { ArgsDef } from "citty";
import * as v from "valibot";
import type { Given } from "../arguments.ts";
import { type BackendName, backendNames } from "../backends.ts";
import { modelArgs } from "../model-arguments.ts";
import { seconds } from "../options.ts";

/** How ESFT weighs experts: by the mean gate (2407.01906, equation 5) or by how often they are chosen (equation 6). */
const esftKinds = ["gate", "token"] as const;

const { backend, threads, router, "follow-links": followLinks } = modelArgs;

export const finetuneArgs = {
  text: {
    type: "string",
    description: "A text file in UTF-8 to learn from; several, each with its own --text, are joined",
    valueHint: "FILE",
  },
  ids: {
    type: "string",
    description: "A file of token ids instead, apart by commas or white space, where the checkpoint has no tokenizer",
    valueHint: "FILE",
  },
  lora: {
    type: "string",
    description: `Train low-rank matrices beside those of these parts, and add them at the end: ${tuningParts.join(", ")}`,
    valueHint: "PARTS",
  },
  rank: { type: "string", description: "With --lora: the rank (default 8)", valueHint: "N" },
  alpha: {
    type: "string",
    description: "With --lora: alpha / rank scales what is added (default twice the rank)",
    valueHint: "X",
  },
  esft: {
    type: "string",
    description:
      "Train only the experts that the text uses: per layer the most relevant ones, until their relevance adds up to P (0.1 by gate, 0.2 by token are usual)",
    valueHint: "P",
  },
  "esft-by": {
    type: "string",
    description: "With --esft, relevance: gate, the mean weight, or token, how often chosen (default gate)",
    valueHint: "KIND",
  },
  experts: {
    type: "string",
    description: "Train the experts that this expert_cfg.json names, as --esft and the code of its paper write it",
    valueHint: "FILE",
  },
  steps: {
    type: "string",
    description: "Steps to train (default: three times through the text, but at most 10 minutes)",
    valueHint: "N",
  },
  time: {
    type: "string",
    description: "Time for everything instead: 90s, 10m, 1h. The speed is measured first",
    valueHint: "TIME",
  },
  lr: {
    type: "string",
    description:
      "Highest learning rate (default 0.04 / width of the model, that is 2e-5 at 2048; with --lora ten times that)",
    valueHint: "X",
  },
  rows: { type: "string", description: "Windows of text per step (default 4)", valueHint: "N" },
  length: {
    type: "string",
    description: "Tokens of a window (default: the model's context, at most 256)",
    valueHint: "N",
  },
  "hold-out": {
    type: "string",
    description:
      "Share at the end of each text that is not trained on but measured, one window at least (default 0.05)",
    valueHint: "X",
  },
  seed: { type: "string", description: "Seed of the order of windows and of --lora (default 1)", valueHint: "N" },
  "snapshot-every": {
    type: "string",
    description: "Time between snapshots, from which a run that was killed goes on (default 5m)",
    valueHint: "TIME",
  },
  resume: { type: "boolean", description: "Go on with the interrupted run in OUT, with its own settings" },
  replace: { type: "boolean", description: "Put the result in the place of the checkpoint that OUT holds" },
  backend,
  threads,
  router,
  "follow-links": followLinks,
  json: { type: "boolean", description: "Print everything that finetune.json holds, as JSON" },
} as const satisfies ArgsDef;

/** What decides the numbers of a run: kept with it, so that a resumed one has the same. Paths are absolute. */
export interface Settings {
  readonly source: string;
  readonly text?: readonly string[];
  readonly ids?: string;
  readonly lora?: readonly TuningPart[];
  readonly rank?: number;
  readonly alpha?: number;
  readonly esft?: number;
  readonly esftBy?: (typeof esftKinds)[number];
  readonly experts?: string;
  readonly steps?: number;
  /** Seconds. */
  readonly time?: number;
  readonly learningRate: number;
  readonly rows: number;
  readonly length: number;
  readonly holdOut: number;
  readonly seed: number;
  readonly backend: BackendName;
  readonly router?: string;
  readonly followLinks: boolean;
}

const whole = v.pipe(v.number(), v.integer(), v.minValue(1));

export const settingsSchema: v.GenericSchema<Settings> = v.object({
  source: v.string(),
  text: v.exactOptional(v.array(v.string())),
  ids: v.exactOptional(v.string()),
  lora: v.exactOptional(v.array(v.picklist(tuningParts))),
  rank: v.exactOptional(whole),
  alpha: v.exactOptional(v.number()),
  esft: v.exactOptional(v.number()),
  esftBy: v.exactOptional(v.picklist(esftKinds)),
  experts: v.exactOptional(v.string()),
  steps: v.exactOptional(whole),
  time: v.exactOptional(v.number()),
  learningRate: v.number(),
  rows: whole,
  length: whole,
  holdOut: v.number(),
  seed: v.number(),
  backend: v.picklist(backendNames),
  router: v.exactOptional(v.string()),
  followLinks: v.boolean(),
});

/** A path for people: as short as it is from here, absolute where that leads out of the working directory. */
export function shown(path: string): string {
  const short = relative(process.cwd(), path);
  return short === "" ? "." : short.startsWith("..") ? path : short;
}

/** What was given on the command line, nothing filled in. */
export type Asked = Partial<Settings>;

/** The option that says a setting, for messages. */
const optionOf: Readonly<Record<keyof Settings, string>> = {
  source: "DIR",
  text: "--text",
  ids: "--ids",
  lora: "--lora",
  rank: "--rank",
  alpha: "--alpha",
  esft: "--esft",
  esftBy: "--esft-by",
  experts: "--experts",
  steps: "--steps",
  time: "--time",
  learningRate: "--lr",
  rows: "--rows",
  length: "--length",
  holdOut: "--hold-out",
  seed: "--seed",
  backend: "--backend",
  router: "--router",
  followLinks: "--follow-links",
};

export interface Request {
  /** As it was typed. */
  readonly out: string;
  readonly asked: Asked;
  readonly resume: boolean;
  readonly replace: boolean;
  readonly threads: number | undefined;
  /** Seconds. */
  readonly snapshotEvery: number;
}

function duration(given: Given, name: string): number | undefined {
  const text = given.text(name);
  if (text === undefined) return undefined;
  const found = seconds(text) ?? 0;
  if (found > 0) return found;
  throw new UnsupportedError(`--${name} takes a time such as 90s, 10m or 1h, found ${JSON.stringify(text)}`);
}

/** The same record without what is undefined. */
function present<T extends Readonly<Record<string, unknown>>>(
  record: T,
): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>;
  };
}

function partsOf(given: Given): readonly TuningPart[] | undefined {
  return given.list("lora")?.map((name) => {
    const part = tuningParts.find((one) => one === name);
    if (part !== undefined) return part;
    throw new UnsupportedError(`--lora takes parts out of ${tuningParts.join(", ")}, found ${JSON.stringify(name)}`);
  });
}

/** The arguments, checked as far as that goes without reading a file. @throws UnsupportedError for what a user can mend. */
export function requestOf(given: Given): Request {
  const resume = given.flag("resume");
  const { positionals } = given;
  const fits = positionals.length === 2 || (resume && positionals.length === 1);
  if (!fits) {
    const found = positionals.map((one) => JSON.stringify(one)).join(", ") || "none";
    throw new UnsupportedError(
      `finetune takes a checkpoint folder and a folder to write to, found ${found}: switchyard finetune DIR OUT --text FILE, ` +
        "or switchyard finetune --resume OUT",
    );
  }
  const source = positionals.length === 2 ? positionals[0] : undefined;
  const texts = given.texts("text");
  const [ids, experts] = [given.text("ids"), given.text("experts")];
  const asked = present({
    source: source === undefined ? undefined : resolve(source),
    text: texts.length === 0 ? undefined : texts.map((path) => resolve(path)),
    ids: ids === undefined ? undefined : resolve(ids),
    lora: partsOf(given),
    rank: given.whole("rank", { from: 1, to: 65536 }),
    alpha: given.number("alpha", { from: 1e-6 }),
    esft: given.number("esft", { from: 1e-6, to: 1 }),
    esftBy: given.choice("esft-by", esftKinds),
    experts: experts === undefined ? undefined : resolve(experts),
    steps: given.whole("steps", { from: 1 }),
    time: duration(given, "time"),
    learningRate: given.number("lr", { from: 1e-12 }),
    rows: given.whole("rows", { from: 1, to: 65536 }),
    length: given.whole("length", { from: 2 }),
    holdOut: given.number("hold-out", { from: 0.001, to: 0.9 }),
    seed: given.whole("seed", { from: 0, to: 2 ** 31 - 1 }),
    backend: given.choice("backend", backendNames),
    router: given.text("router"),
    followLinks: given.flag("follow-links") || undefined,
  }) satisfies Asked;
  checkTogether(asked, resume);
  return {
    out: positionals.at(-1) ?? "",
    asked,
    resume,
    replace: given.flag("replace"),
    threads: given.whole("threads", { from: 1, to: 256 }),
    snapshotEvery: duration(given, "snapshot-every") ?? 300,
  };
}

/** Options that exclude or need each other. */
function checkTogether(asked: Asked, resume: boolean): void {
  const exclude = (names: readonly (keyof Settings)[], why: string): void => {
    const both = names.filter((name) => asked[name] !== undefined).map((name) => optionOf[name]);
    if (both.length > 1) throw new UnsupportedError(`${both.join(" and ")} exclude each other: ${why}`);
  };
  exclude(["text", "ids"], "give one of them");
  exclude(["steps", "time"], "give one of them");
  exclude(["esft", "experts"], "each says which experts are trained");
  // A resumed run has these settings already.
  if (resume) return;
  if (asked.text === undefined && asked.ids === undefined) {
    throw new UnsupportedError("finetune needs a text: --text FILE, or --ids FILE with token ids; found neither");
  }
  const need = (name: keyof Settings, other: keyof Settings): void => {
    if (asked[name] === undefined || asked[other] !== undefined) return;
    throw new UnsupportedError(`${optionOf[name]} goes with ${optionOf[other]}; give that too`);
  };
  need("rank", "lora");
  need("alpha", "lora");
  need("esftBy", "esft");
  if (asked.lora === undefined || asked.lora.includes("experts")) return;
  const chosen = (["esft", "experts"] as const).find((name) => asked[name] !== undefined);
  if (chosen === undefined) return;
  throw new UnsupportedError(
    `${optionOf[chosen]} says which experts are trained, but --lora ${asked.lora.join(",")} leaves experts out; name them too: ` +
      `--lora ${["experts", ...asked.lora].join(",")}`,
  );
}

/** Everything that was not asked filled in, for a model of this width and context. */
export function complete(asked: Asked, model: { readonly width: number; readonly context: number }): Settings {
  const { source = "", rank = 8, esftBy = "gate", lora, esft, ...others } = asked;
  const least = 0.04 / model.width;
  return {
    learningRate: Number((lora ? 10 * least : least).toPrecision(3)),
    rows: 4,
    length: Math.min(model.context, 256),
    holdOut: 0.05,
    seed: 1,
    backend: "wasm",
    followLinks: false,
    ...others,
    source,
    ...(lora ? { lora, rank, alpha: asked.alpha ?? 2 * rank } : {}),
    ...(esft === undefined ? {} : { esft, esftBy }),
  };
}

/** @throws UnsupportedError where an option says something else than the run that is resumed was told. */
export function sameSettings(asked: Asked, settings: Settings, out: string): void {
  for (const key of Object.keys(asked) as (keyof Settings)[]) {
    const [now, then] = [JSON.stringify(asked[key]), JSON.stringify(settings[key])];
    if (now === then) continue;
    const before = then === undefined ? "without it" : `with ${then}`;
    throw new UnsupportedError(
      `--resume keeps the run's own settings: it was started ${before}, now ${optionOf[key]} is ${now}; leave ${optionOf[key]} out, ` +
        `or start a new run in another folder than ${out}`,
    );
  }
}
