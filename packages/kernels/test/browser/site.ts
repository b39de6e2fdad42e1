// What the browser tests stand on: the user's project, bundled and served, a Chromium with pages on it, and the same training in
// Node to compare with.
import { execFile } from "node:child_process";
import { readdirSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import type { Browser, Page } from "playwright-core";
import { expect } from "vitest";
import { flags } from "./chromium.ts";
import { makeProject, type Project } from "./project.ts";
import { isolation, type Origin, policy, serve } from "./server.ts";

/** What the functions of pages/job.js answer with, beside their own results. */
export interface Facts {
  readonly seconds: number;
  /** Of the wasm backend. */
  readonly threads?: number;
  readonly variant?: string;
  readonly note?: string;
  /** Of the others: the device, the mode. */
  readonly description?: string;
  readonly live: number;
  readonly leaked: number;
  readonly waits: number;
  readonly pieces: number;
}
export interface Cases extends Facts {
  readonly count: number;
  /** How many there are in all. */
  readonly of: number;
  readonly failures: readonly string[];
}
export interface Training extends Facts {
  readonly losses: readonly number[];
  readonly loads: readonly (readonly number[])[];
  readonly evaluation: number;
  readonly grown: number;
  /** What reached the page while the worker trained: [step, loss]. */
  readonly steps?: readonly (readonly [number, number])[];
}
type Call = (name: string, ...args: readonly unknown[]) => Promise<unknown>;
interface Switchyard {
  readonly onMainThread: Readonly<Record<string, (...args: readonly unknown[]) => unknown>>;
  readonly inWorker: Call;
  readonly withPeers: Call;
  withChosenFiles(where: "worker" | "page", ...args: readonly unknown[]): Promise<unknown>;
  everything(): Promise<Readonly<Record<string, number>>>;
}
type OnPage = typeof globalThis & { readonly switchyard: Switchyard };

export interface Site {
  readonly project: Project;
  readonly browser: Browser;
  /** Served with the headers that threads need; without; and with a policy that forbids workers. */
  readonly isolated: Origin;
  readonly open: Origin;
  readonly strict: Origin;
  /** The same training on Node's wasm backend, on one thread. */
  readonly node: Training;
  close(): Promise<void>;
}

/** Checkpoints with recorded outputs, served under /files/. */
export const fixtures: string = join(import.meta.dirname, "..", "..", "..", "models", "test", "fixtures");
/** Steps of every training. */
export const STEPS = 12;
const run = promisify(execFile);

export async function openSite(chromium: string): Promise<Site> {
  const closing: (() => unknown)[] = [];
  const close = async (): Promise<void> => {
    for (const one of closing.splice(0).reverse()) await one();
  };
  try {
    const project = makeProject();
    closing.push(() => rmSync(project.folder, { recursive: true, force: true }));
    const isolated = await serve(project, isolation, fixtures);
    const open = await serve(project, {});
    const strict = await serve(project, { ...isolation, ...policy });
    closing.push(isolated.close, open.close, strict.close);
    const browser = await launch(chromium);
    closing.push(() => browser.close());
    const options = JSON.stringify({ threads: 1, steps: STEPS });
    const { stdout } = await run(process.execPath, [join(project.folder, "node.js"), "wasm", options]);
    return { project, browser, isolated, open, strict, node: JSON.parse(stdout), close };
  } catch (error) {
    await close();
    throw error;
  }
}

export async function launch(chromium: string): Promise<Browser> {
  const { chromium: launcher } = await import("playwright-core");
  return launcher.launch({ executablePath: chromium, args: [...flags] });
}

/** Bundles the pages as `npx vite build` does; answers its warnings, but for the one that TensorFlow.js is large. */
export async function build({ folder, built }: Project): Promise<string> {
  const vite = join(dirname(createRequire(import.meta.url).resolve("vite/package.json")), "bin", "vite.js");
  // The environment of vitest says "test"; a user's does not.
  const { NODE_ENV: _, VITEST: __, FORCE_COLOR: ___, ...env }: NodeJS.ProcessEnv = { ...process.env, NO_COLOR: "1" };
  const args = [vite, "build", "--base=/built/", `--outDir=${built}`, "--logLevel=warn"];
  const { stdout, stderr } = await run(process.execPath, args, { cwd: folder, env });
  return (stdout + stderr).replace(
    /^\[plugin builtin:vite-reporter\]\s+\(!\) Some chunks are larger.*?Limit\.\s+/s,
    "",
  );
}

/** Opens a page, hands it to `use`, and fails on anything in the console but what is expected there. */
export async function on<R>(
  browser: Browser,
  url: string,
  use: (page: Page) => Promise<R>,
  expected?: RegExp,
): Promise<R> {
  const page = await browser.newPage();
  const errors: string[] = [];
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) errors.push(message.text());
  });
  try {
    await page.goto(url);
    await page
      .waitForFunction(() => "switchyard" in globalThis, undefined, { timeout: 20_000 })
      .catch((cause: Error) => {
        throw new Error(`${url} did not load: ${errors.join("; ") || cause.message}`, { cause });
      });
    const result = await use(page);
    expect(errors.filter((error) => !expected?.test(error))).toEqual([]);
    return result;
  } finally {
    await page.close();
  }
}

const calling =
  (way: "inWorker" | "withPeers") =>
  <R>(page: Page, name: string, ...args: readonly unknown[]): Promise<R> =>
    page.evaluate(([way, name, args]) => (globalThis as OnPage).switchyard[way](name, ...args), [
      way,
      name,
      args,
    ] as const) as Promise<R>;
/** Calls a function of the job in a worker of its own. */
export const inWorker = calling("inWorker");
/** Calls a function of the job on the main thread, with the backends that stand on other libraries. */
export const withPeers = calling("withPeers");
/** Calls a function of the job on the main thread. */
export const onMainThread = <R>(page: Page, name: string, ...args: readonly unknown[]): Promise<R> =>
  page.evaluate(([name, args]) => (globalThis as OnPage).switchyard.onMainThread[name]?.(...args), [
    name,
    args,
  ] as const) as Promise<R>;
/** Runs recorded checkpoints from files that are chosen on the page, all of a folder at once, in a worker or on the main thread. */
export async function withChosenFiles<R>(
  page: Page,
  folders: readonly string[],
  ...[where, ...args]: readonly ["worker" | "page", ...(readonly unknown[])]
): Promise<R> {
  await page.evaluate((html) => {
    document.body.innerHTML = html;
  }, '<input type="file" multiple>'.repeat(folders.length));
  for (const [i, folder] of folders.entries()) {
    const home = join(fixtures, folder);
    await page
      .locator("input")
      .nth(i)
      .setInputFiles(readdirSync(home).map((name) => join(home, name)));
  }
  return page.evaluate(([where, args]) => (globalThis as OnPage).switchyard.withChosenFiles(where, ...args), [
    where,
    args,
  ] as const) as Promise<R>;
}
/** Loads every subpath of every package; answers how many exports each has. */
export const everything = (page: Page): Promise<Readonly<Record<string, number>>> =>
  page.evaluate(() => (globalThis as OnPage).switchyard.everything());

/** Each `every`-th case passed; names every one that failed. */
export function expectNoFailures(found: Cases, every = 1): void {
  if (found.failures.length > 0) {
    throw new Error(`${found.failures.length} of ${found.count} cases failed:\n${found.failures.join("\n")}`);
  }
  expect(found.of).toBeGreaterThan(1000);
  expect(found.count).toBe(Math.ceil(found.of / every));
  expect(found).toMatchObject({ live: 0, leaked: 0 });
}
