// What the checkpoints of DeepSeek-V2 and V3 have in common in the Hugging Face layout: latent attention, dense first layers, routed
// and shared experts. The versions differ in their routers and in the defaults of their configuration classes.
import type { RouterPlugin } from "@switchyard/core/moe";
import type { LatentAttention, LayerBlueprint, Norm } from "../blueprint.ts";
import { isRecord } from "../checkpoint.ts";
import { ConfigReader } from "../config-reader.ts";
import { quote } from "../safetensors.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import {
  described,
  isNull,
  type Places,
  placeExperts,
  placeGated,
  placeLayerNorms,
  placeOutside,
  placeRouter,
  places,
  readActivation,
  readExperts,
  readRope,
  readSizes,
  refuse,
} from "./hub.ts";

/** Defaults of a configuration class. `k` absent: the key must be there. */
export interface DeepSeekDefaults {
  readonly vocabulary: number;
  readonly width: number;
  readonly hidden: number;
  readonly expertHidden: number;
  readonly layers: number;
  readonly heads: number;
  readonly context: number;
  readonly experts: number;
  readonly shared: number;
  readonly k?: number;
  /** Layers before the first with experts. */
  readonly dense: number;
}

/** What the router of a version is made from. */
export interface DeepSeekRouting {
  readonly config: ConfigReader;
  readonly checkpoint: CheckpointIndex;
  readonly experts: number;
  readonly k: number;
  /** "routed_scaling_factor". */
  readonly scale: number;
}

/** The groups that experts lie in and how many a token may use; throws CheckpointError where they cannot hold k experts. */
export function readGroups(
  { config, experts, k }: DeepSeekRouting,
  defaults: { readonly groups?: number; readonly kept?: number } = {},
): { readonly groups: number; readonly keptGroups: number } {
  const groups = config.whole("n_group", defaults.groups);
  const keptGroups = config.whole("topk_group", defaults.kept);
  if (experts % groups !== 0) refuse(`${experts} experts do not split into ${groups} groups ("n_group")`);
  if (keptGroups > groups) refuse(`"topk_group" is ${keptGroups}, but "n_group" ${groups}`);
  const reachable = (experts / groups) * keptGroups;
  if (k > reachable) refuse(`"num_experts_per_tok" is ${k}, but ${keptGroups} of ${groups} groups hold ${reachable}`);
  return { groups, keptGroups };
}

/** Reads a checkpoint of either version. `correctionBias`: the router has a buffer `bias`. */
export function describeDeepSeek(
  checkpoint: CheckpointIndex,
  {
    defaults,
    scale: scaleDefault,
    interleaved,
    correctionBias,
    router,
  }: {
    readonly defaults: DeepSeekDefaults;
    readonly scale: number;
    readonly interleaved: boolean;
    readonly correctionBias: boolean;
    readonly router: (routing: DeepSeekRouting) => RouterPlugin;
  },
): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, { ...defaults, eps: 1e-6 });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  if (kvHeads !== heads) {
    refuse(`"num_key_value_heads" is ${kvHeads}, but latent attention has keys and values for all ${heads} heads`);
  }
  const hidden = config.whole("intermediate_size", defaults.hidden);
  const expertHidden = config.whole("moe_intermediate_size", defaults.expertHidden);
  const routed = readExperts(config, {
    counts: ["n_routed_experts", "num_experts", "num_local_experts"],
    experts: defaults.experts,
    ...(defaults.k === undefined ? { k: config.whole("num_experts_per_tok") } : { k: defaults.k }),
  });
  const { experts, k } = routed;
  const sharedCount = isNull(checkpoint, "n_shared_experts") ? 0 : config.whole("n_shared_experts", defaults.shared, 0);
  const firstMoE = config.whole("first_k_dense_replace", defaults.dense, 0);
  const every = config.whole("moe_layer_freq", 1);
  const scale = config.number("routed_scaling_factor", scaleDefault);
  if (!(scale > 0)) refuse(`"routed_scaling_factor" is ${scale}, expected a number above 0`);

  const norm: Norm = { kind: "rms", eps };
  const activation = readActivation(config);
  const attention = readLatent(checkpoint, { heads, context, interleaved });
  const moe = {
    kind: "moe",
    experts,
    hidden: expertHidden,
    activation,
    router: router({ config, checkpoint, experts, k, scale }),
    ...(sharedCount > 0 ? { shared: { hidden: sharedCount * expertHidden } } : {}),
  } as const;
  const dense = { kind: "dense", hidden, activation } as const;
  const blueprints = Array.from(
    { length: layers },
    (_, i): LayerBlueprint => ({ attention, feedForward: i >= firstMoE && i % every === 0 ? moe : dense }),
  );

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (const [layer, { feedForward }] of blueprints.entries()) {
    const [path, name] = [`layers.${layer}`, `model.layers.${layer}.mlp`];
    placeLayerNorms(at, layer, { norm, width });
    placeLatent(at, layer, attention, width);
    if (feedForward === dense) {
      placeGated(at, { path: `${path}.dense`, name, hidden, width });
      continue;
    }
    placeRouter(at, layer, { names: [`${name}.gate.weight`], experts, width });
    if (correctionBias) at.whole(`${path}.moe.buffers.bias`, `${name}.gate.e_score_correction_bias`, [experts]);
    const own = { experts, hidden: expertHidden, width };
    placeExperts(at, { path: `${path}.moe.experts`, prefixes: [`${name}.experts`], ...own });
    if (moe.shared) {
      const shared = { path: `${path}.moe.shared.0.experts`, name: `${name}.shared_experts` };
      placeGated(at, { ...shared, hidden: moe.shared.hidden, width });
    }
  }
  return described(at, { vocabulary, width, context, layers: blueprints, norm, tieEmbeddings });
}

/** The attention of all layers. */
function readLatent(
  checkpoint: CheckpointIndex,
  { heads, context, interleaved }: { readonly heads: number; readonly context: number; readonly interleaved: boolean },
): LatentAttention {
  const config = new ConfigReader(checkpoint.config);
  const nopeSize = config.whole("qk_nope_head_dim", 128);
  const ropeSize = config.whole("qk_rope_head_dim", 64);
  // Rotary positions are for the rotary channels only; "head_dim" is their number in what the library writes.
  const rope = readRope(config, { headSize: ropeSize, theta: 10000, context, interleaved });
  const record = config.get("rope_parameters") ?? config.get("rope_scaling");
  if (isRecord(record) && record.mscale_all_dim && rope.type !== "yarn" && rope.type !== "default") {
    refuse(`"mscale_all_dim" is given for rotary positions of type ${quote(rope.type)}; it is known for "yarn" only`);
  }
  return {
    kind: "latent",
    heads,
    queryRank: isNull(checkpoint, "q_lora_rank") ? undefined : config.whole("q_lora_rank", 1536),
    rank: config.whole("kv_lora_rank", 512),
    nopeSize,
    ropeSize,
    valueSize: config.whole("v_head_dim", 128),
    bias: config.boolean("attention_bias", false),
    scale: rope.softmaxScaling / Math.sqrt(nopeSize + ropeSize),
    // The library's class does not hand "rms_norm_eps" to the norms inside attention.
    normEps: 1e-6,
    rope,
  };
}

function placeLatent(at: Places, layer: number, attention: LatentAttention, width: number): void {
  const { heads, queryRank, rank, nopeSize, ropeSize, valueSize, bias } = attention;
  const [path, name] = [`layers.${layer}.attention`, `model.layers.${layer}.self_attn`];
  const rows = heads * (nopeSize + ropeSize);
  if (queryRank === undefined) at.whole(`${path}.q`, `${name}.q_proj.weight`, [rows, width]);
  else {
    at.whole(`${path}.qDown`, `${name}.q_a_proj.weight`, [queryRank, width]);
    at.whole(`${path}.qNorm`, `${name}.q_a_layernorm.weight`, [queryRank]);
    at.whole(`${path}.qUp`, `${name}.q_b_proj.weight`, [rows, queryRank]);
    if (bias) at.whole(`${path}.qDownBias`, `${name}.q_a_proj.bias`, [queryRank]);
  }
  at.whole(`${path}.kvDown`, `${name}.kv_a_proj_with_mqa.weight`, [rank + ropeSize, width]);
  at.whole(`${path}.kvNorm`, `${name}.kv_a_layernorm.weight`, [rank]);
  at.whole(`${path}.kvUp`, `${name}.kv_b_proj.weight`, [heads * (nopeSize + valueSize), rank]);
  at.whole(`${path}.o`, `${name}.o_proj.weight`, [width, heads * valueSize]);
  if (!bias) return;
  at.whole(`${path}.kvDownBias`, `${name}.kv_a_proj_with_mqa.bias`, [rank + ropeSize]);
  at.whole(`${path}.oBias`, `${name}.o_proj.bias`, [width]);
}
