// DA-MoE (2409.06669): a token gets as many experts as it is important, and it is important when others attend to it.
//   received_j = mean over heads and queries i that can see j of A^h_ij;   importance_j = received_j / max received
//   K_j = clamp(⌈importance_j K_max⌉, K_min, K_max);   top K_j of softmax(W x_j), divided by their sum
// How much attention a token receives, later tokens decide: for a text written token by token `decodeK` says what K is.
// Of the paper only the abstract and an overview could be read: see ourChoices.
import {
  cumsum,
  div,
  entropyLast,
  floor,
  gatherLast,
  hostConstant,
  less,
  linear,
  log,
  maximum,
  maxLast,
  mean,
  minimum,
  mul,
  neg,
  reshape,
  ShapeError,
  slice,
  softmax,
  stopGradient,
  sub,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
  transpose,
  UnsupportedError,
  where,
} from "@switchyard/core";
import { type Layout, maskPlan, type Routed, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
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

export interface DAMoEOptions {
  /** K_max: most experts per token; default 4. */
  readonly k?: number;
  /** K_min: fewest experts per token; default 1. */
  readonly fewest?: number;
  /**
   * Importance from the attention received: its share of the sequence's largest ("ratio"), its place between the smallest
   * and the largest ("minmax"), or the share of tokens that receive no more ("quantile"). Default "ratio".
   */
  readonly mapping?: "ratio" | "minmax" | "quantile";
  /** How the heads become one; default "mean". */
  readonly heads?: "mean" | "max";
  /** Whether queries see later tokens, and so how many queries a token can receive from; default "causal". */
  readonly attention?: "causal" | "bidirectional";
  /**
   * K of a token that is written after others, from a cache: by how widely the token itself looks, the entropy of its
   * row over that of an even one ("entropy"), or K_min ("min"). Default "entropy".
   */
  readonly decodeK?: "entropy" | "min";
  /** Gives every token the K of decodeK, in whole sequences too, which makes the router causal; default false. */
  readonly asDecoded?: boolean;
  /** Weight of the balance loss, E Σ f P with the f summing to the mean K; default 0.01. */
  readonly balance?: number;
  /** Weight of the z-loss (2202.08906); default 0.001. */
  readonly zLoss?: number;
}

/**
 * Top-k with a k of each token's own, from the attention of the block before. Params: `weight [experts, width]`. Metric:
 * `expertsPerToken`, its mean. No gradient flows into the attention. `init` throws ShapeError when k is not in
 * 1..experts, `route` UnsupportedError where there is no attention.
 *
 * @example daMoE({ k: 4, asDecoded: true })
 */
export function daMoE(options: DAMoEOptions = {}): RouterPlugin {
  const name = "daMoE";
  const { k = 4, fewest = 1, mapping = "ratio", heads = "mean", attention = "causal", decodeK = "entropy" } = options;
  const { asDecoded = false, balance = 0.01, zLoss = 0.001 } = options;
  checkNotNegative(name, { balance, zLoss });
  checkWord(name, "mapping", mapping, ["ratio", "minmax", "quantile"]);
  checkWord(name, "heads", heads, ["mean", "max"]);
  checkWord(name, "attention", attention, ["causal", "bidirectional"]);
  checkWord(name, "decodeK", decodeK, ["entropy", "min"]);
  if (!Number.isInteger(k) || k < 1) throw new ShapeError(`${name}: k = ${k}; expected a whole number from 1`);
  if (!Number.isInteger(fewest) || fewest < 1 || fewest > k) {
    throw new ShapeError(`${name}: fewest = ${fewest}; expected a whole number from 1 to k = ${k}`);
  }
  const causal = asDecoded && attention === "causal";

  /** `[tokens, 1]`, 0..1. */
  const importance = (input: RouterInput): Tensor => {
    const { batch, sequence, past } = input.layout;
    const tokens = batch * sequence;
    if (!asDecoded && past === 0) {
      const received = receivedAttention(attentionOf(input), input.layout, { heads, attention });
      return reshape(importanceOf(received, mapping, input.layout.mask), [tokens, 1]);
    }
    if (decodeK === "min") return hostConstant(input.hidden, new Float64Array(tokens), [tokens, 1]);
    return reshape(breadth(attentionOf(input), input.layout, { heads, attention }), [tokens, 1]);
  };

  const route = (params: Tree, input: RouterInput): Routed => {
    const logits = linear(input.hidden, leaf(params, "weight")); // [tokens, experts]
    const probabilities = softmax(logits);
    const wanted = expertCounts(importance(input), { k, fewest }); // [tokens, 1]
    const ranks = hostConstant(
      logits,
      Float64Array.from({ length: k }, (_, rank) => rank),
      [1, k],
    );
    const experts = where(less(ranks, wanted), topkIndices(logits, k), -1); // [tokens, k]
    const chosen = gatherLast(probabilities, experts);
    const plan = { kind: "sparse", experts, weights: div(chosen, maximum(sumLast(chosen), 1e-20)) } as const;
    const { mask } = maskOf(input);
    const real = mask ? sum(mask) : undefined;
    const total = sum(mask ? mul(reshape(wanted, mask.shape), mask) : wanted);
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts, balance, zLoss }),
      metrics: { expertsPerToken: real ? div(total, maximum(real, 1)) : mul(total, 1 / Math.max(wanted.size, 1)) },
    };
  };

  return {
    name,
    causal: { training: causal, evaluation: causal },
    needs: ["attention"],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: { k, fewest, mapping, heads, attention, decodeK, asDecoded, balance, zLoss },
    // How many it is the text decides; this is the most.
    expertsPerToken: k,
    init(context) {
      checkK(name, k, context.experts);
      return { params: { weight: normalWeight(context) }, buffers: {}, route };
    },
  };
}

function attentionOf(input: RouterInput): Tensor {
  const { batch, sequence, past } = input.layout;
  const found = input.attention?.();
  if (found === undefined) {
    throw new UnsupportedError(
      `daMoE: layer ${input.layer} got no attention; put it behind a block that hands its own over as input.attention`,
    );
  }
  const [b, heads = 0, s, total] = found.shape;
  if (b !== batch || s !== sequence || total !== past + sequence || heads === 0) {
    throw new ShapeError(
      `daMoE: attention is [${found.shape}], expected [batch, heads, sequence, past + sequence] = ` +
        `[${batch}, heads, ${sequence}, ${past + sequence}]`,
    );
  }
  return stopGradient(found);
}

interface Form {
  readonly heads: "mean" | "max";
  readonly attention: "causal" | "bidirectional";
}

/** Joins the heads of `[batch, heads, n]`: `[batch, n]`. */
function joinHeads(x: Tensor, how: Form["heads"]): Tensor {
  if (how === "mean") return mean(x, [1]);
  const [batch = 0, , n = 0] = x.shape;
  return reshape(maxLast(transpose(x, [0, 2, 1])), [batch, n]);
}

/**
 * How many real tokens each position sees or is seen by: `[batch, n]`, or `[1, n]` without a mask; at least 1.
 * `backwards`: counted from the end.
 */
function counts(
  x: Tensor,
  { batch, sequence, past, mask }: Layout,
  form: Form["attention"],
  backwards: boolean,
): Tensor {
  const n = past + sequence;
  if (!mask) {
    const count = (i: number): number => (form === "bidirectional" ? n : backwards ? n - i : i + 1);
    return hostConstant(
      x,
      Float64Array.from({ length: n }, (_, i) => count(i)),
      [1, n],
    );
  }
  if (form === "bidirectional")
    return maximum(mul(sumLast(mask), hostConstant(x, new Float64Array(n).fill(1), [1, n])), 1);
  return maximum(reshape(cumsum(mask, { axis: 1, reverse: backwards }), [batch, n]), 1);
}

/**
 * Mean attention that each token receives, from the real tokens that can see it: attention `[batch, heads, sequence,
 * sequence]` -> `[batch, sequence]`, 0 for padding.
 */
export function receivedAttention(attention: Tensor, layout: Layout, form: Form): Tensor {
  const { batch, sequence, mask } = layout;
  const rows = mask ? mul(attention, reshape(mask, [batch, 1, sequence, 1])) : attention;
  const joined = joinHeads(sum(rows, [2]), form.heads); // [batch, sequence]
  const share = div(joined, counts(attention, layout, form.attention, true));
  return mask ? mul(share, mask) : share;
}

/** Importance 0..1 of each token in its sequence: received `[batch, sequence]` -> the same shape, 0 for padding. */
export function importanceOf(received: Tensor, mapping: "ratio" | "minmax" | "quantile", mask?: Tensor): Tensor {
  const [batch = 0, sequence = 0] = received.shape;
  if (received.size === 0) return received;
  const kept = (x: Tensor): Tensor => (mask ? mul(x, mask) : x);
  const most = maxLast(received); // [batch, 1]; padding receives 0
  if (mapping === "ratio") return div(received, maximum(most, 1e-20));
  if (mapping === "minmax") {
    // Nothing is above 1, so that padding is never the smallest.
    const least = neg(maxLast(neg(mask ? where(mask, received, 2) : received)));
    return kept(div(sub(received, least), maximum(sub(most, least), 1e-20)));
  }
  const [own, other] = [reshape(received, [batch, sequence, 1]), reshape(received, [batch, 1, sequence])];
  const more = less(own, other); // [batch, sequence, sequence]
  const above = sumLast(mask ? mul(more, reshape(mask, [batch, 1, sequence])) : more);
  const real = mask ? maximum(sumLast(mask), 1) : hostConstant(received, Float64Array.of(sequence), [1, 1]);
  return kept(sub(1, div(reshape(above, [batch, sequence]), real)));
}

/** How widely each new token looks, 0..1: its row's entropy over that of an even row. `[batch, sequence]`. */
function breadth(attention: Tensor, layout: Layout, form: Form): Tensor {
  const { batch, sequence, past } = layout;
  const [, heads = 0] = attention.shape;
  const entropies = reshape(entropyLast(attention), [batch, heads, sequence]);
  const all = counts(attention, layout, form.attention, false); // [batch or 1, past + sequence]
  const seen = slice(all, [0, past], [all.shape[0] ?? 0, sequence]);
  return div(joinHeads(entropies, form.heads), log(maximum(seen, 2)));
}

/** K of each token: importance 0..1 -> whole numbers from `fewest` to `k`, as f32, same shape. */
export function expertCounts(
  importance: Tensor,
  { k, fewest }: { readonly k: number; readonly fewest: number },
): Tensor {
  // A product that rounding lifted above a whole number stays at it.
  const up = neg(floor(neg(sub(mul(importance, k), 1e-5))));
  return minimum(maximum(up, fewest), k);
}

export const card: RouterCard = {
  name: "daMoE",
  title: "DA-MoE: experts by attention received",
  paper: "2409.06669",
  equations: "from the abstract; the formulas are ours",
  needs: ["attention"],
  causal: "no",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width and the block's attention once more",
  claim: "consistently better than a Switch-style baseline on GLUE",
  ourChoices: [
    "how importance becomes a number of experts is not known: the share of the sequence's largest, rounded up",
    "received attention is the mean over the real queries that can see the token",
    "a token written after others gets K by how widely it looks, or K_min; asDecoded does so everywhere, which is causal",
    "no gradient flows into the attention",
    "balance loss over all chosen experts, z-loss as in other routers",
  ],
};
