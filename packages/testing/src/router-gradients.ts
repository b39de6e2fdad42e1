// The gradients of a router: of its weights and losses, with respect to its parameters and to the hidden states,
// against central differences.
import {
  add,
  autodiff,
  dispose,
  type Engine,
  grad,
  mapTree,
  mul,
  sum,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import type { Routed, Router, RouterInput } from "@switchyard/core/moe";
import { coordinates, generator, type HostArray, uniform } from "./arrays.ts";
import { array, collect, readTree } from "./router-answer.ts";

/** Weighted sum of everything differentiable in a decision. */
function objective(routed: Routed, engine: Engine): Tensor {
  const tensors = collect(routed);
  let total: Tensor | undefined;
  for (const [name, x] of tensors) {
    if (x.dtype !== "f32" || name.startsWith("metric ") || name === "logits" || name === "probabilities") continue;
    const weights = uniform(generator(`objective ${name}`), x.shape, 0.5, 1.5);
    const term = sum(mul(x, engine.tensor(weights.data, x.shape)));
    total = total ? add(total, term) : term;
  }
  if (!total) throw new Error("the plan has no weights");
  return total;
}

/**
 * Throws with the first entry where autodiff and differences disagree in training, or when no gradient reaches any
 * parameter.
 * `inputOf` makes the input around hidden states; it is called inside a scope.
 */
export async function checkGradients(
  engine: Engine,
  router: Router,
  { hidden, inputOf }: { readonly hidden: HostArray; readonly inputOf: (hidden: HostArray) => RouterInput },
): Promise<void> {
  const all = await readTree(router.params, "");
  const params = new Map([...all].filter(([, x]) => x.data instanceof Float64Array));
  const place = (values: ReadonlyMap<string, HostArray>): Tree =>
    mapTree(router.params, (leaf, path) => {
      const x = values.get(`.${path}`);
      return x ? engine.tensor(x.data, x.shape) : leaf;
    });
  const valueAt = async (h: HostArray, values: ReadonlyMap<string, HostArray>): Promise<number> => {
    const y = engine.scope(() => objective(router.route(place(values), inputOf(h)), engine));
    const [value] = await y.data();
    y.dispose();
    return value ?? Number.NaN;
  };
  const analytic = engine.scope(() => {
    const outer = autodiff(engine);
    const watched = watch(outer, { params: place(params), hidden: engine.tensor(hidden.data, hidden.shape) });
    const input = { ...inputOf(hidden), hidden: watched.hidden };
    return grad(objective(router.route(watched.params, input), engine), watched);
  });
  const found = await readTree(analytic, "");
  dispose(analytic);

  const compare = async (name: string, x: HostArray, at: (moved: HostArray) => Promise<number>): Promise<void> => {
    const slopes = array(found, name);
    for (let i = 0; i < x.data.length; i++) {
      const step = 1e-6 * Math.max(1, Math.abs(x.data[i] ?? 0));
      const value = async (by: number): Promise<number> => {
        const data = Float64Array.from(x.data);
        data[i] = (data[i] ?? 0) + by;
        return at({ shape: x.shape, data });
      };
      const numeric = ((await value(step)) - (await value(-step))) / (2 * step);
      const slope = slopes.data[i] ?? Number.NaN;
      if (!(Math.abs(slope - numeric) <= 1e-6 + 1e-5 * Math.abs(numeric)))
        throw new Error(
          `${name.slice(1)} [${coordinates(i, x.shape).join(", ")}]: autodiff gives ${slope}, ` +
            `central differences give ${numeric}`,
        );
    }
  };
  for (const [name, x] of params)
    await compare(`.params${name}`, x, (moved) => valueAt(hidden, new Map([...params, [name, moved]])));
  await compare(".hidden", hidden, (moved) => valueAt(moved, params));
  const reached = [...params.keys()].some((name) => array(found, `.params${name}`).data.some((slope) => slope !== 0));
  if (params.size > 0 && !reached) throw new Error("no gradient reaches any parameter of the router");
}
