// The dry run of a release shows every package with its next version and ranges, and leaves the repository as it is.
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { expect, test } from "vitest";
import { root } from "./child.mjs";
import { readPackages } from "./workspace.ts";

test("npm run release -- --dry-run packs every package and changes nothing", () => {
  const before = readPackages().map(({ manifest }) => manifest);
  const { status, stdout, stderr } = spawnSync(process.execPath, [join(root, "tools", "release.ts"), "--dry-run"], {
    encoding: "utf8",
  });
  expect(status, stderr).toBe(0);
  const published = before.filter((manifest) => !manifest.private);
  for (const { name } of published)
    expect(stdout).toMatch(new RegExp(`^${name} +\\d+\\.\\d+\\.\\d+ -> \\d+\\.\\d+\\.\\d+ `, "m"));
  expect(stdout).toContain(`${published.length} packages packed`);
  const version = (name: string): string =>
    stdout.match(new RegExp(`^@switchyard/${name} .*? -> (\\S+)`, "m"))?.[1] ?? "";
  expect(stdout).toMatch(new RegExp(`^@switchyard/routers .*needs core \\^${version("core")}$`, "m"));
  expect(readPackages().map(({ manifest }) => manifest)).toEqual(before);
});
