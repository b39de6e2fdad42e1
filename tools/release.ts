// npm run release: the two steps of a release, by changesets. With --dry-run it shows the coming versions and packs every
// package with them in a temporary folder, and changes nothing here.
//
//   1st run, while .changeset/ holds changesets: writes versions, ranges, changelogs and the lock file, for review and commit.
//   2nd run, when none is left: publishes every version that the registry does not have, and tags it.
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";
import { root } from "./child.mjs";
import { npm, pack } from "./pack.ts";
import { type Manifest, readPackages } from "./workspace.ts";

const { values } = parseArgs({ options: { "dry-run": { type: "boolean", default: false } } });
if (values["dry-run"]) dryRun();
else if (pendingChangesets().length > 0) version();
else changeset(["publish"], root);

function pendingChangesets(): string[] {
  return readdirSync(join(root, ".changeset")).filter((name) => name.endsWith(".md") && name !== "README.md");
}

function version(): void {
  changeset(["version"], root);
  npm(["install", "--package-lock-only", "--ignore-scripts"], root);
  console.log("Versions and changelogs are written. Review and commit them, then run this again to publish.");
}

/** Versions a copy of the repository and packs it. */
function dryRun(): void {
  const copy = mkdtempSync(join(tmpdir(), "switchyard-release-"));
  try {
    const kept = (path: string): boolean =>
      !["node_modules", ".git", ".turbo", "src", "test", "runs"].includes(basename(path));
    for (const name of ["package.json", "package-lock.json", ".changeset", "packages", "apps"]) {
      cpSync(join(root, name), join(copy, name), { recursive: true, filter: kept });
    }
    const published = readPackages().filter(({ manifest }) => !manifest.private);
    // Changelog entries name commits, and the copy has none.
    const config = join(copy, ".changeset", "config.json");
    writeFileSync(config, JSON.stringify({ ...JSON.parse(readFileSync(config, "utf8")), changelog: false }));
    if (pendingChangesets().length > 0) changeset(["version"], copy);
    const rows = published.map(({ folder, manifest }) => {
      const packed = pack(join(copy, folder), copy);
      const size = `${(packed.bytes / 1000).toFixed(1)} kB in ${packed.files} files`;
      return [packed.name, `${manifest.version} -> ${packed.version}`, size, needs(join(copy, folder))];
    });
    const widths = [0, 1, 2].map((column) => Math.max(...rows.map((row) => row[column]!.length)));
    for (const row of rows)
      console.log(
        row
          .map((cell, column) => cell.padEnd(widths[column] ?? 0))
          .join("  ")
          .trimEnd(),
      );
    console.log(`${rows.length} packages packed. Nothing was changed or published.`);
  } finally {
    rmSync(copy, { recursive: true });
  }
}

/** The ranges of our own packages in the package.json of `folder`. */
function needs(folder: string): string {
  const { dependencies, peerDependencies }: Manifest = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  const ranges = Object.entries({ ...dependencies, ...peerDependencies }).filter(([name]) =>
    name.startsWith("@switchyard/"),
  );
  return ranges.length > 0 ? `needs ${ranges.map(([name, range]) => `${name.split("/")[1]} ${range}`).join(", ")}` : "";
}

function changeset(args: readonly string[], folder: string): void {
  const program = join(root, "node_modules", "@changesets", "cli", "bin.js");
  const quiet = folder !== root;
  const { status, stdout, stderr } = spawnSync(process.execPath, [program, ...args], {
    cwd: folder,
    encoding: "utf8",
    stdio: quiet ? "pipe" : "inherit",
  });
  if (status !== 0) throw new Error(`changeset ${args.join(" ")} failed${quiet ? `:\n${stdout}${stderr}` : ""}`);
}
