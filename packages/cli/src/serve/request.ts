// What a client asks for: the bodies of /v1/completions and /v1/chat/completions, checked before anything runs.
import { randomInt } from "node:crypto";
import type { Json } from "@switchyard/core";
import type { ChatMessage, DecodingStrategy, DecodingStrategyName, Tokenizer } from "@switchyard/models";
import { readArguments } from "../arguments.ts";
import type { OpenModel } from "../model-arguments.ts";
import { chosenStrategy, strategyArgs } from "../strategies.ts";
import { ApiError, badParameter } from "./errors.ts";
import { type Body, Fields, isBody } from "./fields.ts";

export interface Asked {
  readonly kind: "chat" | "text";
  /** Ids; every prompt gets `n` answers. */
  readonly prompts: readonly (readonly number[])[];
  readonly n: number;
  readonly maxNew: number;
  /** Of the first answer to a prompt; the next ones count up. */
  readonly seed: number;
  readonly stop: readonly (string | number)[];
  readonly stream: boolean;
  readonly includeUsage: boolean;
  /** How many alternatives with each token; undefined: no probabilities. */
  readonly logprobs: number | undefined;
  readonly strategy: DecodingStrategy;
  readonly routing: boolean;
}

export interface Served {
  readonly open: OpenModel;
  readonly tokenizer: Tokenizer;
  /** As clients name the model. */
  readonly name: string;
}

const mostAnswers = 64;
const mostStops = 16;
/** Rows that one answer may take, by the field that says so. */
const mostRows: Readonly<Record<string, number>> = { beams: 16, candidates: 16, samples: 32 };

/** Strategies that make each token in one pass, in the first row of the batch. */
const showsRouting: ReadonlySet<DecodingStrategyName> = new Set([
  ...(["greedy", "sample", "selfContrast", "doLa", "dynamicRouting", "ensembleRouting"] as const),
]);

/** How selfConsistency finds the answer of a sample: patterns of ours, as one of a stranger might take for ever. */
const answers = {
  number: "^[\\s\\S]*(?<![\\d.-])(-?\\d+(?:\\.\\d+)?)",
  line: "^[\\s\\S]*?([^\\n]*)\\s*$",
} as const;

/** Fields of sampling that stand at the top level of a body, as other servers have them. */
const sampling = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"] as const;

/** `strategy: "selfContrast"` or `{ name: "selfContrast", beta: 0.5 }`, with the options of `switchyard generate` in snake case. */
function readStrategy(fields: Fields): { readonly strategy: DecodingStrategy; readonly name: DecodingStrategyName } {
  const options = new Map<string, Json>();
  const temperature = fields.number("temperature", { from: 0, to: 2 });
  const topP = fields.number("top_p", { from: 0, to: 1 });
  const given: Readonly<Record<(typeof sampling)[number], number | undefined>> = {
    temperature,
    // The smallest share is one token.
    top_p: topP === 0 ? Number.MIN_VALUE : topP,
    top_k: fields.whole("top_k", { from: 1 }),
    min_p: fields.number("min_p", { from: 0, to: 1 }),
    repetition_penalty: fields.number("repetition_penalty", { from: 0 }),
  };
  for (const name of sampling) if (given[name] !== undefined) options.set(name, given[name]);
  const asked = fields.value("strategy");
  if (asked === undefined) {
    options.set("strategy", "sample");
  } else if (typeof asked === "string") {
    options.set("strategy", asked);
  } else if (isBody(asked)) {
    for (const [key, value] of Object.entries(asked)) {
      if (key === "strategy") throw unknown("strategy.strategy");
      options.set(key === "name" ? "strategy" : key, value);
    }
    if (typeof asked.name !== "string") throw badParameter("strategy.name", "'strategy.name' must name the strategy.");
  } else {
    fields.refuse("strategy", 'a name such as "greedy", or an object { "name": ..., ... }');
  }
  if (options.get("strategy") === "contrastive") {
    throw badParameter("strategy", "'strategy' contrastive needs a second model, which this server does not have.");
  }
  if (options.get("strategy") === "selfConsistency" && !options.has("answer")) {
    throw badParameter(
      "strategy.answer",
      '\'strategy.answer\' must be "number" or "line": what of a text is its answer.',
    );
  }
  return strategyOf(options);
}

const unknown = (path: string): ApiError =>
  badParameter(path.slice(0, 80), `Unknown parameter: '${path.slice(0, 80)}'.`, "unknown_parameter");

function strategyOf(options: ReadonlyMap<string, Json>): ReturnType<typeof readStrategy> {
  const words: string[] = [];
  for (const [key, value] of options) {
    const path = sampling.some((name) => name === key) ? key : `strategy.${key}`;
    const option = key.replaceAll("_", "-");
    const known = option === "strategy" || (Object.hasOwn(strategyArgs, option) && !key.includes("-"));
    // The amateur is a folder: paths never come from a request.
    if (!known || key === "amateur") {
      throw unknown(path);
    }
    const bad = (expected: string): ApiError => badParameter(path, `'${path}' must be ${expected}.`);
    if (key === "draw") {
      if (typeof value !== "boolean") throw bad("true or false");
      if (value) words.push("--draw");
      continue;
    }
    if (key === "answer") {
      if (value !== "number" && value !== "line") throw bad('"number" or "line": the last of the text');
      words.push(`--answer=${answers[value]}`);
      continue;
    }
    const limit = mostRows[key];
    if (limit !== undefined && typeof value === "number" && value > limit) throw bad(`at most ${limit}`);
    const list = Array.isArray(value) && value.every((one) => typeof one === "number") ? value.join(",") : value;
    if (typeof list !== "string" && typeof list !== "number") throw bad("a number or a string");
    words.push(`--${option}=${list}`);
  }
  const spec = { strategy: { type: "string" }, ...strategyArgs } as const;
  try {
    const chosen = chosenStrategy(readArguments("generate", spec, words));
    return { strategy: chosen.make(), name: chosen.name };
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    // Messages speak of options of the command line.
    const message = error.message.replace(/--([a-z][a-z-]*)/g, (_, name: string) => name.replaceAll("-", "_"));
    throw badParameter("strategy", message);
  }
}

/** Text of a message: a string, or a list of text parts. */
function contentOf(fields: Fields): string {
  const value = fields.value("content");
  if (value === undefined) return "";
  if (typeof value === "string") return value;
  if (!Array.isArray(value)) return fields.refuse("content", "a string or a list of text parts");
  return value
    .map((part) => {
      if (isBody(part) && part.type === "text" && typeof part.text === "string") return part.text;
      return fields.refuse(
        "content",
        'a string or a list of parts { "type": "text", "text": ... }; this model reads text',
      );
    })
    .join("");
}

function messagesOf(fields: Fields): ChatMessage[] {
  const value = fields.value("messages");
  if (!Array.isArray(value) || value.length === 0) {
    return fields.refuse("messages", 'a list of at least one message, such as { "role": "user", "content": "Hi" }');
  }
  return value.map((one: Json, i): ChatMessage => {
    const path = `messages[${i}]`;
    if (!isBody(one)) throw badParameter(path, `'${path}' must be an object with role and content.`);
    const message = new Fields(one, `${path}.`);
    const role = message.text("role") ?? message.refuse("role", "system, developer, user, assistant or tool");
    if (!["system", "developer", "user", "assistant", "tool"].includes(role)) {
      message.refuse("role", "system, developer, user, assistant or tool");
    }
    message.unsupported("tool_calls", (calls) => Array.isArray(calls) && calls.length === 0, "it calls no tools");
    const [name, call] = [message.text("name"), message.text("tool_call_id")];
    message.ignore("refusal", "annotations", "audio", "function_call");
    const content = contentOf(message);
    message.finish();
    return {
      // Templates of open models know no "developer".
      role: role === "developer" ? "system" : role,
      content,
      ...(name === undefined ? {} : { name }),
      ...(call === undefined ? {} : { tool_call_id: call }),
    };
  });
}

function promptsOf(fields: Fields, { open, tokenizer }: Served): number[][] {
  const value = fields.value("prompt");
  const expected = "a string, a list of strings, a list of token ids, or a list of such lists";
  const { vocabulary } = open.model;
  const ids = (list: readonly Json[]): number[] =>
    list.map((id) => {
      if (typeof id === "number" && Number.isInteger(id) && id >= 0 && id < vocabulary) return id;
      return fields.refuse("prompt", `${expected}; token ids go from 0 to ${vocabulary - 1}`);
    });
  const encode = (text: string): number[] => Array.from(tokenizer.encode(text, { addSpecial: true }));
  if (typeof value === "string") return [encode(value)];
  if (!Array.isArray(value) || value.length === 0) return fields.refuse("prompt", expected);
  if (value.every((one) => typeof one === "number")) return [ids(value)];
  // Before they are encoded one by one.
  if (value.length > mostAnswers) {
    throw badParameter("prompt", `'prompt' has ${value.length} prompts; at most ${mostAnswers} answers at once.`);
  }
  return value.map((one: Json) => {
    if (typeof one === "string") return encode(one);
    return Array.isArray(one) ? ids(one) : fields.refuse("prompt", expected);
  });
}

function stopsOf(fields: Fields): string[] {
  const value = fields.value("stop");
  if (value === undefined) return [];
  const list = Array.isArray(value) ? value : [value];
  const texts = list.filter((one) => typeof one === "string" && one !== "" && one.length <= 1000);
  if (texts.length === list.length && list.length <= mostStops) return texts.map(String);
  return fields.refuse("stop", `a string or a list of at most ${mostStops} strings, none of them empty`);
}

/** What the two kinds of requests call differently. */
function logprobsOf(fields: Fields, kind: Asked["kind"]): number | undefined {
  if (kind === "text") return fields.whole("logprobs", { from: 0, to: 20 });
  const asked = fields.flag("logprobs") ?? false;
  const top = fields.whole("top_logprobs", { from: 0, to: 20 });
  if (top !== undefined && !asked) throw badParameter("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.");
  return asked ? (top ?? 0) : undefined;
}

function refuseUnsupported(fields: Fields, kind: Asked["kind"]): void {
  const empty = (value: Json): boolean =>
    (Array.isArray(value) && value.length === 0) || (isBody(value) && Object.keys(value).length === 0);
  const penalty = "leave it out, or use 'repetition_penalty'";
  for (const name of ["presence_penalty", "frequency_penalty"]) {
    fields.unsupported(name, (value) => value === 0, penalty);
  }
  fields.unsupported("logit_bias", empty, "leave it out");
  fields.unsupported("store", (value) => value === false, "nothing is kept");
  fields.ignore("user", "metadata", "safety_identifier", "prompt_cache_key");
  if (kind === "text") {
    fields.unsupported("echo", (value) => value === false, "put the prompt before the text yourself");
    fields.unsupported("suffix", (value) => value === "", "the model writes on from a prompt");
    fields.unsupported("best_of", (value) => value === 1, "use 'n' and choose");
    return;
  }
  for (const name of ["tools", "functions"]) fields.unsupported(name, empty, "answers are text");
  for (const name of ["tool_choice", "function_call"]) {
    fields.unsupported(name, (value) => value === "none" || value === "auto", "answers are text");
  }
  fields.ignore("parallel_tool_calls");
  fields.unsupported("response_format", (value) => isBody(value) && value.type === "text", "answers are plain text");
  fields.unsupported("modalities", (value) => Array.isArray(value) && value.join() === "text", "answers are text");
}

/** Tokens to make, within the context. */
function budget(fields: Fields, kind: Asked["kind"], prompts: readonly (readonly number[])[], context: number): number {
  const names = kind === "chat" ? ["max_completion_tokens", "max_tokens"] : ["max_tokens"];
  const [given, other] = names.map((name) => fields.whole(name, { from: 1 }));
  if (given !== undefined && other !== undefined && given !== other) {
    throw badParameter("max_tokens", "'max_tokens' and 'max_completion_tokens' differ; leave one of them out.");
  }
  const asked = given ?? other ?? (kind === "text" ? 16 : undefined);
  const longest = Math.max(...prompts.map(({ length }) => length));
  const param = kind === "chat" ? "messages" : "prompt";
  if (Math.min(...prompts.map(({ length }) => length)) === 0) {
    throw badParameter(param, `'${param}' has no tokens; the model needs at least one to begin with.`);
  }
  if (longest + (asked ?? 1) <= context) return asked ?? context - longest;
  throw badParameter(
    param,
    `This model's maximum context length is ${context} tokens. However, you requested ${longest + (asked ?? 1)} tokens ` +
      `(${longest} in the ${param}, ${asked ?? "at least 1"} in the completion). Please reduce the length of the ${param} or completion.`,
    "context_length_exceeded",
  );
}

/** Throws ApiError for everything a client can mend. */
export function readRequest(kind: Asked["kind"], body: Body, served: Served): Asked {
  const { open, tokenizer, name } = served;
  const fields = new Fields(body);
  const model = fields.text("model");
  if (model === undefined) throw badParameter("model", `You must provide a 'model'; this server has '${name}'.`);
  if (model !== name) {
    throw new ApiError(404, `The model '${model.slice(0, 200)}' does not exist; this server has '${name}'.`, {
      param: "model",
      code: "model_not_found",
    });
  }
  refuseUnsupported(fields, kind);
  const messages = kind === "chat" ? messagesOf(fields) : [];
  const { strategy, name: strategyName } = readStrategy(fields);
  const n = fields.whole("n", { from: 1, to: mostAnswers }) ?? 1;
  const seed = fields.whole("seed", { from: 0 }) ?? randomInt(2 ** 31);
  const stops = stopsOf(fields);
  const stream = fields.flag("stream") ?? false;
  const streamOptions = fields.object("stream_options");
  if (streamOptions && !stream) throw badParameter("stream_options", "'stream_options' needs 'stream' to be true.");
  const includeUsage = streamOptions?.flag("include_usage") ?? false;
  streamOptions?.ignore("include_obfuscation");
  streamOptions?.finish();
  const logprobs = logprobsOf(fields, kind);
  const routing = fields.flag("routing") ?? false;
  if (routing && !showsRouting.has(strategyName)) {
    const able = [...showsRouting].join(", ");
    throw badParameter("routing", `'routing' does not go with the strategy ${strategyName}, only with ${able}.`);
  }
  const ignoreEos = fields.flag("ignore_eos") ?? false;
  const prompts =
    kind === "text"
      ? promptsOf(fields, served)
      : [Array.from(tokenizer.encode(open.chatTemplate.render(messages, { addGenerationPrompt: true })))];
  const maxNew = budget(fields, kind, prompts, open.model.context);
  if (n * prompts.length > mostAnswers) {
    throw badParameter("n", `'n' times the prompts is ${n * prompts.length}; at most ${mostAnswers} answers at once.`);
  }
  fields.finish();
  const stop = [...(ignoreEos ? [] : open.endIds), ...stops];
  return { kind, prompts, n, maxNew, seed, stop, stream, includeUsage, logprobs, strategy, routing };
}
