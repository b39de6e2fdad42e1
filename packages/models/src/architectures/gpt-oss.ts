// gpt-oss (2508.10925) in the Hugging Face layout: grouped-query attention with sinks and biases, a sliding window in every second
// layer; the k best logits, then their softmax; clamped gated experts with biases, stacked, in floats or MXFP4.
import { topK } from "@switchyard/routers/top-k";
import type { GroupedAttention, LayerBlueprint, Norm } from "../blueprint.ts";
import { ConfigReader } from "../config-reader.ts";
import type { CheckpointIndex, Description, Piece } from "../source.ts";
import { architecture, type DescribedArchitecture } from "./architecture.ts";
import {
  described,
  isNull,
  type Places,
  placeAttention,
  placeLayerNorms,
  placeOutside,
  placeRouter,
  places,
  readExperts,
  readHeadSize,
  readNotNegative,
  readRope,
  readSizes,
  readWindows,
  refuse,
} from "./hub.ts";

/** What the class takes where neither spelling of the key is there. */
const usualRope = {
  rope_type: "yarn",
  factor: 32,
  beta_fast: 32,
  beta_slow: 1,
  truncate: false,
  original_max_position_embeddings: 4096,
};

function describe(checkpoint: CheckpointIndex): Description {
  for (const key of ["rope_scaling", "rope_parameters"]) {
    if (isNull(checkpoint, key)) {
      refuse(`"${key}" is null, which is plain rotary positions in one version of the library and yarn in another`);
    }
  }
  const plain = ["rope_scaling", "rope_parameters"].every((key) => !Object.hasOwn(checkpoint.config, key));
  const config = new ConfigReader({ ...checkpoint.config, ...(plain ? { rope_scaling: usualRope } : {}) });
  const sizes = readSizes(checkpoint, {
    ...{ vocabulary: 201088, width: 2880, layers: 36, heads: 64, kvHeads: 8, context: 131072, eps: 1e-5 },
  });
  const { vocabulary, width, layers, heads, kvHeads, context, eps, tieEmbeddings } = sizes;
  config.only("hidden_act", "silu");
  const given = config.get("head_dim") !== undefined || isNull(checkpoint, "head_dim");
  const headSize = given ? readHeadSize(config, sizes) : 64;
  const { experts, k } = readExperts(config, { counts: ["num_local_experts", "num_experts"], experts: 128, k: 4 });
  const hidden = config.whole("intermediate_size", 2880);
  const window = isNull(checkpoint, "sliding_window") ? undefined : config.whole("sliding_window", 128);
  if (window === undefined && config.get("layer_types") === undefined) {
    refuse('"sliding_window" is null, but every second layer has one unless "layer_types" says otherwise');
  }
  const windows = readWindows(config, { layers, window, fallback: (layer) => layer % 2 === 0 });
  const limit = config.number("swiglu_limit", 7);
  if (!(limit > 0)) refuse(`"swiglu_limit" is ${limit}, expected a number above 0`);

  const norm: Norm = { kind: "rms", eps };
  const bias = config.boolean("attention_bias", true);
  const rope = readRope(config, { headSize, theta: 150000, context });
  const router = topK({
    k,
    order: "topk-softmax",
    bias: true,
    balance: readNotNegative(config, "router_aux_loss_coef", 0.9),
    zLoss: 0,
  });
  const blueprints = windows.map((own) => {
    const attention: GroupedAttention = {
      kind: "grouped",
      ...{ heads, kvHeads, headSize, bias, outputBias: bias, window: own, sinks: true, rope },
    };
    const activation = { kind: "clamped", limit, alpha: 1.702 } as const;
    return {
      attention,
      feedForward: { kind: "moe", experts, hidden, activation, bias: true, router },
    } as const satisfies LayerBlueprint;
  });

  const at = places(checkpoint);
  const stored = new Set(checkpoint.names);
  placeOutside(at, { vocabulary, width, norm, tieEmbeddings });
  for (const [layer, { attention }] of blueprints.entries()) {
    const [path, name] = [`layers.${layer}.moe`, `model.layers.${layer}.mlp`];
    placeLayerNorms(at, layer, { norm, width });
    placeAttention(at, layer, attention, width);
    placeRouter(at, layer, { names: [`${name}.router.weight`], experts, width });
    at.whole(`${path}.router.bias`, `${name}.router.bias`, [experts]);
    placeClamped(at, stored, { path: `${path}.experts`, name: `${name}.experts`, experts, hidden, width });
  }
  return described(at, { vocabulary, width, context, layers: blueprints, norm, tieEmbeddings });
}

/** Stacked experts whose rows of gate and up alternate: floats lie as [in, out], the blocks of MXFP4 as [out, in]. */
function placeClamped(
  at: Places,
  stored: ReadonlySet<string>,
  options: {
    readonly path: string;
    readonly name: string;
    readonly experts: number;
    readonly hidden: number;
    readonly width: number;
  },
): void {
  const { path, name, experts, hidden, width } = options;
  const place = (
    own: string,
    file: string,
    shape: readonly number[],
    form: Pick<Piece, "transposed" | "alternating">,
  ) =>
    at.experts(`${path}.${own}`, [experts, ...shape], (e) => [
      { name: `${name}.${file}`, shape, index: e, of: experts, ...form },
    ]);
  const lying = (file: string): Pick<Piece, "transposed"> =>
    stored.has(`${name}.${file}_blocks`) ? {} : { transposed: true };
  place("gateUp", "gate_up_proj", [2 * hidden, width], { ...lying("gate_up_proj"), alternating: true });
  place("down", "down_proj", [width, hidden], lying("down_proj"));
  place("gateUpBias", "gate_up_proj_bias", [2 * hidden], { alternating: true });
  place("downBias", "down_proj_bias", [width], {});
}

/**
 * Reads `model_type: "gpt_oss"`, experts in floats (`gate_up_proj`) or MXFP4 (`gate_up_proj_blocks`, `_scales`). `swiglu_limit` is
 * obeyed, as by the authors' code; the library's class knows only 7. Throws CheckpointError for settings it does not know.
 */
export const gptOss: DescribedArchitecture = architecture({ modelTypes: ["gpt_oss"], describe });
