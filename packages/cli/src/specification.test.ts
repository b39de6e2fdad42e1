// How a specification is taken apart: names, packages, files of every system, options and wrappers.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { UnsupportedError } from "@switchyard/core";
import { afterAll, describe, expect, test } from "vitest";
import { parseSpecification } from "./specification.ts";

const folder = mkdtempSync(join(tmpdir(), "switchyard-specification-"));
afterAll(() => rmSync(folder, { recursive: true }));
const parse = (text: string): ReturnType<typeof parseSpecification> => parseSpecification(text, folder);

test.each([
  ["topK", "topK", []],
  [" topK:k=1 ", "topK", [["k", 1]]],
  [
    "topK:order=topk-softmax:bias=true:balance=1e-3",
    "topK",
    [
      ["order", "topk-softmax"],
      ["bias", true],
      ["balance", 0.001],
    ],
  ],
  ["some-package", "some-package", []],
  ["@scope/some-package/router:k=2", "@scope/some-package/router", [["k", 2]]],
  ["decimal.js:k=2", "decimal.js", [["k", 2]]],
])("%s is a name", (text, head, options) => {
  expect(parse(text)).toEqual({
    head,
    isFile: false,
    options,
    wrappers: [],
    label: text.trim(),
    portable: text.trim(),
  });
});

describe("files", () => {
  test.each(["./my-router.ts", "../x/my-router.mjs", "/abs/my-router.js", "./a.b/my+router.mts", ".\\my-router.ts"])(
    "%s",
    (file) => {
      for (const options of ["", ":k=2", ":k=2+capacity:factor=2"]) {
        const parsed = parse(file + options);
        const absolute = resolve(folder, file);
        expect(parsed).toMatchObject({ head: absolute, isFile: true, portable: absolute + options });
        expect(parsed.label).toBe(basename(absolute) + options);
        expect(parsed.options).toEqual(options === "" ? [] : [["k", 2]]);
        expect(parsed.wrappers).toEqual(options.includes("+") ? [{ name: "capacity", options: [["factor", 2]] }] : []);
        // A resumed run reads the portable form, in whatever folder.
        expect(parseSpecification(parsed.portable, tmpdir())).toEqual({ ...parsed, portable: parsed.portable });
      }
    },
  );
  test.each(["C:\\routers\\my-router.ts", "d:/routers/my-router.js"])(
    "%s: the colon of the drive begins no option",
    (file) => {
      const parsed = parse(`${file}:k=2+jitter`);
      expect(parsed.isFile).toBe(true);
      expect(parsed.head.endsWith(file)).toBe(true);
      expect([parsed.options, parsed.wrappers]).toEqual([[["k", 2]], [{ name: "jitter", options: [] }]]);
    },
  );
  test("an address", () => {
    const file = join(folder, "my router.ts");
    expect(parse(`${pathToFileURL(file).href}:k=3`)).toMatchObject({ head: file, isFile: true, options: [["k", 3]] });
  });
  test("a name like that of a file is a file where there is one", () => {
    expect(parse("plain.ts:k=2").isFile).toBe(false);
    writeFileSync(join(folder, "plain.ts"), "");
    expect(parse("plain.ts:k=2")).toMatchObject({ isFile: true, head: join(folder, "plain.ts"), options: [["k", 2]] });
  });
});

test.each([
  ["./my-router", "give the file with its ending: .ts, .mts, .js or .mjs"],
  ["C:\\my-router:k=2", "give the file with its ending"],
  ["./my-router.ts:k", '"k" is not option=value; write for example topK:k=2'],
  ["topK:=2", '"=2" is not option=value'],
  ["topK+capacity:2", '"2" is not option=value'],
])("%s is refused", (text, message) => {
  expect(() => parse(text)).toThrow(UnsupportedError);
  expect(() => parse(text)).toThrow(`router "${text}": ${message}`);
});
