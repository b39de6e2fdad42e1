// Codes in words, there and back, in every number of bits and for lines that do not fill their last word. The values of the original
// libraries are in test/fixtures/prune-pack.json (npm run vectors).
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { packAwq, unpackAwq } from "./awq.ts";
import { packGptq, unpackGptq } from "./gptq.ts";
import { packLines, packZeros, unpackLines, unpackZeros } from "./pack.ts";
import { draws, packedCode } from "./stored.test-util.ts";

const sizes = fc.record({
  bits: fc.integer({ min: 1, max: 8 }),
  lines: fc.integer({ min: 0, max: 13 }),
  length: fc.integer({ min: 0, max: 40 }),
  seed: fc.integer(),
});
/** Random signed codes of so many bits. */
const signed = (n: number, bits: number, seed: number): number[] =>
  Array.from(draws(seed).bits(n), (byte) => (byte % 2 ** bits) - 2 ** (bits - 1));
const asI32 = (words: Int32Array, shape: number[]) => ({ dtype: "I32", shape, bytes: new Uint8Array(words.buffer) });

describe("compressed-tensors", () => {
  it("holds every code in its bits, and nothing behind the last", () => {
    fc.assert(
      fc.property(sizes, ({ bits, lines, length, seed }) => {
        const codes = signed(lines * length, bits, seed);
        const words = packLines(codes, { bits, length });
        const each = Math.floor(32 / bits);
        const across = Math.ceil(length / each);
        expect(words.length).toBe(length === 0 ? 0 : lines * across);
        const stored = asI32(words, [lines, across]);
        for (let i = 0; i < codes.length; i++) {
          const [line, c] = [Math.floor(i / length), i % length];
          expect(packedCode(stored, line * across + Math.floor(c / each), c % each, bits)).toBe(codes[i]);
        }
        for (let line = 0; line < lines && length % each > 0; line++) {
          const last = words[(line + 1) * across - 1] ?? 0;
          const used = bits * (length % each);
          expect(last >>> used).toBe(0);
        }
      }),
    );
  });

  it("comes back as bytes and, up to four bits, as nibbles", () => {
    fc.assert(
      fc.property(sizes, ({ bits, lines, length: any, seed }) => {
        const length = 2 * any;
        const codes = signed(lines * length, bits, seed);
        const bytes = new Uint8Array(packLines(codes, { bits, length }).buffer);
        const before = bytes.slice();
        const wide = unpackLines(bytes, { bits, length, nibbles: false });
        expect(Array.from(wide, (byte) => (byte << 24) >> 24)).toEqual(codes);
        if (bits <= 4) {
          const pairs = unpackLines(bytes, { bits, length, nibbles: true });
          expect(Array.from(pairs).flatMap((byte) => [(byte & 15) - 8, (byte >> 4) - 8])).toEqual(codes);
        }
        expect(bytes).toEqual(before);
      }),
    );
  });

  it("brings zero points of any lines back", () => {
    fc.assert(
      fc.property(sizes, fc.nat(), fc.nat(), ({ bits, lines, length: groups, seed }, a, b) => {
        const zeros = signed(lines * groups, bits, seed);
        const words = packZeros(zeros, { bits, groups });
        const each = Math.floor(32 / bits);
        const from = a % (lines + 1);
        const count = b % (lines - from + 1);
        // As they are read: from the words in which the first of these lines lies.
        const first = Math.floor(from / each);
        const part = new Uint32Array(words.buffer).subarray(first * groups);
        const how = { bits, groups, from: from - first * each, count };
        const expected = zeros.slice(from * groups, (from + count) * groups);
        const bytes = unpackZeros(part, { ...how, nibbles: false });
        expect(Array.from(bytes, (byte) => (byte << 24) >> 24)).toEqual(expected);
        if (bits <= 4) {
          const nibbles = unpackZeros(part, { ...how, nibbles: true });
          expect(Array.from(nibbles, (zero) => zero - 8)).toEqual(expected);
        }
      }),
    );
  });
});

describe("GPTQ", () => {
  const any = fc.record({
    bits: fc.constantFrom(2, 3, 4, 8),
    out: fc.integer({ min: 0, max: 3 }),
    inner: fc.integer({ min: 0, max: 3 }),
    groups: fc.integer({ min: 1, max: 3 }),
    offset: fc.constantFrom(0 as const, 1 as const),
    seed: fc.integer(),
  });
  it("comes back, in both versions", () => {
    fc.assert(
      fc.property(any, ({ bits, offset: zeroOffset, seed, ...sizes }) => {
        const [out, inner] = [32 * sizes.out, 32 * sizes.inner];
        const draw = draws(seed);
        const given = {
          bits,
          shape: [out, inner] as const,
          codes: draw.bits(out * inner).map((byte) => byte % 2 ** bits),
          zeros: draw.bits(out * (out === 0 ? 0 : sizes.groups)).map((byte) => byte % 2 ** bits),
        };
        const packed = packGptq(given, { zeroOffset });
        expect(packed.qweight.data.length * 32).toBe(out * inner * bits);
        expect(unpackGptq(packed, { zeroOffset })).toEqual(given);
      }),
      { numRuns: 40 },
    );
  });

  it("has the words 0x77777777 for the zero point 8, as symmetric checkpoints have", () => {
    const zeros = new Uint8Array(16).fill(8);
    const { qzeros } = packGptq({ bits: 4, shape: [16, 8], codes: new Uint8Array(128), zeros });
    expect([...qzeros.data]).toEqual([0x77777777, 0x77777777]);
  });

  it("refuses other bits, and what does not fill its words", () => {
    const given = { shape: [8, 12] as const, codes: new Uint8Array(96), zeros: new Uint8Array(8) };
    expect(() => packGptq({ ...given, bits: 5 })).toThrow("2, 3, 4 or 8 bits, not 5");
    expect(() => packGptq({ ...given, bits: 4 })).toThrow("12 codes of 4 bits do not fill words of 32 bits");
  });
});

describe("AWQ", () => {
  it("comes back", () => {
    fc.assert(
      fc.property(fc.nat(3), fc.nat(9), fc.integer({ min: 1, max: 3 }), fc.integer(), (eights, inner, groups, seed) => {
        const out = 8 * eights;
        const draw = draws(seed);
        const given = {
          shape: [out, inner] as const,
          codes: draw.bits(out * inner).map((byte) => byte & 15),
          zeros: draw.bits(out * groups).map((byte) => byte & 15),
        };
        expect(unpackAwq(packAwq(given))).toEqual(given);
      }),
    );
  });

  it("refuses lines that do not fill their words", () => {
    const given = { shape: [12, 1] as const, codes: new Uint8Array(12), zeros: new Uint8Array(12) };
    expect(() => packAwq(given)).toThrow("12 lines do not fill words of eight codes");
  });
});
