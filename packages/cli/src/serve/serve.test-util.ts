// A server on a small checkpoint that can chat, in this process.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { engine } from "@switchyard/core";
import { wasm } from "@switchyard/kernels/wasm";
import { loadModel, type Tokenizer } from "@switchyard/models";
import type { OpenModel } from "../model-arguments.ts";
import { saveSmallModel } from "../small-model.test-util.ts";
import { type RunningServer, type ServerOptions, startServer } from "./server.ts";

/** Refuses what it does not know, as templates do. */
export const template = `{% for m in messages %}{% if m.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}`;

/** Saves a small model with a chat template into `folder`. */
export async function saveChatModel(folder: string): Promise<Tokenizer> {
  const words = await saveSmallModel(folder);
  writeFileSync(join(folder, "chat_template.jinja"), template);
  return words;
}

export interface TestServer extends RunningServer {
  readonly open: OpenModel;
  readonly tokenizer: Tokenizer;
  /** What the server says of its own failures. */
  readonly failures: unknown[];
  post(path: string, body: unknown, init?: RequestInit): Promise<Response>;
  close(): Promise<void>;
}

export async function testServer(
  folder: string,
  {
    memory,
    name = "small",
    ...options
  }: Partial<ServerOptions> & { readonly memory?: number; readonly name?: string } = {},
): Promise<TestServer> {
  const backend = await wasm({ threads: 1 });
  const on = engine(backend);
  const loaded = await loadModel(folder, { engine: on, ...(memory === undefined ? {} : { memory }) });
  const { tokenizer } = loaded;
  if (!tokenizer) throw new Error(`${folder} has no tokenizer`);
  const open: OpenModel = {
    ...loaded,
    folder,
    config: {},
    endIds: [],
    expertBytes: undefined,
    backend: "wasm",
    plugins: [],
  };
  const failures: unknown[] = [];
  const server = await startServer(
    { open, tokenizer, name },
    {
      ...{ host: "127.0.0.1", port: 0, parallel: 4, queue: 100, maxBody: 100_000, prefixBytes: 0 },
      ...{ allowedHosts: [], allowedOrigins: [], failed: (error) => failures.push(error) },
      ...options,
    },
  );
  return {
    ...server,
    ...{ open, tokenizer, failures },
    post: (path, body, init = {}) =>
      fetch(`${server.url}${path}`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: typeof body === "string" ? body : JSON.stringify(body),
        ...init,
      }),
    async close() {
      await server.stop(0);
      await loaded.close();
      backend.dispose?.();
    },
  };
}

/** Chunks of a stream of events, without [DONE], which must be the last. */
export function chunksOf(text: string): { readonly [key: string]: unknown }[] {
  const events = text.split("\n\n").filter((event) => event !== "");
  if (events.pop() !== "data: [DONE]") throw new Error(`the stream does not end with [DONE]: ${text.slice(-200)}`);
  return events.map((event) => JSON.parse(event.replace(/^data: /, "")));
}
