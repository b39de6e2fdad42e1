// Jensen-Shannon divergence: by it DoLa (2309.03883, section 2.2) chooses the early layer that differs most from the last one.
import { divergence, logProbabilities, sameLength } from "./distributions.ts";

/**
 * ½ KL(p || m) + ½ KL(q || m) in nats, m = (p + q) / 2, from the logits of both, `[vocabulary]`: 0 where they are alike, ln 2 at most.
 * Throws ShapeError for lengths that differ and logits that are no numbers.
 */
export function jensenShannon(p: ArrayLike<number>, q: ArrayLike<number>): number {
  sameLength("jensenShannon", p, q);
  const [a, b] = [logProbabilities("jensenShannon", p), logProbabilities("jensenShannon", q)];
  const middle = a.map((x, i) => {
    const y = b[i] ?? Number.NaN;
    const top = Math.max(x, y);
    return top === Number.NEGATIVE_INFINITY ? top : top + Math.log((Math.exp(x - top) + Math.exp(y - top)) / 2);
  });
  return Math.max((divergence(a, middle) + divergence(b, middle)) / 2, 0);
}
