// GRIN (2409.12136): experts are sampled, SparseMixer-v2 estimates the gradient of that choice. v1: 2310.00811.
// For each of the k picks, over the scores s without the experts picked before:
//   e drops out where (max s - s_e) / max(|s_e|, max s) > 2 r;  p = softmax(what is left)
//   training: e* = argmax(s - ln Exp(1)), a Gumbel sample of p; evaluation: e* = argmax s
//   weight m = h p_e*;  h = 1 where e* is the best or u > 3/4, else 1/3 (Heun's third order; v1: u > 1/2, else 1/2)
//   backward, with g the gradient of m: ds = g p_e* (1[e = e*] - p), without h (v1: twice that)
// The balance loss E Σ f P counts the sampled experts, over the global batch where the trainer supplies that.
import {
  affine,
  concat,
  type Engine,
  gatherLast,
  isTensor,
  less,
  linear,
  log,
  maximum,
  maxLast,
  mul,
  neg,
  oneHot,
  reshape,
  ShapeError,
  softmax,
  stopGradient,
  straightThrough,
  sub,
  type Tensor,
  type Tree,
  topkIndices,
  UnsupportedError,
  where,
} from "@switchyard/core";
import { type Experts, maskPlan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export interface GrinOptions {
  /** Experts per token, each sampled without those before; default 2. */
  readonly k?: number;
  /** Default "v2". */
  readonly version?: SparseMixerVersion;
  /** r: how far below the best an expert may score, relative to it, and still be sampled; default 0.1. */
  readonly jitter?: number;
  /** Weight of the balance loss, with the f summing to k; default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

export type SparseMixerVersion = "v1" | "v2";

/**
 * Each token samples its k experts in training and takes the best ones in evaluation; the weights are not divided by
 * their sum. Params: `weight [experts, width]`. For v1 give the layer `scaledExperts` of @switchyard/routers/grin.
 * `init` throws ShapeError when k is not in 1..experts.
 *
 * @example grin({ k: 2, jitter: 0.1 })
 */
export function grin(options: GrinOptions = {}): RouterPlugin {
  const { k = 2, version = "v2", jitter = 0.1, balance = 0.01, zLoss = 0 } = options;
  checkNotNegative("grin", { jitter, balance, zLoss });
  checkWord("grin", "version", version, ["v1", "v2"]);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const [tokens = 0, experts = 0] = logits.shape;
    // Drawn pick by pick, so that the noise of a token does not depend on how many tokens come after it.
    const noise = Array.from({ length: input.training ? k : 0 }, (_, pick) => ({
      exponential: input.random.at(input.layer, "sample", pick).exponential([tokens, experts]),
      uniform: input.random.at(input.layer, "midpoint", pick).uniform([tokens, 1]),
    }));
    const mixed = sparseMixer(logits, { k, jitter, version, ...(input.training ? { noise } : {}) });
    const plan = { kind: "sparse", experts: mixed.experts, weights: mixed.weights } as const;
    const probabilities = softmax(logits); // [tokens, experts]
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts: mixed.experts, balance, zLoss }),
    };
  };

  return {
    name: "grin",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { k, version, jitter, balance, zLoss },
    expertsPerToken: k,
    init(context) {
      checkK("grin", k, context.experts);
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

/** The draws of one pick. */
export interface SparseMixerNoise {
  /** Exp(1), `[tokens, experts]`. */
  readonly exponential: Tensor;
  /** In [0, 1), `[tokens, 1]`. */
  readonly uniform: Tensor;
}

export interface SparseMixed {
  /** i32 `[tokens, k]`. */
  readonly experts: Tensor;
  /** `[tokens, k]`, with the estimator's gradient to the scores. */
  readonly weights: Tensor;
  /** `[tokens, k]`: 1 where h = 1, else 0. */
  readonly whole: Tensor;
  /** p of each pick, `[tokens, experts]`, without gradient. */
  readonly probabilities: readonly Tensor[];
}

/**
 * SparseMixer over `scores [tokens, experts]`: picks and weights. Without `noise`, the best experts are taken, as in
 * evaluation. Throws ShapeError unless there is noise for every pick.
 */
export function sparseMixer(
  scores: Tensor,
  options: {
    readonly k: number;
    readonly jitter: number;
    readonly version: SparseMixerVersion;
    readonly noise?: readonly SparseMixerNoise[];
  },
): SparseMixed {
  const { k, jitter, version, noise } = options;
  if (noise && noise.length !== k) {
    throw new ShapeError(`sparseMixer: noise for ${noise.length} picks, expected one of each of the ${k}`);
  }
  const [, count = 0] = scores.shape;
  let open = scores; // without the experts already picked
  const picks = Array.from({ length: k }, (_, i) => {
    const pick = onePick(scores, open, { jitter, version, ...(noise?.[i] ? { noise: noise[i] } : {}) });
    const taken = reshape(oneHot(pick.expert, count), scores.shape);
    open = where(taken, Number.NEGATIVE_INFINITY, open);
    return pick;
  });
  const columns = (of: (pick: (typeof picks)[number]) => Tensor): Tensor => concat(picks.map(of), 1); // [tokens, k]
  return {
    experts: columns(({ expert }) => expert),
    weights: columns(({ weight }) => weight),
    whole: columns(({ whole }) => whole),
    probabilities: picks.map(({ probabilities }) => stopGradient(probabilities)),
  };
}

function onePick(
  scores: Tensor,
  open: Tensor,
  {
    jitter,
    version,
    noise,
  }: { readonly jitter: number; readonly version: SparseMixerVersion; readonly noise?: SparseMixerNoise },
): Record<"expert" | "weight" | "whole" | "probabilities", Tensor> {
  const best = maxLast(open); // [tokens, 1]
  const scale = maximum(maximum(scores, neg(scores)), best); // never negative: the ratio need not be divided out
  const far = less(mul(scale, 2 * jitter), sub(best, scores)); // [tokens, experts]
  const left = where(far, Number.NEGATIVE_INFINITY, open);
  const probabilities = softmax(left);
  const first = topkIndices(left, 1); // [tokens, 1]
  // An exponential of exactly 0 would make -inf - -inf of an expert that is out.
  const expert = noise ? topkIndices(sub(left, log(maximum(noise.exponential, 1e-9))), 1) : first;
  const isFirst = sub(sub(1, less(expert, first)), less(first, expert));
  const threshold = version === "v2" ? 0.75 : 0.5;
  const whole = noise ? maximum(isFirst, less(threshold, noise.uniform)) : isFirst; // [tokens, 1]
  // The released code writes 0.3333 and 0.6667.
  const part = version === "v2" ? 0.3333 : 0.5;
  const chosen = gatherLast(probabilities, expert);
  // The slope of the chosen probability is p_e* (1[e = e*] - p).
  const slope = version === "v2" ? chosen : mul(chosen, 2);
  const weight = straightThrough(mul(chosen, affine(whole, { scale: 1 - part, shift: part })), slope);
  return { expert, weight, whole, probabilities };
}

/**
 * The experts of v1 (2310.00811): each output is multiplied by a learned `omega [width]`, ones at the start, which
 * stands under `shared` of the parameters.
 */
export function scaledExperts(experts: Experts, options: { readonly engine: Engine; readonly width: number }): Experts {
  const { engine, width } = options;
  const { params, count, stream } = experts;
  const shared = branch(params, "shared");
  if (isTensor(params) || (shared !== undefined && isTensor(shared))) {
    throw new ShapeError("scaledExperts: the parameters are a single tensor; expected them by name");
  }
  if (stream) throw new UnsupportedError("scaledExperts: the experts are streamed; load them into memory");
  const omega = engine.tensor(new Float32Array(width).fill(1), [width]);
  return {
    count,
    params: { ...params, shared: { ...shared, omega } },
    apply(given, rows, ends, layout, observe) {
      const result = experts.apply(given, rows, ends, layout, observe);
      return { ...result, output: mul(result.output, leaf(branch(given, "shared") ?? {}, "omega")) };
    },
  };
}

const branch = (tree: Tree, name: string): Tree | undefined =>
  isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];

export const card: RouterCard = {
  name: "grin",
  title: "GRIN: sampled experts with SparseMixer's gradient, v2 and v1",
  paper: "2409.12136",
  equations: "SparseMixer-v2 as in the released code; v1: 2310.00811",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; v1 also omega [width] beside the experts",
  cost: "one product experts x width, k softmaxes over the experts",
  claim: "GRIN MoE 16 x 3.8B, 6.6B active, beats a dense 7B model and equals a dense 14B one trained on the same data",
  ourChoices: [
    "any k: the released code has 1 and 2",
    "one third is written 0.3333, as in the released code",
    "the balance loss has the weight 0.01; it counts over the global batch only where the trainer supplies that load",
    "ties go to the lower expert",
  ],
};
