// What a case of the backend suite is, and the two ways most of them are made: values against an oracle, gradients
// against central differences of the same oracle. No vitest here: a case throws when it fails.
import { add, autodiff, type Engine, grad, mul, sum, type Tensor } from "@switchyard/core";
import { assertClose, generator, type HostArray, type Tolerance, uniform } from "../arrays.ts";

/** One check of a backend. `run` rejects with an Error that says what was found and what was expected. */
export interface BackendCase {
  /** Stable: "matmul/transposeB 5x7x3". A skip names cases by it. */
  readonly name: string;
  /** The op it is about; "engine" for the behaviours of a backend as a whole. */
  readonly op: string;
  run(engine: Engine, tolerance?: Partial<Tolerance>): Promise<void>;
}

/** f32 arithmetic in any order of summation; the sizes of the suite are small. */
export const defaultTolerance: Tolerance = { absolute: 2e-6, relative: 1e-5 };

export const upload = (engine: Engine, x: HostArray): Tensor => engine.tensor(x.data, x.shape);

export async function download(x: Tensor): Promise<HostArray> {
  const data = await x.data();
  return { shape: x.shape, data: x.dtype === "i32" ? Int32Array.from(data) : Float64Array.from(data) };
}

type Compute = (xs: readonly Tensor[]) => Tensor | readonly Tensor[];
const list = <T>(x: T | readonly T[]): readonly T[] => (Array.isArray(x) ? (x as readonly T[]) : [x as T]);

/** Runs `f` on copies of the inputs and reads its results; frees everything. */
export async function evaluate(engine: Engine, inputs: readonly HostArray[], f: Compute): Promise<HostArray[]> {
  const ys = engine.scope(() => [...list(f(inputs.map((x) => upload(engine, x))))]);
  try {
    return await Promise.all(ys.map(download));
  } finally {
    for (const y of ys) y.dispose();
  }
}

/** Fixed coefficients that turn results into one number, so that every entry of every result counts. */
const coefficients = (result: number, shape: readonly number[]): HostArray =>
  uniform(generator(`coefficients ${result}`), shape, 0.5, 1.5);

/** Gradients of the weighted sum of all float results, by autodiff on `engine`. */
async function gradients(
  engine: Engine,
  inputs: readonly HostArray[],
  wanted: readonly number[],
  f: Compute,
): Promise<HostArray[]> {
  const outer = autodiff(engine);
  const grads = outer.scope(() => {
    const xs = inputs.map((x, i) => upload(wanted.includes(i) ? outer : engine, x));
    const terms = list(f(xs)).flatMap((y, i) =>
      y.dtype === "f32" ? [sum(mul(y, upload(engine, coefficients(i, y.shape))))] : [],
    );
    const loss = terms.reduce((total, term) => add(total, term));
    return grad(
      loss,
      wanted.map((i) => xs[i] as Tensor),
    );
  });
  try {
    return await Promise.all(grads.map(download));
  } finally {
    for (const g of grads) g.dispose();
  }
}

/** Central differences; their own error is about 1e-8, hence the floor under the tolerance of gradients. */
function numericGradient(
  f: (inputs: readonly HostArray[]) => number,
  inputs: readonly HostArray[],
  wanted: number,
): HostArray {
  const x = inputs[wanted] as HostArray;
  const result = new Float64Array(x.data.length);
  for (let i = 0; i < result.length; i++) {
    const step = 1e-5 * Math.max(1, Math.abs(x.data[i] ?? 0));
    const moved = (by: number): number => {
      const data = Float64Array.from(x.data);
      data[i] = (data[i] ?? 0) + by;
      return f(inputs.map((input, j) => (j === wanted ? { shape: x.shape, data } : input)));
    };
    result[i] = (moved(step) - moved(-step)) / (2 * step);
  }
  return { shape: x.shape, data: result };
}

export interface Comparison {
  readonly inputs: readonly HostArray[];
  readonly run: Compute;
  readonly expect: (xs: readonly HostArray[]) => HostArray | readonly HostArray[];
  /** Inputs to differentiate; absent: values only. */
  readonly gradient?: readonly number[];
  /** Multiplies the tolerance, where a function is steep or a sum is long. */
  readonly slack?: number;
}

/** A case of values, and one named "... gradient" where `gradient` is given. */
export function compare(name: string, comparison: Comparison): BackendCase[] {
  const { inputs, run, expect, gradient, slack = 1 } = comparison;
  const op = name.slice(0, name.indexOf("/"));
  const widened = (tolerance: Partial<Tolerance> | undefined, floor = 0): Tolerance => {
    const { absolute, relative } = { ...defaultTolerance, ...tolerance };
    return { absolute: Math.max(absolute, floor) * slack, relative: Math.max(relative, floor) * slack };
  };
  const values = makeCase(name, op, async (engine, tolerance) => {
    const found = await evaluate(engine, inputs, run);
    const expected = list(expect(inputs));
    if (found.length !== expected.length)
      throw new Error(`${name}: ${found.length} results, expected ${expected.length}`);
    expected.forEach((y, i) => {
      assertClose(expected.length === 1 ? name : `${name}, result ${i}`, found[i] as HostArray, y, widened(tolerance));
    });
  });
  if (gradient === undefined) return [values];
  const weighted = (xs: readonly HostArray[]): number =>
    list(expect(xs)).reduce((total, y, i) => {
      if (!(y.data instanceof Float64Array)) return total;
      const weights = coefficients(i, y.shape).data;
      return y.data.reduce((inner: number, value: number, j: number) => inner + value * (weights[j] ?? 0), total);
    }, 0);
  const slopes = makeCase(`${name} gradient`, op, async (engine, tolerance) => {
    const found = await gradients(engine, inputs, gradient, run);
    gradient.forEach((input, i) => {
      const expected = numericGradient(weighted, inputs, input);
      assertClose(`${name}, gradient of input ${input}`, found[i] as HostArray, expected, widened(tolerance, 2e-7));
    });
  });
  return [values, slopes];
}

/** A case around a body: also checks that every handle made by it was freed. */
export function makeCase(
  name: string,
  op: string,
  body: (engine: Engine, tolerance: Partial<Tolerance> | undefined) => Promise<void>,
): BackendCase {
  return {
    name,
    op,
    async run(engine, tolerance) {
      const before = engine.live();
      await body(engine, tolerance);
      const after = engine.live();
      if (after !== before) throw new Error(`${name}: ${after - before} handles were left alive (${before} before)`);
    },
  };
}

export const behaviour = (name: string, body: (engine: Engine, tolerance: Tolerance) => Promise<void>): BackendCase =>
  makeCase(name, "engine", (engine, tolerance) => body(engine, { ...defaultTolerance, ...tolerance }));
