// The runtime of every blueprint: embedding, layers of pre-norm attention and feed-forward, norm, head. `forward` runs a whole pass
// and can be differentiated; `step` runs layer by layer and gives experts time to be loaded.
import {
  add,
  affine,
  type Engine,
  hostConstant,
  layerNorm,
  leaves,
  random as makeRandom,
  type Random,
  reshape,
  rmsNorm,
  ShapeError,
  slice,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import {
  dispatchPlan,
  type Experts,
  gatherRows,
  type MoELayer,
  type MoEOptions,
  moe,
  type Routed,
  type Router,
  type RouterInput,
  type RouterPlugin,
  routeTokens,
  routingMetrics,
  runExperts,
  tokenMask,
} from "@switchyard/core/moe";
import type { AttentionModule, Turns } from "./attention/kind.ts";
import type { Blueprint } from "./blueprint.ts";
import { breathe } from "./breathe.ts";
import { type CacheSizes, TransformerCache } from "./cache.ts";
import type { KvCache, LanguageModel, PassOptions, RoutingPlace } from "./model.ts";
import { type Rotary, ropeTables } from "./rope.ts";
import { lookup, product, withoutLowRank } from "./stored-matrix.ts";
import type { ExpertStore } from "./streamed-experts.ts";
import { branch, leaf, tensorsIn } from "./tree.ts";

/** One layer, ready to run. */
export interface DecoderLayer {
  readonly attention: AttentionModule;
  readonly rope: Rotary;
  /** Places in `routing`. */
  readonly attentionPlace: number | undefined;
  readonly feedForward:
    | { readonly kind: "moe"; readonly module: MoELayer; readonly place: number; readonly outputBias: boolean }
    | { readonly kind: "dense"; readonly experts: Experts };
}

export interface DecoderParts {
  readonly layers: readonly DecoderLayer[];
  readonly plugins: readonly RouterPlugin[];
  readonly routers: readonly Router[];
  readonly routing: readonly RoutingPlace[];
  readonly params: Tree;
  readonly buffers: readonly Tree[];
  readonly streamed?: ExpertStore;
}

/** The same router with other buffers; everything else is inherited, so that any kind of object works. */
const withBuffers = (router: Router, buffers: Tree): Router =>
  router.buffers === buffers ? router : Object.create(router, { buffers: { value: buffers, enumerable: true } });

/** What is the same for all layers of one pass. */
interface PassState {
  readonly params: Tree;
  readonly options: PassOptions;
  readonly buffers: readonly Tree[];
  readonly random: Random;
  readonly layout: RouterInput["layout"];
  readonly cache: TransformerCache | undefined;
  readonly tokenIds: Tensor;
  readonly turns: ReadonlyMap<Rotary, Turns>;
}

export function assemble(engine: Engine, blueprint: Blueprint, parts: DecoderParts): LanguageModel {
  const { vocabulary, width, context, norm, tieEmbeddings, headBias = false } = blueprint;
  const { layers, plugins, routing, params: ownParams, buffers: ownBuffers } = parts;
  const ropes = [...new Set(layers.map(({ rope }) => rope))];
  const scaled = (x: Tensor, scale: number | undefined): Tensor =>
    scale === undefined || scale === 1 ? x : affine(x, { scale, shift: 0 });

  const checkCausal = (training: boolean, allowed: boolean): void => {
    const plugin = plugins.find(({ causal }) => !(training ? causal.training : causal.evaluation));
    if (allowed || plugin === undefined) return;
    const use = training
      ? "training a language model on it leaks the future into the loss"
      : "it can neither generate text nor be judged as if it could";
    throw new UnsupportedError(
      `router ${plugin.name} chooses experts by looking at later tokens, so ${use}; ` +
        "use a causal router, or set allowNonCausal: true if that is wanted",
    );
  };

  const cacheSizes = blueprint.layers.map(({ attention }): CacheSizes => {
    const { kind } = attention;
    if (kind === "latent") return { keys: [1, attention.ropeSize], values: [1, attention.rank] };
    const each = [attention.kvHeads, attention.headSize] as const;
    return { keys: each, values: each };
  });
  const checkCache = (cache: KvCache | undefined, batch: number): TransformerCache | undefined => {
    if (cache === undefined) return undefined;
    if (!(cache instanceof TransformerCache)) {
      throw new UnsupportedError(
        "transformer: this cache was made by another kind of model; use model.newCache(batch)",
      );
    }
    if (cache.batch !== batch)
      throw new ShapeError(`transformer: the cache has ${cache.batch} rows, the ids have ${batch}`);
    cache.checkFits(cacheSizes);
    return cache;
  };

  /** Cosines and sines of the new positions; rows that start with padding count from their first token. */
  const turnsOf = (like: Tensor, rope: Rotary, sizes: PassSizes): Turns => {
    const { past, sequence, length, padding = [] } = sizes;
    const half = rope.size / 2;
    if (padding.every((n) => n === 0)) {
      const tables = ropeTables(rope, { past, positions: sequence, length });
      return {
        cos: hostConstant(like, tables.cos, [sequence, half]),
        sin: hostConstant(like, tables.sin, [sequence, half]),
      };
    }
    const shape = [padding.length, sequence, half];
    const [cos, sin] = [
      new Float64Array(shape.reduce((n, d) => n * d, 1)),
      new Float64Array(padding.length * sequence * half),
    ];
    for (const [row, before] of padding.entries()) {
      const hidden = Math.min(Math.max(before - past, 0), sequence); // new positions that are padding: never seen, not turned
      const own = { past: Math.max(past - before, 0), positions: sequence - hidden, length: length - before };
      const tables = ropeTables(rope, own);
      cos.set(tables.cos, (row * sequence + hidden) * half);
      sin.set(tables.sin, (row * sequence + hidden) * half);
    }
    return { cos: hostConstant(like, cos, shape), sin: hostConstant(like, sin, shape) };
  };

  /** Checks the inputs; its tensors live in the scope of the caller. */
  const begin = (params: Tree, ids: Tensor, options: PassOptions): PassState => {
    const [batch, sequence] = ids.shape;
    if (ids.shape.length !== 2 || ids.dtype !== "i32" || batch === undefined || sequence === undefined) {
      throw new ShapeError(`transformer: ids must be i32 [batch, sequence], found ${ids.dtype} [${ids.shape}]`);
    }
    const { training = false, allowNonCausal = blueprint.allowNonCausal ?? false } = options;
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
    const inAttention = options.override?.some((one) => one?.parts?.includes("attention"));
    if (inAttention && !routing.some(({ part }) => part === "attention")) {
      throw new UnsupportedError(
        "transformer: a routing override names the routers of attention, of which this model has none; leave parts out",
      );
    }
    const { padding } = options;
    const total = past + sequence;
    const mask = options.mask ?? (padding && paddingMask(ids, padding, { batch, total }));
    if (options.mask && padding) {
      throw new ShapeError(
        "transformer: mask and padding exclude one another; padding counts positions from each row's first token",
      );
    }
    if (mask && mask.shape.join() !== [batch, total].join()) {
      throw new ShapeError(
        `transformer: mask is [${mask.shape}], expected [batch, past + sequence] = [${batch}, ${total}]`,
      );
    }
    const { length = total } = options;
    if (!(Number.isSafeInteger(length) && length >= total && length <= context)) {
      throw new ShapeError(
        `transformer: length is ${length}, expected a whole number from ${total}, which this pass reaches, to context, ${context}`,
      );
    }
    const sizes = { past, sequence, length, ...(padding ? { padding } : {}) };
    return {
      params,
      options,
      buffers: options.buffers ?? ownBuffers,
      random: options.random ?? makeRandom(engine, 0),
      layout: { batch, sequence, past, ...(mask ? { mask } : {}) },
      cache,
      tokenIds: reshape(ids, [batch * sequence]),
      turns: new Map(ropes.map((rope) => [rope, turnsOf(ids, rope, sizes)])),
    };
  };

  const normalise = (params: Tree, name: string, x: Tensor, eps = norm.eps): Tensor =>
    norm.kind === "rms"
      ? rmsNorm(x, leaf(params, name), { eps })
      : layerNorm(x, leaf(params, name), leaf(params, `${name}Bias`), { eps });

  /** The attention half of a layer: x [batch, sequence, width] -> the new residual and what the router gets to see. */
  const attend = (pass: PassState, layer: number, x: Tensor, carry: Tree | undefined) => {
    const { params, options, layout, cache, turns } = pass;
    const { batch, sequence } = layout;
    const own = branch(params, "layers", layer);
    const { attention, rope, attentionPlace, feedForward } = layerOf(layer);
    const { training = false, step = 0, totalSteps, pass: repetition = 0, override, schedule, watch } = options;
    const inputOf = (hidden: Tensor, place: number): RouterInput => ({
      hidden,
      layout,
      training,
      step,
      ...(totalSteps === undefined ? {} : { totalSteps }),
      pass: repetition,
      layer,
      layers: layers.length,
      random: pass.random.at("layer", layer),
      buffers: pass.buffers[place] ?? [],
      tokenIds: pass.tokenIds,
      ...(schedule === undefined ? {} : { schedule }),
    });
    const attended = attention.run(branch(own, "attention"), {
      hidden: normalise(own, "attentionNorm", x, blueprint.layerNormEps),
      layout,
      turns: turns.get(rope) as Turns,
      remember(keys, values) {
        cache?.append(layer, keys, values);
        return cache?.layer(layer) ?? { keys, values };
      },
      cached: cache !== undefined,
      routerInput: (hidden) => ({
        ...inputOf(hidden, attentionPlace ?? 0),
        part: "attention",
        ...(override === undefined ? {} : { override }),
      }),
    });
    watch?.("attention", attended.output, layer);
    const residual = add(x, scaled(attended.output, blueprint.residualScale));
    const hidden = normalise(own, "moeNorm", residual, blueprint.layerNormEps);
    watch?.("moeInput", hidden, layer);
    const place = feedForward.kind === "moe" ? feedForward.place : 0;
    const routerCache = cache?.layer(layer)?.router;
    const globalLoad = options.globalLoad?.[place];
    const input: RouterInput = {
      ...inputOf(reshape(hidden, [batch * sequence, width]), place),
      attention: attended.probabilities,
      ...(carry === undefined ? {} : { carry }),
      ...(routerCache === undefined ? {} : { cache: routerCache }),
      ...(override === undefined ? {} : { override }),
      ...(globalLoad === undefined ? {} : { globalLoad }),
    };
    return { residual, input, routed: attended.routed };
  };

  /** What the feed-forward part gave [tokens, width], added to the residual. */
  const join = (pass: PassState, layer: number, residual: Tensor, output: Tensor): Tensor => {
    const { feedForward } = layerOf(layer);
    const biased =
      feedForward.kind === "moe" && feedForward.outputBias
        ? add(output, leaf(pass.params, "layers", layer, "moeBias"))
        : output;
    const y = reshape(biased, residual.shape);
    const { watch } = pass.options;
    watch?.("moeOutput", y, layer);
    const x = add(residual, scaled(y, blueprint.residualScale));
    watch?.("hidden", x, layer);
    return x;
  };
  /** What the layer's router and experts run on: routers see plain tensors. */
  const moeParams = (params: Tree, layer: number): Tree => {
    const own = branch(params, "layers", layer, "moe");
    const router = branch(own, "router");
    const plain = withoutLowRank(router);
    return plain === router ? own : { ...own, router: plain };
  };
  const runDense = (params: Tree, layer: number, experts: Experts, { hidden, layout }: RouterInput): Tensor => {
    const ends = hostConstant(hidden, Int32Array.of(hidden.shape[0] ?? 0), [1]);
    return experts.apply(branch(params, "layers", layer, "dense"), hidden, ends, layout).output;
  };
  const embedded = ({ params, tokenIds, layout: { batch, sequence }, options }: PassState): Tensor => {
    const x = reshape(lookup(params, "embed", tokenIds), [batch, sequence, width]);
    options.watch?.("embed", x, 0);
    return scaled(x, blueprint.embedScale);
  };
  const toLogits = (params: Tree, x: Tensor, watch?: PassOptions["watch"]): Tensor => {
    const y = normalise(params, "norm", x);
    watch?.("finalNorm", y, 0);
    const bias = headBias ? leaf(params, "headBias") : undefined;
    return scaled(product(params, tieEmbeddings ? "embed" : "head", y, bias), blueprint.logitScale);
  };
  const layerOf = (layer: number): DecoderLayer => {
    const found = layers[layer];
    if (!found) throw new RangeError(`layer ${layer} of ${layers.length}`);
    return found;
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

  /** A decision with the metrics that `moe` gives those of feed-forward layers. */
  const measured = (place: number, routed: Routed, { hidden, layout }: RouterInput): Routed => {
    const mask = tokenMask(layout);
    const sizes = { experts: routing[place]?.experts ?? 0, ...(mask ? { mask } : {}) };
    const metrics = { ...routingMetrics(routed, sizes, hidden.shape[0] ?? 0), ...routed.metrics };
    return { ...routed, metrics };
  };

  const forward: LanguageModel["forward"] = (params, ids, options = {}) =>
    ids.engine.scope(() => {
      const pass = begin(params, ids, options);
      const { observe, trace } = options;
      return undoing(pass.cache, () => {
        const routed: Routed[] = [];
        const note = (place: number, decided: Routed): void => {
          trace?.record(place, decided);
          routed.push(decided);
        };
        let x = embedded(pass);
        let carry: Tree | undefined;
        for (const [layer, { attentionPlace, feedForward }] of layers.entries()) {
          const { residual, input, routed: heads } = attend(pass, layer, x, carry);
          if (heads && attentionPlace !== undefined) note(attentionPlace, measured(attentionPlace, heads, input));
          if (feedForward.kind === "dense") {
            x = join(pass, layer, residual, runDense(params, layer, feedForward.experts, input));
            continue;
          }
          const watching: MoEOptions = observe
            ? {
                observe: (name, rows, ends) => observe(`layers.${layer}.moe.experts.${name}`, layer, rows, ends),
              }
            : {};
          const done = moe(feedForward.module, moeParams(params, layer), input, watching);
          x = join(pass, layer, residual, done.output);
          if (done.routed.cache) pass.cache?.setRouter(layer, done.routed.cache);
          carry = done.routed.carry;
          note(feedForward.place, done.routed);
        }
        return { logits: toLogits(params, x, options.watch), routed };
      });
    });

  /** All parameters and buffers, found once. */
  let owned: ReadonlySet<Tensor> | undefined;
  const step: LanguageModel["step"] = async (ids, options = {}) => {
    await breathe();
    // Between scopes tensors have no owner: those made here are ours to free, those that came in are not.
    owned ??= tensorsIn([ownParams, ownBuffers]);
    const given = owned;
    const foreign = tensorsIn([ids, { ...options, watch: undefined, trace: undefined }]);
    const alive = new Set<Tensor>();
    const keep = <T>(value: T): T => {
      for (const x of tensorsIn(value)) if (!foreign.has(x) && !given.has(x)) alive.add(x);
      return value;
    };
    const pass = engine.scope(() => begin(ownParams, ids, options));
    const { turns, tokenIds, layout } = pass;
    const common = tensorsIn([[...turns.values()], tokenIds, layout]);
    keep([...common]);
    const length = pass.cache?.length ?? 0;
    const { trace, watch, positions = "last" } = options;
    try {
      const { batch, sequence } = layout;
      if (sequence === 0) throw new ShapeError("transformer: step needs at least one token per row");
      let x = keep(engine.scope(() => embedded(pass)));
      let carry: Tree | undefined;
      const measuring: MoEOptions = { metrics: trace !== undefined && trace.metrics !== false };
      for (const [layer, { attentionPlace, feedForward }] of layers.entries()) {
        // What the cache holds is the cache's.
        for (const tensor of tensorsIn(pass.cache?.layer(layer)?.router)) foreign.add(tensor);
        /** The layer up to what its router decides. */
        const begun = (module: MoELayer): Begun => {
          const { residual, input, routed: heads } = attend(pass, layer, x, carry);
          return { residual, input, heads, routed: routeTokens(module, moeParams(ownParams, layer), input) };
        };
        /** The rest of it. */
        const ended = (module: MoELayer, place: number, { residual, input, heads, routed: decided }: Begun) => {
          if (heads && attentionPlace !== undefined) trace?.record(attentionPlace, heads);
          const { output, routed } = runExperts(module, branch(ownParams, "layers", layer, "moe"), input, {
            routed: decided,
            options: measuring,
          });
          if (routed.cache) pass.cache?.setRouter(layer, routed.cache);
          trace?.record(place, routed);
          return { x: join(pass, layer, residual, output), carry: routed.carry };
        };
        let done: { readonly x: Tensor; readonly carry: Tree | undefined };
        if (feedForward.kind === "dense") {
          done = engine.scope(() => {
            const { residual, input, routed: heads } = attend(pass, layer, x, carry);
            if (heads && attentionPlace !== undefined) trace?.record(attentionPlace, heads);
            return { x: join(pass, layer, residual, runDense(ownParams, layer, feedForward.experts, input)), carry };
          });
        } else if (feedForward.module.experts.stream) {
          const { module, place } = feedForward;
          const first = keep(engine.scope(() => begun(module)));
          const served = await serve(module, first, keep);
          done = engine.scope(() => ended(served, place, first));
        } else {
          const { module, place } = feedForward;
          // Experts of many tokens need the memory that attention took; of few tokens a scope costs more than it frees.
          const first = (): Begun =>
            batch * sequence > FEW_TOKENS ? engine.scope(() => begun(module)) : begun(module);
          done = engine.scope(() => ended(module, place, first()));
        }
        keep(done);
        ({ x, carry } = done);
        // What the next layers need stays; the rest of this layer goes now, not at the end of the pass.
        const needed = tensorsIn([x, carry]);
        for (const tensor of alive) {
          if (needed.has(tensor) || common.has(tensor)) continue;
          tensor.dispose();
          alive.delete(tensor);
        }
      }
      return engine.scope(() => {
        if (positions === "all") return toLogits(ownParams, x, watch);
        // A watch sees the norm of all positions, whatever the head is run on.
        if (watch) normaliseAll(x, watch);
        const last = slice(x, [0, sequence - 1, 0], [batch, 1, width]);
        return reshape(toLogits(ownParams, last), [batch, vocabulary]);
      });
    } catch (error) {
      pass.cache?.truncate(length);
      throw error;
    } finally {
      for (const tensor of alive) tensor.dispose();
    }
  };
  const normaliseAll = (x: Tensor, watch: NonNullable<PassOptions["watch"]>): void =>
    watch("finalNorm", normalise(ownParams, "norm", x), 0);

  return {
    engine,
    blueprint,
    params: ownParams,
    layers: layers.length,
    vocabulary,
    width,
    context,
    routing,
    routers: parts.routers.map((router, place) => withBuffers(router, ownBuffers[place] ?? router.buffers)),
    buffers: ownBuffers,
    ...(parts.streamed ? { streamed: parts.streamed } : {}),
    forward,
    step,
    head: (hidden) => hidden.engine.scope(() => toLogits(ownParams, hidden)),
    newCache: (batch) => new TransformerCache(layers.length, batch),
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
      if (found.length !== expected.size || buffers.length !== routing.length) {
        const counts = `${found.length} parameters and ${buffers.length} buffers`;
        throw new ShapeError(`transformer: ${counts}, expected ${expected.size} and ${routing.length}`);
      }
      return assemble(engine, blueprint, { ...parts, params, buffers });
    },
  };
}

/** Up to so many tokens of a pass, what their layers hold is no matter. */
const FEW_TOKENS = 16;

/** A layer whose router has decided. */
interface Begun {
  readonly residual: Tensor;
  readonly input: RouterInput;
  /** What the attention's own router decided. */
  readonly heads: Routed | undefined;
  readonly routed: Routed;
}

interface PassSizes {
  readonly past: number;
  readonly sequence: number;
  /** Of the whole sequence, of which this pass may be a part. */
  readonly length: number;
  readonly padding?: readonly number[];
}

/** 0 where a row has padding, `[batch, total]`; nothing where no row has any. */
function paddingMask(
  like: Tensor,
  padding: readonly number[],
  { batch, total }: { readonly batch: number; readonly total: number },
): Tensor | undefined {
  if (padding.length !== batch || padding.some((n) => !Number.isSafeInteger(n) || n < 0 || n >= total)) {
    throw new ShapeError(
      `transformer: padding is [${padding}] for ${batch} rows of ${total} positions; expected one count per row, smaller than that`,
    );
  }
  if (padding.every((n) => n === 0)) return undefined;
  const mask = Float32Array.from({ length: batch * total }, (_, i) =>
    i % total < (padding[Math.floor(i / total)] as number) ? 0 : 1,
  );
  return hostConstant(like, mask, [batch, total]);
}

/** The layer as `runExperts` takes it: experts that are streamed have done their work when this settles. */
async function serve(
  module: MoELayer,
  { input, routed }: { readonly input: RouterInput; readonly routed: Routed },
  keep: <T>(value: T) => T,
): Promise<MoELayer> {
  const { experts } = module;
  if (!experts.stream) return module;
  const { plan } = routed;
  if (plan.kind !== "sparse" || routed.more || routed.expertOutputs) {
    throw new UnsupportedError(
      `streamed experts serve plans of kind "sparse", found "${plan.kind}"${routed.more ? " with further paths" : ""}; load the experts into memory`,
    );
  }
  const asked = keep(
    input.hidden.engine.scope(() => {
      const dispatched = dispatchPlan(plan, experts.count, tokenMask(input.layout));
      return { rows: gatherRows(routed.rows ?? input.hidden, dispatched), ends: dispatched.ends };
    }),
  );
  const output = keep(await experts.stream(asked.rows, asked.ends));
  return { ...module, experts: { count: experts.count, params: {}, apply: () => ({ output }) } };
}
