// What several routers share: initial weights, checks of options, the usual losses, and the record a router's README
// row is made of.
// Private: only the type of the card leaves the package.
import {
  div,
  isTensor,
  maximum,
  mul,
  neg,
  ShapeError,
  softmax,
  softplus,
  sum,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import {
  idCounts,
  type Loss,
  type RouterContext,
  type RouterInput,
  switchBalance,
  tokenMask,
  zLoss,
} from "@switchyard/core/moe";

export type { RouterCard } from "@switchyard/core/moe";

/** `weight [experts, width]`, N(0, deviation²); 0.02 is where Mixtral, OLMoE and Qwen start. */
export function normalWeight({ engine, experts, width, random }: RouterContext, deviation = 0.02): Tensor {
  const draws = random.at("weight").host("normal", experts * width);
  return engine.tensor(scaled(draws, deviation), [experts, width]);
}

/** A parameter of any shape, N(0, deviation²), drawn under its name. */
export function normalTensor(
  { engine, random }: Pick<RouterContext, "engine" | "random">,
  name: string,
  shape: readonly number[],
  deviation: number,
): Tensor {
  const draws = random.at(name).host(
    "normal",
    shape.reduce((n, d) => n * d, 1),
  );
  return engine.tensor(scaled(draws, deviation), shape);
}

/** The numbers times a factor, in their place: they were drawn for this, and a model has hundreds of millions. */
function scaled(draws: Float64Array, factor: number): Float64Array {
  for (let i = 0; i < draws.length; i++) draws[i] = (draws[i] as number) * factor;
  return draws;
}

/**
 * `weight [experts, width]`, normal with variance scale / width and cut at two standard deviations: what falls outside
 * is drawn again (Switch Transformer 2101.03961, section 2.4, with scale 0.1).
 */
export function truncatedWeight({ engine, experts, width, random }: RouterContext, scale: number): Tensor {
  const draws = random.at("weight").host("normal", experts * width);
  for (let round = 0; draws.some((z) => Math.abs(z) > 2); round++) {
    const again = random.at("weight", round).host("normal", draws.length);
    for (const [i, z] of draws.entries()) if (Math.abs(z) > 2) draws[i] = again[i] ?? 0;
  }
  const deviation = Math.sqrt(scale / width);
  return engine.tensor(
    draws.map((z) => z * deviation),
    [experts, width],
  );
}

/** The tensor of that name among a router's parameters or buffers. */
export function leaf(tree: Tree, name: string): Tensor {
  const found = isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
  if (found === undefined || !isTensor(found)) {
    const names = isTensor(tree) ? "a single tensor" : Object.keys(tree).join(", ") || "nothing";
    throw new ShapeError(`router: there is no tensor "${name}", found ${names}; pass the tree that init() made`);
  }
  return found;
}

/** Throws ShapeError unless 1 <= k <= experts, a whole number. */
export function checkK(router: string, k: number, experts: number): void {
  if (!Number.isInteger(k) || k < 1 || k > experts) {
    throw new ShapeError(`${router}: k = ${k} of ${experts} experts; expected a whole number from 1 to ${experts}`);
  }
}

/** Throws ShapeError unless every value is a finite number from 0. */
export function checkNotNegative(router: string, options: Readonly<Record<string, number>>): void {
  for (const [name, value] of Object.entries(options)) {
    if (!(value >= 0) || !Number.isFinite(value)) {
      throw new ShapeError(`${router}: ${name} = ${value}; expected a finite number from 0`);
    }
  }
}

/** Throws ShapeError unless the option is one of the words. */
export function checkWord(router: string, option: string, value: string, words: readonly string[]): void {
  if (!words.includes(value)) {
    throw new ShapeError(
      `${router}: ${option} = "${value}"; expected ${words.map((word) => `"${word}"`).join(" or ")}`,
    );
  }
}

/** σ(l) / Σ σ(l) along the last axis, as the softmax of ln σ(l): also where every sigmoid is too small for a number. */
export const normalisedSigmoid = (logits: Tensor): Tensor => softmax(neg(softplus(neg(logits))));

/** The mask of the tokens as options take it: `{ mask }`, or nothing when all are real. */
export function maskOf(input: RouterInput): { readonly mask?: Tensor } {
  const mask = tokenMask(input.layout);
  return mask ? { mask } : {};
}

/** How often each of the ids 0..count-1 occurs in `ids [tokens, k]`, per real token: f32 `[count]`, without gradient. */
export function loadPerToken(ids: Tensor, count: number, mask?: Tensor): Tensor {
  const counts = idCounts(ids, count, mask);
  return mask ? div(counts, maximum(sum(mask), 1)) : mul(counts, 1 / Math.max(ids.shape[0] ?? 0, 1));
}

export interface UsualLosses {
  readonly logits: Tensor;
  /** `[tokens, experts]`, rows that sum to 1. */
  readonly probabilities: Tensor;
  /** i32 `[tokens, k]`, before any dropping. */
  readonly experts: Tensor;
  readonly balance: number;
  readonly zLoss: number;
  readonly normalizeByK?: boolean;
}
/**
 * Balance loss in the Switch form and z-loss, each only in training and where its weight is not 0; padding enters
 * neither.
 */
export function usualLosses(input: RouterInput, options: UsualLosses): Readonly<Record<string, Loss>> {
  if (!input.training) return {};
  const { logits, probabilities, experts, normalizeByK = false } = options;
  const masked = maskOf(input);
  const losses: Record<string, Loss> = {};
  if (options.balance !== 0) {
    const load = input.globalLoad ? { load: input.globalLoad } : {};
    const value = switchBalance({ probabilities, experts, normalizeByK, ...masked, ...load });
    losses.balance = { value, weight: options.balance };
  }
  if (options.zLoss !== 0) losses.zLoss = { value: zLoss(logits, masked.mask), weight: options.zLoss };
  return losses;
}
