// The checkpoints of DeepSeek-V2 and V3 in plain float64 loops: what their tests share.
import {
  type Get,
  type NaiveModel,
  type NaiveTurns,
  naiveLatent,
  plus,
  type Row,
  times,
} from "../naive-attention.test-util.ts";
import { naiveSilu } from "../naive-decoder.test-util.ts";

export interface NaiveDeepSeek {
  /** Absent: one matrix for queries. */
  readonly queryRank?: number;
  readonly attentionBias?: boolean;
  readonly tied?: boolean;
  /** Layers without experts. */
  readonly isDense: (layer: number) => boolean;
  readonly sharedHidden: number;
  readonly correctionBias: boolean;
  /** Experts in one tensor. */
  readonly stacked?: boolean;
  readonly activation?: (x: number) => number;
  readonly turns?: NaiveTurns;
  /** Factor of the scores, default 1 / sqrt(10). */
  readonly scale?: number;
  /** From a token's logits, and the layer's correction bias, to experts and weights. */
  route(logits: Row, bias: Row): readonly (readonly [expert: number, weight: number])[];
}

/** config.json of the sizes below. */
export const deepSeekSizes = {
  ...{ vocab_size: 19, hidden_size: 9, intermediate_size: 6, moe_intermediate_size: 5, num_hidden_layers: 3 },
  ...{ num_attention_heads: 2, num_key_value_heads: 2, n_routed_experts: 8, num_experts_per_tok: 3 },
  ...{ kv_lora_rank: 4, qk_nope_head_dim: 6, qk_rope_head_dim: 4, v_head_dim: 7 },
  ...{ max_position_embeddings: 60, rms_norm_eps: 0.01, rope_theta: 30 },
};
const [heads, rank, nope, rope, value] = [2, 4, 6, 4, 7];
const [width, experts, hidden, denseHidden] = [9, 8, 5, 6];
export const plainTurns: NaiveTurns = { inverse: [1, 30 ** -0.5], interleaved: true };

export function naiveDeepSeek(o: NaiveDeepSeek): NaiveModel {
  const { queryRank, attentionBias, isDense, sharedHidden, correctionBias, stacked, activation = naiveSilu } = o;
  const shapes = new Map<string, readonly number[]>();
  const gated = (name: string, size: number): void => {
    for (const one of ["gate_proj", "up_proj"]) shapes.set(`${name}.${one}.weight`, [size, width]);
    shapes.set(`${name}.down_proj.weight`, [width, size]);
  };
  for (let l = 0; l < 3; l++) {
    const [own, mlp] = [`model.layers.${l}.self_attn`, `model.layers.${l}.mlp`];
    if (queryRank === undefined) shapes.set(`${own}.q_proj.weight`, [heads * (nope + rope), width]);
    else {
      shapes.set(`${own}.q_a_proj.weight`, [queryRank, width]).set(`${own}.q_a_layernorm.weight`, [queryRank]);
      shapes.set(`${own}.q_b_proj.weight`, [heads * (nope + rope), queryRank]);
      if (attentionBias) shapes.set(`${own}.q_a_proj.bias`, [queryRank]);
    }
    shapes.set(`${own}.kv_a_proj_with_mqa.weight`, [rank + rope, width]);
    shapes.set(`${own}.kv_a_layernorm.weight`, [rank]).set(`${own}.kv_b_proj.weight`, [heads * (nope + value), rank]);
    shapes.set(`${own}.o_proj.weight`, [width, heads * value]);
    if (attentionBias) shapes.set(`${own}.kv_a_proj_with_mqa.bias`, [rank + rope]).set(`${own}.o_proj.bias`, [width]);
    if (isDense(l)) {
      gated(mlp, denseHidden);
      continue;
    }
    shapes.set(`${mlp}.gate.weight`, [experts, width]);
    if (correctionBias) shapes.set(`${mlp}.gate.e_score_correction_bias`, [experts]);
    if (stacked) {
      shapes.set(`${mlp}.experts.gate_up_proj`, [experts, 2 * hidden, width]);
      shapes.set(`${mlp}.experts.down_proj`, [experts, width, hidden]);
    } else for (let e = 0; e < experts; e++) gated(`${mlp}.experts.${e}`, hidden);
    if (sharedHidden > 0) gated(`${mlp}.shared_experts`, sharedHidden);
  }
  const between = (gate: Row, up: Row): number[] => gate.map((g, i) => activation(g) * (up[i] as number));
  const runGated = (name: string, x: Row, size: number, get: Get): number[] => {
    const [gate, up] = ["gate_proj", "up_proj"].map((one) => times(get(`${name}.${one}.weight`), x, size));
    return times(get(`${name}.down_proj.weight`), between(gate ?? [], up ?? []), width);
  };
  return {
    ...{ vocabulary: 19, width, layers: 3, eps: 0.01, shapes },
    ...(o.tied ? { tied: true } : {}),
    attention(layer, xs, get) {
      const name = `model.layers.${layer}.self_attn`;
      const biasOf = (one: string) => (attentionBias ? get(`${name}.${one}.bias`) : undefined);
      const queries =
        queryRank === undefined
          ? { q: get(`${name}.q_proj.weight`) }
          : {
              qDown: get(`${name}.q_a_proj.weight`),
              qDownBias: biasOf("q_a_proj"),
              qNorm: get(`${name}.q_a_layernorm.weight`),
              qUp: get(`${name}.q_b_proj.weight`),
            };
      const weights = {
        ...queries,
        kvDown: get(`${name}.kv_a_proj_with_mqa.weight`),
        kvDownBias: biasOf("kv_a_proj_with_mqa"),
        kvNorm: get(`${name}.kv_a_layernorm.weight`),
        kvUp: get(`${name}.kv_b_proj.weight`),
        o: get(`${name}.o_proj.weight`),
        oBias: biasOf("o_proj"),
      };
      const scale = o.scale ?? 1 / Math.sqrt(nope + rope);
      return naiveLatent(weights, { heads, rank, nope, rope, value, scale, turns: o.turns ?? plainTurns }, xs);
    },
    feedForward(layer, x, get) {
      const name = `model.layers.${layer}.mlp`;
      if (isDense(layer)) return runGated(name, x, denseHidden, get);
      const bias = correctionBias ? Array.from(get(`${name}.gate.e_score_correction_bias`)) : [];
      let y = sharedHidden > 0 ? runGated(`${name}.shared_experts`, x, sharedHidden, get) : x.map(() => 0);
      for (const [e, weight] of o.route(times(get(`${name}.gate.weight`), x, experts), bias)) {
        if (!stacked) {
          y = plus(y, runGated(`${name}.experts.${e}`, x, hidden, get), weight);
          continue;
        }
        const both = times(get(`${name}.experts.gate_up_proj`), x, 2 * hidden, e * 2 * hidden);
        const inner = between(both.slice(0, hidden), both.slice(hidden));
        y = plus(y, times(get(`${name}.experts.down_proj`), inner, width, e * width), weight);
      }
      return y;
    },
  };
}

/** Ids by falling score, ties to the lower one. */
export const ranked = (scores: Row): number[] =>
  [...scores.keys()].sort((a, b) => (scores[b] as number) - (scores[a] as number) || a - b);

/** The experts of the `kept` groups whose `best` largest scores have the largest sum. */
export function inBestGroups(
  scores: Row,
  { groups, kept, best }: { readonly groups: number; readonly kept: number; readonly best: number },
): number[] {
  const size = scores.length / groups;
  const groupScores = Array.from({ length: groups }, (_, g) =>
    scores
      .slice(g * size, (g + 1) * size)
      .sort((a, b) => b - a)
      .slice(0, best)
      .reduce((a, b) => a + b, 0),
  );
  const chosen = new Set(ranked(groupScores).slice(0, kept));
  return [...scores.keys()].filter((e) => chosen.has(Math.floor(e / size)));
}

/** 2309.00071, 3.2 and 3.4, and DeepSeek's mscale: frequencies, the factor of cosine and sine, that of the softmax's scale. */
export function naiveYarn({
  factor,
  original,
  mscale,
  all,
}: {
  readonly factor: number;
  readonly original: number;
  readonly mscale?: number;
  readonly all?: number;
}): { readonly turns: NaiveTurns; readonly softmax: number } {
  const pairOf = (turns: number): number => (rope * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(30));
  const low = Math.max(Math.floor(pairOf(32)), 0);
  const high = Math.min(Math.ceil(pairOf(1)), rope - 1);
  const inverse = [0, 1].map((i) => {
    const plain = 30 ** ((-2 * i) / rope);
    const share = Math.min(Math.max((i - low) / (high - low), 0), 1);
    return share * (plain / factor) + (1 - share) * plain;
  });
  const grown = (by: number): number => 0.1 * by * Math.log(factor) + 1;
  const scaling = mscale && all ? grown(mscale) / grown(all) : grown(1);
  return { turns: { inverse, scaling, interleaved: true }, softmax: all ? grown(all) ** 2 : 1 };
}
