// Tempered top-k: every token chooses how sharp its weights are.
//   l = x Wᵀ / τ(x), τ(x) = softplus(x vᵀ) + floor; experts and weights are the k largest l and their softmax
// One temperature for all logits of a token changes no order: it decides between one expert and an even mixture.
import {
  add,
  div,
  isTensor,
  linear,
  ShapeError,
  softmaxTopk,
  softplus,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import {
  defineRouter,
  maskPlan,
  type Router,
  type RouterContext,
  zLoss as squaredLogSum,
  tokenMask,
} from "@switchyard/core/moe";

/** Params: `weight [experts, width]`, `temperature [1, width]`. */
export const tempered = defineRouter({
  name: "tempered",
  options: {
    /** Experts per token. */
    k: 2,
    /** The least temperature, above 0. */
    floor: 0.1,
    /** Weight of the z-loss, which keeps temperatures from sinking for nothing; 0: none. */
    zLoss: 0.001,
  },

  plugin({ k, floor, zLoss }) {
    if (!(floor > 0)) throw new ShapeError(`tempered: floor = ${floor}; expected a number above 0`);
    if (!(zLoss >= 0)) throw new ShapeError(`tempered: zLoss = ${zLoss}; expected a number from 0`);
    return {
      causal: { training: true, evaluation: true },
      needs: [],
      plans: ["sparse"],
      gives: ["scores", "logits", "probabilities", "choices"],
      expertsPerToken: k,

      init(context) {
        const { experts } = context;
        if (!Number.isInteger(k) || k < 1 || k > experts) {
          throw new ShapeError(
            `tempered: k = ${k} of ${experts} experts; expected a whole number from 1 to ${experts}`,
          );
        }
        const score = (params: Tree, { hidden }: { readonly hidden: Tensor }): Tensor => {
          const temperature = add(softplus(linear(hidden, leaf(params, "temperature"))), floor); // [tokens, 1]
          return div(linear(hidden, leaf(params, "weight")), temperature); // [tokens, experts]
        };
        const select: NonNullable<Router["select"]> = (logits, { layout, training }) => {
          const { ids, weights, probabilities } = softmaxTopk(logits, { k, order: "topk-softmax" }); // [tokens, k]
          const plan = { kind: "sparse", experts: ids, weights } as const;
          const mask = tokenMask(layout);
          return {
            plan: mask ? maskPlan(plan, mask) : plan,
            logits,
            probabilities,
            losses: training && zLoss > 0 ? { zLoss: { value: squaredLogSum(logits, mask), weight: zLoss } } : {},
          };
        };
        return {
          params: { weight: normal(context, "weight", experts), temperature: normal(context, "temperature", 1) },
          buffers: {},
          score,
          select,
          route: (params, input) => select(score(params, input), input),
        };
      },
    };
  },
});

/** `[rows, width]`, N(0, 0.02²), drawn under its name. */
function normal({ engine, random, width }: RouterContext, name: string, rows: number): Tensor {
  const draws = random.at(name).host("normal", rows * width);
  return engine.tensor(
    draws.map((z) => 0.02 * z),
    [rows, width],
  );
}

function leaf(tree: Tree, name: string): Tensor {
  const found = isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
  if (found === undefined || !isTensor(found)) throw new ShapeError(`tempered: there is no tensor "${name}"`);
  return found;
}
