// DeepSeek-V3 and R1 (2412.19437) in the Hugging Face layout: latent attention, sigmoid scores with a bias that only chooses, groups of
// experts, dense first layers and shared experts; weights also in fp8 with a scale per block.

import type { RouterPlugin } from "@switchyard/core/moe";
import { deepSeekV3 as router } from "@switchyard/routers/deep-seek-v3";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import { type DeepSeekRouting, describeDeepSeek, readGroups } from "./deepseek.ts";
import { isNull, oneOf, readNotNegative } from "./hub.ts";

const defaults = {
  ...{ vocabulary: 129280, width: 7168, hidden: 18432, expertHidden: 2048, layers: 61, heads: 128, context: 4096 },
  ...{ experts: 256, shared: 1, k: 8, dense: 3 },
};

function routerOf(routing: DeepSeekRouting): RouterPlugin {
  const { config, checkpoint, k, scale } = routing;
  config.only("scoring_func", "sigmoid");
  config.only("topk_method", "noaux_tc");
  const noGroups = isNull(checkpoint, "n_group");
  return router({
    k,
    scale,
    ...(noGroups ? {} : readGroups(routing, { groups: 8, kept: 4 })),
    normalise: config.boolean("norm_topk_prob", true),
    balance: readNotNegative(config, "aux_loss_alpha", 0.0001),
  });
}

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const description = describeDeepSeek(checkpoint, {
    defaults,
    scale: 2.5,
    interleaved: config.boolean("rope_interleave", true),
    correctionBias: true,
    router: routerOf,
  });
  // Layers that predict further tokens lie behind the last one.
  const further = config.whole(oneOf(config, ["num_nextn_predict_layers", "num_mtp_layers"]), 1, 0);
  const first = description.blueprint.layers.length;
  return {
    ...description,
    ignores(name) {
      const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
      return (layer >= first && layer < first + further) || description.ignores?.(name) === true;
    },
  };
}

/**
 * Reads `model_type: "deepseek_v3"`, in floats or in fp8 with `weight_block_size`, experts one by one or stacked. The layers for multi-token
 * prediction (`num_nextn_predict_layers`, numbered behind the others) are left unread: they are not needed to generate. Experts of
 * groups that are not chosen are never taken, as in the paper and in version 5 of the library; 4.x could take one where all others had a
 * score plus bias below 0. Throws CheckpointError for settings it does not know.
 */
export const deepSeekV3: DescribedArchitecture = architecture({ modelTypes: ["deepseek_v3"], describe });
