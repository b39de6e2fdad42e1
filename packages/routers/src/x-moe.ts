// X-MoE (2204.09179): routing on a low-dimensional hypersphere, against representations collapsing onto experts.
//   z = W x in d_e dimensions,  s_e = cos(z, e_e),  logits = s / τ with a learned τ
//   the k best s (paper: 1); weights w = softmax(s / τ) or sigmoid(s / τ) at the chosen, not divided by their sum
//   L_bal = E Σ f P with P the mean of softmax(s / τ0), τ0 = 0.3 fixed
// Two other forms of the same idea, to load weights trained with them:
//   torchscale   logits = z · e / |e|: the token side keeps its length, no temperature
//   tutel        logits = cos(z, e) exp(min(t, ln 100)), t learned from ln 2
import {
  div,
  exp,
  gatherLast,
  linear,
  mapTree,
  maximum,
  minimum,
  mul,
  ShapeError,
  sigmoid,
  softmax,
  sqrt,
  square,
  stopGradient,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import {
  maskPlan,
  type Routed,
  type Router,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalisedSigmoid,
  normalTensor,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export type XMoEVariant = "paper" | "torchscale" | "tutel";

export interface XMoEOptions {
  /** Experts per token; default 1. */
  readonly k?: number;
  /** Which form of the scores; default "paper". */
  readonly variant?: XMoEVariant;
  /** What becomes of the scores of the chosen experts; default "softmax". */
  readonly gate?: "softmax" | "sigmoid";
  /** d_e, size of the space of the embeddings; default half the experts, torchscale 16, tutel 256. */
  readonly dimension?: number;
  /** τ at the start; default 0.3, with the sigmoid gate 0.07, tutel 0.5. "torchscale" has none. */
  readonly temperature?: number;
  /** Weight of the balance loss, with the f summing to k; default 0.01. */
  readonly balance?: number;
  /** τ0 of the balance loss; default 0.3. The other variants balance the probabilities that they route by. */
  readonly balanceTemperature?: number;
  /** No gradient reaches the router's parameters, as in the paper's fine-tuning; default false. */
  readonly frozen?: boolean;
}

/**
 * Each token takes the k experts whose embeddings lie closest in direction. Params: `projection [dimension, width]`,
 * `embeddings [experts, dimension]` and, but for torchscale, `logScale []`, the logarithm of 1 / τ. `init` throws
 * ShapeError when k is not in 1..experts.
 *
 * @example xMoE({ k: 1, gate: "sigmoid" })
 */
export function xMoE(options: XMoEOptions = {}): RouterPlugin {
  const {
    k = 1,
    variant = "paper",
    gate = "softmax",
    dimension = { paper: undefined, torchscale: 16, tutel: 256 }[variant],
    temperature = variant === "tutel" ? 0.5 : gate === "softmax" ? 0.3 : 0.07,
    balance = 0.01,
    balanceTemperature = 0.3,
    frozen = false,
  } = options;
  checkWord("xMoE", "variant", variant, ["paper", "torchscale", "tutel"]);
  checkWord("xMoE", "gate", gate, ["softmax", "sigmoid"]);
  checkNotNegative("xMoE", { balance });
  for (const [name, value] of Object.entries({ temperature, balanceTemperature })) {
    if (!(value > 0) || !Number.isFinite(value)) {
      throw new ShapeError(`xMoE: ${name} = ${value}; expected a finite number above 0`);
    }
  }
  if (dimension !== undefined && !(Number.isInteger(dimension) && dimension >= 1)) {
    throw new ShapeError(`xMoE: dimension = ${dimension}; expected a whole number from 1`);
  }

  const cosines = (params: Tree, { hidden }: RouterInput): Tensor => {
    const low = linear(hidden, leaf(params, "projection")); // [tokens, dimension]
    const smallest = variant === "torchscale" ? 1e-4 : 1e-6;
    const embeddings = unitRows(leaf(params, "embeddings"), smallest); // [experts, dimension]
    return linear(variant === "torchscale" ? low : unitRows(low, smallest), embeddings); // [tokens, experts]
  };
  const scaled = (params: Tree, scores: Tensor): Tensor => {
    if (variant === "torchscale") return scores;
    const logScale = leaf(params, "logScale");
    return mul(scores, exp(variant === "tutel" ? minimum(logScale, Math.log(100)) : logScale));
  };
  /** `balanced`: the logits whose softmax the balance loss evens out. */
  const decide = (logits: Tensor, input: RouterInput, balanced: () => Tensor): Routed => {
    const { mask } = maskOf(input);
    const softened = gate === "softmax" ? softmax(logits) : sigmoid(logits); // [tokens, experts]
    const experts = topkIndices(logits, k); // [tokens, k]
    const plan = { kind: "sparse", experts, weights: gatherLast(softened, experts) } as const;
    const evened = input.training && balance !== 0;
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities: gate === "softmax" ? softened : normalisedSigmoid(logits),
      losses: evened
        ? usualLosses(input, { logits, probabilities: softmax(balanced()), experts, balance, zLoss: 0 })
        : {},
    };
  };
  const fixed = (params: Tree): Tree => (frozen ? mapTree(params, stopGradient) : params);
  const score = (params: Tree, input: RouterInput): Tensor => scaled(fixed(params), cosines(fixed(params), input));
  const select = (logits: Tensor, input: RouterInput): Routed => decide(logits, input, () => logits);
  // The paper's balance loss needs the cosines, which logits of a learned temperature do not give back.
  const routing: Pick<Router, "score" | "select" | "route"> =
    variant === "paper"
      ? {
          route(given, input) {
            const params = fixed(given);
            const scores = cosines(params, input);
            return decide(scaled(params, scores), input, () => mul(scores, 1 / balanceTemperature));
          },
        }
      : { score, select, route: (params, input) => select(score(params, input), input) };

  return {
    name: "xMoE",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives:
      variant === "paper" ? ["logits", "probabilities", "choices"] : ["scores", "logits", "probabilities", "choices"],
    options: { k, variant, gate, dimension: dimension ?? null, temperature, balance, balanceTemperature, frozen },
    expertsPerToken: k,
    init(context) {
      const { engine, experts, width } = context;
      checkK("xMoE", k, experts);
      const size = dimension ?? Math.max(1, Math.floor(experts / 2));
      const embeddings = initialEmbeddings(context, size, variant);
      const params = {
        projection: normalTensor(context, "projection", [size, width], Math.sqrt(1 / (3 * width))),
        embeddings: engine.tensor(embeddings, [experts, size]),
      };
      const logScale = (): Tensor => engine.tensor(Float64Array.of(-Math.log(temperature)), []);
      return {
        params: variant === "torchscale" ? params : { ...params, logScale: logScale() },
        buffers: {},
        ...routing,
      };
    },
  };
}

/** Rows divided by their length, or by `smallest` where they are shorter. */
function unitRows(x: Tensor, smallest: number): Tensor {
  return div(x, sqrt(maximum(sumLast(square(x)), smallest * smallest)));
}

/** `[experts, size]`: orthogonal, gain 0.32; torchscale rescales its rows to length 1.5, Tutel draws N(0, 0.01²). */
function initialEmbeddings({ random, experts }: RouterContext, size: number, variant: XMoEVariant): Float64Array {
  const draws = random.at("embeddings").host("normal", experts * size);
  if (variant === "tutel") return draws.map((z) => 0.01 * z);
  const found = orthogonal(draws, experts, size).map((x) => 0.32 * x);
  if (variant === "paper") return found;
  return found.map((x, i) => {
    const start = i - (i % size);
    return (1.5 * x) / Math.hypot(...found.subarray(start, start + size));
  });
}

/** Gram-Schmidt over the shorter side of a matrix `[rows, columns]` of normal draws: a random orthogonal matrix. */
function orthogonal(draws: Float64Array, rows: number, columns: number): Float64Array {
  const [count, length] = [Math.min(rows, columns), Math.max(rows, columns)];
  const place = (vector: number, i: number): number => (rows < columns ? vector * columns + i : i * columns + vector);
  const out = Float64Array.from(draws);
  const at = (vector: number, i: number): number => out[place(vector, i)] ?? 0;
  const dot = (a: number, b: number): number => {
    let total = 0;
    for (let i = 0; i < length; i++) total += at(a, i) * at(b, i);
    return total;
  };
  for (let vector = 0; vector < count; vector++) {
    for (let earlier = 0; earlier < vector; earlier++) {
      const along = dot(vector, earlier);
      for (let i = 0; i < length; i++) out[place(vector, i)] = at(vector, i) - along * at(earlier, i);
    }
    const norm = Math.sqrt(dot(vector, vector));
    for (let i = 0; i < length; i++) out[place(vector, i)] = at(vector, i) / norm;
  }
  return out;
}

export const card: RouterCard = {
  name: "xMoE",
  title: "X-MoE: cosine routing on a low-dimensional hypersphere, torchscale's and Tutel's forms",
  paper: "2204.09179",
  equations: "dimension reduction, l2 normalisation, gate with learned temperature, balance loss",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "projection [dimension, width], embeddings [experts, dimension], logScale []",
  cost: "one product dimension x width, one experts x dimension",
  claim: "better than Switch-style routing on multilingual benchmarks, with steadier routing",
  ourChoices: [
    "the temperature is learned as the logarithm of its inverse, so that it stays positive",
    "k above 1 is possible; the weights are then not divided by their sum either",
    "an odd number of experts: the dimension is rounded down",
    "torchscale rescales its embeddings to length 1.5 in every step, which changes no score; here they only start so",
    "torchscale and tutel balance the probabilities they route by; tutel's projection has no bias",
    "the projection starts from N(0, 1 / (3 width)), the variance of PyTorch's linear layer",
  ],
};
