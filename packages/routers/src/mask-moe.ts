// MaskMoE (2407.09816): a fixed table says which experts each token id may see: rare ids one, so that it is trained well,
// frequent ones several, among which the router chooses.
//   m_id ∈ {0, -∞}^E, drawn once: one 0 for rare ids, V for frequent ones
//   p_t = softmax(W x_t + m_id(t)); the k most probable experts; y_t = Σ p_te f_e(x_t)
// Balance loss E Σ f P over the tokens that see more than one expert.
import {
  div,
  gatherLast,
  less,
  linear,
  maximum,
  mul,
  reshape,
  ShapeError,
  softmax,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  topkIndices,
  UnsupportedError,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  type Routed,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  switchBalance,
} from "@switchyard/core/moe";
import { frequentTokens, tokenIdsOf, visibleExperts } from "./hash-parts.ts";
import { checkK, checkNotNegative, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface MaskMoEOptions {
  /** Experts per token; a token that sees fewer uses those. Default 1. */
  readonly k?: number;
  /** V: experts that a frequent token sees; default 8, or all where there are fewer. */
  readonly visible?: number;
  /** Share of all occurrences that the frequent ids make up, 0..1; default 0.4. */
  readonly frequentMass?: number;
  /**
   * Divides the weights of the chosen experts by their sum; default false. With k = 1 every weight is then 1, and the
   * gate learns from the balance loss alone.
   */
  readonly renormalize?: boolean;
  /** Weight of the balance loss, with the f summing to at most k; default 0.01. */
  readonly balance?: number;
  /** Of the table, a whole number of 32 bits; default 0. */
  readonly seed?: number;
}

/**
 * Top-k among the experts that the token's id may see. Ids outside the table see none. Params: `weight [experts, width]`;
 * buffers: `visible [vocabulary, experts]`, 0 or 1, saved with the model. `init` throws UnsupportedError without token
 * counts, ShapeError when k or `visible` is not in 1..experts; `route` throws UnsupportedError without token ids.
 *
 * @example maskMoE({ k: 1, visible: 4 })
 */
export function maskMoE(options: MaskMoEOptions = {}): RouterPlugin {
  const { k = 1, visible, frequentMass = 0.4, renormalize = false, balance = 0.01, seed = 0 } = options;
  checkNotNegative("maskMoE", { frequentMass, balance });
  if (frequentMass > 1) throw new ShapeError(`maskMoE: frequentMass = ${frequentMass}; expected a share from 0 to 1`);
  if (!Number.isInteger(seed) || seed < 0 || seed >= 2 ** 32) {
    throw new ShapeError(`maskMoE: seed = ${seed}; expected a whole number from 0 to ${2 ** 32 - 1}`);
  }
  if (visible !== undefined && !(Number.isInteger(visible) && visible >= 1)) {
    throw new ShapeError(`maskMoE: visible = ${visible}; expected a whole number of experts from 1`);
  }

  const score = (params: Tree, input: RouterInput): Tensor =>
    where(seen(input), linear(input.hidden, leaf(params, "weight")), Number.NEGATIVE_INFINITY);
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const open = seen(input); // [tokens, experts]
    const probabilities = softmax(logits);
    const best = topkIndices(logits, k); // [tokens, k]
    const experts = where(gatherLast(open, best), best, -1);
    const chosen = gatherLast(probabilities, experts);
    const weights = renormalize ? div(chosen, maximum(sumLast(chosen), 1e-20)) : chosen;
    const { mask } = maskOf(input);
    const plan = { kind: "sparse", experts, weights } as const;
    const losses: Record<string, Loss> = {};
    if (input.training && balance !== 0) {
      const several = reshape(less(1, sumLast(open)), [logits.shape[0] ?? 0]); // [tokens]
      const counted = mask ? mul(several, mask) : several;
      losses.balance = { value: switchBalance({ probabilities, experts, mask: counted }), weight: balance };
    }
    return { plan: mask ? maskPlan(plan, mask) : plan, logits, probabilities, losses };
  };

  return {
    name: "maskMoE",
    causal: { training: true, evaluation: true },
    needs: ["tokenIds"],
    plans: ["sparse"],
    // The logits hold -Infinity where an expert is not seen.
    gives: ["scores", "probabilities", "choices"],
    options: { k, visible: visible ?? null, frequentMass, renormalize, balance, seed },
    expertsPerToken: k,
    init(context) {
      const { engine, experts } = context;
      checkK("maskMoE", k, experts);
      if (visible !== undefined && visible > experts) {
        throw new ShapeError(`maskMoE: visible = ${visible} of ${experts} experts; expected a number up to ${experts}`);
      }
      const table = tableOf(context, { frequentMass, seed, visible: visible ?? Math.min(8, experts) });
      return {
        params: { weight: normalWeight(context) },
        buffers: { visible: engine.tensor(table, [table.length / experts, experts]) },
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** `[tokens, experts]`: 1 where the token may see the expert. */
function seen(input: RouterInput): Tensor {
  return takeRows(leaf(input.buffers, "visible"), tokenIdsOf("maskMoE", input));
}

function tableOf(
  { experts, layer, tokenCounts }: RouterContext,
  { frequentMass, seed, visible }: { readonly frequentMass: number; readonly seed: number; readonly visible: number },
): Float32Array {
  if (tokenCounts === undefined) {
    throw new UnsupportedError(
      "maskMoE: which token ids are frequent is not known here; put the token counts of the corpus into the context " +
        "(transformer: the option tokenCounts)",
    );
  }
  const table = new Float32Array(tokenCounts.length * experts);
  frequentTokens(tokenCounts, frequentMass).forEach((frequent, token) => {
    const count = frequent === 1 ? visible : 1;
    for (const e of visibleExperts(token, { experts, visible: count, seed, layer })) table[token * experts + e] = 1;
  });
  return table;
}

export const card: RouterCard = {
  name: "maskMoE",
  title: "MaskMoE: experts visible by token id",
  paper: "2407.09816",
  equations: "the masked softmax, as far as it could be read second-hand",
  needs: ["tokenIds"],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; buffer visible [vocabulary, experts]",
  cost: "one product experts x width and one table lookup",
  claim: "lower perplexity and better downstream results than dynamic and than fixed routing",
  ourChoices: [
    "frequent: the most frequent ids until 40 % of all occurrences have passed",
    "a frequent id sees 8 experts, or all where there are fewer",
    "the table comes from a 32-bit hash of seed, id, expert and layer: each layer has another",
    "a token that sees fewer than k experts leaves slots empty",
    "the balance loss counts only tokens that see several experts, of the batch itself",
    "weights are not divided by their sum unless asked for",
  ],
};
