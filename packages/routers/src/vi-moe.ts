// ViMoE (2410.15732): top-1 softmax routing in the last layers of a Vision Transformer beside one expert that is always
// on, and the analysis that tells which of these layers are worth keeping.
//   y = f_shared(x) + p_i f_i(x), i = argmax p, p = softmax(x Wᵀ)
// The shared expert is the layer's; the router asks for it. The analysis: h_ce = share of class c's choices that go
// to expert e, specialisation of c = 1 - H(h_c) / ln E, a layer's = the mean over its classes; layers above a threshold
// stay.
import {
  add,
  div,
  entropyLast,
  less,
  maximum,
  mul,
  reshape,
  ShapeError,
  sub,
  sum,
  type Tensor,
  where,
} from "@switchyard/core";
import { idCounts, type RouterPlugin } from "@switchyard/core/moe";
import { checkK, checkNotNegative, type RouterCard } from "./parts.ts";
import { topK } from "./top-k.ts";

export interface ViMoEOptions {
  /** Routed experts per token, beside the shared one; default 1. */
  readonly k?: number;
  /** Experts that every token goes through beside these; default 1, 0 for none. */
  readonly shared?: number;
  /** Weight of the balance loss, E Σ f P with the f summing to k; default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Each token takes its k best experts at their probabilities, which are not divided by their sum, in a layer with a
 * shared expert: `transformer` makes it, `moeLayer` refuses to do without. Params: `weight [experts, width]`. `init`
 * throws ShapeError when k is not in 1..experts.
 *
 * @example moeLayer(viMoE(), context, { experts, shared: [{ experts: glu({ count: 1, ...sizes }) }] })
 */
export function viMoE(options: ViMoEOptions = {}): RouterPlugin {
  const { k = 1, shared = 1, balance = 0.01, zLoss = 0 } = options;
  checkNotNegative("viMoE", { balance, zLoss });
  if (!Number.isInteger(shared) || shared < 0) {
    throw new ShapeError(`viMoE: shared = ${shared}; expected a whole number of experts, 0 for none`);
  }
  const inner = topK({ k, order: "softmax-topk", balance, zLoss });
  return {
    ...inner,
    name: "viMoE",
    sharedExperts: shared,
    options: { k, shared, balance, zLoss },
    init(context) {
      checkK("viMoE", k, context.experts);
      return inner.init(context);
    },
  };
}

/**
 * Which class goes where, `[classes, experts]`: the shares of the class's choices that each expert gets, rows that
 * sum to 1, or to 0 for a class without choices. `experts` i32 `[tokens, k]` as in a sparse plan, -1 = empty slot;
 * `labels` i32 `[tokens]`, ids outside the classes count nowhere (label -1: padding). For images, a token has the
 * class of its image. Throws ShapeError for other shapes.
 */
export function routingHeatMap(
  experts: Tensor,
  labels: Tensor,
  sizes: { readonly experts: number; readonly classes: number },
): Tensor {
  const [tokens = 0] = experts.shape;
  if (
    experts.dtype !== "i32" ||
    experts.shape.length !== 2 ||
    labels.dtype !== "i32" ||
    labels.shape.join() !== `${tokens}`
  ) {
    throw new ShapeError(
      `routingHeatMap: experts [${experts.shape.join(", ")}] and labels [${labels.shape.join(", ")}]; ` +
        "expected i32 [tokens, k] and i32 [tokens]",
    );
  }
  const { experts: count, classes } = sizes;
  const within = (ids: Tensor, below: number): Tensor => mul(less(-1, ids), less(ids, below));
  const column = reshape(labels, [tokens, 1]);
  const known = mul(within(experts, count), within(column, classes)); // [tokens, k]
  const cells = where(known, add(experts, mul(column, count)), -1);
  const counts = reshape(idCounts(cells, classes * count), [classes, count]);
  return div(counts, maximum(reshape(sum(counts, [1]), [classes, 1]), 1));
}

/**
 * 1 - H / ln E of every row of `heatMap [classes, experts]`, `[classes]`: 1 = one expert, 0 = all alike, and 0 for a
 * class without choices.
 */
export function classSpecialisation(heatMap: Tensor): Tensor {
  const experts = heatMap.shape[1] ?? 0;
  const seen = less(0, sum(heatMap, [1])); // [classes]
  // One expert alone is neither special nor not.
  if (experts < 2) return mul(seen, 0);
  return where(seen, sub(1, mul(entropyLast(heatMap), 1 / Math.log(experts))), 0);
}

/** The mean specialisation of the classes that have choices, []: what a layer is judged by. */
export function layerSpecialisation(heatMap: Tensor): Tensor {
  const seen = less(0, sum(heatMap, [1]));
  return div(sum(classSpecialisation(heatMap)), maximum(sum(seen), 1));
}

/**
 * The layers to keep as Mixture-of-Experts layers, ascending: those whose specialisation is above the threshold. The
 * others can become plain feed-forward layers.
 */
export function layersToKeep(
  specialisations: ArrayLike<number>,
  { threshold = 0.3 }: { readonly threshold?: number } = {},
): number[] {
  return Array.from(specialisations, (value, layer) => (value > threshold ? layer : -1)).filter((layer) => layer >= 0);
}

export const card: RouterCard = {
  name: "viMoE",
  title: "ViMoE: top-1 beside a shared expert, and which layers to keep",
  paper: "2410.15732",
  equations: "routed plus shared expert; the routing heat map by class and layer",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]; the shared expert is the layer's",
  cost: "one product experts x width, beside the shared expert",
  claim: "stable accuracy however many layers are MoE layers, and layers that do not specialise can go without loss",
  ourChoices: [
    "the measure of specialisation, 1 - H / ln E averaged over classes, and the threshold of 0.3",
    "the balance loss weighs 0.01",
    "routed weights are probabilities, not divided by their sum: with one expert the gate would not learn",
  ],
};
