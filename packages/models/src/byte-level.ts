// The byte-level alphabet and word splitting of GPT-2: every byte has a printable character, and merges never cross
// words.

/**
 * The pattern that cuts text into words, as in the `tokenizers` libraries. A cut between a character and a following
 * white space never changes the words on either side, which lets long texts be handled piece by piece.
 */
export const wordPattern = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** characters[b] is the character that stands for byte b: itself where it prints, else one from U+0100 up. */
export const characters: readonly string[] = (() => {
  const prints = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(prints(b) ? b : next++));
})();

/** The byte that each character of the alphabet stands for. */
export const byteOf: ReadonlyMap<string, number> = new Map(characters.map((character, b) => [character, b]));

/** Pieces of about `size` characters, cut only before a white space that follows another character. */
export function* pieces(text: string, size = 1 << 20): Generator<string, void, undefined> {
  const cut = /\S(?=\s)/g;
  let from = 0;
  while (text.length - from > size) {
    cut.lastIndex = from + size;
    const found = cut.exec(text);
    if (!found) break;
    const to = found.index + 1;
    yield text.slice(from, to);
    from = to;
  }
  if (from < text.length) yield text.slice(from);
}

/** Lets timers, signals and the page have their turn. */
export const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 0));
