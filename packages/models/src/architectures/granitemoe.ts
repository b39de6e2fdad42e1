// GraniteMoe (IBM Granite 3.0 language models, 2024) in the Hugging Face layout: the k best logits, then their softmax; experts stacked
// in `input_linear` and `output_linear`; factors on embedding, residual stream and scores, and a divisor of the logits.
import { topK } from "@switchyard/routers/top-k";
import type { GroupedAttention, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  checkLayerTypes,
  described,
  placeAttention,
  placeLayerNorms,
  placeOutside,
  placeRouter,
  placeStacked,
  places,
  readActivation,
  readExperts,
  readHeadSize,
  readNotNegative,
  readRope,
  readSizes,
  refuse,
} from "./hub.ts";

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 32000,
    width: 4096,
    layers: 32,
    heads: 32,
    context: 2048,
    eps: 1e-6,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  config.only("position_embedding_type", "rope");
  config.only("sliding_window");
  checkLayerTypes(config, Array.from({ length: layers }));
  const headSize = readHeadSize(config, sizes);
  const { experts, k } = readExperts(config, { counts: ["num_local_experts", "num_experts"], experts: 8, k: 2 });
  const hidden = config.whole("intermediate_size", 11008);
  const divisor = config.number("logits_scaling", 1);
  if (divisor === 0) refuse('"logits_scaling" is 0, and logits are divided by it');

  const norm: Norm = { kind: "rms", eps };
  const bias = config.boolean("attention_bias", false);
  const attention: GroupedAttention = {
    kind: "grouped",
    heads,
    kvHeads,
    headSize,
    bias,
    outputBias: bias,
    // Not 1 / sqrt(headSize) where the key is absent.
    scale: config.number("attention_multiplier", 1),
    rope: readRope(config, { headSize, theta: 10000, context }),
  };
  const feedForward: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation: readActivation(config),
    router: topK({
      k,
      order: "topk-softmax",
      balance: readNotNegative(config, "router_aux_loss_coef", 0.001),
      zLoss: 0,
    }),
  };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (let layer = 0; layer < layers; layer++) {
    const name = `model.layers.${layer}.block_sparse_moe`;
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    // The second names are those of the modules of version 5 of the library, which it writes on request.
    placeRouter(at, layer, { names: [`${name}.router.layer.weight`, `${name}.router.weight`], experts, width });
    const newer = at.has(`${name}.experts.gate_up_proj`);
    placeStacked(at, {
      path: `layers.${layer}.moe.experts`,
      gateUp: newer ? `${name}.experts.gate_up_proj` : `${name}.input_linear.weight`,
      down: newer ? `${name}.experts.down_proj` : `${name}.output_linear.weight`,
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
    embedScale: config.number("embedding_multiplier", 1),
    residualScale: config.number("residual_multiplier", 1),
    logitScale: 1 / divisor,
  });
}

/** Reads `model_type: "granitemoe"`. Throws CheckpointError for settings it does not know. */
export const graniteMoe: DescribedArchitecture = architecture({ modelTypes: ["granitemoe"], describe });
