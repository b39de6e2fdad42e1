// A user's project in a temporary folder: the pages beside this file, and the built packages installed as npm would install
// them. Everything in the browser, and the same job in Node, runs from there.
import { execFileSync } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join, posix } from "node:path";

const root = join(import.meta.dirname, "..", "..", "..", "..");
const pages = join(import.meta.dirname, "pages");
const packages = ["core", "routers", "kernels", "models", "testing"];
/** The libraries under the adapters, which a user installs. */
const peers = [
  ...["core", "layers", "backend-cpu", "backend-webgl", "backend-webgpu"].map((name) => `@tensorflow/tfjs-${name}`),
  "gpu.js",
];

/** One subpath of a package. */
export interface Module {
  /** "@switchyard/core/moe" */
  readonly specifier: string;
  /** Of its file, relative to node_modules, with forward slashes. */
  readonly path: string;
}

export interface Project {
  readonly folder: string;
  readonly modules: readonly Module[];
  /** Where the tests let Vite put the pages. */
  readonly built: string;
}

/** The suites of the testing package need vitest, which no page has; its cases as data do not. */
const forPages = (specifier: string): boolean =>
  !specifier.startsWith("@switchyard/testing") || specifier === "@switchyard/testing/backend-cases";

/** Builds the packages when that is needed, and makes the project. The caller removes the folder. */
export function makeProject(): Project {
  const stale = packages.filter((name) => !isBuilt(join(root, "packages", name)));
  if (stale.length > 0) {
    console.warn(`browser tests: building first, because dist is missing or old in ${stale.join(", ")}`);
    const filters = packages.map((name) => `--filter=@switchyard/${name}`);
    const turbo = join(root, "node_modules", "turbo", "bin", "turbo");
    const args = [turbo, "run", "build", ...filters, "--output-logs=errors-only", "--ui=stream"];
    const env = { ...process.env, TURBO_TELEMETRY_DISABLED: "1", TURBO_NO_UPDATE_NOTIFIER: "1" };
    execFileSync(process.execPath, args, { cwd: root, env, stdio: ["ignore", 2, 2] });
  }
  const folder = mkdtempSync(join(tmpdir(), "switchyard-browser-"));
  cpSync(pages, folder, { recursive: true });
  writeFileSync(join(folder, "package.json"), JSON.stringify({ private: true, type: "module" }));

  const modules = [
    ...packages.flatMap((name) => installed(join(root, "packages", name), folder, ["dist"])),
    ...["jinja", "tokenizers"].flatMap((name) =>
      installed(join(root, "node_modules", "@huggingface", name), folder, ["dist"]),
    ),
  ].filter(({ specifier }) => forPages(specifier));
  for (const name of peers) linked(join(root, "node_modules", ...name.split("/")), name, folder);
  const imports = modules.map(({ specifier }, i) => `import * as m${i} from "${specifier}";\n`);
  const list = modules.map(({ specifier }, i) => `  "${specifier}": m${i},\n`);
  writeFileSync(join(folder, "everything.js"), `${imports.join("")}export const modules = {\n${list.join("")}};\n`);
  return { folder, modules, built: join(folder, "built") };
}

type Target = string | { readonly default?: Target; readonly browser?: Target; readonly import?: Target };
interface Manifest {
  readonly name: string;
  readonly exports: Readonly<Record<string, Target>>;
}
const manifestOf = (home: string): Manifest => JSON.parse(readFileSync(join(home, "package.json"), "utf8"));

/** The file of an export in a browser. */
function fileOf(target: Target): string | undefined {
  if (typeof target === "string") return target;
  const chosen = target.browser ?? target.import ?? target.default;
  return chosen === undefined ? undefined : fileOf(chosen);
}

const filesOf = (manifest: Manifest): [subpath: string, file: string][] =>
  Object.entries(manifest.exports).flatMap(([subpath, target]) => {
    const file = fileOf(target);
    return file?.match(/\.m?js$/) ? [[subpath, file] as [string, string]] : [];
  });

/** Copies what npm would install; answers the package's subpaths. */
function installed(home: string, folder: string, files: readonly string[]): Module[] {
  const manifest = manifestOf(home);
  const target = join(folder, "node_modules", ...manifest.name.split("/"));
  mkdirSync(target, { recursive: true });
  for (const name of ["package.json", ...files]) cpSync(join(home, name), join(target, name), { recursive: true });
  return filesOf(manifest).map(([subpath, file]) => ({
    specifier: manifest.name + subpath.slice(1),
    path: posix.join(manifest.name, file),
  }));
}

/** Links a library, which finds its own dependencies from where it lies. No copy: these are a hundred megabytes. */
function linked(home: string, name: string, folder: string): void {
  const target = join(folder, "node_modules", ...name.split("/"));
  mkdirSync(join(target, ".."), { recursive: true });
  symlinkSync(home, target, "junction");
}

/** Whether every exported file is there, and none of the sources is newer. */
function isBuilt(home: string): boolean {
  const files = filesOf(manifestOf(home)).map(([, file]) => join(home, file));
  if (!files.every((file) => existsSync(file))) return false;
  const oldest = Math.min(...files.map((file) => statSync(file).mtimeMs));
  const sources = readdirSync(join(home, "src"), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts") && !/\.test(-util)?\.ts$/.test(name))
    .map((name) => join(home, "src", name));
  return sources.every((file) => statSync(file).mtimeMs <= oldest);
}
