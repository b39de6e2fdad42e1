// Qwen3-MoE (2505.09388) in the Hugging Face layout: queries and keys normalised head by head, no shared expert, dense layers by list
// or by period, on request one sliding window for all layers.
import { topK } from "@switchyard/routers/top-k";
import type { DenseFeedForward, GroupedAttention, LayerBlueprint, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  checkLayerTypes,
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
} from "./hub.ts";
import { readDenseLayers } from "./qwen2-moe.ts";

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 151936,
    width: 2048,
    layers: 24,
    heads: 32,
    kvHeads: 4,
    context: 32768,
    eps: 1e-6,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  const headSize = readHeadSize(config, sizes);
  const { experts, k } = readExperts(config, { counts: ["num_experts", "num_local_experts"], experts: 128, k: 8 });
  const hidden = config.whole("moe_intermediate_size", 768);
  const denseHidden = config.whole("intermediate_size", 6144);
  const activation = readActivation(config);
  const denseLayers = readDenseLayers(config, layers);
  const windowed = config.boolean("use_sliding_window", false) && !isNull(checkpoint, "sliding_window");
  const window = windowed ? config.whole("sliding_window", 4096) : undefined;
  checkLayerTypes(
    config,
    Array.from({ length: layers }, () => window),
  );

  const norm: Norm = { kind: "rms", eps };
  const bias = config.boolean("attention_bias", false);
  const attention: GroupedAttention = {
    kind: "grouped",
    heads,
    kvHeads,
    headSize,
    bias,
    outputBias: bias,
    qkNorm: "head",
    window,
    rope: readRope(config, { headSize, theta: 10000, context }),
  };
  const routed: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation,
    router: topK({
      k,
      order: config.boolean("norm_topk_prob", false) ? "softmax-topk-renormalise" : "softmax-topk",
      balance: readNotNegative(config, "router_aux_loss_coef", 0.001),
      zLoss: 0,
    }),
  };
  const dense: DenseFeedForward = { kind: "dense", hidden: denseHidden, activation };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (const [layer, isDense] of denseLayers.entries()) {
    const name = `model.layers.${layer}.mlp`;
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    if (isDense) {
      placeGated(at, { path: `layers.${layer}.dense`, name, hidden: denseHidden, width });
      continue;
    }
    placeRouter(at, layer, { names: [`${name}.gate.weight`], experts, width });
    const prefixes = [`${name}.experts`];
    placeExperts(at, { path: `layers.${layer}.moe.experts`, prefixes, experts, hidden, width });
  }
  const blueprints = denseLayers.map(
    (isDense): LayerBlueprint => ({ attention, feedForward: isDense ? dense : routed }),
  );
  return described(at, { vocabulary, width, context, layers: blueprints, norm, tieEmbeddings });
}

/** Reads `model_type: "qwen3_moe"`, experts one by one or stacked. Throws CheckpointError for settings it does not know. */
export const qwen3Moe: DescribedArchitecture = architecture({ modelTypes: ["qwen3_moe"], describe });
