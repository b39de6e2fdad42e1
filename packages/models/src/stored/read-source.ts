// A whole parameter from its pieces: rows one below the other, experts stacked.
import type { Checkpoint } from "../model.ts";
import type { Piece, Source } from "../source.ts";
import { below, type HostMatrix, nodeKey, stack } from "./host-matrix.ts";
import { readPiece } from "./read-piece.ts";

async function joined(checkpoint: Checkpoint, pieces: readonly Piece[]): Promise<HostMatrix> {
  const parts: HostMatrix[] = [];
  for (const piece of pieces) parts.push(await readPiece(checkpoint, piece));
  return below(parts);
}

/**
 * A parameter in its stored type, read piece by piece. A stack of experts is written in its place as it is read: no more than one
 * expert is held twice.
 * Throws CheckpointError as `readPiece` does.
 */
export async function readSource(checkpoint: Checkpoint, source: Source): Promise<HostMatrix> {
  if (source.kind === "whole") return joined(checkpoint, source.pieces);
  const [count = 0] = source.shape;
  // Runs of experts of one form. There is one, unless experts are stored differently.
  const runs: Filling[] = [];
  for (let e = 0; e < count; e++) {
    const expert = await joined(checkpoint, source.expert(e));
    let run = runs.at(-1);
    if (!run?.takes(expert)) {
      run = filling(expert, count - e);
      runs.push(run);
    }
    run.add(expert);
  }
  const [only] = runs;
  if (only && runs.length === 1) return only.stack();
  return stack(runs.flatMap((run) => run.parts()));
}

interface Filling {
  takes(part: HostMatrix): boolean;
  add(part: HostMatrix): void;
  stack(): HostMatrix;
  /** Views of its experts. */
  parts(): HostMatrix[];
}

/** Room for `count` matrices like `first`. */
function filling(first: HostMatrix, count: number): Filling {
  const form = (host: HostMatrix): string =>
    [nodeKey(host), host.kind === "codes" && host.zeros !== undefined, ...host.shape].join();
  const wanted = form(first);
  const room = (part: Float32Array | Uint16Array | Uint8Array) =>
    part instanceof Float32Array
      ? new Float32Array(count * part.length)
      : part instanceof Uint16Array
        ? new Uint16Array(count * part.length)
        : new Uint8Array(count * part.length);
  const arrays = arraysOf(first);
  const rooms = arrays.map(room);
  let filled = 0;
  return {
    takes: (part) => filled < count && form(part) === wanted,
    add(part) {
      arraysOf(part).forEach((array, i) => {
        rooms[i]?.set(array, filled * array.length);
      });
      filled++;
    },
    stack: () => withArrays(first, [count, ...first.shape], rooms),
    parts: () =>
      Array.from({ length: filled }, (_, e) =>
        withArrays(
          first,
          first.shape,
          rooms.map((all, i) => {
            const { length } = arrays[i] ?? all;
            return all.subarray(e * length, (e + 1) * length);
          }),
        ),
      ),
  };
}

type Elements = Float32Array | Uint16Array | Uint8Array;

const arraysOf = (host: HostMatrix): readonly Elements[] =>
  host.kind === "floats" ? [host.data] : [host.codes, host.scales, ...(host.zeros ? [host.zeros] : [])];

function withArrays(
  like: HostMatrix,
  shape: readonly number[],
  [first, scales, zeros]: readonly Elements[],
): HostMatrix {
  if (like.kind === "floats") return { ...like, shape, data: first as Float32Array | Uint16Array };
  const codes = { ...like, shape, codes: first as Uint8Array, scales: scales as Float32Array | Uint8Array };
  return zeros ? { ...codes, zeros: zeros as Uint8Array } : codes;
}
