// Reading a routing trace, chunk by chunk. The file may come from anywhere and may still be written: every length is checked
// before anything is allocated, and a last chunk that is not complete yet is left for later.
import { CheckpointError, type Json } from "@switchyard/core";
import { type ByteSource, quote } from "../safetensors.ts";
import {
  checkHeader,
  chunkFault,
  chunkHeaderBytes,
  chunkMagic,
  crc32,
  decodePayload,
  limits,
  magic,
  payloadBytes,
  preambleBytes,
  type TraceChunk,
  type TraceHeader,
} from "./format.ts";

/** A place between two chunks. */
export interface TracePlace {
  /** In bytes. */
  readonly offset: number;
  /** Tokens before it. */
  readonly tokens: number;
  /** Number of the last pass before it; -1 at the start. */
  readonly pass: number;
}

/** Where reading ended; `left` bytes after it are an incomplete chunk. */
export interface TraceEnd extends TracePlace {
  readonly left: number;
}

export interface Trace extends AsyncIterable<TraceChunk> {
  readonly header: TraceHeader;
  /** Where the chunks begin. */
  readonly start: TracePlace;
  /**
   * The whole chunks from `from` (default: `start`) on; the generator returns where it ended. Throws CheckpointError at a chunk
   * that is damaged, after those before it.
   */
  chunks(from?: TracePlace): AsyncGenerator<TraceChunk, TraceEnd, undefined>;
}

/**
 * Reads and checks the header of a routing trace; the result gives its chunks, one in memory at a time.
 * Throws CheckpointError for anything the format does not allow.
 *
 * @example for await (const { tokens, layers } of await readTrace(source)) console.log(tokens, layers[0]?.experts);
 */
export async function readTrace(source: ByteSource): Promise<Trace> {
  const where = source.name;
  if (source.size < preambleBytes) {
    throw new CheckpointError(`${where}: ${source.size} bytes are too few for a routing trace`);
  }
  const preamble = await source.read(0, preambleBytes);
  if (!magic.every((byte, i) => preamble[i] === byte)) {
    throw new CheckpointError(`${where}: it does not begin with MOETRACE: not a routing trace`);
  }
  const view = new DataView(preamble.buffer, preamble.byteOffset);
  const version = view.getUint32(8, true);
  if (version !== 1) throw new CheckpointError(`${where}: version ${version}; this package reads version 1`);
  const length = view.getUint32(12, true);
  if (length > limits.headerBytes || length % 8 !== 0) {
    throw new CheckpointError(
      `${where}: the header says it is ${length} bytes long, expected a multiple of 8 up to ${limits.headerBytes}`,
    );
  }
  if (preambleBytes + length > source.size) {
    throw new CheckpointError(`${where}: the header says it is ${length} bytes long, but the file has ${source.size}`);
  }
  const raw = await source.read(preambleBytes, preambleBytes + length);
  let value: Json;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw)) as Json;
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    throw new CheckpointError(`${where}: the header is not valid JSON: ${quote(message)}`, { cause });
  }
  const header = checkHeader(value, where);
  const start: TracePlace = { offset: preambleBytes + length, tokens: 0, pass: -1 };

  async function* chunks(from: TracePlace = start): AsyncGenerator<TraceChunk, TraceEnd, undefined> {
    let { offset, tokens: first, pass } = from;
    for (;;) {
      const at = `${where}: the chunk at byte ${offset}`;
      const left = source.size - offset;
      const end = { offset, tokens: first, pass, left };
      if (left < chunkHeaderBytes) return end;
      const head = await source.read(offset, offset + chunkHeaderBytes);
      const fields = new DataView(head.buffer, head.byteOffset);
      if (fields.getUint32(0, true) !== chunkMagic) throw new CheckpointError(`${at} does not begin with CHNK`);
      const tokens = fields.getUint32(4, true);
      const number = fields.getBigUint64(8, true);
      const size = fields.getUint32(16, true);
      if (tokens < 1 || tokens > limits.chunkTokens) {
        throw new CheckpointError(`${at} has ${tokens} tokens, expected 1 to ${limits.chunkTokens}`);
      }
      if (number !== BigInt(first)) {
        throw new CheckpointError(`${at} begins with token ${number}, expected ${first}: chunks are missing`);
      }
      const expected = payloadBytes(header, tokens);
      if (size !== expected || size > limits.chunkBytes) {
        throw new CheckpointError(
          `${at} says it has ${size} bytes; ${tokens} tokens take ${expected}, and ${limits.chunkBytes} are allowed`,
        );
      }
      if (left < chunkHeaderBytes + size) return end;
      const bytes = await source.read(offset + chunkHeaderBytes, offset + chunkHeaderBytes + size);
      const sum = crc32(bytes);
      if (sum !== fields.getUint32(20, true)) throw new CheckpointError(`${at} is damaged: its checksum differs`);
      const chunk = decodePayload(header, bytes, first, tokens);
      const earlier = (chunk.pass[0] as number) < pass ? `pass falls from ${pass} to ${chunk.pass[0]}` : undefined;
      const fault = earlier ?? chunkFault(header, chunk);
      if (fault !== undefined) throw new CheckpointError(`${at} is not valid: ${fault}`);
      yield chunk;
      offset += chunkHeaderBytes + size;
      first += tokens;
      pass = chunk.pass[tokens - 1] as number;
    }
  }
  return { header, start, chunks, [Symbol.asyncIterator]: () => chunks() };
}
