// Expert sets: gated (glu) and plain (ffn) feed-forward experts with stacked parameters, run by grouped matmuls.
import type { Engine } from "../engine.ts";
import { ShapeError, UnsupportedError } from "../errors.ts";
import { add, affine, mul, square, swiglu } from "../ops/elementwise.ts";
import { dispatch, groupedMatmul, moeExperts } from "../ops/experts.ts";
import { matmul } from "../ops/matmul.ts";
import { addRows, takeRows } from "../ops/rows.ts";
import { reshape, slice } from "../ops/shape.ts";
import type { Random } from "../random.ts";
import { isTensor, leaves, mapTree, show, type Tensor, type Tree } from "../tensor.ts";
import { activations, biasRows, child } from "./parts.ts";
import type { Experts, MergePlan, Observe } from "./plan.ts";

export type Activation = "silu" | "gelu" | "gelu-tanh" | "relu";

/** New parameters (normal, standard deviation 1/sqrt(inputs)) or given ones, such as a checkpoint's. */
export type Initial = { readonly engine: Engine; readonly random: Random } | { readonly params: Tree };

interface Sizes {
  readonly count: number;
  /** Width of the tokens. */
  readonly width: number;
  /** Width inside each expert. */
  readonly hidden: number;
  /** Adds `gateUpBias` / `upBias` and `downBias`; default false. */
  readonly bias?: boolean;
}
export type GluOptions = Sizes & {
  /** silu makes SwiGLU (2002.05202, the default), gelu GeGLU, relu ReGLU. */
  readonly activation?: Activation;
} & Initial;
export type FfnOptions = Sizes & {
  /** Default relu. */
  readonly activation?: Activation;
  /** Squares what the activation gives: relu and squared make the ReLU² of Primer (2109.08668). Default false. */
  readonly squared?: boolean;
} & Initial;

/**
 * Gated experts, y = down (act(gate x) * up x). Params: `gateUp [count, 2 hidden, width]` (gate rows, then up rows),
 * `down [count, width, hidden]`, with `bias` also `gateUpBias [count, 2 hidden]` and `downBias [count, width]`.
 */
export function glu(options: GluOptions): Experts {
  const { count, width, hidden, activation = "silu", bias = false } = options;
  const shapes = {
    gateUp: [count, 2 * hidden, width],
    down: [count, width, hidden],
    ...(bias ? { gateUpBias: [count, 2 * hidden], downBias: [count, width] } : {}),
  };
  const act = activations[activation];
  const experts = makeExperts("glu", shapes, options, ({ matrix, rows, n }) => {
    const both = matrix("gateUp", rows); // [n, 2 hidden]
    if (activation === "silu") return matrix("down", swiglu(both));
    return matrix("down", mul(act(slice(both, [0, 0], [n, hidden])), slice(both, [0, hidden], [n, hidden])));
  });
  if (activation !== "silu" || bias) return experts;
  return {
    ...experts,
    fused(params, tokens, { experts: ids, weights, bound }) {
      const matrices = { gateUp: leaf(params, "gateUp"), down: leaf(params, "down") };
      const limit = bound === undefined ? {} : { bound: Math.min(bound, ids.size) };
      return moeExperts(tokens, matrices, { ids, weights }, limit);
    },
  };
}

/**
 * Plain experts, y = down act(up x). Params: `up [count, hidden, width]`, `down [count, width, hidden]`, with `bias` also
 * `upBias [count, hidden]` and `downBias [count, width]`.
 */
export function ffn(options: FfnOptions): Experts {
  const { count, width, hidden, activation = "relu", squared = false, bias = false } = options;
  const shapes = {
    up: [count, hidden, width],
    down: [count, width, hidden],
    ...(bias ? { upBias: [count, hidden], downBias: [count, width] } : {}),
  };
  const act = activations[activation];
  return makeExperts("ffn", shapes, options, ({ matrix, rows }) => {
    const inner = act(matrix("up", rows)); // [n, hidden]
    return matrix("down", squared ? square(inner) : inner);
  });
}

interface Body {
  readonly rows: Tensor;
  readonly n: number;
  /** x times the matrix of that name, plus its bias where there is one. */
  matrix(name: string, x: Tensor): Tensor;
}

function makeExperts(
  kind: string,
  shapes: Readonly<Record<string, readonly number[]>>,
  options: Sizes & Initial,
  body: (parts: Body) => Tensor,
): Experts {
  const sizes = [options.count, options.width, options.hidden];
  if (sizes.some((n) => !Number.isInteger(n) || n < 1)) {
    throw new ShapeError(`${kind}: count, width and hidden are ${sizes.join(", ")}, expected whole numbers from 1`);
  }
  const params = "params" in options ? checked(kind, shapes, options.params) : initial(shapes, options);
  const hasBias = options.bias ?? false;

  const run = (given: Tree, rows: Tensor, ends: Tensor, observe?: Observe): Tensor => {
    const n = rows.shape[0] ?? 0;
    return body({
      rows,
      n,
      matrix(name, x) {
        observe?.(name, x, ends);
        const y = groupedMatmul(x, leaf(given, name), ends);
        return hasBias ? add(y, biasRows(leaf(given, `${name}Bias`), ends, n)) : y;
      },
    });
  };

  return {
    count: options.count,
    params,
    apply: (given, rows, ends, _, observe) => ({ output: run(given, rows, ends, observe) }),
    mixed: (given, hidden, plan) => mixParameters(given, hidden, plan, run),
  };
}

/**
 * The `mixed` of experts whose leaves are all `[experts, ...]`: each group's parameters are the sum of the experts' weighted by
 * `coefficients [groups, experts]` (SMEAR 2306.03745); then `run` treats the groups as the experts. Gives [tokens, width].
 */
export function mixParameters(
  params: Tree,
  hidden: Tensor,
  plan: MergePlan,
  run: (params: Tree, rows: Tensor, ends: Tensor) => Tensor,
): Tensor {
  const [coefficients, ...more] = plan.coefficients;
  if (coefficients === undefined || more.length > 0) {
    throw new UnsupportedError(
      `these experts have one expert mode, the merge plan has ${plan.coefficients.length}; use factorised experts or one mode`,
    );
  }
  const [groups = 0, experts = 0] = coefficients.shape;
  const mixture = mapTree(params, (x) => {
    const [count = 0, ...rest] = x.shape;
    if (count !== experts) {
      throw new ShapeError(
        `merge plan: coefficients are ${show(coefficients)}, a parameter is ${show(x)}; expected as many experts`,
      );
    }
    return reshape(matmul(coefficients, reshape(x, [count, x.size / Math.max(count, 1)])), [groups, ...rest]);
  });
  const tokens = plan.groups.size;
  if (hidden.shape[0] !== tokens) {
    throw new ShapeError(
      `merge plan: groups are ${show(plan.groups)} for hidden ${show(hidden)}; expected one per token`,
    );
  }
  const { rows, ends } = dispatch(reshape(plan.groups, [tokens, 1]), { count: groups, bound: tokens });
  return addRows(run(mixture, takeRows(hidden, rows), ends), rows, tokens);
}

function initial(
  shapes: Readonly<Record<string, readonly number[]>>,
  { engine, random }: { readonly engine: Engine; readonly random: Random },
): Tree {
  return engine.scope(() =>
    Object.fromEntries(
      Object.entries(shapes).map(([name, shape]) => {
        if (shape.length === 2) return [name, engine.tensor(new Float32Array(shape.reduce((n, d) => n * d, 1)), shape)];
        return [name, affine(random.at(name).normal(shape), { scale: 1 / Math.sqrt(shape.at(-1) ?? 1), shift: 0 })];
      }),
    ),
  );
}

function checked(kind: string, shapes: Readonly<Record<string, readonly number[]>>, params: Tree): Tree {
  const found = new Map(leaves(params));
  for (const [name, shape] of Object.entries(shapes)) {
    const x = found.get(name);
    if (x === undefined || x.shape.join() !== shape.join()) {
      throw new ShapeError(
        `${kind}: parameter "${name}" is ${x ? show(x) : "missing"}, expected [${shape.join(", ")}]`,
      );
    }
  }
  return params;
}

function leaf(params: Tree, name: string): Tensor {
  const x = child(params, name);
  if (x === undefined || !isTensor(x)) throw new ShapeError(`experts: the parameters lack a tensor "${name}"`);
  return x;
}
