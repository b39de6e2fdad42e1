// Fixed tables that send token ids to experts, made on the host once: a 32-bit hash that is the same everywhere, and what
// Hash Layers (2106.04426) and MaskMoE (2407.09816) build with it; and the ids that they look up in it.
import { reshape, ShapeError, type Tensor, UnsupportedError } from "@switchyard/core";
import type { RouterInput } from "@switchyard/core/moe";

/** The token ids of an input, i32 `[tokens]`. Throws UnsupportedError where there are none, ShapeError for another number. */
export function tokenIdsOf(router: string, { tokenIds, hidden }: RouterInput): Tensor {
  if (tokenIds === undefined) {
    throw new UnsupportedError(`${router}: the input has no token ids; hand them over as input.tokenIds, i32 [tokens]`);
  }
  const [tokens = 0] = hidden.shape;
  if (tokenIds.size !== tokens) {
    throw new ShapeError(
      `${router}: token ids are [${tokenIds.shape.join(", ")}], expected one for each of ${tokens} tokens`,
    );
  }
  return reshape(tokenIds, [tokens]);
}

/** Mixes a whole number of 32 bits into another (splitmix32 with the constants of murmur3), 0..2³² - 1. */
export function mix32(x: number): number {
  let z = (x + 0x9e3779b9) >>> 0;
  z = Math.imul(z ^ (z >>> 16), 0x85ebca6b) >>> 0;
  z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35) >>> 0;
  return (z ^ (z >>> 16)) >>> 0;
}

export interface HashKey {
  readonly seed: number;
  readonly layer: number;
}

/** The hash of a token and a number (0, or an expert from 1) in one layer, 0..2³² - 1. */
export function hashKey(token: number, number: number, { seed, layer }: HashKey): number {
  const keys = seed ^ Math.imul(token, 0x9e3779b1) ^ Math.imul(layer, 0x85ebca6b) ^ Math.imul(number, 0xc2b2ae35);
  return mix32(keys >>> 0);
}

/** An expert for each token id 0..vocabulary - 1: the hash modulo `experts`. */
export function randomHash(vocabulary: number, experts: number, key: HashKey): Int32Array {
  return Int32Array.from({ length: vocabulary }, (_, token) => hashKey(token, 0, key) % experts);
}

/**
 * An expert for each token id of `counts`, its number of occurrences: the most frequent first, ties by the lower id, each
 * to the expert with the least occurrences so far (2106.04426, section 3.2), ties by the lower expert.
 */
export function balancedHash(counts: ArrayLike<number>, experts: number): Int32Array {
  const load = new Float64Array(experts);
  const table = new Int32Array(counts.length);
  for (const token of byCount(counts)) {
    const expert = load.indexOf(Math.min(...load));
    table[token] = expert;
    load[expert] = (load[expert] ?? 0) + (counts[token] ?? 0);
  }
  return table;
}

/**
 * 1 for the frequent token ids, else 0: in falling order of their count, ties by the lower id, those before which less
 * than `mass` (0..1) of all occurrences has passed.
 */
export function frequentTokens(counts: ArrayLike<number>, mass: number): Int32Array {
  const total = Array.from(counts).reduce((sum, count) => sum + count, 0);
  const frequent = new Int32Array(counts.length);
  let before = 0;
  for (const token of byCount(counts)) {
    if (before >= mass * total) break;
    frequent[token] = 1;
    before += counts[token] ?? 0;
  }
  return frequent;
}

/** The `visible` experts of the smallest hashes of a token, ties by the lower expert, in ascending order. */
export function visibleExperts(
  token: number,
  { experts, visible, ...key }: HashKey & { readonly experts: number; readonly visible: number },
): number[] {
  const keys = Array.from({ length: experts }, (_, e) => hashKey(token, e + 1, key));
  return keys
    .map((_, e) => e)
    .sort((a, b) => (keys[a] ?? 0) - (keys[b] ?? 0) || a - b)
    .slice(0, visible)
    .sort((a, b) => a - b);
}

/** Token ids in falling order of their count, ties by the lower id. Throws ShapeError for a count that is no number from 0. */
function byCount(counts: ArrayLike<number>): number[] {
  const list = Array.from(counts);
  const wrong = list.findIndex((count) => !(count >= 0) || !Number.isFinite(count));
  if (wrong >= 0) {
    throw new ShapeError(`token counts: id ${wrong} occurs ${list[wrong]} times; expected a finite number from 0`);
  }
  return list.map((_, token) => token).sort((a, b) => (list[b] ?? 0) - (list[a] ?? 0) || a - b);
}
