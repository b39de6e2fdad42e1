// Routers with tables by token id and RMoE's shared cell in a language model: the tables follow the model's vocabulary and
// counts, what layers share is trained, saved and loaded once.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { leaves, random, type Tensor, type Tree } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { base, daMoE, hash, maskMoE, rMoE } from "@switchyard/routers";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { openCheckpoint } from "./checkpoint.ts";
import { loadSaved, makeEngine, readAll, smallConfig } from "./models.test-util.ts";
import { parameterCounts } from "./parameter-counts.ts";
import { saveModel } from "./pretrained.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { transformer } from "./transformer.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => value(i, 1)),
  };
};
const tokenCounts = Float64Array.from({ length: 13 }, (_, id) => (id < 11 ? 100 - 7 * id : 0));
const config = { ...smallConfig, width: 16, headSize: 4, hidden: 8, tokenCounts };
const optimiser = () => adamw({ learningRate: 0.01 });
const unique = (tree: Tree): Set<Tensor> => new Set(leaves(tree).map(([, x]) => x));

let folder = "";
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-lookup-"));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const plugins: readonly [string, RouterPlugin][] = [
  ["hash", hash()],
  ["hash, balanced", hash({ table: "balanced" })],
  ["maskMoE", maskMoE({ k: 2, visible: 3 })],
  ["rMoE", rMoE({ k: 2, size: 6 })],
  ["daMoE", daMoE({ k: 3, asDecoded: true })],
  ["rMoE, rnn", rMoE({ k: 1, size: 6, cell: "rnn" })],
];
describe.each(plugins)("%s in a language model", (_, router) => {
  it("learns; saved and loaded it answers the same, and its tables are those it was trained with", async () => {
    const on = makeEngine();
    const model = transformer(on, { ...config, router }, random(on, 1));
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: optimiser(), clip: 1 });
    const { loss } = await run.step();
    const live = on.live();
    await run.run({ until: 25 });
    expect(on.live()).toBe(live);
    expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
    const trained = model.with({ params: run.params, buffers: run.buffers });
    expect(await saveModel(trained, folder)).toBe("switchyard");
    const { model: loaded } = await loadSaved(folder, { engine: on, routers: [router] });
    expect(await readAll(loaded.params)).toEqual(await readAll(trained.params));
    expect(await readAll(loaded.buffers)).toEqual(await readAll(trained.buffers));
    const counted = router.needs.includes("tokenIds");
    expect(loaded.config.tokenCounts).toEqual(counted ? tokenCounts : undefined);
    const ids = on.tensor(batch(3).ids, [2, 6]);
    const answer = async (one: typeof model): Promise<number[]> => [
      ...(await one.forward(one.params, ids).logits.data()),
    ];
    expect(await answer(loaded)).toEqual(await answer(trained));
  });
});

describe("tables by token id", () => {
  it("have an entry for every id of the model", () => {
    const on = makeEngine();
    const { tokenCounts: _, ...without } = config;
    const shapes = (router: RouterPlugin, of = config): string[] =>
      transformer(on, { ...of, router }, random(on, 1)).buffers.flatMap((tree) =>
        leaves(tree).map(([, x]) => x.shape.join()),
      );
    expect(shapes(hash(), without as typeof config)).toEqual(["13", "13"]);
    expect(shapes(hash({ vocabulary: 20 }))).toEqual(["20", "20"]);
    expect(shapes(maskMoE())).toEqual(["13,5", "13,5"]);
    expect(() => shapes(maskMoE(), without as typeof config)).toThrow("the option tokenCounts");
    expect(() => shapes(hash({ table: "balanced" }), without as typeof config)).toThrow("needs the token counts");
    expect(() => shapes(maskMoE(), { ...config, tokenCounts: new Float64Array(12) })).toThrow(
      "tokenCounts has 12 entries, expected one for each of 13 ids",
    );
  });
});

describe("RMoE's cell", () => {
  it("is one parameter set for all layers: counted, updated, snapshotted and saved once", async () => {
    const on = makeEngine();
    const router = rMoE({ k: 2, size: 6 });
    const model = transformer(on, { ...config, layers: 3, router }, random(on, 1));
    const cells = (tree: Tree): [string, Tensor][] => leaves(tree).filter(([path]) => path.includes(".router.cell."));
    expect(cells(model.params)).toHaveLength(12);
    expect(unique(cells(model.params).map(([, x]) => x)).size).toBe(4);
    const own = 3 * (6 * 16 + 5 * 6) + 6 * 6 * 6 + 6 * 6;
    expect(parameterCounts({ ...config, layers: 3, router }).routers).toBe(own);

    const start = await readAll(model.params);
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: optimiser() });
    await run.step();
    expect(unique(cells(run.params).map(([, x]) => x)).size).toBe(4);
    for (const [path, x] of cells(run.params)) {
      // Adam's first step moves every entry that has a gradient by the learning rate: twice would be twice as far.
      const moved = Array.from(await x.data(), (value, i) => Math.abs(value - (start.get(path)?.[i] ?? Number.NaN)));
      expect(Math.max(...moved), path).toBeGreaterThan(0.009);
      expect(Math.max(...moved), path).toBeLessThan(0.0105);
    }
    const { arrays } = await run.snapshot();
    const names = (list: readonly string[], prefix: string): string[] =>
      list.filter((name) => name.startsWith(prefix) && name.includes(".router.cell."));
    expect(names(Object.keys(arrays), "params.")).toHaveLength(4);
    await saveModel(model.with({ params: run.params, buffers: run.buffers }), folder);
    const checkpoint = await openCheckpoint(folder);
    expect(names(checkpoint.names, "params.")).toHaveLength(4);
    await checkpoint.close();
    const { model: loaded } = await loadSaved(folder, { engine: on, routers: [router] });
    expect(unique(cells(loaded.params).map(([, x]) => x)).size).toBe(4);

    // A resumed run goes on with one cell and equals the uninterrupted one.
    const again = transformer(on, { ...config, layers: 3, router }, random(on, 9));
    const resumed = trainer(on, languageModelTask(again, { batch }), { optimiser: optimiser() });
    resumed.restore(await run.snapshot());
    await run.step();
    await resumed.step();
    expect(await readAll(resumed.params)).toEqual(await readAll(run.params));
    expect(unique(cells(resumed.params).map(([, x]) => x)).size).toBe(4);
  });
});

describe("base in a language model", () => {
  it("looks ahead while training, and is refused unless that is wanted; then it learns", async () => {
    const on = makeEngine();
    const sizes = { ...config, router: base() };
    const refused = trainer(on, languageModelTask(transformer(on, sizes, random(on, 1)), { batch }), {
      optimiser: optimiser(),
    });
    await expect(refused.step()).rejects.toThrow("router base chooses experts by looking at later tokens");
    const model = transformer(on, { ...sizes, allowNonCausal: true }, random(on, 1));
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: optimiser(), clip: 1 });
    const { loss, loads } = await run.step();
    for (const load of loads) expect(Math.max(...load) - Math.min(...load)).toBeLessThanOrEqual(1);
    await run.run({ until: 25 });
    expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
  });
});
