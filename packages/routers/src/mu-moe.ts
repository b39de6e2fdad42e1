// muMoE (2402.12550): every token goes through one expert that is a mixture of all, most of them with a share of exactly 0.
//   a = entmax_1.5(norm(x Wᵀ)), norm = batch or layer normalisation without affine part, W = 0 at the start
//   several levels: a product of coefficients, a_e a'_f for expert (e, f), each level with its own entmax
// The experts are mixed in their parameters ("merge" plan): `muMoEExperts` of @switchyard/core/experts does so in factors.
import {
  add,
  div,
  entmax15,
  hostConstant,
  linear,
  maximum,
  mean,
  mul,
  reshape,
  ShapeError,
  slice,
  sqrt,
  square,
  stopGradient,
  sub,
  sum,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import { maskPlan, meanOverTokens, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
import { checkNotNegative, checkWord, leaf, maskOf, normalTensor, type RouterCard } from "./parts.ts";

export interface MuMoEOptions {
  /**
   * "batch": over the tokens of the batch, in evaluation by running statistics. A token's route then depends on the others of its batch
   * in training, so that language models refuse it. "layer": over the experts of the token. Default "batch".
   */
  readonly norm?: "batch" | "layer";
  /** Experts of each level, whose product is the number of experts; default one level. Give the experts the same `modes`. */
  readonly modes?: readonly number[];
  /** Share of a batch in the running statistics, 0..1; default 0.1. */
  readonly momentum?: number;
  /** Added to variances, above 0; default 1e-5. */
  readonly eps?: number;
  /** Standard deviation of W at the start; default 0, where all experts have equal shares. */
  readonly deviation?: number;
}

/**
 * One mixture of all experts per token; experts must offer `mixed`: `muMoEExperts`, at the cost of one dense layer, or `glu` and `ffn`,
 * which mix whole matrices for every token and so need tokens times the memory of one expert. Params: `weight [experts, width]` (levels
 * one after the other: `[sum of modes, width]`), buffers with batch normalisation: `mean`, `variance` of as many. There are no losses.
 * Padding has no mixture and enters no statistics.
 *
 * @example muMoE({ norm: "layer" })
 */
export function muMoE({
  norm = "batch",
  modes,
  momentum = 0.1,
  eps = 1e-5,
  deviation = 0,
}: MuMoEOptions = {}): RouterPlugin {
  checkWord("muMoE", "norm", norm, ["batch", "layer"]);
  checkNotNegative("muMoE", { momentum, eps, deviation });
  if (momentum > 1) throw new ShapeError(`muMoE: momentum = ${momentum}; expected a share, from 0 to 1`);
  if (eps === 0) throw new ShapeError("muMoE: eps = 0; expected a number above 0, or equal scores would give NaN");
  if (modes && (modes.length === 0 || modes.some((n) => !Number.isInteger(n) || n < 1))) {
    throw new ShapeError(`muMoE: modes [${modes.join(", ")}]; expected whole numbers from 1`);
  }
  const levelsOf = (columns: number): readonly number[] => modes ?? [columns];

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (scores: Tensor, input: RouterInput): Routed => {
    const [tokens = 0, columns = 0] = scores.shape;
    const { mask } = maskOf(input);
    const levels = levelsOf(columns);
    const measured = norm === "batch" && input.training ? batchStatistics(scores, mask) : undefined;
    const logits =
      norm === "layer"
        ? split(scores, levels).map((x) => normalised(x, rowStatistics(x), eps))
        : split(normalised(scores, measured ?? running(input.buffers), eps), levels);
    const coefficients = logits.map((z) => {
      const a = entmax15(z); // [tokens, experts of the level]
      return mask ? where(reshape(mask, [tokens, 1]), a, 0) : a;
    });
    const each = hostConstant(
      scores,
      Int32Array.from({ length: tokens }, (_, t) => t),
      [tokens],
    );
    const plan = { kind: "merge", groups: each, coefficients } as const;
    const [only] = logits;
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      ...(only && logits.length === 1 ? { logits: only } : {}),
      probabilities: coefficients.reduce(products),
      losses: {},
      ...(measured ? { metrics: forRunning(measured, tokens, mask) } : {}),
    };
  };

  return {
    name: "muMoE",
    causal: { training: norm === "layer", evaluation: true },
    needs: ["mixedExperts"],
    plans: ["merge"],
    gives: modes ? ["scores", "probabilities"] : ["scores", "logits", "probabilities"],
    options: { norm, modes: modes ? [...modes] : null, momentum, eps, deviation },
    expertsPerToken: 1,
    init(context) {
      const { engine, experts, width, layer } = context;
      const levels = levelsOf(experts);
      if (levels.reduce((product, n) => product * n, 1) !== experts) {
        throw new ShapeError(
          `muMoE: modes ${levels.join(" x ")} for ${experts} experts; expected that many as their product`,
        );
      }
      const columns = levels.reduce((total, n) => total + n, 0);
      const made = {
        params: { weight: normalTensor(context, "weight", [columns, width], deviation) },
        score,
        select,
        route: (params: Tree, input: RouterInput): Routed => select(score(params, input), input),
      };
      if (norm === "layer") return { ...made, buffers: {} };
      return {
        ...made,
        buffers: {
          mean: engine.tensor(new Float64Array(columns), [columns]),
          variance: engine.tensor(new Float64Array(columns).fill(1), [columns]),
        },
        afterStep(layers, buffers) {
          const own = layers[layer];
          if (own === undefined) {
            throw new ShapeError(`muMoE: statistics of ${layers.length} layers for the router of layer ${layer}`);
          }
          if (own.tokens === 0) return buffers;
          const moved = (name: "mean" | "variance"): Tensor => {
            const found = own.metrics[name];
            if (found?.length !== columns) {
              throw new ShapeError(
                `muMoE: the metrics of a training step have ${found?.length ?? "no"} entries of "${name}", expected ${columns}`,
              );
            }
            const fresh = engine.tensor(Float64Array.from(found), [columns]);
            return add(mul(leaf(buffers, name), 1 - momentum), mul(fresh, momentum));
          };
          return { mean: moved("mean"), variance: moved("variance") };
        },
      };
    },
  };
}

interface Statistics {
  readonly mean: Tensor;
  /** Divided by the number of entries. */
  readonly variance: Tensor;
}

const normalised = (x: Tensor, { mean, variance }: Statistics, eps: number): Tensor =>
  div(sub(x, mean), sqrt(add(variance, eps)));

/** Of each column over the real tokens, [columns]. */
function batchStatistics(x: Tensor, mask?: Tensor): Statistics {
  const center = meanOverTokens(x, mask);
  return { mean: center, variance: meanOverTokens(square(sub(x, center)), mask) };
}

/** Of each row, [tokens, 1]. */
function rowStatistics(x: Tensor): Statistics {
  const [tokens = 0] = x.shape;
  const over = (y: Tensor): Tensor => reshape(mean(y, [1]), [tokens, 1]);
  const center = over(x);
  return { mean: center, variance: over(square(sub(x, center))) };
}

const running = (buffers: Tree): Statistics => ({
  mean: leaf(buffers, "mean"),
  variance: leaf(buffers, "variance"),
});

/** What the running statistics take up: the variance divided by one token less, as PyTorch's batch normalisation has it. */
function forRunning({ mean: center, variance }: Statistics, tokens: number, mask?: Tensor): Record<string, Tensor> {
  const unbiased = (): Tensor => {
    if (!mask) return mul(variance, tokens / Math.max(tokens - 1, 1));
    const real = sum(mask);
    return mul(variance, div(real, maximum(sub(real, 1), 1)));
  };
  return { mean: stopGradient(center), variance: stopGradient(unbiased()) };
}

/** The columns of each level. */
function split(x: Tensor, levels: readonly number[]): readonly Tensor[] {
  const [tokens = 0] = x.shape;
  let from = 0;
  return levels.map((n) => {
    from += n;
    return slice(x, [0, from - n], [tokens, n]);
  });
}

/** a [tokens, m], b [tokens, n] -> [tokens, m * n], the second level fastest. */
function products(a: Tensor, b: Tensor): Tensor {
  const [tokens = 0, m = 0] = a.shape;
  const [, n = 0] = b.shape;
  return reshape(mul(reshape(a, [tokens, m, 1]), reshape(b, [tokens, 1, n])), [tokens, m * n]);
}

export const card: RouterCard = {
  name: "muMoE",
  title: "muMoE: sparse coefficients over mixed experts",
  paper: "2402.12550",
  equations: "the gate of the released code: entmax 1.5 of normalised scores, also in levels",
  needs: ["mixedExperts"],
  causal: "evaluation",
  plans: ["merge"],
  params: "weight [experts, width], buffers mean and variance [experts]",
  cost: "one product experts x width, a sort of the experts; with factorised experts one dense layer",
  claim: "thousands of experts at the cost of a dense layer, more specialised, which helps editing by class",
  ourChoices: [
    "running statistics move with momentum 0.1 and the unbiased variance, as PyTorch's do",
    "padding enters no statistics",
    "batch normalisation is the default, layer normalisation makes it causal",
  ],
};
