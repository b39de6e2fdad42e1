// A decoder-only Mixture-of-Experts transformer: pre-norm RMS normalisation (1910.07467), rotary positions
// (2104.09864), grouped-query attention (2305.13245) and SwiGLU experts (2002.05202) behind any router. One definition
// trains and runs.
import {
  add,
  affine,
  attention,
  type Engine,
  hostConstant,
  leaves,
  linear,
  random as makeRandom,
  maximum,
  minimum,
  type Random,
  reshape,
  rmsNorm,
  rope,
  ShapeError,
  slice,
  type Tensor,
  type Tree,
  takeRows,
  UnsupportedError,
} from "@switchyard/core";
import {
  type Experts,
  glu,
  layerParams,
  type MoELayer,
  moe,
  moeLayer,
  type Routed,
  type Router,
  type RouterInput,
  routeTokens,
  runExperts,
} from "@switchyard/core/moe";
import { TransformerCache } from "./cache.ts";
import type { Architecture, Checkpoint, ForwardOptions, KvCache, Model } from "./model.ts";
import { ropeTables, rotary } from "./rope.ts";
import {
  type CompleteConfig,
  completeConfig,
  parameterShapes,
  type TransformerConfig,
  vocabularyOf,
} from "./transformer-config.ts";
import { branch, leaf, tensorsIn } from "./tree.ts";

export interface TransformerOptions extends ForwardOptions {
  /** Default false. */
  readonly training?: boolean;
  /** Optimiser steps done; default 0. */
  readonly step?: number;
  readonly totalSteps?: number;
  /** Repetition of the same batch (THOR); default 0. */
  readonly pass?: number;
  /** Keyed by (seed, step, pass, micro-batch); default: seed 0. */
  readonly random?: Random;
  /** One tree per layer, instead of the model's own. */
  readonly buffers?: readonly Tree[];
  /** Handed to routers. */
  readonly schedule?: Readonly<Record<string, number | boolean>>;
  /** `[load]` per layer, handed to routers. */
  readonly globalLoad?: readonly Tensor[];
  /**
   * Is told the inputs of every matrix of the routed experts, rows sorted by expert: `parameter` is the path of the
   * matrix in `params` ("layers.0.moe.experts.gateUp").
   */
  readonly observe?: (parameter: string, layer: number, rows: Tensor, ends: Tensor) => void;
}

export interface Transformer extends Model {
  readonly engine: Engine;
  readonly config: CompleteConfig;
  /** One per layer. */
  readonly routers: readonly Router[];
  /** The routers' buffers, one tree per layer. */
  readonly buffers: readonly Tree[];
  /**
   * ids i32 [batch, sequence] -> logits [batch, sequence, vocabulary], and what each layer's router decided. Ids
   * outside the vocabulary embed to zero. Throws ShapeError for a sequence beyond `context`, UnsupportedError for a
   * router that looks ahead.
   */
  forward(
    params: Tree,
    ids: Tensor,
    options?: TransformerOptions,
  ): { readonly logits: Tensor; readonly routed: readonly Routed[] };
  /**
   * Logits [batch, vocabulary] of the last position, layer by layer. Prompts of different lengths are padded at the
   * left. What a trace records is valid during the call only: read it or `alias` it.
   */
  step(ids: Tensor, options?: ForwardOptions): Promise<Tensor>;
  /** The same model with other parameters and buffers, for example a trainer's. Nothing is copied. */
  with(state: { readonly params?: Tree; readonly buffers?: readonly Tree[] }): Transformer;
}

/** A family of checkpoints that this one definition runs. */
export interface TransformerArchitecture extends Architecture {
  read(checkpoint: Checkpoint, engine: Engine, options: { readonly memory?: number }): Promise<Transformer>;
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
  const { width, layers, heads, experts: count, hidden, router: plugin, sharedExperts } = config;
  for (const need of plugin.needs) {
    if (need === "modalityIds" || need === "target") {
      throw new UnsupportedError(
        `router ${plugin.name} needs "${need}", which a text model does not have; use another router`,
      );
    }
  }
  const shapes = parameterShapes(config);
  const given = (path: string): Tensor => parts.parameter(path, shapes.get(path) ?? []);
  const shared = new Map<string, unknown>();
  const modules: MoELayer[] = [];
  const layerTrees: Tree[] = [];
  const embed = given("embed");
  for (let layer = 0; layer < layers; layer++) {
    const at = (name: string): Tensor => given(`layers.${layer}.${name}`);
    const attentionNames = ["q", "k", "v", "o", ...(config.qkNorm ? ["qNorm", "kNorm"] : [])];
    const attentionTree = Object.fromEntries(attentionNames.map((name) => [name, at(`attention.${name}`)]));
    const expertSet = (path: string, experts: number, inner: number): Experts =>
      glu({ count: experts, width, hidden: inner, params: { gateUp: at(`${path}.gateUp`), down: at(`${path}.down`) } });
    const experts = expertSet("moe.experts", count, hidden);
    const every =
      sharedExperts > 0 ? [{ experts: expertSet("moe.shared.0.experts", 1, sharedExperts * hidden) }] : undefined;
    const context = {
      engine,
      width,
      experts: count,
      heads,
      layer,
      layers,
      ...vocabularyOf(config),
      random: parts.random.at("router", layer),
      shared: <T>(key: string, make: () => T): T => {
        if (!shared.has(key)) shared.set(key, make());
        return shared.get(key) as T;
      },
    };
    const module = moeLayer(plugin, context, { experts, ...(every ? { shared: every } : {}) });
    modules.push(module);
    layerTrees.push({
      attentionNorm: at("attentionNorm"),
      attention: attentionTree,
      moeNorm: at("moeNorm"),
      moe: layerParams(module),
    });
  }
  const params: Tree = {
    embed,
    layers: layerTrees,
    norm: given("norm"),
    ...(config.tieEmbeddings ? {} : { head: given("head") }),
  };
  return assemble(engine, config, { modules, params, buffers: modules.map(({ router }) => router.buffers) });
}

/** The same router with other buffers; everything else is inherited, so that any kind of object works. */
const withBuffers = (router: Router, buffers: Tree): Router =>
  router.buffers === buffers ? router : Object.create(router, { buffers: { value: buffers, enumerable: true } });

interface Parts {
  readonly modules: readonly MoELayer[];
  readonly params: Tree;
  readonly buffers: readonly Tree[];
}

/** What is the same for all layers of one pass. */
interface PassState {
  readonly params: Tree;
  readonly options: TransformerOptions;
  readonly buffers: readonly Tree[];
  readonly random: Random;
  readonly layout: RouterInput["layout"];
  readonly cache: TransformerCache | undefined;
  readonly tokenIds: Tensor;
  /** [sequence, headSize / 2] */
  readonly cos: Tensor;
  readonly sin: Tensor;
}

function assemble(engine: Engine, config: CompleteConfig, parts: Parts): Transformer {
  const { vocabulary, width, layers, heads, kvHeads, headSize, context, ropeTheta, normEps: eps, qkNorm } = config;
  const { modules, params: ownParams, buffers: ownBuffers } = parts;
  const { router: plugin, clipQkv } = config;
  const positionsOf = rotary(undefined, { headSize, theta: ropeTheta });

  const checkCausal = (training: boolean, allowed: boolean): void => {
    if (allowed || (training ? plugin.causal.training : plugin.causal.evaluation)) return;
    const use = training
      ? "training a language model on it leaks the future into the loss"
      : "it can neither generate text nor be judged as if it could";
    throw new UnsupportedError(
      `router ${plugin.name} chooses experts by looking at later tokens, so ${use}; ` +
        "use a causal router, or set allowNonCausal: true if that is wanted",
    );
  };

  const checkCache = (cache: KvCache | undefined, batch: number): TransformerCache | undefined => {
    if (cache === undefined) return undefined;
    if (!(cache instanceof TransformerCache)) {
      throw new UnsupportedError(
        "transformer: this cache was made by another kind of model; use model.newCache(batch)",
      );
    }
    if (cache.batch !== batch)
      throw new ShapeError(`transformer: the cache has ${cache.batch} rows, the ids have ${batch}`);
    return cache;
  };

  /** Checks the inputs; its tensors live in the scope of the caller. */
  const begin = (params: Tree, ids: Tensor, options: TransformerOptions): PassState => {
    const [batch, sequence] = ids.shape;
    if (ids.shape.length !== 2 || ids.dtype !== "i32" || batch === undefined || sequence === undefined) {
      throw new ShapeError(`transformer: ids must be i32 [batch, sequence], found ${ids.dtype} [${ids.shape}]`);
    }
    const { training = false, mask, allowNonCausal = config.allowNonCausal } = options;
    checkCausal(training, allowNonCausal);
    const cache = checkCache(options.cache, batch);
    if (cache && training)
      throw new UnsupportedError("transformer: a cache is for inference; leave it out while training");
    const past = cache?.length ?? 0;
    if (past + sequence > context) {
      throw new ShapeError(
        `transformer: ${past + sequence} positions (${past} of them cached), but context is ${context}`,
      );
    }
    if (mask && mask.shape.join() !== [batch, past + sequence].join()) {
      throw new ShapeError(
        `transformer: mask is [${mask.shape}], expected [batch, past + sequence] = [${batch}, ${past + sequence}]`,
      );
    }
    const half = headSize / 2;
    const tables = ropeTables(positionsOf, { past, positions: sequence });
    return {
      params,
      options,
      buffers: options.buffers ?? ownBuffers,
      random: options.random ?? makeRandom(engine, 0),
      layout: { batch, sequence, past, ...(mask ? { mask } : {}) },
      cache,
      tokenIds: reshape(ids, [batch * sequence]),
      cos: hostConstant(ids, tables.cos, [sequence, half]),
      sin: hostConstant(ids, tables.sin, [sequence, half]),
    };
  };

  /** The attention half of a layer: x [batch, sequence, width] -> the new residual and what the router gets to see. */
  const attend = (pass: PassState, layer: number, x: Tensor, carry: Tree | undefined) => {
    const { params, options, layout, cache, cos, sin } = pass;
    const { batch, sequence, mask } = layout;
    const own = branch(params, "layers", layer);
    const weights = branch(own, "attention");
    const y = rmsNorm(x, leaf(own, "attentionNorm"), { eps });
    const project = (name: "q" | "k" | "v", count: number): Tensor => {
      let z = linear(y, leaf(weights, name)); // [batch, sequence, count * headSize]
      if (qkNorm === "projection" && name !== "v") z = rmsNorm(z, leaf(weights, `${name}Norm`), { eps });
      if (clipQkv !== undefined) z = minimum(maximum(z, -clipQkv), clipQkv);
      z = reshape(z, [batch, sequence, count, headSize]);
      if (qkNorm === "head" && name !== "v") z = rmsNorm(z, leaf(weights, `${name}Norm`), { eps });
      return name === "v" ? z : rope(z, cos, sin);
    };
    const q = project("q", heads);
    let keys = project("k", kvHeads);
    let values = project("v", kvHeads);
    if (cache) {
      cache.append(layer, keys, values);
      const all = cache.layer(layer);
      if (all) ({ keys, values } = all); // [batch, past + sequence, kvHeads, headSize]
    }
    const settings = { causal: true, scale: 1 / Math.sqrt(headSize), ...(mask ? { mask } : {}) };
    const { output } = attention(q, keys, values, settings);
    const residual = add(x, linear(reshape(output, [batch, sequence, heads * headSize]), leaf(weights, "o")));
    const { training = false, step = 0, totalSteps, pass: repetition = 0, override, schedule } = options;
    const routerCache = cache?.layer(layer)?.router;
    const globalLoad = options.globalLoad?.[layer];
    const input: RouterInput = {
      hidden: reshape(rmsNorm(residual, leaf(own, "moeNorm"), { eps }), [batch * sequence, width]),
      layout,
      training,
      step,
      ...(totalSteps === undefined ? {} : { totalSteps }),
      pass: repetition,
      layer,
      layers,
      random: pass.random.at("layer", layer),
      buffers: pass.buffers[layer] ?? [],
      tokenIds: pass.tokenIds,
      attention: () => {
        const { probabilities } = attention(q, keys, values, { ...settings, probabilities: true });
        if (!probabilities) throw new Error("attention gave no probabilities");
        return probabilities; // [batch, heads, sequence, past + sequence]
      },
      ...(carry === undefined ? {} : { carry }),
      ...(routerCache === undefined ? {} : { cache: routerCache }),
      ...(override === undefined ? {} : { override }),
      ...(schedule === undefined ? {} : { schedule }),
      ...(globalLoad === undefined ? {} : { globalLoad }),
    };
    return { residual, input };
  };

  const join = (residual: Tensor, output: Tensor): Tensor => add(residual, reshape(output, residual.shape));
  const embedded = ({ params, tokenIds, layout: { batch, sequence } }: PassState): Tensor =>
    reshape(takeRows(leaf(params, "embed"), tokenIds), [batch, sequence, width]);
  const toLogits = (params: Tree, x: Tensor): Tensor =>
    linear(rmsNorm(x, leaf(params, "norm"), { eps }), leaf(params, config.tieEmbeddings ? "embed" : "head"));
  const moduleOf = (layer: number): MoELayer => {
    const module = modules[layer];
    if (!module) throw new RangeError(`layer ${layer} of ${modules.length}`);
    return module;
  };
  /** A pass that fails leaves the cache as it found it. */
  const undoing = <T>(cache: TransformerCache | undefined, body: () => T): T => {
    const length = cache?.length ?? 0;
    try {
      return body();
    } catch (error) {
      cache?.truncate(length);
      throw error;
    }
  };

  const forward: Transformer["forward"] = (params, ids, options = {}) =>
    ids.engine.scope(() => {
      const pass = begin(params, ids, options);
      const { observe } = options;
      return undoing(pass.cache, () => {
        const routed: Routed[] = [];
        let x = embedded(pass);
        let carry: Tree | undefined;
        for (let layer = 0; layer < layers; layer++) {
          const { residual, input } = attend(pass, layer, x, carry);
          const watching = observe && {
            observe: (name: string, rows: Tensor, ends: Tensor) =>
              observe(`layers.${layer}.moe.experts.${name}`, layer, rows, ends),
          };
          const done = moe(moduleOf(layer), branch(params, "layers", layer, "moe"), input, { ...watching });
          x = join(residual, done.output);
          if (done.routed.cache) pass.cache?.setRouter(layer, done.routed.cache);
          options.trace?.record(layer, done.routed);
          carry = done.routed.carry;
          routed.push(done.routed);
        }
        return { logits: toLogits(params, x), routed };
      });
    });

  /** Ids of the experts that a plan uses; all of them where the plan does not say it in ids. */
  const chosen = async ({ plan, more = [] }: Routed, count: number): Promise<number[]> => {
    const ids = new Set<number>();
    for (const { plan: one } of [{ plan }, ...more]) {
      const listed = one.kind === "sparse" ? await one.experts.data() : Array.from({ length: count }, (_, e) => e);
      for (const id of listed) if (id >= 0 && id < count) ids.add(id);
    }
    return [...ids].sort((a, b) => a - b);
  };

  const step: Transformer["step"] = async (ids, options = {}) => {
    // Between scopes tensors have no owner: those made here are ours to free, those that came in are not.
    const foreign = tensorsIn([ownParams, ownBuffers, ids, options]);
    const alive = new Set<Tensor>();
    const keep = <T>(value: T): T => {
      for (const x of tensorsIn(value)) if (!foreign.has(x)) alive.add(x);
      return value;
    };
    const pass = engine.scope(() => begin(ownParams, ids, options));
    const { cos, sin, tokenIds, layout } = pass;
    keep([cos, sin, tokenIds]);
    const length = pass.cache?.length ?? 0;
    try {
      const { batch, sequence } = layout;
      if (sequence === 0) throw new ShapeError("transformer: step needs at least one token per row");
      let x = keep(engine.scope(() => embedded(pass)));
      let carry: Tree | undefined;
      for (let layer = 0; layer < layers; layer++) {
        const module = moduleOf(layer);
        const params = branch(ownParams, "layers", layer, "moe");
        // What the cache holds is the cache's.
        for (const tensor of tensorsIn(pass.cache?.layer(layer)?.router)) foreign.add(tensor);
        const first = keep(
          engine.scope(() => {
            const { residual, input } = attend(pass, layer, x, carry);
            return { residual, input, routed: routeTokens(module, params, input) };
          }),
        );
        await module.experts.prepare?.(await chosen(first.routed, module.experts.count));
        const second = keep(
          engine.scope(() => {
            const { input, routed } = first;
            const done = runExperts(module, params, input, {
              routed,
              options: { metrics: options.trace !== undefined },
            });
            return { x: join(first.residual, done.output), routed: done.routed };
          }),
        );
        if (second.routed.cache) pass.cache?.setRouter(layer, second.routed.cache);
        options.trace?.record(layer, second.routed);
        x = second.x;
        carry = second.routed.carry;
        // What the next layers need stays; the rest of this layer goes now, not at the end of the pass.
        const needed = tensorsIn([x, carry, cos, sin, tokenIds]);
        for (const tensor of alive) {
          if (needed.has(tensor)) continue;
          tensor.dispose();
          alive.delete(tensor);
        }
      }
      return engine.scope(() =>
        reshape(toLogits(ownParams, slice(x, [0, sequence - 1, 0], [batch, 1, width])), [batch, vocabulary]),
      );
    } catch (error) {
      pass.cache?.truncate(length);
      throw error;
    } finally {
      for (const tensor of alive) tensor.dispose();
    }
  };

  return {
    engine,
    config,
    params: ownParams,
    layers,
    vocabulary,
    routers: modules.map(({ router }, layer) => withBuffers(router, ownBuffers[layer] ?? router.buffers)),
    buffers: ownBuffers,
    forward,
    step,
    newCache: (batch) => new TransformerCache(layers, batch),
    with: ({ params = ownParams, buffers = ownBuffers }) => {
      const expected = new Map(leaves(ownParams).map(([path, x]) => [path, x.shape.join()]));
      const found = leaves(params);
      const wrong = found.find(([path, x]) => expected.get(path) !== x.shape.join());
      if (wrong) {
        const [path, { shape }] = wrong;
        throw new ShapeError(
          `transformer: parameter "${path}" is [${shape}], expected [${expected.get(path) ?? "none"}]`,
        );
      }
      if (found.length !== expected.size || buffers.length !== layers) {
        const counts = `${found.length} parameters and ${buffers.length} buffers`;
        throw new ShapeError(`transformer: ${counts}, expected ${expected.size} and ${layers}`);
      }
      return assemble(engine, config, { modules, params, buffers });
    },
  };
}
