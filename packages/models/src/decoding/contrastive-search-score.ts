// The score of one candidate in contrastive search (2202.06417, eq. 5): probable, and unlike what stands there already.
//   (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)
import { ShapeError } from "@switchyard/core";

export interface ContrastiveSearchCandidate {
  /** What the model gives the candidate, 0..1. */
  readonly probability: number;
  /** Its hidden state, `[width]`. */
  readonly hidden: ArrayLike<number>;
}

/**
 * Higher is better; `earlier` are the hidden states of the tokens before, `[width]` each (none: no penalty). `alpha` 0..1, default
 * 0.6; at 0 it is the probability. A vector of zeros is like nothing. Throws ShapeError for sizes that differ and numbers out of range.
 */
export function contrastiveSearchScore(
  { probability, hidden }: ContrastiveSearchCandidate,
  earlier: readonly ArrayLike<number>[],
  alpha = 0.6,
): number {
  for (const [name, value] of Object.entries({ alpha, probability })) {
    if (!(value >= 0 && value <= 1))
      throw new ShapeError(`contrastiveSearchScore: ${name} is ${value}; expected 0 to 1`);
  }
  const penalty = earlier.reduce(
    (most, state) => Math.max(most, cosine(hidden, state)),
    earlier.length === 0 ? 0 : Number.NEGATIVE_INFINITY,
  );
  return (1 - alpha) * probability - alpha * penalty;
}

function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) {
    throw new ShapeError(
      `contrastiveSearchScore: hidden states of ${a.length} and ${b.length} numbers; expected one width`,
    );
  }
  let [dot, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i] ?? Number.NaN, b[i] ?? Number.NaN];
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  const norms = Math.sqrt(aa) * Math.sqrt(bb);
  return norms === 0 ? 0 : dot / norms;
}
