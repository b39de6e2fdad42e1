// Loss-free balancing (2408.15664): top-k on scores plus a bias that no gradient touches.
//   s = sigmoid(x Wᵀ); the experts are the top k of s + b, their weights are s without b, divided by their sum
//   after each step b_e ← b_e + rate * sign(mean load - load_e)                                 algorithm 1
import {
  add,
  div,
  gatherLast,
  isTensor,
  linear,
  ShapeError,
  sigmoid,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import { maskPlan, type RouterPlugin, tokenMask } from "@switchyard/core/moe";

export interface LossFreeOptions {
  /** Experts per token. */
  readonly k: number;
  /** Step of the bias; default 0.001. */
  readonly rate?: number;
}

/** Top-k whose loads are balanced by a bias. Params: `weight [experts, width]`; buffers: `bias [experts]`. */
export function lossFree({ k, rate = 0.001 }: LossFreeOptions): RouterPlugin {
  return {
    name: "lossFree",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    options: { k, rate },
    expertsPerToken: k,

    init({ engine, width, experts, random, layer }) {
      if (k < 1 || k > experts) throw new ShapeError(`lossFree: k = ${k} of ${experts} experts`);
      const start = random.at("weight").host("normal", experts * width);
      return {
        params: {
          weight: engine.tensor(
            start.map((z) => z * 0.02),
            [experts, width],
          ),
        },
        buffers: { bias: engine.tensor(new Float32Array(experts), [experts]) },

        route(params, { hidden, layout, buffers }) {
          const logits = linear(hidden, leaf(params, "weight")); // [tokens, experts]
          const scores = sigmoid(logits);
          const ids = topkIndices(add(scores, leaf(buffers, "bias")), k); // [tokens, k]
          const chosen = gatherLast(scores, ids);
          const plan = { kind: "sparse", experts: ids, weights: div(chosen, sumLast(chosen)) } as const;
          const mask = tokenMask(layout);
          return {
            plan: mask ? maskPlan(plan, mask) : plan,
            logits,
            probabilities: div(scores, sumLast(scores)),
            losses: {},
          };
        },

        afterStep(layers, buffers) {
          const load = layers[layer]?.load ?? new Float64Array(experts);
          const mean = load.reduce((total, tokens) => total + tokens, 0) / experts;
          const step = load.map((tokens) => rate * Math.sign(mean - tokens));
          return { bias: add(leaf(buffers, "bias"), engine.tensor(step, [experts])) };
        },
      };
    },
  };
}

function leaf(tree: Tree, name: string): Tensor {
  const found = isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
  if (found === undefined || !isTensor(found)) throw new ShapeError(`lossFree: no tensor "${name}"`);
  return found;
}
