// One random model in both layouts: a Hugging Face checkpoint (safetensors) for us and a GGUF file for llama.cpp, with the same
// numbers in f32 or in int8. Qwen3-MoE, because both sides know it and turn its rotary positions alike.
import { join } from "node:path";
import {
  architectures,
  type OpenCheckpoint,
  openCheckpoint,
  randomCheckpoint,
  saveCheckpoint,
  type TensorSource,
  toFloat32,
} from "@switchyard/models";
import { type GgufTensor, type GgufValue, writeGguf } from "./gguf.ts";
import { groupSize, quantize } from "./int8.ts";

export interface ModelSizes {
  readonly layers: number;
  readonly width: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headSize: number;
  readonly experts: number;
  /** Experts per token. */
  readonly k: number;
  /** Inner width of an expert. */
  readonly hidden: number;
  readonly vocabulary: number;
  readonly context: number;
}

/** Of the matrices; norms, routers and the embedding are f32 in both. */
export type Weights = "f32" | "int8";

/** Where the two files lie. */
export interface Twins {
  /** A folder in the Hugging Face layout. */
  readonly checkpoint: string;
  readonly gguf: string;
}

const modelType = "qwen3_moe";
const eps = 1e-6;
const theta = 10_000;

const config = (sizes: ModelSizes) => ({
  architectures: ["Qwen3MoeForCausalLM"],
  model_type: modelType,
  vocab_size: sizes.vocabulary,
  hidden_size: sizes.width,
  num_hidden_layers: sizes.layers,
  num_attention_heads: sizes.heads,
  num_key_value_heads: sizes.kvHeads,
  head_dim: sizes.headSize,
  num_experts: sizes.experts,
  num_experts_per_tok: sizes.k,
  moe_intermediate_size: sizes.hidden,
  norm_topk_prob: true,
  hidden_act: "silu",
  rms_norm_eps: eps,
  rope_theta: theta,
  max_position_embeddings: sizes.context,
  tie_word_embeddings: false,
});

/** Names of GGUF and of the checkpoint, of tensors outside the layers and of those of one layer. */
const outside = {
  token_embd: "model.embed_tokens",
  output_norm: "model.norm",
  output: "lm_head",
} as const;
const inLayer = {
  attn_norm: "input_layernorm",
  attn_q: "self_attn.q_proj",
  attn_k: "self_attn.k_proj",
  attn_v: "self_attn.v_proj",
  attn_output: "self_attn.o_proj",
  attn_q_norm: "self_attn.q_norm",
  attn_k_norm: "self_attn.k_norm",
  ffn_norm: "post_attention_layernorm",
  ffn_gate_inp: "mlp.gate",
} as const;
const ofExperts = { ffn_gate_exps: "gate_proj", ffn_up_exps: "up_proj", ffn_down_exps: "down_proj" } as const;

const inInt8 = (name: string): boolean => /_proj\.weight$|^lm_head\.weight$/.test(name);

const values = async (checkpoint: OpenCheckpoint, name: string): Promise<Float32Array> =>
  toFloat32(await checkpoint.read(name), checkpoint.stored(name).dtype, name);

/** The f32 checkpoint with its matrices in int8: `int-quantized` of compressed-tensors, codes `x.weight` and scales `x.weight_scale`. */
function int8Tensors(checkpoint: OpenCheckpoint): readonly TensorSource[] {
  return checkpoint.names.flatMap((name): TensorSource[] => {
    const { dtype, shape } = checkpoint.stored(name);
    if (!inInt8(name)) return [{ name, dtype, shape, bytes: () => checkpoint.read(name) }];
    const [rows = 0, inner = 0] = shape;
    const bytesOf = async (part: "codes" | "scales"): Promise<Uint8Array> =>
      new Uint8Array(quantize(await values(checkpoint, name))[part].buffer);
    return [
      { name, dtype: "I8", shape, bytes: () => bytesOf("codes") },
      { name: `${name}_scale`, dtype: "F16", shape: [rows, inner / groupSize], bytes: () => bytesOf("scales") },
    ];
  });
}

const quantization = {
  quant_method: "compressed-tensors",
  format: "int-quantized",
  quantization_status: "compressed",
  ignore: ["re:.*mlp.gate$"],
  config_groups: {
    group_0: {
      targets: ["Linear"],
      input_activations: null,
      output_activations: null,
      weights: { num_bits: 8, type: "int", symmetric: true, strategy: "group", group_size: groupSize, dynamic: false },
    },
  },
};

function ggufTensors(checkpoint: OpenCheckpoint, { layers, experts }: ModelSizes, weights: Weights): GgufTensor[] {
  const tensor = (to: string, from: readonly string[]): GgufTensor => {
    const names = from.map((name) => `${name}.weight`);
    const [first = ""] = names;
    const { shape } = checkpoint.stored(first);
    return {
      name: `${to}.weight`,
      shape: names.length === 1 ? shape : [names.length, ...shape],
      type: weights === "int8" && inInt8(first) ? "q8_0" : "f32",
      async *data() {
        for (const name of names) yield await values(checkpoint, name);
      },
    };
  };
  const tensors = Object.entries(outside).map(([to, from]) => tensor(to, [from]));
  for (let layer = 0; layer < layers; layer++) {
    const [to, from] = [`blk.${layer}`, `model.layers.${layer}`];
    for (const [own, theirs] of Object.entries(inLayer)) tensors.push(tensor(`${to}.${own}`, [`${from}.${theirs}`]));
    for (const [own, theirs] of Object.entries(ofExperts)) {
      const each = Array.from({ length: experts }, (_, e) => `${from}.mlp.experts.${e}.${theirs}`);
      tensors.push(tensor(`${to}.${own}`, each));
    }
  }
  return tensors;
}

/**
 * Both work on ids. But node-llama-cpp tokenises a text when it loads a model, and ends the process where there is no vocabulary: bytes,
 * and after them words that no text has.
 */
function ggufVocabulary(size: number): Readonly<Record<string, GgufValue>> {
  const [unknown, control, plain, byte] = [2, 3, 1, 6];
  const bytes = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, "0")}>`);
  const words = Array.from({ length: size - 3 - bytes.length }, (_, i) => `[${i}]`);
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", ...bytes, ...words],
    "tokenizer.ggml.token_type": [unknown, control, control, ...bytes.map(() => byte), ...words.map(() => plain)],
  };
}

const ggufKeys = (sizes: ModelSizes): Readonly<Record<string, GgufValue>> => ({
  "general.architecture": "qwen3moe",
  "qwen3moe.block_count": sizes.layers,
  "qwen3moe.context_length": sizes.context,
  "qwen3moe.embedding_length": sizes.width,
  "qwen3moe.feed_forward_length": sizes.hidden,
  "qwen3moe.expert_feed_forward_length": sizes.hidden,
  "qwen3moe.expert_count": sizes.experts,
  "qwen3moe.expert_used_count": sizes.k,
  "qwen3moe.attention.head_count": sizes.heads,
  "qwen3moe.attention.head_count_kv": sizes.kvHeads,
  "qwen3moe.attention.key_length": sizes.headSize,
  "qwen3moe.attention.value_length": sizes.headSize,
  "qwen3moe.attention.layer_norm_rms_epsilon": { float: eps },
  "qwen3moe.rope.freq_base": { float: theta },
  "qwen3moe.rope.dimension_count": sizes.headSize,
  "qwen3moe.vocab_size": sizes.vocabulary,
  ...ggufVocabulary(sizes.vocabulary),
});

/** Writes a random model into `folder` in both layouts, for each kind of weights. int8 ones are the rounded f32 ones. */
export async function writeTwins(folder: string, sizes: ModelSizes): Promise<Readonly<Record<Weights, Twins>>> {
  const twins = (weights: Weights): Twins => ({
    checkpoint: join(folder, weights),
    gguf: join(folder, `${weights}.gguf`),
  });
  const [f32, int8] = [twins("f32"), twins("int8")];
  const architecture = architectures.find(({ modelTypes }) => modelTypes.includes(modelType));
  if (!architecture) throw new Error(`no architecture reads ${modelType}`);
  await randomCheckpoint(f32.checkpoint, { config: config(sizes), architecture }, { dtype: "F32", scale: 0.05 });
  const checkpoint = await openCheckpoint(f32.checkpoint);
  try {
    await saveCheckpoint(int8.checkpoint, {
      config: { ...config(sizes), quantization_config: quantization },
      tensors: int8Tensors(checkpoint),
    });
    for (const [weights, { gguf }] of [
      ["f32", f32],
      ["int8", int8],
    ] as const) {
      await writeGguf(gguf, ggufKeys(sizes), ggufTensors(checkpoint, sizes, weights));
    }
  } finally {
    await checkpoint.close();
  }
  return { f32, int8 };
}
