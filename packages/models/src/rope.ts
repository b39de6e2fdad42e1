// Rotary positions (2104.09864) in every variant that checkpoints of Hugging Face ask for: from the record `rope_scaling` or
// `rope_parameters` of config.json to inverse frequencies, and from those to tables of cosines and sines. Host float64; the
// turning itself is core's `rope`.
import { CheckpointError, type Json, ShapeError } from "@switchyard/core";
import { ConfigReader } from "./config-reader.ts";
import { quote } from "./safetensors.ts";

/** What one forward pass turns queries and keys by. */
export interface RopeFrequencies {
  /** `[size / 2]`, radians per position. */
  readonly inverse: Float64Array;
  /** Factor of every cosine and sine, so that scores grow by its square. */
  readonly scaling: number;
}

/** The rotary positions of one kind of layer. */
export interface Rotary {
  readonly type: (typeof ropeTypes)[number];
  /** Channels of a head that are turned, the first ones; even. The rest stay as they are. */
  readonly size: number;
  /** Pairs (0, 1), (2, 3), ... (DeepSeek) instead of (i, i + size / 2); hand it to core's `rope`. */
  readonly interleaved: boolean;
  /**
   * Sequences longer than this have other frequencies than shorter ones (dynamic, longrope); undefined: all have the same.
   * Keys in a cache keep the angles they were stored with, as in Hugging Face Transformers: past this length a run with a
   * cache differs from one without. Generation fills the cache anew where a text outgrows longrope's, as its Phi classes do.
   */
  readonly changesAfter: number | undefined;
  /**
   * What the classes of DeepSeek multiply the scale of their softmax with, besides `scaling`: (0.1 mscale_all_dim ln factor +
   * 1)², 1 where the record has no mscale_all_dim. Other classes ignore it.
   */
  readonly softmaxScaling: number;
  /** The frequencies of a pass whose last position is `length - 1`. Treat them as read-only: passes share them. */
  at(length: number): RopeFrequencies;
}

export interface RotaryOptions {
  /** Channels of a head, or of the part of it that is made for positions (`qk_rope_head_dim`). */
  readonly headSize: number;
  /** `rope_theta`, where the record has none of its own. */
  readonly theta?: number;
  /** Share of `headSize` that is turned, rounded down, where the record has no `partial_rotary_factor`; default 1. */
  readonly partial?: number;
  /** Default false. */
  readonly interleaved?: boolean;
  /** `max_position_embeddings`; dynamic needs it, others use it where the record lacks their original length. */
  readonly maxPositions?: number;
  /** `original_max_position_embeddings` beside the record, as Phi writes it. */
  readonly originalPositions?: number;
  /** Name of the record in errors, default "rope_scaling". In "rope_parameters" a type may be missing. */
  readonly key?: string;
}

/** More channels than any model has: tables are made for them before a checkpoint's tensors are looked at. */
export const maximumHead = 65_536;

const ropeTypes = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"] as const;
type RopeType = (typeof ropeTypes)[number];

/** Names of the same thing in older files. */
const oldNames: ReadonlyMap<string, RopeType> = new Map([["su", "longrope"]]);

/** Keys that some type knows. Those that the record's own type does not use are ignored, as in the library. */
const knownKeys = new Set([
  ...["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"],
  ...["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"],
  ...["low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"],
]);

const lengthCheck = (name: string, value: number | undefined): void => {
  if (value === undefined || (Number.isSafeInteger(value) && value > 0)) return;
  throw new ShapeError(`rotary: ${name} is ${value}, expected a whole number from 1`);
};

/** A record read key by key; every error names the key, what was found and what is possible. */
class Reader extends ConfigReader {
  readonly #where: string;

  constructor(record: { readonly [key: string]: Json }, where: string) {
    super(record, where);
    this.#where = where;
  }

  fail(message: string): never {
    throw new CheckpointError(`${this.#where}: ${message}`);
  }

  has(key: string): boolean {
    return this.get(key) !== undefined;
  }

  /** A number above `above`. */
  positive(key: string, fallback?: number, above = 0): number {
    const value = this.number(key, fallback);
    if (!(value > above)) this.fail(`"${key}" is ${value}, expected a number above ${above}`);
    return value;
  }

  /** The number from 1 by which the context was stretched. */
  factor(fallback?: number): number {
    const value = this.number("factor", fallback);
    if (!(value >= 1)) this.fail(`"factor" is ${value}, expected a number from 1`);
    return value;
  }

  /** `count` numbers above 0. */
  list(key: string, count: number): Float64Array {
    const value = this.get(key);
    const good = (x: Json): x is number => typeof x === "number" && Number.isFinite(x) && x > 0;
    const values = Array.isArray(value) ? (value as readonly Json[]) : undefined;
    if (values?.length === count && values.every(good)) return Float64Array.from(values);
    const wrong = values?.find((x) => !good(x));
    const shown = wrong === undefined ? `${values?.length} numbers` : `a list with ${quote(JSON.stringify(wrong))}`;
    const found = value === undefined ? "missing" : values ? shown : quote(JSON.stringify(value));
    this.fail(`"${key}" is ${found}, expected ${count} numbers above 0, one for each pair of channels`);
  }

  type(required: boolean): RopeType {
    const names = ["rope_type", "type"].filter((key) => this.has(key));
    const [first, second] = names.map((key) => this.string(key));
    const supported = `supported are ${ropeTypes.join(", ")}`;
    if (first === undefined) {
      if (required) this.fail(`"rope_type" is missing (older files call it "type"); ${supported}`);
      return "default";
    }
    if (second !== undefined && second !== first) {
      this.fail(`"rope_type" is ${quote(first)}, but "type" is ${quote(second)}; leave one of them out`);
    }
    const found = ropeTypes.find((name) => name === first) ?? oldNames.get(first);
    return found ?? this.fail(`"${names[0]}" is ${quote(first)}; ${supported}`);
  }
}

/**
 * Reads the rotary positions of a checkpoint: `record` is `rope_scaling` or `rope_parameters` of its config.json, absent or
 * null for plain ones. The formulas are those of Hugging Face Transformers 4.57, with its corrections since: longrope takes
 * its original length from the record where the config has none. PhiMoE's `short_mscale` and `long_mscale` take the place of
 * longrope's attention factor; past the original length its long factors and its long_mscale hold together.
 *
 * Throws CheckpointError for a type that is not supported and for a key that is unknown, missing, of the wrong type or out
 * of range, ShapeError for options out of range.
 *
 * @example
 * const angles = rotary(config.rope_scaling, { headSize: 64, theta: 10000, maxPositions: 4096 });
 * const { cos, sin } = ropeTables(angles, { past: 0, positions: 16 }); // [16, 32]
 */
export function rotary(record: Json | undefined, options: RotaryOptions): Rotary {
  const { headSize, interleaved = false, maxPositions, originalPositions, key = "rope_scaling" } = options;
  lengthCheck("headSize", headSize);
  if (headSize > maximumHead) throw new ShapeError(`rotary: headSize is ${headSize}, more than ${maximumHead}`);
  lengthCheck("maxPositions", maxPositions);
  lengthCheck("originalPositions", originalPositions);
  if (record !== undefined && record !== null && (typeof record !== "object" || Array.isArray(record))) {
    throw new CheckpointError(`config.json: "${key}" is ${quote(JSON.stringify(record))}, expected an object or null`);
  }
  const given = (record ?? {}) as { readonly [key: string]: Json };
  const from = new Reader(given, `config.json, ${key}`);
  const nested = Object.entries(given).find(([, value]) => typeof value === "object" && value && !Array.isArray(value));
  if (nested) from.fail(`${quote(nested[0])} is an object; hand the record of one kind of layer to rotary`);
  const unknown = Object.keys(given).find((name) => !knownKeys.has(name));
  if (unknown !== undefined) {
    from.fail(
      `${quote(unknown)} is ${quote(JSON.stringify(given[unknown]))}, a key this package does not know; ` +
        `known are ${[...knownKeys].join(", ")}`,
    );
  }
  const type = from.type(Object.keys(given).length > 0 && key !== "rope_parameters");
  const theta = from.positive("rope_theta", options.theta);
  const partial = from.number("partial_rotary_factor", options.partial ?? 1);
  const size = Math.trunc(headSize * partial);
  if (!(partial > 0 && partial <= 1) || size < 2 || size % 2 !== 0) {
    from.fail(
      `"partial_rotary_factor" is ${partial}, which turns ${size} of ${headSize} channels; expected an even number of them`,
    );
  }
  const plain = frequencies(size, theta);
  const always = (inverse: Float64Array, scaling = 1): Pick<Rotary, "at" | "changesAfter"> => {
    const one = { inverse, scaling };
    return { at: () => one, changesAfter: undefined };
  };
  const base = { type, size, interleaved, softmaxScaling: 1 };
  switch (type) {
    case "default":
      return { ...base, ...always(plain) };
    case "linear": {
      const factor = from.factor();
      return { ...base, ...always(plain.map((x) => x / factor)) };
    }
    case "dynamic": {
      const factor = from.factor();
      const known = maxPositions ?? from.fail(`type "dynamic" needs "max_position_embeddings" in config.json`);
      if (size < 4) from.fail(`type "dynamic" needs at least 4 turned channels, found ${size}`);
      const short = { inverse: plain, scaling: 1 };
      return {
        ...base,
        changesAfter: known,
        at(length) {
          if (length <= known) return short;
          const stretch = (factor * length) / known - (factor - 1);
          return { inverse: frequencies(size, theta * stretch ** (size / (size - 2))), scaling: 1 };
        },
      };
    }
    case "yarn": {
      const { inverse, scaling, softmaxScaling } = yarn(from, { plain, size, theta, maxPositions, originalPositions });
      return { ...base, softmaxScaling, ...always(inverse, scaling) };
    }
    case "llama3":
      return { ...base, ...always(llama3(from, plain)) };
    case "longrope":
      return { ...base, ...longrope(from, { plain, size, maxPositions, originalPositions }) };
    default:
      return type satisfies never;
  }
}

/** `[size / 2]`: theta^(-2 i / size). */
function frequencies(size: number, theta: number): Float64Array {
  const half = size / 2;
  return Float64Array.from({ length: half }, (_, i) => theta ** (-i / half));
}

interface Known {
  readonly plain: Float64Array;
  readonly size: number;
  readonly maxPositions: number | undefined;
  readonly originalPositions: number | undefined;
}

/** The length the model was first trained for. */
function originalLength(from: Reader, { maxPositions, originalPositions }: Known): number {
  const original = from.whole("original_max_position_embeddings", originalPositions ?? maxPositions);
  if (originalPositions !== undefined && originalPositions !== original) {
    from.fail(
      `"original_max_position_embeddings" is ${original}, but ${originalPositions} beside the record; ` +
        "leave one of them out",
    );
  }
  return original;
}

/** NTK by parts (2309.00071, 3.2 and 3.4): fast channels stay, slow ones are interpolated, a ramp lies between. */
function yarn(
  from: Reader,
  known: Known & { readonly theta: number },
): RopeFrequencies & { readonly softmaxScaling: number } {
  const { plain, size, theta } = known;
  const factor = from.factor();
  const original = originalLength(from, known);
  if (theta <= 1) from.fail(`"rope_theta" is ${theta}, expected more than 1 for type "yarn"`);
  // 0 stands for the default in the library, too.
  const fast = from.number("beta_fast", 32) || 32;
  const slow = from.number("beta_slow", 1) || 1;
  if (!(slow > 0 && fast >= slow)) {
    from.fail(`"beta_fast" is ${fast} and "beta_slow" ${slow}, expected beta_fast >= beta_slow > 0`);
  }
  const truncate = from.boolean("truncate", true);
  /** The channel pair that turns so many times over the original length. */
  const pairOf = (turns: number): number => (size * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
  const low = Math.max(truncate ? Math.floor(pairOf(fast)) : pairOf(fast), 0);
  let high = Math.min(truncate ? Math.ceil(pairOf(slow)) : pairOf(slow), size - 1);
  if (low === high) high += 0.001;
  const inverse = plain.map((x, i) => {
    const ramp = Math.min(1, Math.max(0, (i - low) / (high - low)));
    return (x / factor) * ramp + x * (1 - ramp);
  });
  const grown = (by: number): number => (factor <= 1 ? 1 : 0.1 * by * Math.log(factor) + 1);
  const mscale = from.number("mscale", 0);
  const all = from.number("mscale_all_dim", 0);
  const inferred = mscale && all ? grown(mscale) / grown(all) : grown(1);
  const scaling = from.has("attention_factor") ? from.positive("attention_factor") : inferred;
  return { inverse, scaling, softmaxScaling: all ? grown(all) ** 2 : 1 };
}

/** By wavelength: short ones stay, long ones are interpolated, a ramp in frequency lies between (Llama 3.1). */
function llama3(from: Reader, plain: Float64Array): Float64Array {
  const factor = from.factor();
  const low = from.positive("low_freq_factor");
  const high = from.positive("high_freq_factor");
  const original = from.whole("original_max_position_embeddings");
  if (high <= low) {
    from.fail(`"high_freq_factor" is ${high}, expected more than "low_freq_factor", which is ${low}`);
  }
  return plain.map((x) => {
    const turns = (original * x) / (2 * Math.PI);
    if (turns > high) return x;
    if (turns < low) return x / factor;
    const smooth = (turns - low) / (high - low);
    return ((1 - smooth) * x) / factor + smooth * x;
  });
}

/** A factor for each pair of channels, one set up to the original length and one beyond (2402.13753). */
function longrope(from: Reader, known: Known): Pick<Rotary, "at" | "changesAfter"> {
  const { plain, size, maxPositions, originalPositions } = known;
  const original = originalLength(from, known);
  const short = from.list("short_factor", size / 2);
  const long = from.list("long_factor", size / 2);
  const scalings = (): readonly [number, number] => {
    if (from.has("short_mscale") || from.has("long_mscale")) {
      return [from.positive("short_mscale"), from.positive("long_mscale")];
    }
    if (from.has("attention_factor")) {
      const scaling = from.positive("attention_factor");
      return [scaling, scaling];
    }
    const stated = originalPositions !== undefined || from.has("original_max_position_embeddings");
    const ratio = stated && maxPositions !== undefined ? maxPositions / original : undefined;
    const factor = from.number("factor", ratio);
    if (!(factor > 0)) from.fail(`"factor" is ${factor}, expected a number above 0`);
    if (ratio !== undefined && Math.abs(factor / ratio - 1) > 1e-6) {
      from.fail(
        `"factor" is ${factor}, but max_position_embeddings / original_max_position_embeddings is ${ratio}, ` +
          "and versions of the library disagree on which one decides; set attention_factor",
      );
    }
    const scaling = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original));
    return [scaling, scaling];
  };
  const [shortScaling, longScaling] = scalings();
  const within = { inverse: plain.map((x, i) => x / (short[i] as number)), scaling: shortScaling };
  const beyond = { inverse: plain.map((x, i) => x / (long[i] as number)), scaling: longScaling };
  return { changesAfter: original, at: (length) => (length > original ? beyond : within) };
}

/**
 * Cosines and sines `[positions, size / 2]`, scaling included, of the positions `past` to `past + positions - 1`: one pass
 * over so many new positions, of a sequence of `length` (default: as far as this pass goes). Throws ShapeError for counts that
 * are not whole numbers from 0.
 */
export function ropeTables(
  { at, size }: Pick<Rotary, "at" | "size">,
  {
    past = 0,
    positions,
    length = past + positions,
  }: { readonly past?: number; readonly positions: number; readonly length?: number },
): { readonly cos: Float64Array; readonly sin: Float64Array } {
  if (!(Number.isSafeInteger(past) && Number.isSafeInteger(positions) && past >= 0 && positions >= 0)) {
    throw new ShapeError(`ropeTables: past is ${past} and positions ${positions}, expected whole numbers from 0`);
  }
  const half = size / 2;
  const { inverse, scaling } = at(length);
  const cos = new Float64Array(positions * half);
  const sin = new Float64Array(positions * half);
  for (let i = 0; i < cos.length; i++) {
    const angle = (past + Math.floor(i / half)) * (inverse[i % half] as number);
    cos[i] = scaling * Math.cos(angle);
    sin[i] = scaling * Math.sin(angle);
  }
  return { cos, sin };
}
