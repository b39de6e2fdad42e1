// Folders and files as users have them: several encodings, empty and binary files, multi-byte characters at every cut.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { UnsupportedError } from "@switchyard/core";
import { afterAll, describe, expect, test } from "vitest";
import { cutBlocks, distinctNames, hostRandom, readCorpus, shuffled, splitCorpora } from "./corpus.ts";

const folder = mkdtempSync(join(tmpdir(), "switchyard-corpus-"));
afterAll(() => rmSync(folder, { recursive: true }));

const decode = (bytes: Uint8Array): string => new TextDecoder("utf-8", { fatal: true }).decode(bytes);
const corpus = (name: string, ...texts: string[]) => ({
  name,
  texts: texts.map((text) => Buffer.from(text)),
  skipped: 0,
});

describe("readCorpus", () => {
  test("a file: line ends become line feeds, the byte-order mark goes, the label is the file's name", () => {
    const path = join(folder, "novel.txt");
    writeFileSync(path, "\ufeffone\r\ntwo\rthree\n");
    const read = readCorpus(path);
    expect({ ...read, texts: read.texts.map(decode) }).toEqual({
      name: "novel.txt",
      texts: ["one\ntwo\rthree\n"],
      skipped: 0,
    });
  });

  test("a folder: files in the order of their paths, hidden and binary ones passed over and counted", () => {
    const root = join(folder, "mixed");
    mkdirSync(join(root, "b", "node_modules"), { recursive: true });
    writeFileSync(join(root, "c.txt"), "sea");
    writeFileSync(join(root, "a.txt"), "ay\n");
    writeFileSync(join(root, "b", "x.txt"), "bee\n");
    writeFileSync(join(root, "b", "node_modules", "x.txt"), "not read");
    writeFileSync(join(root, ".hidden"), "not read");
    writeFileSync(join(root, "picture.png"), Uint8Array.of(137, 80, 0, 1));
    writeFileSync(join(root, "latin1.txt"), Uint8Array.of(0x63, 0xe9, 0x20));
    const read = readCorpus(root);
    expect(read.texts.map(decode)).toEqual(["ay\n", "bee\n", "sea"]);
    expect([read.name, read.skipped]).toEqual(["mixed", 2]);
    const bees = readCorpus(root, { accept: (path) => path.startsWith("b/"), name: "bees" });
    expect([bees.name, bees.texts.map(decode)]).toEqual(["bees", ["bee\n"]]);
    expect(readCorpus(root, { maxBytes: 3 }).texts.map(decode)).toEqual(["ay\n"]);
  });

  test.each([
    ["empty.txt", Uint8Array.of(), "empty"],
    ["blank.txt", Buffer.from(" \n\n"), "empty: it holds white space only"],
    ["zeros.bin", Uint8Array.of(65, 0, 66), "binary: it holds zero bytes"],
    ["bytes.bin", Uint8Array.of(0xff, 0xfe, 65), "not UTF-8 text"],
  ])("%s is refused with the reason", (name, bytes, reason) => {
    const path = join(folder, name);
    writeFileSync(path, bytes);
    expect(() => readCorpus(path)).toThrow(
      new UnsupportedError(`corpus ${path}: ${reason}; give a text file in UTF-8`),
    );
  });

  test("a path that is not there and a folder without text are refused", () => {
    expect(() => readCorpus(join(folder, "nowhere"))).toThrow("no such file or folder");
    const bare = join(folder, "bare");
    mkdirSync(bare);
    expect(() => readCorpus(bare)).toThrow("no files; give a folder with text files");
    writeFileSync(join(bare, "x.bin"), Uint8Array.of(0));
    expect(() => readCorpus(bare)).toThrow("none of its 1 files is text in UTF-8");
  });
});

describe("cutBlocks", () => {
  const text = Buffer.from("aé€😀".repeat(97));
  for (const size of [1, 2, 3, 4, 5, 7, 101, 969, 970, 5000]) {
    test(`blocks of ${size} bytes end on whole characters and lose nothing`, () => {
      const blocks = cutBlocks(text, size);
      expect(blocks.map(decode).join("")).toBe(text.toString());
      for (const block of blocks) expect(block.length).toBeLessThan(1.5 * size + 4);
    });
  }
  test("no text, no blocks", () => expect(cutBlocks(new Uint8Array(0), 10)).toEqual([]));
});

describe("splitCorpora", () => {
  const words = (seed: number, bytes: number): string => {
    const random = hostRandom(seed);
    let text = "";
    while (text.length < bytes) text += `${Math.floor(random() * 1e6).toString(36)} `;
    return text;
  };
  const two = [corpus("a", words(1, 50_000)), corpus("b", words(2, 300_000))];

  test("training and held-out blocks are apart and together make the text", () => {
    const [a] = splitCorpora(two, { seed: 3, block: 1000, held: 0.2 });
    expect([a?.training.length, a?.validation.length]).toEqual([40, 10]);
    const all = [...(a?.training ?? []), ...(a?.validation ?? [])].map(decode).sort();
    expect(all).toEqual([...cutBlocks(two[0]?.texts[0] ?? Buffer.of(), 1000)].map(decode).sort());
  });

  test("a limit takes whole files in the order of the seed, the last one cut at a whole character", () => {
    const files = Array.from({ length: 30 }, (_, i) => `${String.fromCharCode(65 + i)}é`.repeat(500));
    const taken = (seed: number): { letters: string; bytes: number; files: number } => {
      const [domain] = splitCorpora([corpus("many", ...files)], { seed, block: 100, limit: 5000 });
      const text = [...(domain?.training ?? []), ...(domain?.validation ?? [])].map(decode).join("");
      const letters = [...new Set(text.replaceAll("é", "").replaceAll("\n", ""))].sort().join("");
      return { letters, bytes: Buffer.byteLength(text), files: domain?.files ?? 0 };
    };
    const one = taken(1);
    expect(one.files).toBe(4);
    expect(one.letters).toHaveLength(4);
    // Three whole files of 1500 bytes and a line feed each, then 500 bytes or one less where a character would be cut.
    expect(one.bytes).toBeGreaterThanOrEqual(5002);
    expect(one.bytes).toBeLessThanOrEqual(5003);
    expect(taken(1)).toEqual(one);
    expect([2, 3, 4, 5].map((seed) => taken(seed).letters)).not.toEqual(Array(4).fill(one.letters));
  });

  test("the seed decides, the neighbours do not", () => {
    const first = splitCorpora(two, { seed: 5 });
    expect(splitCorpora(two, { seed: 5 })).toEqual(first);
    expect(splitCorpora([two[1] ?? corpus("", "")], { seed: 5 })[0]).toEqual(first[1]);
    expect(splitCorpora(two, { seed: 6 })).not.toEqual(first);
  });

  test("small corpora get small blocks, tiny ones are refused", () => {
    const [small] = splitCorpora([corpus("small", "x ".repeat(1000))], { seed: 0 });
    expect([small?.training.length, small?.validation.length]).toEqual([9, 1]);
    expect(() => splitCorpora([corpus("tiny", "x ".repeat(999))], { seed: 0 })).toThrow(
      "corpus tiny: 1998 bytes are too little",
    );
  });

  test("equal names are numbered", () => {
    const names = distinctNames([corpus("x", "1"), corpus("y", "1"), corpus("x", "2")]).map(({ name }) => name);
    expect(names).toEqual(["x", "y", "x 2"]);
  });
});

test("shuffled holds every number once and uses the generator", () => {
  expect([...shuffled(101, hostRandom(1))].sort((a, b) => a - b)).toEqual(Array.from({ length: 101 }, (_, i) => i));
  expect(shuffled(101, hostRandom(1))).toEqual(shuffled(101, hostRandom(1)));
  expect(shuffled(101, hostRandom(1))).not.toEqual(shuffled(101, hostRandom(2)));
  expect(shuffled(0, hostRandom(1)).length).toBe(0);
});
