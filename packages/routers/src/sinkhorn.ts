// Sinkhorn routing (S-BASE, 2202.01169), with the rules of Megatron-LM: in training, tokens choose from a
// plan that gives every token and every expert the same mass; in evaluation they take their best experts.
//   A = exp(x Wᵀ), T tokens, E experts; d1 = 1; repeat, until the mean |change of d1| is at most a tolerance:
//     d0 = (1/T) / (A d1 + 1e-8), d1 = (1/E) / (Aᵀ d0 + 1e-8)
//   Π = diag(d0) A diag(d1); the experts of token t are the k largest Π_t, chosen without gradient
//   w = sigmoid(x Wᵀ) of the chosen for k = 1, else softmax(x Wᵀ) over all experts, not renormalised
// The plan depends on the whole batch, later tokens included: not causal in training. No balance loss is needed.
import {
  add,
  div,
  exp,
  full,
  gatherLast,
  less,
  linear,
  matmul,
  maximum,
  maxLast,
  mean,
  minimum,
  mul,
  neg,
  reshape,
  ShapeError,
  sigmoid,
  softmax,
  stopGradient,
  sub,
  sum,
  type Tensor,
  type Tree,
  topkIndices,
  transpose,
  where,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { checkK, checkNotNegative, leaf, maskOf, normalWeight, type RouterCard, usualLosses } from "./parts.ts";

export interface SinkhornOptions {
  /** Experts per token. */
  readonly k: number;
  /** Iterations at most, from 1; default 10. All are computed, those after the tolerance is met change nothing. */
  readonly iterations?: number;
  /** Iterations stop to count when the mean |change of d1| is at most this; default 1e-4. 0: all count. */
  readonly tolerance?: number;
  /** Added to the sums that masses are divided by, above 0; default 1e-8. */
  readonly epsilon?: number;
  /** Weight of the router z-loss (2202.08906); default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes k experts: in training by a balanced plan over the batch, in evaluation the best by itself. Params:
 * `weight [experts, width]`. Metric `iterations` [], in training: how many it took until the tolerance.
 * `init` throws ShapeError when k is not in 1..experts.
 *
 * @example sinkhorn({ k: 1 })
 */
export function sinkhorn(options: SinkhornOptions): RouterPlugin {
  const { k, iterations = 10, tolerance = 1e-4, epsilon = 1e-8, zLoss = 0 } = options;
  checkNotNegative("sinkhorn", { tolerance, zLoss });
  checkIterations(iterations);
  checkEpsilon(epsilon);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const probabilities = softmax(logits); // [tokens, experts]
    const balanced = input.training
      ? sinkhornPlan(logits, { iterations, tolerance, epsilon, ...(mask ? { mask } : {}) })
      : undefined;
    const ids = topkIndices(balanced ? balanced.plan : logits, k); // [tokens, k]
    const weights = gatherLast(k === 1 ? sigmoid(logits) : probabilities, ids);
    const plan = { kind: "sparse", experts: ids, weights } as const;
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts: ids, balance: 0, zLoss }),
      ...(balanced ? { metrics: { iterations: balanced.iterations } } : {}),
    };
  };

  return {
    name: "sinkhorn",
    causal: { training: false, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: { k, iterations, tolerance, epsilon, zLoss },
    expertsPerToken: k,
    init(context) {
      checkK("sinkhorn", k, context.experts);
      return {
        params: { weight: normalWeight(context) },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

export interface SinkhornPlanOptions {
  readonly iterations?: number;
  readonly tolerance?: number;
  readonly epsilon?: number;
  /** `[tokens]`, 1 = real token; the others get rows of zeros and no mass. */
  readonly mask?: Tensor;
}

/**
 * The balanced plan of `logits [tokens, experts]`: `plan` of that shape, rows of about 1 / tokens and columns of about
 * 1 / experts, without gradient, and `iterations` [], how many counted. Throws ShapeError unless `iterations` is a whole
 * number from 1 and `epsilon` above 0.
 */
export function sinkhornPlan(
  logits: Tensor,
  { iterations = 10, tolerance = 1e-4, epsilon = 1e-8, mask }: SinkhornPlanOptions = {},
): { readonly plan: Tensor; readonly iterations: Tensor } {
  checkIterations(iterations);
  checkEpsilon(epsilon);
  const [tokens = 0, experts = 1] = logits.shape;
  const fixed = stopGradient(logits);
  const present = mask && reshape(mask, [tokens, 1]);
  // Rows divided by their largest entry, and the epsilon of each row with them: the same plan, and nothing overflows. Of a
  // row below e^-60 everywhere the epsilon stays behind, so that it still tells its experts apart.
  const best = maxLast(fixed); // [tokens, 1]
  const scaled = exp(sub(fixed, best)); // [tokens, experts]
  const a = present ? where(present, scaled, 0) : scaled;
  const share = mul(exp(minimum(neg(best), 60)), epsilon); // [tokens, 1]
  // A row of zeros without its epsilon would divide by 0.
  const floor = present ? where(present, share, 1) : share;
  const real = mask ? maximum(sum(mask), 1) : full(logits, [], Math.max(tokens, 1));

  let d1 = full(logits, [experts, 1], 1);
  let d0 = full(logits, [tokens, 1], 0);
  let open = full(logits, [], 1); // 1 until the tolerance is met
  let counted = full(logits, [], 0);
  for (let i = 0; i < iterations; i++) {
    const nextD0 = div(1, mul(add(matmul(a, d1), floor), real));
    const nextD1 = div(1 / experts, add(matmul(a, nextD0, { transposeA: true }), epsilon));
    const change = sub(nextD1, d1);
    counted = add(counted, open);
    d0 = where(open, nextD0, d0);
    d1 = where(open, nextD1, d1);
    open = mul(open, less(tolerance, mean(maximum(change, neg(change)))));
  }
  return { plan: mul(mul(a, d0), transpose(d1, [1, 0])), iterations: counted };
}

function checkEpsilon(epsilon: number): void {
  if (!(epsilon > 0)) throw new ShapeError(`sinkhorn: epsilon = ${epsilon}; expected a number above 0, such as 1e-8`);
}

function checkIterations(iterations: number): void {
  if (!Number.isInteger(iterations) || iterations < 1) {
    throw new ShapeError(`sinkhorn: iterations = ${iterations}; expected a whole number from 1`);
  }
}

export const card: RouterCard = {
  name: "sinkhorn",
  title: "Sinkhorn: balanced assignment by optimal transport (S-BASE)",
  paper: "2202.01169",
  equations: "S-BASE, as Megatron-LM computes it",
  needs: [],
  causal: "evaluation",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width, in training two products tokens x experts for each iteration",
  claim: "scales better than hash and reinforced routing, to hundreds of experts, without a balance loss",
  ourChoices: [
    "a fixed number of iterations, 10, those after the tolerance frozen, so that no device is waited for",
    "rows are scaled by their largest entry before the exponential, which leaves the plan as it is",
    "padding has no mass",
    "initial weights N(0, 0.02²)",
  ],
};
