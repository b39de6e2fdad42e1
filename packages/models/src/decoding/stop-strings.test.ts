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
