// New values for stored numbers: encoded as the file stores them, and what did not change keeps its bits.
import { UnsupportedError } from "@switchyard/core";
import { fromFloat32 } from "../narrow.ts";
import { quote, toFloat32 } from "../safetensors.ts";

export type Numbers = Float32Array | Float64Array;

/** How the numbers of a plain dtype are read and written. */
export interface Codec {
  /** Of one number. */
  readonly bytes: 1 | 2 | 4 | 8;
  /** Of the tensors that hold such parameters. */
  readonly values: "f32" | "i32" | "u8";
  /** In an array of their own; `bytes` begins where its element type may. */
  read(bytes: Uint8Array): Numbers;
  /** Rounded to nearest, ties to even. */
  write(values: Numbers): Uint8Array;
}

const bytesOf = (x: Float64Array | Int32Array | Uint8Array): Uint8Array =>
  new Uint8Array(x.buffer, x.byteOffset, x.byteLength);
const inFloat32 = (x: Numbers): Float32Array => (x instanceof Float32Array ? x : Float32Array.from(x));
const float = (dtype: string, bytes: 2 | 4): Codec => ({
  bytes,
  values: "f32",
  // F32 is read without a copy.
  read: (stored) => (dtype === "F32" ? toFloat32(stored, dtype, "").slice() : toFloat32(stored, dtype, "")),
  write: (values) => fromFloat32(inFloat32(values), dtype),
});

/** By the file's own name of the type. Quantised types are not among them. */
export const codecs: ReadonlyMap<string, Codec> = new Map<string, Codec>([
  ["F32", float("F32", 4)],
  ["F16", float("F16", 2)],
  ["BF16", float("BF16", 2)],
  [
    "F64",
    {
      bytes: 8,
      values: "f32",
      read: (stored) => toFloat32(stored, "F64", ""),
      write: (values) => bytesOf(Float64Array.from(values)),
    },
  ],
  [
    "I32",
    {
      bytes: 4,
      values: "i32",
      read: (stored) => Float64Array.from(new Int32Array(stored.buffer, stored.byteOffset, stored.length / 4)),
      write: (values) => bytesOf(Int32Array.from(values)),
    },
  ],
  [
    "U8",
    {
      bytes: 1,
      values: "u8",
      read: (stored) => Float64Array.from(stored),
      write: (values) => bytesOf(Uint8Array.from(values)),
    },
  ],
]);

/** Whether two numbers stand for the same: zeros of either sign do, and so do NaNs. */
export const same = (a: number, b: number): boolean => a === b || (Number.isNaN(a) && Number.isNaN(b));

export interface MergeCounts {
  /** Values that are not those of the source. */
  changed: number;
  /** Of these, values that the stored type has not, so that the nearest one stands for them. */
  rounded: number;
  /** Of these, values whose nearest one is the one that was there. */
  unshown: number;
}

/**
 * The bytes of `values` where they differ from `before`, which `stored` holds, and the bytes of `stored` elsewhere.
 * Throws UnsupportedError for a new value that is not finite or beyond the largest number of the type.
 */
export function merged(
  stored: Uint8Array,
  { before, values }: { readonly before: Numbers; readonly values: Numbers },
  { codec, name, dtype, counts }: { codec: Codec; name: string; dtype: string; counts?: MergeCounts },
): Uint8Array {
  const result = codec.write(values);
  // F32 is written without a copy: what is put back must not reach the values.
  const bytes = result.buffer === values.buffer ? result.slice() : result;
  const back = codec.read(bytes);
  const keep = (i: number): void => bytes.set(stored.subarray(i * codec.bytes, (i + 1) * codec.bytes), i * codec.bytes);
  // What stands for the same may have other bits: zeros, NaNs, and doubles that f32 has not.
  const odd = (x: number): boolean => x === 0 || Number.isNaN(x) || codec.bytes === 8;
  let [changed, rounded, unshown] = [0, 0, 0];
  for (let i = 0; i < values.length; i++) {
    const x = values[i] as number;
    const old = before[i] as number;
    if (same(x, old)) {
      if (odd(x)) keep(i);
      continue;
    }
    const y = back[i] as number;
    if (!Number.isFinite(x)) {
      throw new UnsupportedError(
        `saveTuned: the new values of ${quote(name)} hold ${x} where the source has ${old}; did the training diverge?`,
      );
    }
    if (!Number.isFinite(y) || (codec.values !== "f32" && x !== y)) {
      throw new UnsupportedError(
        `saveTuned: the new values of ${quote(name)} hold ${x}, which its type ${dtype} cannot; ` +
          "convert the source to another float type first (convertCheckpoint, switchyard convert --dtype)",
      );
    }
    changed++;
    if (x !== y) rounded++;
    if (y !== old) continue;
    unshown++;
    if (odd(y)) keep(i);
  }
  if (counts) {
    counts.changed += changed;
    counts.rounded += rounded;
    counts.unshown += unshown;
  }
  return bytes;
}
