// Ends a text where one of some strings appears, though it be spread over several tokens: tokens are held back while they may be its
// beginning. Private.

export interface StopStrings<T> {
  /** Adds a token with its text; gives those that are certain now, and whether the text has ended. */
  push(token: T): { readonly released: readonly T[]; readonly ended: boolean };
  /** What was held back, once nothing follows. */
  flush(): readonly T[];
}

/**
 * The text ends before the first string that is complete, of several the one that begins first: a token that has text before it is
 * released with that text only, tokens inside it are not. Its time grows with the text, not with the square of it.
 */
export function stopStrings<T extends { readonly text: string }>(strings: readonly string[]): StopStrings<T> {
  const finders = strings.map(finder);
  /** A token with text, after those without: they are the beginning of its first character, and go with it. */
  let held: { readonly tokens: readonly T[]; readonly text: string }[] = [];
  /** Tokens without text that no text has followed yet. */
  let textless: T[] = [];
  /** Characters in `held`. */
  let length = 0;
  const release = (until: number): T[] => {
    let at = 0;
    let count = 0;
    for (const { text } of held) {
      if (at + text.length > until) break;
      at += text.length;
      count++;
    }
    length -= at;
    return held.splice(0, count).flatMap(({ tokens }) => tokens);
  };
  return {
    push(token) {
      if (strings.length === 0) return { released: [token], ended: false };
      textless.push(token);
      if (token.text === "") return { released: [], ended: false };
      held.push({ tokens: textless, text: token.text });
      textless = [];
      const before = length;
      length += token.text.length;
      const found = finders.map(({ push }) => push(token.text)).filter((start) => start !== undefined);
      if (found.length === 0) {
        const open = finders.reduce((most, { open }) => Math.max(most, open()), 0);
        return { released: release(length - open), ended: false };
      }
      const end = before + Math.min(...found);
      const released: T[] = [];
      let at = 0;
      for (const one of held.flatMap(({ tokens }) => tokens)) {
        if (at >= end) break;
        released.push({ ...one, text: one.text.slice(0, end - at) });
        at += one.text.length;
      }
      held = [];
      return { released, ended: true };
    },
    flush() {
      const rest = [...held.flatMap(({ tokens }) => tokens), ...textless];
      [held, textless] = [[], []];
      return rest;
    },
  };
}

/** Looks for a string in a text that comes in pieces and never goes back in it (Knuth, Morris and Pratt). */
function finder(string: string) {
  /** Of its first i + 1 characters, how many at the end are also those at the beginning. */
  const borders = new Int32Array(string.length);
  let matched = 0;
  const step = (character: string | undefined): void => {
    while (matched > 0 && string[matched] !== character) matched = borders[matched - 1] as number;
    if (string[matched] === character) matched++;
  };
  for (let i = 1; i < string.length; i++) {
    step(string[i]);
    borders[i] = matched;
  }
  matched = 0;
  return {
    /** Where the string begins, counted from the beginning of this piece (below 0: in an earlier one), once it is complete. */
    push(piece: string): number | undefined {
      for (let i = 0; i < piece.length; i++) {
        step(piece[i]);
        if (matched === string.length) return i + 1 - string.length;
      }
      return undefined;
    },
    /** Characters at the end of the text that the string begins with. */
    open: (): number => matched,
  };
}
