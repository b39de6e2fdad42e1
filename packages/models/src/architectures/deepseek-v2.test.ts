// DeepSeek-V2: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { expectModel, type Row } from "../naive-attention.test-util.ts";
import { anyIndex, softmaxOf } from "../naive-decoder.test-util.ts";
import {
  deepSeekSizes,
  inBestGroups,
  type NaiveDeepSeek,
  naiveDeepSeek,
  naiveYarn,
  ranked,
} from "./deepseek.test-util.ts";
import { deepSeekV2 } from "./deepseek-v2.ts";

const config = {
  ...deepSeekSizes,
  ...{ model_type: "deepseek_v2", q_lora_rank: 5, n_shared_experts: 2, first_k_dense_replace: 1 },
  routed_scaling_factor: 1.5,
} satisfies Record<string, Json>;

/** 2405.04434, eqs. 20 to 22 and section 2.2.2. */
const route =
  ({ k = 3, scale = 1.5, groups = 1, kept = 1 }: { k?: number; scale?: number; groups?: number; kept?: number } = {}) =>
  (logits: Row): (readonly [number, number])[] => {
    const p = softmaxOf(logits);
    const allowed = new Set(inBestGroups(p, { groups, kept, best: 1 }));
    const chosen = ranked(p).filter((e) => allowed.has(e));
    return chosen.slice(0, k).map((e) => [e, scale * (p[e] as number)] as const);
  };

const model: NaiveDeepSeek = {
  ...{ queryRank: 5, sharedHidden: 10, correctionBias: false, route: route() },
  isDense: (layer) => layer < 1,
};
const { queryRank: _, ...withoutRank } = model;

describe("deepseek_v2 equals the formulas", () => {
  it.each<[string, Record<string, Json>, NaiveDeepSeek]>([
    ["a bottleneck of queries", {}, model],
    ["plain queries", { q_lora_rank: null }, withoutRank],
    ["biases of attention", { attention_bias: true }, { ...model, attentionBias: true }],
    [
      "biases of attention, plain queries",
      { attention_bias: true, q_lora_rank: null },
      { ...withoutRank, attentionBias: true },
    ],
    ["greedy by default, whatever the groups", { n_group: 4, topk_group: 1 }, model],
    [
      "two of four groups",
      { topk_method: "group_limited_greedy", n_group: 4, topk_group: 2 },
      { ...model, route: route({ groups: 4, kept: 2 }) },
    ],
    [
      "one of two groups",
      { topk_method: "group_limited_greedy", n_group: 2, topk_group: 1 },
      { ...model, route: route({ groups: 2, kept: 1 }) },
    ],
    [
      "as many groups as experts",
      { topk_method: "group_limited_greedy", n_group: 8, topk_group: 3 },
      { ...model, route: route({ groups: 8, kept: 3 }) },
    ],
    ["all experts", { num_experts_per_tok: 8 }, { ...model, route: route({ k: 8 }) }],
    ["one expert", { num_experts_per_tok: 1 }, { ...model, route: route({ k: 1 }) }],
    ["another factor", { routed_scaling_factor: 16 }, { ...model, route: route({ scale: 16 }) }],
    ["no dense layer", { first_k_dense_replace: 0 }, { ...model, isDense: () => false }],
    ["only dense layers", { first_k_dense_replace: 7 }, { ...model, isDense: () => true }],
    ["experts in every second layer", { moe_layer_freq: 2 }, { ...model, isDense: (l) => l < 1 || l % 2 === 1 }],
    ["no shared experts", { n_shared_experts: null }, { ...model, sharedHidden: 0 }],
    ["three shared experts", { n_shared_experts: 3 }, { ...model, sharedHidden: 15 }],
    ["tied embeddings", { tie_word_embeddings: true }, { ...model, tied: true }],
    ["relu", { hidden_act: "relu" }, { ...model, activation: (x) => Math.max(x, 0) }],
    ["stacked experts", {}, { ...model, stacked: true }],
    [
      "linear rope",
      { rope_scaling: { rope_type: "linear", factor: 4 } },
      { ...model, turns: { inverse: [1 / 4, 30 ** -0.5 / 4], interleaved: true } },
    ],
    ["rope_parameters", { rope_theta: null, rope_parameters: { rope_type: "default", rope_theta: 30 } }, model],
  ])("%s", async (_, change, naive) => {
    await expectModel(deepSeekV2, { ...config, ...change }, naiveDeepSeek(naive));
  });

  it.each<[string, Record<string, Json>, { mscale?: number; all?: number }]>([
    ["yarn", {}, {}],
    ["yarn with mscale and mscale_all_dim", { mscale: 0.7, mscale_all_dim: 0.9 }, { mscale: 0.7, all: 0.9 }],
    ["yarn with equal ones", { mscale: 1.3, mscale_all_dim: 1.3 }, { mscale: 1.3, all: 1.3 }],
    ["yarn with mscale_all_dim alone", { mscale_all_dim: 1 }, { all: 1 }],
    ["yarn with mscale alone", { mscale: 2 }, { mscale: 2 }],
  ])("%s", async (_, keys, mscales) => {
    const rope_scaling = { rope_type: "yarn", factor: 8, original_max_position_embeddings: 12, ...keys };
    const { turns, softmax } = naiveYarn({ factor: 8, original: 12, ...mscales });
    const naive = { ...model, turns, scale: softmax / Math.sqrt(10) };
    await expectModel(deepSeekV2, { ...config, rope_scaling }, naiveDeepSeek(naive));
  });
});

describe("deepseek_v2's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = deepSeekV2.describe(anyIndex({ model_type: "deepseek_v2", num_experts_per_tok: 6 }));
    expect(blueprint).toMatchObject({
      ...{ vocabulary: 32000, width: 4096, context: 2048, tieEmbeddings: false },
      norm: { kind: "rms", eps: 1e-6 },
    });
    expect(blueprint.layers.length).toBe(32);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({
      ...{ kind: "latent", heads: 32, queryRank: 1536, rank: 512, nopeSize: 128, ropeSize: 64, valueSize: 128 },
      ...{ bias: false, normEps: 1e-6, scale: 1 / Math.sqrt(192) },
      rope: { type: "default", interleaved: true },
    });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(10000 ** (-2 / 64), 12);
    expect(feedForward).toMatchObject({ experts: 64, hidden: 1407, activation: "silu", shared: { hidden: 2814 } });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 6, groups: 1, normalise: false, scale: 1, balance: 0.001 });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ norm_topk_prob: true }, /"norm_topk_prob" is true: .* only false is known/],
    [{ topk_method: "noaux_tc" }, /"topk_method" is "noaux_tc"; supported are "greedy" and "group_limited_greedy"/],
    [{ scoring_func: "sigmoid" }, /"scoring_func" is .*sigmoid.*only "softmax" is known/],
    [{ mlp_bias: true }, /"mlp_bias" is "true", which this package cannot run/],
    [{ num_experts_per_tok: null }, /"num_experts_per_tok" is missing/],
    [{ num_experts_per_tok: 9 }, /"num_experts_per_tok" is 9, but there are 8 experts/],
    [
      { num_key_value_heads: 1 },
      /"num_key_value_heads" is 1, but latent attention has keys and values for all 2 heads/,
    ],
    [{ topk_method: "group_limited_greedy" }, /"n_group" is missing/],
    [{ topk_method: "group_limited_greedy", n_group: 3, topk_group: 1 }, /8 experts do not split into 3 groups/],
    [{ topk_method: "group_limited_greedy", n_group: 4, topk_group: 5 }, /"topk_group" is 5, but "n_group" 4/],
    [
      { topk_method: "group_limited_greedy", n_group: 4, topk_group: 1 },
      /"num_experts_per_tok" is 3, but 1 of 4 groups hold 2/,
    ],
    [{ routed_scaling_factor: 0 }, /"routed_scaling_factor" is 0, expected a number above 0/],
    [{ moe_layer_freq: 0 }, /"moe_layer_freq" is "0", expected a whole number from 1/],
    [{ qk_rope_head_dim: 5 }, /turns 5 of 5 channels/],
    [{ hidden_act: "mish" }, /"hidden_act" is "mish"/],
    [
      { rope_scaling: { rope_type: "linear", factor: 2, mscale_all_dim: 1 } },
      /"mscale_all_dim" is given for rotary positions of type "linear"; it is known for "yarn" only/,
    ],
  ])("refuses %o", (change, message) => {
    expect(() => deepSeekV2.describe(anyIndex({ ...config, ...change }))).toThrow(message);
  });
});
