// Text to ids and back. Any tokenizer.json is served by @huggingface/tokenizers; byte-level BPE, which is what we
// train, also has a fast way of encoding that gives the same ids.
import { Tokenizer as LibraryTokenizer } from "@huggingface/tokenizers";
import type { Json } from "@switchyard/core";
import { CheckpointError, ShapeError } from "@switchyard/core";
import { withinTime } from "./bounded-time.ts";
import { characters, pieces, wordPattern } from "./byte-level.ts";
import { isRecord, type OpenCheckpoint } from "./checkpoint.ts";
import { Heap } from "./heap.ts";
import { quote } from "./safetensors.ts";
import { tokenDecoder } from "./token-decoder.ts";
import type { TokenizerFiles } from "./tokenizer-training.ts";

export interface Tokenizer {
  /** Number of ids: the highest id in use plus one. */
  readonly vocabulary: number;
  /** The files it was made from, as they are saved with a checkpoint. */
  readonly files: TokenizerFiles;
  /** Ids of special tokens (<|endoftext|>) by their text. */
  readonly special: ReadonlyMap<string, number>;
  /** "byte-level": the fast way; "library": every word goes through @huggingface/tokenizers. */
  readonly encoder: "byte-level" | "library";
  /**
   * Special tokens in the text become their ids, as in the library. `addSpecial`: those that the checkpoint wants at the ends of a
   * text (`<s>`) are added; default false, as what a chat template makes has them already.
   */
  encode(text: string, options?: { readonly addSpecial?: boolean }): Int32Array;
  /** Text of the ids; bytes that are no valid UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, options?: { readonly skipSpecial?: boolean }): string;
  /**
   * The UTF-8 bytes that the ids stand for inside a text, where SentencePiece tokens keep the space in front of a word: for streams
   * (a character may be split over tokens) and bits per byte. Throws ShapeError where tokens are no bytes (WordPiece).
   */
  bytes(ids: ArrayLike<number>): Uint8Array;
  /** Decodes token by token, of any kind of tokenizer. */
  stream(options?: StreamOptions): TokenStream;
}

export interface StreamOptions {
  /** Ids before the first one that is pushed, such as the prompt: their text is not given again. Default: none. */
  readonly after?: ArrayLike<number>;
  /** Special tokens give no text; default false. */
  readonly skipSpecial?: boolean;
}

/** Text that becomes complete; together what `decode` gives for all ids, where they are valid UTF-8. */
export interface TokenStream {
  /** The text that became complete with this token; "" inside a character. Throws ShapeError for an id that is not in use. */
  push(id: number): string;
  /** What is left of a character that was not finished, as U+FFFD. */
  end(): string;
}

interface ByteLevel {
  readonly vocab: ReadonlyMap<string, number>;
  readonly merges: readonly (readonly [string, string])[];
}

interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
  readonly plain: boolean;
}

function addedTokens(files: TokenizerFiles): AddedToken[] {
  const list = files.tokenizer.added_tokens ?? [];
  if (!Array.isArray(list)) throw new CheckpointError("tokenizer.json: added_tokens must be a list");
  return list.map((token: Json) => {
    const { id, content } = isRecord(token) ? token : {};
    if (!isRecord(token) || typeof id !== "number" || typeof content !== "string" || content === "") {
      throw new CheckpointError(
        `tokenizer.json: an added token needs an id and a content, found ${JSON.stringify(token)}`,
      );
    }
    const plain = !token.single_word && !token.lstrip && !token.rstrip && !token.normalized;
    return { id, content, special: token.special === true, plain };
  });
}

/** Pieces of Metaspace, as the Rust library cuts them unless `split` is false: JavaScript's leaves the text whole. */
function withMetaspaceWords(words: Json | undefined): Json | undefined {
  if (!isRecord(words)) return words;
  if (words.type === "Sequence" && Array.isArray(words.pretokenizers)) {
    return { ...words, pretokenizers: words.pretokenizers.map((one: Json) => withMetaspaceWords(one) ?? null) };
  }
  if (words.type !== "Metaspace" || words.split === false) return words;
  const { replacement = "\u2581" } = words;
  const mark = escaped(String(replacement));
  const cut = {
    type: "Split",
    pattern: { Regex: `${mark}[^${mark}]*|[^${mark}]+` },
    behavior: "Isolated",
    invert: false,
  };
  return { type: "Sequence", pretokenizers: [words, cut] };
}

const escaped = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&");

/** Whether a file holds a regular expression of its own, which may take any time. */
function hasPattern(part: Json | undefined): boolean {
  if (Array.isArray(part)) return part.some(hasPattern);
  return isRecord(part) && ("Regex" in part || Object.values(part).some(hasPattern));
}

/** A text takes some microseconds per character; slow machines, and the first time of all, are allowed for. */
const timeFor = (size: number): number => Math.ceil(2000 + 0.05 * size);

/** Runs what may run a file's regular expressions. Throws CheckpointError where that does not come to its end. */
function bounded<T>(size: number, act: () => T): T {
  const most = timeFor(size);
  return withinTime(most, act, () => {
    const time = `${(most / 1000).toFixed(1)} s`;
    return new CheckpointError(
      `tokenizer.json: its regular expressions take more than ${time} for a text of length ${size}: they try all ways of matching; ` +
        "do not use this file",
    );
  });
}

/** Classes of Transformers whose switches `add_bos_token` and `add_eos_token` replace the post-processor of the file. */
const switched = /^(Llama|CodeLlama|Gemma|Cohere)Tokenizer(Fast)?$/;

/** Ids that belong before and after a text. */
function ends(files: TokenizerFiles, library: LibraryTokenizer): readonly [readonly number[], readonly number[]] {
  const id = (token: string): number => {
    const found = library.token_to_id(token);
    if (found === undefined) throw new CheckpointError(`tokenizer.json: ${quote(token)}, added to texts, has no id`);
    return found;
  };
  // No token is called so.
  const inside = "\u0000text\u0000";
  const tokens = library.post_processor?.post_process([inside], null, true).tokens ?? [inside];
  const at = tokens.indexOf(inside);
  const before = tokens.slice(0, Math.max(at, 0)).map(id);
  const after = at < 0 ? [] : tokens.slice(at + 1).map(id);
  const { tokenizer_class: name, add_bos_token: bos, add_eos_token: eos } = files.config;
  if (typeof name !== "string" || !switched.test(name)) return [before, after];
  const own = (role: "bos_token" | "eos_token", wanted: Json | undefined, found: readonly number[]) => {
    if (typeof wanted !== "boolean") return found;
    const token = files.config[role];
    const text = isRecord(token) ? token.content : token;
    return wanted && typeof text === "string" ? [id(text)] : [];
  };
  return [own("bos_token", bos, before), own("eos_token", eos, after)];
}

/** The parts of a byte-level BPE file, or the reason why the fast way cannot serve it. */
function byteLevel({ tokenizer, config }: TokenizerFiles, added: readonly AddedToken[]): ByteLevel | string {
  const { model, pre_tokenizer: words, normalizer } = tokenizer;
  if (normalizer) return "it has a normalizer";
  if (!isRecord(words) || words.type !== "ByteLevel" || words.use_regex === false || words.add_prefix_space) {
    return "its pre-tokenizer is not plain ByteLevel";
  }
  if (config.remove_space || config.do_lowercase_and_remove_accent) return "its configuration changes the text";
  if (added.some(({ plain }) => !plain)) return "an added token takes the spaces around it";
  if (!isRecord(model) || (model.type ?? "BPE") !== "BPE") return "its model is not BPE";
  for (const key of ["continuing_subword_suffix", "end_of_word_suffix", "byte_fallback", "ignore_merges"]) {
    if (model[key]) return `its model sets ${key}`;
  }
  const { vocab, merges } = model;
  if (!isRecord(vocab) || !Array.isArray(merges)) return "its model has no vocab and merges";
  const ids = new Map(Object.entries(vocab) as [string, number][]);
  if (characters.some((character) => !ids.has(character))) return "its vocabulary lacks a byte";
  const pairs = merges.map(
    (merge: Json) => (typeof merge === "string" ? merge.split(" ", 2) : merge) as [string, string],
  );
  if (pairs.some(([a, b]) => !ids.has(a) || !ids.has(b) || !ids.has(a + b))) return "a merge is not in its vocabulary";
  return { vocab: ids, merges: pairs };
}

/** Two neighbours that may be merged: the better rank first, then the leftmost. */
interface Candidate {
  readonly rank: number;
  readonly position: number;
  readonly a: number;
  readonly b: number;
}

const sooner = (x: Candidate, y: Candidate): boolean => (x.rank !== y.rank ? x.rank < y.rank : x.position < y.position);

/** Words longer than this are not remembered: they hardly come again. */
const longestRemembered = 64;
const mostRemembered = 1 << 18;

/** ids of one word, found by merging bytes; common words are looked up. */
function wordEncoder({ vocab, merges }: ByteLevel): (word: string) => readonly number[] {
  const encoder = new TextEncoder();
  const byteIds = characters.map((character) => vocab.get(character) as number);
  const ranks = new Map<number, { readonly rank: number; readonly merged: number }>();
  for (const [rank, [a, b]] of merges.entries()) {
    const key = (vocab.get(a) as number) * 2 ** 26 + (vocab.get(b) as number);
    ranks.set(key, { rank, merged: vocab.get(a + b) as number });
  }
  const find = (a: number, b: number): { readonly rank: number; readonly merged: number } | undefined =>
    ranks.get(a * 2 ** 26 + b);

  const merge = (word: string): number[] => {
    const ids = Array.from(encoder.encode(word), (b) => byteIds[b] as number);
    const next = ids.map((_, i) => (i + 1 < ids.length ? i + 1 : -1));
    const previous = ids.map((_, i) => i - 1);
    const queue = new Heap<Candidate>(sooner);
    const consider = (i: number): void => {
      const j = i < 0 ? -1 : (next[i] as number);
      if (j < 0) return;
      const [a, b] = [ids[i] as number, ids[j] as number];
      const found = find(a, b);
      if (found) queue.push({ rank: found.rank, position: i, a, b });
    };
    for (let i = 0; i < ids.length; i++) consider(i);
    for (let best = queue.pop(); best; best = queue.pop()) {
      const { position: i, a, b } = best;
      const j = next[i] as number;
      // Out of date: one of the two has been merged since.
      if (ids[i] !== a || j < 0 || ids[j] !== b) continue;
      ids[i] = (find(a, b) as { readonly merged: number }).merged;
      ids[j] = -1;
      const after = next[j] as number;
      next[i] = after;
      if (after >= 0) previous[after] = i;
      consider(previous[i] as number);
      consider(i);
    }
    return ids.filter((id) => id >= 0);
  };

  const remembered = new Map<string, readonly number[]>();
  return (word) => {
    const known = remembered.get(word);
    if (known) return known;
    const ids = merge(word);
    if (word.length <= longestRemembered) {
      if (remembered.size >= mostRemembered) remembered.clear();
      remembered.set(word, ids);
    }
    return ids;
  };
}

/** A growing list of ids. */
class Ids {
  #data = new Int32Array(1024);
  #length = 0;

  push(ids: readonly number[]): void {
    if (this.#length + ids.length > this.#data.length) {
      const larger = new Int32Array(Math.max(this.#data.length * 2, this.#length + ids.length));
      larger.set(this.#data);
      this.#data = larger;
    }
    for (const id of ids) this.#data[this.#length++] = id;
  }

  take(): Int32Array {
    return this.#data.slice(0, this.#length);
  }
}

/** Cuts text at added tokens: the leftmost, of those the longest, as the library does. */
function splitter(added: readonly AddedToken[]): (text: string) => (string | AddedToken)[] {
  if (added.length === 0) return (text) => [text];
  const byText = new Map(added.map((token) => [token.content, token]));
  const longestFirst = [...byText.keys()].sort((x, y) => y.length - x.length);
  const pattern = new RegExp(`(${longestFirst.map(escaped).join("|")})`);
  return (text) => text.split(pattern).map((part, i) => (i % 2 === 1 ? (byText.get(part) as AddedToken) : part));
}

/**
 * A tokenizer from the content of tokenizer.json and tokenizer_config.json. Encoding and decoding throw CheckpointError where regular
 * expressions of the file do not come to an end (in Node; a browser has no such bound).
 * Throws CheckpointError where the files do not describe a tokenizer.
 *
 * @example const { encode, decode } = tokenizer(await trainTokenizer([text], { vocabulary: 2048 }));
 */
export function tokenizer(files: TokenizerFiles): Tokenizer {
  const added = addedTokens(files);
  let library: LibraryTokenizer;
  try {
    const words = withMetaspaceWords(files.tokenizer.pre_tokenizer);
    library = new LibraryTokenizer(
      words === undefined ? files.tokenizer : { ...files.tokenizer, pre_tokenizer: words },
      files.config,
    );
  } catch (cause) {
    throw new CheckpointError(`tokenizer.json: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
  const fast = byteLevel(files, added);
  const addedIds = new Map(added.map((token) => [token.id, token]));
  const vocabulary = [...library.get_vocab(true).values()].reduce((most, id) => Math.max(most, id + 1), 0);
  const textEncoder = new TextEncoder();

  const decoder = tokenDecoder(files.tokenizer.decoder);
  const [before, after] = ends(files, library);
  const { model } = files.tokenizer;
  const unigramBytes = isRecord(model) && model.type === "Unigram" && model.byte_fallback === true;

  const { normalizer, pre_tokenizer: words } = files.tokenizer;
  const guarded: typeof bounded = [normalizer, words, files.tokenizer.decoder].some(hasPattern)
    ? bounded
    : (_, act) => act();

  const encodedByLibrary = (text: string) => {
    try {
      return library.encode(text, { add_special_tokens: false });
    } catch (cause) {
      // It hands the tokens of a word over as arguments, of which there may be some 100,000.
      if (!(cause instanceof RangeError)) throw cause;
      throw new ShapeError(
        `tokenizer: a text of ${text.length} characters is too long for this kind of tokenizer; encode it in pieces`,
        { cause },
      );
    }
  };
  const encodeWithLibrary = (text: string): Int32Array => {
    const { ids, tokens } = guarded(text.length, () => encodedByLibrary(text));
    if (!unigramBytes) return Int32Array.from(ids);
    // The library gives an unknown piece as it stands in the text; its bytes are tokens.
    return Int32Array.from(
      tokens.flatMap((token, i) => {
        if (library.token_to_id(token) !== undefined) return [ids[i] as number];
        const bytes = Array.from(textEncoder.encode(token), (b) =>
          library.token_to_id(`<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`),
        );
        return bytes.every((id) => id !== undefined) ? (bytes as number[]) : [ids[i] as number];
      }),
    );
  };
  const encodeFast = (parts: ByteLevel): ((text: string) => Int32Array) => {
    const encodeWord = wordEncoder(parts);
    const split = splitter(added);
    return (text) => {
      const ids = new Ids();
      for (const part of split(text)) {
        if (typeof part !== "string") ids.push([part.id]);
        else
          for (const piece of pieces(part))
            for (const word of piece.match(wordPattern) ?? []) ids.push(encodeWord(word));
      }
      return ids.take();
    };
  };
  const check = (ids: ArrayLike<number>): number[] => {
    const list = Array.from(ids);
    const wrong = list.find((id) => library.id_to_token(id) === undefined);
    if (wrong !== undefined) {
      throw new ShapeError(`the tokenizer has no token ${wrong}; its ids go from 0 to ${vocabulary - 1}`);
    }
    return list;
  };

  const encodeText = typeof fast === "string" ? encodeWithLibrary : encodeFast(fast);
  const bytesOf = (id: number, first: boolean): ArrayLike<number> | undefined => {
    const token = addedIds.get(id);
    return token ? textEncoder.encode(token.content) : decoder?.bytes(library.id_to_token(id) as string, first);
  };
  const isSpecial = (id: number): boolean => addedIds.get(id)?.special === true;
  const decode = (ids: ArrayLike<number>, { skipSpecial = false } = {}): string => {
    const list = skipSpecial ? check(ids).filter((id) => !isSpecial(id)) : check(ids);
    if (list.length === 0) return "";
    if (decoder?.decode) return decoder.decode(list.map((id) => library.id_to_token(id) as string));
    return guarded(list.length, () => library.decode(list, { clean_up_tokenization_spaces: false }));
  };

  return {
    vocabulary,
    files,
    special: new Map(added.filter(({ special }) => special).map(({ content, id }) => [content, id])),
    encoder: typeof fast === "string" ? "library" : "byte-level",
    encode(text, { addSpecial = false } = {}) {
      const ids = encodeText(text);
      return addSpecial ? Int32Array.from([...before, ...ids, ...after]) : ids;
    },
    decode,
    bytes(ids) {
      const result: number[] = [];
      for (const id of check(ids)) {
        const bytes = bytesOf(id, false);
        if (!bytes) throw new ShapeError(`token ${id} is not made of bytes, but a word; use decode or stream`);
        for (let i = 0; i < bytes.length; i++) result.push(bytes[i] as number);
      }
      return Uint8Array.from(result);
    },
    stream({ after: earlier = [], skipSpecial = false } = {}) {
      const shown = (ids: readonly number[]): readonly number[] =>
        skipSpecial ? ids.filter((id) => !isSpecial(id)) : ids;
      const { push, end } = decoder ? byteStream(bytesOf) : textStream(decode);
      for (const id of shown(check(earlier))) push(id);
      return { push: (id) => (shown(check([id])).length > 0 ? push(id) : ""), end };
    },
  };
}

/** Tokens are bytes: a character waits for its last one. */
function byteStream(bytesOf: (id: number, first: boolean) => ArrayLike<number> | undefined): TokenStream {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let first = true;
  return {
    push(id) {
      const bytes = bytesOf(id, first);
      if (!bytes) throw new ShapeError(`token ${id} is not made of bytes, as those of its tokenizer should be`);
      first = false;
      return decoder.decode(Uint8Array.from(bytes), { stream: true });
    },
    end: () => decoder.decode(),
  };
}

/** Tokens are words or parts of them: what a token adds to the text of the latest few before it. */
function textStream(decode: (ids: readonly number[]) => string): TokenStream {
  let ids: readonly number[] = [];
  let text = "";
  return {
    push(id) {
      const longer = decode([...ids, id]);
      const added = longer.startsWith(text) ? longer.slice(text.length) : "";
      ids = [...ids, id].slice(-8);
      text = decode(ids);
      return added;
    },
    end: () => "",
  };
}

/** What a checkpoint has of a tokenizer. */
export interface FoundTokenizer {
  /** Where there is a tokenizer.json. */
  readonly tokenizer?: Tokenizer;
  /** Why there is none, and what to do. */
  readonly withoutTokenizer?: string;
}

/** Files of other kinds of tokenizer, and what they are. */
const others = [
  ["tokenizer.model", "SentencePiece"],
  ["spiece.model", "SentencePiece"],
  ["sentencepiece.bpe.model", "SentencePiece"],
  ["tiktoken.model", "tiktoken"],
  ["tokenizer.tiktoken", "tiktoken"],
  ["qwen.tiktoken", "tiktoken"],
  ["vocab.json", "a BPE vocabulary with merges.txt"],
  ["vocab.txt", "WordPiece"],
] as const;

/**
 * The tokenizer of an open checkpoint, where it has a tokenizer.json; else why not: such a model runs with ids.
 * Throws CheckpointError for a tokenizer.json that is damaged or of a kind that the library does not know.
 */
export async function readTokenizer(checkpoint: Pick<OpenCheckpoint, "json" | "has">): Promise<FoundTokenizer> {
  const content = await checkpoint.json("tokenizer.json");
  if (content) {
    const config = await checkpoint.json("tokenizer_config.json");
    return { tokenizer: tokenizer({ tokenizer: content, config: config ?? {} }) };
  }
  const present = await Promise.all(others.map(([name]) => checkpoint.has(name)));
  for (const [i, [name, kind]] of others.entries()) {
    if (!present[i]) continue;
    return {
      withoutTokenizer:
        `the checkpoint has ${name} (${kind}) but no tokenizer.json. Make one with Python's Transformers: ` +
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER); without it the model runs with token ids",
    };
  }
  return { withoutTokenizer: "the checkpoint has no tokenizer.json: the model runs with token ids" };
}
