// npm test: builds, checks and tests everything, then prints one table over all packages. Every turbo task (build, typecheck,
// lint, publint, attw, size of one package) counts as one check, as do the types and the style of the tools themselves.
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { turbo } from "./build.mjs";
import { root, run } from "./child.mjs";

const tasks = ["build", "typecheck", "lint", "publint", "attw", "size"];
const reports = join(root, ".turbo");
/** Read by .ci/run. */
const totalFile = join(reports, "tests.json");
const node = process.execPath;

/** One line of the table: a package, or the tools. */
interface Row {
  readonly name: string;
  readonly checks: Map<string, boolean>;
  passed: number;
  failed: number;
  skipped: number;
}

const rows = new Map<string, Row>();
const failures: string[] = [];

function row(name: string): Row {
  const found = rows.get(name) ?? { name, checks: new Map<string, boolean>(), passed: 0, failed: 0, skipped: 0 };
  rows.set(name, found);
  return found;
}

function check(name: string, task: string, good: boolean): void {
  row(name).checks.set(task, good);
  if (!good) failures.push(`${name}: ${task}`);
}

// ------------------------------------------------------------------------------------------------ the three parts

/** The tasks of every package through turbo, which skips those whose inputs did not change. */
async function runTasks(): Promise<void> {
  const summaries = join(reports, "runs");
  rmSync(summaries, { recursive: true, force: true });
  const code = await turbo(node, [
    ...tasks,
    "--continue=dependencies-successful",
    "--summarize",
    "--output-logs=errors-only",
  ]);
  const [file] = existsSync(summaries) ? readdirSync(summaries) : [];
  if (!file) return check("all packages", "turbo", false);
  const summary: Summary = JSON.parse(readFileSync(join(summaries, file), "utf8"));
  for (const one of summary.tasks) {
    // Without a script there is nothing to run; without an exit code the task waited for one that failed.
    if (one.command === "<NONEXISTENT>" || !tasks.includes(one.task)) continue;
    const cached = one.cache.status === "HIT";
    check(one.package, one.task, cached || one.execution?.exitCode === 0);
  }
  if (code !== 0 && failures.length === 0) check("all packages", "turbo", false);
}

interface Summary {
  readonly tasks: readonly {
    readonly task: string;
    readonly package: string;
    readonly command: string;
    readonly cache: { readonly status: string };
    readonly execution?: { readonly exitCode: number };
  }[];
}

/** What belongs to no package: tools, configurations, changesets. */
async function checkTools(): Promise<void> {
  const program = (path: string): string => join(root, "node_modules", path);
  const files = readdirSync(root).filter((name) => /\.(json|ts)$/.test(name) && name !== "package-lock.json");
  const lint = await run(node, [program("@biomejs/biome/bin/biome"), "check", "tools", ".changeset", ...files]);
  check("tools", "lint", lint === 0);
  check("tools", "typecheck", (await run(node, [program("typescript/bin/tsc"), "-p", "tools"])) === 0);
}

/** One vitest over packages, apps and tools; its report says what passed in which file. */
async function runSuites(): Promise<void> {
  const file = join(reports, "vitest.json");
  rmSync(file, { force: true });
  const code = await run(node, [
    join(root, "node_modules", "vitest", "vitest.mjs"),
    "run",
    "--reporter=default",
    "--reporter=json",
    `--outputFile.json=${file}`,
  ]);
  if (!existsSync(file)) return check("all packages", "vitest", false);
  const report: Report = JSON.parse(readFileSync(file, "utf8"));
  let failed = 0;
  for (const { name, status, assertionResults } of report.testResults) {
    const path = relative(root, name).split(sep).join("/");
    const one = row(owner(path));
    for (const { status: result, fullName } of assertionResults) {
      if (result === "passed") one.passed++;
      else if (result === "failed") {
        one.failed++;
        failed++;
        failures.push(`${path}: ${fullName}`);
      } else one.skipped++;
    }
    // A file that cannot be loaded has no results of its own.
    if (status === "failed" && assertionResults.every((result) => result.status !== "failed")) {
      one.failed++;
      failed++;
      failures.push(`${path}: the file failed`);
    }
  }
  // An error outside any test, such as an unhandled rejection, fails the run and is in no result.
  if (code !== 0 && failed === 0) check("all packages", "vitest", false);
}

interface Report {
  readonly testResults: readonly {
    readonly name: string;
    readonly status: string;
    readonly assertionResults: readonly { readonly status: string; readonly fullName: string }[];
  }[];
}

/** The name of the package in whose folder a test lies. */
function owner(path: string): string {
  const [parent, folder] = path.split("/");
  const manifest = join(root, parent ?? "", folder ?? "", "package.json");
  return existsSync(manifest) ? JSON.parse(readFileSync(manifest, "utf8")).name : "tools";
}

// ------------------------------------------------------------------------------------------------ the summary

function printSummary(): { passed: number; failed: number; skipped: number } {
  const total = { passed: 0, failed: 0, skipped: 0 };
  const lines = [["package", ...tasks, "tests passed", "failed", "skipped"]];
  for (const one of [...rows.values()].sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const cell = (task: string): string => (one.checks.has(task) ? (one.checks.get(task) ? "ok" : "FAILED") : "");
    lines.push([one.name, ...tasks.map(cell), String(one.passed), String(one.failed), String(one.skipped)]);
    const bad = [...one.checks.values()].filter((good) => !good).length;
    total.passed += one.passed + one.checks.size - bad;
    total.failed += one.failed + bad;
    total.skipped += one.skipped;
  }
  const widths = lines[0]!.map((_, column) => Math.max(...lines.map((line) => line[column]!.length)));
  console.log(
    `\n${lines
      .map((line) =>
        line
          .map((cell, i) => cell.padEnd(widths[i]!))
          .join("  ")
          .trimEnd(),
      )
      .join("\n")}\n`,
  );
  if (failures.length > 0) console.log(`Failed:\n${failures.map((one) => `  ${one}`).join("\n")}\n`);
  return total;
}

const started = performance.now();
mkdirSync(reports, { recursive: true });
rmSync(totalFile, { force: true });
await runTasks();
await checkTools();
await runSuites();
if ([...rows.values()].every(({ passed }) => passed === 0)) check("all packages", "any test", false);
const total = printSummary();
writeFileSync(totalFile, JSON.stringify(total));
const seconds = ((performance.now() - started) / 1000).toFixed(0);
console.log(`Checks and tests: ${total.passed} good, ${total.failed} bad, ${total.skipped} skipped, in ${seconds} s`);
process.exitCode = total.failed > 0 ? 1 : 0;
