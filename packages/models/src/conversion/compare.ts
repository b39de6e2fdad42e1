// The certificate of a conversion: works out from the written files where every byte of the source is, without looking at the plan
// by which they were written.
import { CheckpointError } from "@switchyard/core";
import { builtIn } from "../built-in.ts";
import { weightFiles } from "../checkpoint.ts";
import { type ExpertLayout, expertLayout } from "../expert-layout.ts";
import type { FolderFiles } from "../files.ts";
import type { Checkpoint } from "../model.ts";
import { type ByteSource, quote, readExactly, readHeader } from "../safetensors.ts";
import {
  type Advance,
  type ConvertOptions,
  type Listener,
  type Origin,
  pieceSize,
  type SourceTensor,
  stage,
} from "./origin.ts";
import { type Counts, converted } from "./values.ts";

/** A range of bytes of a tensor in the output. */
export interface TensorRange {
  readonly name: string;
  readonly dtype: string;
  readonly file: string;
  readonly from: number;
  readonly to: number;
}

export interface CertifiedTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly file: string;
  readonly bytes: number;
  /** Where its bytes went, in their order: one range, or one for each expert and matrix of a fused tensor. */
  readonly to: readonly TensorRange[];
}

export interface CertifiedFile {
  readonly name: string;
  readonly bytes: number;
  readonly sha256: string;
}

/** What became of a checkpoint, worked out from the files that were read and written. */
export interface ConvertCertificate {
  readonly schema: "switchyard/convert/1";
  readonly source: string;
  readonly target: string;
  /** False: every file is a copy, byte for byte. */
  readonly changed: boolean;
  readonly totals: {
    readonly source: { readonly tensors: number; readonly bytes: number };
    readonly target: { readonly tensors: number; readonly bytes: number };
    /** Tensors of the source with the same name, type and bytes in the target. */
    readonly same: number;
    /** Tensors of the source whose values have another type now. */
    readonly converted: number;
    /** Tensors of the source under another name, whole, fused or cut. */
    readonly moved: number;
  };
  /** Values of converted tensors: all, those that another value stands for, and of these zeros and largest numbers. */
  readonly values: {
    readonly converted: number;
    readonly rounded: number;
    readonly toZero: number;
    readonly saturated: number;
  };
  readonly tensors: readonly CertifiedTensor[];
  /** Tensors that `dtype` asked for and did not get, with the reason. */
  readonly kept: readonly { readonly name: string; readonly dtype: string; readonly reason: string }[];
  /** Tensors of the source that the target does not hold, with the reason; every other one is in `tensors`. */
  readonly dropped: readonly { readonly name: string; readonly bytes: number; readonly reason: string }[];
  readonly files: {
    /** `copied`: the same bytes under the same name in the target. */
    readonly source: readonly (CertifiedFile & { readonly copied: boolean })[];
    readonly target: readonly (CertifiedFile & { readonly copied: boolean })[];
    /** What lay in the source folder and was not read. */
    readonly leftOut: readonly { readonly name: string; readonly reason: string }[];
  };
}

/** Where a range of a source tensor's bytes should be found in the output. */
interface Expected {
  readonly name: string;
  readonly from: number;
  readonly bytes: number;
  readonly at: number;
}

const elements = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** Looks a source tensor up in the output by its name in either layout; knows nothing of the plan. */
function lookUp(
  tensor: SourceTensor,
  output: Checkpoint,
  has: ReadonlySet<string>,
  layout: ExpertLayout | undefined,
): readonly Expected[] {
  const { name, shape, bytes } = tensor;
  const failed = (why: string): never => {
    throw new CheckpointError(`the written checkpoint is not complete: ${quote(name)} ${why}`);
  };
  const same = [name, layout?.fusedName(name), layout?.separateName(name)].find(
    (one) => one !== undefined && has.has(one),
  );
  if (same !== undefined) {
    const found = output.stored(same);
    if (found.shape.join() !== shape.join()) failed(`is [${shape}], but ${quote(same)} there is [${found.shape}]`);
    return [{ name: same, from: 0, bytes, at: 0 }];
  }
  const place = layout?.place(name);
  if (place && has.has(place.fused)) {
    const found = output.stored(place.fused);
    const [experts = 0, rows = 0, columns = 0] = found.shape;
    if (place.expert >= experts || shape.join() !== [rows / place.parts, columns].join()) {
      failed(`is [${shape}], which does not fit into ${quote(place.fused)} [${found.shape}]`);
    }
    const size = found.bytes / experts / place.parts;
    return [{ name: place.fused, from: 0, bytes, at: (place.expert * place.parts + place.part) * size }];
  }
  const own = layout?.separate(name);
  const [experts = 0, ...rest] = shape;
  if (!own || experts === 0) return failed("is not there");
  const names = Array.from({ length: experts }, (_, e) => own(e)).flat();
  const size = bytes / names.length;
  return names.map((one, i) => {
    if (!has.has(one)) failed(`should be in ${quote(one)}, which is not there`);
    const found = output.stored(one);
    if (elements(found.shape) * names.length !== experts * elements(rest)) {
      failed(`is [${shape}], which ${names.length} tensors like ${quote(one)} [${found.shape}] do not make up`);
    }
    return { name: one, from: i * size, bytes: size, at: 0 };
  });
}

function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (a.length !== b.length) return Math.min(a.length, b.length);
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return i;
  return -1;
}

/** Compares every byte of every source tensor with what was written, and every written byte with a source. */
export async function compareTensors(
  origin: Origin,
  output: Checkpoint,
  fileOf: ReadonlyMap<string, string>,
  { saturate = false, ...options }: ConvertOptions,
): Promise<Pick<ConvertCertificate, "tensors" | "values" | "totals">> {
  const type = origin.checkpoint.config.model_type;
  const layout = typeof type === "string" ? expertLayout(type) : undefined;
  const counts: Counts = { converted: 0, rounded: 0, toZero: 0, saturated: 0 };
  const covered = new Map<string, [number, number][]>(output.names.map((name) => [name, []]));
  const has = new Set(output.names);
  const total = origin.tensors.reduce((sum, { bytes }) => sum + bytes, 0);
  const advance = stage("comparing", total, options);
  const tensors: CertifiedTensor[] = [];
  let [same, changedType, moved] = [0, 0, 0];
  for (const tensor of origin.tensors) {
    const to: TensorRange[] = [];
    for (const { name, from, bytes, at } of lookUp(tensor, output, has, layout)) {
      const { dtype } = output.stored(name);
      const sourceWidth = tensor.bytes / Math.max(1, elements(tensor.shape));
      const ratio =
        tensor.dtype === dtype ? 1 : output.stored(name).bytes / elements(output.stored(name).shape) / sourceWidth;
      for (let done = 0; done < bytes; done += pieceSize) {
        const end = Math.min(bytes, done + pieceSize);
        const before = await origin.checkpoint.read(tensor.name, [from + done, from + end]);
        const after = await output.read(name, [at + done * ratio, at + end * ratio]);
        const expected = tensor.dtype === dtype ? before : converted(before, { tensor, to: dtype, saturate, counts });
        const differs = firstDifference(expected, after);
        if (differs >= 0) {
          throw new CheckpointError(
            `the written checkpoint is damaged: byte ${at + done * ratio + differs} of ${quote(name)} is not what ` +
              `${quote(tensor.name)} of the source gives`,
          );
        }
        advance(end - done);
      }
      // One of no elements has no bytes in either type.
      const size = bytes === 0 ? 0 : bytes * ratio;
      covered.get(name)?.push([at, at + size]);
      to.push({ name, dtype, file: fileOf.get(name) ?? "", from: at, to: at + size });
    }
    const { name, dtype, shape, file, bytes } = tensor;
    tensors.push({ name, dtype, shape, file, bytes, to });
    const renamed = to.length !== 1 || to[0]?.name !== name;
    const retyped = to.some((range) => range.dtype !== dtype);
    if (renamed) moved++;
    if (retyped) changedType++;
    if (!renamed && !retyped) same++;
  }
  let written = 0;
  for (const [name, ranges] of covered) {
    const { bytes } = output.stored(name);
    written += bytes;
    let end = 0;
    for (const [from, to] of ranges.sort(([a, b], [c, d]) => a - c || b - d)) {
      if (from !== end)
        throw new CheckpointError(`bytes ${end} to ${from} of the written ${quote(name)} have no source`);
      end = to;
    }
    if (end !== bytes || ranges.length === 0) {
      throw new CheckpointError(`bytes ${end} to ${bytes} of the written ${quote(name)} have no source`);
    }
  }
  return {
    tensors,
    values: counts,
    totals: {
      source: { tensors: origin.tensors.length, bytes: total },
      target: { tensors: output.names.length, bytes: written },
      ...{ same, converted: changedType, moved },
    },
  };
}

async function sha256(source: ByteSource, advance: Advance): Promise<string> {
  const { createHash } = await builtIn("node:crypto");
  const hash = createHash("sha256");
  for (let at = 0; at < source.size; at += pieceSize) {
    const bytes = await readExactly(source, at, Math.min(source.size, at + pieceSize));
    hash.update(bytes);
    advance(bytes.length);
  }
  return hash.digest("hex");
}
/** File of each tensor of a checkpoint. */
export async function filesOf(
  open: (name: string) => Promise<ByteSource | undefined>,
  where: string,
): Promise<Map<string, string>> {
  const result = new Map<string, string>();
  for (const file of (await weightFiles(open, where)).keys()) {
    const source = await open(file);
    if (!source) throw new CheckpointError(`${where} has no ${file}`);
    try {
      for (const name of (await readHeader(source)).tensors.keys()) result.set(name, file);
    } finally {
      await source.close?.();
    }
  }
  return result;
}

/** Checksums of all files, and that copies are copies. */
export async function checkFiles(
  job: {
    readonly read: readonly string[];
    readonly written: readonly string[];
    readonly copyNames: ReadonlySet<string>;
    readonly files: FolderFiles;
    readonly open: (name: string) => Promise<(ByteSource & { close(): Promise<void> }) | undefined>;
  },
  options: Listener<"checksums">,
): Promise<Omit<ConvertCertificate["files"], "leftOut">> {
  const { read, written, copyNames, files, open } = job;
  const sides = [
    { names: [...read].sort(), from: files.open },
    { names: [...written].sort(), from: open },
  ];
  let total = 0;
  for (const { names, from } of sides) {
    for (const name of names) {
      const file = await from(name);
      total += file?.size ?? 0;
      await file?.close();
    }
  }
  const advance = stage("checksums", total, options);
  const [source = [], target = []] = await inTurn(sides, async ({ names, from }) =>
    inTurn(names, async (name) => {
      const file = await from(name);
      if (!file) throw new CheckpointError(`${name} is not there any more`);
      try {
        return { name, bytes: file.size, sha256: await sha256(file, advance), copied: copyNames.has(name) };
      } finally {
        await file.close();
      }
    }),
  );
  const sums = new Map(target.map(({ name, sha256: sum }) => [name, sum]));
  const wrong = source.find(({ name, sha256: sum, copied: asIs }) => asIs && sums.get(name) !== sum);
  if (wrong)
    throw new CheckpointError(`the copy of ${wrong.name} is not the file it was made from; did that file change?`);
  return { source, target };
}

/** One after the other, so that one file is read at a time. */
async function inTurn<T, R>(items: readonly T[], act: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = [];
  for (const item of items) results.push(await act(item));
  return results;
}
