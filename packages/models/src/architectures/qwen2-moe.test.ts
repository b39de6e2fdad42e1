// Qwen2-MoE: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  anyIndex,
  expectNaive,
  type NaiveDecoder,
  type NaiveDense,
  type NaiveMoE,
  naiveRopes,
  naiveTopK,
  without,
} from "../naive-decoder.test-util.ts";
import { qwen2Moe } from "./qwen2-moe.ts";

const base = {
  model_type: "qwen2_moe",
  vocab_size: 17,
  hidden_size: 8,
  intermediate_size: 9,
  moe_intermediate_size: 5,
  shared_expert_intermediate_size: 7,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  num_experts: 5,
  num_experts_per_tok: 2,
  max_position_embeddings: 40,
  rms_norm_eps: 0.01,
  rope_theta: 50,
} satisfies Record<string, Json>;

const name = (layer: number): string => `model.layers.${layer}.mlp`;
const moe = (layer: number): NaiveMoE => ({
  experts: 5,
  hidden: 5,
  router: `${name(layer)}.gate.weight`,
  layout: { prefix: `${name(layer)}.experts`, names: ["gate_proj", "up_proj", "down_proj"] },
  route: naiveTopK(2, false),
  shared: { name: `${name(layer)}.shared_expert`, hidden: 7, gate: `${name(layer)}.shared_expert_gate.weight` },
});
const dense = (layer: number): NaiveDense => ({ name: name(layer), hidden: 9 });
const decoder: NaiveDecoder = {
  vocabulary: 17,
  width: 8,
  layers: 3,
  heads: 4,
  kvHeads: 2,
  headSize: 2,
  eps: 0.01,
  qkvBias: true,
  rope: naiveRopes.plain(2, 50),
  feedForward: moe,
};
const denseIn = (...layers: readonly number[]): Pick<NaiveDecoder, "feedForward"> => ({
  feedForward: (layer) => (layers.includes(layer) ? dense(layer) : moe(layer)),
});

describe("qwen2_moe equals the formulas", () => {
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["biases by default, weights as they are", {}, {}],
    ["no biases", { qkv_bias: false }, { qkvBias: false }],
    [
      "norm_topk_prob",
      { norm_topk_prob: true },
      { feedForward: (layer) => ({ ...moe(layer), route: naiveTopK(2, true) }) },
    ],
    ["head_dim", { head_dim: 6 }, { headSize: 6, rope: naiveRopes.plain(6, 50) }],
    ["a dense layer in front", { mlp_only_layers: [0] }, denseIn(0)],
    ["dense layers anywhere, some of them beyond the last", { mlp_only_layers: [2, 1, 7] }, denseIn(1, 2)],
    ["every second layer", { decoder_sparse_step: 2 }, denseIn(0, 2)],
    ["every third layer, and not that one", { decoder_sparse_step: 3, mlp_only_layers: [2] }, denseIn(0, 1, 2)],
    ["no list of dense layers", { mlp_only_layers: null }, {}],
    ["a window that is not used", { use_sliding_window: false, sliding_window: 2, max_window_layers: 1 }, {}],
    ["a window of null", { use_sliding_window: true, sliding_window: null }, {}],
    ["a window as long as the context", { use_sliding_window: true, sliding_window: 40 }, {}],
    [
      "windows by layer",
      {
        use_sliding_window: true,
        sliding_window: 3,
        layer_types: ["full_attention", "sliding_attention", "sliding_attention"],
      },
      { window: (layer) => (layer === 0 ? undefined : 3) },
    ],
    ["tied embeddings", { tie_word_embeddings: true }, { tied: true }],
    [
      "all experts stacked",
      {},
      {
        feedForward: (layer) => {
          const experts = `${name(layer)}.experts`;
          return { ...moe(layer), layout: { gateUp: `${experts}.gate_up_proj`, down: `${experts}.down_proj` } };
        },
      },
    ],
    [
      "relu, in shared and dense layers too",
      { hidden_act: "relu", mlp_only_layers: [1] },
      { ...denseIn(1), activation: (x) => Math.max(x, 0) },
    ],
  ])("%s", async (_, change, naive) => {
    await expectNaive(qwen2Moe, { ...base, ...change }, { ...decoder, ...naive }, { unlike: without(decoder, naive) });
  });
});

describe("qwen2_moe's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = qwen2Moe.describe(anyIndex({ model_type: "qwen2_moe" }));
    expect(blueprint).toMatchObject({ vocabulary: 151936, width: 2048, context: 32768, tieEmbeddings: false });
    expect(blueprint.norm).toEqual({ kind: "rms", eps: 1e-6 });
    expect(blueprint.layers.length).toBe(24);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 16, kvHeads: 16, headSize: 128, bias: true, window: undefined });
    expect(attention).not.toHaveProperty("outputBias");
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e4 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 60, hidden: 1408, shared: { hidden: 5632, gate: true } });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 4, order: "softmax-topk", balance: 0.001 });
    const { layers } = qwen2Moe.describe(anyIndex({ decoder_sparse_step: 2 })).blueprint;
    expect(layers[0]?.feedForward).toMatchObject({ kind: "dense", hidden: 5632 });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ use_sliding_window: true, sliding_window: 3 }, /versions of the library disagree .*add "layer_types"/],
    [
      { layer_types: ["full_attention", "full_attention", "sliding_attention"] },
      /layer 2 is of type "sliding_attention"/,
    ],
    [{ mlp_only_layers: [0.5] }, /"mlp_only_layers" is \[0.5\], expected a list of layers/],
    [{ mlp_only_layers: 1 }, /"mlp_only_layers" is 1, expected a list of layers/],
    [{ decoder_sparse_step: 0 }, /"decoder_sparse_step" is "0", expected a whole number from 1/],
    [{ norm_topk_prob: "yes" }, /"norm_topk_prob" is .*expected true or false/],
  ])("refuses %o", (change, message) => {
    expect(() => qwen2Moe.describe(anyIndex({ ...base, ...change }))).toThrow(message);
  });
});
