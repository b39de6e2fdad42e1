// `switchyard serve`: a checkpoint behind the HTTP API that OpenAI's clients speak.
import { basename, resolve } from "node:path";
import { UnsupportedError } from "@switchyard/core";
import { type ArgsDef, defineCommand } from "citty";
import { readArguments } from "../arguments.ts";
import { interruptible } from "../interrupt.ts";
import type { CommandLine } from "../main.ts";
import { modelArgs, modelArguments, modelName, needTokenizer, withModel } from "../model-arguments.ts";
import type { Streams } from "../terminal.ts";
import { usageText } from "../usage.ts";
import { startServer } from "./server.ts";

const serveArgs = {
  host: { type: "string", description: "Address to listen on (default 127.0.0.1: this machine only)", valueHint: "IP" },
  port: { type: "string", description: "Port (default 8000; 0: any that is free)", valueHint: "N" },
  name: { type: "string", description: "How clients name the model (default: the folder's name)", valueHint: "NAME" },
  parallel: {
    type: "string",
    description: "Requests that generate at once, pass by pass in turn; others wait (default 8)",
    valueHint: "N",
  },
  queue: {
    type: "string",
    description: "Requests that may wait; further ones are sent away (default 256)",
    valueHint: "N",
  },
  "max-body": { type: "string", description: "Size of a request's body at most (default 1MB)", valueHint: "SIZE" },
  "prefix-cache": {
    type: "string",
    description:
      "Memory for keys and values of ended texts, so that a conversation runs its new part only (default none)",
    valueHint: "SIZE",
  },
  "allow-host": {
    type: "string",
    description: "A name by which clients reach this server; may be given several times",
    valueHint: "NAME",
  },
  "allow-origin": {
    type: "string",
    description: "A web page's origin that may ask, such as http://localhost:3000; may be given several times",
    valueHint: "ORIGIN",
  },
  grace: {
    type: "string",
    description: "Seconds that running answers have to end after Ctrl-C or SIGTERM (default 10)",
    valueHint: "N",
  },
  ...modelArgs,
  json: { type: "boolean", description: "Print address and model as one line of JSON" },
} as const satisfies ArgsDef;

const serveCommand = defineCommand({
  meta: { name: "switchyard serve", description: "Serve a checkpoint over HTTP, in the form of OpenAI's API" },
  args: {
    dir: { type: "positional", description: "A checkpoint in the Hugging Face layout", required: true },
    ...serveArgs,
  },
});

const example = `
EXAMPLE

  switchyard serve OLMoE-1B-7B-0924-Instruct --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "OLMoE-1B-7B-0924-Instruct", "messages": [{"role": "user", "content": "Hi"}], "stream": true}'

GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /metrics, GET /health. There are no keys: whoever reaches
the port may ask. Further fields of a request: strategy, routing, top_k, min_p, repetition_penalty, ignore_eos.
`;

/** An aborted signal at SIGTERM, for as long as `act` runs. */
async function terminable<T>(given: AbortSignal | undefined, act: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const control = new AbortController();
  const end = (): void => control.abort();
  process.on("SIGTERM", end);
  try {
    return await act(given ? AbortSignal.any([given, control.signal]) : control.signal);
  } finally {
    process.off("SIGTERM", end);
  }
}

const aborted = (signal: AbortSignal): Promise<void> =>
  new Promise((done) => {
    if (signal.aborted) done();
    else signal.addEventListener("abort", () => done(), { once: true });
  });

/**
 * Runs the command until Ctrl-C or SIGTERM. Answers the exit code: 0 after an orderly end.
 * @throws UnsupportedError, CheckpointError, ShapeError for what a user can mend; an Error where the port is taken.
 */
export async function serve(rest: readonly string[], options: CommandLine, streams: Streams): Promise<number> {
  if (rest.includes("--help") || rest.includes("-h")) {
    streams.out(`${await usageText(serveCommand)}\n${example}`);
    return 0;
  }
  const given = readArguments("serve", serveArgs, rest);
  const args = modelArguments("serve", given);
  const origins = given.texts("allow-origin");
  const wrong = origins.find((one) => !URL.canParse(one) || new URL(one).origin !== one);
  if (wrong !== undefined) {
    throw new UnsupportedError(`--allow-origin takes an origin such as http://localhost:3000, found "${wrong}"`);
  }
  const grace = given.number("grace", { from: 0, to: 3600 }) ?? 10;
  const [json, name] = [given.flag("json"), given.text("name") ?? basename(resolve(args.folder))];
  const settings = {
    // As in a URL, too.
    host: (given.text("host") ?? "127.0.0.1").replace(/^\[(.*)\]$/, "$1"),
    port: given.whole("port", { from: 0, to: 65535 }) ?? 8000,
    parallel: given.whole("parallel", { from: 1, to: 1024 }) ?? 8,
    queue: given.whole("queue", { from: 0, to: 100_000 }) ?? 256,
    maxBody: given.bytes("max-body") ?? 1_000_000,
    prefixBytes: given.bytes("prefix-cache") ?? 0,
    allowedHosts: given.texts("allow-host"),
    allowedOrigins: origins,
    failed: (error: unknown) => {
      streams.error(`switchyard serve: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`);
    },
  };
  const note = (): void => streams.error("Ending: running answers may finish. Ctrl-C again ends at once.\n");
  return terminable(options.signal, (signal) =>
    interruptible({ signal }, note, (stop) =>
      withModel(args, async (open) => {
        const tokenizer = needTokenizer(open, "serve", "Run it by ids: switchyard generate DIR --ids 1,2,3");
        const server = await startServer({ open, tokenizer, name }, settings);
        const { model, chatTemplate } = open;
        const chat = chatTemplate.names.length > 0;
        if (json) {
          const about = { schema: "switchyard/serve/1", url: server.url, model: name, context: model.context, chat };
          streams.out(`${JSON.stringify(about)}\n`);
        } else {
          const without = chat ? "" : "; it has no chat template, so /v1/completions only";
          streams.out(`${modelName(open)} listens on ${server.url}/v1 as "${name}"${without}\n`);
        }
        await aborted(stop);
        await server.stop(grace);
        return 0;
      }),
    ),
  );
}
