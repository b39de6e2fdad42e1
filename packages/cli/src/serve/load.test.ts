// Many streams at once, a third of them cut off midway: what ends is what the request gives alone, and nothing is left behind.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { afterAll, beforeAll, expect, test } from "vitest";
import { chunksOf, saveChatModel, type TestServer, testServer } from "./serve.test-util.ts";

const root = mkdtempSync(join(tmpdir(), "switchyard-load-"));
let server: TestServer;
beforeAll(async () => {
  await saveChatModel(join(root, "small"));
  server = await testServer(join(root, "small"), { parallel: 8 });
});
afterAll(async () => {
  await server.close();
  rmSync(root, { recursive: true });
});

const streams = 64;
const aborted = (i: number): boolean => i % 3 === 1;

/** Requests of every kind, no two alike. */
function request(i: number): { readonly path: string; readonly body: object } {
  const how = [
    { temperature: 0 },
    { temperature: 1.2, top_p: 0.9 },
    { strategy: "selfContrast", routing: true },
    { temperature: 1, n: 2, logprobs: 2 },
    { strategy: { name: "beam", beams: 2 } },
  ];
  const common = { model: "small", seed: i, max_tokens: aborted(i) ? 30 : 8 + (i % 9), stream: true, ignore_eos: true };
  const prompt = "A whale ship was my Yale College".slice(0, 3 + (i % 20));
  const body = { ...common, stream_options: { include_usage: true }, ...how[i % how.length] };
  if (i % 2 === 0) return { path: "/v1/completions", body: { ...body, prompt } };
  const chat = { ...body, messages: [{ role: "user", content: prompt }] };
  return {
    path: "/v1/chat/completions",
    body: "logprobs" in chat ? { ...chat, logprobs: true, top_logprobs: 2 } : chat,
  };
}

/** What a stream says, without what differs from one request to the next. */
const said = (text: string) => chunksOf(text).map(({ id: _, created: __, ...rest }) => rest);

/** Reads a whole stream, or until some has come. */
async function run(i: number): Promise<string | undefined> {
  const control = new AbortController();
  const { path, body } = request(i);
  const response = await server.post(path, body, { signal: control.signal });
  expect(response.status).toBe(200);
  if (!aborted(i)) return response.text();
  const reader = response.body?.getReader();
  await reader?.read();
  control.abort();
  await reader?.closed.catch(() => undefined);
  return undefined;
}

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

/** Waits until nothing runs; bounded by the test's own time. */
async function idle(): Promise<string> {
  for (;;) {
    const page = await (await fetch(`${server.url}/metrics`)).text();
    if (/^switchyard_requests_running 0$/m.test(page) && /^switchyard_requests_waiting 0$/m.test(page)) return page;
    await sleep(10);
  }
}

test(`${streams} streams at once, a third of them aborted`, async () => {
  const { engine } = server.open.model;
  const live = engine.live();
  const alone: string[] = [];
  for (let i = 0; i < streams; i++) if (!aborted(i)) alone[i] = (await run(i)) ?? "";
  expect(engine.live()).toBe(live);

  const together = async (): Promise<(string | undefined)[]> => {
    const all = await Promise.all(Array.from({ length: streams }, (_, i) => run(i)));
    await idle();
    return all;
  };
  const found = await together();
  expect(found.filter((text) => text !== undefined)).toHaveLength(43);
  for (const [i, text] of found.entries()) {
    if (text !== undefined) expect(said(text), JSON.stringify(request(i))).toEqual(said(alone[i] ?? ""));
  }
  expect(engine.live()).toBe(live);

  // Once more: by now everything that is made once has been made.
  collect();
  const before = process.memoryUsage();
  await together();
  collect();
  const after = process.memoryUsage();
  expect(engine.live()).toBe(live);
  expect(after.heapUsed - before.heapUsed).toBeLessThan(8e6);
  expect(after.rss - before.rss).toBeLessThan(64e6);
  expect(server.failures).toEqual([]);
  const page = await idle();
  const left = [...page.matchAll(/^switchyard_requests_total\{.*status="499"\} (\d+)$/gm)];
  // All but those whose beams come at the end, all at once.
  expect(left.reduce((sum, [, count]) => sum + Number(count), 0)).toBeGreaterThanOrEqual(2 * 16);
});

test("those who come late do not wait for those who came early to end", async () => {
  const ends: string[] = [];
  const ask = async (name: string, tokens: number): Promise<void> => {
    const body = { model: "small", prompt: "A whale", temperature: 0, ignore_eos: true, max_tokens: tokens };
    await (await server.post("/v1/completions", body)).text();
    ends.push(name);
  };
  const long = [ask("long", 55), ask("long", 55)];
  await sleep(5);
  await Promise.all([ask("short", 2), ...long]);
  expect(ends[0]).toBe("short");
});
