// How often a weak routing uses experts that the strong one left alone (2405.14507, section 2.1).
import { ShapeError } from "@switchyard/core";

/**
 * Share of the weak choices that are not among the strong choices of the same token and layer, 0..1. Both are ids `[tokens, slots]` as
 * `plan.experts` holds them, flat, with as many slots as each has; several layers may follow each other as further tokens. -1 is an empty
 * slot, and counts nothing; without any weak choice the share is 0. Throws ShapeError where the lengths are not whole tokens.
 */
export function unchosenRatio(strong: ArrayLike<number>, weak: ArrayLike<number>, tokens: number): number {
  const slots = (name: string, ids: ArrayLike<number>): number => {
    const each = ids.length / Math.max(tokens, 1);
    if (Number.isInteger(tokens) && tokens >= 0 && Number.isInteger(each) && each * tokens === ids.length) return each;
    throw new ShapeError(
      `unchosenRatio: ${ids.length} ${name} ids of ${tokens} tokens; expected as many of each token`,
    );
  };
  const [wide, narrow] = [slots("strong", strong), slots("weak", weak)];
  let [unchosen, all] = [0, 0];
  for (let token = 0; token < tokens; token++) {
    const chosen = new Set<number>();
    for (let j = 0; j < wide; j++) chosen.add(strong[token * wide + j] ?? -1);
    for (let j = 0; j < narrow; j++) {
      const id = weak[token * narrow + j] ?? -1;
      if (id < 0) continue;
      all++;
      if (!chosen.has(id)) unchosen++;
    }
  }
  return all === 0 ? 0 : unchosen / all;
}
