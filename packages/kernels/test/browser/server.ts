// Serves a project from 127.0.0.1 in three forms:
//   /built/   what Vite made
//   /map/     the files as they are; index.html has an import map of the packages
//   /urls/    the files with the packages' names in imports replaced by URLs, as a CDN of modules serves them
// Beside them, under /files/, a folder of data: ranges only, as a server of large files answers them.

import { readFile } from "node:fs/promises";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize, sep } from "node:path";
import type { Project } from "./project.ts";

const types: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
};
/** Makes an origin cross-origin isolated: memory may be shared. */
export const isolation: Readonly<Record<string, string>> = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

/** A content security policy that lets WebAssembly run but no worker start from a Blob. */
export const policy: Readonly<Record<string, string>> = {
  "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:",
};

export interface Origin {
  /** "http://127.0.0.1:PORT", without a slash at the end. */
  readonly url: string;
  /** Requests that found no file. */
  readonly missing: readonly string[];
  close(): Promise<void>;
}

/** `headers` go with every file; `data` is the folder under /files/. */
export async function serve(
  project: Project,
  headers: Readonly<Record<string, string>>,
  data?: string,
): Promise<Origin> {
  const missing: string[] = [];
  const server: Server = createServer((request, response) => {
    const { pathname } = new URL(request.url ?? "/", "http://127.0.0.1");
    if (data !== undefined && pathname.startsWith("/files/")) {
      answerRange(data, decodeURIComponent(pathname.slice("/files/".length)), request.headers.range).then(
        ({ status, ...more }) => response.writeHead(status, { ...more.headers, ...headers }).end(more.body),
        () => response.writeHead(404, headers).end(),
      );
      return;
    }
    answer(project, decodeURIComponent(pathname)).then(
      ({ type, body }) => response.writeHead(200, { "Content-Type": type, ...headers }).end(body),
      (error: Error) => {
        missing.push(`${pathname}: ${error.message}`);
        response.writeHead(404).end();
      },
    );
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  return {
    url: `http://127.0.0.1:${port}`,
    missing,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

async function answer(project: Project, pathname: string): Promise<{ readonly type: string; readonly body: string }> {
  const [, form = "", ...rest] = pathname.split("/");
  const folder = form === "built" ? project.built : project.folder;
  const file = normalize(join(folder, ...rest));
  const type = types[extname(file)];
  if (!["built", "map", "urls"].includes(form) || !file.startsWith(folder + sep) || type === undefined) {
    throw new Error("not served");
  }
  const text = await readFile(file, "utf8");
  if (form === "map" && extname(file) === ".html") return { type, body: withImportMap(project, text) };
  if (form === "urls" && extname(file) !== ".html") return { type, body: withUrls(project, text) };
  return { type, body: text };
}

interface Part {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: Uint8Array;
}

/** What a request for bytes gets; a whole file nobody gets. Rejects where there is no such file. */
async function answerRange(data: string, path: string, range: string | undefined): Promise<Part> {
  const file = normalize(join(data, path));
  if (!file.startsWith(data + sep)) throw new Error("not served");
  const bytes = await readFile(file);
  const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? "") ?? [];
  if (first === undefined || last === undefined) return { status: 400, headers: {} };
  const [from, to] = [Number(first), Math.min(Number(last) + 1, bytes.length)];
  if (from >= to) return { status: 416, headers: { "Content-Range": `bytes */${bytes.length}` } };
  const headers = { "Content-Range": `bytes ${from}-${to - 1}/${bytes.length}`, ETag: `"${bytes.length}"` };
  return { status: 206, headers, body: bytes.subarray(from, to) };
}

function withImportMap({ modules }: Project, page: string): string {
  const imports = Object.fromEntries(modules.map(({ specifier, path }) => [specifier, `/map/node_modules/${path}`]));
  return page.replace("<script ", `<script type="importmap">${JSON.stringify({ imports })}</script>\n    <script `);
}

function withUrls({ modules }: Project, text: string): string {
  const urls = new Map(modules.map(({ specifier, path }) => [specifier, `/urls/node_modules/${path}`]));
  return text.replace(/\b(from|import) "(@[^"]+)"/g, (whole, word: string, specifier: string) => {
    const url = urls.get(specifier);
    return url === undefined ? whole : `${word} "${url}"`;
  });
}
