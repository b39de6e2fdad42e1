// npm run vectors: the fixtures of the routers and of the models pass on both backends, and every way a folder, a file or a number can be
// wrong is told apart, counted and named.
import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { root } from "./child.mjs";
import { checkFolder, families, float32, float64 } from "./vectors.ts";

const fixtures = join(root, "packages", "routers", "test", "fixtures");
const topk = readFileSync(join(fixtures, "topk.json"), "utf8");
const home = mkdtempSync(join(tmpdir(), "switchyard-vectors-"));
afterAll(() => rmSync(home, { recursive: true }));

let folders = 0;
/** A folder with these files, by name. */
function folder(files: Readonly<Record<string, string>>): string {
  const path = join(home, `${folders++}`);
  mkdirSync(path);
  for (const [name, text] of Object.entries(files)) writeFileSync(join(path, name), text);
  return path;
}

/** What the tool says about a folder, and its sums. */
async function checked(path: string, settings = [float64]) {
  const lines: string[] = [];
  const total = await checkFolder(path, { settings, families, say: (line) => lines.push(line) });
  return { ...total, lines };
}

/** The top-k vectors with one number of the first case's `expected` changed. */
function changed(name: string, change: (value: number) => number): string {
  const file = JSON.parse(topk);
  let place = file.cases[0].expected;
  let key: string | number = name;
  while (Array.isArray(place[key])) {
    place = place[key];
    key = 0;
  }
  place[key] = change(place[key]);
  return JSON.stringify(file);
}

test("the routers' own vectors pass in float64 and in float32 on wasm", async () => {
  const { passed, failed, lines } = await checked(fixtures, [float64, await float32()]);
  expect(lines.filter((line) => line.startsWith("  "))).toEqual([]);
  expect(lines).toContain("topk.json 3/3");
  expect([failed, passed > 30]).toEqual([0, true]);
  expect(lines.at(-1)).toBe(`${passed} passed, 0 failed`);
});

test("the vectors of self-contrast decoding pass on both too, and a wrong number in any of them is found", async () => {
  const text = readFileSync(join(root, "packages", "models", "test", "fixtures", "main-scmoe.json"), "utf8");
  const own = await checked(folder({ "main-scmoe.json": text }), [float64, await float32()]);
  expect(own.lines).toEqual(["main-scmoe.json 6/6", "6 passed, 0 failed"]);
  const file = JSON.parse(text);
  for (const { expected } of file.cases) {
    const name =
      Object.keys(expected).find((one) => typeof expected[one] === "number") ?? Object.keys(expected)[0] ?? "";
    const shifted = (_: string, value: unknown): unknown => (typeof value === "number" ? value + 1e-3 : value);
    expected[name] = JSON.parse(JSON.stringify(expected[name]), shifted);
  }
  const { lines } = await checked(folder({ "main-scmoe.json": JSON.stringify(file) }));
  expect(lines[0]).toBe("main-scmoe.json 0/6");
});

test("the vectors of codes in words pass to the last bit, and one bit more or less in any of them is found", async () => {
  const text = readFileSync(join(root, "packages", "models", "test", "fixtures", "prune-pack.json"), "utf8");
  const own = await checked(folder({ "prune-pack.json": text }), [float64, await float32()]);
  expect(own.lines).toEqual(["prune-pack.json 9/9", "9 passed, 0 failed"]);
  for (const where of ["inputs", "expected"]) {
    const file = JSON.parse(text);
    for (const one of file.cases) {
      const name = Object.keys(one[where]).find((key) => Array.isArray(one[where][key]));
      const list = one[where][name ?? ""].at(-1);
      list[list.length - 1] ^= 1;
    }
    const { lines } = await checked(folder({ "prune-pack.json": JSON.stringify(file) }));
    expect(lines[0]).toBe("prune-pack.json 0/9");
  }
});

describe("a folder", () => {
  test("is run in alphabetical order; lists are skipped and named, later packages are not counted", async () => {
    const { lines, passed, failed } = await checked(
      folder({
        "routers-topk.json": topk,
        "routers-index.json": '{"schema":"x","files":[]}',
        "prune-quant.json": '{"meta":{},"cases":[{}]}',
        "prune-merge.json": "not even JSON",
        "README.md": "no vectors",
      }),
    );
    expect(lines).toEqual([
      "prune-merge.json not yet",
      "prune-quant.json not yet",
      "routers-index.json skipped: it has no cases",
      "routers-topk.json 3/3",
      "3 passed, 0 failed",
    ]);
    expect([passed, failed]).toEqual([3, 0]);
  });

  test("that is missing, empty or a file is refused in words", async () => {
    const file = join(folder({ "a.json": "{}" }), "a.json");
    await expect(checked(join(home, "nowhere"))).rejects.toThrow(/^there is no folder .*nowhere$/);
    await expect(checked(file)).rejects.toThrow(/a\.json is a file; name the folder that it lies in$/);
    await expect(checked(folder({}))).rejects.toThrow("has no .json file; vectors are files such as");
    await expect(checked(folder({ "notes.txt": "" }))).rejects.toThrow("has no .json file");
  });
});

describe("a file", () => {
  test.each([
    ["broken JSON", '{"cases": [', /^ {2}it is not JSON: /],
    ["cases that are no list", '{"family":"topk","cases":{}}', /"cases" are not a list/],
    ["no family", '{"cases":[{}]}', /neither a "family" nor a "paper" nor a "meta"/],
    ["no tolerance", '{"family":"topk","cases":[{}]}', /its tolerance is undefined/],
    ["a suite without tolerances", '{"meta":{"suite":"pack"},"cases":[{}]}', /its tolerance is \{\}/],
    ["half a tolerance", '{"family":"topk","tolerance":{"abs":0},"cases":[{}]}', /its tolerance is \{"abs":0\}/],
    ["a case that is no record", '{"family":"topk","tolerance":{"abs":0,"rel":0},"cases":[3]}', /case 0 is 3/],
  ])("with %s is one failure; the others still run", async (_, text, message) => {
    const { lines } = await checked(folder({ "a.json": text, "topk.json": topk }));
    expect(lines[0]).toBe("a.json 0/1");
    expect(lines[1]).toMatch(message);
    expect(lines.slice(2)).toEqual(["topk.json 3/3", "3 passed, 1 failed"]);
  });

  test("of an unknown family fails with all its cases, also where the name is that of a method of records", async () => {
    for (const family of ["nothing", "toString"]) {
      const { lines } = await checked(folder({ "a.json": topk.replace('"topk"', `"${family}"`) }));
      expect(lines).toEqual([
        "a.json 0/3",
        `  nothing runs the family "${family}"; families lie in packages/{routers,models}/test/families`,
        "0 passed, 3 failed",
      ]);
    }
  });
});

describe("a case", () => {
  const id = (JSON.parse(topk) as { cases: { id: string }[] }).cases[0]?.id ?? "";

  test("with a wrong number fails, by name and by how much, the worst entry first", async () => {
    const text = changed("weights_renormalised", (x) => x + 1e-6);
    const { lines, passed, failed } = await checked(folder({ "topk.json": text }));
    expect(lines[0]).toBe("topk.json 2/3");
    expect(lines[1]).toMatch(
      new RegExp(`^ {2}${id} \\(float64\\) weights_renormalised: entry 0 is 0\\.\\d+, expected `),
    );
    expect(lines[1]).toMatch(/: off by 1\.00e-6, allowed \d\.\d\de-\d/);
    expect([lines.length, passed, failed]).toEqual([3, 2, 1]);
  });

  test("fails where only float32 is off too far, and passes within 1e-5 of the largest magnitude", async () => {
    const both = [float64, await float32()];
    // Within the file's tolerance, which is made wide here, and beyond that of float32; then within both.
    const wide = (text: string): string => JSON.stringify({ ...JSON.parse(text), tolerance: { abs: 1, rel: 0 } });
    const beyond = await checked(folder({ "topk.json": wide(changed("softmax", (x) => x + 2e-5)) }), both);
    expect(beyond.lines[0]).toBe("topk.json 2/3");
    expect(beyond.lines[1]).toMatch(`${id} (float32 on wasm) softmax: entry 0 is`);
    expect(beyond.lines.length).toBe(3);
    const inside = await checked(folder({ "topk.json": wide(changed("softmax", (x) => x + 1e-6)) }), both);
    expect(inside.lines).toEqual(["topk.json 3/3", "3 passed, 0 failed"]);
  });

  test("fails for another shape, a name that nothing computes, no number and no expectation", async () => {
    const one = (change: (first: { expected: Record<string, unknown>; inputs: Record<string, unknown> }) => void) => {
      const file = JSON.parse(topk);
      change(file.cases[0]);
      return checked(folder({ "topk.json": JSON.stringify(file) }));
    };
    const line = async (...given: Parameters<typeof one>): Promise<string> => (await one(...given)).lines[1] ?? "";
    expect(await line(({ expected }) => (expected.indices as unknown[]).pop())).toMatch(
      /indices: shape \[\d+,\d+\] with/,
    );
    expect(await line(({ expected }) => void Object.assign(expected, { surprise: [1] }))).toMatch(
      "surprise: nothing was computed under this name",
    );
    expect(await line(({ expected }) => void Object.assign(expected, { top_p_count: ["NaN"] }))).toMatch("shape [");
    expect(await line((first) => void Object.assign(first, { expected: {} }))).toMatch("expects nothing");
    expect(await line(({ inputs }) => void delete inputs.logits)).toMatch('cannot be run: the case has no "logits"');
  });

  test("with a number that is none is the worst of its array", async () => {
    const text = changed("softmax", () => Number.NaN).replace("null", '"NaN"');
    const { lines } = await checked(folder({ "topk.json": text }));
    expect(lines[1]).toMatch(/softmax: entry 0 is 0\.\d+, expected NaN: off by NaN/);
    const infinite = changed("softmax", () => Number.POSITIVE_INFINITY).replace("null", '"Infinity"');
    expect((await checked(folder({ "topk.json": infinite }))).lines[1]).toMatch("off by Infinity");
  });
});

describe("as a program", () => {
  const run = (...args: string[]) => {
    const { INIT_CWD: _, ...env } = process.env;
    const program = [join(root, "tools", "vectors.ts"), ...args];
    const { status, stdout, stderr } = spawnSync(process.execPath, program, { encoding: "utf8", cwd: home, env });
    return { status, stdout, stderr };
  };

  test("it exits with 0 where all pass and with 1 otherwise", () => {
    const good = join(home, "good");
    mkdirSync(good);
    cpSync(join(fixtures, "topk.json"), join(good, "routers-topk.json"));
    expect(run("good")).toMatchObject({ status: 0, stdout: "routers-topk.json 3/3\n3 passed, 0 failed\n" });
    const bad = run(folder({ "topk.json": changed("softmax", (x) => x + 1) }));
    expect(bad).toMatchObject({ status: 1, stderr: "" });
    expect(bad.stdout).toMatch(/^topk\.json 2\/3\n(.*\n){2}2 passed, 1 failed\n$/);
  });

  test("it says in one line what it needs", () => {
    expect(run()).toMatchObject({
      status: 1,
      stderr: "vectors: one folder is needed, found 0: npm run vectors -- DIR\n",
    });
    expect(run("a", "b").stderr).toMatch("found 2");
    expect(run("nowhere")).toMatchObject({ status: 1, stdout: "" });
    expect(run("nowhere").stderr).toMatch(/^vectors: there is no folder .*nowhere\n$/);
  });
});
