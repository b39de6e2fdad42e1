// Qwen3-MoE: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  anyIndex,
  expectNaive,
  type NaiveDecoder,
  type NaiveMoE,
  naiveRopes,
  naiveTopK,
  without,
} from "../naive-decoder.test-util.ts";
import { qwen3Moe } from "./qwen3-moe.ts";

const base = {
  model_type: "qwen3_moe",
  vocab_size: 17,
  hidden_size: 8,
  intermediate_size: 9,
  moe_intermediate_size: 5,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 6,
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
  kvHeads: 2,
  headSize: 6,
  eps: 0.01,
  qkNorm: "head",
  rope: naiveRopes.plain(6, 50),
  feedForward: moe,
};

describe("qwen3_moe equals the formulas", () => {
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["weights as they are, which is the default", {}, {}],
    [
      "norm_topk_prob",
      { norm_topk_prob: true },
      { feedForward: (layer) => ({ ...moe(layer), route: naiveTopK(2, true) }) },
    ],
    ["head_dim absent", { head_dim: null }, { headSize: 2, rope: naiveRopes.plain(2, 50) }],
    ["attention_bias is also of the output", { attention_bias: true }, { qkvBias: true, outputBias: true }],
    ["a window for all layers", { use_sliding_window: true, sliding_window: 3 }, { window: () => 3 }],
    [
      "a window and max_window_layers, which the class does not read",
      { use_sliding_window: true, sliding_window: 3, max_window_layers: 1 },
      { window: () => 3 },
    ],
    ["a window that is not used", { use_sliding_window: false, sliding_window: 3 }, {}],
    ["a window of null", { use_sliding_window: true, sliding_window: null }, {}],
    [
      "layer_types that say the same",
      { use_sliding_window: true, sliding_window: 4, layer_types: ["sliding_attention", "sliding_attention"] },
      { window: () => 4 },
    ],
    [
      "a dense layer",
      { mlp_only_layers: [1] },
      { feedForward: (layer) => (layer === 1 ? { name: "model.layers.1.mlp", hidden: 9 } : moe(layer)) },
    ],
    [
      "a period",
      { decoder_sparse_step: 2 },
      { feedForward: (layer) => (layer === 0 ? { name: "model.layers.0.mlp", hidden: 9 } : moe(layer)) },
    ],
    ["num_local_experts", { num_experts: null, num_local_experts: 5 }, {}],
    ["tied embeddings", { tie_word_embeddings: true }, { tied: true }],
    [
      "yarn",
      { rope_scaling: { rope_type: "yarn", factor: 4, original_max_position_embeddings: 10 } },
      { rope: naiveRopes.yarn(6, 50, { factor: 4, original: 10 }) },
    ],
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
    await expectNaive(qwen3Moe, { ...base, ...change }, { ...decoder, ...naive }, { unlike: without(decoder, naive) });
  });
});

describe("qwen3_moe's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = qwen3Moe.describe(anyIndex({ model_type: "qwen3_moe" }));
    expect(blueprint).toMatchObject({ vocabulary: 151936, width: 2048, context: 32768, tieEmbeddings: false });
    expect(blueprint.norm).toEqual({ kind: "rms", eps: 1e-6 });
    expect(blueprint.layers.length).toBe(24);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 32, kvHeads: 4, headSize: 64, bias: false, window: undefined });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e4 ** (-2 / 64), 12);
    expect(feedForward).toMatchObject({ experts: 128, hidden: 768 });
    expect(feedForward).not.toHaveProperty("shared");
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 8, order: "softmax-topk", balance: 0.001 });
    const windowed = qwen3Moe.describe(anyIndex({ use_sliding_window: true, decoder_sparse_step: 2 })).blueprint;
    expect(windowed.layers[0]).toMatchObject({ attention: { window: 4096 }, feedForward: { hidden: 6144 } });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [
      { use_sliding_window: true, sliding_window: 3, layer_types: ["full_attention", "full_attention"] },
      /"layer_types" and "sliding_window" disagree about layer 0/,
    ],
    [{ layer_types: ["full_attention", "sliding_attention"] }, /disagree about layer 1/],
    [{ num_experts_per_tok: 6 }, /"num_experts_per_tok" is 6, but there are 5 experts/],
  ])("refuses %o", (change, message) => {
    expect(() => qwen3Moe.describe(anyIndex({ ...base, ...change }))).toThrow(message);
  });
});
