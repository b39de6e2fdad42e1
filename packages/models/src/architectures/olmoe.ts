// OLMoE (2409.02060) in the Hugging Face layout: reading any such checkpoint, and writing models of the same form, so
// that other libraries load what was trained here. Form: top-k routing, q/k norm over the whole projection, SwiGLU
// experts, no biases.
import { CheckpointError, type Engine, leaves, random, type Tensor, type Tree } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { isRecord } from "../checkpoint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { Checkpoint } from "../model.ts";
import type { TensorSource } from "../safetensors.ts";
import { buildTransformer, type Transformer, type TransformerArchitecture } from "../transformer.ts";
import { type CompleteConfig, completeConfig, parameterShapes } from "../transformer-config.ts";
import {
  bytesOf,
  type CheckpointContent,
  checkAllUsed,
  checkCounts,
  checkMemory,
  expectShape,
  readFloats,
  readTensor,
  stored,
} from "../weights.ts";

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

/** Defaults are those of the configuration class: keys equal to them are not always written. */
function readConfig(checkpoint: Checkpoint): CompleteConfig {
  const config = new ConfigReader(checkpoint.config);
  config.only("hidden_act", "silu");
  config.only("attention_bias", false);
  config.only("rope_scaling");
  // Since version 5 of the library: { rope_theta, rope_type }.
  const rope = config.get("rope_parameters");
  const ropeReader = isRecord(rope) ? new ConfigReader(rope, "config.json: rope_parameters") : config;
  if (isRecord(rope)) ropeReader.only("rope_type", "default");
  const heads = config.whole("num_attention_heads", 16);
  const clip = config.get("clip_qkv") === undefined ? undefined : config.number("clip_qkv");
  const headSize = config.get("head_dim") === undefined ? undefined : config.whole("head_dim");
  return completeConfig({
    vocabulary: config.whole("vocab_size", 50304),
    width: config.whole("hidden_size", 2048),
    layers: config.whole("num_hidden_layers", 16),
    heads,
    kvHeads: config.whole("num_key_value_heads", heads),
    ...(headSize === undefined ? {} : { headSize }),
    experts: config.whole("num_experts", 64),
    hidden: config.whole("intermediate_size", 2048),
    context: config.whole("max_position_embeddings", 4096),
    ropeTheta: ropeReader.number("rope_theta", config.number("rope_theta", 10000)),
    normEps: config.number("rms_norm_eps", 1e-5),
    qkNorm: "projection",
    clipQkv: clip,
    tieEmbeddings: config.boolean("tie_word_embeddings", false),
    router: topK({
      k: config.whole("num_experts_per_tok", 8),
      order: config.boolean("norm_topk_prob", false) ? "softmax-topk-renormalise" : "softmax-topk",
      balance: config.number("router_aux_loss_coef", 0.01),
      zLoss: config.number("router_z_loss_coef", 0.001),
    }),
  });
}

/** Experts lie one by one: gate and up of each are stacked to [experts, 2 hidden, width]. */
async function readExperts(checkpoint: Checkpoint, path: string, shape: readonly number[]): Promise<Float32Array> {
  const [experts = 0, rows = 0, columns = 0] = shape;
  const matrices = path.endsWith(".gateUp") ? (["gate", "up"] as const) : (["down"] as const);
  const size = (rows / matrices.length) * columns;
  // All are there before memory is taken for them: the sizes come from config.json.
  for (let e = 0; e < experts; e++) {
    for (const matrix of matrices) {
      expectShape(checkpoint, expertName(path, e, matrix), [rows / matrices.length, columns]);
    }
  }
  const stacked = new Float32Array(experts * rows * columns);
  for (let e = 0; e < experts; e++) {
    for (const [i, matrix] of matrices.entries()) {
      const part = await readFloats(checkpoint, expertName(path, e, matrix), [rows / matrices.length, columns]);
      stacked.set(part, e * rows * columns + i * size);
    }
  }
  return stacked;
}

async function read(
  checkpoint: Checkpoint,
  engine: Engine,
  { memory }: { readonly memory?: number },
): Promise<Transformer> {
  const config = readConfig(checkpoint);
  checkCounts(checkpoint, { layers: config.layers, experts: config.experts });
  const shapes = parameterShapes(config);
  checkMemory(shapes.values(), memory);
  const loaded = new Map<string, Tensor>();
  const used = new Set<string>();
  try {
    for (const [path, shape] of shapes) {
      const name = hubName(path);
      if (name === undefined) {
        loaded.set(path, engine.tensor(await readExperts(checkpoint, path, shape), shape));
        for (let e = 0; e < config.experts; e++) {
          for (const matrix of ["gate", "up", "down"] as const) used.add(expertName(path, e, matrix));
        }
      } else {
        loaded.set(path, await readTensor(engine, checkpoint, name, shape));
        used.add(name);
      }
    }
    const gates: Tensor[] = [];
    for (let layer = 0; layer < config.layers; layer++) {
      const name = `model.layers.${layer}.mlp.gate.weight`;
      const gate = await readTensor(engine, checkpoint, name, [config.experts, config.width]);
      loaded.set(name, gate);
      gates.push(gate);
      used.add(name);
    }
    const tied = (name: string): boolean => config.tieEmbeddings && name === "lm_head.weight";
    checkAllUsed(checkpoint, used, (name) => tied(name) || name.endsWith("rotary_emb.inv_freq"));
    const plugin = withWeights(config.router, gates);
    return buildTransformer(
      engine,
      { ...config, router: plugin },
      {
        random: random(engine, 0),
        parameter: (path) => loaded.get(path) as Tensor,
      },
    );
  } catch (error) {
    for (const x of loaded.values()) x.dispose();
    throw error;
  }
}

/** The same plugin; its routers start from the weights of the checkpoint instead of random ones. */
function withWeights(plugin: CompleteConfig["router"], gates: readonly Tensor[]): CompleteConfig["router"] {
  return {
    ...plugin,
    init(context) {
      const router = plugin.init(context);
      for (const [, x] of leaves(router.params)) x.dispose();
      return { ...router, params: { weight: gates[context.layer] as Tensor } };
    },
  };
}

/**
 * Reads `model_type: "olmoe"`. Throws CheckpointError for settings it does not know, so that no model runs differently
 * in silence.
 */
export const olmoe: TransformerArchitecture = {
  modelTypes: ["olmoe"],
  read,
};

/** Why a model cannot be written in this layout; undefined where it can. */
export function olmoeRefusal({ config, buffers }: Transformer): string | undefined {
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
      torch_dtype: "float32",
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
  const size = (rows / matrices.length) * columns * 4;
  const count = experts * matrices.length;
  let whole: Promise<Uint8Array> | undefined;
  return Array.from({ length: count }, (_, i) => ({
    name: expertName(path, Math.floor(i / matrices.length), matrices[i % matrices.length] ?? "down"),
    dtype: "F32",
    shape: [rows / matrices.length, columns],
    async bytes() {
      whole ??= x.data().then(bytesOf);
      const bytes = (await whole).subarray(i * size, (i + 1) * size);
      if (i === count - 1) whole = undefined;
      return bytes;
    },
  }));
}
