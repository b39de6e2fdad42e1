// What every set of experts owes to the layer around it, as data: cases that throw. testExperts runs them in vitest.
import {
  alias,
  dispose,
  type Engine,
  engine as engineOf,
  isTensor,
  leaves,
  mapTree,
  random,
  ShapeError,
  type Tensor,
  type Tree,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { combine, dispatchPlan, type Experts, gatherRows, type Initial, type Layout } from "@switchyard/core/moe";
import { assertClose, floats, generator, type HostArray, integers, ints, type Tolerance, uniform } from "./arrays.ts";
import { download, upload } from "./cases/case.ts";
import { gradientCheck } from "./gradient-check.ts";
import { type Answer, array, read, readTree, sameBits } from "./router-answer.ts";

/** What the suite makes experts with: sizes, and where the parameters come from. */
export type ExpertsOptions = { readonly count: number; readonly width: number } & Initial;

export interface ExpertsSuite {
  readonly name: string;
  /** New experts from a seed, or experts with given parameters (then of the tree that `params` of new ones has). */
  make(options: ExpertsOptions): Experts;
  /**
   * One row through one expert, in plain loops: `params` are the parameters by path ("down", "shared.a"). For `unit` above 1, x holds the
   * rows of one unit one after the other, and so does the result.
   */
  row?(params: ReadonlyMap<string, HostArray>, expert: number, x: readonly number[]): readonly number[];
  /** Default 4; experts with `alike: false` are made with this count only. */
  readonly count?: number;
  /** Default 3. */
  readonly width?: number;
  /** Rows that belong together (the patches of an image): blocks and padding are whole units. Default 1. */
  readonly unit?: number;
  /** How rows lie in batch and sequence; default one sequence. */
  layout?(rows: number, engine: Engine): Layout;
  /** Whether each leaf outside `shared` has a slice per expert, and any number of experts can be made; default true. */
  readonly alike?: boolean;
  /** Experts of each mode, where `mixed` takes coefficients for several; default one mode. */
  readonly modes?: readonly number[];
  /** Paths that `observe` must be told of; default: every leaf `[experts, out, in]` outside `shared`. */
  readonly matrices?: readonly string[];
  /** Default: the reference backend with float64 storage. Gradients are always checked there. */
  engine?(): Engine;
  /** For comparisons that need not be bit for bit; defaults 1e-10 and 1e-9. */
  readonly tolerance?: Partial<Tolerance>;
}

/** One check of a set of experts. `run` rejects with the reason when they break it. */
export interface ExpertsCase {
  readonly name: string;
  /** Why the case does not concern these experts at all; such a case is not run. */
  readonly reason?: string;
  run(): Promise<void>;
}

/** Experts made for one case, with parameters drawn by the suite, so that nothing is zero. */
interface Subject {
  readonly engine: Engine;
  readonly count: number;
  readonly experts: Experts;
  readonly params: Tree;
  /** `params` on the host. */
  readonly values: ReadonlyMap<string, HostArray>;
}

interface Kit {
  readonly suite: ExpertsSuite;
  readonly count: number;
  readonly width: number;
  readonly unit: number;
  readonly tolerance: Tolerance;
  /** New experts of the usual size; their tensors are gone. */
  readonly sample: Experts;
  make(
    name: string,
    body: (subject: Subject) => Promise<void>,
    more?: { readonly reason?: string | undefined; readonly count?: number; readonly precise?: boolean },
  ): ExpertsCase;
  layout(rows: number, engine: Engine): Layout;
  /** Output and losses of rows sorted by expert. */
  apply(subject: Subject, rows: HostArray, ends: readonly number[], params?: Tree): Promise<Answer>;
  rows(key: string, units: number): HostArray;
  /** What each unit of rows gives when it comes alone: the naive loop. */
  alone(subject: Subject, rows: HostArray, experts: readonly number[]): Promise<HostArray>;
}

/** The cases of one set of experts, with the reason where one does not apply. */
export function expertsCases(suite: ExpertsSuite): readonly ExpertsCase[] {
  const kit = makeKit(suite);
  return [
    ...parameterCases(kit),
    ...blockCases(kit),
    ...edgeCases(kit),
    ...mixedCases(kit),
    ...fusedCases(kit),
    ...observeCases(kit),
  ];
}

const output = (answer: Answer): HostArray => array(answer, "output");

function makeKit(suite: ExpertsSuite): Kit {
  const { count = 4, width = 3, unit = 1 } = suite;
  const start = (): Engine => suite.engine?.() ?? engineOf(cpu({ precision: 64 }));
  const engine = start();
  const sample = suite.make({ count, width, engine, random: random(engine, 1) });
  dispose(sample.params);
  const layout = (rows: number, on: Engine): Layout =>
    suite.layout?.(rows, on) ?? { batch: 1, sequence: rows, past: 0 };

  const kit: Kit = {
    suite,
    count,
    width,
    unit,
    tolerance: { absolute: 1e-10, relative: 1e-9, ...suite.tolerance },
    sample,
    make(name, body, { reason, count: own = count, precise = false } = {}) {
      const run = async (): Promise<void> => {
        const on = precise ? engineOf(cpu({ precision: 64 })) : start();
        const before = on.live();
        const fresh = suite.make({ count: own, width, engine: on, random: random(on, 1) });
        const params = drawn(on, fresh.params, "params");
        dispose(fresh.params);
        const experts = suite.make({ count: own, width, params });
        const values = await hostValues(params);
        await body({ engine: on, count: own, experts, params, values });
        dispose(params);
        const left = on.live() - before;
        if (left !== 0) throw new Error(`${left} handles were left alive: free what these experts made beside results`);
      };
      return { name, run, ...(reason === undefined ? {} : { reason }) };
    },
    layout,
    apply({ engine: on, experts, params: own }, rows, ends, params = own) {
      const tensors = on.scope(() => {
        const n = rows.shape[0] ?? 0;
        const result = experts.apply(params, upload(on, rows), upload(on, ints([ends.length], ends)), layout(n, on));
        return answered(result);
      });
      return read(tensors);
    },
    rows: (key, units) => uniform(generator(`rows ${key}`), [units * unit, width], -1.5, 1.5),
    async alone(subject, rows, experts) {
      const parts: number[] = [];
      let out = 0;
      for (const [i, e] of experts.entries()) {
        const x = rows.data.slice(i * unit * width, (i + 1) * unit * width);
        const ends = Array.from({ length: subject.count }, (_, other) => (other >= e ? unit : 0));
        const y = output(await kit.apply(subject, { shape: [unit, width], data: x }, ends));
        parts.push(...y.data);
        out = y.shape[1] ?? 0;
      }
      return { shape: [experts.length * unit, out], data: Float64Array.from(parts) };
    },
  };
  return kit;
}

/** References that outlive the scope, by name. */
function answered({ output: y, losses = {} }: ReturnType<Experts["apply"]>): Map<string, Tensor> {
  const found = new Map([["output", alias(y)]]);
  for (const [name, { value }] of Object.entries(losses)) found.set(`loss ${name}`, alias(value));
  return found;
}

const hostValues = async (params: Tree): Promise<ReadonlyMap<string, HostArray>> =>
  new Map([...(await readTree(params, ""))].map(([path, x]) => [path.slice(1), x]));

/** The same tree with every plain f32 leaf drawn anew; ids and packed weights stay. */
function drawn(on: Engine, params: Tree, key: string): Tree {
  return mapTree(params, (x, path) =>
    x.dtype === "f32" && x.format === undefined
      ? upload(on, uniform(generator(`${key} ${path}`), x.shape, -1, 1))
      : alias(x),
  );
}

/** Expert of each unit: 2 for the first, none for the second, 3 for the third, 1 for the fourth, and so on. */
const usual = (count: number): number[] =>
  Array.from({ length: count }, (_, e) => new Array<number>([2, 0, 3, 1][e % 4] ?? 0).fill(e)).flat();

const endsOf = (experts: readonly number[], count: number, unit: number): number[] =>
  Array.from({ length: count }, (_, e) => experts.filter((other) => other <= e).length * unit);

// ---------------------------------------------------------------- parameters
function parameterCases({ suite, count, width, unit, sample, make, apply, rows }: Kit): ExpertsCase[] {
  const none = leaves(sample.params).length === 0 ? "these experts have no parameters" : undefined;
  return [
    make("count is what was asked for, and a seed gives one set of parameters", async ({ engine, experts }) => {
      if (experts.count !== count) throw new Error(`count is ${experts.count}, ${count} experts were asked for`);
      const fresh = async (): Promise<Answer> => {
        const made = suite.make({ count, width, engine, random: random(engine, 7) });
        const found = await readTree(made.params, "");
        dispose(made.params);
        return found;
      };
      const first = await fresh();
      sameBits(first, await fresh(), "made again");
      for (const [path, x] of first)
        if (!x.data.every(Number.isFinite)) throw new Error(`new parameter ${path.slice(1)} is not finite`);
    }),
    make(
      "the parameters handed to apply are the ones that count, and stay as they were",
      async (subject) => {
        const { engine, params } = subject;
        const x = rows("handed", usual(count).length);
        const ends = endsOf(usual(count), count, unit);
        const expected = await apply(subject, x, ends);
        const others = drawn(engine, params, "others");
        const stranger = { ...subject, experts: suite.make({ count, width, params: others }), params: others };
        const own = await apply(stranger, x, ends);
        sameBits(expected, await apply(stranger, x, ends, params), "experts made with other parameters");
        dispose(others);
        if (output(own).data.every((value, i) => value === output(expected).data[i]))
          throw new Error("other parameters give the same output");
        sameBits(subject.values, await hostValues(params), "after apply");
      },
      { reason: none },
    ),
    make(
      "parameters that went through the host give the same output",
      async (subject) => {
        const { engine, params, values } = subject;
        const x = rows("saved", usual(count).length);
        const ends = endsOf(usual(count), count, unit);
        const loaded = mapTree(params, (leaf, path) =>
          leaf.dtype === "f32" && leaf.format === undefined ? upload(engine, array(values, path)) : alias(leaf),
        );
        const again = { ...subject, experts: suite.make({ count, width, params: loaded }), params: loaded };
        sameBits(await apply(subject, x, ends), await apply(again, x, ends), "after saving and loading");
        dispose(loaded);
      },
      { reason: none },
    ),
    make(
      "parameters of wrong shapes are refused",
      async ({ engine, params }) => {
        for (const [wrong] of leaves(params)) {
          const refused = (what: string, tree: Tree): void => {
            try {
              suite.make({ count, width, params: tree });
            } catch (error) {
              if (error instanceof ShapeError) return;
              throw new Error(`parameter ${wrong} ${what}: expected a ShapeError, found ${error}`);
            }
            throw new Error(`parameter ${wrong} ${what}: expected a ShapeError, nothing was thrown`);
          };
          engine.scope(() => {
            const longer = (x: Tensor): Tensor => {
              const shape = [...x.shape.slice(0, -1), (x.shape.at(-1) ?? 1) + 1];
              return upload(engine, floats(shape, new Float64Array(shape.reduce((n, d) => n * d, 1))));
            };
            refused(
              "one entry too long",
              mapTree(params, (x, path) => (path === wrong ? longer(x) : x)),
            );
            refused("left out", without(params, wrong));
          });
        }
      },
      { reason: none },
    ),
  ];
}

/** The tree without the leaf at that path. */
function without(tree: Tree, path: string, at = ""): Tree {
  if (isTensor(tree)) return tree;
  const kept = Object.entries(tree)
    .map(([key, child]): [string, Tree] => [key, child])
    .filter(([key]) => `${at}${key}` !== path)
    .map(([key, child]): [string, Tree] => [key, without(child, path, `${at}${key}.`)]);
  return Array.isArray(tree) ? kept.map(([, child]) => child) : Object.fromEntries(kept);
}

// ---------------------------------------------------------------- blocks
function blockCases(kit: Kit): ExpertsCase[] {
  const { suite, count, width, unit, tolerance, make, apply, rows, alone, layout } = kit;
  const { alike = true } = suite;
  const differ = alike ? undefined : "the experts are not alike";
  const patterns = [
    ["an expert without rows", usual(count)],
    ["all rows to the last expert", [count - 1, count - 1, count - 1]],
    ["all rows to the first expert", [0, 0]],
  ] as const;
  return [
    ...patterns.map(([what, pattern]) =>
      make(`rows sorted by expert give what each gives alone: ${what}`, async (subject) => {
        const x = rows(what, pattern.length);
        const found = await apply(subject, x, endsOf(pattern, count, unit));
        assertClose("output", output(found), await alone(subject, x, pattern), tolerance);
      }),
    ),
    make(
      "each row gives what the plain loop gives",
      async (subject) => {
        const pattern = usual(count);
        const x = rows("plain", pattern.length);
        const found = output(await apply(subject, x, endsOf(pattern, count, unit)));
        const expected = pattern.flatMap((e, i) => [
          ...(suite.row?.(subject.values, e, [...x.data.slice(i * unit * width, (i + 1) * unit * width)]) ?? []),
        ]);
        assertClose("output", found, { shape: found.shape, data: Float64Array.from(expected) }, tolerance);
      },
      { reason: suite.row ? undefined : "the suite was given no plain loop" },
    ),
    make("rows beyond the last block give zeros and change nothing", async (subject) => {
      const pattern = usual(count);
      const ends = endsOf(pattern, count, unit);
      const filled = pattern.length * unit;
      const x = rows("beyond", pattern.length + 2);
      const other = { ...x, data: x.data.map((value, i) => (i < filled * width ? value : 7 - 3 * value)) };
      const found = await apply(subject, x, ends);
      sameBits(found, await apply(subject, other, ends), "other rows beyond the last block");
      const y = output(found);
      const from = filled * (y.shape[1] ?? 0);
      const stray = y.data.slice(from).findIndex((value) => value !== 0);
      if (stray >= 0) throw new Error(`an entry beyond the last block is ${y.data[from + stray]}, expected 0`);
      const short = await apply(subject, { shape: [filled, width], data: x.data.slice(0, filled * width) }, ends);
      for (const [name, value] of short) {
        const whole = array(found, name);
        const kept = name === "output" ? { shape: value.shape, data: whole.data.slice(0, from) } : whole;
        assertClose(`${name} without rows beyond the last block`, kept, value, tolerance);
      }
    }),
    make(
      "an expert is its own slice of the parameters",
      async (subject) => {
        const { engine, params } = subject;
        const pattern = usual(count);
        const x = rows("slice", pattern.length);
        const expected = output(await apply(subject, x, endsOf(pattern, count, unit)));
        const out = expected.shape[1] ?? 0;
        for (const e of new Set(pattern)) {
          const own = mapTree(params, (leaf, path) =>
            isShared(path) ? alias(leaf) : upload(engine, sliceOf(array(subject.values, path), e)),
          );
          const single = { ...subject, count: 1, experts: suite.make({ count: 1, width, params: own }), params: own };
          const [first, n] = [pattern.indexOf(e) * unit, pattern.filter((other) => other === e).length * unit];
          const part: HostArray = { shape: [n, width], data: x.data.slice(first * width, (first + n) * width) };
          const found = output(await apply(single, part, [n]));
          dispose(own);
          const wanted = { shape: [n, out], data: expected.data.slice(first * out, (first + n) * out) };
          assertClose(`expert ${e} alone`, found, wanted, tolerance);
        }
      },
      { reason: differ },
    ),
    make(
      "gradients of parameters and rows agree with central differences",
      async ({ engine, experts, params, values }) => {
        const pattern = usual(count);
        const ends = endsOf(pattern, count, unit);
        const x = rows("gradients", pattern.length + 1);
        const trained = trainedPaths(params);
        await gradientCheck(
          ([hidden, ...own]) => {
            if (!hidden) throw new Error("no rows");
            const tree = replaced(params, trained, own);
            const found = experts.apply(
              tree,
              hidden,
              upload(engine, ints([count], ends)),
              layout(x.shape[0] ?? 0, engine),
            );
            return [found.output, ...Object.values(found.losses ?? {}).map(({ value }) => value)];
          },
          [x, ...trained.map((path) => array(values, path))],
          { engine },
        );
      },
      { precise: true },
    ),
    make("losses are finite numbers with finite weights", async ({ engine, experts, params }) => {
      const pattern = usual(count);
      const x = rows("losses", pattern.length);
      const read = engine.scope(() => {
        const ends = upload(engine, ints([count], endsOf(pattern, count, unit)));
        const { losses = {} } = experts.apply(params, upload(engine, x), ends, layout(x.shape[0] ?? 0, engine));
        return Object.entries(losses).map(([name, { value, weight }]) => ({ name, value: alias(value), weight }));
      });
      for (const { name, value, weight } of read) {
        const [number, ...more] = await value.data();
        const { shape } = value;
        value.dispose();
        if (shape.length > 0 || more.length > 0) throw new Error(`loss ${name} has the shape [${shape.join(", ")}]`);
        if (!Number.isFinite(number) || !Number.isFinite(weight))
          throw new Error(`loss ${name} is ${number} with weight ${weight}`);
      }
    }),
    make("nothing but output and losses outlives the scope", async ({ engine, experts, params }) => {
      const x = rows("scope", usual(count).length);
      const before = engine.live();
      const results = engine.scope(() => {
        const ends = upload(engine, ints([count], endsOf(usual(count), count, unit)));
        const found = experts.apply(params, upload(engine, x), ends, layout(x.shape[0] ?? 0, engine));
        return { output: found.output, losses: Object.values(found.losses ?? {}).map(({ value }) => value) };
      });
      const kept = engine.live() - before;
      dispose([results.output, ...results.losses]);
      if (kept !== 1 + results.losses.length)
        throw new Error(`${kept} handles outlive the scope, expected ${1 + results.losses.length}`);
    }),
  ];
}

const isShared = (path: string): boolean => path.split(".").includes("shared");
const trainedPaths = (params: Tree): string[] =>
  leaves(params).flatMap(([path, x]) => (x.dtype === "f32" && x.format === undefined ? [path] : []));
const replaced = (params: Tree, paths: readonly string[], by: readonly Tensor[]): Tree =>
  mapTree(params, (x, path) => by[paths.indexOf(path)] ?? x);

function sliceOf(x: HostArray, e: number): HostArray {
  const [, ...rest] = x.shape;
  const size = rest.reduce((n, d) => n * d, 1);
  return { shape: [1, ...rest], data: x.data.slice(e * size, (e + 1) * size) };
}

// ---------------------------------------------------------------- edges
function edgeCases({ suite, count, unit, make, apply, rows, alone, tolerance }: Kit): ExpertsCase[] {
  const { alike = true } = suite;
  const checkFinite = (answer: Answer): void => {
    for (const [name, x] of answer)
      if (!x.data.every(Number.isFinite)) throw new Error(`${name} is not finite: ${x.data.slice(0, 5).join(", ")}`);
  };
  return [
    make("no rows", async (subject) => {
      const found = await apply(subject, rows("none", 0), new Array<number>(count).fill(0));
      const { shape } = output(found);
      if (shape.length !== 2 || shape[0] !== 0) throw new Error(`the output of no rows is [${shape.join(", ")}]`);
      checkFinite(found);
    }),
    make("rows of which none belongs to an expert", async (subject) => {
      const found = await apply(subject, rows("nobody", 3), new Array<number>(count).fill(0));
      checkFinite(found);
      if (output(found).data.some((value) => value !== 0)) throw new Error("the output is not zero");
      if (output(found).shape[0] !== 3 * unit) throw new Error(`the output has ${output(found).shape[0]} rows`);
    }),
    make(
      "one expert",
      async (subject) => {
        const x = rows("one", 3);
        const found = await apply(subject, x, [3 * unit]);
        assertClose("output", output(found), await alone(subject, x, [0, 0, 0]), tolerance);
      },
      { count: 1, reason: alike ? undefined : "the experts are not alike" },
    ),
  ];
}

// ---------------------------------------------------------------- mixed
function mixedCases(kit: Kit): ExpertsCase[] {
  const { suite, count, width, unit, sample, tolerance, make, rows, alone, layout, apply } = kit;
  const { modes = [count], alike = true } = suite;
  const absent = sample.mixed ? undefined : "these experts have no mixed";
  const oneMode = modes.length === 1 ? undefined : "these experts have several modes";
  const size = modes.reduce((n, d) => n * d, 1);
  if (size !== count) throw new Error(`modes ${modes.join(" x ")} of ${count} experts; expected as many`);
  /** Coefficients that name expert e in every mode, one row per expert. */
  const named = modes.map((n, mode) => {
    const below = modes.slice(mode + 1).reduce((product, d) => product * d, 1);
    return floats(
      [count, n],
      Array.from({ length: count * n }, (_, i) => Number(Math.floor(Math.floor(i / n) / below) % n === i % n)),
    );
  });
  const mixed = async (
    { engine, experts, params }: Subject,
    x: HostArray,
    { groups, coefficients }: { readonly groups: HostArray; readonly coefficients: readonly HostArray[] },
  ): Promise<HostArray> => {
    const y = engine.scope(() => {
      const plan = {
        kind: "merge",
        groups: upload(engine, groups),
        coefficients: coefficients.map((c) => upload(engine, c)),
      } as const;
      const found = experts.mixed?.(params, upload(engine, x), plan, layout(x.shape[0] ?? 0, engine));
      if (!found) throw new Error("new experts had mixed, these have not");
      return alias(found);
    });
    const found = await download(y);
    y.dispose();
    return found;
  };
  const eachGroup = (of: number): number[] => Array.from({ length: of + 2 }, (_, i) => ((i + 1) % (of + 1)) - 1);
  const perRow = (groups: readonly number[]): HostArray =>
    ints(
      [groups.length * unit],
      groups.flatMap((g) => new Array<number>(unit).fill(g)),
    );
  return [
    make(
      "mixed with one-hot coefficients is that expert, and a token without group gets zeros",
      async (subject) => {
        const groups = eachGroup(count);
        const x = rows("one-hot", groups.length);
        const found = await mixed(subject, x, { groups: perRow(groups), coefficients: named });
        const every = await alone(
          subject,
          x,
          groups.map((g) => Math.max(g, 0)),
        );
        const part = every.data.length / Math.max(groups.length, 1);
        const data = Float64Array.from(every.data, (value, i) =>
          (groups[Math.floor(i / part)] ?? -1) < 0 ? 0 : value,
        );
        assertClose("mixed", found, { shape: every.shape, data }, tolerance);
        const none = await mixed(subject, rows("one-hot", 0), { groups: perRow([]), coefficients: named });
        if (none.shape[0] !== 0) throw new Error(`mixed of no tokens is [${none.shape.join(", ")}]`);
      },
      { reason: absent },
    ),
    make(
      "mixed is one expert whose parameters are the mixture",
      async (subject) => {
        const { engine, params, values } = subject;
        const x = rows("mixture", 3);
        const shares = uniform(generator("shares"), [1, count], -0.5, 1);
        const mixture = mapTree(params, (leaf, path) => {
          const whole = array(values, path);
          if (isShared(path)) return alias(leaf);
          const parts = Array.from({ length: count }, (_, e) => sliceOf(whole, e));
          const data = Float64Array.from(parts[0]?.data ?? [], (_, i) =>
            parts.reduce((total, part, e) => total + (shares.data[e] ?? 0) * (part.data[i] ?? 0), 0),
          );
          return upload(engine, { shape: parts[0]?.shape ?? [], data });
        });
        const single = {
          ...subject,
          count: 1,
          experts: suite.make({ count: 1, width, params: mixture }),
          params: mixture,
        };
        const expected = output(await apply(single, x, [3 * unit]));
        dispose(mixture);
        const found = await mixed(subject, x, { groups: perRow([0, 0, 0]), coefficients: [shares] });
        assertClose("mixed", found, expected, tolerance);
      },
      { reason: absent ?? oneMode ?? (alike ? undefined : "the experts are not alike") },
    ),
    make(
      "gradients of mixed agree with central differences",
      async ({ engine, experts, params, values }) => {
        const groups = [1, 0, -1, 1];
        const x = rows("mixed gradients", groups.length);
        const trained = trainedPaths(params);
        const shares = modes.map((n, mode) => uniform(generator(`shares ${mode}`), [2, n], 0.2, 1));
        await gradientCheck(
          ([hidden, ...rest]) => {
            if (!hidden) throw new Error("no rows");
            const tree = replaced(params, trained, rest.slice(modes.length));
            const plan = {
              kind: "merge",
              groups: upload(engine, perRow(groups)),
              coefficients: rest.slice(0, modes.length),
            } as const;
            const found = experts.mixed?.(tree, hidden, plan, layout(x.shape[0] ?? 0, engine));
            if (!found) throw new Error("new experts had mixed, these have not");
            return found;
          },
          [x, ...shares, ...trained.map((path) => array(values, path))],
          { engine },
        );
      },
      { reason: absent, precise: true },
    ),
  ];
}

// ---------------------------------------------------------------- fused
function fusedCases({ count, width, sample, tolerance, make, layout }: Kit): ExpertsCase[] {
  const reason = sample.fused ? undefined : "these experts have no fused";
  const tokens = 7;
  const hidden = uniform(generator("fused hidden"), [tokens, width], -1.5, 1.5);
  // From empty slots (-1) to null experts (count).
  const ids = integers(generator("fused ids"), [tokens, 2], -1, count + 1);
  const weights = uniform(generator("fused weights"), [tokens, 2], -1, 1);
  const fused = (experts: Experts, params: Tree, xs: { x: Tensor; weights: Tensor; ids: Tensor }): Tensor => {
    const found = experts.fused?.(params, xs.x, { kind: "sparse", experts: xs.ids, weights: xs.weights });
    if (!found) throw new Error("new experts had fused, these have not");
    return found;
  };
  return [
    make(
      "fused is dispatch, apply and combine",
      async ({ engine, experts, params }) => {
        const tensors = engine.scope(() => {
          const plan = { kind: "sparse", experts: upload(engine, ids), weights: upload(engine, weights) } as const;
          const x = upload(engine, hidden);
          const dispatched = dispatchPlan(plan, count);
          const rows = gatherRows(x, dispatched);
          const applied = experts.apply(params, rows, dispatched.ends, layout(rows.shape[0] ?? 0, engine));
          const slow = combine(plan, dispatched, applied.output, tokens);
          const fast = fused(experts, params, { x, weights: plan.weights, ids: plan.experts });
          return new Map([
            ["fast", alias(fast)],
            ["slow", alias(slow)],
          ]);
        });
        const found = await read(tensors);
        assertClose("fused", array(found, "fast"), array(found, "slow"), tolerance);
      },
      { reason },
    ),
    make(
      "gradients of fused agree with central differences",
      async ({ engine, experts, params, values }) => {
        const trained = trainedPaths(params);
        await gradientCheck(
          ([x, w, ...own]) => {
            if (!x || !w) throw new Error("no inputs");
            return fused(experts, replaced(params, trained, own), { x, weights: w, ids: upload(engine, ids) });
          },
          [hidden, weights, ...trained.map((path) => array(values, path))],
          { engine },
        );
      },
      { reason, precise: true },
    ),
  ];
}

// ---------------------------------------------------------------- observe
function observeCases({ suite, count, unit, sample, make, apply, rows, layout }: Kit): ExpertsCase[] {
  const stacked = leaves(sample.params).flatMap(([path, x]) => (x.shape.length === 3 && !isShared(path) ? [path] : []));
  const { matrices = stacked } = suite;
  return [
    make(
      "observe is told the inputs of every matrix and changes nothing",
      async (subject) => {
        const { engine, experts, params } = subject;
        const pattern = usual(count);
        const ends = endsOf(pattern, count, unit);
        const x = rows("observe", pattern.length);
        const told = new Map<string, { readonly rows: readonly number[]; readonly ends: readonly number[] }>();
        const tensors = engine.scope(() =>
          answered(
            experts.apply(
              params,
              upload(engine, x),
              upload(engine, ints([count], ends)),
              layout(x.shape[0] ?? 0, engine),
              (parameter, inputs, blocks) => {
                told.set(parameter, { rows: inputs.shape, ends: blocks.shape });
              },
            ),
          ),
        );
        sameBits(await apply(subject, x, ends), await read(tensors), "observed");
        const known = new Map(leaves(params));
        for (const [parameter, seen] of told) {
          const leaf = known.get(parameter);
          if (!leaf) throw new Error(`observe was told of "${parameter}", which is no parameter`);
          if (seen.ends.length !== 1) throw new Error(`${parameter}: ends are [${seen.ends.join(", ")}]`);
          const inner = leaf.shape.at(-1);
          if (leaf.shape.length === 3 && (seen.rows.length !== 2 || seen.rows[1] !== inner))
            throw new Error(`${parameter}: inputs are [${seen.rows.join(", ")}], expected [rows, ${inner}]`);
        }
        const missed = matrices.filter((path) => !told.has(path));
        if (missed.length > 0)
          throw new Error(`observe was not told of ${missed.join(", ")}, only of ${[...told.keys()].join(", ")}`);
      },
      { reason: matrices.length === 0 ? "these experts have no matrices" : undefined },
    ),
  ];
}
