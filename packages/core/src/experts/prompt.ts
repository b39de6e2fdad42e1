// Learned prompts beside a frozen attention (LLaMA-Adapter 2303.16199, equation 6; one of MoA's adapters, 2506.05928). Per head h, on queries:
//   y_h = tanh(g_eh) softmax(q_h K_ehᵀ / sqrt(d)) V_eh, K, V [length, d]; g starts at 0
import { ShapeError } from "../errors.ts";
import type { Initial } from "../moe/experts.ts";
import { biasRows } from "../moe/parts.ts";
import type { Experts, Observe } from "../moe/plan.ts";
import { mul, tanh } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import { softmax } from "../ops/normalise.ts";
import { concat, slice } from "../ops/shape.ts";
import { sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { checkSizes, leafAt, mixOwn, parameters } from "./parts.ts";

export type PromptOptions = {
  readonly count: number;
  /** Width of the queries, all heads together; also that of the output. */
  readonly width: number;
  readonly heads: number;
  /** Learned tokens; default 10. */
  readonly length?: number;
} & Initial;

/**
 * Prompts as experts whose rows are the queries of a frozen attention; their output is added to what that attention gives,
 * before its output projection. Params: `keys`, `values [count, length, width]` (new ones normal, variance 1 / width),
 * `gate [count, heads]` (zeros, so that the output starts at zero). A caller that learns prompt tokens and projects them by
 * the frozen Wk and Wv, as the paper does, hands `apply` the projected ones: parameters are an argument. `observe` is told
 * of the keys; what the values are multiplied with differs by head. `mixed` mixes each parameter.
 * Throws ShapeError where `heads` does not divide the width, and for given parameters of other shapes.
 */
export function prompt(options: PromptOptions): Experts {
  const { count, width, heads, length = 10 } = options;
  checkSizes("prompt", { count, width, heads, length });
  if (width % heads !== 0)
    throw new ShapeError(`prompt: ${heads} heads of width ${width}; expected a number that divides the width`);
  const d = width / heads;
  const shapes = { keys: [count, length, width], values: [count, length, width], gate: [count, heads] };

  const run = (params: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    observe?.("keys", rows, ends);
    const [keys, values] = [leafAt(params, "keys"), leafAt(params, "values")];
    const n = rows.shape[0] ?? 0;
    const groups = keys.shape[0] ?? 0;
    const gates = biasRows(tanh(leafAt(params, "gate")), ends, n); // [n, heads]
    const each = Array.from({ length: heads }, (_, h) => {
      const own = (x: Tensor): Tensor => slice(x, [0, 0, h * d], [groups, length, d]);
      const queries = mul(slice(rows, [0, h * d], [n, d]), 1 / Math.sqrt(d));
      const shares = softmax(groupedMatmul(queries, own(keys), ends)); // [n, length]
      const mixed = groupedMatmul(shares, own(values), ends, { transposed: true }); // [n, d]
      return mul(mixed, slice(gates, [0, h], [n, 1]));
    });
    return concat(each, 1);
  };
  return {
    count,
    params: parameters("prompt", shapes, options, (path, shape, random) =>
      path === "gate" ? undefined : random.host("normal", sizeOf(shape)).map((z) => z / Math.sqrt(width)),
    ),
    apply: (params, rows, ends, _, observe) => ({ output: run(params, rows, ends, observe) }),
    mixed: (params, hidden, plan) => mixOwn(params, hidden, plan, run),
  };
}
