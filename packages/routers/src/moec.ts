// MoEC (2207.09094): experts in M fixed clusters of L = E / M, alike inside a cluster and different between clusters.
//   P = softmax(x Wᵀ);  C_intra = mean_t mean_m Var_{e in m} P_te;  C_inter = mean_t Var_m mean_{e in m} P_te
//   loss = mu C_intra / (C_inter + 1e-12), or mu (C_intra - C_inter); beside it Switch's balance
//   cluster-level dropout, in training: in every cluster some experts are closed for the batch (logits -inf), at least
//   one stays, so that a token still finds a sibling of the expert it wants
// Of the paper only the abstract could be read: the formulas are ours, see ourChoices.
import {
  add,
  div,
  hostConstant,
  linear,
  mean,
  reshape,
  ShapeError,
  softmax,
  softmaxTopk,
  square,
  sub,
  sumTo,
  type Tensor,
  type Tree,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalWeight,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export interface MoecOptions {
  /** Experts per token; default 1. */
  readonly k?: number;
  /** M, divides the number of experts; expert e is in cluster floor(e / L). 1 has no cluster loss. Default 2. */
  readonly clusters?: number;
  /** Default "ratio". */
  readonly clusterLoss?: ClusterLossForm;
  /** mu, weight of the cluster loss; default 0.01. */
  readonly mu?: number;
  /** Share of each cluster's experts that is closed in training, 0..1, rounded, at least one stays; default 0.5. */
  readonly dropout?: number;
  /** Closes that share of the clusters instead, as a whole; default false. */
  readonly whole?: boolean;
  /** Weight of the balance loss; default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
  /** Added to C_inter before C_intra is divided by it, from 0; default 1e-12. */
  readonly epsilon?: number;
}

export type ClusterLossForm = "ratio" | "difference";

/**
 * Top-k by softmax, weights not divided by their sum, with losses and dropout over clusters of experts. Params:
 * `weight [experts, width]`. The cluster loss sees the softmax over all experts, the balance loss that over the open
 * ones. `init` throws ShapeError unless the clusters divide the experts and k fits into what dropout leaves open.
 *
 * @example moec({ k: 2, clusters: 4 })
 */
export function moec(options: MoecOptions = {}): RouterPlugin {
  const {
    k = 1,
    clusters = 2,
    clusterLoss = "ratio",
    mu = 0.01,
    dropout = 0.5,
    whole = false,
    balance = 0.01,
    zLoss = 0,
    epsilon = 1e-12,
  } = options;
  checkNotNegative("moec", { mu, dropout, balance, zLoss, epsilon });
  checkWord("moec", "clusterLoss", clusterLoss, ["ratio", "difference"]);
  if (!(dropout <= 1)) throw new ShapeError(`moec: dropout = ${dropout}; expected a share, from 0 to 1`);
  if (!Number.isInteger(clusters) || clusters < 1) {
    throw new ShapeError(`moec: clusters = ${clusters}; expected a whole number from 1`);
  }

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { training, random, layer } = input;
    const { mask } = maskOf(input);
    const [, experts = 0] = logits.shape;
    let open = logits; // -inf where an expert is closed
    if (training && dropout > 0) {
      const draws = random.at(layer, "cluster dropout").host("uniform", whole ? clusters : experts);
      const shut = closedExperts(draws, { experts, clusters, dropout, whole });
      open = where(hostConstant(logits, shut, [1, experts]), Number.NEGATIVE_INFINITY, logits);
    }
    const { weights, ids, probabilities } = softmaxTopk(open, { k, order: "softmax-topk" }); // [tokens, k]
    const plan = { kind: "sparse", experts: ids, weights } as const;
    const losses: Record<string, Loss> = {
      ...usualLosses(input, { logits, probabilities, experts: ids, balance, zLoss }),
    };
    if (training && mu !== 0 && clusters > 1) {
      const spread = clusterSpread(softmax(logits), { clusters, ...(mask ? { mask } : {}) });
      losses.cluster = { value: clusterValue(spread, clusterLoss, epsilon), weight: mu };
    }
    return { plan: mask ? maskPlan(plan, mask) : plan, logits, probabilities, losses };
  };

  return {
    name: "moec",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities", "choices"],
    options: { k, clusters, clusterLoss, mu, dropout, whole, balance, zLoss, epsilon },
    expertsPerToken: k,
    init(context) {
      const { experts } = context;
      checkK("moec", k, experts);
      if (experts % clusters !== 0) {
        throw new ShapeError(
          `moec: ${experts} experts do not split into ${clusters} clusters; choose a number of clusters that divides them`,
        );
      }
      const open = experts - closedCount({ experts, clusters, dropout, whole });
      if (k > open) {
        throw new ShapeError(
          `moec: k = ${k}, but dropout = ${dropout} leaves ${open} of ${experts} experts open; lower dropout or k`,
        );
      }
      return {
        params: { weight: normalWeight(context) },
        buffers: {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

interface Dropout {
  readonly experts: number;
  readonly clusters: number;
  readonly dropout: number;
  readonly whole: boolean;
}

/** How many of `of` are closed: the share, rounded, but never all. */
const closedOf = (of: number, share: number): number => Math.min(of - 1, Math.round(share * of));

function closedCount({ experts, clusters, dropout, whole }: Dropout): number {
  const size = experts / clusters;
  return whole ? size * closedOf(clusters, dropout) : clusters * closedOf(size, dropout);
}

/** 1 for each closed expert: those with the smallest draws, one per expert, or per cluster where these close whole. */
function closedExperts(draws: Float64Array, { experts, clusters, dropout, whole }: Dropout): Float32Array {
  const size = experts / clusters;
  const shut = new Float32Array(experts);
  const smallest = (from: number, of: number): number[] =>
    Array.from({ length: of }, (_, i) => from + i)
      .sort((a, b) => (draws[a] ?? 0) - (draws[b] ?? 0) || a - b)
      .slice(0, closedOf(of, dropout));
  if (whole) for (const m of smallest(0, clusters)) shut.fill(1, m * size, (m + 1) * size);
  else for (let m = 0; m < clusters; m++) for (const e of smallest(m * size, size)) shut[e] = 1;
  return shut;
}

/** How unlike the probabilities are inside clusters and between them, [] each. */
export interface ClusterSpread {
  readonly intra: Tensor;
  readonly inter: Tensor;
}

/**
 * C_intra and C_inter of `probabilities [tokens, experts]`, means over the real tokens of population variances; `mask
 * [tokens]`, 1 = real. Throws ShapeError unless the clusters divide the experts.
 */
export function clusterSpread(
  probabilities: Tensor,
  { clusters, mask }: { readonly clusters: number; readonly mask?: Tensor },
): ClusterSpread {
  const [tokens = 0, experts = 0] = probabilities.shape;
  const size = experts / clusters;
  if (!Number.isInteger(size) || size === 0) {
    throw new ShapeError(`clusterSpread: ${experts} experts do not split into ${clusters} clusters of equal size`);
  }
  const grouped = reshape(probabilities, [tokens, clusters, size]);
  const centres = div(sumTo(grouped, [tokens, clusters, 1]), size); // [tokens, clusters, 1]
  const centre = div(sumTo(centres, [tokens, 1, 1]), clusters);
  const average = (squares: Tensor): Tensor =>
    mean(meanOverTokens(reshape(squares, [tokens, squares.size / Math.max(tokens, 1)]), mask));
  if (tokens === 0) return { intra: mean(probabilities), inter: mean(probabilities) };
  return { intra: average(square(sub(grouped, centres))), inter: average(square(sub(centres, centre))) };
}

/** The cluster loss without its weight, []; `epsilon` keeps the ratio finite. */
export const clusterValue = ({ intra, inter }: ClusterSpread, form: ClusterLossForm, epsilon = 1e-12): Tensor =>
  form === "ratio" ? div(intra, add(inter, epsilon)) : sub(intra, inter);

export const card: RouterCard = {
  name: "moec",
  title: "MoEC: experts in clusters, with dropout inside each",
  paper: "2207.09094",
  equations: "the abstract; clustering losses and dropout by our formulas",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width",
  claim: "raises the performance ceiling where more experts meet limited data; less over-fitting",
  ourChoices: [
    "cluster losses: population variances of the probabilities inside clusters, over (or less) that of the clusters' means",
    "mu = 0.01; half of each cluster closed in training, the same for the whole batch; whole clusters on request",
    "clusters are neighbouring experts",
    "weights are the probabilities over the open experts, not divided by their sum; the balance loss sees these too",
    "one expert per token by default",
  ],
};
