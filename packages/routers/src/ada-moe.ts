// AdaMoE (2406.13233): top-k over real experts and learned null experts, so that the number of real ones differs by token.
//   p = softmax(x [W; W_null]ᵀ) over E + m experts; top-k; null experts do nothing
//   w = p_chosen / sum of the p of the chosen real ones; a token whose slots are all null gets nothing
//   L_bal = (E + m) Σ f P, the f of the null experts replaced by their mean: no pressure among them
// Made for fine-tuning a model whose experts were trained with a smaller k.
import {
  concat,
  gatherLast,
  hostConstant,
  less,
  linear,
  mul,
  ShapeError,
  softmax,
  sum,
  type Tensor,
  type Tree,
  takeRows,
  topkIndices,
  where,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterInput, type RouterPlugin, switchBalance } from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  loadPerToken,
  maskOf,
  normalTensor,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export interface AdaMoEOptions {
  /** Slots of a token, filled by real or null experts. */
  readonly k: number;
  /** Null experts; default twice as many as real ones (the paper takes 16 beside 8). */
  readonly nulls?: number;
  /** Where the rows of the null experts start: as copies of the real ones in turn, or small random ones. Default "repeat". */
  readonly nullInit?: "repeat" | "normal";
  /** Weight of the balance loss over all experts, with the f summing to k; default 0.01. */
  readonly balance?: number;
  /** Balances the null experts one by one, as the released code does; default false: they share their mean load. */
  readonly balanceEachNull?: boolean;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes its k best of real and null experts. Params: `weight [experts, width]`, `null [nulls, width]`. Ids
 * from `experts` on are null experts, without weight. `init` throws ShapeError when k is more than all of them.
 *
 * @example adaMoE({ k: 4 })
 */
export function adaMoE(options: AdaMoEOptions): RouterPlugin {
  const { k, nulls, nullInit = "repeat", balance = 0.01, balanceEachNull = false, zLoss = 0 } = options;
  checkNotNegative("adaMoE", { balance, zLoss });
  checkWord("adaMoE", "nullInit", nullInit, ["repeat", "normal"]);
  if (nulls !== undefined && !(Number.isInteger(nulls) && nulls >= 1)) {
    throw new ShapeError(`adaMoE: nulls = ${nulls}; expected a whole number from 1; without null experts use topK`);
  }

  const score = (params: Tree, { hidden }: RouterInput): Tensor =>
    linear(hidden, concat([leaf(params, "weight"), leaf(params, "null")], 0)); // [tokens, experts + nulls]

  return {
    name: "adaMoE",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: { k, nulls: nulls ?? null, nullInit, balance, balanceEachNull, zLoss },
    // At even loads; with a number of null experts it depends on that of real ones.
    ...(nulls === undefined ? { expertsPerToken: k / 3 } : {}),
    init(context) {
      const { experts, width } = context;
      const none = nulls ?? 2 * experts;
      checkK("adaMoE", k, experts + none);
      const select = (logits: Tensor, input: RouterInput): Routed => {
        const { mask } = maskOf(input);
        const probabilities = softmax(logits); // [tokens, experts + nulls]
        const ids = topkIndices(logits, k); // [tokens, k]
        const real = less(ids, experts);
        // The same as dividing the probabilities by their sum; a row without a real expert stays zero.
        const weights = softmax(where(real, gatherLast(logits, ids), Number.NEGATIVE_INFINITY));
        const plan = { kind: "sparse", experts: ids, weights } as const;
        const usual = usualLosses(input, { logits, probabilities, experts: ids, balance: 0, zLoss });
        const load = input.globalLoad ?? loadPerToken(ids, experts + none, mask);
        const shared = balanceEachNull ? load : sharedLoad(load, experts);
        const value = (): Tensor =>
          switchBalance({ probabilities, experts: ids, load: shared, ...(mask ? { mask } : {}) });
        const balanced = input.training && balance !== 0;
        return {
          plan: mask ? maskPlan(plan, mask) : plan,
          logits,
          probabilities,
          losses: balanced ? { balance: { value: value(), weight: balance }, ...usual } : usual,
        };
      };
      const weight = normalWeight(context);
      const rows = Int32Array.from({ length: none }, (_, i) => i % experts);
      return {
        params: {
          weight,
          null:
            nullInit === "normal"
              ? normalTensor(context, "null", [none, width], 0.02)
              : context.engine.scope(() => takeRows(weight, hostConstant(weight, rows, [none]))),
        },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** `load [experts + nulls]` with that of every null expert replaced by their mean. */
function sharedLoad(load: Tensor, experts: number): Tensor {
  const isNull = hostConstant(
    load,
    Float32Array.from({ length: load.size }, (_, i) => Number(i >= experts)),
    [load.size],
  );
  const mean = mul(sum(mul(load, isNull)), 1 / (load.size - experts));
  return where(isNull, mean, load);
}

export const card: RouterCard = {
  name: "adaMoE",
  title: "AdaMoE: token-adaptive routing with null experts",
  paper: "2406.13233",
  equations: "sections 3.2 and 3.3",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], null [nulls, width]",
  cost: "one product (experts + nulls) x width; k experts / (experts + nulls) per token at even loads",
  claim: "Mixtral 8x7B fine-tuned: 14.5 % fewer FLOPs and 1.69 % more accuracy on ARC-C",
  ourChoices: [
    "the null experts share their mean load in the balance loss, as the paper says; in the released code that line has no " +
      "effect, which balanceEachNull: true reproduces",
    "ties go to the real expert: until the first step the copied rows of null experts score like their originals",
    "the balance loss is one per layer",
  ],
};
