// `switchyard eval`: how well a model foretells a text.
import { UnsupportedError } from "@switchyard/core";
import { type EvaluateProgress, type Evaluation, evaluateText, evaluateTokens } from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, readArguments, tokenIds } from "./arguments.ts";
import { interruptible } from "./interrupt.ts";
import type { CommandLine } from "./main.ts";
import {
  modelArgs,
  modelArguments,
  modelName,
  needTokenizer,
  newFile,
  recording,
  streamingText,
  traceArg,
  withModel,
} from "./model-arguments.ts";
import { progressBar } from "./progress.ts";
import type { Streams } from "./terminal.ts";
import { readText } from "./text-file.ts";
import { usageText } from "./usage.ts";

const evalArgs = {
  text: { type: "string", description: "A text file in UTF-8", valueHint: "FILE" },
  ids: {
    type: "string",
    description: "A file of token ids, apart by commas or white space, where the checkpoint has no tokenizer",
    valueHint: "FILE",
  },
  context: { type: "string", description: "Tokens of a window (default: the context of the model)", valueHint: "N" },
  stride: {
    type: "string",
    description: "Tokens from one window to the next (default: half a window); smaller: lower perplexity, more time",
    valueHint: "N",
  },
  chunk: {
    type: "string",
    description: "Tokens per pass, which bounds the memory for logits (default 128)",
    valueHint: "N",
  },
  ...modelArgs,
  ...traceArg,
  json: { type: "boolean", description: "Print the figures as JSON" },
} as const satisfies ArgsDef;

const evalCommand = defineCommand({
  meta: {
    name: "switchyard eval",
    description: "Perplexity and bits per byte of a model on a text, over sliding windows",
  },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...evalArgs,
  },
});

const example = `
EXAMPLE

  switchyard eval OLMoE-1B-7B --text novel.txt --context 2048 --stride 512
  switchyard eval my-model --ids ids.txt --json

Ctrl-C ends it with the figures of what has been read so far.
`;

function figures(found: Evaluation): string {
  const { tokens, scored, windows, bytes, perplexity, bitsPerToken, bitsPerByte, withoutBytes } = found;
  const lines = [
    `perplexity      ${perplexity.toFixed(4)}`,
    `bits per token  ${bitsPerToken.toFixed(4)}`,
    ...(bitsPerByte === undefined ? [] : [`bits per byte   ${bitsPerByte.toFixed(4)}`]),
    ...(withoutBytes === undefined ? [] : [`bits per byte   ${withoutBytes}`]),
    `foretold        ${scored} of ${count(tokens, "token")}${bytes === undefined ? "" : `, ${count(bytes, "byte")}`}, in ${count(windows, "window")}`,
  ];
  return `${lines.join("\n")}\n`;
}

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function evaluate(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(evalCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("eval", evalArgs, rest);
  const args = modelArguments("eval", given);
  const trace = newFile("trace", given);
  const [textFile, idsFile] = [given.text("text"), given.text("ids")];
  if ((textFile === undefined) === (idsFile === undefined)) {
    const found = textFile === undefined ? "neither" : "both";
    throw new UnsupportedError(`eval needs a text: --text FILE, or --ids FILE with token ids; found ${found}`);
  }
  const [context, stride] = [given.whole("context", { from: 2 }), given.whole("stride", { from: 1 })];
  const chunk = given.whole("chunk", { from: 1 });
  const text = textFile === undefined ? undefined : readText(textFile);
  const ids = idsFile === undefined ? undefined : tokenIds(idsFile, readText(idsFile));
  const bar = progressBar(streams);
  return interruptible(
    options,
    () => {
      bar.end();
      streams.error("Finishing this pass. Ctrl-C again ends at once.\n");
    },
    (signal) =>
      withModel(args, async (open) => {
        let latest: EvaluateProgress | undefined;
        const started = performance.now();
        const how = {
          ...(context === undefined ? {} : { context }),
          ...(stride === undefined ? {} : { stride }),
          ...(chunk === undefined ? {} : { chunk }),
          signal,
          onProgress(progress: EvaluateProgress) {
            latest = progress;
            const { sofar, done, total } = progress;
            if (sofar.scored > 0) bar.update("Evaluating", done, total, `perplexity ${sofar.perplexity.toFixed(3)}`);
          },
        };
        const report = (found: Evaluation, complete: boolean): void => {
          bar.end();
          const seconds = (performance.now() - started) / 1000;
          const model = modelName(open);
          const streaming = open.model.streamed ? { streaming: open.model.streamed.counts() } : {};
          if (given.flag("json")) {
            streams.out(
              `${JSON.stringify({ schema: "switchyard/eval/1", model, complete, ...found, seconds, ...streaming })}\n`,
            );
          } else {
            streams.out(`${model} on ${textFile ?? idsFile}\n\n${figures(found)}`);
            streams.error(streamingText(open));
          }
        };
        try {
          const found = await recording(open, trace, (model) => {
            if (text === undefined) return evaluateTokens(model, ids ?? [], how);
            const words = needTokenizer(open, "--text", "Give token ids: --ids FILE");
            return evaluateText(model, words, text, how);
          });
          report(found, true);
          return 0;
        } catch (error) {
          if (!signal.aborted) throw error;
          if (latest === undefined || latest.sofar.scored === 0)
            streams.error("Stopped before anything was foretold.\n");
          else {
            report(latest.sofar, false);
            streams.error(`Stopped after ${Math.floor((100 * latest.done) / latest.total)} %.\n`);
          }
          return 130;
        } finally {
          bar.end();
        }
      }),
  );
}
