// One optimiser step on one parameter. The results take over the storage of the inputs that were given away.
import { at, type Op } from "../op.ts";
import { add, div, mul, sqrt, sub } from "./elementwise.ts";
import { fail, same, spec } from "./infer.ts";

const alike =
  (name: string, parameters: number): Op["shapes"] =>
  (inputs) => {
    const x = at(inputs, 0);
    for (const y of inputs.slice(1, -1)) if (!same(x.shape, y.shape)) fail(name, "shapes differ", inputs);
    if (at(inputs, inputs.length - 1).shape.length !== 0) fail(name, "the gradient scale must be one number", inputs);
    return Array.from({ length: parameters }, () => spec(x.shape));
  };

export interface AdamwAttrs {
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  /** 1 - beta1^t and 1 - beta2^t at step t = 1, 2, ... */
  readonly correction1: number;
  readonly correction2: number;
}
/** AdamW (1711.05101) of param, grad, m, v, scale []: decay is not part of the gradient; `scale` multiplies the gradient first (clipping). */
export const adamwOp: Op<AdamwAttrs> = {
  name: "adamw",
  shapes: (inputs, _) => alike("adamw", 3)(inputs, {}),
  fallback([param, grad, m, v, scale], attrs) {
    if (!param || !grad || !m || !v || !scale) return [];
    const { lr, beta1, beta2, eps, weightDecay, correction1, correction2 } = attrs;
    const g = mul(grad, scale);
    const m2 = add(mul(m, beta1), mul(g, 1 - beta1));
    const v2 = add(mul(v, beta2), mul(mul(g, g), 1 - beta2));
    const step = div(mul(m2, 1 / correction1), add(sqrt(mul(v2, 1 / correction2)), eps));
    return [sub(param, mul(add(step, mul(param, weightDecay)), lr)), m2, v2];
  },
  reuses: [0, 2, 3],
};
export interface SgdAttrs {
  readonly lr: number;
  readonly momentum: number;
  readonly weightDecay: number;
  readonly nesterov: boolean;
}
/** SGD with momentum of param, grad, velocity, scale [], L2 decay in the gradient: v = momentum v + g, p = p - lr v. */
export const sgdOp: Op<SgdAttrs> = {
  name: "sgd",
  shapes: (inputs, _) => alike("sgd", 2)(inputs, {}),
  fallback([param, grad, velocity, scale], { lr, momentum, weightDecay, nesterov }) {
    if (!param || !grad || !velocity || !scale) return [];
    const g = add(mul(grad, scale), mul(param, weightDecay));
    const v2 = add(mul(velocity, momentum), g);
    return [sub(param, mul(nesterov ? add(g, mul(v2, momentum)) : v2, lr)), v2];
  },
  reuses: [0, 2],
};
