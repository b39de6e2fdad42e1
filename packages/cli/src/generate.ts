// `switchyard generate`: text from a checkpoint, by any decoding strategy.
import { UnsupportedError } from "@switchyard/core";
import { type Ending, type GeneratedToken, generate as generateTokens } from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { count, type Given, readArguments } from "./arguments.ts";
import { interruptible } from "./interrupt.ts";
import type { CommandLine } from "./main.ts";
import {
  type ModelArguments,
  modelArgs,
  modelArguments,
  modelName,
  needTokenizer,
  newFile,
  type OpenModel,
  promptArgument,
  promptIds,
  recording,
  streamingText,
  traceArg,
  withModel,
} from "./model-arguments.ts";
import { chosenStrategy, optionsOf, strategyArgs, strategyNames } from "./strategies.ts";
import type { Streams } from "./terminal.ts";
import { usageText, wrapped } from "./usage.ts";

const generateArgs = {
  prompt: {
    type: "string",
    description: "Text to go on from, where the checkpoint has a tokenizer",
    valueHint: "TEXT",
  },
  ids: { type: "string", description: "Token ids to go on from, separated by commas", valueHint: "1,2,3" },
  chat: { type: "boolean", description: "Hands --prompt to the checkpoint's chat template, as the message of a user" },
  system: { type: "string", description: "With --chat: a system message before it", valueHint: "TEXT" },
  "max-new": { type: "string", description: "Tokens to make at most (default 128)", valueHint: "N" },
  stop: {
    type: "string",
    description: "Text that ends it and is not shown; may be given several times",
    valueHint: "TEXT",
  },
  "stop-ids": {
    type: "string",
    description: "Token ids that end it, instead of those that the checkpoint names",
    valueHint: "1,2",
  },
  "ignore-eos": { type: "boolean", description: "Goes on where the checkpoint says that the text ends" },
  seed: { type: "string", description: "Seed of sampling (default 0)", valueHint: "N" },
  stream: { type: "boolean", description: "Shows tokens as they come" },
  strategy: {
    type: "string",
    description: `${strategyNames.join(", ")} (default greedy, or sample where an option of sampling is given)`,
    valueHint: "NAME",
  },
  ...strategyArgs,
  ...modelArgs,
  ...traceArg,
  json: { type: "boolean", description: "Print ids, probabilities, text and figures as JSON" },
} as const satisfies ArgsDef;

const generateCommand = defineCommand({
  meta: { name: "switchyard generate", description: "Generate text from a checkpoint" },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...generateArgs,
  },
});

const strategyLines = strategyNames.map((name) => {
  return wrapped(`  ${name}`, optionsOf[name].map((option) => `--${option}`).join(" "), 20);
});
const example = `
STRATEGIES and their options

${strategyLines.join("\n")}

EXAMPLE

  switchyard generate OLMoE-1B-7B --prompt "Call me" --temperature 0.7 --top-p 0.9 --stream
  switchyard generate Mixtral-8x7B --memory 16GB --prompt "Question: 12 * 7 = ?" --strategy selfContrast --beta 0.5
  switchyard generate my-model --ids 1,2,3 --max-new 16 --json

Without a tokenizer, ids go in and come out. Ctrl-C ends the text.
`;

/** Ids of the prompt, rendered by the chat template where that is asked for. */
function startOf(open: OpenModel, given: Given): number[] {
  const prompt = promptArgument("generate", given);
  if (!given.flag("chat")) return promptIds(open, prompt);
  if (!("text" in prompt)) throw new UnsupportedError("--chat takes --prompt TEXT, not --ids");
  const system = given.text("system");
  const messages = [
    ...(system === undefined ? [] : [{ role: "system", content: system }]),
    { role: "user", content: prompt.text },
  ];
  const text = open.chatTemplate.render(messages, { addGenerationPrompt: true });
  return Array.from(needTokenizer(open, "--chat", "Give token ids: --ids 1,2,3").encode(text));
}

const endings: Readonly<Record<Ending | "stopped", string>> = {
  stopId: "ended by itself",
  stopString: "ended by --stop",
  maxNew: "ended by --max-new",
  context: "the context is full",
  strategy: "ended by the strategy",
  stopped: "stopped",
};

/** Opens the amateur of contrastive decoding, where there is one, around `act`. */
export function withAmateur<T>(
  args: ModelArguments,
  folder: string | undefined,
  act: (amateur?: OpenModel) => Promise<T>,
): Promise<T> {
  return folder === undefined ? act() : withModel({ ...args, folder, router: undefined }, act);
}

/** Runs the command. Answers the exit code. @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend. */
export async function generate(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(generateCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("generate", generateArgs, rest);
  const args = modelArguments("generate", given);
  const trace = newFile("trace", given);
  promptArgument("generate", given);
  if (given.text("system") !== undefined && !given.flag("chat")) throw new UnsupportedError("--system needs --chat");
  const [json, stream] = [given.flag("json"), given.flag("stream")];
  if (json && stream) throw new UnsupportedError("--stream and --json exclude each other; leave one of them out");
  const stopIds = given.ids("stop-ids");
  if (stopIds && given.flag("ignore-eos")) {
    throw new UnsupportedError("--stop-ids and --ignore-eos exclude each other; leave one of them out");
  }
  const maxNew = given.whole("max-new", { from: 0 }) ?? 128;
  const seed = given.whole("seed", { from: 0, to: 2 ** 31 - 1 }) ?? 0;
  const chosen = chosenStrategy(given);
  const note = (): void => streams.error("\nStopping after this token. Ctrl-C again ends at once.\n");
  return interruptible(options, note, (signal) =>
    withModel(args, (open) =>
      withAmateur(args, chosen.amateur, async (amateur) => {
        const ids = startOf(open, given);
        const { tokenizer } = open;
        const stops = given.texts("stop");
        if (stops.length > 0) needTokenizer(open, "--stop", "Give token ids: --stop-ids 1,2");
        const stop = [...(stopIds ?? (given.flag("ignore-eos") ? [] : open.endIds)), ...stops];
        const tokens: GeneratedToken[] = [];
        let ending: Ending | "stopped" = "stopped";
        const started = performance.now();
        try {
          await recording(open, trace, async (running) => {
            const made = generateTokens(running, {
              prompt: ids,
              ...(tokenizer ? { tokenizer } : {}),
              strategy: chosen.make(amateur?.model),
              ...{ maxNew, seed, stop, signal },
            });
            for (;;) {
              const { value, done } = await made.next();
              if (done) {
                ending = value;
                break;
              }
              if (stream) streams.out(tokenizer ? value.text : `${tokens.length > 0 ? "," : ""}${value.id}`);
              tokens.push(value);
            }
          });
        } catch (error) {
          if (!signal.aborted) throw error;
        }
        const seconds = (performance.now() - started) / 1000;
        const text = tokenizer ? tokens.map((token) => token.text).join("") : undefined;
        const found = tokens.map(({ id }) => id);
        if (json) {
          const result = {
            schema: "switchyard/generate/1",
            model: modelName(open),
            ...{ strategy: chosen.name, seed, prompt: ids, ids: found },
            ...(text === undefined ? {} : { text }),
            logProbabilities: tokens.map(({ logProbability }) => logProbability),
            ...{ ending, seconds },
            ...(open.model.streamed ? { streaming: open.model.streamed.counts() } : {}),
          };
          streams.out(`${JSON.stringify(result)}\n`);
        } else {
          streams.out(stream ? "\n" : `${text ?? found.join(",")}\n`);
          const speed = tokens.length > 0 ? `, ${(tokens.length / seconds).toFixed(1)} tokens/s with the prompt` : "";
          streams.error(
            `${count(tokens.length, "token")} in ${seconds.toFixed(1)} s${speed}; ${endings[ending]}\n${streamingText(open)}`,
          );
        }
        return ending === "stopped" ? 130 : 0;
      }),
    ),
  );
}
