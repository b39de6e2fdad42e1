// The built packages in a real browser: bundled by Vite, served by Vite's development server, as plain modules with an import map
// and by URL; in a worker with and without threads, and on a page's main thread. Skipped, with one printed reason, where no
// Chromium is found.
import { execFile } from "node:child_process";
import { rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { findChromium, flags } from "./chromium.ts";
import { makeProject, type Project } from "./project.ts";
import { isolation, type Origin, policy, serve } from "./server.ts";

/** What the functions of pages/job.js answer with, beside their own results. */
interface Facts {
  readonly threads: number;
  readonly variant: string;
  readonly note: string;
  readonly live: number;
  readonly leaked: number;
  readonly waits: number;
  readonly pieces: number;
}
interface Cases extends Facts {
  readonly count: number;
  readonly failures: readonly string[];
}
interface Training extends Facts {
  readonly losses: readonly number[];
  readonly loads: readonly (readonly number[])[];
  readonly evaluation: number;
  readonly grown: number;
  /** What reached the page while the worker trained: [step, loss]. */
  readonly steps?: readonly (readonly [number, number])[];
}
interface Place {
  readonly isolated: boolean;
  readonly page: boolean;
}
interface Switchyard {
  readonly onMainThread: Readonly<Record<string, (...args: readonly unknown[]) => unknown>>;
  inWorker(name: string, ...args: readonly unknown[]): Promise<unknown>;
  everything(): Promise<Readonly<Record<string, number>>>;
}
type OnPage = typeof globalThis & { readonly switchyard: Switchyard };

const STEPS = 12;
const run = promisify(execFile);
const chromium = findChromium();
if (chromium === undefined) {
  console.warn("browser tests skipped: no Chromium found; install one or set SWITCHYARD_CHROMIUM to its program");
}

describe.skipIf(chromium === undefined)("in Chromium", () => {
  let project: Project;
  let browser: Browser;
  let isolated: Origin;
  let open: Origin;
  let strict: Origin;
  /** The same training on Node's wasm backend, on one thread. */
  let node: Training;
  const closing: (() => unknown)[] = [];

  beforeAll(async () => {
    project = makeProject();
    closing.push(() => rmSync(project.folder, { recursive: true, force: true }));
    isolated = await serve(project, isolation);
    open = await serve(project, {});
    strict = await serve(project, { ...isolation, ...policy });
    closing.push(isolated.close, open.close, strict.close);
    const { chromium: launcher } = await import("playwright-core");
    browser = await launcher.launch({ executablePath: chromium ?? "", args: [...flags] });
    closing.push(() => browser.close());
    const { stdout } = await run(process.execPath, [join(project.folder, "node.js"), "1", String(STEPS)]);
    node = JSON.parse(stdout);
    console.log(`browser tests: ${chromium}, version ${browser.version()}`);
  }, 300_000);

  afterAll(async () => {
    for (const close of closing.reverse()) await close();
  });

  /** Opens a page, hands it to `use`, and fails on anything in the console but what is expected there. */
  async function on<R>(url: string, use: (page: Page) => Promise<R>, expected?: RegExp): Promise<R> {
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
  const inWorker = <R>(page: Page, name: string, ...args: readonly unknown[]): Promise<R> =>
    page.evaluate(([name, args]) => (globalThis as OnPage).switchyard.inWorker(name, ...args), [
      name,
      args,
    ] as const) as Promise<R>;
  const onMainThread = <R>(page: Page, name: string, ...args: readonly unknown[]): Promise<R> =>
    page.evaluate(([name, args]) => (globalThis as OnPage).switchyard.onMainThread[name]?.(...args), [
      name,
      args,
    ] as const) as Promise<R>;
  const everything = (page: Page): Promise<Readonly<Record<string, number>>> =>
    page.evaluate(() => (globalThis as OnPage).switchyard.everything());

  function expectSameTraining(found: Training): void {
    expect(found.losses).toHaveLength(STEPS);
    const difference = Math.max(...found.losses.map((loss, i) => Math.abs(loss - (node.losses[i] ?? Number.NaN))));
    expect(difference).toBeLessThan(1e-6);
    expect(Math.abs(found.evaluation - node.evaluation)).toBeLessThan(1e-6);
    expect(found.loads).toEqual(node.loads);
    expect({ variant: found.variant, live: found.live, grown: found.grown, leaked: found.leaked }).toEqual({
      variant: node.variant,
      live: 0,
      grown: 0,
      leaked: 0,
    });
  }
  function expectNoFailures(found: Cases): void {
    expect(found.failures).toEqual([]);
    expect(found.count).toBeGreaterThan(300);
    expect(found).toMatchObject({ live: 0, leaked: 0 });
  }
  /** Every subpath has at least one export. */
  function expectEverything(counts: Readonly<Record<string, number>>): void {
    expect(Object.keys(counts)).toEqual(project.modules.map(({ specifier }) => specifier));
    expect(Object.entries(counts).filter(([, count]) => count === 0)).toEqual([]);
  }

  it("Node, for comparison, learns", () => {
    expect(node.losses[0]).toBeCloseTo(Math.log(40), 0);
    expect(node.losses.at(-1)).toBeLessThan((node.losses[0] ?? 0) - 0.5);
    expect(node).toMatchObject({ threads: 1, live: 0, grown: 0, leaked: 0 });
  });

  describe("bundled by Vite", () => {
    beforeAll(async () => {
      const vite = join(dirname(createRequire(import.meta.url).resolve("vite/package.json")), "bin", "vite.js");
      // The environment of vitest says "test"; a user's does not.
      const { NODE_ENV: _, VITEST: __, ...env } = process.env;
      const args = [vite, "build", "--base=/built/", `--outDir=${project.built}`, "--logLevel=warn"];
      const { stdout, stderr } = await run(process.execPath, args, { cwd: project.folder, env });
      // Not a word: a module of Node that was put outside, or code that cannot be split, would be a warning here.
      expect(stdout + stderr).toBe("");
    }, 60_000);

    it("runs the backend suite in a worker with two threads", async () => {
      await on(`${isolated.url}/built/index.html`, async (page) => {
        expect(await inWorker(page, "place")).toMatchObject({ isolated: true, page: false });
        const found = await inWorker<Cases>(page, "cases", 2);
        expectNoFailures(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
      });
    });

    it("trains in a worker with two threads, as Node does", async () => {
      await on(`${isolated.url}/built/index.html`, async (page) => {
        const found = await inWorker<Training>(page, "train", 2, STEPS);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
        expect(found.pieces).toBeGreaterThan(0);
        expect(found.steps).toEqual(found.losses.map((loss, step) => [step, loss]));
      });
    });

    it("trains in a worker on one thread, and says so, where the page is not isolated", async () => {
      await on(`${open.url}/built/index.html`, async (page) => {
        expect(await inWorker(page, "place")).toMatchObject({ isolated: false, page: false });
        const found = await inWorker<Training>(page, "train", 2, STEPS);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
        expect(found.note).toMatch(/^one thread: the page is not cross-origin isolated .*Cross-Origin-Opener-Policy/);
      });
    });

    it("trains on one thread, and says so, where a policy forbids the helpers", async () => {
      await on(
        `${strict.url}/built/index.html`,
        async (page) => {
          const found = await inWorker<Training>(page, "train", 2, STEPS);
          expectSameTraining(found);
          expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
          expect(found.note).toMatch(/^one thread: wasm: a worker did not start/);
        },
        /Content Security Policy/,
      );
    });

    it.each([true, false])("runs on the main thread alone, without waiting (isolated: %s)", async (isIsolated) => {
      await on(`${(isIsolated ? isolated : open).url}/built/index.html`, async (page) => {
        expect(await onMainThread<Place>(page, "place")).toEqual({ isolated: isIsolated, page: true });
        const found = await onMainThread<Training>(page, "train", 2, STEPS);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
        expect(found.note).toMatch(
          isIsolated ? /^one thread: .* main thread .* runInWorker/ : /^one thread: .* isolated/,
        );
      });
    });

    it("loads every subpath of every package, and refuses files in words", async () => {
      await on(`${open.url}/built/index.html`, async (page) => {
        expectEverything(await everything(page));
        expect(await onMainThread(page, "readFile")).toMatch(
          /^UnsupportedError: files are read and written in Node only/,
        );
      });
    });
  });

  describe("served by Vite's development server", () => {
    it("trains in a worker with two threads, as Node does", async () => {
      const { createServer } = await import("vite");
      const server = await createServer({
        root: project.folder,
        configFile: false,
        logLevel: "silent",
        // The headers are what threads need; everything else is as it comes.
        server: { host: "127.0.0.1", port: 0, headers: isolation },
      });
      try {
        await server.listen();
        const url = server.resolvedUrls?.local[0] ?? "";
        const found = await on(url, (page) => inWorker<Training>(page, "train", 2, STEPS));
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
      } finally {
        await server.close();
      }
    });
  });

  describe("as plain modules", () => {
    it("runs on the main thread of a page with an import map", async () => {
      await on(`${open.url}/map/index.html`, async (page) => {
        expectEverything(await everything(page));
        expectNoFailures(await onMainThread<Cases>(page, "cases", 1));
        const found = await onMainThread<Training>(page, "train", 1, STEPS);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, note: "", waits: 0 });
      });
    });

    it("says that an import map does not reach a worker", async () => {
      const message = on(`${isolated.url}/map/index.html`, (page) => inWorker(page, "place"));
      await expect(message).rejects.toThrow(/the worker failed: .*import map/);
    });

    it("runs in a worker with two threads where modules are imported by URL", async () => {
      await on(`${isolated.url}/urls/index.html`, async (page) => {
        const found = await inWorker<Training>(page, "train", 2, STEPS);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
        expect(found.pieces).toBeGreaterThan(0);
      });
    });
  });

  it("no page asked for a file that is not there", () => {
    expect([...isolated.missing, ...open.missing, ...strict.missing]).toEqual([]);
  });
});
