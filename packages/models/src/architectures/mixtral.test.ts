// Mixtral: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  anyIndex,
  expectNaive,
  type NaiveDecoder,
  type NaiveMoE,
  naiveGelu,
  naiveRopes,
  naiveShapes,
  naiveTopK,
  randomTensors,
  without,
} from "../naive-decoder.test-util.ts";
import { mixtral } from "./mixtral.ts";

const base = {
  model_type: "mixtral",
  vocab_size: 17,
  hidden_size: 8,
  intermediate_size: 5,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 6,
  num_local_experts: 5,
  num_experts_per_tok: 2,
  max_position_embeddings: 40,
  rms_norm_eps: 0.01,
  rope_theta: 50,
} satisfies Record<string, Json>;

const moe = (layer: number): NaiveMoE => ({
  experts: 5,
  hidden: 5,
  router: `model.layers.${layer}.block_sparse_moe.gate.weight`,
  layout: { prefix: `model.layers.${layer}.block_sparse_moe.experts`, names: ["w1", "w3", "w2"] },
  route: naiveTopK(2, true),
});
const decoder: NaiveDecoder = {
  ...{ vocabulary: 17, width: 8, layers: 2, heads: 4, kvHeads: 2, headSize: 6, eps: 0.01 },
  rope: naiveRopes.plain(6, 50),
  feedForward: moe,
};
const withMoE = (change: Partial<NaiveMoE>): Pick<NaiveDecoder, "feedForward"> => ({
  feedForward: (layer) => ({ ...moe(layer), ...change }),
});

describe("mixtral equals the formulas", () => {
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["explicit head_dim", {}, {}],
    ["head_dim null", { head_dim: null }, { headSize: 2, rope: naiveRopes.plain(2, 50) }],
    ["as many keys as queries", { num_key_value_heads: null }, { kvHeads: 4 }],
    ["one head of keys", { num_key_value_heads: 1 }, { kvHeads: 1 }],
    ["one expert per token", { num_experts_per_tok: 1 }, withMoE({ route: naiveTopK(1, true) })],
    ["all experts", { num_experts_per_tok: 5 }, withMoE({ route: naiveTopK(5, true) })],
    ["num_experts", { num_local_experts: null, num_experts: 5 }, {}],
    ["a window", { sliding_window: 3 }, { window: () => 3 }],
    ["a window of one", { sliding_window: 1 }, { window: () => 1 }],
    ["a window longer than the text", { sliding_window: 30 }, {}],
    ["tied embeddings", { tie_word_embeddings: true }, { tied: true }],
    ["relu", { hidden_act: "relu" }, { activation: (x) => Math.max(x, 0) }],
    ["gelu_pytorch_tanh", { hidden_act: "gelu_pytorch_tanh" }, { activation: naiveGelu }],
    ["rope_parameters", { rope_theta: null, rope_parameters: { rope_theta: 50, rope_type: "default" } }, {}],
    ["linear rope", { rope_scaling: { rope_type: "linear", factor: 2.5 } }, { rope: naiveRopes.linear(6, 50, 2.5) }],
    [
      "linear rope, old spelling",
      { rope_scaling: { type: "linear", factor: 4 } },
      { rope: naiveRopes.linear(6, 50, 4) },
    ],
    [
      "linear rope, new spelling",
      { rope_theta: null, rope_parameters: { rope_type: "linear", factor: 4, rope_theta: 50 } },
      { rope: naiveRopes.linear(6, 50, 4) },
    ],
    [
      "yarn",
      { rope_scaling: { rope_type: "yarn", factor: 4, original_max_position_embeddings: 10 } },
      { rope: naiveRopes.yarn(6, 50, { factor: 4, original: 10 }) },
    ],
    [
      "llama3",
      {
        rope_scaling: {
          rope_type: "llama3",
          factor: 8,
          original_max_position_embeddings: 40,
          low_freq_factor: 1,
          high_freq_factor: 4,
        },
      },
      { rope: naiveRopes.llama3(6, 50, { factor: 8, original: 40, low: 1, high: 4 }) },
    ],
  ])("%s", async (_, change, naive) => {
    await expectNaive(mixtral, { ...base, ...change }, { ...decoder, ...naive }, { unlike: without(decoder, naive) });
  });

  it.each([5, 9])("dynamic rope within and past the length of training: %i positions of 7", async (length) => {
    const config = { ...base, max_position_embeddings: 7, rope_scaling: { rope_type: "dynamic", factor: 3 } };
    const rope = naiveRopes.dynamic(6, 50, { factor: 3, trained: 7 });
    await expectNaive(mixtral, config, { ...decoder, rope }, { length, cached: length < 7 });
  });

  it.each<[Record<string, Json>, number]>([
    [{}, 40],
    [{ rope_type: "linear", factor: 2.5 }, 100],
    [{ rope_type: "dynamic", factor: 3 }, 120],
    [{ rope_type: "yarn", factor: 4, original_max_position_embeddings: 10 }, 40],
    [{ rope_type: "yarn", factor: 4, original_max_position_embeddings: 20 }, 80],
    [{ rope_type: "yarn", factor: 2 }, 80],
  ])("%o allows %i positions", (rope, context) => {
    const rope_scaling = Object.keys(rope).length > 0 ? rope : null;
    expect(mixtral.describe(anyIndex({ ...base, rope_scaling })).blueprint.context).toBe(context);
  });

  it.each([6, 11])("longrope within and past the original length: %i positions of 8", async (length) => {
    const factors = { short_factor: [1, 1.5, 2], long_factor: [2, 3, 5] };
    const config = {
      ...base,
      original_max_position_embeddings: 8,
      rope_scaling: { rope_type: "longrope", ...factors },
    };
    const scaling = Math.sqrt(1 + Math.log(40 / 8) / Math.log(8));
    const { short_factor: short, long_factor: long } = factors;
    const rope = naiveRopes.longrope(6, 50, { original: 8, short, long, scalings: [scaling, scaling] });
    await expectNaive(mixtral, config, { ...decoder, rope }, { length, cached: length < 8 });
  });

  it("experts stacked as version 5 of the library holds them", async () => {
    const stacked = (layer: number): NaiveMoE => {
      const mlp = `model.layers.${layer}.mlp`;
      const layout = { gateUp: `${mlp}.experts.gate_up_proj`, down: `${mlp}.experts.down_proj` };
      return { ...moe(layer), router: `${mlp}.gate.weight`, layout };
    };
    await expectNaive(mixtral, base, { ...decoder, feedForward: stacked });
  });

  it("tied embeddings beside a head that is stored all the same", async () => {
    const checkpoint = randomTensors({ ...base, tie_word_embeddings: true }, naiveShapes(decoder));
    const { sources, ignores } = mixtral.describe(checkpoint);
    expect(sources.has("head")).toBe(false);
    expect(ignores?.("lm_head.weight")).toBe(true);
  });
});

describe("mixtral's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = mixtral.describe(anyIndex({ model_type: "mixtral" }));
    expect(blueprint).toMatchObject({
      ...{ vocabulary: 32000, width: 4096, context: 131072, tieEmbeddings: false },
      norm: { kind: "rms", eps: 1e-5 },
    });
    expect(blueprint.layers.length).toBe(32);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 32, kvHeads: 8, headSize: 128, window: undefined });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e6 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 8, hidden: 14336, activation: "silu" });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 2, order: "softmax-topk-renormalise", balance: 0.001 });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ hidden_act: "quick_gelu" }, /"hidden_act" is "quick_gelu"; supported are silu, .*relu/],
    [{ num_experts_per_tok: 6 }, /"num_experts_per_tok" is 6, but there are 5 experts/],
    [{ num_key_value_heads: 3 }, /4 attention heads cannot share 3 heads of keys and values/],
    [{ head_dim: 5 }, /heads have 5 channels; rotary positions need an even number/],
    [{ head_dim: 2 * 10 ** 9 }, /heads have 2000000000 channels; at most 65536 are read/],
    [{ head_dim: null, hidden_size: 10 }, /"head_dim" is missing, and hidden_size 10 is no multiple of 4/],
    [{ num_hidden_layers: 10 ** 9 }, /asks for 1000000000 layers, but the checkpoint has only 500 tensors/],
    [{ num_local_experts: 10 ** 9 }, /asks for 1000000000 experts, but the checkpoint has only 500 tensors/],
    [{ rope_scaling: { rope_type: "spiral" } }, /"rope_type" is "spiral"; supported are default, linear/],
    [
      { rope_scaling: { rope_type: "linear", factor: 2, rope_theta: 9 } },
      /"rope_theta" is 50, but 9 in "rope_scaling"/,
    ],
    [
      { rope_scaling: { rope_type: "linear", factor: 2 }, rope_parameters: { rope_type: "default" } },
      /"rope_scaling" is .*, but "rope_parameters" is/,
    ],
    [{ partial_rotary_factor: 0.5 }, /"partial_rotary_factor" is "0.5", which this package cannot run/],
    [
      { rope_theta: null, rope_parameters: { rope_type: "default", partial_rotary_factor: 0.34 } },
      /turns 2 of 6 channels; this family turns all of them/,
    ],
    [{ attention_bias: true }, /"attention_bias" is "true", which this package cannot run; only false/],
    [
      { sliding_window: 3, layer_types: ["full_attention", "sliding_attention"] },
      /"layer_types" and "sliding_window" disagree about layer 0/,
    ],
    [
      { layer_types: ["full_attention", "chunked_attention"] },
      /"layer_types" has .*chunked_attention.* at 1; supported/,
    ],
    [{ layer_types: ["full_attention"] }, /expected a list of 2 kinds of layers/],
    [{ sliding_window: 0 }, /"sliding_window" is "0", expected a whole number from 1/],
    [{ rms_norm_eps: -1 }, /"rms_norm_eps" is -1/],
    [{ router_aux_loss_coef: -1 }, /"router_aux_loss_coef" is -1, expected a number from 0/],
    [{ num_experts: 6 }, /"num_local_experts" is "5", but "num_experts" is "6"/],
  ])("refuses %o", (change, message) => {
    expect(() => mixtral.describe(anyIndex({ ...base, ...change }))).toThrow(message);
  });
});
