// Phi-3.5-MoE (2404.14219) in the Hugging Face layout: SparseMixer picks two experts (2409.12136; at inference the best ones), Layer
// norms, biases on attention and head on request, longrope whose factors of cosine and sine are given (`short_mscale`, `long_mscale`).
// Past the original length the long factors hold, as in version 4.57 of the library and in the authors' code.
import { grin } from "@switchyard/routers/grin";
import type { GroupedAttention, MoEFeedForward, Norm } from "../blueprint.ts";
import { isRecord } from "../checkpoint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
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
  refuse,
  ropeKey,
} from "./hub.ts";
import { mixtralNames } from "./mixtral.ts";

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const sizes = readSizes(checkpoint, {
    vocabulary: 32064,
    width: 4096,
    layers: 32,
    heads: 32,
    kvHeads: 8,
    context: 131072,
    eps: 1e-5,
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  const headSize = readHeadSize(config, sizes);
  const { experts, k } = readExperts(config, { counts: ["num_local_experts", "num_experts"], experts: 16, k: 2 });
  // The library takes two whatever this says.
  if (k !== 2) refuse(`"num_experts_per_tok" is ${k}; the classes of this family always take 2`);
  const hidden = config.whole("intermediate_size", 6400);
  const window = config.get("sliding_window") === undefined ? undefined : config.whole("sliding_window");
  checkLayerTypes(
    config,
    Array.from({ length: layers }, () => window),
  );

  const norm: Norm = { kind: "layer", eps };
  const bias = config.boolean("attention_bias", false);
  const headBias = config.boolean("lm_head_bias", false);
  const attention: GroupedAttention = {
    kind: "grouped",
    heads,
    kvHeads,
    headSize,
    bias,
    outputBias: bias,
    window,
    rope: readPhiRope(config, { headSize, context }),
  };
  const feedForward: MoEFeedForward = {
    kind: "moe",
    experts,
    hidden,
    activation: readActivation(config),
    router: grin({
      k,
      jitter: readNotNegative(config, "router_jitter_noise", 0.01),
      balance: readNotNegative(config, "router_aux_loss_coef", 0.001),
    }),
  };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings, headBias });
  for (let layer = 0; layer < layers; layer++) {
    const [old, mlp] = ["block_sparse_moe", "mlp"].map((name) => `model.layers.${layer}.${name}`);
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    placeRouter(at, layer, { names: [`${old}.gate.weight`, `${mlp}.router.weight`], experts, width });
    placeExperts(at, {
      path: `layers.${layer}.moe.experts`,
      prefixes: [`${old}.experts`, `${mlp}.experts`],
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
    headBias,
  });
}

/** Plain positions, or longrope with everything the family's class asks of it. */
function readPhiRope(
  config: ConfigReader,
  sizes: { readonly headSize: number; readonly context: number },
): GroupedAttention["rope"] {
  const rope = readRope(config, { ...sizes, theta: 1e6, types: ["default", "longrope"] });
  const key = ropeKey(config);
  const record = config.get(key);
  if (rope.type === "longrope" && isRecord(record)) {
    const needed = ["short_mscale", "long_mscale", "original_max_position_embeddings"];
    const missing = needed.find((name) => typeof record[name] !== "number");
    if (missing !== undefined) refuse(`"${key}" has no "${missing}", which this family needs for longrope`);
  }
  return rope;
}

/**
 * Reads `model_type: "phimoe"`, experts one by one (`block_sparse_moe.experts.0.w1`) or stacked (`mlp.experts.gate_up_proj`). Throws
 * CheckpointError for settings it does not know.
 */
export const phiMoe: DescribedArchitecture = architecture({ modelTypes: ["phimoe"], describe });
