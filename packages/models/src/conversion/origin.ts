// The checkpoint that is converted, as its files hold it, and what a conversion is asked for.
import { CheckpointError, type Json } from "@switchyard/core";
import { readIndex, weightFiles } from "../checkpoint.ts";
import type { FolderFiles } from "../files.ts";
import type { Checkpoint } from "../model.ts";
import { readHeader } from "../safetensors.ts";

/** Float types that a checkpoint can be converted to. */
export type FloatType = "f32" | "f16" | "bf16";
export const floatTypes: readonly FloatType[] = ["f32", "f16", "bf16"];

/** Of everything that writes a checkpoint anew. */
export interface RewritingOptions {
  /** Puts the result in the place of what the target folder holds; default false: that folder must be empty or absent. */
  readonly replace?: boolean;
  /** Reads files that are links out of the folder; default false. */
  readonly followLinks?: boolean;
  readonly signal?: AbortSignal;
}

export interface ConvertOptions extends RewritingOptions {
  /** Type of all plain floats; quantised weights, their scales and integers stay as they are. Default: as stored. */
  readonly dtype?: FloatType;
  /** Writes the largest finite number where a value is too large for `dtype`, instead of refusing. Default false. */
  readonly saturate?: boolean;
  /** Most bytes of tensors in one file, unless a single tensor has more. Default: the files of the source. */
  readonly shardBytes?: number;
  /** All experts of a layer in one tensor, or one tensor per expert and matrix. Default: as stored. */
  readonly experts?: "fused" | "separate";
  onProgress?(progress: ConvertProgress): void;
}

export interface ConvertProgress {
  /** Writing the files, comparing them with the source, and their checksums. */
  readonly stage: "writing" | "comparing" | "checksums";
  /** In bytes, of this stage. */
  readonly done: number;
  readonly total: number;
}

/** In bytes; a multiple of every element size. */
export const pieceSize = 1 << 23;

export interface SourceTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly file: string;
  readonly bytes: number;
}
/** The checkpoint that is read: opened once, closed at the end. */
export interface Origin {
  readonly folder: string;
  readonly files: FolderFiles;
  readonly checkpoint: Checkpoint;
  /** In the order in which they lie in the files. */
  readonly tensors: readonly SourceTensor[];
  /** Files of weights and their metadata, in the order of the index. */
  readonly weights: ReadonlyMap<string, ReadonlyMap<string, string>>;
  readonly index: { readonly [key: string]: Json } | undefined;
}

export async function readOrigin(folder: string, files: FolderFiles, checkpoint: Checkpoint): Promise<Origin> {
  const weights = new Map<string, ReadonlyMap<string, string>>();
  const tensors: SourceTensor[] = [];
  for (const file of [...(await weightFiles(files.open, folder)).keys()].sort()) {
    const source = await files.open(file);
    if (!source) throw new CheckpointError(`${folder} has no ${file}`);
    try {
      const header = await readHeader(source);
      weights.set(file, header.metadata);
      const ordered = [...header.tensors].sort(([, a], [, b]) => a.from - b.from || a.to - b.to);
      for (const [name, { dtype, shape, from, to }] of ordered) {
        tensors.push({ name, dtype, shape, file, bytes: to - from });
      }
    } finally {
      await source.close();
    }
  }
  return { folder, files, checkpoint, tensors, weights, index: await readIndex(files.open) };
}

export type Advance = (bytes: number) => void;

/** Who is told how far a stage is, and may end it. */
export interface Listener<S extends string> {
  readonly signal?: AbortSignal;
  onProgress?(progress: { readonly stage: S; readonly done: number; readonly total: number }): void;
}

/** Counts bytes of a stage and lets the caller end it. */
export function stage<S extends string>(name: S, total: number, { onProgress, signal }: Listener<S>): Advance {
  let done = 0;
  return (bytes) => {
    signal?.throwIfAborted();
    done += bytes;
    onProgress?.({ stage: name, done, total });
  };
}
