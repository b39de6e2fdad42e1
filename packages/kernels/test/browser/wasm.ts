// The wasm backend in a browser: bundled by Vite, served by Vite's development server, as plain modules with an import map and by
// URL; in a worker with and without threads, and on a page's main thread. To the last digits what Node computes.
import type { Page } from "playwright-core";
import { describe, expect, it } from "vitest";
import { isolation } from "./server.ts";
import {
  type Cases,
  everything,
  expectNoFailures,
  inWorker,
  onMainThread,
  on as onPage,
  type Site,
  STEPS,
  type Training,
} from "./site.ts";

interface Place {
  readonly isolated: boolean;
  readonly page: boolean;
}

/** Tests; `site` answers once the tests run. */
export function wasmTests(site: () => Site): void {
  const on = <R>(url: string, use: (page: Page) => Promise<R>, expected?: RegExp): Promise<R> =>
    onPage(site().browser, url, use, expected);
  const train = (page: Page): Promise<Training> => inWorker(page, "train", "wasm", { threads: 2, steps: STEPS });

  function expectSameTraining(found: Training): void {
    const { node } = site();
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
  /** Every subpath has at least one export. */
  function expectEverything(counts: Readonly<Record<string, number>>): void {
    expect(Object.keys(counts)).toEqual(site().project.modules.map(({ specifier }) => specifier));
    expect(Object.entries(counts).filter(([, count]) => count === 0)).toEqual([]);
  }

  it("Node, for comparison, learns", () => {
    const { node } = site();
    expect(node.losses[0]).toBeCloseTo(Math.log(40), 0);
    expect(node.losses.at(-1)).toBeLessThan((node.losses[0] ?? 0) - 0.5);
    expect(node).toMatchObject({ threads: 1, live: 0, grown: 0, leaked: 0 });
  });

  describe("bundled by Vite", () => {
    const built = (origin: "isolated" | "open" | "strict"): string => `${site()[origin].url}/built/index.html`;

    it("runs the backend suite in a worker with two threads", async () => {
      await on(built("isolated"), async (page) => {
        expect(await inWorker(page, "place")).toMatchObject({ isolated: true, page: false });
        const found = await inWorker<Cases>(page, "cases", "wasm", { threads: 2 });
        expectNoFailures(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
      });
    });

    it("trains in a worker with two threads, as Node does", async () => {
      await on(built("isolated"), async (page) => {
        const found = await train(page);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
        expect(found.pieces).toBeGreaterThan(0);
        expect(found.steps).toEqual(found.losses.map((loss, step) => [step, loss]));
      });
    });

    it("trains in a worker on one thread, and says so, where the page is not isolated", async () => {
      await on(built("open"), async (page) => {
        expect(await inWorker(page, "place")).toMatchObject({ isolated: false, page: false });
        const found = await train(page);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
        expect(found.note).toMatch(/^one thread: the page is not cross-origin isolated .*Cross-Origin-Opener-Policy/);
      });
    });

    it("trains on one thread, and says so, where a policy forbids the helpers", async () => {
      await on(
        built("strict"),
        async (page) => {
          const found = await train(page);
          expectSameTraining(found);
          expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
          expect(found.note).toMatch(/^one thread: wasm: a worker did not start/);
        },
        /Content Security Policy/,
      );
    });

    it.each([true, false])("runs on the main thread alone, without waiting (isolated: %s)", async (isIsolated) => {
      await on(built(isIsolated ? "isolated" : "open"), async (page) => {
        expect(await onMainThread<Place>(page, "place")).toEqual({ isolated: isIsolated, page: true });
        const found = await onMainThread<Training>(page, "train", "wasm", { threads: 2, steps: STEPS });
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, waits: 0, pieces: 0 });
        expect(found.note).toMatch(
          isIsolated ? /^one thread: .* main thread .* runInWorker/ : /^one thread: .* isolated/,
        );
      });
    });

    it("loads every subpath of every package, and refuses files in words", async () => {
      await on(built("open"), async (page) => {
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
        root: site().project.folder,
        configFile: false,
        logLevel: "silent",
        // The headers are what threads need; everything else is as it comes.
        server: { host: "127.0.0.1", port: 0, headers: isolation },
      });
      try {
        await server.listen();
        const found = await on(server.resolvedUrls?.local[0] ?? "", train);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
      } finally {
        await server.close();
      }
    });
  });

  describe("as plain modules", () => {
    it("runs on the main thread of a page with an import map", async () => {
      await on(`${site().open.url}/map/index.html`, async (page) => {
        expectEverything(await everything(page));
        expectNoFailures(await onMainThread<Cases>(page, "cases", "wasm", { threads: 1 }));
        const found = await onMainThread<Training>(page, "train", "wasm", { threads: 1, steps: STEPS });
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 1, note: "", waits: 0 });
      });
    });

    it("says that an import map does not reach a worker", async () => {
      const message = on(`${site().isolated.url}/map/index.html`, (page) => inWorker(page, "place"));
      await expect(message).rejects.toThrow(/the worker failed: .*import map/);
    });

    it("runs in a worker with two threads where modules are imported by URL", async () => {
      await on(`${site().isolated.url}/urls/index.html`, async (page) => {
        const found = await train(page);
        expectSameTraining(found);
        expect(found).toMatchObject({ threads: 2, note: "" });
        expect(found.pieces).toBeGreaterThan(0);
      });
    });
  });
}
