// Products with matrices of a tree of parameters, whatever the form in which they are held: a tensor of floats, or a node with one key
// that names the format of its codes, or, "lora/2", the factor of a low-rank map beside a matrix of any other form (2106.09685):
//   { "lora/2": { base, a [r, in], b [out, r] } } is base + 2 b a, and for stacks a [experts, r, in], b [experts, out, r].
import {
  add,
  affine,
  cast,
  dequantize,
  floor,
  groupedMatmul,
  isTensor,
  linear,
  matmul,
  mul,
  type QuantizedFormat,
  type QuantizedWeights,
  quantizedGroupedMatmul,
  quantizedLinear,
  reshape,
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
      `"${name}" is no matrix: expected a tensor, codes and scales under one key such as "int4/32", "mxfp4" or ` +
        `"fp8/128x128", or base, a and b under "lora/2"; found ${Object.keys(node).join(", ") || "nothing"}`,
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

/** A low-rank map beside a matrix: base + factor b a. */
export interface LowRank {
  readonly factor: number;
  readonly base: Tree;
  readonly a: Tensor;
  readonly b: Tensor;
}

/** The node of a low-rank map, to be put in the place of its base. */
export const lowRankNode = ({ factor, base, a, b }: LowRank): Tree => ({ [`lora/${factor}`]: { base, a, b } });

/** What a node of one key "lora/..." holds; undefined for every other form. */
export function lowRank(node: Tree): LowRank | undefined {
  if (isTensor(node)) return undefined;
  const [[form = "", content] = [], ...more] = Object.entries(node);
  const [, digits] = /^lora\/(.+)$/.exec(form) ?? [];
  if (digits === undefined || more.length > 0) return undefined;
  const factor = Number(digits);
  const held = new Map(Object.entries(content ?? {}));
  const [base, a, b] = [held.get("base"), held.get("a"), held.get("b")];
  if (!Number.isFinite(factor) || base === undefined || !isTensor(a) || !isTensor(b))
    throw new ShapeError(`"${form}" is no low-rank map: expected a factor as in "lora/2", and base, a and b under it`);
  return { factor, base, a, b };
}

/** The matrix of a node in floats, [out, in] or [experts, out, in]: a tensor as it is, codes widened to f32, low-rank maps added. */
export function floatsOf(node: Tree, name: string): Tensor {
  if (isTensor(node)) return node;
  const low = lowRank(node);
  if (!low) return dequantize(weightsOf(node, name));
  const base = floatsOf(low.base, name);
  return add(base.dtype === "f32" ? base : cast(base, "f32"), mul(matmul(low.b, low.a), low.factor));
}

/** The tree with tensors in place of low-rank maps, for what does not know of them (routers); the same tree where there are none. */
export function withoutLowRank(tree: Tree, name = ""): Tree {
  if (isTensor(tree)) return tree;
  if (lowRank(tree)) return floatsOf(tree, name);
  const entries = Object.entries(tree).map(([key, child]) => [key, withoutLowRank(child, `${name}.${key}`)] as const);
  if (entries.every(([key, child]) => child === (tree as { readonly [key: string]: Tree })[key])) return tree;
  return Array.isArray(tree) ? entries.map(([, child]) => child) : Object.fromEntries(entries);
}

/**
 * x [..., in] times wᵀ for the matrix w [out, in] at params[name], plus bias [out]: [..., out], f32.
 * @throws ShapeError where there is no matrix of that name, or sizes do not fit.
 */
export function product(params: Tree, name: string, x: Tensor, bias?: Tensor): Tensor {
  return productOf(branch(params, name), name, x, bias);
}

function productOf(w: Tree, name: string, x: Tensor, bias?: Tensor): Tensor {
  if (isTensor(w)) return linear(x, w, bias);
  const low = lowRank(w);
  if (low) {
    const { factor, base, a, b } = low;
    return add(productOf(base, name, x, bias), linear(mul(linear(x, a), factor), b));
  }
  const y = quantizedLinear(x, weightsOf(w, name));
  return bias ? add(y, bias) : y;
}

/**
 * Row i of expert e's block (ends[e-1] <= i < ends[e]) times that expert's matrix, for the stack [experts, out, in] at params[name]: rows
 * [n, in], ends i32 [experts] -> [n, out], f32. Rows behind the last block give zeros.
 * @throws ShapeError where there is no matrix of that name, or sizes do not fit.
 */
export function groupedProduct(params: Tree, name: string, rows: Tensor, ends: Tensor): Tensor {
  return groupedProductOf(branch(params, name), name, rows, ends);
}

function groupedProductOf(w: Tree, name: string, rows: Tensor, ends: Tensor): Tensor {
  if (isTensor(w)) return groupedMatmul(rows, w, ends);
  const low = lowRank(w);
  if (!low) return quantizedGroupedMatmul(rows, weightsOf(w, name), ends);
  const { factor, base, a, b } = low;
  const more = groupedMatmul(mul(groupedMatmul(rows, a, ends), factor), b, ends);
  return add(groupedProductOf(base, name, rows, ends), more);
}

/**
 * Rows of the matrix [n, width] at params[name] by id i32 [...m]: [...m, width], f32. Embeddings, tied ones too.
 * @throws ShapeError where there is no matrix of that name.
 */
export function lookup(params: Tree, name: string, ids: Tensor): Tensor {
  return lookupIn(branch(params, name), name, ids);
}

function lookupIn(table: Tree, name: string, ids: Tensor): Tensor {
  const low = lowRank(table);
  if (low) {
    const { factor, base, a, b } = low;
    const rows = takeRows(b, ids); // [...m, r]
    const flat = reshape(rows, [rows.size / Math.max(rows.shape.at(-1) ?? 1, 1), rows.shape.at(-1) ?? 0]);
    const more = mul(reshape(matmul(flat, a), [...ids.shape, a.shape.at(-1) ?? 0]), factor);
    return add(lookupIn(base, name, ids), more);
  }
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
