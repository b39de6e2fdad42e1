// What `recomputed` keeps until the gradient is taken. That the gradients themselves are right: ops/gradients.test.ts.
import { expect, it } from "vitest";
import { autodiff, grad, recomputed, watch } from "./autodiff.ts";
import { cpu } from "./cpu/index.ts";
import { engine } from "./engine.ts";
import { exp } from "./ops/elementwise.ts";
import { sum } from "./ops/reduce.ts";
import type { Tensor } from "./tensor.ts";

const chain = (x: Tensor): Tensor => exp(exp(exp(exp(x))));

/** Handles alive between the forward pass and the gradient, and the gradient. */
async function between(f: (x: Tensor) => Tensor): Promise<{ live: number; slope: number }> {
  const on = engine(cpu({ precision: 64 }));
  let live = 0;
  const slope = on.scope(() => {
    const x = watch(autodiff(on), on.tensor(Float64Array.of(-1), [1]));
    const y = f(x);
    live = on.live();
    return grad(sum(y), x);
  });
  const [value = Number.NaN] = await slope.data();
  slope.dispose();
  expect(on.live()).toBe(0);
  return { live, slope: value };
}

it("recomputed keeps its inputs and its result, and gives the same gradient", async () => {
  const plain = await between(chain);
  const again = await between((x) => recomputed([x], chain));
  expect(again.slope).toBe(plain.slope);
  expect(plain.live).toBe(5);
  expect(again.live).toBe(2);
});

it("recomputed within recomputed", async () => {
  const nested = await between((x) => recomputed([x], (y) => exp(recomputed([y], (z) => exp(exp(exp(z)))))));
  expect(nested).toEqual({ live: 2, slope: (await between(chain)).slope });
});
