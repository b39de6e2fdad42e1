// Text to ids and back. Any tokenizer.json is served by @huggingface/tokenizers; byte-level BPE, which is what we
// train, also has a fast way of encoding that gives the same ids.
import { Tokenizer as LibraryTokenizer } from "@huggingface/tokenizers";
import type { Json } from "@switchyard/core";
import { CheckpointError, ShapeError } from "@switchyard/core";
import { byteOf, characters, pieces, wordPattern } from "./byte-level.ts";
import { isRecord } from "./checkpoint.ts";
import { Heap } from "./heap.ts";
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
  /** Special tokens in the text become their ids, as in the library; nothing is added at the ends. */
  encode(text: string): Int32Array;
  /** Text of the ids; bytes that are no valid UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, options?: { readonly skipSpecial?: boolean }): string;
  /** The UTF-8 bytes of the ids: for streams (a character may be split over tokens) and bits per byte. */
  bytes(ids: ArrayLike<number>): Uint8Array;
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

/** The parts of a byte-level BPE file, or the reason why the fast way cannot serve it. */
function byteLevel({ tokenizer, config }: TokenizerFiles, added: readonly AddedToken[]): ByteLevel | string {
  const { model, pre_tokenizer: words, normalizer, post_processor: post } = tokenizer;
  if (normalizer) return "it has a normalizer";
  if (!isRecord(words) || words.type !== "ByteLevel" || words.use_regex === false || words.add_prefix_space) {
    return "its pre-tokenizer is not plain ByteLevel";
  }
  if (post && !(isRecord(post) && post.type === "ByteLevel")) return "it has a post-processor";
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
  const pattern = new RegExp(`(${longestFirst.map((x) => x.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&")).join("|")})`);
  return (text) => text.split(pattern).map((part, i) => (i % 2 === 1 ? (byText.get(part) as AddedToken) : part));
}

/**
 * A tokenizer from the content of tokenizer.json and tokenizer_config.json.
 * Throws CheckpointError where the files do not describe a tokenizer.
 *
 * @example const { encode, decode } = tokenizer(await trainTokenizer([text], { vocabulary: 2048 }));
 */
export function tokenizer(files: TokenizerFiles): Tokenizer {
  const added = addedTokens(files);
  let library: LibraryTokenizer;
  try {
    library = new LibraryTokenizer(files.tokenizer, files.config);
  } catch (cause) {
    throw new CheckpointError(`tokenizer.json: ${cause instanceof Error ? cause.message : cause}`, { cause });
  }
  const fast = byteLevel(files, added);
  const addedIds = new Map(added.map((token) => [token.id, token]));
  const vocabulary = [...library.get_vocab(true).values()].reduce((most, id) => Math.max(most, id + 1), 0);
  const textEncoder = new TextEncoder();

  const encodeWithLibrary = (text: string): Int32Array =>
    Int32Array.from(library.encode(text, { add_special_tokens: false }).ids);
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

  return {
    vocabulary,
    files,
    special: new Map(added.filter(({ special }) => special).map(({ content, id }) => [content, id])),
    encoder: typeof fast === "string" ? "library" : "byte-level",
    encode: typeof fast === "string" ? encodeWithLibrary : encodeFast(fast),
    decode(ids, { skipSpecial = false } = {}) {
      const list = check(ids);
      if (list.length === 0) return "";
      return library.decode(list, { skip_special_tokens: skipSpecial, clean_up_tokenization_spaces: false });
    },
    bytes(ids) {
      const result: number[] = [];
      for (const id of check(ids)) {
        const token = addedIds.get(id);
        const text = token ? token.content : (library.id_to_token(id) as string);
        const bytes = token ? textEncoder.encode(text) : Array.from(text, (character) => byteOf.get(character));
        for (const b of bytes) {
          if (b === undefined) {
            throw new ShapeError(`token ${id} is not made of bytes: this tokenizer is not byte-level`);
          }
          result.push(b);
        }
      }
      return Uint8Array.from(result);
    },
  };
}
