// What expert sets share: their parameter trees (new or given), products with a bias, mixtures beside a shared part.
// Not exported by the package.
import { ShapeError } from "../errors.ts";
import { type Initial, mixParameters } from "../moe/experts.ts";
import { biasRows, child } from "../moe/parts.ts";
import type { MergePlan } from "../moe/plan.ts";
import { add } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import type { Random } from "../random.ts";
import { isTensor, leaves, show, sizeOf, type Tensor, type Tree } from "../tensor.ts";

/** Shapes by path; a path is a name, or "shared." and a name. */
export type Shapes = Readonly<Record<string, readonly number[]>>;

/** Throws ShapeError unless every size is a whole number from 1. */
export function checkSizes(kind: string, sizes: Readonly<Record<string, number>>): void {
  for (const [name, n] of Object.entries(sizes))
    if (!Number.isInteger(n) || n < 1) throw new ShapeError(`${kind}: ${name} = ${n}; expected a whole number from 1`);
}

/** Numbers of a new parameter; undefined: zeros. */
export type Draw = (path: string, shape: readonly number[], random: Random) => Float64Array | undefined;

/** The given parameters, if they have these shapes (else ShapeError), or new ones. */
export function parameters(kind: string, shapes: Shapes, options: Initial, draw: Draw): Tree {
  if ("params" in options) {
    const found = new Map(leaves(options.params));
    for (const [path, shape] of Object.entries(shapes)) {
      const x = found.get(path);
      if (x === undefined || x.shape.join() !== shape.join()) {
        throw new ShapeError(
          `${kind}: parameter "${path}" is ${x ? show(x) : "missing"}, expected [${shape.join(", ")}]`,
        );
      }
    }
    return options.params;
  }
  const { engine, random } = options;
  const own: Record<string, Tensor> = {};
  const shared: Record<string, Tensor> = {};
  for (const [path, shape] of Object.entries(shapes)) {
    const x = engine.tensor(draw(path, shape, random.at(path)) ?? new Float64Array(sizeOf(shape)), shape);
    if (path.startsWith("shared.")) shared[path.slice("shared.".length)] = x;
    else own[path] = x;
  }
  return Object.keys(shared).length > 0 ? { ...own, shared } : own;
}

/** Uniform in [-bound, bound). */
export const uniformWithin = (random: Random, shape: readonly number[], bound: number): Float64Array =>
  random.host("uniform", sizeOf(shape)).map((u) => bound * (2 * u - 1));

/** The tensor at a path such as "shared.a"; ShapeError where there is none. */
export function leafAt(params: Tree, path: string): Tensor {
  const found = path.split(".").reduce<Tree | undefined>((tree, name) => tree && child(tree, name), params);
  if (found === undefined || !isTensor(found)) {
    const names = leaves(params).map(([name]) => name);
    throw new ShapeError(`experts: the parameters lack a tensor "${path}"; they have ${names.join(", ") || "nothing"}`);
  }
  return found;
}

/** Each row times its expert's matrix, plus its expert's bias: w `[experts, out, in]`, bias `[experts, out]` -> `[n, out]`. */
export function groupedLinear(x: Tensor, w: Tensor, ends: Tensor, bias?: Tensor): Tensor {
  const y = groupedMatmul(x, w, ends);
  return bias ? add(y, biasRows(bias, ends, x.shape[0] ?? 0)) : y;
}

/** `mixParameters` for experts that have a part in common: what stands under `shared` is handed on as it is. */
export function mixOwn(
  params: Tree,
  hidden: Tensor,
  plan: MergePlan,
  run: (params: Tree, rows: Tensor, ends: Tensor) => Tensor,
): Tensor {
  const shared = child(params, "shared");
  if (shared === undefined || isTensor(params)) return mixParameters(params, hidden, plan, run);
  const own = Object.fromEntries(Object.entries(params).filter(([name]) => name !== "shared"));
  return mixParameters(own, hidden, plan, (mixture, rows, ends) => run({ ...record(mixture), shared }, rows, ends));
}

const record = (tree: Tree): Readonly<Record<string, Tree>> =>
  isTensor(tree) ? {} : Object.fromEntries(Object.entries(tree).map(([name, one]): [string, Tree] => [name, one]));
