// The HTTP server: who may ask, which path means what, bodies in and answers out, and an orderly end.
import { once } from "node:events";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { type AddressInfo, isIP, Server as NetServer } from "node:net";
import { prefixCache } from "@switchyard/models";
import { answer, chunks, type Running } from "./answers.ts";
import { ApiError, apiError } from "./errors.ts";
import { type Body, isBody } from "./fields.ts";
import { Metrics } from "./metrics.ts";
import { ExpertLoad } from "./observed.ts";
import { type Asked, readRequest, type Served } from "./request.ts";
import { turns } from "./turns.ts";

export interface ServerOptions {
  readonly host: string;
  /** 0: any that is free. */
  readonly port: number;
  /** Requests that generate at once; their passes take turns. */
  readonly parallel: number;
  /** Requests that may wait for them. */
  readonly queue: number;
  /** Bytes of a request body. */
  readonly maxBody: number;
  /** Bytes of keys and values that ended texts may leave for prompts that begin alike; 0: every prompt is run from its start. */
  readonly prefixBytes: number;
  /** Names by which clients reach this server, beside those of the machine itself. */
  readonly allowedHosts: readonly string[];
  /** Web pages that may ask, such as https://example.org. */
  readonly allowedOrigins: readonly string[];
  /** Is told of failures that are not the client's. */
  readonly failed: (error: unknown) => void;
}

export interface RunningServer {
  readonly url: string;
  /** Takes no new requests, gives those that generate `grace` seconds, then ends them too. */
  stop(grace: number): Promise<void>;
}

/** A client that takes nothing for so long is gone. */
const stalled = 60_000;
/** Texts whose keys and values are kept: each prompt is compared with all of them. */
const mostTexts = 64;
const endpoints = ["/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics", "/health"];

interface Active {
  readonly control: AbortController;
  started: boolean;
}

/** The host of a Host header, in lower case, without the port. */
const hostOf = (header: string): string =>
  header
    .toLowerCase()
    .replace(/:\d+$/, "")
    .replace(/^\[(.*)\]$/, "$1");
const isLoopback = (host: string): boolean => host === "localhost" || host === "::1" || /^127\./.test(host);

export async function startServer(served: Served, options: ServerOptions): Promise<RunningServer> {
  const { host, port, parallel, queue, maxBody, prefixBytes, allowedOrigins, failed } = options;
  const metrics = new Metrics();
  const load = new ExpertLoad(served.open.model.routing);
  const requests = turns(parallel);
  const prefix = prefixBytes === 0 ? undefined : prefixCache({ texts: mostTexts, bytes: prefixBytes });
  const running: Running = { ...served, metrics, load, passes: turns(1), ...(prefix ? { prefix } : {}) };
  const created = Math.floor(Date.now() / 1000);
  const model = { id: served.name, object: "model", created, owned_by: "switchyard" };
  const actives = new Set<Active>();
  const answering = new Set<Promise<void>>();
  let stopping = false;

  const names = new Set([
    "localhost",
    "127.0.0.1",
    "::1",
    ...[host, ...options.allowedHosts].map((one) => one.toLowerCase()),
  ]);
  /** A page of a stranger that points its own name at this machine is told apart by that name. */
  const checkSender = (request: IncomingMessage, response: ServerResponse): void => {
    const name = hostOf(request.headers.host ?? "");
    if (!names.has(name) && (isLoopback(host) || isIP(name) === 0)) {
      throw new ApiError(403, "This server does not answer to that Host; start it with --allow-host NAME.", {
        code: "host_not_allowed",
      });
    }
    const { origin } = request.headers;
    if (origin === undefined) return;
    if (!allowedOrigins.includes(origin)) {
      throw new ApiError(403, "Web pages of this origin may not ask; start the server with --allow-origin ORIGIN.", {
        code: "origin_not_allowed",
      });
    }
    response.setHeader("access-control-allow-origin", origin);
    response.setHeader("vary", "origin");
  };

  const send = (response: ServerResponse, status: number, body: object): void => {
    if (stopping) response.setHeader("connection", "close");
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify(body));
  };

  const complete = async (kind: Asked["kind"], request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const arrived = performance.now();
    const control = new AbortController();
    const { signal } = control;
    const active: Active = { control, started: false };
    response.on("close", () => {
      if (!response.writableFinished) control.abort(new Error("the client left"));
    });
    actives.add(active);
    try {
      const asked = readRequest(kind, await readBody(request, response, { limit: maxBody, signal }), served);
      if (stopping) throw stopped();
      if (requests.running >= parallel && requests.waiting >= queue) {
        response.setHeader("retry-after", "1");
        throw new ApiError(503, `${requests.waiting} requests wait already; try again later.`, { code: "overloaded" });
      }
      let begun = false;
      const token = (): void => {
        metrics.token();
        if (!begun) metrics.first((performance.now() - arrived) / 1000);
        begun = true;
      };
      const course = { signal, token, reused: (tokens: number) => metrics.reused(tokens) };
      await requests.take(signal, async () => {
        active.started = true;
        if (!asked.stream) return send(response, 200, await answer(asked, running, course));
        for await (const chunk of chunks(asked, running, course)) {
          if (!response.headersSent) {
            if (stopping) response.setHeader("connection", "close");
            response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-cache" });
          }
          await write(response, `data: ${JSON.stringify(chunk)}\n\n`, signal);
        }
        response.end("data: [DONE]\n\n");
      });
    } catch (error) {
      // What the end of the server, or of the client, does to the engine's work is no failure.
      throw signal.aborted ? signal.reason : error;
    } finally {
      actives.delete(active);
      metrics.took((performance.now() - arrived) / 1000);
    }
  };

  const respond = async (request: IncomingMessage, response: ServerResponse, path: string): Promise<void> => {
    checkSender(request, response);
    const { method } = request;
    if (method === "OPTIONS" && request.headers.origin !== undefined) {
      response.writeHead(204, {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": request.headers["access-control-request-headers"] ?? "content-type",
        "access-control-max-age": "600",
      });
      response.end();
      return;
    }
    const posts = path === "/v1/completions" || path === "/v1/chat/completions";
    const named = /^\/v1\/models\/([^/]+)$/.exec(path)?.[1];
    if (!endpoints.includes(path) && named === undefined) {
      throw new ApiError(404, `Unknown request URL: ${method} ${path.slice(0, 200)}.`, { code: "unknown_url" });
    }
    if (method !== (posts ? "POST" : "GET")) {
      response.setHeader("allow", posts ? "POST" : "GET");
      throw new ApiError(405, `Not allowed to ${method} on ${path.slice(0, 200)}; use ${posts ? "POST" : "GET"}.`, {
        code: "method_not_allowed",
      });
    }
    if (path === "/health") return send(response, stopping ? 503 : 200, { status: stopping ? "stopping" : "ok" });
    if (path === "/metrics") {
      response.writeHead(200, { "content-type": "text/plain; version=0.0.4; charset=utf-8" });
      response.end(metrics.render(served.open, { requests, load, prefix }));
      return;
    }
    if (path === "/v1/models") return send(response, 200, { object: "list", data: [model] });
    if (named !== undefined) {
      const asked = decoded(named);
      if (asked === served.name) return send(response, 200, model);
      throw new ApiError(404, `The model '${asked.slice(0, 200)}' does not exist; this server has '${served.name}'.`, {
        param: "model",
        code: "model_not_found",
      });
    }
    await complete(path === "/v1/completions" ? "text" : "chat", request, response);
  };

  const handle = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const [path = ""] = (request.url ?? "").split("?");
    const endpoint = endpoints.includes(path) ? path : path.startsWith("/v1/models/") ? "/v1/models" : "other";
    // A write that comes too late for a client that left; "close" says the same.
    response.on("error", () => response.destroy());
    response.on("close", () => metrics.request(endpoint, response.writableFinished ? response.statusCode : 499));
    try {
      await respond(request, response, path);
    } catch (error) {
      if (response.destroyed) return;
      const shown = apiError(error);
      if (shown.status === 500) failed(error);
      if (!response.headersSent) send(response, shown.status, shown.body);
      else response.end(`data: ${JSON.stringify(shown.body)}\n\n`);
    }
  };

  const server = createServer({ requestTimeout: 60_000, headersTimeout: 20_000 }, (request, response) => {
    const done = handle(request, response)
      .catch((error: unknown) => {
        failed(error);
        response.destroy();
      })
      // Until the client has all of it.
      .then(() => (response.closed ? undefined : new Promise<void>((gone) => response.once("close", gone))));
    answering.add(done);
    void done.finally(() => answering.delete(done));
  });
  await listen(server, host, port);
  const { port: found } = server.address() as AddressInfo;
  const shownHost = isIP(host) === 6 ? `[${host}]` : host;
  return {
    url: `http://${shownHost}:${found}`,
    async stop(grace) {
      stopping = true;
      // Not server.close(): it cuts off answers that have ended here and are not with the client yet.
      const closed = new Promise<void>((resolve) => NetServer.prototype.close.call(server, () => resolve()));
      for (const { control, started } of actives) if (!started) control.abort(stopped());
      const end = setTimeout(() => {
        for (const { control } of actives) control.abort(stopped());
      }, grace * 1000);
      // Who does not take what it is given is cut off.
      const cut = setTimeout(() => server.closeAllConnections(), grace * 1000 + 1000);
      while (answering.size > 0) await Promise.all(answering);
      // What is still there has asked nothing, or not to the end.
      server.closeAllConnections();
      await closed;
      server.close(); // its timer
      clearTimeout(end);
      clearTimeout(cut);
      prefix?.dispose();
    },
  };
}

const stopped = (): ApiError => new ApiError(503, "The server is stopping.", { code: "stopping" });

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch (cause) {
    if (cause instanceof URIError) throw new ApiError(400, "The model's name is not a valid part of a URL.");
    throw cause;
  }
}

async function listen(server: Server, host: string, port: number): Promise<void> {
  try {
    server.listen(port, host);
    await once(server, "listening");
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? String(cause.code) : String(cause);
    const next: Readonly<Record<string, string>> = {
      EADDRINUSE: "something listens there already; choose another --port",
      EACCES: "this port needs privileges; choose another --port",
    };
    const why = next[code] ?? "this machine has no such address; choose another --host";
    throw new Error(`cannot listen on ${host}:${port} (${code}): ${why}`, { cause });
  }
}

/** Waits where the client is slower than the model. */
async function write(response: ServerResponse, text: string, signal: AbortSignal): Promise<void> {
  signal.throwIfAborted();
  if (response.write(text)) return;
  try {
    await once(response, "drain", { signal: AbortSignal.any([signal, AbortSignal.timeout(stalled)]) });
  } catch (error) {
    response.destroy();
    throw error;
  }
}

/** @throws ApiError for a body that is too large or no JSON object; the signal's reason, where the end does not come before it. */
async function readBody(
  request: IncomingMessage,
  response: ServerResponse,
  { limit, signal }: { readonly limit: number; readonly signal: AbortSignal },
): Promise<Body> {
  const type = request.headers["content-type"]?.split(";")[0]?.trim().toLowerCase();
  if (type !== "application/json" || request.headers["content-encoding"] !== undefined) {
    throw new ApiError(415, "The body must be JSON: send it with Content-Type: application/json, not compressed.", {
      code: "unsupported_media_type",
    });
  }
  const parts: Buffer[] = [];
  let size = 0;
  // Somewhat too much is still read, and dropped: a client that is cut off while it sends would not read why.
  const most = 16 * limit;
  if (Number(request.headers["content-length"] ?? 0) <= most) {
    const coming: AsyncIterator<Buffer> = request.iterator({ destroyOnReturn: false });
    const aborted = new Promise<never>((_, reject) => {
      if (signal.aborted) reject(signal.reason);
      else signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
    aborted.catch(() => undefined);
    for (;;) {
      const { value: part, done } = await Promise.race([coming.next(), aborted]);
      if (done) break;
      size += part.length;
      if (size > most) break;
      if (size <= limit) parts.push(part);
      else parts.length = 0;
    }
  } else size = Number.POSITIVE_INFINITY;
  if (size > limit) {
    if (size > most) response.setHeader("connection", "close");
    throw new ApiError(
      413,
      `The body is larger than ${limit} bytes; shorten it, or start the server with --max-body.`,
      {
        code: "body_too_large",
      },
    );
  }
  let body: unknown;
  try {
    body = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(parts)));
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new ApiError(400, `We could not parse the JSON body of your request: ${why.slice(0, 200)}.`, {
      code: "invalid_json",
    });
  }
  if (isBody(body as Body)) return body as Body;
  throw new ApiError(400, "The body must be a JSON object.", { code: "invalid_json" });
}
