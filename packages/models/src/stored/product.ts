// Products with matrices of a tree of parameters, whatever the type in which they are held: a tensor of floats, or a node with one key
// that names the format of its codes.
import {
  add,
  affine,
  cast,
  dequantize,
  floor,
  groupedMatmul,
  isTensor,
  linear,
  type QuantizedFormat,
  type QuantizedWeights,
  quantizedGroupedMatmul,
  quantizedLinear,
  ShapeError,
  type Tensor,
  type Tree,
  takeRows,
} from "@switchyard/core";
import { branch } from "../tree.ts";

const key = /^(?:(int8|int4)\/(\d+)|(mxfp4)|(fp8)\/(\d+)x(\d+))$/;

/** The weights that a node of one key stands for; see `upload`. */
function weightsOf(node: Tree, name: string): QuantizedWeights {
  const [[form = "", content] = [], ...more] = Object.entries(node);
  const [, int, intGroup, mx, fp8, rows, group] = key.exec(form) ?? [];
  const format = (int ?? mx ?? fp8) as QuantizedFormat | undefined;
  const { codes, scales, zeros }: Readonly<Record<string, unknown>> = content ?? {};
  if (more.length > 0 || !format || !isTensor(codes) || !isTensor(scales) || (zeros !== undefined && !isTensor(zeros)))
    throw new ShapeError(
      `"${name}" is no matrix: expected a tensor, or codes and scales under one key such as "int4/32", "mxfp4" or ` +
        `"fp8/128x128"; found ${Object.keys(node).join(", ") || "nothing"}`,
    );
  return {
    format,
    codes,
    scales,
    ...(zeros ? { zeros } : {}),
    group: mx ? 32 : Number(intGroup ?? group),
    ...(rows === undefined ? {} : { rows: Number(rows) }),
  };
}

/**
 * x [..., in] times wᵀ for the matrix w [out, in] at params[name], plus bias [out]: [..., out], f32.
 * @throws ShapeError where there is no matrix of that name, or sizes do not fit.
 */
export function product(params: Tree, name: string, x: Tensor, bias?: Tensor): Tensor {
  const w = branch(params, name);
  if (isTensor(w)) return linear(x, w, bias);
  const y = quantizedLinear(x, weightsOf(w, name));
  return bias ? add(y, bias) : y;
}

/**
 * Row i of expert e's block (ends[e-1] <= i < ends[e]) times that expert's matrix, for the stack [experts, out, in] at params[name]: rows
 * [n, in], ends i32 [experts] -> [n, out], f32. Rows behind the last block give zeros.
 * @throws ShapeError where there is no matrix of that name, or sizes do not fit.
 */
export function groupedProduct(params: Tree, name: string, rows: Tensor, ends: Tensor): Tensor {
  const w = branch(params, name);
  return isTensor(w) ? groupedMatmul(rows, w, ends) : quantizedGroupedMatmul(rows, weightsOf(w, name), ends);
}

/**
 * Rows of the matrix [n, width] at params[name] by id i32 [...m]: [...m, width], f32. Embeddings, tied ones too.
 * @throws ShapeError where there is no matrix of that name.
 */
export function lookup(params: Tree, name: string, ids: Tensor): Tensor {
  const table = branch(params, name);
  if (isTensor(table)) {
    const rows = takeRows(table, ids);
    return rows.dtype === "f32" ? rows : cast(rows, "f32");
  }
  const { codes, scales, zeros, rows = 1, ...how } = weightsOf(table, name);
  // fp8: a line of scales serves several rows.
  const lines =
    rows === 1 ? ids : cast(floor(affine(cast(ids, "f32"), { scale: 1 / rows, shift: 0.25 / rows })), "i32");
  return dequantize({
    ...how,
    codes: takeRows(codes, ids),
    scales: takeRows(scales, lines),
    ...(zeros ? { zeros: takeRows(zeros, lines) } : {}),
  });
}
