// What the decoding functions share: distributions over the vocabulary on the host, in float64. Private.
import { ShapeError } from "@switchyard/core";

/** Natural logarithms of the probabilities that logits stand for; -Infinity stays. Throws ShapeError for NaN, Infinity, or nothing else than -Infinity. */
export function logProbabilities(name: string, logits: ArrayLike<number>): Float64Array {
  const values = new Float64Array(logits);
  const logSum = logSumExp(name, values);
  return values.map((z) => z - logSum);
}

/** ln Σ exp z. Throws ShapeError as above. */
export function logSumExp(name: string, logits: Float64Array): number {
  const top = highest(name, logits);
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp((logits[i] as number) - top);
  return top + Math.log(sum);
}

/** The largest of some logits. Throws ShapeError as above. */
export function highest(name: string, logits: Float64Array): number {
  let top = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) top = Math.max(top, logits[i] as number);
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
