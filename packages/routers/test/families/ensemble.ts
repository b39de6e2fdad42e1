// Vectors of THOR, CompeteSMoE, SMEAR and MoEC.
import {
  alias,
  full,
  mapTree,
  type Random,
  reshape,
  softmax,
  sub,
  type Tensor,
  type Tree,
  transpose,
  where,
} from "@switchyard/core";
import {
  ffn,
  layerInput,
  layerParams,
  type MergePlan,
  mixParameters,
  moe,
  moeLayer,
  type Plan,
  type Routed,
} from "@switchyard/core/moe";
import { type CompeteSMoEOptions, competeSMoE, competition, distillationLosses } from "../../src/compete-smoe.ts";
import { clusterSpread, clusterValue, moec } from "../../src/moec.ts";
import { leaf } from "../../src/parts.ts";
import { smear } from "../../src/smear.ts";
import { oneExpert, thor, thorConsistency } from "../../src/thor.ts";
import {
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
  turned,
  type Values,
  word,
} from "../vectors.ts";
import { expertActivation, plainExperts, selecting } from "./parts.ts";

/** A Random whose draws on the host are given, whatever the key. */
const fixedHost = (draws: readonly number[]): Random => {
  const refuse = (): never => {
    throw new Error("the vector gives draws on the host only");
  };
  const self: Random = {
    at: () => self,
    host: () => Float64Array.from(draws),
    uniform: refuse,
    normal: refuse,
    exponential: refuse,
  };
  return self;
};

export const moecFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const dropped = flat(given(one.inputs, "dropped"));
  const experts = shapeOf(logits)[1] ?? 0;
  const clusters = number(one, "clusters");
  const size = experts / clusters;
  const closed = Array.from({ length: clusters }, (_, m) =>
    dropped.slice(m * size, (m + 1) * size).reduce((a, b) => a + b, 0),
  );
  if (!Number.isInteger(size)) throw new Error(`${experts} experts in ${clusters} clusters`);
  const epsilon = numberOr(one, "eps", 1e-12);
  const base = { k: number(one, "k"), clusters, mu: number(one, "mu"), epsilon };
  // The smallest draws close: as many in each cluster, or clusters as a whole. Where a file closes others, which the
  // router never does, their logits are gone before it sees them.
  const random = (whole: boolean): Random =>
    fixedHost((whole ? closed : dropped).map((x) => 1 - x / (whole ? size : 1)));
  const [least, most] = [Math.min(...closed), Math.max(...closed)];
  const whole = closed.every((n) => n === 0 || n === size) && most > 0;
  const drawn = whole || least === most;
  const dropout = whole ? closed.filter((n) => n > 0).length / clusters : drawn ? least / size : 0;
  const select = selecting(on, moec({ ...base, dropout, whole }), experts);
  const lossOf = ({ losses: { cluster } }: Routed): { value: Tensor; weight: number } => {
    if (!cluster) throw new Error("there is no cluster loss");
    return cluster;
  };
  let weight = 0;
  const found = await results(on, () => {
    const x = tensor(on, logits);
    const call = { training: true, random: random(whole) };
    const open = select(x, call);
    const gone = on.tensor(Float64Array.from(dropped), [1, experts]);
    const trained = drawn ? open : select(where(gone, Number.NEGATIVE_INFINITY, x), call);
    const { intra, inter } = clusterSpread(softmax(x), { clusters });
    const other = selecting(on, moec({ ...base, dropout: 0, clusterLoss: "difference" }), experts);
    weight = lossOf(open).weight;
    return {
      softmax: select(x, {}).probabilities as Tensor,
      c_intra: intra,
      c_inter: inter,
      ratio: lossOf(open).value,
      difference: lossOf(other(x, { training: true })).value,
      masked_softmax: trained.probabilities as Tensor,
      indices_after_dropout: sparse(trained).experts,
      weights_after_dropout: sparse(trained).weights,
    };
  });
  const { ratio, difference, ...rest } = found;
  return {
    ...rest,
    ratio_loss: weight * (flat(ratio)[0] ?? Number.NaN),
    difference_loss: weight * (flat(difference)[0] ?? Number.NaN),
    grad_unscaled_ratio: await slopes(on, logits, (x) =>
      clusterValue(clusterSpread(softmax(x), { clusters }), "ratio", epsilon),
    ),
  };
};

export const thorFamily: Family = async (one, on) => {
  const [first, second] = [given(one.inputs, "logits_pass1"), given(one.inputs, "logits_pass2")];
  const padding = flat(given(one.inputs, "pad_mask"));
  const [x, matrices] = [given(one.inputs, "x"), given(one.inputs, "w_expert")];
  const ids = Int32Array.from(flat(given(one.inputs, "random_expert_per_token")));
  const real = (): Tensor =>
    tensor(
      on,
      padding.map((pad) => 1 - pad),
    );
  const output = (plan?: Plan): Tensor => {
    const experts = plainExperts(on, matrices, expertActivation(one, "relu"));
    const plugin = thor({ evaluation: "ensemble" });
    const layer = moeLayer(plugin, { engine: on, width: shapeOf(x)[1] ?? 0 }, { experts });
    const routed = plan ? { ...layer, router: { ...layer.router, route: () => ({ plan, losses: {} }) } } : layer;
    return moe(routed, layerParams(routed), layerInput(routed, tensor(on, x))).output;
  };
  const found = await results(on, () => {
    const { sum, mean } = thorConsistency(tensor(on, first), tensor(on, second), real());
    return {
      consistency_sum: sum,
      consistency_mean_over_tokens: mean,
      dispatch_output: output(oneExpert(tensor(on, x), on.tensor(Int32Array.from(ids), [ids.length, 1]))),
      ensemble_output: output(),
    };
  });
  return {
    ...found,
    grad_sum_wrt_logits_pass1: await slopes(on, first, (z) => thorConsistency(z, tensor(on, second), real()).sum),
  };
};

export const competeSMoEFamily: Family = async (one, on) => {
  const [x, matrices, w] = [given(one.inputs, "x"), given(one.inputs, "w_expert"), given(one.inputs, "w_router")];
  const [batch = 0, sequence = 0, width = 0] = shapeOf(x);
  const [tokens, k] = [batch * sequence, number(one, "k")];
  const run = (options: CompeteSMoEOptions, compete: boolean): { output: Tensor; routed: Routed } => {
    const experts = plainExperts(on, matrices, expertActivation(one, "tanh"));
    const layer = moeLayer(competeSMoE({ k, ...options }), { engine: on, width }, { experts });
    const params = { router: { weight: tensor(on, turned(w)) }, experts: experts.params };
    return moe(
      layer,
      params,
      layerInput(layer, reshape(tensor(on, x), [tokens, width]), {
        layout: { batch, sequence, past: 0 },
        training: true,
        schedule: { "competeSMoE.0": compete },
      }),
    );
  };
  const nested = (y: Tensor): Tensor => reshape(y, [batch, sequence, ...y.shape.slice(1)]);
  const lossOf = ({ losses }: Routed, name: string): Tensor => {
    const loss = losses[name];
    if (!loss) throw new Error(`no loss ${name}; there are ${Object.keys(losses).join(", ")}`);
    return loss.value;
  };
  const outputsOf = ({ expertOutputs }: Routed): Tensor => {
    if (!expertOutputs) throw new Error("nothing competed");
    return expertOutputs;
  };
  return results(on, () => {
    const second = run({}, true);
    const outputs = outputsOf(second.routed);
    const { affinity } = competition(outputs, { k, version: "v2" });
    const normal = run({}, false).routed;
    // With theta = 1 the squared differences over the winners come on top.
    const plain = lossOf(second.routed, "distillation");
    const hybrid = lossOf(run({ hybrid: 1 }, true).routed, "distillation");
    const first = run({ version: "v1" }, true).routed;
    const outcome = competition(outputs, { k, version: "v1" });
    const { target } = distillationLosses(first.logits as Tensor, outcome, { version: "v1", distance: "mse" });
    return {
      "v2.affinity": nested(affinity),
      "v2.affinity_softmax": nested(softmax(affinity)),
      "v2.indices": nested(sparse(second.routed).experts),
      "v2.weights": nested(sparse(second.routed).weights),
      "v2.output": nested(second.output),
      "v2.router_softmax": nested(normal.probabilities as Tensor),
      "v2.router_indices": nested(sparse(normal).experts),
      "v2.router_weights": nested(sparse(normal).weights),
      "v2.router_loss_mse": plain,
      "v2.router_loss_topk_mse": sub(hybrid, plain),
      "v2.diversity_loss_mean_incl_zero_diagonal": lossOf(run({ officialDiversity: true }, true).routed, "diversity"),
      "v2.diversity_loss_offdiagonal_mean": lossOf(second.routed, "diversity"),
      "v2.balance_loss_top1": lossOf(second.routed, "balance"),
      "v1.norms": nested(outcome.affinity),
      "v1.indices": nested(sparse(first).experts),
      "v1.weights": nested(sparse(first).weights),
      "v1.target": nested(target),
      "v1.distill_mse": lossOf(first, "distillation"),
    };
  });
};

export const smearFamily: Family = async (one, on) => {
  const input = (name: string): Values => given(one.inputs, name);
  const [batch = 0, sequence = 0, width = 0] = shapeOf(input("x"));
  const [count = 0, , hidden = 0] = shapeOf(input("down"));
  const swapped = (x: Tensor): Tensor => transpose(x, [0, 2, 1]);
  only(one, "routing_input", ["mean over sequence"]);
  only(one, "activation", ["silu", "relu", "gelu"]);
  const activation = word(one, "activation") as "silu" | "relu" | "gelu";
  const normEpsilon = numberOr(one, "ln_eps", 1e-5);
  const layout = { batch, sequence, past: 0 };
  return results(on, () => {
    const x = reshape(tensor(on, input("x")), [batch * sequence, width]);
    // What the paper calls down and up leads into the adapter and out of it.
    const adapter = {
      up: swapped(tensor(on, input("down"))),
      upBias: tensor(on, input("down_bias")),
      down: swapped(tensor(on, input("up"))),
      downBias: full(x, [count, width], 0),
    };
    const experts = ffn({ count, width, hidden, activation, bias: true, params: adapter });
    const router = {
      weight: tensor(on, turned(input("w_router"))),
      bias: tensor(on, input("b_router")),
      normWeight: tensor(on, input("ln_weight")),
      normBias: tensor(on, input("ln_bias")),
      gain: tensor(on, input("router_weight_ln_gain")),
    };
    const run = (
      normaliseWeights: boolean,
    ): ReturnType<typeof moe> & { readonly p: Tensor; readonly plan: MergePlan } => {
      const layer = moeLayer(smear({ normaliseWeights, normEpsilon }), { engine: on, width }, { experts });
      const done = moe(layer, { router, experts: adapter }, layerInput(layer, x, { layout }));
      const { plan } = done.routed;
      const [p] = plan.kind === "merge" ? plan.coefficients : [];
      if (plan.kind !== "merge" || !p) throw new Error(`found a plan of kind ${plan.kind}`);
      return { ...done, p, plan };
    };
    const plain = run(false);
    let merged: Tree = [];
    mixParameters(adapter, x, plain.plan, (mixture) => {
      merged = mapTree(mixture, alias);
      return x;
    });
    const nested = (y: Tensor): Tensor => reshape(y, [batch, sequence, width]);
    const weights = plain.routed.probabilities as Tensor; // [tokens, experts]
    const layer = moeLayer(smear(), { engine: on, width }, { experts });
    const contrast = { ...layer.router, route: (): Routed => ({ plan: { kind: "dense", weights }, losses: {} }) };
    const ensemble = moe(
      { ...layer, router: contrast },
      { router, experts: adapter },
      layerInput(layer, x, { layout }),
    );
    return {
      probs: plain.p,
      probs_with_layernormed_router_weights: run(true).p,
      merged_down: swapped(leaf(merged, "up")),
      merged_down_bias: leaf(merged, "upBias"),
      merged_up: swapped(leaf(merged, "down")),
      adapter_output: nested(plain.output),
      output_ensemble_of_outputs_for_contrast: nested(ensemble.output),
    };
  });
};

export const ensembleFamilies: Readonly<Record<string, Family>> = {
  competesmoe: competeSMoEFamily,
  moec: moecFamily,
  smear: smearFamily,
  thor: thorFamily,
};
