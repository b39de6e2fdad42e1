// Mixture of attention heads (2210.05144, in the form of JetMoE 2404.07413, section 2.2): every expert is a projection to queries and
// one from what they found back to the stream; keys and values are common. A token has kvHeads queries from each of its experts, and
// query j of each meets key head j.
import {
  add,
  attention,
  reshape,
  rope,
  slice,
  type Tensor,
  type Tree,
  takeRows,
  transpose,
  UnsupportedError,
} from "@switchyard/core";
import {
  combine,
  dispatchPlan,
  gatherRows,
  maskPlan,
  outputsPerSlot,
  type Router,
  requireOverrides,
  tokenMask,
} from "@switchyard/core/moe";
import type { MixtureAttention } from "../blueprint.ts";
import { groupedProduct, product, withoutLowRank } from "../stored-matrix.ts";
import { branch, leaf } from "../tree.ts";
import type { Attended, AttentionInput, AttentionModule } from "./kind.ts";

/**
 * `router` is that of the layer; without it the module only tells its shapes. Throws UnsupportedError for a router whose plan is not
 * sparse: slots of tokens are what the queries are made for.
 */
export function mixtureAttention(options: MixtureAttention, width: number, router?: Router): AttentionModule {
  const { experts, kvHeads, headSize } = options;
  const inner = kvHeads * headSize;
  const turning = options.rope.interleaved ? { interleaved: true } : {};
  const settings = { causal: true, scale: 1 / Math.sqrt(headSize) };

  const run = (params: Tree, { hidden, layout, turns, remember, routerInput }: AttentionInput): Attended => {
    if (!router) throw new UnsupportedError("mixture of attention heads: this module was made without its router");
    const { batch, sequence, past, mask } = layout;
    const tokens = batch * sequence;
    const flat = reshape(hidden, [tokens, width]);
    const input = routerInput(flat);
    requireOverrides(router, input);
    const decided = router.route(withoutLowRank(branch(params, "router")), input);
    if (decided.plan.kind !== "sparse") {
      throw new UnsupportedError(
        `mixture of attention heads: the router gave a "${decided.plan.kind}" plan, which has no slots; use one such as topK`,
      );
    }
    const real = tokenMask(layout);
    const plan = real ? maskPlan(decided.plan, real) : decided.plan;
    const k = plan.experts.shape[1] ?? 0;
    const dispatched = dispatchPlan(plan, experts);
    const projections = branch(params, "experts");

    // Slot i of a token holds queries 0..kvHeads-1 of its expert; attention wants those of one key head side by side.
    const grouped = (x: Tensor): Tensor =>
      reshape(transpose(reshape(x, [batch, sequence, k, kvHeads, headSize]), [0, 1, 3, 2, 4]), [
        batch,
        sequence,
        kvHeads * k,
        headSize,
      ]);
    const perSlot = (x: Tensor): Tensor =>
      reshape(transpose(reshape(x, [batch, sequence, kvHeads, k, headSize]), [0, 1, 3, 2, 4]), [tokens * k, inner]);
    const turn = (x: Tensor): Tensor => rope(x, turns.cos, turns.sin, turning);

    const asked = groupedProduct(projections, "input", gatherRows(flat, dispatched), dispatched.ends); // [bound, inner]
    const q = turn(grouped(outputsPerSlot(plan, dispatched, asked)));
    const both = reshape(product(params, "kv", hidden), [batch, sequence, 2 * kvHeads, headSize]);
    const half = (from: number): Tensor => slice(both, [0, 0, from, 0], [batch, sequence, kvHeads, headSize]);
    const { keys, values } = remember(turn(half(0)), half(kvHeads));
    const seen = { ...settings, ...(mask ? { mask } : {}) };
    const { output } = attention(q, keys, values, seen);

    const found = takeRows(perSlot(output), dispatched.slots); // [bound, inner]
    const back = groupedProduct(projections, "output", found, dispatched.ends); // [bound, width]
    const summed = add(combine(plan, dispatched, back, tokens), leaf(params, "bias"));
    return {
      output: reshape(summed, [batch, sequence, width]),
      probabilities() {
        const { probabilities } = attention(q, keys, values, { ...seen, probabilities: true });
        if (!probabilities) throw new Error("attention gave no probabilities");
        // Heads in the order of the slots: [batch, k * kvHeads, sequence, past + sequence].
        const total = past + sequence;
        const bySlot = transpose(reshape(probabilities, [batch, kvHeads, k, sequence, total]), [0, 2, 1, 3, 4]);
        return reshape(bySlot, [batch, k * kvHeads, sequence, total]);
      },
      routed: { ...decided, plan },
    };
  };

  return {
    shapes: {
      "experts.input": [experts, inner, width],
      "experts.output": [experts, width, inner],
      kv: [2 * inner, width],
      bias: [width],
    },
    run,
  };
}
