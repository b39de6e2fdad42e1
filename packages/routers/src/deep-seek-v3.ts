// DeepSeek-V3 (2412.19437): sigmoid scores, loads kept even by a bias that only chooses, devices limited by groups.
//   s = sigmoid(x Wᵀ); the experts are the top k of s + b            eqs. 15, 16 (bias from 2408.15664)
//   w = scale s_chosen / Σ s_chosen, without b                       eqs. 12, 13
//   groups: the score of a group is the sum of its two largest s + b; experts of the best keptGroups are eligible   section 2.1.2
//   after each step b_e ← b_e + rate sign(mean load - load_e)        section 2.1.2
//   loss = balance Σ_e f_e P_e per sequence of N tokens, f_e = E count_e / (k N), P_e = mean_t(s_te / Σ_j s_tj)   eqs. 17-20
import {
  add,
  div,
  gatherLast,
  linear,
  mul,
  neg,
  ShapeError,
  sigmoid,
  softplus,
  sumLast,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import {
  maskPlan,
  overridePlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type StepStatistics,
  sequenceBalance,
} from "@switchyard/core/moe";
import { bestInGroups, checkGroups, checkLimit, eligible } from "./group-parts.ts";
import { checkK, checkNotNegative, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface DeepSeekV3Options {
  /** Experts per token (8 of 256 in the paper). */
  readonly k: number;
  /** Groups of equally many neighbouring experts; default 1 (8 in the paper). */
  readonly groups?: number;
  /** Groups that a token may use; default: all (4 in the paper). */
  readonly keptGroups?: number;
  /** Divides the weights by their sum; default true. With k = 1 every weight is then `scale`, and the gate cannot learn. */
  readonly normalise?: boolean;
  /** Factor on the weights; default 2.5, that of the released model. */
  readonly scale?: number;
  /** Step of the bias; default 0.001. */
  readonly rate?: number;
  /** Share of the training after which the bias stays, 0..1; default 0.966 (14.3 of 14.8 trillion tokens). */
  readonly biasUntil?: number;
  /** Weight of the sequence-wise balance loss; default 0.0001. */
  readonly balance?: number;
  /**
   * Sets the scores of excluded groups to 0 instead of leaving them out, as the released code does: an excluded expert is taken
   * when all others have s + b below 0. Default false.
   */
  readonly hfCompat?: boolean;
}

/**
 * Each token takes the k experts of largest score plus bias, weighed by the scores alone. Params: `weight [experts, width]`.
 * Buffers: `bias [experts]`, raised after a step for experts with less than the mean load and lowered for those with more, by
 * the loads of the whole global batch. `probabilities` are the scores divided by their sum over all experts.
 * `init` throws ShapeError when k is not in 1..experts, when the experts do not split into the groups, or when the kept groups
 * hold fewer than k.
 *
 * @example deepSeekV3({ k: 8, groups: 8, keptGroups: 4 })
 */
export function deepSeekV3(options: DeepSeekV3Options): RouterPlugin {
  const {
    k,
    groups = 1,
    keptGroups = groups,
    normalise = true,
    scale = 2.5,
    rate = 0.001,
    biasUntil = 0.966,
    balance = 0.0001,
    hfCompat = false,
  } = options;
  checkNotNegative("deepSeekV3", { rate, balance });
  checkLimit("deepSeekV3", groups, keptGroups);
  if (!(scale > 0) || !Number.isFinite(scale)) {
    throw new ShapeError(`deepSeekV3: scale = ${scale}; expected a finite number above 0`);
  }
  if (!(biasUntil >= 0 && biasUntil <= 1)) {
    throw new ShapeError(`deepSeekV3: biasUntil = ${biasUntil}; expected a share of the training, 0 to 1`);
  }
  const limit = { groups, keptGroups, best: 2, ...(hfCompat ? { excluded: 0 } : {}) };

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { training, layout, buffers } = input;
    const masked = maskOf(input);
    const scores = sigmoid(logits); // [tokens, experts]
    const biased = add(scores, leaf(buffers, "bias"));
    const ids = bestInGroups(biased, k, limit); // [tokens, k]
    const chosen = gatherLast(scores, ids);
    const shares = normalise ? div(chosen, add(sumLast(chosen), 1e-20)) : chosen;
    const own = { kind: "sparse", experts: ids, weights: mul(shares, scale) } as const;
    const plan = overridePlan(own, input, () => ({
      ...eligible(biased, limit),
      logWeights: neg(softplus(neg(logits))), // ln s
      normalised: normalise,
      scale,
      k,
    }));
    const lossy = training && balance !== 0;
    return {
      plan: masked.mask ? maskPlan(plan, masked.mask) : plan,
      logits,
      probabilities: div(scores, add(sumLast(scores), 1e-20)),
      losses: lossy
        ? {
            balance: {
              value: sequenceBalance({ scores, experts: ids, batch: layout.batch, ...masked }),
              weight: balance,
            },
          }
        : {},
    };
  };

  return {
    name: "deepSeekV3",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: { k, groups, keptGroups, normalise, scale, rate, biasUntil, balance, hfCompat },
    expertsPerToken: k,
    init(context) {
      const { engine, experts, layer } = context;
      checkK("deepSeekV3", k, experts);
      checkGroups("deepSeekV3", { groups, keptGroups, k }, experts);
      return {
        params: { weight: normalWeight(context) },
        buffers: { bias: engine.tensor(new Float32Array(experts), [experts]) },
        overrides: true,
        score,
        select,
        route: (params, input) => select(score(params, input), input),
        afterStep(layers, buffers) {
          const own = layers[layer];
          if (own === undefined) {
            throw new ShapeError(`deepSeekV3: statistics of ${layers.length} layers for the router of layer ${layer}`);
          }
          if (own.tokens === 0 || isOver(own, biasUntil)) return buffers;
          return { bias: add(leaf(buffers, "bias"), engine.tensor(biasStep(own.load, { experts, rate }), [experts])) };
        },
      };
    },
  };
}

/** Whether the share of the training in which the bias moves is over; never, where the length of the training is unknown. */
function isOver({ step, totalSteps }: StepStatistics, biasUntil: number): boolean {
  return totalSteps !== undefined && step >= biasUntil * totalSteps;
}

/** rate sign(mean load - load_e) for the real experts. */
function biasStep(
  load: Float64Array,
  { experts, rate }: { readonly experts: number; readonly rate: number },
): Float64Array {
  const real = load.slice(0, experts);
  const mean = real.reduce((total, n) => total + n, 0) / experts;
  return real.map((n) => rate * Math.sign(mean - n));
}

export const card: RouterCard = {
  name: "deepSeekV3",
  title: "DeepSeek-V3: sigmoid scores, balance by bias, group limits",
  paper: "2412.19437",
  equations: "12-20, section 2.1.2",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; buffer bias [experts]",
  cost: "one product experts x width; with groups a second, smaller choice",
  claim: "even loads almost without a balance loss: better than with one at equal balance, no token dropped",
  ourChoices: [
    "groups are off unless asked for",
    "experts of excluded groups are never chosen; the released code can choose one (hfCompat)",
    "the counts in the balance loss are those of the experts in fact chosen, bias and groups included; equation 18 counts the top k of s",
    "initial weights N(0, 0.02²)",
    "without a known number of steps the bias moves throughout; a step without tokens leaves it alone",
  ],
};
