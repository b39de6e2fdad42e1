// What was written, against the source and the values that were given: worked out from the files, by reading them as a loader does.
import { CheckpointError } from "@switchyard/core";
import { type Origin, pieceSize, type SourceTensor } from "../conversion/origin.ts";
import type { Checkpoint } from "../model.ts";
import { quote, readExactly } from "../safetensors.ts";
import { codecs, same } from "./merge.ts";
import { type Patch, rowsBack, valuesOf } from "./patches.ts";

/** A tensor whose bytes are others than in the source. */
export interface TunedTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly file: string;
  readonly bytes: number;
  /** Values whose bytes are others. */
  readonly values: number;
}

export function differs(a: Uint8Array, b: Uint8Array): boolean {
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return true;
  return false;
}

/** Bytes of a file before its tensors: length and header. */
export const headerBytes = (size: number, own: readonly SourceTensor[]): number =>
  own.reduce((left, { bytes }) => left - bytes, size);

const damaged = (what: string): never => {
  throw new CheckpointError(`the written checkpoint is damaged: ${what}`);
};

/** Elements whose bytes are not the same. */
function differences(a: Uint8Array, b: Uint8Array, size: number): number {
  let count = 0;
  for (let at = 0; at < a.length; at += size) {
    for (let i = at; i < at + size; i++) {
      if (a[i] === b[i]) continue;
      count++;
      break;
    }
  }
  return count;
}

/**
 * Reads the written tensors as a loader does: the changed parameters have the values that were given, rounded, and no more bytes differ
 * from the source than these values make. Knows nothing of how they were written. Answers the tensors that changed.
 */
export async function compare(
  origin: Origin,
  output: Checkpoint,
  patches: ReadonlyMap<string, Patch>,
  advance: (bytes: number) => void,
): Promise<TunedTensor[]> {
  const found: TunedTensor[] = [];
  if (output.names.length !== origin.tensors.length) damaged(`it has ${output.names.length} tensors`);
  for (const tensor of origin.tensors) {
    const { name, dtype, shape, bytes } = tensor;
    const written = output.stored(name);
    if (written.dtype !== dtype || written.shape.join() !== shape.join()) damaged(`${quote(name)} has another form`);
    const patch = patches.get(name);
    let expected = 0;
    for (const slot of patch ? [...patch.slots.values()].flat() : []) {
      const { codec } = patch as Patch;
      for (const { first, count, read } of rowsBack(slot, patch as Patch)) {
        const [before, after] = [await read(origin.checkpoint), await read(output)];
        const given = await valuesOf(slot, first, count);
        const rounded = codec.read(codec.write(given));
        for (let i = 0; i < after.length; i++) {
          const x = given[i] as number;
          const was = before[i] as number;
          const now = after[i] as number;
          if (!same(now, same(x, was) ? was : (rounded[i] as number))) {
            damaged(`${quote(name)} holds ${now} where ${quote(slot.path)} has ${x}`);
          }
          if (!same(now, was)) expected++;
        }
      }
    }
    let values = 0;
    for (let at = 0; at < bytes; at += pieceSize) {
      const range = [at, Math.min(bytes, at + pieceSize)] as const;
      const [before, after] = [await origin.checkpoint.read(name, range), await output.read(name, range)];
      values += differences(before, after, codecs.get(dtype)?.bytes ?? 1);
      advance(before.length);
    }
    if (values !== expected) {
      damaged(`${values} values of ${quote(name)} are others than in the source, and ${expected} were changed`);
    }
    if (values > 0) found.push({ name, dtype, shape, file: tensor.file, bytes, values });
  }
  return found;
}

/** Headers of rewritten files are those of the source. */
export async function compareHeaders(
  origin: Origin,
  files: ReadonlySet<string>,
  open: Origin["files"]["open"],
): Promise<void> {
  for (const file of files) {
    const own = origin.tensors.filter((tensor) => tensor.file === file);
    const parts: Uint8Array[] = [];
    for (const from of [origin.files.open, open]) {
      const source = await from(file);
      if (!source) throw new CheckpointError(`${file} is not there any more`);
      try {
        parts.push(await readExactly(source, 0, headerBytes(source.size, own)));
      } finally {
        await source.close();
      }
    }
    const [before = new Uint8Array(), after = new Uint8Array()] = parts;
    if (before.length !== after.length || differs(before, after)) damaged(`the header of ${file} is another`);
  }
}
