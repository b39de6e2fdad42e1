// What the wrappers share: a plugin around a plugin, that names, declares and saves itself honestly, and the three places of a router
// where a wrapper may stand: before `score`, between `score` and `select`, after `select`.
import { UnsupportedError } from "../errors.ts";
import type { Json } from "../json.ts";
import type { Gift, Loss, Plan, Routed, Router, RouterContext, RouterInput, RouterPlugin } from "../moe/plan.ts";
import type { Tensor } from "../tensor.ts";

/** What a wrapper does to one router; what it leaves out stays as it is. */
export interface Stages {
  before?(input: RouterInput): RouterInput;
  /** Only for routers that give "scores". */
  between?(scores: Tensor, input: RouterInput): Tensor;
  after?(routed: Routed, input: RouterInput): Routed;
}

export interface Wrapper {
  /** Behind the plus in the name of the result: "topK+capacity". */
  readonly name: string;
  /** Every option with its default. */
  readonly options: { readonly [name: string]: Json };
  /** What the result declares otherwise than the plugin inside. */
  readonly changes?: Partial<Omit<RouterPlugin, "name" | "options" | "init">>;
  /** Absent: the context of the wrapper itself. */
  inside?(context: RouterContext): RouterContext;
  stages?(context: RouterContext): Stages;
}

/** The plugin with a wrapper around it. Its options hold those of the plugin inside, so that saved models compare. */
export function wrap(plugin: RouterPlugin, { name, options, changes, inside, stages }: Wrapper): RouterPlugin {
  return {
    ...plugin,
    ...changes,
    name: `${plugin.name}+${name}`,
    options: { router: { name: plugin.name, options: plugin.options ?? null }, ...options },
    init: (context) => wrapRouter(plugin.init(inside?.(context) ?? context), stages?.(context) ?? {}),
  };
}

function wrapRouter(inner: Router, { before, between, after }: Stages): Router {
  const scored = (input: RouterInput): RouterInput => before?.(input) ?? input;
  const decided = (routed: Routed, input: RouterInput): Routed => after?.(routed, input) ?? routed;
  const { params, buffers, score, select, afterStep, overrides } = inner;
  const kept: Pick<Router, "params" | "buffers" | "afterStep" | "overrides"> = {
    params,
    buffers,
    ...(overrides ? { overrides } : {}),
    ...(afterStep ? { afterStep: (layers, own) => afterStep.call(inner, layers, own) } : {}),
  };
  if (!score || !select) {
    return { ...kept, route: (own, input) => decided(inner.route(own, scored(input)), input) };
  }
  const outerScore: NonNullable<Router["score"]> = (own, input) => {
    const scores = score.call(inner, own, scored(input));
    return between?.(scores, input) ?? scores;
  };
  const outerSelect: NonNullable<Router["select"]> = (scores, input) =>
    decided(select.call(inner, scores, input), input);
  return {
    ...kept,
    score: outerScore,
    select: outerSelect,
    route: (own, input) => outerSelect(outerScore(own, input), input),
  };
}

/** Throws UnsupportedError that names both and says why they do not go together. */
export function refuse(wrapper: string, plugin: RouterPlugin, why: string): never {
  throw new UnsupportedError(`${wrapper}(${plugin.name}): ${why}`);
}

/** Refuses plugins that may return a plan of another kind than "sparse". */
export function needSparse(
  wrapper: string,
  plugin: RouterPlugin,
  whyNot: Readonly<Record<Plan["kind"], string>>,
): void {
  const other = plugin.plans.find((kind) => kind !== "sparse");
  if (other) refuse(wrapper, plugin, `its plan is "${other}": ${whyNot[other]}`);
}

/** Refuses plugins that do not declare to give this, with what it would be needed for. */
export function needGift(wrapper: string, plugin: RouterPlugin, gift: Gift, why: string): void {
  if (plugin.gives?.includes(gift)) return;
  const found = plugin.gives === undefined ? "declares nothing (RouterPlugin.gives)" : "does not give them";
  refuse(wrapper, plugin, `${why}, and this router ${found}`);
}

/** Refuses plugins that already have a loss of that name: their option of the same name, or that of a router inside, is above 0. */
export function needNoLoss(wrapper: string, plugin: RouterPlugin, loss: "balance" | "zLoss"): void {
  let at: { readonly name: string; readonly options: Json } | undefined = {
    name: plugin.name,
    options: plugin.options ?? null,
  };
  while (at) {
    const { name, options }: { readonly name: string; readonly options: Json } = at;
    const weight = field(options, loss);
    if (typeof weight === "number" && weight > 0) {
      refuse(
        wrapper,
        plugin,
        `${name} has that loss already (${loss}: ${weight}); make it with ${loss}: 0, or do not wrap it`,
      );
    }
    const router: Json | undefined = field(options, "router");
    const inner = field(router, "name");
    at = typeof inner === "string" ? { name: inner, options: field(router, "options") ?? null } : undefined;
  }
}

const field = (value: Json | undefined, name: string): Json | undefined =>
  typeof value === "object" && value !== null && !Array.isArray(value)
    ? Object.entries(value).find(([key]) => key === name)?.[1]
    : undefined;

/** The decision with one more loss. */
export function withLoss(routed: Routed, name: string, loss: Loss): Routed {
  if (routed.losses[name]) {
    throw new UnsupportedError(
      `the router returned a loss "${name}" itself, which its options did not tell; leave the wrapper out`,
    );
  }
  return { ...routed, losses: { ...routed.losses, [name]: loss } };
}
