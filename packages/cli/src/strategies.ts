// Decoding strategies by name, with the options of `switchyard generate` that each takes.
import { UnsupportedError } from "@switchyard/core";
import {
  type DecodingModel,
  type DecodingStrategy,
  type DecodingStrategyName,
  decodingStrategies,
  type SelfConsistencyOptions,
} from "@switchyard/models";
import type { ArgsDef } from "citty";
import type { Given } from "./arguments.ts";

export const strategyNames = Object.keys(decodingStrategies) as readonly DecodingStrategyName[];

export const strategyArgs = {
  temperature: {
    type: "string",
    description: "Divides the logits before sampling; 0 takes the most likely token",
    valueHint: "X",
  },
  "top-k": { type: "string", description: "Samples among the N most likely tokens", valueHint: "N" },
  "top-p": {
    type: "string",
    description: "Samples among the most likely tokens whose probabilities reach X",
    valueHint: "X",
  },
  "min-p": {
    type: "string",
    description: "Samples among tokens with at least this share of the largest probability",
    valueHint: "X",
  },
  "repetition-penalty": {
    type: "string",
    description: "Makes tokens that were there already less likely; above 1",
    valueHint: "X",
  },
  alpha: {
    type: "string",
    description:
      "Share of the largest probability below which a token is out; of contrastiveSearch the weight of likeness",
    valueHint: "X",
  },
  beta: { type: "string", description: "How far to move away from the weak logits", valueHint: "X" },
  "weak-rank": {
    type: "string",
    description: "The expert that the weak pass uses alone, 1 being the best; random: any, drawn for every token",
    valueHint: "N",
  },
  "strong-experts": {
    type: "string",
    description: "Experts per token of the strong pass (default: as trained)",
    valueHint: "N",
  },
  draw: { type: "boolean", description: "Draws from what the contrast gives instead of taking the largest" },
  amateur: { type: "string", description: "Folder of the weaker model", valueHint: "DIR" },
  experts: { type: "string", description: "Experts per token; of dynamicRouting at most", valueHint: "N" },
  threshold: { type: "string", description: "As few experts as have probabilities of this sum", valueHint: "X" },
  layers: {
    type: "string",
    description: "Layers to contrast with: low, high, or numbers separated by commas",
    valueHint: "LIST",
  },
  candidates: { type: "string", description: "Tokens to choose among", valueHint: "N" },
  beams: { type: "string", description: "Beginnings that are followed at once", valueHint: "N" },
  "length-penalty": { type: "string", description: "Above 0 favours long texts", valueHint: "X" },
  samples: { type: "string", description: "Texts that vote", valueHint: "N" },
  answer: {
    type: "string",
    description: "Regular expression that finds the answer in a text: its first group, or all of it",
    valueHint: "REGEX",
  },
} as const satisfies ArgsDef;

type Option = keyof typeof strategyArgs;
const sampling = ["temperature", "top-k", "top-p", "min-p", "repetition-penalty"] as const satisfies readonly Option[];
const contrasting = ["alpha", "beta", "draw"] as const satisfies readonly Option[];

/** Which options a strategy takes. */
export const optionsOf: Readonly<Record<DecodingStrategyName, readonly Option[]>> = {
  greedy: ["repetition-penalty"],
  sample: sampling,
  beam: ["beams", "length-penalty"],
  selfContrast: [...contrasting, "weak-rank", "strong-experts"],
  contrastive: [...contrasting, "amateur"],
  contrastiveSearch: ["alpha", "candidates"],
  doLa: ["alpha", "layers", ...sampling],
  dynamicRouting: ["threshold", "experts", ...sampling],
  ensembleRouting: ["experts", ...sampling],
  selfConsistency: ["samples", "answer", ...sampling],
};

/** Options that make rows of one batch; many more than anyone uses. */
const mostRows: { readonly [O in Option]?: number } = { beams: 256, candidates: 256, samples: 1024 };
const whyRows = "each is computed at once with the others, with keys and values of its own in memory";

export interface ChosenStrategy {
  readonly name: DecodingStrategyName;
  /** Folder of the amateur, where the strategy needs one. */
  readonly amateur?: string;
  /** @throws ShapeError for options out of range. */
  make(amateur?: DecodingModel): DecodingStrategy;
}

/** Leaves out what was not given. */
function defined<T extends Record<string, unknown>>(options: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  return Object.fromEntries(given) as { [K in keyof T]?: Exclude<T[K], undefined> };
}

function layersOf(text: string | undefined): "low" | "high" | number[] | undefined {
  if (text === undefined || text === "low" || text === "high") return text;
  const parts = text.split(",").map((part) => part.trim());
  if (parts.every((part) => /^\d{1,6}$/.test(part))) return parts.map(Number);
  throw new UnsupportedError(`--layers takes low, high or numbers such as 0,2,4, found ${JSON.stringify(text)}`);
}

function answerOf(text: string | undefined): SelfConsistencyOptions["answer"] {
  if (text === undefined) {
    throw new UnsupportedError("--strategy selfConsistency needs --answer REGEX, such as --answer '-?[0-9]+$'");
  }
  let pattern: RegExp;
  try {
    pattern = new RegExp(text, "u");
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new UnsupportedError(`--answer takes a regular expression: ${why}`, { cause });
  }
  return ({ text: said }) => {
    const found = pattern.exec(said);
    return found?.[1] ?? found?.[0];
  };
}

/** The strategy that the arguments name. @throws UnsupportedError for an unknown one and options of another. */
export function chosenStrategy(given: Given): ChosenStrategy {
  const present = (Object.keys(strategyArgs) as Option[]).filter((option) => {
    return strategyArgs[option].type === "boolean" ? given.flag(option) : given.text(option) !== undefined;
  });
  const name =
    given.choice("strategy", strategyNames) ??
    (present.some((option) => option !== "repetition-penalty" && sampling.some((one) => one === option))
      ? "sample"
      : "greedy");
  const foreign = present.find((option) => !optionsOf[name].includes(option));
  if (foreign !== undefined) {
    const takers = strategyNames.filter((one) => optionsOf[one].includes(foreign)).join(", ");
    const own = optionsOf[name].map((option) => `--${option}`).join(", ");
    throw new UnsupportedError(`--${foreign} is for --strategy ${takers}; ${name} takes ${own}`);
  }
  const number = (option: Option, from = 0): number | undefined => given.number(option, { from });
  const whole = (option: Option): number | undefined => {
    const most = mostRows[option];
    return given.whole(option, { from: 1, ...(most === undefined ? {} : { to: most, why: whyRows }) });
  };
  const samplingOptions = defined({
    temperature: number("temperature"),
    topK: whole("top-k"),
    topP: number("top-p"),
    minP: number("min-p"),
    repetitionPenalty: number("repetition-penalty"),
  });
  const contrast = defined({ alpha: number("alpha"), beta: number("beta"), sample: given.flag("draw") || undefined });
  const make: Readonly<Record<DecodingStrategyName, (amateur?: DecodingModel) => DecodingStrategy>> = {
    greedy: () => decodingStrategies.greedy(defined({ repetitionPenalty: samplingOptions.repetitionPenalty })),
    sample: () => decodingStrategies.sample(samplingOptions),
    beam: () =>
      decodingStrategies.beam(
        defined({ width: whole("beams"), lengthPenalty: number("length-penalty", Number.NEGATIVE_INFINITY) }),
      ),
    selfContrast() {
      const k = whole("strong-experts");
      const strong = k === undefined ? undefined : { k };
      const weak =
        given.text("weak-rank") === "random" ? { weak: { random: 0 } } : defined({ weakRank: whole("weak-rank") });
      return decodingStrategies.selfContrast({ ...contrast, ...weak, ...defined({ strong }) });
    },
    contrastive(amateur) {
      if (!amateur) throw new UnsupportedError("--strategy contrastive needs --amateur DIR, a smaller model");
      return decodingStrategies.contrastive({ ...contrast, amateur });
    },
    contrastiveSearch: () =>
      decodingStrategies.contrastiveSearch(defined({ alpha: number("alpha"), candidates: whole("candidates") })),
    doLa: () =>
      decodingStrategies.doLa({
        ...samplingOptions,
        ...defined({ alpha: number("alpha"), layers: layersOf(given.text("layers")) }),
      }),
    dynamicRouting: () =>
      decodingStrategies.dynamicRouting({
        ...samplingOptions,
        ...defined({ threshold: number("threshold"), k: whole("experts") }),
      }),
    ensembleRouting: () =>
      decodingStrategies.ensembleRouting({ ...samplingOptions, ...defined({ k: whole("experts") }) }),
    selfConsistency: () =>
      decodingStrategies.selfConsistency({
        answer: answerOf(given.text("answer")),
        ...defined({ samples: whole("samples") }),
        ...(Object.keys(samplingOptions).length > 0
          ? { strategy: decodingStrategies.sample({ temperature: 0.7, ...samplingOptions }) }
          : {}),
      }),
  };
  const amateur = given.text("amateur");
  // Wrong options are refused before a model is loaded.
  if (amateur === undefined) make[name]();
  return { name, ...(amateur === undefined ? {} : { amateur }), make: (model) => make[name](model) };
}
