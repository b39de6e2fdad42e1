// VQMoE (2411.19402): beside top-k routing a discrete path, in which the token's nearest code points to an expert.
//   c = argmin_j |x - v_j|², expert(c) = c mod E
//   y = g_c Σ_e p_e f_e(x) + g_d f_expert(c)(v_c),  (g_c, g_d) = softmax(x W₂ᵀ + b), p = top-k of softmax(x Wᵀ),
//     divided by its sum
//   forward v_c, backward as if it were x (straight-through); the codes learn from the quantisation loss alone:
//   L = mean (v_c - sg x)² + β mean (sg v_c - x)², β = 0.25
// Released code: github.com/giangdip2410/VQMoE.
import {
  add,
  full,
  layerNorm,
  linear,
  mean,
  mul,
  reshape,
  ShapeError,
  slice,
  softmax,
  softmaxTopk,
  square,
  stopGradient,
  straightThrough,
  sub,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  topkIndices,
  transpose,
} from "@switchyard/core";
import {
  idCounts,
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalTensor,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export interface VQMoEOptions {
  /** Experts per token of the top-k path; default 2. */
  readonly k?: number;
  /** K, size of the codebook; default 0: one code for every expert. The released code takes 512. */
  readonly codes?: number;
  /**
   * Where only the discrete path runs, with weight 1, which leaves one expert per token: "never", in "evaluation", or
   * "always" (fine-tuning). Default "never".
   */
  readonly discreteOnly?: "never" | "evaluation" | "always";
  /** β, the weight of the part of the quantisation loss that moves the tokens; default 0.25. */
  readonly commitment?: number;
  /** Weight of the quantisation loss; default 0.1. */
  readonly vqLoss?: number;
  /** Weight of the balance loss of the top-k path, with the f summing to k; default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
  /**
   * c of the released code, whose experts see x (1 - c) + (v - x) c instead of v, with a gradient to x only; it takes
   * 0.05 or 0.1. Default 0: v itself.
   */
  readonly blend?: number;
  /**
   * Layer norm with gain and bias on what the experts of the discrete path see, as in the released code; default
   * false.
   */
  readonly normalise?: boolean;
}

/**
 * Top-k routing plus one expert that the token's code names. Params: `weight [experts, width]`, `codebook [codes,
 * width]`, `combine [2, width]`, `combineBias [2]`; with `normalise` also `normGain` and `normBias [width]`. Both
 * paths use the same experts. Metric `codes [codes]`: real tokens of each code. Throws ShapeError for options out of
 * range.
 *
 * @example vqMoE({ k: 2, codes: 64 })
 */
export function vqMoE(options: VQMoEOptions = {}): RouterPlugin {
  const {
    k = 2,
    codes = 0,
    discreteOnly = "never",
    commitment = 0.25,
    vqLoss = 0.1,
    balance = 0.01,
    zLoss = 0,
    blend = 0,
    normalise = false,
  } = options;
  checkNotNegative("vqMoE", { commitment, vqLoss, balance, zLoss });
  checkWord("vqMoE", "discreteOnly", discreteOnly, ["never", "evaluation", "always"]);
  if (!Number.isInteger(codes) || codes < 0) {
    throw new ShapeError(`vqMoE: codes = ${codes}; expected a whole number, 0 for as many as there are experts`);
  }
  if (!(blend >= 0 && blend <= 1)) throw new ShapeError(`vqMoE: blend = ${blend}; expected a number from 0 to 1`);

  const route = (params: Tree, input: RouterInput): Routed => {
    const { hidden, training } = input;
    const { mask } = maskOf(input);
    const masked = mask ? { mask } : {};
    const weight = leaf(params, "weight");
    const experts = weight.shape[0] ?? 0;
    const codebook = leaf(params, "codebook");
    const found = quantize(hidden, codebook, { blend, commitment, ...masked });
    const rows = normalise
      ? layerNorm(found.rows, leaf(params, "normGain"), leaf(params, "normBias"), { eps })
      : found.rows;
    const limited = (plan: SparsePlan): SparsePlan => (mask ? maskPlan(plan, mask) : plan);
    const ids = codeExperts(found.codes, experts, codebook.shape[0] ?? 0); // [tokens, 1]
    const losses: Record<string, Loss> = training && vqLoss !== 0 ? { vq: { value: found.loss, weight: vqLoss } } : {};
    const metrics = { codes: idCounts(found.codes, codebook.shape[0] ?? 0, mask) };
    if (discreteOnly === "always" || (discreteOnly === "evaluation" && !training)) {
      const plan = limited({ kind: "sparse", experts: ids, weights: full(hidden, ids.shape, 1) });
      return { plan, rows, losses, metrics };
    }
    const gates = combineGate(hidden, leaf(params, "combine"), leaf(params, "combineBias")); // [tokens, 2]
    const [tokens = 0] = hidden.shape;
    const gate = (column: number): Tensor => slice(gates, [0, column], [tokens, 1]);
    const logits = linear(hidden, weight); // [tokens, experts]
    const chosen = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
    const { probabilities } = chosen;
    return {
      plan: limited({ kind: "sparse", experts: chosen.ids, weights: mul(chosen.weights, gate(0)) }),
      more: [{ plan: limited({ kind: "sparse", experts: ids, weights: gate(1) }), rows }],
      logits,
      probabilities,
      losses: { ...usualLosses(input, { logits, probabilities, experts: chosen.ids, balance, zLoss }), ...losses },
      metrics,
    };
  };

  return {
    name: "vqMoE",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: discreteOnly === "never" ? ["logits", "probabilities", "choices"] : [],
    options: { k, codes, discreteOnly, commitment, vqLoss, balance, zLoss, blend, normalise },
    expertsPerToken: discreteOnly === "always" ? 1 : k + 1,
    init(context) {
      const { engine, experts, width, random } = context;
      checkK("vqMoE", k, experts);
      const count = codes || experts;
      const spread = random
        .at("codebook")
        .host("uniform", count * width)
        .map((u) => (2 * u - 1) / count); // U(-1/K, 1/K)
      const params = {
        weight: normalWeight(context),
        codebook: engine.tensor(spread, [count, width]),
        combine: normalTensor(context, "combine", [2, width], 0.02),
        combineBias: engine.tensor(new Float32Array(2), [2]),
        ...(normalise
          ? {
              normGain: engine.tensor(new Float32Array(width).fill(1), [width]),
              normBias: engine.tensor(new Float32Array(width), [width]),
            }
          : {}),
      };
      return { params, buffers: {}, route };
    },
  };
}

const eps = 1e-5;

/** (g_c, g_d) of x `[tokens, width]`: `[tokens, 2]`. */
export function combineGate(x: Tensor, weight: Tensor, bias: Tensor): Tensor {
  return softmax(linear(x, weight, bias));
}

/** |x - v|² of `x [tokens, width]` and `codebook [codes, width]`: `[tokens, codes]`. */
export function codeDistances(x: Tensor, codebook: Tensor): Tensor {
  const own = transpose(sumLast(square(codebook)), [1, 0]); // [1, codes]
  return add(sub(own, mul(linear(x, codebook), 2)), sumLast(square(x)));
}

/** The expert of each code, i32: code mod experts. */
export function codeExperts(codes: Tensor, experts: number, count: number): Tensor {
  const table = Int32Array.from({ length: count }, (_, code) => code % experts);
  return takeRows(codes.engine.root.tensor(table, [count]), codes);
}

export interface Quantized {
  /** i32 `[tokens, 1]`; ties go to the lower code. */
  readonly codes: Tensor;
  /** `[tokens, width]`: the codes, with the straight-through gradient to x; or the released code's blend. */
  readonly rows: Tensor;
  /** [], over the real tokens; 0 when there is none. */
  readonly loss: Tensor;
}

/** Nearest codes of `x [tokens, width]` in `codebook [codes, width]`. */
export function quantize(
  x: Tensor,
  codebook: Tensor,
  options: { readonly blend?: number; readonly commitment?: number; readonly mask?: Tensor } = {},
): Quantized {
  const { blend = 0, commitment = 0.25, mask } = options;
  const [tokens = 0] = x.shape;
  const nearness = mul(stopGradient(codeDistances(x, codebook)), -1);
  const codes = topkIndices(nearness, 1); // [tokens, 1]
  const v = takeRows(codebook, reshape(codes, [tokens])); // [tokens, width]
  const fixed = stopGradient(v);
  const still = stopGradient(x);
  const rows = blend === 0 ? straightThrough(v, x) : add(mul(x, 1 - blend), mul(sub(fixed, still), blend));
  const error = (a: Tensor, b: Tensor): Tensor => mean(meanOverTokens(square(sub(a, b)), mask));
  const loss = add(error(v, still), mul(error(fixed, x), commitment));
  return { codes, rows, loss };
}

export const card: RouterCard = {
  name: "vqMoE",
  title: "VQMoE: a learned code of the token points to an expert",
  paper: "2411.19402",
  equations: "the two paths, their gate and the quantisation loss, as in the released code",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width], codebook [codes, width], combine [2, width], combineBias [2]",
  cost: "products experts x width and codes x width, one expert more per token",
  claim: "28 % better robustness than other routers of sparse MoE, strong in fine-tuning",
  ourChoices: [
    "as many codes as experts unless told otherwise; the quantisation loss weighs 0.1",
    "the discrete path alone has weight 1",
    "the released code's blend and layer norm before the experts are options; its layer norm behind them, its restarts of dead codes and its contrastive loss are left out",
    "codes without tokens stay where they are",
    "ties go to the lower code and the lower expert",
  ],
};
