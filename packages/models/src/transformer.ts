// A decoder-only Mixture-of-Experts transformer as we train it: pre-norm RMS normalisation (1910.07467), rotary positions
// (2104.09864), grouped-query attention (2305.13245) and SwiGLU experts (2002.05202) behind any router. One definition
// trains and runs.
import { affine, type Engine, type Random, type Tensor, type Tree, UnsupportedError } from "@switchyard/core";
import type { Blueprint } from "./blueprint.ts";
import { buildDecoder } from "./build-decoder.ts";
import type { Architecture, Checkpoint, LanguageModel, ReadModelOptions } from "./model.ts";
import { blueprintOf, type CompleteConfig, completeConfig, type TransformerConfig } from "./transformer-config.ts";

/** A decoder with the sizes it was made with. */
export interface Transformer extends LanguageModel {
  readonly config: CompleteConfig;
  /** The same model with other parameters and buffers, for example a trainer's. Nothing is copied. */
  with(state: { readonly params?: Tree; readonly buffers?: readonly Tree[] }): Transformer;
}

/** A family of checkpoints that this one definition runs. */
export interface TransformerArchitecture extends Architecture {
  read(checkpoint: Checkpoint, engine: Engine, options?: ReadModelOptions): Promise<Transformer>;
}

/** N(0, 0.02); matrices that write into the residual stream scaled by 1/sqrt(2 layers) (GPT-2); norms start at 1. */
function initial(
  engine: Engine,
  config: CompleteConfig,
  random: Random,
): (path: string, shape: readonly number[]) => Tensor {
  return (path, shape) => {
    if (shape.length === 1) return engine.tensor(new Float32Array(shape[0] ?? 0).fill(1), shape);
    const residual = path.endsWith(".o") || path.endsWith(".down");
    const scale = residual ? 0.02 / Math.sqrt(2 * config.layers) : 0.02;
    return engine.scope(() => affine(random.at(path).normal(shape), { scale, shift: 0 }));
  };
}

/**
 * A new model with random parameters on `engine`.
 * Throws ShapeError where sizes do not fit together, UnsupportedError for a router that needs what text does not have.
 *
 * @example
 * const model = transformer(engine, { vocabulary: 2048, width: 128, layers: 4, heads: 4, experts: 8, hidden: 128,
 *   router: topK({ k: 2 }), context: 256 }, random(engine, 1));
 */
export function transformer(engine: Engine, config: TransformerConfig, random: Random): Transformer {
  const complete = completeConfig(config);
  return buildTransformer(engine, complete, { random, parameter: initial(engine, complete, random) });
}

/** A model whose parameters come from `parameter`, by path; those of the routers are new (see `parameterShapes`). */
export function buildTransformer(
  engine: Engine,
  config: CompleteConfig,
  parts: { readonly random: Random; parameter(path: string, shape: readonly number[]): Tensor },
): Transformer {
  const blueprint: Blueprint = blueprintOf(config);
  const parameters = { given: parts.parameter };
  return withConfig(buildDecoder(engine, blueprint, { random: parts.random, parameters }), config);
}

/** The model as one of our own making: a loaded one is, where it was saved in a layout of ours or as OLMoE. */
export function asTransformer(model: LanguageModel): Transformer {
  if ("config" in model) return model as Transformer;
  throw new UnsupportedError(
    "the model comes from a checkpoint of another architecture and has no config of ours; switchyard convert rewrites such checkpoints",
  );
}

/** A decoder of `blueprintOf(config)`, with that config. */
export const withConfig = (model: LanguageModel, config: CompleteConfig): Transformer => ({
  ...model,
  config,
  with: (state) => withConfig(model.with(state), config),
});
