// Null experts (2601.15370): token choice over real experts and copies of one that costs nothing, so that easy tokens use
// fewer real experts. G(x) = x Wᵀ in R^{N+1}; the last, null logit counts M = N (1 - rho) / rho times, rho the target
// share of real experts among the k slots of a token:
//   slots = top-k of [G_1 ... G_N, G_0 x M], g = softmax over the chosen real logits, y = Σ g_i E_i(x)        section 3
//   L_bal = (N + M) Σ_slots f P, f = assignments / (tokens k); L_z = mean (ln(Σ_real e^G + M e^G_0))²
// An equal rule without the M columns: real experts are those at least as good as the null logit, at most k, and at
// least k - M; the null logit is a learned threshold per token. That is what runs unless `form` says otherwise.
import {
  add,
  concat,
  gatherLast,
  hostConstant,
  less,
  linear,
  mul,
  reshape,
  ShapeError,
  slice,
  softmax,
  softmaxTopk,
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
  zLoss as squaredLogSum,
} from "@switchyard/core/moe";
import {
  checkNotNegative,
  checkWord,
  leaf,
  loadPerToken,
  maskOf,
  normalTensor,
  normalWeight,
  type RouterCard,
} from "./parts.ts";

export interface NullExpertsOptions {
  /**
   * Slots of a token, filled by real or null experts: the most real experts it may get. With k = 1 every weight is 1,
   * and the gate learns from its losses alone.
   */
  readonly k: number;
  /** Share of the slots that real experts shall fill, above 0 and at most 1; default 0.5. At 1 there is no null expert. */
  readonly rho?: number;
  /** Weight of the balance loss over real and null slots, as a mean over the layers; default 0.02. */
  readonly balance?: number;
  /** Divides the balance loss by k, so that even loads give 1; default true. */
  readonly normalizeByK?: boolean;
  /** Weight of the z-loss, as a mean over the layers; default 0.001. */
  readonly zLoss?: number;
  /** How slots are chosen, with one result: against the null logit as a threshold, or among M copies of it. Default "threshold". */
  readonly form?: "threshold" | "copies";
}

/**
 * Each token takes as many real experts as beat the learned null logit, up to k; about k * rho of them on average. Params:
 * `weight [experts, width]`, `null [1, width]` (absent at rho = 1, where this is top-k). In the plan, null slots have the
 * id `experts` and no weight. `probabilities [tokens, experts + 1]` end with those of all copies together. Metrics:
 * `nullRatio` [], null slots per slot, and `zeroCompute` [], tokens without a real expert per token.
 * `init` throws ShapeError when k is more than experts and copies.
 *
 * @example nullExperts({ k: 4, rho: 0.5 })
 */
export function nullExperts(options: NullExpertsOptions): RouterPlugin {
  const { k, rho = 0.5, balance = 0.02, normalizeByK = true, zLoss = 0.001, form = "threshold" } = options;
  checkNotNegative("nullExperts", { balance, zLoss });
  checkWord("nullExperts", "form", form, ["threshold", "copies"]);
  if (!(rho > 0 && rho <= 1)) {
    throw new ShapeError(`nullExperts: rho = ${rho}; expected the share of real slots, above 0 and at most 1`);
  }

  return {
    name: "nullExperts",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: { k, rho, balance, normalizeByK, zLoss, form },
    expertsPerToken: k * rho,
    init(context) {
      const { experts, width } = context;
      const copies = nullCopies(experts, rho);
      if (!Number.isInteger(k) || k < 1 || k > experts + copies) {
        throw new ShapeError(
          `nullExperts: k = ${k} with ${experts} experts and ${copies} null copies (rho = ${rho}); ` +
            `expected a whole number from 1 to ${experts + copies}`,
        );
      }
      const score = (params: Tree, { hidden }: RouterInput): Tensor => {
        const weight = leaf(params, "weight");
        return linear(hidden, copies === 0 ? weight : concat([weight, leaf(params, "null")], 0)); // [tokens, experts (+ 1)]
      };
      const select = (logits: Tensor, input: RouterInput): Routed => {
        const { mask } = maskOf(input);
        const slots = slotLogits(logits, experts, copies); // [tokens, experts (+ 1)]
        const probabilities = softmax(slots);
        const asked = chooseReal(logits, { k, experts, copies, form });
        const plan = mask ? maskPlan(asked, mask) : asked;
        return {
          plan,
          logits,
          probabilities,
          losses: input.training
            ? losses(input, { slots, probabilities, plan: asked, k, experts, copies, balance, normalizeByK, zLoss })
            : {},
          metrics: nullShares(plan, experts, mask),
        };
      };
      const weight = normalWeight(context);
      return {
        params: copies === 0 ? { weight } : { weight, null: normalTensor(context, "null", [1, width], 0.02) },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** M = N (1 - rho) / rho, rounded: copies of the null logit for N experts. */
export function nullCopies(experts: number, rho: number): number {
  return Math.round((experts * (1 - rho)) / rho);
}

/**
 * The slots of each token as a plan `[tokens, k]`: of the real logits `[tokens, experts]` and the null logit in the last
 * column (none when `copies` is 0). Real experts stand best first, with weights that sum to 1; null slots have the id
 * `experts` and weight 0, behind the real ones or, chosen among the copies, where their score puts them. Ties: real before
 * null, then the lower expert.
 */
export function chooseReal(
  logits: Tensor,
  {
    k,
    experts,
    copies,
    form = "threshold",
  }: {
    readonly k: number;
    readonly experts: number;
    readonly copies: number;
    readonly form?: NullExpertsOptions["form"];
  },
): SparsePlan {
  if (copies === 0) {
    const { ids, weights } = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
    return { kind: "sparse", experts: ids, weights };
  }
  const [tokens = 0] = logits.shape;
  const real = slice(logits, [0, 0], [tokens, experts]);
  const none = slice(logits, [0, experts], [tokens, 1]);
  if (form === "copies") {
    const all = concat([real, ...new Array<Tensor>(copies).fill(none)], 1); // [tokens, experts + copies]
    const ids = topkIndices(all, k);
    const isReal = less(ids, experts);
    return realSlots(gatherLast(all, ids), { ids, isReal, experts });
  }
  const most = Math.min(k, experts);
  const ids = topkIndices(real, most); // [tokens, most]
  const chosen = gatherLast(real, ids);
  // Slot j must be real where the copies do not reach: j < k - copies.
  const forced = Float32Array.from({ length: most }, (_, j) => Number(j < k - copies));
  const isReal = where(less(chosen, none), hostConstant(logits, forced, [1, most]), 1);
  const plan = realSlots(chosen, { ids, isReal, experts });
  if (most === k) return plan;
  const rest = [tokens, k - most];
  const size = tokens * (k - most);
  return {
    kind: "sparse",
    experts: concat([plan.experts, hostConstant(logits, new Int32Array(size).fill(experts), rest)], 1),
    weights: concat([plan.weights, hostConstant(logits, new Float32Array(size), rest)], 1),
    bound: tokens * most,
  };
}

/** Weights over the real slots only: softmax of their logits; a token without one has none. */
function realSlots(
  chosen: Tensor,
  { ids, isReal, experts }: { readonly ids: Tensor; readonly isReal: Tensor; readonly experts: number },
): SparsePlan {
  return {
    kind: "sparse",
    experts: where(isReal, ids, experts),
    weights: softmax(where(isReal, chosen, Number.NEGATIVE_INFINITY)),
  };
}

/** The logits with all copies of the null one as one column: G_0 + ln M. */
function slotLogits(logits: Tensor, experts: number, copies: number): Tensor {
  if (copies === 0) return logits;
  const shift = Float64Array.from({ length: experts + 1 }, (_, i) => (i === experts ? Math.log(copies) : 0));
  return add(logits, hostConstant(logits, shift, [1, experts + 1]));
}

interface NullLosses {
  readonly slots: Tensor;
  readonly probabilities: Tensor;
  readonly plan: SparsePlan;
  readonly k: number;
  readonly experts: number;
  readonly copies: number;
  readonly balance: number;
  readonly normalizeByK: boolean;
  readonly zLoss: number;
}
function losses(input: RouterInput, parts: NullLosses): Routed["losses"] {
  const { slots, probabilities, plan, k, experts, copies, balance, normalizeByK, zLoss } = parts;
  const { mask } = maskOf(input);
  const found: Record<string, Loss> = {};
  if (balance !== 0) {
    const columns = probabilities.shape[1] ?? 0;
    // The copies share their load and their probability alike: M (load / M) (P / M).
    const scale = Float64Array.from(
      { length: columns },
      (_, i) => (experts + copies) / (i < experts ? 1 : copies) / (normalizeByK ? k : 1),
    );
    const load = input.globalLoad ?? loadPerToken(plan.experts, columns, mask); // [experts (+ 1)]
    const weighed = mul(mul(load, meanOverTokens(probabilities, mask)), hostConstant(slots, scale, [columns]));
    found.balance = { value: sum(weighed), weight: balance / input.layers };
  }
  if (zLoss !== 0) found.zLoss = { value: squaredLogSum(slots, mask), weight: zLoss / input.layers };
  return found;
}

/** Null slots per slot and tokens without a real expert per token, [] each. */
function nullShares(
  { experts: ids }: SparsePlan,
  experts: number,
  mask: Tensor | undefined,
): Readonly<Record<string, Tensor>> {
  const k = ids.shape[1] ?? 1;
  const nulls = sumLast(less(experts - 1, ids)); // [tokens, 1]
  return {
    nullRatio: mul(reshape(meanOverTokens(nulls, mask), []), 1 / k),
    zeroCompute: reshape(meanOverTokens(less(k - 0.5, nulls), mask), []),
  };
}

export const card: RouterCard = {
  name: "nullExperts",
  title: "Null experts: weight and data sparsity",
  paper: "2601.15370",
  equations: "section 3: slots, gates, balance over real and null slots, z-loss",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], null [1, width]",
  cost: "one product (experts + 1) x width; k * rho experts per token on average",
  claim:
    "rho = 0.5 is better than none at equal compute: fine-grained vision-language models spend less on image tokens",
  ourChoices: [
    "the gate multiplies the expert's output; the paper's algorithm 1 multiplies its input",
    "M = N (1 - rho) / rho is rounded to a whole number",
    "balance shares are per slot, tokens times k, so that even loads give 1; normalizeByK: false divides by tokens only",
    "the losses are averaged over the layers, which the paper leaves open",
    "initial weights N(0, 0.02²)",
  ],
};
