import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { setTopLevel } from "./json-edit.ts";

describe("setTopLevel", () => {
  it.each([
    ['{"a": 1e-05, "b":"x"}', "b", '{"a": 1e-05, "b":"y"}'],
    ['{\n  "b": null,\n  "c": {"b": "x"}\n}\n', "b", '{\n  "b": "y",\n  "c": {"b": "x"}\n}\n'],
    ['{"c": {"b": "x"}, "d": ["b", "}"]}', "b", '{"c": {"b": "x"}, "d": ["b", "}"], "b": "y"}'],
    ['{\n  "a": 1,\n  "c": 2\n}', "b", '{\n  "a": 1,\n  "c": 2,\n  "b": "y"\n}'],
    ['{\n  "a": 1\n}', "b", '{\n  "a": 1,\n  "b": "y"\n}'],
    ["{}", "b", '{"b": "y"}'],
    [' { "a" : [1, {"x": "\\"}"}] , "b" : [ ] } ', "b", ' { "a" : [1, {"x": "\\"}"}] , "b" : "y" } '],
    ['{"\\u0062": true}', "b", '{"\\u0062": "y"}'],
  ])("%j, %s", (text, key, expected) => {
    expect(setTopLevel(text, key, "y")).toBe(expected);
    expect(JSON.parse(expected).b).toBe("y");
  });

  it("changes one key of any object, and nothing else", () => {
    fc.assert(
      fc.property(
        fc.dictionary(fc.string(), fc.jsonValue()),
        fc.string(),
        fc.constantFrom(undefined, 1, "\t"),
        (object, key, indent) => {
          fc.pre(key !== "__proto__" && !Object.hasOwn(object, "__proto__"));
          const found = JSON.parse(setTopLevel(JSON.stringify(object, null, indent), key, 5));
          expect(found).toEqual({ ...JSON.parse(JSON.stringify(object)), [key]: 5 });
        },
      ),
    );
  });

  it.each(["[]", '"x"', ""])("refuses %j", (text) => {
    expect(() => setTopLevel(text, "a", 1)).toThrow(/a JSON object was expected/);
  });
});
