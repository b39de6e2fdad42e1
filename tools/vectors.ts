// npm run vectors -- DIR: every vector file of a folder through the real implementation, in float64 on the reference
// backend within the file's tolerance, and in float32 on the wasm backend within 1e-5 of the array's largest magnitude.
// One line per file, then `N passed, N failed`; the exit code is 1 when something failed. What runs a family of vectors
// lies with the tests of its package (packages/routers/test/families, packages/models/test/families).
import { readdirSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { wasm } from "@switchyard/kernels/wasm";
import { families as ofModels } from "../packages/models/test/families/index.ts";
import { families as ofRouters } from "../packages/routers/test/families/index.ts";
import {
  type Family,
  flat,
  float32Tolerance,
  parseVectors,
  shapeOf,
  type Values,
  type VectorCase,
  type Vectors,
} from "../packages/routers/test/vectors.ts";

/** Of packages that are not written yet. */
const later = [/^prune-(?!pack$)/];

/** What runs each family of vectors, of all packages. */
export const families: Readonly<Record<string, Family>> = { ...ofRouters, ...ofModels };

/** One backend to run the cases on, and how far a number may be off there. */
export interface Setting {
  readonly name: string;
  open(): Engine;
  allowed(expected: Values, tolerance: Vectors["tolerance"]): Vectors["tolerance"];
}

export const float64: Setting = {
  name: "float64",
  open: () => engine(cpu({ precision: 64 })),
  allowed: (_, tolerance) => tolerance,
};

export async function float32(): Promise<Setting> {
  const backend = await wasm({ threads: 1 });
  return {
    name: "float32 on wasm",
    open: () => engine(backend),
    allowed: float32Tolerance,
  };
}

export interface Options {
  readonly settings: readonly Setting[];
  readonly families: Readonly<Record<string, Family>>;
  say(line: string): void;
}

/** Runs all files of `folder`, in alphabetical order. Throws an Error when there is nothing to run. */
export async function checkFolder(
  folder: string,
  { say, ...options }: Options,
): Promise<{ passed: number; failed: number }> {
  const files = filesOf(folder);
  const total = { passed: 0, failed: 0 };
  for (const file of files) {
    const name = file.replace(/\.json$/, "");
    if (later.some((pattern) => pattern.test(name))) {
      say(`${file} not yet`);
      continue;
    }
    const { passed, failed, skipped, lines } = await checkFile(name, resolve(folder, file), options);
    say(skipped ? `${file} skipped: it has no cases` : `${file} ${passed}/${passed + failed}`);
    for (const line of lines) say(`  ${line}`);
    total.passed += passed;
    total.failed += failed;
  }
  say(`${total.passed} passed, ${total.failed} failed`);
  return total;
}

function filesOf(folder: string): string[] {
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch (error) {
    const code = error instanceof Error && "code" in error ? error.code : undefined;
    if (code === "ENOENT") throw new Error(`there is no folder ${folder}`);
    if (code === "ENOTDIR") throw new Error(`${folder} is a file; name the folder that it lies in`);
    throw new Error(`the folder ${folder} cannot be read: ${words(error)}`);
  }
  const files = names.filter((name) => name.endsWith(".json")).sort();
  if (files.length === 0)
    throw new Error(`${folder} has no .json file; vectors are files such as routers-topk.json with "cases"`);
  return files;
}

interface FileResult {
  passed: number;
  failed: number;
  skipped?: boolean;
  readonly lines: string[];
}

/** A file that cannot be read or run counts as one failure, or as one per case where these are known. */
async function checkFile(name: string, path: string, options: Omit<Options, "say">): Promise<FileResult> {
  const result: FileResult = { passed: 0, failed: 0, lines: [] };
  let vectors: Vectors;
  try {
    const text = readFileSync(path, "utf8");
    if (!hasCases(text)) return { ...result, skipped: true };
    vectors = parseVectors(text, name);
  } catch (error) {
    return { ...result, failed: 1, lines: [words(error)] };
  }
  const run = Object.hasOwn(options.families, vectors.family) ? options.families[vectors.family] : undefined;
  if (!run) {
    const line = `nothing runs the family "${vectors.family}"; families lie in packages/{routers,models}/test/families`;
    return { ...result, failed: vectors.cases.length, lines: [line] };
  }
  for (const one of vectors.cases) {
    const problems: string[] = [];
    for (const setting of options.settings) {
      for (const line of await unmet(run, one, { setting, tolerance: vectors.tolerance }))
        problems.push(`${one.id} (${setting.name}) ${line}`);
    }
    if (problems.length === 0) result.passed++;
    else result.failed++;
    result.lines.push(...problems);
  }
  return result;
}

/** Whether a file's text is vectors or some other list. Throws for what cannot be either. */
function hasCases(text: string): boolean {
  let file: unknown;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not JSON: ${words(error)}`);
  }
  if (typeof file !== "object" || file === null || !("cases" in file)) return false;
  const { cases } = file;
  if (!Array.isArray(cases)) throw new Error('its "cases" are not a list');
  if (cases.length === 0) return false;
  const { family, paper, meta, tolerance: own } = file as Readonly<Record<string, unknown>>;
  const suite = value(meta, "suite");
  if (![family, paper, suite].some((word) => typeof word === "string")) {
    const layouts = "the layout of routers-*.json, main-*.json or prune-*.json";
    throw new Error(`it has neither a "family" nor a "paper" nor a "meta" with a suite; expected ${layouts}`);
  }
  const tolerance = suite === undefined ? own : { abs: value(meta, "absTol"), rel: value(meta, "relTol") };
  const bounds = typeof paper === "string" ? [own] : [value(tolerance, "abs"), value(tolerance, "rel")];
  if (!bounds.every((bound) => typeof bound === "number" && bound >= 0))
    throw new Error(`its tolerance is ${JSON.stringify(tolerance)}; expected numbers from 0`);
  const odd = cases.findIndex((one) => typeof one !== "object" || one === null);
  if (odd >= 0) throw new Error(`case ${odd} is ${JSON.stringify(cases[odd])}, not a record`);
  return true;
}

const value = (record: unknown, name: string): unknown =>
  typeof record === "object" && record !== null ? (record as Readonly<Record<string, unknown>>)[name] : undefined;

/** What a case does not meet on one backend: a line for each name, with its worst number. */
async function unmet(
  run: Family,
  one: VectorCase,
  { setting, tolerance }: { readonly setting: Setting; readonly tolerance: Vectors["tolerance"] },
): Promise<string[]> {
  if (Object.keys(one.expected).length === 0) return ["expects nothing"];
  let found: Readonly<Record<string, Values>>;
  try {
    found = await run(one, setting.open());
  } catch (error) {
    return [`cannot be run: ${words(error)}`];
  }
  return Object.entries(one.expected).flatMap(([name, expected]) => {
    const own = found[name];
    if (own === undefined) return [`${name}: nothing was computed under this name`];
    const odd = [expected].flat(Number.POSITIVE_INFINITY as 1).find((x) => typeof x !== "number");
    if (odd !== undefined) return [`${name}: expects ${JSON.stringify(odd)}, which is no number`];
    const line = worst(expected, own, setting.allowed(expected, tolerance));
    return line === undefined ? [] : [`${name}: ${line}`];
  });
}

/** The entry that is off by most, where one is off by more than allowed. */
function worst(expected: Values, found: Values, { abs, rel }: Vectors["tolerance"]): string | undefined {
  const [wanted, values] = [flat(expected), flat(found)];
  if (shapeOf(expected).join() !== shapeOf(found).join() || wanted.length !== values.length)
    return `shape [${shapeOf(found)}] with ${values.length} numbers, expected [${shapeOf(expected)}] with ${wanted.length}`;
  let count = 0;
  let top = -1;
  let line = "";
  wanted.forEach((want, i) => {
    const own = values[i] ?? Number.NaN;
    if (Object.is(own, want) || own === want) return;
    // What is not finite has to be met exactly.
    const [error, bound] = [Math.abs(own - want), Number.isFinite(want) ? abs + rel * Math.abs(want) : 0];
    if (error <= bound) return;
    count++;
    // NaN is worse than any number.
    const rank = Number.isNaN(error) ? Number.POSITIVE_INFINITY : error;
    if (rank <= top) return;
    top = rank;
    line = `entry ${i} is ${own}, expected ${want}: off by ${error.toExponential(2)}, allowed ${bound.toExponential(2)}`;
  });
  return count === 0 ? undefined : count === 1 ? line : `${line}; ${count} of ${wanted.length} entries are off`;
}

const words = (error: unknown): string => (error instanceof Error ? error.message : String(error));

async function main([folder, ...more]: readonly string[]): Promise<number> {
  if (folder === undefined || more.length > 0)
    throw new Error(
      `one folder is needed, found ${more.length + (folder === undefined ? 0 : 1)}: npm run vectors -- DIR`,
    );
  // npm starts scripts in the root; INIT_CWD is where it was called.
  const path = resolve(process.env.INIT_CWD ?? process.cwd(), folder);
  const settings = [float64, await float32()];
  const { failed } = await checkFolder(path, { settings, families, say: (line) => console.log(line) });
  return failed > 0 ? 1 : 0;
}

if (process.argv[1] === import.meta.filename) {
  main(process.argv.slice(2)).then(
    (code) => {
      process.exitCode = code;
    },
    (error) => {
      console.error(`vectors: ${words(error)}`);
      process.exitCode = 1;
    },
  );
}
