// Peers are installed on demand into a folder of their own, without their install scripts: they are no part of the project.
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const folder = fileURLToPath(new URL("../peers/", import.meta.url));

const manifest = (name: string): string => join(folder, "node_modules", ...name.split("/"), "package.json");

export const installedVersion = (name: string): string =>
  (JSON.parse(readFileSync(manifest(name), "utf8")) as { version: string }).version;

/** Imports an installed package. What it exports to `import` counts; packages without an export map are found as `require` does. */
export async function load(name: string): Promise<unknown> {
  const { exports } = JSON.parse(readFileSync(manifest(name), "utf8")) as { exports?: unknown };
  const entry = exportedFile(exports);
  const file = entry
    ? join(folder, "node_modules", ...name.split("/"), entry)
    : createRequire(join(folder, "package.json")).resolve(name);
  return import(pathToFileURL(file).href);
}

/** The file of "." under the conditions node and import. */
export function exportedFile(exports: unknown): string | undefined {
  if (typeof exports === "string") return exports;
  if (typeof exports !== "object" || exports === null) return undefined;
  for (const [condition, target] of Object.entries(exports)) {
    if ([".", "node", "import", "default"].includes(condition)) {
      const found = exportedFile(target);
      if (found !== undefined) return found;
    }
  }
  return undefined;
}

/** Installs what is missing. Returns the reason in one line when that fails. */
export function install(packages: Readonly<Record<string, string>>): string | undefined {
  const missing = Object.entries(packages).filter(([name]) => !existsSync(manifest(name)));
  if (missing.length === 0) return undefined;
  mkdirSync(folder, { recursive: true });
  const own = join(folder, "package.json");
  if (!existsSync(own)) writeFileSync(own, `${JSON.stringify({ name: "peers", private: true, type: "module" })}\n`);
  // npm tells its own script where it is; a shell is needed only where it does not, and only for npm.cmd.
  const script = process.env.npm_execpath;
  const [command, first] = script ? [process.execPath, [script]] : ["npm", []];
  const { status, stderr, error } = spawnSync(
    command,
    [
      ...first,
      "install",
      "--ignore-scripts",
      "--omit=optional", // binaries for graphics cards, hundreds of megabytes
      "--no-audit",
      "--no-fund",
      "--no-package-lock",
      ...missing.map((p) => p.join("@")),
    ],
    { cwd: folder, encoding: "utf8", shell: !script && process.platform === "win32" },
  );
  if (status === 0) return undefined;
  const lines = (stderr ?? "").split("\n").filter((line) => line.startsWith("npm error"));
  return `npm install failed: ${error?.message ?? lines[0] ?? `exit code ${status}`}`;
}
