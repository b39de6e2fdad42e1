// Vectors of the classic routers: noisy top-k, Sinkhorn, hash.
import { dispose, linear, type Random, type Tensor } from "@switchyard/core";
import { expertLoad, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { hash } from "../../src/hash.ts";
import { frequentTokens, mix32, visibleExperts } from "../../src/hash-parts.ts";
import { expectedLoad, noiseDeviation, noisyTopK } from "../../src/noisy-top-k.ts";
import { sinkhorn, sinkhornPlan } from "../../src/sinkhorn.ts";
import {
  dense,
  expertsOf,
  type Family,
  flat,
  given,
  number,
  numberOr,
  results,
  shapeOf,
  sparse,
  tensor,
  turned,
} from "../vectors.ts";
import { selecting } from "./parts.ts";

/** A Random whose every normal draw is given. */
export const fixedNormal = (draws: () => Tensor): Random => {
  const refuse = (): never => {
    throw new Error("the vector gives normal draws only");
  };
  const self: Random = { at: () => self, uniform: refuse, normal: draws, exponential: refuse, host: refuse };
  return self;
};

const loss = (routed: Routed, name: string): Tensor => {
  const found = routed.losses[name];
  if (!found) throw new Error(`no loss "${name}", there are ${Object.keys(routed.losses).join(", ")}`);
  return found.value;
};

export const noisyTopKFamily: Family = async (one, on) => {
  const [x, gate, noise] = [given(one.inputs, "x"), given(one.inputs, "w_gate"), given(one.inputs, "w_noise")];
  const draws = given(one.inputs, "standard_normal_noise");
  const [width = 0, experts = 0] = shapeOf(gate);
  const [k, noiseFloor] = [number(one, "k"), number(one, "noise_epsilon")];
  const params = (): { weight: Tensor; noise: Tensor } => ({
    weight: tensor(on, turned(gate)),
    noise: tensor(on, turned(noise)),
  });
  const route = (training: boolean, sampleVariance = false): Routed => {
    const router = noisyTopK({ k, noiseFloor, sampleVariance }).init(routerContext(on, { experts, width }));
    return router.route(params(), {
      ...routerInput(on, { hidden: tensor(on, x), training }),
      random: fixedNormal(() => tensor(on, draws)),
    });
  };
  const found = await results(on, () => {
    const [routed, sampled, evaluated] = [route(true), route(true, true), route(false)];
    const clean = linear(tensor(on, x), params().weight);
    const deviation = noiseDeviation(tensor(on, x), params().noise, noiseFloor);
    const noisy = routed.logits as Tensor;
    return {
      clean: evaluated.logits as Tensor,
      deviation,
      noisy,
      ids: sparse(routed).experts,
      weights: sparse(routed).weights,
      load: expectedLoad({ clean, noisy, deviation, k }),
      importance: loss(routed, "importance"),
      loadLoss: loss(routed, "load"),
      importanceSample: loss(sampled, "importance"),
      loadSample: loss(sampled, "load"),
      plainIds: sparse(evaluated).experts,
      plainWeights: sparse(evaluated).weights,
      plainLoad: expertLoad(evaluated.plan, { experts }),
    };
  });
  const gates = dense(found.ids, found.weights, experts);
  return {
    clean_logits: found.clean,
    noise_stddev: found.deviation,
    noisy_logits: found.noisy,
    gates,
    load: found.load,
    importance: turned(gates).map((column) => column.reduce((total, value) => total + value, 0)),
    cv2_importance_population: found.importance,
    cv2_load_population: found.loadLoss,
    cv2_importance_sample: found.importanceSample,
    cv2_load_sample: found.loadSample,
    infer_gates: dense(found.plainIds, found.plainWeights, experts),
    infer_load: found.plainLoad,
  };
};

export const sinkhornFamily: Family = async (one, on) => {
  const logits = given(one.inputs, "logits");
  const [, experts = 0] = shapeOf(logits);
  const k = number(one, "k");
  // Those after the tolerance is met count for nothing: as many as any case may need.
  const rules = { tolerance: numberOr(one, "tol", 1e-4), epsilon: numberOr(one, "eps", 1e-8), iterations: 1000 };
  const select = selecting(on, sinkhorn({ k, ...rules }), experts);
  const found = await results(on, () => {
    const { plan, iterations } = sinkhornPlan(tensor(on, logits), rules);
    const trained = sparse(select(tensor(on, logits), { training: true }));
    const evaluated = sparse(select(tensor(on, logits), { training: false }));
    return {
      plan,
      iterations,
      ids: trained.experts,
      weights: trained.weights,
      plainIds: evaluated.experts,
      plainWeights: evaluated.weights,
    };
  });
  if (flat(found.iterations)[0] === rules.iterations)
    throw new Error(`the plan is not settled after ${rules.iterations} iterations`);
  return {
    iterations: found.iterations,
    plan: found.plan,
    train_indices: found.ids,
    train_combine: dense(found.ids, found.weights, experts),
    infer_indices: found.plainIds,
    infer_combine: dense(found.plainIds, found.plainWeights, experts),
  };
};

export const hashFamily: Family = async (one, on) => {
  const experts = expertsOf(one);
  const counts = Float64Array.from(flat(given(one.inputs, "token_counts")));
  const [seed, layer] = [number(one, "seed"), number(one, "layer")];
  const ids = Int32Array.from(counts, (_, token) => token);
  const routed = async (table: "random" | "balanced"): Promise<number[]> => {
    const router = hash({ table, seed }).init(routerContext(on, { experts, layer, tokenCounts: counts }));
    const found = await results(on, () => {
      const hidden = on.tensor(new Float64Array(ids.length), [ids.length, 1]);
      const input = routerInput(on, { hidden, buffers: router.buffers });
      return { ids: sparse(router.route({}, { ...input, tokenIds: on.tensor(ids, [ids.length]) })).experts };
    });
    dispose(router.buffers);
    return flat(found.ids);
  };
  const balanced = await routed("balanced");
  const load = new Array<number>(experts).fill(0);
  balanced.forEach((e, token) => {
    load[e] = (load[e] ?? 0) + (counts[token] ?? 0);
  });
  const frequent = frequentTokens(counts, number(one, "frequent_mass"));
  // "splitmix32_of_0_1_2" is the mix of 0, 1 and 2.
  const mixed = Object.keys(one.expected).filter((name) => /^splitmix32_of(_\d+)+$/.test(name));
  return {
    balanced_hash: balanced,
    balanced_load: load,
    random_hash: await routed("random"),
    maskmoe_frequent: [...frequent],
    maskmoe_visible: [...frequent].map((often, token) => {
      const visible = number(one, often === 1 ? "visible_frequent" : "visible_infrequent");
      return visibleExperts(token, { experts, visible, seed, layer });
    }),
    ...Object.fromEntries(
      mixed.map((name) => [
        name,
        name
          .split("_")
          .slice(2)
          .map((n) => mix32(Number(n))),
      ]),
    ),
  };
};

export const classicFamilies: Readonly<Record<string, Family>> = {
  noisy_topk: noisyTopKFamily,
  sinkhorn: sinkhornFamily,
  hash: hashFamily,
};
