// `switchyard chat`: a conversation with a checkpoint in the terminal, or line by line from a pipe.
import { writeFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { CheckpointError, ShapeError, UnsupportedError } from "@switchyard/core";
import {
  type ChatMessage,
  type Ending,
  generate,
  type PrefixCache,
  prefixCache,
  type Tokenizer,
} from "@switchyard/models";
import { type ArgsDef, defineCommand } from "citty";
import { readArguments } from "./arguments.ts";
import { withAmateur } from "./generate.ts";
import type { CommandLine } from "./main.ts";
import { modelArgs, modelArguments, modelName, needTokenizer, type OpenModel, withModel } from "./model-arguments.ts";
import { chosenStrategy, strategyArgs, strategyNames } from "./strategies.ts";
import type { Streams } from "./terminal.ts";
import { usageText } from "./usage.ts";

const chatArgs = {
  system: { type: "string", description: "A system message before the conversation", valueHint: "TEXT" },
  "max-new": {
    type: "string",
    description: "Tokens of an answer at most (default: until the context is full)",
    valueHint: "N",
  },
  stop: { type: "string", description: "Text that ends an answer; may be given several times", valueHint: "TEXT" },
  seed: { type: "string", description: "Seed of sampling (default 0); counts up with every answer", valueHint: "N" },
  strategy: {
    type: "string",
    description: `${strategyNames.join(", ")} (default greedy, or sample where an option of sampling is given)`,
    valueHint: "NAME",
  },
  ...strategyArgs,
  ...modelArgs,
  json: { type: "boolean", description: "Print each answer as one line of JSON" },
} as const satisfies ArgsDef;

const chatCommand = defineCommand({
  meta: { name: "switchyard chat", description: "Talk with a checkpoint that has a chat template" },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...chatArgs,
  },
});

const commandLines = `/reset          forgets the conversation; the system message stays
/system TEXT    sets the system message; without TEXT takes it away
/save FILE      writes the conversation as JSON, into a new file
/help           shows this
/exit           leaves, as the end of input does

A backslash at the end of a line goes on with the next one; //x is the message
/x. Ctrl-C stops an answer, and leaves where there is none.
`;

const example = `
IN THE CONVERSATION

${commandLines.replace(/^(?=.)/gm, "  ")}
EXAMPLE

  switchyard chat OLMoE-1B-7B-0924-Instruct --system "Answer in one sentence." --temperature 0.7
  echo "What is a whale?" | switchyard chat OLMoE-1B-7B-0924-Instruct --json
`;

/** Text for a terminal: what a model writes must not move its cursor or worse. */
export const printable = (text: string): string => text.replace(/[^\P{Cc}\n\t]/gu, "\uFFFD");

/** What is said in the conversation so far. */
class Conversation {
  system: string | undefined;
  messages: ChatMessage[] = [];

  get all(): readonly ChatMessage[] {
    return [...(this.system === undefined ? [] : [{ role: "system", content: this.system }]), ...this.messages];
  }
}

/** Carries out a line that begins with a slash; answers whether the conversation goes on. */
async function obey(line: string, talk: Conversation, open: OpenModel, streams: Streams): Promise<boolean> {
  const [, name = "", rest = ""] = /^\/(\S*)\s*(.*)$/s.exec(line) ?? [];
  switch (name) {
    case "exit":
    case "quit":
      return false;
    case "reset":
      talk.messages = [];
      streams.error("Forgotten.\n");
      return true;
    case "system":
      talk.system = rest === "" ? undefined : rest;
      streams.error(rest === "" ? "No system message.\n" : "System message set.\n");
      return true;
    case "save": {
      if (rest === "") throw new UnsupportedError("/save takes the name of a file: /save talk.json");
      const content = { schema: "switchyard/conversation/1", model: modelName(open), messages: talk.all };
      try {
        await writeFile(rest, `${JSON.stringify(content, null, 2)}\n`, { flag: "wx" });
      } catch (cause) {
        const why = cause instanceof Error ? cause.message : String(cause);
        throw new UnsupportedError(`cannot save the conversation as a new file ${rest}: ${why}`, { cause });
      }
      streams.error(`${talk.messages.length} messages saved in ${rest}\n`);
      return true;
    }
    case "help":
      streams.error(commandLines);
      return true;
    default:
      throw new UnsupportedError(
        `unknown command /${name}; there are /reset, /system, /save, /help, /exit, and //${name} says it to the model`,
      );
  }
}

interface Answer {
  readonly text: string;
  /** Tokens of the conversation so far, and how many of them were not run anew. */
  readonly prompt: number;
  readonly reused: number;
  readonly tokens: number;
  readonly ending: Ending | "stopped";
  readonly seconds: number;
}

type How = Omit<Parameters<typeof generate>[1], "prompt" | "signal"> & { readonly prefix: PrefixCache };

/** The next message of the model; `show` gets its text as it comes. */
async function reply(
  { model, chatTemplate }: OpenModel,
  tokenizer: Tokenizer,
  {
    messages,
    how,
    signal,
    show,
  }: {
    readonly messages: readonly ChatMessage[];
    readonly how: How;
    readonly signal: AbortSignal;
    readonly show: (text: string) => void;
  },
): Promise<Answer> {
  const started = performance.now();
  const prompt = tokenizer.encode(chatTemplate.render(messages, { addGenerationPrompt: true }));
  if (prompt.length >= model.context) {
    throw new ShapeError(
      `the conversation has ${prompt.length} tokens, the model's context is ${model.context}: /reset forgets it`,
    );
  }
  const before = how.prefix.reused;
  let text = "";
  let tokens = 0;
  let ending: Answer["ending"] = "stopped";
  try {
    const made = generate(model, { ...how, prompt, signal });
    for (;;) {
      const { value, done } = await made.next();
      if (done) {
        ending = value;
        break;
      }
      tokens++;
      text += value.text;
      show(value.text);
    }
  } catch (error) {
    if (!signal.aborted) throw error;
  }
  const reused = how.prefix.reused - before;
  return { text, prompt: prompt.length, reused, tokens, ending, seconds: (performance.now() - started) / 1000 };
}

/** What a user can mend in the next line. */
const mendable = (error: unknown): error is Error =>
  [ShapeError, UnsupportedError, CheckpointError].some((kind) => kind.isInstance(error));

/**
 * Runs the command until its input ends. Answers the exit code: 0, 1 where a message from a pipe failed, 130 after Ctrl-C.
 * @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend.
 */
export async function chat(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(chatCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("chat", chatArgs, rest);
  const args = modelArguments("chat", given);
  const maxNew = given.whole("max-new", { from: 1 });
  const seed = given.whole("seed", { from: 0, to: 2 ** 31 - 1 }) ?? 0;
  const chosen = chosenStrategy(given);
  const [json, stops] = [given.flag("json"), given.texts("stop")];
  return withModel(args, (open) =>
    withAmateur(args, chosen.amateur, async (amateur) => {
      const tokenizer = needTokenizer(open, "chat", "Run it by ids: switchyard generate DIR --ids 1,2,3");
      if (open.chatTemplate.names.length === 0) {
        throw new CheckpointError(
          `${args.folder} has no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json. ` +
            `Base models go on with a text: switchyard generate ${args.folder} --prompt TEXT`,
        );
      }
      const talk = new Conversation();
      talk.system = given.text("system");
      // What has been said is not run again.
      const prefix = prefixCache();
      const how: How = {
        ...{ tokenizer, strategy: chosen.make(amateur?.model), stop: [...open.endIds, ...stops], prefix },
        ...(maxNew === undefined ? {} : { maxNew }),
      };
      let answers = 0;
      const conversation = converse(options, streams, {
        hint: `${modelName(open)}. /help shows the commands.\n`,
        hear: async (line, signal) => {
          if (line.startsWith("/") && !line.startsWith("//")) return obey(line, talk, open, streams);
          const message = { role: "user", content: line.replace(/^\/\//, "/") };
          const show = (text: string): void => {
            if (!json) streams.out(process.stdout.isTTY ? printable(text) : text);
          };
          const messages = [...talk.all, message];
          const said = await reply(open, tokenizer, { messages, how: { ...how, seed: seed + answers }, signal, show });
          answers++;
          const { text: content, ending, ...figures } = said;
          talk.messages.push(message, { role: "assistant", content });
          if (json) {
            streams.out(`${JSON.stringify({ schema: "switchyard/chat/1", content, ending, ...figures })}\n`);
          } else {
            streams.out("\n");
            if (ending === "stopped") streams.error("(stopped)\n");
            if (ending === "context") streams.error("The context is full: /reset forgets the conversation.\n");
          }
          return true;
        },
      });
      return conversation.finally(() => prefix.dispose());
    }),
  );
}

interface Hearing {
  /** Shown at first, on a terminal. */
  readonly hint: string;
  /** One line, or several that were joined; answers whether to go on. */
  hear(line: string, signal: AbortSignal): Promise<boolean>;
}

/** Reads lines until there are none, with what Ctrl-C means in between. */
async function converse(
  { input = process.stdin, signal }: CommandLine,
  streams: Streams,
  { hint, hear }: Hearing,
): Promise<number> {
  const terminal = "isTTY" in input && input.isTTY === true && process.stdout.isTTY === true;
  const lines = createInterface({ input, terminal, ...(terminal ? { output: process.stdout } : {}) });
  let running: AbortController | undefined;
  let [warned, left, failed] = [false, false, false];
  let begun = "";
  /** Whether each line to come was pasted together with the next: terminals mark the ends of a paste where they are asked to. */
  const joined: boolean[] = [];
  let pasting = false;
  lines.on("line", () => joined.push(pasting));
  const pasted = (_: unknown, { name }: { readonly name?: string } = {}): void => {
    if (name === "paste-start") pasting = true;
    if (name === "paste-end") pasting = false;
  };
  const asPasted = (marked: boolean): void => {
    if (terminal) process.stdout.write(marked ? "\u001B[?2004h" : "\u001B[?2004l");
  };
  input.on("keypress", pasted);
  asPasted(true);
  // The end of input may come while an answer is made.
  let closed = false;
  lines.once("close", () => {
    closed = true;
  });
  const ask = (prompt: string): void => {
    if (!terminal || closed) return;
    lines.setPrompt(prompt);
    // What has been typed or pasted meanwhile goes on where it was.
    lines.prompt(true);
  };
  const leave = (): void => {
    left = true;
    running?.abort();
    lines.close();
  };
  const interrupt = (): void => {
    if (left) {
      asPasted(false);
      process.exit(130);
    }
    if (running && !running.signal.aborted) running.abort();
    else if (running || warned) leave();
    else {
      warned = true;
      begun = "";
      // What was written of the line goes as well.
      for (const name of terminal && !closed ? ["e", "u"] : []) lines.write(null, { ctrl: true, name });
      streams.error("\nCtrl-C again leaves; so does /exit.\n");
      ask("> ");
    }
  };
  process.on("SIGINT", interrupt);
  lines.on("SIGINT", interrupt); // of a terminal, which sends no signal while lines are read
  signal?.addEventListener("abort", leave);
  if (signal?.aborted) leave();
  const answer = async (line: string): Promise<boolean> => {
    running = new AbortController();
    try {
      return await hear(line, running.signal);
    } catch (error) {
      if (!mendable(error)) throw error;
      streams.error(`${error.message}\n`);
      failed = true;
      return true;
    } finally {
      running = undefined;
    }
  };
  try {
    if (terminal) streams.error(hint);
    ask("> ");
    let goes = true;
    for await (const line of lines) {
      if (left) break;
      warned = false;
      const more = joined.shift() ?? false;
      if (more || line.endsWith("\\")) {
        begun += `${more ? line : line.slice(0, -1)}\n`;
        ask("  ");
        continue;
      }
      const whole = `${begun}${line}`;
      begun = "";
      if (whole.trim() !== "") goes = await answer(whole);
      if (!goes || left) break;
      ask("> ");
    }
    if (begun.trim() !== "" && goes && !left) await answer(begun.trimEnd());
  } finally {
    lines.close();
    input.off("keypress", pasted);
    asPasted(false);
    process.off("SIGINT", interrupt);
    signal?.removeEventListener("abort", leave);
  }
  if (left) return 130;
  return failed && !terminal ? 1 : 0;
}
