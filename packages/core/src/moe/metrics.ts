// What routing did in one layer, as small tensors without gradient: they stay on the device until the step's one transfer.
import { div, less, mul, square, stopGradient, where } from "../ops/elementwise.ts";
import { maxLast, sum } from "../ops/reduce.ts";
import { addRows, takeRows } from "../ops/rows.ts";
import { constant, pad, reshape, slice } from "../ops/shape.ts";
import type { Tensor } from "../tensor.ts";
import { entropyOfMean, idCounts, tokenEntropy } from "./losses.ts";
import { filled, inside } from "./parts.ts";
import type { Plan, Routed } from "./plan.ts";

interface Sizes {
  /** Real experts. */
  readonly experts: number;
  /** Null experts, counted after the real ones; default 0. */
  readonly nulls?: number;
  /** `[tokens]`, 1 = real token; needed only for a plan that `maskPlan` has not seen, and for a dense one. */
  readonly mask?: Tensor;
}

/**
 * Tokens per expert, f32 `[experts + nulls]`. A dense plan sends every token to every expert; slots and merge plans are soft, and
 * there each token counts once, shared out by its combine weights or coefficients (with several expert modes, their products; the last mode counts fastest).
 */
export function expertLoad(plan: Plan, { experts, nulls = 0, mask }: Sizes): Tensor {
  const total = experts + nulls;
  switch (plan.kind) {
    case "sparse":
      return idCounts(plan.experts, total, mask);
    case "dense": {
      const [tokens = 0, columns = 0] = plan.weights.shape;
      const real = mask ? sum(mask) : constant(plan.weights, tokens);
      return fit(mul(filled(plan.weights, [columns], 1), real), total);
    }
    case "expert-choice":
      return fit(sum(less(-1, plan.tokens), [1]), total);
    case "slots": {
      const [batch = 0, sequence = 0, slots = 0] = plan.combine.shape;
      const perSlot = sum(reshape(stopGradient(plan.combine), [batch * sequence, slots]), [0]);
      return fit(sum(reshape(perSlot, [experts, slots / experts]), [1]), total);
    }
    case "merge": {
      const [first, ...others] = plan.coefficients;
      if (first === undefined) return filled(plan.groups, [total], 0);
      const shares = others.reduce((a, b) => {
        const [[groups = 0, m = 0], [, n = 0]] = [a.shape, b.shape];
        return reshape(mul(reshape(a, [groups, m, 1]), reshape(b, [groups, 1, n])), [groups, m * n]);
      }, first);
      return fit(sum(takeRows(stopGradient(shares), plan.groups), [0]), total);
    }
    default:
      return plan satisfies never;
  }
}

/** Summed weights per expert, `[experts + nulls]` (1701.06538, eq. 6), with gradient. For the kinds that weigh tokens. */
export function expertImportance(
  plan: Extract<Plan, { kind: "sparse" | "dense" | "expert-choice" }>,
  { experts, nulls = 0 }: Sizes,
): Tensor {
  const total = experts + nulls;
  const { weights } = plan;
  if (plan.kind === "sparse") {
    const flat = reshape(weights, [weights.size, 1]);
    return reshape(addRows(flat, reshape(plan.experts, [weights.size]), total), [total]);
  }
  if (plan.kind === "dense") return fit(sum(weights, [0]), total);
  return fit(sum(where(less(-1, plan.tokens), weights, 0), [1]), total);
}

/**
 * Jain's index of `load [experts]`, []: (Σ l)² / (E Σ l²), from 1 / E (one expert has everything) to 1 (all alike); 0 without load. How
 * 2505.10860 measures the utilisation of experts.
 */
export function jainIndex(load: Tensor): Tensor {
  const squares = sum(square(load));
  const spread = mul(squares, Math.max(load.size, 1));
  return div(square(sum(load)), where(less(0, squares), spread, 1));
}

/** How many real tokens no real expert sees, []. Dense, slots and merge plans leave none out. */
export function untouchedTokens(plan: Plan, { experts, mask }: Sizes, tokens: number): Tensor {
  switch (plan.kind) {
    case "sparse": {
      const k = plan.experts.shape[1] ?? 0;
      if (k === 0) return mask ? sum(mask) : filled(plan.weights, [], tokens);
      return without(reshape(maxLast(inside(plan.experts, experts)), [tokens]), mask);
    }
    case "expert-choice": {
      const places = plan.tokens.size;
      const seen = addRows(filled(plan.weights, [places, 1], 1), reshape(plan.tokens, [places]), tokens);
      return without(reshape(seen, [tokens]), mask);
    }
    case "dense":
      return filled(plan.weights, [], 0);
    case "slots":
      return filled(plan.combine, [], 0);
    case "merge":
      return filled(plan.groups, [], 0);
    default:
      return plan satisfies never;
  }
}

/**
 * The metrics `moe()` adds to every layer: `load` [experts + nulls], `untouched` [] and, where the router tells its probabilities,
 * `entropy` (mean of the tokens') and `entropyOfMean`, both in nats.
 */
export function routingMetrics(routed: Routed, sizes: Sizes, tokens: number): Readonly<Record<string, Tensor>> {
  const { plan } = routed;
  const metrics = { load: expertLoad(plan, sizes), untouched: untouchedTokens(plan, sizes, tokens) };
  if (routed.probabilities === undefined) return metrics;
  const probabilities = stopGradient(routed.probabilities);
  return {
    ...metrics,
    entropy: tokenEntropy(probabilities, sizes.mask),
    entropyOfMean: entropyOfMean(probabilities, sizes.mask),
  };
}

// How many of the real tokens have seen [tokens] = 0.
function without(seen: Tensor, mask?: Tensor): Tensor {
  const none = less(seen, 0.5);
  return sum(mask ? mul(none, mask) : none);
}

// x [n] cut or filled up with zeros to [total].
function fit(x: Tensor, total: number): Tensor {
  return x.size >= total ? slice(x, [0], [total]) : pad(x, [0], [total - x.size]);
}
