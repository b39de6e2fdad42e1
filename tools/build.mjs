// Builds every package through turbo, and does not even start turbo when nothing changed since the last build.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";
import { root, run } from "./child.mjs";

const stamp = join(root, "node_modules", ".cache", "switchyard", "build");
const made = new Set(["dist", "node_modules", "runs", ".turbo"]);

/**
 * Throws when the build fails; turbo prints why.
 * @param {string} node The Node program to build with.
 */
export async function build(node) {
  const before = fingerprint();
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === before && targets().every(existsSync)) return;
  console.error("Building the packages ...");
  const code = await turbo(node, ["build", "--output-logs=errors-only"], { quiet: true });
  if (code !== 0) throw new Error(`the build failed with exit code ${code}; its message is above`);
  mkdirSync(dirname(stamp), { recursive: true });
  writeFileSync(stamp, before);
}

/**
 * `turbo run ARGS` on the given Node: turbo's own program is started by a script of its package, which needs no shell.
 * @param {string} node
 * @param {readonly string[]} args
 * @param {{ quiet?: boolean }} [options]
 */
export function turbo(node, args, options = {}) {
  return run(node, [join(root, "node_modules", "turbo", "bin", "turbo"), "run", ...args, "--ui=stream"], {
    ...options,
    environment: { TURBO_TELEMETRY_DISABLED: "1", TURBO_NO_UPDATE_NOTIFIER: "1" },
  });
}

/** One hash over the contents of all that a build reads. */
function fingerprint() {
  const hash = createHash("sha256");
  const files = [
    ...["package-lock.json", "turbo.json"].map((name) => join(root, name)),
    ...["packages", "apps", "tools"].flatMap((name) => sources(join(root, name))),
  ];
  for (const file of files) {
    hash.update(`${relative(root, file).split(sep).join("/")}\n`);
    hash.update(createHash("sha256").update(readFileSync(file)).digest());
  }
  return hash.digest("hex");
}

/**
 * @param {string} folder
 * @returns {string[]}
 */
function sources(folder) {
  return readdirSync(folder, { withFileTypes: true })
    .filter((entry) => !made.has(entry.name))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => {
      const path = join(folder, entry.name);
      if (entry.isDirectory()) return sources(path);
      return /\.(test|test-util|generated)\.ts$|\.md$/.test(entry.name) ? [] : [path];
    });
}

/** Every file that a package.json promises under `exports` and `bin`. */
function targets() {
  return readdirSync(join(root, "packages")).flatMap((name) => {
    const folder = join(root, "packages", name);
    if (!existsSync(join(folder, "package.json"))) return [];
    const { exports = {}, bin = {} } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    return [...Object.values(exports), ...Object.values(bin)]
      .flatMap((target) => (typeof target === "string" ? [target] : /** @type {string[]} */ (Object.values(target))))
      .map((target) => join(folder, target));
  });
}
