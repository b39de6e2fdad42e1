// MoE-FFD (2404.08452, sections 3.2-3.4), the routing of a frozen vision transformer that learns to tell forged faces: noisy top-1
// gating (1701.06538) with weights of zero, in two places.
//   level "token": every token has its expert; for LoRA experts of several ranks on the fused projection of the attention
//   level "image": all tokens of an image go to the expert that the mean of its tokens chooses; for convolution adapters of several
//                  kinds, which see the whole image (`convAdapter`)
//   loss per layer = CV(importance)² + CV(load)², over tokens or over images, with sample variances
//   total = cross entropy + 200 Σ of the token layers' + 1 Σ of the image layers'
// With k = 1 the softmax over one logit is 1: the gate learns from the load alone.
import {
  div,
  hostConstant,
  less,
  maximum,
  mul,
  reshape,
  sum,
  type Tensor,
  type Tree,
  takeRows,
  UnsupportedError,
  where,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { noisyTopK } from "./noisy-top-k.ts";
import { checkK, checkNotNegative, checkWord, maskOf, type RouterCard } from "./parts.ts";

export interface MoEFFDOptions {
  /** Who chooses: each token, or each image by the mean of its tokens; default "token". */
  readonly level?: "token" | "image";
  /** Experts per token or image; default 1. */
  readonly k?: number;
  /** Added to the softplus, the least deviation of the noise; above 0, default 0.01. */
  readonly noiseFloor?: number;
  /** Weight of the importance loss; default 200 for tokens, 1 for images. */
  readonly importance?: number;
  /** Weight of the load loss; default 200 for tokens, 1 for images. */
  readonly load?: number;
  /** Where both weights start; default "zero". "normal": N(0, 0.02²). */
  readonly start?: "zero" | "normal";
}

/**
 * Noisy top-k over tokens or over images; an image is a row of the batch. Params: `weight [experts, width]`, `noise [experts, width]`.
 * Losses, in training: `importance` and `load`. At level "image" the plugin is `perSample`, so that spatial experts go with it; it is
 * not causal there, and `route` throws UnsupportedError after cached tokens and for a layout that puts several samples into one row.
 * `init` throws ShapeError when k is not in 1..experts.
 *
 * @example moeFFD({ level: "image" })
 */
export function moeFFD(options: MoEFFDOptions = {}): RouterPlugin {
  const { level = "token", k = 1, noiseFloor = 0.01, start = "zero" } = options;
  checkWord("moeFFD", "level", level, ["token", "image"]);
  const perImage = level === "image";
  const { importance = perImage ? 1 : 200, load = perImage ? 1 : 200 } = options;
  checkNotNegative("moeFFD", { noiseFloor, importance, load });
  const gate = noisyTopK({ k, noiseFloor, importance, load, start, sampleVariance: true });

  return {
    ...gate,
    name: "moeFFD",
    causal: { training: !perImage, evaluation: !perImage },
    perSample: perImage,
    options: { level, k, noiseFloor, importance, load, start },
    init(context) {
      checkK("moeFFD", k, context.experts);
      const router = gate.init(context);
      if (!perImage) return router;
      return { ...router, route: (params, input) => byImage(params, input, router.route) };
    },
  };
}

/** Lets every row of the batch choose by the mean of its tokens. */
function byImage(params: Tree, input: RouterInput, route: (params: Tree, input: RouterInput) => Routed): Routed {
  const { hidden, layout } = input;
  const { batch, sequence, past, samples } = layout;
  if (past > 0 || samples !== undefined) {
    throw new UnsupportedError(
      `moeFFD: level "image" takes the mean of each row of the batch, ${
        past > 0 ? `but ${past} tokens are in the cache already` : "but the layout names the sample of each token"
      }; give it one whole image per row`,
    );
  }
  const { mask } = maskOf(input);
  const [, width = 0] = hidden.shape;
  const images = reshape(hidden, [batch, sequence, width]);
  const real = mask && reshape(mask, [batch, sequence, 1]);
  const total = sum(real ? where(real, images, 0) : images, [1]); // [batch, width]
  const tokens = real && sum(real, [1]); // [batch, 1]
  const means = tokens ? div(total, maximum(tokens, 1)) : mul(total, 1 / Math.max(sequence, 1));
  const present = tokens && less(0, tokens); // [batch, 1]: an image of nothing but padding has no expert
  const { plan, logits, probabilities, losses } = route(params, {
    ...input,
    hidden: means,
    layout: { batch, sequence: 1, past: 0, ...(present ? { mask: present } : {}) },
  });
  if (plan.kind !== "sparse") throw new UnsupportedError(`moeFFD: a sparse plan was expected, found "${plan.kind}"`);
  const image = hostConstant(
    hidden,
    Int32Array.from({ length: batch * sequence }, (_, t) => Math.floor(t / sequence)),
    [batch * sequence],
  );
  const each = (x: Tensor): Tensor => takeRows(x, image); // [batch, n] -> [batch * sequence, n]
  const spread = { kind: "sparse", experts: each(plan.experts), weights: each(plan.weights) } as const;
  return {
    plan: mask ? maskPlan(spread, mask) : spread,
    ...(logits ? { logits: each(logits) } : {}),
    ...(probabilities ? { probabilities: each(probabilities) } : {}),
    losses,
  };
}

export const card: RouterCard = {
  name: "moeFFD",
  title: "MoE-FFD: noisy top-1 by token or by image",
  paper: "2404.08452",
  equations: "noisy top-1 and its losses; per token for LoRA experts, per image for convolution adapters",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], noise [experts, width]",
  cost: "one product experts x width per token or image, in training two",
  claim: "state-of-the-art generalisation in face forgery detection with few trained parameters",
  ourChoices: [
    "the weights 200 and 1 of the total loss belong to the layers here, and split evenly over importance and load",
    'level "image" is not causal; an image is a row of the batch, padding enters no mean',
    "k above 1 is possible",
  ],
};
