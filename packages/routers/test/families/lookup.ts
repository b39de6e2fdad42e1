// Vectors of BASE, MaskMoE, DA-MoE and RMoE.
import { concat, div, mul, reshape, sumLast, type Tensor, type Tree } from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { base } from "../../src/base.ts";
import { daMoE, expertCounts, importanceOf, receivedAttention } from "../../src/da-moe.ts";
import { maskMoE } from "../../src/mask-moe.ts";
import { leaf } from "../../src/parts.ts";
import { rMoE } from "../../src/r-moe.ts";
import {
  dense,
  type Family,
  flat,
  given,
  number,
  results,
  shapeOf,
  sized,
  sparse,
  tensor,
  type Values,
} from "../vectors.ts";
import { weighted } from "./parts.ts";

export const baseFamily: Family = async (one, on) => {
  const centroids = given(one.inputs, "expert_centroids");
  const [experts = 0, width = 0] = shapeOf(centroids);
  sized(one, "tokens_per_expert", (shapeOf(given(one.inputs, "x"))[0] ?? 0) / experts);
  const router = base().init(routerContext(on, { experts, width }));
  const found = await results(on, () => {
    const hidden = tensor(on, given(one.inputs, "x"));
    const route = (training: boolean): Routed =>
      router.route({ weight: tensor(on, centroids) }, routerInput(on, { hidden, training }));
    const [train, infer] = [route(true), route(false)];
    return {
      scores: train.logits as Tensor,
      train_assignment: sparse(train).experts,
      train_gate: sparse(train).weights,
      infer_assignment: sparse(infer).experts,
      infer_gate: sparse(infer).weights,
    };
  });
  const scores = found.scores as readonly (readonly number[])[];
  const chosen = flat(found.train_assignment);
  return {
    scores: found.scores,
    train_assignment: chosen,
    train_total_score: chosen.reduce((total, e, t) => total + (scores[t]?.[e] ?? Number.NaN), 0),
    train_gate: flat(found.train_gate),
    infer_assignment: flat(found.infer_assignment),
    infer_gate: flat(found.infer_gate),
  };
};

export const maskMoEFamily: Family = async (one, on) => {
  const w = given(one.inputs, "w_router");
  const [, experts = 0] = shapeOf(w);
  const ids = flat(given(one.inputs, "token_ids"));
  const route = (renormalize: boolean): Routed => {
    const { router, params } = weighted(on, maskMoE({ k: number(one, "k"), renormalize, visible: experts }), w);
    const buffers = { visible: tensor(on, given(one.inputs, "visible_table")) };
    const input = routerInput(on, { hidden: tensor(on, given(one.inputs, "x")), buffers });
    return router.route(params, { ...input, tokenIds: on.tensor(Int32Array.from(ids), [ids.length]) });
  };
  return results(on, () => {
    const plain = route(false);
    return {
      masked_softmax: plain.probabilities as Tensor,
      indices: sparse(plain).experts,
      weights: sparse(plain).weights,
      weights_renormalised: sparse(route(true)).weights,
    };
  });
};

export const daMoEFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "router_logits");
  const [batch = 0, sequence = 0, experts = 0] = shapeOf(logits);
  const [k, fewest] = [number(one, "k_max"), number(one, "k_min")];
  const form = async (attention: "causal" | "bidirectional"): Promise<Readonly<Record<string, Values>>> => {
    const plugin = daMoE({ k, fewest, attention, balance: 0, zLoss: 0 });
    const router = plugin.init(routerContext(on, { experts, width: experts }));
    const found = await results(on, () => {
      const given4 = tensor(on, given(one.inputs, "attention"));
      const lower = Float64Array.from({ length: sequence ** 2 }, (_, i) =>
        Number(i % sequence <= Math.floor(i / sequence)),
      );
      const cut = mul(given4, on.tensor(lower, [sequence, sequence]));
      const rows = attention === "causal" ? div(cut, sumLast(cut)) : given4;
      const mask = tensor(on, given(one.inputs, "mask"));
      const layout = { batch, sequence, past: 0, mask };
      const received = receivedAttention(rows, layout, { heads: "mean", attention });
      const importance = importanceOf(received, "ratio", mask);
      // With an identity as weight the hidden states are the logits.
      const hidden = reshape(tensor(on, logits), [batch * sequence, experts]);
      const identity = Array.from({ length: experts }, (_, i) =>
        Array.from({ length: experts }, (__, j) => +(i === j)),
      );
      const input = { ...routerInput(on, { hidden, batch }), layout, attention: () => rows };
      const { experts: ids, weights } = sparse(router.route({ weight: tensor(on, identity) }, input));
      return { received, importance, k_per_token: mul(expertCounts(importance, { k, fewest }), mask), ids, weights };
    });
    const flatCombine = dense(found.ids, found.weights, experts);
    const combine = Array.from({ length: batch }, (_, b) => flatCombine.slice(b * sequence, (b + 1) * sequence));
    const { ids: _, weights: __, ...rest } = found;
    return Object.fromEntries(Object.entries({ ...rest, combine }).map(([name, x]) => [`${attention}.${name}`, x]));
  };
  return { ...(await form("bidirectional")), ...(await form("causal")) };
};

export const rMoEFamily: Family = async (one, on) => {
  const [xs, projections, outs] = ["x_per_layer", "w_proj_per_layer", "w_out_per_layer"].map(
    (name) => given(one.inputs, name) as readonly Values[],
  ) as [readonly Values[], readonly Values[], readonly Values[]];
  sized(one, "layers", xs.length);
  const [size = 0, width = 0] = shapeOf(projections[0] ?? []);
  const [experts = 0] = shapeOf(outs[0] ?? []);
  // A record of arrays by name.
  const weights = Object.fromEntries(Object.entries<Values>(given(one.inputs, "gru") as readonly Values[]));
  const router = rMoE({ k: number(one, "k"), size }).init(routerContext(on, { experts, width }));
  return results(on, () => {
    const gates = (kind: string): Tensor =>
      concat(
        ["r", "z", "n"].map((gate) => tensor(on, given(weights, kind.replace("*", gate)))),
        0,
      );
    const cell = {
      input: gates("weight_i*"),
      hidden: gates("weight_h*"),
      inputBias: gates("bias_i*"),
      hiddenBias: gates("bias_h*"),
    };
    let carry: Tree | undefined;
    const layers = xs.map((x, layer) => {
      const params = { projection: tensor(on, projections[layer] ?? []), weight: tensor(on, outs[layer] ?? []), cell };
      const input = routerInput(on, { hidden: tensor(on, x) });
      const routed = router.route(params, { ...input, ...(carry ? { carry } : {}) });
      carry = routed.carry;
      return routed;
    });
    const stack = (of: (routed: Routed) => Tensor): Tensor =>
      concat(
        layers.map((routed) => reshape(of(routed), [1, ...of(routed).shape])),
        0,
      );
    return {
      hidden: stack(({ carry: own }) => leaf(own ?? {}, "state")),
      logits: stack(({ logits }) => logits as Tensor),
      indices: stack((routed) => sparse(routed).experts),
      weights: stack((routed) => sparse(routed).weights),
    };
  });
};

export const lookupFamilies: Readonly<Record<string, Family>> = {
  base: baseFamily,
  damoe: daMoEFamily,
  maskmoe: maskMoEFamily,
  rmoe: rMoEFamily,
};
