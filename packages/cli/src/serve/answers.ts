// From a request to its answers, in the shapes of OpenAI's API: one object, or a stream of chunks. The answers of one request are made
// one after the other, so that a request for many takes no more turns than one for a single answer.
import { randomUUID } from "node:crypto";
import { type Ending, type GeneratedToken, generate, type Tokenizer } from "@switchyard/models";
import type { Metrics } from "./metrics.ts";
import { type ChosenExperts, type ExpertLoad, observed } from "./observed.ts";
import type { Asked, Served } from "./request.ts";
import type { Turns } from "./turns.ts";

export interface Running extends Served {
  readonly passes: Turns;
  readonly metrics: Metrics;
  readonly load: ExpertLoad;
}

/** A request on its way. */
export interface Course {
  readonly signal: AbortSignal;
  /** Is told of every token. */
  readonly token: () => void;
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
  { signal, token: noted }: Course,
): AsyncGenerator<Made, "stop" | "length", undefined> {
  const { open, tokenizer, passes, metrics, load } = running;
  const { model, routingAt } = observed(open.model, {
    ...{ passes, signal, load, keep: asked.routing },
    passed: (pass) => metrics.pass(pass),
  });
  metrics.prompt(prompt.length);
  const { strategy, maxNew, stop, logprobs = 0 } = asked;
  const tokens = generate(model, {
    ...{ prompt, tokenizer, strategy, maxNew, stop, seed, signal, prefillChunk },
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

/** Text of a token alone, and its bytes; none where it is a part of a character. */
function tokenText(tokenizer: Tokenizer, id: number): { readonly token: string; readonly bytes: number[] | null } {
  // Models may have more ids than their tokenizer.
  const token = id < tokenizer.vocabulary ? tokenizer.decode([id]) : "";
  return { token, bytes: token.includes("\uFFFD") ? null : Array.from(new TextEncoder().encode(token)) };
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
      tokens: list.map(({ token }) => tokenText(tokenizer, token.id).token),
      token_logprobs: list.map(({ token }) => token.logProbability),
      top_logprobs: list.map(({ token: { top = [] } }) =>
        Object.fromEntries(top.map((one) => [tokenText(tokenizer, one.id).token, one.logProbability])),
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
}

function usage(asked: Asked, completion: number): Usage {
  const prompt = asked.prompts.reduce((sum, { length }) => sum + length, 0);
  return { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion };
}

/** Every answer with its number. */
function* answersOf({ prompts, n, seed }: Asked) {
  for (const [i, prompt] of prompts.entries()) {
    for (let j = 0; j < n; j++) yield { index: i * n + j, prompt, seed: seed + j };
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
  let count = 0;
  for (const { index, ...from } of answersOf(asked)) {
    const list: Made[] = [];
    const tokens = made(asked, running, from, course);
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
  return { ...envelope(asked, running, false), choices, usage: usage(asked, count) };
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
  let count = 0;
  for (const { index, ...from } of answersOf(asked)) {
    const tokens = made(asked, running, from, course);
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
  if (asked.includeUsage) yield { ...head, choices: [], usage: usage(asked, count) };
}
