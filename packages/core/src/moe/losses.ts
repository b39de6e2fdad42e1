// Auxiliary losses of routers, as functions of tensors. Counts carry no gradient, mean probabilities do; a masked token (padding)
// enters no count and no mean. Weights are the caller's: every function returns the bare value, [] unless it says otherwise.
import { ShapeError } from "../errors.ts";
import { add, div, less, maximum, mul, neg, square, where } from "../ops/elementwise.ts";
import { blockSizes } from "../ops/experts.ts";
import { entropyLast, logSumExp, softmax } from "../ops/normalise.ts";
import { mean, sum, sumLast } from "../ops/reduce.ts";
import { blockEnds, topkIndices } from "../ops/rows.ts";
import { concat, constant, hostConstant, reshape, slice } from "../ops/shape.ts";
import { show, type Tensor } from "../tensor.ts";
import { filled, inside } from "./parts.ts";

export interface Balance {
  /** `[tokens, experts (+ nulls)]`. */
  readonly probabilities: Tensor;
  /** i32 `[tokens, k]`, before any dropping; -1 = empty slot. */
  readonly experts: Tensor;
  /** `[tokens]`, 1 = real token. */
  readonly mask?: Tensor;
}

/**
 * Switch Transformer's load balance (2101.03961, eqs. 4-6): E Σ_e f_e P_e, f_e the share of tokens sent to e and P_e its mean
 * probability. With k > 1 the f_e sum to k; `normalizeByK` divides by k. `load [experts]` replaces f, for shares counted over
 * several micro-batches (GRIN 2409.12136). Uniform routing gives k, or 1 when normalised.
 */
export function switchBalance(options: Balance & { readonly normalizeByK?: boolean; readonly load?: Tensor }): Tensor {
  const { probabilities, experts, mask, normalizeByK = false, load } = options;
  checkTokens("switchBalance", probabilities, experts, mask);
  const [tokens = 0, count = 0] = probabilities.shape;
  const share = load ?? div(idCounts(experts, count, mask), realTokens(probabilities, tokens, mask)); // [experts]
  const k = normalizeByK ? Math.max(experts.shape[1] ?? 1, 1) : 1;
  return mul(sum(mul(share, meanOverTokens(probabilities, mask))), count / k);
}

/**
 * GShard's load balance (2006.16668, algorithm 1): (1/E) Σ_e c_e m_e over first choices only. `scaled` multiplies by E², the form of
 * tensor2tensor, which is 1 for uniform routing.
 */
export function gshardBalance(options: Balance & { readonly scaled?: boolean }): Tensor {
  const { probabilities, experts, scaled = false, ...rest } = options;
  const [tokens = 0, count = 0] = probabilities.shape;
  const firsts = slice(experts, [0, 0], [tokens, 1]);
  return mul(switchBalance({ probabilities, experts: firsts, ...rest }), scaled ? 1 : 1 / (count * count));
}

/**
 * The loss of Hugging Face's Mixtral: one balance over the concatenated tokens of all layers, not a mean of one per layer.
 * `logits[l] [tokens, experts]`; `mask [tokens]` counts for every layer. Uniform routing gives k.
 */
export function mixtralBalance(
  logits: readonly Tensor[],
  options: { readonly k: number; readonly mask?: Tensor },
): Tensor {
  const { k, mask } = options;
  if (logits.length === 0) throw new ShapeError("mixtralBalance: there are no layers");
  const all = concat(logits, 0); // [layers * tokens, experts]
  const experts = topkIndices(all, k); // [layers * tokens, k]
  const repeated = mask && concat(new Array<Tensor>(logits.length).fill(mask), 0);
  return switchBalance({ probabilities: softmax(all), experts, ...(repeated ? { mask: repeated } : {}) });
}

/** Router z-loss (ST-MoE 2202.08906, eq. 5): the mean of logsumexp(logits)² over the tokens of `logits [tokens, experts]`. */
export function zLoss(logits: Tensor, mask?: Tensor): Tensor {
  checkTokens("zLoss", logits, undefined, mask);
  return reshape(meanOverTokens(square(logSumExp(logits)), mask), []);
}

/** Squared coefficient of variation of `x [n]` (1701.06538, eq. 7): variance / (mean² + 1e-10); `sample` divides by n - 1. */
export function squaredCV(x: Tensor, options: { readonly sample?: boolean } = {}): Tensor {
  const n = x.size;
  const center = mean(x);
  const divisor = Math.max(options.sample ? n - 1 : n, 1);
  const variance = mul(sum(square(add(x, neg(center)))), 1 / divisor);
  return div(variance, add(square(center), 1e-10));
}

export interface SequenceBalance {
  /** Non-negative scores of all routed experts, `[batch * sequence, experts]`: sigmoids (V3) or probabilities (V2). */
  readonly scores: Tensor;
  /** i32 `[batch * sequence, k]`. */
  readonly experts: Tensor;
  readonly batch: number;
  /** `[batch * sequence]`, 1 = real token. */
  readonly mask?: Tensor;
}

/**
 * DeepSeek's sequence-wise balance (2412.19437, eqs. 17-20; V2 2405.04434, eqs. 23-25), per sequence, `[batch]`:
 * Σ_e f_e P_e with f_e = experts / (k N) * count_e and P_e the mean of the scores normalised to sum 1. An empty sequence gives 0.
 */
export function sequenceBalances(options: SequenceBalance): Tensor {
  const { scores, experts, batch, mask } = options;
  checkTokens("sequenceBalance", scores, experts, mask);
  const [tokens = 0, count = 0] = scores.shape;
  const k = experts.shape[1] ?? 1;
  if (!Number.isInteger(tokens / Math.max(batch, 1))) {
    throw new ShapeError(`sequenceBalance: ${tokens} tokens do not split into ${batch} sequences`);
  }
  const sequence = tokens / Math.max(batch, 1);
  const row = hostConstant(
    experts,
    Int32Array.from({ length: tokens }, (_, t) => Math.floor(t / sequence) * count),
    [tokens, 1],
  );
  const ids = where(inside(experts, count), add(experts, row), -1);
  const counts = reshape(idCounts(ids, batch * count, mask), [batch, count]);
  const normal = div(scores, add(sumLast(scores), 1e-20)); // [tokens, experts]
  const kept = mask ? where(reshape(mask, [tokens, 1]), normal, 0) : normal;
  const totals = sum(reshape(kept, [batch, sequence, count]), [1]); // [batch, experts]
  const real = mask
    ? maximum(sum(reshape(mask, [batch, sequence]), [1]), 1)
    : filled(scores, [batch], Math.max(sequence, 1));
  return mul(div(sum(mul(counts, totals), [1]), square(real)), count / Math.max(k, 1));
}

/** The mean of `sequenceBalances` over the sequences that have a real token. */
export function sequenceBalance(options: SequenceBalance): Tensor {
  const values = sequenceBalances(options);
  const { batch, mask } = options;
  if (mask === undefined) return mean(values);
  const present = less(0, sum(reshape(mask, [batch, mask.size / Math.max(batch, 1)]), [1])); // [batch]
  return div(sum(values), maximum(sum(present), 1));
}

/** Mean of the tokens' entropies in nats: how undecided the router is, from 0 to ln(experts). Per token: `entropyLast`. */
export function tokenEntropy(probabilities: Tensor, mask?: Tensor): Tensor {
  checkTokens("tokenEntropy", probabilities, undefined, mask);
  const entropies = reshape(entropyLast(probabilities), [probabilities.shape[0] ?? 0, 1]);
  return reshape(meanOverTokens(entropies, mask), []);
}

/** Entropy of the mean distribution: how evenly the experts are used, from 0 to ln(experts). */
export function entropyOfMean(probabilities: Tensor, mask?: Tensor): Tensor {
  checkTokens("entropyOfMean", probabilities, undefined, mask);
  return entropyLast(meanOverTokens(probabilities, mask));
}

// ---------------------------------------------------------------- counts and means
/** How often each of the ids 0..count-1 occurs in `ids [tokens, k]`, as f32 `[count]`, without gradient; others are not counted. */
export function idCounts(ids: Tensor, count: number, mask?: Tensor): Tensor {
  const kept = mask ? where(reshape(mask, [mask.size, 1]), ids, -1) : ids;
  return blockSizes(blockEnds(reshape(kept, [ids.size]), count));
}

/** Mean over the real tokens of `x [tokens, n]`: `[n]`; 0 when there is none. */
export function meanOverTokens(x: Tensor, mask?: Tensor): Tensor {
  const [tokens = 0] = x.shape;
  const kept = mask ? where(reshape(mask, [tokens, 1]), x, 0) : x;
  return div(sum(kept, [0]), realTokens(x, tokens, mask));
}

/** How many tokens are real, [], at least 1. */
function realTokens(like: Tensor, tokens: number, mask?: Tensor): Tensor {
  return mask ? maximum(sum(mask), 1) : constant(like, Math.max(tokens, 1));
}

function checkTokens(name: string, rows: Tensor, ids: Tensor | undefined, mask: Tensor | undefined): void {
  const tokens = rows.shape[0];
  if (rows.shape.length !== 2) throw new ShapeError(`${name}: got ${show(rows)}, expected [tokens, experts]`);
  if (ids && (ids.dtype !== "i32" || ids.shape.length !== 2 || ids.shape[0] !== tokens)) {
    throw new ShapeError(`${name}: expert ids are ${show(ids)}, expected i32 [${tokens}, k]`);
  }
  if (mask && (mask.shape.length !== 1 || mask.shape[0] !== tokens)) {
    throw new ShapeError(`${name}: the mask is ${show(mask)}, expected [${tokens}], 1 = real token`);
  }
}
