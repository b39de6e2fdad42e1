// Many parts of files in few reads: neighbours in a file are read together and dealt out, so that a model of thousands of small tensors
// loads about as fast as its bytes can be read. A few small buffers are used again and again, each still in the processor's cache when
// it is dealt out.
import type { Checkpoint } from "./model.ts";
import { type ByteSource, readExactly } from "./safetensors.ts";

/** Bytes of a tensor that are wanted. */
export interface ReadPart {
  readonly name: string;
  /** Bytes of the tensor: `from` to `to` (exclusive). */
  readonly from: number;
  readonly to: number;
  /** Is given all of them, in pieces and in any order: bytes of the part from byte `at` on, valid during the call only. */
  put(bytes: Uint8Array, at: number): void;
  /** All of the memory where the part belongs, if that stays in its place: it may then be filled by reads that are under way. */
  into?(): Uint8Array;
}

/** A part as it lies in a file. */
export interface PlacedPart extends Pick<ReadPart, "put" | "into"> {
  readonly source: ByteSource;
  /** Positions in the file. */
  readonly from: number;
  readonly to: number;
}

/** One read. */
interface Stretch {
  readonly source: ByteSource;
  readonly from: number;
  to: number;
  /** What of it belongs to which part. */
  readonly shares: { readonly part: PlacedPart; readonly from: number; readonly to: number }[];
  /** Read into the place of its only part. */
  readonly direct?: PlacedPart;
}

/** Bytes of one read from a file on disk: of the size of a processor's cache. */
const fileRead = 2 ** 20;
/** Bytes of one read into the place of a part, and of parts for which that is worth a read of their own. */
const directRead = 2 ** 23;
const directFrom = 2 ** 17;
/** And where every read makes a buffer of its own, perhaps over a network. */
const otherRead = 2 ** 23;
const readsAtATime = 3;
/** Bytes between two parts that are read and thrown away, rather than to read twice. */
const gap = 2 ** 14;

/** Reads in the order of the files. */
function stretchesOf(parts: readonly PlacedPart[]): Stretch[] {
  const order = new Map<ByteSource, number>();
  for (const { source } of parts) if (!order.has(source)) order.set(source, order.size);
  const place = ({ source }: PlacedPart): number => order.get(source) as number;
  const sorted = [...parts].sort((a, b) => place(a) - place(b) || a.from - b.from);
  const stretches: Stretch[] = [];
  for (const part of sorted) {
    const { source } = part;
    const most = source.readInto ? fileRead : otherRead;
    let at = part.from;
    if (source.readInto && part.into && part.to - part.from >= directFrom) {
      for (; at < part.to; at += directRead) {
        stretches.push({ source, from: at, to: Math.min(part.to, at + directRead), shares: [], direct: part });
      }
      continue;
    }
    while (at < part.to) {
      let last = stretches.at(-1);
      const joins =
        last?.source === source && !last.direct && at >= last.to && at - last.to <= gap && at < last.from + most;
      if (!last || !joins) {
        last = { source, from: at, to: at, shares: [] };
        stretches.push(last);
      }
      const to = Math.min(part.to, last.from + most);
      last.shares.push({ part, from: at, to });
      last.to = to;
      at = to;
    }
  }
  return stretches;
}

/**
 * Reads parts of files and hands them out. Every read has ended when this settles, also where one failed.
 * Throws what reading or `put` throws; CheckpointError where a file was changed meanwhile.
 */
export async function readPlaced(parts: readonly PlacedPart[]): Promise<void> {
  const stretches = stretchesOf(parts);
  const longest = stretches.reduce((most, one) => (one.direct ? most : Math.max(most, one.to - one.from)), 0);
  const one = async (spare: Uint8Array | undefined, { source, from, to, shares, direct }: Stretch): Promise<void> => {
    if (direct?.into) {
      await fill(source, direct.into().subarray(from - direct.from, to - direct.from), from);
      return;
    }
    const bytes = spare && source.readInto ? spare.subarray(0, to - from) : await readExactly(source, from, to);
    if (spare && source.readInto) await fill(source, bytes, from);
    for (const { part, ...share } of shares) {
      part.put(bytes.subarray(share.from - from, share.to - from), share.from - part.from);
    }
  };
  let next = 0;
  let failed = false;
  const reader = async (): Promise<void> => {
    let spare: Uint8Array | undefined;
    try {
      for (let stretch = stretches[next++]; stretch && !failed; stretch = stretches[next++]) {
        if (!stretch.direct && stretch.source.readInto) spare ??= new Uint8Array(longest);
        await one(spare, stretch);
      }
    } catch (error) {
      failed = true;
      throw error;
    }
  };
  const ends = await Promise.allSettled(Array.from({ length: Math.min(readsAtATime, stretches.length) }, reader));
  for (const end of ends) if (end.status === "rejected") throw end.reason;
  for (const source of new Set(stretches.map((stretch) => stretch.source))) await source.unwatched?.unchanged();
}

/** Without looking whether the source was changed, where that can be left for the end. */
async function fill(source: ByteSource, target: Uint8Array, from: number): Promise<void> {
  if (source.unwatched) await source.unwatched.fill(target, from);
  else await source.readInto?.(target, from);
}

/** Parts of a checkpoint's tensors, together where the checkpoint can read so, else one after the other. */
export async function readParts(checkpoint: Checkpoint, parts: readonly ReadPart[]): Promise<void> {
  if (checkpoint.readParts) return checkpoint.readParts(parts);
  for (const { name, from, to, put } of parts) {
    for (let at = from; at < to; at += otherRead) {
      put(await checkpoint.read(name, [at, Math.min(at + otherRead, to)]), at - from);
    }
  }
}
