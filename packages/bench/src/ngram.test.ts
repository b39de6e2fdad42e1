// Oracle: the recursion written directly over strings, without sorting or searching.
import { describe, expect, test } from "vitest";
import { byteModel, byteModelBits, byteProbability } from "./ngram.ts";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);

function naive(training: readonly string[], context: string, next: string): number {
  if (context.length === 0) {
    const all = training.join("");
    const kinds = new Set(all).size;
    if (all.length === 0) return 1 / 256;
    return ([...all].filter((c) => c === next).length + kinds / 256) / (all.length + kinds);
  }
  const shorter = naive(training, context.slice(1), next);
  const followers: string[] = [];
  for (const text of training) {
    for (let i = context.length; i < text.length; i++) {
      if (text.slice(i - context.length, i) === context) followers.push(text[i] ?? "");
    }
  }
  const kinds = new Set(followers).size;
  if (kinds === 0) return shorter;
  return (followers.filter((c) => c === next).length + kinds * shorter) / (followers.length + kinds);
}

const training = ["the cat sat on the mat; the dog sat too", "a dog and a cat", "", "z"];
const held = "the dog sat on a cat? qz the";

describe("byteModel", () => {
  for (const order of [0, 1, 2, 3, 5]) {
    test(`order ${order} gives the probabilities of the written-out recursion`, () => {
      const model = byteModel(training.map(bytes), order);
      let bits = 0;
      for (let i = 0; i < held.length; i++) {
        const expected = naive(training, held.slice(Math.max(0, i - order), i), held[i] ?? "");
        expect(byteProbability(model, bytes(held), i)).toBeCloseTo(expected, 12);
        bits -= Math.log2(expected);
      }
      expect(byteModelBits(model, [bytes(held)])).toBeCloseTo(bits / held.length, 10);
    });
  }

  test("a model of a higher order contains the lower ones", () => {
    const blocks = training.map(bytes);
    const high = byteModel(blocks, 3);
    expect(byteModelBits(high, [bytes(held)], 2)).toBe(byteModelBits(byteModel(blocks, 2), [bytes(held)]));
  });

  test("probabilities over all bytes sum to one, byte 255 after byte 255 included", () => {
    const block = new Uint8Array([255, 255, 255, 0, 255, 254, 255, 255]);
    const model = byteModel([block], 3);
    for (let at = 0; at <= 4; at++) {
      let sum = 0;
      for (let byte = 0; byte < 256; byte++) {
        const text = Uint8Array.from(block.subarray(0, at + 1));
        text[at] = byte;
        sum += byteProbability(model, text, at);
      }
      expect(sum).toBeCloseTo(1, 12);
    }
  });

  test("no training text leaves the uniform distribution: 8 bits per byte", () => {
    expect(byteModelBits(byteModel([], 2), [bytes("abc")])).toBe(8);
    expect(byteModelBits(byteModel([], 2), [])).toBe(0);
  });

  test("an order that a double cannot hold is refused", () => {
    expect(() => byteModel([], 6)).toThrow("order 6 is not an integer from 0 to 5");
  });
});
