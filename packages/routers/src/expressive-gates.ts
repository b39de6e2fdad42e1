// The gates of the expressive-power paper (2505.24205): how scores depend on a token decides which regions of the input
// space a layer can give to its experts.
//   linear W x;  affine W x + b;  quadratic xᵀ A_e x + w_e x + b_e;  mlp W2 relu(W1 x + b1);  cosine <w_e, x> / (|w_e| |x|);
//   distance -|x - c_e|²;  interval c_e t - c_e²/2, c_e = e + 1/2 on one coordinate t;  circle <(cos a_e, sin a_e), x>
//   experts = top-k of the scores, weights = softmax over the selected scores (section 3.1; exactly 1 for k = 1)
// And the networks of its proofs: a ReLU interpolant as an expert, so that layers of E experts make E^L pieces (section 5).
import {
  add,
  div,
  type Engine,
  linear,
  mul,
  relu,
  reshape,
  ShapeError,
  softmax,
  softmaxTopk,
  sqrt,
  square,
  sub,
  sumLast,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import {
  type Experts,
  ffn,
  maskPlan,
  type Plan,
  type Routed,
  type RouterContext,
  type RouterInput,
  type RouterPlugin,
} from "@switchyard/core/moe";
import {
  checkK,
  checkNotNegative,
  checkWord,
  leaf,
  maskOf,
  normalTensor,
  type RouterCard,
  usualLosses,
} from "./parts.ts";

export type ExpressiveGate = "linear" | "affine" | "quadratic" | "mlp" | "cosine" | "distance" | "interval" | "circle";

export interface ExpressiveGatesOptions {
  /** Experts per token. */
  readonly k: number;
  /** Default "affine". "interval" and "circle" are fixed, not trained. */
  readonly gate?: ExpressiveGate;
  /** Neurons of the "mlp" gate; default 0, as many as the width. */
  readonly hidden?: number;
  /** The coordinate that the "interval" gate looks at; default 0. */
  readonly coordinate?: number;
  /** Factor of the scores, such as the sharpness of the cosine gate, which would else stay within ±1; default 1. */
  readonly scale?: number;
  /**
   * "selected": softmax over the selected scores, the paper's; with k = 1 the weight is always 1 and the gate does not
   * learn. "all": the selected part of the softmax over all scores (Switch). "anneal": in training every expert at the
   * softmax of the scores over a temperature that falls, and in evaluation "selected". Default "selected".
   */
  readonly weights?: "selected" | "all" | "anneal";
  /** Temperature of "anneal" at the first step; default 1. */
  readonly warm?: number;
  /** Temperature at the last step, reached in even ratios; default 0.1. Without a total number of steps it stays at `warm`. */
  readonly cold?: number;
  /** Weight of the balance loss, E Σ f P with the f summing to k, which the paper does not have; default 0. */
  readonly balance?: number;
  /** Weight of the router z-loss (2202.08906), which the paper does not have; default 0. */
  readonly zLoss?: number;
}

/**
 * Token choice with one of eight gates. Params by gate: `weight [experts, width]` for all but "distance", whose are
 * `centres [experts, width]`, and "mlp", whose are `hidden [n, width]`, `hiddenBias [n]` and `weight [experts, n]`; `bias
 * [experts]` for "affine" and "quadratic"; `form [experts, width, width]` for "quadratic". The fixed gates have buffers
 * `weight [experts, width]` and `bias [experts]` instead. `init` throws ShapeError when k is not in 1..experts, or a fixed
 * gate needs more coordinates than there are.
 *
 * @example expressiveGates({ k: 2, gate: "mlp" })
 */
export function expressiveGates(options: ExpressiveGatesOptions): RouterPlugin {
  const {
    k,
    gate = "affine",
    hidden = 0,
    coordinate = 0,
    scale = 1,
    weights = "selected",
    warm = 1,
    cold = 0.1,
    balance = 0,
    zLoss = 0,
  } = options;
  const name = "expressiveGates";
  checkWord(name, "gate", gate, Object.keys(gates));
  checkWord(name, "weights", weights, ["selected", "all", "anneal"]);
  checkNotNegative(name, { balance, zLoss });
  for (const [option, value] of Object.entries({ scale, warm, cold })) {
    if (!(value > 0) || !Number.isFinite(value)) {
      throw new ShapeError(`${name}: ${option} = ${value}; expected a number above 0`);
    }
  }
  for (const [option, value] of Object.entries({ hidden, coordinate })) {
    if (!Number.isInteger(value) || value < 0) {
      throw new ShapeError(`${name}: ${option} = ${value}; expected a whole number from 0`);
    }
  }

  const score = (params: Tree, { hidden: x, buffers }: RouterInput): Tensor => {
    const found = gates[gate].score(x, gates[gate].fixed ? buffers : params); // [tokens, experts]
    return scale === 1 ? found : mul(found, scale);
  };
  const select = (logits: Tensor, input: RouterInput): Routed => {
    const { mask } = maskOf(input);
    const order = weights === "all" ? "softmax-topk" : "topk-softmax";
    const { ids, weights: own, probabilities } = softmaxTopk(logits, { k, order });
    const annealed = weights === "anneal" && input.training;
    const plan: Plan = annealed
      ? { kind: "dense", weights: softmax(mul(logits, 1 / temperature(input, warm, cold))) }
      : { kind: "sparse", experts: ids, weights: own };
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts: ids, balance, zLoss }),
    };
  };

  return {
    name,
    causal: { training: true, evaluation: true },
    needs: [],
    plans: weights === "anneal" ? ["sparse", "dense"] : ["sparse"],
    gives: ["scores", "logits", "probabilities", ...(weights === "anneal" ? [] : (["choices"] as const))],
    options: { k, gate, hidden, coordinate, scale, weights, warm, cold, balance, zLoss },
    expertsPerToken: k,
    init(context) {
      checkK(name, k, context.experts);
      const made = gates[gate].init(context, { hidden: hidden || context.width, coordinate });
      const { fixed } = gates[gate];
      return {
        params: fixed ? {} : made,
        buffers: fixed ? made : {},
        score,
        select,
        route: (params, input) => select(score(params, input), input),
      };
    },
  };
}

/** From `warm` at the first step to `cold` at the last, geometrically. */
function temperature({ step, totalSteps }: RouterInput, warm: number, cold: number): number {
  if (totalSteps === undefined || totalSteps < 2) return warm;
  return warm * (cold / warm) ** Math.min(step / (totalSteps - 1), 1);
}

// ---------------------------------------------------------------- the gates
interface Gate {
  /** Whether its numbers are given rather than learned: buffers. */
  readonly fixed?: boolean;
  init(context: RouterContext, sizes: { readonly hidden: number; readonly coordinate: number }): Record<string, Tensor>;
  /** `x [tokens, width]` -> `[tokens, experts]`. */
  score(x: Tensor, params: Tree): Tensor;
}

const deviation = 0.02;
const weightOf = (context: RouterContext, columns = context.width): Tensor =>
  normalTensor(context, "weight", [context.experts, columns], deviation);
const zeros = ({ engine }: RouterContext, n: number): Tensor => engine.tensor(new Float32Array(n), [n]);

const affine: Gate = {
  init: (context) => ({ weight: weightOf(context), bias: zeros(context, context.experts) }),
  score: (x, params) => linear(x, leaf(params, "weight"), leaf(params, "bias")),
};
const fixed = (made: (context: RouterContext, coordinate: number) => GateNumbers): Gate => ({
  ...affine,
  fixed: true,
  init(context, { coordinate }) {
    const { engine, experts, width } = context;
    const { weight, bias } = made(context, coordinate);
    return { weight: engine.tensor(weight, [experts, width]), bias: engine.tensor(bias, [experts]) };
  },
});

const gates: Readonly<Record<ExpressiveGate, Gate>> = {
  linear: {
    init: (context) => ({ weight: weightOf(context) }),
    score: (x, params) => linear(x, leaf(params, "weight")),
  },
  affine,
  quadratic: {
    init(context) {
      const { experts, width } = context;
      const form = normalTensor(context, "form", [experts, width, width], deviation / Math.sqrt(width));
      return { form, ...affine.init(context, { hidden: 0, coordinate: 0 }) };
    },
    score(x, params) {
      const form = leaf(params, "form");
      const [experts = 0, width = 0] = form.shape;
      const tokens = x.shape[0] ?? 0;
      const forms = linear(x, reshape(form, [experts * width, width])); // [tokens, experts * width]
      const squares = mul(reshape(forms, [tokens, experts, width]), reshape(x, [tokens, 1, width]));
      return add(reshape(sumLast(squares), [tokens, experts]), affine.score(x, params));
    },
  },
  mlp: {
    init: (context, { hidden }) => ({
      hidden: normalTensor(context, "hidden", [hidden, context.width], 1 / Math.sqrt(context.width)),
      hiddenBias: zeros(context, hidden),
      weight: weightOf(context, hidden),
    }),
    score: (x, params) =>
      linear(relu(linear(x, leaf(params, "hidden"), leaf(params, "hiddenBias"))), leaf(params, "weight")),
  },
  cosine: {
    init: (context) => ({ weight: weightOf(context) }),
    score: (x, params) => linear(unit(x), unit(leaf(params, "weight"))),
  },
  distance: {
    // Centres lie among the tokens, which are of the scale 1 after a norm.
    init: (context) => ({ centres: normalTensor(context, "centres", [context.experts, context.width], 1) }),
    score(x, params) {
      const centres = leaf(params, "centres");
      const own = reshape(sumLast(square(centres)), [1, centres.shape[0] ?? 0]);
      return sub(sub(mul(linear(x, centres), 2), own), sumLast(square(x))); // 2 x·c - |c|² - |x|²
    },
  },
  interval: fixed(({ experts, width }, coordinate) => intervalGate({ experts, width, coordinate })),
  circle: fixed((sizes) => circleGate(sizes)),
};

/** Rows of length 1; a row of zeros stays. */
function unit(x: Tensor): Tensor {
  return div(x, sqrt(add(sumLast(square(x)), 1e-12)));
}

// ---------------------------------------------------------------- constructions
/** A gate W x + b on the host: `weight [experts, width]` row by row, `bias [experts]`. */
export interface GateNumbers {
  readonly weight: Float64Array;
  readonly bias: Float64Array;
}

/** Expert e is the best where coordinate t lies in [e, e + 1], of t in [0, experts]: c t - c²/2 with c = e + 1/2. */
export function intervalGate(sizes: {
  readonly experts: number;
  readonly width: number;
  readonly coordinate?: number;
}): GateNumbers {
  const { experts, width, coordinate = 0 } = sizes;
  if (coordinate >= width) {
    throw new ShapeError(`intervalGate: coordinate ${coordinate} of ${width}; expected 0 to ${width - 1}`);
  }
  const weight = new Float64Array(experts * width);
  for (let e = 0; e < experts; e++) weight[e * width + coordinate] = e + 0.5;
  return { weight, bias: Float64Array.from({ length: experts }, (_, e) => -((e + 0.5) ** 2) / 2) };
}

/** Expert e is the best in its sector of the plane of the first two coordinates, around the angle 2 pi e / experts. */
export function circleGate({ experts, width }: { readonly experts: number; readonly width: number }): GateNumbers {
  if (width < 2) throw new ShapeError(`circleGate: width ${width}; a circle needs 2 coordinates or more`);
  const weight = new Float64Array(experts * width);
  for (let e = 0; e < experts; e++) {
    const angle = (2 * Math.PI * e) / experts;
    weight[e * width] = Math.cos(angle);
    weight[e * width + 1] = Math.sin(angle);
  }
  return { weight, bias: new Float64Array(experts) };
}

/** f(from) + Σ_j slopes_j relu(z - knots_j). */
export interface Interpolant {
  readonly start: number;
  readonly knots: readonly number[];
  readonly slopes: readonly number[];
  /** Its value at z. */
  at(z: number): number;
}

/**
 * The piecewise linear interpolant of f on [from, to] with `neurons` pieces, as a ReLU network. It errs by at most
 * h² max|f''| / 8, h = (to - from) / neurons, and goes on straight beyond `to`, flat before `from`.
 */
export function reluInterpolant(
  f: (z: number) => number,
  { from, to, neurons }: { readonly from: number; readonly to: number; readonly neurons: number },
): Interpolant {
  if (!Number.isInteger(neurons) || neurons < 1 || !(to > from)) {
    throw new ShapeError(`reluInterpolant: ${neurons} neurons on [${from}, ${to}]; expected at least 1, and from < to`);
  }
  const step = (to - from) / neurons;
  const knots = Array.from({ length: neurons }, (_, j) => from + j * step);
  const steep = knots.map((z, j) => (f(j + 1 === neurons ? to : from + (j + 1) * step) - f(z)) / step);
  const slopes = steep.map((slope, j) => slope - (steep[j - 1] ?? 0));
  const start = f(from);
  const at = (z: number): number =>
    slopes.reduce((total, slope, j) => total + slope * Math.max(z - (knots[j] ?? 0), 0), start);
  return { start, knots, slopes, at };
}

/** One expert of a construction: it computes `f` of `direction · x` into a coordinate. */
export interface Piece extends Interpolant {
  /** `[width]`. */
  readonly direction: readonly number[];
}

/**
 * ReLU experts, each with the interpolant of its piece written to `coordinate` of the output. The other coordinates are
 * passed on, as relu(t) - relu(-t), or left at 0 when `keep` is false. All pieces must have as many neurons.
 */
export function interpolantExperts(
  engine: Engine,
  options: { readonly pieces: readonly Piece[]; readonly coordinate: number; readonly keep?: boolean },
): Experts {
  const { pieces, coordinate, keep = true } = options;
  const [width, neurons] = [pieces[0]?.direction.length ?? 0, pieces[0]?.knots.length ?? 0];
  if (pieces.some(({ direction, knots }) => direction.length !== width || knots.length !== neurons)) {
    throw new ShapeError(
      "interpolantExperts: pieces differ in width or neurons; an expert set has experts of one shape",
    );
  }
  const others = keep ? Array.from({ length: width }, (_, i) => i).filter((i) => i !== coordinate) : [];
  const [count, hidden] = [pieces.length, neurons + 2 * others.length];
  const up = new Float64Array(count * hidden * width);
  const upBias = new Float64Array(count * hidden);
  const down = new Float64Array(count * width * hidden);
  const downBias = new Float64Array(count * width);
  for (const [e, { direction, knots, slopes, start }] of pieces.entries()) {
    const place = (neuron: number, inputs: readonly number[], output: number, slope: number): void => {
      up.set(inputs, (e * hidden + neuron) * width);
      down[(e * width + output) * hidden + neuron] = slope;
    };
    for (const [j, slope] of slopes.entries()) {
      place(j, direction, coordinate, slope);
      upBias[e * hidden + j] = -(knots[j] ?? 0);
    }
    for (const [i, other] of others.entries()) {
      const axis = Array.from({ length: width }, (_, c) => Number(c === other));
      place(neurons + 2 * i, axis, other, 1);
      place(
        neurons + 2 * i + 1,
        axis.map((x) => -x),
        other,
        -1,
      );
    }
    downBias[e * width + coordinate] = start;
  }
  const params = {
    up: engine.tensor(up, [count, hidden, width]),
    upBias: engine.tensor(upBias, [count, hidden]),
    down: engine.tensor(down, [count, width, hidden]),
    downBias: engine.tensor(downBias, [count, width]),
  };
  return ffn({ count, width, hidden, bias: true, params });
}

export const card: RouterCard = {
  name: "expressiveGates",
  title: "Gates of the expressive-power paper: linear to quadratic, MLP, cosine, distance, interval, circle",
  paper: "2505.24205",
  equations: "section 3.1 (layer), sections 4 and 5 (constructions, nonlinear gating)",
  needs: [],
  causal: "yes",
  plans: ["sparse"],
  params: "by gate: weight [experts, width] and bias [experts] up to form [experts, width, width]",
  cost: "one product experts x width; quadratic experts width²; mlp width² more",
  claim:
    "shallow MoE escapes the curse of dimension on manifolds; L layers of E experts fit E^L pieces with L E experts",
  ourChoices: [
    "trained either softly with a falling temperature, or with the weights of the whole softmax: a single weight of 1 lets no gradient into the gate",
    "the temperature falls geometrically from 1 to 0.1",
    "initial weights N(0, 0.02²), centres N(0, 1)",
    "the factor of the scores, which a cosine needs to become decided, is fixed",
  ],
};
