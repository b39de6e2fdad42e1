// OLMoE: our own export of the recorded checkpoint, options that it does not show against naive loops, class defaults, refusals.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { cast, type Engine, type Json, mapTree, type Tree } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../checkpoint.ts";
import type { LanguageModel, ReadModelOptions } from "../model.ts";
import { loadSaved, loudModel, makeEngine, readAll, smallConfig } from "../models.test-util.ts";
import {
  anyIndex,
  expectNaive,
  type NaiveDecoder,
  type NaiveMoE,
  naiveGelu,
  naiveRopes,
  naiveTopK,
  without,
} from "../naive-decoder.test-util.ts";
import { saveModel } from "../pretrained.ts";
import { asTransformer, type Transformer } from "../transformer.ts";
import { leaf } from "../tree.ts";
import { olmoe, olmoeRefusal, writeOlmoe } from "./olmoe.ts";

const fixture = fileURLToPath(new URL("../../test/fixtures/olmoe", import.meta.url));
let on: Engine;
let model: Transformer;
let close: () => Promise<void>;
let folder: string;
beforeAll(async () => {
  on = makeEngine();
  ({ model, close } = await loadSaved(fixture, { engine: on }));
  folder = await mkdtemp(join(tmpdir(), "switchyard-olmoe-"));
});
afterAll(async () => {
  await close();
  await rm(folder, { recursive: true, force: true });
});

describe("export", () => {
  it("writes the names and shapes of the Hub, and the bytes that were read", async () => {
    const target = join(folder, "again");
    expect(await saveModel(model, target)).toBe("olmoe");
    const [before, after] = [await openCheckpoint(fixture), await openCheckpoint(target)];
    expect([...after.names].sort()).toEqual([...before.names].sort());
    for (const name of before.names) {
      expect(after.stored(name)).toEqual(before.stored(name));
      expect(await after.read(name)).toEqual(await before.read(name));
    }
    const { transformers_version: _, ...config } = before.config;
    // Ids of special tokens belong to the tokenizer, and there is none here.
    const own = { bos_token_id: null, eos_token_id: null, pad_token_id: null, router_z_loss_coef: 0.001 };
    expect(after.config).toEqual({ ...config, ...own });
    await Promise.all([before.close(), after.close()]);
  });

  it.each([
    ["separate embeddings", {}],
    [
      "tied embeddings, clipped, renormalised",
      { tieEmbeddings: true, clipQkv: 0.5, router: topK({ k: 3, balance: 0.5, zLoss: 0 }) },
    ],
  ])("gives the same logits after reloading, bit for bit: %s", async (name, change) => {
    const config = {
      ...smallConfig,
      headSize: 2,
      qkNorm: "projection",
      router: topK({ k: 2, order: "softmax-topk" }),
    } as const;
    const original = loudModel(on, { ...config, ...change });
    await saveModel(original, join(folder, name));
    const { model: reloaded, close: closeIt } = await loadSaved(join(folder, name), { engine: on });
    const { router: a, ...rest } = original.config;
    const { router: b, ...same } = reloaded.config;
    expect(same).toEqual(rest);
    expect(b.options).toEqual(a.options);
    const ids = on.tensor(Int32Array.of(1, 2, 3, 4, 5, 6), [2, 3]);
    const run = async (m: Transformer) => Array.from(await m.forward(m.params, ids).logits.data());
    expect(await run(reloaded)).toEqual(await run(original));
    expect(await readAll(reloaded.params as Tree)).toEqual(await readAll(original.params as Tree));
    await closeIt();
  });

  it("keeps matrices that were read as bf16 or f16 in their type", async () => {
    const original = loudModel(on, { ...smallConfig, headSize: 2, qkNorm: "projection", router: topK({ k: 2 }) });
    for (const [dtype, file, named] of [
      ["bf16", "BF16", "bfloat16"],
      ["f16", "F16", "float16"],
    ] as const) {
      const params = mapTree(original.params, (x) => (x.shape.length > 1 ? on.scope(() => cast(x, dtype)) : x));
      const { config, tensors } = writeOlmoe({ ...original, params });
      expect(config.torch_dtype).toBe(named);
      for (const { name, shape, dtype: stored, bytes } of tensors) {
        const matrix = shape.length > 1;
        expect([name, stored]).toEqual([name, matrix ? file : "F32"]);
        const content = (await bytes()) as Uint8Array;
        expect(content.byteLength).toBe(shape.reduce((n, d) => n * d, matrix ? 2 : 4));
      }
      const down = leaf(params, "layers", 1, "moe", "experts", "down"); // [5, 8, 7]
      const last = tensors.find(({ name }) => name === "model.layers.1.mlp.experts.4.down_proj.weight");
      expect(await last?.bytes()).toEqual(new Uint8Array((await down.data()).buffer).slice(4 * 56 * 2));
    }
  });

  it("does not write experts that are elsewhere, nor weights in codes", async () => {
    const checkpoint = await openCheckpoint(fixture);
    const { streamed, ...streaming } = asTransformer(await olmoe.read(checkpoint, on, { memory: 1.2e6 }));
    expect(streamed).toBeDefined();
    expect(olmoeRefusal({ ...streaming, ...(streamed ? { streamed } : {}) })).toMatch(
      /load it without a limit of memory/,
    );
    await checkpoint.close();
    const codes = {
      "int8/4": { codes: on.tensor(new Uint8Array(8), [1, 8]), scales: on.tensor(new Float32Array(2), [1, 2]) },
    };
    const { params } = model;
    expect(olmoeRefusal({ ...model, params: { ...(params as object), head: codes } })).toMatch(
      /quantised; load it with weights: "f32"/,
    );
  });

  const form = { ...smallConfig, headSize: 2, qkNorm: "projection" as const };
  it.each([
    [{ ...form, router: topK({ k: 1, order: "sigmoid" }) }, /order sigmoid/],
    [{ ...form, router: topK({ k: 2, topP: 0.5 }) }, /topP/],
    [{ ...form, router: topK({ k: 2, bias: true }) }, /bias/],
    [{ ...form, router: topK({ k: 2 }), qkNorm: "head" as const }, /train with qkNorm: "projection"/],
    [{ ...form, router: topK({ k: 2 }), headSize: 4 }, /heads \(4\) times headSize \(4\) is not width \(8\)/],
    [{ ...form, router: topK({ k: 2 }), sharedExperts: 1 }, /shared experts/],
    [form, /its router is plainTopK/],
  ])("names the reason why a model has another form", async (config, reason) => {
    const other = loudModel(on, config);
    expect(olmoeRefusal(other)).toMatch(reason);
    await expect(saveModel(other, join(folder, "refused"), { layout: "olmoe" })).rejects.toThrow(
      /cannot be saved in the OLMoE layout/,
    );
    await expect(openCheckpoint(join(folder, "refused"))).rejects.toThrow(/no config.json/);
  });
});

describe("reading", () => {
  /** The fixture with another config, and the error that reading it gives. */
  const readWith = async (change: Record<string, Json>, options: ReadModelOptions = {}): Promise<LanguageModel> => {
    const checkpoint = await openCheckpoint(fixture);
    try {
      const config = { ...checkpoint.config, ...change };
      return await olmoe.read({ ...checkpoint, config }, on, options);
    } finally {
      await checkpoint.close();
    }
  };
  it.each<[Record<string, Json>, RegExp]>([
    [{ hidden_act: "tanh" }, /"hidden_act" is "tanh"; supported are silu/],
    [{ attention_bias: true }, /"model.layers.0.self_attn.q_proj.bias"/],
    [{ rope_scaling: { type: "yarn" } }, /rope_scaling: "factor" is missing/],
    [{ rope_parameters: { rope_theta: 7000, rope_type: "coil" } }, /"rope_type" is "coil"; supported are/],
    [{ num_hidden_layers: "2" }, /"num_hidden_layers" is .*expected a whole number from 1/],
    [{ num_experts: 9 }, /"model.layers.0.mlp.gate.weight" is F32 \[8, 48\].*\[9, 48\]/],
    [{ num_experts: 7 }, /"model.layers.0.mlp.gate.weight" is F32 \[8, 48\].*\[7, 48\]/],
    [{ num_hidden_layers: 1 }, /holds \d+ tensors that its config.json does not call for/],
    [{ intermediate_size: 23 }, /is F32 \[24, 48\], but config.json asks for F32 \[23, 48\]/],
    [{ vocab_size: 300 }, /"model.embed_tokens.weight" is F32 \[256, 48\].*\[300, 48\]/],
    [{ clip_qkv: 0 }, /"clip_qkv" is 0, expected a number above 0 or null/],
    [{ sliding_window: 4 }, /"sliding_window" is "4", which this package cannot run/],
  ])("refuses %o and frees what was read", async (change, message) => {
    const live = on.live();
    await expect(readWith(change)).rejects.toThrow(message);
    expect(on.live()).toBe(live);
  });

  it("takes the rope settings of newer versions and the defaults of absent keys", async () => {
    const newer = await readWith({ rope_theta: null, rope_parameters: { rope_theta: 7000, rope_type: "default" } });
    expect(asTransformer(newer).config.ropeTheta).toBe(7000);
    expect(asTransformer(await readWith({ rms_norm_eps: null })).config.normEps).toBe(1e-5);
  });

  it("gives no config of ours to models with options that ours lacks", async () => {
    const stretched = await readWith({ rope_scaling: { rope_type: "linear", factor: 2 } });
    expect(() => asTransformer(stretched)).toThrow(/has no config of ours/);
    expect(() => asTransformer(stretched.with({}))).toThrow(/has no config of ours/);
  });

  it("respects a memory limit", async () => {
    await expect(readWith({}, { memory: 1000 })).rejects.toThrow(/needs .* of memory/);
  });

  it("has the defaults of the class", () => {
    const { blueprint } = olmoe.describe(anyIndex({ model_type: "olmoe" }));
    expect(blueprint).toMatchObject({ vocabulary: 50304, width: 2048, context: 4096, tieEmbeddings: false });
    expect(blueprint.norm).toEqual({ kind: "rms", eps: 1e-5 });
    expect(blueprint.layers.length).toBe(16);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 16, kvHeads: 16, headSize: 128, qkNorm: "projection", clip: undefined });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e4 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 64, hidden: 2048 });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 8, order: "softmax-topk", balance: 0.01, zLoss: 0.001 });
  });
});

describe("olmoe equals the formulas", () => {
  const base = {
    model_type: "olmoe",
    vocab_size: 17,
    hidden_size: 8,
    intermediate_size: 5,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_experts: 5,
    num_experts_per_tok: 2,
    max_position_embeddings: 40,
    rms_norm_eps: 0.01,
    rope_theta: 50,
  } satisfies Record<string, Json>;
  const moe = (layer: number): NaiveMoE => ({
    experts: 5,
    hidden: 5,
    router: `model.layers.${layer}.mlp.gate.weight`,
    layout: { prefix: `model.layers.${layer}.mlp.experts`, names: ["gate_proj", "up_proj", "down_proj"] },
    route: naiveTopK(2, false),
  });
  const decoder: NaiveDecoder = {
    vocabulary: 17,
    width: 8,
    layers: 2,
    heads: 4,
    kvHeads: 4,
    headSize: 2,
    eps: 0.01,
    qkNorm: "projection",
    rope: naiveRopes.plain(2, 50),
    feedForward: moe,
  };
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["weights as they are, which is the default", {}, {}],
    [
      "norm_topk_prob",
      { norm_topk_prob: true },
      { feedForward: (layer) => ({ ...moe(layer), route: naiveTopK(2, true) }) },
    ],
    ["clip_qkv", { clip_qkv: 0.4 }, { clip: 0.4 }],
    ["fewer heads of keys, each part normalised over its own size", { num_key_value_heads: 2 }, { kvHeads: 2 }],
    [
      "head_dim and clip_qkv",
      { head_dim: 6, clip_qkv: 0.7 },
      { headSize: 6, rope: naiveRopes.plain(6, 50), clip: 0.7 },
    ],
    ["biases, before the norm", { attention_bias: true }, { qkvBias: true, outputBias: true }],
    ["tied embeddings", { tie_word_embeddings: true }, { tied: true }],
    ["linear rope", { rope_scaling: { type: "linear", factor: 3 } }, { rope: naiveRopes.linear(2, 50, 3) }],
    ["gelu_new", { hidden_act: "gelu_new" }, { activation: naiveGelu }],
    [
      "experts stacked",
      {},
      {
        feedForward: (layer) => {
          const experts = `model.layers.${layer}.mlp.experts`;
          return { ...moe(layer), layout: { gateUp: `${experts}.gate_up_proj`, down: `${experts}.down_proj` } };
        },
      },
    ],
  ])("%s", async (_, change, naive) => {
    await expectNaive(olmoe, { ...base, ...change }, { ...decoder, ...naive }, { unlike: without(decoder, naive) });
  });
});
