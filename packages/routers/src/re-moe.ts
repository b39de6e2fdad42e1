// ReMoE (2412.14711): a ReLU in place of top-k. Differentiable throughout; how many experts a token gets is learned.
//   g = relu(x Wᵀ), y = Σ_e g_e E_e(x)                             section 3.2: no top-k, no normalisation
//   lambda ← lambda alpha while S < 1 - k/E, else lambda / alpha   section 3.3, after each step; S = share of idle pairs
//   loss = lambda Σ_e f_e mean_t(g_te), f_e = E count_e / (k T)    section 3.4: L1, heavier on experts in use
// The update compares with `<`, as the authors' code does; a sign() as in the text would keep lambda when both are equal.
import {
  div,
  hostConstant,
  less,
  linear,
  maximum,
  mul,
  relu,
  ShapeError,
  stopGradient,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type StepStatistics,
} from "@switchyard/core/moe";
import { checkK, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface ReMoEOptions {
  /** Experts per token that lambda aims at, on average over tokens and layers. */
  readonly k: number;
  /** Where lambda starts; default 1e-8. */
  readonly lambda?: number;
  /** Factor of one step of lambda, above 1; default 1.2. */
  readonly alpha?: number;
}

/**
 * Each token takes the experts whose gate is positive, from none to all. Params: `weight [experts, width]`. Buffers:
 * `lambda` [], alike in all layers because it follows from the mean over them. Training starts almost dense (about half
 * of the experts) and thins out over the first hundreds of steps, so memory peaks early. `probabilities` are the gates
 * divided by their sum, for metrics only.
 * `init` throws ShapeError when k is not in 1..experts.
 *
 * @example reMoE({ k: 2 })
 */
export function reMoE({ k, lambda = 1e-8, alpha = 1.2 }: ReMoEOptions): RouterPlugin {
  if (!(lambda > 0) || !Number.isFinite(lambda))
    throw new ShapeError(`reMoE: lambda = ${lambda}; expected a number above 0`);
  if (!(alpha > 1) || !Number.isFinite(alpha))
    throw new ShapeError(`reMoE: alpha = ${alpha}; expected a number above 1`);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const [, experts = 0] = logits.shape;
    const { mask } = maskOf(input);
    const gates = relu(logits); // [tokens, experts]
    const active = less(0, gates);
    const ids = hostConstant(
      logits,
      Int32Array.from({ length: experts }, (_, e) => e),
      [1, experts],
    );
    const plan = { kind: "sparse", experts: where(active, ids, -1), weights: gates } as const;
    const shares = stopGradient(div(gates, maximum(sumLast(gates), 1e-20)));
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities: shares,
      losses: input.training ? { sparsity: sparsityLoss(gates, active, { k, input }) } : {},
      // A copy: whoever frees the metrics must not free the buffer.
      metrics: { lambda: mul(leaf(input.buffers, "lambda"), 1) },
    };
  };

  return {
    name: "reMoE",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits"],
    options: { k, lambda, alpha },
    expertsPerToken: k,
    init(context) {
      const { engine, experts } = context;
      checkK("reMoE", k, experts);
      return {
        params: { weight: normalWeight(context) },
        buffers: { lambda: engine.tensor(Float64Array.of(lambda), []) },
        score,
        select,
        route: (params, input) => select(score(params, input), input),
        afterStep(layers, buffers) {
          const seen = layers.filter(({ tokens }) => tokens > 0);
          if (seen.length === 0) return buffers;
          const factor = idleShare(seen, experts) < 1 - k / experts ? alpha : 1 / alpha;
          return { lambda: mul(leaf(buffers, "lambda"), factor) };
        },
      };
    },
  };
}

/** lambda Σ_e f_e mean_t(g_te); f without gradient, from the whole step where the trainer knows it. */
function sparsityLoss(
  gates: Tensor,
  active: Tensor,
  { k, input }: { readonly k: number; readonly input: RouterInput },
): Loss {
  const { mask } = maskOf(input);
  const [, experts = 0] = gates.shape;
  const load = input.globalLoad ?? meanOverTokens(active, mask); // [experts], tokens per token
  const penalty = sum(mul(mul(load, experts / k), meanOverTokens(gates, mask)));
  return { value: mul(penalty, leaf(input.buffers, "lambda")), weight: 1 };
}

/** 1 - active pairs / (tokens * experts), mean over the layers. */
function idleShare(layers: readonly StepStatistics[], experts: number): number {
  const idle = layers.map(({ load, tokens }) => 1 - load.reduce((total, n) => total + n, 0) / (tokens * experts));
  return idle.reduce((total, share) => total + share, 0) / layers.length;
}

export const card: RouterCard = {
  name: "reMoE",
  title: "ReMoE: ReLU routing",
  paper: "2412.14711",
  equations: "sections 3.2-3.4",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; buffer lambda []",
  cost: "one product experts x width; experts per token vary around k, and start at about half of all",
  claim: "better than top-k at every model size, number of experts and granularity tried",
  ourChoices: [
    "initial weights N(0, 0.02²)",
    "every layer keeps its own copy of lambda, updated from the mean over all layers",
    "a step without tokens leaves lambda alone",
  ],
};
