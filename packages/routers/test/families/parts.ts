// What families of vectors share: routers with the weights or the logits of a case.
import type { Engine, Tensor, Tree } from "@switchyard/core";
import type { Routed, Router, RouterInput, RouterPlugin } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { shapeOf, tensor, turned, type Values } from "../vectors.ts";

/** A router whose `select` takes logits of that many experts; its weights do not matter. */
export function selecting(
  on: Engine,
  plugin: RouterPlugin,
  experts: number,
): (logits: Tensor, input: Partial<RouterInput>) => Routed {
  const router = plugin.init(routerContext(on, { experts }));
  return (logits, input) => {
    if (!router.select) throw new Error(`${plugin.name} has no select`);
    const hidden = on.tensor(new Float64Array(logits.shape[0] ?? 0), [logits.shape[0] ?? 0, 1]);
    return router.select(logits, { ...routerInput(on, { hidden, buffers: router.buffers }), ...input });
  };
}

/** A router with the weights of the vector, w_router [width, experts]. */
export function weighted(
  on: Engine,
  plugin: RouterPlugin,
  w: Values,
): { readonly router: Router; readonly params: Tree } {
  const [width = 0, experts = 0] = shapeOf(w);
  const router = plugin.init(routerContext(on, { experts, width }));
  return { router, params: { weight: tensor(on, turned(w)) } };
}
