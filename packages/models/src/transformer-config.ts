// The sizes of a transformer: options with their defaults, what fits together, and the shapes of all parameters.
import { ShapeError } from "@switchyard/core";
import type { RouterContext, RouterPlugin } from "@switchyard/core/moe";
import type { Blueprint, LayerBlueprint } from "./blueprint.ts";
import { blueprintShapes } from "./build-decoder.ts";
import { rotary } from "./rope.ts";

export interface TransformerConfig {
  /** Number of token ids. */
  readonly vocabulary: number;
  /** Size of the residual stream. */
  readonly width: number;
  readonly layers: number;
  readonly heads: number;
  /** Heads of keys and values, a divisor of `heads`; default heads. */
  readonly kvHeads?: number;
  /** Channels per head, even; default width / heads. */
  readonly headSize?: number;
  /** Experts per layer. */
  readonly experts: number;
  /** Inner size of one expert. */
  readonly hidden: number;
  readonly router: RouterPlugin;
  /** Longest sequence. */
  readonly context: number;
  /** Default 10000. */
  readonly ropeTheta?: number;
  /** Default 1e-5. */
  readonly normEps?: number;
  /**
   * RMS normalisation of queries and keys: of each head (Qwen3, 2505.09388), or of the whole projection (OLMoE,
   * 2409.02060). Default false.
   */
  readonly qkNorm?: false | "head" | "projection";
  /** Clips queries, keys and values to [-clipQkv, clipQkv] (OLMoE's option); default: no clipping. */
  readonly clipQkv?: number | undefined;
  /** One matrix for input and output embeddings; default false. */
  readonly tieEmbeddings?: boolean;
  /** Experts every token goes through, run as one of inner size sharedExperts * hidden (2401.06066); default: what the router asks for. */
  readonly sharedExperts?: number;
  /**
   * Accepts routers whose choice for a token depends on later tokens. The loss is then better than what generation can
   * reach, because the routing tells about the future. Default false.
   */
  readonly allowNonCausal?: boolean;
  /**
   * Occurrences of each token id in the training text, `[vocabulary]`, for routers whose table follows them (hash,
   * MaskMoE). Saved with the model.
   */
  readonly tokenCounts?: Float64Array | undefined;
}

/** `TransformerConfig` with every default filled in. */
export type CompleteConfig = Required<Omit<TransformerConfig, "clipQkv" | "tokenCounts">> & {
  readonly clipQkv: number | undefined;
  readonly tokenCounts: Float64Array | undefined;
};

const defaults = {
  ropeTheta: 10000,
  normEps: 1e-5,
  qkNorm: false,
  tieEmbeddings: false,
  allowNonCausal: false,
  clipQkv: undefined,
  tokenCounts: undefined,
} as const;

/** Fills in the defaults. Throws ShapeError where sizes do not fit together. */
export function completeConfig(config: TransformerConfig): CompleteConfig {
  const { width, heads } = config;
  const asked = config.router.sharedExperts ?? 0;
  const own = { kvHeads: heads, headSize: width / heads, sharedExperts: asked };
  const complete: CompleteConfig = { ...defaults, ...own, ...config };
  const refuse = (why: string): never => {
    throw new ShapeError(`transformer: ${why}`);
  };
  for (const name of ["vocabulary", "width", "layers", "heads", "kvHeads", "experts", "hidden", "context"] as const) {
    const value = complete[name];
    if (!Number.isInteger(value) || value < 1) refuse(`${name} is ${value}, expected a whole number from 1`);
  }
  const { kvHeads, headSize, sharedExperts, normEps, ropeTheta, clipQkv } = complete;
  if (!Number.isInteger(headSize) || headSize < 2 || headSize % 2 !== 0) {
    refuse(`headSize is ${headSize}, expected an even whole number (width ${width}, ${heads} heads)`);
  }
  if (heads % kvHeads !== 0) refuse(`${heads} heads cannot share ${kvHeads} heads of keys and values`);
  if (!Number.isInteger(sharedExperts) || sharedExperts < 0) refuse(`sharedExperts is ${sharedExperts}`);
  if (asked > 0 && sharedExperts !== asked) {
    refuse(`sharedExperts is ${sharedExperts}, but router ${config.router.name} asks for ${asked}; leave it out`);
  }
  if (!(normEps >= 0)) refuse(`normEps is ${normEps}`);
  if (!(ropeTheta > 0)) refuse(`ropeTheta is ${ropeTheta}`);
  if (clipQkv !== undefined && !(clipQkv > 0)) refuse(`clipQkv is ${clipQkv}`);
  const { tokenCounts, vocabulary } = complete;
  if (tokenCounts && tokenCounts.length !== vocabulary) {
    refuse(`tokenCounts has ${tokenCounts.length} entries, expected one for each of ${vocabulary} ids`);
  }
  return complete;
}

/** What routers are told about the token ids. */
export const vocabularyOf = ({
  vocabulary,
  tokenCounts,
}: CompleteConfig): Pick<RouterContext, "vocabulary" | "tokenCounts"> => ({
  vocabulary,
  ...(tokenCounts ? { tokenCounts } : {}),
});

/** The decoder that a config stands for: all layers are alike. */
export function blueprintOf(config: CompleteConfig): Blueprint {
  const { vocabulary, width, context, layers, heads, kvHeads, headSize, ropeTheta, normEps, qkNorm, clipQkv } = config;
  const { experts, hidden, router, sharedExperts, tieEmbeddings, allowNonCausal, tokenCounts } = config;
  const layer: LayerBlueprint = {
    attention: {
      kind: "grouped",
      heads,
      kvHeads,
      headSize,
      qkNorm: qkNorm || undefined,
      clip: clipQkv,
      rope: rotary(undefined, { headSize, theta: ropeTheta }),
    },
    feedForward: {
      kind: "moe",
      experts,
      hidden,
      router,
      shared: sharedExperts > 0 ? { hidden: sharedExperts * hidden } : undefined,
    },
  };
  return {
    vocabulary,
    width,
    context,
    layers: Array.from({ length: layers }, () => layer),
    norm: { kind: "rms", eps: normEps },
    tieEmbeddings,
    allowNonCausal,
    tokenCounts,
  };
}

/** Shapes of all parameters but the routers', by their path in `params`. */
export const parameterShapes = (config: TransformerConfig): ReadonlyMap<string, readonly number[]> =>
  blueprintShapes(blueprintOf(completeConfig(config)));
