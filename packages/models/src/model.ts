// The contracts of this package: checkpoints, models and their caches, routing traces, checkpoint families. Types only.
import type { Engine, Json, Random, Tensor, Tree } from "@switchyard/core";
import type { Routed, Router, RoutingOverride } from "@switchyard/core/moe";
import type { Blueprint } from "./blueprint.ts";
import type { ReadPart } from "./read-parts.ts";
import type { ExpertStore, StreamPolicy } from "./streamed-experts.ts";

/** Lazy: nothing is read until asked. `dtype` is the file's own name ("BF16", "F8_E4M3", "I64", ...). */
export interface Checkpoint {
  readonly config: { readonly [key: string]: Json };
  readonly names: readonly string[];
  /** Throws CheckpointError for a name that is not there; so does `read`. */
  stored(name: string): { readonly shape: readonly number[]; readonly dtype: string; readonly bytes: number };
  /** The tensor's bytes, or those from `from` to `to` (exclusive), in a buffer of their own. */
  read(name: string, range?: readonly [from: number, to: number]): Promise<Uint8Array>;
  /** As many of the tensor's bytes, from byte `from` on, as `target` has, put there: for memory that is used again and again. */
  readInto?(target: Uint8Array, name: string, from: number): Promise<void>;
  /**
   * Many parts of tensors in as few reads as there can be. Every read has ended when this settles, also where one failed.
   * Throws CheckpointError for a name that is not there, and for a part that its tensor has not.
   */
  readParts?(parts: readonly ReadPart[]): Promise<void>;
}

/** Keys and values of earlier positions, and the routers' own caches, for every layer. */
export interface KvCache {
  /** Positions held; it moves on when a forward pass has appended to every layer. */
  readonly length: number;
  /** Which row each row was when the cache was made: `reorder` changes it. Traces number their sequences by it. */
  readonly origins?: readonly number[];
  /** Keys and values [batch, sequence, kvHeads, headSize] of new positions. */
  append(layer: number, keys: Tensor, values: Tensor): void;
  /** Row i becomes what row rows[i] was (beam search); the number of rows may change. */
  reorder(rows: readonly number[]): void;
  /** Forgets the positions from `length` on (rejected drafts). */
  truncate(length: number): void;
  /** What it holds on the device. */
  readonly bytes?: number;
  /** Another one with the first `length` positions. */
  copy?(length: number): KvCache;
  dispose(): void;
}

export interface RoutingTrace {
  /** `layer` counts the routers of the model (`Model.routing`): layers without one are left out. */
  record(layer: number, routed: Routed): void;
  /** false: `step` need not compute `routed.metrics` for it; default true. */
  readonly metrics?: boolean;
}

/** What a pass shows on its way: name, the tensor `[batch, sequence, width]`, and the layer (0 for those outside layers). */
export type Watch = (
  what: /** The embedding as looked up, before any factor. */
    | "embed"
    /** What attention gives, before it is added. */
    | "attention"
    /** What router and experts see, after the norm. */
    | "moeInput"
    /** What the experts give, shared ones included, before it is added. */
    | "moeOutput"
    /** What a layer gives. */
    | "hidden"
    | "finalNorm",
  x: Tensor,
  layer: number,
) => void;

export interface ForwardOptions {
  readonly cache?: KvCache;
  /** [batch, past + sequence], 1 = real token. */
  readonly mask?: Tensor;
  /**
   * Padding tokens before each row, where rows of different lengths share a batch: instead of `mask`, and positions count from
   * the first real token, so that a row is computed as if it were alone. The same numbers with every call of one cache.
   */
  readonly padding?: readonly number[];
  /**
   * Positions `[past + sequence]` and more that the sequence will have, padding included, where this pass is a part of it: rotary
   * positions that depend on the length (dynamic, longrope) are then those of the whole. Default: what this pass reaches.
   */
  readonly length?: number;
  /** Per row of the batch. */
  readonly override?: readonly (RoutingOverride | undefined)[];
  /** How `traced` numbers the rows; default: by the cache's `origins`, or 0, 1, 2, ... */
  readonly sequences?: readonly number[];
  readonly trace?: RoutingTrace;
  /** Accepts, for this call, a router that looks at later tokens; default: what the model's config says. */
  readonly allowNonCausal?: boolean;
  /** What `step` gives logits for: the last position `[batch, vocabulary]` (default), or all `[batch, sequence, vocabulary]`. */
  readonly positions?: "last" | "all";
  /** Sees hidden states as they come, valid during the call only: read them or `alias` them. */
  readonly watch?: Watch;
}

/** Where a router stands: in the attention of a layer (mixture of attention heads) or in its feed-forward part. */
export interface RoutingPlace {
  readonly layer: number;
  readonly part: "attention" | "feedForward";
  readonly experts: number;
}

export interface Model {
  readonly params: Tree;
  readonly layers: number;
  readonly vocabulary: number;
  readonly width: number;
  /** Longest sequence. */
  readonly context: number;
  /** The routers in the order in which a pass asks them. */
  readonly routing: readonly RoutingPlace[];
  /** Training and full passes: ids [batch, sequence] -> logits [batch, sequence, vocabulary]. */
  forward(
    params: Tree,
    ids: Tensor,
    options?: ForwardOptions,
  ): { readonly logits: Tensor; readonly routed: readonly Routed[] };
  /**
   * Inference layer by layer, so that experts can be loaded in between. Logits of the last position: [batch, vocabulary].
   */
  step(ids: Tensor, options?: ForwardOptions): Promise<Tensor>;
  /** Logits of hidden states `[..., width]` as any layer gives them: final norm, then the head (DoLa reads early layers so). */
  head(hidden: Tensor): Tensor;
  newCache(batch: number): KvCache;
}

export interface PassOptions extends ForwardOptions {
  /** Default false. */
  readonly training?: boolean;
  /** Optimiser steps done; default 0. */
  readonly step?: number;
  readonly totalSteps?: number;
  /** Repetition of the same batch (THOR); default 0. */
  readonly pass?: number;
  /** Keyed by (seed, step, pass, micro-batch); default: seed 0. */
  readonly random?: Random;
  /** One tree per router, instead of the model's own. */
  readonly buffers?: readonly Tree[];
  /** Handed to routers. */
  readonly schedule?: Readonly<Record<string, number | boolean>>;
  /** `[load]` per router, handed to routers. */
  readonly globalLoad?: readonly Tensor[];
  /**
   * Is told the inputs of every matrix of the routed experts, rows sorted by expert: `parameter` is the path of the
   * matrix in `params` ("layers.0.moe.experts.gateUp").
   */
  readonly observe?: (parameter: string, layer: number, rows: Tensor, ends: Tensor) => void;
}

/** A decoder that runs: what every architecture gives. */
export interface LanguageModel extends Model {
  readonly engine: Engine;
  readonly blueprint: Blueprint;
  /** In the order of `routing`. */
  readonly routers: readonly Router[];
  /** The routers' buffers, one tree per router. */
  readonly buffers: readonly Tree[];
  /** Where the experts are read from, if not all are in memory. */
  readonly streamed?: ExpertStore;
  /**
   * ids i32 [batch, sequence] -> logits [batch, sequence, vocabulary], and what each router decided. Ids outside the
   * vocabulary embed to zero. Throws ShapeError for a sequence beyond `context`, UnsupportedError for a router that looks
   * ahead and for streamed experts.
   */
  forward(
    params: Tree,
    ids: Tensor,
    options?: PassOptions,
  ): { readonly logits: Tensor; readonly routed: readonly Routed[] };
  /**
   * Logits [batch, vocabulary] of the last position, or of all with `positions: "all"`, layer by layer. What a trace records or a
   * watch sees is valid during the call only: read it or `alias` it.
   */
  step(ids: Tensor, options?: ForwardOptions): Promise<Tensor>;
  /** The same model with other parameters and buffers, for example a trainer's. Nothing is copied. */
  with(state: { readonly params?: Tree; readonly buffers?: readonly Tree[] }): LanguageModel;
}

export interface ReadModelOptions {
  /** Bytes that the model may hold; experts that do not fit are read when they are needed. Default: no limit. */
  readonly memory?: number;
  /** How the experts that are kept are chosen, where not all are in memory; default "lru". */
  readonly streaming?: StreamPolicy;
  /** "f32" widens all weights, as training needs it; default "stored": the type of the file, where the backend takes it. */
  readonly weights?: "stored" | "f32";
}

/** A family of checkpoints: what a Hugging Face `model_type` stands for. */
export interface Architecture {
  readonly modelTypes: readonly string[];
  read(checkpoint: Checkpoint, engine: Engine, options?: ReadModelOptions): Promise<LanguageModel>;
}
