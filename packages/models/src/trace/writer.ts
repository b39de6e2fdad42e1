// Writing a routing trace: whole chunks, one after the other, so that the file is valid between any two writes.
import { CheckpointError, ShapeError } from "@switchyard/core";
import { builtIn } from "../built-in.ts";
import { fileSource } from "../files.ts";
import { encodeChunk, encodeHeader, type TraceChunk, type TraceHeader } from "./format.ts";
import { readTrace, type TraceEnd } from "./reader.ts";

/** Where bytes go: each call is awaited before the next. */
export interface TraceSink {
  write(bytes: Uint8Array): Promise<void>;
  close?(): Promise<void>;
}

export interface TraceWriter {
  readonly header: TraceHeader;
  /** Tokens written. */
  readonly tokens: number;
  /** Number of the last pass written; -1 before the first. */
  readonly pass: number;
  /**
   * Appends a chunk; resolves when the sink has it, so awaiting it keeps a fast model from running ahead of a slow disk.
   * Calls that do not wait are carried out in order. Throws ShapeError for a chunk that does not fit the header; after a failed
   * write every further one fails with the same error, since the file may end in half a chunk.
   */
  write(chunk: Omit<TraceChunk, "first">): Promise<void>;
  /** Waits for what was written and closes the sink. */
  close(): Promise<void>;
}

function writerTo(sink: TraceSink, header: TraceHeader, from: { tokens: number; pass: number }): TraceWriter {
  let { tokens, pass } = from;
  let last: Promise<void> = Promise.resolve();
  return {
    header,
    get tokens() {
      return tokens;
    },
    get pass() {
      return pass;
    },
    async write(chunk) {
      const bytes = encodeChunk(header, { ...chunk, first: tokens });
      if ((chunk.pass[0] as number) < pass) {
        throw new ShapeError(`routing trace: pass falls from ${pass} to ${chunk.pass[0]}`);
      }
      tokens += chunk.tokens;
      pass = chunk.pass[chunk.tokens - 1] as number;
      last = last.then(() => sink.write(bytes));
      await last;
    },
    async close() {
      try {
        await last;
      } finally {
        await sink.close?.();
      }
    },
  };
}

/** Begins a routing trace in a sink: writes the header. Throws CheckpointError for a header that is not valid. */
export async function traceWriter(sink: TraceSink, header: TraceHeader): Promise<TraceWriter> {
  await sink.write(encodeHeader(header));
  return writerTo(sink, header, { tokens: 0, pass: -1 });
}

/** A file as a sink (Node). Without `from` it must not exist yet; with it, what lies beyond that byte is cut off. */
export async function traceFile(path: string, from?: number): Promise<TraceSink & { close(): Promise<void> }> {
  const { open } = await builtIn("node:fs/promises");
  const handle = await open(path, from === undefined ? "wx" : "r+").catch((cause: unknown) => {
    const message = cause instanceof Error ? cause.message : String(cause);
    const advice = message.startsWith("EEXIST") ? "; name another file, or delete that one" : "";
    throw new CheckpointError(`cannot write the routing trace ${path}: ${message}${advice}`, { cause });
  });
  let at = from ?? 0;
  if (from !== undefined) await handle.truncate(from);
  return {
    async write(bytes) {
      let done = 0;
      while (done < bytes.length)
        done += (await handle.write(bytes, done, bytes.length - done, at + done)).bytesWritten;
      at += bytes.length;
    },
    close: () => handle.close(),
  };
}

/**
 * Continues a routing trace on disk (Node); an incomplete chunk at its end is cut off. Reads the file once. Throws
 * CheckpointError where it is missing or damaged; then nothing is changed.
 */
export async function appendTrace(path: string): Promise<TraceWriter> {
  const source = await fileSource(path);
  if (!source) throw new CheckpointError(`cannot continue the routing trace ${path}: there is no such file`);
  try {
    const { header, chunks } = await readTrace(source);
    const reading = chunks();
    let end: TraceEnd | undefined;
    while (end === undefined) {
      const step = await reading.next();
      if (step.done) end = step.value;
    }
    return writerTo(await traceFile(path, end.offset), header, end);
  } finally {
    await source.close();
  }
}
