// Null experts around a router (2406.13233, 2601.15370): it is made for more experts than the layer has, and what goes to the others
// costs nothing. With N experts there are M = N (1 - rho) / rho null ones, so that even loads leave real experts the share rho.
import { ShapeError } from "../errors.ts";
import type { RouterPlugin, SparsePlan } from "../moe/plan.ts";
import { div, less, mul, where } from "../ops/elementwise.ts";
import { sumLast } from "../ops/reduce.ts";
import { needSparse, refuse, wrap } from "./wrap.ts";

export interface WithNullExpertsOptions {
  /** Share of the slots that real experts fill when loads are even, above 0 and at most 1; default 0.5. */
  readonly rho?: number;
  /** Hands the weights of a token's null slots to its real ones, in proportion; default true. */
  readonly renormalise?: boolean;
}

const whyNot = {
  sparse: "",
  dense: "every token goes to every expert, so null ones would take nothing off it",
  "expert-choice": "experts choose their tokens, and a null expert that chooses does nothing",
  slots: "slots are mixtures of all tokens, and null slots would only lose part of each",
  merge: "experts are mixed by their parameters, and null experts have none",
};

/**
 * The router among real and null experts, the latter with ids from `experts` on and weight 0. Its parameters and buffers have one row or
 * entry more for each null expert; its losses treat them like any others.
 * Throws UnsupportedError for plans other than sparse ones and where the plan's null slots could not be counted or served,
 * ShapeError for rho out of range.
 *
 * @example withNullExperts(topK({ k: 4 }), { rho: 0.5 })
 */
export function withNullExperts(plugin: RouterPlugin, options: WithNullExpertsOptions = {}): RouterPlugin {
  const { rho = 0.5, renormalise = true } = options;
  needSparse("withNullExperts", plugin, whyNot);
  const { needs, gives, expertsPerToken } = plugin;
  if (needs.includes("everyExpert") || needs.includes("mixedExperts")) {
    refuse("withNullExperts", plugin, "it asks for the outputs or parameters of its experts, and null ones have none");
  }
  if (!gives?.includes("logits") && !gives?.includes("probabilities")) {
    const found = gives ? "neither" : "nothing (RouterPlugin.gives)";
    refuse(
      "withNullExperts",
      plugin,
      `null experts are learned through, and counted by, logits or probabilities, and this router declares ${found}`,
    );
  }
  if (!(rho > 0 && rho <= 1)) {
    throw new ShapeError(`withNullExperts: rho = ${rho}; expected the share of real slots, above 0 and at most 1`);
  }
  return wrap(plugin, {
    name: "nullExperts",
    options: { rho, renormalise },
    changes: expertsPerToken === undefined ? {} : { expertsPerToken: expertsPerToken * rho },
    inside: (context) => ({
      ...context,
      experts: context.experts + Math.round((context.experts * (1 - rho)) / rho),
    }),
    stages: ({ experts }) => ({
      after: (routed) =>
        routed.plan.kind === "sparse"
          ? { ...routed, plan: realWeights(routed.plan, { experts, renormalise }) }
          : routed,
    }),
  });
}

function realWeights(
  plan: SparsePlan,
  { experts, renormalise }: { experts: number; renormalise: boolean },
): SparsePlan {
  const real = where(less(plan.experts, experts), plan.weights, 0); // [tokens, k]
  if (!renormalise) return { ...plan, weights: real };
  const kept = sumLast(real); // [tokens, 1]
  const some = less(0, kept);
  const factor = where(some, div(sumLast(plan.weights), where(some, kept, 1)), 1);
  return { ...plan, weights: mul(real, factor) };
}
