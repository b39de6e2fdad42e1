// One AdamW step on one parameter: a launch for each of its three results.
import type { Kernel } from "@switchyard/core";
import { type Calls, type GpujsHandle, only } from "../calls.ts";
import type { Program } from "../program.ts";

const momentum: Program = {
  name: "adamwMomentum",
  arrays: ["m", "g", "scale"],
  numbers: ["beta"],
  body: "return beta * m[i] + (1 - beta) * g[i] * scale[0];",
};
const variance: Program = {
  name: "adamwVariance",
  arrays: ["v", "g", "scale"],
  numbers: ["beta"],
  body: `
  const x = g[i] * scale[0];
  return beta * v[i] + (1 - beta) * x * x;`,
};
const update: Program = {
  name: "adamw",
  arrays: ["x", "m", "v"],
  numbers: ["lr", "eps", "decay", "correction1", "correction2"],
  body: `
  const step = m[i] / correction1 / (Math.sqrt(v[i] / correction2) + eps);
  return x[i] - lr * (step + decay * x[i]);`,
};

interface Attrs {
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  readonly correction1: number;
  readonly correction2: number;
}

export function optimiserKernels(calls: Calls): Readonly<Record<string, Kernel<GpujsHandle>>> {
  return {
    adamw: calls.kernel(
      "adamw",
      async ([x, g, m, v, scale], _, attrs: Attrs, work) => {
        if (!x || !g || !m || !v || !scale) return [];
        const { lr, beta1, beta2, eps, weightDecay: decay, correction1, correction2 } = attrs;
        const n = x.value.length;
        const m2 = await work.run(momentum, n, [m.value, g.value, scale.value], { beta: beta1 });
        const v2 = await work.run(variance, n, [v.value, g.value, scale.value], { beta: beta2 });
        const params = { lr, eps, decay, correction1, correction2 };
        return [await work.run(update, n, [x.value, m2, v2], params), m2, v2];
      },
      only("f"),
    ),
  };
}
