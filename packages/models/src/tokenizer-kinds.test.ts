// Tokenizers of the kinds that published checkpoints have, against what the Rust library made of the same files: ids, ids with the
// special tokens at the ends, text of any ids, streams. And folders that have none.
import { readFile } from "node:fs/promises";
import { CheckpointError, type Json, ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { readCheckpoint } from "./checkpoint.ts";
import { bytesSource } from "./safetensors.ts";
import { readTokenizer, tokenizer } from "./tokenizer.ts";

interface Kind {
  readonly name: string;
  readonly tokenizer: { readonly [key: string]: Json };
  readonly config: { readonly [key: string]: Json };
  readonly samples: readonly {
    readonly text: string;
    readonly ids: number[];
    readonly special: number[];
    readonly decoded: string;
    readonly skipped: string;
  }[];
  /** Ids in an order that no text has. */
  readonly odd: readonly { readonly ids: number[]; readonly decoded: string }[];
}
const url = new URL("../test/fixtures/tokenizers.json", import.meta.url);
const { kinds } = JSON.parse(await readFile(url, "utf8")) as { readonly kinds: readonly Kind[] };

describe.each(kinds)("$name", ({ name, tokenizer: content, config, samples, odd }) => {
  const own = tokenizer({ tokenizer: content, config });
  const streamed = (ids: readonly number[], options: Parameters<typeof own.stream>[0] = {}): string => {
    const stream = own.stream(options);
    return ids.map((id) => stream.push(id)).join("") + stream.end();
  };

  it("encodes as the Rust library, with the special tokens at the ends and without", () => {
    for (const { text, ids, special } of samples) {
      expect([...own.encode(text)], JSON.stringify(text)).toEqual(ids);
      expect([...own.encode(text, { addSpecial: true })], JSON.stringify(text)).toEqual(special);
    }
    expect(own.encoder).toBe(name === "gpt2" ? "byte-level" : "library");
  });

  it("decodes as the Rust library, any ids", () => {
    for (const { ids, special, decoded, skipped } of samples) {
      expect(own.decode(ids)).toBe(decoded);
      expect(own.decode(special, { skipSpecial: true })).toBe(skipped);
    }
    for (const { ids, decoded } of odd) expect(own.decode(ids), `${ids}`).toBe(decoded);
  });

  it("gives the same text token by token, a character when it is whole", () => {
    for (const { ids, special, decoded, skipped } of samples) {
      expect(streamed(ids)).toBe(decoded);
      expect(streamed(special, { skipSpecial: true })).toBe(skipped);
      const stream = own.stream();
      for (const id of ids) expect(stream.push(id)).not.toContain("\ufffd");
      // Going on after any part of the text.
      for (const at of [1, ids.length >> 1, ids.length - 1]) {
        const before = own.stream();
        const text = ids.slice(0, at).map((id) => before.push(id));
        expect(text.join("") + streamed(ids.slice(at), { after: ids.slice(0, at) })).toBe(decoded);
      }
    }
    // Where bytes are no text, streams replace as little as possible and the library a whole run of bytes.
    for (const { ids, decoded } of odd) if (!decoded.includes("\ufffd")) expect(streamed(ids), `${ids}`).toBe(decoded);
  });

  it("has bytes that are the text, but for the space in front", () => {
    for (const { ids, decoded } of samples) {
      const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(own.bytes(ids));
      expect([decoded, ` ${decoded}`]).toContain(text);
    }
  });

  it("names ids that are not in use", () => {
    const { vocabulary } = own;
    for (const use of [own.decode, own.bytes]) {
      expect(() => use([0, vocabulary])).toThrow(`no token ${vocabulary}; its ids go from 0 to ${vocabulary - 1}`);
    }
    expect(() => own.stream().push(vocabulary)).toThrow(ShapeError);
    expect(() => own.stream({ after: [-1] })).toThrow(ShapeError);
  });
});

it("the recorded kinds have samples", () => {
  expect(kinds.length).toBeGreaterThan(10);
  expect(kinds.every(({ samples, odd }) => samples.length > 15 && odd.length > 10)).toBe(true);
});

describe("special tokens at the ends", () => {
  const kind = (name: string): Kind => kinds.find((one) => one.name === name) as Kind;
  const ids = ({ tokenizer: content }: Kind, config: { readonly [key: string]: Json }): number[] => [
    ...tokenizer({ tokenizer: content, config }).encode("the", { addSpecial: true }),
  ];
  const llama = kind("llama");
  const text = [...tokenizer({ tokenizer: llama.tokenizer, config: {} }).encode("the")];
  const named = { bos_token: "<s>", eos_token: { content: "</s>" } };

  it("are those of the file, which the switches of Llama's classes replace", () => {
    const config = { ...named, tokenizer_class: "LlamaTokenizerFast" };
    expect(ids(llama, config)).toEqual([1, ...text]);
    expect(ids(llama, { ...config, add_bos_token: false })).toEqual(text);
    expect(ids(llama, { ...config, add_bos_token: true, add_eos_token: true })).toEqual([1, ...text, 2]);
    expect(ids(llama, { tokenizer_class: "LlamaTokenizer", add_eos_token: true })).toEqual([1, ...text]);
    expect(ids(llama, { ...named, tokenizer_class: "PreTrainedTokenizerFast", add_bos_token: false })).toEqual([
      1,
      ...text,
    ]);
  });

  it("must be tokens", () => {
    const config = { bos_token: "<none>", add_bos_token: true, tokenizer_class: "LlamaTokenizer" };
    expect(() => ids(llama, config)).toThrow(CheckpointError);
    expect(() => ids(llama, config)).toThrow(/"<none>", added to texts, has no id/);
  });
});

describe("words that are no bytes", () => {
  const vocab = { "[UNK]": 0, hello: 1, "##ing": 2, world: 3, ".": 4, "[CLS]": 5 };
  const own = tokenizer({
    tokenizer: {
      added_tokens: [{ id: 5, content: "[CLS]", special: true }],
      normalizer: null,
      pre_tokenizer: { type: "BertPreTokenizer" },
      post_processor: null,
      decoder: { type: "WordPiece", prefix: "##", cleanup: true },
      model: { type: "WordPiece", unk_token: "[UNK]", continuing_subword_prefix: "##", vocab },
    },
    config: {},
  });

  it("are streamed too", () => {
    const ids = [5, 1, 2, 3, 4, ...Array.from({ length: 30 }, (_, i) => (i % 3) + 1), 4];
    const stream = own.stream({ skipSpecial: true });
    expect(ids.map((id) => stream.push(id)).join("") + stream.end()).toBe(own.decode(ids, { skipSpecial: true }));
    const rest = own.stream({ after: ids.slice(0, 3) });
    expect(rest.push(3) + rest.push(4)).toBe(" world.");
    expect(() => own.bytes([1])).toThrow(/token 1 is not made of bytes, but a word; use decode or stream/);
  });
});

describe("readTokenizer", () => {
  const read = async (files: Readonly<Record<string, string>>) => {
    const all = new Map(Object.entries({ "config.json": "{}", "model.safetensors": "\x02\0\0\0\0\0\0\0{}", ...files }));
    const open = async (name: string) => {
      const text = all.get(name);
      return text === undefined ? undefined : bytesSource(name, new TextEncoder().encode(text));
    };
    return readTokenizer(await readCheckpoint(open, "here"));
  };

  it("reads tokenizer.json with tokenizer_config.json", async () => {
    const { tokenizer: content, config, samples } = kinds[0] as Kind;
    const files = { "tokenizer.json": JSON.stringify(content) };
    const { tokenizer: found, withoutTokenizer } = await read({
      ...files,
      "tokenizer_config.json": JSON.stringify(config),
    });
    expect([...(found?.encode("the whale") ?? [])]).toEqual(samples[1]?.ids);
    expect([found?.files.config, withoutTokenizer]).toEqual([config, undefined]);
    expect((await read(files)).tokenizer?.files.config).toEqual({});
  });

  it.each([
    ["tokenizer.model", /has tokenizer.model \(SentencePiece\) but no tokenizer.json. Make one with .*save_pretrained/],
    ["tiktoken.model", /has tiktoken.model \(tiktoken\) but no tokenizer.json/],
    ["vocab.json", /has vocab.json \(a BPE vocabulary with merges.txt\) but/],
    ["README.md", /has no tokenizer.json: the model runs with token ids/],
  ])("says what a folder with only %s needs", async (name, message) => {
    const found = await read({ [name]: "x" });
    expect(found.tokenizer).toBeUndefined();
    expect(found.withoutTokenizer).toMatch(message);
  });

  it("refuses a damaged one", async () => {
    await expect(read({ "tokenizer.json": "[]" })).rejects.toThrow(/tokenizer.json must hold a JSON object/);
    await expect(read({ "tokenizer.json": "{}" })).rejects.toThrow(CheckpointError);
  });
});

it("says so where a text is too long for the library", () => {
  const { tokenizer: content, config } = kinds.find(({ name }) => name === "unigram") as Kind;
  const own = tokenizer({ tokenizer: content, config });
  expect(own.encode("a".repeat(20_000)).length).toBeGreaterThan(10_000);
  expect(() => own.encode("a".repeat(400_000))).toThrow(ShapeError);
  expect(() => own.encode("a".repeat(400_000))).toThrow(/400000 characters is too long for this kind of tokenizer/);
});
