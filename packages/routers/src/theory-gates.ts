// Gates whose statistics are known: softmax gates in 2503.03213, the normalised sigmoid of DeepSeek-V3 in 2505.10860.
// With l = x Wᵀ + b:
//   dense         w = softmax(l), every expert
//   sparse        w = softmax over the k largest l
//   hierarchical  w_gm = softmax(a)_g softmax(l_g)_m, a = x Uᵀ + c over groups g, l_g = the members m of g; at each
//                 level all or the k largest, softmax over those
//   sigmoid       w = σ(l) / Σ σ(l), over the k largest l or over all experts
// The first finds that experts with a nonlinear activation are learned at near-parametric rates and linear ones far
// slower; the second that shared experts and the normalised sigmoid need fewer samples. Routing over time: core's
// `routingHistory` and `jainIndex`.
import {
  add,
  div,
  gatherLast,
  linear,
  logSoftmax,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  softmax,
  softmaxTopk,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import { maskPlan, type Plan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalisedSigmoid,
  normalTensor,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export type TheoryGate = "dense" | "sparse" | "hierarchical" | "sigmoid";

export interface TheoryGatesOptions {
  /** Default "sparse". */
  readonly gate?: TheoryGate;
  /**
   * Experts per token of "sparse" and "sigmoid"; default 2. With "sigmoid" 0 means all. One expert has the weight 1,
   * from which the gate does not learn (but for "sigmoid" divided by the sum over all).
   */
  readonly k?: number;
  /** What the weights of "sigmoid" are divided by: the sum over the "selected" (default), or over "all" experts. */
  readonly over?: "selected" | "all";
  /** Groups of "hierarchical", of neighbouring experts; default 2. */
  readonly groups?: number;
  /** Groups that a token enters in "hierarchical"; default 0: all. */
  readonly outerK?: number;
  /** Members that it takes in each of these; default 0: all. */
  readonly innerK?: number;
  /**
   * Weight of the balance loss, E Σ f P with the f summing to the experts of a token, which the papers do not have;
   * default 0.
   */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the papers do not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Token choice with one of the four gates. Params: `weight [experts, width]`, `bias [experts]`; "hierarchical" also
 * `outerWeight [groups, width]`, `outerBias [groups]`. "dense", "sigmoid" with k = 0, and "hierarchical" without
 * limits send every token to every expert. `init` throws ShapeError when k, groups or a level's k do not fit the
 * number of experts.
 *
 * @example theoryGates({ gate: "hierarchical", groups: 4, outerK: 1, innerK: 2 })
 */
export function theoryGates(options: TheoryGatesOptions = {}): RouterPlugin {
  const {
    gate = "sparse",
    k = 2,
    over = "selected",
    groups = 2,
    outerK = 0,
    innerK = 0,
    balance = 0,
    zLoss = 0,
  } = options;
  const name = "theoryGates";
  checkWord(name, "gate", gate, ["dense", "sparse", "hierarchical", "sigmoid"]);
  checkWord(name, "over", over, ["selected", "all"]);
  checkNotNegative(name, { balance, zLoss });
  for (const [option, value] of Object.entries({ k, groups, outerK, innerK })) {
    if (!Number.isInteger(value) || value < 0) {
      throw new ShapeError(`${name}: ${option} = ${value}; expected a whole number from 0`);
    }
  }
  if (gate === "hierarchical" && zLoss > 0) {
    throw new ShapeError(
      `${name}: zLoss = ${zLoss}; scores of "hierarchical" are logarithms of probabilities, whose z-loss is always 0`,
    );
  }
  const full = gate === "dense" || (gate === "sigmoid" && k === 0) || (gate === "hierarchical" && !outerK && !innerK);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => {
    const inner = linear(hidden, leaf(params, "weight"), leaf(params, "bias")); // [tokens, experts]
    if (gate !== "hierarchical") return inner;
    return hierarchicalLogits(linear(hidden, leaf(params, "outerWeight"), leaf(params, "outerBias")), inner);
  };
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const { plan, probabilities } = gates[gate](logits, { k, over, groups, outerK, innerK });
    const ids = plan.kind === "sparse" ? plan.experts : topkIndices(logits, logits.shape[1] ?? 0);
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts: ids, balance, zLoss }),
    };
  };
  const perToken = gate === "hierarchical" ? outerK * innerK : k; // where both levels have a limit

  return {
    name,
    causal: { training: true, evaluation: true },
    needs: [],
    plans: [full ? "dense" : "sparse"],
    gives: full ? ["scores", "logits", "probabilities"] : ["scores", "logits", "probabilities", "choices"],
    options: { gate, k, over, groups, outerK, innerK, balance, zLoss },
    ...(full || perToken === 0 ? {} : { expertsPerToken: perToken }),
    init(context) {
      const { engine, experts, width } = context;
      if (gate === "sparse" || (gate === "sigmoid" && k > 0)) checkK(name, k, experts);
      const zeros = (n: number): Tensor => engine.tensor(new Float32Array(n), [n]);
      const flat = { weight: normalWeight(context), bias: zeros(experts) };
      if (gate === "hierarchical") checkGroups({ experts, groups, outerK, innerK });
      const outer =
        gate === "hierarchical"
          ? { outerWeight: normalTensor(context, "outer", [groups, width], 0.02), outerBias: zeros(groups) }
          : {};
      return {
        params: { ...flat, ...outer },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

function checkGroups(sizes: {
  readonly experts: number;
  readonly groups: number;
  readonly outerK: number;
  readonly innerK: number;
}): void {
  const { experts, groups, outerK, innerK } = sizes;
  if (groups < 1 || experts % groups !== 0) {
    throw new ShapeError(`theoryGates: groups = ${groups}; expected a divisor of ${experts} experts`);
  }
  if (outerK > groups || innerK > experts / groups) {
    throw new ShapeError(
      `theoryGates: outerK = ${outerK} of ${groups} groups, innerK = ${innerK} of ${experts / groups} members; ` +
        "a level cannot choose more than it has",
    );
  }
}

// ---------------------------------------------------------------- the gates
type Limits = Required<Pick<TheoryGatesOptions, "k" | "over" | "groups" | "outerK" | "innerK">>;
interface Gated {
  readonly plan: Plan;
  /** `[tokens, experts]`, rows that sum to 1. */
  readonly probabilities: Tensor;
}

const gates: Readonly<Record<TheoryGate, (logits: Tensor, limits: Limits) => Gated>> = {
  dense(logits) {
    const probabilities = softmax(logits);
    return { plan: { kind: "dense", weights: probabilities }, probabilities };
  },
  sparse(logits, { k }) {
    const { ids, weights, probabilities } = softmaxTopk(logits, { k, order: "topk-softmax" });
    return { plan: { kind: "sparse", experts: ids, weights }, probabilities };
  },
  sigmoid(logits, { k, over }) {
    const probabilities = normalisedSigmoid(logits); // [tokens, experts]
    if (k === 0) return { plan: { kind: "dense", weights: probabilities }, probabilities };
    const ids = topkIndices(logits, k); // sigmoid keeps the order, and saturates less before it
    const weights = over === "all" ? gatherLast(probabilities, ids) : normalisedSigmoid(gatherLast(logits, ids));
    return { plan: { kind: "sparse", experts: ids, weights }, probabilities };
  },
  hierarchical(logits, { groups, outerK, innerK }) {
    const experts = logits.shape[1] ?? 0;
    const members = experts / groups;
    const levels = hierarchicalGate(logits, groups);
    const probabilities = joint(levels);
    if (outerK === 0 && innerK === 0) return { plan: { kind: "dense", weights: probabilities }, probabilities };
    const kept = joint({ outer: largest(levels.outer, outerK), inner: largest(levels.inner, innerK) });
    const ids = topkIndices(kept, (outerK || groups) * (innerK || members)); // [tokens, of both levels]
    return { plan: { kind: "sparse", experts: ids, weights: gatherLast(kept, ids) }, probabilities };
  },
};

/** A probability per group `[tokens, groups]`, and per member of each `[tokens, groups, members]`. */
export interface Levels {
  readonly outer: Tensor;
  readonly inner: Tensor;
}

/**
 * Both levels as one score per expert, `[tokens, experts]`: ln outer + ln inner, whose softmax is the joint
 * probability. `outer [tokens, groups]` and `inner [tokens, experts]` are logits, experts group by group.
 */
export function hierarchicalLogits(outer: Tensor, inner: Tensor): Tensor {
  const [tokens = 0, groups = 0] = outer.shape;
  const experts = inner.shape[1] ?? 0;
  const levels = add(
    logSoftmax(reshape(inner, [tokens, groups, experts / Math.max(groups, 1)])),
    reshape(logSoftmax(outer), [tokens, groups, 1]),
  );
  return reshape(levels, [tokens, experts]);
}

/**
 * The levels back from `logits [tokens, experts]`: `outer` sums a group's joint probabilities, `inner` divides them
 * by that.
 */
export function hierarchicalGate(logits: Tensor, groups: number): Levels {
  const [tokens = 0, experts = 0] = logits.shape;
  const split = reshape(logits, [tokens, groups, experts / groups]);
  return { outer: sum(reshape(softmax(logits), split.shape), [2]), inner: softmax(split) };
}

/** outer_g inner_gm, `[tokens, experts]`. */
function joint({ outer, inner }: Levels): Tensor {
  const [tokens = 0, groups = 0, members = 0] = inner.shape;
  return reshape(mul(reshape(outer, [tokens, groups, 1]), inner), [tokens, groups * members]);
}

/** The k largest of the last axis divided by their sum, zeros elsewhere; k = 0: all. */
function largest(p: Tensor, k: number): Tensor {
  const n = p.shape.at(-1) ?? 0;
  if (k === 0 || k === n) return p;
  const ids = topkIndices(p, k);
  const chosen = gatherLast(p, ids);
  return scatterLast(div(chosen, sumLast(chosen)), ids, n);
}

export const card: RouterCard = {
  name: "theoryGates",
  title: "Gates of theory: dense and sparse softmax, hierarchical softmax, normalised sigmoid",
  paper: "2503.03213",
  equations: "dense, sparse and hierarchical gates; normalised sigmoid: 2505.10860",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], bias [experts]; hierarchical also outerWeight [groups, width], outerBias [groups]",
  cost: "one product experts x width; hierarchical groups x width more; every expert runs where no k limits them",
  claim:
    "strongly identifiable experts are estimated at near-parametric rates, linear ones far slower; shared experts and sigmoid gates need fewer samples",
  ourChoices: [
    "hierarchical groups are neighbouring experts; each level may keep its k largest, which are then divided by their sum",
    "the balance loss of the sigmoid gate sees the scores divided by their sum over all experts",
    "initial weights N(0, 0.02²), biases 0",
    "ties go to the lower expert or group",
  ],
};
