// MoA (2506.05928): one router for all adapters of a block, which may be of different kinds; none competes with another.
//   logits = W2 (silu(W1 x + b1) ⊙ (W3 x + b3)) + b2, 4 hidden numbers per adapter, or W x + b; g = sigmoid(logits)
//   soft: y = Σ_e g_e E_e(x), every adapter on every token
//   sparse: θ = 0.5 sigmoid(w x + b), or a constant; the adapters with g_e >= θ, weights g_e as they are (not g_e - θ)
// No loss of its own. As in the released code.
import {
  affine,
  div,
  hostConstant,
  less,
  linear,
  maximum,
  mul,
  reshape,
  ShapeError,
  sigmoid,
  silu,
  stopGradient,
  sumLast,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  maskPlan,
  meanOverTokens,
  type Plan,
  type Routed,
  type Router,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import { checkWord, leaf, maskOf, type RouterCard } from "./parts.ts";

export interface MoAOptions {
  /** "soft" runs every adapter on every token; default "sparse". */
  readonly mode?: "soft" | "sparse";
  /** Least weight of an adapter that runs, sparse only: of each token by itself, or one number from 0 to 1; default "learned". */
  readonly threshold?: "learned" | number;
  /** Largest value of a learned threshold, above 0 and at most 1; default 0.5. */
  readonly maxThreshold?: number;
  /** "gated": the two-layer network; "linear": one matrix. Default "gated". */
  readonly logits?: "gated" | "linear";
  /** Hidden numbers of the gated network per adapter; default 4. */
  readonly hiddenPerExpert?: number;
}

/**
 * Every adapter gets a weight of its own in 0..1, so that all, some or none of them run for a token. Params: `w1`, `w3`
 * `[hidden, width]`, `b1`, `b3 [hidden]`, `w2 [experts, hidden]`, `b2 [experts]`, hidden = `hiddenPerExpert` experts, or
 * `weight [experts, width]`, `bias [experts]`; with a learned threshold also `threshold [1, width]` and `thresholdBias [1]`.
 * No gradient reaches the threshold: it decides only whether, and weights do not depend on it; it stays where it starts
 * unless something else moves it. For adapters that sit at different places of a block, route once and hand each
 * its part of the plan (`planPart` of @switchyard/core/experts).
 * Throws ShapeError for options out of range.
 *
 * @example moa({ mode: "sparse", threshold: 0.5 })
 */
export function moa(options: MoAOptions = {}): RouterPlugin {
  const { mode = "sparse", threshold = "learned", maxThreshold = 0.5, logits = "gated", hiddenPerExpert = 4 } = options;
  checkWord("moa", "mode", mode, ["soft", "sparse"]);
  checkWord("moa", "logits", logits, ["gated", "linear"]);
  if (threshold !== "learned" && !(threshold >= 0 && threshold <= 1))
    throw new ShapeError(`moa: threshold = ${threshold}; expected "learned" or a number from 0 to 1`);
  if (!(maxThreshold > 0 && maxThreshold <= 1))
    throw new ShapeError(`moa: maxThreshold = ${maxThreshold}; expected a number above 0 and at most 1`);
  if (!Number.isInteger(hiddenPerExpert) || hiddenPerExpert < 1)
    throw new ShapeError(`moa: hiddenPerExpert = ${hiddenPerExpert}; expected a whole number from 1`);
  if (mode === "soft" && options.threshold !== undefined)
    throw new ShapeError('moa: mode "soft" has no threshold, every adapter runs; leave it out or take mode "sparse"');
  const learned = mode === "sparse" && threshold === "learned";

  const score = (params: Tree, { hidden }: RouterInput): Tensor => moaLogits(params, hidden);
  const decide = (scores: Tensor, input: RouterInput, least?: Tensor | number): Routed => {
    const { mask } = maskOf(input);
    const gates = sigmoid(scores); // [tokens, experts]
    const plan: Plan = least === undefined ? { kind: "dense", weights: gates } : kept(gates, least);
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits: scores,
      // For metrics only: the gates are no distribution.
      probabilities: stopGradient(div(gates, maximum(sumLast(gates), 1e-20))),
      losses: {},
      ...(typeof least === "object" ? { metrics: { threshold: reshape(meanOverTokens(least, mask), []) } } : {}),
    };
  };
  const halves: Partial<Router> = learned
    ? {}
    : { score, select: (scores, input) => decide(scores, input, mode === "soft" ? undefined : Number(threshold)) };

  return {
    name: "moa",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: [mode === "soft" ? "dense" : "sparse"],
    gives: learned ? ["logits"] : ["scores", "logits"],
    options: { mode, threshold: mode === "soft" ? null : threshold, maxThreshold, logits, hiddenPerExpert },
    init({ engine, experts, width, random }) {
      const inner = hiddenPerExpert * experts;
      /** Uniform within 1/sqrt(inputs), weights and bias. */
      const layer = (names: readonly [string, string], [out, inputs]: readonly [number, number]): Tree => {
        const draw = (name: string, shape: readonly number[]): Tensor =>
          engine.tensor(
            random
              .at(name)
              .host(
                "uniform",
                shape.reduce((n, d) => n * d, 1),
              )
              .map((u) => (2 * u - 1) / Math.sqrt(inputs)),
            shape,
          );
        return { [names[0]]: draw(names[0], [out, inputs]), [names[1]]: draw(names[1], [out]) };
      };
      const network =
        logits === "linear"
          ? layer(["weight", "bias"], [experts, width])
          : {
              ...layer(["w1", "b1"], [inner, width]),
              ...layer(["w3", "b3"], [inner, width]),
              ...layer(["w2", "b2"], [experts, inner]),
            };
      return {
        params: { ...network, ...(learned ? layer(["threshold", "thresholdBias"], [1, width]) : {}) },
        buffers: {},
        ...halves,
        route(params, input) {
          const scores = score(params, input);
          if (mode === "soft") return decide(scores, input);
          return decide(scores, input, learned ? moaThreshold(params, input.hidden, maxThreshold) : Number(threshold));
        },
      };
    },
  };
}

/** The logits of `hidden [tokens, width]`, `[tokens, experts]`: gated where the parameters have `w1`, else linear. */
export function moaLogits(params: Tree, hidden: Tensor): Tensor {
  if (!("w1" in params)) return linear(hidden, leaf(params, "weight"), leaf(params, "bias"));
  const gate = silu(linear(hidden, leaf(params, "w1"), leaf(params, "b1"))); // [tokens, hidden]
  const value = linear(hidden, leaf(params, "w3"), leaf(params, "b3"));
  return linear(mul(gate, value), leaf(params, "w2"), leaf(params, "b2"));
}

/** The learned threshold of `hidden [tokens, width]`: `[tokens, 1]`, between 0 and `most`, without gradient. */
export function moaThreshold(params: Tree, hidden: Tensor, most = 0.5): Tensor {
  const raw = linear(hidden, leaf(params, "threshold"), leaf(params, "thresholdBias"));
  return stopGradient(mul(sigmoid(raw), most));
}

/** The adapters whose gate is not below the least one, a slot for each. */
function kept(gates: Tensor, least: Tensor | number): Plan {
  const [, experts = 0] = gates.shape;
  const runs = affine(less(gates, least), { scale: -1, shift: 1 });
  const ids = hostConstant(
    gates,
    Int32Array.from({ length: experts }, (_, e) => e),
    [1, experts],
  );
  return { kind: "sparse", experts: where(runs, ids, -1), weights: where(runs, gates, 0) };
}

export const card: RouterCard = {
  name: "moa",
  title: "MoA: a weight of its own for every adapter, soft or above a threshold",
  paper: "2506.05928",
  equations: "soft and sparse routing, as in the released code",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "w1, w3 [4 experts, width], w2 [experts, 4 experts], biases; threshold [1, width] and its bias",
  cost: "two products 4 experts x width and one experts x 4 experts; none to all experts per token, soft always all",
  claim: "adapters of different kinds beat mixtures of LoRA in accuracy and parameters; sparse loses next to nothing",
  ourChoices: [
    "initial weights and biases uniform within 1/sqrt(inputs), for the linear form and the threshold too",
    "the linear form has a bias",
    "the threshold gets no gradient, as weights do not depend on it",
  ],
};
