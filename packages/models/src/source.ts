// Where the parameters of a model lie in a checkpoint, as data: what an architecture says and the loader, the streamer of experts
// and the generator of random checkpoints read.
import type { Blueprint } from "./blueprint.ts";
import type { Checkpoint } from "./model.ts";

/** One stored tensor or a part of it. */
export interface Piece {
  /**
   * Name of the tensor where it is stored as floats, such as "model.layers.0.self_attn.q_proj.weight". Quantised forms have names made
   * from it (`.weight_packed`, `.weight_scale_inv`, `_blocks`).
   */
  readonly name: string;
  /** Shape of this part, `[out, in]` for a matrix, as it is used: after `index`, `rows`, `transposed`. */
  readonly shape: readonly number[];
  /** Entry of the first axis of a tensor that stacks experts. */
  readonly index?: number;
  /** How many entries that first axis has; given with `index`. */
  readonly of?: number;
  /** The first of the rows that belong here, of `total` rows that are stored. */
  readonly rows?: { readonly from: number; readonly total: number };
  /** Stored as [in, out]. */
  readonly transposed?: boolean;
  /** Rows of gate and up alternate in the file (gpt-oss); used are all of gate, then all of up. */
  readonly alternating?: boolean;
}

/** Pieces one below the other. */
export type Source =
  | { readonly kind: "whole"; readonly shape: readonly number[]; readonly pieces: readonly Piece[] }
  /** A parameter `[experts, ...]`, expert by expert. */
  | {
      readonly kind: "experts";
      readonly shape: readonly number[];
      expert(e: number): readonly Piece[];
    };

/** All pieces of a source, expert by expert. */
export function* piecesOf(source: Source): Generator<Piece> {
  if (source.kind === "whole") yield* source.pieces;
  else for (let e = 0; e < (source.shape[0] ?? 0); e++) yield* source.expert(e);
}

/** The pieces of a whole parameter, or of expert `e` of a stack. */
export const piecesAt = (source: Source, e: number): readonly Piece[] =>
  source.kind === "whole" ? source.pieces : source.expert(e);

/** A checkpoint understood: the model it holds, and where each of its parameters lies. */
export interface Description {
  readonly blueprint: Blueprint;
  /** By path of the parameter; those of routers at `layers.0.moe.router.weight`, their buffers at `layers.0.moe.buffers.bias`. */
  readonly sources: ReadonlyMap<string, Source>;
  /** Tensors that may be there and mean nothing. */
  ignores?(name: string): boolean;
  /** Of those, tensors that repeat a parameter for programs that read them: their names, and the parameter's path. */
  readonly copies?: ReadonlyMap<string, string>;
}

/** The part of a checkpoint that can be understood without reading weights. */
export type CheckpointIndex = Pick<Checkpoint, "config" | "names" | "stored">;
