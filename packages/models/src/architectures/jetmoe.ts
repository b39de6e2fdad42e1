// JetMoE (2404.07413) in the Hugging Face layout: a mixture of attention heads and one of feed-forward experts in every layer, both
// with the k best logits and their softmax, both with a bias on what they give.
import { topK } from "@switchyard/routers/top-k";
import type { MixtureAttention, MoEFeedForward, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  described,
  type Places,
  placeLayerNorms,
  placeOutside,
  placeRouter,
  placeStacked,
  places,
  readActivation,
  readExperts,
  readNotNegative,
  readRope,
  readSizes,
  refuse,
} from "./hub.ts";

function describe(checkpoint: CheckpointIndex): Description {
  const config = new ConfigReader(checkpoint.config);
  const { experts, k } = readExperts(config, { counts: ["num_local_experts", "num_experts"], experts: 8, k: 2 });
  const kvHeads = config.whole("num_key_value_heads", 16);
  const sizes = readSizes(checkpoint, {
    ...{ vocabulary: 32000, width: 2048, layers: 12, heads: kvHeads * k, kvHeads: 16, context: 4096, eps: 1e-6 },
    tieEmbeddings: true,
  });
  const { vocabulary, width, layers, heads, context, eps, tieEmbeddings } = sizes;
  if (heads !== kvHeads * k) {
    refuse(
      `"num_attention_heads" is ${heads}, but ${k} experts ("num_experts_per_tok") with ${kvHeads} heads each ` +
        `("num_key_value_heads") make ${kvHeads * k}`,
    );
  }
  const headSize = config.whole("kv_channels", 128);
  if (headSize % 2 !== 0) refuse(`"kv_channels" is ${headSize}; rotary positions need an even number`);
  const hidden = config.whole("intermediate_size", 5632);

  const norm: Norm = { kind: "rms", eps };
  const router = topK({ k, order: "topk-softmax", balance: readNotNegative(config, "aux_loss_coef", 0.01), zLoss: 0 });
  const rope = readRope(config, { headSize, theta: 10000, context });
  const attention: MixtureAttention = { kind: "mixture", experts, k, kvHeads, headSize, router, rope };
  const activation = readActivation(config, "activation_function");
  const feedForward: MoEFeedForward = { kind: "moe", experts, hidden, activation, router, outputBias: true };

  const at = places(checkpoint);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (let layer = 0; layer < layers; layer++) {
    const name = `model.layers.${layer}.mlp`;
    placeLayerNorms(at, layer, { norm, width });
    placeMixture(at, layer, attention, width);
    placeRouter(at, layer, { names: [`${name}.router.layer.weight`], experts, width });
    const names = { gateUp: `${name}.input_linear.weight`, down: `${name}.output_linear.weight` };
    placeStacked(at, { path: `layers.${layer}.moe.experts`, ...names, experts, hidden, width });
    at.whole(`layers.${layer}.moeBias`, `${name}.bias`, [width]);
  }
  return described(at, {
    vocabulary,
    width,
    context,
    layers: Array.from({ length: layers }, () => ({ attention, feedForward })),
    norm,
    // The library's class hands "rms_norm_eps" to the last norm only.
    layerNormEps: 1e-6,
    tieEmbeddings,
  });
}

function placeMixture(at: Places, layer: number, attention: MixtureAttention, width: number): void {
  const { experts, kvHeads, headSize } = attention;
  const inner = kvHeads * headSize;
  const [path, name] = [`layers.${layer}.attention`, `model.layers.${layer}.self_attention`];
  at.whole(`${path}.router.weight`, `${name}.experts.router.layer.weight`, [experts, width]);
  at.experts(`${path}.experts.input`, [experts, inner, width], (e) => [
    { name: `${name}.experts.input_linear.weight`, shape: [inner, width], index: e, of: experts },
  ]);
  at.experts(`${path}.experts.output`, [experts, width, inner], (e) => [
    { name: `${name}.experts.output_linear.weight`, shape: [width, inner], index: e, of: experts },
  ]);
  at.whole(`${path}.kv`, `${name}.kv_proj.weight`, [2 * inner, width]);
  at.whole(`${path}.bias`, `${name}.experts.bias`, [width]);
}

/** Reads `model_type: "jetmoe"`. Throws CheckpointError for settings it does not know. */
export const jetMoE: DescribedArchitecture = architecture({ modelTypes: ["jetmoe"], describe });
