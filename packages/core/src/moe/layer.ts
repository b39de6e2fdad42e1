// The Mixture-of-Experts layer: route -> dispatch -> experts -> combine, for every kind of plan. `moe` is the composition of
// `routeTokens` and `runExperts`; streamed inference calls the two itself and loads experts in between.
import { ShapeError, UnsupportedError } from "../errors.ts";
import { add, mul, sigmoid, where } from "../ops/elementwise.ts";
import { dispatch } from "../ops/experts.ts";
import { linear, matmul } from "../ops/matmul.ts";
import { addRows, takeRows } from "../ops/rows.ts";
import { hostConstant, reshape, transpose } from "../ops/shape.ts";
import { random } from "../random.ts";
import { isTensor, show, type Tensor, type Tree } from "../tensor.ts";
import {
  combine,
  combineOutputs,
  dispatchPlan,
  gatherRows,
  maskPlan,
  outputsPerSlot,
  type TokenPlan,
  tokenMask,
} from "./dispatch.ts";
import { routingMetrics } from "./metrics.ts";
import { requireOverrides } from "./override.ts";
import { checkPlan, child, everyId } from "./parts.ts";
import type {
  Dispatch,
  Experts,
  Layout,
  Loss,
  MoELayer,
  Observe,
  Plan,
  Routed,
  RouterContext,
  RouterInput,
  RouterPlugin,
  SharedExperts,
  SlotsPlan,
} from "./plan.ts";

export interface MoEOptions {
  /** false: the experts' outputs `[tokens, k, width]`, neither weighted nor summed (JetMoE, MoA); sparse and dense plans only. */
  readonly combine?: boolean;
  /** Instead of `input.buffers`. */
  readonly buffers?: Tree;
  /** Whether `routed.metrics` gets load, untouched and entropies; default true. */
  readonly metrics?: boolean;
  /** Is told the inputs of every matrix of the routed experts; runs them without the fused op. */
  readonly observe?: Observe;
}

/** What a layer's router is made with; only the engine and the width cannot be known otherwise. */
export type LayerContext = Pick<RouterContext, "engine" | "width"> & Partial<RouterContext>;

/**
 * The layer of one router plugin and its experts. What the context leaves out is that of a layer by itself: the first of one, as many
 * experts as there are, seed 0. Throws UnsupportedError when they do not go together or the backend cannot serve the router, before
 * anything runs.
 */
export function moeLayer(
  plugin: RouterPlugin,
  given: LayerContext,
  parts: { readonly experts: Experts; readonly shared?: readonly SharedExperts[] },
): MoELayer {
  const made = new Map<string, unknown>();
  const context: RouterContext = {
    experts: parts.experts.count,
    layer: 0,
    layers: 1,
    random: given.random ?? random(given.engine, 0).at("router"),
    shared<T>(key: string, make: () => T): T {
      if (!made.has(key)) made.set(key, make());
      return made.get(key) as T;
    },
    ...given,
  };
  const { experts } = parts;
  const refuse = (why: string): never => {
    throw new UnsupportedError(`router ${plugin.name}: ${why}`);
  };
  if (context.experts !== experts.count) {
    throw new ShapeError(`router ${plugin.name}: made for ${context.experts} experts, the layer has ${experts.count}`);
  }
  if (plugin.needs.includes("host") && !context.engine.canBlock) {
    refuse(
      `it needs results on the host inside a step, and ${context.engine.name} cannot block; use a CPU backend or another router`,
    );
  }
  const asked = plugin.sharedExperts ?? 0;
  if (asked > 0 && !parts.shared?.length) {
    refuse(`it asks for ${asked} shared expert${asked > 1 ? "s" : ""}, and the layer has none; pass them as shared`);
  }
  const merges = plugin.needs.includes("mixedExperts") || plugin.plans.every((kind) => kind === "merge");
  if (merges && experts.mixed === undefined) refuse(unmixable);
  if (experts.spatial && !plugin.perSample) {
    refuse(
      "these experts see whole images, and it routes token by token; use a router that sends all tokens of an image to the same " +
        'experts, such as moeFFD({ level: "image" }), or experts that see single tokens, such as glu()',
    );
  }
  return { router: plugin.init(context), ...parts };
}

const unmixable =
  'its "merge" plan mixes the experts\' parameters, and these experts have no mixed(); use glu(), ffn(), lora() or adapter()';

/**
 * The input of a layer used by itself: `hidden [tokens, width]` as one sequence, in evaluation, seed 0, the router's first buffers; `more`
 * replaces any of it.
 */
export function layerInput(layer: MoELayer, hidden: Tensor, more: Partial<RouterInput> = {}): RouterInput {
  return {
    hidden,
    layout: { batch: 1, sequence: hidden.shape[0] ?? 0, past: 0 },
    training: false,
    step: 0,
    pass: 0,
    layer: 0,
    layers: 1,
    random: more.random ?? random(hidden.engine.root, 0).at("input"),
    buffers: layer.router.buffers,
    ...more,
  };
}

/** The parameters `moe` expects, as the layer made them: `{ router, experts, shared? }`. */
export function layerParams(layer: MoELayer): Tree {
  const shared = layer.shared?.map(({ experts, gate }) => ({ experts: experts.params, ...(gate ? { gate } : {}) }));
  return { router: layer.router.params, experts: layer.experts.params, ...(shared ? { shared } : {}) };
}

/**
 * One layer on `input.hidden [tokens, width]`: `output [tokens, width]` (zeros for padding) and what the router decided, with the
 * experts' losses (named "experts.x", "shared.0.x") and the metrics of `routingMetrics` added. Without `mask` in the layout every
 * token is real. Throws ShapeError for parameters or plans of wrong sizes, UnsupportedError for a plan these experts cannot serve.
 */
export function moe(
  layer: MoELayer,
  params: Tree,
  input: RouterInput,
  options: MoEOptions = {},
): { readonly output: Tensor; readonly routed: Routed } {
  return input.hidden.engine.scope(() => {
    const { buffers = input.buffers } = options;
    return runExperts(layer, params, input, { routed: routeTokens(layer, params, { ...input, buffers }), options });
  });
}

/**
 * The first half of `moe`: the router's decision, its plan freed of padding. Throws UnsupportedError for a routing override where the
 * router takes none.
 */
export function routeTokens(layer: MoELayer, params: Tree, input: RouterInput): Routed {
  const { hidden, layout } = input;
  const tokens = layout.batch * layout.sequence;
  if (hidden.shape.length !== 2 || hidden.shape[0] !== tokens) {
    throw new ShapeError(`moe: hidden is ${show(hidden)}, expected [batch * sequence, width] = [${tokens}, width]`);
  }
  const { router, experts } = layer;
  requireOverrides(router, input);
  const mask = tokenMask(layout);
  let every: Outputs | undefined;
  const everyExpert = (): Tensor => {
    every ??= allOutputs(experts, branch(params, "experts"), input, mask);
    return every.output;
  };
  const decided = router.route(branch(params, "router"), { everyExpert, ...input });
  // Losses of the experts come with their outputs: here, where the router hands those on.
  const routed = decided.expertOutputs
    ? { ...decided, losses: { ...decided.losses, ...named("experts", every?.losses) } }
    : decided;
  if (mask === undefined) return routed;
  const more = routed.more?.map((path) => ({ ...path, plan: maskPlan(path.plan, mask) }));
  return { ...routed, plan: maskPlan(routed.plan, mask), ...(more ? { more } : {}) };
}

/** The second half of `moe`: experts, shared experts, further paths, losses and metrics. */
export function runExperts(
  layer: MoELayer,
  params: Tree,
  input: RouterInput,
  { routed, options = {} }: { readonly routed: Routed; readonly options?: MoEOptions },
): { readonly output: Tensor; readonly routed: Routed } {
  const { experts, shared = [] } = layer;
  const { hidden, layout } = input;
  const tokens = hidden.shape[0] ?? 0;
  const mask = tokenMask(layout);
  const losses: Record<string, Loss> = { ...routed.losses };
  const path: Path = {
    experts,
    params: branch(params, "experts"),
    layout,
    ...(mask ? { mask } : {}),
    ...(options.observe ? { observe: options.observe } : {}),
    note: (found) => Object.assign(losses, named("experts", found)),
  };
  if (options.combine === false && (shared.length > 0 || routed.more || routed.expertOutputs)) {
    throw new UnsupportedError(
      "moe: combine: false leaves the outputs per slot, so nothing can be summed into them; this layer has shared experts, further paths or outputs of its router",
    );
  }

  let output =
    options.combine === false
      ? slotsOfPath(path, routed.plan, routed.rows ?? hidden)
      : routed.expertOutputs
        ? combineOutputs(tokenPlan(routed.plan), routed.expertOutputs)
        : runPath(path, routed.plan, routed.rows ?? hidden);
  for (const { plan, rows = hidden } of routed.more ?? []) output = add(output, runPath(path, plan, rows));
  shared.forEach((one, i) => {
    const outputs = runShared(one, branch(branch(params, "shared"), `${i}`), input);
    output = add(output, outputs.output);
    Object.assign(losses, named(`shared.${i}`, outputs.losses));
  });

  if (options.metrics === false) return { output, routed: { ...routed, losses } };
  const nulls = Math.max(((routed.probabilities ?? routed.logits)?.shape.at(-1) ?? 0) - experts.count, 0);
  const sizes = { experts: experts.count, nulls, ...(mask ? { mask } : {}) };
  const metrics = { ...routingMetrics(routed, sizes, tokens), ...routed.metrics };
  return { output, routed: { ...routed, losses, metrics } };
}

interface Path {
  readonly experts: Experts;
  readonly params: Tree;
  readonly layout: Layout;
  readonly mask?: Tensor;
  readonly observe?: Observe;
  /** Collects the experts' own losses. */
  note(losses: Routed["losses"] | undefined): void;
}

/** One plan through the experts: `rows [tokens, width]` -> `[tokens, width']`. */
function runPath(path: Path, plan: Plan, rows: Tensor): Tensor {
  const { experts, params, layout, mask, observe } = path;
  switch (plan.kind) {
    case "sparse":
      if (experts.fused && !observe) return experts.fused(params, rows, plan);
      break;
    case "slots":
      return runSlots(path, plan, rows);
    case "merge":
      if (experts.mixed === undefined) throw new UnsupportedError(`moe: ${unmixable}`);
      return experts.mixed(params, rows, plan, layout);
  }
  checkPlan(plan, rows);
  const dispatched = dispatchPlan(plan, experts.count, mask);
  return combine(plan, dispatched, applyTo(path, dispatched, rows), rows.shape[0] ?? 0);
}

function applyTo({ experts, params, layout, observe, note }: Path, dispatched: Dispatch, rows: Tensor): Tensor {
  const { output, losses } = experts.apply(params, gatherRows(rows, dispatched), dispatched.ends, layout, observe);
  note(losses);
  return output;
}

function slotsOfPath(path: Path, plan: Plan, rows: Tensor): Tensor {
  if (plan.kind !== "sparse" && plan.kind !== "dense") {
    throw new UnsupportedError(`moe: combine: false needs a sparse or dense plan, the router gave "${plan.kind}"`);
  }
  checkPlan(plan, rows);
  const dispatched = dispatchPlan(plan, path.experts.count, path.mask);
  return outputsPerSlot(plan, dispatched, applyTo(path, dispatched, rows));
}

/** Soft MoE (2308.00951, section 2): every slot is a mixture of its sample's tokens, every token a mixture of the slots' outputs. */
function runSlots({ experts, params, layout, observe, note }: Path, plan: SlotsPlan, rows: Tensor): Tensor {
  const [batch = 0, sequence = 0, total = 0] = plan.dispatch.shape;
  const { count } = experts;
  const [tokens = 0, width = 0] = rows.shape;
  if (plan.combine.shape.join() !== plan.dispatch.shape.join() || batch * sequence !== tokens || total % count !== 0) {
    throw new ShapeError(
      `slots plan: dispatch ${show(plan.dispatch)} and combine ${show(plan.combine)} for ${tokens} tokens and ${count} experts; ` +
        "expected [batch, sequence, experts * slots] twice",
    );
  }
  const slots = total / count;
  const mixed = matmul(plan.dispatch, reshape(rows, [batch, sequence, width]), { transposeA: true }); // [batch, experts * slots, width]
  const byExpert = transpose(reshape(mixed, [batch, count, slots, width]), [1, 0, 2, 3]); // [experts, batch, slots, width]
  const ends = hostConstant(
    rows,
    Int32Array.from({ length: count }, (_, e) => (e + 1) * batch * slots),
    [count],
  );
  const applied = experts.apply(params, reshape(byExpert, [count * batch * slots, width]), ends, layout, observe);
  note(applied.losses);
  const out = applied.output.shape[1] ?? 0;
  const bySample = transpose(reshape(applied.output, [count, batch, slots, out]), [1, 0, 2, 3]); // [batch, experts, slots, out]
  return reshape(matmul(plan.combine, reshape(bySample, [batch, total, out])), [tokens, out]);
}

interface Outputs {
  readonly output: Tensor;
  readonly losses?: Routed["losses"];
}

/** Rows for every expert on every real token, sorted by expert. */
function dispatchAll(hidden: Tensor, count: number, mask: Tensor | undefined): Dispatch {
  const tokens = hidden.shape[0] ?? 0;
  const ids = everyId(hidden, tokens, count); // [tokens, count]
  const real = mask ? where(reshape(mask, [tokens, 1]), ids, -1) : ids;
  return dispatch(real, { count, bound: tokens * count });
}

/** Every expert on every real token: `[tokens, experts, width']`, zeros for padding. */
function allOutputs(
  experts: Experts,
  params: Tree,
  { hidden, layout }: RouterInput,
  mask: Tensor | undefined,
): Outputs {
  const tokens = hidden.shape[0] ?? 0;
  const { rows, slots, ends } = dispatchAll(hidden, experts.count, mask);
  const { output, ...rest } = experts.apply(params, takeRows(hidden, rows), ends, layout);
  const width = output.shape[1] ?? 0;
  return { output: reshape(addRows(output, slots, tokens * experts.count), [tokens, experts.count, width]), ...rest };
}

/** Shared experts, summed: `[tokens, width']`, zeros for padding. */
function runShared({ experts }: SharedExperts, params: Tree, { hidden, layout }: RouterInput): Outputs {
  const tokens = hidden.shape[0] ?? 0;
  const mask = tokenMask(layout);
  const own = branch(params, "experts");
  const gate = child(params, "gate");
  let applied: Outputs;
  if (experts.count === 1 && mask === undefined) {
    applied = experts.apply(own, hidden, hostConstant(hidden, Int32Array.of(tokens), [1]), layout);
  } else {
    const { rows, ends } = dispatchAll(hidden, experts.count, mask);
    const { output, ...rest } = experts.apply(own, takeRows(hidden, rows), ends, layout);
    applied = { output: addRows(output, rows, tokens), ...rest };
  }
  if (gate === undefined) return applied;
  if (!isTensor(gate)) throw new ShapeError("moe: the gate of shared experts must be one tensor [1, width]");
  return { ...applied, output: mul(applied.output, sigmoid(linear(hidden, gate))) }; // gate: [tokens, 1]
}

const named = (prefix: string, losses: Routed["losses"] = {}): Routed["losses"] =>
  Object.fromEntries(Object.entries(losses).map(([name, loss]) => [`${prefix}.${name}`, loss]));

function tokenPlan(plan: Plan): TokenPlan {
  if (plan.kind === "slots" || plan.kind === "merge") {
    throw new UnsupportedError(
      `moe: expertOutputs cannot be combined by a "${plan.kind}" plan; return a sparse, dense or expert-choice plan`,
    );
  }
  return plan;
}

function branch(params: Tree, name: string): Tree {
  const found = child(params, name);
  if (found === undefined) {
    throw new ShapeError(
      `moe: the parameters lack "${name}"; expected { router, experts, shared? }, as layerParams(layer) gives them`,
    );
  }
  return found;
}
