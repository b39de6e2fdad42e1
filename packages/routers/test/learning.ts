// Trains one layer by plain gradient descent on a small task, for tests that ask whether a router learns.
import {
  add,
  autodiff,
  dispose,
  type Engine,
  grad,
  leaves,
  mapTree,
  mean,
  mul,
  square,
  sub,
  type Tensor,
  watch,
} from "@switchyard/core";
import { layerInput, layerParams, type MoELayer, moe, type Routed } from "@switchyard/core/moe";
import { tensor, type Values } from "./vectors.ts";

/**
 * The layer's params before each of the steps: the mean squared error against `target [tokens, width]`, and what
 * `also` makes of the routing. All losses of the router enter the gradient. The layer's first parameters are freed.
 */
export async function learn(
  on: Engine,
  layer: MoELayer,
  task: {
    readonly x: Values;
    readonly target: Values;
    readonly steps: number;
    readonly rate: number;
    readonly also?: (routed: Routed) => Tensor;
  },
): Promise<{ readonly error: number[]; readonly also: number[] }> {
  const { x, target, steps, rate, also } = task;
  const found: { error: number[]; also: number[] } = { error: [], also: [] };
  let params = layerParams(layer);
  for (let step = 0; step < steps; step++) {
    const result = on.scope(() => {
      const watched = watch(autodiff(on), params);
      const { output, routed } = moe(layer, watched, layerInput(layer, tensor(on, x), { training: true, step }));
      const error = mean(square(sub(output, tensor(on, target))));
      const total = Object.values(routed.losses).reduce(
        (all, { value, weight }) => add(all, mul(value, weight)),
        error,
      );
      const slopes = new Map(leaves(grad(total, watched)));
      const next = mapTree(params, (value, path) => sub(value, mul(slopes.get(path) as Tensor, rate)));
      // Values on the recording engine would keep its graph alive: the task runs once more on the plain one.
      const plain = moe(layer, params, layerInput(layer, tensor(on, x), { training: true, step }));
      const own = mean(square(sub(plain.output, tensor(on, target))));
      return { next, error: own, ...(also ? { also: mul(also(plain.routed), 1) } : {}) };
    });
    found.error.push((await result.error.data())[0] ?? Number.NaN);
    if (result.also) found.also.push((await result.also.data())[0] ?? Number.NaN);
    dispose([params, result.error, ...(result.also ? [result.also] : [])]);
    params = result.next;
  }
  dispose(params);
  return found;
}
