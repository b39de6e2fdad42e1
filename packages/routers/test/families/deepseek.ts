// DeepSeek-V2 and V3 (2405.04434, 2412.19437): scores, groups, weights, the bias after a step. GShard (2006.16668): the rules
// for the second expert, places under a capacity, the balance loss.
import { add, type Engine, mean, mul, sigmoid, slice, type Tensor } from "@switchyard/core";
import { capacityOf, expertLoad, idCounts, maxViolation, padToCapacity, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { deepSeekV2 } from "../../src/deep-seek-v2.ts";
import { type DeepSeekV3Options, deepSeekV3 } from "../../src/deep-seek-v3.ts";
import { limitToGroups } from "../../src/group-parts.ts";
import { type GShardOptions, gshard } from "../../src/gshard.ts";
import { leaf } from "../../src/parts.ts";
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
  sparse,
  tensor,
  type Values,
  type VectorCase,
} from "../vectors.ts";
import { selecting, weighted } from "./parts.ts";

/** Options of the case that both routers have. */
const groupOptions = (one: VectorCase): { k: number; groups: number; keptGroups: number } => ({
  k: number(one, "k"),
  groups: number(one, "n_group"),
  keptGroups: number(one, "topk_group"),
});

const deepSeekFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const [tokens = 0, experts = 0] = shapeOf(logits);
  const scale = number(one, "routed_scaling_factor");
  const options = { ...groupOptions(one), scale, rate: number(one, "bias_update_speed") };
  const { groups, keptGroups, k } = options;
  const bias = (engine: Engine): Tensor => tensor(engine, given(one.inputs, "score_correction_bias"));

  const third = await results(on, () => {
    const route = (more: Partial<DeepSeekV3Options>): Routed =>
      selecting(on, deepSeekV3({ ...options, ...more }), experts)(tensor(on, logits), { buffers: { bias: bias(on) } });
    const routed = route({});
    const { experts: ids, weights } = sparse(routed);
    const scores = sigmoid(tensor(on, logits));
    const choice = add(scores, bias(on));
    const limited = limitToGroups(choice, { groups, keptGroups, best: 2 });
    const everywhere = sparse(route({ groups: 1, keptGroups: 1, scale: 1 }));
    const load = expertLoad(routed.plan, { experts });
    return {
      scores,
      choice,
      groupScores: limited.groupScores,
      kept: limited.kept,
      mask: limited.mask,
      asZero: sparse(route({ hfCompat: true })).experts,
      ids,
      normalised: sparse(route({ scale: 1 })).weights,
      weights,
      freeIds: everywhere.experts,
      freeWeights: everywhere.weights,
      load,
      violation: maxViolation(load),
    };
  });
  const { next } = await results(on, () => {
    const router = deepSeekV3(options).init(routerContext(on, { experts }));
    const statistics = { step: 0, tokens, load: Float64Array.from(flat(third.load)), metrics: {} };
    if (!router.afterStep) throw new Error("deepSeekV3 has afterStep");
    return { next: leaf(router.afterStep([statistics], { bias: bias(on) }), "bias") };
  });
  const second = await results(on, () => {
    const route = (more: { scale: number; normalise?: boolean }): Routed =>
      selecting(on, deepSeekV2({ k, groups, keptGroups, ...more }), experts)(tensor(on, logits), {});
    const routed = route({ scale: 1 });
    const scores = routed.probabilities as Tensor;
    const { groupScores, mask } = limitToGroups(scores, { groups, keptGroups, best: 1 });
    return {
      scores,
      groupScores,
      mask,
      ids: sparse(routed).experts,
      weights: sparse(routed).weights,
      scaled: sparse(route({ scale })).weights,
      normalised: sparse(route({ scale: 1, normalise: true })).weights,
    };
  });
  return {
    "v3.scores": third.scores,
    "v3.scores_for_choice": third.choice,
    "v3.group_scores": third.groupScores,
    "v3.group_index": third.kept,
    "v3.group_mask": third.mask,
    "v3.indices_masked_zero": third.asZero,
    "v3.indices_masked_neg_inf": third.ids,
    "v3.weights_normalised": third.normalised,
    "v3.weights_scaled": third.weights,
    "v3.dense": dense(third.ids, third.weights, experts),
    "v3_without_groups.indices": third.freeIds,
    "v3_without_groups.weights_normalised": third.freeWeights,
    "v2.scores": second.scores,
    "v2.group_scores": second.groupScores,
    "v2.group_mask": second.mask,
    "v2.indices": second.ids,
    "v2.weights": second.weights,
    "v2.weights_times_scaling": second.scaled,
    "v2.weights_normalised": second.normalised,
    load: third.load,
    bias_next: next,
    max_violation: third.violation,
  };
};

/** The rule for second experts that the vectors call "all", "none", "random_paper", "threshold0.2" or "random_threshold0.2". */
function secondRule(name: string): Pick<GShardOptions, "second" | "threshold"> {
  if (name === "all" || name === "none") return { second: name };
  if (name === "random_paper") return { second: "chance" };
  const [, random, threshold] = /^(random_)?threshold(\d*\.?\d+)$/.exec(name) ?? [];
  if (threshold === undefined) throw new Error(`no rule for the second expert is called "${name}"`);
  return { second: random ? "random" : "threshold", threshold: Number(threshold) };
}

const gshardFamily: Family = async (one, on) => {
  const w = given(one.inputs, "w_router");
  const experts = shapeOf(w)[1] ?? 0;
  const [factor, minimum] = [number(one, "capacity_factor"), numberOr(one, "min_capacity", 0)];
  const epsilon = numberOr(one, "eps", 1e-9);
  const tokens = shapeOf(given(one.inputs, "x"))[0] ?? 0;
  const capacity = capacityOf({ tokens, experts, factor, minimum, round: "down" });
  const route = (more: GShardOptions): Routed => {
    const plugin = gshard({ capacityFactor: factor, minimumCapacity: minimum, epsilon, balance: 1, ...more });
    const { router, params } = weighted(on, plugin, w);
    const input = routerInput(on, { hidden: tensor(on, given(one.inputs, "x")), training: true });
    return router.route(params, { ...input, random: fixedUniform(on, given(one.inputs, "uniform")) });
  };
  const column = (x: Tensor, i: number): Tensor => slice(x, [0, i], [tokens, 1]);
  const base = await results(on, () => {
    const routed = route({ second: "all", capacityFactor: Number.POSITIVE_INFINITY });
    const { experts: ids, weights } = sparse(routed);
    return {
      logits: routed.logits as Tensor,
      ids,
      g1: column(weights, 0),
      g2: column(weights, 1),
      c1: mul(idCounts(column(ids, 0), experts), 1 / tokens),
      m: mean(routed.probabilities as Tensor, [0]),
      scaled: routed.losses.balance?.value as Tensor,
      paper: route({ scaledBalance: false }).losses.balance?.value as Tensor,
    };
  });
  const firsts = flat(base.c1).map((share) => Math.round(share * tokens));
  const found: Record<string, Values> = {
    logits: base.logits,
    indices: base.ids,
    g1: flat(base.g1),
    g2: flat(base.g2),
    c1: base.c1,
    m: base.m,
    aux_paper_mean_over_E: base.paper,
    aux_scaled_E2: base.scaled,
  };
  // What is expected as "all.kept" belongs to the rule "all"; a threshold has a point of its own.
  const names = Object.keys(one.expected).flatMap((path) => /^(.+)\.[a-z_]+$/.exec(path)?.[1] ?? []);
  for (const name of new Set(names)) {
    const rule = secondRule(name);
    const { asked, places, kept, weights } = await results(on, () => {
      const plan = sparse(route({ ...rule, capacityFactor: Number.POSITIVE_INFINITY }));
      // Every token of each expert in the order of its places.
      const free = { experts, policy: "choice", capacity: 2 * tokens } as const;
      const limited = sparse(route(rule));
      return {
        asked: plan.experts,
        places: padToCapacity({ kind: "sparse", ...plan }, free).tokens, // [experts, 2 * tokens]
        kept: limited.experts,
        weights: limited.weights,
      };
    });
    const sent = (asked as readonly Values[]).map(flat);
    found[`${name}.send_second`] = sent.map(([, e = -1]) => Number(e >= 0));
    found[`${name}.capacity`] = capacity;
    found[`${name}.position`] = sent.map((row, t) =>
      row.map((e, j) => {
        if (e < 0) return -1;
        const place = flat((places as readonly Values[])[e] ?? []).indexOf(t);
        // The vectors let second choices begin behind the first ones that fit, here they begin behind all.
        return j === 0 ? place : place - Math.max(0, (firsts[e] ?? 0) - capacity);
      }),
    );
    found[`${name}.kept`] = (kept as readonly Values[]).map((row) => flat(row).map((e) => Number(e >= 0)));
    found[`${name}.combine`] = dense(kept, weights, experts);
  }
  return found;
};

export const deepseekFamilies: Readonly<Record<string, Family>> = { deepseek: deepSeekFamily, gshard: gshardFamily };
