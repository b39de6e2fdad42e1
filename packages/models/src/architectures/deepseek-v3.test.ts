// DeepSeek-V3: options that the recorded checkpoints do not show, against naive loops; layers for further tokens; class defaults;
// refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { expectModel, type NaiveCheckpoint, naiveCheckpoint, type Row } from "../naive-attention.test-util.ts";
import { anyIndex } from "../naive-decoder.test-util.ts";
import { leaf } from "../tree.ts";
import {
  deepSeekSizes,
  inBestGroups,
  type NaiveDeepSeek,
  naiveDeepSeek,
  naiveYarn,
  plainTurns,
  ranked,
} from "./deepseek.test-util.ts";
import { deepSeekV3 } from "./deepseek-v3.ts";

const config = {
  ...deepSeekSizes,
  ...{ model_type: "deepseek_v3", q_lora_rank: 5, n_shared_experts: 1, first_k_dense_replace: 1 },
  ...{ n_group: 4, topk_group: 2 },
} satisfies Record<string, Json>;

interface Routing {
  readonly k?: number;
  readonly scale?: number;
  readonly groups?: number;
  readonly kept?: number;
  readonly normalise?: boolean;
}
/** 2412.19437, eqs. 12 to 16 and section 2.1.2: the bias chooses, and does not weigh. */
const route =
  ({ k = 3, scale = 2.5, groups = 4, kept = 2, normalise = true }: Routing = {}) =>
  (logits: Row, bias: Row): (readonly [number, number])[] => {
    const s = logits.map((x) => 1 / (1 + Math.exp(-x)));
    const biased = s.map((x, e) => x + (bias[e] as number));
    const allowed = new Set(inBestGroups(biased, { groups, kept, best: 2 }));
    const chosen = ranked(biased)
      .filter((e) => allowed.has(e))
      .slice(0, k);
    const total = normalise ? chosen.reduce((sum, e) => sum + (s[e] as number), 0) : 1;
    return chosen.map((e) => [e, (scale * (s[e] as number)) / total] as const);
  };

const model: NaiveDeepSeek = {
  ...{ queryRank: 5, sharedHidden: 5, correctionBias: true, route: route() },
  isDense: (layer) => layer < 1,
};
const { queryRank: _, ...withoutRank } = model;

/** The same checkpoint with every correction bias in this range. */
const biasedBetween =
  (low: number, high: number) =>
  (checkpoint: NaiveCheckpoint): NaiveCheckpoint => {
    for (const [name, numbers] of checkpoint.numbers) {
      if (!name.endsWith("e_score_correction_bias")) continue;
      numbers.set(numbers.map((_, e) => low + (high - low) * (((5 * e + name.length) % 8) / 7)));
    }
    return checkpoint;
  };

describe("deepseek_v3 equals the formulas", () => {
  it.each<[string, Record<string, Json>, NaiveDeepSeek]>([
    ["a bottleneck of queries", {}, model],
    ["plain queries", { q_lora_rank: null }, withoutRank],
    ["biases of attention", { attention_bias: true }, { ...model, attentionBias: true }],
    ["one group", { n_group: 1, topk_group: 1 }, { ...model, route: route({ groups: 1, kept: 1 }) }],
    ["no groups", { n_group: null, topk_group: null }, { ...model, route: route({ groups: 1, kept: 1 }) }],
    ["all groups", { topk_group: 4 }, { ...model, route: route({ kept: 4 }) }],
    ["one of two groups", { n_group: 2, topk_group: 1 }, { ...model, route: route({ groups: 2, kept: 1 }) }],
    ["all experts of the groups", { num_experts_per_tok: 4 }, { ...model, route: route({ k: 4 }) }],
    ["all experts", { num_experts_per_tok: 8, topk_group: 4 }, { ...model, route: route({ k: 8, kept: 4 }) }],
    ["one expert", { num_experts_per_tok: 1 }, { ...model, route: route({ k: 1 }) }],
    ["weights as they are", { norm_topk_prob: false }, { ...model, route: route({ normalise: false }) }],
    [
      "weights as they are, one factor",
      { norm_topk_prob: false, routed_scaling_factor: 1 },
      { ...model, route: route({ normalise: false, scale: 1 }) },
    ],
    ["another factor", { routed_scaling_factor: 0.3 }, { ...model, route: route({ scale: 0.3 }) }],
    ["halves turn", { rope_interleave: false }, { ...model, turns: { ...plainTurns, interleaved: false } }],
    ["no dense layer", { first_k_dense_replace: 0 }, { ...model, isDense: () => false }],
    ["only dense layers", { first_k_dense_replace: 3 }, { ...model, isDense: () => true }],
    ["three shared experts", { n_shared_experts: 3 }, { ...model, sharedHidden: 15 }],
    ["no shared experts", { n_shared_experts: 0 }, { ...model, sharedHidden: 0 }],
    ["tied embeddings", { tie_word_embeddings: true }, { ...model, tied: true }],
    ["stacked experts", {}, { ...model, stacked: true }],
  ])("%s", async (_, change, naive) => {
    await expectModel(deepSeekV3, { ...config, ...change }, naiveDeepSeek(naive));
  });

  it.each<[number, number]>([
    [0.1, 0.9],
    [-0.9, -0.1],
    [-0.5, 0.5],
    [-9, -5],
    [-40, 40],
  ])("correction biases from %d to %d", async (low, high) => {
    await expectModel(deepSeekV3, config, naiveDeepSeek(model), { change: biasedBetween(low, high) });
  });

  it.each<[string, Record<string, Json>, { mscale?: number; all?: number }]>([
    ["yarn", {}, {}],
    ["yarn with mscale and mscale_all_dim", { mscale: 0.7, mscale_all_dim: 0.9 }, { mscale: 0.7, all: 0.9 }],
    ["yarn with equal ones", { mscale: 1, mscale_all_dim: 1 }, { mscale: 1, all: 1 }],
  ])("%s", async (_, keys, mscales) => {
    const record = { factor: 40, original_max_position_embeddings: 10, ...keys };
    const { turns, softmax } = naiveYarn({ factor: 40, original: 10, ...mscales });
    const naive = naiveDeepSeek({ ...model, turns, scale: softmax / Math.sqrt(10) });
    await expectModel(deepSeekV3, { ...config, rope_scaling: { type: "yarn", ...record } }, naive);
    const rope_parameters = { rope_type: "yarn", rope_theta: 30, ...record };
    await expectModel(deepSeekV3, { ...config, rope_theta: null, rope_parameters }, naive);
  });
});

it("moves the correction bias of each router by its own loads, dense layers left out", async () => {
  const on = makeEngine();
  const read = await deepSeekV3.read(naiveCheckpoint(config, naiveDeepSeek(model)), on);
  expect(read.routers.length).toBe(2);
  const statistics = read.routers.map((_, place) => ({
    ...{ step: 0, tokens: 8, metrics: {} },
    load: Float64Array.from({ length: 8 }, (_, e) => (e === place ? 9 : 1)),
  }));
  for (const [place, router] of read.routers.entries()) {
    const before = await leaf(router.buffers, "bias").data();
    const after = router.afterStep?.(statistics, router.buffers);
    const moved = await leaf(after ?? {}, "bias").data();
    for (const [e, x] of before.entries()) expect(moved[e]).toBeCloseTo(x + (e === place ? -0.001 : 0.001), 6);
  }
});

describe("deepseek_v3's layers for further tokens", () => {
  const further = (change: Record<string, Json>, layers: readonly number[]): NaiveCheckpoint => {
    const checkpoint = naiveCheckpoint({ ...config, ...change }, naiveDeepSeek(model));
    const more = layers.map((layer) => `model.layers.${layer}.eh_proj.weight`);
    return {
      ...checkpoint,
      names: [...checkpoint.names, ...more],
      stored: (name) => (more.includes(name) ? { shape: [9, 18], dtype: "BF16", bytes: 324 } : checkpoint.stored(name)),
    };
  };
  const read = (checkpoint: NaiveCheckpoint) => deepSeekV3.read(checkpoint, makeEngine());

  it.each<[Record<string, Json>, readonly number[]]>([
    [{}, [3]],
    [{ num_nextn_predict_layers: 2 }, [3, 4]],
    [{ num_mtp_layers: 3 }, [3, 4, 5]],
  ])("with %o layers %o are left unread", async (change, layers) => {
    const model = await read(further(change, layers));
    expect(model.layers).toBe(3);
  });

  it.each<[Record<string, Json>, readonly number[]]>([
    [{}, [4]],
    [{ num_nextn_predict_layers: 0 }, [3]],
    [{ num_nextn_predict_layers: 2 }, [5]],
    [{ num_nextn_predict_layers: 2 }, [2]],
  ])("with %o layers %o are nobody's", async (change, layers) => {
    await expect(read(further(change, layers))).rejects.toThrow(/1 tensors that its config.json does not call for/);
  });
});

describe("deepseek_v3's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = deepSeekV3.describe(anyIndex({ model_type: "deepseek_v3" }));
    expect(blueprint).toMatchObject({
      ...{ vocabulary: 129280, width: 7168, context: 4096, tieEmbeddings: false },
      norm: { kind: "rms", eps: 1e-6 },
    });
    expect(blueprint.layers.length).toBe(61);
    expect(blueprint.layers.map(({ feedForward }) => feedForward.kind).slice(0, 4)).toEqual([
      "dense",
      "dense",
      "dense",
      "moe",
    ]);
    const { attention, feedForward } = blueprint.layers[3] ?? {};
    expect(attention).toMatchObject({
      ...{ heads: 128, queryRank: 1536, rank: 512, nopeSize: 128, ropeSize: 64, valueSize: 128, bias: false },
      rope: { interleaved: true },
    });
    expect(blueprint.layers[0]?.feedForward).toMatchObject({ hidden: 18432 });
    expect(feedForward).toMatchObject({ experts: 256, hidden: 2048, shared: { hidden: 2048 } });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({
      ...{ k: 8, groups: 8, keptGroups: 4, normalise: true, scale: 2.5, hfCompat: false },
    });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ scoring_func: "softmax" }, /"scoring_func" is .*softmax.*only "sigmoid" is known/],
    [{ topk_method: "greedy" }, /"topk_method" is .*greedy.*only "noaux_tc" is known/],
    [{ n_group: 5 }, /8 experts do not split into 5 groups/],
    [{ topk_group: 5 }, /"topk_group" is 5, but "n_group" 4/],
    [{ topk_group: 1 }, /"num_experts_per_tok" is 3, but 1 of 4 groups hold 2/],
    [{ num_key_value_heads: 1 }, /latent attention has keys and values for all 2 heads/],
    [{ rope_interleave: "yes" }, /"rope_interleave" is .*yes.*expected true or false/],
    [{ num_nextn_predict_layers: 1, num_mtp_layers: 2 }, /"num_nextn_predict_layers" is "1", but "num_mtp_layers" is/],
    [{ routed_scaling_factor: -1 }, /"routed_scaling_factor" is -1/],
    [{ n_routed_experts: 10 ** 9, n_group: 1, topk_group: 1 }, /asks for 1000000000 experts/],
  ])("refuses %o", (change, message) => {
    expect(() => deepSeekV3.describe(anyIndex({ ...config, ...change }))).toThrow(message);
  });

  it.each(["bitsandbytes", "gptq", "awq"])("refuses weights of quant_method %s by name", async (quant_method) => {
    const checkpoint = naiveCheckpoint({ ...config, quantization_config: { quant_method } }, naiveDeepSeek(model));
    const packed: NaiveCheckpoint = {
      ...checkpoint,
      stored: (name) =>
        name.endsWith("_proj.weight") ? { shape: [9, 4], dtype: "U8", bytes: 36 } : checkpoint.stored(name),
    };
    await expect(deepSeekV3.read(packed, makeEngine())).rejects.toThrow(quant_method);
  });
});
