// SMEAR (2306.03745): no choice at all. Every sample goes once through one expert whose parameters are the mean of all
// experts', weighted by the router's probabilities.
//   x¯ = mean over the tokens of the sample;  p = softmax(LN(x¯) Wᵀ + b)
//   θ¯ = Σ_e p_e θ_e for every tensor of the experts, biases included;  y = f(x; θ¯)      the residual is added outside
// As in the released configuration each row of W is first layer-normalised with a learned gain. In training, where
// asked: jitter on x¯, uniform p for a random share of the samples, experts dropped from p.
// A token sees the mean of its whole sample: not for language models.
import {
  addRows,
  affine,
  broadcastTo,
  concat,
  div,
  full,
  hostConstant,
  layerNorm,
  less,
  linear,
  maximum,
  mul,
  reshape,
  ShapeError,
  slice,
  softmax,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  UnsupportedError,
  where,
} from "@switchyard/core";
import { maskPlan, type RouterContext, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { checkNotNegative, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface SmearOptions {
  /** Layer-normalises each expert's router weights, with a learned gain from 0.01 on; default true, as released. */
  readonly normaliseWeights?: boolean;
  /** Probability that an expert is left out of a sample's p in training, 0..1; if all would be, none is. Default 0. */
  readonly expertDropout?: number;
  /** Probability that a sample's p is uniform in training, 0..1; default 0. */
  readonly epsilon?: number;
  /** Half the width of the noise that multiplies x¯ in training; default 0. */
  readonly jitter?: number;
  /** Added to the variances of both layer normalisations, above 0; default 1e-5. */
  readonly normEpsilon?: number;
  /** Samples in one call at most, where the layout names the sample of each token; without names a row is a sample. */
  readonly samples?: number;
  /**
   * Decoding with a cache: new tokens go through the mixture of their prompt, which is not how it was trained. Default
   * false.
   */
  readonly decoding?: boolean;
}

/**
 * One mixture of all experts per sample; experts must offer `mixed`, as `glu` and `ffn` do. Params: `weight [experts,
 * width]`, `bias [experts]`, `normWeight` and `normBias [width]` of the layer norm of x¯, and `gain [width]` with
 * `normaliseWeights`. There are no losses. Padding enters no mean and has no mixture.
 *
 * A sample is a row of the batch, or, where `layout.samples` names samples 0, 1, ..., all tokens of one name, in any
 * row; a name from `samples` on has no mixture, its output is 0. `route` throws ShapeError for such a layout unless
 * `samples` is set, and UnsupportedError while decoding with a cache unless `decoding` is true: then the first call,
 * the prompt, fixes p, which the cache carries on.
 *
 * @example smear()
 */
export function smear(options: SmearOptions = {}): RouterPlugin {
  const { normaliseWeights = true, expertDropout = 0, epsilon = 0, jitter = 0, samples, decoding = false } = options;
  const { normEpsilon = 1e-5 } = options;
  checkNotNegative("smear", { expertDropout, epsilon, jitter });
  for (const [name, value] of Object.entries({ expertDropout, epsilon })) {
    if (value > 1) throw new ShapeError(`smear: ${name} = ${value}; expected a probability, from 0 to 1`);
  }
  if (!(normEpsilon > 0)) throw new ShapeError(`smear: normEpsilon = ${normEpsilon}; expected a number above 0`);
  if (samples !== undefined && !(Number.isInteger(samples) && samples >= 1)) {
    throw new ShapeError(`smear: samples = ${samples}; expected a whole number from 1`);
  }

  /** p of each sample from x¯ `[samples, width]`: `[samples, experts]`. */
  const mixture = (params: Tree, means: Tensor, { training, random, layer }: RouterInput): Tensor => {
    const draws = (name: string, shape: readonly number[]): Tensor => random.at(layer, name).uniform(shape);
    const [count = 0] = means.shape;
    const noisy =
      training && jitter > 0
        ? mul(means, affine(draws("jitter", means.shape), { scale: 2 * jitter, shift: 1 - jitter }))
        : means;
    let p = smearProbabilities(params, noisy, { normaliseWeights, normEpsilon });
    const [, experts = 0] = p.shape;
    if (training && epsilon > 0) p = where(less(draws("explore", [count, 1]), epsilon), 1 / Math.max(experts, 1), p);
    if (training && expertDropout > 0) {
      const drawn = less(draws("expert dropout", p.shape), expertDropout); // 1 = left out
      const all = less(experts - 0.5, sumLast(drawn)); // [samples, 1]
      const kept = where(where(all, 0, drawn), 0, p);
      // Of probabilities that all vanished nothing would be left to divide.
      p = div(kept, maximum(sumLast(kept), 1e-30));
    }
    return p;
  };

  return {
    name: "smear",
    causal: { training: false, evaluation: false },
    needs: ["mixedExperts"],
    plans: ["merge"],
    gives: ["probabilities"],
    options: { normaliseWeights, expertDropout, epsilon, jitter, normEpsilon, samples: samples ?? null, decoding },
    expertsPerToken: 1,
    init(context) {
      return {
        params: smearParams(context, normaliseWeights),
        buffers: {},
        route(params, input) {
          const { layout, cache, training } = input;
          const { batch, sequence, past } = layout;
          if (past > 0 && !decoding) {
            throw new UnsupportedError(
              `smear: asked to route ${batch * sequence} new tokens after ${past} cached ones, but a token needs the ` +
                "mean of its whole sample; decode without a cache, or pass decoding: true to keep the mixture of the prompt",
            );
          }
          if (decoding && layout.samples) {
            throw new UnsupportedError(
              "smear: decoding: true keeps one mixture per row, but the layout names samples; leave layout.samples out",
            );
          }
          const { mask } = maskOf(input);
          const groups = groupsOf(input);
          const p =
            past > 0 ? fromPrompt(input, cache) : mixture(params, meanOfSamples(input, groups, samples, mask), input);
          const plan = { kind: "merge", groups, coefficients: [p] } as const;
          const [rows = 0, experts = 0] = p.shape;
          const kept =
            decoding && !training && broadcastTo(reshape(p, [rows, 1, experts]), [rows, past + sequence, experts]);
          return {
            plan: mask ? maskPlan(plan, mask) : plan,
            probabilities: takeRows(p, groups), // [tokens, experts]
            losses: {},
            ...(kept ? { cache: { mixture: kept } } : {}),
          };
        },
      };
    },
  };
}

function smearParams(context: RouterContext, normaliseWeights: boolean): Tree {
  const { engine, experts, width } = context;
  const vector = (size: number, value: number): Tensor => engine.tensor(new Float64Array(size).fill(value), [size]);
  return {
    weight: normalWeight(context),
    bias: vector(experts, 0),
    normWeight: vector(width, 1),
    normBias: vector(width, 0),
    ...(normaliseWeights ? { gain: vector(width, 0.01) } : {}),
  };
}

/** p of samples with the means `means [samples, width]`: `[samples, experts]`. */
export function smearProbabilities(
  params: Tree,
  means: Tensor,
  { normaliseWeights = true, normEpsilon: eps = 1e-5 }: Pick<SmearOptions, "normaliseWeights" | "normEpsilon"> = {},
): Tensor {
  const weight = leaf(params, "weight");
  const gain = normaliseWeights ? leaf(params, "gain") : undefined;
  // A learned shift of the rows would add the same to every logit, which softmax does not see.
  const rows = gain ? layerNorm(weight, gain, full(gain, gain.shape, 0), { eps }) : weight;
  return softmax(
    linear(layerNorm(means, leaf(params, "normWeight"), leaf(params, "normBias"), { eps }), rows, leaf(params, "bias")),
  );
}

/** The sample of each token, i32 `[tokens]`. */
function groupsOf({ hidden, layout: { sequence, samples } }: RouterInput): Tensor {
  if (samples) return samples;
  const [tokens = 0] = hidden.shape;
  return hostConstant(
    hidden,
    Int32Array.from({ length: tokens }, (_, t) => Math.floor(t / sequence)),
    [tokens],
  );
}

/** x¯ of each sample, `[samples, width]`; of one without real tokens 0. */
function meanOfSamples(
  { hidden, layout }: RouterInput,
  groups: Tensor,
  most: number | undefined,
  mask: Tensor | undefined,
): Tensor {
  const [tokens = 0, width = 0] = hidden.shape;
  const named = layout.samples !== undefined;
  if (named && most === undefined) {
    throw new ShapeError(
      "smear: the layout names the sample of each token, but not how many samples there are; pass samples, " +
        "the most in one call",
    );
  }
  const count = named ? (most ?? 0) : layout.batch;
  const real = mask ? reshape(mask, [tokens, 1]) : full(hidden, [tokens, 1], 1);
  if (!named) {
    const perRow = (x: Tensor): Tensor => sum(reshape(x, [count, layout.sequence, x.shape[1] ?? 0]), [1]);
    return div(perRow(mask ? where(real, hidden, 0) : hidden), maximum(perRow(real), 1));
  }
  const kept = mask ? where(real, hidden, 0) : hidden;
  const totals = addRows(concat([kept, real], 1), groups, count); // [samples, width + 1]
  return div(slice(totals, [0, 0], [count, width]), maximum(slice(totals, [0, width], [count, 1]), 1));
}

/** p as the prompt fixed it, `[batch, experts]`. */
function fromPrompt({ layout: { batch, past } }: RouterInput, cache: Tree | undefined): Tensor {
  const kept = cache && leaf(cache, "mixture"); // [batch, past, experts]
  if (kept?.shape[0] !== batch || kept.shape[1] !== past) {
    throw new ShapeError(
      `smear: ${past} tokens of ${batch} sequences are cached, but ` +
        `${kept ? `its own cache is [${kept.shape}]` : "it got no cache of its own"}; ` +
        "hand on as input.cache what it returned for the tokens before",
    );
  }
  const [, , experts = 0] = kept.shape;
  return reshape(slice(kept, [0, past - 1, 0], [batch, 1, experts]), [batch, experts]);
}

export const card: RouterCard = {
  name: "smear",
  title: "SMEAR: one expert, merged from all for each sample",
  paper: "2306.03745",
  equations: "soft merging of experts with adaptive routing, as in the released code",
  needs: ["mixedExperts"],
  causal: "no",
  plans: ["merge"],
  params: "weight [experts, width], bias [experts], normWeight, normBias, gain [width]",
  cost: "per sample one product experts x width and a weighted sum of all expert parameters; one expert runs",
  claim: "beats routing by metadata and routing trained with gradient estimates, at the cost of one expert",
  ourChoices: [
    "the weights' layer norm has no bias: softmax does not see it",
    "jitter multiplies the mean of the sample",
    "dropping all experts of a sample drops none",
    "refused while decoding with a cache unless asked for; then the prompt decides the mixture",
    "the residual is added by the block around the layer",
  ],
};
