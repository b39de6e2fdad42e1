// DeepSeek-V2 (2405.04434) in the Hugging Face layout: latent attention, softmax scores, on request limited to the best groups of
// experts, dense first layers and shared experts.

import type { RouterPlugin } from "@switchyard/core/moe";
import { deepSeekV2 as router } from "@switchyard/routers/deep-seek-v2";
import { quote } from "../safetensors.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import { type DeepSeekRouting, describeDeepSeek, readGroups } from "./deepseek.ts";
import { readNotNegative, refuse } from "./hub.ts";

const defaults = {
  ...{ vocabulary: 32000, width: 4096, hidden: 11008, expertHidden: 1407, layers: 32, heads: 32, context: 2048 },
  ...{ experts: 64, shared: 2, dense: 0 },
};

function routerOf(routing: DeepSeekRouting): RouterPlugin {
  const { config, k, scale } = routing;
  config.only("scoring_func", "softmax");
  config.only("mlp_bias", false);
  if (config.boolean("norm_topk_prob", false)) {
    refuse(
      '"norm_topk_prob" is true: the authors\' code then divides the weights by their sum and leaves out ' +
        '"routed_scaling_factor", the library does neither; only false is known',
    );
  }
  const method = config.string("topk_method", "greedy");
  const limited = method === "group_limited_greedy";
  if (!limited && method !== "greedy") {
    refuse(`"topk_method" is ${quote(method)}; supported are "greedy" and "group_limited_greedy"`);
  }
  return router({
    k,
    scale,
    ...(limited ? readGroups(routing) : {}),
    balance: readNotNegative(config, "aux_loss_alpha", 0.001),
    deviceBalance: 0,
    communication: 0,
  });
}

function describe(checkpoint: CheckpointIndex): Description {
  return describeDeepSeek(checkpoint, {
    defaults,
    scale: 1,
    interleaved: true,
    correctionBias: false,
    router: routerOf,
  });
}

/**
 * Reads `model_type: "deepseek_v2"` with `topk_method` "greedy" and "group_limited_greedy", experts one by one or stacked. With yarn and
 * `mscale_all_dim` scores are scaled as in the authors' code and in version 5 of the library. Layers with experts are those from
 * `first_k_dense_replace` whose number `moe_layer_freq` divides. Throws CheckpointError for settings it does not know.
 */
export const deepSeekV2: DescribedArchitecture = architecture({ modelTypes: ["deepseek_v2"], describe });
