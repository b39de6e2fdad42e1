// THOR (2110.04260): no router at all. In training every layer sends the whole batch to one random expert; each batch
// is run twice, and the two predictions p and q are asked to agree:
//   loss = CE(p) + CE(q) + alpha 1/2 Σ_tokens Σ_words (p - q)(ln p - ln q)
// summed over tokens that are not padding, and divided by the number that the cross entropies are divided by.
// Evaluation: a random expert for each token or each sequence ("dispatch"), or the mean of all experts ("ensemble").
import {
  add,
  cast,
  cumsum,
  div,
  exp,
  full,
  hostConstant,
  less,
  logSoftmax,
  maximum,
  mul,
  reshape,
  ShapeError,
  slice,
  sub,
  sum,
  sumLast,
  type Tensor,
  takeRows,
  UnsupportedError,
  where,
} from "@switchyard/core";
import {
  type DensePlan,
  type Layout,
  maskPlan,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  type SparsePlan,
  type TrainingHook,
} from "@switchyard/core/moe";
import { hashKey } from "./hash-parts.ts";
import { checkNotNegative, checkWord, maskOf, type RouterCard } from "./parts.ts";

export interface ThorOptions {
  /** In evaluation: one random expert, or the mean of all, at as many times the cost; default "dispatch". */
  readonly evaluation?: "dispatch" | "ensemble";
  /** What has a random expert of its own when dispatched; default "token". */
  readonly dispatch?: "token" | "sequence";
  /** Of the experts in evaluation, a whole number; default 0. In training the trainer's seed decides. */
  readonly seed?: number;
}

/**
 * Every expert learns the same task on its own batches; nothing is learned or stored here. Train it with `thorHook` of
 * @switchyard/routers/thor, without which the experts are not asked to agree. Dispatched tokens draw by layer, row of the batch and position among
 * the real tokens, so that decoding with a cache goes on as without one and padding changes nothing.
 *
 * @example trainer(engine, task, { optimiser, hooks: [thorHook()] })
 */
export function thor({ evaluation = "dispatch", dispatch = "token", seed = 0 }: ThorOptions = {}): RouterPlugin {
  checkWord("thor", "evaluation", evaluation, ["dispatch", "ensemble"]);
  checkWord("thor", "dispatch", dispatch, ["token", "sequence"]);
  if (!Number.isInteger(seed)) throw new ShapeError(`thor: seed = ${seed}; expected a whole number`);

  return {
    name: "thor",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: evaluation === "ensemble" ? ["sparse", "dense"] : ["sparse"],
    gives: [],
    options: { evaluation, dispatch, seed },
    expertsPerToken: 1,
    init({ experts }) {
      const route = ({ hidden, layout, layer, training, random }: RouterInput): SparsePlan | DensePlan => {
        const [tokens = 0] = hidden.shape;
        if (training) {
          const [u = 0] = random.at(layer, "expert").host("uniform", 1);
          const drawn = new Int32Array(tokens).fill(Math.floor(u * experts));
          return oneExpert(hidden, hostConstant(hidden, drawn, [tokens, 1]));
        }
        if (evaluation === "ensemble") return { kind: "dense", weights: full(hidden, [tokens, experts], 1 / experts) };
        return oneExpert(hidden, drawExperts(hidden, layout, { experts, layer, seed, dispatch }));
      };
      return {
        params: {},
        buffers: {},
        route(_, input): Routed {
          const { mask } = maskOf(input);
          const plan = route(input);
          return { plan: mask ? maskPlan(plan, mask) : plan, losses: {} };
        },
      };
    },
  };
}

/** Each token to its one expert, with weight 1: `ids` i32 `[tokens, 1]`. */
export function oneExpert(like: Tensor, ids: Tensor): SparsePlan {
  return { kind: "sparse", experts: ids, weights: full(like, ids.shape, 1) };
}

interface Draw {
  readonly experts: number;
  readonly layer: number;
  readonly seed: number;
  readonly dispatch: "token" | "sequence";
}

/** The experts of dispatched tokens, i32 `[tokens, 1]`: by row of the batch and, for single tokens, position. */
function drawExperts(
  like: Tensor,
  { batch, sequence, past, mask }: Layout,
  { experts, layer, seed, dispatch }: Draw,
): Tensor {
  const expertAt = (row: number, place: number): number => hashKey(row, place, { seed, layer }) % experts;
  const total = past + sequence;
  if (dispatch === "sequence" || !mask) {
    const ids = Int32Array.from({ length: batch * sequence }, (_, i) =>
      expertAt(Math.floor(i / sequence), dispatch === "token" ? past + (i % sequence) + 1 : 0),
    );
    return hostConstant(like, ids, [batch * sequence, 1]);
  }
  // The n-th real token of a row draws as the n-th of a row without padding; what padding draws is not used.
  const table = Int32Array.from({ length: batch * total }, (_, i) => expertAt(Math.floor(i / total), (i % total) + 1));
  const before = hostConstant(
    like,
    Int32Array.from({ length: batch }, (_, row) => row * total - 1),
    [batch, 1],
  );
  const place = slice(cumsum(cast(mask, "i32"), { axis: 1 }), [0, past], [batch, sequence]); // from 1 on
  return takeRows(hostConstant(like, table, [batch * total, 1]), reshape(add(before, place), [batch * sequence]));
}

export interface ThorHookOptions {
  /** Weight of the consistency; default 1, as in the released code. */
  readonly alpha?: number;
}

/**
 * Two passes of every batch, and the loss above. The consistency is divided by the number of tokens it is summed over:
 * those with a label of the vocabulary where the task tells labels, else those of the mask, else all. Where the task's
 * loss is the mean over these tokens, as in `languageModelTask`, that is the released code's loss divided by their
 * number. Losses of routers keep their mean over the passes.
 * `combine` throws UnsupportedError when another hook asks for another number of passes.
 *
 * @example trainer(engine, task, { optimiser, hooks: [thorHook({ alpha: 5 })] })
 */
export function thorHook({ alpha = 1 }: ThorHookOptions = {}): TrainingHook {
  checkNotNegative("thorHook", { alpha });
  return {
    name: "thor",
    passes: 2,
    combine(passes, { labels, mask }) {
      const [first, second, ...more] = passes;
      if (!first || !second || more.length > 0) {
        throw new UnsupportedError(
          `thorHook: compares two passes of a batch, there are ${passes.length}; leave out the hook that asks for more`,
        );
      }
      const both = add(first.loss, second.loss);
      if (alpha === 0) return both;
      const vocabulary = first.logits.shape.at(-1) ?? 0;
      const known = labels && mul(less(-1, labels), less(labels, vocabulary));
      const counted = known && mask ? where(mask, reshape(known, mask.shape), 0) : (known ?? mask);
      return add(both, mul(thorConsistency(first.logits, second.logits, counted).mean, alpha));
    },
  };
}

/**
 * Half the symmetric Kullback-Leibler divergence of the distributions of two passes, in nats, `sum` over tokens and
 * `mean` over them, [] each, with gradient to both: logits `[..., vocabulary]`; `mask`, 1 = counted, with one entry per
 * token. Throws ShapeError for a mask of another size.
 */
export function thorConsistency(
  first: Tensor,
  second: Tensor,
  mask?: Tensor,
): { readonly sum: Tensor; readonly mean: Tensor } {
  const vocabulary = first.shape.at(-1) ?? 0;
  const tokens = vocabulary === 0 ? 0 : first.size / vocabulary;
  if (second.shape.join() !== first.shape.join() || (mask && mask.size !== tokens)) {
    throw new ShapeError(
      `thorConsistency: logits [${first.shape}] and [${second.shape}], mask ${mask ? `[${mask.shape}]` : "none"}; ` +
        "expected two of equal shape and one entry of the mask per token",
    );
  }
  const [lnP, lnQ] = [logSoftmax(first), logSoftmax(second)];
  const perToken = reshape(sumLast(mul(sub(exp(lnP), exp(lnQ)), sub(lnP, lnQ))), [tokens]);
  const counted = mask && reshape(mask, [tokens]);
  const total = mul(sum(counted ? where(counted, perToken, 0) : perToken), 0.5);
  if (!counted) return { sum: total, mean: mul(total, 1 / Math.max(tokens, 1)) };
  return { sum: total, mean: div(total, maximum(sum(counted), 1)) };
}

export const card: RouterCard = {
  name: "thor",
  title: "THOR: random experts that learn to agree",
  paper: "2110.04260",
  equations: "random activation and consistency, as in the released code",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "none",
  cost: "none; training runs every batch twice (thorHook), evaluation as an ensemble every expert",
  claim: "2 BLEU above Switch in multilingual translation, equal to a model 18 times larger",
  ourChoices: [
    "dispatched experts are a hash of seed, layer, row and position, so that evaluation repeats itself",
    "the consistency is divided by the number of tokens it is summed over, as a mean cross entropy is",
    "the two passes draw by themselves, so that a layer may use the same expert twice",
  ],
};
