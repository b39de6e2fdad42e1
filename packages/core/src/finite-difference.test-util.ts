// Central finite differences in float64, for core's own tests (the published gradientCheck stands on core and cannot be used here).
import { autodiff, grad, watch } from "./autodiff.ts";
import { cpu } from "./cpu/index.ts";
import { type Engine, engine } from "./engine.ts";
import { add, mul } from "./ops/elementwise.ts";
import { sum } from "./ops/reduce.ts";
import type { Tensor } from "./tensor.ts";

export const precise = (): Engine => engine(cpu({ precision: 64 }));

/** Deterministic numbers in [-1, 1) that hit no kink or tie. */
export function numbers(count: number, seed = 1): Float64Array {
  let state = seed * 2654435761;
  return Float64Array.from({ length: count }, () => {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) | 0;
    return ((state >>> 0) / 2 ** 32) * 2 - 1;
  });
}

/** Largest relative difference between autodiff and finite differences over all inputs; weighs the output with fixed numbers. */
export async function gradientError(
  shapes: readonly (readonly number[])[],
  f: (...inputs: Tensor[]) => Tensor | readonly Tensor[],
  options: { values?: readonly Float64Array[]; step?: number } = {},
): Promise<number> {
  const root = precise();
  const values = shapes.map(
    (shape, i) =>
      options.values?.[i] ??
      numbers(
        shape.reduce((n, d) => n * d, 1),
        i + 1,
      ),
  );
  const scalar = (inputs: Tensor[]): Tensor => {
    const ys = f(...inputs);
    const list = Array.isArray(ys) ? (ys as readonly Tensor[]) : [ys as Tensor];
    const parts = list.map((y, i) => sum(mul(y, root.tensor(numbers(y.size, 77 + i), y.shape))));
    return parts.reduce((a, b) => add(a, b));
  };
  const value = async (): Promise<number> => {
    const y = root.scope(() => scalar(values.map((v, i) => root.tensor(v, shapes[i] ?? []))));
    const n = (await y.data())[0] ?? Number.NaN;
    y.dispose();
    return n;
  };
  const recording = autodiff(root);
  const gradients = root.scope(() => {
    const inputs = values.map((v, i) => watch(recording, root.tensor(v, shapes[i] ?? [])));
    return grad(scalar(inputs), inputs);
  });
  const step = options.step ?? 1e-5;
  let worst = 0;
  for (const [i, v] of values.entries()) {
    const analytic = (await gradients[i]?.data()) ?? new Float64Array();
    for (let j = 0; j < v.length; j++) {
      const x = v[j] ?? 0;
      v[j] = x + step;
      const up = await value();
      v[j] = x - step;
      const down = await value();
      v[j] = x;
      const numeric = (up - down) / (2 * step);
      const difference = Math.abs(numeric - (analytic[j] ?? Number.NaN)) / Math.max(1, Math.abs(numeric));
      if (!(difference <= worst)) worst = difference;
    }
    gradients[i]?.dispose();
  }
  if (root.live() !== 0) throw new Error(`${root.live()} handles leaked`);
  return worst;
}
