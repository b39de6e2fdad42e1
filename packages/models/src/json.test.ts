// Untrusted JSON: what is accepted is what JSON.parse gives, and every refusal has its name.
import { CheckpointError } from "@switchyard/core";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type JsonLimits, parseUntrusted } from "./json.ts";

const nested = (depth: number, inner = ""): string => `${"[".repeat(depth)}${inner}${"]".repeat(depth)}`;

describe("parseUntrusted", () => {
  it("gives what JSON.parse gives, for any value without __proto__", () => {
    fc.assert(
      fc.property(fc.jsonValue({ maxDepth: 8 }), fc.integer({ min: 0, max: 3 }), (value, indent) => {
        const text = JSON.stringify(value, null, indent);
        fc.pre(!text.includes("__proto__"));
        expect(parseUntrusted(text, "x")).toEqual(JSON.parse(text));
      }),
      { seed: 1 },
    );
  });

  it("gives a value or throws CheckpointError, for any text", () => {
    const piece = fc.constantFrom(
      "{",
      "}",
      "[",
      "]",
      ",",
      ":",
      '"',
      "\\",
      '"a"',
      "1e999",
      "-",
      "null",
      " ",
      "\u0000",
      "é",
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 60 }), (pieces) => {
        const text = pieces.join("");
        try {
          expect(parseUntrusted(text, "x")).toEqual(JSON.parse(text));
        } catch (error) {
          expect(CheckpointError.isInstance(error)).toBe(true);
        }
      }),
      { seed: 2, numRuns: 2000 },
    );
  });

  it("takes equal texts that are no keys of one object", () => {
    const text = '{"a":{"a":["a","a",{"a":"a:"}]},"b":"a","c\\"":1,"c":":"}';
    expect(parseUntrusted(text, "x")).toEqual(JSON.parse(text));
    expect(parseUntrusted(nested(64), "x")).toEqual(JSON.parse(nested(64)));
  });

  it("knows the end of a text: brackets and keys inside it are no brackets and keys", () => {
    const inside = JSON.stringify([`"${"[".repeat(100)}`, '","a":1,"a":2,"__proto__":3', "\\", '\\"']);
    expect(parseUntrusted(inside, "x")).toEqual(JSON.parse(inside));
    expect(() => parseUntrusted('{"\\\\\\"":"\\"","b":"\\\\","b":3}', "x")).toThrow(/key "b" twice/);
  });

  it("keeps __proto__ as a plain key where it is asked to", () => {
    const parsed = parseUntrusted('{"__proto__":{"x":1}}', "x", { anyKey: true });
    expect(Object.entries(parsed as object)).toEqual([["__proto__", { x: 1 }]]);
  });

  const cases: [what: string, text: string, message: RegExp, limits?: JsonLimits][] = [
    ["a key twice", '{"a":1,"b":2,"a":3}', /x has the key "a" twice in one object/],
    ["a key twice, spelled differently", '{"a":1,"\\u0061":3}', /key "a" twice/],
    ["a key twice, deep inside", '[{"x":{"b":[],"b":{}}}]', /key "b" twice/],
    ["a key twice after spaces", '{"a" \n:1,"a"\t:3}', /key "a" twice/],
    ["__proto__", '{"a":{"__proto__":1}}', /x has the key "__proto__", not allowed/],
    ["__proto__ with escapes", '{"__prot\\u006f__":1}', /key "__proto__"/],
    ["65 levels", nested(65), /nests more than 64/],
    ["levels of objects", '{"a":'.repeat(65), /nests more than 64/],
    ["a million levels", "[".repeat(1_000_000), /nests more than 64/],
    ["more values than allowed", "[1,2,3,4]", /holds more than 3 values/, { values: 3 }],
    ["more empty lists than allowed", nested(4), /holds more than 3 values/, { values: 3 }],
    ["text that is no JSON", "{'a':1}", /x is not valid JSON/],
    ["a text without an end", '{"a', /not valid JSON/],
    ["a text that ends in a backslash", '{"a\\"', /not valid JSON/],
    ["a wrong escape in a key", '{"\\x":1}', /not valid JSON/],
  ];
  it.each(cases)("refuses %s", (_, text, message, limits) => {
    expect(() => parseUntrusted(text, "x", limits)).toThrow(message);
    expect(() => parseUntrusted(text, "x", limits)).toThrow(CheckpointError);
  });

  it("takes time in proportion to the text, whatever quotes and backslashes it has", () => {
    const text = `["${'\\"'.repeat(500_000)}","${"\\\\".repeat(500_000)}"]`;
    expect(parseUntrusted(text, "x")).toHaveLength(2);
  });
});
