// Saving what was trained in the layout of the checkpoint that it was loaded from (Node only): the files of the source with the bytes of
// changed values put in, compared with the source and the values before they count.
import { CheckpointError } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import type { DescribedArchitecture } from "../architectures/architecture.ts";
import { describeCheckpoint } from "../architectures/find.ts";
import { readCheckpoint } from "../checkpoint.ts";
import { type CertifiedFile, checkFiles } from "../conversion/compare.ts";
import { advancing, belongs, copied, otherFiles, rewriting } from "../conversion/folder.ts";
import { type Origin, pieceSize, type RewritingOptions, type SourceTensor, stage } from "../conversion/origin.ts";
import { type FileToSave, saveFiles } from "../files.ts";
import { readExactly } from "../safetensors.ts";
import { compare, compareHeaders, differs, headerBytes, type TunedTensor } from "./compare.ts";
import type { MergeCounts } from "./merge.ts";
import { type Changed, checkQuantized, chunksOf, type Patch, patched, patchesOf, quantizedBytes } from "./patches.ts";

export interface SaveTunedOptions extends RewritingOptions {
  /** For models saved in our own layout: the routers that may occur, as for loading. */
  readonly routers?: readonly RouterPlugin[];
  /** Architectures beside the built-in ones, asked first. */
  readonly architectures?: readonly DescribedArchitecture[];
  onProgress?(progress: TunedProgress): void;
}

export interface TunedProgress {
  /** Looking for what changed, writing, comparing what was written with the source and the values, checksums of all files. */
  readonly stage: "checking" | "writing" | "comparing" | "checksums";
  /** In bytes, of this stage. */
  readonly done: number;
  readonly total: number;
}

/** What became of a checkpoint that was tuned, worked out from the files that were read and written. */
export interface TunedCertificate {
  readonly schema: "switchyard/tuned/1";
  readonly source: string;
  readonly target: string;
  /** False: every file is a copy, byte for byte. */
  readonly changed: boolean;
  readonly totals: {
    /** Of the source and of the target. */
    readonly tensors: number;
    readonly bytes: number;
    /** Tensors that keep every byte. */
    readonly kept: number;
  };
  /**
   * Values that are not those of the source; of these, those that another value of the stored type stands for; of these, those whose
   * nearest value is the one that was there: the type could not show the change.
   */
  readonly values: { readonly changed: number; readonly rounded: number; readonly unshown: number };
  /** Those that do not keep every byte, in the order of the files. */
  readonly tensors: readonly TunedTensor[];
  readonly files: {
    /** `copied`: the same bytes under the same name in the target. */
    readonly source: readonly (CertifiedFile & { readonly copied: boolean })[];
    readonly target: readonly (CertifiedFile & { readonly copied: boolean })[];
    /** What lay in the source folder and was not read. */
    readonly leftOut: readonly { readonly name: string; readonly reason: string }[];
  };
}

/** Entries of a tensor some of whose bytes change. */
type Dirty = ReadonlyMap<string, ReadonlySet<number>>;

/** Merges all values without writing them: what changes, or why it cannot be written. */
async function changesOf(
  { checkpoint }: Origin,
  patches: ReadonlyMap<string, Patch>,
  advance: (bytes: number) => void,
): Promise<{ readonly dirty: Dirty; readonly counts: MergeCounts }> {
  const counts: MergeCounts = { changed: 0, rounded: 0, unshown: 0 };
  const dirty = new Map<string, Set<number>>();
  for (const [name, patch] of patches) {
    const own = new Set<number>();
    for (const entry of patch.slots.keys()) {
      for (const chunk of chunksOf(patch)) {
        const { stored, bytes } = await patched(checkpoint, patch, { entry, chunk, counts });
        if (differs(stored, bytes)) own.add(entry);
        advance(stored.length);
      }
    }
    if (own.size > 0) dirty.set(name, own);
  }
  return { dirty, counts };
}

/** The bytes of a tensor with what changed. */
async function* tensorBytes(
  { checkpoint }: Origin,
  { name, bytes }: SourceTensor,
  patch: Patch | undefined,
  dirty: ReadonlySet<number>,
): AsyncGenerator<Uint8Array, void, undefined> {
  const entries = patch?.entries ?? 1;
  for (let entry = 0; entry < entries; entry++) {
    if (patch && dirty.has(entry)) {
      for (const chunk of chunksOf(patch)) yield (await patched(checkpoint, patch, { entry, chunk })).bytes;
      continue;
    }
    const end = ((entry + 1) * bytes) / entries;
    for (let at = (entry * bytes) / entries; at < end; at += pieceSize) {
      yield await checkpoint.read(name, [at, Math.min(end, at + pieceSize)]);
    }
  }
}

/** A file of weights with what changed: its header as it is, for no tensor changes its size. */
async function* rewrittenFile(
  origin: Origin,
  file: string,
  { patches, dirty }: { patches: ReadonlyMap<string, Patch>; dirty: Dirty },
): AsyncGenerator<Uint8Array, void, undefined> {
  const own = origin.tensors.filter((tensor) => tensor.file === file);
  const source = await origin.files.open(file);
  if (!source) throw new CheckpointError(`${file} was there a moment ago, and is not any more`);
  try {
    yield await readExactly(source, 0, headerBytes(source.size, own));
  } finally {
    await source.close();
  }
  for (const tensor of own) {
    yield* tensorBytes(origin, tensor, patches.get(tensor.name), dirty.get(tensor.name) ?? new Set());
  }
}

/**
 * Saves a tuned model as a checkpoint of the same layout as the one that it was loaded from: the same files, shards and names, experts
 * fused or one by one, matrices transposed or alternating as there, and in the same types, rounded to nearest, ties to even. `changed`: f32
 * tensors of the model's own shapes by their paths in `params` (`leaves`), those of low-rank maps merged; parameters that are not in
 * it, and those whose values are those of the source, keep their bytes. config.json and all other files are copies. A head that a file
 * stores beside a tied embedding follows the embedding.
 *
 * A few rows are in memory at a time. What was written is compared with the source and with the values, byte for byte, before it
 * counts; the target holds all of the new checkpoint or what it held before, also when the process is killed (see `saveFiles`).
 *
 * Throws, before anything is written, UnsupportedError for a target inside the source or not empty, for quantised tensors whose values
 * changed, and for values that are not finite or too large for the stored type; CheckpointError for a path that the model has not;
 * ShapeError for another shape; CheckpointError for a damaged source, and where files cannot be read or written; the signal's reason
 * when aborted (the target is then as it was).
 *
 * @example
 * const { values } = await saveTuned("OLMoE-1B-7B-0924", "olmoe-tuned", new Map([["layers.0.moe.experts.down", down]]));
 * console.log(values.unshown / values.changed); // the share of changes too small for bf16
 */
export async function saveTuned(
  source: string,
  target: string,
  changed: Changed,
  options: SaveTunedOptions = {},
): Promise<TunedCertificate> {
  return rewriting({ source, target, act: "tune" }, options, async (origin) => {
    const { routers = [], architectures = [] } = options;
    const known = { routers, architectures, otherOptions: true };
    const description = describeCheckpoint(origin.checkpoint, known, source);
    const { patches, quantized } = patchesOf(origin, description, changed);
    const touched = [...patches.values()].reduce(
      (sum, { tensor, entries, slots }) => sum + (tensor.bytes / entries) * slots.size,
      quantizedBytes(quantized),
    );
    const checking = stage("checking", touched, options);
    await checkQuantized(origin.checkpoint, quantized, checking);
    const changes = await changesOf(origin, patches, checking);
    return write(origin, { target, patches, ...changes }, options);
  });
}

async function write(
  origin: Origin,
  job: {
    readonly target: string;
    readonly patches: ReadonlyMap<string, Patch>;
    readonly dirty: Dirty;
    readonly counts: MergeCounts;
  },
  options: SaveTunedOptions,
): Promise<TunedCertificate> {
  const { files, tensors, weights, folder } = origin;
  const { target, patches, dirty, counts } = job;
  const fresh = new Set(tensors.filter(({ name }) => dirty.has(name)).map(({ file }) => file));
  const { copies, leftOut } = await otherFiles(origin, { changed: fresh.size > 0, index: undefined }, "tuned");
  const names = [...weights.keys(), ...copies, "config.json"];
  let total = 0;
  for (const name of names) {
    const file = await files.open(name);
    total += file?.size ?? 0;
    await file?.close();
  }
  const advance = stage("writing", total, options);
  const toSave = names.map(
    (name): FileToSave => ({
      name,
      content: () => advancing(fresh.has(name) ? rewrittenFile(origin, name, job) : copied(files.open, name), advance),
    }),
  );
  let found: readonly TunedTensor[] | undefined;
  let checked: Omit<TunedCertificate["files"], "leftOut"> | undefined;
  const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
  await saveFiles(target, toSave, {
    last: "config.json",
    isStale: belongs,
    async verify(open) {
      await compareHeaders(origin, fresh, open);
      const output = await readCheckpoint(open, target);
      try {
        found = await compare(origin, output, patches, stage("comparing", bytes, options));
      } finally {
        await output.close();
      }
      const copyNames = new Set(names.filter((name) => !fresh.has(name)));
      checked = await checkFiles({ read: names, written: names, copyNames, files, open }, options);
    },
  });
  if (!found || !checked) throw new CheckpointError(`${target} was written, but not compared`);
  return {
    schema: "switchyard/tuned/1",
    ...{ source: folder, target },
    changed: fresh.size > 0,
    totals: { tensors: tensors.length, bytes, kept: tensors.length - found.length },
    values: counts,
    tensors: found,
    files: { ...checked, leftOut },
  };
}
