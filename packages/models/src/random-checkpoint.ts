// Checkpoints of random weights in the Hugging Face layout, of any architecture and any size: for tests, for measuring, and for
// trying a configuration before there are weights. Nothing in them is trained.
import { CheckpointError, type Json } from "@switchyard/core";
import { ConfigReader } from "./config-reader.ts";
import { fromFloat32 } from "./narrow.ts";
import { maximumTensors, quote, type TensorSource } from "./safetensors.ts";
import { type SaveCheckpointOptions, type SavedCheckpoint, saveCheckpoint } from "./save-checkpoint.ts";
import { type CheckpointIndex, type Description, piecesOf } from "./source.ts";
import { quantizationOf } from "./stored/quantization-config.ts";

export interface RandomCheckpointOptions extends SaveCheckpointOptions {
  /** Default 0. A tensor depends on the seed, its name and its size only. */
  readonly seed?: number;
  /** How floats are stored; default BF16. Scales of fp8 weights and what corrects routing scores are F32, as on the Hub. */
  readonly dtype?: "F32" | "BF16" | "F16";
  /** Standard deviation of all weights; default 0.02. Those of norms are 1 plus such a number. */
  readonly scale?: number;
}

/** An architecture, as far as this file needs it. */
export interface DescribesCheckpoints {
  readonly modelTypes: readonly string[];
  describe(checkpoint: CheckpointIndex): Description;
}

// ---------------------------------------------------------------------------------------------------- numbers

/** Value of the standard normal distribution below which the share p of it lies (Abramowitz and Stegun 26.2.23, to 5e-4). */
function quantile(p: number): number {
  const t = Math.sqrt(-2 * Math.log(Math.min(p, 1 - p)));
  const top = 2.515517 + t * (0.802853 + t * 0.010328);
  const x = t - top / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
  return p < 0.5 ? -x : x;
}
const quantiles = (count: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => quantile((i + 0.5) / count));

/** Fills 32-bit words from a seed and a name (sfc32 of PractRand, started from an FNV-1a hash). */
function fill(words: Uint32Array, seed: number, name: string): void {
  let hash = 0x811c9dc5;
  for (const c of name) hash = Math.imul(hash ^ (c.codePointAt(0) ?? 0), 0x01000193);
  let [a, b, c, counter] = [hash, seed | 0, Math.floor(seed / 2 ** 32) | 0, 1];
  const next = (): number => {
    const t = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + t) | 0;
    return t;
  };
  for (let i = 0; i < 16; i++) next();
  for (let i = 0; i < words.length; i++) words[i] = next();
}

/** `count` entries of a table of 65,536, chosen at random: two for each random word. */
function drawn<T extends Uint8Array | Uint16Array | Float32Array>(table: T, out: T, seed: number, name: string): T {
  const words = new Uint32Array(Math.min(1 << 16, Math.ceil(out.length / 2)));
  const step = 2 * words.length;
  for (let from = 0, part = 0; from < out.length; from += step, part++) {
    fill(words, seed, `${name}/${part}`);
    const halves = new Uint16Array(words.buffer);
    const end = Math.min(step, out.length - from);
    for (let i = 0; i < end; i++) out[from + i] = table[halves[i] as number] as number;
  }
  return out;
}

const bytesOf = (x: Uint8Array | Uint16Array | Float32Array): Uint8Array =>
  new Uint8Array(x.buffer, x.byteOffset, x.byteLength);

/** The nearest of a format's non-negative values, by bits; `sign` is added for negative numbers. */
const nearest =
  (values: readonly number[], sign: number) =>
  (x: number): number => {
    let best = 0;
    for (const [code, value] of values.entries()) {
      if (Math.abs(Math.abs(x) - value) < Math.abs(Math.abs(x) - (values[best] as number))) best = code;
    }
    return x < 0 ? best + sign : best;
  };

/** E4M3 without its NaN, and E2M1 (OCP 8-bit Floating Point 1.0 and Microscaling Formats 1.0). */
const e4m3 = nearest(
  Array.from({ length: 127 }, (_, code) => {
    const [exponent, fraction] = [code >> 3, code & 7];
    return exponent === 0 ? fraction * 2 ** -9 : (8 + fraction) * 2 ** (exponent - 10);
  }),
  128,
);
const e2m1 = nearest([0, 0.5, 1, 1.5, 2, 3, 4, 6], 8);

/** N(0, 1) times these is what codes hold: the largest numbers come near the largest codes. */
const fp8Spread = 64;
const mxfp4Spread = 1.5;
const intSpread = { 4: 2.4, 8: 32 } as const;

/** Bytes of two codes of four bits each, for every pair of 256 quantiles. */
function pairs(code: (x: number) => number): Uint8Array {
  const codes = Uint8Array.from(quantiles(256), code);
  return Uint8Array.from({ length: 65_536 }, (_, i) => (codes[i & 255] as number) | ((codes[i >> 8] as number) << 4));
}

/** Tables made when they are first needed. */
function tables(scale: number, seed: number) {
  const made = new Map<string, Uint8Array | Uint16Array | Float32Array>();
  const table = <T extends Uint8Array | Uint16Array | Float32Array>(key: string, make: () => T): T => {
    const found = made.get(key) ?? make();
    made.set(key, found);
    return found as T;
  };
  const size = 65_536;
  return {
    /** N(mean, scale). */
    floats(name: string, dtype: string, count: number, mean: number): Uint8Array {
      const values = (): Float32Array => quantiles(size).map((x) => mean + scale * x);
      if (dtype === "F32") {
        return bytesOf(drawn(table(`F32 ${mean}`, values), new Float32Array(count), seed, name));
      }
      const stored = table(`${dtype} ${mean}`, () => new Uint16Array(fromFloat32(values(), dtype).buffer));
      return bytesOf(drawn(stored, new Uint16Array(count), seed, name));
    },
    /** E4M3 codes of N(0, fp8Spread). */
    fp8: (name: string, count: number): Uint8Array =>
      drawn(
        table("fp8", () => Uint8Array.from(quantiles(size), (x) => e4m3(fp8Spread * x))),
        new Uint8Array(count),
        seed,
        name,
      ),
    /** Scales that make N(0, scale) of codes of N(0, spread), each between half and three halves of that. */
    scales(
      name: string,
      { count, dtype, spread }: { readonly count: number; readonly dtype: string; readonly spread: number },
    ): Uint8Array {
      const values = (): Float32Array =>
        Float32Array.from({ length: size }, (_, i) => (scale / spread) * (0.5 + i / size));
      if (dtype === "F32")
        return bytesOf(drawn(table(`scales ${spread}`, values), new Float32Array(count), seed, name));
      const stored = table(`scales ${spread} ${dtype}`, () => new Uint16Array(fromFloat32(values(), dtype).buffer));
      return bytesOf(drawn(stored, new Uint16Array(count), seed, name));
    },
    /** Ints of N(0, intSpread) as compressed-tensors packs them: plus half their range, the first in the lowest bits. */
    packed(name: string, bytes: number, bits: 4 | 8): Uint8Array {
      const half = 2 ** (bits - 1);
      const code = (x: number): number => Math.max(0, Math.min(2 * half - 1, Math.round(intSpread[bits] * x) + half));
      const wide = (): Uint8Array => Uint8Array.from(quantiles(size), code);
      return drawn(table(`ints ${bits}`, bits === 8 ? wide : () => pairs(code)), new Uint8Array(bytes), seed, name);
    },
    /** Pairs of E2M1 codes of N(0, mxfp4Spread). */
    mxfp4(name: string, bytes: number): Uint8Array {
      const made = table("mxfp4", () => pairs((x) => e2m1(mxfp4Spread * x)));
      return drawn(made, new Uint8Array(bytes), seed, name);
    },
    /** Exponents beside the one that makes N(0, scale) of the codes, or that one. */
    mxfp4Scales(name: string, count: number): Uint8Array {
      const middle = Math.round(Math.log2(scale / mxfp4Spread)) + 127;
      const near = table("mxfp4 scales", () => Uint8Array.from({ length: size }, (_, i) => middle - 1 + (i % 3)));
      return drawn(near, new Uint8Array(count), seed, name);
    },
  };
}

// ---------------------------------------------------------------------------------------------------- tensors

/** A tensor that holds pieces: its shape when stored as floats, and the parameters that it serves. */
interface Whole {
  readonly name: string;
  readonly shape: readonly number[];
  /** Matrices stored as [in, out] behind the axis of experts. */
  readonly transposed: boolean;
  /** Whether the first axis counts experts. */
  readonly stacked: boolean;
  readonly path: string;
}

/** The stored tensors a description calls for, in its order. Throws CheckpointError where two pieces disagree about one. */
function storedTensors({ sources }: Description): Whole[] {
  const found = new Map<string, Whole>();
  for (const [path, source] of sources) {
    for (const { name, shape, of, rows, transposed = false } of piecesOf(source)) {
      const [lines = 1, ...rest] = rows ? [rows.total, ...shape.slice(1)] : shape;
      const plain = transposed ? [...rest, lines] : shape.length === 0 ? [] : [lines, ...rest];
      const whole = {
        name,
        shape: of === undefined ? plain : [of, ...plain],
        transposed,
        stacked: of !== undefined,
        path,
      };
      const before = found.get(name);
      if (before && before.shape.join() !== whole.shape.join()) {
        throw new CheckpointError(
          `${quote(name)} is [${before.shape}] for ${before.path}, but [${whole.shape}] for ${path}: the description is wrong`,
        );
      }
      if (!before) found.set(name, whole);
    }
  }
  return [...found.values()];
}

/** Kept in floats by every quantised checkpoint: what is looked up or small, and what decides. */
const neverQuantized = /(^|\.)(embed|head|router|gate|bias|buffers|sinks|\w*norm)(\.|$)|Norm$|Bias$/;
const isNorm = /(^|\.)norm$|Norm$/;
const isBuffer = /\.buffers\./;

const product = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
const blocks = (n: number, block: number): number => Math.ceil(n / block);

/** How matrices are stored; groups and blocks may be larger than a matrix. */
type How =
  | { readonly kind: "floats" | "mxfp4" }
  | { readonly kind: "fp8"; readonly rows: number; readonly group: number }
  | { readonly kind: "packed"; readonly bits: 4 | 8; readonly group: number };

/** What config.json says about that. Throws CheckpointError for ways this file does not write. */
function quantization(config: { readonly [key: string]: Json }): How {
  const { method, format, schemes } = quantizationOf(config);
  const [scheme, ...more] = schemes;
  if (method === "none") return { kind: "floats" };
  if (method === "mxfp4") return { kind: "mxfp4" };
  if (method === "fp8" && scheme && Number.isFinite(scheme.rows + scheme.group)) {
    return { kind: "fp8", rows: scheme.rows, group: scheme.group };
  }
  if (method === "compressed-tensors" && format === "pack-quantized" && scheme && more.length === 0) {
    const { type, bits, symmetric, rows, group } = scheme;
    if (type === "int" && symmetric && rows === 1 && (bits === 4 || bits === 8)) return { kind: "packed", bits, group };
  }
  throw new CheckpointError(
    `randomCheckpoint: quantization_config says quant_method ${quote(method)}${format === undefined ? "" : `, format ${quote(format)}`}; ` +
      "random weights are written as floats (no quantization_config), fp8 in blocks, mxfp4, and symmetric pack-quantized ints of " +
      "4 or 8 bits of compressed-tensors",
  );
}

/**
 * The tensors of a random checkpoint, each made when its bytes are asked for. `description` is what an architecture makes of
 * `config`; where config.json has a quantization_config (fp8 in blocks, mxfp4, pack-quantized ints of compressed-tensors), matrices
 * are stored that way.
 * Throws CheckpointError for another kind of quantisation.
 */
export function randomTensors(
  config: { readonly [key: string]: Json },
  description: Description,
  { seed = 0, dtype = "BF16", scale = 0.02 }: Pick<RandomCheckpointOptions, "seed" | "dtype" | "scale"> = {},
): TensorSource[] {
  if (!Number.isSafeInteger(seed))
    throw new CheckpointError(`randomCheckpoint: seed is ${seed}, expected a whole number`);
  if (!(scale > 0 && Number.isFinite(scale))) {
    throw new CheckpointError(`randomCheckpoint: scale is ${scale}, expected a number above 0`);
  }
  const how = quantization(config);
  const random = tables(scale, seed);
  return storedTensors(description).flatMap(({ name, shape, transposed, stacked, path }): TensorSource[] => {
    const matrix = shape.length === (stacked ? 3 : 2) && !neverQuantized.test(path);
    if (how.kind === "fp8" && matrix && !stacked) {
      const scales = [blocks(shape[0] ?? 0, how.rows), blocks(shape[1] ?? 0, how.group)];
      return [
        { name, dtype: "F8_E4M3", shape, bytes: () => random.fp8(name, product(shape)) },
        {
          name: `${name}_scale_inv`,
          dtype: "F32",
          shape: scales,
          bytes: () => random.scales(`${name}_scale_inv`, { count: product(scales), dtype: "F32", spread: fp8Spread }),
        },
      ];
    }
    if (how.kind === "packed" && matrix && !stacked) {
      const [out = 0, inner = 0] = shape;
      const { bits, group } = how;
      if (group < inner && inner % group !== 0) {
        throw new CheckpointError(
          `randomCheckpoint: ${quote(name)} has rows of ${inner} numbers, which groups of ${group} do not divide`,
        );
      }
      const words = [out, Math.ceil(inner / (32 / bits))];
      const scales = [out, blocks(inner, Math.min(group, inner))];
      const spread = intSpread[bits];
      return [
        {
          name: `${name}_packed`,
          dtype: "I32",
          shape: words,
          bytes: () => random.packed(`${name}_packed`, 4 * product(words), bits),
        },
        {
          name: `${name}_scale`,
          dtype,
          shape: scales,
          bytes: () => random.scales(`${name}_scale`, { count: product(scales), dtype, spread }),
        },
        {
          name: `${name}_shape`,
          dtype: "I64",
          shape: [2],
          bytes: () => new Uint8Array(BigInt64Array.of(BigInt(out), BigInt(inner)).buffer),
        },
      ];
    }
    if (how.kind === "mxfp4" && matrix && stacked) {
      const [experts = 0, first = 0, second = 0] = shape;
      const [out, inner] = transposed ? [second, first] : [first, second];
      if (inner % 32 !== 0) {
        throw new CheckpointError(
          `randomCheckpoint: ${quote(name)} has rows of ${inner} numbers; mxfp4 needs a multiple of 32`,
        );
      }
      const groups = [experts, out, inner / 32];
      return [
        {
          name: `${name}_blocks`,
          dtype: "U8",
          shape: [...groups, 16],
          bytes: () => random.mxfp4(`${name}_blocks`, 16 * product(groups)),
        },
        {
          name: `${name}_scales`,
          dtype: "U8",
          shape: groups,
          bytes: () => random.mxfp4Scales(`${name}_scales`, product(groups)),
        },
      ];
    }
    const own = isBuffer.test(path) ? "F32" : dtype;
    const mean = isNorm.test(path) ? 1 : 0;
    return [{ name, dtype: own, shape, bytes: () => random.floats(name, own, product(shape), mean) }];
  });
}

/**
 * Writes a checkpoint of random weights into a folder: config.json as given, one file of weights or several with their index.
 * Only one tensor is in memory at a time, and the folder holds all or nothing. The same options give the same bytes
 * everywhere. The model works in numbers of ordinary size, and what it says means nothing.
 * Throws CheckpointError where the architecture refuses the configuration or the folder cannot be written.
 *
 * @example
 * await randomCheckpoint("random", { config: JSON.parse(await readFile("config.json", "utf8")), architecture: olmoe });
 */
export async function randomCheckpoint(
  folder: string,
  model: { readonly config: { readonly [key: string]: Json }; readonly architecture: DescribesCheckpoints },
  options: RandomCheckpointOptions = {},
): Promise<SavedCheckpoint> {
  const { config, architecture } = model;
  const type = new ConfigReader(config).string("model_type");
  if (!architecture.modelTypes.includes(type)) {
    throw new CheckpointError(
      `randomCheckpoint: model_type is ${quote(type)}, the architecture is for ${architecture.modelTypes.join(", ")}`,
    );
  }
  const description = architecture.describe({
    config,
    // Architectures refuse counts of layers or experts beyond the number of tensors: as many as a file may have, nameless.
    names: Array<string>(maximumTensors).fill(""),
    stored(name) {
      throw new CheckpointError(`a checkpoint of random weights has no tensor ${quote(name)} yet`);
    },
  });
  return saveCheckpoint(folder, { config, tensors: randomTensors(config, description, options) }, options);
}
