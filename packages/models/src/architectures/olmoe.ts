// OLMoE (2409.02060) in the Hugging Face layout: reading any such checkpoint, and writing models of the same form, so
// that other libraries load what was trained here. Form: top-k routing, q/k norm over the whole projection, SwiGLU
// experts; on request clipped queries, keys and values, and biases.
import { CheckpointError, type Engine, leaves, type Tensor, type Tree } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import type { GroupedAttention, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { Checkpoint, LanguageModel, ReadModelOptions } from "../model.ts";
import type { TensorSource } from "../safetensors.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { type Transformer, withConfig } from "../transformer.ts";
import { type CompleteConfig, completeConfig } from "../transformer-config.ts";
import { bytesOf, type CheckpointContent, fileTypes, stored } from "../weights.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  checkLayerTypes,
  described,
  placeAttention,
  placeExperts,
  placeLayerNorms,
  placeOutside,
  placeRouter,
  places,
  readActivation,
  readExperts,
  readHeadSize,
  readNotNegative,
  readRope,
  readSizes,
  readTheta,
  refuse,
} from "./hub.ts";

/** Our path of a parameter that is stored as one tensor -> its name on the Hub. */
const names: ReadonlyMap<string, string> = new Map([
  ["attentionNorm", "input_layernorm"],
  ["attention.q", "self_attn.q_proj"],
  ["attention.k", "self_attn.k_proj"],
  ["attention.v", "self_attn.v_proj"],
  ["attention.o", "self_attn.o_proj"],
  ["attention.qNorm", "self_attn.q_norm"],
  ["attention.kNorm", "self_attn.k_norm"],
  ["moeNorm", "post_attention_layernorm"],
  ["moe.router.weight", "mlp.gate"],
]);

/** The name on the Hub; undefined for the experts' matrices, which lie there one by one. */
function hubName(path: string): string | undefined {
  if (path === "embed") return "model.embed_tokens.weight";
  if (path === "norm") return "model.norm.weight";
  if (path === "head") return "lm_head.weight";
  const [, layer, rest = ""] = /^layers\.(\d+)\.(.+)$/.exec(path) ?? [];
  const name = names.get(rest);
  return name === undefined ? undefined : `model.layers.${layer}.${name}.weight`;
}
const expertName = (path: string, expert: number, matrix: "gate" | "up" | "down"): string =>
  `model.layers.${path.split(".")[1]}.mlp.experts.${expert}.${matrix}_proj.weight`;

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 50304,
    width: 2048,
    layers: 16,
    heads: 16,
    context: 4096,
    eps: 1e-5,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  config.only("sliding_window");
  checkLayerTypes(config, Array.from({ length: layers }));
  const headSize = readHeadSize(config, sizes);
  const { experts, k } = readExperts(config, { counts: ["num_experts", "num_local_experts"], experts: 64, k: 8 });
  const hidden = config.whole("intermediate_size", 2048);
  const clip = config.get("clip_qkv") === undefined ? undefined : config.number("clip_qkv");
  if (clip !== undefined && !(clip > 0)) refuse(`"clip_qkv" is ${clip}, expected a number above 0 or null`);

  const norm: Norm = { kind: "rms", eps };
  const bias = config.boolean("attention_bias", false);
  const attention: GroupedAttention = {
    kind: "grouped",
    heads,
    kvHeads,
    headSize,
    bias,
    outputBias: bias,
    qkNorm: "projection",
    clip,
    rope: readRope(config, { headSize, theta: defaultTheta, context }),
  };
  const feedForward: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation: readActivation(config),
    router: topK({
      k,
      order: config.boolean("norm_topk_prob", false) ? "softmax-topk-renormalise" : "softmax-topk",
      balance: readNotNegative(config, "router_aux_loss_coef", 0.01),
      zLoss: readNotNegative(config, "router_z_loss_coef", 0.001),
    }),
  };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (let layer = 0; layer < layers; layer++) {
    const name = `model.layers.${layer}.mlp`;
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    placeRouter(at, layer, { names: [`${name}.gate.weight`], experts, width });
    const prefixes = [`${name}.experts`];
    placeExperts(at, { path: `layers.${layer}.moe.experts`, prefixes, experts, hidden, width });
  }
  return described(at, {
    vocabulary,
    width,
    context,
    layers: Array.from({ length: layers }, () => ({ attention, feedForward })),
    norm,
    tieEmbeddings,
  });
}

const defaultTheta = 10000;

/** The config of ours that says the same; undefined where the model has options that ours lacks. */
function configOf(model: LanguageModel, checkpoint: CheckpointIndex): CompleteConfig | undefined {
  const { vocabulary, width, context, layers, norm, tieEmbeddings } = model.blueprint;
  const [{ attention, feedForward } = {}] = layers;
  if (attention?.kind !== "grouped" || feedForward?.kind !== "moe") return undefined;
  const { heads, kvHeads, headSize, bias, clip, rope } = attention;
  const { experts, hidden, activation, router } = feedForward;
  if (bias || rope.type !== "default" || activation !== "silu") return undefined;
  return completeConfig({
    vocabulary,
    width,
    layers: layers.length,
    heads,
    kvHeads,
    headSize,
    experts,
    hidden,
    context,
    ropeTheta: readTheta(new ConfigReader(checkpoint.config), defaultTheta),
    normEps: norm.eps,
    qkNorm: "projection",
    clipQkv: clip,
    tieEmbeddings,
    router,
  });
}

const plain = architecture({ modelTypes: ["olmoe"], describe });

/**
 * Reads `model_type: "olmoe"`, experts one by one or stacked. The model has a `config` of ours, so that it can be trained and saved,
 * unless it uses biases, scaled rotary positions or another activation than SiLU. Throws CheckpointError for settings it does
 * not know, so that no model runs differently in silence.
 */
export const olmoe: DescribedArchitecture = {
  ...plain,
  async read(checkpoint: Checkpoint, engine: Engine, options?: ReadModelOptions): Promise<LanguageModel | Transformer> {
    const model = await plain.read(checkpoint, engine, options);
    const config = configOf(model, checkpoint);
    return config ? withConfig(model, config) : model;
  },
};

/** Why a model cannot be written in this layout; undefined where it can. */
export function olmoeRefusal({ config, buffers, params, streamed }: Transformer): string | undefined {
  const { router, width, heads, headSize, qkNorm, sharedExperts } = config;
  if (router.name !== "topK") return `its router is ${router.name}, and OLMoE has top-k routing only`;
  const { order, topP, bias } = router.options ?? {};
  if (order !== "softmax-topk" && order !== "softmax-topk-renormalise") {
    return `its router weighs experts in the order ${order}; OLMoE knows "softmax-topk" and "softmax-topk-renormalise"`;
  }
  if (topP !== null && topP !== undefined) return "its router uses topP";
  if (bias) return "its router has a bias";
  if (leaves(buffers).length > 0) return "its router keeps buffers";
  if (qkNorm !== "projection") return 'OLMoE normalises queries and keys; train with qkNorm: "projection"';
  if (headSize * heads !== width) return `heads (${heads}) times headSize (${headSize}) is not width (${width})`;
  if (sharedExperts > 0) return "it has shared experts";
  if (streamed) return "its experts are read from the file when they are needed; load it without a limit of memory";
  if (leaves(params).some(([path]) => hubName(path) === undefined && !/\.experts\.(gateUp|down)$/.test(path))) {
    return 'its weights are quantised; load it with weights: "f32"';
  }
  return undefined;
}

/** Ids of special tokens, as config.json names them. */
export interface SpecialIds {
  readonly bos?: number;
  readonly eos?: number;
  readonly pad?: number;
}

/**
 * config.json and tensors of a model in this layout. Throws CheckpointError with the reason where the model has another
 * form.
 */
export function writeOlmoe(model: Transformer, special: SpecialIds = {}): CheckpointContent {
  const refusal = olmoeRefusal(model);
  if (refusal !== undefined) throw new CheckpointError(`the model cannot be saved in the OLMoE layout: ${refusal}`);
  const { config } = model;
  const matrices = leaves(model.params).find(([path]) => path === "embed")?.[1].dtype;
  const { k = 1, order, balance = 0, zLoss = 0 } = config.router.options ?? {};
  return {
    config: {
      architectures: ["OlmoeForCausalLM"],
      model_type: "olmoe",
      attention_bias: false,
      attention_dropout: 0,
      bos_token_id: special.bos ?? null,
      clip_qkv: config.clipQkv ?? null,
      eos_token_id: special.eos ?? null,
      hidden_act: "silu",
      hidden_size: config.width,
      initializer_range: 0.02,
      intermediate_size: config.hidden,
      max_position_embeddings: config.context,
      norm_topk_prob: order === "softmax-topk-renormalise",
      num_attention_heads: config.heads,
      num_experts: config.experts,
      num_experts_per_tok: k,
      num_hidden_layers: config.layers,
      num_key_value_heads: config.kvHeads,
      output_router_logits: false,
      pad_token_id: special.pad ?? null,
      rms_norm_eps: config.normEps,
      rope_scaling: null,
      rope_theta: config.ropeTheta,
      router_aux_loss_coef: balance,
      router_z_loss_coef: zLoss,
      tie_word_embeddings: config.tieEmbeddings,
      torch_dtype: matrices === "bf16" ? "bfloat16" : matrices === "f16" ? "float16" : "float32",
      use_cache: true,
      vocab_size: config.vocabulary,
    },
    tensors: leaves(model.params as Tree).flatMap(([path, x]): TensorSource[] => {
      const name = hubName(path);
      return name === undefined ? expertTensors(path, x) : [stored(name, x)];
    }),
  };
}

/** One source per expert and matrix, over one copy of the stacked tensor that is dropped after the last of them. */
function expertTensors(path: string, x: Tensor): TensorSource[] {
  const [experts = 0, rows = 0, columns = 0] = x.shape;
  const matrices = path.endsWith(".gateUp") ? (["gate", "up"] as const) : (["down"] as const);
  const count = experts * matrices.length;
  let whole: Promise<Uint8Array> | undefined;
  return Array.from({ length: count }, (_, i) => ({
    name: expertName(path, Math.floor(i / matrices.length), matrices[i % matrices.length] ?? "down"),
    dtype: fileTypes[x.dtype],
    shape: [rows / matrices.length, columns],
    async bytes() {
      whole ??= x.data().then(bytesOf);
      const all = await whole;
      const size = all.byteLength / count;
      if (i === count - 1) whole = undefined;
      return all.subarray(i * size, (i + 1) * size);
    },
  }));
}
