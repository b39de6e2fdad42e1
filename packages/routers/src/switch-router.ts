// Switch Transformer (2101.03961): one expert per token, with a limit on the tokens of each expert.
//   p = softmax(x Wᵀ)                 eq. 1; in training x is first multiplied elementwise by U(1 - jitter, 1 + jitter)
//   y = p_i E_i(x), i = argmax p      eq. 2
//   capacity = ceil(factor tokens / experts)   eq. 3; first come, first served in token order, the rest passes by
//   loss = alpha E Σ f_i P_i          eqs. 4-6; f counts before dropping
import { affine, linear, logSoftmax, mul, ShapeError, softmaxTopk, type Tensor, type Tree } from "@switchyard/core";
import {
  applyCapacity,
  maskPlan,
  overridePlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import { checkNotNegative, leaf, maskOf, type RouterCard, truncatedWeight, usualLosses } from "./parts.ts";

export interface SwitchOptions {
  /** Room of each expert in training, in units of an even share; default 1.25. Infinity: nothing is dropped. */
  readonly capacityFactor?: number;
  /** The same in evaluation; default Infinity. The paper takes 2. */
  readonly evaluationCapacityFactor?: number;
  /** Half the width of the noise that multiplies the router's input in training; default 0.01. */
  readonly jitter?: number;
  /** Weight of the balance loss (the paper's alpha); default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes its best expert, weighed by its probability; experts that are full drop the latest tokens. Params:
 * `weight [experts, width]`. Metric `dropped` []: share of the tokens that found their expert full.
 *
 * @example switchRouter({ capacityFactor: 1.25 })
 */
export function switchRouter(options: SwitchOptions = {}): RouterPlugin {
  const {
    capacityFactor = 1.25,
    evaluationCapacityFactor = Number.POSITIVE_INFINITY,
    jitter = 0.01,
    balance = 0.01,
    zLoss = 0,
  } = options;
  checkNotNegative("switchRouter", { jitter, balance, zLoss });
  for (const [name, factor] of Object.entries({ capacityFactor, evaluationCapacityFactor })) {
    if (!(factor >= 0))
      throw new ShapeError(`switchRouter: ${name} = ${factor}; expected a number from 0, or Infinity`);
  }

  const score = (params: Tree, { hidden, training, random, layer }: RouterInput): Tensor => {
    if (!training || jitter === 0) return linear(hidden, leaf(params, "weight"));
    const noise = affine(random.at(layer, "jitter").uniform(hidden.shape), { scale: 2 * jitter, shift: 1 - jitter });
    return linear(mul(hidden, noise), leaf(params, "weight")); // [tokens, experts]
  };
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const { weights, ids, probabilities } = softmaxTopk(logits, { k: 1, order: "softmax-topk" }); // [tokens, 1]
    const own = { kind: "sparse", experts: ids, weights } as const;
    const asked = overridePlan(own, input, () => ({
      order: logits,
      logWeights: logSoftmax(logits),
      normalised: false,
      k: 1,
    }));
    const plan = mask ? maskPlan(asked, mask) : asked;
    const factor = input.training ? capacityFactor : evaluationCapacityFactor;
    const decided = {
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts: ids, balance, zLoss }),
    };
    if (factor === Number.POSITIVE_INFINITY) return { ...decided, plan };
    const experts = logits.shape[1] ?? 0;
    const limited = applyCapacity(plan, { experts, policy: "position", factor });
    return { ...decided, plan: limited.plan, metrics: { dropped: limited.dropped } };
  };

  const drops = [capacityFactor, evaluationCapacityFactor].some((factor) => factor !== Number.POSITIVE_INFINITY);
  const saved = (factor: number): number | null => (factor === Number.POSITIVE_INFINITY ? null : factor);
  return {
    name: "switchRouter",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", ...(drops ? [] : (["choices"] as const))],
    options: {
      capacityFactor: saved(capacityFactor),
      evaluationCapacityFactor: saved(evaluationCapacityFactor),
      jitter,
      balance,
      zLoss,
    },
    expertsPerToken: 1,
    init: (context) => ({
      params: { weight: truncatedWeight(context, 0.1) },
      buffers: {},
      overrides: true,
      score,
      select,
      route: (params, input) => select(score(params, input), input),
    }),
  };
}

export const card: RouterCard = {
  name: "switchRouter",
  title: "Switch Transformer",
  paper: "2101.03961",
  equations: "1-6",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width, a sort of the tokens where a capacity is set",
  claim: "the quality of T5-Base up to seven times sooner at equal compute per token",
  ourChoices: [
    "evaluation drops nothing unless asked; the paper evaluates with a capacity factor of 2",
    "the capacity follows from all tokens of the batch, padding included, so that no mask is read; padding takes no place",
    "token order is row after row of the batch: with a capacity, earlier rows are served first",
    "the router computes in the precision of the layer, f32",
  ],
};
