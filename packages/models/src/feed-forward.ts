// The gated feed-forward experts of a decoder, for routed, shared and dense layers alike: every activation of a blueprint, with
// biases or without, over weights in any form in which they are held. Core's `glu` wherever that is what they are.
import {
  add,
  cast,
  gelu,
  groupedMatmul,
  hostConstant,
  isTensor,
  maximum,
  minimum,
  mul,
  relu,
  reshape,
  ShapeError,
  sigmoid,
  silu,
  slice,
  swiglu,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import { type Experts, glu } from "@switchyard/core/moe";
import type { GateActivation } from "./blueprint.ts";
import { groupedProduct } from "./stored-matrix.ts";
import { branch, leaf } from "./tree.ts";

export interface ExpertSetOptions {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width inside each expert. */
  readonly hidden: number;
  readonly activation: GateActivation;
  readonly bias: boolean;
  /**
   * `gateUp [count, 2 hidden, width]` (gate rows, then up rows) and `down [count, width, hidden]` in any form of
   * stored-matrix.ts; with `bias` the tensors `gateUpBias [count, 2 hidden]` and `downBias [count, width]`.
   */
  readonly params: Tree;
}

/**
 * Experts y = down (act(gate x) * up x), as a blueprint describes them. Only those that are core's `glu` (floats, no bias, a plain
 * activation) can be merged, and run as one op. Throws ShapeError for parameters that are missing or, as far as they are floats, of
 * another shape.
 */
export function expertSet({ count, width, hidden, activation, bias, params }: ExpertSetOptions): Experts {
  const shapes: Readonly<Record<string, readonly number[]>> = {
    gateUp: [count, 2 * hidden, width],
    down: [count, width, hidden],
    ...(bias ? { gateUpBias: [count, 2 * hidden], downBias: [count, width] } : {}),
  };
  const floats = Object.entries(shapes).filter(([name, shape]) => {
    const found = branch(params, name);
    if (isTensor(found) && found.shape.join() !== shape.join()) {
      throw new ShapeError(`experts: parameter "${name}" is [${found.shape}], expected [${shape}]`);
    }
    return isTensor(found);
  });
  if (typeof activation === "string" && !bias && floats.length === 2) {
    return glu({ count, width, hidden, activation, params });
  }
  return {
    count,
    params,
    apply(given, rows, ends, _, observe) {
      const matrix = (name: "gateUp" | "down", x: Tensor): Tensor => {
        observe?.(name, x, ends);
        const y = groupedProduct(given, name, x, ends);
        return bias ? add(y, biasRows(leaf(given, `${name}Bias`), x, ends)) : y;
      };
      const both = matrix("gateUp", rows); // [n, 2 hidden]
      return { output: matrix("down", gated(both, hidden, activation)) };
    },
  };
}

/** Gate and up side by side, `[n, 2 hidden]`, to what goes down, `[n, hidden]`. */
function gated(both: Tensor, hidden: number, activation: GateActivation): Tensor {
  if (activation === "silu") return swiglu(both);
  const n = both.shape[0] ?? 0;
  const [gate, up] = [slice(both, [0, 0], [n, hidden]), slice(both, [0, hidden], [n, hidden])];
  if (typeof activation === "string") return mul(activations[activation](gate), up);
  const { limit, alpha } = activation;
  const low = minimum(gate, limit); // from above only
  return mul(add(minimum(maximum(up, -limit), limit), 1), mul(low, sigmoid(mul(low, alpha))));
}

const activations: { readonly [A in Extract<GateActivation, string>]: (x: Tensor) => Tensor } = {
  silu,
  gelu: (x) => gelu(x),
  "gelu-tanh": (x) => gelu(x, { approximate: "tanh" }),
  relu,
};

/** The bias `[experts, out]` of each row's expert, zero behind the last block: a grouped product with a column of ones. */
function biasRows(bias: Tensor, rows: Tensor, ends: Tensor): Tensor {
  const n = rows.shape[0] ?? 0;
  const ones = hostConstant(rows, new Float32Array(n).fill(1), [n, 1]);
  return groupedMatmul(ones, reshape(cast(bias, "f32"), [...bias.shape, 1]), ends); // [n, out]
}
