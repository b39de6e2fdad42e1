// The other backends in a browser: our WebGPU kernels, TensorFlow.js and gpu.js. Each runs the backend suite and trains as Node's
// wasm backend does, to 1e-4; a WebGPU device that goes away ends a training with one clear error.
import type { Page } from "playwright-core";
import { beforeAll, describe, expect, it, type TestContext } from "vitest";
import {
  type Cases,
  expectNoFailures,
  inWorker,
  launch,
  onMainThread,
  on as onPage,
  type Site,
  STEPS,
  type Training,
  withPeers,
} from "./site.ts";

/** Which cases a backend runs, where all of them take too long; the reason is printed. */
interface Part {
  /** Each n-th. */
  readonly every: number;
  readonly reason: string;
}
interface Subject {
  readonly name: string;
  readonly needs: "webgpu" | "webgl2";
  /** What the backend says that it runs on. */
  readonly description: RegExp;
  readonly part?: Part;
}

const subjects: readonly Subject[] = [
  {
    name: "tfjs webgl",
    needs: "webgl2",
    description: /^webgl$/,
    part: { every: 13, reason: "on WebGL every shape is a program to compile, minutes for all of them" },
  },
  {
    name: "tfjs webgpu",
    needs: "webgpu",
    description: /^webgpu$/,
    part: { every: 3, reason: "a software driver takes most of a minute for all of them" },
  },
  { name: "gpu.js webgl2", needs: "webgl2", description: /^webgl2$/ },
  { name: "gpu.js webgpu", needs: "webgpu", description: /^webgpu$/ },
];

/** What Chromium says of itself, whatever the page does; the last, when its GPU process died. */
const chatter = /WebGPU is experimental on this platform|GPU stall due to ReadPixels|A valid external Instance/;
/** What libraries and Chromium say of a device that went away. */
const complaints = new RegExp(`${chatter.source}|CONTEXT_LOST|[Dd]evice (is|was) (lost|destroyed)|[Ll]ost`);
const patience = 300_000;
/** Steps where software drivers are slow. */
const FEW = 4;

interface Lost {
  readonly error?: { readonly device: boolean; readonly message: string };
  readonly again?: { readonly device: boolean; readonly message: string };
  /** Of the training that was resumed. */
  readonly losses?: readonly number[];
  readonly rejections: readonly string[];
}
interface Fit {
  readonly losses: readonly number[];
  /** Of the trained model, and of the saved and loaded one. */
  readonly predictions: readonly (readonly number[])[];
}

/** Equal to what two implementations of one arithmetic may differ by. */
function expectClose(found: readonly number[], expected: readonly number[]): void {
  expect(found).toHaveLength(expected.length);
  const differences = found.map((x, i) => Math.abs(x / (expected[i] ?? Number.NaN) - 1));
  expect(Math.max(...differences), `found ${found}, expected ${expected}`).toBeLessThan(1e-4);
}

/** Tests; `site` answers once the tests run. */
export function gpuTests(chromium: string, site: () => Site): void {
  const found = { webgpu: "", webgl2: "" };
  const url = (): string => `${site().open.url}/built/index.html`;
  const on = <R>(use: (page: Page) => Promise<R>, expected = chatter): Promise<R> =>
    onPage(site().browser, url(), use, expected);

  beforeAll(async () => {
    Object.assign(
      found,
      await on((page) =>
        page.evaluate(async () => {
          const adapter = await navigator.gpu?.requestAdapter();
          const gl = document.createElement("canvas").getContext("webgl2");
          return {
            webgpu: adapter ? `${adapter.info.vendor} ${adapter.info.architecture}` : "",
            webgl2: gl ? `${gl.getParameter(gl.RENDERER)}` : "",
          };
        }),
      ),
    );
    for (const [name, device] of Object.entries(found)) {
      const line = device || "none: the tests that need it are skipped";
      console.log(`browser tests: ${name}: ${line}`);
      if (!device && process.env.SWITCHYARD_REQUIRE_GPU === "1") {
        throw new Error(`browser tests: Chromium has no ${name} here, and SWITCHYARD_REQUIRE_GPU=1 asks for it`);
      }
    }
  });
  const needs = ({ skip }: TestContext, what: keyof typeof found): void =>
    skip(!found[what], `Chromium has no ${what} here`);

  const expectLosses = (losses: readonly number[], steps: number): void =>
    expectClose(losses, site().node.losses.slice(0, steps));
  function expectTraining(name: string, training: Training, steps: number): void {
    console.log(`${name} in the browser: ${steps} steps in ${training.seconds.toFixed(1)} s`);
    expectLosses(training.losses, steps);
    expect(training).toMatchObject({ live: 0, grown: 0, leaked: 0 });
  }
  function expectCases(name: string, cases: Cases, every = 1): void {
    console.log(`${name} in the browser: ${cases.count} of ${cases.of} cases in ${cases.seconds.toFixed(1)} s`);
    expectNoFailures(cases, every);
  }

  function expectLost({ error, again, rejections }: Lost, message: RegExp): void {
    expect(error?.message).toMatch(message);
    expect(again?.message).toMatch(message);
    expect([error?.device, again?.device, rejections]).toEqual([true, true, []]);
  }

  describe("webgpu", () => {
    it("runs the backend suite in a worker", { timeout: patience }, async (test) => {
      needs(test, "webgpu");
      const cases = await on((page) => inWorker<Cases>(page, "cases", "webgpu"));
      expectCases("webgpu", cases);
      expect(cases.description).not.toBe("");
    });

    for (const [where, call] of [["in a worker", inWorker] as const, ["on the main thread", onMainThread] as const]) {
      it(`trains ${where}, as Node does`, { timeout: patience }, async (test) => {
        needs(test, "webgpu");
        const training = await on((page) => call<Training>(page, "train", "webgpu", { steps: STEPS }));
        expectTraining("webgpu", training, STEPS);
        expectClose([training.evaluation], [site().node.evaluation]);
      });
    }

    it("ends a training whose device is destroyed, and resumes it on a new one", {
      timeout: patience,
    }, async (test) => {
      needs(test, "webgpu");
      const lost = await on(async (page) => {
        await onMainThread(page, "beginLosing", "webgpu", { steps: FEW, until: 2, lose: true });
        return onMainThread<Lost>(page, "endLosing");
      });
      expectLost(lost, /^DeviceError: webgpu: the device was lost \(destroyed.*recover\(\)/);
      expectLosses(lost.losses ?? [], FEW);
    });

    it("the same when the browser's GPU process dies", { timeout: patience }, async (test) => {
      needs(test, "webgpu");
      // In a browser of its own: the others share theirs.
      const browser = await launch(chromium);
      try {
        const training = async (page: Page): Promise<Lost> => {
          await onMainThread(page, "beginLosing", "webgpu", { steps: FEW, until: 2 });
          const debugging = await browser.newBrowserCDPSession();
          await debugging.send("Browser.crashGpuProcess");
          return onMainThread<Lost>(page, "endLosing");
        };
        const lost = await onPage(browser, url(), training, chatter);
        expectLost(lost, /^DeviceError: webgpu: the device was lost \(unknown.*recover\(\)/);
        expectLosses(lost.losses ?? [], FEW);
      } finally {
        await browser.close();
      }
    });
  });

  describe.each(subjects)("$name", ({ name, needs: what, description, part }) => {
    it("runs the backend suite", { timeout: patience }, async (test) => {
      needs(test, what);
      if (part) console.log(`${name} in the browser: one case in ${part.every}: ${part.reason}`);
      // Small as they are, the cases would otherwise run on the processor.
      const { every } = part ?? { every: 1 };
      const cases = await on((page) => withPeers<Cases>(page, "cases", name, { forward: false, every }));
      expectCases(name, cases, every);
      expect(cases.description).toMatch(description);
    });

    it("trains as Node does", { timeout: patience }, async (test) => {
      needs(test, what);
      const training = await on((page) => withPeers<Training>(page, "train", name, { steps: FEW }));
      expectTraining(name, training, FEW);
      expect(training.description).toMatch(description);
    });

    it("ends a training whose device goes away", { timeout: patience }, async (test) => {
      needs(test, what);
      const lost = await on(async (page) => {
        await withPeers(page, "beginLosing", name, { until: 1, lose: true });
        return withPeers<Lost>(page, "endLosing");
      }, complaints);
      expectLost(lost, /^DeviceError: /);
    });
  });

  for (const [name, what] of [["webgl", "webgl2"] as const, ["webgpu", "webgpu"] as const]) {
    it(`the layer for tf.layers trains on tfjs ${name} as on its cpu`, { timeout: patience }, async (test) => {
      needs(test, what);
      const results = await on(async (page) => [
        await withPeers<Fit>(page, "fit", "cpu"),
        await withPeers<Fit>(page, "fit", name),
      ]);
      const [expected, found] = results as [Fit, Fit];
      expect(expected.losses.at(-1)).toBeLessThan(0.9 * (expected.losses[0] ?? 0));
      expectClose(found.losses, expected.losses);
      expect(found.predictions[1]).toEqual(found.predictions[0]);
    });
  }
}
