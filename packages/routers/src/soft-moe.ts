// Soft MoE (2308.00951): no choice at all. Every slot of an expert sees a mixture of all tokens of a sample,
// every token gets a mixture of what all slots give. Per sample, X [tokens, width], Φ [width, experts * slots]:
//   L = X Φ;  D = softmax of L over the tokens;  C = softmax of L over the slots
//   slots X~ = Dᵀ X, each through its expert;  Y = C Y~
// Normalised: rows of X and columns of Φ divided by sqrt(sum of squares + 1e-6), Φ times a learned scale.
// A token sees all others of its sample: for images, not for language models.
import {
  add,
  div,
  linear,
  mul,
  reshape,
  ShapeError,
  softmax,
  sqrt,
  square,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  transpose,
  UnsupportedError,
  where,
} from "@switchyard/core";
import type { Routed, RouterInput, RouterPlugin } from "@switchyard/core/moe";
import { leaf, maskOf, normalTensor, type RouterCard } from "./parts.ts";

export interface SoftMoEOptions {
  /** Slots of each expert; default 1. The cost is that of experts * slots tokens per sample. */
  readonly slots?: number;
  /** Normalises tokens and Φ, which wide models need; default true. */
  readonly normalise?: boolean;
  /** Scale of the normalised Φ at the start; default 1. */
  readonly scale?: number;
  /** Added to the sums of squares that rows are normalised by, from 0; default 1e-6. */
  readonly epsilon?: number;
  /**
   * Mixes single new tokens with each other when decoding with a cache, which is not how it was trained; default false.
   */
  readonly decoding?: boolean;
}

/**
 * Every row of the batch is one sample; its slots mix all its tokens. Params: `phi [experts, slots, width]` and, where
 * normalised, `scale []`. `route` throws UnsupportedError while decoding with a cache, unless `decoding` is true, and
 * for a layout that puts several samples into one row.
 *
 * @example softMoE({ slots: 4 })
 */
export function softMoE({
  slots = 1,
  normalise = true,
  scale = 1,
  epsilon = 1e-6,
  decoding = false,
}: SoftMoEOptions = {}): RouterPlugin {
  if (!Number.isInteger(slots) || slots < 1) {
    throw new ShapeError(`softMoE: slots = ${slots}; expected a whole number from 1`);
  }
  if (!Number.isFinite(scale) || scale === 0) {
    throw new ShapeError(`softMoE: scale = ${scale}; expected a finite number other than 0`);
  }

  if (!(epsilon >= 0)) throw new ShapeError(`softMoE: epsilon = ${epsilon}; expected a number from 0`);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => {
    const phi = leaf(params, "phi"); // [experts, slots, width]
    const [experts = 0, , width = 0] = phi.shape;
    const columns = reshape(phi, [experts * slots, width]);
    if (!normalise) return linear(hidden, columns); // [tokens, experts * slots]
    return linear(normalised(hidden, epsilon), mul(normalised(columns, epsilon), leaf(params, "scale")));
  };
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { batch, sequence, past, samples } = input.layout;
    if (past > 0 && !decoding) {
      throw new UnsupportedError(
        `softMoE: asked to route ${batch * sequence} new tokens after ${past} cached ones, but its slots mix all ` +
          "tokens of a sample; decode without a cache, or pass decoding: true to mix the new ones only",
      );
    }
    if (samples !== undefined) {
      throw new UnsupportedError(
        "softMoE: the layout names the sample of each token, but slots are per row of the batch; put one sample into " +
          "each row, padded, and leave layout.samples out",
      );
    }
    const [, all = 0] = logits.shape; // experts * slots
    const { mask } = maskOf(input);
    const perSample = reshape(logits, [batch, sequence, all]);
    const real = mask && reshape(mask, [batch, sequence, 1]);
    const bySlot = transpose(real ? where(real, perSample, Number.NEGATIVE_INFINITY) : perSample, [0, 2, 1]);
    const shares = softmax(perSample); // over the slots
    const combine = real ? where(real, shares, 0) : shares;
    return {
      plan: { kind: "slots", dispatch: transpose(softmax(bySlot), [0, 2, 1]), combine }, // [batch, sequence, all] each
      probabilities: sum(reshape(shares, [batch * sequence, all / slots, slots]), [2]), // [tokens, experts]
      losses: {},
    };
  };

  return {
    name: "softMoE",
    causal: { training: false, evaluation: false },
    needs: [],
    plans: ["slots"],
    gives: ["scores", "probabilities"],
    options: { slots, normalise, scale, epsilon, decoding },
    init(context) {
      const { engine, experts, width } = context;
      const phi = normalTensor(context, "phi", [experts, slots, width], Math.sqrt(1 / width));
      return {
        params: normalise ? { phi, scale: engine.tensor(Float64Array.of(scale), []) } : { phi },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** Rows divided by sqrt(sum of squares + epsilon). */
const normalised = (x: Tensor, epsilon: number): Tensor => div(x, sqrt(add(sumLast(square(x)), epsilon)));

export const card: RouterCard = {
  name: "softMoE",
  title: "Soft MoE",
  paper: "2308.00951",
  equations: "dispatch, slots and combine; the l2 normalisation with a learned scale",
  needs: [],
  causal: "no",
  plans: ["slots"],
  params: "phi [experts, slots, width], scale []",
  cost: "three products experts * slots x width; the experts run on experts * slots rows per sample",
  claim: "Soft MoE Base/16 matches ViT-Huge/14 at 5.7 times lower inference time",
  ourChoices: [
    "padding enters no slot and gets nothing",
    "refused while decoding with a cache unless asked for",
    "a sample is a row of the batch",
    "phi starts from N(0, 1 / width)",
  ],
};
