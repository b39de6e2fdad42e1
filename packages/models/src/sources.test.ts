import { mkdtemp, rm, utimes, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CheckpointError } from "@switchyard/core";
import { afterEach, describe, expect, it } from "vitest";
import { readCheckpoint } from "./checkpoint.ts";
import { fileSource } from "./files.ts";
import { encodeSafetensors } from "./safetensors.ts";
import { blobSource, chosenFiles, directoryFiles, httpFiles, httpSource } from "./sources.ts";

const content = Uint8Array.from({ length: 1000 }, (_, i) => i % 251);

async function checkpointFiles(): Promise<Map<string, Uint8Array<ArrayBuffer>>> {
  const bytes = new Uint8Array(new Float32Array([1, 2, 3, 4, 5, 6]).buffer);
  const parts: Uint8Array[] = [];
  const tensors = [{ name: "x", dtype: "F32", shape: [2, 3], bytes: () => bytes }];
  for await (const part of encodeSafetensors(tensors)) parts.push(part);
  return new Map([
    ["model.safetensors", new Uint8Array(Buffer.concat(parts))],
    ["config.json", new TextEncoder().encode('{"model_type": "olmoe"}')],
  ]);
}

const servers: Server[] = [];
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
});
/** A server on this machine; the address ends with a slash. */
async function serve(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<string> {
  const server = createServer(answer);
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
}
/** As a good server answers. */
function partial(bytes: Uint8Array, request: IncomingMessage, response: ServerResponse): void {
  const [, first = "", last = ""] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? "") ?? [];
  const from = Number(first);
  if (from >= bytes.length) {
    response.writeHead(416, { "content-range": `bytes */${bytes.length}` }).end();
    return;
  }
  const to = Math.min(Number(last) + 1, bytes.length);
  const headers = { "content-range": `bytes ${from}-${to - 1}/${bytes.length}`, etag: '"1"' };
  response.writeHead(206, headers).end(bytes.subarray(from, to));
}

describe("blobs and folders", () => {
  it("reads ranges of a blob into buffers of their own", async () => {
    const source = blobSource(new File([content], "weights"));
    expect([source.name, source.size]).toEqual(["weights", 1000]);
    const part = await source.read(3, 11);
    expect([...part]).toEqual([...content.subarray(3, 11)]);
    expect(part.buffer.byteLength).toBe(8);
    expect((await source.read(5, 5)).length).toBe(0);
    expect(blobSource(new Blob([content])).name).toBe("a blob");
    const broken = new File([content], "x");
    Object.defineProperty(broken, "slice", { value: () => ({ arrayBuffer: () => Promise.reject(new Error("gone")) }) });
    await expect(blobSource(broken).read(0, 1)).rejects.toThrow(/cannot read x: gone; choose/);
  });

  it("opens a checkpoint from chosen files and from a folder of the browser", async () => {
    const files = await checkpointFiles();
    const made = [...files].map(([name, bytes]) => new File([bytes], name));
    const chosen = chosenFiles(made);
    const directory = {
      name: "folder",
      async getFileHandle(name: string) {
        const found = made.find((file) => file.name === name);
        if (!found) throw new DOMException("none", name === "odd" ? "TypeMismatchError" : "NotFoundError");
        return { getFile: async () => found };
      },
      keys: async function* () {
        yield* files.keys();
      },
    };
    for (const { open, list } of [chosen, directoryFiles(directory)]) {
      const checkpoint = await readCheckpoint(open, "here", { list });
      expect([...new Float32Array((await checkpoint.read("x", [4, 16])).buffer)]).toEqual([2, 3, 4]);
      expect((await list()).toSorted()).toEqual(["config.json", "model.safetensors"]);
      expect(await open("none.json")).toBeUndefined();
      await checkpoint.close();
    }
    await expect(directoryFiles(directory).open("odd")).rejects.toThrow(/cannot read odd in folder: none/);
    await expect(directoryFiles(directory).open("../x")).rejects.toThrow(/no file name/);
    const deep = new File([], "config.json");
    Object.defineProperty(deep, "webkitRelativePath", { value: "top/below/config.json" });
    expect(await chosenFiles([deep]).list()).toEqual([]);
  });
});

describe("ranges over HTTP", () => {
  it("reads just what is asked for", async () => {
    const asked: (string | undefined)[] = [];
    const url = await serve((request, response) => {
      asked.push(request.headers.range);
      expect(request.headers.authorization).toBe("Bearer me");
      partial(content, request, response);
    });
    const source = await httpSource(url, { headers: { authorization: "Bearer me" } });
    if (!source) throw new Error("no source");
    expect([source.name, source.size]).toEqual([url, 1000]);
    const [a, b, none] = await Promise.all([source.read(0, 1000), source.read(999, 1000), source.read(7, 7)]);
    expect(a).toEqual(content);
    expect([[...b], none.length]).toEqual([[content[999]], 0]);
    expect(asked.toSorted()).toEqual(["bytes=0-7", "bytes=0-999", "bytes=999-999"]);
    await expect(source.read(990, 1001)).rejects.toThrow(/bytes 990 to 1001 of 1000/);
  });

  it("opens a checkpoint by its address", async () => {
    const files = await checkpointFiles();
    const url = await serve((request, response) => {
      const bytes = files.get(decodeURIComponent(request.url ?? "").replace("/a model/", ""));
      if (bytes) partial(bytes, request, response);
      else response.writeHead(404).end("not here");
    });
    const where = `${url}a%20model`;
    const checkpoint = await readCheckpoint(httpFiles(where), where);
    expect([...new Float32Array((await checkpoint.read("x")).buffer)]).toEqual([1, 2, 3, 4, 5, 6]);
    expect(await checkpoint.json("tokenizer.json")).toBeUndefined();
    await expect(async () => httpFiles(where)("../config.json")).rejects.toThrow(/no file name/);
    await expect(readCheckpoint(httpFiles(`${url}other`), "there")).rejects.toThrow(/there has no config.json/);
  });

  it("knows empty files", async () => {
    const url = await serve((request, response) => partial(new Uint8Array(0), request, response));
    const source = await httpSource(url);
    expect([source?.size, (await source?.read(0, 0))?.length]).toEqual([0, 0]);
  });

  const range = (text: string) => ({ "content-range": text });
  it.each<[string, RegExp, (response: ServerResponse) => void]>([
    ["ignores ranges", /ignores range requests.*chosenFiles/, (r) => r.writeHead(200).end(content)],
    ["refuses", /status 403 Forbidden$/, (r) => r.writeHead(403).end("no")],
    ["has no such range", /status 416/, (r) => r.writeHead(416, range("bytes */5")).end()],
    ["hides Content-Range", /Access-Control-Expose-Headers/, (r) => r.writeHead(206).end("12345678")],
    ["does not know the size", /Content-Range is "bytes 0-7\/\*"/, (r) => r.writeHead(206, range("bytes 0-7/*")).end()],
    ["talks nonsense", /Content-Range is "bytes 7-0\/9"/, (r) => r.writeHead(206, range("bytes 7-0/9")).end()],
    [
      "compresses",
      /sends it compressed \("br"\)/,
      (r) => r.writeHead(206, { ...range("bytes 0-7/100"), "content-encoding": "br" }).end(),
    ],
  ])("refuses a server that %s", async (_, message, answer) => {
    const url = await serve((_request, response) => answer(response));
    const failure = httpSource(url);
    await expect(failure).rejects.toThrow(message);
    await expect(failure).rejects.toBeInstanceOf(CheckpointError);
  });

  /** The second answer, for bytes 100 to 110. */
  it.each<[string, RegExp, (response: ServerResponse) => void]>([
    ["another size", /changed while it was being read/, (r) => r.writeHead(206, range("bytes 100-109/1001")).end()],
    [
      "another tag",
      /changed while it was being read/,
      (r) => r.writeHead(206, { ...range("bytes 100-109/1000"), etag: '"2"' }).end("0123456789"),
    ],
    ["another range", /the server sent 100 to 109/, (r) => r.writeHead(206, range("bytes 100-108/1000")).end()],
    [
      "too little",
      /10 bytes were asked for, 4 came back/,
      (r) => r.writeHead(206, range("bytes 100-109/1000")).end("0123"),
    ],
    ["too much", /more than the 10 bytes/, (r) => r.writeHead(206, range("bytes 100-109/1000")).end("0123456789a")],
    ["all of it", /ignores range requests/, (r) => r.writeHead(200).end(content)],
    [
      "half an answer",
      /cannot read http:/,
      (r) => {
        r.writeHead(206, { ...range("bytes 100-109/1000"), "content-length": "10" }).write("012");
        setTimeout(() => r.destroy(), 20);
      },
    ],
  ])("refuses %s later on", async (_, message, answer) => {
    let count = 0;
    const url = await serve((request, response) => {
      if (count++ === 0) partial(content, request, response);
      else answer(response);
    });
    const source = await httpSource(url);
    await expect(source?.read(100, 110)).rejects.toThrow(message);
  });

  it("does not read what a server sends beyond the answer", async () => {
    let sent = 0;
    const ended: (() => void)[] = [];
    const end = new Promise<void>((resolve) => ended.push(resolve));
    const chunk = new Uint8Array(1 << 20);
    let count = 0;
    const url = await serve((request, response) => {
      if (count++ === 0) return partial(content, request, response);
      response.on("close", () => ended[0]?.());
      response.writeHead(206, range("bytes 0-9/1000"));
      const more = (): void => {
        while (!response.destroyed && sent < 1 << 28) {
          sent += chunk.length;
          if (!response.write(chunk)) {
            response.once("drain", more);
            return;
          }
        }
      };
      more();
    });
    const source = await httpSource(url);
    await expect(source?.read(0, 10)).rejects.toThrow(/more than the 10 bytes/);
    await end;
    expect(sent).toBeLessThan(1 << 27);
  });

  it("is refused by name where nobody answers, and stops when told", async () => {
    const url = await serve((request) => request.resume());
    const stop = new AbortController();
    const opening = httpSource(url, { signal: stop.signal });
    stop.abort(new Error("enough"));
    await expect(opening).rejects.toThrow("enough");
    const failing = httpSource("http://x/", { fetch: () => Promise.reject(new TypeError("fetch failed")) });
    await expect(failing).rejects.toThrow("cannot read http://x/: fetch failed");
  });
});

describe("fileSource", () => {
  it("refuses a file that was overwritten after it had been opened", async () => {
    const folder = await mkdtemp(join(tmpdir(), "switchyard-file-"));
    try {
      const path = join(folder, "weights");
      await writeFile(path, Uint8Array.of(1, 2, 3, 4));
      const source = await fileSource(path);
      expect(await source?.read(1, 3)).toEqual(Uint8Array.of(2, 3));
      await writeFile(path, Uint8Array.of(5, 6, 7, 8));
      // A clock may be too coarse to tell the two writes apart.
      await utimes(path, new Date(), new Date(Date.now() + 5000));
      await expect(source?.read(1, 3)).rejects.toThrow(
        /was changed after it had been opened; load the checkpoint again/,
      );
      await source?.close?.();
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });
});
