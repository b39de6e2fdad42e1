// BASE layers (2103.16716): in training tokens are assigned to experts so that each gets equally many and the sum of their
// scores is largest; nothing else balances them.
//   a_te = x_t · w_e, w_e the expert's embedding (centroid)                       section 3.1
//   training: max Σ_t a_t,e(t), each expert with T / E tokens; evaluation: e(t) = argmax_e a_te
//   y_t = x_t + sigmoid(a_t,e(t)) f_e(t)(x_t); the block adds x_t                eq. 1
import {
  gatherLast,
  hostConstant,
  linear,
  reshape,
  ShapeError,
  sigmoid,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { auctionAssignment, exactAssignment } from "./assignment-parts.ts";
import { leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface BaseOptions {
  /** Tokens up to which the assignment is exact, by shortest augmenting paths; above, an auction. Default 512. */
  readonly exactUpTo?: number;
  /**
   * Of the auction: how far below the best the mean score of a token may end, as a share of the range of all scores;
   * default 0.0001. Smaller takes longer.
   */
  readonly precision?: number;
}

/**
 * One expert per token. In training every expert gets floor(T / E) or ceil(T / E) of the T real tokens of the batch, found
 * on the host: the engine must be able to block. Params: `weight [experts, width]`, the centroids. No loss. The
 * assignment carries no gradient, the gate does.
 *
 * @example base()
 */
export function base({ exactUpTo = 512, precision = 1e-4 }: BaseOptions = {}): RouterPlugin {
  if (!Number.isInteger(exactUpTo) || exactUpTo < 0) {
    throw new ShapeError(`base: exactUpTo = ${exactUpTo}; expected a whole number of tokens from 0`);
  }
  if (!(precision > 0 && precision <= 1)) {
    throw new ShapeError(`base: precision = ${precision}; expected a share above 0, up to 1`);
  }

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const experts = input.training ? assigned(logits, mask, { exactUpTo, precision }) : topkIndices(logits, 1); // [tokens, 1]
    const plan = { kind: "sparse", experts, weights: sigmoid(gatherLast(logits, experts)) } as const;
    return { plan: mask ? maskPlan(plan, mask) : plan, logits, losses: {} };
  };

  return {
    name: "base",
    causal: { training: false, evaluation: true },
    needs: ["host"],
    plans: ["sparse"],
    gives: ["scores", "logits"],
    options: { exactUpTo, precision },
    expertsPerToken: 1,
    init: (context) => ({
      params: { weight: normalWeight(context) },
      buffers: {},
      score,
      select,
      route: (params, input) => select(score(params, input), input),
    }),
  };
}

/** i32 `[tokens, 1]`: the balanced assignment of the real tokens, -1 for padding. Waits for the scores. */
function assigned(logits: Tensor, mask: Tensor | undefined, { exactUpTo, precision }: Required<BaseOptions>): Tensor {
  const [tokens = 0, experts = 0] = logits.shape;
  const scores = logits.engine.read(logits);
  const kept = mask?.engine.read(mask);
  const real = Array.from({ length: tokens }, (_, t) => t).filter((t) => kept === undefined || kept[t] !== 0);
  const rows = new Float64Array(real.length * experts);
  for (const [row, t] of real.entries()) rows.set(scores.subarray(t * experts, (t + 1) * experts), row * experts);
  const sizes = { tokens: real.length, experts };
  const found =
    real.length <= exactUpTo ? exactAssignment(rows, sizes) : auctionAssignment(rows, { ...sizes, precision });
  const ids = new Int32Array(tokens).fill(-1);
  for (const [row, t] of real.entries()) ids[t] = found[row] ?? -1;
  return reshape(hostConstant(logits, ids, [tokens]), [tokens, 1]);
}

export const card: RouterCard = {
  name: "base",
  title: "BASE layers: balanced assignment",
  paper: "2103.16716",
  equations: "1, section 3.1",
  needs: ["host"],
  causal: "evaluation",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width; in training an assignment on the host, about (tokens)² experts steps up to 512 tokens",
  claim: "better than Switch and Sparsely Gated MoE at equal compute, with no balance loss and no new hyperparameter",
  ourChoices: [
    "where tokens do not divide evenly, experts get one more or one fewer",
    "padding is left out of the assignment",
    "exact up to 512 tokens, above that an auction within a stated distance of the best",
    "one assignment per layer and batch; the paper's workers first exchange random tokens, then assign within each",
    "centroids start from N(0, 0.02)",
  ],
};
