// The server against fetch: who may ask, what is refused and how, the extra fields, the figures, and the end.

import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { request as rawRequest } from "node:http";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { decodingStrategies, generate, traced, traceRecorder } from "@switchyard/models";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { main } from "../main.ts";
import { runCommand } from "../run.test-util.ts";
import { saveSmallModel } from "../small-model.test-util.ts";
import { optionsOf, strategyNames } from "../strategies.ts";
import { chunksOf, saveChatModel, type TestServer, testServer } from "./serve.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-serve-"));
const folder = join(root, "small");
let server: TestServer;
beforeAll(async () => {
  await saveChatModel(folder);
  server = await testServer(folder, { allowedOrigins: ["http://localhost:3000"], allowedHosts: ["moe.example"] });
});
afterAll(async () => {
  expect(server.failures).toEqual([]);
  await server.close();
  rmSync(root, { recursive: true });
});

const ask = { model: "small", prompt: "A whale", max_tokens: 6, temperature: 0 };
const chat = { model: "small", messages: [{ role: "user", content: "A whale" }], max_tokens: 6, temperature: 0 };
const text = (body: object) => server.post("/v1/completions", { ...ask, ...body });

describe("who may ask", () => {
  const status = (path: string, headers: Record<string, string>, method = "GET") =>
    new Promise<{ status: number | undefined; headers: Record<string, unknown>; body: string }>((resolve, reject) => {
      const sent = rawRequest(`${server.url}${path}`, { method, headers }, (response) => {
        let body = "";
        response.on("data", (part) => {
          body += part;
        });
        response.on("end", () => resolve({ status: response.statusCode, headers: response.headers, body }));
      });
      sent.on("error", reject);
      sent.end();
    });
  test.each([
    ["127.0.0.1:1", 200],
    ["localhost", 200],
    ["LOCALHOST:80", 200],
    ["[::1]:80", 200],
    ["moe.example:8000", 200],
    ["evil.example", 403],
    ["localhost.evil.example", 403],
    ["192.168.0.1", 403],
  ])("Host %s: %d", async (host, expected) => {
    const found = await status("/v1/models", { host });
    expect(found.status).toBe(expected);
    if (expected === 403) expect(JSON.parse(found.body).error.code).toBe("host_not_allowed");
  });
  test("pages of an origin that was named, and no others", async () => {
    const refused = await status("/metrics", { origin: "https://evil.example" });
    expect([refused.status, JSON.parse(refused.body).error.code]).toEqual([403, "origin_not_allowed"]);
    expect(refused.headers).not.toHaveProperty("access-control-allow-origin");
    expect((await status("/v1/models", { origin: "null" })).status).toBe(403);
    const allowed = await status("/v1/models", { origin: "http://localhost:3000" });
    expect([allowed.status, allowed.headers["access-control-allow-origin"]]).toEqual([200, "http://localhost:3000"]);
    const asking = { origin: "http://localhost:3000", "access-control-request-headers": "content-type,authorization" };
    const preflight = await status("/v1/completions", asking, "OPTIONS");
    expect(preflight.status).toBe(204);
    expect(preflight.headers["access-control-allow-headers"]).toBe("content-type,authorization");
    expect((await status("/v1/completions", { origin: "http://evil.example" }, "OPTIONS")).status).toBe(403);
  });
});

describe("refuses in OpenAI's shape", () => {
  test.each<[string, object, number, string | null, string, RegExp]>([
    ["an unknown model", { model: "gpt-4" }, 404, "model", "model_not_found", /'gpt-4' does not exist.*'small'/],
    ["no model", { model: null }, 400, "model", "invalid_value", /must provide a 'model'/],
    ["a path for a model", { model: "../small" }, 404, "model", "model_not_found", /does not exist/],
    ["no prompt", { prompt: null }, 400, "prompt", "invalid_value", /a list of token ids/],
    ["an empty prompt", { prompt: [[1], []] }, 400, "prompt", "invalid_value", /has no tokens/],
    ["ids beyond the vocabulary", { prompt: [1, 100000] }, 400, "prompt", "invalid_value", /token ids go from 0 to/],
    ["heat", { temperature: 2.5 }, 400, "temperature", "invalid_value", /from 0 to 2, found 2.5/],
    ["heat as text", { temperature: "hot" }, 400, "temperature", "invalid_value", /number from 0 to 2, found "hot"/],
    ["a share above 1", { top_p: 1.1 }, 400, "top_p", "invalid_value", /from 0 to 1/],
    ["half a token", { max_tokens: 1.5 }, 400, "max_tokens", "invalid_value", /whole number from 1/],
    ["too long", { max_tokens: 63 }, 400, "prompt", "context_length_exceeded", /maximum context length is 64 tokens/],
    ["many answers", { n: 65 }, 400, "n", "invalid_value", /from 1 to 64/],
    ["many prompts", { prompt: Array(65).fill([1]) }, 400, "prompt", "invalid_value", /65 prompts; at most 64/],
    ["many answers in all", { n: 40, prompt: ["a", "b"] }, 400, "n", "invalid_value", /80; at most 64/],
    ["an empty stop", { stop: [""] }, 400, "stop", "invalid_value", /none of them empty/],
    ["a misspelt field", { max_token: 3 }, 400, "max_token", "unknown_parameter", /Unknown parameter: 'max_token'/],
    ["a penalty", { presence_penalty: 1 }, 400, "presence_penalty", "unsupported_parameter", /repetition_penalty/],
    ["echo", { echo: true }, 400, "echo", "unsupported_parameter", /not supported/],
    ["options of no stream", { stream_options: {} }, 400, "stream_options", "invalid_value", /needs 'stream'/],
    ["an unknown strategy", { strategy: "best" }, 400, "strategy", "invalid_value", /strategy takes greedy, sample/],
    ["a strategy without a name", { strategy: { beta: 1 } }, 400, "strategy.name", "invalid_value", /must name/],
    [
      "the amateur",
      { strategy: { name: "greedy", amateur: "/etc" } },
      400,
      "strategy.amateur",
      "unknown_parameter",
      /./,
    ],
    ["contrastive", { strategy: "contrastive" }, 400, "strategy", "invalid_value", /a second model/],
    [
      "an option of another strategy",
      { temperature: null, strategy: { name: "greedy", beta: 1 } },
      ...([400, "strategy", "invalid_value", /^beta is for strategy selfContrast, contrastive; greedy takes/] as const),
    ],
    ["heat for greedy", { strategy: "greedy" }, 400, "strategy", "invalid_value", /temperature is for strategy sample/],
    [
      "a pattern of a stranger",
      { strategy: { name: "selfConsistency", answer: "(a+)+$" } },
      ...([400, "strategy.answer", "invalid_value", /"number" or "line"/] as const),
    ],
    [
      "many beams",
      { temperature: null, strategy: { name: "beam", beams: 1000 } },
      ...([400, "strategy.beams", "invalid_value", /at most 16/] as const),
    ],
    [
      "routing of beams",
      { temperature: null, strategy: "beam", routing: true },
      ...([400, "routing", "invalid_value", /does not go with the strategy beam/] as const),
    ],
    [
      "a rank that the model does not have",
      { temperature: null, strategy: { name: "selfContrast", weak_rank: 9 }, stream: true },
      ...([400, null, "invalid_request", /rank/] as const),
    ],
  ])("%s", async (_, body, status, param, code, message) => {
    const response = await text(body);
    const { error } = await response.json();
    expect({ status: response.status, ...error }).toEqual({
      ...{ status, type: "invalid_request_error", param, code },
      message: expect.stringMatching(message),
    });
  });
  test.each<[string, object, string | null, RegExp]>([
    ["no messages", { messages: [] }, "messages", /at least one message/],
    ["a role", { messages: [{ role: "king", content: "x" }] }, "messages[0].role", /system, developer, user/],
    [
      "a picture",
      { messages: [{ role: "user", content: [{ type: "image_url", image_url: { url: "x" } }] }] },
      ...(["messages[0].content", /this model reads text/] as const),
    ],
    ["what the template refuses", { messages: [{ role: "tool", content: "x" }] }, null, /refuses .* no tools here/],
    ["tools", { tools: [{ type: "function" }] }, "tools", /not supported/],
    ["JSON mode", { response_format: { type: "json_object" } }, "response_format", /plain text/],
    ["two limits", { max_completion_tokens: 3 }, "max_tokens", /differ/],
    ["alternatives alone", { top_logprobs: 2 }, "top_logprobs", /needs 'logprobs'/],
    ["a conversation too long", { messages: [{ role: "user", content: "whale ".repeat(99) }] }, "messages", /maximum/],
  ])("of a chat, %s", async (_, body, param, message) => {
    const response = await server.post("/v1/chat/completions", { ...chat, ...body });
    const { error } = await response.json();
    expect([response.status, error.param]).toEqual([400, param]);
    expect(error.message).toMatch(message);
  });
  test("bodies that are no JSON object, of another type, or too large", async () => {
    const of = async (response: Response) => [response.status, (await response.json()).error.code];
    for (const body of ['{"model":', "[1]", "7", "null", '"\uD800"']) {
      expect(await of(await server.post("/v1/completions", body))).toEqual([400, "invalid_json"]);
    }
    expect(await of(await server.post("/v1/completions", "[".repeat(90_000)))).toEqual([400, "invalid_json"]);
    const nested = `{"model":"small","prompt":${"[".repeat(40_000)}${"]".repeat(40_000)}}`;
    expect(await of(await server.post("/v1/completions", nested))).toEqual([400, "invalid_value"]);
    const typed = { headers: { "content-type": "text/plain" } };
    expect(await of(await server.post("/v1/completions", ask, typed))).toEqual([415, "unsupported_media_type"]);
    const large = { ...ask, prompt: "x".repeat(500_000) };
    expect(await of(await server.post("/v1/completions", large))).toEqual([413, "body_too_large"]);
    // Without a length it is found while it comes.
    const stream = new Blob([JSON.stringify(large)]).stream();
    const init: RequestInit & { duplex: "half" } = { body: stream, duplex: "half" };
    expect(await of(await server.post("/v1/completions", "", init))).toEqual([413, "body_too_large"]);
  });
  test("unknown paths and methods", async () => {
    const of = async (path: string, init?: RequestInit) => {
      const response = await fetch(`${server.url}${path}`, init);
      return [response.status, (await response.json()).error.code];
    };
    expect(await of("/v1/embeddings", { method: "POST" })).toEqual([404, "unknown_url"]);
    expect(await of("/v1/models/..%2F..%2Fetc%2Fpasswd")).toEqual([404, "model_not_found"]);
    expect(await of("/v1/models/%ff")).toEqual([400, null]);
    expect(await of("/v1/completions")).toEqual([405, "method_not_allowed"]);
    expect(await of("/health", { method: "DELETE" })).toEqual([405, "method_not_allowed"]);
  });
});

describe("the extra fields", () => {
  const ids = async (options: Omit<Parameters<typeof generate>[1], "prompt">): Promise<string> => {
    let made = "";
    const { tokenizer, open } = server;
    for await (const token of generate(open.model, { prompt: "A whale", tokenizer, maxNew: 6, ...options })) {
      made += token.text;
    }
    return made;
  };
  const textOf = async (body: object) => {
    const response = await text(body);
    const answer = await response.json();
    expect([response.status, answer.error]).toEqual([200, undefined]);
    return answer.choices[0].text;
  };
  test("strategies give what the function gives", async () => {
    const { selfContrast, beam, sample, greedy, doLa, selfConsistency } = decodingStrategies;
    const t = { temperature: null };
    expect(await textOf({ ...t, strategy: "greedy" })).toBe(await ids({ strategy: greedy() }));
    expect(await textOf({ ...t, strategy: { name: "selfContrast", beta: 0.7, weak_rank: 1 } })).toBe(
      await ids({ strategy: selfContrast({ beta: 0.7, weakRank: 1 }) }),
    );
    expect(await textOf({ ...t, strategy: { name: "beam", beams: 3, length_penalty: -0.5 } })).toBe(
      await ids({ strategy: beam({ width: 3, lengthPenalty: -0.5 }) }),
    );
    expect(await textOf({ ...t, strategy: { name: "doLa", layers: [0, 1] }, seed: 5, top_k: 9 })).toBe(
      await ids({ strategy: doLa({ layers: [0, 1], topK: 9 }), seed: 5 }),
    );
    expect(
      await textOf({ temperature: 1.5, strategy: { name: "selfConsistency", answer: "line", samples: 3 }, seed: 2 }),
    ).toBe(
      await ids({
        seed: 2,
        strategy: selfConsistency({
          samples: 3,
          answer: ({ text: made }) => /^[\s\S]*?([^\n]*)\s*$/u.exec(made)?.[1],
          strategy: sample({ temperature: 1.5 }),
        }),
      }),
    );
    const drawn = { temperature: 1.3, top_p: 0.9, top_k: 40, min_p: 0.01, repetition_penalty: 1.1, seed: 7 };
    const same = { temperature: 1.3, topP: 0.9, topK: 40, minP: 0.01, repetitionPenalty: 1.1, seed: 7 };
    expect(await textOf(drawn)).toBe(await ids(same));
    expect(await textOf({ temperature: 2, top_p: 0 })).toBe(await ids({ strategy: greedy() }));
  });

  test("routing names the experts of every token, as a trace records them", async () => {
    const { model, tokenizer } = server.open;
    const seen: { experts: number[]; weights: number[] }[][] = [];
    const recorder = traceRecorder(
      { write: async () => undefined },
      { model: { name: "small" }, routing: model.routing },
    );
    // The reference is a second reading of the same passes.
    const watched = {
      ...model,
      step: async (ids: Parameters<typeof model.step>[0], given: Parameters<typeof model.step>[1] = {}) => {
        const layers: Promise<{ experts: number[]; weights: number[] }>[] = [];
        const record: NonNullable<typeof given.trace>["record"] = (layer, routed) => {
          given.trace?.record(layer, routed);
          if (routed.plan.kind !== "sparse") throw new Error("expected a sparse plan");
          const { experts, weights } = routed.plan;
          layers.push(
            Promise.all([experts.data(), weights.data()]).then(([e, w]) => ({
              experts: Array.from(e, Number).slice(-2),
              weights: Array.from(w, Number).slice(-2),
            })),
          );
        };
        const logits = await model.step(ids, { ...given, trace: { record } });
        seen.push(await Promise.all(layers));
        return logits;
      },
    };
    const made: number[] = [];
    const strategy = decodingStrategies.greedy();
    const tokens = generate(traced(watched, recorder), {
      ...{ prompt: "A whale", maxNew: 5, strategy },
      ...(tokenizer ? { tokenizer } : {}),
    });
    for await (const { id } of tokens) made.push(id);
    const expected = seen.map((layers, i) => ({
      token_id: made[i],
      layers: layers.map(({ experts, weights }, layer) => ({ layer, part: "feedForward", experts, weights })),
    }));
    const whole = await (await text({ max_tokens: 5, routing: true })).json();
    expect(whole.choices[0].routing).toEqual(expected);
    const streamed = chunksOf(await (await text({ max_tokens: 5, routing: true, stream: true })).text());
    const found = streamed.flatMap(({ choices }) => (choices as { routing?: object[] }[])[0]?.routing ?? []);
    expect(found).toEqual(expected);
    // The strong pass, not the weak one.
    const contrast = { temperature: null, strategy: { name: "selfContrast", beta: 0 }, routing: true, max_tokens: 5 };
    expect((await (await text(contrast)).json()).choices[0].routing[0].layers).toEqual(expected[0]?.layers);
  });
});

test("whatever is asked, the answer is one or a reason", async () => {
  const values = [
    ...[null, true, false, 0, 1, -1, 0.5, 7, 1e9, 1e300, "", "x", "greedy", "line", [], [1], ["x"], [[1, 2]], [null]],
    ...[{}, { name: "beam" }, { type: "text" }, { role: "user", content: "x" }, [{ role: "user", content: "x" }]],
  ];
  const fields = [
    ...["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "stream", "stream_options"],
    ...["logprobs", "top_logprobs", "seed", "routing", "strategy", "tools", "logit_bias", "user", "echo", "toString"],
    ...["response_format", "ignore_eos", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "alpha"],
  ];
  let state = 1;
  const next = <T>(list: readonly T[]): T => {
    state = (state * 48_271) % 2_147_483_647;
    return list[state % list.length] as T;
  };
  const seen = new Map<number, number>();
  for (let i = 0; i < 400; i++) {
    const name = next(strategyNames);
    const option = next([...optionsOf[name], "amateur", "__proto__", "strategy"]).replaceAll("-", "_");
    const strategy = i % 3 === 0 ? { temperature: null, strategy: { name, [option]: next(values) } } : {};
    const changed = i % 5 < 3 ? { [next(fields)]: next(values) } : {};
    const [path, usual] = i % 2 === 0 ? ["/v1/completions", ask] : ["/v1/chat/completions", chat];
    const body = { ...usual, max_tokens: 2, ...strategy, ...changed };
    const response = await server.post(path, body);
    const answer = await response.text();
    expect([200, 400, 404], `${JSON.stringify(body)}: ${answer}`).toContain(response.status);
    seen.set(response.status, (seen.get(response.status) ?? 0) + 1);
  }
  expect(server.failures).toEqual([]);
  for (const status of [200, 400]) expect(seen.get(status)).toBeGreaterThan(100);
});

test("/metrics counts what happens", async () => {
  const figures = async () => {
    const page = await (await fetch(`${server.url}/metrics`)).text();
    const lines = page.split("\n").filter((line) => line !== "" && !line.startsWith("#"));
    // Every family is declared before its samples, once.
    const types = [...page.matchAll(/^# TYPE (\S+) (counter|gauge|summary)$/gm)].map(([, name]) => name);
    expect(new Set(types).size).toBe(types.length);
    for (const line of lines) expect(line).toMatch(/^[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[\d.e+-]+$/);
    return new Map(lines.map((line) => [line.slice(0, line.lastIndexOf(" ")), Number(line.split(" ").at(-1))]));
  };
  const before = await figures();
  await (await text({ prompt: [1, 2, 3], max_tokens: 5 })).text();
  await text({ model: "other" });
  await sleep(10);
  const after = await figures();
  const grown = (name: string): number => (after.get(name) ?? Number.NaN) - (before.get(name) ?? 0);
  expect(grown("switchyard_generated_tokens_total")).toBe(5);
  expect(grown("switchyard_prompt_tokens_total")).toBe(3);
  expect(grown("switchyard_pass_tokens_total")).toBe(7);
  expect(grown('switchyard_requests_total{endpoint="/v1/completions",status="200"}')).toBe(1);
  expect(grown('switchyard_requests_total{endpoint="/v1/completions",status="404"}')).toBe(1);
  expect([after.get("switchyard_requests_running"), after.get("switchyard_requests_waiting")]).toEqual([0, 0]);
  // Two of four experts for each of seven tokens, in both layers.
  for (const layer of [0, 1]) {
    const experts = [0, 1, 2, 3].map((expert) =>
      grown(`switchyard_expert_tokens_total{layer="${layer}",part="feedForward",expert="${expert}"}`),
    );
    expect(experts.reduce((sum, n) => sum + n, 0)).toBe(14);
    expect(after.get(`switchyard_layer_busiest_load{layer="${layer}",part="feedForward"}`)).toBeGreaterThanOrEqual(1);
  }
  expect(after.get("switchyard_live_tensors")).toBe(server.open.model.engine.live());
});

test("what ended texts leave behind is not run again", async () => {
  const keeping = await testServer(folder, { prefixBytes: 1e6 });
  const { engine } = keeping.open.model;
  const live = engine.live();
  const messages = [{ role: "user", content: "A whale" }];
  const reused: number[] = [];
  for (const content of ["My", "was", ""]) {
    const asked = { ...chat, messages, max_tokens: 4 };
    const plain = await (await server.post("/v1/chat/completions", asked)).json();
    const found = await (await keeping.post("/v1/chat/completions", asked)).json();
    expect([found.choices, found.error]).toEqual([plain.choices, undefined]);
    expect(plain.usage).not.toHaveProperty("prompt_tokens_details");
    expect(found.usage).toMatchObject(plain.usage);
    reused.push(found.usage.prompt_tokens_details.cached_tokens);
    messages.push({ role: "assistant", content: "ship" }, { role: "user", content });
  }
  expect(reused[0]).toBe(0);
  expect(reused[1]).toBeGreaterThan(5);
  expect(reused[2]).toBeGreaterThan(reused[1] ?? 0);
  // Several answers to one prompt: the prompt of the first counts, those of the others are spared beside.
  const many = { ...ask, prompt: "Yale ship", n: 3, stream: true, stream_options: { include_usage: true } };
  const chunks = chunksOf(await (await keeping.post("/v1/completions", many)).text());
  expect(chunks.at(-1)?.usage).toMatchObject({ prompt_tokens_details: { cached_tokens: 0 } });
  // Streams that are left, and others beside them.
  const bodies = Array.from({ length: 12 }, (_, i) => ({
    ...ask,
    prompt: `A whale ship${" was".repeat(i % 4)}`,
    seed: i,
  }));
  const alone: unknown[] = [];
  for (const body of bodies) alone.push((await (await server.post("/v1/completions", body)).json()).choices);
  const together = bodies.map(async (body, i) => {
    if (i % 3 !== 1) return (await (await keeping.post("/v1/completions", body)).json()).choices;
    const control = new AbortController();
    const long = { ...body, max_tokens: 40, stream: true };
    const response = await keeping.post("/v1/completions", long, { signal: control.signal });
    await response.body?.getReader().read();
    control.abort();
    return alone[i];
  });
  expect(await Promise.all(together)).toEqual(alone);
  const page = async () => (await fetch(`${keeping.url}/metrics`)).text();
  while (!/^switchyard_requests_running 0$/m.test(await page())) await sleep(5);
  const figure = async (name: string) => Number(new RegExp(`^${name} (\\S+)$`, "m").exec(await page())?.[1]);
  expect(await figure("switchyard_prompt_reused_tokens_total")).toBeGreaterThan(2 * (reused[2] ?? 0));
  expect(await figure("switchyard_prefix_texts")).toBeGreaterThan(2);
  expect(await figure("switchyard_prefix_bytes")).toBeGreaterThan(1000);
  expect(engine.live()).toBeGreaterThan(live);
  await keeping.stop(1);
  expect(engine.live()).toBe(live);
  await keeping.open.close();

  // Room for a single short text only.
  const little = await testServer(folder, { prefixBytes: 2 * 2 * 16 * 4 * 20 });
  for (const prompt of ["A whale", "Yale", "My ship was a whale"])
    await (await little.post("/v1/completions", { ...ask, prompt })).json();
  const held = Number(
    /^switchyard_prefix_bytes (\d+)$/m.exec(await (await fetch(`${little.url}/metrics`)).text())?.[1],
  );
  expect(held).toBeGreaterThan(0);
  expect(held).toBeLessThanOrEqual(2 * 2 * 16 * 4 * 20);
  await little.close();
});

test("/metrics shows the cache of streamed experts, and the text is the same", async () => {
  const refused = await testServer(folder, { memory: 1 }).then(String, String);
  const [, least = "", unit] = /needs ([\d.]+) (kB|MB) of memory/.exec(refused) ?? [];
  const memory = Math.round(Number(least) * (unit === "MB" ? 1e6 : 1e3)) + 10_000;
  const little = await testServer(folder, { memory });
  const whole = await (await text({ max_tokens: 12 })).json();
  const streamed = await (await little.post("/v1/completions", { ...ask, max_tokens: 12 })).json();
  expect(streamed.choices).toEqual(whole.choices);
  const page = await (await fetch(`${little.url}/metrics`)).text();
  const { requests = 0, hits = 0, bytesRead = 0 } = little.open.model.streamed?.counts() ?? {};
  expect(hits).toBeGreaterThan(0);
  expect(requests).toBeGreaterThan(hits);
  expect(page).toContain(`\nswitchyard_expert_requests_total ${requests}\n`);
  expect(page).toContain(`\nswitchyard_expert_cache_hits_total ${hits}\n`);
  expect(page).toContain(`\nswitchyard_expert_read_bytes_total ${bytesRead}\n`);
  await little.close();
});

test("who finds the queue full is sent away", async () => {
  const none = await testServer(folder, { parallel: 1, queue: 0 });
  expect((await none.post("/v1/completions", ask)).status).toBe(200);
  await none.close();
  const busy = await testServer(folder, { parallel: 1, queue: 1 });
  const long = { ...ask, max_tokens: 40, ignore_eos: true };
  const answers = await Promise.all(
    Array.from({ length: 6 }, async () => {
      const response = await busy.post("/v1/completions", long);
      return [response.status, (await response.json()).error?.code, response.headers.get("retry-after")];
    }),
  );
  await busy.close();
  const fine = answers.filter(([status]) => status === 200);
  const away = answers.filter(([status]) => status !== 200);
  expect(fine.length).toBeGreaterThanOrEqual(2);
  expect(away.length).toBeGreaterThan(0);
  for (const one of away) expect(one).toEqual([503, "overloaded", "1"]);
});

test("at its end running answers finish, waiting ones are sent away, and nothing new is taken", async () => {
  const ending = await testServer(folder, { parallel: 1 });
  const long = { ...ask, max_tokens: 40, ignore_eos: true, stream: true };
  const first = await ending.post("/v1/completions", long);
  const waiting = ending.post("/v1/completions", long);
  const figures = async () => (await fetch(`${ending.url}/metrics`)).text();
  while (!(await figures()).includes("\nswitchyard_requests_waiting 1\n")) await sleep(2);
  const stopped = ending.stop(30);
  expect((await waiting).status).toBe(503);
  expect(chunksOf(await first.text()).at(-1)).toMatchObject({ choices: [{ finish_reason: "length" }] });
  await stopped;
  await expect(fetch(`${ending.url}/health`)).rejects.toThrow();
  await ending.open.close();
});

test("after the time of grace running answers end too, in words", async () => {
  const ending = await testServer(folder);
  const response = await ending.post("/v1/completions", { ...ask, max_tokens: 50, ignore_eos: true, stream: true });
  await ending.stop(0);
  const events = (await response.text()).split("\n\n").filter((event) => event !== "");
  expect(JSON.parse(events.at(-1)?.replace("data: ", "") ?? "").error).toMatchObject({ code: "stopping" });
  expect(ending.open.model.engine.live()).toBe(server.open.model.engine.live());
  await ending.open.close();
});

test("its end waits for nobody who asks nothing, or never comes to the end of it", async () => {
  const ending = await testServer(folder);
  const { port } = new URL(ending.url);
  const opened = async (text: string) => {
    const socket = connect(Number(port), "127.0.0.1");
    await once(socket, "connect");
    let said = "";
    socket.on("data", (part) => {
      said += part;
    });
    socket.write(text);
    return { gone: once(socket, "close").then(() => said) };
  };
  const head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
  const open = [
    await opened(""),
    await opened("GET /health HTTP/1.1\r\nHost: localhost\r\n"),
    await opened(`${head}Content-Length: 100\r\n\r\n{`),
    await opened(`${head}Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n`),
  ];
  await sleep(20);
  const started = performance.now();
  await ending.stop(30);
  expect(performance.now() - started).toBeLessThan(2000);
  const said = await Promise.all(open.map(({ gone }) => gone));
  expect(said.slice(0, 2)).toEqual(["", ""]);
  for (const one of said.slice(2)) expect(one).toMatch(/^HTTP\/1.1 503 [\s\S]*"code":"stopping"/);
  expect(ending.failures).toEqual([]);
  await ending.open.close();
});

test("an answer that is slow to be taken is not cut off at the end", async () => {
  // More than the buffers between the two hold.
  const name = "x".repeat(20e6);
  const ending = await testServer(folder, { name });
  const socket = connect(Number(new URL(ending.url).port), "127.0.0.1");
  await once(socket, "connect");
  socket.pause();
  socket.write("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const page = async () => (await fetch(`${ending.url}/metrics`)).text();
  await page();
  await sleep(100);
  expect(await page()).not.toContain('endpoint="/v1/models"');
  const stopped = ending.stop(30);
  await sleep(50);
  let size = 0;
  socket.on("data", (part) => {
    size += part.length;
  });
  socket.resume();
  await once(socket, "close");
  await stopped;
  expect(size).toBeGreaterThan(name.length);
  await ending.open.close();
});

describe("the command", () => {
  test("serves until Ctrl-C or SIGTERM", async () => {
    const plain = join(root, "plain");
    await saveSmallModel(plain);
    for (const [dir, signal] of [
      [folder, "SIGINT"],
      [plain, "SIGTERM"],
    ] as const) {
      let url = "";
      let body: Promise<unknown> = Promise.resolve();
      let answer: Promise<Response> | undefined;
      const streams = {
        out(line: string) {
          url = JSON.parse(line).url;
          answer = fetch(`${url}/v1/chat/completions`, {
            method: "POST",
            headers: { "content-type": "application/json" },
            body: JSON.stringify({ ...chat, model: "whale" }),
          });
          body = answer.then((response) => response.json()).finally(() => process.emit(signal));
        },
        error: () => undefined,
      };
      const args = ["serve", dir, "--port", "0", "--backend", "cpu", "--name", "whale", "--json", "--grace", "1"];
      expect(await main(args, { streams })).toBe(0);
      const status = (await answer)?.status;
      if (dir === folder) {
        expect([status, await body]).toMatchObject([200, { model: "whale" }]);
      } else {
        const message = expect.stringContaining("this checkpoint has no chat template");
        expect([status, await body]).toMatchObject([400, { error: { message } }]);
      }
    }
    expect([process.listenerCount("SIGINT"), process.listenerCount("SIGTERM")]).toEqual([0, 0]);
  });
  test("explains itself", async () => {
    const { code, out } = await runCommand(["serve", "--help"]);
    expect(code).toBe(0);
    for (const part of ["--host", "--port", "--allow-origin", "EXAMPLE", "/v1/chat/completions", "/metrics"]) {
      expect(out).toContain(part);
    }
  });
  test.each([
    [[], /serve takes one checkpoint folder/],
    [["a", "--port", "70000"], /--port takes a whole number from 0 to 65535/],
    [["a", "--allow-origin", "localhost"], /--allow-origin takes an origin/],
    [["a", "--allow-origin", "http://a/b"], /--allow-origin takes an origin/],
    [["a", "--max-body", "much"], /--max-body takes a size/],
    [[folder, "--port", "0", "--host", "nosuch.invalid"], /cannot listen on nosuch.invalid:0 .*choose another --host/],
    [["a"], /a has no config\.json/],
  ])("refuses %j", async (args, message) => {
    const { code, error } = await runCommand(["serve", ...args, "--backend", "cpu"]);
    expect(code).toBe(1);
    expect(error).toMatch(message);
  });
  test("says which port is taken", async () => {
    const { port } = new URL(server.url);
    const { code, error } = await runCommand(["serve", folder, "--port", port, "--backend", "cpu"]);
    expect([code, error]).toEqual([
      1,
      `switchyard: cannot listen on 127.0.0.1:${port} (EADDRINUSE): something listens there already; choose another --port\n`,
    ]);
  });
});
