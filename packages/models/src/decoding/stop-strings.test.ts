// Stop strings over token boundaries: what is released, what is cut, what is held back.
import { expect, it } from "vitest";
import { stopStrings } from "./stop-strings.ts";

/** Released texts after each token, and what is left at the end. */
function through(strings: readonly string[], texts: readonly string[]) {
  const stops = stopStrings<{ readonly text: string }>(strings);
  const steps: string[] = [];
  for (const text of texts) {
    const { released, ended } = stops.push({ text });
    steps.push(released.map((one) => one.text).join("|"));
    if (ended) return { steps, ended };
  }
  return { steps, ended: false, rest: stops.flush().map((one) => one.text) };
}

it("releases at once what no stop string begins with", () => {
  expect(through([], ["a", "", "b"])).toEqual({ steps: ["a", "", "b"], ended: false, rest: [] });
  expect(through(["xyz"], ["a", "xa", "b"])).toEqual({ steps: ["a", "xa", "b"], ended: false, rest: [] });
});

it("ends before a string, in one token or over several, and keeps the text before it", () => {
  expect(through(["\n\n"], ["a\n", "\nb"])).toEqual({ steps: ["", "a"], ended: true });
  expect(through(["END"], ["go", "E", "N", "D."])).toEqual({ steps: ["go", "", "", ""], ended: true });
  expect(through(["END"], ["xENDy"])).toEqual({ steps: ["x"], ended: true });
  expect(through(["END"], ["END"])).toEqual({ steps: [""], ended: true });
});

it("lets go what turns out not to be one, and holds on to what still may", () => {
  expect(through(["abc"], ["a", "b", "d"])).toEqual({ steps: ["", "", "a|b|d"], ended: false, rest: [] });
  expect(through(["aab"], ["a", "a", "a", "b"])).toEqual({ steps: ["", "", "a", ""], ended: true });
  expect(through(["abc"], ["xa", "b"])).toEqual({ steps: ["", ""], ended: false, rest: ["xa", "b"] });
});

it("takes the string that is complete first, of several the one that begins first", () => {
  expect(through(["bcd", "c"], ["ab", "c", "d"])).toEqual({ steps: ["", "ab"], ended: true });
  expect(through(["cd", "bcde"], ["a", "bcde"])).toEqual({ steps: ["a", ""], ended: true });
});

it("drops tokens without text that belong to the stop string only", () => {
  // The first bytes of a character have no text yet.
  const count = (texts: readonly string[]) => {
    const stops = stopStrings<{ readonly text: string }>(["é!"]);
    return texts.map((text) => stops.push({ text }).released.length);
  };
  expect(count(["a", "", "é", "!"])).toEqual([1, 0, 0, 0]);
  expect(count(["a", "", "é", "?"])).toEqual([1, 0, 0, 3]);
  expect(count(["a", "", "", "x"])).toEqual([1, 0, 0, 3]);
});

it("finds what a search in the whole text finds, wherever tokens end", () => {
  let state = 7;
  const next = (n: number): number => {
    state = (state * 48_271) % 2_147_483_647;
    return state % n;
  };
  const word = (length: number): string => Array.from({ length }, () => "ab"[next(2)]).join("");
  let ends = 0;
  for (let trial = 0; trial < 2000; trial++) {
    const strings = Array.from({ length: 1 + next(3) }, () => word(1 + next(6)));
    const texts = Array.from({ length: 1 + next(12) }, () => word(next(4)));
    // The first token with which some string is complete, and of those the first place.
    let whole = "";
    let expected: string | undefined;
    for (const text of texts) {
      whole += text;
      const places = strings.map((string) => whole.indexOf(string)).filter((at) => at >= 0);
      if (places.length === 0) continue;
      expected = whole.slice(0, Math.min(...places));
      break;
    }
    const { steps, ended, rest = [] } = through(strings, texts);
    const released = steps.join("").replaceAll("|", "");
    if (expected === undefined) expect([ended, released + rest.join("")]).toEqual([false, texts.join("")]);
    else expect([ended, released]).toEqual([true, expected]);
    ends += ended ? 1 : 0;
    // What is held back may be the beginning of a string.
    if (!ended && rest.join("") !== "") {
      const held = rest.join("");
      expect(strings.some((string) => [...held].some((_, i) => string.startsWith(held.slice(i))))).toBe(true);
    }
  }
  expect(ends).toBeGreaterThan(500);
});

it("takes time that grows with the text: tokens without text, and text that nearly ends it", () => {
  const stops = stopStrings<{ readonly text: string }>([`${"a".repeat(50_000)}b`]);
  let released = 0;
  for (let i = 0; i < 200_000; i++) released += stops.push({ text: "" }).released.length;
  for (let i = 0; i < 40_000; i++) released += stops.push({ text: "a" }).released.length;
  expect(released).toBe(0);
  // The square of it would be ten thousand million steps.
  expect(stops.push({ text: "c" }).released).toHaveLength(240_001);
}, 20_000);
