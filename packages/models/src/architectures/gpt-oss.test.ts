// gpt-oss: options that the recorded checkpoints do not show, against naive loops; class defaults; refusals.
import type { Json } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import {
  expectModel,
  type NaiveModel,
  type NaiveTurns,
  naiveChoice,
  naiveSinks,
  plus,
  times,
} from "../naive-attention.test-util.ts";
import { anyIndex } from "../naive-decoder.test-util.ts";
import { gptOss } from "./gpt-oss.ts";

const config = {
  ...{ model_type: "gpt_oss", vocab_size: 19, hidden_size: 8, intermediate_size: 5, num_hidden_layers: 3 },
  ...{ num_attention_heads: 4, num_key_value_heads: 2, head_dim: 6, num_local_experts: 5, num_experts_per_tok: 2 },
  ...{ max_position_embeddings: 60, rms_norm_eps: 0.01, rope_theta: 50, sliding_window: 3 },
  rope_scaling: { rope_type: "default" },
} satisfies Record<string, Json>;
const [width, hidden, experts] = [8, 5, 5];

interface NaiveOss {
  readonly headSize?: number;
  readonly kvHeads?: number;
  readonly bias?: boolean;
  readonly k?: number;
  readonly limit?: number;
  readonly tied?: boolean;
  readonly windows?: readonly number[];
  readonly turns?: NaiveTurns;
  /** Is told gate and up of every expert that runs. */
  see?(gate: number, up: number): void;
}
const all = Number.POSITIVE_INFINITY;
const plain = (size: number): NaiveTurns => ({
  inverse: Array.from({ length: size / 2 }, (_, i) => 50 ** ((-2 * i) / size)),
});

/** 2508.10925 and the class of the library: [in, out] matrices, gate and up in turns. */
function naiveOss(o: NaiveOss = {}): NaiveModel {
  const { headSize = 6, kvHeads = 2, bias = true, k = 2, limit = 7, windows = [3, all, 3], see } = o;
  const heads = 4;
  const shapes = new Map<string, readonly number[]>();
  for (let l = 0; l < 3; l++) {
    const [own, mlp] = [`model.layers.${l}.self_attn`, `model.layers.${l}.mlp`];
    const rows = { q: heads * headSize, k: kvHeads * headSize, v: kvHeads * headSize };
    for (const [one, count] of Object.entries(rows)) {
      shapes.set(`${own}.${one}_proj.weight`, [count, width]);
      if (bias) shapes.set(`${own}.${one}_proj.bias`, [count]);
    }
    shapes.set(`${own}.o_proj.weight`, [width, heads * headSize]).set(`${own}.sinks`, [heads]);
    if (bias) shapes.set(`${own}.o_proj.bias`, [width]);
    shapes.set(`${mlp}.router.weight`, [experts, width]).set(`${mlp}.router.bias`, [experts]);
    shapes.set(`${mlp}.experts.gate_up_proj`, [experts, width, 2 * hidden]);
    shapes.set(`${mlp}.experts.gate_up_proj_bias`, [experts, 2 * hidden]);
    shapes.set(`${mlp}.experts.down_proj`, [experts, hidden, width]);
    shapes.set(`${mlp}.experts.down_proj_bias`, [experts, width]);
  }
  return {
    ...{ vocabulary: 19, width, layers: 3, eps: 0.01, shapes, tied: o.tied ?? false },
    attention(layer, xs, get) {
      const name = `model.layers.${layer}.self_attn`;
      const part = (one: string) => (one.endsWith("bias") && !bias ? undefined : get(`${name}.${one}`));
      const sizes = { heads, kvHeads, headSize, window: windows[layer] ?? all };
      return naiveSinks(part, { ...sizes, turns: o.turns ?? plain(headSize) }, xs);
    },
    feedForward(layer, x, get) {
      const name = `model.layers.${layer}.mlp`;
      const number = (one: string, i: number): number => get(`${name}.experts.${one}`)[i] as number;
      let y = x.map(() => 0);
      const logits = plus(times(get(`${name}.router.weight`), x, experts), get(`${name}.router.bias`));
      for (const [e, weight] of naiveChoice(logits, k)) {
        const column = (c: number): number =>
          x.reduce(
            (sum, v, r) => sum + v * number("gate_up_proj", (e * width + r) * 2 * hidden + c),
            number("gate_up_proj_bias", e * 2 * hidden + c),
          );
        const inner = Array.from({ length: hidden }, (_, i) => {
          const [gate, up] = [column(2 * i), column(2 * i + 1)];
          see?.(gate, up);
          const low = Math.min(gate, limit);
          return (Math.min(Math.max(up, -limit), limit) + 1) * low * (1 / (1 + Math.exp(-1.702 * low)));
        });
        const out = Array.from({ length: width }, (_, c) =>
          inner.reduce(
            (sum, v, r) => sum + v * number("down_proj", (e * hidden + r) * width + c),
            number("down_proj_bias", e * width + c),
          ),
        );
        y = plus(y, out, weight);
      }
      return y;
    },
  };
}

/** Frequencies of yarn between 32 and 1 turns, bounds rounded or not, as the class has it. */
function yarn(truncate: boolean, factor = 4, original = 10): NaiveTurns {
  const pairOf = (turns: number): number => (6 * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(50));
  const low = Math.max(truncate ? Math.floor(pairOf(32)) : pairOf(32), 0);
  const high = Math.min(truncate ? Math.ceil(pairOf(1)) : pairOf(1), 5);
  const inverse = [0, 1, 2].map((i) => {
    const share = Math.min(Math.max((i - low) / (high - low), 0), 1);
    return 50 ** ((-2 * i) / 6) * (share / factor + 1 - share);
  });
  return { inverse, scaling: 0.1 * Math.log(factor) + 1 };
}
const yarnRecord = { rope_type: "yarn", factor: 4, original_max_position_embeddings: 10 };

describe("gpt_oss equals the formulas", () => {
  it.each<[string, Record<string, Json>, NaiveOss]>([
    ["every second layer with a window", {}, {}],
    ["windows of one", { sliding_window: 1 }, { windows: [1, all, 1] }],
    ["windows longer than the text", { sliding_window: 40 }, { windows: [40, all, 40] }],
    [
      "windows by layer_types",
      { layer_types: ["full_attention", "sliding_attention", "sliding_attention"] },
      { windows: [all, 3, 3] },
    ],
    [
      "no window at all",
      { sliding_window: null, layer_types: ["full_attention", "full_attention", "full_attention"] },
      { windows: [all, all, all] },
    ],
    ["no biases of attention", { attention_bias: false }, { bias: false }],
    ["one head of keys", { num_key_value_heads: 1 }, { kvHeads: 1 }],
    ["as many keys as queries", { num_key_value_heads: null }, { kvHeads: 4 }],
    ["head_dim null", { head_dim: null }, { headSize: 2 }],
    ["one expert", { num_experts_per_tok: 1 }, { k: 1 }],
    ["all experts", { num_experts_per_tok: 5 }, { k: 5 }],
    ["tied embeddings", { tie_word_embeddings: true }, { tied: true }],
    ["yarn without rounding", { rope_scaling: { ...yarnRecord, truncate: false } }, { turns: yarn(false) }],
    ["yarn with rounding", { rope_scaling: { ...yarnRecord } }, { turns: yarn(true) }],
    [
      "rope_parameters",
      { rope_scaling: "absent", rope_theta: null, rope_parameters: { ...yarnRecord, truncate: false, rope_theta: 50 } },
      { turns: yarn(false) },
    ],
  ])("%s", async (_, change, naive) => {
    const given = Object.entries<Json>({ ...config, ...change }).filter(([, value]) => value !== "absent");
    await expectModel(gptOss, Object.fromEntries(given), naiveOss(naive));
  });

  it.each([0.5, 1.5, 7])("the limit of %d, reached by gate from above and by up on both sides", async (limit) => {
    const reached = { gate: 0, below: 0, up: 0, down: 0 };
    const see = (gate: number, up: number): void => {
      if (gate > limit) reached.gate++;
      if (gate < -limit) reached.below++;
      if (up > limit) reached.up++;
      if (up < -limit) reached.down++;
    };
    // Loud enough for the largest limit.
    const loud = naiveOss({ limit, see });
    await expectModel(gptOss, { ...config, swiglu_limit: limit }, loud, {
      change(checkpoint) {
        for (const [name, numbers] of checkpoint.numbers) {
          if (name.includes("gate_up_proj")) numbers.set(numbers.map((x) => 6 * x));
        }
        return checkpoint;
      },
    });
    expect(Math.min(...Object.values(reached))).toBeGreaterThan(0);
  });

  it("the class's yarn where the config says nothing", () => {
    const { rope_scaling: _, ...silent } = config;
    const { rope } = gptOss.describe(anyIndex(silent)).blueprint.layers[0]?.attention ?? {};
    expect(rope?.type).toBe("yarn");
    expect(rope?.at(1).scaling).toBeCloseTo(0.1 * Math.log(32) + 1, 12);
    const found = Array.from(rope?.at(1).inverse ?? []);
    const pairOf = (turns: number): number => (6 * Math.log(4096 / (turns * 2 * Math.PI))) / (2 * Math.log(50));
    const [low, high] = [pairOf(32), Math.min(pairOf(1), 5)];
    for (const [i, x] of found.entries()) {
      const share = Math.min(Math.max((i - low) / (high - low), 0), 1);
      expect(x).toBeCloseTo(50 ** ((-2 * i) / 6) * (share / 32 + 1 - share), 12);
    }
  });
});

describe("gpt_oss's config", () => {
  it("has the defaults of the class", () => {
    const { blueprint } = gptOss.describe(anyIndex({ model_type: "gpt_oss" }));
    expect(blueprint).toMatchObject({
      ...{ vocabulary: 201088, width: 2880, context: 131072, tieEmbeddings: false },
      norm: { kind: "rms", eps: 1e-5 },
    });
    expect(blueprint.layers.length).toBe(36);
    const [first, second] = blueprint.layers;
    expect(first?.attention).toMatchObject({
      ...{ heads: 64, kvHeads: 8, headSize: 64, bias: true, outputBias: true, sinks: true, window: 128 },
    });
    expect(second?.attention).toMatchObject({ window: undefined });
    expect(first?.attention.rope.at(1).inverse[0]).toBe(1);
    expect(first?.feedForward).toMatchObject({
      ...{ experts: 128, hidden: 2880, bias: true, activation: { kind: "clamped", limit: 7, alpha: 1.702 } },
    });
    if (first?.feedForward.kind !== "moe") throw new Error("expected experts");
    expect(first.feedForward.router.options).toMatchObject({ k: 4, order: "topk-softmax", bias: true });
  });

  it("blocks of MXFP4 lie as [out, in], floats as [in, out]", () => {
    const index = anyIndex(config);
    const name = "model.layers.0.mlp.experts.gate_up_proj";
    const pieceOf = (names: readonly string[]) => {
      const source = gptOss.describe({ ...index, names: [...index.names, ...names] }).sources;
      const found = source.get("layers.0.moe.experts.gateUp");
      return found?.kind === "experts" ? found.expert(1)[0] : undefined;
    };
    const common = { name, shape: [2 * hidden, width], index: 1, of: experts, alternating: true };
    expect(pieceOf([name])).toEqual({ ...common, transposed: true });
    expect(pieceOf([`${name}_blocks`, `${name}_scales`])).toEqual(common);
  });

  it.each<[Record<string, Json>, RegExp]>([
    [{ hidden_act: "gelu" }, /"hidden_act" is .*gelu.*only "silu" is known/],
    [{ rope_scaling: null }, /"rope_scaling" is null, which is plain .* in one version .* and yarn in another/],
    [{ sliding_window: null }, /"sliding_window" is null, but every second layer has one/],
    [
      { sliding_window: null, layer_types: ["full_attention", "sliding_attention", "full_attention"] },
      /layer 1 is of type "sliding_attention", but there is no "sliding_window"/,
    ],
    [{ layer_types: ["full_attention"] }, /expected a list of 3 kinds of layers/],
    [{ layer_types: ["full_attention", "chunked_attention", "full_attention"] }, /chunked_attention.* at 1; supported/],
    [{ swiglu_limit: 0 }, /"swiglu_limit" is 0, expected a number above 0/],
    [{ num_experts_per_tok: 6 }, /"num_experts_per_tok" is 6, but there are 5 experts/],
    [{ num_experts: 4 }, /"num_local_experts" is "5", but "num_experts" is "4"/],
    [{ num_key_value_heads: 3 }, /4 attention heads cannot share 3 heads/],
    [{ head_dim: 7 }, /heads have 7 channels; rotary positions need an even number/],
  ])("refuses %o", (change, message) => {
    expect(() => gptOss.describe(anyIndex({ ...config, ...change }))).toThrow(message);
  });
});
