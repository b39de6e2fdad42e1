// Checkpoints with recorded outputs in a browser, on the wasm backend in a worker with two threads and on our WebGPU kernels: from files
// that were chosen on the page, over HTTP ranges, and from the origin private file system. Every recorded tensor of the first prompt within the tolerances of golden.json; chosen
// experts and greedy tokens exactly.
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Page } from "playwright-core";
import { describe, expect, it } from "vitest";
import { type Facts, fixtures, inWorker, onMainThread, on as onPage, type Site, withChosenFiles } from "./site.ts";

const folders = readdirSync(fixtures, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map(({ name }) => name);

interface Recorded {
  readonly tolerance: { readonly [name: string]: number };
  readonly prompts: readonly { readonly input_ids: readonly number[]; readonly greedy_ids: readonly number[] }[];
}
interface Answer extends Facts {
  readonly results: readonly {
    readonly tensors: readonly (readonly [name: string, values: readonly number[]])[];
    readonly cached: readonly number[];
    readonly recomputed: readonly number[];
    readonly streaming: { readonly hits: number; readonly requests: number; readonly bytesRead: number } | null;
  }[];
}

const goldenOf = (folder: string): Recorded => JSON.parse(readFileSync(join(fixtures, folder, "golden.json"), "utf8"));

/** The recorded tensors of the first prompt, read without the package under test. */
function recordedOf(folder: string): Map<string, ArrayLike<number>> {
  const { buffer } = Uint8Array.from(readFileSync(join(fixtures, folder, "golden.safetensors")));
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  type Header = Record<string, { readonly dtype: string; readonly data_offsets: readonly [number, number] }>;
  const { __metadata__: _, ...header }: Header = JSON.parse(new TextDecoder().decode(buffer.slice(8, 8 + length)));
  return new Map(
    Object.entries(header)
      .filter(([name]) => name.startsWith("prompt0.") && !name.endsWith(".greedy_logits"))
      .map(([name, { dtype, data_offsets: offsets }]) => {
        const bytes = buffer.slice(...(offsets.map((at) => 8 + length + at) as [number, number]));
        return [name.slice("prompt0.".length), dtype === "I32" ? new Int32Array(bytes) : new Float32Array(bytes)];
      }),
  );
}

/** The bound of a tensor by its name; ids are equal or not. */
function allowed(name: string, { tolerance }: Recorded): number {
  if (name.endsWith("topk_indices")) return 0;
  const kind = { router_logits: "router_logits", topk_weights: "topk_weights", logits: "logits" }[
    name.split(".").at(-1) ?? ""
  ];
  return tolerance[`${kind ?? "hidden"}_max_abs`] ?? 0;
}

function expectRecorded(folder: string, found: Answer["results"][number] | undefined, greedy: number): void {
  const golden = goldenOf(folder);
  const recorded = recordedOf(folder);
  const tensors = new Map(found?.tensors);
  expect([...tensors.keys()].sort(), folder).toEqual([...recorded.keys()].sort());
  for (const [name, expected] of recorded) {
    const own = tensors.get(name) ?? [];
    expect(own.length, `${folder}: ${name}`).toBe(expected.length);
    const apart = own.reduce((most, x, i) => Math.max(most, Math.abs(x - (expected[i] ?? Number.NaN))), 0);
    expect(apart, `${folder}: ${name}`).toBeLessThanOrEqual(allowed(name, golden));
  }
  const tokens = golden.prompts[0]?.greedy_ids.slice(0, greedy);
  expect([found?.cached, found?.recomputed], folder).toEqual([tokens, tokens]);
}

/** Tests; `site` answers once the tests run. `needs` skips a test where the device is missing. */
export function goldenTests(site: () => Site): void {
  const on = <R>(use: (page: Page) => Promise<R>): Promise<R> =>
    // Asking for files that a checkpoint may have is no error.
    onPage(site().browser, `${site().isolated.url}/built/index.html`, use, /status of 404|WebGPU is experimental/);
  const requests = (greedy: number) =>
    folders.map((name) => ({
      url: `${site().isolated.url}/files/${name}/`,
      prompt: goldenOf(name).prompts[0]?.input_ids,
      greedy,
    }));
  function expectAll(name: string, answer: Answer, greedy: number): void {
    console.log(`${folders.length} checkpoints on ${name} in the browser: ${answer.seconds.toFixed(1)} s`);
    expect(answer.results).toHaveLength(folders.length);
    for (const [i, folder] of folders.entries()) expectRecorded(folder, answer.results[i], greedy);
    expect(answer).toMatchObject({ live: 0, leaked: 0 });
  }

  describe("recorded checkpoints", { timeout: 240_000 }, () => {
    it("are there", () => expect(folders.length).toBeGreaterThan(10));

    it("on wasm in a worker with two threads, from chosen files", async () => {
      const answer = await on((page) =>
        withChosenFiles<Answer>(page, folders, "worker", "wasm", { threads: 2 }, requests(16)),
      );
      expectAll("wasm, from files", answer, 16);
      expect(answer).toMatchObject({ threads: 2, note: "" });
    });

    it("on wasm in a worker with two threads, over HTTP ranges", async () => {
      const answer = await on((page) => inWorker<Answer>(page, "checkpoints", "wasm", { threads: 2 }, requests(16)));
      expectAll("wasm, over HTTP", answer, 16);
    });

    it("on wasm, from the origin private file system, with experts read when they are needed", async () => {
      const folder = "mixtral";
      const store = readdirSync(join(fixtures, folder)).filter((name) =>
        /^(config|model).*(json|safetensors)$/.test(name),
      );
      const [request] = requests(16).filter(({ url }) => url.endsWith(`/${folder}/`));
      const answer = await on((page) =>
        inWorker<Answer>(page, "checkpoints", "wasm", { threads: 2 }, [{ ...request, store, memory: 1_320_000 }]),
      );
      expectRecorded(folder, answer.results[0], 16);
      const { requests: asked = 0, hits = 0, bytesRead = 0 } = answer.results[0]?.streaming ?? {};
      expect(asked).toBeGreaterThan(hits);
      expect(bytesRead).toBeGreaterThan(0);
      expect(answer).toMatchObject({ live: 0, leaked: 0 });
    });

    it("on webgpu, from chosen files", async ({ skip }) => {
      skip(!(await on(hasWebgpu)), "Chromium has no webgpu here");
      const answer = await on((page) => withChosenFiles<Answer>(page, folders, "page", "webgpu", {}, requests(16)));
      expectAll("webgpu, from files", answer, 16);
    });

    it("on webgpu, over HTTP ranges", async ({ skip }) => {
      skip(!(await on(hasWebgpu)), "Chromium has no webgpu here");
      const answer = await on((page) => onMainThread<Answer>(page, "checkpoints", "webgpu", {}, requests(16)));
      expectAll("webgpu, over HTTP", answer, 16);
    });
  });
}

const hasWebgpu = (page: Page): Promise<boolean> =>
  page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
