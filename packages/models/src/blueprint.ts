// What a decoder is made of, layer by layer, as plain data: everything in which the families of checkpoints differ. A model is
// a blueprint and a tree of parameters; `layers.3.attention.q` is the path of one of them.
import type { RouterPlugin } from "@switchyard/core/moe";
import type { Rotary } from "./rope.ts";

/** RMS (1910.07467): a weight. Layer (1607.06450): a weight and a bias. */
export interface Norm {
  readonly kind: "rms" | "layer";
  readonly eps: number;
}

/** Grouped-query attention (2305.13245). Parameters: `q`, `k`, `v`, `o`, and `qBias`, ..., `qNorm`, `kNorm`, `sinks [heads]`. */
export interface GroupedAttention {
  readonly kind: "grouped";
  readonly heads: number;
  /** A divisor of `heads`. */
  readonly kvHeads: number;
  readonly headSize: number;
  /** Biases of q, k and v; default false. */
  readonly bias?: boolean;
  /** Bias of o; default false. */
  readonly outputBias?: boolean;
  /** RMS normalisation of queries and keys, of each head (Qwen3) or of the whole projection (OLMoE); default none. */
  readonly qkNorm?: "head" | "projection" | undefined;
  /** Clips q, k and v to [-clip, clip] after the norm (OLMoE). */
  readonly clip?: number | undefined;
  /** Factor of the scores; default 1 / sqrt(headSize). */
  readonly scale?: number;
  /** A query sees the latest so many positions, itself included; default: all. */
  readonly window?: number | undefined;
  /** One learned score per head that takes part in the softmax and has no value (gpt-oss). */
  readonly sinks?: boolean;
  readonly rope: Rotary;
}

/**
 * Multi-head latent attention (2405.04434). Parameters: `q [heads (nope + rope), width]`, or with `queryRank` `qDown`, `qNorm`,
 * `qUp`; `kvDown [rank + ropeSize, width]`, `kvNorm [rank]`, `kvUp [heads (nope + value), rank]`, `o`; biases `qDownBias`, `kvDownBias`,
 * `oBias`.
 */
export interface LatentAttention {
  readonly kind: "latent";
  readonly heads: number;
  /** Rank of the queries' bottleneck; absent: one matrix. */
  readonly queryRank?: number | undefined;
  /** Rank of what keys and values are made from: the cache holds that, and one rotary key per position. */
  readonly rank: number;
  /** Channels of a head without position. */
  readonly nopeSize: number;
  /** Channels of a head with position. */
  readonly ropeSize: number;
  readonly valueSize: number;
  /** Of the two down projections and o; default false. */
  readonly bias?: boolean;
  readonly scale: number;
  readonly normEps: number;
  readonly rope: Rotary;
}

/**
 * Mixture of attention heads (2210.05144, JetMoE 2404.07413): every token has a query from each of its k experts, keys and
 * values are common. Parameters: `router`, `experts.input [experts, kvHeads headSize, width]`, `experts.output [experts, width, kvHeads
 * headSize]`, `kv [2 kvHeads headSize, width]`, `bias [width]`.
 */
export interface MixtureAttention {
  readonly kind: "mixture";
  readonly experts: number;
  /** Experts per token. */
  readonly k: number;
  /** Heads of keys and values; each of the k experts has as many queries. */
  readonly kvHeads: number;
  readonly headSize: number;
  readonly router: RouterPlugin;
  readonly rope: Rotary;
}

/** What a gated feed-forward layer does with gate and up; clamped: (up + 1) gate sigmoid(alpha gate) of clipped values (gpt-oss). */
export type GateActivation =
  | "silu"
  | "gelu"
  | "gelu-tanh"
  | "relu"
  | { readonly kind: "clamped"; readonly limit: number; readonly alpha: number };

/** Parameters: `dense.gateUp [1, 2 hidden, width]`, `dense.down [1, width, hidden]`. */
export interface DenseFeedForward {
  readonly kind: "dense";
  readonly hidden: number;
  /** Default silu. */
  readonly activation?: GateActivation;
}

/**
 * Routed experts. Parameters: `moe.router`, `moe.experts.gateUp [experts, 2 hidden, width]` (gate rows, then up rows), `moe.experts.down
 * [experts, width, hidden]`, with `bias` `gateUpBias [experts, 2 hidden]` and `downBias [experts, width]`; `moe.shared.0.experts.{gateUp,down}`
 * with a leading 1, `moe.shared.0.gate [1, width]`; `moeBias [width]`.
 */
export interface MoEFeedForward {
  readonly kind: "moe";
  readonly experts: number;
  /** Inner size of one expert. */
  readonly hidden: number;
  readonly router: RouterPlugin;
  /** Default silu. */
  readonly activation?: GateActivation;
  /** Biases inside the experts; default false. */
  readonly bias?: boolean;
  /** Experts that every token goes through, run as one of inner size `hidden`; `gate`: times sigmoid(x gateᵀ) (Qwen2-MoE). */
  readonly shared?: { readonly hidden: number; readonly gate?: boolean } | undefined;
  /** A bias on the layer's output (JetMoE); default false. */
  readonly outputBias?: boolean;
}

export interface LayerBlueprint {
  readonly attention: GroupedAttention | LatentAttention | MixtureAttention;
  readonly feedForward: DenseFeedForward | MoEFeedForward;
}

/**
 * A decoder: embedding, layers of pre-norm attention and feed-forward, norm, head. Parameters outside the layers: `embed [vocabulary,
 * width]`, `norm`, `head [vocabulary, width]`, `headBias`; in a layer: `attentionNorm`, `attention`, `moeNorm`, then `moe` or `dense`. Norms of
 * kind "layer" also have `normBias`, `attentionNormBias`, `moeNormBias`.
 */
export interface Blueprint {
  readonly vocabulary: number;
  readonly width: number;
  /** Longest sequence. */
  readonly context: number;
  readonly layers: readonly LayerBlueprint[];
  readonly norm: Norm;
  /** Where the two norms of each layer have another `eps` than the last one (JetMoE). */
  readonly layerNormEps?: number;
  /** The head is the embedding. */
  readonly tieEmbeddings: boolean;
  readonly headBias?: boolean;
  /** Factors (Granite) of the embedding, of what a layer adds to the residual stream, and of the logits; default 1. */
  readonly embedScale?: number;
  readonly residualScale?: number;
  readonly logitScale?: number;
  /** Runs routers that look at later tokens; default false. */
  readonly allowNonCausal?: boolean;
  /** Occurrences of each token id in the training text, for routers whose tables follow them. */
  readonly tokenCounts?: Float64Array | undefined;
}
