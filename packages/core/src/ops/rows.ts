// Gather, scatter, sort: rows by id, elements of the last axis by id, stable top-k and argsort.
import { at, type Op, run1 } from "../op.ts";
import { sizeOf, type Tensor } from "../tensor.ts";
import { add, less, where } from "./elementwise.ts";
import { dtypes, fail, last, rowsOf, same, spec } from "./infer.ts";
import { hostConstant, reshape } from "./shape.ts";

export const takeRowsOp: Op = {
  name: "takeRows",
  shapes(inputs) {
    dtypes("takeRows", inputs, "?i");
    const [x, ids] = [at(inputs, 0), at(inputs, 1)];
    if (x.shape.length === 0) fail("takeRows", "needs rows", inputs);
    return [spec([...ids.shape, ...x.shape.slice(1)], x.dtype)];
  },
  vjp: ([dy], [x, ids]) =>
    dy && x && ids ? [addRows(reshape(dy, [ids.size, ...x.shape.slice(1)]), reshape(ids, [-1]), at(x.shape, 0))] : [],
};
/** Rows of x [n, ...] by id [...m]: [...m, ...]. An id outside 0..n-1 (such as -1) gives a row of zeros. */
export const takeRows = (x: Tensor, ids: Tensor): Tensor => run1(takeRowsOp, [x, ids], {});
/** Rows of an embedding table [vocabulary, width] by token id. */
export const embedding = takeRows;

export const addRowsOp: Op<{ readonly rows: number }> = {
  name: "addRows",
  shapes(inputs, { rows }) {
    dtypes("addRows", inputs, "fi");
    const [x, ids] = [at(inputs, 0), at(inputs, 1)];
    if (ids.shape.length !== 1 || x.shape[0] !== ids.shape[0]) fail("addRows", "needs one id per row", inputs);
    return [spec([rows, ...x.shape.slice(1)])];
  },
  vjp: ([dy], [, ids]) => (dy && ids ? [takeRows(dy, ids)] : []),
};
/** Sums the rows of x [m, ...] into a zero tensor [rows, ...] at ids [m]; rows with an id outside are dropped. Order of sums: that of x. */
export const addRows = (x: Tensor, ids: Tensor, rows: number): Tensor => run1(addRowsOp, [x, ids], { rows });

/** Ids along the last axis as row ids of x flattened to [rows * n, 1]; -1 stays -1. */
const flatIds = (ids: Tensor, n: number): Tensor => {
  const rows = rowsOf(ids);
  const offsets = hostConstant(
    ids,
    Int32Array.from({ length: rows }, (_, i) => i * n),
    [rows, 1],
  );
  const flat = reshape(ids, [rows, last(ids)]);
  return reshape(where(less(flat, 0), -1, add(flat, offsets)), [-1]);
};

export const gatherLastOp: Op = {
  name: "gatherLast",
  shapes(inputs) {
    dtypes("gatherLast", inputs, "?i");
    const [x, ids] = [at(inputs, 0), at(inputs, 1)];
    if (!same(x.shape.slice(0, -1), ids.shape.slice(0, -1)) || ids.shape.length === 0) {
      fail("gatherLast", "leading dimensions differ", inputs);
    }
    return [spec(ids.shape, x.dtype)];
  },
  fallback: ([x, ids]) => (x && ids ? [reshape(takeRows(reshape(x, [-1, 1]), flatIds(ids, last(x))), ids.shape)] : []),
  vjp: ([dy], [x, ids]) => (dy && x && ids ? [scatterLast(dy, ids, last(x))] : []),
};
/** Elements of x [..., n] at ids [..., k]: [..., k]; id -1 gives 0. */
export const gatherLast = (x: Tensor, ids: Tensor): Tensor => run1(gatherLastOp, [x, ids], {});

export const scatterLastOp: Op<{ readonly size: number }> = {
  name: "scatterLast",
  shapes(inputs, { size }) {
    dtypes("scatterLast", inputs, "fi");
    const [x, ids] = [at(inputs, 0), at(inputs, 1)];
    if (!same(x.shape, ids.shape) || x.shape.length === 0) fail("scatterLast", "shapes differ", inputs);
    return [spec([...x.shape.slice(0, -1), size])];
  },
  fallback([x, ids], { size }) {
    if (!x || !ids) return [];
    const shape = [...x.shape.slice(0, -1), size];
    return [reshape(addRows(reshape(x, [-1, 1]), flatIds(ids, size), sizeOf(shape)), shape)];
  },
  vjp: ([dy], [, ids]) => (dy && ids ? [gatherLast(dy, ids)] : []),
};
/** Adds x [..., k] into zeros [..., size] at ids [..., k]; id -1 is dropped. */
export const scatterLast = (x: Tensor, ids: Tensor, size: number): Tensor => run1(scatterLastOp, [x, ids], { size });

export const topkIndicesOp: Op<{ readonly k: number }> = {
  name: "topkIndices",
  shapes(inputs, { k }) {
    dtypes("topkIndices", inputs, "f");
    const x = at(inputs, 0);
    if (x.shape.length === 0 || !Number.isInteger(k) || k < 0 || k > last(x)) fail("topkIndices", `k = ${k}`, inputs);
    return [spec([...x.shape.slice(0, -1), k], "i32")];
  },
};
/** Ids of the k largest of the last axis, descending; ties: lower id first. */
export const topkIndices = (x: Tensor, k: number): Tensor => run1(topkIndicesOp, [x], { k });

export interface Argsort {
  readonly descending?: boolean;
  /** All values are integers in [0, bound): a backend may count instead of compare. */
  readonly bound?: number;
}
export const argsortOp: Op<Argsort> = {
  name: "argsort",
  shapes(inputs) {
    const x = at(inputs, 0);
    if (x.shape.length === 0 || (x.dtype !== "f32" && x.dtype !== "i32"))
      fail("argsort", "needs f32 or i32 rows", inputs);
    return [spec(x.shape, "i32")];
  },
};
/** Ids that sort the last axis; stable. */
export const argsort = (x: Tensor, attrs: Argsort = {}): Tensor => run1(argsortOp, [x], attrs);

export const blockEndsOp: Op<{ readonly count: number }> = {
  name: "blockEnds",
  shapes(inputs, { count }) {
    dtypes("blockEnds", inputs, "i");
    if (at(inputs, 0).shape.length !== 1) fail("blockEnds", "needs a list of ids", inputs);
    return [spec([count], "i32")];
  },
};
/** ends[e] = how many of the ids are in 0..e; ids outside 0..count-1 are not counted. */
export const blockEnds = (ids: Tensor, count: number): Tensor => run1(blockEndsOp, [ids], { count });

/** 1 at the id, 0 elsewhere: [..., size]; id -1 gives zeros. Ids of x's engine; no gradient. */
export const oneHot = (ids: Tensor, size: number): Tensor => {
  const line = hostConstant(
    ids,
    Int32Array.from({ length: size }, (_, i) => i),
    [size],
  );
  const wide = reshape(ids, [...ids.shape, 1]);
  const hit = add(less(wide, line), less(line, wide));
  return where(hit, 0, onesLike(hit));
};
const onesLike = (x: Tensor): Tensor => hostConstant(x, Float32Array.of(1), []);
