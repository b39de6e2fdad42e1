// FuseMoE (2402.03226): a mixture of experts over several modalities, some of which may be missing. h_e is the clean logit of expert e:
//   Laplace gate h_e = -|x - w_e|;  Gaussian gate h_e = -|x - w_e|²;  softmax gate h_e = <x, w_e>          section 3
//   H = h + ε ⊙ (softplus(x W_nᵀ) + 0.01), ε ~ N(0, 1) in training;  weights = softmax over the k largest H  (1701.06538)
//   designs: perModality, a router for each modality over one pool of experts; disjoint, a router and a pool for each;
//            joint, one router over the modalities side by side
//   a missing modality m is replaced by a learned vector z_m, for the router and for the experts
//   losses: CV(importance)², CV(load)², and mean_m H(p_m) - H(mean_m p_m), p_m the mean probabilities of modality m: each modality
//   keeps to few experts, together they use all of them
import {
  add,
  addRows,
  concat,
  dispatch,
  div,
  full,
  groupedMatmul,
  hostConstant,
  less,
  linear,
  log,
  matmul,
  maximum,
  mul,
  neg,
  oneHot,
  reshape,
  ShapeError,
  scatterLast,
  slice,
  softmax,
  softmaxTopk,
  softplus,
  sqrt,
  square,
  sub,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  UnsupportedError,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  type Routed,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
} from "@switchyard/core/moe";
import { noisyLosses } from "./noisy-top-k.ts";
import { checkK, checkNotNegative, checkWord, leaf, maskOf, normalTensor, type RouterCard } from "./parts.ts";

export interface FuseMoEOptions {
  /** Experts per token. */
  readonly k: number;
  /** Default "laplace". */
  readonly gate?: "laplace" | "gaussian" | "softmax";
  /** Default "perModality". */
  readonly design?: "perModality" | "disjoint" | "joint";
  /** How many there are; default 2. */
  readonly modalities?: number;
  /** Noise in training, and with it the load loss; default true. */
  readonly noise?: boolean;
  /** Added to the softplus, the least deviation of the noise; above 0, default 0.01. */
  readonly noiseFloor?: number;
  /** Weight of the importance loss; default 0.01. */
  readonly importance?: number;
  /** Weight of the load loss; default 0.01. */
  readonly load?: number;
  /** Weight of the entropy regulariser, which the design "perModality" has; default 0.01. */
  readonly entropy?: number;
  /** Divides the variances by experts - 1; default false: by experts. */
  readonly sampleVariance?: boolean;
  /** Quirk of the public code, which leaves the minus sign out, so that the farthest experts win; default false. */
  readonly farthest?: boolean;
}

/**
 * Designs "perModality" and "disjoint": every token is of one modality, `input.modalityIds [tokens]`, and `input.missing [tokens]` (1 =
 * missing) tells which are not there; a token of another modality than 0..modalities-1 has no expert. Design "joint": every token is the
 * modalities side by side, in equal parts of its width, and `input.missing` is `[tokens, modalities]`. What is missing is replaced in
 * `Routed.rows`.
 *
 * Params: `centres`, `noise` where there is noise, both `[modalities, experts, width]`, disjoint `[modalities, experts / modalities,
 * width]`, joint `[experts, width]`; `indicator [modalities, width]`, joint `[modalities, width / modalities]`. Losses, in training:
 * `importance`, `load`, `entropy`. `init` throws ShapeError when sizes do not divide or k is not in 1..experts (of one pool), `route`
 * UnsupportedError without the modality of each token.
 *
 * @example fuseMoE({ k: 2, modalities: 3 })
 */
export function fuseMoE(options: FuseMoEOptions): RouterPlugin {
  const {
    k,
    gate = "laplace",
    design = "perModality",
    modalities = 2,
    noise = true,
    noiseFloor = 0.01,
    importance = 0.01,
    load = 0.01,
    entropy = 0.01,
    sampleVariance = false,
    farthest = false,
  } = options;
  const name = "fuseMoE";
  checkWord(name, "gate", gate, ["laplace", "gaussian", "softmax"]);
  checkWord(name, "design", design, ["perModality", "disjoint", "joint"]);
  checkNotNegative(name, { noiseFloor, importance, load, entropy });
  if (noiseFloor === 0) throw new ShapeError(`${name}: noiseFloor = 0; expected a number above 0, such as 0.01`);
  if (!Number.isInteger(modalities) || modalities < 1) {
    throw new ShapeError(`${name}: modalities = ${modalities}; expected a whole number from 1`);
  }
  const pools = design === "disjoint" ? modalities : 1;
  const weights = { importance, load };

  const route = (params: Tree, input: RouterInput): Routed => {
    const { training, random, layer } = input;
    const { mask } = maskOf(input);
    const facts = design === "joint" ? undefined : modalitiesOf(input, modalities, mask);
    const rows = filled(input, leaf(params, "indicator"), facts?.ids);
    const x = rows ?? input.hidden; // [tokens, width]
    const clean = gateLogits({ gate, x, centres: leaf(params, "centres"), ...facts, farthest }); // [tokens, experts of a pool]
    const deviation =
      training && noise ? add(softplus(products(x, leaf(params, "noise"), facts?.ids)), noiseFloor) : undefined;
    const noisy = deviation ? add(clean, mul(random.at(layer, "noise").normal(clean.shape), deviation)) : clean;
    const chosen = softmaxTopk(noisy, { k, order: "topk-softmax" });
    const real = facts?.real ?? mask;
    const asked = { kind: "sparse", experts: chosen.ids, weights: chosen.weights } as const;
    const plan = real ? maskPlan(asked, real) : asked; // ids within the pool

    const losses: Record<string, Loss> = {};
    if (training) {
      const common = { clean, noisy, ...(deviation ? { deviation } : {}), k, weights, sampleVariance };
      if (facts && pools > 1) {
        // The mean over the pools: as many tokens in each is nothing that routing could bring about.
        const each = facts.masks.map((own) => noisyLosses({ ...common, plan: maskPlan(plan, own), mask: own }));
        Object.assign(losses, averaged(each));
      } else {
        Object.assign(losses, noisyLosses({ ...common, plan, ...(real ? { mask: real } : {}) }));
      }
      if (facts && pools === 1 && entropy !== 0) {
        const means = modalityMeans(softmax(clean), facts.masks);
        losses.entropy = { value: entropyRegulariser(means), weight: entropy };
      }
    }
    const seen = rows ? { rows } : {};
    if (!facts || pools === 1) return { plan, logits: noisy, probabilities: chosen.probabilities, losses, ...seen };
    return { ...inPools({ plan, noisy, probabilities: chosen.probabilities, ids: facts.ids, pools }), losses, ...seen };
  };

  return {
    name,
    causal: { training: true, evaluation: true },
    needs: design === "joint" ? [] : ["modalityIds"],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: {
      k,
      gate,
      design,
      modalities,
      noise,
      noiseFloor,
      importance,
      load,
      entropy,
      sampleVariance,
      farthest,
    },
    expertsPerToken: k,
    init(context: RouterContext) {
      const { experts, width } = context;
      if (experts % pools !== 0) {
        throw new ShapeError(`${name}: ${experts} experts in ${pools} pools, one for each modality; they must divide`);
      }
      if (design === "joint" && width % modalities !== 0) {
        throw new ShapeError(`${name}: ${modalities} modalities side by side in a width of ${width}; they must divide`);
      }
      checkK(name, k, experts / pools);
      const joint = design === "joint";
      const shape = joint ? [experts, width] : [modalities, experts / pools, width];
      const size = shape.reduce((n, d) => n * d, 1);
      return {
        params: {
          // Centres of distances lie among the tokens, which are of the scale 1 after a norm.
          centres: normalTensor(context, "centres", shape, gate === "softmax" ? 0.02 : 1),
          indicator: normalTensor(context, "indicator", [modalities, joint ? width / modalities : width], 1),
          ...(noise ? { noise: context.engine.tensor(new Float32Array(size), shape) } : {}),
        },
        buffers: {},
        route,
      };
    },
  };
}

interface Modalities {
  /** i32 `[tokens]`, -1 for what is no modality. */
  readonly ids: Tensor;
  /** `[tokens]`: real tokens of a modality. */
  readonly real: Tensor;
  /** One `[tokens]` for each modality: its real tokens. */
  readonly masks: readonly Tensor[];
}

function modalitiesOf(input: RouterInput, modalities: number, mask?: Tensor): Modalities {
  const tokens = input.hidden.shape[0] ?? 0;
  if (input.modalityIds?.size !== tokens) {
    throw new UnsupportedError(
      `fuseMoE: there are ${input.modalityIds?.size ?? "no"} modality ids for ${tokens} tokens; pass input.modalityIds, i32 [${tokens}], ` +
        'or use design: "joint"',
    );
  }
  const modalityIds = reshape(input.modalityIds, [tokens]);
  const known = mul(less(-1, modalityIds), less(modalityIds, modalities)); // [tokens]
  const ids = where(known, modalityIds, -1);
  const real = mask ? mul(mask, known) : known;
  const own = mul(oneHot(ids, modalities), reshape(real, [tokens, 1])); // [tokens, modalities]
  const masks = Array.from({ length: modalities }, (_, m) => reshape(slice(own, [0, m], [tokens, 1]), [tokens]));
  return { ids, real, masks };
}

/** The tokens with what is missing replaced, `[tokens, width]`; undefined where nothing was said to be missing. */
function filled({ hidden, missing }: RouterInput, indicator: Tensor, ids?: Tensor): Tensor | undefined {
  if (missing === undefined) return undefined;
  const [tokens = 0, width = 0] = hidden.shape;
  const [modalities = 0, part = 0] = indicator.shape;
  const size = ids ? tokens : tokens * modalities;
  if (missing.size !== size) {
    throw new ShapeError(
      `fuseMoE: input.missing is [${missing.shape.join(", ")}]; expected [${tokens}${ids ? "" : `, ${modalities}`}], 1 = missing`,
    );
  }
  if (ids) return where(reshape(missing, [tokens, 1]), takeRows(indicator, ids), hidden);
  const parts = reshape(hidden, [tokens, modalities, part]);
  const lacking = reshape(missing, [tokens, modalities, 1]);
  return reshape(where(lacking, reshape(indicator, [1, modalities, part]), parts), [tokens, width]);
}

interface GateLogits {
  readonly gate: "laplace" | "gaussian" | "softmax";
  /** `[tokens, width]`. */
  readonly x: Tensor;
  /** `[experts, width]`, or `[modalities, experts, width]` with `ids`. */
  readonly centres: Tensor;
  /** i32 `[tokens]`: the modality of each token. */
  readonly ids?: Tensor;
  readonly farthest?: boolean;
}

/** Logits before the noise, `[tokens, experts]`: minus distances, minus their squares, or products. */
function gateLogits({ gate, x, centres, ids, farthest = false }: GateLogits): Tensor {
  const product = products(x, centres, ids);
  if (gate === "softmax") return product;
  const squares = reshape(sumLast(square(centres)), centres.shape.slice(0, -1)); // [(modalities,) experts]
  const own = ids ? takeRows(squares, ids) : reshape(squares, [1, squares.size]);
  // |x - w|², which rounding may take below 0; the slope of a root is infinite at 0.
  const distance = maximum(sub(add(sumLast(square(x)), own), mul(product, 2)), 1e-12);
  const far = gate === "laplace" ? sqrt(distance) : distance;
  return farthest ? far : neg(far);
}

/** Products with the rows of a matrix, `[tokens, experts]`; with `ids`, of the matrix of each token's modality. */
function products(x: Tensor, w: Tensor, ids?: Tensor): Tensor {
  if (ids === undefined) return linear(x, w);
  const [tokens = 0] = x.shape;
  const { rows, ends } = dispatch(reshape(ids, [tokens, 1]), { count: w.shape[0] ?? 0, bound: tokens });
  return addRows(groupedMatmul(takeRows(x, rows), w, ends), rows, tokens);
}

interface Local {
  readonly plan: SparsePlan;
  readonly noisy: Tensor;
  readonly probabilities: Tensor;
  readonly ids: Tensor;
  readonly pools: number;
}
/** From the ids inside a modality's pool to those of the layer; logits are -inf and probabilities 0 outside the own pool. */
function inPools({ plan, noisy, probabilities, ids, pools }: Local): Pick<Routed, "plan" | "logits" | "probabilities"> {
  const [tokens = 0, size = 0] = noisy.shape;
  const pool = reshape(ids, [tokens, 1]);
  const first = mul(pool, size); // [tokens, 1]
  const places = hostConstant(
    ids,
    Int32Array.from({ length: size }, (_, e) => e),
    [1, size],
  );
  const columns = where(less(pool, 0), -1, add(first, places)); // [tokens, size]
  const spread = (x: Tensor): Tensor => scatterLast(x, columns, size * pools); // [tokens, experts]
  const own = spread(full(noisy, noisy.shape, 1));
  return {
    plan: { ...plan, experts: where(less(plan.experts, 0), -1, add(plan.experts, first)) },
    logits: where(own, spread(noisy), Number.NEGATIVE_INFINITY),
    probabilities: spread(probabilities),
  };
}

function averaged(each: readonly Record<string, Loss>[]): Record<string, Loss> {
  const [first = {}, ...more] = each;
  return Object.fromEntries(
    Object.entries(first).map(([name, { value, weight }]) => {
      const total = more.reduce((sofar, losses) => add(sofar, losses[name]?.value ?? 0), value);
      return [name, { value: mul(total, 1 / each.length), weight }];
    }),
  );
}

/** Mean probabilities of each modality, `[modalities, experts]`, and 1 for each that has a token, `[modalities, 1]`. */
export interface ModalityMeans {
  readonly means: Tensor;
  readonly present: Tensor;
}
/** `probabilities [tokens, experts]`, for each modality the `[tokens]` that are its own (1). A modality without tokens has zeros. */
export function modalityMeans(probabilities: Tensor, masks: readonly Tensor[]): ModalityMeans {
  const [tokens = 0] = probabilities.shape;
  const sums = masks.map((mask) => matmul(reshape(mask, [1, tokens]), probabilities)); // [1, experts] each
  const counts = masks.map((mask) => reshape(sum(mask), [1, 1]));
  const all = concat(counts, 0); // [modalities, 1]
  return { means: div(concat(sums, 0), maximum(all, 1)), present: less(0, all) };
}

/** mean_m H(p_m) - H(mean_m p_m) in nats over the modalities that are present, []; from -ln(modalities) to 0. */
export function entropyRegulariser({ means, present }: ModalityMeans): Tensor {
  const [, experts = 0] = means.shape;
  const count = maximum(sum(present), 1);
  const centre = reshape(div(sum(means, [0]), count), [1, experts]);
  // -mean_m KL(p_m | centre), which is the same: the difference of two entropies would be lost to rounding.
  const ratios = where(less(0, means), div(means, maximum(centre, 1e-30)), 1); // [modalities, experts]
  return neg(div(sum(mul(means, log(ratios))), count));
}

export const card: RouterCard = {
  name: "fuseMoE",
  title: "FuseMoE: Laplace gating over modalities, some of them missing",
  paper: "2402.03226",
  equations: "Laplace and Gaussian gates; joint, per-modality and disjoint designs; entropy regulariser",
  needs: ["modalityIds"],
  causal: "yes",
  plans: ["sparse"],
  params: "centres and noise [modalities, experts, width] each, indicator [modalities, width]",
  cost: "one product experts x width and the norms, in training two products",
  claim:
    "faster convergence and better results on clinical, vision and sentiment tasks, above all with missing modalities",
  ourChoices: [
    "the weight of the entropy regulariser, 0.01, and that it looks at the probabilities without noise",
    "centres start from N(0, 1), noise weights from 0, indicators from N(0, 1)",
    "outputs are plain weighted sums; the public code takes logarithms, and the farthest experts",
    "with pools of their own, the balance losses are means over the pools, and there is no entropy regulariser",
    "the joint design takes tokens that hold the modalities side by side",
  ],
};
