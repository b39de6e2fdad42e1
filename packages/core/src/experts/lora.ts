// Low-rank experts on a frozen linear map (LoRA 2106.09685; as experts in DynMoLE 2504.00661, MoE-FFD 2404.08452, MoA 2506.05928):
//   y = W x + Σ_e w_e (α / r_e) B_e A_e x, W frozen, A_e [r_e, width], B_e [out, r_e]
// HydraLoRA (2404.19245) shares A among the experts, or, inside one adapter, among the heads that its own softmax weighs.
import { ShapeError, UnsupportedError } from "../errors.ts";
import { combine, dispatchPlan, gatherRows, tokenMask } from "../moe/dispatch.ts";
import type { Initial } from "../moe/experts.ts";
import { filled } from "../moe/parts.ts";
import type { Experts, Layout, MergePlan, Observe, Plan, Routed } from "../moe/plan.ts";
import { add, mul, stopGradient } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import { linear } from "../ops/matmul.ts";
import { softmax } from "../ops/normalise.ts";
import { hostConstant, reshape } from "../ops/shape.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { checkSizes, type Draw, leafAt, mixOwn, parameters, uniformWithin } from "./parts.ts";

export type LoraOptions = {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width of the output; default: `width`. */
  readonly out?: number;
  /** Rank of all experts, or one per expert. */
  readonly rank: number | readonly number[];
  /** Numerator of the scale α / r; default: the rank, so that the scale is 1. */
  readonly alpha?: number;
  /** One A for all experts (HydraLoRA); default false. */
  readonly sharedA?: boolean;
} & Initial;

/**
 * Low-rank experts without the frozen map: y = (α / r_e) B_e A_e x. Params, r the largest rank: `a [count, r, width]`
 * (with `sharedA`: `shared.a [r, width]`) and `b [count, out, r]`. New ones start as LoRA's: A uniform within
 * 1/sqrt(width), B zero, so that the output is zero.
 *
 * Ranks that differ are padded: what lies beyond an expert's rank is multiplied by 0, gets no gradient and is never seen,
 * but takes memory and time. Where ranks lie far apart, `heterogeneous` of one set per rank has no padding.
 *
 * `mixed` mixes A and B, each by itself (SMEAR); ranks and scales belong to the expert and are mixed with them.
 * Throws ShapeError for sizes that are not whole numbers from 1, and for given parameters of other shapes.
 *
 * @example lora({ count: 8, width: 64, rank: 8, alpha: 16, engine, random: random(engine, 0) })
 */
export function lora(options: LoraOptions): Experts {
  const { count, width, out = width, rank, alpha, sharedA = false } = options;
  const ranks = typeof rank === "number" ? [] : rank;
  checkSizes("lora", { count, width, out, ...(typeof rank === "number" ? { rank } : named(ranks)) });
  if (typeof rank !== "number" && ranks.length !== count)
    throw new ShapeError(`lora: ${ranks.length} ranks for ${count} experts; expected one each, or one number for all`);
  checkAlpha("lora", alpha);
  const largest = typeof rank === "number" ? rank : Math.max(...ranks);
  const a = sharedA ? "shared.a" : "a";
  const shapes = { [a]: sharedA ? [largest, width] : [count, largest, width], b: [count, out, largest] };

  const scale = alpha === undefined ? 1 : alpha / largest;
  /** 0 beyond an expert's rank, its scale (or 1) within: `[count, r]`. */
  const within = (like: Tensor, scaled: boolean): Tensor =>
    hostConstant(
      like,
      Float64Array.from({ length: count * largest }, (_, i) => {
        const own = ranks[Math.floor(i / largest)] ?? 0;
        return i % largest < own ? (scaled && alpha !== undefined ? alpha / own : 1) : 0;
      }),
      [count, largest],
    );
  const project = (params: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    const matrix = leafAt(params, a);
    observe?.(a, rows, ends);
    return sharedA ? linear(rows, matrix) : groupedMatmul(rows, matrix, ends); // [n, r]
  };
  const expand = (params: Tree, inner: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    observe?.("b", inner, ends);
    return groupedMatmul(inner, leafAt(params, "b"), ends); // [n, out]
  };
  const run = (params: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    const inner = project(params, rows, ends, observe);
    if (ranks.length === 0) return expand(params, scale === 1 ? inner : mul(inner, scale), ends, observe);
    const n = rows.shape[0] ?? 0;
    const factors = reshape(within(rows, true), [count, largest, 1]);
    return expand(params, mul(inner, groupedMatmul(filled(rows, [n, 1], 1), factors, ends)), ends, observe);
  };

  return {
    count,
    params: parameters("lora", shapes, options, drawA(a)),
    apply: (params, rows, ends, _, observe) => ({ output: run(params, rows, ends, observe) }),
    mixed(params, hidden, plan) {
      if (ranks.length === 0) return mixOwn(params, hidden, plan, run);
      // Ranks and scales go into the matrices first: a mixture of experts has no rank of its own.
      const [one, b] = [leafAt(params, a), leafAt(params, "b")];
      const own = sharedA ? { shared: { a: one } } : { a: mul(one, reshape(within(b, false), [count, largest, 1])) };
      const cut = { ...own, b: mul(b, reshape(within(b, true), [count, 1, largest])) };
      return mixOwn(cut, hidden, plan, (mixture, rows, ends) => expand(mixture, project(mixture, rows, ends), ends));
    },
  };
}

export type HydraLoraOptions = Omit<LoraOptions, "rank" | "sharedA"> & {
  readonly rank: number;
  /** Low-rank maps inside each adapter. */
  readonly heads: number;
  /** One A for the heads of an adapter (HydraLoRA); default true. */
  readonly sharedA?: boolean;
} & Initial;

/**
 * Adapters that are each a softmax mixture of low-rank maps: y = (α / r) Σ_h softmax(G_e x)_h B_eh A_e x, every head on
 * every row. Params: `gate [count, heads, width]`, `a [count, rank, width]` (without `sharedA`: `[count, heads rank,
 * width]`, head by head), `b [count, out, heads rank]`. New ones: gate and A uniform within 1/sqrt(width), B zero.
 * Throws ShapeError as `lora` does.
 */
export function hydraLora(options: HydraLoraOptions): Experts {
  const { count, width, out = width, rank, heads, alpha, sharedA = true } = options;
  checkSizes("hydraLora", { count, width, out, rank, heads });
  checkAlpha("hydraLora", alpha);
  const shapes = {
    gate: [count, heads, width],
    a: [count, sharedA ? rank : heads * rank, width],
    b: [count, out, heads * rank],
  };
  const scale = alpha === undefined ? 1 : alpha / rank;
  const run = (params: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    const n = rows.shape[0] ?? 0;
    const product = (name: string, x: Tensor): Tensor => {
      observe?.(name, x, ends);
      return groupedMatmul(x, leafAt(params, name), ends);
    };
    const shares = softmax(product("gate", rows)); // [n, heads]
    const inner = product("a", rows); // [n, rank] or [n, heads rank]
    const weighed = mul(reshape(inner, [n, sharedA ? 1 : heads, rank]), reshape(mul(shares, scale), [n, heads, 1]));
    return product("b", reshape(weighed, [n, heads * rank])); // [n, out]
  };
  return {
    count,
    params: parameters("hydraLora", shapes, options, drawA("a", "gate")),
    apply: (params, rows, ends, _, observe) => ({ output: run(params, rows, ends, observe) }),
    mixed: (params, hidden, plan) => mixOwn(params, hidden, plan, run),
  };
}

/** Experts with their parameters, and which of them each token meets. */
export interface Adapters {
  readonly experts: Experts;
  readonly params: Tree;
  /** Freed of padding, as `routeTokens` gives it; `planPart` cuts one adapter's plan out of a router's for several. */
  readonly plan: Plan;
  readonly layout: Layout;
  readonly observe?: Observe;
}

/**
 * A frozen linear map with experts added: hidden `[tokens, width]` -> W x + bias + Σ_e w_e E_e(x), `[tokens, out]`, and
 * the experts' own losses. `base.weight [out, width]` and `base.bias [out]` get no gradient; a token without expert gets
 * what the base gives. Throws UnsupportedError for a plan of slots, and for a merge plan where the experts cannot mix.
 */
export function adaptedLinear(
  hidden: Tensor,
  base: { readonly weight: Tensor; readonly bias?: Tensor },
  adapters: Adapters,
): { readonly output: Tensor; readonly losses?: Routed["losses"] } {
  const frozen = linear(hidden, stopGradient(base.weight), base.bias && stopGradient(base.bias));
  const { output, ...rest } = applyPlan(hidden, adapters);
  return { output: add(frozen, output), ...rest };
}

function applyPlan(
  hidden: Tensor,
  { experts, params, plan, layout, observe }: Adapters,
): { readonly output: Tensor; readonly losses?: Routed["losses"] } {
  if (plan.kind === "slots")
    throw new UnsupportedError("adaptedLinear: a plan of slots has no rows of single tokens; use another router");
  if (plan.kind === "merge") return { output: mixture(experts, params, hidden, plan, layout) };
  const dispatched = dispatchPlan(plan, experts.count, tokenMask(layout));
  const applied = experts.apply(params, gatherRows(hidden, dispatched), dispatched.ends, layout, observe);
  return { ...applied, output: combine(plan, dispatched, applied.output, hidden.shape[0] ?? 0) };
}

function mixture(experts: Experts, params: Tree, hidden: Tensor, plan: MergePlan, layout: Layout): Tensor {
  if (experts.mixed) return experts.mixed(params, hidden, plan, layout);
  throw new UnsupportedError("adaptedLinear: a merge plan needs experts with mixed(), such as lora() or adapter()");
}

const named = (ranks: readonly number[]): Record<string, number> =>
  Object.fromEntries(ranks.map((r, e) => [`rank[${e}]`, r]));

function checkAlpha(kind: string, alpha: number | undefined): void {
  if (alpha !== undefined && !Number.isFinite(alpha))
    throw new ShapeError(`${kind}: alpha = ${alpha}; expected a finite number`);
}

/** Uniform within 1/sqrt(inputs) for the named parameters (kaiming with a = sqrt(5)), zeros for the others. */
const drawA =
  (...names: readonly string[]): Draw =>
  (path, shape, random) =>
    names.includes(path) ? uniformWithin(random, shape, 1 / Math.sqrt(shape.at(-1) ?? 1)) : undefined;
