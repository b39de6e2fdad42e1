// Bottleneck adapters run beside a frozen layer (parallel adapter 2110.04366, section 3.3; in MoA 2506.05928: 16 wide, SiLU):
//   y = s U_e act(D_e x), D_e [hidden, width], U_e [out, hidden]
import { ShapeError } from "../errors.ts";
import type { Activation, Initial } from "../moe/experts.ts";
import { activations } from "../moe/parts.ts";
import type { Experts, Observe } from "../moe/plan.ts";
import { mul } from "../ops/elementwise.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { checkSizes, groupedLinear, leafAt, mixOwn, parameters, uniformWithin } from "./parts.ts";

export type AdapterOptions = {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width of the output; default: `width`. */
  readonly out?: number;
  /** Width of the bottleneck; default 16. */
  readonly hidden?: number;
  /** Default silu. */
  readonly activation?: Activation;
  /** Adds `downBias [count, hidden]` and `upBias [count, out]`; default false. */
  readonly bias?: boolean;
  /** s; default 1. */
  readonly scale?: number;
  /** New weights are uniform within gain sqrt(6 / (in + out)) (Xavier); default 1e-4. */
  readonly gain?: number;
} & Initial;

/**
 * Adapters of one kind: down to a few numbers, an activation, up again. Params: `down [count, hidden, width]`,
 * `up [count, out, hidden]`, with `bias` also `downBias` and `upBias` (zeros). The frozen layer beside them is not part of
 * them. `mixed` mixes each parameter (SMEAR 2306.03745). Throws ShapeError for sizes that are not whole numbers from 1,
 * and for given parameters of other shapes.
 */
export function adapter(options: AdapterOptions): Experts {
  const { count, width, out = width, hidden = 16, activation = "silu", bias = false, scale = 1, gain = 1e-4 } = options;
  checkSizes("adapter", { count, width, out, hidden });
  if (!Number.isFinite(scale) || !Number.isFinite(gain))
    throw new ShapeError(`adapter: scale = ${scale}, gain = ${gain}; expected finite numbers`);
  const shapes = {
    down: [count, hidden, width],
    up: [count, out, hidden],
    ...(bias ? { downBias: [count, hidden], upBias: [count, out] } : {}),
  };
  const run = (params: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    const product = (name: string, x: Tensor): Tensor => {
      observe?.(name, x, ends);
      return groupedLinear(x, leafAt(params, name), ends, bias ? leafAt(params, `${name}Bias`) : undefined);
    };
    const y = product("up", activations[activation](product("down", rows))); // [n, hidden] -> [n, out]
    return scale === 1 ? y : mul(y, scale);
  };
  return {
    count,
    params: parameters("adapter", shapes, options, (_, shape, random) => {
      const [, rows = 1, columns] = shape;
      if (columns === undefined) return undefined;
      return uniformWithin(random, shape, gain * Math.sqrt(6 / (rows + columns)));
    }),
    apply: (params, rows, ends, _, observe) => ({ output: run(params, rows, ends, observe) }),
    mixed: (params, hiddens, plan) => mixOwn(params, hiddens, plan, run),
  };
}
