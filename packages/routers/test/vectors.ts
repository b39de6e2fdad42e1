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
  /** Truth values are 0 and 1. */
  readonly config: Readonly<Record<string, number | string>>;
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

export function given<V>(of: Readonly<Record<string, V>>, name: string): V {
  const value = of[name];
  if (value === undefined) throw new Error(`the case has no "${name}"; it has ${Object.keys(of).join(", ")}`);
  return value;
}
export const number = (one: VectorCase, name: string): number => Number(given(one.config, name));
export const word = (one: VectorCase, name: string): string => String(given(one.config, name));
/** A number of the config; where it is absent, the value that the algorithm takes by default. */
export const numberOr = (one: VectorCase, name: string, otherwise: number): number =>
  Number(one.config[name] ?? otherwise);
/** Throws unless the config leaves `name` out or has one of these values: nothing else is computed in silence. */
export function only(one: VectorCase, name: string, values: readonly (number | string)[]): void {
  const value = one.config[name];
  // Truth values are numbers here.
  if (value === undefined || values.some((known) => known === value || known === Number(value))) return;
  throw new Error(`the case has ${name} = ${JSON.stringify(value)}; known are ${values.join(", ")}`);
}
/** Throws unless the config leaves the size `name` out or agrees with what the inputs have. */
export function sized(one: VectorCase, name: string, found: number): void {
  const value = one.config[name];
  if (value !== undefined && Number(value) !== found)
    throw new Error(`the case has ${name} = ${value}, but its inputs have ${found}`);
}
/** The number of experts of a case whose inputs do not tell: from its config, else from its id ("hash_V12_E4"). */
export function expertsOf(one: VectorCase): number {
  const experts = Number(one.config.experts ?? one.config.E ?? /(?:^|_)E(\d+)(?:_|$)/.exec(one.id)?.[1]);
  if (Number.isInteger(experts) && experts > 0) return experts;
  throw new Error(`case "${one.id}" does not tell its experts; put "experts" into its config, or E4 into its id`);
}
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

/** What float32 is allowed: 1e-5 of the largest magnitude in the array, and near 0 the 1e-9 that float64 has too. */
export function float32Tolerance(expected: Values): Vectors["tolerance"] {
  const largest = flat(expected).reduce((top, x) => (Number.isFinite(x) ? Math.max(top, Math.abs(x)) : top), 0);
  return { abs: 1e-9 + 1e-5 * largest, rel: 0 };
}

/** Differences between what was found and what is expected, as lines; empty when they meet. */
export function differences(expected: Values, found: Values | undefined, tolerance: Vectors["tolerance"]): string[] {
  if (found === undefined) return ["nothing was computed under this name"];
  if (shapeOf(expected).join() !== shapeOf(found).join())
    return [`shape [${shapeOf(found)}], expected [${shapeOf(expected)}]`];
  const values = flat(found);
  return flat(expected).flatMap((value, i) => {
    const error = Math.abs((values[i] ?? Number.NaN) - value);
    const bound = Number.isFinite(value) ? tolerance.abs + tolerance.rel * Math.abs(value) : 0;
    return Object.is(values[i], value) || error <= bound ? [] : [`entry ${i}: ${values[i]}, expected ${value}`];
  });
}

/** The vectors of a file of the fixtures. */
export function readVectors(file: string): Vectors {
  return parseVectors(readFileSync(new URL(`fixtures/${file}.json`, import.meta.url), "utf8"), file);
}

/** A file of the second layout: `kind` tells what a case is about, sizes and inputs stand beside each other. */
interface KindVectors {
  readonly paper: string;
  readonly tolerance: number;
  readonly cases: readonly ({ readonly kind: string } & Readonly<Record<string, unknown>>)[];
}

/**
 * Case kinds of the second layout whose expected values stand beside the inputs instead of under `expected`, and their
 * names.
 */
const expectedBeside: Readonly<Record<string, readonly string[]>> = {
  "similarity-sanity": ["loss", "switchBalanceLoss", "maxVio", "combinationUsage95"],
};

/** A file of the third layout: `meta` tells what all cases are about. */
interface SuiteVectors {
  readonly meta: { readonly suite: string; readonly absTol: number; readonly relTol: number };
  readonly cases: readonly {
    readonly name: string;
    readonly inputs: Readonly<Record<string, unknown>>;
    readonly expected: Readonly<Record<string, unknown>>;
  }[];
}

/** Family = "prune-" and the suite, config = inputs that are one number, truth value or word, inputs = those that are lists. */
function ofSuite({ meta, cases }: SuiteVectors): Vectors {
  return {
    family: `prune-${meta.suite}`,
    tolerance: { abs: meta.absTol, rel: meta.relTol },
    cases: cases.map((one) => {
      const config: Record<string, number | string> = {};
      const inputs: Record<string, Values> = {};
      for (const [path, value] of named(one.inputs)) {
        const key = path.join(".");
        if (typeof value === "object") inputs[key] = value;
        else config[key] = value;
      }
      return { id: one.name, config, inputs, expected: flattened(one.expected) };
    }),
  };
}

/**
 * The vectors in a file's text, of any layout. Records inside `expected` of the first one give names with points. Those
 * of the second one become: family = `name`, id = kind and
 * position, config = what is one number, truth value or word (`kind` among them), inputs = what is a list. What is null
 * is left out. A record inside a case gives names with points: what stands in `layers[0].h` is called "layers.0.h", what
 * stands in `expected.gates.sigmoid` or `gates.expected.sigmoid` is expected as "gates.sigmoid".
 */
export function parseVectors(text: string, name: string): Vectors {
  const infinite = new Map([
    ["-Infinity", Number.NEGATIVE_INFINITY],
    ["-inf", Number.NEGATIVE_INFINITY],
    ["Infinity", Number.POSITIVE_INFINITY],
    ["inf", Number.POSITIVE_INFINITY],
    ["NaN", Number.NaN],
  ]);
  const file: Vectors | KindVectors | SuiteVectors = JSON.parse(text, (_, value) =>
    typeof value === "string" ? (infinite.get(value) ?? value) : typeof value === "boolean" ? Number(value) : value,
  );
  if ("meta" in file) return ofSuite(file);
  if (!("paper" in file)) {
    // What a case leaves out is missed by name where a family asks for it.
    const empty = { config: {}, inputs: {} };
    return { ...file, cases: file.cases.map((one) => ({ ...empty, ...one, expected: flattened(one.expected) })) };
  }
  return {
    family: name,
    tolerance: { abs: 1e-9, rel: file.tolerance },
    cases: file.cases.map((one, i) => {
      const config: Record<string, number | string> = {};
      const inputs: Record<string, Values> = {};
      const expected: Record<string, Values> = {};
      for (const [path, value] of named(one)) {
        const own = path.at(-1) ?? "";
        const wanted = path.includes("expected") || (path.length > 1 && expectedBeside[one.kind]?.includes(own));
        const key = path.filter((part) => part !== "expected").join(".");
        if (typeof value === "string") config[key] = value;
        else if (wanted) expected[key] = value;
        else if (typeof value === "number") config[key] = value;
        else inputs[key] = value;
      }
      return { id: `${one.kind} ${i}`, config, inputs, expected };
    }),
  };
}

/** Records inside `expected` as names with points: what stands in `v3.scores` is called "v3.scores". */
function flattened(expected: Readonly<Record<string, unknown>>): Readonly<Record<string, Values>> {
  const pairs = named(expected).map(([path, value]): [string, Values] => {
    if (typeof value === "string") throw new Error(`expected ${path.join(".")} is the word "${value}", not numbers`);
    return [path.join("."), value];
  });
  return Object.fromEntries(pairs);
}

/** A list of numbers, its truth values as 0 and 1. */
const counted = (list: readonly unknown[]): readonly Values[] =>
  list.map((x) => (Array.isArray(x) ? counted(x) : typeof x === "boolean" ? Number(x) : (x as Values)));

/** The words, numbers and lists of numbers in a record, with the way to each; truth values are numbers, null is nothing. */
function named(value: unknown, path: readonly string[] = []): [readonly string[], Values | string][] {
  if (value === null || value === undefined) return [];
  if (typeof value === "boolean") return [[path, Number(value)]];
  if (typeof value === "number" || typeof value === "string") return [[path, value]];
  const records = Array.isArray(value) && value.some((x) => typeof x === "object" && x !== null && !Array.isArray(x));
  if (Array.isArray(value) && !records) return [[path, counted(value)]];
  return Object.entries(value).flatMap(([key, x]) => named(x, [...path, key]));
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
