// Saving and loading whole folders: our own layout with buffers and shared tensors, tokenizers, refusals, a save that
// fails.
import { mkdtemp, readdir, readFile, readlink, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { CheckpointError, type Engine, leaves, mul, type Tensor, type Tree } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { reMoE } from "@switchyard/routers/re-moe";
import { topK } from "@switchyard/routers/top-k";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { mixtral } from "./architectures/mixtral.ts";
import { openCheckpoint } from "./checkpoint.ts";
import { planMemory } from "./memory.ts";
import { loadSaved, loudModel, makeEngine, plainTopK, readAll, smallConfig } from "./models.test-util.ts";
import { loadModel, saveModel } from "./pretrained.ts";
import { tokenizer } from "./tokenizer.ts";
import { trainTokenizer } from "./tokenizer-training.ts";
import type { Transformer } from "./transformer.ts";
import type { TransformerConfig } from "./transformer-config.ts";

let folder = "";
let on: Engine;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "switchyard-pretrained-"));
  on = makeEngine();
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const logitsOf = async (model: Transformer): Promise<number[]> => {
  const ids = on.tensor(Int32Array.of(1, 2, 3, 4, 5, 6), [2, 3]);
  return Array.from(await model.forward(model.params, ids).logits.data());
};

describe("our own layout", () => {
  it("keeps a router's parameters and trained buffers, bit for bit", async () => {
    const config: TransformerConfig = {
      ...smallConfig,
      router: reMoE({ k: 2 }),
      sharedExperts: 1,
      tieEmbeddings: true,
      qkNorm: "head",
    };
    const fresh = loudModel(on, config);
    const buffers = fresh.buffers.map((tree, layer) => scaled(tree, layer + 2));
    const original = fresh.with({ buffers });
    expect(leaves(original.buffers).length).toBeGreaterThan(0);
    expect(await saveModel(original, folder)).toBe("switchyard");
    const { model, tokenizer: none } = await loadSaved(folder, {
      engine: on,
      routers: [topK({ k: 1 }), reMoE({ k: 2 })],
    });
    expect(none).toBeUndefined();
    expect(await logitsOf(model)).toEqual(await logitsOf(original));
    expect(await readAll(model.params)).toEqual(await readAll(original.params));
    expect(await readAll(model.buffers)).toEqual(await readAll(original.buffers));
    // A trainer takes buffers from the routers.
    expect(model.routers.map(({ buffers: own }) => own)).toEqual(model.buffers);
    const { router: _, ...sizes } = original.config;
    expect(model.config).toMatchObject(sizes);
  });

  it("writes a tensor that layers share once and shares it again after loading", async () => {
    const router: RouterPlugin = {
      ...plainTopK(2),
      name: "sharing",
      init(context) {
        const inner = plainTopK(2).init(context);
        const weight = context.shared("weight", () => (inner.params as { weight: Tensor }).weight);
        const count = context.shared("count", () => context.engine.tensor(Int32Array.of(context.layer), [1]));
        return { ...inner, params: { weight }, buffers: { count } };
      },
    };
    const { transformer } = await import("./transformer.ts");
    const { random } = await import("@switchyard/core");
    const original = transformer(on, { ...smallConfig, router }, random(on, 4));
    await saveModel(original, folder);
    const checkpoint = await openCheckpoint(folder);
    expect(checkpoint.names.filter((name) => /router|buffers/.test(name))).toEqual([
      "params.layers.0.moe.router.weight",
      "buffers.0.count",
    ]);
    expect(checkpoint.stored("buffers.0.count").dtype).toBe("I32");
    await checkpoint.close();
    const live = on.live();
    const { model } = await loadSaved(folder, { engine: on, routers: [router] });
    const found = new Map(leaves(model.params));
    expect(found.get("layers.1.moe.router.weight")).toBe(found.get("layers.0.moe.router.weight"));
    expect(await logitsOf(model)).toEqual(await logitsOf(original));
    // Nothing of the routers' own first tensors is left.
    const unique = new Set([...leaves(model.params), ...leaves(model.buffers)].map(([, x]) => x));
    expect(on.live() - live).toBeGreaterThanOrEqual(unique.size);
    for (const x of unique) x.dispose();
  });

  it("asks for the router it needs, with its options", async () => {
    await saveModel(loudModel(on, smallConfig), folder);
    const load = (routers: RouterPlugin[], otherOptions = false) =>
      loadSaved(folder, { engine: on, routers, otherOptions });
    await expect(load([])).rejects.toThrow(/needs the router plainTopK\(\{"k":2\}\); passed: none/);
    await expect(load([topK({ k: 2 })])).rejects.toThrow(/passed: topK\(/);
    await expect(load([plainTopK(3)])).rejects.toThrow(
      /saved with plainTopK\(\{"k":2\}\); passed: plainTopK\(\{"k":3\}\)/,
    );
    expect((await load([plainTopK(3)], true)).model.config.router.options).toEqual({ k: 3 });
    expect((await load([plainTopK(3), plainTopK(2)])).model.config.router.options).toEqual({ k: 2 });
  });

  it.each([
    ["another format", { format: 2 }, /format is 2, this version reads 1/],
    ["a size that does not fit the weights", { width: 16 }, /but config.json asks for|headSize/],
    ["a size that is no number", { layers: null }, /"layers" is missing, expected a whole number/],
    ["a negative size", { experts: -1 }, /"experts" is .*-1/],
    ["no router", { router: null }, /router is missing/],
    ["an unknown norm", { qkNorm: "both" }, /qkNorm is "both"/],
    ["fewer layers than weights", { layers: 1 }, /does not call for/],
    ["another family", { model_type: "llama" }, /model_type is "llama"; this version loads mixtral, .*switchyard$/],
  ])("refuses %s and frees what was read", async (_, change, message) => {
    await saveModel(loudModel(on, smallConfig), folder);
    const path = join(folder, "config.json");
    await writeFile(path, JSON.stringify({ ...JSON.parse(await readFile(path, "utf8")), ...change }));
    const live = on.live();
    const error: unknown = await loadSaved(folder, { engine: on, routers: [plainTopK(2)] }).catch((e: unknown) => e);
    expect(String(error)).toMatch(message);
    expect(on.live()).toBe(live);
  });

  it("refuses weights that are cut short", async () => {
    await saveModel(loudModel(on, smallConfig), folder);
    const path = join(folder, "model.safetensors");
    await writeFile(path, (await readFile(path)).subarray(0, -10));
    const load = loadSaved(folder, { engine: on, routers: [plainTopK(2)] });
    await expect(load).rejects.toThrow(/model.safetensors: .*cut short or damaged/);
    await expect(load).rejects.toSatisfy(CheckpointError.isInstance);
  });
});

const scaled = (tree: Tree, by: number): Tree => {
  if ("dtype" in tree) return mul(tree as Tensor, by);
  if (Array.isArray(tree)) return tree.map((child: Tree) => scaled(child, by));
  return Object.fromEntries(Object.entries(tree).map(([key, child]) => [key, scaled(child as Tree, by)]));
};

describe("folders", () => {
  const olmoeForm = {
    ...smallConfig,
    headSize: 2,
    qkNorm: "projection",
    router: topK({ k: 2 }),
    vocabulary: 300,
  } as const;

  it("hold the tokenizer and its special ids", async () => {
    const words = tokenizer(await trainTokenizer(["the cat sat on the mat"], { vocabulary: 270 }));
    const original = loudModel(on, olmoeForm);
    expect(await saveModel(original, folder, { tokenizer: words })).toBe("olmoe");
    expect((await readdir(folder)).sort()).toEqual([
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "tokenizer.json",
      "tokenizer_config.json",
    ]);
    const json = async (name: string) => JSON.parse(await readFile(join(folder, name), "utf8"));
    expect(await json("config.json")).toMatchObject({
      architectures: ["OlmoeForCausalLM"],
      bos_token_id: 0,
      eos_token_id: 0,
    });
    expect(await json("generation_config.json")).toMatchObject({ eos_token_id: 0 });
    expect(await json("tokenizer_config.json")).toMatchObject({ model_max_length: 12, eos_token: "<|endoftext|>" });
    const loaded = await loadSaved(folder, { engine: on });
    expect(loaded.tokenizer?.encode("the mat")).toEqual(words.encode("the mat"));
  });

  it("never hold two saves at once: a later one replaces all files of the earlier, and nothing else", async () => {
    const words = tokenizer(await trainTokenizer(["abab"], { vocabulary: 258 }));
    await saveModel(loudModel(on, olmoeForm), folder, { tokenizer: words });
    await writeFile(join(folder, "notes.txt"), "mine");
    await writeFile(join(folder, "model-00001-of-00002.safetensors"), "old shard");
    const later = loudModel(on, smallConfig);
    await saveModel(later, folder);
    expect((await readdir(folder)).sort()).toEqual([
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "notes.txt",
    ]);
    const { model } = await loadSaved(folder, { engine: on, routers: [plainTopK(2)] });
    expect(await logitsOf(model)).toEqual(await logitsOf(later));
  });

  it("keep the earlier model when a save fails", async () => {
    const first = loudModel(on, smallConfig);
    await saveModel(first, folder);
    const expected = await logitsOf(first);
    const names = await readdir(folder);
    const second = loudModel(on, { ...smallConfig, layers: 3 });
    // One parameter is gone when its turn comes.
    for (const [path, x] of leaves(second.params)) if (path === "norm") x.dispose();
    await expect(saveModel(second, folder)).rejects.toThrow(/cannot save to .*nothing was changed/);
    expect(await readdir(folder)).toEqual(names);
    const { model } = await loadSaved(folder, { engine: on, routers: [plainTopK(2)] });
    expect(await logitsOf(model)).toEqual(expected);
  });

  it("refuse a tokenizer of another model", async () => {
    const words = tokenizer(await trainTokenizer(["abab"], { vocabulary: 258 }));
    await expect(saveModel(loudModel(on, smallConfig), folder, { tokenizer: words })).rejects.toThrow(
      /the tokenizer has 258 ids, the model only 13/,
    );
    expect(await readdir(folder)).toEqual([]);
  });
});

describe.skipIf(process.platform !== "linux")("files of a checkpoint", () => {
  const path = fileURLToPath(new URL("../test/fixtures/mixtral", import.meta.url));
  const open = async (): Promise<number> => {
    const handles = await readdir("/proc/self/fd");
    const targets = await Promise.all(handles.map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => "")));
    return targets.filter((target) => target.startsWith(path)).length;
  };

  it("stay open only for experts that are streamed, until the model is closed", async () => {
    const resident = await loadModel(path, { engine: on });
    expect(await open()).toBe(0);
    await resident.close();
    const checkpoint = await openCheckpoint(path);
    const { least: memory } = planMemory(on, checkpoint, mixtral.describe(checkpoint));
    await checkpoint.close();
    const streamed = await loadModel(path, { engine: on, memory });
    expect(streamed.model.streamed).toBeDefined();
    expect(await open()).toBeGreaterThan(0);
    await streamed.close();
    expect(await open()).toBe(0);
    await expect(loadModel(path, { engine: on, memory: 1 })).rejects.toThrow(/needs .* of memory/);
    expect(await open()).toBe(0);
    expect(on.live()).toBe(0);
  });
});
