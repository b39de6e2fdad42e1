// Random numbers without a state that advances: every draw is a function of the keys that lead to it (Philox 4x32-10, 10.1145/2063384.2063405),
// so that every backend sees the same numbers and a resumed run repeats them exactly.
import type { Engine } from "./engine.ts";
import type { Tensor } from "./tensor.ts";
import { sizeOf } from "./tensor.ts";

export interface Random {
  /** The generator for one place: step, pass, layer, name, ... The same keys give the same numbers. */
  at(...key: (string | number)[]): Random;
  /** In [0, 1), 24 bits. */
  uniform(shape: readonly number[]): Tensor;
  /** Mean 0, variance 1. */
  normal(shape: readonly number[]): Tensor;
  /** Mean 1. */
  exponential(shape: readonly number[]): Tensor;
  /** The same numbers on the host; `kind` names the distribution. */
  host(kind: "uniform" | "normal" | "exponential", count: number): Float64Array;
}

/** Draws are made on the host and uploaded to the engine. */
export function random(engine: Engine, seed: number): Random {
  return generator(engine, mix(0x5bd1e995, seed), mix(0x27d4eb2f, seed));
}

function generator(engine: Engine, k0: number, k1: number): Random {
  const host = (kind: "uniform" | "normal" | "exponential", count: number): Float64Array => draw(kind, count, k0, k1);
  const tensor = (kind: "uniform" | "normal" | "exponential") => (shape: readonly number[]) =>
    engine.tensor(host(kind, sizeOf(shape)), shape);
  return {
    at(...key) {
      let [a, b] = [k0, k1];
      for (const part of key) {
        const values = typeof part === "number" ? numberWords(part) : [...part].map((c) => c.codePointAt(0) ?? 0);
        // The type and length keep at("1"), at(1) and at("a", "b") apart from at("ab").
        for (const value of [typeof part === "number" ? 1 : 2, values.length, ...values]) {
          a = mix(a, value);
          b = mix(b, value ^ a);
        }
      }
      return generator(engine, a, b);
    },
    uniform: tensor("uniform"),
    normal: tensor("normal"),
    exponential: tensor("exponential"),
    host,
  };
}

const numberWords = (x: number): number[] => {
  if (Number.isInteger(x) && Math.abs(x) < 2 ** 31) return [x | 0];
  const words = new Uint32Array(new Float64Array([x]).buffer);
  return [...words];
};

/** One round of the murmur3 mixer over (state, value). */
function mix(state: number, value: number): number {
  let k = Math.imul(value, 0xcc9e2d51);
  k = Math.imul((k << 15) | (k >>> 17), 0x1b873593);
  let h = state ^ k;
  h = Math.imul((h << 13) | (h >>> 19), 5) + 0xe6546b64;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

function draw(kind: "uniform" | "normal" | "exponential", count: number, k0: number, k1: number): Float64Array {
  const out = new Float64Array(count);
  const words = new Uint32Array(4);
  // Normals use two words for one pair of numbers; the others one word each.
  for (let i = 0; i < count; i += 4) {
    philox(words, i / 4, k0, k1);
    if (kind === "normal") {
      for (let j = 0; j < 4 && i + j < count; j += 2) {
        const radius = Math.sqrt(-2 * Math.log(1 - unit(words[j] ?? 0)));
        const angle = 2 * Math.PI * unit(words[j + 1] ?? 0);
        out[i + j] = radius * Math.cos(angle);
        if (i + j + 1 < count) out[i + j + 1] = radius * Math.sin(angle);
      }
    } else {
      for (let j = 0; j < 4 && i + j < count; j++) {
        const u = unit(words[j] ?? 0);
        out[i + j] = kind === "uniform" ? u : -Math.log(1 - u);
      }
    }
  }
  return out;
}

const unit = (word: number): number => (word >>> 8) * 2 ** -24;

/** Four words of the stream with this key, at this index. Scalars throughout: this runs for every number drawn. */
export function philox(out: Uint32Array, index: number, key0: number, key1: number): void {
  let c0 = index >>> 0;
  let c1 = Math.floor(index / 2 ** 32);
  let c2 = 0;
  let c3 = 0;
  let k0 = key0;
  let k1 = key1;
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(c0, 0xd2511f53);
    const high1 = mulHigh(c2, 0xcd9e8d57);
    const low0 = Math.imul(c0, 0xd2511f53);
    const low1 = Math.imul(c2, 0xcd9e8d57);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) | 0;
    k1 = (k1 + 0xbb67ae85) | 0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/** The upper 32 bits of the 64-bit product of two unsigned 32-bit integers, from four products of 16 bits that fit an integer. */
function mulHigh(a: number, b: number): number {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const low = Math.imul(a0, b0) >>> 16;
  const middle = Math.imul(a1, b0);
  const cross = Math.imul(a0, b1);
  const carry = low + (middle & 0xffff) + (cross & 0xffff);
  return (Math.imul(a1, b1) + (middle >>> 16) + (cross >>> 16) + (carry >>> 16)) | 0;
}
