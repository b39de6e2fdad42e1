// Starts child processes without a shell: the same on Linux, macOS and Windows. Also knows where the root and npm are.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { constants } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

/** The root of the repository. */
export const root = fileURLToPath(new URL("..", import.meta.url));

/**
 * Runs `command` in the root and answers its exit code. `quiet` sends its output to stderr, so that the stdout of the job
 * itself stays clean (`--json`).
 * @param {string} command
 * @param {readonly string[]} args
 * @param {{ quiet?: boolean, environment?: Record<string, string> }} [options]
 * @returns {Promise<number>}
 */
export function run(command, args, { quiet = false, environment = {} } = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: root,
      stdio: ["inherit", quiet ? 2 : "inherit", "inherit"],
      env: { ...withLocalTools(process.env), ...environment },
    });
    // A terminal sends Ctrl-C to every process of the group, the child included: sending it again would be a second
    // Ctrl-C. Without a terminal only this process was told. Either way the child decides when to end.
    const passOn = (/** @type {NodeJS.Signals} */ signal) => {
      if (signal === "SIGTERM" || !process.stdin.isTTY) child.kill(signal);
    };
    const settled = () => {
      process.off("SIGINT", passOn);
      process.off("SIGTERM", passOn);
    };
    process.on("SIGINT", passOn);
    process.on("SIGTERM", passOn);
    child.once("error", (error) => {
      settled();
      reject(error);
    });
    child.once("close", (code, signal) => {
      settled();
      resolve(code ?? 128 + (signal ? constants.signals[signal] : 0));
    });
  });
}

/** npm-cli.js: npm names itself to the scripts it runs; otherwise it is found through the PATH. */
export function npmProgram() {
  const named = process.env.npm_execpath;
  if (named?.endsWith("npm-cli.js")) return named;
  const folders = [dirname(process.execPath), ...(process.env[pathName(process.env)] ?? "").split(delimiter)];
  const found = folders
    .flatMap((folder) => [join(folder, "node_modules"), join(folder, "..", "lib", "node_modules")])
    .map((modules) => join(modules, "npm", "bin", "npm-cli.js"))
    .find((file) => existsSync(file));
  if (found) return found;
  throw new Error('npm was not found through the PATH: start this with "npm run" instead.');
}

/**
 * The same environment with node_modules/.bin first on the PATH: there lie the tools, and Node 24 under the name `node`.
 * @param {NodeJS.ProcessEnv} environment
 */
function withLocalTools(environment) {
  const name = pathName(environment);
  return { ...environment, [name]: join(root, "node_modules", ".bin") + delimiter + (environment[name] ?? "") };
}

/**
 * Windows calls it `Path`, and a copied environment keeps that spelling.
 * @param {NodeJS.ProcessEnv} environment
 */
function pathName(environment) {
  return Object.keys(environment).find((key) => key.toUpperCase() === "PATH") ?? "PATH";
}
