// CompeteSMoE (v2 2505.13380, v1 2402.02526): in a few scheduled steps all experts compute, the strongest answers win,
// and the router learns to foresee the winners; in all other steps, and in evaluation, the router chooses.
//   v2  a_e = mean_d softplus(E_e(x)_d);  winners: top k of a, weights a / Σ a over them
//       L_R = mean (softmax(x W) - stop softmax(a))² + theta times the same over the winners
//       diversity: mean cosine between the outputs of two different winners;  balance on softmax(a)
//   v1  a_e = |E_e(x)|;  weights: softmax over the winners' a;  L_R: MSE or KL to these weights, zeros elsewhere
//   other steps: softmax, top k, renormalised; balance and z-loss
// Balance: per sequence E Σ f P, f of first choices. Which layers compete at a step: `competeSMoESchedule`.
import {
  add,
  div,
  full,
  gatherLast,
  hostConstant,
  linear,
  log,
  logSoftmax,
  maximum,
  mul,
  reshape,
  ShapeError,
  scatterLast,
  softmax,
  softmaxTopk,
  softplus,
  sqrt,
  square,
  stopGradient,
  sub,
  sum,
  sumLast,
  type Tensor,
  type Tree,
  takeRows,
  topkIndices,
  UnsupportedError,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type RouterInput,
  type RouterPlugin,
  sequenceBalance,
  type TrainingHook,
  zLoss as zLossOf,
} from "@switchyard/core/moe";
import { hashKey } from "./hash-parts.ts";
import { checkK, checkNotNegative, checkWord, leaf, maskOf, normalWeight, type RouterCard } from "./parts.ts";

export interface CompeteSMoEOptions {
  /** Experts per token, winners of a competition too; default 2. */
  readonly k?: number;
  /** Default "v2". */
  readonly version?: CompeteSMoEVersion;
  /** Weight of what the router learns from a competition; default 0.01. */
  readonly distillation?: number;
  /** How it learns: squared differences, or Kullback-Leibler divergence (v1 only); default "mse". */
  readonly distance?: "mse" | "kl";
  /**
   * theta: weight of the squared differences over the winners, within `distillation` (v2 only); default 0. The
   * released settings for language models have 0.2.
   */
  readonly hybrid?: number;
  /** Weight of the diversity of the winners' outputs (v2 only); default 0.01 in v2. */
  readonly diversity?: number;
  /** Divides the diversity by k², as the released code does, not by the k (k - 1) pairs; default false. */
  readonly officialDiversity?: boolean;
  /** Weight of the balance loss; default 0.01. */
  readonly balance?: number;
  /** Weight of the router z-loss in steps without competition; default 0.001. */
  readonly zLoss?: number;
}

export type CompeteSMoEVersion = "v1" | "v2";

/** The key of a layer in `input.schedule`. */
const keyOf = (layer: number): string => `competeSMoE.${layer}`;

/**
 * Top-k by softmax, taught by competitions. Params: `weight [experts, width]`. It competes where `input.schedule` says
 * so, in training only: without the hook `competeSMoESchedule` of @switchyard/routers/compete-smoe never. A competition
 * runs every expert on every token and hands their outputs on, so that they are not computed twice. `logits` and `probabilities` are the router's in all
 * steps. Metric `competition` [], in training: 1 in a step with competition, else 0.
 * `init` throws ShapeError when k is not in 1..experts; `route` throws UnsupportedError when it is to compete and the
 * caller supplies no `everyExpert`.
 *
 * @example trainer(engine, task, { optimiser, totalSteps, hooks: [competeSMoESchedule({ layers: 4 })] })
 */
export function competeSMoE(options: CompeteSMoEOptions = {}): RouterPlugin {
  const {
    k = 2,
    version = "v2",
    distillation = 0.01,
    distance = "mse",
    hybrid = 0,
    diversity = version === "v2" ? 0.01 : 0,
    officialDiversity = false,
    balance = 0.01,
    zLoss = 0.001,
  } = options;
  checkNotNegative("competeSMoE", { distillation, hybrid, diversity, balance, zLoss });
  checkWord("competeSMoE", "version", version, ["v1", "v2"]);
  checkWord("competeSMoE", "distance", distance, ["mse", "kl"]);
  const refuse = (why: string): never => {
    throw new ShapeError(`competeSMoE: ${why}`);
  };
  if (version === "v2" && distance === "kl") refuse('distance = "kl" with version "v2"; only "v1" has it');
  if (version === "v1" && hybrid !== 0) refuse(`hybrid = ${hybrid} with version "v1"; only "v2" has it`);
  if (version === "v1" && diversity !== 0) refuse(`diversity = ${diversity} with version "v1"; only "v2" has it`);

  const score = (params: Tree, { hidden }: RouterInput): Tensor => linear(hidden, leaf(params, "weight"));

  const chooseByRouter = (logits: Tensor, input: RouterInput): Routed => {
    const masked = maskOf(input);
    const { weights, ids, probabilities } = softmaxTopk(logits, { k, order: "softmax-topk-renormalise" });
    const plan = { kind: "sparse", experts: ids, weights } as const; // [tokens, k]
    const losses: Record<string, Loss> = {};
    if (input.training && balance !== 0) losses.balance = balanceOf(probabilities, input);
    if (input.training && zLoss !== 0) losses.zLoss = { value: zLossOf(logits, masked.mask), weight: zLoss };
    return {
      plan: masked.mask ? maskPlan(plan, masked.mask) : plan,
      logits,
      probabilities,
      losses,
      ...(input.training ? { metrics: { competition: full(logits, [], 0) } } : {}),
    };
  };
  const balanceOf = (scores: Tensor, input: RouterInput): Loss => {
    const experts = topkIndices(scores, 1); // first choices, [tokens, 1]
    const value = sequenceBalance({ scores, experts, batch: input.layout.batch, ...maskOf(input) });
    return { value, weight: balance };
  };

  const compete = (logits: Tensor, outputs: Tensor, input: RouterInput): Routed => {
    const masked = maskOf(input);
    const outcome = competition(outputs, { k, version });
    const { affinity, experts, weights } = outcome;
    const plan = { kind: "sparse", experts, weights } as const; // [tokens, k]
    const losses: Record<string, Loss> = {};
    if (distillation !== 0) {
      const { all, winners } = distillationLosses(logits, outcome, { version, distance, ...masked });
      const value = hybrid === 0 ? all : add(all, mul(winners, hybrid));
      losses.distillation = { value, weight: distillation };
    }
    if (diversity !== 0 && k > 1) {
      const value = outputDiversity(outputs, experts, { official: officialDiversity, ...masked });
      losses.diversity = { value, weight: diversity };
    }
    if (balance !== 0) losses.balance = balanceOf(softmax(affinity), input);
    return {
      plan: masked.mask ? maskPlan(plan, masked.mask) : plan,
      logits,
      probabilities: softmax(logits),
      losses,
      expertOutputs: outputs,
      metrics: { competition: full(logits, [], 1) },
    };
  };

  const select = (logits: Tensor, input: RouterInput): Routed => {
    if (!input.training || input.schedule?.[keyOf(input.layer)] !== true) return chooseByRouter(logits, input);
    if (input.everyExpert === undefined) {
      throw new UnsupportedError(
        `competeSMoE: layer ${input.layer} is to compete at step ${input.step}, but nobody supplies everyExpert(); run ` +
          "the layer with moe(), or leave the schedule out",
      );
    }
    return compete(logits, input.everyExpert(), input);
  };

  return {
    name: "competeSMoE",
    causal: { training: true, evaluation: true },
    needs: ["everyExpert"],
    plans: ["sparse"],
    gives: ["scores", "logits", "probabilities"],
    options: { k, version, distillation, distance, hybrid, diversity, officialDiversity, balance, zLoss },
    expertsPerToken: k,
    init(context) {
      checkK("competeSMoE", k, context.experts);
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

export interface Competition {
  /** How strongly each expert answers, `[tokens, experts]`. */
  readonly affinity: Tensor;
  /** The winners, i32 `[tokens, k]`, the strongest first. */
  readonly experts: Tensor;
  /** `[tokens, k]`, rows sum to 1. */
  readonly weights: Tensor;
}

/** Who wins with `outputs [tokens, experts, width]`; everything has its gradient. */
export function competition(
  outputs: Tensor,
  { k, version }: { readonly k: number; readonly version: CompeteSMoEVersion },
): Competition {
  const [tokens = 0, experts = 0, width = 0] = outputs.shape;
  const affinity = reshape(
    version === "v2" ? mul(sumLast(softplus(outputs)), 1 / Math.max(width, 1)) : lengths(outputs),
    [tokens, experts],
  );
  const ids = topkIndices(affinity, k);
  const chosen = gatherLast(affinity, ids); // [tokens, k]
  return { affinity, experts: ids, weights: version === "v2" ? div(chosen, sumLast(chosen)) : softmax(chosen) };
}

/**
 * What the router learns from a competition: its `target [tokens, experts]`, and, [] each, means over the real tokens of
 * how far it is from there: `all` over every expert, `winners` over the winners only (divergences are sums). The outcome
 * of the competition has no gradient here. `logits [tokens, experts]`; `mask [tokens]`, 1 = real.
 */
export function distillationLosses(
  logits: Tensor,
  outcome: Competition,
  options: { readonly version: CompeteSMoEVersion; readonly distance: "mse" | "kl"; readonly mask?: Tensor },
): { readonly target: Tensor; readonly all: Tensor; readonly winners: Tensor } {
  const { version, distance, mask } = options;
  const { experts: ids } = outcome;
  const [, experts = 0] = logits.shape;
  const [, k = 0] = ids.shape;
  const target = // [tokens, experts]
    version === "v2"
      ? softmax(stopGradient(outcome.affinity))
      : scatterLast(stopGradient(outcome.weights), ids, experts);
  const apart =
    distance === "kl"
      ? mul(target, sub(log(maximum(target, 1e-30)), logSoftmax(logits))) // 0 where the target is 0
      : square(sub(softmax(logits), target));
  const average = (x: Tensor, columns: number): Tensor =>
    mul(reshape(meanOverTokens(sumLast(x), mask), []), 1 / Math.max(columns, 1));
  return {
    target,
    all: average(apart, distance === "kl" ? 1 : experts),
    winners: average(gatherLast(apart, ids), distance === "kl" ? 1 : k),
  };
}

/**
 * Mean cosine between the outputs of two different winners of a token, [], from `outputs [tokens, experts, width]` and
 * `experts` i32 `[tokens, k]`; `official` divides by k² instead of k (k - 1). An output of zeros is unlike every other.
 */
export function outputDiversity(
  outputs: Tensor,
  experts: Tensor,
  { official = false, mask }: { readonly official?: boolean; readonly mask?: Tensor } = {},
): Tensor {
  const [tokens = 0, count = 0, width = 0] = outputs.shape;
  const k = experts.shape[1] ?? 0;
  const first = hostConstant(
    experts,
    Int32Array.from({ length: tokens }, (_, t) => t * count),
    [tokens, 1],
  );
  const chosen = takeRows(reshape(outputs, [tokens * count, width]), add(experts, first)); // [tokens, k, width]
  const units = div(chosen, maximum(lengths(chosen), 1e-12));
  // |Σ u|² is the sum of all cosines; those of an output with itself are taken out.
  const pairs = sub(sumLast(square(sum(units, [1]))), sumLast(sum(square(units), [1]))); // [tokens, 1]
  return mul(reshape(meanOverTokens(pairs, mask), []), 1 / Math.max(official ? k * k : k * (k - 1), 1));
}

/** Euclidean lengths along the last axis, which stays as 1; the gradient of a length 0 is 0. */
const lengths = (x: Tensor): Tensor => sqrt(add(sumLast(square(x)), 1e-30));

// ---------------------------------------------------------------- schedule
export interface CompetitionSchedule {
  /** MoE layers of the model. */
  readonly layers: number;
  /** Share of the steps after warm-up in which a layer competes, 0..1; default 0.05. */
  readonly rate?: number;
  /** Share of all steps before the first competition, 0..1; default 0.05. */
  readonly warmUp?: number;
  /** Layers that may compete in one step; default 3. */
  readonly most?: number;
  /** A whole number; default 0. */
  readonly seed?: number;
}

/**
 * The layers that compete at each of `steps` steps, ascending. Every layer draws its steps by itself, one layer after
 * the other; a step that is full sends the later layer to the nearest earlier step with room, else to the nearest later
 * one. A pure function of its options.
 */
export function competitionSteps(
  options: CompetitionSchedule & { readonly steps: number },
): readonly (readonly number[])[] {
  const { layers, rate = 0.05, warmUp = 0.05, most = 3, seed = 0, steps } = options;
  const share = (name: string, value: number): void => {
    if (!(value >= 0 && value <= 1)) throw new ShapeError(`competitionSteps: ${name} = ${value}; expected 0 to 1`);
  };
  share("rate", rate);
  share("warmUp", warmUp);
  for (const [name, value] of Object.entries({ layers, most, steps })) {
    if (!Number.isInteger(value) || value < 0) {
      throw new ShapeError(`competitionSteps: ${name} = ${value}; expected a whole number from 0`);
    }
  }
  if (!Number.isInteger(seed)) throw new ShapeError(`competitionSteps: seed = ${seed}; expected a whole number`);
  const start = Math.floor(warmUp * steps);
  const table: number[][] = Array.from({ length: steps }, () => []);
  let room = most * (steps - start); // places left
  for (let layer = 0; layer < layers && room > 0; layer++) {
    const free = (step: number): boolean => {
      const own = table[step];
      return own !== undefined && own.length < most && own.at(-1) !== layer;
    };
    for (let step = start; step < steps && room > 0; step++) {
      if (hashKey(step - start, 1, { seed, layer }) / 2 ** 32 >= rate) continue;
      let to = step;
      while (to >= start && !free(to)) to--;
      if (to < start) for (to = step + 1; to < steps && !free(to); ) to++;
      if (to >= steps) break; // no step has room for this layer
      table[to]?.push(layer);
      room--;
    }
  }
  return table;
}

/**
 * Tells the layers of `competeSMoE` when to compete. It needs to know how long training is: the trainer's totalSteps,
 * or `steps`; without either `beforeStep` throws UnsupportedError. There is no state: a resumed run goes on with the
 * same table. In steps beyond the table nothing competes.
 *
 * @example trainer(engine, task, { optimiser, totalSteps: 1000, hooks: [competeSMoESchedule({ layers: 4 })] })
 */
export function competeSMoESchedule(options: CompetitionSchedule & { readonly steps?: number }): TrainingHook {
  competitionSteps({ ...options, steps: 0 }); // checks the options
  let made: { readonly steps: number; readonly table: readonly (readonly number[])[] } | undefined;
  return {
    name: "competeSMoE",
    beforeStep({ step, totalSteps }) {
      const steps = options.steps ?? totalSteps;
      if (steps === undefined) {
        throw new UnsupportedError(
          "competeSMoESchedule: how many steps there are is not known; give the trainer totalSteps, or the hook steps",
        );
      }
      // The table follows from the options and the number of steps alone.
      if (made?.steps !== steps) made = { steps, table: competitionSteps({ ...options, steps }) };
      return Object.fromEntries((made.table[step] ?? []).map((layer) => [keyOf(layer), true]));
    },
  };
}

export const card: RouterCard = {
  name: "competeSMoE",
  title: "CompeteSMoE: a router taught by competitions of all experts, v2 and v1",
  paper: "2505.13380",
  equations: "competition, router, diversity and balance losses and schedule, as in the released code; v1: 2402.02526",
  needs: ["everyExpert"],
  causal: "yes",
  plans: ["sparse"],
  params: "weight [experts, width]",
  cost: "one product experts x width; a competition runs every expert on every token",
  claim: "better than SMoE, X-MoE and shared experts in language and vision-language models at little more cost",
  ourChoices: [
    "the diversity is a mean over pairs of different experts; the released code divides by k²",
    "v1 has v2's schedule and balance loss, and no diversity",
    "an overfull step sends a layer to another one; where no step has room for the layer, that competition is dropped",
    "without the hook competeSMoESchedule nothing competes",
    "ties go to the lower expert",
  ],
};
