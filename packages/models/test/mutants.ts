// Damaged checkpoints by the number: valid ones of several forms, changed by someone who knows the format (lengths,
// offsets, dtypes, names, nesting, numbers, duplicates, splices) or by plain noise, and a judge that says what the reader
// made of each. One seed is one mutant, the same on every machine.
import { CheckpointError } from "@switchyard/core";
import { readCheckpoint } from "../src/checkpoint.ts";
import { type ByteSource, bytesSource, encodeSafetensors, readHeader, type TensorSource } from "../src/safetensors.ts";

/** A folder in memory: content by name. */
export type Files = Map<string, Uint8Array>;

interface Draw {
  /** A whole number from 0 to n - 1. */
  below(n: number): number;
  pick<T>(list: readonly T[]): T;
  chance(probability: number): boolean;
}

/** Mulberry32: enough for choices, and fast. */
function draws(seed: number): Draw {
  let state = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) >>> 0;
  const next = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (n: number): number => Math.floor(next() * n);
  return { below, pick: (list) => list[below(list.length)] as (typeof list)[number], chance: (p) => next() < p };
}

const encoder = new TextEncoder();
const join = (parts: readonly Uint8Array[]): Uint8Array => {
  const whole = new Uint8Array(parts.reduce((n, { length }) => n + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
};

// ------------------------------------------------------------------------------------------------ valid checkpoints

const tensor = (name: string, dtype: string, shape: readonly number[], bytes: number): TensorSource => ({
  name,
  dtype,
  shape,
  bytes: () => Uint8Array.from({ length: bytes }, (_, i) => i * 37),
});

async function encode(tensors: readonly TensorSource[], metadata?: Record<string, string>): Promise<Uint8Array> {
  const parts: Uint8Array[] = [];
  for await (const part of encodeSafetensors(tensors, metadata)) parts.push(part);
  return join(parts);
}

const json = (value: unknown): Uint8Array => encoder.encode(JSON.stringify(value));

/** The checkpoints that mutants are made from. */
export async function validCheckpoints(): Promise<Files[]> {
  const config = json({
    model_type: "olmoe",
    num_hidden_layers: 2,
    rope_scaling: null,
    eos_token_id: [1, 2],
    nested: { a: { b: [1.5, -2e-3] } },
  });
  const tokenizer = json({ model: { type: "BPE", vocab: { a: 0, b: 1, ab: 2 }, merges: [["a", "b"]] } });
  const floats = [
    tensor("w", "F32", [2, 3], 24),
    tensor("model.layers.0.mlp.experts.1.up_proj.weight", "BF16", [3], 6),
  ];
  const odd = [
    tensor("empty", "F32", [0, 7], 0),
    tensor("scalar", "F64", [], 8),
    tensor("codes", "F4", [4], 2),
    tensor('quoted "\\ é \u{1f600}', "U8", [5], 5),
    tensor("scales", "F8_E8M0", [1], 1),
  ];
  const index = {
    metadata: { total_size: 46 },
    weight_map: Object.fromEntries([
      ...floats.map(({ name }) => [name, "model-00001-of-00002.safetensors"]),
      ...odd.map(({ name }) => [name, "model-00002-of-00002.safetensors"]),
    ]),
  };
  const single = (model: Uint8Array): Files =>
    new Map([
      ["model.safetensors", model],
      ["config.json", config],
      ["tokenizer.json", tokenizer],
    ]);
  return [
    single(await encode([])),
    single(await encode(floats.slice(0, 1))),
    single(await encode([...floats, ...odd], { a: "b", "longer key": "x".repeat(50) })),
    single(await encode(Array.from({ length: 12 }, (_, i) => tensor(`t${i}`, "I16", [i], 2 * i)))),
    new Map([
      ["model.safetensors.index.json", json(index)],
      ["model-00001-of-00002.safetensors", await encode(floats)],
      ["model-00002-of-00002.safetensors", await encode(odd)],
      ["config.json", config],
      ["tokenizer.json", tokenizer],
    ]),
  ];
}

// ------------------------------------------------------------------------------------------------ JSON as a tree

/** JSON that may be wrong: objects are lists of entries (a key may come twice), and a literal is any text. */
type Node =
  | { kind: "object"; entries: { key: string; value: Node }[] }
  | { kind: "list"; items: Node[] }
  | { kind: "text"; text: string }
  | { kind: "literal"; text: string };

function toTree(value: unknown): Node {
  if (Array.isArray(value)) return { kind: "list", items: value.map(toTree) };
  if (typeof value === "string") return { kind: "text", text: value };
  if (typeof value !== "object" || value === null) return { kind: "literal", text: JSON.stringify(value) };
  return { kind: "object", entries: Object.entries(value).map(([key, child]) => ({ key, value: toTree(child) })) };
}

function toText(node: Node, draw: Draw, loose: boolean): string {
  const space = (): string => (loose && draw.chance(0.2) ? draw.pick([" ", "\n", "\t", "\r", "  "]) : "");
  const text = (value: string): string => {
    const quoted = JSON.stringify(value);
    if (!loose || !draw.chance(0.1) || value.length === 0) return quoted;
    // Another spelling of the same text.
    const first = value.charCodeAt(0).toString(16).padStart(4, "0");
    return `"\\u${first}${JSON.stringify(value.slice(1)).slice(1)}`;
  };
  switch (node.kind) {
    case "literal":
      return node.text;
    case "text":
      return text(node.text);
    case "list":
      return `[${node.items.map((item) => `${space()}${toText(item, draw, loose)}${space()}`).join(",")}]`;
    case "object":
      return `{${node.entries
        .map(({ key, value }) => `${space()}${text(key)}${space()}:${space()}${toText(value, draw, loose)}${space()}`)
        .join(",")}}`;
    default:
      return node satisfies never;
  }
}

const copy = (node: Node): Node => structuredClone(node);

/** Every place that holds a node, with the means to replace it. */
interface Place {
  readonly node: Node;
  replace(node: Node): void;
}

function places(root: Node, replace: (node: Node) => void, found: Place[] = []): Place[] {
  found.push({ node: root, replace });
  if (root.kind === "list") {
    for (const [i, item] of root.items.entries()) {
      places(item, (node) => void root.items.splice(i, 1, node), found);
    }
  } else if (root.kind === "object") {
    for (const entry of root.entries) places(entry.value, (node) => void Object.assign(entry, { value: node }), found);
  }
  return found;
}

const oddNumbers = [
  ..."0 1 2 3 4 7 8 16 24 64 65 255 65536 4294967295 4294967296 2147483648 9007199254740991 9007199254740992".split(
    " ",
  ),
  ..."18446744073709551616 -1 -0 1.5 1e3 1E400 -1e999 0x10 01 NaN Infinity +1 1_000 .5 99999999999999999999999".split(
    " ",
  ),
  "9".repeat(400),
];
const oddTexts = [
  "",
  "__proto__",
  "model.__proto__.weight",
  "constructor",
  "toString",
  "__metadata__",
  "dtype",
  "shape",
  "data_offsets",
  "weight_map",
  "w",
  "F32",
  "BF16",
  "F4",
  "F6_E2M3",
  "U8",
  "C64",
  "F31",
  "n".repeat(1024),
  "n".repeat(1025),
  "../../etc/passwd",
  "../model.safetensors",
  "/tmp/model.safetensors",
  "C:\\model.safetensors",
  "a\\..\\b.safetensors",
  "nul.safetensors",
  "a\u0000.safetensors",
  "pytorch_model.bin",
  "model.safetensors",
  "config.json",
  "\ud800",
  "\u2028",
  "é",
];

type TreeChange = (all: readonly Place[], draw: Draw) => void;
const objects = (all: readonly Place[]) =>
  all.flatMap(({ node }) => (node.kind === "object" && node.entries.length ? [node] : []));
const lists = (all: readonly Place[]) =>
  all.flatMap(({ node }) => (node.kind === "list" && node.items.length ? [node] : []));
const literals = (all: readonly Place[]) => all.filter(({ node }) => node.kind === "literal");
const literal = (text: string): Node => ({ kind: "literal", text });

const treeChanges: readonly TreeChange[] = [
  // A number becomes another one: odd, or near what it was.
  (all, draw) => {
    const found = literals(all);
    if (found.length === 0) return;
    const { node, replace } = draw.pick(found);
    const old = node.kind === "literal" ? Number(node.text) : 0;
    const near = [old + 1, old - 1, old * 2, old + 8, old - 4, old * 2 ** 32].map(String);
    replace(literal(draw.pick(draw.chance(0.5) ? near : oddNumbers)));
  },
  // Two numbers change places.
  (all, draw) => {
    const found = literals(all);
    if (found.length < 2) return;
    const [a, b] = [draw.pick(found), draw.pick(found)];
    const old = copy(a.node);
    a.replace(copy(b.node));
    b.replace(old);
  },
  // A text or key becomes another one.
  (all, draw) => {
    const found = all.filter(({ node }) => node.kind === "text");
    if (found.length) draw.pick(found).replace({ kind: "text", text: draw.pick(oddTexts) });
  },
  (all, draw) => {
    const found = objects(all);
    if (found.length) draw.pick(draw.pick(found).entries).key = draw.pick(oddTexts);
  },
  // An entry twice: as it is, or under another name.
  (all, draw) => {
    const found = objects(all);
    if (found.length === 0) return;
    const { entries } = draw.pick(found);
    const { key, value } = draw.pick(entries);
    const name = draw.chance(0.5) ? key : `${key}2`;
    entries.splice(draw.below(entries.length + 1), 0, { key: name, value: copy(value) });
  },
  // An entry less, or all in another order.
  (all, draw) => {
    const found = objects(all);
    if (found.length === 0) return;
    const { entries } = draw.pick(found);
    const [taken] = entries.splice(draw.below(entries.length), 1);
    if (taken && draw.chance(0.5)) entries.splice(draw.below(entries.length + 1), 0, taken);
  },
  // A list longer or shorter.
  (all, draw) => {
    const found = lists(all);
    if (found.length === 0) return;
    const { items } = draw.pick(found);
    if (draw.chance(0.5)) items.splice(draw.below(items.length), 1);
    else for (let times = draw.pick([1, 1, 2, 64]); times > 0; times--) items.push(copy(draw.pick(items)));
  },
  // A part becomes a copy of another part.
  (all, draw) => draw.pick(all).replace(copy(draw.pick(all).node)),
  // Nesting.
  (all, draw) => {
    const { node, replace } = draw.pick(all);
    let deep = copy(node);
    for (let left = draw.pick([1, 2, 63, 64, 65, 300]); left > 0; left--) {
      deep = draw.chance(0.5)
        ? { kind: "list", items: [deep] }
        : { kind: "object", entries: [{ key: "x", value: deep }] };
    }
    replace(deep);
  },
  // Offsets moved together: one tensor, or all from one on.
  (all, draw) => {
    const found = objects(all).flatMap(({ entries }) =>
      entries.flatMap(({ key, value }) => (key === "data_offsets" && value.kind === "list" ? [value] : [])),
    );
    if (found.length === 0) return;
    const start = draw.below(found.length);
    const by = draw.pick([-8, -4, -1, 1, 4, 8, 2 ** 32]);
    for (const { items } of draw.chance(0.5) ? found.slice(start) : found.slice(start, start + 1)) {
      for (const item of items) if (item.kind === "literal") item.text = String(Number(item.text) + by);
    }
  },
  // A literal that is none, or of another kind.
  (all, draw) =>
    draw.pick(all).replace(literal(draw.pick(["null", "true", "{}", "[]", '""', "undefined", "", "{", "]"]))),
];

/** A JSON value changed as the headers of the mutants are. */
export const mutantJson = (seed: number, value: unknown): Uint8Array => mutateTree(value, draws(seed));

function mutateTree(value: unknown, draw: Draw): Uint8Array {
  let root = toTree(value);
  for (let times = draw.pick([1, 1, 1, 2, 3]); times > 0; times--) {
    draw.pick(treeChanges)(
      places(root, (node) => {
        root = node;
      }),
      draw,
    );
  }
  return encoder.encode(toText(root, draw, draw.chance(0.3)));
}

// ------------------------------------------------------------------------------------------------ bytes

/** Noise: flips, insertions, cuts, repeated and exchanged blocks. */
function mutateBytes(bytes: Uint8Array, other: Uint8Array, draw: Draw): Uint8Array {
  const { length } = bytes;
  const at = draw.below(length + 1);
  const end = Math.min(length, at + 1 + draw.below(16));
  const [before, block, after] = [bytes.subarray(0, at), bytes.subarray(at, end), bytes.subarray(end)];
  switch (draw.below(7)) {
    case 0: {
      const changed = Uint8Array.from(bytes);
      if (length) changed[draw.below(length)] = draw.pick([0, 1, 0x22, 0x7b, 0x7d, 0x80, 0xff, draw.below(256)]);
      return changed;
    }
    case 1: {
      const changed = Uint8Array.from(bytes);
      const i = draw.below(length);
      if (length) changed[i] = (changed[i] as number) ^ (1 << draw.below(8));
      return changed;
    }
    case 2:
      return Uint8Array.from(before);
    case 3:
      return join([before, after]);
    case 4:
      return join([before, block, block, after]);
    case 5:
      return join([before, other.subarray(draw.below(other.length + 1))]);
    default:
      return join([before, Uint8Array.from({ length: 1 + draw.below(12) }, () => draw.below(256)), block, after]);
  }
}

function mutateSafetensors(bytes: Uint8Array, other: Uint8Array, draw: Draw): Uint8Array {
  const size = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  let header = bytes.subarray(8, 8 + size);
  let data = bytes.subarray(8 + size);
  if (draw.chance(0.8)) header = mutateTree(JSON.parse(new TextDecoder().decode(header)), draw);
  if (draw.chance(0.1)) header = mutateBytes(header, other, draw);
  if (draw.chance(0.15)) data = mutateBytes(data, other, draw);
  const start = new Uint8Array(8);
  const odd = [0, 1, header.length - 1, header.length + 1, header.length + data.length, 100_000_000, 100_000_001].map(
    BigInt,
  );
  const length = draw.chance(0.15)
    ? draw.pick([...odd, BigInt(draw.below(2 ** 32)), 2n ** 32n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n])
    : BigInt(header.length);
  new DataView(start.buffer).setBigUint64(0, BigInt.asUintN(64, length), true);
  const whole = join([start, header, data]);
  return draw.chance(0.05) ? mutateBytes(whole, other, draw) : whole;
}

/** The mutant of a seed: one of the checkpoints with one file changed, missing, doubled or under another's name. */
export function mutant(seed: number, valid: readonly Files[]): Files {
  const draw = draws(seed);
  const files: Files = new Map(draw.pick(valid));
  const names = [...files.keys()];
  const name = draw.pick(names);
  const bytes = files.get(name) ?? new Uint8Array(0);
  const other = files.get(draw.pick(names)) ?? bytes;
  if (draw.chance(0.04)) {
    files.delete(name);
    if (draw.chance(0.7)) files.set(draw.pick([...names, "pytorch_model.bin", "../x.safetensors"]), other);
    return files;
  }
  // Weights are what most of the format is about.
  const weights = names.filter((each) => each.endsWith(".safetensors"));
  const target = draw.chance(0.6) ? draw.pick(weights) : name;
  const content = files.get(target) ?? bytes;
  files.set(
    target,
    target.endsWith(".safetensors")
      ? mutateSafetensors(content, other, draw)
      : draw.chance(0.8)
        ? mutateTree(JSON.parse(new TextDecoder().decode(content)), draw)
        : mutateBytes(content, other, draw),
  );
  return files;
}

// ------------------------------------------------------------------------------------------------ the judge

/** What the reader made of a mutant: "accepted", or the refusal without the names and numbers of this one case. */
export interface Verdict {
  readonly outcome: string;
  /** Bytes read for it and the largest array made for it, in parts of the files' size. */
  readonly read: number;
  readonly largest: number;
}

const kinds = ["ArrayBuffer", "Uint8Array", "Uint16Array", "Int32Array", "Float32Array", "Float64Array"] as const;

/** Runs `act` and measures the largest buffer, in bytes, that anybody makes meanwhile. */
async function watchingBuffers<T>(act: () => Promise<T>): Promise<{ result: T; largest: number }> {
  let largest = 0;
  const global = globalThis as Record<string, unknown>;
  const originals = kinds.map((kind) => [kind, globalThis[kind]] as const);
  for (const [kind, original] of originals) {
    global[kind] = new Proxy(original, {
      construct(target, args, made) {
        const array = Reflect.construct(target, args, made === global[kind] ? target : made) as ArrayBuffer;
        largest = Math.max(largest, array.byteLength);
        return array;
      },
    });
  }
  try {
    return { result: await act(), largest };
  } finally {
    for (const [kind, original] of originals) global[kind] = original;
  }
}

const bits: Readonly<Record<string, number>> = {
  ...{ F4: 4, F6_E2M3: 6, F6_E3M2: 6, BOOL: 8, U8: 8, I8: 8, F8_E4M3: 8, F8_E5M2: 8, F8_E8M0: 8 },
  ...{ I16: 16, U16: 16, F16: 16, BF16: 16, I32: 32, U32: 32, F32: 32, I64: 64, U64: 64, F64: 64, C64: 64 },
};

function must(good: boolean, what: string): asserts good {
  if (!good) throw new Error(`the reader accepted a file that it should not have: ${what}`);
}

/** A table that was accepted, checked again with big integers and by other means than the reader's. */
export function checkTable(bytes: Uint8Array, { tensors }: Awaited<ReturnType<typeof readHeader>>): void {
  const start = 8n + new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
  const text = new TextDecoder().decode(bytes.subarray(8, Number(start)));
  const listed = Object.keys(JSON.parse(text) as object).filter((name) => name !== "__metadata__");
  must(listed.sort().join("\n") === [...tensors.keys()].sort().join("\n"), "other names than the header's");
  const owners = new Uint8Array(bytes.length);
  owners.fill(1, 0, Number(start));
  for (const [name, { dtype, shape, from, to }] of tensors) {
    must(!name.split(".").includes("__proto__") && name.length <= 1024 && shape.length <= 64, `the name of ${name}`);
    must(BigInt(from) >= start && from <= to && to <= bytes.length, `${name} lies outside`);
    const size = shape.reduce((n, d) => n * BigInt(d), BigInt(bits[dtype] ?? 0));
    must(bits[dtype] !== undefined && size === 8n * BigInt(to - from), `${name} is not ${dtype} [${shape}]`);
    for (let i = from; i < to; i++) {
      must(owners[i] === 0, `byte ${i} belongs to two`);
      owners[i] = 1;
    }
  }
  must(!owners.includes(0), "a byte belongs to nobody");
}

/**
 * Reads a checkpoint as a stranger's: every header, every tensor, every JSON file. Throws an Error for anything but
 * acceptance of a consistent checkpoint or a CheckpointError: a crash, a read outside a file, more work or larger arrays
 * than twice what the files hold.
 */
export async function judge(files: Files): Promise<Verdict> {
  const size = [...files.values()].reduce((n, { length }) => n + length, 0);
  let read = 0;
  let reads = 0;
  const opened = new Set<string>();
  const source = (name: string, bytes: Uint8Array): ByteSource => ({
    name,
    size: bytes.length,
    async read(from, to) {
      const whole = Number.isSafeInteger(from) && Number.isSafeInteger(to);
      if (!whole || from < 0 || to < from || to > bytes.length) throw new Error(`${name}: read from ${from} to ${to}`);
      read += to - from;
      reads++;
      const part = new Uint8Array(to - from);
      part.set(bytes.subarray(from, to));
      return part;
    },
  });
  const open = async (name: string): Promise<ByteSource | undefined> => {
    const bytes = files.get(name);
    if (bytes) opened.add(name);
    return bytes && source(name, bytes);
  };
  const { result, largest } = await watchingBuffers(async () => {
    try {
      const checkpoint = await readCheckpoint(open, "here");
      await checkpoint.json("tokenizer.json");
      for (const name of checkpoint.names) {
        const { bytes } = checkpoint.stored(name);
        if ((await checkpoint.read(name)).length !== bytes) throw new Error(`${name} has another length`);
      }
      await checkpoint.close();
      return { outcome: "accepted" };
    } catch (error) {
      if (!CheckpointError.isInstance(error)) throw error;
      if (error.message.length > 2000)
        throw new Error(`a message of ${error.message.length} characters`, { cause: error });
      return { outcome: kindOf(error.message) };
    }
  });
  // 64 bytes: a file may be empty, and eight bytes are asked for before its size is known to matter.
  if (largest > 2 * size + 64) throw new Error(`an array of ${largest} bytes for files of ${size}`);
  if (read > 2 * size + 64) throw new Error(`${read} bytes read of files of ${size}`);
  if (reads > 10 + 2 * files.size + size) throw new Error(`${reads} reads`);
  if (result.outcome === "accepted") {
    for (const [name, bytes] of files) {
      if (!opened.has(name) || !name.endsWith(".safetensors")) continue;
      checkTable(bytes, await readHeader(bytesSource(name, bytes)));
    }
  }
  return { outcome: result.outcome, read: size ? read / size : 0, largest: size ? largest / size : 0 };
}

/** The message of a refusal without quoted names, numbers and lists: one text per kind of refusal. */
const kindOf = (message: string): string =>
  message
    .replace(/"(\\.|[^"\\])*"/g, "…")
    .replace(/not valid JSON: .*/s, "not valid JSON")
    .replace(/\[[^\]]*\]/g, "[…]")
    .replace(/[+-]?\d+/g, "#")
    .replace(/\b[A-Z]\w*#\w*\b/g, "#")
    .replace(/found .*/s, "found …")
    .replace(/^\S+: /, "")
    .replace(/^\S+\.(json|safetensors) /, "")
    .slice(0, 90);
