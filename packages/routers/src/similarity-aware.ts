// Similarity-aware routing (Graph of Tokens, 2505.00792): a token is routed as the tokens that resemble it are.
//   r_j = softmax(W u_j + b);   S_ij = exp(u_iᵀ W_s u_j / tau) / Σ_j' exp(u_iᵀ W_s u_j' / tau), j in the same sequence
//   r~_i = Σ_j S_ij r_j;   K_i = top k of r~_i;   y_i = Σ_{e in K_i} r~_ie / (Σ_{m in K_i} r~_im) E_e(u_i)
// The experts see u_i itself, never a mixture. S is block-diagonal over the sequences of a batch, padding has S_.j = 0,
// and in a language model j <= i. Of the paper only the abstract and second-hand notes could be read: see ourChoices.
import {
  attention,
  concat,
  gatherLast,
  hostConstant,
  less,
  linear,
  matmul,
  mul,
  recomputed,
  reshape,
  ShapeError,
  scatterLast,
  slice,
  softmax,
  type Tensor,
  type Tree,
  topkIndices,
  UnsupportedError,
  where,
} from "@switchyard/core";
import type { RouterContext, RouterPlugin } from "@switchyard/core/moe";
import { decide, type GraphOptions, gate, gateParams, graphOptions, withEarlier } from "./graph-parts.ts";
import { checkK, checkWord, leaf, type RouterCard } from "./parts.ts";

export { entropyBounds } from "./graph-parts.ts";

export interface SimilarityAwareOptions extends GraphOptions {
  /**
   * W_s: the identity, a learned matrix `[width, width]`, or the learned Pᵀ P with P `[rank, width]`; default
   * "identity". Learned ones start where the identity at its default temperature stands.
   */
  readonly similarity?: "identity" | "learned" | "low-rank";
  /** Rows of P; default width / 8, at least 1. */
  readonly rank?: number;
  /** tau; default width / 2 for the identity, sqrt(width) for a learned W_s. */
  readonly temperature?: number;
  /** Keeps this many of the largest entries of each row of S and divides them by their sum; default: all. */
  readonly neighbours?: number;
  /** A token looks at this many latest tokens, itself included; default: all. For causal routing. */
  readonly window?: number;
  /** Whether a token looks at earlier tokens only; default true. false is for images and encoders. */
  readonly causal?: boolean;
}

/**
 * Top-k on a mixture of the tokens' distributions, weighted by similarity. Params: `weight [experts, width]`, with
 * `bias` also `bias [experts]`, and `similarity [width, width]` or `[rank, width]` where it is learned. Cache, per
 * position: what S compares (`keys`, width or rank numbers) and what it mixes (`values`, one per expert); a window
 * reads only its part of it. `probabilities` are the mixed ones, `logits` those before mixing. There are no halves
 * `score` and `select`: neither alone knows the cache.
 *
 * With `neighbours` or `window` no tensor has room for a whole sequence times a whole sequence, gradients included.
 * `init` throws ShapeError when k is not in 1..experts; `route` throws UnsupportedError when a router that is not
 * causal is asked to go on after cached tokens.
 *
 * @example similarityAware({ k: 2 })
 */
export function similarityAware(options: SimilarityAwareOptions): RouterPlugin {
  const name = "similarityAware";
  const common = graphOptions(name, options);
  const { similarity = "identity", rank, temperature, neighbours, window, causal = true } = options;
  const { k } = common;
  checkWord(name, "similarity", similarity, ["identity", "learned", "low-rank"]);
  for (const [option, value] of Object.entries({ rank, neighbours, window })) {
    if (value !== undefined && !(Number.isInteger(value) && value >= 1)) {
      throw new ShapeError(`${name}: ${option} = ${value}; expected a whole number from 1`);
    }
  }
  if (rank !== undefined && similarity !== "low-rank") {
    throw new ShapeError(`${name}: rank = ${rank} with similarity "${similarity}"; only "low-rank" has one`);
  }
  if (temperature !== undefined && !(temperature > 0 && Number.isFinite(temperature))) {
    throw new ShapeError(`${name}: temperature = ${temperature}; expected a number above 0`);
  }
  if (window !== undefined && !causal) {
    throw new UnsupportedError(
      `${name}: window = ${window} counts back from a token, and causal is false; use neighbours`,
    );
  }

  return {
    name,
    causal: { training: causal, evaluation: causal },
    needs: [],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: {
      ...common,
      similarity,
      rank: rank ?? null,
      temperature: temperature ?? null,
      neighbours: neighbours ?? null,
      window: window ?? null,
      causal,
    },
    expertsPerToken: k,
    init(context) {
      checkK(name, k, context.experts);
      const { width } = context;
      const own = similarity === "identity" ? {} : { similarity: startOf(context, similarity, rank) };
      const look: Look = {
        causal,
        temperature: temperature ?? (similarity === "identity" ? width / 2 : Math.sqrt(width)),
        ...(neighbours === undefined ? {} : { neighbours }),
        ...(window === undefined ? {} : { window }),
      };
      return {
        params: { ...gateParams(context, common), ...own },
        buffers: {},
        route(params, input) {
          const { layout, training, hidden } = input;
          if (!causal && layout.past > 0) {
            throw new UnsupportedError(
              `${name}: asked to route after ${layout.past} cached tokens, but with causal: false they should have ` +
                "looked at the new ones; decode without a cache, or use causal: true",
            );
          }
          const { logits, values } = gate(params, input, common);
          const [queries, keys] = sides(params, hidden, similarity).map((x) =>
            reshape(x, [layout.batch, layout.sequence, x.shape[1] ?? 0]),
          ) as [Tensor, Tensor];
          const seen = withEarlier(name, input, { keys, values });
          const mixed = mixBySimilarity(
            { queries, keys: leaf(seen, "keys"), values: leaf(seen, "values") },
            { ...look, ...(layout.mask ? { mask: layout.mask } : {}) },
          ); // [batch, sequence, experts]
          const routed = decide({ logits, values, mixed }, input, common);
          return causal && !training ? { ...routed, cache: seen } : routed;
        },
      };
    },
  };
}

/** So that u W_s u / sqrt(width) starts as u u / (width / 2): exactly, or on average over the draws of P. */
function startOf(
  { engine, width, random }: RouterContext,
  similarity: "learned" | "low-rank",
  rank = Math.max(1, Math.floor(width / 8)),
): Tensor {
  const scale = 2 / Math.sqrt(width);
  if (similarity === "learned") {
    const identity = new Float64Array(width * width);
    for (let i = 0; i < width; i++) identity[i * (width + 1)] = scale;
    return engine.tensor(identity, [width, width]);
  }
  const draws = random.at("similarity").host("normal", rank * width);
  return engine.tensor(
    draws.map((z) => z * Math.sqrt(scale / rank)),
    [rank, width],
  );
}

/** Rows whose products are u_iᵀ W_s u_j: of the token that looks, of the token looked at. */
function sides(params: Tree, hidden: Tensor, similarity: "identity" | "learned" | "low-rank"): [Tensor, Tensor] {
  if (similarity === "identity") return [hidden, hidden];
  const projected = linear(hidden, leaf(params, "similarity")); // [tokens, width or rank]
  return similarity === "learned" ? [hidden, projected] : [projected, projected];
}

/** How tokens look at each other. */
export interface Look {
  readonly causal: boolean;
  readonly temperature: number;
  readonly neighbours?: number;
  readonly window?: number;
  /** `[batch, total]`, 1 = real token. */
  readonly mask?: Tensor;
}

/** Tokens that look at once where their view is limited: rows of a block of S. */
const blockRows = 128;

/**
 * Σ_j S_ij v_j: queries `[batch, sequence, d]` are the last of total positions, keys `[batch, total, d]`, values
 * `[batch, total, n]` -> `[batch, sequence, n]`. A token that sees nothing gets zeros.
 */
export function mixBySimilarity(
  { queries, keys, values }: { readonly queries: Tensor; readonly keys: Tensor; readonly values: Tensor },
  look: Look,
): Tensor {
  const [batch = 0, sequence = 0, d = 0] = queries.shape;
  const [, total = 0, n = 0] = values.shape;
  const { causal, neighbours, window, mask } = look;
  if (neighbours === undefined && window === undefined) return attend([queries, keys, values, mask], look);
  if (batch * sequence * n === 0) return slice(values, [0, total - sequence, 0], [batch, sequence, n]);
  const past = total - sequence;
  const blocks: Tensor[] = [];
  for (let from = 0; from < sequence; from += blockRows) {
    const rows = Math.min(blockRows, sequence - from);
    const first = window === undefined ? 0 : Math.max(0, past + from - window + 1);
    const end = causal ? past + from + rows : total;
    const seen = (x: Tensor): Tensor => slice(x, [0, first, 0], [batch, end - first, x.shape[2] ?? 0]);
    const block = [slice(queries, [0, from, 0], [batch, rows, d]), seen(keys), seen(values)];
    const real = mask && slice(mask, [0, first], [batch, end - first]);
    blocks.push(
      neighbours === undefined
        ? attend([...block, real], look)
        : recomputed(real ? [...block, real] : block, (q, k, v, m) => {
            if (!q || !k || !v) throw new RangeError("recomputed passes on what it was given");
            const at = { offset: past + from - first, ...look };
            return matmul(similarityGraph(q, k, m ? { ...at, mask: m } : at), v);
          }),
    );
  }
  return concat(blocks, 1);
}

/** All that is visible with its weight: what an attention of one head computes, with kernels that never hold S. */
function attend(
  [queries, keys, values, mask]: readonly (Tensor | undefined)[],
  { causal, temperature, window }: Look,
): Tensor {
  if (!queries || !keys || !values) throw new RangeError("attend needs queries, keys and values");
  const head = (x: Tensor): Tensor => reshape(x, [x.shape[0] ?? 0, x.shape[1] ?? 0, 1, x.shape[2] ?? 0]);
  const { output } = attention(head(queries), head(keys), head(values), {
    causal,
    scale: 1 / temperature,
    ...(window === undefined ? {} : { window }),
    ...(mask ? { mask } : {}),
  }); // [batch, sequence, 1, n]
  return reshape(output, [queries.shape[0] ?? 0, queries.shape[1] ?? 0, values.shape[2] ?? 0]);
}

/**
 * S as a tensor, `[batch, sequence, total]`: for looking at it, and for blocks of it. Query i stands at position
 * `offset` + i; by default the queries are the last of the positions.
 */
export function similarityGraph(queries: Tensor, keys: Tensor, look: Look & { readonly offset?: number }): Tensor {
  const [batch = 0, sequence = 0] = queries.shape;
  const [, total = 0] = keys.shape;
  const { causal, temperature, neighbours, window, mask, offset = total - sequence } = look;
  const positions = (n: number, start: number, shape: readonly number[]): Tensor =>
    hostConstant(
      keys,
      Int32Array.from({ length: n }, (_, i) => start + i),
      shape,
    );
  const j = positions(total, 0, [total]);
  let scores = mul(matmul(queries, keys, { transposeB: true }), 1 / temperature); // [batch, sequence, total]
  if (causal) scores = where(less(j, positions(sequence, offset + 1, [sequence, 1])), scores, -Infinity);
  if (window !== undefined) {
    scores = where(less(positions(sequence, offset - window, [sequence, 1]), j), scores, -Infinity);
  }
  if (mask) scores = where(reshape(mask, [batch, 1, total]), scores, -Infinity);
  if (neighbours === undefined || neighbours >= total) return softmax(scores);
  const nearest = topkIndices(scores, neighbours); // [batch, sequence, neighbours]
  return scatterLast(softmax(gatherLast(scores, nearest)), nearest, total);
}

export const card: RouterCard = {
  name: "similarityAware",
  title: "Graph of Tokens: similarity-aware",
  paper: "2505.00792",
  equations:
    "abstract and sections 2, 4 as far as they could be read; the form is the marginal over a latent neighbour",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; similarity [width, width] or [rank, width] where it is learned",
  cost: "one product experts x width, and for each token it looks at width + experts",
  claim: "experts are chosen with less entropy and fluctuate less, accuracy and robustness to noise rise",
  ourChoices: [
    "in causal models a token looks at itself and earlier tokens only: otherwise generation would see the future",
    "temperature width / 2 for the identity (on a toy task much less makes S diagonal), sqrt(width) for a learned W_s",
    "whether W_s is learned is not known: identity by default, learned ones start as its equal",
    "mixing of logits, selfWeight, neighbours and window are options beside the paper's form",
    "balance loss on the mixed probabilities, z-loss on the logits before mixing",
    "the cache keeps every position also where a window is set, so that it can be cut back",
  ],
};
