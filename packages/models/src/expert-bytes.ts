// The bytes of one streamed expert: where they lie in the files, and how they come into memory. What is stored as it is used is read
// straight into a buffer that is used again for other experts, so that streaming leaves nothing for the garbage collector.
import type { Checkpoint } from "./model.ts";
import type { CheckpointIndex, Source } from "./source.ts";
import { below, type HostFloats, type HostMatrix, plainStretches, readPiece, type Stretch } from "./stored-matrix.ts";

export type ExpertSource = Extract<Source, { kind: "experts" }>;
/** By name: gateUp, down and, with biases, theirs. */
export type ExpertSources = ReadonlyMap<string, ExpertSource>;
export type HostExpert = ReadonlyMap<string, HostMatrix>;

/** One matrix of an expert that is used as it is stored. */
interface PlainMatrix {
  readonly name: string;
  readonly dtype: HostFloats["dtype"];
  readonly shape: readonly number[];
  /** Where it begins in the buffer. */
  readonly at: number;
  /** Bytes of tensors, one after the other. */
  readonly stretches: readonly Stretch[];
}

/** An expert that is used as it is stored. */
export interface PlainExpert {
  readonly matrices: readonly PlainMatrix[];
  /** Of the buffer. */
  readonly bytes: number;
}

const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);

/** Expert e where all of it is used as it is stored; undefined where some is packed, transposed or alternates. */
export function plainExpert(index: CheckpointIndex, sources: ExpertSources, e: number): PlainExpert | undefined {
  const matrices: PlainMatrix[] = [];
  let end = 0;
  for (const [name, source] of sources) {
    const plain = plainStretches(index, source, e);
    if (!plain) return undefined;
    const at = Math.ceil(end / 4) * 4;
    matrices.push({ name, ...plain, shape: source.shape.slice(1), at });
    end = plain.stretches.reduce((n, { bytes }) => n + bytes, at);
  }
  return { matrices, bytes: end };
}

/** Reads a plain expert into a buffer. Every read has ended when this settles, also where one failed. */
export async function readPlain(checkpoint: Checkpoint, expert: PlainExpert, buffer: ArrayBuffer): Promise<HostExpert> {
  const reads: Promise<void>[] = [];
  const host = new Map<string, HostMatrix>();
  for (const { name, dtype, shape, at, stretches } of expert.matrices) {
    let next = at;
    for (const { name: tensor, from, bytes } of stretches) {
      const target = new Uint8Array(buffer, next, bytes);
      reads.push(fill(checkpoint, target, tensor, from));
      next += bytes;
    }
    const data =
      dtype === "f32" ? new Float32Array(buffer, at, sizeOf(shape)) : new Uint16Array(buffer, at, sizeOf(shape));
    host.set(name, { kind: "floats", dtype, shape, data });
  }
  for (const { status, ...rest } of await Promise.allSettled(reads)) {
    if (status === "rejected" && "reason" in rest) throw rest.reason;
  }
  return host;
}

async function fill(checkpoint: Checkpoint, target: Uint8Array, name: string, from: number): Promise<void> {
  if (checkpoint.readInto) await checkpoint.readInto(target, name, from);
  else target.set(await checkpoint.read(name, [from, from + target.length]));
}

/** Reads any expert, in its stored type. */
export async function readExpert(checkpoint: Checkpoint, sources: ExpertSources, e: number): Promise<HostExpert> {
  const matrices = Array.from(sources, async ([name, source]): Promise<[string, HostMatrix]> => {
    return [name, below(await Promise.all(source.expert(e).map((piece) => readPiece(checkpoint, piece))))];
  });
  return new Map(await Promise.all(matrices));
}
