// `switchyard inspect`: what a checkpoint is made of, without loading it; with a text, what its routing does.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { shortCount, traceFindings, troubledExperts } from "@switchyard/bench";
import { UnsupportedError } from "@switchyard/core";
import { analyseTrace, type CheckpointSummary, type TraceAnalysis } from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, readArguments, shownBytes, table } from "./arguments.ts";
import { interruptible } from "./interrupt.ts";
import type { CommandLine } from "./main.ts";
import { modelArgs, modelArguments, withModel } from "./model-arguments.ts";
import { progressBar } from "./progress.ts";
import { recordTexts, summaryOf, textArgs, textArguments } from "./recording.ts";
import type { Streams } from "./terminal.ts";
import { reportOf, withTrace, writeReport } from "./trace.ts";
import { usageText, wrapped } from "./usage.ts";

const inspectArgs = {
  ...textArgs,
  out: { type: "string", alias: "o", description: "An HTML report of the routing, FILE.html", valueHint: "FILE" },
  ...modelArgs,
  json: { type: "boolean", description: "Print everything as JSON" },
} as const satisfies ArgsDef;

const inspectCommand = defineCommand({
  meta: {
    name: "switchyard inspect",
    description: "What a checkpoint is made of, from its headers; with a text, what its routing does",
  },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...inspectArgs,
  },
});

const example = `
EXAMPLE

  switchyard inspect OLMoE-1B-7B
  switchyard inspect OLMoE-1B-7B --text novel.txt --tokens 10000 --out routing.html

Without a text no weights are read. With one, a row per layer that routes:
  each      experts a token goes to, mean
  busiest   load of the busiest expert, times an even share
  weight    importance: the same for the summed weights of an expert
  dead      experts that no token chose
  over      experts with more than twice an even share
  evenness  entropy of the load: 1 all experts alike
  entropy   of a token's routing: 0 certain, 1 undecided
  pairs     share of the pairs of experts that make 95 % of all meetings
  told      what a token's expert in the layer before tells about this one
`;

const percent = (x: number, of: number): string => `${((100 * x) / Math.max(1, of)).toFixed(1)} %`;

function summaryText(folder: string, summary: CheckpointSummary): string {
  const { modelType, layers, width, vocabulary, context, parameters, bytes, parts, groups, expertBytes } = summary;
  const range = ({ from, to }: { from: number; to: number }): string =>
    from === to ? `layer ${from}` : `layers ${from} to ${to}`;
  const wide = Math.max(...groups.map((group) => range(group).length));
  const architecture = groups.flatMap((group) => [
    `${range(group).padEnd(wide)}  attention     ${group.attention}`,
    `${" ".repeat(wide)}  feed-forward  ${group.feedForward}`,
  ]);
  const rows = parts.map((part) => [
    part.name,
    shortCount(part.parameters),
    shownBytes(part.bytes),
    percent(part.bytes, bytes),
    part.types.join(" "),
  ]);
  return [
    `${folder} (${modelType}): ${count(layers, "layer")}, width ${width}, vocabulary ${vocabulary}, context ${context}`,
    "",
    ...architecture,
    "",
    `parameters  ${shortCount(parameters.total)} in all, ${shortCount(parameters.active)} (${percent(parameters.active, parameters.total)}) active for a token`,
    ...(expertBytes === undefined ? [] : [`one expert  ${shownBytes(expertBytes)}`]),
    "",
    table([
      ["part", "parameters", "bytes", "share", "stored as"],
      ...rows,
      ["all", shortCount(parameters.total), shownBytes(bytes)],
    ]),
    "",
  ].join("\n");
}

function routingText(analysis: TraceAnalysis): string {
  const { layers, transitions } = analysis;
  const told = new Map(transitions.map(({ to, told: share }) => [to, share]));
  const busiest = (values: readonly number[]): string => {
    const total = values.reduce((sum, x) => sum + x, 0);
    return total === 0 ? "0.00" : ((Math.max(...values) * values.length) / total).toFixed(2);
  };
  const rows = layers.map((layer, i) => [
    `${layer.index}${layer.name === undefined ? "" : ` ${layer.name}`}`,
    `${layer.experts}`,
    layer.expertsPerToken.toFixed(2),
    layer.imbalance.toFixed(2),
    layer.importance === undefined ? "" : busiest(layer.importance),
    `${layer.dead.length}`,
    `${layer.overloaded.length}`,
    layer.loadEntropy.toFixed(2),
    layer.entropy?.toFixed(2) ?? "",
    layer.combinations === undefined ? "" : `${Math.round(100 * layer.combinations)} %`,
    told.has(i) ? `${Math.round(100 * (told.get(i) ?? 0))} %` : "",
  ]);
  const head = [
    "layer",
    "experts",
    "each",
    "busiest",
    "weight",
    "dead",
    "over",
    "evenness",
    "entropy",
    "pairs",
    "told",
  ];
  const findings = traceFindings(analysis).map((line) => wrapped("*", line, 2));
  const troubled = troubledExperts(analysis, { overloaded: false });
  // A few layers are named in the findings.
  const wide = Math.max(0, ...troubled.map(([name]) => name.length)) + 2;
  const named = troubled.length > 3 ? troubled.map(([name, text]) => wrapped(name, text, wide)) : [];
  return `\n${table([head, ...rows])}\n\n${[...findings, ...(named.length > 0 ? ["", ...named] : [])].join("\n")}\n`;
}

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function inspect(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(inspectCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("inspect", inspectArgs, rest);
  const args = modelArguments("inspect", given);
  const texts = textArguments(given);
  const out = given.text("out");
  if (out !== undefined && texts.texts.length === 0) {
    throw new UnsupportedError("--out writes a report of the routing, which needs a text: --text FILE, or --ids 1,2,3");
  }
  const json = given.flag("json");
  const summary = await summaryOf(args);
  if (!json) streams.out(summaryText(args.folder, summary));
  const print = (more: object): void =>
    streams.out(`${JSON.stringify({ schema: "switchyard/inspect/1", folder: args.folder, ...summary, ...more })}\n`);
  if (texts.texts.length === 0) {
    if (json) print({});
    return 0;
  }
  const bar = progressBar(streams);
  const note = (): void => {
    bar.end();
    streams.error("Finishing this pass. Ctrl-C again ends at once.\n");
  };
  const folder = mkdtempSync(join(tmpdir(), "switchyard-inspect-"));
  try {
    return await interruptible(options, note, (signal) =>
      withModel(args, async (open) => {
        const path = join(folder, "run.trace");
        const { expertBytes } = summary;
        const { tokens, total } = await recordTexts(open, texts, { path, expertBytes, signal, bar });
        if (tokens === 0) {
          streams.error("Stopped before anything was routed.\n");
          return 130;
        }
        return withTrace(path, async (trace) => {
          const analysis = await analyseTrace(trace);
          if (json) print({ complete: tokens === total, routing: analysis });
          else streams.out(routingText(analysis));
          if (out !== undefined) {
            writeReport(out, await reportOf(trace, analysis, open.tokenizer));
            if (!json) streams.out(`\nReport: ${out}\n`);
          }
          if (tokens === total) return 0;
          streams.error(`Stopped after ${Math.floor((100 * tokens) / total)} %.\n`);
          return 130;
        });
      }),
    );
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
