// What the decoding functions share: distributions over the vocabulary on the host, in float64. Private.
import { ShapeError } from "@switchyard/core";

/** Natural logarithms of the probabilities that logits stand for; -Infinity stays. Throws ShapeError for NaN, Infinity, or nothing else than -Infinity. */
export function logProbabilities(name: string, logits: ArrayLike<number>): Float64Array {
  const values = Float64Array.from(logits);
  const top = highest(name, values);
  const logSum = top + Math.log(values.reduce((sum, z) => sum + Math.exp(z - top), 0));
  return values.map((z) => z - logSum);
}

/** The largest of some logits. Throws ShapeError as above. */
export function highest(name: string, logits: Float64Array): number {
  const top = logits.reduce((most, z) => Math.max(most, z), Number.NEGATIVE_INFINITY);
  if (Number.isFinite(top)) return top;
  throw new ShapeError(
    `${name}: the largest logit of ${logits.length} is ${top}; expected numbers, or -Infinity for what is masked`,
  );
}

/** Throws ShapeError unless both are over the same vocabulary. */
export function sameLength(name: string, a: ArrayLike<number>, b: ArrayLike<number>): void {
  if (a.length !== b.length) {
    throw new ShapeError(`${name}: ${a.length} and ${b.length} logits; both must be over the same vocabulary`);
  }
}

/** Σ p (ln p - ln q) in nats from logarithms; what p excludes counts nothing. */
export function divergence(logP: Float64Array, logQ: Float64Array): number {
  return logP.reduce(
    (sum, p, i) => (p === Number.NEGATIVE_INFINITY ? sum : sum + Math.exp(p) * (p - (logQ[i] ?? Number.NaN))),
    0,
  );
}
