// What users get: core, routers and kernels packed as for npm, installed into an empty folder, running the README's example.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { root } from "./child.mjs";
import { examples } from "./examples.ts";
import { npm, type Packed, pack } from "./pack.ts";

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
    expect(readdirSync(join(installed, "dist")).length).toBeGreaterThan(1);
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

test("the example of the README runs", () => {
  const [example] = examples(readFileSync(join(root, "README.md"), "utf8"));
  expect(example).toBeDefined();
  writeFileSync(join(folder, "example.ts"), example!.code);
  const { status, stdout, stderr } = spawnSync(process.execPath, ["example.ts"], { cwd: folder, encoding: "utf8" });
  expect(status, stderr).toBe(0);
  expect(stdout.trim()).not.toBe("");
});
