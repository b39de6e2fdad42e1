// The built packages in a real browser. Skipped, with one printed reason, where no Chromium is found; SWITCHYARD_REQUIRE_GPU=1 (CI)
// makes that a failure.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { findChromium } from "./chromium.ts";
import { goldenTests } from "./golden.ts";
import { gpuTests } from "./gpu.ts";
import { build, openSite, type Site } from "./site.ts";
import { wasmTests } from "./wasm.ts";

const chromium = findChromium();
if (chromium === undefined) {
  const why = "no Chromium found; install one or set SWITCHYARD_CHROMIUM to its program";
  if (process.env.SWITCHYARD_REQUIRE_GPU === "1") throw new Error(`browser tests: ${why}`);
  console.warn(`browser tests skipped: ${why}`);
}

describe.skipIf(chromium === undefined)("in Chromium", () => {
  let opened: Site | undefined;
  const site = (): Site => {
    if (!opened) throw new Error("the browser did not start");
    return opened;
  };
  beforeAll(async () => {
    opened = await openSite(chromium ?? "");
    console.log(`browser tests: ${chromium}, version ${opened.browser.version()}`);
    // Not a word: a module of Node that was put outside, or code that cannot be split, would be a warning here.
    expect(await build(opened.project)).toBe("");
  }, 300_000);
  afterAll(() => opened?.close());

  wasmTests(site);
  goldenTests(site);
  gpuTests(chromium ?? "", site);

  it("no page asked for a file that is not there", () => {
    const { isolated, open, strict } = site();
    expect([...isolated.missing, ...open.missing, ...strict.missing]).toEqual([]);
  });
});
