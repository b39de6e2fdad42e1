// The command line: arguments in, exit code out. Errors a user can mend are one line; anything else is a fault of ours and shows its stack.
import { createRequire } from "node:module";
import { basename, join } from "node:path";
import { type Corpus, tableText } from "@switchyard/bench";
import { CheckpointError, DeviceError, MissingPackageError, ShapeError, UnsupportedError } from "@switchyard/core";
import { type ArgsDef, defineCommand, parseArgs } from "citty";
import { backendNames } from "./backends.ts";
import { cacheSim } from "./cache-sim.ts";
import { chat } from "./chat.ts";
import { convert } from "./convert.ts";
import { evaluate } from "./eval.ts";
import { finetune } from "./finetune/finetune.ts";
import { generate } from "./generate.ts";
import { inspect } from "./inspect.ts";
import { interruptible } from "./interrupt.ts";
import { logits } from "./logits.ts";
import { checkArgs } from "./options.ts";
import { defaultRouters, routerNames } from "./routers.ts";
import { serve } from "./serve/serve.ts";
import { display, processStreams, type Streams } from "./terminal.ts";
import { trace } from "./trace.ts";
import { type Outcome, shownPath, train } from "./train.ts";
import { usageText } from "./usage.ts";

export interface CommandLine {
  /** Text for `train` without paths. */
  readonly corpora?: () => readonly Corpus[];
  /** What starts `train`, for messages; default "switchyard train". */
  readonly command?: string;
  readonly streams?: Streams;
  /** What `chat` reads lines from; default: standard input. */
  readonly input?: NodeJS.ReadableStream;
  /** Ends a training run after its current step, as Ctrl-C does. */
  readonly signal?: AbortSignal;
}

const trainArgs = {
  time: {
    type: "string",
    description: "Time for all runs together: 90s, 3m, 1h (default 3m, more for more than five routers)",
    valueHint: "TIME",
  },
  steps: { type: "string", description: "Steps per run, instead of a time", valueHint: "N" },
  size: { type: "string", description: "tiny, small or base (default small)", valueHint: "SIZE" },
  router: {
    type: "string",
    description: `Routers, separated by commas, options after colons, wrappers after plus signs: topK:k=1,reMoE+jitter; your own by ./file.ts or package; all: every one that fits (default ${defaultRouters.join(",")}; known: ${routerNames.join(", ")})`,
    valueHint: "A,B,C",
  },
  backend: {
    type: "string",
    description: `${backendNames.join(", ")} (default wasm; cpu is the slow reference; the others need their package)`,
    valueHint: "NAME",
  },
  threads: {
    type: "string",
    description: "Threads of the wasm backend (default: what the machine has)",
    valueHint: "N",
  },
  seed: { type: "string", description: "Seed of text, weights and batches (default 1)", valueHint: "N" },
  seeds: {
    type: "string",
    description: "Runs per router, with seeds counted up; gives intervals (default 1)",
    valueHint: "N",
  },
  out: { type: "string", description: "Folder for runs (default runs)", valueHint: "DIR" },
  name: { type: "string", description: "Name of this run (default: date and time)", valueHint: "NAME" },
  resume: { type: "string", description: "Continue an interrupted run with its own settings", valueHint: "DIR" },
  json: { type: "boolean", description: "Print results.json instead of the table" },
} as const satisfies ArgsDef;

const trainCommand = defineCommand({
  meta: {
    name: "switchyard train",
    description: "Train small Mixture-of-Experts language models on text and compare their routers",
  },
  args: {
    paths: { type: "positional", description: "Text files or folders, each one domain", required: false },
    ...trainArgs,
  },
});

const overview = `switchyard: Mixture-of-Experts in TypeScript

  switchyard train PATH...      train small language models, compare routers
  switchyard finetune DIR OUT   train a checkpoint on your text
  switchyard generate DIR       generate text from a checkpoint
  switchyard chat DIR           talk with a checkpoint that has a chat template
  switchyard serve DIR          answer over HTTP, in the form of OpenAI's API
  switchyard eval DIR           perplexity and bits per byte on a text
  switchyard inspect DIR        what it is made of, and how it routes a text
  switchyard trace DIR          record the routing of a text; diff, report
  switchyard logits DIR         everything a checkpoint computes, as a file
  switchyard convert DIR OUT    rewrite it: float type, shards, layout
  switchyard cache-sim TRACE    what a cache of experts would hold and read

Each command explains itself with --help; --version names this version.
`;

const example = `
EXAMPLE

  switchyard train novel.txt speeches/ --router topK,reMoE:k=1 --time 5m
  switchyard train --resume runs/2026-01-02-0304
`;

type Command = (rest: readonly string[], options: CommandLine, streams: Streams) => Promise<number>;

const version = (createRequire(import.meta.url)("../package.json") as { readonly version: string }).version;

/** Each gets the arguments after its name and answers the exit code. */
const commands: ReadonlyMap<string, Command> = new Map<string, Command>([
  ["train", (rest, options, streams) => trainFrom(rest, options, streams)],
  ["finetune", finetune],
  ["generate", generate],
  ["chat", chat],
  ["serve", serve],
  ["eval", evaluate],
  ["inspect", inspect],
  ["trace", trace],
  ["logits", (rest, _, streams) => logits(rest, streams)],
  ["convert", convert],
  ["cache-sim", (rest, _, streams) => cacheSim(rest, streams)],
]);

/** Runs a command. Answers the exit code: 0, 1 for an error, 130 after Ctrl-C. */
export async function main(argv: readonly string[], options: CommandLine = {}): Promise<number> {
  const streams = options.streams ?? processStreams();
  const [command, ...rest] = argv;
  try {
    if (command === undefined || command === "--help" || command === "-h" || command === "help") {
      streams.out(overview);
      return 0;
    }
    // Not among other arguments, where it may be the text of a prompt.
    if ((command === "--version" || (rest[0] === "--version" && commands.has(command))) && rest.length < 2) {
      streams.out(`switchyard ${version}\n`);
      return 0;
    }
    const run = commands.get(command);
    if (run === undefined) {
      throw new UnsupportedError(
        `unknown command "${command}"; the commands are ${[...commands.keys()].join(", ")} and help`,
      );
    }
    return await run(rest, options, streams);
  } catch (error) {
    streams.error(`${errorText(error)}\n`);
    return 1;
  }
}

const ours = [ShapeError, UnsupportedError, CheckpointError, DeviceError, MissingPackageError];

function errorText(error: unknown): string {
  if (!(error instanceof Error)) return `switchyard: ${String(error)}`;
  // TypeError and its like are faults of the program; a plain Error or one of ours says what to do.
  const explained = ours.some((kind) => kind.isInstance(error)) || error.constructor === Error;
  return explained ? `switchyard: ${error.message}` : `switchyard: unexpected ${error.stack ?? error.message}`;
}

async function trainFrom(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  const { command = "switchyard train" } = options;
  if (rest.includes("--help") || rest.includes("-h")) {
    const usage = await usageText(trainCommand);
    streams.out(`${usage}\n${example.replaceAll("switchyard train", command)}`);
    return 0;
  }
  const { _: paths, ...given } = parseArgs<typeof trainArgs>([...rest], trainArgs);
  const unknown = Object.keys(given).find((name) => !(name in trainArgs));
  if (unknown !== undefined) {
    const known = Object.keys(trainArgs).map((name) => `--${name}`);
    throw new UnsupportedError(`unknown option --${unknown}; the options are ${known.join(", ")}`);
  }
  const args = checkArgs(given);
  if (args.resume !== undefined) {
    const kept = ["time", "steps", "size", "router", "backend", "seed", "seeds", "out", "name"].filter(
      (name) => given[name] !== undefined,
    );
    if (kept.length > 0)
      throw new UnsupportedError(`--resume keeps the run's own settings; leave out --${kept.join(", --")}`);
  }
  const screen = display(streams);
  const note = (): void => screen.note("Finishing this step, then saving. Ctrl-C again ends at once.");
  return interruptible(options, note, async (signal) => {
    try {
      const outcome = await train(args, paths, {
        ...(options.corpora === undefined ? {} : { corpora: options.corpora }),
        command,
        display: screen,
        signal,
      });
      return report(outcome, args.json, command, streams);
    } finally {
      screen.end();
    }
  });
}

function report({ status, folder, results }: Outcome, json: boolean, command: string, streams: Streams): number {
  const where = shownPath(folder);
  if (status === "stopped" || results === undefined) {
    streams.error("Stopped before training began; nothing to save.\n");
    return 130;
  }
  if (json) streams.out(`${JSON.stringify(results)}\n`);
  else if (results.runs.length > 0) {
    const [run] = results.runs;
    const sample = run?.samples[0];
    streams.out(`\n${tableText(results.summary, results.baselines)}\n`);
    if (run !== undefined && sample !== undefined) {
      const known = Math.round(100 * sample.knownWords);
      streams.out(
        `\n${run.router} writes (${known} % of the words occur in the training text):\n\n${sample.prompt}${sample.text}\n`,
      );
    }
  }
  if (status === "interrupted") {
    streams.error(`\nSaved. Continue with: ${command} --resume ${where}\n`);
    return 130;
  }
  if (!json)
    streams.out(
      `\nReport: ${join(where, "report.html")}\nModels: ${results.runs.map(({ model }) => join(where, basename(model))).join(", ")}\n`,
    );
  return 0;
}
