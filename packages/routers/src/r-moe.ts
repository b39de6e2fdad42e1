// RMoE, the layerwise recurrent router (2408.06793): what a layer decides about a token depends on what the layers before
// it decided, through a recurrent cell that all layers share. Per token, never along the sequence.
//   z = W1_l x;  h_l = GRU(z, h_{l-1}), h_0 = 0;  logits = W2_l h_l;  softmax, top k, divided by their sum
//   GRU: r = σ(W_ir z + b_ir + W_hr h + b_hr); u likewise; n = tanh(W_in z + b_in + r ⊙ (W_hn h + b_hn));
//        h' = (1 - u) ⊙ n + u ⊙ h                       rnn instead: h' = tanh(W_i z + W_h h + b)
import {
  add,
  affine,
  div,
  gatherLast,
  hostConstant,
  isTensor,
  linear,
  mul,
  ShapeError,
  sigmoid,
  slice,
  softmax,
  sumLast,
  type Tensor,
  type Tree,
  tanh,
  topkIndices,
} from "@switchyard/core";
import { maskPlan, type Routed, type RouterContext, type RouterInput, type RouterPlugin } from "@switchyard/core/moe";
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

export interface RMoEOptions {
  /** Experts per token; default 2. */
  readonly k?: number;
  /** p: numbers in the state; default 256. */
  readonly size?: number;
  /** Default "gru". */
  readonly cell?: "gru" | "rnn";
  /**
   * Divides the weights of the chosen experts by their sum; default true. With k = 1 every weight is then 1, and the
   * router learns from its losses alone.
   */
  readonly renormalize?: boolean;
  /** Weight of the balance loss, E Σ f P with the f summing to k; default 0.001. */
  readonly balance?: number;
  /** Weight of the z-loss (2202.08906); default 0. */
  readonly zLoss?: number;
}

/**
 * Top-k on the state of a recurrent cell that passes from layer to layer. Params: `projection [size, width]`, `weight
 * [experts, size]`, and `cell`, the same tensors in every layer of a model (`context.shared`), which the trainer and
 * checkpoints take as one: `input` and `hidden [3 size, size]` in the order r, u, n, `inputBias` and `hiddenBias
 * [3 size]`; of "rnn" `input` and `hidden [size, size]`, `bias [size]`. Carry: `state [tokens, size]`, with its gradient.
 *
 * `init` throws ShapeError when k is not in 1..experts; `route` for a state of another size.
 *
 * @example rMoE({ k: 2, size: 64 })
 */
export function rMoE(options: RMoEOptions = {}): RouterPlugin {
  const { k = 2, size = 256, cell = "gru", renormalize = true, balance = 0.001, zLoss = 0 } = options;
  checkNotNegative("rMoE", { balance, zLoss });
  checkWord("rMoE", "cell", cell, ["gru", "rnn"]);
  if (!Number.isInteger(size) || size < 1) {
    throw new ShapeError(`rMoE: size = ${size}; expected a whole number from 1`);
  }

  const route = (params: Tree, input: RouterInput): Routed => {
    const z = linear(input.hidden, leaf(params, "projection")); // [tokens, size]
    const own = branch(params, "cell");
    const state = (cell === "gru" ? gru : rnn)(own, z, earlier(input, size));
    const logits = linear(state, leaf(params, "weight")); // [tokens, experts]
    const probabilities = softmax(logits);
    const experts = topkIndices(logits, k); // [tokens, k]
    const chosen = gatherLast(probabilities, experts);
    const plan = { kind: "sparse", experts, weights: renormalize ? div(chosen, sumLast(chosen)) : chosen } as const;
    const { mask } = maskOf(input);
    return {
      plan: mask ? maskPlan(plan, mask) : plan,
      logits,
      probabilities,
      losses: usualLosses(input, { logits, probabilities, experts, balance, zLoss }),
      carry: { state },
    };
  };

  return {
    name: "rMoE",
    causal: { training: true, evaluation: true },
    needs: ["carry"],
    plans: ["sparse"],
    gives: ["logits", "probabilities", "choices"],
    options: { k, size, cell, renormalize, balance, zLoss },
    expertsPerToken: k,
    init(context) {
      const { experts, width } = context;
      checkK("rMoE", k, experts);
      const shared = context.shared(`rMoE ${cell} ${size}`, () => newCell(context, cell, size));
      return {
        params: {
          projection: normalTensor(context, "projection", [size, width], 0.02),
          weight: normalTensor(context, "weight", [experts, size], 0.02),
          cell: shared,
        },
        buffers: {},
        route,
      };
    },
  };
}

/** U(-1/√size, 1/√size), as torch.nn.GRU starts. */
function newCell(
  { engine, random }: RouterContext,
  cell: "gru" | "rnn",
  size: number,
): Readonly<Record<string, Tensor>> {
  const uniform = (name: string, shape: readonly number[]): Tensor => {
    const draws = random.at("cell", name).host(
      "uniform",
      shape.reduce((n, d) => n * d, 1),
    );
    const bound = 1 / Math.sqrt(size);
    return engine.tensor(
      draws.map((u) => (2 * u - 1) * bound),
      shape,
    );
  };
  const rows = cell === "gru" ? 3 * size : size;
  const matrices = { input: uniform("input", [rows, size]), hidden: uniform("hidden", [rows, size]) };
  if (cell === "rnn") return { ...matrices, bias: uniform("bias", [rows]) };
  return { ...matrices, inputBias: uniform("inputBias", [rows]), hiddenBias: uniform("hiddenBias", [rows]) };
}

/** The state of the layer before; zeros in the first one. */
function earlier({ hidden, carry }: RouterInput, size: number): Tensor {
  const [tokens = 0] = hidden.shape;
  if (carry === undefined) return hostConstant(hidden, new Float64Array(tokens * size), [tokens, size]);
  const state = isTensor(carry) ? undefined : Object.entries(carry).find(([key]) => key === "state")?.[1];
  if (!state || !isTensor(state) || state.shape[0] !== tokens || state.shape[1] !== size) {
    const found = state && isTensor(state) ? `a state of [${state.shape}]` : "no state";
    throw new ShapeError(
      `rMoE: the layer before handed on ${found}, expected [${tokens}, ${size}]; every layer of the ` +
        "model must use the same router on the same tokens",
    );
  }
  return state;
}

function gru(cell: Tree, z: Tensor, h: Tensor): Tensor {
  const given = linear(z, leaf(cell, "input"), leaf(cell, "inputBias")); // [tokens, 3 size]
  const kept = linear(h, leaf(cell, "hidden"), leaf(cell, "hiddenBias"));
  const [tokens = 0, size = 0] = h.shape;
  const part = (x: Tensor, i: number): Tensor => slice(x, [0, i * size], [tokens, size]);
  const reset = sigmoid(add(part(given, 0), part(kept, 0)));
  const update = sigmoid(add(part(given, 1), part(kept, 1)));
  const fresh = tanh(add(part(given, 2), mul(reset, part(kept, 2))));
  return add(mul(affine(update, { scale: -1, shift: 1 }), fresh), mul(update, h));
}

const rnn = (cell: Tree, z: Tensor, h: Tensor): Tensor =>
  tanh(add(linear(z, leaf(cell, "input")), linear(h, leaf(cell, "hidden"), leaf(cell, "bias"))));

function branch(tree: Tree, name: string): Tree {
  const found = isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
  if (found === undefined) throw new ShapeError(`rMoE: the parameters lack "${name}"; pass the tree that init() made`);
  return found;
}

export const card: RouterCard = {
  name: "rMoE",
  title: "RMoE: a recurrent router across layers",
  paper: "2408.06793",
  equations: "the GRU between layers, as in the released code",
  needs: ["carry"],
  causal: "yes",
  plans: ["sparse"],
  params: "projection [p, width], weight [experts, p]; in the whole model once: the GRU, 6 p² + 6 p",
  cost: "products p x width, 6 p x p and experts x p",
  claim: "consistently better than a range of routers at equal compute, with more diverse experts",
  ourChoices: [
    "the balance loss is taken layer by layer, not over the tokens of all layers at once",
    "projection and weight start from N(0, 0.02), the cell from U(-1/√p, 1/√p)",
    "the first layer gets a state of zeros",
  ],
};
