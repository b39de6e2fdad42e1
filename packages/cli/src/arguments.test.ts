// Arguments of commands: what is taken, and that every refusal names the option.
import { describe, expect, test } from "vitest";
import { byteSize, count, exactly, readArguments, shownBytes, table, tokenIds } from "./arguments.ts";

const spec = {
  file: { type: "positional", description: "", required: true },
  name: { type: "string", description: "" },
  "two-words": { type: "string", description: "" },
  json: { type: "boolean", description: "" },
} as const;
const read = (...rest: string[]) => readArguments("try", spec, rest);

describe("readArguments", () => {
  test("gives what was given, in any order, and undefined for the rest", () => {
    const given = read("--two-words=7", "a", "--json", "--name", "-5", "b");
    expect(given.positionals).toEqual(["a", "b"]);
    expect([given.text("name"), given.whole("two-words", { from: 0 }), given.flag("json")]).toEqual(["-5", 7, true]);
    const nothing = read();
    expect([nothing.text("name"), nothing.flag("json"), nothing.texts("name"), nothing.ids("name")]).toEqual([
      ...[undefined, false, [], undefined],
    ]);
    expect(read("--", "--name").positionals).toEqual(["--name"]);
    expect(read("--name=--json").text("name")).toBe("--json");
    expect(read("--name", "--other").text("name")).toBe("--other");
  });
  test("reads numbers, choices, lists, ids and sizes", () => {
    expect(read("--name", "-1.5e-3").number("name", { from: -1 })).toBe(-0.0015);
    expect(read("--name", ".5").number("name", { from: 0, to: 1 })).toBe(0.5);
    expect(read("--name", "b").choice("name", ["a", "b"])).toBe("b");
    expect(read("--name", "a, b").list("name")).toEqual(["a", "b"]);
    expect(read("--name", "3, 1,2").ids("name")).toEqual([3, 1, 2]);
    expect(read("--name", "2.5MB").bytes("name")).toBe(2_500_000);
    expect(read("--name", "x", "--name", "y").texts("name")).toEqual(["x", "y"]);
  });
  test.each([
    [["--nome", "x"], /unknown option --nome; the options are --name, --two-words, --json/],
    [["--name"], /--name takes a value; see switchyard try --help/],
    [["--name="], /--name takes a value/],
    [["--json=no"], /--json takes no value/],
    [["--name", "--json"], /--name takes a value, found the option --json; .* written --name=--json/],
  ])("refuses %j", (rest, message) => {
    expect(() => read(...rest)).toThrow(message);
  });
  test.each<[string, (given: ReturnType<typeof read>) => unknown, RegExp]>([
    ["1.5", (given) => given.whole("name", { from: 1 }), /--name takes a whole number from 1, found "1\.5"/],
    ["0", (given) => given.whole("name", { from: 1 }), /found "0"/],
    ["9", (given) => given.whole("name", { from: 1, to: 8 }), /a whole number from 1 to 8/],
    ["NaN", (given) => given.number("name", { from: 0 }), /--name takes a number from 0, found "NaN"/],
    ["Infinity", (given) => given.number("name", { from: 0 }), /found "Infinity"/],
    ["c", (given) => given.choice("name", ["a", "b"]), /--name takes a, b, found "c"/],
    ["1,two", (given) => given.ids("name"), /--name takes token ids separated by commas, such as 1,2,3, found "two"/],
    [",", (given) => given.ids("name"), /found ",", where id number 1 is missing/],
    ["1,,2", (given) => given.ids("name"), /found "1,,2", where id number 2 is missing$/],
    [",1", (given) => given.ids("name"), /found ",1", where id number 1 is missing/],
    ["1,2,,", (given) => given.ids("name"), /found "1,2,,", where id number 3 is missing/],
    [
      `${Array.from({ length: 50 }, (_, i) => i).join()},,7`,
      (given) => given.ids("name"),
      /found "49,,", where id number 51/,
    ],
    ["4,5x", (given) => given.ids("name"), /found "5x" as id number 2/],
    ["9", (given) => given.whole("name", { from: 1, to: 8, why: "memory" }), /from 1 to 8 \(memory\), found "9"/],
    ["3 kg", (given) => given.bytes("name"), /--name takes a size such as 512MB, 3GB or 2GiB, found "3 kg"/],
  ])("refuses %s", (value, act, message) => {
    expect(() => act(read("--name", value))).toThrow(message);
  });
  test("refuses an option that is given twice where one counts", () => {
    expect(() => read("--name", "a", "--name", "b").text("name")).toThrow(/--name is given 2 times; once is enough/);
  });
});

test("exactly so many positional arguments", () => {
  expect(exactly(1, read("a"), "try takes one", "try x")).toEqual(["a"]);
  expect(() => exactly(1, read(), "try takes one file", "switchyard try x")).toThrow(
    "try takes one file, found none: switchyard try x",
  );
});

test.each([
  ["12", 12],
  ["1KB", 1000],
  ["1kib", 1024],
  ["2GiB", 2 ** 31],
  ["0.5 GB", 5e8],
])("byteSize(%s)", (text, bytes) => expect(byteSize("x", text)).toBe(bytes));

test.each([
  [0, "0 B"],
  [999, "999 B"],
  [1500, "1.50 kB"],
  [2.5e6, "2.50 MB"],
  [3e9, "3.00 GB"],
])("shownBytes(%d)", (bytes, text) => expect(shownBytes(bytes)).toBe(text));

test("ids of a file stand on lines too", () => {
  expect(tokenIds("ids.txt", "1,2\n3 4,\n")).toEqual([1, 2, 3, 4]);
  expect(tokenIds("ids.txt", "1, 2,\n3,\n")).toEqual([1, 2, 3]);
  expect(() => tokenIds("ids.txt", "")).toThrow(/ids\.txt takes token ids/);
});

test("one of something has no s", () => {
  expect([count(0, "token"), count(1, "token"), count(2, "token")]).toEqual(["0 tokens", "1 token", "2 tokens"]);
  expect([count(1, "entry", "entries"), count(2, "entry", "entries")]).toEqual(["1 entry", "2 entries"]);
});

test("columns", () => {
  expect(
    table([
      ["a", "bb"],
      ["ccc", "d"],
    ]),
  ).toBe("a    bb\nccc   d");
});
