// Vectors of VQMoE, MoGE, ViMoE's shared expert with its analysis, and the gates of theory.
import { add, broadcastTo, entmax15, reshape, type Tensor } from "@switchyard/core";
import {
  layerInput,
  layerParams,
  moe,
  moeLayer,
  type Routed,
  runExperts,
  type SharedExperts,
} from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { groupPenalty, moge } from "../../src/moge.ts";
import { hierarchicalGate, type TheoryGatesOptions, theoryGates } from "../../src/theory-gates.ts";
import { classSpecialisation, routingHeatMap, viMoE } from "../../src/vi-moe.ts";
import { codeDistances, quantize, vqMoE } from "../../src/vq-moe.ts";
import {
  dense,
  type Family,
  flat,
  given,
  number,
  numberOr,
  results,
  shapeOf,
  sized,
  slopes,
  sparse,
  tensor,
  turned,
  type Values,
} from "../vectors.ts";
import { expertActivation, plainExperts, selecting } from "./parts.ts";

export const vqMoEFamily: Family = async (one, on) => {
  const [x, codebook, matrices] = [
    given(one.inputs, "x"),
    given(one.inputs, "codebook"),
    given(one.inputs, "w_expert"),
  ];
  const [codes = 0, width = 0] = shapeOf(codebook);
  const [tokens = 0, experts] = [shapeOf(x)[0], number(one, "experts")];
  const [commitment, act] = [numberOr(one, "beta", 0.25), expertActivation(one, "tanh")];
  const blend = number(one, "official_contrib_rate");
  if (blend === 0) throw new Error("official_contrib_rate = 0: a blend of 0 stands for no blend at all");
  const options = { k: 1, codes, commitment } as const;
  const layer = (plugin = vqMoE(options)) => {
    const made = moeLayer(plugin, { engine: on, width }, { experts: plainExperts(on, matrices, act) });
    const router = {
      weight: on.tensor(new Float64Array(experts * width), [experts, width]),
      codebook: tensor(on, codebook),
      combine: tensor(on, turned(given(one.inputs, "w_combine"))),
      combineBias: tensor(on, given(one.inputs, "b_combine")),
    };
    return { made, params: { ...(layerParams(made) as Readonly<Record<string, Tensor>>), router } };
  };
  const loss = (hidden: Tensor, book: Tensor): Tensor => quantize(hidden, book, { commitment }).loss;
  const found = await results(on, () => {
    const hidden = tensor(on, x);
    const both = layer();
    const input = layerInput(both.made, hidden, { training: true });
    const routed = both.made.router.route(both.params.router, input);
    const path = routed.more?.[0];
    if (path?.rows === undefined || path.plan.kind !== "sparse") throw new Error("there is no discrete path");
    // The vector gives the top-k path's output: as if every expert had computed it.
    const computed = reshape(tensor(on, given(one.inputs, "smoe_output")), [tokens, 1, width]);
    const whole = runExperts(both.made, both.params, input, {
      routed: { ...routed, expertOutputs: broadcastTo(computed, [tokens, experts, width]) },
    });
    const alone = layer(vqMoE({ ...options, discreteOnly: "evaluation" }));
    const distances = codeDistances(hidden, tensor(on, codebook));
    return {
      distances,
      code: quantize(hidden, tensor(on, codebook)).codes,
      expert: path.plan.experts,
      rows: path.rows,
      loss: routed.losses.vq?.value as Tensor,
      gateDiscrete: path.plan.weights,
      gateTopK: sparse(routed).weights, // with k = 1 the gate itself
      discrete: moe(alone.made, alone.params, layerInput(alone.made, hidden)).output,
      output: whole.output,
      blended: quantize(hidden, tensor(on, codebook), { blend }).rows,
    };
  });
  return {
    sq_distances: found.distances,
    code: flat(found.code),
    expert: flat(found.expert),
    quantized: found.rows,
    vq_loss: found.loss,
    grad_x: await slopes(on, x, (hidden) => loss(hidden, tensor(on, codebook))),
    grad_codebook: await slopes(on, codebook, (book) => loss(tensor(on, x), book)),
    combine_gate: flat(found.gateTopK).map((gate, t) => [gate, flat(found.gateDiscrete)[t] ?? Number.NaN]),
    discrete_output: found.discrete,
    output: found.output,
    official_blended_forward_value: found.blended,
  };
};

export const moGEFamily: Family = async (one, on) => {
  const z = given(one.inputs, "routing_input");
  const experts = shapeOf(z)[1] ?? 0;
  const [height, epsilon] = [number(one, "height"), numberOr(one, "eps", 1e-8)];
  sized(one, "width", experts / height);
  const map = { height, epsilon } as const;
  const penalty = (of: Tensor, kernel: "uniform" | "gaussian", padding: "zero" | "torus"): Tensor =>
    groupPenalty(of, { ...map, kernel, padding });
  const found = await results(on, () => {
    // The router's own penalty has the usual epsilon.
    const select = selecting(on, moge({ k: 1, height }), experts);
    const own = select(tensor(on, z), { training: true }).losses.group?.value as Tensor;
    return {
      uniform3_zero_pad: epsilon === 1e-8 ? own : penalty(tensor(on, z), "uniform", "zero"),
      uniform3_torus: penalty(tensor(on, z), "uniform", "torus"),
      gauss3_zero_pad: penalty(tensor(on, z), "gaussian", "zero"),
      gauss3_torus: penalty(tensor(on, z), "gaussian", "torus"),
    };
  });
  return {
    ...Object.fromEntries(Object.entries(found).map(([name, value]) => [`penalty.${name}`, value])),
    grad_uniform3_zero_pad: await slopes(on, z, (x) => penalty(x, "uniform", "zero")),
  };
};

export const sharedExpertsFamily: Family = async (one, on) => {
  const [x, w, own] = [given(one.inputs, "x"), given(one.inputs, "w_router"), given(one.inputs, "w_expert")];
  const [width = 0, experts = 0] = shapeOf(w);
  const labels = flat(given(one.inputs, "class_id"));
  const classes = Math.max(...labels) + 1;
  const act = expertActivation(one, "tanh");
  const sharedMatrices = given(one.inputs, "w_shared") as readonly Values[];
  sized(one, "shared", sharedMatrices.length);
  const output = (shared: readonly SharedExperts[]): { readonly output: Tensor; readonly routed: Routed } => {
    const parts = { experts: plainExperts(on, own, act), shared };
    const plugin = viMoE({ k: number(one, "k"), shared: shared.length });
    const layer = moeLayer(plugin, { engine: on, width }, parts);
    const params = { ...(layerParams(layer) as Readonly<Record<string, Tensor>>) };
    const router = { weight: tensor(on, turned(w)) };
    return moe(layer, { ...params, router }, layerInput(layer, tensor(on, x)));
  };
  const found = await results(on, () => {
    const shared = sharedMatrices.map((matrix) => plainExperts(on, [matrix], act));
    const gate = tensor(on, turned(given(one.inputs, "w_shared_gate"))); // [1, width]
    const routed = output([]);
    const { experts: ids, weights } = sparse(routed.routed);
    const heat = routingHeatMap(ids, on.tensor(Int32Array.from(labels), [labels.length]), { experts, classes });
    const all = on.tensor(Int32Array.of(labels.length), [1]);
    const layout = { batch: 1, sequence: labels.length, past: 0 };
    return {
      ids,
      weights,
      routed: routed.output,
      shared: shared
        .map((experts) => experts.apply(experts.params, tensor(on, x), all, layout).output)
        .reduce((total, one) => add(total, one)),
      both: output(shared.map((experts) => ({ experts }))).output,
      gated: output(shared.map((experts) => ({ experts, gate }))).output,
      heat,
      special: classSpecialisation(heat),
    };
  });
  return {
    gates: dense(found.ids, found.weights, experts),
    routed: found.routed,
    shared: found.shared,
    deepseekmoe_or_vimoe_output: found.both,
    qwen2moe_output: found.gated,
    routing_heatmap: found.heat,
    specialisation_per_class: found.special,
  };
};

export const gatingFamily: Family = async (one, on) => {
  const { x, w, b } = { x: given(one.inputs, "x"), w: given(one.inputs, "w"), b: given(one.inputs, "b") };
  const [width = 0, experts = 0] = shapeOf(w);
  const [outer, inner] = [given(one.inputs, "w_outer"), given(one.inputs, "w_inner") as readonly Values[]];
  const groups = shapeOf(outer)[1] ?? 0;
  const k = number(one, "k");
  const route = (options: TheoryGatesOptions, count: number, params: Readonly<Record<string, Tensor>>): Routed =>
    theoryGates(options)
      .init(routerContext(on, { experts: count, width }))
      .route(params, routerInput(on, { hidden: tensor(on, x) }));
  const whole = ({ plan }: Routed): Tensor => {
    if (plan.kind !== "dense") throw new Error(`a dense plan was expected, found ${plan.kind}`);
    return plan.weights;
  };
  const found = await results(on, () => {
    const plain = { weight: tensor(on, turned(w)), bias: tensor(on, b) };
    const levels = {
      weight: tensor(
        on,
        inner.flatMap((matrix) => turned(matrix)),
      ), // [groups * members, width]
      bias: tensor(on, flat(given(one.inputs, "b_inner"))),
      outerWeight: tensor(on, turned(outer)),
      outerBias: tensor(on, given(one.inputs, "b_outer")),
    };
    const count = levels.weight.shape[0] ?? 0;
    const softmaxed = route({ gate: "dense" }, experts, plain);
    const [chosen, sigmoid] = [route({ k }, experts, plain), route({ gate: "sigmoid", k }, experts, plain)];
    const joint = route({ gate: "hierarchical", groups }, count, levels);
    const split = hierarchicalGate(joint.logits as Tensor, groups);
    return {
      logits: softmaxed.logits as Tensor,
      dense: whole(softmaxed),
      ids: sparse(chosen).experts,
      weights: sparse(chosen).weights,
      sigmoid: whole(route({ gate: "sigmoid", k: 0 }, experts, plain)),
      sigmoidIds: sparse(sigmoid).experts,
      sigmoidWeights: sparse(sigmoid).weights,
      outer: split.outer,
      inner: split.inner,
      joint: whole(joint),
      entmax: entmax15(softmaxed.logits as Tensor),
    };
  });
  return {
    logits: found.logits,
    dense_softmax: found.dense,
    sparse_softmax: dense(found.ids, found.weights, experts),
    normalised_sigmoid: found.sigmoid,
    normalised_sigmoid_topk: dense(found.sigmoidIds, found.sigmoidWeights, experts),
    hierarchical_outer: found.outer,
    hierarchical_inner: found.inner,
    hierarchical_joint: found.joint,
    entmax15: found.entmax,
  };
};

export const structuredFamilies: Readonly<Record<string, Family>> = {
  vqmoe: vqMoEFamily,
  moge: moGEFamily,
  shared_experts: sharedExpertsFamily,
  gating: gatingFamily,
};
