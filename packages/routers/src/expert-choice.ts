// Expert Choice (2202.09368, section 3.2): every expert takes its best tokens, so loads are equal by construction and no
// balance loss is needed.
//   S = softmax(x Wᵀ) over the experts, [tokens, experts]
//   each expert takes the n = floor(tokens c / experts) tokens of largest S in its column
//   y = Σ S E(x) over the experts that took the token: none, some or all
// A token's fate depends on the others of the batch, later ones included: not causal.
import {
  gatherLast,
  less,
  linear,
  reshape,
  softmax,
  type Tensor,
  type Tree,
  topkIndices,
  transpose,
  UnsupportedError,
  where,
} from "@switchyard/core";
import { capacityOf, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { checkNotNegative, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface ExpertChoiceOptions {
  /** Experts per token on average; default 2. */
  readonly capacityFactor?: number;
  /**
   * Routes single new tokens against each other when decoding with a cache, which is not how it was trained; default
   * false.
   */
  readonly decoding?: boolean;
}

/**
 * Each expert takes its floor(tokens * capacityFactor / experts) best tokens of the batch. Params: `weight [experts,
 * width]`. `route` throws UnsupportedError while decoding with a cache, unless `decoding` is true.
 *
 * @example expertChoice({ capacityFactor: 2 })
 */
export function expertChoice({ capacityFactor = 2, decoding = false }: ExpertChoiceOptions = {}): RouterPlugin {
  checkNotNegative("expertChoice", { capacityFactor });

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const [tokens = 0, experts = 1] = logits.shape;
    const { past } = input.layout;
    if (past > 0 && !decoding) {
      throw new UnsupportedError(
        `expertChoice: asked to route ${tokens} new tokens after ${past} cached ones, but experts choose among all ` +
          "tokens of a sequence; " +
          "decode without a cache, or pass decoding: true to let them choose among the new ones only",
      );
    }
    const places = capacityOf({ tokens, experts, factor: capacityFactor, round: "down" });
    const probabilities = softmax(logits); // [tokens, experts]
    const { mask } = maskOf(input);
    // Below every probability, so that padding comes last.
    const open = mask ? where(reshape(mask, [tokens, 1]), probabilities, -1) : probabilities;
    const byExpert = transpose(open, [1, 0]); // [experts, tokens]
    const ids = topkIndices(byExpert, Math.min(places, tokens)); // [experts, places]
    const weights = gatherLast(byExpert, ids);
    const padding = less(weights, 0);
    return {
      plan: { kind: "expert-choice", tokens: where(padding, -1, ids), weights: where(padding, 0, weights) },
      logits,
      probabilities,
      losses: {},
    };
  };

  return {
    name: "expertChoice",
    causal: { training: false, evaluation: false },
    needs: [],
    plans: ["expert-choice"],
    gives: ["scores", "logits", "probabilities"],
    options: { capacityFactor, decoding },
    expertsPerToken: capacityFactor,
    init: (context) => ({
      params: { weight: normalWeight(context) },
      buffers: {},
      score,
      select,
      route: (params, input) => select(score(params, input), input),
    }),
  };
}

export const card: RouterCard = {
  name: "expertChoice",
  title: "Expert Choice",
  paper: "2202.09368",
  equations: "section 3.2",
  needs: [],
  causal: "no",
  plans: ["expert-choice"],
  params: "weight [experts, width]",
  cost: "one product experts x width, a top-n over the tokens for each expert",
  claim: "converges more than twice as fast as Switch and GShard top-2 at equal compute, with perfectly even loads",
  ourChoices: [
    "experts choose among all tokens of the batch, as in the paper; their number of places counts padding too",
    "refused while decoding with a cache unless asked for",
    "initial weights N(0, 0.02²)",
  ],
};
