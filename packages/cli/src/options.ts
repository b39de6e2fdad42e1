// What the user asked for, checked: every wrong value is refused in one line that names the option and what it takes.
import { UnsupportedError } from "@switchyard/core";
import * as v from "valibot";
import { type BackendName, backendNames } from "./backends.ts";
import { defaultRouters } from "./routers.ts";
import type { sizes } from "./sizes.ts";

const sizeNames = ["tiny", "small", "base"] as const satisfies readonly (keyof typeof sizes)[];

/** "90s", "3m", "1.5h", or minutes. */
export function seconds(text: string): number | undefined {
  const [, number, unit = "m"] = /^(\d+(?:\.\d+)?)\s*(s|m|h|min|sec)?$/.exec(text.trim()) ?? [];
  if (number === undefined) return undefined;
  const factor = unit.startsWith("s") ? 1 : unit === "h" ? 3600 : 60;
  return Number(number) * factor;
}

const duration = v.pipe(
  v.string(),
  v.check((text) => (seconds(text) ?? 0) > 0, "takes a time such as 90s, 3m or 1h"),
  v.transform((text) => seconds(text) ?? 0),
);

const whole = (least: number, most = 2 ** 31 - 1): v.GenericSchema<string, number> =>
  v.pipe(
    v.string(),
    v.check(
      (text) => /^\d+$/.test(text) && Number(text) >= least && Number(text) <= most,
      `takes a whole number from ${least}`,
    ),
    v.transform(Number),
  );

const list: v.GenericSchema<string, string[]> = v.pipe(
  v.string(),
  v.transform((text) =>
    text
      .split(",")
      .map((part) => part.trim())
      .filter((part) => part !== ""),
  ),
  v.check((parts) => parts.length > 0, "takes names, separated by commas"),
);

const argsSchema = v.object({
  time: v.optional(duration),
  steps: v.optional(whole(1)),
  size: v.optional(v.picklist(sizeNames, `takes ${sizeNames.join(", ")}`), "small"),
  router: v.optional(list, defaultRouters.join(",")),
  backend: v.optional(v.picklist(backendNames, `takes ${backendNames.join(", ")}`), "wasm"),
  threads: v.optional(whole(1, 256)),
  seed: v.optional(whole(0), "1"),
  seeds: v.optional(whole(1, 1000), "1"),
  out: v.optional(v.pipe(v.string(), v.nonEmpty("takes a folder")), "runs"),
  name: v.optional(
    v.pipe(v.string(), v.regex(/^[\w.-]*\w[\w.-]*$/, "takes letters, digits, dots, dashes and underscores")),
  ),
  resume: v.optional(v.pipe(v.string(), v.nonEmpty("takes the folder of a run"))),
  json: v.optional(v.boolean(), false),
});

export type TrainArgs = v.InferOutput<typeof argsSchema>;

/** The options of `switchyard train`, as strings from the command line. @throws UnsupportedError that names the option. */
export function checkArgs(given: Readonly<Record<string, unknown>>): TrainArgs {
  const checked = v.safeParse(argsSchema, given);
  if (checked.success) return checked.output;
  const [issue] = checked.issues;
  const name = v.getDotPath(issue) ?? "";
  throw new UnsupportedError(`--${name} ${issue.message}, found ${JSON.stringify(given[name])}`);
}

/** What decides a run's numbers: kept with the run, so that a resumed one has the same. */
export interface RunSettings {
  /** Files and folders of text, absolute; absent: the corpora that came with the program. */
  readonly paths?: readonly string[];
  readonly size: (typeof sizeNames)[number];
  readonly routers: readonly string[];
  readonly backend: BackendName;
  readonly seed: number;
  readonly seeds: number;
}

/** The file `run.json`. */
export interface RunFile {
  readonly schema: "switchyard/run/1";
  readonly name: string;
  readonly created: string;
  readonly settings: RunSettings;
  /** Steps of every run: measured once, then fixed. */
  readonly steps: number;
  /** SHA-256 of the text, as it was split. */
  readonly text: string;
  /** SHA-256 of the files of routers that are not ours, by the router's label. */
  readonly plugins?: Readonly<Record<string, string>>;
  /** Seconds of the run before it was resumed. */
  readonly seconds: number;
}

export const runFileSchema: v.GenericSchema<RunFile> = v.object({
  schema: v.literal("switchyard/run/1"),
  name: v.string(),
  created: v.pipe(v.string(), v.isoTimestamp()),
  settings: v.object({
    paths: v.exactOptional(v.array(v.string())),
    size: v.picklist(sizeNames),
    routers: v.array(v.string()),
    backend: v.picklist(backendNames),
    seed: v.number(),
    seeds: v.number(),
  }),
  steps: v.pipe(v.number(), v.integer(), v.minValue(1)),
  text: v.string(),
  plugins: v.exactOptional(v.record(v.string(), v.string())),
  seconds: v.number(),
});
