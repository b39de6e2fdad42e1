// Vectors of what stands around routers: dispatch, capacity, losses, and the training hooks ESFT and OMoE.
import {
  concat,
  entropyLast,
  groupedMatmul,
  mul,
  reshape,
  sigmoid,
  softmax,
  sum,
  type Tensor,
  takeRows,
  topkIndices,
} from "@switchyard/core";
import {
  applyCapacity,
  combine,
  type DropPolicy,
  dispatchPlan,
  entropyOfMean,
  gatherRows,
  idCounts,
  mixtralBalance,
  type Routed,
  type SparsePlan,
  sequenceBalance,
  sequenceBalances,
  squaredCV,
  switchBalance,
  tokenEntropy,
  zLoss,
} from "@switchyard/core/moe";
import {
  esftStatistics,
  normaliseScores,
  otherProjectors,
  projectGradient,
  selectExperts,
  updateProjectors,
} from "@switchyard/core/train";
import { topK } from "../../src/top-k.ts";
import {
  dense,
  expertsOf,
  type Family,
  flat,
  given,
  number,
  only,
  results,
  shapeOf,
  sized,
  slopes,
  sparse,
  tensor,
  type Values,
  word,
} from "../vectors.ts";
import { selecting } from "./parts.ts";

/** Members of a list. */
const members = (values: Values | undefined): readonly Values[] => {
  if (values === undefined || typeof values === "number") throw new Error(`a list was expected, found ${values}`);
  return values;
};

export const dispatchFamily: Family = async (one, on) => {
  const [x, scale] = [given(one.inputs, "x"), flat(given(one.inputs, "expert_scale"))];
  const indices = given(one.inputs, "indices");
  const [tokens = 0, width = 0] = shapeOf(x);
  const [experts, k] = [scale.length, shapeOf(indices)[1] ?? 0];
  sized(one, "k", k);
  only(one, "expert", ["scale_e * x"]);
  const found = await results(on, () => {
    const ids = on.tensor(Int32Array.from(flat(indices)), shapeOf(indices));
    const plan: SparsePlan = { kind: "sparse", experts: ids, weights: tensor(on, given(one.inputs, "weights")) };
    const dispatched = dispatchPlan(plan, experts);
    const gathered = gatherRows(tensor(on, x), dispatched);
    // Expert e is scale_e times the identity.
    const matrices = Float64Array.from({ length: experts * width * width }, (_, i) =>
      (i % (width * width)) % (width + 1) === 0 ? (scale[Math.floor(i / (width * width))] ?? Number.NaN) : 0,
    );
    const output = groupedMatmul(gathered, on.tensor(matrices, [experts, width, width]), dispatched.ends);
    return {
      ...dispatched,
      weight: takeRows(reshape(plan.weights, [tokens * k]), dispatched.slots),
      gathered,
      output: combine(plan, dispatched, output, tokens),
    };
  });
  const ends = flat(found.ends);
  const filled = ends.at(-1) ?? 0;
  return {
    expert_offsets: [0, ...ends],
    token_index: flat(found.rows).slice(0, filled),
    slot_index: flat(found.slots)
      .slice(0, filled)
      .map((slot) => slot % k),
    weight: flat(found.weight).slice(0, filled),
    gathered: members(found.gathered).slice(0, filled),
    output: found.output,
  };
};

export const capacityFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const [, experts = 0] = shapeOf(logits);
  const [k, factor] = [number(one, "k"), number(one, "capacity_factor")];
  const policies: Readonly<Record<string, DropPolicy>> = { probs: "probability", position: "position" };
  only(one, "softmax", ["before_topk", "after_topk"]);
  const order = word(one, "softmax") === "before_topk" ? "softmax-topk" : "topk-softmax";
  let capacity = Number.NaN;
  const found = await results(on, () => {
    const { experts: ids, weights } = sparse(selecting(on, topK({ k, order }), experts)(tensor(on, logits), {}));
    const policy = given(policies, word(one, "drop_policy"));
    const limited = applyCapacity({ kind: "sparse", experts: ids, weights }, { experts, policy, k, factor });
    capacity = limited.capacity;
    return {
      before: idCounts(ids, experts),
      ids: limited.plan.experts,
      weights: limited.plan.weights,
      dropped: mul(limited.dropped, ids.size),
    };
  });
  const chosen = members(found.ids).map(flat);
  return {
    capacity,
    tokens_per_expert_before_drop: found.before,
    kept_mask: chosen.map((row) => Array.from({ length: experts }, (_, e) => Number(row.includes(e)))),
    combine: dense(found.ids, found.weights, experts),
    dropped: found.dropped,
  };
};

export const lossesFamily: Family = async (one, on) => {
  const layerLogits = members(given(one.inputs, "layer_logits"));
  const concatenated = layerLogits.flatMap((layer) => members(layer));
  const [k, batch] = [number(one, "k"), number(one, "batch")];
  sized(one, "layers", layerLogits.length);
  const [first] = layerLogits;
  if (first === undefined) throw new Error("a case without layers");
  const [tokens = 0, experts = 0] = shapeOf(first);
  const found = await results(on, () => {
    const layers = layerLogits.map((logits) => tensor(on, logits));
    const logits = tensor(on, first);
    const mask = reshape(tensor(on, given(one.inputs, "attention_mask")), [tokens]);
    const probabilities = softmax(logits);
    const ids = topkIndices(logits, k);
    const [v3, v2] = [sigmoid(logits), probabilities].map((scores) => ({ scores, experts: ids, batch }));
    if (!v3 || !v2) throw new Error("two forms of scores");
    return {
      hf_mixtral: mixtralBalance(layers, { k }),
      hf_mixtral_masked: mixtralBalance(layers, { k, mask }),
      "layer0.tokens_per_expert": idCounts(ids, experts),
      "layer0.switch_style_divided_by_k": switchBalance({ probabilities, experts: ids, normalizeByK: true }),
      "layer0.switch_style_sum_over_k": switchBalance({ probabilities, experts: ids }),
      "layer0.z_loss": zLoss(logits),
      "layer0.deepseek_v3_sequence": sequenceBalances(v3),
      "layer0.deepseek_v3_sequence_mean": sequenceBalance(v3),
      "layer0.deepseek_v2_seq_aux": sequenceBalances(v2),
      "layer0.deepseek_v2_seq_aux_mean": sequenceBalance(v2),
      "layer0.token_entropy": reshape(entropyLast(probabilities), [tokens]),
      "layer0.mean_token_entropy": tokenEntropy(probabilities),
      "layer0.entropy_of_mean": reshape(entropyOfMean(probabilities), []),
      "layer0.importance_cv2_population": squaredCV(sum(probabilities, [0])),
    };
  });
  return {
    ...found,
    hf_grad_wrt_concatenated_logits: await slopes(on, concatenated, (all) => mixtralBalance([all], { k })),
    "layer0.grad_z_loss": await slopes(on, first, (logits) => zLoss(logits)),
  };
};

export const esftFamily: Family = async (one, on) => {
  const lengths = flat(given(one.inputs, "sample_lengths"));
  const [indices, gates] = [members(given(one.inputs, "indices")), members(given(one.inputs, "gates"))];
  const [batch, sequence, k] = [lengths.length, Math.max(...lengths), number(one, "k")];
  const layers = members(indices[0]).length;
  const experts = expertsOf(one);
  // A selection is a set: the file may list it in any order.
  const selected = (name: string, found: readonly (readonly number[])[]): readonly (readonly number[])[] =>
    found.map((own, layer) => {
      const wanted = flat(members(one.expected[name] ?? [])[layer] ?? []);
      const same = own.length === wanted.length && own.every((e) => wanted.includes(e));
      return same ? wanted : own;
    });
  /** The samples of one layer, each filled up to the longest: [batch * sequence * k]. */
  const padded = (samples: readonly Values[], layer: number, filling: number): number[] =>
    samples.flatMap((sample, i) => {
      const own = flat(members(sample)[layer] ?? []);
      if (own.length !== (lengths[i] ?? 0) * k) throw new Error(`sample ${i} has ${own.length} gates`);
      return [...own, ...new Array<number>(sequence * k - own.length).fill(filling)];
    });
  const statisticsOf = async (mean: "samples" | "tokens") => {
    const statistics = esftStatistics({ experts, mean });
    const routed = Array.from({ length: layers }, (_, layer): Routed => {
      // What stands in padding must not count.
      const ids = on.tensor(Int32Array.from(padded(indices, layer, 0)), [batch * sequence, k]);
      const weights = on.tensor(Float64Array.from(padded(gates, layer, 9)), [batch * sequence, k]);
      return { plan: { kind: "sparse", experts: ids, weights }, losses: {} };
    });
    const real = lengths.flatMap((n) => Array.from({ length: sequence }, (_, t) => Number(t < n)));
    const mask = on.tensor(Float64Array.from(real), [batch, sequence]);
    statistics.add(routed, { batch, mask });
    for (const { plan } of routed)
      if (plan.kind === "sparse") for (const x of [plan.experts, plan.weights]) x.dispose();
    mask.dispose();
    return statistics.scores();
  };
  const [bySample, pooled] = [await statisticsOf("samples"), await statisticsOf("tokens")];
  const normal = normaliseScores(bySample.gate);
  return {
    average_gate_score: bySample.gate,
    average_gate_score_layer_normalised: normal,
    token_selection_ratio: bySample.token,
    selected_gate: selected("selected_gate", selectExperts(normal, number(one, "p_gate"))),
    selected_token: selected("selected_token", selectExperts(bySample.token, number(one, "p_token"))),
    repo_pooled_gate_layer_normalised: normaliseScores(pooled.gate),
    repo_pooled_token_layer_normalised: normaliseScores(pooled.token),
    repo_as_written_axis0_gate: normaliseScores(pooled.gate, { over: "layers" }),
  };
};

export const omoeFamily: Family = async (one, on) => {
  const steps = members(given(one.inputs, "mean_input_per_step_and_expert"));
  const alpha = number(one, "alpha");
  return results(on, () => {
    const inputs = steps.map((step) => tensor(on, step)); // [experts, in]
    const [experts = 0, inner = 0] = inputs[0]?.shape ?? [];
    const identity = Float64Array.from({ length: inner * inner }, (_, i) => Number(i % (inner + 1) === 0));
    const start = concat(
      Array.from({ length: experts }, () => on.tensor(identity, [1, inner, inner])),
      0,
    );
    const projectors = inputs.reduce(
      (p: Tensor, x) => updateProjectors(p, reshape(x, [experts, 1, inner]), alpha),
      start,
    );
    return {
      projectors,
      averaged_other_projectors: otherProjectors(projectors),
      projected_grad: projectGradient(tensor(on, given(one.inputs, "grad_per_expert")), projectors),
    };
  });
};

export const trainingFamilies: Readonly<Record<string, Family>> = {
  dispatch: dispatchFamily,
  capacity: capacityFamily,
  losses: lossesFamily,
  esft: esftFamily,
  omoe: omoeFamily,
};
