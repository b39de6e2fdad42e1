// Noisy top-k gating, the first large Mixture of Experts (1701.06538, sections 2.1 and 4, appendix A):
//   H = x W_gᵀ + ε ⊙ σ, σ = softplus(x W_nᵀ) + 0.01, ε ~ N(0, 1) in training only        eqs. 3-4
//   G = softmax over the k largest H, 0 elsewhere                                         eqs. 3, 5
//   importance = Σ_t G, L_importance = CV(importance)²                                    eqs. 6-7
//   P_te = Φ((x W_gᵀ - θ_te) / σ), θ = the k-th largest H of the other experts            eqs. 8-9
//   load = Σ_t P_t, L_load = CV(load)²: smooth, so that it tells W_g and W_n how to even out the loads   eqs. 10-11
// CV² is the variance over the squared mean. In evaluation H has no noise.
import {
  add,
  affine,
  div,
  erf,
  full,
  gatherLast,
  less,
  linear,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  slice,
  softmaxTopk,
  softplus,
  sub,
  sum,
  type Tensor,
  type Tree,
  topkIndices,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  type Routed,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
  squaredCV,
} from "@switchyard/core/moe";
import { checkK, checkNotNegative, checkWord, leaf, maskOf, normalTensor, type RouterCard } from "./parts.ts";

export interface NoisyTopKOptions {
  /** Experts per token. */
  readonly k: number;
  /** Added to the softplus, the least deviation of the noise; above 0, default 0.01. */
  readonly noiseFloor?: number;
  /** Weight of the importance loss; default 0.1. */
  readonly importance?: number;
  /** Weight of the load loss; default 0.1. */
  readonly load?: number;
  /** Divides the variances by experts - 1, as the PyTorch ports do; default false: by experts, as the original. */
  readonly sampleVariance?: boolean;
  /** Where both weights start; default "zero", so that noise alone decides at first. "normal": N(0, 0.02²). */
  readonly start?: "zero" | "normal";
}

/**
 * Each token takes the k experts of the largest noisy logits. Params: `weight [experts, width]`, `noise [experts, width]`.
 * Losses, in training: `importance` and `load`. `probabilities` are the softmax over all noisy logits, for metrics.
 * `init` throws ShapeError when k is not in 1..experts. With `start: "zero"` an untrained model sends every token to the
 * first k experts in evaluation.
 *
 * @example noisyTopK({ k: 2 })
 */
export function noisyTopK(options: NoisyTopKOptions): RouterPlugin {
  const { k, noiseFloor = 0.01, importance = 0.1, load = 0.1, sampleVariance = false, start = "zero" } = options;
  checkNotNegative("noisyTopK", { noiseFloor, importance, load });
  if (noiseFloor === 0) throw new ShapeError("noisyTopK: noiseFloor = 0; expected a number above 0, such as 0.01");
  checkWord("noisyTopK", "start", start, ["zero", "normal"]);

  const route = (params: Tree, input: RouterInput): Routed => {
    const { hidden, training, random, layer } = input;
    const { mask } = maskOf(input);
    const clean = linear(hidden, leaf(params, "weight")); // [tokens, experts]
    const deviation = training ? noiseDeviation(hidden, leaf(params, "noise"), noiseFloor) : undefined;
    const noisy = deviation ? add(clean, mul(random.at(layer, "noise").normal(clean.shape), deviation)) : clean;
    const { weights, ids, probabilities } = softmaxTopk(noisy, { k, order: "topk-softmax" }); // [tokens, k]
    const asked = { kind: "sparse", experts: ids, weights } as const;
    const plan = mask ? maskPlan(asked, mask) : asked;

    const losses = training
      ? noisyLosses({
          clean,
          noisy,
          ...(deviation ? { deviation } : {}),
          plan,
          k,
          ...(mask ? { mask } : {}),
          weights: { importance, load },
          sampleVariance,
        })
      : {};
    return { plan, logits: noisy, probabilities, losses };
  };

  return {
    name: "noisyTopK",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: { k, noiseFloor, importance, load, sampleVariance, start },
    expertsPerToken: k,
    init(context: RouterContext) {
      const { engine, experts, width } = context;
      checkK("noisyTopK", k, experts);
      const first = (name: string): Tensor =>
        start === "zero"
          ? engine.tensor(new Float32Array(experts * width), [experts, width])
          : normalTensor(context, name, [experts, width], 0.02);
      return { params: { weight: first("weight"), noise: first("noise") }, buffers: {}, route };
    },
  };
}

/** σ = softplus(hidden noiseᵀ) + floor: `[tokens, experts]` of hidden `[tokens, width]` and noise `[experts, width]`. */
export function noiseDeviation(hidden: Tensor, noise: Tensor, floor = 0.01): Tensor {
  return add(softplus(linear(hidden, noise)), floor);
}

export interface NoisyLosses extends Omit<ExpectedLoad, "deviation"> {
  /** Absent: without noise, where there is no expected load. */
  readonly deviation?: Tensor;
  /** Without padding. */
  readonly plan: SparsePlan;
  readonly weights: { readonly importance: number; readonly load: number };
  /** Divides the variances by experts - 1. */
  readonly sampleVariance: boolean;
}

/** CV² of importance and expected load (1701.06538, eqs. 6-11), each where its weight is not 0. */
export function noisyLosses(options: NoisyLosses): Record<string, Loss> {
  const { deviation, plan, weights, sampleVariance, ...rest } = options;
  const [, experts = 0] = rest.clean.shape;
  const unevenness = (x: Tensor): Tensor => squaredCV(x, { sample: sampleVariance });
  const losses: Record<string, Loss> = {};
  if (weights.importance !== 0) {
    const value = unevenness(sum(scatterLast(plan.weights, plan.experts, experts), [0]));
    losses.importance = { value, weight: weights.importance };
  }
  if (deviation && weights.load !== 0) {
    losses.load = { value: unevenness(expectedLoad({ ...rest, deviation })), weight: weights.load };
  }
  return losses;
}

export interface ExpectedLoad {
  /** Logits before the noise, `[tokens, experts]`, as the two that follow. */
  readonly clean: Tensor;
  /** Logits with the noise that was drawn. */
  readonly noisy: Tensor;
  /** Standard deviation of the noise. */
  readonly deviation: Tensor;
  readonly k: number;
  /** `[tokens]`, 1 = real token. */
  readonly mask?: Tensor;
}

/**
 * Expected tokens of each expert, `[experts]` (1701.06538, eqs. 8-10): Σ_t of the probability that the expert would be
 * among the k best of t if its own noise were drawn again. With k = experts that is 1 for every token.
 */
export function expectedLoad({ clean, noisy, deviation, k, mask }: ExpectedLoad): Tensor {
  const [tokens = 0, experts = 0] = clean.shape;
  const best = gatherLast(noisy, topkIndices(noisy, Math.min(k + 1, experts))); // [tokens, k + 1], descending
  let chance: Tensor;
  if (k >= experts) {
    chance = full(clean, clean.shape, 1);
  } else {
    const last = slice(best, [0, k - 1], [tokens, 1]);
    const next = slice(best, [0, k], [tokens, 1]);
    // The k-th largest without the expert itself: one further down for those that are among the k.
    const threshold = where(less(next, noisy), next, last);
    const z = div(sub(clean, threshold), deviation);
    chance = affine(erf(mul(z, Math.SQRT1_2)), { scale: 0.5, shift: 0.5 });
  }
  return sum(mask ? where(reshape(mask, [tokens, 1]), chance, 0) : chance, [0]);
}

export const card: RouterCard = {
  name: "noisyTopK",
  title: "Noisy top-k gating",
  paper: "1701.06538",
  equations: "3-11",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], noise [experts, width]",
  cost: "one product experts x width, in training two",
  claim:
    "over 1000 times the capacity of stacked LSTMs at a minor loss of speed; better language models at less compute",
  ourChoices: [
    "ties go to the lower expert; with weights of zero that is the first k experts in evaluation",
    "both losses have weight 0.1 unless told otherwise",
    "with k = all experts the expected load is one per token, without gradient",
    "the losses are those of the batch at hand, also where the load of several micro-batches is known",
    "the load needs clean and noisy logits, so that score and select are one",
  ],
};
