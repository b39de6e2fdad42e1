// From a request to its answers, in the shapes of OpenAI's API: one object, or a stream of chunks. The answers of one request are made
// one after the other, so that a request for many takes no more turns than one for a single answer.
import { randomUUID } from "node:crypto";
import { ShapeError } from "@switchyard/core";
import { type Ending, type GeneratedToken, generate, type PrefixCache, type Tokenizer } from "@switchyard/models";
import type { Metrics } from "./metrics.ts";
import { type ChosenExperts, type ExpertLoad, observed } from "./observed.ts";
import type { Asked, Served } from "./request.ts";
import type { Turns } from "./turns.ts";

export interface Running extends Served {
  readonly passes: Turns;
  readonly metrics: Metrics;
  readonly load: ExpertLoad;
  /** What earlier answers left behind; absent: every prompt is run from its start. */
  readonly prefix?: PrefixCache;
}

/** A request on its way. */
export interface Course {
  readonly signal: AbortSignal;
  /** Is told of every token. */
  readonly token: () => void;
  /** Is told how many tokens of a prompt need not be run. */
  readonly reused: (tokens: number) => void;
}

/** A token of an answer. */
interface Made {
  readonly token: GeneratedToken;
  readonly routing?: readonly ChosenExperts[];
}

/** Prompt tokens per pass: others get their turn in between. */
const prefillChunk = 512;

const finishReasons: Readonly<Record<Ending, "stop" | "length">> = {
  stopId: "stop",
  stopString: "stop",
  strategy: "stop",
  maxNew: "length",
  context: "length",
};

async function* made(
  asked: Asked,
  running: Running,
  { prompt, seed }: { readonly prompt: readonly number[]; readonly seed: number },
  { signal, token: noted, reused }: Course,
): AsyncGenerator<Made, "stop" | "length", undefined> {
  const { open, tokenizer, passes, metrics, load, prefix } = running;
  let begun = false;
  const { model, routingAt } = observed(open.model, {
    ...{ passes, signal, load, keep: asked.routing },
    passed: (pass) => {
      metrics.pass(pass);
      if (!begun) reused(pass.past);
      begun = true;
    },
  });
  metrics.prompt(prompt.length);
  const { strategy, maxNew, stop, logprobs = 0 } = asked;
  const tokens = generate(model, {
    ...{ prompt, tokenizer, strategy, maxNew, stop, seed, signal, prefillChunk },
    ...(prefix ? { prefix } : {}),
    topLogProbabilities: Math.min(logprobs, model.vocabulary),
  });
  try {
    for (let count = 0; ; count++) {
      const { value, done } = await tokens.next();
      if (done) return finishReasons[value];
      noted();
      const routing = asked.routing ? routingAt(prompt.length + count) : undefined;
      yield { token: value, ...(routing ? { routing } : {}) };
    }
  } finally {
    await tokens.return("maxNew");
  }
}

/** Bytes of a token inside a text. */
function bytesOf(tokenizer: Tokenizer, id: number): Uint8Array {
  // Models may have more ids than their tokenizer.
  if (id >= tokenizer.vocabulary) return new Uint8Array();
  try {
    return tokenizer.bytes([id]);
  } catch (error) {
    // Tokens of some tokenizers are words.
    if (!ShapeError.isInstance(error)) throw error;
    return new TextEncoder().encode(tokenizer.decode([id]));
  }
}

/** A token alone, as OpenAI writes it: what is a part of a character only by its bytes, so that no two are the same. */
function tokenText(tokenizer: Tokenizer, id: number): { readonly token: string; readonly bytes: readonly number[] } {
  const bytes = Array.from(bytesOf(tokenizer, id));
  try {
    const whole = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return { token: whole.decode(Uint8Array.from(bytes)), bytes };
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return { token: bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join(""), bytes };
  }
}

/** The same as completions name it. */
function tokenName(tokenizer: Tokenizer, id: number): string {
  const { token, bytes } = tokenText(tokenizer, id);
  return token.startsWith("\\x") && bytes[0] !== 0x5c ? `bytes:${token}` : token;
}

interface Probabilities {
  readonly logprobs: object | null;
}

/** Log probabilities of some tokens, as the two endpoints have them; `offset`: characters of text before them. */
function probabilities(asked: Asked, tokenizer: Tokenizer, list: readonly Made[], offset: number): Probabilities {
  if (asked.logprobs === undefined) return { logprobs: null };
  if (asked.kind === "chat") {
    const content = list.map(({ token: { id, logProbability, top = [] } }) => ({
      ...tokenText(tokenizer, id),
      logprob: logProbability,
      top_logprobs: top.map((one) => ({ ...tokenText(tokenizer, one.id), logprob: one.logProbability })),
    }));
    return { logprobs: { content, refusal: null } };
  }
  const offsets: number[] = [];
  let at = offset;
  for (const { token } of list) {
    offsets.push(at);
    at += token.text.length;
  }
  return {
    logprobs: {
      tokens: list.map(({ token }) => tokenName(tokenizer, token.id)),
      token_logprobs: list.map(({ token }) => token.logProbability),
      top_logprobs: list.map(({ token: { top = [] } }) =>
        // Of several without text of their own, the likeliest.
        Object.fromEntries(top.toReversed().map((one) => [tokenName(tokenizer, one.id), one.logProbability])),
      ),
      text_offset: offsets,
    },
  };
}

/** The extra field `routing`: which experts saw the token before each of these, from which it was predicted. */
function routingOf(asked: Asked, list: readonly Made[]): object {
  if (!asked.routing) return {};
  return { routing: list.map(({ token, routing = [] }) => ({ token_id: token.id, layers: routing })) };
}

interface Usage {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly total_tokens: number;
  readonly prompt_tokens_details?: { readonly cached_tokens: number };
}

function usage(asked: Asked, completion: number, { prefix }: Running, cached: number): Usage {
  const prompt = asked.prompts.reduce((sum, { length }) => sum + length, 0);
  return {
    ...{ prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion },
    ...(prefix ? { prompt_tokens_details: { cached_tokens: cached } } : {}),
  };
}

/** The same request, and how many tokens of its prompts it has been spared: of answers to one prompt, the first counts. */
function sparing(course: Course) {
  let tokens = 0;
  const of = (first: boolean): Course => ({
    ...course,
    reused(count) {
      course.reused(count);
      if (first) tokens += count;
    },
  });
  return { of, tokens: () => tokens };
}

/** Every answer with its number. */
function* answersOf({ prompts, n, seed }: Asked) {
  for (const [i, prompt] of prompts.entries()) {
    for (let j = 0; j < n; j++) yield { index: i * n + j, prompt, seed: seed + j, first: j === 0 };
  }
}

function envelope(asked: Asked, { name }: Served, chunk: boolean): object {
  const [prefix, object] =
    asked.kind === "chat"
      ? ["chatcmpl", chunk ? "chat.completion.chunk" : "chat.completion"]
      : ["cmpl", "text_completion"];
  return {
    id: `${prefix}-${randomUUID().replaceAll("-", "")}`,
    object,
    created: Math.floor(Date.now() / 1000),
    model: name,
  };
}

/** The whole answer. */
export async function answer(asked: Asked, running: Running, course: Course): Promise<object> {
  const choices: object[] = [];
  const spared = sparing(course);
  let count = 0;
  for (const { index, first, ...from } of answersOf(asked)) {
    const list: Made[] = [];
    const tokens = made(asked, running, from, spared.of(first));
    for (;;) {
      const { value, done } = await tokens.next();
      if (!done) {
        list.push(value);
        continue;
      }
      const content = list.map(({ token }) => token.text).join("");
      choices.push({
        index,
        ...(asked.kind === "chat" ? { message: { role: "assistant", content, refusal: null } } : { text: content }),
        ...probabilities(asked, running.tokenizer, list, 0),
        finish_reason: value,
        ...routingOf(asked, list),
      });
      break;
    }
    count += list.length;
  }
  return { ...envelope(asked, running, false), choices, usage: usage(asked, count, running, spared.tokens()) };
}

/** The chunks of a streamed answer. Nothing comes before the first token is there, so that what fails until then has a status of its own. */
export async function* chunks(asked: Asked, running: Running, course: Course): AsyncGenerator<object, void, undefined> {
  const head = envelope(asked, running, true);
  const chat = asked.kind === "chat";
  const chunk = (choice: object): object => ({
    ...head,
    choices: [choice],
    ...(asked.includeUsage ? { usage: null } : {}),
  });
  const spared = sparing(course);
  let count = 0;
  for (const { index, first, ...from } of answersOf(asked)) {
    const tokens = made(asked, running, from, spared.of(first));
    let begun = !chat;
    let offset = 0;
    try {
      for (;;) {
        const { value, done } = await tokens.next();
        if (!begun) {
          begun = true;
          const delta = { role: "assistant", content: "", refusal: null };
          yield chunk({ index, delta, logprobs: null, finish_reason: null });
        }
        if (done) {
          yield chunk({ index, ...(chat ? { delta: {} } : { text: "" }), logprobs: null, finish_reason: value });
          break;
        }
        count++;
        const { text } = value.token;
        // Inside a character there is nothing to say yet.
        if (text === "" && asked.logprobs === undefined && !asked.routing) continue;
        yield chunk({
          index,
          ...(chat ? { delta: { content: text } } : { text }),
          ...probabilities(asked, running.tokenizer, [value], offset),
          finish_reason: null,
          ...routingOf(asked, [value]),
        });
        offset += text.length;
      }
    } finally {
      await tokens.return("length");
    }
  }
  if (asked.includeUsage) yield { ...head, choices: [], usage: usage(asked, count, running, spared.tokens()) };
}
