// Trained experts to matrix product operators (MPOE 2203.01104, section 3.3): one decomposition of their mean, which all start from.
import type { Engine } from "../engine.ts";
import { ShapeError } from "../errors.ts";
import { type MpoForm, operatorsOf } from "../experts/mpo.ts";
import { checkSizes } from "../experts/parts.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { denseMatrices, type FactorError, relativeError } from "./dense.ts";
import { mpoDecompose, mpoReconstruct } from "./mpo-decompose.ts";
import { transposed } from "./svd.ts";

/** What a decomposition kept of one operator. */
export interface MpoError extends FactorError {
  /** The bond of each cut. */
  readonly bonds: readonly number[];
  /** All singular values of each cut. */
  readonly singularValues: readonly Float64Array[];
}

/**
 * Params for `mpo` with `count` experts from those of trained experts (`ffn`, or `glu` for a gated one; a dense network has one): their
 * mean is decomposed once, and every expert starts from the same cores (2203.01104, section 3.3). The report says per operator how far
 * the given matrices are from the one that was made, relative to their Frobenius norms: 0 for one dense network without `bond`. On the
 * host; the new params lie on the engine of the given ones.
 *
 * @throws ShapeError where the sizes do not fit.
 * @example const { params, report } = await denseToMpo(dense, { count: 8, widthDims: [3, 4, 4], hiddenDims: [4, 8, 6], bond: 24 })
 */
export async function denseToMpo(
  dense: Tree,
  form: MpoForm & { readonly count: number },
): Promise<{ readonly params: Tree; readonly report: Readonly<Record<string, MpoError>> }> {
  const { count } = form;
  checkSizes("denseToMpo", { count });
  const { engine, gated, matrices, biases } = await denseMatrices("denseToMpo", dense);
  // A scope: where a decomposition throws, what was stored before is freed.
  return engine.scope(() => {
    const own: Record<string, Tensor> = {};
    const shared: Record<string, Tensor> = {};
    const report: Record<string, MpoError> = {};
    for (const { name, inputs, outputs, sizes, central } of operatorsOf(form, gated)) {
      const given = matrices.get(name);
      const [experts = 0, rows = 0, columns = 0] = given?.shape ?? [];
      if (given === undefined || rows !== outputs || columns !== inputs) {
        throw new ShapeError(
          `denseToMpo: ${name} is [${given?.shape.join(", ") ?? "missing"}]; expected [experts, ${outputs}, ${inputs}] by the dims`,
        );
      }
      const each = (e: number): Float64Array => given.data.slice(e * rows * columns, (e + 1) * rows * columns);
      const mean = new Float64Array(rows * columns);
      for (let e = 0; e < experts; e++)
        each(e).forEach((x, i) => {
          mean[i] = (mean[i] as number) + x / experts;
        });
      const { cores, bonds, singularValues } = mpoDecompose(transposed({ data: mean, rows, columns }), sizes);
      cores.forEach((core, k) => {
        if (k === central) shared[`${name}Central`] = engine.tensor(core.data, core.shape);
        else own[`${name}${k}`] = repeated(engine, core, count);
      });
      const made = mpoReconstruct(cores);
      const back = transposed(made).data; // [out, in]
      report[name] = {
        ...relativeError(Array.from({ length: experts }, (_, e) => [each(e), back] as const)),
        bonds,
        singularValues,
      };
    }
    for (const [name, { data, shape }] of biases) {
      const [experts = 1, width = 0] = shape;
      const mean = Float64Array.from({ length: width }, (_, i) => {
        let sum = 0;
        for (let e = 0; e < experts; e++) sum += (data[e * width + i] as number) / experts;
        return sum;
      });
      own[name] = repeated(engine, { shape: [width], data: mean }, count);
    }
    return { params: { ...own, shared }, report };
  });
}

/** A core for every expert, `[count, ...]`. */
function repeated(
  engine: Engine,
  { shape, data }: { readonly shape: readonly number[]; readonly data: Float64Array },
  count: number,
): Tensor {
  const all = new Float64Array(count * data.length);
  for (let e = 0; e < count; e++) all.set(data, e * data.length);
  return engine.tensor(all, [count, ...shape]);
}
