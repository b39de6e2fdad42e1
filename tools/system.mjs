// What the tests on GPUs and in a browser need from the system, and how Debian's package manager brings it: Chromium, with the
// software drivers in its package, and the loader of Vulkan drivers. Plain JavaScript: nothing is installed yet.
import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import { run } from "./child.mjs";

/**
 * @typedef {object} System
 * @property {NodeJS.Platform} platform
 * @property {string} architecture
 * @property {number | undefined} user 0 is root.
 * @property {readonly string[]} path Folders with programs.
 * @property {string | undefined} browser What SWITCHYARD_CHROMIUM names.
 * @property {(file: string) => boolean} exists
 */

const browsers = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge"];
/** @type {Record<string, string>} */
const folders = { x64: "x86_64-linux-gnu", arm64: "aarch64-linux-gnu" };

/** @returns {System} */
export function thisSystem() {
  return {
    platform: process.platform,
    architecture: process.arch,
    user: process.getuid?.(),
    path: (process.env.PATH ?? "").split(delimiter).filter((folder) => folder !== ""),
    browser: process.env.SWITCHYARD_CHROMIUM,
    exists: existsSync,
  };
}

/**
 * The Debian packages that are missing; none where the system has no apt-get.
 * @param {System} system
 * @returns {string[]}
 */
export function missingPackages({ platform, architecture, path, browser, exists }) {
  /** @param {string} program */
  const installed = (program) => path.some((folder) => exists(join(folder, program)));
  if (platform !== "linux" || !installed("apt-get")) return [];
  const library = ["/usr/lib", "/lib", "/usr/local/lib"]
    .flatMap((folder) => [folder, join(folder, folders[architecture] ?? "")])
    .some((folder) => exists(join(folder, "libvulkan.so.1")));
  return [...(browser || browsers.some(installed) ? [] : ["chromium"]), ...(library ? [] : ["libvulkan1"])];
}

/**
 * The command that runs apt-get as root; undefined for a user without sudo.
 * @param {System} system
 * @returns {string[] | undefined}
 */
export function aptGet({ user, path, exists }) {
  const command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-o", "DPkg::Lock::Timeout=120"];
  if (user === 0) return command;
  return path.some((folder) => exists(join(folder, "sudo"))) ? ["sudo", "-n", ...command] : undefined;
}

/**
 * Installs what is missing, and says what it does. Never throws: the tests themselves say what they do not find.
 * @param {System} [system]
 */
export async function installPackages(system = thisSystem()) {
  const packages = missingPackages(system);
  if (packages.length === 0) return;
  const command = aptGet(system);
  if (!command) {
    console.error(`Missing: ${packages.join(", ")}, and without root or sudo they cannot be installed from here.`);
    return;
  }
  const [program = "", ...start] = command;
  /** @param {string[]} args */
  const apt = async (...args) => {
    console.error(`Running ${[...command, ...args].join(" ")}`);
    const code = await run(program, [...start, ...args]).catch((error) => error.message);
    return code === 0;
  };
  const install = () => apt("install", "--no-install-recommends", ...packages);
  console.error(`Installing ${packages.join(" and ")} for the tests on GPUs and in a browser ...`);
  // The lists of packages may be missing or old: only then are they loaded.
  if ((await install()) || ((await apt("update")) && (await install()))) return;
  console.error(`${packages.join(" and ")} could not be installed; the message of apt-get is above.`);
}
