// Safetensors files: a strict reader over any byte source and a streaming encoder. A header is checked in full before a
// single tensor is read, because a file from the internet decides how much we allocate. Files on disk are in files.ts.
import { CheckpointError } from "@switchyard/core";

/** Random access to bytes: a file, a blob or an array in memory. */
export interface ByteSource {
  /** Shown in errors: usually the path. */
  readonly name: string;
  /** In bytes. */
  readonly size: number;
  /** Bytes `from` to `to` (exclusive) in a fresh buffer of its own, so that it can be viewed as any element type. */
  read(from: number, to: number): Promise<Uint8Array>;
  /** The same for as many bytes as `target` has, put there: for memory that is used again and again. */
  readInto?(target: Uint8Array, from: number): Promise<void>;
  /**
   * `readInto` in two steps, where the source can change while it is open: `fill` reads without looking whether it did, and `unchanged`
   * throws CheckpointError where it did. Many reads need one look, at their end.
   */
  readonly unwatched?: {
    fill(target: Uint8Array, from: number): Promise<void>;
    unchanged(): Promise<void>;
  };
  close?(): Promise<void>;
}

/** Where a tensor lies: `from` and `to` are byte positions in the whole file. */
export interface StoredTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly from: number;
  readonly to: number;
}

export interface Safetensors {
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, StoredTensor>;
}

/**
 * A tensor to be written. `bytes` is called once, when its turn comes, so that only one tensor is in memory at a time, or
 * only a piece of one where it comes in pieces.
 */
export interface TensorSource {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  bytes(): Uint8Array | Promise<Uint8Array> | AsyncIterable<Uint8Array>;
}

/** Limits of the reference implementation (header) and of sanity (counts, names, rank). */
const maximumHeader = 100_000_000;
export const maximumTensors = 200_000;
const maximumMetadata = 10_000;
const maximumName = 1024;
const maximumRank = 64;
/** A whole number below 2^53 has 16 digits at most. */
const maximumDigits = 16;

const bitsOf: ReadonlyMap<string, number> = new Map([
  ["F4", 4],
  ["F6_E2M3", 6],
  ["F6_E3M2", 6],
  ["BOOL", 8],
  ["U8", 8],
  ["I8", 8],
  ["F8_E4M3", 8],
  ["F8_E5M2", 8],
  ["F8_E8M0", 8],
  ["I16", 16],
  ["U16", 16],
  ["F16", 16],
  ["BF16", 16],
  ["I32", 32],
  ["U32", 32],
  ["F32", 32],
  ["I64", 64],
  ["U64", 64],
  ["F64", 64],
  ["C64", 64],
]);

/** A name from the file, quoted and shortened, so that a hostile name cannot flood a terminal. */
export const quote = (name: string): string => JSON.stringify(name.length > 80 ? `${name.slice(0, 77)}...` : name);

/** Bytes a tensor of this dtype and shape takes; undefined where that is no whole number of bytes below 2^53. */
function bytesNeeded(bits: number, shape: readonly number[]): number | undefined {
  let elements = 1;
  // A zero anywhere makes the tensor empty, even beside sizes whose product would overflow.
  if (shape.includes(0)) return 0;
  for (const size of shape) {
    elements *= size;
    if (elements > Number.MAX_SAFE_INTEGER / 8) return undefined;
  }
  const total = elements * bits;
  return total % 8 === 0 ? total / 8 : undefined;
}

/** Bytes that a tensor takes in a file; undefined for an unknown dtype and for sizes that are no whole bytes below 2^53. */
export function storedBytes({ dtype, shape }: Pick<StoredTensor, "dtype" | "shape">): number | undefined {
  const bits = bitsOf.get(dtype);
  return bits === undefined ? undefined : bytesNeeded(bits, shape);
}

/** What an error is about: put into words only when there is one. */
type What = () => string;
const [quoteMark, backslash, comma, bracket] = [0x22, 0x5c, 0x2c, 0x5d];

/** A set of a few texts: most objects of a header are a tensor's, of three keys. */
class Few {
  readonly #keys: string[] = [];
  get size(): number {
    return this.#keys.length;
  }
  has(key: string): boolean {
    return this.#keys.includes(key);
  }
  add(key: string): void {
    this.#keys.push(key);
  }
}
const fewKeys = 8;

/**
 * The part of JSON a header may use. Written by hand because JSON.parse keeps the last of two equal keys without a
 * word.
 */
class HeaderParser {
  readonly #text: string;
  readonly #where: string;
  #at = 0;

  constructor(text: string, where: string) {
    this.#text = text;
    this.#where = where;
  }

  fail(message: string): never {
    throw new CheckpointError(`${this.#where}: ${message}`);
  }

  #peek(): string {
    for (;;) {
      const c = this.#text.charCodeAt(this.#at);
      if (c !== 0x20 && c !== 0x0a && c !== 0x0d && c !== 0x09) return this.#text[this.#at] ?? "";
      this.#at++;
    }
  }

  #expect(c: string): void {
    const next = this.#peek();
    if (next !== c) {
      if (next === "{" || next === "[") this.#tooDeep();
      const found = this.#text[this.#at] ?? "its end";
      this.fail(`the header is not valid: expected ${c} at character ${this.#at}, found ${found}`);
    }
    this.#at++;
  }

  /** An object or list where the format has a text or a number: a header has three levels and no more. */
  #tooDeep(): never {
    this.fail(`the header is not valid: it nests deeper than the format allows, at character ${this.#at}`);
  }

  /** `limit` in characters as they stand in the file. */
  string(what = "a text of the header", limit = maximumHeader): string {
    this.#expect('"');
    const start = this.#at - 1;
    // Without escapes and control characters a text stands for itself.
    let plain = true;
    for (;;) {
      const c = this.#text.charCodeAt(this.#at++);
      if (Number.isNaN(c)) this.fail("the header is not valid: a string has no end");
      if (c === quoteMark) break;
      if (c === backslash) this.#at++;
      if (c === backslash || c < 0x20) plain = false;
    }
    const length = this.#at - start - 2;
    if (length > limit) {
      this.fail(
        `${what} has ${length} characters; at most ${limit} are allowed: ${quote(this.#text.slice(start + 1))}`,
      );
    }
    if (plain) return this.#text.slice(start + 1, this.#at - 1);
    try {
      return JSON.parse(this.#text.slice(start, this.#at)) as string;
    } catch (cause) {
      throw new CheckpointError(`${this.#where}: the header holds an invalid string at character ${start}`, { cause });
    }
  }

  /** Calls `entry` once per key, after the colon; refuses equal keys and more than `limit`. */
  object(what: What, limit: number, entry: (key: string) => void): void {
    const seen: { readonly size: number; has(key: string): boolean; add(key: string): void } =
      limit <= fewKeys ? new Few() : new Set<string>();
    this.#expect("{");
    if (this.#peek() === "}") {
      this.#at++;
      return;
    }
    for (;;) {
      const key = this.string("a name in the header", maximumName);
      if (seen.has(key)) this.fail(`${what()} has the key ${quote(key)} twice`);
      if (seen.size === limit) this.fail(`${what()} lists more than ${limit} entries`);
      seen.add(key);
      this.#expect(":");
      entry(key);
      if (this.#peek() === "}") break;
      this.#expect(",");
    }
    this.#at++;
  }

  integers(what: What, limit: number): number[] {
    const result: number[] = [];
    this.#expect("[");
    if (this.#peek() === "]") {
      this.#at++;
      return result;
    }
    for (;;) {
      if (result.length === limit) this.fail(`${what()} has more than ${limit} entries`);
      result.push(this.#integer(what));
      if (this.#peek() === "]") break;
      this.#expect(",");
    }
    this.#at++;
    return result;
  }

  #integer(what: What): number {
    const next = this.#peek();
    if (next === "{" || next === "[") this.#tooDeep();
    const start = this.#at;
    // The usual case: up to 15 digits, the first of which is no 0 unless it is alone.
    let [value, c] = [0, this.#text.charCodeAt(start)];
    const zero = c === 0x30;
    for (; c >= 0x30 && c <= 0x39 && this.#at - start < 15; c = this.#text.charCodeAt(++this.#at)) {
      value = 10 * value + (c - 0x30);
    }
    const length = this.#at - start;
    if (length > 0 && (length === 1 || !zero) && (c === comma || c === bracket)) return value;
    this.#at = start;
    return this.#unusualInteger(what);
  }

  #unusualInteger(what: What): number {
    const start = this.#at;
    while (this.#at - start <= maximumDigits && /[-+.\w]/.test(this.#text[this.#at] ?? "")) this.#at++;
    const digits = this.#text.slice(start, this.#at);
    if (!/^(0|[1-9]\d*)$/.test(digits)) {
      this.fail(`${what()} must hold whole numbers from 0 up, found ${quote(digits)}`);
    }
    const value = Number(digits);
    if (digits.length > maximumDigits || !Number.isSafeInteger(value))
      this.fail(`${what()} holds ${quote(digits)}, which is beyond 2^53`);
    return value;
  }

  end(): void {
    if (this.#peek() !== "") this.fail(`the header has text after its end, at character ${this.#at}`);
  }
}

const forbidden = (name: string): boolean => name.includes("__proto__") && name.split(".").includes("__proto__");

function parseHeader(text: string, where: string, dataSize: number, dataStart: number): Safetensors {
  const parser: HeaderParser = new HeaderParser(text, where);
  const metadata = new Map<string, string>();
  const tensors = new Map<string, StoredTensor>();
  // One more than the tensors: the metadata is an entry too.
  parser.object(
    () => "the header",
    maximumTensors + 1,
    (name) => {
      if (name === "__metadata__") {
        parser.object(
          () => "__metadata__",
          maximumMetadata,
          (key) => {
            if (forbidden(key)) parser.fail(`__metadata__ has the key ${quote(key)}, which is not allowed`);
            metadata.set(key, parser.string());
          },
        );
        return;
      }
      if (forbidden(name)) parser.fail(`the tensor name ${quote(name)} is not allowed`);
      if (tensors.size === maximumTensors) parser.fail(`the header lists more than ${maximumTensors} tensors`);
      const what = (): string => `tensor ${quote(name)}`;
      let dtype: string | undefined;
      let shape: number[] | undefined;
      let offsets: number[] | undefined;
      parser.object(what, 4, (key) => {
        if (key === "dtype") dtype = parser.string();
        else if (key === "shape") shape = parser.integers(() => `the shape of ${what()}`, maximumRank);
        else if (key === "data_offsets") offsets = parser.integers(() => `data_offsets of ${what()}`, 2);
        else parser.fail(`${what()} has the unknown key ${quote(key)}`);
      });
      const [from, to] = offsets ?? [];
      if (dtype === undefined || shape === undefined || from === undefined || to === undefined) {
        parser.fail(`${what()} lacks dtype, shape or its two data_offsets`);
      }
      const bits = bitsOf.get(dtype);
      if (bits === undefined) {
        parser.fail(`${what()} has the unknown dtype ${quote(dtype)}; known are ${[...bitsOf.keys()].join(", ")}`);
      }
      const needed = bytesNeeded(bits, shape);
      if (needed === undefined) {
        parser.fail(`${what()}: ${dtype} [${shape}] is no whole number of bytes below 2^53`);
      }
      if (to < from) parser.fail(`${what()} ends at byte ${to}, before its start ${from}`);
      if (to > dataSize) {
        parser.fail(
          `${what()} ends at byte ${to} of the data, but the file holds ${dataSize}: it is cut short or damaged`,
        );
      }
      if (to - from !== needed) {
        parser.fail(`${what()}: ${dtype} [${shape}] needs ${needed} bytes, but its data_offsets span ${to - from}`);
      }
      tensors.set(name, { dtype, shape, from: dataStart + from, to: dataStart + to });
    },
  );
  parser.end();

  // Every byte belongs to exactly one tensor: nothing hides between them and no two share storage.
  const ordered = [...tensors].sort(([, a], [, b]) => a.from - b.from || a.to - b.to);
  let end = dataStart;
  let previous = "";
  for (const [name, { from, to }] of ordered) {
    if (from < end) parser.fail(`tensors ${quote(previous)} and ${quote(name)} overlap`);
    if (from > end) parser.fail(`there is a hole of ${from - end} bytes before tensor ${quote(name)}`);
    end = to;
    previous = name;
  }
  const left = dataStart + dataSize - end;
  if (left > 0) parser.fail(`the file has ${left} bytes after its last tensor`);
  return { metadata, tensors };
}

/** Bytes `from` to `to`. Throws CheckpointError where the source gives another number of bytes (a broken download). */
export async function readExactly(source: ByteSource, from: number, to: number): Promise<Uint8Array> {
  const bytes = await source.read(from, to);
  if (bytes.length === to - from) return bytes;
  throw new CheckpointError(`${source.name}: bytes ${from} to ${to} were asked for, ${bytes.length} came back`);
}

/** Why files of this kind are not read, and what to do instead. */
export const pickleAdvice: string =
  "Such a file is a Python pickle, which can run any program when it is opened, so this package does not read it. " +
  "Convert it where you trust it, for example with Hugging Face Transformers: " +
  "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)";

/** What a file is that is no safetensors file, by its first eight bytes; undefined where they are not known. */
function recognised(start: Uint8Array): string | undefined {
  const [first = 0, second = 0] = start;
  const text = String.fromCharCode(...start);
  // torch.save writes a zip archive, older versions a bare pickle of protocol 2 to 5.
  if (text.startsWith("PK\x03\x04") || (first === 0x80 && second >= 2 && second <= 5)) return pickleAdvice;
  if (text.startsWith("GGUF")) return "This is a GGUF file, not a safetensors file.";
  if (text === "version ") return "This is a pointer of Git LFS, not the file itself: fetch it with git lfs pull.";
  return undefined;
}

/**
 * Reads and checks the header of a safetensors file; no tensor is read.
 * Throws CheckpointError for anything the format does not allow: a header longer than 100 MB or than the file, unknown
 * dtypes, sizes beyond 2^53, offsets outside the file, overlaps, holes, a size that is not dtype x shape, equal keys,
 * `__proto__` in a name, deeper nesting, names over 1024 characters, more than 64 dimensions, 200,000 tensors or 10,000
 * entries of metadata; and, by its first bytes, for a pickle, a GGUF file or a pointer of Git LFS under a wrong name.
 */
export async function readHeader(source: ByteSource): Promise<Safetensors> {
  const where = source.name;
  if (source.size < 8) throw new CheckpointError(`${where}: ${source.size} bytes are too few for a safetensors file`);
  const start = await readExactly(source, 0, 8);
  const length = new DataView(start.buffer, start.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(maximumHeader)) {
    throw new CheckpointError(
      `${where}: the header says it is ${length} bytes long; at most ${maximumHeader} are allowed. ` +
        (recognised(start) ?? "Is this a safetensors file?"),
    );
  }
  const size = Number(length);
  if (size > source.size - 8) {
    throw new CheckpointError(`${where}: the header says it is ${size} bytes long, but the file has ${source.size}`);
  }
  const raw = await readExactly(source, 8, 8 + size);
  if (raw[0] !== 0x7b) throw new CheckpointError(`${where}: the header does not start with {: not a safetensors file`);
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw);
  } catch (cause) {
    throw new CheckpointError(`${where}: the header is not valid UTF-8`, { cause });
  }
  return parseHeader(text, where, source.size - 8 - size, 8 + size);
}

/** A byte source over an array in memory. */
export function bytesSource(name: string, bytes: Uint8Array): ByteSource {
  return { name, size: bytes.length, read: async (from, to) => bytes.slice(from, to) };
}

const encoder = new TextEncoder();

/** Writes may be large; handles and disks prefer them in pieces. */
const pieceSize = 1 << 24;

/**
 * The bytes of a safetensors file, piece by piece: the header, then each tensor in the order given.
 * Throws CheckpointError where a name comes twice, is not allowed, or a tensor's bytes are not dtype x shape.
 */
export async function* encodeSafetensors(
  tensors: readonly TensorSource[],
  metadata: Readonly<Record<string, string>> = {},
): AsyncGenerator<Uint8Array, void, undefined> {
  const seen = new Set<string>();
  const entries: string[] = [`"__metadata__":${JSON.stringify({ format: "pt", ...metadata })}`];
  const sizes: number[] = [];
  let at = 0;
  if (tensors.length > maximumTensors) {
    throw new CheckpointError(
      `cannot write ${tensors.length} tensors to one file; at most ${maximumTensors} are allowed`,
    );
  }
  for (const { name, dtype, shape } of tensors) {
    if (JSON.stringify(name).length - 2 > maximumName) {
      throw new CheckpointError(`cannot write a tensor named ${quote(name)}: over ${maximumName} characters`);
    }
    if (seen.has(name) || forbidden(name) || name === "__metadata__") {
      throw new CheckpointError(`cannot write a tensor named ${quote(name)}: the name is taken or not allowed`);
    }
    seen.add(name);
    const size = storedBytes({ dtype, shape });
    if (size === undefined) throw new CheckpointError(`cannot write tensor ${quote(name)}: ${dtype} [${shape}]`);
    entries.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [at, at + size] })}`);
    sizes.push(size);
    at += size;
  }
  // Padding with spaces keeps the data aligned for readers that map the file.
  let header = `{${entries.join(",")}}`;
  const length = encoder.encode(header).length;
  header += " ".repeat((8 - (length % 8)) % 8);
  const raw = encoder.encode(header);
  if (raw.length > maximumHeader) {
    throw new CheckpointError(`the header would be ${raw.length} bytes long; at most ${maximumHeader} are allowed`);
  }
  const start = new Uint8Array(8);
  new DataView(start.buffer).setBigUint64(0, BigInt(raw.length), true);
  yield start;
  yield raw;
  for (const [i, tensor] of tensors.entries()) {
    const given = tensor.bytes();
    let written = 0;
    for await (const bytes of Symbol.asyncIterator in given ? given : [await given]) {
      written += bytes.length;
      // Before they are written: bytes too many would stand where the next tensor belongs.
      if (written > (sizes[i] as number)) break;
      for (let from = 0; from < bytes.length; from += pieceSize) yield bytes.subarray(from, from + pieceSize);
    }
    if (written !== sizes[i]) {
      throw new CheckpointError(
        `cannot write tensor ${quote(tensor.name)}: ${tensor.dtype} [${tensor.shape}] needs ${sizes[i]} bytes, ` +
          `got ${written}`,
      );
    }
  }
}

const halfToFloat = (half: number): number => {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
};

let halves: Float32Array | undefined;

/** By a table of all halves, made when it is first needed. */
function widenedHalves(stored: Uint16Array): Float32Array {
  halves ??= Float32Array.from({ length: 1 << 16 }, (_, half) => halfToFloat(half));
  const table = halves;
  const result = new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) result[i] = table[stored[i] as number] as number;
  return result;
}

/**
 * Widens stored floats to f32. `bytes` must start at a multiple of the element size (reads always do).
 * Throws CheckpointError for a dtype that is not F32, F16, BF16 or F64.
 */
export function toFloat32(bytes: Uint8Array, dtype: string, name: string): Float32Array {
  const { buffer, byteOffset: at, byteLength: length } = bytes;
  switch (dtype) {
    case "F32":
      return new Float32Array(buffer, at, length / 4);
    case "F64":
      return Float32Array.from(new Float64Array(buffer, at, length / 8));
    case "BF16": {
      const stored = new Uint16Array(buffer, at, length / 2);
      const bits = new Uint32Array(stored.length);
      for (let i = 0; i < bits.length; i++) bits[i] = (stored[i] as number) << 16;
      return new Float32Array(bits.buffer);
    }
    case "F16":
      return widenedHalves(new Uint16Array(buffer, at, length / 2));
    default:
      throw new CheckpointError(`tensor ${quote(name)} is stored as ${dtype}; expected F32, F16, BF16 or F64`);
  }
}
