// Null experts (2601.15370), AdaMoE (2406.13233), Expert Race (2503.16057) and the expressive-power paper (2505.24205).
import {
  type Engine,
  gatherLast,
  groupedMatmul,
  less,
  matmul,
  mul,
  softmax,
  sum,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  assignments,
  byGroup,
  coActivation,
  combinationUsage,
  type Experts,
  expertLoad,
  expertsPerToken,
  type Layout,
  layerInput,
  layerParams,
  maxViolation,
  moe,
  moeLayer,
  type Routed,
  type RouterInput,
  routerSimilarity,
  similarityWeights,
  switchBalance,
} from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { adaMoE } from "../../src/ada-moe.ts";
import { compete, type ExpertRaceOptions, expertRace, raceHeads } from "../../src/expert-race.ts";
import {
  type ExpressiveGate,
  type ExpressiveGatesOptions,
  expressiveGates,
  interpolantExperts,
  type Piece,
  reluInterpolant,
} from "../../src/expressive-gates.ts";
import { type NullExpertsOptions, nullCopies, nullExperts } from "../../src/null-experts.ts";
import { leaf } from "../../src/parts.ts";
import {
  dense,
  type Family,
  flat,
  given,
  number,
  only,
  results,
  shapeOf,
  sized,
  sparse,
  tensor,
  turned,
  type Values,
  type VectorCase,
  word,
} from "../vectors.ts";
import { selecting } from "./parts.ts";

const rows = (values: Values): number[][] => (values as readonly Values[]).map(flat);
const lossOf = ({ losses }: Routed, name: string): Tensor => {
  const loss = losses[name];
  if (!loss) throw new Error(`no loss "${name}" among ${Object.keys(losses).join(", ")}`);
  return loss.value;
};

// ---------------------------------------------------------------- null experts
const nullOptions = (one: VectorCase): NullExpertsOptions => ({ k: number(one, "K"), rho: number(one, "rho") });

const nullRouteFamily: Family = async (one, on) => {
  const experts = number(one, "N");
  const rho = number(one, "rho");
  const copies = nullCopies(experts, rho);
  sized(one, "M", copies);
  // Without copies there is no null logit.
  const logits = rows(given(one.inputs, "routerLogits")).map((row) => (copies === 0 ? row.slice(0, experts) : row));
  const [k, tokens] = [number(one, "K"), logits.length];
  sized(one, "T", tokens);
  const route = (more: Partial<NullExpertsOptions> = {}): Routed =>
    selecting(on, nullExperts({ ...nullOptions(one), ...more }), experts)(tensor(on, logits), { training: true });
  const found = await results(on, () => {
    const routed = route();
    const plan = sparse(routed);
    const real = expertsPerToken(assignments({ kind: "sparse", ...plan }, { tokens, experts }));
    const groups = on.tensor(Int32Array.from(flat(given(one.inputs, "isVision"))), [tokens]);
    const { mean, share } = byGroup(real, groups, 2);
    return {
      ids: plan.experts,
      weights: plan.weights,
      real,
      probabilities: routed.probabilities as Tensor,
      load: expertLoad(routed.plan, { experts, nulls: 1 }),
      balance: lossOf(routed, "balance"),
      byTokens: lossOf(route({ normalizeByK: false }), "balance"),
      zLoss: lossOf(routed, "zLoss"),
      nullRatio: routed.metrics?.nullRatio as Tensor,
      zeroCompute: routed.metrics?.zeroCompute as Tensor,
      intensity: mul(mean, 1 / k),
      share,
    };
  });
  const realOnly = rows(found.ids).map((row) => row.map((e) => (e < experts ? e : -1)));
  const load = flat(found.load);
  const [text = Number.NaN, vision = Number.NaN] = flat(found.intensity);
  return {
    nullCopies: copies,
    topkReal: realOnly.map((row) => row.filter((e) => e >= 0)),
    realPerToken: found.real,
    gates: dense(realOnly, found.weights, experts),
    // The last column has the copies together.
    slotProbsFirstNPlus1: rows(found.probabilities).map((row) => row.map((p, i) => (i < experts ? p : p / copies))),
    slotCountsReal: load.slice(0, experts),
    nullAssignments: load[experts] ?? Number.NaN,
    balanceLoss: found.balance,
    balanceLossTokenNorm: found.byTokens,
    zLoss: found.zLoss,
    expectedRealTarget: nullExperts(nullOptions(one)).expertsPerToken ?? Number.NaN,
    meanReal: flat(found.real).reduce((total, r) => total + r, 0) / tokens,
    nullRatio: found.nullRatio,
    zeroComputeRatio: found.zeroCompute,
    computeIntensityVision: vision,
    computeIntensityText: text,
    computeShareVision: flat(found.share)[1] ?? Number.NaN,
  };
};

/** Experts y = W_e x, as the vectors have them: W [experts, out, in]. */
const linearExperts = (weights: Tensor): Experts => ({
  count: weights.shape[0] ?? 0,
  params: { weights },
  apply: (params, x, ends) => ({ output: groupedMatmul(x, leaf(params, "weights"), ends) }),
});

const nullLayerFamily: Family = async (one, on) => {
  const [x, w] = [given(one.inputs, "X"), rows(given(one.inputs, "W"))];
  const [experts, width] = [number(one, "N"), number(one, "D")];
  const copies = nullCopies(experts, number(one, "rho"));
  sized(one, "M", copies);
  const found = await results(on, () => {
    const hidden = tensor(on, x);
    const routed = linearExperts(tensor(on, given(one.inputs, "experts")));
    const shared = linearExperts(tensor(on, [given(one.inputs, "shared")]));
    const layer = moeLayer(nullExperts(nullOptions(one)), { engine: on, width }, { experts: routed });
    const router = {
      weight: tensor(on, w.slice(0, experts)),
      ...(copies === 0 ? {} : { null: tensor(on, w.slice(experts)) }),
    };
    const alone = moe(layer, { ...(layerParams(layer) as object), router }, layerInput(layer, hidden));
    const both = { ...layer, shared: [{ experts: shared }] };
    const { output } = moe(both, { ...(layerParams(both) as object), router }, layerInput(both, hidden));
    const plan = sparse(alone.routed);
    const met = assignments({ kind: "sparse", ...plan }, { tokens: hidden.shape[0] ?? 0, experts });
    return {
      ids: plan.experts,
      weights: plan.weights,
      real: expertsPerToken(met),
      routed: alone.output,
      output,
    };
  });
  const realOnly = rows(found.ids).map((row) => row.map((e) => (e < experts ? e : -1)));
  return {
    realPerToken: found.real,
    gates: dense(realOnly, found.weights, experts),
    routed: found.routed,
    output: found.output,
  };
};

// ---------------------------------------------------------------- AdaMoE
export const adaMoEFamily: Family = async (one, on) => {
  const [k, experts, nulls] = [number(one, "k"), number(one, "real"), number(one, "null")];
  const route = (balanceEachNull: boolean): Routed => {
    const router = adaMoE({ k, nulls, balanceEachNull, balance: 1 }).init(
      routerContext(on, { experts, width: shapeOf(given(one.inputs, "x"))[1] ?? 0 }),
    );
    // Both are [width, experts] in the vectors.
    const [weight, none] = [given(one.inputs, "w_gate"), given(one.inputs, "w_null")];
    const params = { weight: tensor(on, turned(weight)), null: tensor(on, turned(none)) };
    return router.route(params, routerInput(on, { hidden: tensor(on, given(one.inputs, "x")), training: true }));
  };
  const found = await results(on, () => {
    const routed = route(true);
    const { experts: ids, weights } = sparse(routed);
    const probabilities = routed.probabilities as Tensor;
    const real = less(ids, experts);
    return {
      logits: routed.logits as Tensor,
      softmax: probabilities,
      ids,
      real,
      weights,
      slots: where(real, weights, gatherLast(probabilities, ids)),
      perToken: sum(real, [1]),
      official: lossOf(routed, "balance"),
      averaged: lossOf(route(false), "balance"),
    };
  });
  const realOnly = rows(found.ids).map((row) => row.map((e) => (e < experts ? e : -1)));
  return {
    logits: found.logits,
    softmax: found.softmax,
    indices: found.ids,
    is_real: found.real,
    real_weights_renormalised: found.weights,
    official_weight_slots: found.slots,
    real_experts_per_token: found.perToken,
    dense_real: dense(realOnly, found.weights, experts),
    aux_official_code: found.official,
    aux_null_load_averaged: found.averaged,
  };
};

// ---------------------------------------------------------------- Expert Race
const strategyNames = {
  "token-choice": "token",
  "expert-choice": "expert",
  "bl-choice": "bl",
  "be-choice": "be",
  "le-choice": "le",
  "expert-race": "race",
} as const;

/** Logits [batch, sequence, experts] as the router takes them, with the layout. */
function flatLogits(one: VectorCase): { logits: number[][]; layout: Layout } {
  const logits = given(one.inputs, "logits") as readonly Values[];
  const layout = { batch: number(one, "B"), sequence: number(one, "L"), past: 0 };
  return { logits: logits.flatMap(rows), layout };
}
/** [tokens, experts] as [batch, sequence, experts]. */
const bySequence = (values: Values, { batch, sequence }: Layout): Values =>
  Array.from({ length: batch }, (_, b) => (values as readonly Values[]).slice(b * sequence, (b + 1) * sequence));

const raceFamily: Family = async (one, on) => {
  const { logits, layout } = flatLogits(one);
  const [k, experts] = [number(one, "k"), number(one, "E")];
  const tokens = logits.length;
  const options: ExpertRaceOptions = {
    k,
    compare: "logits",
    momentum: number(one, "momentum"),
    tau: number(one, "tau0"),
    balance: 1,
  };
  const route = (more: Partial<ExpertRaceOptions>, input: Partial<RouterInput>): Routed =>
    selecting(on, expertRace({ ...options, ...more }), experts)(tensor(on, logits), { layout, ...input });
  const chosenBy = (routed: Routed): Tensor => assignments({ kind: "sparse", ...sparse(routed) }, { tokens, experts });
  const found: Record<string, Values> = {};

  for (const [name, strategy] of Object.entries(strategyNames)) {
    const { places, groups } = on.scope(() => {
      const scores = tensor(on, logits);
      const { places, groups } = compete(scores, layout, { strategy, k, uneven: "refuse" });
      return { places, groups };
    });
    const { mask, thresholds } = await results(on, () => ({
      mask: chosenBy(route({ strategy }, { training: true })),
      thresholds: compete(tensor(on, logits), layout, { strategy, k, uneven: "refuse" }).thresholds,
    }));
    found[`strategies.${name}.K`] = places;
    found[`strategies.${name}.groups`] = groups;
    found[`strategies.${name}.mask`] = bySequence(mask, layout);
    found[`strategies.${name}.groupThreshold`] = thresholds;
  }
  for (const gate of ["identity", "sigmoid", "softmax"] as const) {
    const { ids, weights } = await results(on, () => {
      const { experts: ids, weights } = sparse(route({ gate }, { training: true }));
      return { ids, weights };
    });
    found[`gates.${gate}`] = bySequence(dense(ids, weights, experts), layout);
  }
  const trained = await results(on, () => {
    const routed = route({}, { training: true });
    const together = coActivation(chosenBy(routed));
    const probabilities = routed.probabilities as Tensor;
    return {
      kth: routed.metrics?.kth as Tensor,
      races: routed.metrics?.races as Tensor,
      perToken: expertsPerToken(chosenBy(routed)),
      similarity: lossOf(routed, "similarity"),
      alike: matmul(probabilities, probabilities, { transposeA: true }),
      together,
      weights: similarityWeights(together),
      balance: lossOf(routed, "balance"),
      violation: maxViolation(expertLoad(routed.plan, { experts })),
      usage: combinationUsage(together),
    };
  });
  const evaluated = await results(on, () => {
    const router = expertRace(options).init(routerContext(on, { experts }));
    const metrics = { kth: Float64Array.from(flat(trained.kth)), races: Float64Array.from(flat(trained.races)) };
    const statistics = { step: 0, tokens, load: new Float64Array(experts), metrics };
    if (!router.afterStep) throw new Error("expertRace has afterStep");
    const buffers = router.afterStep([statistics], router.buffers);
    return { tau: leaf(buffers, "tau"), mask: chosenBy(route({}, { buffers })) };
  });
  return {
    ...found,
    kthLargest: trained.kth,
    tauAfterOneStep: evaluated.tau,
    evalMaskWithTau: bySequence(evaluated.mask, layout),
    expertsPerToken: bySequence(trained.perToken, layout),
    routerSimilarityLoss: trained.similarity,
    Pprime: trained.alike,
    Mprime: trained.together,
    W: trained.weights,
    switchBalanceLoss: trained.balance,
    maxVio: trained.violation,
    combinationUsage95: trained.usage,
  };
};

const similaritySanityFamily: Family = async (one, on) => {
  const found: Record<string, Values> = {};
  for (const name of Object.keys(one.inputs).flatMap((path) => /^(.+)\.logits$/.exec(path)?.[1] ?? [])) {
    const [logits, mask] = [given(one.inputs, `${name}.logits`), given(one.inputs, `${name}.mask`)];
    const values = await results(on, () => {
      const [x, assigned] = [tensor(on, logits), tensor(on, mask)];
      const together = coActivation(assigned);
      const load = sum(assigned, [0]);
      const k = flat(mask).reduce((total, m) => total + m, 0) / (shapeOf(mask)[0] ?? 1);
      const ids = on.tensor(
        Int32Array.from(rows(mask).flatMap((row) => row.map((m, e) => (m === 1 ? e : -1)))),
        shapeOf(mask),
      );
      return {
        loss: routerSimilarity({ logits: x, assigned }),
        balance: mul(switchBalance({ probabilities: softmax(x), experts: ids }), 1 / k),
        violation: maxViolation(load),
        usage: combinationUsage(together),
      };
    });
    const measures = {
      loss: values.loss,
      switchBalanceLoss: values.balance,
      maxVio: values.violation,
      combinationUsage95: values.usage,
    };
    // Of uniform logits only the loss is told.
    for (const [measure, value] of Object.entries(measures))
      if (`${name}.${measure}` in one.expected) found[`${name}.${measure}`] = value;
  }
  return found;
};

const perLayerFamily: Family = async (one, on) => {
  only(one, "gelu", ["exact erf"]);
  only(one, "reduction", ["mean over tokens and outputs, then mean over layers"]);
  const target = given(one.inputs, "target");
  const outputs = shapeOf(target)[1] ?? 0;
  const found: Record<string, Values> = {};
  const layers = Object.keys(one.inputs).filter((name) => /^layers\.\d+\.h$/.test(name)).length;
  let [total, weighted] = [0, 0];
  for (let layer = 0; layer < layers; layer++) {
    const at = (name: string): Values => given(one.inputs, `layers.${layer}.${name}`);
    const [experts = 0, width = 0] = shapeOf(at("Wgate"));
    const plugin = expertRace({ k: 1, target: outputs, perLayer: number(one, "weight") });
    const names = {
      hidden: "W1",
      hiddenBias: "b1",
      weight: "Wgate",
      bias: "bgate",
      target: "Wtarget",
      targetBias: "btarget",
    };
    const params = (): Tree =>
      Object.fromEntries(Object.entries(names).map(([own, name]) => [own, tensor(on, at(name))]));
    let share = 0;
    const { logits, prediction, mse } = await results(on, () => {
      const router = plugin.init(routerContext(on, { experts, width, layers }));
      const hidden = tensor(on, at("h"));
      const given = { ...routerInput(on, { hidden, training: true }), layers, target: tensor(on, target) };
      const routed = router.route(params(), given);
      share = routed.losses.perLayer?.weight ?? Number.NaN;
      const prediction = raceHeads(params(), hidden, { router: "mlp", target: outputs }).prediction as Tensor;
      return { logits: routed.logits as Tensor, prediction, mse: lossOf(routed, "perLayer") };
    });
    found[`layers.${layer}.routerLogits`] = logits;
    found[`layers.${layer}.prediction`] = prediction;
    found[`layers.${layer}.mse`] = mse;
    total += flat(mse)[0] ?? Number.NaN;
    weighted += share * (flat(mse)[0] ?? Number.NaN);
  }
  return { ...found, meanMse: total / layers, weighted };
};

// ---------------------------------------------------------------- expressive power
const gatesFamily: Family = async (one, on) => {
  const params: Readonly<Record<string, readonly [ExpressiveGate, Readonly<Record<string, string>>]>> = {
    linear: ["linear", { weight: "W" }],
    quadratic: ["quadratic", { weight: "W", bias: "b", form: "A" }],
    mlpRelu: ["mlp", { hidden: "W1", hiddenBias: "b1", weight: "W2" }],
    cosine: ["cosine", { weight: "centres" }],
    negSquaredDistance: ["distance", { centres: "centres" }],
  };
  const found: Record<string, Values> = {};
  for (const [name, [gate, names]] of Object.entries(params)) {
    const { scores, top } = await results(on, () => {
      const router = expressiveGates({ k: 1, gate }).init(
        routerContext(on, { experts: number(one, "E"), width: number(one, "D") }),
      );
      const own = Object.fromEntries(
        Object.entries(names).map(([leaf, of]) => [leaf, tensor(on, given(one.inputs, of))]),
      );
      const routed = router.route(own, routerInput(on, { hidden: tensor(on, given(one.inputs, "X")) }));
      return { scores: routed.logits as Tensor, top: sparse(routed).experts };
    });
    found[`${name}.scores`] = scores;
    found[`${name}.top1`] = flat(top);
  }
  return found;
};

/** One layer of a fixed gate and given experts on tokens x: the expert of each, and the outputs. */
async function runLayer(
  on: Engine,
  x: Values,
  { gate, make }: { gate: Partial<ExpressiveGatesOptions>; make: () => Experts },
): Promise<{ expert: number[]; output: number[][] }> {
  const { expert, output } = await results(on, () => {
    const hidden = tensor(on, x);
    const layer = moeLayer(
      expressiveGates({ k: 1, ...gate }),
      { engine: on, width: hidden.shape[1] ?? 0 },
      { experts: make() },
    );
    const done = moe(layer, layerParams(layer), layerInput(layer, hidden));
    return { expert: sparse(done.routed).experts, output: done.output };
  });
  return { expert: flat(expert), output: rows(output) };
}

/** How many points the grid of an expected name has: "supErrorGrid4096" has 4096. */
function gridOf(one: VectorCase, name: string): number {
  const found = Object.keys(one.expected).find((key) => key.startsWith(name));
  return Number(found?.slice(name.length) || 4096);
}

const cubesFamily: Family = async (one, on) => {
  const [experts, layers, neurons] = [number(one, "E"), number(one, "L"), number(one, "width")];
  const x = rows(given(one.inputs, "X"));
  const grid = gridOf(one, "supErrorPerExpertGrid");
  const part =
    (layer: number, i: number) =>
    (z: number): number =>
      (layer % 2 === 0 ? 1 : -1) * i * (i - 1 - z) ** 2 * (z - i) ** 2 + 0.1 * layer;
  const pieces = (layer: number): Piece[] =>
    Array.from({ length: experts }, (_, e) => ({
      ...reluInterpolant(part(layer, e + 1), { from: e, to: e + 1, neurons }),
      direction: Array.from({ length: layers }, (_, c) => Number(c === layer)),
    }));
  let output = x;
  const paths: number[][] = x.map(() => []);
  let worst = 0;
  for (let layer = 0; layer < layers; layer++) {
    const step = await runLayer(on, output, {
      gate: { gate: "interval", coordinate: layer },
      make: () => interpolantExperts(on, { pieces: pieces(layer), coordinate: layer }),
    });
    output = step.output;
    for (const [t, e] of step.expert.entries()) paths[t]?.push(e);
    for (const [e, piece] of pieces(layer).entries())
      for (let j = 0; j < grid; j++) {
        const z = e + j / (grid - 1);
        worst = Math.max(worst, Math.abs(piece.at(z) - part(layer, e + 1)(z)));
      }
  }
  return {
    expert: paths,
    exact: x.map((row, t) => row.map((z, layer) => part(layer, (paths[t]?.[layer] ?? 0) + 1)(z))),
    approx: output,
    [`supErrorPerExpertGrid${grid}`]: worst,
  };
};

const circleFamily: Family = async (one, on) => {
  const [width, experts, neurons] = [number(one, "D"), number(one, "E"), number(one, "width")];
  const f = (x1: number, x2: number): number => Math.sin(5 * x1) + Math.cos(3 * x2);
  const reach = Math.sin(Math.PI / experts);
  const pieces: Piece[] = Array.from({ length: experts }, (_, e) => {
    const [c, s] = [Math.cos((2 * Math.PI * e) / experts), Math.sin((2 * Math.PI * e) / experts)];
    // The point of the circle at distance z along the tangent.
    const onCircle = (z: number): number => f(Math.sqrt(1 - z * z) * c - z * s, Math.sqrt(1 - z * z) * s + z * c);
    return {
      ...reluInterpolant(onCircle, { from: -reach, to: reach, neurons }),
      direction: Array.from({ length: width }, (_, i) => [-s, c][i] ?? 0),
    };
  });
  const at = async (angles: readonly number[]): Promise<{ expert: number[]; approx: number[]; exact: number[] }> => {
    const points = angles.map((a) => Array.from({ length: width }, (_, i) => [Math.cos(a), Math.sin(a)][i] ?? 0));
    const { expert, output } = await runLayer(on, points, {
      gate: { gate: "circle" },
      make: () => interpolantExperts(on, { pieces, coordinate: 0, keep: false }),
    });
    const exact = angles.map((a) => f(Math.cos(a), Math.sin(a)));
    return { expert, approx: output.map((row) => row[0] ?? Number.NaN), exact };
  };
  const few = await at(flat(given(one.inputs, "angles")));
  // The errors of the construction itself, in float64: rounding of single outputs is beside them.
  const points = gridOf(one, "supErrorGrid");
  const angles = Array.from({ length: points }, (_, i) => (2 * Math.PI * (i + 0.5)) / points);
  const { expert, exact } = await at(angles);
  const errors = angles.map((a, i) => {
    const { at = () => Number.NaN, direction = [] } = pieces[expert[i] ?? -1] ?? {};
    const along = Math.cos(a) * (direction[0] ?? 0) + Math.sin(a) * (direction[1] ?? 0);
    return Math.abs(at(along) - (exact[i] ?? Number.NaN));
  });
  return {
    expert: few.expert,
    approx: few.approx,
    exact: few.exact,
    [`supErrorGrid${points}`]: errors.reduce((most, error) => Math.max(most, error), 0),
    [`rmseGrid${points}`]: Math.sqrt(errors.reduce((total, error) => total + error * error, 0) / errors.length),
  };
};

/** The cases of one file by what they are about. */
const byKind =
  (kinds: Readonly<Record<string, Family>>): Family =>
  (one, on) => {
    const family = kinds[word(one, "kind")];
    if (!family) throw new Error(`no family for "${word(one, "kind")}"; there are ${Object.keys(kinds).join(", ")}`);
    return family(one, on);
  };

export const foundingFamilies: Readonly<Record<string, Family>> = {
  adamoe: adaMoEFamily,
  "main-expert-race": byKind({
    race: raceFamily,
    "similarity-sanity": similaritySanityFamily,
    "per-layer-regularization": perLayerFamily,
  }),
  "main-expressive": byKind({
    gates: gatesFamily,
    "compositional-cubes": cubesFamily,
    "circle-manifold": circleFamily,
  }),
  "main-null-experts": byKind({ "null-route": nullRouteFamily, "null-layer": nullLayerFamily }),
};
