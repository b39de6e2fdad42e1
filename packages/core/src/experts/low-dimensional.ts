// Experts that see a few numbers of each token (2505.24205, suggestion 3 after its theorems on low-dimensional manifolds):
//   y = f_e(Enc x), Enc: R^width -> R^low shared or one per expert; f_e(z) = W2 act(W1 z)
//   L = weight mean ||Dec(Enc x) - x||²: the few numbers shall tell where the token lies
// #Enc + O(low²) parameters per expert instead of O(width²).
import { ShapeError } from "../errors.ts";
import type { Activation, Initial } from "../moe/experts.ts";
import { activations } from "../moe/parts.ts";
import type { Experts, Observe } from "../moe/plan.ts";
import { cast, div, less, maximum, mul, square, sub } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import { linear } from "../ops/matmul.ts";
import { sum } from "../ops/reduce.ts";
import { hostConstant, reshape, slice } from "../ops/shape.ts";
import { sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { checkSizes, groupedLinear, leafAt, mixOwn, parameters, type Shapes } from "./parts.ts";

export type LowDimensionalOptions = {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** d: numbers that the encoder keeps of a token. */
  readonly low: number;
  /** Width inside each expert's two-layer network. */
  readonly hidden: number;
  /**
   * Width of what a network gives. Absent: it gives `low` numbers, and the decoder makes `width` of them, so that no
   * matrix beside encoder and decoder grows with the width.
   */
  readonly out?: number;
  /** Encoder and decoder for all experts ("shared", the default) or each its own. */
  readonly encoder?: "shared" | "own";
  /** Default relu. */
  readonly activation?: Activation;
  /** Adds `upBias [count, hidden]` and `downBias [count, low or out]`; default true, as the theorems need offsets. */
  readonly bias?: boolean;
  /** Weight of the reconstruction loss; 0 leaves it out. Default 0.1 (the paper names none). */
  readonly reconstruction?: number;
} & Initial;

/**
 * Experts of few parameters for tokens that lie near a manifold of few dimensions. Params: `encoder [low, width]` and
 * `decoder [width, low]` under `shared`, or `[count, ...]` each; `up [count, hidden, low]`, `down [count, low or out,
 * hidden]`, biases. There is no decoder where `out` is given and `reconstruction` is 0. `apply` gives the loss
 * `reconstruction`, the mean over its filled rows of the squared error summed over the width; a token with k experts
 * counts k times. It is computed in evaluation too: the same experts made with `reconstruction: 0` leave it out.
 * Throws ShapeError for impossible sizes and for given parameters of other shapes.
 */
export function lowDimensional(options: LowDimensionalOptions): Experts {
  const { count, width, low, hidden, out, encoder = "shared", bias = true, reconstruction = 0.1 } = options;
  const act = activations[options.activation ?? "relu"];
  checkSizes("lowDimensional", { count, width, low, hidden, out: out ?? width });
  if (low > width) throw new ShapeError(`lowDimensional: low = ${low} of width ${width}; expected at most the width`);
  if (!(reconstruction >= 0) || !Number.isFinite(reconstruction))
    throw new ShapeError(`lowDimensional: reconstruction = ${reconstruction}; expected a finite number from 0`);
  if (encoder !== "shared" && encoder !== "own")
    throw new ShapeError(`lowDimensional: encoder = "${encoder}"; expected "shared" or "own"`);

  const shared = encoder === "shared";
  const prefix = shared ? "shared." : "";
  const per = shared ? [] : [count];
  const decodes = out === undefined || reconstruction > 0;
  const shapes: Shapes = {
    [`${prefix}encoder`]: [...per, low, width],
    ...(decodes ? { [`${prefix}decoder`]: [...per, width, low] } : {}),
    up: [count, hidden, low],
    down: [count, out ?? low, hidden],
    ...(bias ? { upBias: [count, hidden], downBias: [count, out ?? low] } : {}),
  };

  const stages = (params: Tree, ends: Tensor, observe?: Observe) => {
    const coder = (name: "encoder" | "decoder") => (x: Tensor) => {
      const path = `${prefix}${name}`;
      observe?.(path, x, ends);
      return shared ? linear(x, leafAt(params, path)) : groupedMatmul(x, leafAt(params, path), ends);
    };
    const layer = (name: "up" | "down", x: Tensor): Tensor => {
      observe?.(name, x, ends);
      return groupedLinear(x, leafAt(params, name), ends, bias ? leafAt(params, `${name}Bias`) : undefined);
    };
    const [encode, decode] = [coder("encoder"), coder("decoder")];
    const network = (code: Tensor): Tensor => {
      const y = layer("down", act(layer("up", code))); // [n, low] or [n, out]
      return out === undefined ? decode(y) : y;
    };
    return { encode, decode, network };
  };

  return {
    count,
    params: parameters("lowDimensional", shapes, options, (path, shape, random) => {
      if (path.endsWith("Bias")) return undefined;
      const draws = random.host("normal", sizeOf(shape));
      return draws.map((z) => z / Math.sqrt(shape.at(-1) ?? 1));
    }),
    apply(params, rows, ends, _, observe) {
      const { encode, decode, network } = stages(params, ends, observe);
      const code = encode(rows); // [n, low]
      const output = network(code); // [n, out]
      if (reconstruction === 0) return { output };
      const value = meanError(decode(code), rows, ends);
      return { output, losses: { reconstruction: { value, weight: reconstruction } } };
    },
    mixed: (params, hiddens, plan) =>
      mixOwn(params, hiddens, plan, (mixture, rows, ends) => {
        const { encode, network } = stages(mixture, ends);
        return network(encode(rows));
      }),
  };
}

/** Squared error of each row, summed over the width, mean over the rows that an expert has; 0 where there are none. */
function meanError(found: Tensor, rows: Tensor, ends: Tensor): Tensor {
  const [n = 0] = rows.shape;
  const last = slice(ends, [(ends.shape[0] ?? 1) - 1], [1]);
  const places = hostConstant(
    rows,
    Int32Array.from({ length: n }, (_, i) => i),
    [n],
  );
  const filled = reshape(cast(less(places, last), "f32"), [n, 1]);
  const total = sum(mul(square(sub(found, rows)), filled));
  return div(total, maximum(reshape(cast(last, "f32"), []), 1));
}
