// Qwen2-MoE (2407.10671, section 3.2) in the Hugging Face layout: Qwen1.5-MoE and Qwen2-57B-A14B. Top-k of a softmax, a shared expert
// behind a sigmoid gate, biases on queries, keys and values, dense layers by list or by period.
import { topK } from "@switchyard/routers/top-k";
import type { DenseFeedForward, GroupedAttention, LayerBlueprint, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  described,
  isNull,
  placeAttention,
  placeExperts,
  placeGated,
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
  readWindows,
  refuse,
} from "./hub.ts";

/**
 * Which layers are dense, in both Qwen families: those of `mlp_only_layers`, and those whose number, counted from 1, is no multiple
 * of `decoder_sparse_step`.
 */
export function readDenseLayers(config: ConfigReader, layers: number): readonly boolean[] {
  const step = config.whole("decoder_sparse_step", 1);
  const listed = config.get("mlp_only_layers") ?? [];
  if (!Array.isArray(listed) || !listed.every((i) => Number.isSafeInteger(i) && i >= 0)) {
    refuse(`"mlp_only_layers" is ${JSON.stringify(listed)}, expected a list of layers, counted from 0`);
  }
  const dense = new Set(listed);
  return Array.from({ length: layers }, (_, i) => dense.has(i) || (i + 1) % step !== 0);
}

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 151936,
    width: 2048,
    layers: 24,
    heads: 16,
    kvHeads: 16,
    context: 32768,
    eps: 1e-6,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  const headSize = readHeadSize(config, sizes);
  const { experts, k } = readExperts(config, { counts: ["num_experts", "num_local_experts"], experts: 60, k: 4 });
  const hidden = config.whole("moe_intermediate_size", 1408);
  const sharedHidden = config.whole("shared_expert_intermediate_size", 5632);
  const denseHidden = config.whole("intermediate_size", 5632);
  const activation = readActivation(config);
  const denseLayers = readDenseLayers(config, layers);
  const windows = readQwenWindows(checkpoint, { layers, context });

  const norm: Norm = { kind: "rms", eps };
  const rope = readRope(config, { headSize, theta: 10000, context });
  const bias = config.boolean("qkv_bias", true);
  const routed: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation,
    shared: { hidden: sharedHidden, gate: true },
    router: topK({
      k,
      order: config.boolean("norm_topk_prob", false) ? "softmax-topk-renormalise" : "softmax-topk",
      balance: readNotNegative(config, "router_aux_loss_coef", 0.001),
      zLoss: 0,
    }),
  };
  const dense: DenseFeedForward = { kind: "dense", hidden: denseHidden, activation };
  const blueprints = windows.map((window, layer): LayerBlueprint => {
    const attention: GroupedAttention = { kind: "grouped", heads, kvHeads, headSize, bias, window, rope };
    return { attention, feedForward: denseLayers[layer] ? dense : routed };
  });

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (const [layer, { attention, feedForward }] of blueprints.entries()) {
    const path = `layers.${layer}`;
    const name = `model.layers.${layer}.mlp`;
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention as GroupedAttention, width);
    if (feedForward.kind === "dense") {
      placeGated(at, { path: `${path}.dense`, name, hidden: denseHidden, width });
      continue;
    }
    placeRouter(at, layer, { names: [`${name}.gate.weight`], experts, width });
    placeExperts(at, { path: `${path}.moe.experts`, prefixes: [`${name}.experts`], experts, hidden, width });
    const shared = `${path}.moe.shared.0`;
    placeGated(at, { path: `${shared}.experts`, name: `${name}.shared_expert`, hidden: sharedHidden, width });
    at.whole(`${shared}.gate`, `${name}.shared_expert_gate.weight`, [1, width]);
  }
  return described(at, { vocabulary, width, context, layers: blueprints, norm, tieEmbeddings });
}

/**
 * Windows count only with `use_sliding_window`. Which layers have them is said by `layer_types`; without that list versions of
 * the library disagree: 4.57 masks all layers, 5 every second one of those before `max_window_layers`.
 */
function readQwenWindows(
  checkpoint: CheckpointIndex,
  { layers, context }: { readonly layers: number; readonly context: number },
): readonly (number | undefined)[] {
  const config = new ConfigReader(checkpoint.config);
  const used = config.boolean("use_sliding_window", false) && !isNull(checkpoint, "sliding_window");
  const window = used ? config.whole("sliding_window", 4096) : undefined;
  if (window !== undefined && window < context && config.get("layer_types") === undefined) {
    refuse(
      '"use_sliding_window" is true without "layer_types", and versions of the library disagree about the layers that it ' +
        'stands for; add "layer_types", a list of "sliding_attention" and "full_attention"',
    );
  }
  return readWindows(config, { layers, window, fallback: () => used });
}

/**
 * Reads `model_type: "qwen2_moe"`, experts one by one or stacked. Throws CheckpointError for settings it does not know, and for
 * sliding windows without `layer_types`.
 */
export const qwen2Moe: DescribedArchitecture = architecture({ modelTypes: ["qwen2_moe"], describe });
