// What the families of Hugging Face checkpoints have in common: reading the sizes of config.json, and saying where the usual
// parts of a decoder lie. A family's own file says which of these parts it has; nothing here reads weights.
import { CheckpointError, type Json } from "@switchyard/core";
import type { Blueprint, GateActivation, GroupedAttention, Norm } from "../blueprint.ts";
import { isRecord } from "../checkpoint.ts";
import { ConfigReader } from "../config-reader.ts";
import { maximumHead, type Rotary, type RotaryOptions, rotary } from "../rope.ts";
import { quote } from "../safetensors.ts";
import type { CheckpointIndex, Description, Piece, Source } from "../source.ts";
import { checkCounts } from "../weights.ts";

/** Throws a CheckpointError about config.json. */
export function refuse(message: string): never {
  throw new CheckpointError(`config.json: ${message}`);
}

/** Whether a key is there and null, where that is not the same as absent. */
export const isNull = ({ config }: CheckpointIndex, key: string): boolean =>
  Object.hasOwn(config, key) && config[key] === null;

/** The sizes that every family has under the same names. */
export interface Sizes {
  readonly vocabulary: number;
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly context: number;
  readonly eps: number;
  readonly tieEmbeddings: boolean;
}

/**
 * Reads the sizes. `defaults` are those of the family's configuration class, because keys equal to them are not always
 * written; kvHeads absent: as many as heads. Throws CheckpointError for values out of range, for heads that cannot share keys,
 * and for more layers than there are tensors.
 */
export function readSizes(
  checkpoint: CheckpointIndex,
  defaults: Omit<Sizes, "kvHeads" | "tieEmbeddings"> & { readonly kvHeads?: number; readonly tieEmbeddings?: boolean },
): Sizes {
  const config = new ConfigReader(checkpoint.config);
  const heads = config.whole("num_attention_heads", defaults.heads);
  // A null there means "as many as heads" in every class, an absent key the class's own number.
  const asHeads = isNull(checkpoint, "num_key_value_heads");
  const sizes: Sizes = {
    vocabulary: config.whole("vocab_size", defaults.vocabulary),
    width: config.whole("hidden_size", defaults.width),
    layers: config.whole("num_hidden_layers", defaults.layers),
    heads,
    kvHeads: config.whole("num_key_value_heads", asHeads ? heads : (defaults.kvHeads ?? heads)),
    context: config.whole("max_position_embeddings", defaults.context),
    eps: config.number("rms_norm_eps", defaults.eps),
    tieEmbeddings: config.boolean("tie_word_embeddings", defaults.tieEmbeddings ?? false),
  };
  if (heads % sizes.kvHeads !== 0) {
    refuse(`${heads} attention heads cannot share ${sizes.kvHeads} heads of keys and values ("num_key_value_heads")`);
  }
  if (!(sizes.eps >= 0)) refuse(`"rms_norm_eps" is ${sizes.eps}, expected a number from 0`);
  checkCounts(checkpoint, { layers: sizes.layers });
  return sizes;
}

/** `head_dim`, or hidden_size / num_attention_heads where it is absent or null. */
export function readHeadSize(config: ConfigReader, { width, heads }: Pick<Sizes, "width" | "heads">): number {
  const found = config.get("head_dim") === undefined ? width / heads : config.whole("head_dim");
  if (!Number.isInteger(found)) {
    refuse(`"head_dim" is missing, and hidden_size ${width} is no multiple of ${heads} attention heads`);
  }
  if (found % 2 !== 0) refuse(`heads have ${found} channels; rotary positions need an even number`);
  return found;
}

/** Routed experts per token, at most as many as there are. */
export function readExperts(
  config: ConfigReader,
  { counts, experts, k }: { readonly counts: readonly string[]; readonly experts: number; readonly k: number },
): { readonly experts: number; readonly k: number } {
  const key = oneOf(config, counts);
  const found = config.whole(key, experts);
  const perToken = config.whole("num_experts_per_tok", k);
  if (perToken > found) refuse(`"num_experts_per_tok" is ${perToken}, but there are ${found} experts`);
  return { experts: found, k: perToken };
}

/** A number from 0, such as a loss weight or a jitter. */
export function readNotNegative(config: ConfigReader, key: string, fallback: number): number {
  const value = config.number(key, fallback);
  if (!(value >= 0)) refuse(`${quote(key)} is ${value}, expected a number from 0`);
  return value;
}

/** The one of several names of the same key that is given, else the first. Throws CheckpointError where two disagree. */
export function oneOf(config: ConfigReader, keys: readonly string[]): string {
  const given = keys.filter((key) => config.get(key) !== undefined);
  const [first = keys[0] ?? "", ...others] = given;
  for (const other of others) {
    if (JSON.stringify(config.get(other)) !== JSON.stringify(config.get(first))) {
      refuse(`${quote(first)} is ${shown(config.get(first))}, but ${quote(other)} is ${shown(config.get(other))}`);
    }
  }
  return first;
}

const shown = (value: Json | undefined): string => quote(JSON.stringify(value ?? null));

/** Names of `torch.nn` functions in config.json -> ours. */
const activations: ReadonlyMap<string, GateActivation> = new Map([
  ["silu", "silu"],
  ["swish", "silu"],
  ["gelu", "gelu"],
  ["gelu_new", "gelu-tanh"],
  ["gelu_pytorch_tanh", "gelu-tanh"],
  ["relu", "relu"],
]);

/** The function between gate and up; `key` default "hidden_act". Throws CheckpointError for one that is not known. */
export function readActivation(config: ConfigReader, key = "hidden_act"): GateActivation {
  const name = config.string(key, "silu");
  return (
    activations.get(name) ??
    refuse(`${quote(key)} is ${quote(name)}; supported are ${[...activations.keys()].join(", ")}`)
  );
}

/** The key of the record of rotary positions. */
export const ropeKey = (config: ConfigReader): string => oneOf(config, ["rope_scaling", "rope_parameters"]);

/** `rope_theta`, beside the record of rotary positions or in it. Throws CheckpointError where the two differ. */
export function readTheta(config: ConfigReader, fallback: number): number {
  const key = ropeKey(config);
  const record = config.get(key);
  const beside = config.number("rope_theta", fallback);
  if (!isRecord(record)) return beside;
  const inside = new ConfigReader(record, `config.json, ${key}`).number("rope_theta", beside);
  if (config.get("rope_theta") !== undefined && inside !== beside) {
    refuse(`"rope_theta" is ${beside}, but ${inside} in ${quote(key)}; leave one of them out`);
  }
  return inside;
}

/**
 * Rotary positions in both spellings: `rope_scaling` beside `rope_theta`, and since version 5 of the library
 * `rope_parameters` with everything in it. Throws CheckpointError where the two disagree, and as `rotary` does.
 */
export function readRope(
  config: ConfigReader,
  options: Pick<RotaryOptions, "headSize" | "interleaved"> & {
    /** Default of the class. */
    readonly theta: number;
    readonly context: number;
    /** Types of rotary positions that the family can have; default: all. */
    readonly types?: readonly Rotary["type"][];
  },
): Rotary {
  const { headSize, interleaved, context, types } = options;
  if (headSize > maximumHead) refuse(`heads have ${headSize} channels; at most ${maximumHead} are read`);
  const theta = readTheta(config, options.theta);
  const key = ropeKey(config);
  const record = config.get(key);
  config.only("partial_rotary_factor", 1);
  const original = "original_max_position_embeddings";
  const result = rotary(record, {
    headSize,
    theta,
    maxPositions: context,
    key,
    ...(interleaved === undefined ? {} : { interleaved }),
    ...(config.get(original) === undefined ? {} : { originalPositions: config.whole(original) }),
  });
  if (result.size !== headSize) {
    refuse(`${quote(key)} turns ${result.size} of ${headSize} channels; this family turns all of them`);
  }
  if (types && !types.includes(result.type)) {
    refuse(`${quote(key)} is of type ${quote(result.type)}; this family has ${types.join(" or ")}`);
  }
  return result;
}

/**
 * Longest sequence: `max_position_embeddings`, which for linear, dynamic and yarn rope is that of the training, before the
 * stretching. The others state the stretched length.
 */
function stretched({ config: stated }: CheckpointIndex, { context, layers: [layer] }: Blueprint): number {
  const config = new ConfigReader(stated);
  const record = config.get(ropeKey(config));
  const type = layer?.attention.rope.type;
  if (!isRecord(record) || (type !== "linear" && type !== "dynamic" && type !== "yarn")) return context;
  const from = new ConfigReader(record, "config.json, rotary positions");
  const before = type === "yarn" ? from.whole("original_max_position_embeddings", context) : context;
  return Math.max(context, Math.min(Math.floor(before * from.number("factor")), Number.MAX_SAFE_INTEGER));
}

/**
 * The window of each layer, undefined for those that see everything. `layer_types` decides where it is given, else
 * `fallback(layer)`. Throws CheckpointError for kinds of layers that are not known and for a list of another length.
 */
export function readWindows(
  config: ConfigReader,
  {
    layers,
    window,
    fallback,
  }: { readonly layers: number; readonly window: number | undefined; readonly fallback: (layer: number) => boolean },
): readonly (number | undefined)[] {
  const kinds = config.get("layer_types");
  if (kinds === undefined) return Array.from({ length: layers }, (_, i) => (fallback(i) ? window : undefined));
  if (!Array.isArray(kinds) || kinds.length !== layers) {
    refuse(`"layer_types" is ${shown(kinds)}, expected a list of ${layers} kinds of layers`);
  }
  return (kinds as readonly Json[]).map((kind, i) => {
    if (kind === "full_attention") return undefined;
    if (kind !== "sliding_attention") {
      refuse(`"layer_types" has ${shown(kind)} at ${i}; supported are "full_attention" and "sliding_attention"`);
    }
    return window ?? refuse(`layer ${i} is of type "sliding_attention", but there is no "sliding_window"`);
  });
}

/** Throws CheckpointError where `layer_types`, which the family's class does not read, says something else than the class does. */
export function checkLayerTypes(config: ConfigReader, windows: readonly (number | undefined)[]): void {
  const stated = readWindows(config, { layers: windows.length, window: 1, fallback: (i) => windows[i] !== undefined });
  const other = stated.findIndex((window, i) => (window === undefined) !== (windows[i] === undefined));
  if (other < 0) return;
  refuse(`"layer_types" and "sliding_window" disagree about layer ${other}, and this family has one window for all`);
}

/** Where parameters lie, collected part by part. Paths are ours, names those of the checkpoint. */
export interface Places {
  readonly checkpoint: CheckpointIndex;
  readonly sources: Map<string, Source>;
  /** Whether this tensor is stored, as floats or in a quantised form that is named after it. */
  has(name: string): boolean;
  /** A parameter that is one stored tensor. */
  whole(path: string, name: string, shape: readonly number[]): void;
  /** A parameter `[experts, ...]`: what lies one below the other for each expert. */
  experts(path: string, shape: readonly number[], expert: (e: number) => readonly Piece[]): void;
}

export function places(checkpoint: CheckpointIndex): Places {
  // What a quantised tensor's main part adds to the name.
  const stored = new Set(checkpoint.names.map((name) => name.replace(/_(packed|blocks)$/, "")));
  const sources = new Map<string, Source>();
  return {
    checkpoint,
    sources,
    has: (name) => stored.has(name),
    whole: (path, name, shape) => sources.set(path, { kind: "whole", shape, pieces: [{ name, shape }] }),
    experts: (path, shape, expert) => sources.set(path, { kind: "experts", shape, expert }),
  };
}

/** A norm: `name.weight` at `path`, and for Layer `name.bias` at `pathBias`. */
export function placeNorm(
  at: Places,
  norm: Norm,
  { path, name, size }: { readonly path: string; readonly name: string; readonly size: number },
): void {
  at.whole(path, `${name}.weight`, [size]);
  if (norm.kind === "layer") at.whole(`${path}Bias`, `${name}.bias`, [size]);
}

/** Embedding, last norm, head: the parts outside layers. */
export function placeOutside(
  at: Places,
  blueprint: Pick<Blueprint, "vocabulary" | "width" | "norm" | "tieEmbeddings" | "headBias">,
): void {
  const { vocabulary, width, norm, tieEmbeddings, headBias } = blueprint;
  at.whole("embed", "model.embed_tokens.weight", [vocabulary, width]);
  placeNorm(at, norm, { path: "norm", name: "model.norm", size: width });
  if (!tieEmbeddings) at.whole("head", "lm_head.weight", [vocabulary, width]);
  if (headBias) at.whole("headBias", "lm_head.bias", [vocabulary]);
}

/** The two norms of a layer. */
export function placeLayerNorms(at: Places, layer: number, { norm, width }: Pick<Blueprint, "norm" | "width">): void {
  const names = { attentionNorm: "input_layernorm", moeNorm: "post_attention_layernorm" };
  for (const [path, name] of Object.entries(names)) {
    placeNorm(at, norm, { path: `layers.${layer}.${path}`, name: `model.layers.${layer}.${name}`, size: width });
  }
}

/** `self_attn` of grouped attention: projections, their biases, the norms of queries and keys, sinks. */
export function placeAttention(at: Places, layer: number, attention: GroupedAttention, width: number): void {
  const { heads, kvHeads, headSize, bias, outputBias, qkNorm, sinks } = attention;
  const path = `layers.${layer}.attention`;
  const name = `model.layers.${layer}.self_attn`;
  const rows = { q: heads * headSize, k: kvHeads * headSize, v: kvHeads * headSize };
  for (const [one, size] of Object.entries(rows)) {
    at.whole(`${path}.${one}`, `${name}.${one}_proj.weight`, [size, width]);
    if (bias) at.whole(`${path}.${one}Bias`, `${name}.${one}_proj.bias`, [size]);
  }
  at.whole(`${path}.o`, `${name}.o_proj.weight`, [width, heads * headSize]);
  if (outputBias) at.whole(`${path}.oBias`, `${name}.o_proj.bias`, [width]);
  if (qkNorm) {
    at.whole(`${path}.qNorm`, `${name}.q_norm.weight`, [qkNorm === "head" ? headSize : rows.q]);
    at.whole(`${path}.kNorm`, `${name}.k_norm.weight`, [qkNorm === "head" ? headSize : rows.k]);
  }
  if (sinks) at.whole(`${path}.sinks`, `${name}.sinks`, [heads]);
}

/** Sizes of gated feed-forward layers. */
export interface GatedSizes {
  readonly hidden: number;
  readonly width: number;
}

/**
 * One gated feed-forward layer, `[1, 2 hidden, width]` and `[1, width, hidden]` at `path.gateUp` and `path.down`: a dense
 * layer or shared experts, from `name.gate_proj.weight`, `name.up_proj.weight`, `name.down_proj.weight`.
 */
export function placeGated(
  at: Places,
  { path, name, hidden, width }: GatedSizes & { readonly path: string; readonly name: string },
): void {
  at.experts(`${path}.gateUp`, [1, 2 * hidden, width], () => [
    { name: `${name}.gate_proj.weight`, shape: [hidden, width] },
    { name: `${name}.up_proj.weight`, shape: [hidden, width] },
  ]);
  at.experts(`${path}.down`, [1, width, hidden], () => [{ name: `${name}.down_proj.weight`, shape: [width, hidden] }]);
}

/** Names of an expert's three matrices, `[gate, up, down]`. */
export type ExpertNames = readonly [gate: string, up: string, down: string];

export const projNames: ExpertNames = ["gate_proj", "up_proj", "down_proj"];

/** Routed experts in two stacked tensors, `gateUp [experts, 2 hidden, width]` (gate rows, then up rows) and `down [experts, width, hidden]`. */
export function placeStacked(
  at: Places,
  options: GatedSizes & {
    readonly path: string;
    readonly gateUp: string;
    readonly down: string;
    readonly experts: number;
  },
): void {
  const { path, gateUp, down, experts, hidden, width } = options;
  at.experts(`${path}.gateUp`, [experts, 2 * hidden, width], (e) => [
    { name: gateUp, shape: [2 * hidden, width], index: e, of: experts },
  ]);
  at.experts(`${path}.down`, [experts, width, hidden], (e) => [
    { name: down, shape: [width, hidden], index: e, of: experts },
  ]);
}

/**
 * The routed experts of a layer at `path.gateUp` and `path.down`, in either layout: one by one (`prefix.3.gate_proj.weight`), or
 * stacked as version 5 of the library holds them (`prefix.gate_up_proj [experts, 2 hidden, width]`, `prefix.down_proj`). `prefixes`: names
 * of the module in the versions of the library, the first one used where none is found.
 */
export function placeExperts(
  at: Places,
  options: GatedSizes & {
    readonly path: string;
    readonly prefixes: readonly string[];
    readonly names?: ExpertNames;
    readonly experts: number;
  },
): void {
  const { path, prefixes, names = projNames, experts, hidden, width } = options;
  const stacked = prefixes.find((prefix) => at.has(`${prefix}.gate_up_proj`));
  if (stacked !== undefined) {
    const stackedNames = { gateUp: `${stacked}.gate_up_proj`, down: `${stacked}.down_proj` };
    placeStacked(at, { path, experts, hidden, width, ...stackedNames });
    return;
  }
  checkCounts(at.checkpoint, { experts });
  const [gate, up, down] = names;
  const prefix = prefixes.find((one) => at.has(`${one}.0.${gate}.weight`)) ?? prefixes[0];
  const piece = (e: number, name: string, shape: readonly number[]): Piece => ({
    name: `${prefix}.${e}.${name}.weight`,
    shape,
  });
  at.experts(`${path}.gateUp`, [experts, 2 * hidden, width], (e) => [
    piece(e, gate, [hidden, width]),
    piece(e, up, [hidden, width]),
  ]);
  at.experts(`${path}.down`, [experts, width, hidden], (e) => [piece(e, down, [width, hidden])]);
}

/** The router's matrix of a layer, at the first of `names` that is stored. */
export function placeRouter(
  at: Places,
  layer: number,
  { names, experts, width }: { readonly names: readonly string[]; readonly experts: number; readonly width: number },
): void {
  const name = names.find((one) => at.has(one)) ?? names[0] ?? "";
  at.whole(`layers.${layer}.moe.router.weight`, name, [experts, width]);
}

/** The finished description, its context stretched as its rotary positions are. Ignored are a head that is the embedding, and tables of frequencies of old files. */
export function described(at: Places, blueprint: Blueprint): Description {
  const copies = new Map(blueprint.tieEmbeddings ? [["lm_head.weight", "embed"]] : []);
  return {
    blueprint: { ...blueprint, context: stretched(at.checkpoint, blueprint) },
    sources: at.sources,
    ignores: (name) => copies.has(name) || name.endsWith("rotary_emb.inv_freq"),
    copies,
  };
}
