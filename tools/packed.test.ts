// What users get: core, routers and kernels packed as for npm, installed into an empty folder, running the README's example.
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { root } from "./child.mjs";
import { examples } from "./examples.ts";
import { npm, type Packed, pack } from "./pack.ts";
import type { Manifest } from "./workspace.ts";

const names = ["core", "routers", "kernels"];
let folder: string;
let packed: Packed[];

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "switchyard-packed-"));
  packed = names.map((name) => pack(join(root, "packages", name), folder));
  writeFileSync(join(folder, "package.json"), JSON.stringify({ name: "user", private: true, type: "module" }));
  // Offline: the three packages must bring all they need.
  npm(
    ["install", "--offline", "--ignore-scripts", "--no-audit", "--no-fund", ...packed.map(({ tarball }) => tarball)],
    folder,
  );
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

test("the tarballs hold the build, the manifest, the licence and the README, and no sources", () => {
  for (const name of names) {
    const installed = join(folder, "node_modules", "@switchyard", name);
    expect(readdirSync(installed).sort()).toEqual(
      expect.arrayContaining(["LICENSE", "README.md", "dist", "package.json"]),
    );
    expect(readdirSync(installed)).not.toContain("src");
    const { exports = {} }: Manifest = JSON.parse(readFileSync(join(installed, "package.json"), "utf8"));
    const promised = Object.values(exports).flatMap((target) =>
      typeof target === "string" ? target : Object.values(target),
    );
    expect(promised.length).toBeGreaterThan(2);
    expect(promised.filter((file) => !existsSync(join(installed, file)))).toEqual([]);
  }
});

test("nothing else is installed, and core only once", () => {
  const installed = readdirSync(join(folder, "node_modules")).filter((name) => !name.startsWith("."));
  expect(installed).toEqual(["@switchyard"]);
  expect(readdirSync(join(folder, "node_modules", "@switchyard")).sort()).toEqual([...names].sort());
  for (const name of names) {
    expect(readdirSync(join(folder, "node_modules", "@switchyard", name))).not.toContain("node_modules");
  }
});

test("declarations take the types of core from core", () => {
  for (const name of ["routers", "kernels"]) {
    const dist = join(folder, "node_modules", "@switchyard", name, "dist");
    const files = readdirSync(dist, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".d.ts"));
    const text = files.map((file) => readFileSync(join(dist, file), "utf8")).join("\n");
    expect(text).toMatch(/from ["']@switchyard\/core["'/]/);
    expect(text).not.toMatch(/interface (Tensor|Engine|Backend|RouterPlugin)\b/);
  }
});

describe("the example of the README", () => {
  const [example] = examples(readFileSync(join(root, "README.md"), "utf8"));
  beforeAll(() => writeFileSync(join(folder, "example.ts"), example?.code ?? ""));

  test("runs", () => {
    expect(example?.kind).toBe("program");
    expect(node(["example.ts"]).trim()).not.toBe("");
  });

  test("has the right types, strictly and with those of the packages checked", () => {
    const options = [
      "--strict",
      "--exactOptionalPropertyTypes",
      "--noEmit",
      "--target",
      "es2023",
      "--module",
      "nodenext",
    ];
    // Without @types/node: declarations must not need more than a browser has.
    const surroundings = ["--lib", "es2023,dom,esnext.disposable", "--skipLibCheck", "false"];
    node([join(root, "node_modules", "typescript", "bin", "tsc"), ...options, ...surroundings, "example.ts"]);
  });
});

/** Runs a program in the folder, on the Node of this test; answers its output. */
function node(args: readonly string[]): string {
  const { status, stdout, stderr } = spawnSync(process.execPath, [...args], { cwd: folder, encoding: "utf8" });
  expect(status, `${stdout}${stderr}`).toBe(0);
  return stdout;
}
