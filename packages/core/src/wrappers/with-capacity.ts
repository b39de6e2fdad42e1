// A capacity around a router: an expert that is full drops tokens (Switch Transformer 2101.03961, section 2.2; GShard 2006.16668).
import { ShapeError } from "../errors.ts";
import { applyCapacity, type DropPolicy } from "../moe/capacity.ts";
import { maskPlan, tokenMask } from "../moe/dispatch.ts";
import type { Routed, RouterInput, RouterPlugin } from "../moe/plan.ts";
import { add, mul, sub } from "../ops/elementwise.ts";
import { needSparse, refuse, wrap } from "./wrap.ts";

export interface WithCapacityOptions {
  /** Places of each expert in training, in units of the assignments divided by the experts; default 1.25. Infinity: no limit. */
  readonly factor?: number;
  /** The same in evaluation, where decoding token by token then differs from the whole sequence; default Infinity. */
  readonly evaluation?: number;
  /** Who is served first; default "position", the only one that is causal. */
  readonly policy?: DropPolicy;
  /** Places that every expert has at least; default 0. */
  readonly minimum?: number;
}

const whyNot = {
  sparse: "",
  dense: "every token goes to every expert, so there is nothing to drop",
  "expert-choice": "experts choose their tokens, so they have a capacity already; set that",
  slots: "slots are a capacity already; set their number",
  merge: "every token sees one mixture of experts, so there is nothing to drop",
};

/**
 * The router, its experts limited: `factor * tokens * k / experts` places each, k the router's `expertsPerToken` or else the slots of a
 * token, tokens those of the batch, padding included (it takes no place). Dropped slots are empty, kept weights are not rescaled.
 * Null experts have no limit. Metric `dropped` []: share of the assignments to real experts that found no place.
 *
 * Around balance losses, not inside: what has been dropped says nothing about what tokens chose.
 * Throws UnsupportedError for plans other than sparse ones, ShapeError for a factor below 0.
 *
 * @example withCapacity(topK({ k: 2 }), { factor: 1.25 })
 */
export function withCapacity(plugin: RouterPlugin, options: WithCapacityOptions = {}): RouterPlugin {
  const { factor = 1.25, evaluation = Number.POSITIVE_INFINITY, policy = "position", minimum = 0 } = options;
  needSparse("withCapacity", plugin, whyNot);
  if (plugin.needs.includes("everyExpert")) {
    refuse("withCapacity", plugin, "it runs every expert on every token anyway, so dropping saves nothing");
  }
  for (const [name, value] of Object.entries({ factor, evaluation })) {
    if (!(value >= 0)) throw new ShapeError(`withCapacity: ${name} = ${value}; expected a number from 0, or Infinity`);
  }
  if (!Number.isInteger(minimum) || minimum < 0) {
    throw new ShapeError(`withCapacity: minimum = ${minimum}; expected a whole number from 0`);
  }
  if (!["position", "choice", "probability"].includes(policy)) {
    throw new ShapeError(`withCapacity: policy = "${policy}"; expected "position", "choice" or "probability"`);
  }
  const causal = (own: boolean, limit: number): boolean =>
    own && (policy === "position" || limit === Number.POSITIVE_INFINITY);
  const saved = (limit: number): number | null => (limit === Number.POSITIVE_INFINITY ? null : limit);
  const limited = [factor, evaluation].some((limit) => limit !== Number.POSITIVE_INFINITY);
  const { gives, expertsPerToken: k } = plugin;

  const limit = (routed: Routed, { training, layout }: RouterInput, experts: number): Routed => {
    const share = training ? factor : evaluation;
    if (share === Number.POSITIVE_INFINITY || routed.plan.kind !== "sparse") return routed;
    const mask = tokenMask(layout);
    const asked = mask ? maskPlan(routed.plan, mask) : routed.plan;
    const rule = { experts, policy, factor: share, minimum, ...(k === undefined ? {} : { k }) };
    const { plan, dropped: now } = applyCapacity(asked, rule);
    // Of what an inner capacity has left.
    const before = routed.metrics?.dropped;
    const dropped = before ? add(before, mul(sub(1, before), now)) : now;
    return { ...routed, plan, metrics: { ...routed.metrics, dropped } };
  };

  return wrap(plugin, {
    name: "capacity",
    options: { factor: saved(factor), evaluation: saved(evaluation), policy, minimum },
    changes: {
      // What is dropped is single tokens.
      ...(limited ? { perSample: false } : {}),
      causal: {
        training: causal(plugin.causal.training, factor),
        evaluation: causal(plugin.causal.evaluation, evaluation),
      },
      ...(gives ? { gives: gives.filter((gift) => gift !== "choices" || !limited) } : {}),
    },
    stages: ({ experts }) => ({ after: (routed, input) => limit(routed, input, experts) }),
  });
}
