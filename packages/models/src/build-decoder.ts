// From a blueprint and parameters to a model that runs: which parameters there are, the routers and experts of every layer, and the tree
// that holds all of it.
import {
  dispose,
  type Engine,
  isTensor,
  type Random,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import {
  type Experts,
  layerParams,
  moeLayer,
  type Router,
  type RouterContext,
  type RouterPlugin,
} from "@switchyard/core/moe";
import { groupedAttention } from "./attention/grouped.ts";
import type { AttentionModule } from "./attention/kind.ts";
import { latentAttention } from "./attention/latent.ts";
import { mixtureAttention } from "./attention/mixture.ts";
import type { Blueprint, LayerBlueprint } from "./blueprint.ts";
import { assemble, type DecoderLayer } from "./decoder.ts";
import { expertSet } from "./feed-forward.ts";
import type { LanguageModel, RoutingPlace } from "./model.ts";
import type { ExpertStore } from "./streamed-experts.ts";
import { branch, leaf } from "./tree.ts";

/** Where the parameters come from. */
export interface Parameters {
  /** A parameter by its path: a tensor, or a node of `stored-matrix.ts`. */
  given(path: string, shape: readonly number[]): Tree;
  /** A parameter or buffer of a router, by path; undefined: the one that the router made stays. */
  router?(path: string, shape: readonly number[]): Tree | undefined;
  /** Routers that there are already, in the order of `routing`, instead of new ones. Their tensors stay theirs. */
  readonly routers?: readonly Router[];
  /** Routed experts that are not in memory, instead of parameters. */
  readonly streamed?: ExpertStore;
}

/** Shapes of all parameters but the routers', by their path. */
export function blueprintShapes(blueprint: Blueprint): ReadonlyMap<string, readonly number[]> {
  const { vocabulary, width, layers, norm, tieEmbeddings, headBias = false } = blueprint;
  const shapes = new Map<string, readonly number[]>([["embed", [vocabulary, width]]]);
  const addNorm = (path: string): void => {
    shapes.set(path, [width]);
    if (norm.kind === "layer") shapes.set(`${path}Bias`, [width]);
  };
  const addExperts = (
    path: string,
    { count, hidden, bias = false }: { count: number; hidden: number; bias?: boolean },
  ) => {
    shapes.set(`${path}.gateUp`, [count, 2 * hidden, width]);
    shapes.set(`${path}.down`, [count, width, hidden]);
    if (bias) shapes.set(`${path}.gateUpBias`, [count, 2 * hidden]).set(`${path}.downBias`, [count, width]);
  };
  for (const [layer, { attention, feedForward }] of layers.entries()) {
    const at = (name: string): string => `layers.${layer}.${name}`;
    addNorm(at("attentionNorm"));
    for (const [name, shape] of Object.entries(attentionModule(attention, blueprint).shapes)) {
      shapes.set(at(`attention.${name}`), shape);
    }
    addNorm(at("moeNorm"));
    if (feedForward.kind === "dense") {
      addExperts(at("dense"), { count: 1, hidden: feedForward.hidden });
      continue;
    }
    const { experts: count, hidden, bias = false, shared, outputBias } = feedForward;
    addExperts(at("moe.experts"), { count, hidden, bias });
    if (shared) addExperts(at("moe.shared.0.experts"), { count: 1, hidden: shared.hidden });
    if (shared?.gate) shapes.set(at("moe.shared.0.gate"), [1, width]);
    if (outputBias) shapes.set(at("moeBias"), [width]);
  }
  addNorm("norm");
  if (!tieEmbeddings) shapes.set("head", [vocabulary, width]);
  if (headBias) shapes.set("headBias", [vocabulary]);
  return shapes;
}

function attentionModule(
  attention: LayerBlueprint["attention"],
  { width, norm }: Blueprint,
  router?: Router,
): AttentionModule {
  switch (attention.kind) {
    case "grouped":
      return groupedAttention(attention, width, norm);
    case "latent":
      return latentAttention(attention, width);
    case "mixture":
      return mixtureAttention(attention, width, router);
    default:
      return attention satisfies never;
  }
}

/** A tree from values by path: "a.b" becomes { a: { b: value } }. */
type Branch = { [name: string]: Tree | Branch };
function plant(root: Branch, path: string, value: Tree): void {
  const names = path.split(".");
  const last = names.pop() as string;
  let at = root;
  for (const name of names) {
    at[name] ??= {};
    at = at[name] as Branch;
  }
  at[last] = value;
}

/** The tree with its leaves replaced by trees. */
function graft(tree: Tree, change: (leaf: Tensor, path: string) => Tree, path = ""): Tree {
  if (isTensor(tree)) return change(tree, path);
  const entries = Object.entries(tree).map(
    ([key, child]) => [key, graft(child, change, path === "" ? key : `${path}.${key}`)] as const,
  );
  return Array.isArray(tree) ? entries.map(([, child]) => child) : Object.fromEntries(entries);
}

/**
 * A model of a blueprint. Throws ShapeError where sizes do not fit together, UnsupportedError for a router that needs what text does
 * not have.
 */
export function buildDecoder(
  engine: Engine,
  blueprint: Blueprint,
  { random, parameters }: { readonly random: Random; readonly parameters: Parameters },
): LanguageModel {
  const { width, vocabulary, tokenCounts } = blueprint;
  const shapes = blueprintShapes(blueprint);
  const shared = new Map<string, unknown>();
  const [plugins, routers, routing]: [RouterPlugin[], Router[], RoutingPlace[]] = [[], [], []];
  const layers: DecoderLayer[] = [];
  const layerTrees: Tree[] = [];
  const outside: Branch = {};
  const trees = blueprint.layers.map((): Branch => ({}));
  const streamed = new Map<number, Experts>();
  for (const [layer, { feedForward }] of blueprint.layers.entries()) {
    const away = feedForward.kind === "moe" ? parameters.streamed?.experts(layer, feedForward) : undefined;
    if (away) streamed.set(layer, away);
  }
  for (const [path, shape] of shapes) {
    const [, layer, rest = path] = /^layers\.(\d+)\.(.+)$/.exec(path) ?? [];
    if (layer !== undefined && rest.startsWith("moe.experts.") && streamed.has(Number(layer))) continue;
    plant(layer === undefined ? outside : (trees[Number(layer)] as Branch), rest, parameters.given(path, shape));
  }

  const routerCount = blueprint.layers.reduce(
    (count, { attention, feedForward }) =>
      count + (attention.kind === "mixture" ? 1 : 0) + (feedForward.kind === "moe" ? 1 : 0),
    0,
  );
  const contextOf = (layer: number, experts: number, part: RoutingPlace["part"]): RouterContext => {
    const { attention } = blueprint.layers[layer] as LayerBlueprint;
    return {
      engine,
      width,
      experts,
      ...(attention.kind === "mixture" ? {} : { heads: attention.heads }),
      // Among the routers: what `afterStep` is told has an entry for each of them, and dense layers have none.
      layer: routers.length,
      layers: routerCount,
      vocabulary,
      ...(tokenCounts ? { tokenCounts } : {}),
      random: random.at("router", ...(part === "attention" ? [part] : []), layer),
      shared: <T>(key: string, make: () => T): T => {
        if (!shared.has(key)) shared.set(key, make());
        return shared.get(key) as T;
      },
    };
  };
  /** The router with the parameters and buffers that a checkpoint has for it. */
  const settle = (router: Router, path: string): Router => {
    const { router: find } = parameters;
    if (!find) return router;
    const swap = (tree: Tree, prefix: string): Tree =>
      graft(tree, (x, name) => {
        const found = find(`${path}.${prefix}.${name}`, x.shape);
        if (found && !parameters.routers) x.dispose();
        return found ?? x;
      });
    try {
      const [params, buffers] = [swap(router.params, "router"), swap(router.buffers, "buffers")];
      return Object.create(router, {
        params: { value: params, enumerable: true },
        buffers: { value: buffers, enumerable: true },
      });
    } catch (error) {
      if (!parameters.routers) dispose([router.params, router.buffers]);
      throw error;
    }
  };
  /** The plugin, or one that gives the router there is. */
  const known = (plugin: RouterPlugin): RouterPlugin => {
    const router = parameters.routers?.[routers.length];
    return router ? { ...plugin, init: () => router } : plugin;
  };
  const enlist = (plugin: RouterPlugin, router: Router, place: RoutingPlace): number => {
    plugins.push(plugin);
    routers.push(router);
    return routing.push(place) - 1;
  };

  for (const [layer, { attention, feedForward }] of blueprint.layers.entries()) {
    const own = trees[layer] as Branch;
    let attentionPlace: number | undefined;
    let headRouter: Router | undefined;
    if (attention.kind === "mixture") {
      checkNeeds(attention.router);
      const router = settle(
        known(attention.router).init(contextOf(layer, attention.experts, "attention")),
        `layers.${layer}.attention`,
      );
      plant(own, "attention.router", router.params);
      attentionPlace = enlist(attention.router, router, { layer, part: "attention", experts: attention.experts });
      headRouter = router;
    }
    const common = {
      attention: attentionModule(attention, blueprint, headRouter),
      rope: attention.rope,
      attentionPlace,
    };
    const { activation = "silu" } = feedForward;
    if (feedForward.kind === "dense") {
      const { hidden } = feedForward;
      const experts = expertSet({ count: 1, width, hidden, activation, bias: false, params: branch(own, "dense") });
      layers.push({ ...common, feedForward: { kind: "dense", experts } });
      layerTrees.push(own);
      continue;
    }
    const { experts: count, hidden, bias = false, router: plugin, shared: every, outputBias = false } = feedForward;
    checkNeeds(plugin);
    const experts =
      streamed.get(layer) ??
      expertSet({ count, width, hidden, activation, bias, params: branch(own, "moe", "experts") });
    const sharedExperts = every && {
      experts: expertSet({
        count: 1,
        width,
        hidden: every.hidden,
        activation,
        bias: false,
        params: branch(own, "moe", "shared", "0", "experts"),
      }),
      ...(every.gate ? { gate: leaf(own, "moe", "shared", "0", "gate") } : {}),
    };
    const made = moeLayer(known(plugin), contextOf(layer, count, "feedForward"), {
      experts,
      ...(sharedExperts ? { shared: [sharedExperts] } : {}),
    });
    const module = { ...made, router: settle(made.router, `layers.${layer}.moe`) };
    const place = enlist(plugin, module.router, { layer, part: "feedForward", experts: count });
    layers.push({ ...common, feedForward: { kind: "moe", module, place, outputBias } });
    layerTrees.push({ ...own, moe: layerParams(module) });
  }
  const { embed, ...rest } = outside;
  const params = { embed, layers: layerTrees, ...rest } as Tree;
  return assemble(engine, blueprint, {
    layers,
    plugins,
    routers,
    routing,
    params,
    buffers: routers.map(({ buffers }) => buffers),
    ...(parameters.streamed ? { streamed: parameters.streamed } : {}),
  });
}

function checkNeeds(plugin: RouterPlugin): void {
  const need = plugin.needs.find((one) => one === "modalityIds" || one === "target");
  if (need === undefined) return;
  throw new UnsupportedError(
    `router ${plugin.name} needs "${need}", which a text model does not have; use another router`,
  );
}
