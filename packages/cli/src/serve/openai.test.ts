// OpenAI's own client against the server: what it returns, streams and throws.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { APIError, BadRequestError, NotFoundError } from "openai";
import { afterAll, beforeAll, expect, test } from "vitest";
import { saveChatModel, type TestServer, testServer } from "./serve.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-openai-"));
let server: TestServer;
let client: OpenAI;
beforeAll(async () => {
  await saveChatModel(join(root, "small"));
  server = await testServer(join(root, "small"));
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
});
afterAll(async () => {
  await server.close();
  rmSync(root, { recursive: true });
});

const messages = [
  { role: "developer" as const, content: "Be short." },
  { role: "user" as const, content: [{ type: "text" as const, text: "A whale" }] },
];
const chat = { model: "small", messages, max_completion_tokens: 8, temperature: 0 };

test("models", async () => {
  const list = await client.models.list();
  expect(list.data.map(({ id, object }) => [id, object])).toEqual([["small", "model"]]);
  expect((await client.models.retrieve("small")).id).toBe("small");
  await expect(client.models.retrieve("large")).rejects.toThrow(NotFoundError);
});

test("a chat, whole and as a stream, is the same", async () => {
  const whole = await client.chat.completions.create(chat);
  const [choice] = whole.choices;
  expect(whole).toMatchObject({ object: "chat.completion", model: "small" });
  expect(choice).toMatchObject({ index: 0, finish_reason: "length", message: { role: "assistant" } });
  const content = choice?.message.content ?? "";
  expect(content.length).toBeGreaterThan(0);
  const prompt = server.tokenizer.encode("system: Be short.\nuser: A whale\nassistant:").length;
  const usage = { prompt_tokens: prompt, completion_tokens: 8, total_tokens: prompt + 8 };
  expect(whole.usage).toEqual(usage);

  const stream = await client.chat.completions.create({
    ...chat,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  const finishes: (string | null)[] = [];
  let last: unknown;
  for await (const chunk of stream) {
    expect(chunk.object).toBe("chat.completion.chunk");
    for (const { delta, finish_reason: finish } of chunk.choices) {
      text += delta.content ?? "";
      finishes.push(finish);
    }
    last = chunk.usage;
  }
  expect([text, last]).toEqual([content, usage]);
  expect(finishes.filter((finish) => finish !== null)).toEqual(["length"]);
  // The client's own gathering of chunks.
  const gathered = await client.chat.completions.stream(chat).finalChatCompletion();
  expect(gathered.choices[0]?.message.content).toBe(content);
});

test("several answers draw from seeds that count up", async () => {
  const body = { model: "small", prompt: ["A whale", "My Yale"], max_tokens: 5, temperature: 1.5, seed: 4 };
  const many = await client.completions.create({ ...body, n: 2 });
  expect(many.choices.map(({ index }) => index)).toEqual([0, 1, 2, 3]);
  expect(many.usage?.completion_tokens).toBe(20);
  for (const [i, choice] of many.choices.entries()) {
    const prompt = body.prompt[Math.floor(i / 2)] ?? "";
    const one = await client.completions.create({ ...body, prompt, seed: 4 + (i % 2) });
    expect(one.choices[0]?.text).toBe(choice.text);
  }
  const texts = ["", "", "", ""];
  for await (const { choices } of await client.completions.create({ ...body, n: 2, stream: true })) {
    for (const { index, text } of choices) texts[index] += text;
  }
  expect(texts).toEqual(many.choices.map(({ text }) => text));
});

test("ends before a stop string", async () => {
  const body = { model: "small", prompt: "A whale", max_tokens: 12, temperature: 0 };
  const { text = "" } = (await client.completions.create(body)).choices[0] ?? {};
  const stop = text.slice(3, 5);
  const [choice] = (await client.completions.create({ ...body, stop: ["never said", stop] })).choices;
  expect(choice).toMatchObject({ text: text.slice(0, text.indexOf(stop)), finish_reason: "stop" });
});

test("probabilities of tokens", async () => {
  const asked = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 3 });
  const content = asked.choices[0]?.logprobs?.content ?? [];
  expect(content).toHaveLength(8);
  for (const { logprob, top_logprobs: top, bytes, token } of content) {
    expect(top).toHaveLength(3);
    // Greedy: what is taken is the likeliest.
    expect(top[0]).toEqual({ token, bytes, logprob });
    expect(logprob).toBeLessThan(0);
    expect(top.reduce((sum, one) => sum + Math.exp(one.logprob), 0)).toBeLessThan(1);
  }
  const body = { model: "small", prompt: "A whale", max_tokens: 4, temperature: 0, logprobs: 2 };
  const [choice] = (await client.completions.create(body)).choices;
  const {
    tokens = [],
    token_logprobs: each = [],
    top_logprobs: top = [],
    text_offset: at = [],
  } = choice?.logprobs ?? {};
  expect([tokens.length, each.length, top.length, at.length]).toEqual([4, 4, 4, 4]);
  expect(at[0]).toBe(0);
  expect(Math.max(...Object.values(top[0] ?? {}))).toBe(each[0]);
  // Parts of characters are told apart by their bytes.
  const wide = (await client.completions.create({ ...body, logprobs: 20 })).choices[0]?.logprobs;
  const names = (wide?.top_logprobs ?? []).map((one) => Object.keys(one));
  expect(names.map((one) => one.length)).toEqual([20, 20, 20, 20]);
  expect(names.flat().some((name) => /^bytes:(\\x[0-9a-f]{2})+$/.test(name))).toBe(true);
  expect(names.flat().join("")).not.toContain("\uFFFD");
  const all = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 20 });
  for (const { token, bytes, top_logprobs: top } of all.choices[0]?.logprobs?.content ?? []) {
    for (const one of [{ token, bytes }, ...top]) {
      const text = new TextDecoder().decode(Uint8Array.from(one.bytes ?? []));
      if (text.includes("\uFFFD")) expect(one.token).toMatch(/^(\\x[0-9a-f]{2})+$/);
      else expect([one.token, text.length > 0]).toEqual([text, true]);
    }
  }
  const none = await client.chat.completions.create({ ...chat, logprobs: true });
  expect(none.choices[0]?.logprobs?.content?.[0]?.top_logprobs).toEqual([]);
});

test("the client leaves midway", async () => {
  const { engine } = server.open.model;
  const live = engine.live();
  const body = { model: "small", prompt: "A whale", max_tokens: 55, stream: true as const, temperature: 0 };
  const stream = await client.completions.create(body);
  let count = 0;
  for await (const _ of stream) if (++count === 3) break;
  expect(stream.controller.signal.aborted).toBe(true);
  while (engine.live() !== live) await new Promise((done) => setTimeout(done, 5));
});

test("throws the errors that it has for them", async () => {
  const error = async (asking: Promise<unknown>): Promise<APIError> => {
    const found = await asking.then(
      () => undefined,
      (thrown: unknown) => thrown,
    );
    if (!(found instanceof APIError)) throw new Error("expected an APIError");
    return found;
  };
  const unknown = await error(client.chat.completions.create({ ...chat, model: "gpt-4o" }));
  expect(unknown).toBeInstanceOf(NotFoundError);
  expect(unknown).toMatchObject({ status: 404, code: "model_not_found", param: "model" });
  const long = await error(client.chat.completions.create({ ...chat, max_completion_tokens: 64 }));
  expect(long).toBeInstanceOf(BadRequestError);
  expect(long).toMatchObject({ status: 400, code: "context_length_exceeded", type: "invalid_request_error" });
  expect(long.message).toMatch(/maximum context length is 64 tokens/);
  const hot = await error(client.chat.completions.create({ ...chat, temperature: 9, stream: true }));
  expect(hot).toMatchObject({ status: 400, param: "temperature" });
  const tool = { type: "function" as const, function: { name: "f" } };
  expect(await error(client.chat.completions.create({ ...chat, tools: [tool] }))).toMatchObject({ param: "tools" });
});

test("throws where a stream cannot go on, and where a server is full", async () => {
  const ending = await testServer(join(root, "small"), { parallel: 1, queue: 0 });
  const other = new OpenAI({ baseURL: `${ending.url}/v1`, apiKey: "none", maxRetries: 0 });
  const body = { model: "small", prompt: "A whale", max_tokens: 55, temperature: 0, ignore_eos: true };
  const stream = await other.completions.create({ ...body, stream: true as const });
  await expect(other.completions.create(body)).rejects.toMatchObject({ status: 503, code: "overloaded" });
  const read = async (): Promise<void> => {
    for await (const _ of stream) await ending.stop(0);
  };
  const thrown = await read().then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(thrown).toBeInstanceOf(APIError);
  expect(thrown).toMatchObject({ code: "stopping", type: "server_error" });
  await ending.open.close();
});

test("fields of our own pass through the client", async () => {
  const body = { ...chat, strategy: { name: "selfContrast", beta: 0.3 }, routing: true, temperature: null };
  const { choices } = await client.chat.completions.create(body);
  const [choice] = choices;
  if (!choice || !("routing" in choice)) throw new Error("expected routing");
  expect(choice.routing).toHaveLength(8);
});
