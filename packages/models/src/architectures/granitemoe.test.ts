// GraniteMoe: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
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
import { graniteMoe } from "./granitemoe.ts";

const base = {
  model_type: "granitemoe",
  vocab_size: 17,
  hidden_size: 12,
  intermediate_size: 5,
  num_hidden_layers: 2,
  num_attention_heads: 3,
  num_local_experts: 5,
  num_experts_per_tok: 2,
  max_position_embeddings: 40,
  rms_norm_eps: 0.01,
  rope_theta: 50,
} satisfies Record<string, Json>;

/** The softmax of the k best logits is that of all, divided by its sum over them. */
const moe = (layer: number, k = 2): NaiveMoE => ({
  experts: 5,
  hidden: 5,
  router: `model.layers.${layer}.block_sparse_moe.router.layer.weight`,
  layout: {
    gateUp: `model.layers.${layer}.block_sparse_moe.input_linear.weight`,
    down: `model.layers.${layer}.block_sparse_moe.output_linear.weight`,
  },
  route: naiveTopK(k, true),
});
const decoder: NaiveDecoder = {
  vocabulary: 17,
  width: 12,
  layers: 2,
  heads: 3,
  kvHeads: 3,
  headSize: 4,
  eps: 0.01,
  // Not 1 / sqrt(4).
  scale: 1,
  rope: naiveRopes.plain(4, 50),
  feedForward: moe,
};

describe("granitemoe equals the formulas", () => {
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["no multiplier: all are 1, that of attention too", {}, {}],
    ["embedding_multiplier", { embedding_multiplier: 3 }, { embedScale: 3 }],
    ["residual_multiplier", { residual_multiplier: 0.22 }, { residualScale: 0.22 }],
    ["attention_multiplier", { attention_multiplier: 0.125 }, { scale: 0.125 }],
    ["logits_scaling divides", { logits_scaling: 8 }, { logitScale: 1 / 8 }],
    [
      "all four, tied, with one head of keys and values",
      {
        embedding_multiplier: 12,
        residual_multiplier: 0.3,
        attention_multiplier: 0.2,
        logits_scaling: 6,
        tie_word_embeddings: true,
        num_key_value_heads: 1,
      },
      { embedScale: 12, residualScale: 0.3, scale: 0.2, logitScale: 1 / 6, tied: true, kvHeads: 1 },
    ],
    ["biases", { attention_bias: true }, { qkvBias: true, outputBias: true }],
    ["three experts", { num_experts_per_tok: 3 }, { feedForward: (layer) => moe(layer, 3) }],
    ["linear rope", { rope_scaling: { type: "linear", factor: 3 } }, { rope: naiveRopes.linear(4, 50, 3) }],
    [
      "the names of version 5 of the library",
      {},
      {
        feedForward: (layer) => {
          const name = `model.layers.${layer}.block_sparse_moe`;
          const layout = { gateUp: `${name}.experts.gate_up_proj`, down: `${name}.experts.down_proj` };
          return { ...moe(layer), router: `${name}.router.weight`, layout };
        },
      },
    ],
    ["rope_parameters", { rope_theta: null, rope_parameters: { rope_type: "default", rope_theta: 50 } }, {}],
  ])("%s", async (_, change, naive) => {
    await expectNaive(
      graniteMoe,
      { ...base, ...change },
      { ...decoder, ...naive },
      { unlike: without(decoder, naive) },
    );
  });
});

describe("granitemoe's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = graniteMoe.describe(anyIndex({ model_type: "granitemoe" }));
    expect(blueprint).toMatchObject({ vocabulary: 32000, width: 4096, context: 2048, tieEmbeddings: false });
    expect(blueprint).toMatchObject({ embedScale: 1, residualScale: 1, logitScale: 1 });
    expect(blueprint.norm).toEqual({ kind: "rms", eps: 1e-6 });
    expect(blueprint.layers.length).toBe(32);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 32, kvHeads: 32, headSize: 128, bias: false, scale: 1 });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e4 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 8, hidden: 11008 });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 2, order: "topk-softmax", balance: 0.001 });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ position_embedding_type: "nope" }, /"position_embedding_type" is .*nope.*; only "rope" is known/],
    [{ sliding_window: 3 }, /"sliding_window" is "3", which this package cannot run/],
    [{ logits_scaling: 0 }, /"logits_scaling" is 0, and logits are divided by it/],
    [{ embedding_multiplier: "12" }, /"embedding_multiplier" is .*expected a number/],
  ])("refuses %o", (change, message) => {
    expect(() => graniteMoe.describe(anyIndex({ ...base, ...change }))).toThrow(message);
  });

  it("does not ask for memory because config.json has a large number of experts", async () => {
    const { sources } = graniteMoe.describe(anyIndex({ ...base, num_local_experts: 10 ** 12 }));
    const source = sources.get("layers.0.moe.experts.gateUp");
    if (source?.kind !== "experts") throw new Error("expected experts");
    const name = "model.layers.0.block_sparse_moe.input_linear.weight";
    expect(source.expert(7)).toEqual([{ name, shape: [10, 12], index: 7, of: 10 ** 12 }]);
  });
});
