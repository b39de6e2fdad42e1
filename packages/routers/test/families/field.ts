// Vectors of the field's routers: X-MoE, SparseMixer, Soft MoE, DynMoLE.
import {
  add,
  alias,
  concat,
  groupedMatmul,
  mul,
  reshape,
  sum,
  type Tensor,
  type Tree,
  transpose,
} from "@switchyard/core";
import { type Experts, layerInput, moe, moeLayer, type Routed, type RouterPlugin } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { type DynMoLEOptions, dynMoLE, dynMoLEPlan } from "../../src/dyn-mole.ts";
import { type SparseMixed, sparseMixer } from "../../src/grin.ts";
import { leaf } from "../../src/parts.ts";
import { softMoE } from "../../src/soft-moe.ts";
import { type XMoEOptions, xMoE } from "../../src/x-moe.ts";
import {
  dense,
  type Family,
  flat,
  given,
  number,
  numberOr,
  only,
  results,
  shapeOf,
  slopes,
  sparse,
  tensor,
  type Values,
  word,
} from "../vectors.ts";
import { expertActivation, selecting } from "./parts.ts";

export const xMoEFamily: Family = async (one, on) => {
  const [x, projection, embeddings] = [
    given(one.inputs, "x"),
    given(one.inputs, "w_proj"),
    given(one.inputs, "expert_embeddings"),
  ];
  const [dimension = 0, width = 0] = shapeOf(projection);
  const [experts = 0] = shapeOf(embeddings);
  const base: XMoEOptions = { k: number(one, "k"), dimension, balanceTemperature: numberOr(one, "tau_balance", 0.3) };
  const temperature = number(one, "tau");
  const route = (plugin: RouterPlugin, hidden: Tensor): Routed => {
    const router = plugin.init(routerContext(on, { experts, width }));
    const params: Tree = {
      ...(router.params as Readonly<Record<string, Tensor>>),
      projection: tensor(on, projection),
      embeddings: tensor(on, embeddings),
    };
    return router.route(params, routerInput(on, { hidden, training: true }));
  };
  const softmaxGate = xMoE({ ...base, temperature });
  const found = await results(on, () => {
    const hidden = tensor(on, x);
    const routed = route(softmaxGate, hidden);
    return {
      // With temperature 1 the logits are the cosines.
      cosine_scores: route(xMoE({ ...base, temperature: 1 }), hidden).logits as Tensor,
      softmax_gate: routed.probabilities as Tensor,
      expert: sparse(routed).experts,
      gate_softmax: sparse(routed).weights,
      gate_sigmoid: sparse(route(xMoE({ ...base, gate: "sigmoid", temperature }), hidden)).weights,
      balance_loss: routed.losses.balance?.value as Tensor,
      torchscale_half_cosine_logits: route(xMoE({ ...base, variant: "torchscale" }), hidden).logits as Tensor,
      tutel_logits_at_init: route(xMoE({ ...base, variant: "tutel" }), hidden).logits as Tensor,
    };
  });
  // With one expert the vectors have a number for each token.
  const list = (values: Values): Values => (base.k === 1 ? flat(values) : values);
  return {
    ...found,
    expert: list(found.expert),
    gate_softmax: list(found.gate_softmax),
    gate_sigmoid: list(found.gate_sigmoid),
    grad_sum_of_gate_wrt_x: await slopes(on, x, (hidden) => sum(sparse(route(softmaxGate, hidden)).weights)),
  };
};

export const grinFamily: Family = async (one, on) => {
  const scores = given(one.inputs, "scores");
  const options = { k: number(one, "k"), jitter: number(one, "jitter_eps"), version: "v2" } as const;
  const draws = (name: string): Tensor[] =>
    (given(one.inputs, name) as readonly Values[]).map((values) => tensor(on, values));
  const mixed = (x: Tensor, training: boolean): SparseMixed => {
    const uniform = draws("uniform");
    const noise = draws("exponential_noise").map((exponential, pick) => ({
      exponential,
      uniform: uniform[pick] as Tensor,
    }));
    return sparseMixer(x, { ...options, ...(training ? { noise } : {}) });
  };
  const phase = async (training: boolean): Promise<Readonly<Record<string, Values>>> => {
    const found = await results(on, () => {
      const { experts, weights, whole, probabilities } = mixed(tensor(on, scores), training);
      const stacked = concat(
        probabilities.map((p) => reshape(p, [1, ...p.shape])),
        0,
      );
      return { selected: experts, multiplier: weights, mask_for_one: whole, masked_softmax: stacked };
    });
    const upstream = given(one.inputs, "upstream_grad_of_multiplier");
    const slope = await slopes(on, scores, (x) => sum(mul(mixed(x, training).weights, tensor(on, upstream))));
    return { ...found, grad_scores_for_upstream: slope };
  };
  return Object.fromEntries(
    (
      await Promise.all(
        (["train", "infer"] as const).map(async (name) =>
          Object.entries(await phase(name === "train")).map(([key, value]) => [`${name}.${key}`, value] as const),
        ),
      )
    ).flat(),
  );
};

export const softMoEFamily: Family = async (one, on) => {
  const [x, phi, matrices] = [given(one.inputs, "x"), given(one.inputs, "phi"), given(one.inputs, "w_expert")];
  const [width = 0, count = 0] = shapeOf(phi);
  const scale = number(one, "scale");
  const act = expertActivation(one, "tanh");
  const layer = (normalise: boolean, seen?: (rows: Tensor) => void) => {
    const experts: Experts = {
      count,
      params: { w: transpose(tensor(on, matrices), [0, 2, 1]) }, // [experts, out, in]
      apply(params, rows, ends) {
        seen?.(rows);
        return { output: act(groupedMatmul(rows, leaf(params, "w"), ends)) };
      },
    };
    const plugin = softMoE({
      slots: number(one, "slots_per_expert"),
      normalise,
      scale,
      epsilon: numberOr(one, "norm_eps", 1e-6),
    });
    const made = moeLayer(plugin, { engine: on, width }, { experts });
    const params = {
      router: { phi: transpose(tensor(on, phi), [1, 2, 0]), scale: tensor(on, scale) },
      experts: experts.params,
    };
    return { made, params, input: layerInput(made, tensor(on, x)) };
  };
  const planned = (normalise: boolean): { dispatch: Tensor; combine: Tensor; logits: Tensor } => {
    const { made, params, input } = layer(normalise);
    const { plan } = made.router.route(params.router, input);
    if (plan.kind !== "slots" || !made.router.score) throw new Error(`found a plan of kind ${plan.kind}`);
    const [tokens, all] = [plan.dispatch.shape[1] ?? 0, plan.dispatch.shape[2] ?? 0];
    return {
      dispatch: reshape(plan.dispatch, [tokens, all]),
      combine: reshape(plan.combine, [tokens, all]),
      logits: made.router.score(params.router, input),
    };
  };
  return results(on, () => {
    const [plain, normal] = [planned(false), planned(true)];
    let slots: Tensor | undefined;
    const { made, params, input } = layer(false, (rows) => {
      slots = alias(rows);
    });
    const { output } = moe(made, params, input);
    if (slots === undefined) throw new Error("the experts did not run");
    return {
      dispatch: plain.dispatch,
      combine: plain.combine,
      slots,
      output,
      normalised_logits: normal.logits,
      normalised_dispatch: normal.dispatch,
      normalised_combine: normal.combine,
    };
  });
};

export const dynMoLEFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const [, experts = 0] = shapeOf(logits);
  // The losses are there whatever their weight, which comes on top.
  const weights: Readonly<Record<string, number>> = {
    entropy: number(one, "dyn_loss_coef"),
    balance: number(one, "aux_loss_coef"),
  };
  only(one, "entropy_type", ["renyi", "tsallis"]);
  const options: DynMoLEOptions = {
    k: number(one, "keep_top_k"),
    topP: number(one, "top_p"),
    threshold: number(one, "entropy_threshold"),
    entropy: word(one, "entropy_type") === "renyi" ? "renyi" : "tsallis",
    q: number(one, "entropy_index"),
    epsilon: number(one, "entropy_eps"),
    entropyLoss: 1,
    balance: 1,
  };
  const select = selecting(on, dynMoLE(options), experts);
  const total = ({ losses }: Routed): Tensor =>
    Object.entries(losses).reduce<Tensor>(
      (all, [name, { value, weight }]) => add(all, mul(value, weight * given(weights, name))),
      tensor(on, 0),
    );
  const found = await results(on, () => {
    const routed = select(tensor(on, logits), { training: true });
    const { entropy, high } = dynMoLEPlan(tensor(on, logits), options);
    return {
      softmax: routed.probabilities as Tensor,
      ids: sparse(routed).experts,
      weights: sparse(routed).weights,
      entropy,
      high,
      entropyLoss: routed.losses.entropy?.value as Tensor,
      balance: routed.losses.balance?.value as Tensor,
      total: total(routed),
    };
  });
  const ones = (found.ids as readonly Values[]).map((row) => flat(row).map(() => 1));
  const mask = dense(found.ids, ones, experts);
  return {
    softmax: found.softmax,
    normalised_entropy: found.entropy,
    high_entropy: flat(found.high),
    mask,
    weights: dense(found.ids, found.weights, experts),
    active: mask.map((row) => row.reduce((n, kept) => n + kept, 0)),
    entropy_loss: found.entropyLoss,
    load_balance: found.balance,
    total_router_loss: found.total,
    grad_total_wrt_logits: await slopes(on, logits, (x) => total(select(x, { training: true }))),
  };
};

export const fieldFamilies: Readonly<Record<string, Family>> = {
  dynmole: dynMoLEFamily,
  soft_moe: softMoEFamily,
  grin: grinFamily,
  xmoe: xMoEFamily,
};
