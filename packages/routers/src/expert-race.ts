// Expert Race (2503.16057): all pairs of token and expert compete for the best tokens * k places, so that hard tokens get
// more experts. Logits S = gate(z) in R^{B x L x E}; a strategy splits S into groups, and each group keeps its best:
//   token (b,l): k of E;  expert (b,e): kL/E of L;  bl (e): kBL/E of BL;  be (l): kB of BE;  le (b): kL of LE;  race: kBL of all
//   y_t = Σ_{e chosen} G(S)_te E_e(x_t), G = identity (the paper's choice), sigmoid or softmax              section 3.1
//   threshold tau ← m tau + (1 - m) K-th largest S of the step; in inference a pair is chosen when S >= tau  section 3.2
//   router z = gelu(W1 x + b1), S = Wg z + bg; per-layer regularisation: mean |Wt z + bt - target|²          section 3.3
//   router similarity loss (1/T) Σ W_ij (PᵀP)_ij, P = softmax(S)                                              section 3.4
import {
  add,
  gelu,
  hostConstant,
  less,
  linear,
  maximum,
  mean,
  mul,
  reshape,
  ShapeError,
  sigmoid,
  softmax,
  square,
  sub,
  sum,
  type Tensor,
  type Tree,
  UnsupportedError,
  where,
} from "@switchyard/core";
import {
  type Loss,
  maskPlan,
  meanOverTokens,
  type Routed,
  type Router,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
  routerSimilarity,
  type StepStatistics,
  switchBalance,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  loadPerToken,
  maskOf,
  normalTensor,
  type RouterCard,
} from "./parts.ts";
import { compete, type RaceResult, type RaceStrategy, strategies } from "./race-parts.ts";

export { compete, type RaceResult, type RaceRules, type RaceStrategy } from "./race-parts.ts";

export interface ExpertRaceOptions {
  /** Experts per token, on average over a group. */
  readonly k: number;
  /** Default "race". */
  readonly strategy?: RaceStrategy;
  /** The weight of a chosen expert: its logit, which may be negative, or the sigmoid or softmax of it. Default "identity". */
  readonly gate?: "identity" | "sigmoid" | "softmax";
  /** What competes: the gates or the logits; differs for softmax only. Default "gates". */
  readonly compare?: "gates" | "logits";
  /**
   * How experts are chosen in training: by competing with the other tokens of the batch, later ones included, or by the
   * threshold, which is causal and keeps the budget only as well as the last steps predict it. Language models need
   * "threshold". Default "compete".
   */
  readonly training?: "compete" | "threshold";
  /** The same in evaluation; default "threshold". */
  readonly evaluation?: "compete" | "threshold";
  /** How much of the threshold stays after a step, 0..1; default 0.99. */
  readonly momentum?: number;
  /** Where the threshold starts; default: at that of the first step, before which every token takes its k best. */
  readonly tau?: number;
  /** A group whose places are no whole number is refused, or gets the whole part. Default "refuse". */
  readonly uneven?: "refuse" | "floor";
  /** The paper's router of two layers, or a single product. Default "mlp". */
  readonly router?: "mlp" | "linear";
  /** Numbers per token of the training target that each layer learns to predict (16 in the paper); default 0: it does not. */
  readonly target?: number;
  /** Weight of that prediction's loss, as a mean over the layers; default 0.01. */
  readonly perLayer?: number;
  /** Weight of the router similarity loss; default 0.0001. */
  readonly similarity?: number;
  /** Weight of a balance loss, E Σ f P with the f summing to 1, which the paper compares with; default 0. */
  readonly balance?: number;
}

/**
 * Tokens and experts are paired by a race instead of token by token: from none to all experts for a token, about k on
 * average. In the usual form it looks ahead in training and is causal in evaluation; with `training: "threshold"` it is
 * causal in both. Params: `weight [experts, width]`, `bias [experts]`, for the "mlp" router `hidden [width, width]` and
 * `hiddenBias [width]`, with `target` also `target [target, width]` and `targetBias [target]`. Buffers, unless tokens
 * choose: `tau`, [] or, where experts choose ("expert", "bl"), [experts], and `known` [], 1 once tau means something. With
 * `target` the training target `[tokens, target]` must be given, and score and select do not come apart.
 *
 * `init` throws ShapeError when k is not in 1..experts, `route` for uneven groups, and UnsupportedError for tokens that
 * would have to compete while decoding with a cache.
 *
 * @example expertRace({ k: 2 })
 * @example expertRace({ k: 2, training: "threshold" })
 */
export function expertRace(options: ExpertRaceOptions): RouterPlugin {
  const complete = completed(options);
  const { k, strategy, training, evaluation, tau, target } = complete;
  const races = strategy !== "token";
  return {
    name: "expertRace",
    causal: {
      training: !races || training === "threshold",
      evaluation: !races || evaluation === "threshold",
    },
    needs: target > 0 ? ["target"] : [],
    plans: ["sparse"],
    gives: target > 0 ? ["logits", "probabilities"] : ["scores", "logits", "probabilities"],
    options: { ...complete, tau: tau ?? null },
    expertsPerToken: k,
    init: (context) => makeRouter(complete, context),
  };
}

type Complete = Required<Omit<ExpertRaceOptions, "tau">> & Pick<ExpertRaceOptions, "tau">;

function completed({
  k,
  strategy = "race",
  gate = "identity",
  compare = "gates",
  training = "compete",
  evaluation = "threshold",
  momentum = 0.99,
  tau,
  uneven = "refuse",
  router = "mlp",
  target = 0,
  perLayer = 0.01,
  similarity = 0.0001,
  balance = 0,
}: ExpertRaceOptions): Complete {
  const name = "expertRace";
  checkNotNegative(name, { target, perLayer, similarity, balance });
  checkWord(name, "strategy", strategy, strategies);
  checkWord(name, "gate", gate, ["identity", "sigmoid", "softmax"]);
  checkWord(name, "compare", compare, ["gates", "logits"]);
  checkWord(name, "training", training, ["compete", "threshold"]);
  checkWord(name, "evaluation", evaluation, ["compete", "threshold"]);
  checkWord(name, "uneven", uneven, ["refuse", "floor"]);
  checkWord(name, "router", router, ["mlp", "linear"]);
  if (!(momentum >= 0 && momentum <= 1)) throw new ShapeError(`${name}: momentum = ${momentum}; expected 0 to 1`);
  if (tau !== undefined && !Number.isFinite(tau))
    throw new ShapeError(`${name}: tau = ${tau}; expected a finite number`);
  if (!Number.isInteger(target)) throw new ShapeError(`${name}: target = ${target}; expected a whole number from 0`);
  const own = { k, strategy, gate, compare, training, evaluation, momentum, uneven, router, target };
  return { ...own, perLayer, similarity, balance, ...(tau === undefined ? {} : { tau }) };
}

function makeRouter(options: Complete, context: RouterContext): Router {
  const { k, strategy, momentum, target } = options;
  const { engine, experts, layer } = context;
  checkK("expertRace", k, experts);
  const buffers = strategy === "token" ? {} : firstBuffers(options, context);

  const select = (logits: Tensor, input: RouterInput): Routed => decide(logits, input, options);
  const score = (params: Tree, { hidden }: RouterInput): Tensor => raceHeads(params, hidden, options).logits;

  return {
    params: firstParams(options, context),
    buffers,
    ...(target > 0 ? {} : { score, select }),
    route(params, input) {
      const { logits, prediction } = raceHeads(params, input.hidden, options);
      const routed = select(logits, input);
      if (prediction === undefined || !input.training) return routed;
      const perLayer = { value: targetError(prediction, input), weight: options.perLayer / input.layers };
      return { ...routed, losses: { ...routed.losses, perLayer } };
    },
    ...(strategy === "token"
      ? {}
      : { afterStep: (layers, own) => engine.scope(() => nextBuffers(statisticsOf(layers, layer), own, momentum)) }),
  };
}

/**
 * What the router's network says of `hidden [tokens, width]`: `logits [tokens, experts]` and, where it learns the training
 * target, its `prediction [tokens, target]` of it (section 3.4), both from one hidden state.
 */
export function raceHeads(
  params: Tree,
  hidden: Tensor,
  { router, target }: { readonly router: "mlp" | "linear"; readonly target: number },
): { readonly logits: Tensor; readonly prediction?: Tensor } {
  const z = router === "linear" ? hidden : gelu(linear(hidden, leaf(params, "hidden"), leaf(params, "hiddenBias"))); // [tokens, width]
  const logits = linear(z, leaf(params, "weight"), leaf(params, "bias"));
  return target === 0
    ? { logits }
    : { logits, prediction: linear(z, leaf(params, "target"), leaf(params, "targetBias")) };
}

function firstParams({ router, target }: Complete, context: RouterContext): Tree {
  const { engine, experts, width } = context;
  const zeros = (n: number): Tensor => engine.tensor(new Float32Array(n), [n]);
  const matrix = (name: string, rows: number): Tensor =>
    normalTensor(context, name, [rows, width], 1 / Math.sqrt(width));
  return {
    weight: matrix("weight", experts),
    bias: zeros(experts),
    ...(router === "mlp" ? { hidden: matrix("hidden", width), hiddenBias: zeros(width) } : {}),
    ...(target > 0 ? { target: matrix("target", target), targetBias: zeros(target) } : {}),
  };
}

// ---------------------------------------------------------------- the decision
function decide(logits: Tensor, input: RouterInput, options: Complete): Routed {
  const { k, strategy, gate, compare, similarity, balance } = options;
  const { training } = input;
  const [, experts = 0] = logits.shape;
  const { mask } = maskOf(input);
  const masked = mask ? { mask } : {};
  const probabilities = softmax(logits);
  const gates = { identity: logits, sigmoid: sigmoid(logits), softmax: probabilities }[gate]; // [tokens, experts]
  const scores = compare === "gates" ? gates : logits;

  const byThreshold = strategy !== "token" && (training ? options.training : options.evaluation) === "threshold";
  const race = byThreshold && !training ? undefined : compete(scores, input.layout, options);
  if (!byThreshold) checkDecoding(input, strategy);
  const chosen = byThreshold || race === undefined ? aboveThreshold(scores, input, k) : race.chosen; // [tokens, experts]
  const everyId = hostConstant(
    logits,
    Int32Array.from({ length: experts }, (_, e) => e),
    [1, experts],
  );
  const ids = where(chosen, everyId, -1);
  const plan = {
    kind: "sparse",
    experts: ids,
    weights: where(chosen, gates, 0),
    ...(race && !byThreshold ? { bound: race.groups * race.places } : {}),
  } as const;

  const losses: Record<string, Loss> = {};
  if (training && similarity !== 0) {
    losses.similarity = { value: routerSimilarity({ logits, assigned: chosen, ...masked }), weight: similarity };
  }
  if (training && balance !== 0) {
    const load = mul(input.globalLoad ?? loadPerToken(ids, experts, mask), 1 / k);
    losses.balance = { value: switchBalance({ probabilities, experts: ids, load, ...masked }), weight: balance };
  }
  return {
    plan: mask ? maskPlan(plan, mask) : plan,
    logits,
    probabilities,
    losses,
    ...(training && race && strategy !== "token" ? { metrics: raceMetrics(race, strategy, experts) } : {}),
  };
}

/** Pairs that reach the threshold, [tokens, experts]; while none is known, each token's k best. */
function aboveThreshold(scores: Tensor, { buffers, layout }: RouterInput, k: number): Tensor {
  const reached = where(less(scores, leaf(buffers, "tau")), 0, hostConstant(scores, Float32Array.of(1), []));
  const best = compete(scores, layout, { strategy: "token", k, uneven: "refuse" }).chosen;
  return where(leaf(buffers, "known"), reached, best);
}

function checkDecoding({ layout: { past, batch, sequence } }: RouterInput, strategy: RaceStrategy): void {
  if (past === 0 || strategy === "token") return;
  throw new UnsupportedError(
    `expertRace: asked to route ${batch * sequence} new tokens after ${past} cached ones by strategy "${strategy}", in which ` +
      'tokens compete with later ones; decode without a cache, or by "threshold"',
  );
}

/** Mean squared error of the prediction over real tokens and numbers, []. */
function targetError(predicted: Tensor, input: RouterInput): Tensor {
  const { target } = input;
  if (target === undefined || target.shape.join() !== predicted.shape.join()) {
    throw new UnsupportedError(
      `expertRace: per-layer regularisation needs the training target [${predicted.shape.join(", ")}], found ` +
        `${target ? `[${target.shape.join(", ")}]` : "none"}; give it as input.target, or leave out the option target`,
    );
  }
  return mean(meanOverTokens(square(sub(predicted, target)), maskOf(input).mask));
}

// ---------------------------------------------------------------- the threshold
const perExpert = (strategy: RaceStrategy): boolean => strategy === "expert" || strategy === "bl";

/** `kth`: the lowest scores that won, summed over the groups that had a place, and `races`: how many had; as tau is shaped. */
function raceMetrics(
  { thresholds, present }: RaceResult,
  strategy: RaceStrategy,
  experts: number,
): Readonly<Record<string, Tensor>> {
  const summed = (x: Tensor): Tensor =>
    perExpert(strategy) ? sum(reshape(x, [x.size / experts, experts]), [0]) : sum(x);
  return { kth: summed(thresholds), races: summed(present) };
}

function firstBuffers({ strategy, tau }: Complete, { engine, experts }: RouterContext): Tree {
  const shape = perExpert(strategy) ? [experts] : [];
  return {
    tau: engine.tensor(new Float32Array(perExpert(strategy) ? experts : 1).fill(tau ?? 0), shape),
    known: engine.tensor(Float32Array.of(tau === undefined ? 0 : 1), []),
  };
}

function statisticsOf(layers: readonly StepStatistics[], layer: number): StepStatistics {
  const own = layers[layer];
  if (own) return own;
  throw new ShapeError(`expertRace: statistics of ${layers.length} layers for the router of layer ${layer}`);
}

/** tau ← m tau + (1 - m) mean K-th largest score, or that score itself the first time. */
function nextBuffers({ tokens, metrics }: StepStatistics, buffers: Tree, momentum: number): Tree {
  const { kth, races } = metrics;
  // A step of padding only, or of groups too small for a place, says nothing.
  if (tokens === 0 || !kth || !races || races.some((n) => n === 0)) return buffers;
  const [tau, known] = [leaf(buffers, "tau"), leaf(buffers, "known")];
  const mean = hostConstant(
    tau,
    kth.map((value, i) => value / (races[i] ?? 1)),
    tau.shape,
  );
  const stays = mul(known, momentum); // []
  return { tau: add(mul(tau, stays), mul(mean, sub(1, stays))), known: maximum(known, 1) };
}

export const card: RouterCard = {
  name: "expertRace",
  title: "Expert Race: tokens and experts compete, with five sibling strategies",
  paper: "2503.16057",
  equations: "sections 3.1 to 3.4",
  needs: [],
  causal: "evaluation",
  plans: ["sparse"],
  params: "weight [experts, width], bias [experts], hidden [width, width], hiddenBias [width]; buffers tau, known []",
  cost: "products width x width and experts x width; in training a sort of all scores",
  claim:
    "ImageNet-256 diffusion reaches the loss of a dense DiT-XL in 7.2 times fewer steps at equal compute per token",
  ourChoices: [
    'training: "threshold" trains by the moving threshold, which language models need',
    "before a threshold is known every token takes its k best; the first step sets it; momentum 0.99",
    "the other strategies have thresholds too, one per expert where experts choose",
    "weights of the similarity (1e-4) and per-layer (1e-2) losses; one is divided by the tokens, one by the layers",
    "padding takes no place; places left uneven by it are rounded down",
    "initial weights N(0, 1/width)",
  ],
};
