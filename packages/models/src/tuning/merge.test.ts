// Which bytes new values get: what the stored type cannot show keeps the bytes that were there, down to the sign of a zero.
import { UnsupportedError } from "@switchyard/core";
import { expect, test } from "vitest";
import { codecs, type MergeCounts, merged } from "./merge.ts";

/** Merges new values into stored BF16 numbers, both given as bits or numbers. */
function bf16(stored: readonly number[], values: readonly number[], counts?: MergeCounts): number[] {
  const codec = codecs.get("BF16");
  if (!codec) throw new Error("no bf16");
  const bytes = new Uint8Array(Uint16Array.from(stored).buffer);
  const given = { before: codec.read(bytes), values: Float32Array.from(values) };
  const found = merged(bytes, given, { codec, name: "w", dtype: "BF16", ...(counts ? { counts } : {}) });
  return Array.from(new Uint16Array(found.slice().buffer));
}

test("a change too small for the type leaves the bits, those of -0 too", () => {
  const counts: MergeCounts = { changed: 0, rounded: 0, unshown: 0 };
  // -0, 0 and 1; 2 ** -140 is no bf16, and the nearest is 0.
  expect(bf16([0x8000, 0x0000, 0x3f80], [2 ** -140, -(2 ** -140), 1 + 2 ** -12], counts)).toEqual([
    0x8000, 0x0000, 0x3f80,
  ]);
  expect(counts).toEqual({ changed: 3, rounded: 3, unshown: 3 });
});

test("others are rounded to the nearest, ties to even, and counted", () => {
  const counts: MergeCounts = { changed: 0, rounded: 0, unshown: 0 };
  expect(bf16([0x3f80, 0x3f80, 0x3f80, 0x8000], [1 + 3 * 2 ** -8, 2, 1, 0], counts)).toEqual([
    0x3f82, 0x4000, 0x3f80, 0x8000,
  ]);
  expect(counts).toEqual({ changed: 2, rounded: 1, unshown: 0 });
});

test("what is no number, or too large, is refused; what was no number before may stay so", () => {
  expect(() => bf16([0x3f80], [Number.NaN])).toThrow("hold NaN where the source has 1; did the training diverge?");
  expect(() => bf16([0x3f80], [Number.POSITIVE_INFINITY])).toThrow(UnsupportedError);
  expect(() => bf16([0x3f80], [2 ** 127 * (2 - 2 ** -23)])).toThrow("which its type BF16 cannot");
  expect(bf16([0x7fc1, 0xff80], [Number.NaN, Number.NEGATIVE_INFINITY])).toEqual([0x7fc1, 0xff80]);
});
