// JetMoE: options that the recorded checkpoint does not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import {
  expectModel,
  type NaiveModel,
  type NaiveTurns,
  naiveCheckpoint,
  naiveChoice,
  naiveMixture,
  plus,
  times,
} from "../naive-attention.test-util.ts";
import { anyIndex, naiveSilu } from "../naive-decoder.test-util.ts";
import { jetMoE } from "./jetmoe.ts";

const config = {
  ...{ model_type: "jetmoe", vocab_size: 19, hidden_size: 8, intermediate_size: 5, num_hidden_layers: 2 },
  ...{ num_key_value_heads: 2, kv_channels: 4, num_local_experts: 5, num_experts_per_tok: 2 },
  ...{ max_position_embeddings: 60, rms_norm_eps: 0.05, rope_theta: 40 },
} satisfies Record<string, Json>;
const [width, hidden] = [8, 5];

interface NaiveJet {
  readonly experts?: number;
  readonly k?: number;
  readonly kvHeads?: number;
  readonly headSize?: number;
  readonly tied?: boolean;
  readonly turns?: NaiveTurns;
  readonly activation?: (x: number) => number;
}
const plain = (size: number): NaiveTurns => ({
  inverse: Array.from({ length: size / 2 }, (_, i) => 40 ** ((-2 * i) / size)),
});

/** 2404.07413, section 2, and the class of the library: its norms in layers have an eps of their own. */
function naiveJet(o: NaiveJet = {}): NaiveModel {
  const { experts = 5, k = 2, kvHeads = 2, headSize = 4, tied = true, activation = naiveSilu } = o;
  const inner = kvHeads * headSize;
  const shapes = new Map<string, readonly number[]>();
  for (let l = 0; l < 2; l++) {
    const [own, mlp] = [`model.layers.${l}.self_attention`, `model.layers.${l}.mlp`];
    shapes.set(`${own}.experts.router.layer.weight`, [experts, width]).set(`${own}.experts.bias`, [width]);
    shapes.set(`${own}.experts.input_linear.weight`, [experts, inner, width]);
    shapes.set(`${own}.experts.output_linear.weight`, [experts, width, inner]);
    shapes.set(`${own}.kv_proj.weight`, [2 * inner, width]);
    shapes.set(`${mlp}.router.layer.weight`, [experts, width]).set(`${mlp}.bias`, [width]);
    shapes.set(`${mlp}.input_linear.weight`, [experts, 2 * hidden, width]);
    shapes.set(`${mlp}.output_linear.weight`, [experts, width, hidden]);
  }
  return {
    ...{ vocabulary: 19, width, layers: 2, eps: 0.05, layerEps: 1e-6, shapes, tied },
    attention(layer, xs, get) {
      const name = `model.layers.${layer}.self_attention`;
      const weights = {
        router: get(`${name}.experts.router.layer.weight`),
        input: get(`${name}.experts.input_linear.weight`),
        output: get(`${name}.experts.output_linear.weight`),
        kv: get(`${name}.kv_proj.weight`),
        bias: get(`${name}.experts.bias`),
      };
      return naiveMixture(weights, { experts, k, kvHeads, headSize, turns: o.turns ?? plain(headSize) }, xs);
    },
    feedForward(layer, x, get) {
      const name = `model.layers.${layer}.mlp`;
      let y = Array.from(get(`${name}.bias`));
      for (const [e, weight] of naiveChoice(times(get(`${name}.router.layer.weight`), x, experts), k)) {
        const both = times(get(`${name}.input_linear.weight`), x, 2 * hidden, e * 2 * hidden);
        const between = both.slice(0, hidden).map((gate, i) => activation(gate) * (both[hidden + i] as number));
        y = plus(y, times(get(`${name}.output_linear.weight`), between, width, e * width), weight);
      }
      return y;
    },
  };
}

describe("jetmoe equals the formulas", () => {
  it.each<[string, Record<string, Json>, NaiveJet]>([
    ["two of five experts, tied by default", {}, {}],
    ["one expert", { num_experts_per_tok: 1 }, { k: 1 }],
    ["all experts", { num_experts_per_tok: 5 }, { k: 5 }],
    ["one head of keys", { num_key_value_heads: 1 }, { kvHeads: 1 }],
    ["three heads of keys and three experts", { num_key_value_heads: 3, num_experts_per_tok: 3 }, { kvHeads: 3, k: 3 }],
    ["heads of six channels", { kv_channels: 6 }, { headSize: 6 }],
    ["heads stated", { num_attention_heads: 4 }, {}],
    ["a head of its own", { tie_word_embeddings: false }, { tied: false }],
    ["relu", { activation_function: "relu" }, { activation: (x) => Math.max(x, 0) }],
    [
      "linear rope",
      { rope_scaling: { rope_type: "linear", factor: 2 } },
      { turns: { inverse: plain(4).inverse.map((x) => x / 2) } },
    ],
    ["rope_parameters", { rope_theta: null, rope_parameters: { rope_theta: 40, rope_type: "default" } }, {}],
  ])("%s", async (_, change, naive) => {
    await expectModel(jetMoE, { ...config, ...change }, naiveJet(naive));
  });
});

describe("jetmoe", () => {
  it("asks two routers in each layer, that of attention first, and shows both", async () => {
    const on = makeEngine();
    const model = await jetMoE.read(naiveCheckpoint(config, naiveJet()), on);
    expect(model.routing).toEqual(
      [0, 0, 1, 1].map((layer, i) => ({ layer, part: i % 2 === 0 ? "attention" : "feedForward", experts: 5 })),
    );
    const places: number[] = [];
    const ids = on.tensor(Int32Array.of(1, 2, 3), [1, 3]);
    const logits = await model.step(ids, {
      trace: {
        record(place, { plan, logits: scores }) {
          places.push(place);
          expect(plan.kind === "sparse" && plan.experts.shape).toEqual([3, 2]);
          expect(scores?.shape).toEqual([3, 5]);
        },
      },
    });
    expect(places).toEqual([0, 1, 2, 3]);
    const { routed } = model.forward(model.params, ids);
    expect(routed.length).toBe(4);
    // Trainers count by these.
    for (const { metrics } of routed) {
      const load = Array.from((await metrics?.load?.data()) ?? []);
      expect(load.length).toBe(5);
      expect(load.reduce((a, b) => a + b)).toBe(6);
    }
    expect(logits.shape).toEqual([1, 19]);
  });

  it("takes overrides of the routers in attention, too, where they are named", async () => {
    const on = makeEngine();
    const model = await jetMoE.read(naiveCheckpoint(config, naiveJet()), on);
    const single = await jetMoE.read(naiveCheckpoint({ ...config, num_experts_per_tok: 1 }, naiveJet()), on);
    const ids = on.tensor(Int32Array.of(1, 2, 3, 4, 5, 6), [2, 3]);
    /** Logits, and the experts of each token and router. */
    const run = async (of: typeof model, override?: readonly (RoutingOverride | undefined)[]) => {
      const experts: Promise<number[]>[] = [];
      const logits = await of.step(ids, {
        positions: "all",
        ...(override ? { override } : {}),
        trace: {
          record(_, { plan }) {
            if (plan.kind === "sparse") experts.push(plan.experts.data().then((list) => Array.from(list)));
          },
        },
      });
      return { logits: Array.from(await logits.data()), experts: await Promise.all(experts) };
    };
    const [plain, one] = [await run(model), await run(single)];
    const both = await run(model, Array(2).fill({ k: 1, parts: ["attention", "feedForward"] }));
    for (const [i, x] of one.logits.entries()) expect(both.logits[i]).toBeCloseTo(x, 5);
    // The best one is the first of the two that the trained routing takes, as long as nothing before it differs.
    expect(one.experts[0]).toEqual(plain.experts[0]?.filter((_, i) => i % 2 === 0));
    const heads = await run(model, [{ k: 1, parts: ["attention"] }, undefined]);
    expect(heads.experts[0]?.filter((expert) => expert >= 0).length).toBe(3 + 6);
    expect(heads.experts[1]?.length).toBe(12);
    // The row without an override is as it was; the other is neither the trained one nor that with one expert everywhere.
    expect(heads.logits.slice(57)).toEqual(plain.logits.slice(57));
    for (const other of [plain, one]) expect(heads.logits.slice(0, 57)).not.toEqual(other.logits.slice(0, 57));
    // Without parts only feed-forward routers obey.
    const after = await run(model, Array(2).fill({ k: 1 }));
    expect([after.experts[0], after.experts[1]?.length]).toEqual([plain.experts[0], 6]);
    const masked = await run(model, Array(2).fill({ masked: [0], parts: ["attention"], layers: [0] }));
    expect(plain.experts[0]).toContain(0);
    expect(masked.experts[0]).not.toContain(0);
  });

  it("has the defaults of the class", () => {
    const { blueprint } = jetMoE.describe(anyIndex({ model_type: "jetmoe" }));
    expect(blueprint).toMatchObject({
      ...{ vocabulary: 32000, width: 2048, context: 4096, tieEmbeddings: true, layerNormEps: 1e-6 },
      norm: { kind: "rms", eps: 1e-6 },
    });
    expect(blueprint.layers.length).toBe(12);
    const [{ attention, feedForward } = {}] = blueprint.layers;
    expect(attention).toMatchObject({ kind: "mixture", experts: 8, k: 2, kvHeads: 16, headSize: 128 });
    expect(attention?.rope.at(1).inverse[1]).toBeCloseTo(10000 ** (-2 / 128), 12);
    expect(feedForward).toMatchObject({ experts: 8, hidden: 5632, activation: "silu", outputBias: true });
    if (feedForward?.kind !== "moe") throw new Error("expected experts");
    expect(feedForward.router.options).toMatchObject({ k: 2, order: "topk-softmax", balance: 0.01 });
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ num_attention_heads: 8 }, /"num_attention_heads" is 8, but 2 experts .* with 2 heads each .* make 4/],
    [{ kv_channels: 5 }, /"kv_channels" is 5; rotary positions need an even number/],
    [{ num_experts_per_tok: 6 }, /"num_experts_per_tok" is 6, but there are 5 experts/],
    [{ activation_function: "mish" }, /"activation_function" is "mish"; supported are silu/],
    [{ rope_scaling: { rope_type: "spiral" } }, /"rope_type" is "spiral"/],
    [{ aux_loss_coef: -1 }, /"aux_loss_coef" is -1/],
  ])("refuses %o", (change, message) => {
    expect(() => jetMoE.describe(anyIndex({ ...config, ...change }))).toThrow(message);
  });
});
