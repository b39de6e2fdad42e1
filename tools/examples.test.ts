// Runs every marked example of every README against the built packages, and checks its types against their declarations.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { root } from "./child.mjs";
import { type Example, examples, markers } from "./examples.ts";
import { readPackages } from "./workspace.ts";

// Beside node_modules, so that the examples find the packages by name; the folder is ignored by git.
const folder = join(root, ".turbo", "examples");
/** A command, whose README shows command lines; its own tests run them. */
const withoutExample = ["@switchyard/cli"];

const readmes = [
  { name: "switchyard", path: join(root, "README.md") },
  ...readPackages()
    .filter(({ manifest }) => !manifest.private && !withoutExample.includes(manifest.name))
    .map((one) => ({ name: one.manifest.name, path: join(root, one.folder, "README.md") })),
].map(({ name, path }) => {
  const text = existsSync(path) ? readFileSync(path, "utf8") : "";
  return { name, text, found: examples(text) };
});

const fileName = (name: string, { kind }: Example, i: number): string =>
  `${name.replace("@switchyard/", "")}-${i + 1}${kind === "test" ? ".test" : ""}.ts`;

beforeAll(() => {
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  for (const { name, found } of readmes) {
    for (const [i, example] of found.entries()) writeFileSync(join(folder, fileName(name, example, i)), example.code);
  }
  const options = { noUnusedLocals: false, noUnusedParameters: false };
  writeFileSync(
    join(folder, "tsconfig.json"),
    JSON.stringify({ extends: "../../tools/tsconfig/base.json", compilerOptions: options, include: ["*.ts"] }),
  );
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Runs a program of node_modules, or the example itself, on the Node of this test; answers its output. */
function node(args: readonly string[], cwd: string): string {
  const { status, stdout, stderr } = spawnSync(process.execPath, [...args], { cwd, encoding: "utf8" });
  expect(status, `${stdout}${stderr}`).toBe(0);
  return stdout;
}

describe.each(readmes)("README of $name", ({ name, text, found }) => {
  test("has an example, and a block after each marker", () => {
    expect(found.length, "no <!-- example --> marker with a ```ts block").toBeGreaterThan(0);
    expect(found.length).toBe(markers(text));
  });

  test.each(found.map((example, i) => [i + 1, example] as const))("example %i runs", (number, example) => {
    const file = join(folder, fileName(name, example, number - 1));
    if (example.kind === "test") {
      const output = node([join(root, "node_modules", "vitest", "vitest.mjs"), "run", "--root", folder, file], folder);
      expect(output).toMatch(/Tests .*passed/);
      return;
    }
    const empty = mkdtempSync(join(tmpdir(), "switchyard-example-"));
    try {
      expect(node([file], empty).trim(), "an example prints something").not.toBe("");
    } finally {
      rmSync(empty, { recursive: true });
    }
  });
});

test("all examples have the right types", () => {
  expect(readmes.flatMap(({ found }) => found).length).toBeGreaterThan(0);
  node([join(root, "node_modules", "typescript", "bin", "tsc"), "-p", folder], folder);
});

describe("examples", () => {
  const block = "```ts\nconsole.log(1);\n```\n";
  test("takes marked blocks only", () => {
    const text = `# A\n\n${block}\n<!-- example -->\n${block}\n<!-- example: test -->\n\n${block}\n<!-- example -->\ntext\n${block}`;
    const code = "console.log(1);\n";
    expect(examples(text)).toEqual([
      { kind: "program", code },
      { kind: "test", code },
    ]);
    expect(markers(text)).toBe(3);
  });
});
