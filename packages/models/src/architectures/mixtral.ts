// Mixtral (2401.04088) in the Hugging Face layout: top-k of a softmax over all experts, renormalised; grouped-query attention, on
// request with one sliding window for all layers; no biases.
import { topK } from "@switchyard/routers/top-k";
import type { GroupedAttention, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  checkLayerTypes,
  described,
  type ExpertNames,
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
} from "./hub.ts";

/** Gate, up and down of an expert, as Mixtral and Phi-MoE name them. */
export const mixtralNames: ExpertNames = ["w1", "w3", "w2"];

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 32000,
    width: 4096,
    layers: 32,
    heads: 32,
    kvHeads: 8,
    context: 131072,
    eps: 1e-5,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  config.only("attention_bias", false);
  const headSize = readHeadSize(config, sizes);
  const counts = ["num_local_experts", "num_experts"];
  const { experts, k } = readExperts(config, { counts, experts: 8, k: 2 });
  const hidden = config.whole("intermediate_size", 14336);
  const window = config.get("sliding_window") === undefined ? undefined : config.whole("sliding_window");
  checkLayerTypes(
    config,
    Array.from({ length: layers }, () => window),
  );

  const norm: Norm = { kind: "rms", eps };
  const rope = readRope(config, { headSize, theta: 1e6, context });
  const attention: GroupedAttention = { kind: "grouped", heads, kvHeads, headSize, window, rope };
  const feedForward: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation: readActivation(config),
    router: topK({ k, balance: readNotNegative(config, "router_aux_loss_coef", 0.001), zLoss: 0 }),
  };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (let layer = 0; layer < layers; layer++) {
    const modules = ["block_sparse_moe", "mlp"].map((name) => `model.layers.${layer}.${name}`);
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    placeRouter(at, layer, { names: modules.map((name) => `${name}.gate.weight`), experts, width });
    placeExperts(at, {
      path: `layers.${layer}.moe.experts`,
      prefixes: modules.map((name) => `${name}.experts`),
      names: mixtralNames,
      experts,
      hidden,
      width,
    });
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

/**
 * Reads `model_type: "mixtral"`, experts one by one (`block_sparse_moe.experts.0.w1`) or stacked (`mlp.experts.gate_up_proj`). Throws
 * CheckpointError for settings it does not know.
 */
export const mixtral: DescribedArchitecture = architecture({ modelTypes: ["mixtral"], describe });
