// Attention-aware routing (Graph of Tokens, 2505.00792): a token is routed as the tokens are that it attends to.
//   r_j = softmax(W u_j + b);   r~_i = Σ_j A_ij r_j;   K_i = top k of r~_i, weights as in similarityAware
// A joins the heads' attention probabilities A^(h) of the block just before, after masking and softmax:
//   mean         A = (1/H) Σ_h A^(h)
//   min-entropy  A = A^(h*), h* = argmin_h of the mean of H(A^(h)_i) over the tokens i
//   learned      A = Σ_h softmax(c)_h A^(h)
// Causal because the attention is. Of the paper only the abstract and second-hand notes could be read: see ourChoices.
import {
  broadcastTo,
  cumsum,
  entropyLast,
  matmul,
  mean,
  mul,
  neg,
  oneHot,
  reshape,
  ShapeError,
  slice,
  softmax,
  stopGradient,
  sum,
  type Tensor,
  topkIndices,
  transpose,
  UnsupportedError,
  where,
} from "@switchyard/core";
import type { Layout, RouterInput, RouterPlugin } from "@switchyard/core/moe";
import { decide, type GraphOptions, gate, gateParams, graphOptions, withEarlier } from "./graph-parts.ts";
import { checkK, checkWord, leaf, type RouterCard } from "./parts.ts";

export { entropyBounds } from "./graph-parts.ts";

export interface AttentionAwareOptions extends GraphOptions {
  /** How the heads become one; default "mean". */
  readonly headAggregation?: "mean" | "min-entropy" | "learned";
  /**
   * Which tokens' entropies decide with "min-entropy": those up to the token itself ("past"), which is causal and may
   * change the head along the sequence, or all of the sequence ("sequence"): one head for all of it, not causal.
   * Default "past".
   */
  readonly entropyOver?: "past" | "sequence";
  /** Lets no gradient into the attention; default false. */
  readonly detachAttention?: boolean;
}

/**
 * Top-k on a mixture of the tokens' distributions, weighted by the attention of the block before. Params: `weight
 * [experts, width]`, with `bias` also `bias [experts]`, with learned heads also `heads [heads]`. Cache, per position:
 * what is mixed (`values`, one number per expert) and, for "min-entropy", the `entropies` of the heads. `probabilities`
 * are the mixed ones, `logits` those before mixing. There are no halves `score` and `select`: neither alone knows the
 * cache.
 *
 * `init` throws ShapeError when k is not in 1..experts; `route` throws UnsupportedError where there is no attention.
 *
 * @example attentionAware({ k: 2 })
 */
export function attentionAware(options: AttentionAwareOptions): RouterPlugin {
  const name = "attentionAware";
  const common = graphOptions(name, options);
  const { headAggregation = "mean", entropyOver = "past", detachAttention = false } = options;
  const { k } = common;
  checkWord(name, "headAggregation", headAggregation, ["mean", "min-entropy", "learned"]);
  checkWord(name, "entropyOver", entropyOver, ["past", "sequence"]);
  const causal = headAggregation !== "min-entropy" || entropyOver === "past";

  return {
    name,
    causal: { training: causal, evaluation: causal },
    needs: ["attention"],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: { ...common, headAggregation, entropyOver, detachAttention },
    expertsPerToken: k,
    init(context) {
      const { engine, experts, heads } = context;
      checkK(name, k, experts);
      if (headAggregation === "learned" && heads === undefined) {
        throw new UnsupportedError(
          `${name}: headAggregation "learned" has a parameter per head, and the layer does not say how many heads ` +
            'there are; put "heads" into the context, or use "mean"',
        );
      }
      const own =
        headAggregation === "learned" ? { heads: engine.tensor(new Float32Array(heads ?? 0), [heads ?? 0]) } : {};
      return {
        params: { ...gateParams(context, common), ...own },
        buffers: {},
        route(params, input) {
          if (!causal && input.layout.past > 0) {
            throw new UnsupportedError(
              `${name}: asked to route after ${input.layout.past} cached tokens, but their entropies should have ` +
                'been compared together with those of the new ones; decode without a cache, or use entropyOver: "past"',
            );
          }
          const { logits, values } = gate(params, input, common);
          const attention = attentionOf(input, detachAttention);
          const quietest = headAggregation === "min-entropy";
          const fresh = quietest ? { values, entropies: headEntropies(attention) } : { values };
          const seen = withEarlier(name, input, fresh);
          const graph = quietest
            ? quietestHead(attention, leaf(seen, "entropies"), { layout: input.layout, over: entropyOver }).graph
            : headAggregation === "learned"
              ? weighHeads(attention, softmax(leaf(params, "heads")))
              : mean(attention, [1]); // [batch, sequence, past + sequence]
          const mixed = matmul(graph, leaf(seen, "values")); // [batch, sequence, experts]
          const routed = decide({ logits, values, mixed }, input, common);
          return causal && !input.training ? { ...routed, cache: seen } : routed;
        },
      };
    },
  };
}

function attentionOf(input: RouterInput, detach: boolean): Tensor {
  const { batch, sequence, past } = input.layout;
  const found = input.attention?.();
  if (found === undefined) {
    throw new UnsupportedError(
      `attentionAware: layer ${input.layer} got no attention; put it behind a block that hands its own over as ` +
        "input.attention, or use similarityAware",
    );
  }
  const [b, heads = 0, s, total] = found.shape;
  if (b !== batch || s !== sequence || total !== past + sequence || heads === 0) {
    throw new ShapeError(
      `attentionAware: attention is [${found.shape}], expected [batch, heads, sequence, past + sequence] = ` +
        `[${batch}, heads, ${sequence}, ${past + sequence}]`,
    );
  }
  return detach ? stopGradient(found) : found;
}

/** H(A^(h)_i) in nats: attention `[batch, heads, sequence, total]` -> `[batch, sequence, heads]`, without gradient. */
export function headEntropies(attention: Tensor): Tensor {
  return transpose(entropyLast(stopGradient(attention)), [0, 2, 1]);
}

/** Σ_h w_h A^(h), `[batch, sequence, total]`, for weights `[heads]`. */
function weighHeads(attention: Tensor, weights: Tensor): Tensor {
  const [batch = 0, heads = 0, sequence = 0, total = 0] = attention.shape;
  const joined = matmul(reshape(weights, [1, 1, heads]), reshape(attention, [batch, heads, sequence * total]));
  return reshape(joined, [batch, sequence, total]);
}

/**
 * The head whose rows are the least spread out, the lower one on a tie. `entropies [batch, past + sequence, heads]`;
 * `chosen` i32 `[batch, sequence]`, `graph [batch, sequence, past + sequence]`. Padding does not count.
 */
export function quietestHead(
  attention: Tensor,
  entropies: Tensor,
  { layout, over }: { readonly layout: Layout; readonly over: "past" | "sequence" },
): { readonly chosen: Tensor; readonly graph: Tensor } {
  const [batch = 0, heads = 0, sequence = 0] = attention.shape;
  const total = entropies.shape[1] ?? 0;
  const { mask } = layout;
  const counted = mask ? where(reshape(mask, [batch, total, 1]), entropies, 0) : entropies;
  const shape = [batch, sequence, heads];
  // Every head has as many tokens: the least sum is the least mean.
  const sums =
    over === "past"
      ? slice(cumsum(counted, { axis: 1 }), [0, total - sequence, 0], shape)
      : broadcastTo(reshape(sum(counted, [1]), [batch, 1, heads]), shape);
  const chosen = topkIndices(neg(sums), 1); // [batch, sequence, 1]
  const picks = oneHot(reshape(chosen, [batch, sequence]), heads); // [batch, sequence, heads]
  const perHead = reshape(transpose(picks, [0, 2, 1]), [batch, heads, sequence, 1]);
  return { chosen: reshape(chosen, [batch, sequence]), graph: sum(mul(attention, perHead), [1]) };
}

export const card: RouterCard = {
  name: "attentionAware",
  title: "Graph of Tokens: attention-aware",
  paper: "2505.00792",
  equations: "abstract and sections 3, 4 as far as they could be read",
  needs: ["attention"],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; heads [heads] where their weights are learned",
  cost: "one product experts x width, the block's attention once more, and heads + experts for each token it looks at",
  claim: "experts are chosen with less entropy and fluctuate less, accuracy and robustness to noise rise",
  ourChoices: [
    "how the paper joins heads is not known: mean by default",
    "min-entropy compares entropies up to the token, which is causal; over the whole sequence on request, which is not",
    "learned weights of heads start equal",
    "gradients flow into the attention unless detachAttention is set",
    "mixing of logits and selfWeight are options beside the paper's form",
    "balance loss on the mixed probabilities, z-loss on the logits before mixing",
  ],
};
