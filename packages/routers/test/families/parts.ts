// What families of vectors share: routers with the weights or the logits of a case.
import {
  type Engine,
  gelu,
  groupedMatmul,
  relu,
  sigmoid,
  silu,
  type Tensor,
  type Tree,
  tanh,
  transpose,
} from "@switchyard/core";
import type { Experts, Routed, Router, RouterInput, RouterPlugin } from "@switchyard/core/moe";
import { routerContext, routerInput } from "@switchyard/testing";
import { leaf } from "../../src/parts.ts";
import { shapeOf, tensor, turned, type Values, type VectorCase, word } from "../vectors.ts";

type Activation = (x: Tensor) => Tensor;
const activations: Readonly<Record<string, Activation>> = { tanh, relu, sigmoid, silu, gelu: (x) => gelu(x) };

/** The activation of that name. */
export function activationOf(name: string): Activation {
  const found = Object.hasOwn(activations, name) ? activations[name] : undefined;
  if (!found) throw new Error(`no activation "${name}"; known are ${Object.keys(activations).join(", ")}`);
  return found;
}

/** f of experts that the config describes as "f(x @ W_e)", the x and W of any name; "x @ W_e" has none. */
export function expertActivation(one: VectorCase, otherwise: string): Activation {
  const text = one.config.expert === undefined ? `${otherwise}(x @ W)` : word(one, "expert");
  const [, f, inner] = /^(?:(\w+)\()?\w+ @ W\w*(\)?)$/.exec(text) ?? [];
  if (inner === undefined || (f === undefined) !== (inner === ""))
    throw new Error(`the case has expert = "${text}"; known are such as "tanh(x @ W_e)" and "x @ W_e"`);
  return f === undefined ? (x) => x : activationOf(f);
}

/** Experts y = f(x W_e) with the W_e [in][out] of a vector. */
export function plainExperts(on: Engine, matrices: Values, f: Activation): Experts {
  return {
    count: shapeOf(matrices)[0] ?? 0,
    params: { w: transpose(tensor(on, matrices), [0, 2, 1]) }, // [experts, out, in]
    apply: (params, rows, ends) => ({ output: f(groupedMatmul(rows, leaf(params, "w"), ends)) }),
  };
}

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
