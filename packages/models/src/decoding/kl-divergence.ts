// Kullback-Leibler divergence between what two passes say next: how far a rank-k routing is from the trained one (2405.14507, section 2.2).
import { divergence, logProbabilities, sameLength } from "./distributions.ts";

/**
 * KL(p || q) in nats from the logits of both, `[vocabulary]`: Σ p (ln p - ln q), Infinity where q excludes what p does not.
 * Throws ShapeError for lengths that differ and logits that are no numbers.
 */
export function klDivergence(p: ArrayLike<number>, q: ArrayLike<number>): number {
  sameLength("klDivergence", p, q);
  // What is 0 in theory may be a rounding error below it.
  return Math.max(divergence(logProbabilities("klDivergence", p), logProbabilities("klDivergence", q)), 0);
}
