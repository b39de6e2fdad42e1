// DeepSeek-V2 (2405.04434): top-k of a softmax, limited to the best groups of experts, with three balance losses.
//   p = softmax(x Wᵀ), w = scale p_chosen                            eqs. 20-22; the shared experts belong to the layer
//   groups: the score of a group is its largest p; only experts of the best M groups are eligible            section 2.2.2
//   f_e = E count_e / (k N), P_e = mean_t p_te, per sequence of N tokens; Σ_e f_e P_e                         eqs. 23-25
//   over the D groups (devices) of experts G_i: P'_i = Σ_{e in G_i} P_e, f'_i = mean of f_e in G_i; Σ_i f'_i P'_i    eqs. 26-28
//   f''_i = D / (M N) tokens with an expert in G_i; Σ_i f''_i P'_i                                            eqs. 29-31
import {
  div,
  gatherLast,
  hostConstant,
  less,
  linear,
  logSoftmax,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  softmax,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  overridePlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  sequenceBalance,
} from "@switchyard/core/moe";
import { bestInGroups, checkGroups, checkLimit, eligible } from "./group-parts.ts";
import { checkK, checkNotNegative, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface DeepSeekV2Options {
  /** Experts per token (6 of 160 in the paper). */
  readonly k: number;
  /** Groups of equally many neighbouring experts, one per device; default 1 (8 in the paper). */
  readonly groups?: number;
  /** Groups that a token may use, the paper's M; default: all (3 in the paper). */
  readonly keptGroups?: number;
  /** Divides the weights by their sum; default false. With k = 1 every weight is then `scale`, and the gate cannot learn. */
  readonly normalise?: boolean;
  /** Factor on the weights; default 1, that of the released V2-Lite (16 in V2). */
  readonly scale?: number;
  /** Weight of the balance loss over experts (the paper's alpha 1); default 0.003. */
  readonly balance?: number;
  /** Weight of the balance loss over groups (alpha 2); default 0.05. Without groups there is none. */
  readonly deviceBalance?: number;
  /** Weight of the communication loss over groups (alpha 3); default 0.02. Without groups there is none. */
  readonly communication?: number;
}

/**
 * Each token takes the k most probable experts of its best groups. Params: `weight [experts, width]`. The losses are per
 * sequence and averaged over the sequences.
 * `init` throws ShapeError when k is not in 1..experts, when the experts do not split into the groups, or when the kept groups
 * hold fewer than k.
 *
 * @example deepSeekV2({ k: 6, groups: 8, keptGroups: 3 })
 */
export function deepSeekV2(options: DeepSeekV2Options): RouterPlugin {
  const {
    k,
    groups = 1,
    keptGroups = groups,
    normalise = false,
    scale = 1,
    balance = 0.003,
    deviceBalance = 0.05,
    communication = 0.02,
  } = options;
  checkNotNegative("deepSeekV2", { balance, deviceBalance, communication });
  checkLimit("deepSeekV2", groups, keptGroups);
  if (!(scale > 0) || !Number.isFinite(scale)) {
    throw new ShapeError(`deepSeekV2: scale = ${scale}; expected a finite number above 0`);
  }
  const limit = { groups, keptGroups, best: 1 };
  const weights = { balance, deviceBalance, communication };

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const probabilities = softmax(logits); // [tokens, experts]
    const ids = bestInGroups(probabilities, k, limit); // [tokens, k]
    const chosen = gatherLast(probabilities, ids);
    const shares = normalise ? div(chosen, sumLast(chosen)) : chosen;
    const own = { kind: "sparse", experts: ids, weights: mul(shares, scale) } as const;
    const plan = overridePlan(own, input, () => ({
      ...eligible(probabilities, limit),
      logWeights: logSoftmax(logits),
      normalised: normalise,
      scale,
      k,
    }));
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: input.training ? lossesOf(probabilities, ids, { input, limit, weights }) : {},
    };
  };

  return {
    name: "deepSeekV2",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { k, groups, keptGroups, normalise, scale, ...weights },
    expertsPerToken: k,
    init(context) {
      checkK("deepSeekV2", k, context.experts);
      checkGroups("deepSeekV2", { groups, keptGroups, k }, context.experts);
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

interface LossInput {
  readonly input: RouterInput;
  readonly limit: { readonly groups: number; readonly keptGroups: number };
  readonly weights: { readonly balance: number; readonly deviceBalance: number; readonly communication: number };
}

/** The losses whose weight is not 0, from `probabilities [tokens, experts]` and `ids [tokens, k]`. */
function lossesOf(
  probabilities: Tensor,
  ids: Tensor,
  { input, limit: { groups, keptGroups }, weights }: LossInput,
): Readonly<Record<string, Loss>> {
  const { balance, deviceBalance, communication } = weights;
  const usual = { batch: input.layout.batch, ...maskOf(input) };
  const losses: Record<string, Loss> = {};
  if (balance !== 0) {
    losses.balance = { value: sequenceBalance({ scores: probabilities, experts: ids, ...usual }), weight: balance };
  }
  if (groups === 1 || (deviceBalance === 0 && communication === 0)) return losses;

  const [tokens = 0, experts = 0] = probabilities.shape;
  const k = ids.shape[1] ?? 0;
  const size = experts / groups;
  const scores = reshape(sumLast(reshape(probabilities, [tokens, groups, size])), [tokens, groups]);
  const table = hostConstant(
    ids,
    Int32Array.from({ length: experts }, (_, e) => Math.floor(e / size)),
    [experts],
  );
  const groupIds = reshape(takeRows(table, reshape(ids, [tokens * k])), [tokens, k]);
  if (deviceBalance !== 0) {
    // Groups in place of experts: D / (k N) assignments to group i is the mean of its f_e.
    losses.deviceBalance = { value: sequenceBalance({ scores, experts: groupIds, ...usual }), weight: deviceBalance };
  }
  if (communication !== 0) {
    const ones = hostConstant(scores, new Float32Array(tokens * k).fill(1), [tokens, k]);
    const used = less(0, scatterLast(ones, groupIds, groups)); // [tokens, groups]
    const every = hostConstant(
      ids,
      Int32Array.from({ length: groups }, (_, i) => i),
      [1, groups],
    );
    // A list of up to D groups per token, so that sequenceBalance divides by D where the paper has M.
    const value = sequenceBalance({ scores, experts: where(used, every, -1), ...usual });
    losses.communication = { value: mul(value, groups / keptGroups), weight: communication };
  }
  return losses;
}

export const card: RouterCard = {
  name: "deepSeekV2",
  title: "DeepSeek-V2: group-limited softmax, balance over experts, devices and communication",
  paper: "2405.04434",
  equations: "20-31",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width; with groups a second, smaller choice",
  claim: "with 21B active parameters stronger than DeepSeek 67B, at 42.5 % less training cost",
  ourChoices: [
    "groups are off unless asked for, and with them the losses over groups",
    "scale 1, as in V2-Lite; the released V2 has 16",
    "one group per device: the losses over devices are over groups",
    "the paper's device-level token dropping is left to a capacity wrapper",
    "initial weights N(0, 0.02²)",
  ],
};
