// Bytes from where a browser has them: files a user chose, a server that answers range requests, folders of the browser's own
// file system (OPFS). Files on disk in Node are in files.ts.
import { CheckpointError } from "@switchyard/core";
import type { OpenFile, ReadOptions } from "./checkpoint.ts";
import { isPlainName } from "./files.ts";
import { type ByteSource, quote } from "./safetensors.ts";

// ---------------------------------------------------------------------------------------------------- blobs

const nameOf = (blob: Blob): string => ("name" in blob ? String(blob.name) : "a blob");

/** A `File` or `Blob` as a byte source; only the parts asked for are read. `name` is shown in errors. */
export function blobSource(blob: Blob, name: string = nameOf(blob)): ByteSource {
  return {
    name,
    size: blob.size,
    async read(from, to) {
      let buffer: ArrayBuffer;
      try {
        buffer = await blob.slice(from, to).arrayBuffer();
      } catch (cause) {
        // Browsers refuse a file that changed on disk since it was chosen.
        const message = cause instanceof Error ? cause.message : String(cause);
        throw new CheckpointError(`cannot read ${name}: ${message}; choose the file again if it was changed`, {
          cause,
        });
      }
      return new Uint8Array(buffer);
    },
  };
}

/** Files by their names, and the list of names that `readCheckpoint` uses in errors. */
export interface NamedFiles extends Required<ReadOptions> {
  readonly open: OpenFile;
}

/**
 * Files that a user chose or dropped (`input.files`), as `readCheckpoint` takes them. Of a chosen folder only what lies directly
 * in it counts.
 *
 * @example
 * const { open, list } = chosenFiles(input.files);
 * const checkpoint = await readCheckpoint(open, "your files", { list });
 */
export function chosenFiles(files: Iterable<File>): NamedFiles {
  const byName = new Map<string, File>();
  for (const file of files) {
    const path = "webkitRelativePath" in file ? file.webkitRelativePath : "";
    if (path.split("/").length <= 2) byName.set(file.name, file);
  }
  return {
    async open(name) {
      const file = byName.get(name);
      return file && blobSource(file);
    },
    list: async () => [...byName.keys()],
  };
}

/** The part of a `FileSystemDirectoryHandle` that is used. */
export interface DirectoryHandle {
  readonly name: string;
  getFileHandle(name: string): Promise<{ getFile(): Promise<File> }>;
  keys(): AsyncIterable<string>;
}

/**
 * The files of a folder of the browser: of its own file system (`navigator.storage.getDirectory()`) or one the user picked
 * (`showDirectoryPicker()`), as `readCheckpoint` takes them.
 */
export function directoryFiles(directory: DirectoryHandle): NamedFiles {
  return {
    async open(name) {
      if (!isPlainName(name)) {
        throw new CheckpointError(`cannot read ${quote(name)} in ${directory.name}: it is no file name`);
      }
      try {
        return blobSource(await (await directory.getFileHandle(name)).getFile(), name);
      } catch (cause) {
        if (cause instanceof Error && cause.name === "NotFoundError") return undefined;
        const message = cause instanceof Error ? cause.message : String(cause);
        throw new CheckpointError(`cannot read ${name} in ${directory.name}: ${message}`, { cause });
      }
    },
    async list() {
      const names: string[] = [];
      for await (const name of directory.keys()) names.push(name);
      return names;
    },
  };
}

// ---------------------------------------------------------------------------------------------------- HTTP

export interface HttpOptions {
  /** Default: the global one. */
  readonly fetch?: (url: string, init: RequestInit) => Promise<Response>;
  /** Sent with every request, such as `{ authorization: "Bearer ..." }`. */
  readonly headers?: Readonly<Record<string, string>>;
  /** Ends requests that are under way and refuses later ones. */
  readonly signal?: AbortSignal;
}

/** What a partial answer says about itself. */
interface Partial {
  readonly from: number;
  /** Exclusive. */
  readonly to: number;
  readonly size: number;
}

/** "bytes 0-7/1234" */
function contentRange(response: Response): Partial | undefined {
  const [, first, last, size] =
    /^bytes (\d{1,16})-(\d{1,16})\/(\d{1,16})$/.exec(response.headers.get("content-range") ?? "") ?? [];
  if (first === undefined) return undefined;
  const range = { from: Number(first), to: Number(last) + 1, size: Number(size) };
  const sound = Number.isSafeInteger(range.size) && range.from < range.to && range.to <= range.size;
  return sound ? range : undefined;
}

/** Reads a body of exactly `length` bytes: a server that sends more is not listened to any longer. */
async function body(response: Response, length: number, where: string): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  const reader = response.body?.getReader();
  let at = 0;
  if (reader) {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > length) {
        await reader.cancel();
        throw new CheckpointError(`${where}: more than the ${length} bytes that were asked for came back`);
      }
      bytes.set(value, at);
      at += value.length;
    }
  }
  if (at !== length) throw new CheckpointError(`${where}: ${length} bytes were asked for, ${at} came back`);
  return bytes;
}

/**
 * A file on a server as a byte source, read by range requests; undefined where the server says that there is none (404). Every
 * answer is checked: that it is partial (206), holds just the range asked for, and is of the same file as the first one
 * (size, and ETag where the server sends one).
 * Throws CheckpointError for other answers, with advice for a server that ignores ranges, compresses what it sends, or
 * hides Content-Range from pages of other origins.
 *
 * @example const source = await httpSource("https://example.org/model/model.safetensors");
 */
export async function httpSource(url: string, options: HttpOptions = {}): Promise<ByteSource | undefined> {
  const { fetch = (address, init) => globalThis.fetch(address, init), headers = {}, signal } = options;
  const ask = async (from: number, to: number): Promise<Response> => {
    const range = `bytes=${from}-${to - 1}`;
    try {
      return await fetch(url, { headers: { ...headers, range }, ...(signal ? { signal } : {}) });
    } catch (cause) {
      if (signal?.aborted) throw cause;
      const message = cause instanceof Error ? cause.message : String(cause);
      throw new CheckpointError(`cannot read ${url}: ${message}`, { cause });
    }
  };
  /** Gives the range of the answer; the body is dropped where it is not as it must be. */
  const check = async (response: Response): Promise<Partial> => {
    const found = response.status === 206 ? contentRange(response) : undefined;
    const encoding = response.headers.get("content-encoding") ?? "identity";
    if (found && encoding === "identity") return found;
    await response.body?.cancel();
    if (response.status === 200) {
      throw new CheckpointError(
        `cannot read ${url}: the server ignores range requests and sends the whole file; use one that answers them with ` +
          "status 206, or download the files and choose them in the page (chosenFiles)",
      );
    }
    if (response.status !== 206) {
      throw new CheckpointError(
        `cannot read ${url}: the server answered with status ${response.status} ${response.statusText}`.trimEnd(),
      );
    }
    if (!found) {
      const header = response.headers.get("content-range");
      throw new CheckpointError(
        header === null
          ? `cannot read ${url}: the answer has no Content-Range, or the server does not show it to pages of other origins ` +
              "(Access-Control-Expose-Headers: Content-Range)"
          : `cannot read ${url}: the answer's Content-Range is ${quote(header)}`,
      );
    }
    throw new CheckpointError(
      `cannot read ${url}: the server sends it compressed (${quote(encoding)}), so parts of it cannot be told; switch that off`,
    );
  };

  const first = await ask(0, 8);
  if (first.status === 404) {
    await first.body?.cancel();
    return undefined;
  }
  // Nothing can be asked of an empty file: the answer is 416, with the size.
  if (first.status === 416 && /^bytes \*\/0$/.test(first.headers.get("content-range") ?? "")) {
    await first.body?.cancel();
    return { name: url, size: 0, read: async () => new Uint8Array(0) };
  }
  const { size } = await check(first);
  const tag = first.headers.get("etag");
  await first.body?.cancel();
  return {
    name: url,
    size,
    async read(from, to) {
      if (from === to) return new Uint8Array(0);
      if (!(from >= 0 && from < to && to <= size)) {
        throw new CheckpointError(`${url}: bytes ${from} to ${to} of ${size} were asked for`);
      }
      const response = await ask(from, to);
      const found = await check(response);
      const newTag = response.headers.get("etag");
      if (found.size !== size || (tag !== null && newTag !== null && newTag !== tag)) {
        await response.body?.cancel();
        throw new CheckpointError(`${url} changed while it was being read; open the checkpoint again`);
      }
      if (found.from !== from || found.to !== to) {
        await response.body?.cancel();
        throw new CheckpointError(
          `${url}: bytes ${from} to ${to} were asked for, the server sent ${found.from} to ${found.to}`,
        );
      }
      try {
        return await body(response, to - from, url);
      } catch (cause) {
        if (signal?.aborted || CheckpointError.isInstance(cause)) throw cause;
        const message = cause instanceof Error ? cause.message : String(cause);
        throw new CheckpointError(`cannot read ${url}: ${message}`, { cause });
      }
    },
  };
}

/**
 * The files below an address, as `readCheckpoint` takes them.
 *
 * @example
 * const where = "https://example.org/model/";
 * const checkpoint = await readCheckpoint(httpFiles(where), where);
 */
export function httpFiles(base: string, options: HttpOptions = {}): OpenFile {
  return (name) => {
    if (!isPlainName(name)) throw new CheckpointError(`cannot read ${quote(name)} at ${base}: it is no file name`);
    return httpSource(`${base.endsWith("/") ? base : `${base}/`}${encodeURIComponent(name)}`, options);
  };
}
