// One function per family of vectors: what the router gives under each name the vectors expect.
import { mean, mul, type Random, relu, sum, type Tensor } from "@switchyard/core";
import {
  capacityOf,
  expertLoad,
  idCounts,
  padToCapacity,
  type Routed,
  type RouterInput,
  untouchedTokens,
} from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { expertChoice } from "../../src/expert-choice.ts";
import { leaf } from "../../src/parts.ts";
import { reMoE } from "../../src/re-moe.ts";
import { switchRouter } from "../../src/switch-router.ts";
import { type TopKOptions, topK } from "../../src/top-k.ts";
import {
  dense,
  type Family,
  fixedUniform,
  flat,
  given,
  number,
  numberOr,
  results,
  shapeOf,
  slopes,
  sparse,
  tensor,
  turned,
  type Values,
} from "../vectors.ts";
import { selecting, weighted } from "./parts.ts";

export const topKFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const experts = shapeOf(logits)[1] ?? 0;
  const k = number(one, "k");
  const routed = async (options: TopKOptions): Promise<{ ids: Values; weights: Values; probabilities: Values }> =>
    results(on, () => {
      const found = selecting(on, topK(options), experts)(tensor(on, logits), {});
      return {
        ids: sparse(found).experts,
        weights: sparse(found).weights,
        probabilities: found.probabilities as Tensor,
      };
    });
  const renormalised = await routed({ k, order: "softmax-topk-renormalise" });
  const raw = await routed({ k, order: "softmax-topk" });
  const after = await routed({ k, order: "topk-softmax" });
  const sigmoid = await routed({ k, order: "sigmoid" });
  const topP = numberOr(one, "top_p", 1);
  const nucleus = await routed({ k: experts, order: "softmax-topk", topP });
  const nucleusOne = await routed({ k: experts, order: "softmax-topk-renormalise", topP });
  const kept = (nucleus.ids as readonly Values[]).map((row) => flat(row).filter((e) => e >= 0));
  return {
    softmax: renormalised.probabilities,
    indices: renormalised.ids,
    weights_softmax_then_topk: raw.weights,
    weights_renormalised: renormalised.weights,
    weights_topk_then_softmax: after.weights,
    dense_renormalised: dense(renormalised.ids, renormalised.weights, experts),
    top_p_count: kept.map((row) => row.length),
    top_p_mask: kept.map((row) => Array.from({ length: experts }, (_, e) => Number(row.includes(e)))),
    top_p_weights_unnormalised: dense(nucleus.ids, nucleus.weights, experts),
    top_p_weights_renormalised: dense(nucleusOne.ids, nucleusOne.weights, experts),
    sigmoid_topk_indices: sigmoid.ids,
    sigmoid_topk_weights_renormalised: sigmoid.weights,
  };
};

export const switchFamily: Family = async (one, on) => {
  const [x, w] = [given(one.inputs, "x"), given(one.inputs, "w_router")];
  const [tokens = 0] = shapeOf(x);
  const experts = shapeOf(w)[1] ?? 0;
  const [factor, jitter, alpha] = [number(one, "capacity_factor"), number(one, "jitter_eps"), number(one, "alpha")];
  const plugin = switchRouter({ capacityFactor: factor, jitter, balance: alpha });
  // The vector's noise is the factor 1 - jitter + 2 jitter u; the router draws u. Without jitter it draws nothing.
  const u = (given(one.inputs, "jitter") as readonly Values[]).map((row) =>
    flat(row).map((n) => {
      if (jitter === 0 && n !== 1) throw new Error(`a case without jitter multiplies by ${n}`);
      return jitter === 0 ? 0.5 : (n - 1 + jitter) / (2 * jitter);
    }),
  );
  const capacity = capacityOf({ tokens, experts, factor });

  const route = (training: boolean, random?: Random): Routed => {
    const { router, params } = weighted(on, plugin, w);
    return router.route(params, {
      ...routerInput(on, { hidden: tensor(on, x), training }),
      ...(random ? { random } : {}),
    });
  };
  const balance = (routed: Routed): Tensor => routed.losses.balance?.value as Tensor;
  const trained = await results(on, () => {
    const routed = route(true, fixedUniform(on, u));
    const free = switchRouter({ capacityFactor: Number.POSITIVE_INFINITY, jitter });
    const { router, params } = weighted(on, free, w);
    const asked = sparse(
      router.route(params, {
        ...routerInput(on, { hidden: tensor(on, x), training: true }),
        random: fixedUniform(on, u),
      }),
    );
    // Every token of each expert in the order of its places: [experts, tokens].
    const places = padToCapacity({ kind: "sparse", ...asked }, { experts, policy: "position", capacity: tokens });
    return {
      logits: routed.logits as Tensor,
      asked: asked.experts,
      gates: asked.weights,
      kept: sparse(routed).experts,
      places: places.tokens,
      f: mul(idCounts(asked.experts, experts), 1 / tokens),
      P: mean(routed.probabilities as Tensor, [0]),
      aux: balance(routed),
      scaled: mul(balance(routed), routed.losses.balance?.weight ?? Number.NaN),
    };
  });
  const evaluated = await results(on, () => ({
    ids: sparse(route(false)).experts,
    gates: sparse(route(false)).weights,
  }));
  const position = new Array<number>(tokens).fill(-1);
  for (const row of trained.places as readonly Values[])
    flat(row).forEach((token, place) => {
      if (token >= 0) position[token] = place;
    });
  return {
    train_logits: trained.logits,
    train_expert: flat(trained.asked),
    train_gate: flat(trained.gates),
    capacity,
    position_in_expert: position,
    kept: flat(trained.kept).map((e) => Number(e >= 0)),
    f: trained.f,
    P: trained.P,
    aux_loss_unscaled: trained.aux,
    aux_loss: trained.scaled,
    grad_aux_unscaled_wrt_logits: await slopes(on, trained.logits, (logits) =>
      balance(selecting(on, plugin, experts)(logits, { training: true })),
    ),
    infer_expert: flat(evaluated.ids),
    infer_gate: flat(evaluated.gates),
  };
};

export const reMoEFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const [tokens = 0, experts = 0] = shapeOf(logits);
  const [k, lambda, alpha] = [number(one, "k"), number(one, "lambda0"), number(one, "alpha")];
  const select = selecting(on, reMoE({ k, lambda, alpha }), experts);
  // With lambda 1 the loss is the bare penalty.
  const call = (): Partial<RouterInput> => ({ training: true, buffers: { lambda: on.tensor(Float64Array.of(1), []) } });
  const penalty = (routed: Routed): Tensor => routed.losses.sparsity?.value as Tensor;
  const found = await results(on, () => {
    const routed = select(tensor(on, logits), call());
    const { weights, experts: ids } = sparse(routed);
    return {
      gates: weights,
      ids,
      load: expertLoad(routed.plan, { experts }),
      l1: mul(sum(relu(routed.logits as Tensor)), 1 / tokens),
      penalty: penalty(routed),
    };
  });
  const load = flat(found.load);
  const { next } = await results(on, () => {
    const router = reMoE({ k, lambda, alpha }).init(routerContext(on, { experts }));
    const statistics = { step: 0, tokens, load: Float64Array.from(load), metrics: {} };
    if (!router.afterStep) throw new Error("reMoE has afterStep");
    return { next: leaf(router.afterStep([statistics], router.buffers), "lambda") };
  });
  return {
    gates: found.gates,
    active: (found.ids as readonly Values[]).map((row) => flat(row).map((e) => Number(e >= 0))),
    tokens_per_expert: load,
    f: load.map((n) => (experts * n) / (k * tokens)),
    l1_mean_per_token: found.l1,
    l1_load_balanced_unscaled: found.penalty,
    sparsity: 1 - load.reduce((total, n) => total + n, 0) / (tokens * experts),
    target_sparsity: 1 - k / experts,
    lambda_next: next,
    grad_l1_load_balanced_wrt_logits: await slopes(on, logits, (x) => penalty(select(x, call()))),
  };
};

export const expertChoiceFamily: Family = async (one, on) => {
  const [x, w] = [given(one.inputs, "x"), given(one.inputs, "w_router")];
  const [tokens = 0] = shapeOf(x);
  const experts = shapeOf(w)[1] ?? 0;
  const found = await results(on, () => {
    const { router, params } = weighted(on, expertChoice({ capacityFactor: number(one, "capacity_factor") }), w);
    const routed = router.route(params, routerInput(on, { hidden: tensor(on, x) }));
    if (routed.plan.kind !== "expert-choice") throw new Error(`found a plan of kind ${routed.plan.kind}`);
    return {
      scores: routed.probabilities as Tensor,
      ids: routed.plan.tokens,
      gates: routed.plan.weights,
      untouched: untouchedTokens(routed.plan, { experts }, tokens),
    };
  });
  // [experts, tokens], turned around.
  const combine = turned(dense(found.ids, found.gates, tokens));
  return {
    k: shapeOf(found.ids)[1] ?? 0,
    scores: found.scores,
    token_index: found.ids,
    gates: found.gates,
    combine,
    experts_per_token: combine.map((row) => row.filter((weight) => weight !== 0).length),
    untouched_tokens: found.untouched,
  };
};

export const firstFamilies: Readonly<Record<string, Family>> = {
  topk: topKFamily,
  switch: switchFamily,
  remoe: reMoEFamily,
  expert_choice: expertChoiceFamily,
};
