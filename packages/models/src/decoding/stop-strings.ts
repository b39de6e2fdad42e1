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
 * released with that text only, tokens inside it are not.
 */
export function stopStrings<T extends { readonly text: string }>(strings: readonly string[]): StopStrings<T> {
  let held: T[] = [];
  const release = (until: number): T[] => {
    const released: T[] = [];
    let at = 0;
    for (const token of held) {
      if (at + token.text.length > until) break;
      at += token.text.length;
      released.push(token);
    }
    // Tokens without text at the end are the beginning of a character that may belong to a stop string.
    while (strings.length > 0 && released.at(-1)?.text === "") released.pop();
    held = held.slice(released.length);
    return released;
  };
  return {
    push(token) {
      held.push(token);
      const text = held.map((one) => one.text).join("");
      const found = strings.map((string) => text.indexOf(string)).filter((at) => at >= 0);
      if (found.length === 0) {
        const open = Math.max(0, ...strings.map((string) => opening(text, string)));
        return { released: release(text.length - open), ended: false };
      }
      const end = Math.min(...found);
      const released: T[] = [];
      let at = 0;
      for (const one of held) {
        if (at >= end) break;
        released.push({ ...one, text: one.text.slice(0, end - at) });
        at += one.text.length;
      }
      held = [];
      return { released, ended: true };
    },
    flush() {
      const rest = held;
      held = [];
      return rest;
    },
  };
}

/** Length of the longest end of `text` that `string` begins with. */
function opening(text: string, string: string): number {
  for (let length = Math.min(string.length - 1, text.length); length > 0; length--) {
    if (string.startsWith(text.slice(text.length - length))) return length;
  }
  return 0;
}
