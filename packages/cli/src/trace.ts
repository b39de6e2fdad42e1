// `switchyard trace`: records the routing of a text, compares two records, and makes a report of one.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { traceReport, writableFolder, writeWhole } from "@switchyard/bench";
import { CheckpointError, UnsupportedError } from "@switchyard/core";
import {
  analyseTrace,
  diffTraces,
  fileSource,
  type LayerDifference,
  openCheckpoint,
  type RoutingDifference,
  readTokenizer,
  readTrace,
  type Tokenizer,
  type Trace,
  type TraceAnalysis,
  type TraceDifference,
  traceTexts,
  traceTokens,
} from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, exactly, readArguments, shownBytes, table } from "./arguments.ts";
import { interruptible } from "./interrupt.ts";
import type { CommandLine } from "./main.ts";
import { modelArgs, modelArguments, modelName, withModel } from "./model-arguments.ts";
import { progressBar } from "./progress.ts";
import { recordTexts, summaryOf, textArgs, textArguments } from "./recording.ts";
import type { Streams } from "./terminal.ts";
import { usageText } from "./usage.ts";

const recordArgs = {
  ...textArgs,
  out: { type: "string", alias: "o", description: "The trace to write, a new file", valueHint: "FILE" },
  logits: { type: "boolean", description: "Record the router's scores of all experts too, for an exact entropy" },
  ...modelArgs,
  json: { type: "boolean", description: "Print the summary as JSON" },
} as const satisfies ArgsDef;

const recordCommand = defineCommand({
  meta: { name: "switchyard trace", description: "Record which experts every token of a text goes to" },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...recordArgs,
  },
});

const example = `
  switchyard trace diff A B      how far two traces of a text differ
  switchyard trace report FILE   the HTML report of a trace
Both explain themselves with --help. A folder named diff or report is written
./diff, ./report.

EXAMPLE

  switchyard trace OLMoE-1B-7B --text novel.txt --text code.txt -o run.trace
  switchyard trace report run.trace -o run.html
`;

const diffArgs = { json: { type: "boolean", description: "Print everything as JSON" } } as const satisfies ArgsDef;
const diffCommand = defineCommand({
  meta: { name: "switchyard trace diff", description: "How far two traces of the same tokens route differently" },
  args: {
    a: { type: "positional", description: "A routing trace", required: true },
    b: { type: "positional", description: "Another one, of the same text", required: true },
    ...diffArgs,
  },
});
const diffExample = `
EXAMPLE

  switchyard trace diff before.trace after.trace
  cd runs/NAME/traces/topK-seed1
  switchyard trace diff step-0000.trace step-0400.trace

"other experts": tokens whose set of experts is another one. "replaced": the
mean part of a token's experts that is. "another first": tokens whose leading
expert is another one. Experts are compared by number: two models that did not
begin as one number theirs differently, and agree only as far as chance does.
`;

const reportArgs = {
  out: { type: "string", alias: "o", description: "The report to write (default: FILE.html)", valueHint: "FILE" },
  tokenizer: {
    type: "string",
    description: "A checkpoint whose tokenizer gives the text, where the trace does not name its tokens",
    valueHint: "DIR",
  },
} as const satisfies ArgsDef;
const reportCommand = defineCommand({
  meta: { name: "switchyard trace report", description: "Show a routing trace as one HTML file that needs no network" },
  args: { file: { type: "positional", description: "A routing trace", required: true }, ...reportArgs },
});
const reportExample = `
EXAMPLE

  switchyard trace report run.trace -o run.html
`;

/** Opens a trace, hands it over and closes it. */
export async function withTrace<T>(path: string, act: (trace: Trace) => Promise<T>): Promise<T> {
  const source = await fileSource(path);
  if (!source) throw new CheckpointError(`cannot read ${path}: there is no such file`);
  try {
    return await act(await readTrace(source));
  } finally {
    await source.close();
  }
}

/** The report of a trace as HTML. */
export async function reportOf(trace: Trace, analysis: TraceAnalysis, tokenizer?: Tokenizer): Promise<string> {
  const { header } = trace;
  const tokens = await traceTokens(trace);
  const named = tokenizer !== undefined || header.extra?.tokens !== undefined;
  return traceReport({
    analysis,
    tokens,
    ...(named ? { texts: traceTexts(tokens, { header, tokenizer }) } : {}),
    labelOf: (sequence) => header.sequences[sequence]?.label,
  });
}

/** Writes a report whole or not at all. */
export function writeReport(path: string, html: string): void {
  writableFolder(dirname(path));
  writeWhole(path, [html]);
}

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function trace(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  const [first, ...others] = rest;
  if (first === "diff") return diff(others, streams);
  if (first === "report") return report(others, streams);
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(recordCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("trace", recordArgs, rest);
  const args = modelArguments("trace", given);
  const path = given.text("out");
  if (path === undefined) throw new UnsupportedError("trace needs a file to write: -o FILE.trace");
  const texts = textArguments(given);
  if (texts.texts.length === 0) {
    throw new UnsupportedError("trace needs a text: --text FILE, or --ids 1,2,3; found neither");
  }
  const { expertBytes } = await summaryOf(args);
  const bar = progressBar(streams);
  const note = (): void => {
    bar.end();
    streams.error("Finishing this pass. Ctrl-C again ends at once.\n");
  };
  return interruptible(options, note, (signal) =>
    withModel(args, async (open) => {
      const how = { path, expertBytes, logits: given.flag("logits"), signal, bar };
      const { tokens, total } = await recordTexts(open, texts, how);
      if (tokens === 0) {
        streams.error("Stopped before anything was recorded.\n");
        return 130;
      }
      const bytes = readFileSync(path).length;
      const model = modelName(open);
      const complete = tokens === total;
      if (given.flag("json")) {
        const layers = open.model.routing.length;
        streams.out(
          `${JSON.stringify({ schema: "switchyard/trace/1", file: path, model, complete, tokens, layers, bytes })}\n`,
        );
      } else streams.out(`${model}: ${count(tokens, "token")}, ${shownBytes(bytes)} in ${path}\n`);
      if (!complete)
        streams.error(`Stopped after ${Math.floor((100 * tokens) / total)} %; what was recorded is kept.\n`);
      return complete ? 0 : 130;
    }),
  );
}

const layerName = ({ index, name }: LayerDifference): string => `layer ${index}${name === undefined ? "" : ` ${name}`}`;
const share = (x: number): string => `${(100 * x).toFixed(1)} %`;
const shares = ({ sets, overlap, firsts }: RoutingDifference): string[] => [sets, overlap, firsts].map(share);

async function diff(rest: readonly string[], streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(diffCommand)}\n${diffExample}`);
    return 0;
  }
  const given = readArguments("trace diff", diffArgs, rest);
  const [a = "", b = ""] = exactly(2, given, "trace diff takes two routing traces", "switchyard trace diff A B");
  const found = await withTrace(a, (one) => withTrace(b, (other) => diffTraces(one, other)));
  if (given.flag("json")) {
    streams.out(`${JSON.stringify({ schema: "switchyard/trace-diff/1", ...found })}\n`);
    return 0;
  }
  const head = ["other experts", "replaced", "another first"];
  const layers = found.layers.map((layer) => [layerName(layer), ...shares(layer)]);
  streams.out(`${a} and ${b}: ${found.tokens} tokens in both\n\n`);
  streams.out(`${table([["", ...head], ["all layers", ...shares(found.total)], ...layers])}\n`);
  if (found.labels.length > 0) {
    const rows = found.labels.map((label) => [label.name, ...shares(label), `${label.tokens}`]);
    streams.out(`\n${table([["all layers, by text", ...head, "tokens"], ...rows])}\n`);
    streams.out(byLayerAndText(found));
  }
  return 0;
}

/** More texts than this make lines too long to read; --json has them. */
const mostTexts = 6;

/** Tokens with other experts: a row per layer, a column per text. */
function byLayerAndText({ layers, labels }: TraceDifference): string {
  if (labels.length < 2 || layers.length < 2) return "";
  if (labels.length > mostTexts)
    return `\nOther experts by layer and text: --json has them for ${labels.length} texts.\n`;
  const rows = layers.map((layer) => [layerName(layer), ...layer.labels.map(({ sets }) => share(sets))]);
  return `\n${table([["other experts, by layer and text", ...labels.map(({ name }) => name)], ...rows])}\n`;
}

async function report(rest: readonly string[], streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(reportCommand)}\n${reportExample}`);
    return 0;
  }
  const given = readArguments("trace report", reportArgs, rest);
  const [path = ""] = exactly(1, given, "trace report takes one routing trace", "switchyard trace report run.trace");
  const out = given.text("out") ?? `${path}.html`;
  const folder = given.text("tokenizer");
  const tokenizer = folder === undefined ? undefined : await tokenizerOf(folder);
  const html = await withTrace(path, async (one) => reportOf(one, await analyseTrace(one), tokenizer));
  writeReport(out, html);
  streams.out(`Report: ${out} (${shownBytes(Buffer.byteLength(html))})\n`);
  return 0;
}

async function tokenizerOf(folder: string): Promise<Tokenizer> {
  const checkpoint = await openCheckpoint(folder);
  try {
    const { tokenizer, withoutTokenizer } = await readTokenizer(checkpoint);
    if (tokenizer) return tokenizer;
    throw new CheckpointError(`--tokenizer: ${withoutTokenizer ?? `${folder} has no tokenizer.json`}`);
  } finally {
    await checkpoint.close();
  }
}
