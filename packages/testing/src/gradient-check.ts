// Autodiff against central differences in float64. Not tied to a test runner: it returns a report or throws.
import { add, autodiff, type Engine, engine, grad, mul, sum, type Tensor, watch } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { coordinates, generator, type HostArray, uniform } from "./arrays.ts";

export interface GradientCheckOptions {
  /** Inputs to differentiate; default: all float ones. */
  readonly wanted?: readonly number[];
  /** Half the width of a difference, times max(1, |x|); default 1e-5. */
  readonly step?: number;
  /** Allowed: absolute + relative * |numeric|; defaults 1e-7 and 1e-5. */
  readonly absolute?: number;
  readonly relative?: number;
  /** Default: the reference backend with float64 storage. Differences in f32 are mostly rounding. */
  readonly engine?: Engine;
}

/** The entry where autodiff and difference are furthest apart. */
export interface WorstEntry {
  readonly input: number;
  readonly index: readonly number[];
  readonly analytic: number;
  readonly numeric: number;
}

export interface GradientReport {
  /** Entries compared. */
  readonly checked: number;
  /** Absent when no entry was compared. */
  readonly worst?: WorstEntry;
}

/**
 * Compares the gradients of `f` by autodiff with central differences, entry by entry. Results of any shape are summed
 * with fixed random coefficients, so that every entry counts; several results may be returned. `f` must give the same
 * value for the same inputs.
 *
 * @throws Error with the worst entry (input, index, both values) when one leaves the tolerance, or when handles leak.
 * @example
 * await gradientCheck(([x]) => silu(x!), [floats([3], [0.5, -1, 2])]);
 */
export async function gradientCheck(
  f: (inputs: readonly Tensor[]) => Tensor | readonly Tensor[],
  inputs: readonly HostArray[],
  options: GradientCheckOptions = {},
): Promise<GradientReport> {
  const { step = 1e-5, absolute = 1e-7, relative = 1e-5 } = options;
  const on = options.engine ?? engine(cpu({ precision: 64 }));
  const wanted = options.wanted ?? inputs.flatMap((x, i) => (x.data instanceof Float64Array ? [i] : []));
  const before = on.live();

  const scalar = (xs: readonly Tensor[]): Tensor => {
    const result = f(xs);
    const ys = (Array.isArray(result) ? result : [result]) as readonly Tensor[];
    const terms = ys.flatMap((y, i) => {
      if (y.dtype !== "f32") return [];
      const weights = uniform(generator(`result ${i}`), y.shape, 0.5, 1.5);
      return [sum(mul(y, on.tensor(weights.data, weights.shape)))];
    });
    if (terms.length === 0) throw new Error("gradientCheck: f returned no f32 tensor");
    return terms.reduce((total, term) => add(total, term));
  };
  const valueAt = async (arrays: readonly HostArray[]): Promise<number> => {
    const y = on.scope(() => scalar(arrays.map((x) => on.tensor(x.data, x.shape))));
    const [value] = await y.data();
    y.dispose();
    return value ?? Number.NaN;
  };

  const analytic = on.scope(() => {
    const outer = autodiff(on);
    const xs = inputs.map((x, i) => {
      const tensor = on.tensor(x.data, x.shape);
      return wanted.includes(i) ? watch(outer, tensor) : tensor;
    });
    return grad(
      scalar(xs),
      wanted.map((i) => pick(xs, i)),
    );
  });
  let checked = 0;
  let worst: WorstEntry | undefined;
  let excess = Number.NEGATIVE_INFINITY;
  for (const [position, input] of wanted.entries()) {
    const x = pick(inputs, input);
    const found = await pick(analytic, position).data();
    pick(analytic, position).dispose();
    for (let i = 0; i < x.data.length; i++) {
      const h = step * Math.max(1, Math.abs(x.data[i] ?? 0));
      const moved = (by: number): Promise<number> => {
        const data = Float64Array.from(x.data);
        data[i] = (data[i] ?? 0) + by;
        return valueAt(inputs.map((other, j) => (j === input ? { shape: x.shape, data } : other)));
      };
      const numeric = ((await moved(h)) - (await moved(-h))) / (2 * h);
      const value = found[i] ?? Number.NaN;
      const error = Math.abs(value - numeric) - (absolute + relative * Math.abs(numeric));
      checked++;
      // A NaN on either side is the worst there is.
      if (!(error <= excess)) {
        excess = Number.isNaN(error) ? Number.POSITIVE_INFINITY : error;
        worst = { input, index: coordinates(i, x.shape), analytic: value, numeric };
      }
    }
  }
  if (worst && excess > 0) {
    throw new Error(
      `gradientCheck: input ${worst.input}, entry [${worst.index.join(", ")}]: autodiff gives ${worst.analytic}, ` +
        `central differences give ${worst.numeric}`,
    );
  }
  const after = on.live();
  if (after !== before) throw new Error(`gradientCheck: ${after - before} handles were left alive`);
  return { checked, ...(worst ? { worst } : {}) };
}

function pick<T>(list: readonly T[], i: number): T {
  const item = list[i];
  if (item === undefined) throw new RangeError(`gradientCheck: there is no input ${i}`);
  return item;
}
