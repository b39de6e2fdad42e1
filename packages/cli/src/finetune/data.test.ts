// Which tokens are trained on and which are held out, down to texts that are just long enough.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { tokenizer, trainTokenizer } from "@switchyard/models";
import { afterAll, expect, test } from "vitest";
import { batchesOf, cutText, type Material, readMaterial, stepsOfEpoch } from "./data.ts";

const home = mkdtempSync(join(tmpdir(), "switchyard-data-"));
afterAll(() => rmSync(home, { recursive: true }));

const count = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);
const material = (...parts: readonly (readonly number[])[]): Material => ({
  files: parts.map((content, i) => ({ name: `file ${i}`, content })),
  sha256: "",
});
const how = { share: 0.1, length: 4, vocabulary: 1000 };

test("the end of each text is held out, the rest is one stream", () => {
  const { training, heldOut, files } = cutText(material(count(0, 100), count(200, 250)), how);
  expect(Array.from(training)).toEqual([...count(0, 90), ...count(200, 245)]);
  expect(heldOut.map(({ ids }) => Array.from(ids))).toEqual([count(90, 100), count(245, 250)]);
  expect(files).toEqual([
    { name: "file 0", tokens: 100, heldOut: 10 },
    { name: "file 1", tokens: 50, heldOut: 5 },
  ]);
});

test("an id that the model does not have is named with its file", () => {
  const ids = (last: number): Material => material(count(0, 20), [...count(0, 20), last]);
  expect(cutText(ids(999), how).files).toHaveLength(2);
  expect(() => cutText(ids(1000), how)).toThrow("file 1: id 1000 is not in the model's vocabulary of 1000");
});

test("of short texts a whole window is held out, at the end of the longest one", () => {
  const { training, heldOut } = cutText(material(count(0, 3), count(10, 30)), how);
  expect(Array.from(training)).toEqual([...count(0, 3), ...count(10, 25)]);
  expect(heldOut.map(({ ids }) => Array.from(ids))).toEqual([count(25, 30)]);
});

test("a single held-out token foretells nothing and is trained on; a window is held out all the same", () => {
  const { training, heldOut, files } = cutText(material(count(0, 90), count(100, 110)), how);
  expect(files[1]?.heldOut).toBe(0);
  expect(Array.from(training)).toEqual([...count(0, 81), ...count(100, 110)]);
  expect(heldOut.map(({ ids }) => Array.from(ids))).toEqual([count(81, 90)]);
  // A tenth of every file, more than a window in all, and yet nothing that could be measured.
  const many = Array.from({ length: 9 }, (_, i) => count(20 * i, 20 * i + 10));
  const cut = cutText(material(...many), how);
  expect(cut.heldOut.map(({ ids }) => Array.from(ids))).toEqual([count(5, 10)]);
  expect(cut.training).toHaveLength(90 - 5);
});

test("a text that is just long enough is taken; one token less is refused with what fits, and that does fit", () => {
  expect(cutText(material(count(0, 10)), how).training).toHaveLength(5);
  for (const total of [9, 8, 7, 6]) {
    const short = (): unknown => cutText(material(count(0, total)), how);
    expect(short).toThrow(`it has ${total} tokens, windows of 4 need 10 (one to train on, one held out); --length`);
    const [, fits] = /--length (\d+) would fit/.exec(String(catching(short))) ?? [];
    expect(cutText(material(count(0, total)), { ...how, length: Number(fits) }).heldOut).toHaveLength(1);
  }
  expect(() => cutText(material(count(0, 5)), how)).toThrow("even the shortest windows need 6; give more text");
  expect(() => cutText(material([]), how)).toThrow("it has 0 tokens");
  const most = { ...how, share: 0.9 };
  expect(() => cutText(material(count(0, 40)), most)).toThrow(
    "of which --hold-out 0.9 leaves too few to train on windows of 4; --length 3 would fit, or hold out less",
  );
  expect(cutText(material(count(0, 40)), { ...most, length: 3 }).training).toHaveLength(4);
});

function catching(act: () => unknown): unknown {
  try {
    return act();
  } catch (error) {
    return error;
  }
}

test("a longest text that cannot give a window by itself is refused, too", () => {
  const parts = Array.from({ length: 5 }, (_, i) => count(10 * i, 10 * i + 4));
  expect(() => cutText(material(...parts), how)).toThrow(
    "it has 20 tokens, but the longest file only 4, too few for windows of 4; --length 3 would fit",
  );
  expect(cutText(material(...parts), { ...how, length: 3 }).training).toHaveLength(16);
});

test("bytes are those of the foretold tokens, without special ones", async () => {
  const words = tokenizer(await trainTokenizer(["whale ships and öre"], { vocabulary: 300 }));
  const content = "whale ships and öre ".repeat(20);
  const { heldOut } = cutText(
    { files: [{ name: "a", content }], sha256: "" },
    { ...how, tokenizer: words, vocabulary: words.vocabulary },
  );
  const [end] = heldOut;
  const text = words.decode(end?.ids.subarray(1) ?? []);
  expect(end?.bytes).toBe(Buffer.byteLength(text));
  expect(content.endsWith(text)).toBe(true);
});

test("every window is trained on once in a round, and an index gives the same batch again", () => {
  const text = cutText(material(count(0, 200)), how);
  const settings = { rows: 2, length: 4, seed: 3 };
  const batch = batchesOf(text, settings);
  expect(stepsOfEpoch(text.training.length, settings)).toBeCloseTo(179 / 8);
  const seen = new Set<number>();
  for (let i = 0; i < 21; i++) {
    const { shape, ids, labels } = batch(i);
    expect(shape).toEqual([2, 4]);
    for (const [j, id] of ids.entries()) {
      expect(labels[j]).toBe(id + 1);
      seen.add(id);
    }
  }
  expect(seen.size).toBe(21 * 8);
  expect(Math.max(...seen)).toBeLessThan(180);
  expect(batchesOf(text, settings)(7)).toEqual(batch(7));
  expect(batchesOf(text, { ...settings, seed: 4 })(7)).not.toEqual(batch(7));
});

test("files are read in their order, and a changed one changes the checksum", () => {
  const [a, b] = [join(home, "a.txt"), join(home, "b.txt")];
  writeFileSync(a, "one");
  writeFileSync(b, "two");
  const first = readMaterial({ text: [a, b] });
  expect(first.files).toEqual([
    { name: "a.txt", content: "one" },
    { name: "b.txt", content: "two" },
  ]);
  expect(readMaterial({ text: [a, b] }).sha256).toBe(first.sha256);
  expect(readMaterial({ text: [b, a] }).sha256).not.toBe(first.sha256);
  writeFileSync(a, "onet");
  writeFileSync(b, "wo");
  expect(readMaterial({ text: [a, b] }).sha256).not.toBe(first.sha256);
  writeFileSync(b, "4, 5\n6");
  expect(readMaterial({ ids: b }).files).toEqual([{ name: "b.txt", content: [4, 5, 6] }]);
});
