// From logits to one token: the most likely one, or a draw after temperature and cuts. On the host in float64, so that a seed gives the
// same text on every backend whose logits agree.
import { ShapeError } from "@switchyard/core";
import { logSumExp } from "./distributions.ts";
import type { DecodedToken, TokenProbability } from "./strategy.ts";

/** In the order in which they apply. */
export interface SamplingOptions {
  /**
   * Divides positive logits of tokens that the prompt or the text has, and multiplies negative ones (1909.05858, section 4.1); above 0, default 1:
   * no penalty.
   */
  readonly repetitionPenalty?: number;
  /** 0 always takes the most likely token; default 1. */
  readonly temperature?: number;
  /** Samples among the k most likely tokens only. */
  readonly topK?: number;
  /** Samples among the most likely tokens whose probabilities reach this sum (1904.09751). */
  readonly topP?: number;
  /** Samples among tokens with at least this share of the largest probability (2407.01082). */
  readonly minP?: number;
}

/** One token from logits `[vocabulary]`; -Infinity is never taken. `sequence`: prompt and text so far; `uniform` in [0, 1) is drawn where needed. */
export type Pick = (logits: Float64Array, sequence: readonly number[], uniform: () => number) => number;

/**
 * Chooses by inverting the cumulative distribution over ids sorted by probability (ties: lower id first).
 * Throws ShapeError for options out of range.
 */
export function picker(name: string, options: SamplingOptions): Pick {
  const { repetitionPenalty = 1, temperature = 1, topK, topP, minP } = options;
  const check = (ok: boolean, option: keyof SamplingOptions, expected: string): void => {
    if (!ok) throw new ShapeError(`${name}: ${option} is ${options[option]}, expected ${expected}`);
  };
  check(repetitionPenalty > 0 && Number.isFinite(repetitionPenalty), "repetitionPenalty", "a number above 0");
  check(temperature >= 0 && Number.isFinite(temperature), "temperature", "0 or more");
  check(topK === undefined || (Number.isInteger(topK) && topK > 0), "topK", "a whole number from 1");
  check(topP === undefined || (topP > 0 && topP <= 1), "topP", "a number above 0, up to 1");
  check(minP === undefined || (minP >= 0 && minP <= 1), "minP", "a share of the largest probability, 0 to 1");
  return (given, sequence, uniform) => {
    const logits = repetitionPenalty === 1 ? given : penalised(given, sequence, repetitionPenalty);
    if (temperature === 0) return argmax(logits);
    const order = descending(logits);
    const top = logits[argmax(logits)] as number;
    const weightOf = (id: number): number => Math.exp(((logits[id] as number) - top) / temperature);
    const among: number[] = [];
    const weights: number[] = [];
    /** The next in falling order joins, if there is one that has any probability. */
    const take = (): number => {
      const { value: id } = order.next();
      const weight = id === undefined ? 0 : weightOf(id);
      if (id === undefined || weight === 0) return 0;
      among.push(id);
      weights.push(weight);
      return weight;
    };
    let total = 0;
    if (topK === undefined) {
      for (let id = 0; id < logits.length; id++) total += weightOf(id);
    } else {
      while (among.length < topK) {
        const weight = take();
        if (weight === 0) break;
        total += weight;
      }
    }
    if (topP !== undefined) {
      let reached = 0;
      let count = 0;
      while (reached < topP * total) {
        const weight = weights[count] ?? take();
        if (weight === 0) break;
        reached += weight;
        count++;
      }
      among.length = weights.length = count;
      total = reached;
    }
    if (minP !== undefined) {
      // The largest weight is 1.
      let count = 0;
      let sum = 0;
      for (;;) {
        const weight = weights[count] ?? (topK === undefined && topP === undefined ? take() : 0);
        if (weight === 0 || weight < minP) break;
        sum += weight;
        count++;
      }
      among.length = weights.length = count;
      total = sum;
    }
    let left = uniform() * total;
    const cut = topK !== undefined || topP !== undefined || minP !== undefined;
    for (let i = 0; ; i++) {
      const weight = weights[i] ?? (cut ? 0 : take());
      // Rounding may leave a rest after the last one.
      if (weight === 0) return among.at(-1) as number;
      left -= weight;
      if (left < 0) return among[i] as number;
    }
  };
}

/** Ids of tokens so far made less likely, as Hugging Face does; a copy. */
export function penalised(logits: Float64Array, sequence: readonly number[], penalty: number): Float64Array {
  const changed = logits.slice();
  for (const id of new Set(sequence)) {
    const z = changed[id];
    if (z !== undefined) changed[id] = z < 0 ? z * penalty : z / penalty;
  }
  return changed;
}

/** The id of the largest, of equal ones the lowest. */
export function argmax(values: Float64Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if ((values[i] as number) > (values[best] as number)) best = i;
  return best;
}

/** Ids from the largest value to the smallest, of equal ones the lower first; each costs little until it is asked for. */
export function* descending(values: Float64Array): Generator<number, undefined> {
  let size = values.length;
  const heap = new Int32Array(size);
  for (let i = 0; i < size; i++) heap[i] = i;
  const before = (a: number, b: number): boolean => {
    const [x, y] = [values[a] as number, values[b] as number];
    return x > y || (x === y && a < b);
  };
  const sink = (start: number): void => {
    const id = heap[start] as number;
    let i = start;
    for (let child = 2 * i + 1; child < size; child = 2 * i + 1) {
      if (child + 1 < size && before(heap[child + 1] as number, heap[child] as number)) child++;
      if (!before(heap[child] as number, id)) break;
      heap[i] = heap[child] as number;
      i = child;
    }
    heap[i] = id;
  };
  for (let i = (size >> 1) - 1; i >= 0; i--) sink(i);
  while (size > 0) {
    yield heap[0] as number;
    size--;
    if (size === 0) return undefined;
    heap[0] = heap[size] as number;
    sink(0);
  }
  return undefined;
}

/** A token with its probability, and `count` of the most likely ones, from logits `[vocabulary]`; `logSum`: of their exponentials. */
export function decoded(
  logits: Float64Array,
  id: number,
  { count, logSum = logSumExp("generate", logits) }: { readonly count: number; readonly logSum?: number },
): DecodedToken {
  const one = (at: number): TokenProbability => ({ id: at, logProbability: (logits[at] as number) - logSum });
  if (count === 0) return one(id);
  const top: TokenProbability[] = [];
  for (const best of descending(logits)) {
    if (top.length === count) break;
    top.push(one(best));
  }
  return { ...one(id), top };
}
