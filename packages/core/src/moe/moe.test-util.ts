// For tests of the layer: a float64 engine, reproducible numbers, naive experts in plain loops, and a comparison of values and
// gradients with an oracle that is differentiated numerically.
import { expect } from "vitest";
import { autodiff, grad, lower, watch } from "../autodiff.ts";
import { cpu } from "../cpu/index.ts";
import { type Engine, engine } from "../engine.ts";
import { mul } from "../ops/elementwise.ts";
import { sum } from "../ops/reduce.ts";
import { random } from "../random.ts";
import { dispose, leaves, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import type { Layout, Plan, Routed, Router, RouterInput } from "./plan.ts";

export const float64 = (): Engine => engine(cpu({ precision: 64 }));

/** Values in [-1, 1) without structure that could hide a swapped index. */
export function noise(n: number, seed = 1): number[] {
  let state = seed * 2654435761;
  return Array.from({ length: n }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32) * 2 - 1;
  });
}

export const floats = (e: Engine, data: readonly number[], shape: readonly number[]): Tensor =>
  e.tensor(Float64Array.from(data), shape);
export const ids = (e: Engine, data: readonly number[], shape: readonly number[]): Tensor =>
  e.tensor(Int32Array.from(data), shape);
export const numbers = async (x: Tensor): Promise<number[]> => Array.from(await x.data());

/** Compares with |difference| <= absolute + relative * |expected|. */
export function close(
  found: readonly number[],
  expected: readonly number[],
  tolerance = { absolute: 1e-9, relative: 1e-7 },
): void {
  expect(found.length).toBe(expected.length);
  found.forEach((x, i) => {
    const wanted = expected[i] ?? Number.NaN;
    const slack = tolerance.absolute + tolerance.relative * Math.abs(wanted);
    if (!(Math.abs(x - wanted) <= slack)) expect.fail(`element ${i}: found ${x}, expected ${wanted}`);
  });
}

export type Values = Readonly<Record<string, readonly number[]>>;
export interface Comparison<N extends string> {
  readonly shapes: Readonly<Record<N, readonly number[]>>;
  readonly forward: (x: Readonly<Record<N, Tensor>>, e: Engine) => Tensor;
  /** The same in plain loops. */
  readonly oracle: (x: Readonly<Record<N, readonly number[]>>) => readonly number[];
  /** Start values where noise will not do. */
  readonly values?: Partial<Readonly<Record<N, readonly number[]>>>;
}

/** Values of `forward` against the oracle, its gradients against central differences of the oracle, and no handle left alive. */
export async function compare<N extends string>({
  shapes,
  forward,
  oracle,
  values = {},
}: Comparison<N>): Promise<void> {
  const e = float64();
  const names = Object.keys(shapes) as N[];
  const start = Object.fromEntries(
    names.map((name, i) => [name, values[name] ?? noise(sizeOf(shapes[name]), i + 1)]),
  ) as Record<N, readonly number[]>;
  const params = Object.fromEntries(names.map((name) => [name, floats(e, start[name], shapes[name])])) as Record<
    N,
    Tensor
  >;
  const before = e.live();
  const expected = oracle(start);
  const probe = noise(expected.length, 99);

  const { y, grads } = e.scope(() => {
    const watched = watch(autodiff(e), params as Tree) as Record<N, Tensor>;
    const out = forward(watched, e);
    const loss = sum(mul(out, floats(e, probe, out.shape)));
    // A forward pass that depends on nothing watched has no gradient to speak of.
    return { y: lower(out), grads: grad(loss, watched as Tree) as Record<N, Tensor> };
  });
  close(await numbers(y), expected);
  for (const name of names) {
    const found = await numbers(grads[name]);
    const at = start[name];
    const numeric = at.map((value, i) => {
      const step = 1e-5;
      const shifted = (by: number) => oracle({ ...start, [name]: at.map((x, j) => (j === i ? value + by : x)) });
      const [up, down] = [shifted(step), shifted(-step)];
      return up.reduce((total, x, j) => total + (probe[j] ?? 0) * (x - (down[j] ?? 0)), 0) / (2 * step);
    });
    close(found, numeric, { absolute: 1e-7, relative: 1e-6 });
  }
  y.dispose();
  dispose(grads as Tree);
  expect(e.live()).toBe(before);
}

// ---------------------------------------------------------------- naive experts
const dot = (w: readonly number[], offset: number, x: readonly number[]): number =>
  x.reduce((total, value, i) => total + value * (w[offset + i] ?? Number.NaN), 0);
export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/** SwiGLU expert e on one row; weights as flat lists [experts, 2 hidden, width] and [experts, width, hidden]. */
export function gluRow(
  w: { gateUp: readonly number[]; down: readonly number[] },
  e: number,
  x: readonly number[],
  hidden: number,
): number[] {
  const width = x.length;
  const inner = Array.from({ length: hidden }, (_, h) => {
    const gate = dot(w.gateUp, (e * 2 * hidden + h) * width, x);
    return gate * sigmoid(gate) * dot(w.gateUp, (e * 2 * hidden + hidden + h) * width, x);
  });
  return Array.from({ length: width }, (_, o) => dot(w.down, (e * width + o) * hidden, inner));
}

/** One row of a flat matrix. */
export const row = (flat: readonly number[], i: number, width: number): number[] =>
  flat.slice(i * width, (i + 1) * width);

/** y += weight * x. */
export function addTo(y: number[], offset: number, x: readonly number[], weight: number): void {
  x.forEach((value, i) => {
    y[offset + i] = (y[offset + i] ?? 0) + weight * value;
  });
}

// ---------------------------------------------------------------- routers
/** A router that decides what the test says. */
export const fixedRouter = (decide: (input: RouterInput) => Partial<Routed> & { plan: Plan }): Router => ({
  params: {},
  buffers: {},
  route: (_, input) => ({ losses: {}, ...decide(input) }),
});

export function routerInput(hidden: Tensor, layout: Partial<Layout> = {}): RouterInput {
  return {
    hidden,
    layout: { batch: 1, sequence: hidden.shape[0] ?? 0, past: 0, ...layout },
    training: true,
    step: 0,
    pass: 0,
    layer: 0,
    layers: 1,
    random: random(hidden.engine.root, 0),
    buffers: {},
  };
}

/** Names of the leaves of a tree. */
export const names = (tree: Tree): string[] => leaves(tree).map(([path]) => path);
