// GShard (2006.16668): two experts per token, the second by chance, a limit on the tokens of each expert.
//   p = softmax(x Wᵀ); g1, g2 = the two largest p, each divided by g1 + g2   algorithm 1
//   the second expert is taken when 2 g2 > u, u uniform: its chance grows with its weight   algorithm 1
//   capacity = floor(factor tokens / experts); all first choices are served in token order, then all second choices
//   loss = balance (1/E) Σ_e c_e m_e, c_e the share of tokens whose first choice is e, m_e = mean_t p_te   algorithm 1
// Because first choices are served first, those of later tokens can take the places of earlier tokens' second choices.
// A token that loses its second expert keeps g1 as it is. Other rules for the second expert are tensor2tensor's.
import {
  add,
  concat,
  div,
  less,
  linear,
  mul,
  reshape,
  ShapeError,
  slice,
  softmaxTopk,
  sumLast,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  applyCapacity,
  gshardBalance,
  type Loss,
  maskPlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
  zLoss as zLossOf,
} from "@switchyard/core/moe";
import { checkNotNegative, checkWord, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

/**
 * When a token's second expert is taken, g2 its weight and u uniform in 0..1: "chance" 2 g2 > u (the paper), "random"
 * g2 / threshold > u (tensor2tensor), "threshold" g2 > threshold, "all" always, "none" never.
 */
export type SecondExpert = "chance" | "random" | "threshold" | "all" | "none";
const rules: readonly SecondExpert[] = ["chance", "random", "threshold", "all", "none"];

export interface GShardOptions {
  /** When the second expert is taken in training; default "chance". */
  readonly second?: SecondExpert;
  /** The same in evaluation, without chance: default "all". */
  readonly evaluationSecond?: Exclude<SecondExpert, "chance" | "random">;
  /** For "random" and "threshold"; default 0.2. */
  readonly threshold?: number;
  /** Room of each expert in training, in units of the tokens divided by the experts; default 2. Infinity: nothing is dropped. */
  readonly capacityFactor?: number;
  /** The same in evaluation; default Infinity. */
  readonly evaluationCapacityFactor?: number;
  /**
   * Who is served first where an expert is full: first choices before second ones (the paper), which looks ahead as soon as
   * there are both, or earlier tokens before later ones, which is causal. Default "choices".
   */
  readonly order?: "choices" | "tokens";
  /** Places that every expert has at least; default 0 (tensor2tensor: 4). */
  readonly minimumCapacity?: number;
  /** Added to g1 + g2 before they are divided by it, from 0; default 1e-9, as in tensor2tensor. */
  readonly epsilon?: number;
  /** Weight of the balance loss; default 0.01. */
  readonly balance?: number;
  /** Multiplies the balance loss by E², so that even loads give 1 for any E (tensor2tensor), not 1 / E². Default true. */
  readonly scaledBalance?: boolean;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes its best expert, and its second best by a rule. Weights of both sum to 1; what is dropped leaves the other's
 * weight alone. Params: `weight [experts, width]`. Metric `dropped` []: share of the assignments that found their expert full.
 * With one expert there is no second. In training it looks ahead, unless `order` is "tokens", `second` is "none" or nothing
 * is dropped.
 *
 * @example gshard({ capacityFactor: 2 })
 * @example gshard({ order: "tokens" })
 */
export function gshard(options: GShardOptions = {}): RouterPlugin {
  const {
    second = "chance",
    evaluationSecond = "all",
    threshold = 0.2,
    capacityFactor = 2,
    evaluationCapacityFactor = Number.POSITIVE_INFINITY,
    order = "choices",
    minimumCapacity = 0,
    epsilon = 1e-9,
    balance = 0.01,
    scaledBalance = true,
    zLoss = 0,
  } = options;
  checkNotNegative("gshard", { epsilon, balance, zLoss });
  checkWord("gshard", "order", order, ["choices", "tokens"]);
  checkWord("gshard", "second", second, rules);
  checkWord("gshard", "evaluationSecond", evaluationSecond, ["threshold", "all", "none"]);
  if (!(threshold > 0 && threshold <= 1)) {
    throw new ShapeError(`gshard: threshold = ${threshold}; expected a weight, above 0 and at most 1`);
  }
  if (!Number.isInteger(minimumCapacity) || minimumCapacity < 0) {
    throw new ShapeError(`gshard: minimumCapacity = ${minimumCapacity}; expected a whole number from 0`);
  }
  for (const [name, factor] of Object.entries({ capacityFactor, evaluationCapacityFactor })) {
    if (!(factor >= 0)) throw new ShapeError(`gshard: ${name} = ${factor}; expected a number from 0, or Infinity`);
  }

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { training } = input;
    const [, experts = 0] = logits.shape;
    const { mask } = maskOf(input);
    const best = softmaxTopk(logits, { k: Math.min(2, experts), order: "softmax-topk" }); // [tokens, 2]
    const weights = div(best.weights, add(sumLast(best.weights), epsilon));
    const rule = training ? second : evaluationSecond;
    const asked = takeSecond({ kind: "sparse", experts: best.ids, weights }, input, { rule, threshold });
    const plan = mask ? maskPlan(asked, mask) : asked;

    const { ids, probabilities } = best;
    const losses: Record<string, Loss> = {};
    if (training && balance !== 0) {
      const value = gshardBalance({ probabilities, experts: ids, scaled: scaledBalance, ...(mask ? { mask } : {}) });
      losses.balance = { value, weight: balance };
    }
    if (training && zLoss !== 0) losses.zLoss = { value: zLossOf(logits, mask), weight: zLoss };
    const decided = { logits, probabilities, losses };
    const factor = training ? capacityFactor : evaluationCapacityFactor;
    if (factor === Number.POSITIVE_INFINITY) return { ...decided, plan };
    // k = 1: the paper's capacity is in units of tokens, not of assignments.
    const policy = order === "choices" ? "choice" : "position";
    const limits = { experts, policy, factor, k: 1, round: "down", minimum: minimumCapacity } as const;
    const limited = applyCapacity(plan, limits);
    return { ...decided, plan: limited.plan, metrics: { dropped: limited.dropped } };
  };

  const causal = (rule: SecondExpert, factor: number): boolean =>
    order === "tokens" || rule === "none" || factor === Number.POSITIVE_INFINITY;
  const saved = (factor: number): number | null => (factor === Number.POSITIVE_INFINITY ? null : factor);
  return {
    name: "gshard",
    causal: {
      training: causal(second, capacityFactor),
      evaluation: causal(evaluationSecond, evaluationCapacityFactor),
    },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: {
      second,
      evaluationSecond,
      threshold,
      capacityFactor: saved(capacityFactor),
      evaluationCapacityFactor: saved(evaluationCapacityFactor),
      order,
      minimumCapacity,
      epsilon,
      balance,
      scaledBalance,
      zLoss,
    },
    expertsPerToken: 2,
    init: (context) => ({
      params: { weight: normalWeight(context) },
      buffers: {},
      score,
      select,
      route: (params, input) => select(score(params, input), input),
    }),
  };
}

/** Empties the second slots that the rule leaves out; first slots stay as they are. */
function takeSecond(
  plan: SparsePlan,
  { random, layer }: RouterInput,
  { rule, threshold }: { readonly rule: SecondExpert; readonly threshold: number },
): SparsePlan {
  const [tokens = 0, k = 0] = plan.weights.shape;
  if (rule === "all" || k < 2) return plan;
  const column = (x: Tensor, i: number): Tensor => slice(x, [0, i], [tokens, 1]);
  const g2 = column(plan.weights, 1);
  const draws = (): Tensor => reshape(random.at(layer, "second").uniform([tokens]), [tokens, 1]);
  const taken = {
    chance: () => less(draws(), mul(g2, 2)),
    random: () => less(draws(), mul(g2, 1 / threshold)),
    threshold: () => less(threshold, g2),
    none: () => less(g2, 0), // weights are never below 0
  }[rule](); // [tokens, 1]
  return {
    kind: "sparse",
    experts: concat([column(plan.experts, 0), where(taken, column(plan.experts, 1), -1)], 1),
    weights: concat([column(plan.weights, 0), where(taken, g2, 0)], 1),
  };
}

export const card: RouterCard = {
  name: "gshard",
  title: "GShard: top-2, the second expert by chance",
  paper: "2006.16668",
  equations: "algorithm 1",
  needs: [],
  causal: "evaluation",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width; with a capacity a sort of the assignments",
  claim: "600B parameters for translation from 100 languages, trained on 2048 TPUs in 4 days",
  ourChoices: [
    'order: "tokens" serves earlier tokens first, for language models',
    "evaluation always takes the second expert and drops nothing unless asked",
    "the balance loss is multiplied by E², so that one weight suits any number of experts; scaledBalance: false is the paper's",
    "weight 0.01 of the balance loss: the paper leaves it open",
    "all tokens of the batch form one group, padding included in the capacity but taking no place; the paper splits into local groups",
    "the sum of the two weights is raised by 1e-9 before dividing, as in tensor2tensor",
    "initial weights N(0, 0.02²)",
  ],
};
