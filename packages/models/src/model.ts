// The contracts of this package: checkpoints, models and their caches, routing traces, checkpoint families. Types only.
import type { Engine, Json, Tensor, Tree } from "@switchyard/core";
import type { Routed, RoutingOverride } from "@switchyard/core/moe";

/** Lazy: nothing is read until asked. `dtype` is the file's own name ("BF16", "F8_E4M3", "I64", ...). */
export interface Checkpoint {
  readonly config: { readonly [key: string]: Json };
  readonly names: readonly string[];
  /** Throws CheckpointError for a name that is not there; so does `read`. */
  stored(name: string): { readonly shape: readonly number[]; readonly dtype: string; readonly bytes: number };
  /** The tensor's bytes, or those from `from` to `to` (exclusive), in a buffer of their own. */
  read(name: string, range?: readonly [from: number, to: number]): Promise<Uint8Array>;
}

/** Keys and values of earlier positions, and the routers' own caches, for every layer. */
export interface KvCache {
  /** Positions held; it moves on when a forward pass has appended to every layer. */
  readonly length: number;
  /** Keys and values [batch, sequence, kvHeads, headSize] of new positions. */
  append(layer: number, keys: Tensor, values: Tensor): void;
  /** Row i becomes what row rows[i] was (beam search); the number of rows may change. */
  reorder(rows: readonly number[]): void;
  /** Forgets the positions from `length` on (rejected drafts). */
  truncate(length: number): void;
  dispose(): void;
}

export interface RoutingTrace {
  record(layer: number, routed: Routed): void;
}

export interface ForwardOptions {
  readonly cache?: KvCache;
  /** [batch, past + sequence], 1 = real token. */
  readonly mask?: Tensor;
  /** Per row of the batch. */
  readonly override?: readonly (RoutingOverride | undefined)[];
  readonly trace?: RoutingTrace;
  /** Accepts, for this call, a router that looks at later tokens; default: what the model's config says. */
  readonly allowNonCausal?: boolean;
}

export interface Model {
  readonly params: Tree;
  readonly layers: number;
  readonly vocabulary: number;
  /** Training and full passes: ids [batch, sequence] -> logits [batch, sequence, vocabulary]. */
  forward(
    params: Tree,
    ids: Tensor,
    options?: ForwardOptions,
  ): { readonly logits: Tensor; readonly routed: readonly Routed[] };
  /**
   * Inference layer by layer: route, leave the scope, prepare experts, apply. Logits of the last position: [batch,
   * vocabulary].
   */
  step(ids: Tensor, options?: ForwardOptions): Promise<Tensor>;
  newCache(batch: number): KvCache;
}

/** A family of checkpoints: what a Hugging Face `model_type` stands for. */
export interface Architecture {
  readonly modelTypes: readonly string[];
  read(checkpoint: Checkpoint, engine: Engine, options: { readonly memory?: number }): Promise<Model>;
}
