// Brings node_modules up to date with package-lock.json and finds the Node 24 that the dependency `node` brings.
import { existsSync, readFileSync } from "node:fs";
import { join, sep } from "node:path";
import { npmProgram, root, run } from "./child.mjs";

const modules = join(root, "node_modules");

/** Installs when node_modules is missing or differs from the lock file. Throws when npm fails. */
export async function install() {
  if (isInstalled()) return;
  // npm ci removes node_modules first. Windows does not delete a program that is running, and this script may be running on
  // the Node in there: then npm install, which changes only what differs.
  const inPlace = process.platform === "win32" && process.execPath.startsWith(modules + sep);
  const command = inPlace ? "install" : "ci";
  console.error(`Installing the dependencies (npm ${command}) ...`);
  const node = process.env.npm_node_execpath ?? process.execPath;
  const code = await run(node, [npmProgram(), command, "--include=dev", "--loglevel=error"], { quiet: true });
  if (code !== 0) throw new Error(`npm ${command} failed with exit code ${code}; its message is above`);
}

/** npm writes what it installed to node_modules/.package-lock.json, last of all: an interrupted installation has none. */
function isInstalled() {
  const record = join(modules, ".package-lock.json");
  if (!existsSync(record)) return false;
  const installed = packagesOf(record);
  return Object.entries(packagesOf(join(root, "package-lock.json"))).every(([path, one]) => {
    if (!path.startsWith("node_modules/")) return true;
    const found = installed[path];
    // Optional packages are those of other platforms too.
    return found ? found.version === one.version : Boolean(one.optional);
  });
}

/**
 * @param {string} lock
 * @returns {Record<string, { version?: string, optional?: boolean }>}
 */
function packagesOf(lock) {
  return JSON.parse(readFileSync(lock, "utf8")).packages;
}

/** The program of Node 24: the development dependency, or the Node that runs this. */
export function node24() {
  const local = join(modules, "node", "bin", process.platform === "win32" ? "node.exe" : "node");
  if (existsSync(local)) return local;
  if (Number(process.versions.node.split(".")[0]) >= 24) return process.execPath;
  throw new Error(
    `Node 24 is missing (this is ${process.version}) because install scripts are disabled: ` +
      'run "npm rebuild node --ignore-scripts=false" or use Node 24, then try again.',
  );
}
