// Runs the vectors of a router family through the router itself. A family is a function from one case to everything it
// expects, by name; `meet` compares. Plain functions, so that other runners can call them.
import { readFileSync } from "node:fs";
import { autodiff, type Engine, engine, grad, type Random, type Tensor, watch } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { Routed } from "@switchyard/core/moe";

/** Nested lists of numbers, or one number. */
export type Values = number | readonly Values[];

export interface VectorCase {
  readonly id: string;
  readonly config: Readonly<Record<string, number>>;
  readonly inputs: Readonly<Record<string, Values>>;
  readonly expected: Readonly<Record<string, Values>>;
}
export interface Vectors {
  readonly family: string;
  readonly tolerance: { readonly abs: number; readonly rel: number };
  readonly cases: readonly VectorCase[];
}
/** What the implementation gives under each name of `expected`, computed on an engine. */
export type Family = (one: VectorCase, on: Engine) => Promise<Readonly<Record<string, Values>>>;

export const float64 = (): Engine => engine(cpu({ precision: 64 }));

export const flat = (values: Values): number[] => (typeof values === "number" ? [values] : values.flatMap(flat));
export const shapeOf = (values: Values): number[] =>
  typeof values === "number" ? [] : [values.length, ...(values[0] === undefined ? [] : shapeOf(values[0]))];

export function given(of: Readonly<Record<string, Values>> | Readonly<Record<string, number>>, name: string): Values {
  const value = of[name];
  if (value === undefined) throw new Error(`the case has no "${name}"; it has ${Object.keys(of).join(", ")}`);
  return value;
}
export const number = (one: VectorCase, name: string): number => flat(given(one.config, name))[0] ?? Number.NaN;
export const tensor = (on: Engine, values: Values): Tensor =>
  on.tensor(Float64Array.from(flat(values)), shapeOf(values));

/** Reads, frees and nests. */
export async function lists(x: Tensor): Promise<Values> {
  const data = [...(await x.data())];
  x.dispose();
  const nest = (shape: readonly number[], from: number): Values => {
    const [n, ...rest] = shape;
    if (n === undefined) return data[from] ?? Number.NaN;
    const step = rest.reduce((product, d) => product * d, 1);
    return Array.from({ length: n }, (_, i) => nest(rest, from + i * step));
  };
  return nest(x.shape, 0);
}

/** Runs `f` in a scope and reads the tensors it returns. */
export async function results<N extends string>(
  on: Engine,
  f: () => Readonly<Record<N, Tensor>>,
): Promise<Record<N, Values>> {
  const tensors = on.scope(() => Object.entries<Tensor>(f()));
  const entries = await Promise.all(tensors.map(async ([name, x]) => [name, await lists(x)] as const));
  return Object.fromEntries(entries) as Record<N, Values>;
}

/** Gradient of one number with respect to x. */
export async function slopes(on: Engine, x: Values, f: (x: Tensor) => Tensor): Promise<Values> {
  const slope = on.scope(() => {
    const [leaf] = watch(autodiff(on), [tensor(on, x)]);
    if (!leaf) throw new Error("watch gave nothing");
    const [found] = grad(f(leaf), [leaf]);
    if (!found) throw new Error("grad gave nothing");
    return found;
  });
  return lists(slope);
}

/** [rows][columns] turned around. */
export const turned = (values: Values): number[][] => {
  const [, columns = 0] = shapeOf(values);
  const rows = (values as readonly Values[]).map(flat);
  return Array.from({ length: columns }, (_, j) => rows.map((row) => row[j] ?? Number.NaN));
};

/** A Random whose every uniform draw is given: noise of a vector goes in where the router draws. */
export const fixedUniform = (on: Engine, draws: Values): Random => {
  const refuse = (): never => {
    throw new Error("the vector gives uniform draws only");
  };
  const self: Random = {
    at: () => self,
    uniform: () => tensor(on, draws),
    normal: refuse,
    exponential: refuse,
    host: refuse,
  };
  return self;
};

/** A sparse plan as the dense matrix of its weights. */
export function dense(ids: Values, weights: Values, experts: number): number[][] {
  const chosen = (ids as readonly Values[]).map(flat);
  return chosen.map((row, t) => {
    const line = new Array<number>(experts).fill(0);
    const own = flat((weights as readonly Values[])[t] ?? []);
    row.forEach((e, j) => {
      if (e >= 0) line[e] = own[j] ?? Number.NaN;
    });
    return line;
  });
}

/** The weights and ids of a plan that must be sparse. */
export function sparse({ plan }: Routed): { readonly experts: Tensor; readonly weights: Tensor } {
  if (plan.kind !== "sparse") throw new Error(`a sparse plan was expected, found ${plan.kind}`);
  return plan;
}

/** Differences between what was found and what is expected, as lines; empty when they meet. */
export function differences(expected: Values, found: Values | undefined, tolerance: Vectors["tolerance"]): string[] {
  if (found === undefined) return ["nothing was computed under this name"];
  if (shapeOf(expected).join() !== shapeOf(found).join())
    return [`shape [${shapeOf(found)}], expected [${shapeOf(expected)}]`];
  const values = flat(found);
  return flat(expected).flatMap((value, i) => {
    const error = Math.abs((values[i] ?? Number.NaN) - value);
    return error <= tolerance.abs + tolerance.rel * Math.abs(value)
      ? []
      : [`entry ${i}: ${values[i]}, expected ${value}`];
  });
}

/** The vectors of a file of the fixtures. */
export function readVectors(file: string): Vectors {
  return JSON.parse(readFileSync(new URL(`fixtures/${file}.json`, import.meta.url), "utf8"));
}

/** Everything of a case that is not met, by name; on the reference backend in float64 unless told otherwise. */
export async function unmet(
  family: Family,
  one: VectorCase,
  tolerance: Vectors["tolerance"],
  on: Engine = float64(),
): Promise<string[]> {
  const found = await family(one, on);
  return Object.entries(one.expected).flatMap(([name, value]) =>
    differences(value, found[name], tolerance).map((line) => `${one.id} ${name}: ${line}`),
  );
}
