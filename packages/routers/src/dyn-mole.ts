// DynMoLE (2504.00661): as many experts as a token needs, all of them where the router is uncertain.
//   p = softmax(x Wᵀ), sorted: kept while the running sum stays <= top_p (not the expert that crosses it) or rank < k
//   H = (1 - Σ (p + ε)^q) / (1 - E^(1-q)), Tsallis' entropy divided by its largest value; H > threshold: all experts
//   weights p of the kept, not divided by their sum
//   L = 0.01 mean(H) + 0.001 E Σ_e mean(kept p)_e mean(p)_e, both factors with gradient
// Rényi's entropy instead: H = ln(Σ (p + ε)^q + 1e-10) / ((1 - q) ln E); at q = 1 both are Shannon's, divided by ln E.
import {
  add,
  affine,
  concat,
  cumsum,
  exp,
  gatherLast,
  hostConstant,
  less,
  linear,
  log,
  maximum,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  softmax,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  topkIndices,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
  type TrainingHook,
} from "@switchyard/core/moe";
import { checkNotNegative, checkWord, leaf, maskOf, type RouterCard } from "./parts.ts";

export interface DynMoLEOptions {
  /** Experts kept at least, fewer where there are not so many; default 2. */
  readonly k?: number;
  /** Sum of probabilities up to which experts are kept, 0..1; default 0.75. */
  readonly topP?: number;
  /** Entropy, relative to the largest one, above which a token gets all experts; default 0.9. */
  readonly threshold?: number;
  /** Default "tsallis". */
  readonly entropy?: "tsallis" | "renyi";
  /** q of the entropy, above 0; 1 is Shannon's. Default 1.1. */
  readonly q?: number;
  /** ε, added to each probability in the entropy; default 1e-5. */
  readonly epsilon?: number;
  /** Weight of the mean entropy in the loss; default 0.01. */
  readonly entropyLoss?: number;
  /** Weight of the balance loss; default 0.001. */
  readonly balance?: number;
}
type Settings = Required<DynMoLEOptions>;

function settings(options: DynMoLEOptions): Settings {
  const { k = 2, topP = 0.75, threshold = 0.9, entropy = "tsallis", q = 1.1, epsilon = 1e-5 } = options;
  const { entropyLoss = 0.01, balance = 0.001 } = options;
  checkNotNegative("dynMoLE", { topP, threshold, epsilon, entropyLoss, balance });
  checkWord("dynMoLE", "entropy", entropy, ["tsallis", "renyi"]);
  if (!Number.isInteger(k) || k < 0) throw new ShapeError(`dynMoLE: k = ${k}; expected a whole number from 0`);
  if (!(q > 0) || !Number.isFinite(q)) throw new ShapeError(`dynMoLE: q = ${q}; expected a finite number above 0`);
  return { k, topP, threshold, entropy, q, epsilon, entropyLoss, balance };
}

/**
 * Each token takes its most probable experts up to a sum, at least k, or all where it is uncertain; the same in
 * training and evaluation. Params: `weight [experts, width]`. The plan has a slot for every expert, so devices that
 * cannot read counts reserve memory for all. The losses are one per layer; for the released form over all layers at
 * once set both weights to 0 and train with `dynMoLEHook` of @switchyard/routers/dyn-mole.
 *
 * @example dynMoLE({ topP: 0.75, k: 2 })
 */
export function dynMoLE(options: DynMoLEOptions = {}): RouterPlugin {
  const set = settings(options);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const { plan, probabilities, high } = dynMoLEPlan(logits, set);
    const trained = input.training && (set.entropyLoss !== 0 || set.balance !== 0);
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: trained ? weighed(dynMoLELosses(logits, { ...set, ...(mask ? { mask } : {}) }), set) : {},
      metrics: { uncertain: reshape(meanOverTokens(high, mask), []) },
    };
  };

  return {
    name: "dynMoLE",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { ...set },
    init({ engine, experts, width, random }) {
      const bound = 1 / Math.sqrt(width);
      const draws = random.at("weight").host("uniform", experts * width);
      const weight = engine.tensor(
        draws.map((u) => bound * (2 * u - 1)),
        [experts, width],
      );
      return { params: { weight }, buffers: {}, score, select, route: (p, input) => select(score(p, input), input) };
    },
  };
}

function weighed(
  { entropy, balance }: { readonly entropy: Tensor; readonly balance: Tensor },
  set: Settings,
): Readonly<Record<string, Loss>> {
  return {
    ...(set.entropyLoss === 0 ? {} : { entropy: { value: entropy, weight: set.entropyLoss } }),
    ...(set.balance === 0 ? {} : { balance: { value: balance, weight: set.balance } }),
  };
}

/** What a token gets, from `logits [tokens, experts]`; slots in the order of the probabilities. */
export function dynMoLEPlan(
  logits: Tensor,
  options: DynMoLEOptions = {},
): {
  readonly plan: SparsePlan;
  readonly probabilities: Tensor;
  /** `[tokens]`. */
  readonly entropy: Tensor;
  /** `[tokens, 1]`: 1 where all experts are taken for uncertainty. */
  readonly high: Tensor;
} {
  const set = settings(options);
  const [, experts = 0] = logits.shape;
  const probabilities = softmax(logits);
  const ids = topkIndices(logits, experts); // [tokens, experts], most probable first
  const sorted = gatherLast(probabilities, ids);
  const beyond = less(set.topP, cumsum(sorted, { axis: 1 })); // the running sum, the expert itself included
  const first = hostConstant(
    logits,
    Float32Array.from({ length: experts }, (_, rank) => Number(rank < set.k)),
    [1, experts],
  );
  const entropy = relativeEntropy(probabilities, set); // [tokens, 1]
  const high = less(set.threshold, entropy);
  const kept = maximum(maximum(affine(beyond, { scale: -1, shift: 1 }), first), high); // [tokens, experts]
  return {
    plan: { kind: "sparse", experts: where(kept, ids, -1), weights: where(kept, sorted, 0) },
    probabilities,
    entropy: reshape(entropy, [entropy.size]),
    high,
  };
}

/** The mean entropy and the balance of `logits [tokens, experts]`, [] each; `mask [tokens]`, 1 = real token. */
export function dynMoLELosses(
  logits: Tensor,
  options: DynMoLEOptions & { readonly mask?: Tensor } = {},
): { readonly entropy: Tensor; readonly balance: Tensor } {
  const { mask, ...rest } = options;
  const { plan, probabilities, entropy } = dynMoLEPlan(logits, rest);
  const [tokens = 0, experts = 0] = logits.shape;
  const kept = scatterLast(plan.weights, plan.experts, experts); // [tokens, experts]
  return {
    entropy: reshape(meanOverTokens(reshape(entropy, [tokens, 1]), mask), []),
    balance: mul(sum(mul(meanOverTokens(kept, mask), meanOverTokens(probabilities, mask))), experts),
  };
}

/** The losses as the released code has them: once over the tokens of all layers, instead of once per layer. */
export function dynMoLEHook(options: DynMoLEOptions = {}): TrainingHook {
  const set = settings(options);
  return {
    name: "dynMoLE",
    loss(layers, { mask }) {
      const logits = layers.flatMap((layer) => (layer.logits ? [layer.logits] : []));
      const [one] = logits;
      if (one === undefined) throw new ShapeError("dynMoLEHook: no layer has logits; use it with the dynMoLE router");
      const repeated = mask && concat(new Array<Tensor>(logits.length).fill(reshape(mask, [mask.size])), 0);
      const { entropy, balance } = dynMoLELosses(concat(logits, 0), {
        ...set,
        ...(repeated ? { mask: repeated } : {}),
      });
      return add(mul(entropy, set.entropyLoss), mul(balance, set.balance));
    },
  };
}

/** Entropy of each row over its largest possible value, `[tokens, 1]`; of one expert 0. */
function relativeEntropy(probabilities: Tensor, { entropy, q, epsilon }: Settings): Tensor {
  const [, experts = 0] = probabilities.shape;
  if (experts < 2) return mul(sumLast(probabilities), 0);
  const shifted = add(probabilities, epsilon);
  if (q === 1) return mul(sumLast(mul(shifted, log(maximum(shifted, 1e-30)))), -1 / Math.log(experts));
  const powers = sumLast(exp(mul(log(maximum(shifted, 1e-30)), q))); // Σ (p + ε)^q
  if (entropy === "renyi") return mul(log(add(powers, 1e-10)), 1 / ((1 - q) * Math.log(experts)));
  const largest = 1 - experts ** (1 - q);
  return affine(powers, { scale: -1 / largest, shift: 1 / largest });
}

export const card: RouterCard = {
  name: "dynMoLE",
  title: "DynMoLE: top-p and top-k, all experts under uncertainty",
  paper: "2504.00661",
  equations: "hybrid routing, entropy and balance losses, as in the released code",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width, a sort of the experts; k to all experts per token",
  claim: "9.6 % better than LoRA and 2.3 % than MoLA on commonsense reasoning",
  ourChoices: [
    "the losses are one per layer; dynMoLEHook has the released form over all layers",
    "a single expert has the entropy 0",
    "k above the number of experts keeps all",
    "ties go to the lower expert",
  ],
};
