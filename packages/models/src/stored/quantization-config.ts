// What config.json says about stored codes, as a list of schemes. Which of them a matrix has is told by the shapes of its tensors, not
// by the names and patterns of modules: a pattern from a stranger is never run.
import { CheckpointError, type Json } from "@switchyard/core";
import { isRecord } from "../checkpoint.ts";
import { quote } from "../safetensors.ts";

/** One way in which the matrices of a checkpoint may be stored. */
export interface Scheme {
  readonly type: "int" | "float";
  readonly bits: number;
  /** Whether codes have no zero points. */
  readonly symmetric: boolean;
  /** Lines and elements of a line [out, in] that share a scale; Infinity: all there are. */
  readonly rows: number;
  readonly group: number;
}

export interface Quantization {
  /** "none" where config.json has no quantization_config. */
  readonly method: string;
  /** Of compressed-tensors. */
  readonly format?: string;
  readonly schemes: readonly Scheme[];
}

const none: Quantization = { method: "none", schemes: [] };
const known = new WeakMap<object, Quantization>();

/**
 * The quantisation of a checkpoint, understood once for each config.
 * Throws CheckpointError where it cannot be understood; methods that nothing here reads come back with no schemes.
 */
export function quantizationOf(config: { readonly [key: string]: Json }): Quantization {
  const before = known.get(config);
  if (before) return before;
  const text = config.text_config;
  const found =
    config.quantization_config ??
    config.compression_config ??
    (isRecord(text) ? (text.quantization_config ?? text.compression_config) : undefined);
  const made = found === undefined || found === null ? none : understood(found);
  known.set(config, made);
  return made;
}

const inConfig = "config.json: quantization_config";
const fail = (what: string): never => {
  throw new CheckpointError(`${inConfig}${what}`);
};
const words = (value: Json | undefined): string => quote(JSON.stringify(value) ?? "nothing");

const isSize = (value: Json | undefined): value is number =>
  typeof value === "number" && Number.isSafeInteger(value) && value > 0;

/** Two sizes: a list, or the older spelling "128x128". */
function pairOf(given: Json | undefined, what: string): readonly [number, number] {
  const value = typeof given === "string" && /^\d{1,9}x\d{1,9}$/.test(given) ? given.split("x").map(Number) : given;
  if (Array.isArray(value) && value.length === 2 && isSize(value[0]) && isSize(value[1])) return [value[0], value[1]];
  return fail(`${what} must be two sizes such as [128, 128], found ${words(value)}`);
}

function understood(value: Json): Quantization {
  if (!isRecord(value)) return fail(` must be a record, found ${words(value)}`);
  const method = value.quant_method;
  if (typeof method !== "string") return fail(`.quant_method must be a word, found ${words(method)}`);
  if (method === "fp8") {
    // The default is that of FineGrainedFP8Config; null stands for one scale for each matrix.
    const block = value.weight_block_size === undefined ? [128, 128] : value.weight_block_size;
    const whole = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY] as const;
    const [rows, group] = block === null ? whole : pairOf(block, ".weight_block_size");
    return { method, schemes: [{ type: "float", bits: 8, symmetric: true, rows, group }] };
  }
  if (method === "compressed-tensors") return compressedTensors(value);
  return { method, schemes: [] };
}

function compressedTensors(value: { readonly [key: string]: Json }): Quantization {
  const { transform_config: transform, config_groups: groups, format, sparsity_config: sparsity } = value;
  if (isRecord(transform) && Object.keys(isRecord(transform.config_groups) ? transform.config_groups : {}).length > 0)
    return fail(".transform_config: weights that were rotated are not supported; take a checkpoint without transforms");
  if (isRecord(sparsity) && sparsity.format !== undefined && sparsity.format !== "dense")
    return fail(`.sparsity_config.format ${words(sparsity.format)} is not supported; supported is "dense"`);
  if (!isRecord(groups)) return fail(`.config_groups must be a record, found ${words(groups)}`);
  const entries = Object.entries(groups);
  if (entries.length > 1000) return fail(`.config_groups has ${entries.length} entries; at most 1000 are allowed`);
  const schemes: Scheme[] = [];
  for (const [name, group] of entries) {
    const where = `.config_groups.${quote(name)}`;
    if (!isRecord(group)) return fail(`${where} must be a record, found ${words(group)}`);
    if (group.weights === null || group.weights === undefined) continue;
    schemes.push(scheme(group.weights, `${where}.weights`));
  }
  return { method: "compressed-tensors", ...(typeof format === "string" ? { format } : {}), schemes };
}

/** Words are read in either case. */
const lower = (value: Json | undefined): Json | undefined => (typeof value === "string" ? value.toLowerCase() : value);

/** QuantizationArgs of compressed-tensors, with the defaults of that class. */
function scheme(value: Json, where: string): Scheme {
  if (!isRecord(value)) return fail(`${where} must be a record, found ${words(value)}`);
  const { num_bits: bits = 8, symmetric = true, group_size: size = null, block_structure: block } = value;
  const type = lower(value.type ?? "int");
  if (type !== "int" && type !== "float") return fail(`${where}.type must be "int" or "float", found ${words(type)}`);
  if (!isSize(bits) || bits > 16) return fail(`${where}.num_bits must be a number of bits, found ${words(bits)}`);
  if (typeof symmetric !== "boolean")
    return fail(`${where}.symmetric must be true or false, found ${words(symmetric)}`);
  const all = Number.POSITIVE_INFINITY;
  // -1 is an older spelling of one scale per row.
  if (size !== null && size !== -1 && !isSize(size))
    return fail(`${where}.group_size must be a size, found ${words(size)}`);
  const strategy = lower(value.strategy) ?? (size === null ? "tensor" : size === -1 ? "channel" : "group");
  switch (strategy) {
    case "tensor":
      return { type, bits, symmetric, rows: all, group: all };
    case "channel":
      return { type, bits, symmetric, rows: 1, group: all };
    case "group":
      if (!isSize(size)) return fail(`${where}: the strategy "group" needs a group_size, found ${words(size)}`);
      return { type, bits, symmetric, rows: 1, group: size };
    case "block": {
      const [rows, group] = pairOf(block, `${where}.block_structure`);
      return { type, bits, symmetric, rows, group };
    }
    default:
      return fail(
        `${where}.strategy ${words(value.strategy)} is not supported; supported are "tensor", "channel", "group" and "block"`,
      );
  }
}
