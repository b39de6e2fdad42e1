// What similarityAware and attentionAware share (Graph of Tokens, 2505.00792): a token's distribution over the experts
// is a mixture of those of the tokens it looks at. Here are options, the part after the mixture, and what stays for
// later tokens.
import {
  add,
  concat,
  div,
  entropyLast,
  gatherLast,
  linear,
  matmul,
  maximum,
  mul,
  reshape,
  ShapeError,
  softmax,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterContext, type RouterInput } from "@switchyard/core/moe";
import { checkNotNegative, checkWord, leaf, maskOf, normalWeight, usualLosses } from "./parts.ts";

/** The options that both routers have. */
export interface GraphOptions {
  /** Experts per token. */
  readonly k: number;
  /**
   * What is mixed: the probabilities of the tokens, or their logits with a softmax after it (the geometric mean of the
   * probabilities, normalised). Default "probabilities".
   */
  readonly mixing?: "probabilities" | "logits";
  /** Share of the token's own distribution that is kept out of the mixture, 0..1; default 0. At 1 this is `topK`. */
  readonly selfWeight?: number;
  /**
   * Divides the weights of the chosen experts by their sum; default true. With k = 1 every weight is then 1, and the
   * gate learns from its losses alone.
   */
  readonly renormalize?: boolean;
  /** Adds a learned bias to the logits; default false. */
  readonly bias?: boolean;
  /** Weight of the balance loss, E Σ f P with the mixed probabilities and the f summing to k; default 0.01. */
  readonly balance?: number;
  /** Weight of the z-loss (2202.08906) of the logits before mixing; default 0.001. */
  readonly zLoss?: number;
}

export type CompleteGraphOptions = Required<GraphOptions>;

/** Fills in the defaults. Throws ShapeError for what cannot be. */
export function graphOptions(router: string, options: GraphOptions): CompleteGraphOptions {
  const {
    k,
    mixing = "probabilities",
    selfWeight = 0,
    renormalize = true,
    bias = false,
    balance = 0.01,
    zLoss = 0.001,
  } = options;
  checkWord(router, "mixing", mixing, ["probabilities", "logits"]);
  checkNotNegative(router, { balance, zLoss });
  if (!(selfWeight >= 0 && selfWeight <= 1)) {
    throw new ShapeError(`${router}: selfWeight = ${selfWeight}; expected a share from 0 to 1`);
  }
  return { k, mixing, selfWeight, renormalize, bias, balance, zLoss };
}

/** `weight [experts, width]` and, where asked for, `bias [experts]`. */
export function gateParams(context: RouterContext, { bias }: CompleteGraphOptions): Record<string, Tensor> {
  const { engine, experts } = context;
  const weight = normalWeight(context);
  return bias ? { weight, bias: engine.tensor(new Float32Array(experts), [experts]) } : { weight };
}

/** The token by itself: logits [tokens, experts], and what of it is mixed, [batch, sequence, experts]. */
export function gate(
  params: Tree,
  { hidden, layout: { batch, sequence } }: RouterInput,
  { bias, mixing }: CompleteGraphOptions,
): { readonly logits: Tensor; readonly values: Tensor } {
  const logits = linear(hidden, leaf(params, "weight"), bias ? leaf(params, "bias") : undefined); // [tokens, experts]
  const own = mixing === "probabilities" ? softmax(logits) : logits;
  return { logits, values: reshape(own, [batch, sequence, logits.shape[1] ?? 0]) };
}

/**
 * Leaves [batch, sequence, ...] with those of earlier positions before them, [batch, past + sequence, ...]. Throws
 * ShapeError where tokens are cached that this router has not seen.
 */
export function withEarlier(
  router: string,
  { cache, layout: { batch, past } }: RouterInput,
  fresh: Readonly<Record<string, Tensor>>,
): Readonly<Record<string, Tensor>> {
  if (past === 0) return fresh;
  const joined = Object.entries(fresh).map(([name, x]) => {
    const earlier = cache && leaf(cache, name);
    if (earlier?.shape[0] !== batch || earlier.shape[1] !== past) {
      throw new ShapeError(
        `${router}: ${past} tokens of ${batch} sequences are cached, but ` +
          `${earlier ? `"${name}" of its own cache is [${earlier.shape}]` : "it got no cache of its own"}; ` +
          "hand on as input.cache what it returned for the tokens before",
      );
    }
    return [name, concat([earlier, x], 1)] as const;
  });
  return Object.fromEntries(joined);
}

/** Chooses by the mixture: `mixed` and `values` [batch, sequence, experts], `logits` [tokens, experts]. */
export function decide(
  { logits, values, mixed }: { readonly logits: Tensor; readonly values: Tensor; readonly mixed: Tensor },
  input: RouterInput,
  { k, mixing, selfWeight, renormalize, balance, zLoss }: CompleteGraphOptions,
): Routed {
  const whole = selfWeight === 0 ? mixed : add(mul(values, selfWeight), mul(mixed, 1 - selfWeight));
  const scores = reshape(whole, logits.shape); // [tokens, experts]
  const probabilities = mixing === "probabilities" ? scores : softmax(scores);
  const experts = topkIndices(scores, k); // [tokens, k]
  const chosen = gatherLast(probabilities, experts);
  // A padded token may have nothing to look at: its row is 0.
  const weights = renormalize ? div(chosen, maximum(sumLast(chosen), 1e-20)) : chosen;
  const { mask } = maskOf(input);
  const plan = { kind: "sparse", experts, weights } as const;
  return {
    plan: mask ? maskPlan(plan, mask) : plan,
    logits,
    probabilities,
    losses: usualLosses(input, { logits, probabilities, experts, balance, zLoss }),
  };
}

/**
 * What the entropy of a mixture of distributions lies between, in nats (section 4 of the paper; the wording is ours):
 * Σ_j S_ij H(r_j) <= H(Σ_j S_ij r_j) <= Σ_j S_ij H(r_j) + H(S_i). `graph [..., n, m]` with rows that sum to 1,
 * `probabilities [..., m, experts]`; both results `[..., n]`.
 */
export function entropyBounds(
  graph: Tensor,
  probabilities: Tensor,
): { readonly lower: Tensor; readonly upper: Tensor } {
  const own = entropyLast(probabilities); // [..., m]
  const lower = reshape(matmul(graph, reshape(own, [...own.shape, 1])), graph.shape.slice(0, -1));
  return { lower, upper: add(lower, entropyLast(graph)) };
}
