// Top-k token choice, the router of most released models: Mixtral (2401.04088), OLMoE (2409.02060), DeepSeek-V2
// (2405.04434), gpt-oss. Logits l = x Wᵀ + b; a token's experts are the k largest l, their weights come in four orders:
//   softmax-topk-renormalise   p = softmax(l) over all experts, w = p_chosen / sum(p_chosen)   Mixtral, Qwen3
//   softmax-topk               w = p_chosen                    OLMoE, DeepSeek-V2, Qwen1.5-MoE
//   topk-softmax               w = softmax(l_chosen)           gpt-oss; in numbers the same as the first
//   sigmoid                    s = sigmoid(l), w = s_chosen / sum(s_chosen)
// topP (2403.07652): of the sorted p, the shortest prefix whose sum reaches topP; a variable number of experts.
// With k = 1 only softmax-topk lets the gate learn: a single weight divided by itself is always 1.
import {
  cumsum,
  div,
  gatherLast,
  less,
  linear,
  logSoftmax,
  neg,
  ShapeError,
  softmax,
  softmaxTopk,
  softplus,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
  where,
} from "@switchyard/core";
import {
  maskPlan,
  overridePlan,
  type Ranking,
  type Routed,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  leaf,
  maskOf,
  normalisedSigmoid,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export type TopKOrder = "softmax-topk-renormalise" | "softmax-topk" | "topk-softmax" | "sigmoid";

export interface TopKOptions {
  /** Experts per token; with `topP` the most a token may get. */
  readonly k: number;
  /** Default "softmax-topk-renormalise". */
  readonly order?: TopKOrder;
  /** Keep the fewest experts whose probabilities reach this sum, 0..1 (2403.07652 takes 0.4); default: always k. */
  readonly topP?: number;
  /** Adds a learned bias to the logits (gpt-oss); default false. */
  readonly bias?: boolean;
  /** Weight of the balance loss of each layer, E Σ f P with the f summing to k; default 0.01 (OLMoE). */
  readonly balance?: number;
  /** Divides the balance loss by k, as Megatron does; default false. */
  readonly normalizeByK?: boolean;
  /** Weight of the router z-loss (2202.08906); default 0.001 (OLMoE). */
  readonly zLoss?: number;
}

/**
 * Each token takes its k best experts. Params: `weight [experts, width]`, with `bias` also `bias [experts]`. The
 * balance loss is one per layer; for Hugging Face's form over all layers at once set `balance: 0` and use core's
 * `mixtralBalance` in a training hook.
 * `init` throws ShapeError when k is not in 1..experts.
 *
 * @example topK({ k: 2 })
 */
export function topK(options: TopKOptions): RouterPlugin {
  const {
    k,
    order = "softmax-topk-renormalise",
    topP,
    bias = false,
    balance = 0.01,
    normalizeByK = false,
    zLoss = 0.001,
  } = options;
  checkNotNegative("topK", { balance, zLoss });
  if (topP !== undefined && !(topP > 0 && topP <= 1)) {
    throw new ShapeError(`topK: topP = ${topP}; expected a sum of probabilities, above 0 and at most 1`);
  }
  if (topP !== undefined && order === "sigmoid") {
    throw new ShapeError(
      'topK: topP sums probabilities, and order "sigmoid" has none; choose one of the softmax orders',
    );
  }

  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const chosen = choose(logits, k, order); // ids and weights [tokens, k]
    const own = topP === undefined ? chosen.plan : shortestPrefix(chosen.plan, logits, { topP, order });
    const plan = overridePlan(own, input, () => ranking(logits, order, topP === undefined ? k : undefined));
    const { probabilities } = chosen;
    const { experts } = plan;
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts, balance, normalizeByK, zLoss }),
    };
  };
  const score = (params: Tree, { hidden }: RouterInput): Tensor =>
    linear(hidden, leaf(params, "weight"), bias ? leaf(params, "bias") : undefined); // [tokens, experts]

  return {
    name: "topK",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { k, order, topP: topP ?? null, bias, balance, normalizeByK, zLoss },
    ...(topP === undefined ? { expertsPerToken: k } : {}),
    init(context: RouterContext) {
      const { engine, experts } = context;
      checkK("topK", k, experts);
      const weight = normalWeight(context);
      return {
        params: bias ? { weight, bias: engine.tensor(new Float32Array(experts), [experts]) } : { weight },
        buffers: {},
        overrides: true,
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** How an order ranks and weighs experts, for routing overrides; without k where topP makes that vary. */
function ranking(logits: Tensor, order: TopKOrder, k: number | undefined): Ranking {
  const logWeights = order === "sigmoid" ? neg(softplus(neg(logits))) : logSoftmax(logits); // [tokens, experts]
  return { order: logits, logWeights, normalised: order !== "softmax-topk", ...(k === undefined ? {} : { k }) };
}

function choose(
  logits: Tensor,
  k: number,
  order: TopKOrder,
): { readonly plan: SparsePlan; readonly probabilities: Tensor } {
  if (order !== "sigmoid") {
    const { weights, ids, probabilities } = softmaxTopk(logits, { k, order });
    return { plan: { kind: "sparse", experts: ids, weights }, probabilities };
  }
  const ids = topkIndices(logits, k); // sigmoid keeps the order, and saturates less before it
  return {
    plan: { kind: "sparse", experts: ids, weights: normalisedSigmoid(gatherLast(logits, ids)) },
    probabilities: normalisedSigmoid(logits), // [tokens, experts]
  };
}

/** Empties the slots behind the one at which the sum of probabilities reaches topP; that one is kept. */
function shortestPrefix(
  { experts }: SparsePlan,
  logits: Tensor,
  { topP, order }: { readonly topP: number; readonly order: TopKOrder },
): SparsePlan {
  const sorted = gatherLast(softmax(logits), experts); // [tokens, k], descending
  const kept = less(cumsum(sorted, { axis: 1, exclusive: true }), topP);
  const raw = where(kept, sorted, 0);
  // softmax over the kept logits is the same as dividing the kept probabilities by their sum.
  const weights = order === "softmax-topk" ? raw : div(raw, sumLast(raw));
  return { kind: "sparse", experts: where(kept, experts, -1), weights };
}

export const card: RouterCard = {
  name: "topK",
  title: "Top-k token choice, top-p and sigmoid gates",
  paper: "2401.04088",
  equations: "section 2.1; topP: 2403.07652",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], bias [experts] on request",
  cost: "one product experts x width",
  claim: "Mixtral 8x7B matches or exceeds Llama 2 70B with 13B active parameters",
  ourChoices: [
    "ties go to the lower expert",
    "with topP, k is an upper limit (the paper has none) and the entropy loss of the paper is left to the caller",
    "sigmoid: the balance loss sees the scores divided by their sum over all experts",
    "defaults of the loss weights are OLMoE's",
  ],
};
