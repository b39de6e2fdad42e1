// Top-p routing (2403.07652): harder tokens get more experts. Of the probabilities in falling order, a token keeps the
// shortest prefix whose sum reaches p.
//   P = softmax(x Wᵀ); n = the least number with Σ of the n largest P >= p; w = P_chosen
//   L = balance E Σ f P + entropy mean_t H(P_t): without the entropy, P flattens and every expert is kept
import {
  cumsum,
  div,
  less,
  linear,
  logSoftmax,
  ShapeError,
  softmaxTopk,
  sumLast,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  overridePlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  tokenEntropy,
} from "@switchyard/core/moe";
import { checkNotNegative, leaf, maskOf, normalWeight, type RouterCard, usualLosses } from "./parts.ts";

export interface TopPOptions {
  /** Sum of probabilities to reach, above 0 and at most 1; default 0.4. */
  readonly p?: number;
  /** Experts of a token at most; default: no limit. */
  readonly most?: number;
  /** Divides the kept probabilities by their sum, which the paper does not; default false. */
  readonly renormalise?: boolean;
  /** Weight of the balance loss; default 0.01. */
  readonly balance?: number;
  /** Weight of the mean entropy of the tokens' probabilities, in nats; default 1e-4. */
  readonly entropy?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes as many experts as it needs to reach the sum p, at least one. Params: `weight [experts, width]`.
 * Losses, in training: `balance`, `entropy`, `zLoss`. Throws ShapeError when p is not in (0, 1]; `init`, when `most` is
 * not in 1..experts.
 *
 * @example topP({ p: 0.4 })
 */
export function topP(options: TopPOptions = {}): RouterPlugin {
  const { p = 0.4, most, renormalise = false, balance = 0.01, entropy = 1e-4, zLoss = 0 } = options;
  checkNotNegative("topP", { balance, entropy, zLoss });
  if (!(p > 0 && p <= 1)) {
    throw new ShapeError(`topP: p = ${p}; expected a sum of probabilities, above 0 and at most 1`);
  }

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const k = most ?? logits.shape[1] ?? 0;
    const { weights: sorted, ids, probabilities } = softmaxTopk(logits, { k, order: "softmax-topk" }); // [tokens, k]
    // Kept while the sum before it is below p, so that the one that reaches p is the last.
    const kept = less(cumsum(sorted, { axis: 1, exclusive: true }), p);
    const raw = where(kept, sorted, 0);
    const experts = where(kept, ids, -1);
    const own = { kind: "sparse", experts, weights: renormalise ? div(raw, sumLast(raw)) : raw } as const;
    const plan = overridePlan(own, input, () => ({
      order: logits,
      logWeights: logSoftmax(logits),
      normalised: renormalise,
    }));
    const usual = usualLosses(input, { logits, probabilities, experts, balance, zLoss });
    const undecided = (): Loss => ({ value: tokenEntropy(probabilities, mask), weight: entropy });
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: input.training && entropy !== 0 ? { ...usual, entropy: undecided() } : usual,
    };
  };

  return {
    name: "topP",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { p, most: most ?? null, renormalise, balance, entropy, zLoss },
    init(context) {
      if (most !== undefined) checkMost(most, context.experts);
      return {
        params: { weight: normalWeight(context) },
        buffers: {},
        overrides: true,
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

function checkMost(most: number, experts: number): void {
  if (!Number.isInteger(most) || most < 1 || most > experts) {
    throw new ShapeError(
      `topP: most = ${most} of ${experts} experts; expected a whole number from 1 to ${experts}, or none for no limit`,
    );
  }
}

export const card: RouterCard = {
  name: "topP",
  title: "Top-p: as many experts as the token needs",
  paper: "2403.07652",
  equations: "the choice by cumulative probability, the balance and the entropy loss",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width, a sort of the experts of each token; experts per token vary",
  claim: "0.7 % better than top-2 on average with less than 90 % of the active parameters",
  ourChoices: [
    "ties go to the lower expert",
    "the expert that reaches the sum is kept",
    "most limits the experts of a token on request; the paper has no limit",
    "initial weights N(0, 0.02²)",
  ],
};
