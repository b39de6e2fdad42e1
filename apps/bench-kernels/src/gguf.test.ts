// The header against a reader written from the format's description.
import { expect, it } from "vitest";
import { ggufHeader } from "./gguf.ts";

it("writes keys of every kind, and where each tensor lies", () => {
  const keys = { name: "x", count: 7, eps: { float: 0.5 }, words: ["a", "bc"], kinds: [2, -1] };
  const bytes = ggufHeader(keys, [
    { name: "first", shape: [3, 5] },
    { name: "second", shape: [4] },
  ]);
  let at = 0;
  const take = (n: number): Buffer => {
    at += n;
    return bytes.subarray(at - n, at);
  };
  const u32 = (): number => take(4).readUInt32LE();
  const u64 = (): number => Number(take(8).readBigUInt64LE());
  const text = (): string => take(u64()).toString("utf8");
  expect(take(4).toString("latin1")).toBe("GGUF");
  expect([u32(), u64(), u64()]).toEqual([3, 2, 5]);
  expect([text(), u32(), text()]).toEqual(["name", 8, "x"]);
  expect([text(), u32(), u32()]).toEqual(["count", 4, 7]);
  expect([text(), u32(), take(4).readFloatLE()]).toEqual(["eps", 6, 0.5]);
  expect([text(), u32(), u32(), u64(), text(), text()]).toEqual(["words", 9, 8, 2, "a", "bc"]);
  expect([text(), u32(), u32(), u64(), u32(), take(4).readInt32LE()]).toEqual(["kinds", 9, 5, 2, 2, -1]);
  // name, number of sizes, sizes fastest first, type f32, offset (a multiple of 32 behind the 60 bytes of the first)
  expect([text(), u32(), u64(), u64(), u32(), u64()]).toEqual(["first", 2, 5, 3, 0, 0]);
  expect([text(), u32(), u64(), u32(), u64()]).toEqual(["second", 1, 4, 0, 64]);
  expect(bytes.length % 32).toBe(0);
  expect(bytes.length - at).toBeLessThan(32);
});
