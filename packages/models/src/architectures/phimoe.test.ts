// Phi-3.5-MoE: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  anyIndex,
  expectNaive,
  type NaiveDecoder,
  type NaiveMoE,
  naiveLogits,
  naiveRopes,
  naiveShapes,
  naiveSparseMixer,
  randomTensors,
  without,
} from "../naive-decoder.test-util.ts";
import { phiMoe } from "./phimoe.ts";

const base = {
  model_type: "phimoe",
  vocab_size: 17,
  hidden_size: 12,
  intermediate_size: 5,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  num_local_experts: 5,
  max_position_embeddings: 40,
  rms_norm_eps: 0.01,
  rope_theta: 50,
} satisfies Record<string, Json>;

const moe = (layer: number, jitter = 0.01): NaiveMoE => ({
  experts: 5,
  hidden: 5,
  router: `model.layers.${layer}.block_sparse_moe.gate.weight`,
  layout: { prefix: `model.layers.${layer}.block_sparse_moe.experts`, names: ["w1", "w3", "w2"] },
  route: naiveSparseMixer(jitter),
});
const jittered = (jitter: number): Pick<NaiveDecoder, "feedForward"> => ({
  feedForward: (layer) => moe(layer, jitter),
});
const decoder: NaiveDecoder = {
  vocabulary: 17,
  width: 12,
  layers: 2,
  heads: 2,
  kvHeads: 1,
  headSize: 6,
  eps: 0.01,
  norm: "layer",
  rope: naiveRopes.plain(6, 50),
  feedForward: moe,
};

const short = [1, 1.5, 2];
const long = [2, 3, 5];
const longrope = {
  short_factor: short,
  long_factor: long,
  short_mscale: 1.2,
  long_mscale: 1.4,
  original_max_position_embeddings: 8,
};
const stretched = naiveRopes.longrope(6, 50, { original: 8, short, long, scalings: [1.2, 1.4] });

describe("phimoe equals the formulas", () => {
  it.each<[string, Record<string, Json>, Partial<NaiveDecoder>]>([
    ["no biases, jitter 0.01, which are the defaults", {}, {}],
    ["no jitter: only the chosen expert is within reach", { router_jitter_noise: 0 }, jittered(0)],
    ["a wide jitter", { router_jitter_noise: 0.7 }, jittered(0.7)],
    ["a jitter that keeps all", { router_jitter_noise: 50 }, jittered(50)],
    ["input jitter, which is for training", { input_jitter_noise: 0.3 }, {}],
    ["biases of attention", { attention_bias: true }, { qkvBias: true, outputBias: true }],
    ["a bias of the head", { lm_head_bias: true }, { headBias: true }],
    ["a bias of a tied head", { lm_head_bias: true, tie_word_embeddings: true }, { headBias: true, tied: true }],
    ["a window", { sliding_window: 3 }, { window: () => 3 }],
    [
      "experts stacked as version 5 of the library holds them",
      {},
      {
        feedForward: (layer) => {
          const mlp = `model.layers.${layer}.mlp`;
          const layout = { gateUp: `${mlp}.experts.gate_up_proj`, down: `${mlp}.experts.down_proj` };
          return { ...moe(layer), router: `${mlp}.router.weight`, layout };
        },
      },
    ],
  ])("%s", async (_, change, naive) => {
    await expectNaive(phiMoe, { ...base, ...change }, { ...decoder, ...naive }, { unlike: without(decoder, naive) });
  });

  it("and those jitters are told apart by the logits", () => {
    const checkpoint = randomTensors(base, naiveShapes(decoder));
    const all = [0, 0.7, 50].map((jitter) =>
      naiveLogits({ ...decoder, ...jittered(jitter) }, checkpoint, [2, 7, 12]).flat(),
    );
    for (const [i, one] of all.entries()) {
      for (const other of all.slice(i + 1)) {
        const apart = one.map((x, j) => Math.abs(x - (other[j] ?? Number.NaN)));
        expect(Math.max(...apart)).toBeGreaterThan(1e-3);
      }
    }
  });

  it.each([
    [8, "rope_type"],
    [8, "type"],
    [9, "rope_type"],
    [12, "type"],
  ])("longrope of %i positions where the first 8 are short, in the spelling %s", async (length, key) => {
    const config = { ...base, rope_scaling: { ...longrope, [key]: "longrope" } };
    await expectNaive(phiMoe, config, { ...decoder, rope: stretched }, { length, cached: length <= 8 });
  });

  it("longrope in the newer spelling, original length stated twice", async () => {
    const config = {
      ...base,
      rope_theta: null,
      original_max_position_embeddings: 8,
      rope_parameters: { ...longrope, rope_type: "longrope", rope_theta: 50 },
    };
    await expectNaive(phiMoe, config, { ...decoder, rope: stretched }, { length: 10, cached: false });
  });
});

describe("phimoe's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = phiMoe.describe(anyIndex({ model_type: "phimoe" }));
    expect(blueprint).toMatchObject({ vocabulary: 32064, width: 4096, context: 131072, tieEmbeddings: false });
    expect(blueprint).toMatchObject({ headBias: false, norm: { kind: "layer", eps: 1e-5 } });
    expect(blueprint.layers.length).toBe(32);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ heads: 32, kvHeads: 8, headSize: 128, bias: false, window: undefined });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(1e6 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 16, hidden: 6400 });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router).toMatchObject({ name: "grin", options: { k: 2, jitter: 0.01, balance: 0.001 } });
  });

  const rope = (change: Record<string, Json>): Record<string, Json> => ({
    rope_scaling: { ...longrope, rope_type: "longrope", ...change },
  });
  it.each<[Record<string, Json>, RegExp]>([
    [{ num_experts_per_tok: 1 }, /"num_experts_per_tok" is 1; the classes of this family always take 2/],
    [{ rope_scaling: { rope_type: "linear", factor: 2 } }, /is of type "linear"; this family has default or longrope/],
    [rope({ short_mscale: null }), /"short_mscale"/],
    [rope({ long_mscale: null }), /"long_mscale"/],
    [rope({ original_max_position_embeddings: null }), /no "original_max_position_embeddings"/],
    [rope({ long_factor: [1, 2] }), /"long_factor" is 2 numbers, expected 3 numbers/],
    [{ router_jitter_noise: -0.1 }, /"router_jitter_noise" is -0.1, expected a number from 0/],
  ])("refuses %o", (change, message) => {
    expect(() => phiMoe.describe(anyIndex({ ...base, ...change }))).toThrow(message);
  });
});
