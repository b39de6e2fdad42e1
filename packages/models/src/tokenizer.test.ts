// Training against the Rust library's merges and a naive trainer; encoding against @huggingface/tokenizers; round
// trips.
import { readFile } from "node:fs/promises";
import { Tokenizer as LibraryTokenizer } from "@huggingface/tokenizers";
import fc from "fast-check";
import { beforeAll, describe, expect, it } from "vitest";
import { pieces, wordPattern } from "./byte-level.ts";
import { type Tokenizer, tokenizer } from "./tokenizer.ts";
import { type TokenizerFiles, type TokenizerProgress, trainTokenizer } from "./tokenizer-training.ts";

interface Golden {
  readonly texts: string[];
  readonly merges: string[];
  readonly samples: readonly { readonly text: string; readonly ids: number[] }[];
}
const specialTokens = ["<|endoftext|>", "<|pad|>"];
const mergesOf = (files: TokenizerFiles): string[] => (files.tokenizer.model as { merges: string[] }).merges;
const vocabOf = (files: TokenizerFiles): Record<string, number> =>
  (files.tokenizer.model as { vocab: Record<string, number> }).vocab;

let golden: Golden;
let files: TokenizerFiles;
let ours: Tokenizer;
let library: LibraryTokenizer;
beforeAll(async () => {
  golden = JSON.parse(await readFile(new URL("../test/fixtures/byte-pair-encoding.json", import.meta.url), "utf8"));
  files = await trainTokenizer(golden.texts, { vocabulary: 480, specialTokens });
  ours = tokenizer(files);
  library = new LibraryTokenizer(files.tokenizer, files.config);
});

describe("trainTokenizer", () => {
  it("learns the merges of the Rust library, in its order", () => {
    expect(mergesOf(files)).toEqual(golden.merges);
    for (const { text, ids } of golden.samples) expect([...ours.encode(text)]).toEqual(ids);
  });

  // Recounts every pair from scratch after every merge.
  const naive = (texts: readonly string[], vocabulary: number, minimum: number): [string, string][] => {
    const words = texts.flatMap((text) => text.match(wordPattern) ?? []).map((word) => Array.from(ours.encode(word)));
    const names = new Map<string, number>(Object.entries(vocabOf(files)).filter(([, id]) => id < 258));
    const name = (id: number): string => [...names].find(([, other]) => other === id)?.[0] ?? "";
    const tokens = words.map((ids) => [...ours.bytes(ids)].map((b) => byteIds[b] as number));
    const merges: [string, string][] = [];
    while (names.size < vocabulary) {
      const counts = new Map<string, number>();
      for (const word of tokens) {
        for (let i = 0; i + 1 < word.length; i++) {
          const key = `${word[i]},${word[i + 1]}`;
          counts.set(key, (counts.get(key) ?? 0) + 1);
        }
      }
      let best: { a: number; b: number; count: number } | undefined;
      for (const [key, count] of counts) {
        const [a = 0, b = 0] = key.split(",").map(Number);
        const better =
          !best || count > best.count || (count === best.count && (a < best.a || (a === best.a && b < best.b)));
        if (better) best = { a, b, count };
      }
      if (!best || best.count < minimum) break;
      const { a, b } = best;
      const text = name(a) + name(b);
      const id = names.get(text) ?? names.size;
      merges.push([name(a), name(b)]);
      names.set(text, id);
      for (const word of tokens) {
        for (let i = 0; i + 1 < word.length; i++) if (word[i] === a && word[i + 1] === b) word.splice(i, 2, id);
      }
    }
    return merges;
  };
  let byteIds: number[] = [];
  beforeAll(() => {
    const ids = vocabOf(files);
    const bytes = new Map(Object.entries(ids).filter(([, id]) => id >= 2 && id < 258));
    byteIds = new Array(256);
    for (const id of bytes.values()) byteIds[ours.bytes([id])[0] as number] = id;
  });

  it("equals a naive trainer on runs, ties and texts made two ways", async () => {
    const letters = fc.array(fc.constantFrom("a", "b", "c", "ab", " ", "é", "aa"), { maxLength: 60 });
    const texts = fc.array(
      letters.map((list) => list.join("")),
      { minLength: 1, maxLength: 3 },
    );
    await fc.assert(
      fc.asyncProperty(texts, fc.integer({ min: 1, max: 3 }), async (list, minimumCount) => {
        const options = { vocabulary: 290, specialTokens, minimumCount };
        const learned = mergesOf(await trainTokenizer(list, options));
        expect(learned).toEqual(naive(list, 290, minimumCount).map((pair) => pair.join(" ")));
      }),
      { seed: 1, numRuns: 60 },
    );
  });

  it("stops where the text has no more pairs, and trains on nothing", async () => {
    const few = tokenizer(await trainTokenizer(["abab"], { vocabulary: 1000 }));
    expect(few.vocabulary).toBe(258);
    const none = tokenizer(await trainTokenizer([], { vocabulary: 257 }));
    expect(none.decode(none.encode("still every byte é"))).toBe("still every byte é");
  });

  it("reads streams, reports progress and is the same in one piece or many", async () => {
    async function* stream(): AsyncGenerator<string> {
      yield* golden.texts;
    }
    const seen: TokenizerProgress[] = [];
    const again = await trainTokenizer(stream(), { vocabulary: 480, specialTokens, onProgress: (p) => seen.push(p) });
    expect(again).toEqual(files);
    expect(seen.at(-1)).toEqual({ phase: "merges", done: 436, total: 436 });
    expect(seen.filter(({ phase }) => phase === "words").at(-1)?.done).toBe(golden.texts.join("").length);
  });

  it("can be aborted", async () => {
    const controller = new AbortController();
    const run = trainTokenizer(golden.texts, {
      vocabulary: 480,
      signal: controller.signal,
      onProgress: () => controller.abort(new Error("enough")),
    });
    await expect(run).rejects.toThrow("enough");
  });

  it("survives tokens called like methods and a word of a million letters", async () => {
    const text = `${"constructor ".repeat(50)}${"ab".repeat(500_000)}`;
    const trained = tokenizer(await trainTokenizer([text], { vocabulary: 300 }));
    const reread = tokenizer(JSON.parse(JSON.stringify(trained.files)));
    expect([...reread.encode("constructor")]).toEqual([...trained.encode("constructor")]);
    expect(trained.encode("constructor").length).toBe(1);
    expect(reread.decode(reread.encode(text))).toBe(text);
  });

  it.each([
    [{ vocabulary: 256 }, /vocabulary is 256; it must be a whole number from 257/],
    [{ vocabulary: 300.5 }, /vocabulary is 300.5/],
    [{ vocabulary: 300, specialTokens: ["<a>", "<a>"] }, /special tokens must differ/],
    [{ vocabulary: 300, specialTokens: ["a"] }, /longer than one byte/],
    [{ vocabulary: 300, specialTokens: ["ab"] }, /the special token "ab" is part of the text/],
  ])("refuses %o", async (options, message) => {
    await expect(trainTokenizer(["abab"], options)).rejects.toThrow(message);
  });
});

describe("tokenizer", () => {
  const texts = fc.oneof(
    fc.string({ unit: "grapheme", maxLength: 80 }),
    fc.string({ unit: "binary", maxLength: 80 }),
    fc
      .array(
        fc.constantFrom(
          "the",
          " banana",
          "\n\n",
          "  ",
          "\t",
          "'s",
          "'re",
          "日本",
          "🙂",
          "é",
          "e\u0301",
          "<|pad|>",
          "\u00a0",
          "\ufeff",
          "12",
          "==",
        ),
      )
      .map((parts) => parts.join("")),
  );

  it("gives the library's ids and its own text back", () => {
    expect(ours.encoder).toBe("byte-level");
    fc.assert(
      fc.property(texts, (text) => {
        const ids = ours.encode(text);
        expect([...ids]).toEqual(library.encode(text, { add_special_tokens: false }).ids);
        expect(ours.decode(ids)).toBe(text);
        expect(new TextDecoder("utf-8", { ignoreBOM: true }).decode(ours.bytes(ids))).toBe(text);
      }),
      { seed: 2, numRuns: 500 },
    );
  });

  it("gives the same ids for texts of several pieces and long words", () => {
    const text = `${golden.texts.join("\n")}${"x".repeat(3000)} ${"banana".repeat(500)}`;
    expect([...ours.encode(text)]).toEqual(library.encode(text).ids);
    // Pieces of any size: no word changes.
    for (const size of [1, 7, 1000]) {
      expect([...pieces(text, size)].flatMap((piece) => piece.match(wordPattern) ?? [])).toEqual(
        text.match(wordPattern),
      );
    }
  });

  it("prefers the longest special token", async () => {
    const nested = tokenizer(
      await trainTokenizer(["abc"], { vocabulary: 300, specialTokens: ["<a>", "<a>b", "[x]("] }),
    );
    const other = new LibraryTokenizer(nested.files.tokenizer, nested.files.config);
    for (const text of ["<a>", "<a>b", "<a><a>bb", "x[x](<a", "[x]"]) {
      expect([...nested.encode(text)]).toEqual(other.encode(text).ids);
    }
    expect([...nested.encode("<a>b<a>")]).toEqual([1, 0]);
    expect([...nested.special]).toEqual([
      ["<a>", 0],
      ["<a>b", 1],
      ["[x](", 2],
    ]);
  });

  it("decodes nothing, skips special tokens on request and refuses unknown ids", () => {
    expect(ours.decode([])).toBe("");
    const ids = ours.encode("a<|pad|>b");
    expect(ours.decode(ids)).toBe("a<|pad|>b");
    expect(ours.decode(ids, { skipSpecial: true })).toBe("ab");
    expect(() => ours.decode([436])).toThrow(/no token 436; its ids go from 0 to 435/);
    expect(ours.vocabulary).toBe(436);
  });

  it("keeps a character that is split over tokens whole in bytes", () => {
    const ids = [...ours.encode("Ω")];
    expect(ids.length).toBe(2);
    expect(ours.decode(ids.slice(0, 1))).toBe("\ufffd");
    expect([...ours.bytes(ids)]).toEqual([0xce, 0xa9]);
  });

  it("leaves other kinds of tokenizer to the library", () => {
    const model = {
      type: "WordPiece",
      unk_token: "[UNK]",
      vocab: { "[UNK]": 0, hello: 1 },
      continuing_subword_prefix: "##",
    };
    const word = tokenizer({
      tokenizer: {
        added_tokens: [],
        normalizer: null,
        pre_tokenizer: { type: "Whitespace" },
        post_processor: null,
        decoder: null,
        model,
      },
      config: {},
    });
    expect(word.encoder).toBe("library");
    expect([...word.encode("hello you")]).toEqual([1, 0]);
    const normalised = tokenizer({ ...files, tokenizer: { ...files.tokenizer, normalizer: { type: "Lowercase" } } });
    expect(normalised.encoder).toBe("library");
    expect(normalised.decode(normalised.encode("BANANA"))).toBe("banana");
  });

  it("cuts off a file's regular expression that tries all ways of matching", () => {
    const hostile = (pattern: string) =>
      tokenizer({
        ...files,
        tokenizer: {
          ...files.tokenizer,
          pre_tokenizer: { type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false },
        },
      });
    const ours = hostile("(?:a+)+$");
    expect(() => ours.encode(`${"a".repeat(60)}!`)).toThrow(
      /its regular expressions take more than 2\.0 s for a text of length 61: .*do not use this file/,
    );
    // Other texts of it, and other files, work.
    expect(ours.decode(ours.encode("aaa"))).toBe("aaa");
    const harmless = hostile("an|b");
    expect(harmless.decode(harmless.encode("banana"))).toBe("banana");
  }, 20_000);

  it("refuses what is no tokenizer", () => {
    expect(() => tokenizer({ tokenizer: {}, config: {} })).toThrow(/tokenizer.json: /);
    const broken = { ...files.tokenizer, added_tokens: [{ content: "x" }] };
    expect(() => tokenizer({ tokenizer: broken, config: {} })).toThrow(/added token needs an id/);
  });
});
