// The routing trace format, version 1 (docs/routing-trace.md): the header's fields with their checks, and a chunk's bytes.
import { CheckpointError, type Json, ShapeError } from "@switchyard/core";
import { quote } from "../safetensors.ts";

/** One place in the model that routes: a layer, or one of several routers in it. */
export interface TraceLayer {
  /** Number of the decoder layer. */
  readonly index: number;
  /** Tells routers of the same layer apart ("attention"). */
  readonly name?: string;
  readonly experts: number;
  /** Null experts: ids `experts` to `experts + nulls - 1`, which compute nothing. Default 0. */
  readonly nulls?: number;
  /** Ids per token. */
  readonly slots: number;
  /** "dense": the layer needs every expert for every token, whichever ids stand here. */
  readonly plan: "sparse" | "dense";
  /** Bytes of one expert's weights as stored. */
  readonly expertBytes?: number;
}

export interface TraceHeader {
  readonly format: "moe-routing-trace";
  readonly version: 1;
  /** `name`: what the user calls it; `type`: the family (`model_type`). */
  readonly model: { readonly name: string; readonly type?: string };
  readonly layers: readonly TraceLayer[];
  /** SHA-256 of tokenizer.json in lower-case hexadecimal; null: none. */
  readonly tokenizer: string | null;
  /** Domains, authors, languages, ... */
  readonly labels: readonly string[];
  /** By the numbers in the column `sequence`; later ones have neither text nor label. `label` is a place in `labels`. */
  readonly sequences: readonly { readonly text?: string; readonly label?: number }[];
  /** Element types; null: not recorded. */
  readonly types: {
    readonly experts: "i8" | "i16" | "i32";
    readonly weights: "f32" | "bf16" | null;
    readonly logits: "f32" | "bf16" | null;
  };
  /** What wrote it. */
  readonly tool?: string;
  /** Anything else. */
  readonly extra?: { readonly [key: string]: Json };
}

/** One layer of a chunk, by token. */
export interface TraceChunkLayer {
  /** `[tokens, slots]`, -1 = empty. */
  readonly experts: Int32Array;
  /** `[tokens, slots]`, 0 where empty. */
  readonly weights?: Float32Array;
  /** `[tokens, experts + nulls]` */
  readonly logits?: Float32Array;
}

export interface TraceChunk {
  /** Number of its first token in the file. */
  readonly first: number;
  readonly tokens: number;
  /** `[tokens]`: number of the forward pass, never falling. */
  readonly pass: Uint32Array;
  /** `[tokens]`: which prompt. */
  readonly sequence: Uint32Array;
  /** `[tokens]`: place in its sequence; -1 = padding: no text, though a model may compute it. */
  readonly position: Int32Array;
  /** `[tokens]`: token id; -1 = unknown. */
  readonly token: Int32Array;
  readonly layers: readonly TraceChunkLayer[];
}

export const magic = new TextEncoder().encode("MOETRACE");
/** Magic, version and length of the header. */
export const preambleBytes = 16;
export const chunkHeaderBytes = 24;
/** "CHNK", little-endian. */
export const chunkMagic = 0x4b4e4843;

export const limits = {
  headerBytes: 1 << 24,
  layers: 4096,
  experts: 1 << 20,
  slots: 1 << 16,
  chunkTokens: 1 << 20,
  chunkBytes: 1 << 28,
} as const;

const elementBytes = { i8: 1, i16: 2, i32: 4, f32: 4, bf16: 2 } as const;
type ElementType = keyof typeof elementBytes;
const largestId = { i8: 127, i16: 32767, i32: 2 ** 31 - 1 } as const;
const padded = (bytes: number): number => Math.ceil(bytes / 8) * 8;

type Problem = (message: string) => never;
type Fields = { readonly [key: string]: Json };

const shown = (value: Json | undefined): string => (value === undefined ? "missing" : quote(JSON.stringify(value)));

function fieldsOf(value: Json | undefined, what: string, known: readonly string[], refuse: Problem): Fields {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    refuse(`${what} is ${shown(value)}, expected an object`);
  }
  const fields = value as Fields;
  const unknown = Object.keys(fields).find((key) => !known.includes(key));
  if (unknown !== undefined) refuse(`${what} has the unknown key ${quote(unknown)}; put further fields into "extra"`);
  return fields;
}

const whole = (value: Json | undefined, what: string, least: number, most: number, refuse: Problem): number =>
  typeof value === "number" && Number.isSafeInteger(value) && value >= least && value <= most
    ? value
    : refuse(`${what} is ${shown(value)}, expected a whole number from ${least} to ${most}`);

const text = (value: Json | undefined, what: string, refuse: Problem): string =>
  typeof value === "string" ? value : refuse(`${what} is ${shown(value)}, expected a text`);

const list = (value: Json | undefined, what: string, refuse: Problem): readonly Json[] =>
  Array.isArray(value) ? (value as readonly Json[]) : refuse(`${what} is ${shown(value)}, expected a list`);

function oneOf<T extends string | null>(
  value: Json | undefined,
  what: string,
  allowed: readonly T[],
  refuse: Problem,
): T {
  const found = allowed.find((one) => one === value);
  return found !== undefined ? found : refuse(`${what} is ${shown(value)}, expected ${allowed.map(String).join(", ")}`);
}

/** Checks a parsed header in full. `where` begins every message. Throws CheckpointError that names the field. */
export function checkHeader(value: Json, where: string): TraceHeader {
  const refuse: Problem = (message) => {
    throw new CheckpointError(`${where}: ${message}`);
  };
  const keys = "format version model layers tokenizer labels sequences types tool extra".split(" ");
  const head = fieldsOf(value, "the header", keys, refuse);
  oneOf(head.format, '"format"', ["moe-routing-trace"], refuse);
  if (head.version !== 1) refuse(`"version" is ${shown(head.version)}; this package reads version 1`);
  const model = fieldsOf(head.model, '"model"', ["name", "type"], refuse);
  text(model.name, '"model.name"', refuse);
  if (model.type !== undefined) text(model.type, '"model.type"', refuse);
  const types = fieldsOf(head.types, '"types"', ["experts", "weights", "logits"], refuse);
  const idType = oneOf(types.experts, '"types.experts"', ["i8", "i16", "i32"], refuse);
  oneOf(types.weights, '"types.weights"', ["f32", "bf16", null], refuse);
  oneOf(types.logits, '"types.logits"', ["f32", "bf16", null], refuse);
  const layers = list(head.layers, '"layers"', refuse);
  if (layers.length === 0 || layers.length > limits.layers) {
    refuse(`"layers" has ${layers.length} entries, expected 1 to ${limits.layers}`);
  }
  for (const [i, entry] of layers.entries()) {
    const what = `layers[${i}]`;
    const layerKeys = ["index", "name", "experts", "nulls", "slots", "plan", "expertBytes"];
    const layer = fieldsOf(entry, what, layerKeys, refuse);
    whole(layer.index, `${what}.index`, 0, 2 ** 31 - 1, refuse);
    if (layer.name !== undefined) text(layer.name, `${what}.name`, refuse);
    const experts = whole(layer.experts, `${what}.experts`, 1, limits.experts, refuse);
    const nulls = layer.nulls === undefined ? 0 : whole(layer.nulls, `${what}.nulls`, 0, limits.experts, refuse);
    whole(layer.slots, `${what}.slots`, 1, limits.slots, refuse);
    oneOf(layer.plan, `${what}.plan`, ["sparse", "dense"], refuse);
    if (layer.expertBytes !== undefined) {
      whole(layer.expertBytes, `${what}.expertBytes`, 0, Number.MAX_SAFE_INTEGER, refuse);
    }
    if (experts + nulls - 1 > largestId[idType]) {
      refuse(`${what} has ${experts + nulls} experts, more than "types.experts" ${quote(idType)} can name`);
    }
  }
  if (head.tokenizer !== null && !/^[0-9a-f]{64}$/.test(text(head.tokenizer, '"tokenizer"', refuse))) {
    refuse(`"tokenizer" is ${shown(head.tokenizer)}, expected a SHA-256 in lower-case hexadecimal, or null`);
  }
  const labels = list(head.labels, '"labels"', refuse);
  for (const [i, label] of labels.entries()) text(label, `labels[${i}]`, refuse);
  for (const [i, entry] of list(head.sequences, '"sequences"', refuse).entries()) {
    const sequence = fieldsOf(entry, `sequences[${i}]`, ["text", "label"], refuse);
    if (sequence.text !== undefined) text(sequence.text, `sequences[${i}].text`, refuse);
    if (sequence.label !== undefined) whole(sequence.label, `sequences[${i}].label`, 0, labels.length - 1, refuse);
  }
  if (head.tool !== undefined) text(head.tool, '"tool"', refuse);
  if (head.extra !== undefined) {
    fieldsOf(head.extra, '"extra"', Object.keys((head.extra ?? {}) as object), refuse);
  }
  return value as Json & TraceHeader;
}

/** Magic, version, length and the header's JSON, padded with spaces to a multiple of 8 bytes. */
export function encodeHeader(header: TraceHeader): Uint8Array {
  const plain = JSON.parse(JSON.stringify(header)) as Json;
  checkHeader(plain, "cannot write a routing trace");
  const json = new TextEncoder().encode(JSON.stringify(plain));
  const length = padded(json.length);
  if (length > limits.headerBytes) {
    throw new CheckpointError(
      `cannot write a routing trace: its header would have ${length} bytes, at most ${limits.headerBytes} are allowed`,
    );
  }
  const bytes = new Uint8Array(preambleBytes + length).fill(0x20);
  bytes.set(magic);
  const view = new DataView(bytes.buffer);
  view.setUint32(8, 1, true);
  view.setUint32(12, length, true);
  bytes.set(json, preambleBytes);
  return bytes;
}

interface Column {
  readonly type: ElementType | "u32";
  /** Elements per token. */
  readonly width: number;
}

/** All columns of a chunk in their order. */
function columnsOf({ layers, types }: TraceHeader): Column[] {
  const columns: Column[] = [
    { type: "u32", width: 1 },
    { type: "u32", width: 1 },
    { type: "i32", width: 1 },
    { type: "i32", width: 1 },
  ];
  for (const { experts, nulls = 0, slots } of layers) {
    columns.push({ type: types.experts, width: slots });
    if (types.weights) columns.push({ type: types.weights, width: slots });
    if (types.logits) columns.push({ type: types.logits, width: experts + nulls });
  }
  return columns;
}

const columnBytes = ({ type, width }: Column, tokens: number): number =>
  padded(tokens * width * (type === "u32" ? 4 : elementBytes[type]));

/** Bytes of a chunk of so many tokens, its own header not counted. */
export const payloadBytes = (header: TraceHeader, tokens: number): number =>
  columnsOf(header).reduce((sum, column) => sum + columnBytes(column, tokens), 0);

const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let bit = 0; bit < 8; bit++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

/** CRC-32 as in zip and PNG. */
export function crc32(bytes: Uint8Array): number {
  let c = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) {
    c = (crcTable[(c ^ (bytes[i] as number)) & 255] as number) ^ (c >>> 8);
  }
  return (c ^ 0xffffffff) >>> 0;
}

/** Round to nearest, ties to even; NaN stays NaN. */
function toBfloat16(values: Float32Array): Uint16Array {
  const bits = new Uint32Array(Float32Array.from(values).buffer);
  return Uint16Array.from(bits, (x) => {
    if ((x & 0x7fffffff) > 0x7f800000) return (x >>> 16) | 0x40;
    return (x + 0x7fff + ((x >>> 16) & 1)) >>> 16;
  });
}

const fromBfloat16 = (stored: Uint16Array): Float32Array =>
  new Float32Array(Uint32Array.from(stored, (x) => x << 16).buffer);

type ColumnValues = Uint32Array | Int32Array | Float32Array;

function bytesOfColumn(type: Column["type"], values: ColumnValues): Uint8Array {
  const stored =
    type === "i8"
      ? Int8Array.from(values)
      : type === "i16"
        ? Int16Array.from(values)
        : type === "bf16"
          ? toBfloat16(values as Float32Array)
          : values;
  return new Uint8Array(stored.buffer, stored.byteOffset, stored.byteLength);
}

function columnOfBytes(type: Column["type"], buffer: ArrayBuffer, at: number, count: number): ColumnValues {
  switch (type) {
    case "u32":
      return new Uint32Array(buffer, at, count);
    case "i32":
      return new Int32Array(buffer, at, count);
    case "i16":
      return Int32Array.from(new Int16Array(buffer, at, count));
    case "i8":
      return Int32Array.from(new Int8Array(buffer, at, count));
    case "f32":
      return new Float32Array(buffer, at, count);
    case "bf16":
      return fromBfloat16(new Uint16Array(buffer, at, count));
    default:
      return type satisfies never;
  }
}

/** Why a chunk cannot be, undefined where it can: lengths, ids and passes. */
export function chunkFault(header: TraceHeader, chunk: TraceChunk): string | undefined {
  const { tokens, pass, sequence, position, token, layers } = chunk;
  for (const [name, column] of Object.entries({ pass, sequence, position, token })) {
    if (column.length !== tokens) return `${name} has ${column.length} entries for ${tokens} tokens`;
  }
  for (let i = 1; i < tokens; i++) {
    if ((pass[i] as number) < (pass[i - 1] as number)) return `pass falls from ${pass[i - 1]} to ${pass[i]}`;
  }
  for (const [name, column] of Object.entries({ position, token })) {
    const wrong = column.find((x) => x < -1);
    if (wrong !== undefined) return `${name} holds ${wrong}, expected -1 or more`;
  }
  if (layers.length !== header.layers.length) return `${layers.length} layers, the header has ${header.layers.length}`;
  for (const [i, { experts: count, nulls = 0, slots }] of header.layers.entries()) {
    const { experts, weights, logits } = layers[i] as TraceChunkLayer;
    const most = count + nulls;
    const expected: readonly [string, number | undefined, number | undefined][] = [
      ["experts", experts.length, tokens * slots],
      ["weights", weights?.length, header.types.weights ? tokens * slots : undefined],
      ["logits", logits?.length, header.types.logits ? tokens * most : undefined],
    ];
    for (const [name, found, wanted] of expected) {
      if (found !== wanted) return `layers[${i}].${name} has ${found ?? "no"} entries, expected ${wanted ?? "none"}`;
    }
    const wrong = experts.find((id) => id < -1 || id >= most);
    if (wrong !== undefined) return `layers[${i}] names expert ${wrong}, the layer has ${most}`;
  }
  return undefined;
}

/** A chunk with its header, in one array. Throws ShapeError where it does not fit the trace's header. */
export function encodeChunk(header: TraceHeader, chunk: TraceChunk): Uint8Array {
  const { tokens, first, pass, sequence, position, token, layers } = chunk;
  const fault = chunkFault(header, chunk);
  if (fault !== undefined) throw new ShapeError(`routing trace: ${fault}`);
  const size = payloadBytes(header, tokens);
  if (tokens < 1 || tokens > limits.chunkTokens || size > limits.chunkBytes) {
    throw new ShapeError(
      `routing trace: a chunk of ${tokens} tokens and ${size} bytes; ` +
        `1 to ${limits.chunkTokens} tokens and up to ${limits.chunkBytes} bytes are allowed`,
    );
  }
  const values: ColumnValues[] = [pass, sequence, position, token];
  for (const { experts, weights, logits } of layers) {
    values.push(experts);
    if (weights) values.push(weights);
    if (logits) values.push(logits);
  }
  const bytes = new Uint8Array(chunkHeaderBytes + size);
  let at = chunkHeaderBytes;
  for (const [i, column] of columnsOf(header).entries()) {
    bytes.set(bytesOfColumn(column.type, values[i] as ColumnValues), at);
    at += columnBytes(column, tokens);
  }
  const view = new DataView(bytes.buffer);
  view.setUint32(0, chunkMagic, true);
  view.setUint32(4, tokens, true);
  view.setBigUint64(8, BigInt(first), true);
  view.setUint32(16, size, true);
  view.setUint32(20, crc32(bytes.subarray(chunkHeaderBytes)), true);
  return bytes;
}

/** The columns of a payload of the right size; `bytes` must own its buffer from a multiple of 8 on. */
export function decodePayload(header: TraceHeader, bytes: Uint8Array, first: number, tokens: number): TraceChunk {
  const buffer = bytes.buffer as ArrayBuffer;
  let at = bytes.byteOffset;
  const values = columnsOf(header).map((column) => {
    const found = columnOfBytes(column.type, buffer, at, tokens * column.width);
    at += columnBytes(column, tokens);
    return found;
  });
  let next = 4;
  const layers = header.layers.map((): TraceChunkLayer => {
    const experts = values[next++] as Int32Array;
    const weights = header.types.weights ? (values[next++] as Float32Array) : undefined;
    const logits = header.types.logits ? (values[next++] as Float32Array) : undefined;
    return { experts, ...(weights ? { weights } : {}), ...(logits ? { logits } : {}) };
  });
  const [pass, sequence, position, token] = values;
  return {
    first,
    tokens,
    pass: pass as Uint32Array,
    sequence: sequence as Uint32Array,
    position: position as Int32Array,
    token: token as Int32Array,
    layers,
  };
}
