// Experts as matrix product operators (MPOE 2203.01104): every matrix is a chain of small cores, of which the central one, the largest,
// belongs to all experts of the layer; an expert owns only the auxiliary cores around it. W_e = T1_e ... C ... Tn_e.
import { ShapeError } from "../errors.ts";
import { type MpoSizes, middleCore, mpoShapes } from "../factors/mpo-decompose.ts";
import type { Activation, Initial } from "../moe/experts.ts";
import { activations, biasRows } from "../moe/parts.ts";
import type { Experts } from "../moe/plan.ts";
import { at } from "../op.ts";
import { add, mul, swiglu, where } from "../ops/elementwise.ts";
import { groupedMatmul } from "../ops/experts.ts";
import { matmul } from "../ops/matmul.ts";
import { full, reshape, slice, transpose } from "../ops/shape.ts";
import { leaves, show, sizeOf, type Tensor, type Tree } from "../tensor.ts";
import { checkSizes, type Draw, leafAt, parameters, type Shapes } from "./parts.ts";

export interface MpoForm {
  /** Factors of the width of the tokens, one per core, at least two. */
  readonly widthDims: readonly number[];
  /** Factors of the width inside each expert, one per core. */
  readonly hiddenDims: readonly number[];
  /** Largest bond, for all cuts or for each from left to right; default: as large as they can be of use. */
  readonly bond?: number | readonly number[];
  /** Which core all experts share; default: the middle one. */
  readonly central?: number;
}

export type MpoOptions = MpoForm & {
  readonly count: number;
  /** y = down (act(gate x) * up x), gate and up as one operator, instead of y = down act(up x); default false. */
  readonly gated?: boolean;
  /** Default gelu, gated silu. */
  readonly activation?: Activation;
  /** Default false. */
  readonly bias?: boolean;
  /**
   * "reconstruct": the experts' matrices are built, then multiplied with the rows. "contract": the rows go through the cores, which is
   * cheaper for few rows or small bonds. Default "auto": whichever takes fewer multiplications for that number of rows.
   */
  readonly evaluation?: "auto" | "reconstruct" | "contract";
} & Initial;

/**
 * Experts whose matrices are matrix product operators. Params for each operator ("up" or, gated, "gateUp", with gate rows first; "down"):
 * `up0 [experts, left bond, in, out, right bond]` and so on for the auxiliary cores, numbered by their place, `shared.upCentral
 * [left bond, in, out, right bond]`, with `bias` also `upBias [experts, out]`. New cores are normal, such that the entries of the
 * matrices have variance 1 / inputs (our choice; the paper starts from a trained network: `denseToMpo`). The training hook `mpoeMask`
 * belongs to these experts. `observe` is told nothing, since there are no matrices.
 *
 * @example mpo({ count: 8, widthDims: [4, 8, 4], hiddenDims: [8, 8, 8], bond: 32, engine, random })
 */
export function mpo(options: MpoOptions): Experts {
  const { count, widthDims, gated = false, bias = false, evaluation = "auto" } = options;
  const activation = options.activation ?? (gated ? "silu" : "gelu");
  checkSizes("mpo", { count });
  const operators = operatorsOf(options, gated);
  const hidden = sizeOf(options.hiddenDims);
  const shapes: Shapes = Object.fromEntries(
    operators.flatMap(({ name, cores, central, outputs }): [string, readonly number[]][] => [
      ...cores.map((shape, k): [string, readonly number[]] =>
        k === central ? [centralPath(name), shape] : [`${name}${k}`, [count, ...shape]],
      ),
      ...(bias ? [[`${name}Bias`, [count, outputs]] as [string, readonly number[]]] : []),
    ]),
  );
  const draw: Draw = (path, shape, random) => {
    const operator = operators.find(({ name }) => path.startsWith(name) || path === centralPath(name));
    if (operator === undefined || path.endsWith("Bias")) return undefined;
    const paths = operator.cores.slice(1).reduce((product, [left]) => product * left, 1); // ways through the bonds
    const deviation = (1 / (operator.inputs * paths)) ** (1 / (2 * operator.cores.length));
    return random.host("normal", sizeOf(shape)).map((z) => deviation * z);
  };
  const act = activations[activation];

  const run = (params: Tree, operator: Operator, x: Tensor, ends: Tensor): Tensor => {
    const n = x.shape[0] ?? 0;
    const cores = coresOf(params, operator);
    const contracts = evaluation === "auto" ? contractingIsCheaper(operator, count, n) : evaluation === "contract";
    const y = contracts
      ? contract(cores, operator, x, ends)
      : groupedMatmul(x, reconstruct(cores, count), ends, { transposed: true }); // [n, out]
    return bias ? add(y, biasRows(leafAt(params, `${operator.name}Bias`), ends, n)) : y;
  };

  return {
    count,
    params: parameters("mpo", shapes, options, draw),
    apply(params, rows, ends) {
      const n = rows.shape[0] ?? 0;
      if (rows.shape[1] !== sizeOf(widthDims)) {
        throw new ShapeError(
          `mpo: rows are ${show(rows)}; expected [n, ${sizeOf(widthDims)}], the product of widthDims`,
        );
      }
      const [first, second] = [at(operators, 0), at(operators, 1)];
      const both = run(params, first, rows, ends);
      const inner = !gated
        ? act(both)
        : activation === "silu"
          ? swiglu(both)
          : mul(act(slice(both, [0, 0], [n, hidden])), slice(both, [0, hidden], [n, hidden]));
      return { output: run(params, second, inner, ends) };
    },
  };
}

/** Path of the central core of an operator within the params of `mpo`. */
const centralPath = (name: string): string => `shared.${name}Central`;

interface Operator {
  readonly name: string;
  readonly inputs: number;
  readonly outputs: number;
  readonly sizes: MpoSizes;
  /** Shapes [left bond, in, out, right bond]. */
  readonly cores: readonly (readonly [number, number, number, number])[];
  readonly central: number;
}

/** The two operators of experts of that form. */
export function operatorsOf(
  { widthDims, hiddenDims, bond, central = middleCore(widthDims.length) }: MpoForm,
  gated: boolean,
): readonly Operator[] {
  const [first = 1, ...others] = hiddenDims;
  const between = gated ? [2 * first, ...others] : hiddenDims;
  if (widthDims.length < 2 || !Number.isInteger(central) || central < 0 || central >= widthDims.length) {
    throw new ShapeError(
      `mpo: ${widthDims.length} cores with core ${central} shared; expected at least two, and one of them`,
    );
  }
  const operator = (name: string, inputDims: readonly number[], outputDims: readonly number[]): Operator => {
    const sizes = { inputDims, outputDims, ...(bond === undefined ? {} : { bond }) };
    return {
      name,
      inputs: sizeOf(inputDims),
      outputs: sizeOf(outputDims),
      sizes,
      cores: mpoShapes(sizes),
      central,
    };
  };
  return [operator(gated ? "gateUp" : "up", widthDims, between), operator("down", hiddenDims, widthDims)];
}

/** All cores in their order, the auxiliary ones [experts, left, in, out, right], the central one [1, left, in, out, right]. */
const coresOf = (params: Tree, { name, cores, central }: Operator): readonly Tensor[] =>
  cores.map((shape, k) =>
    k === central ? reshape(leafAt(params, centralPath(name)), [1, ...shape]) : leafAt(params, `${name}${k}`),
  );

/** The matrices `[experts, in, out]`. */
function reconstruct(cores: readonly Tensor[], count: number): Tensor {
  const [first, ...others] = cores;
  if (first === undefined) throw new ShapeError("mpo: there are no cores");
  const [batch = 1, , i = 1, o = 1, bond = 1] = first.shape;
  let product = reshape(first, [batch, i * o, bond]);
  let [inputs, outputs] = [i, o];
  for (const core of others) {
    const [own = 1, left = 1, ik = 1, ok = 1, right = 1] = core.shape;
    const joined = matmul(product, reshape(core, [own, left, ik * ok * right])); // [e, inputs * outputs, ik * ok * right]
    const [e = 1] = joined.shape;
    const apart = reshape(joined, [e * inputs, outputs, ik, ok * right]);
    product = reshape(transpose(apart, [0, 2, 1, 3]), [e, inputs * ik * outputs * ok, right]);
    [inputs, outputs] = [inputs * ik, outputs * ok];
  }
  return reshape(product, [count, inputs, outputs]); // of two cores, one has all experts
}

/** Rows `[n, in]` through the cores one after the other -> `[n, out]`. */
function contract(cores: readonly Tensor[], { inputs, central }: Operator, x: Tensor, ends: Tensor): Tensor {
  const n = x.shape[0] ?? 0;
  const experts = ends.shape[0] ?? 0;
  // A shared first core would also see what lies beyond the last block.
  let state = central === 0 ? where(biasRows(full(x, [experts, 1], 1), ends, n), x, 0) : x;
  let [done, rest] = [1, inputs]; // outputs so far, inputs not yet contracted; state [n, done, left * ik, rest]
  cores.forEach((core, k) => {
    const [own = 1, left = 1, ik = 1, ok = 1, right = 1] = core.shape;
    rest /= ik;
    const lines = reshape(transpose(reshape(state, [n * done, left * ik, rest])), [n * done * rest, left * ik]);
    const matrix = reshape(core, [own, left * ik, ok * right]);
    const through =
      k === central
        ? matmul(lines, reshape(matrix, [left * ik, ok * right]))
        : groupedMatmul(lines, matrix, mul(ends, done * rest), { transposed: true }); // [n * done * rest, ok * right]
    state = transpose(reshape(through, [n * done, rest, ok * right])); // [n * done, ok * right, rest]
    done *= ok;
  });
  return reshape(state, [n, done]);
}

/** Multiplications of the two ways; sizes are static, so every device decides alike. */
function contractingIsCheaper({ cores, inputs, outputs }: Operator, count: number, n: number): boolean {
  let [building, perRow, done, rest] = [0, 0, 1, inputs];
  let built = 1; // entries of the product so far, without the bond
  for (const [left, i, o, right] of cores) {
    rest /= i;
    perRow += done * rest * left * i * o * right;
    building += built * left * i * o * right;
    done *= o;
    built *= i * o;
  }
  return n * perRow < count * building + n * inputs * outputs;
}

/** The matrices of experts made by `mpo`, as params of `ffn` (or, gated, `glu`) with the same numbers. Biases are the same tensors. */
export function mpoToDense(params: Tree, form: MpoForm & { readonly count: number; readonly gated?: boolean }): Tree {
  const dense: Record<string, Tensor> = {};
  for (const operator of operatorsOf(form, form.gated ?? false)) {
    const built = reconstruct(coresOf(params, operator), form.count); // [experts, in, out]
    dense[operator.name] = transpose(built, [0, 2, 1]);
  }
  for (const [path, x] of leaves(params)) if (path.endsWith("Bias")) dense[path] = x;
  return dense;
}
