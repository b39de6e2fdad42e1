// Dense matrix products.
import type { Spec } from "../backend.ts";
import { ShapeError } from "../errors.ts";
import { at, type Op, run1 } from "../op.ts";
import { show, type Tensor } from "../tensor.ts";
import { add, cast } from "./elementwise.ts";
import { broadcast, count, dtypes, fail, last, rowsOf, spec } from "./infer.ts";
import { reduceTo, reshape } from "./shape.ts";

export interface Matmul {
  readonly transposeA?: boolean;
  readonly transposeB?: boolean;
}
export const matmulOp: Op<Matmul> = {
  name: "matmul",
  shapes(inputs, { transposeA = false, transposeB = false }) {
    count("matmul", inputs, 2);
    dtypes("matmul", inputs, "ff");
    const [a, b] = [at(inputs, 0), at(inputs, 1)];
    if (a.shape.length < 2 || b.shape.length < 2) fail("matmul", "needs matrices", inputs);
    const [m, k] = lastTwo(a, transposeA);
    const [k2, n] = lastTwo(b, transposeB);
    if (k !== k2) {
      const mark = (x: Spec, t: boolean) => `${show(x)}${t ? "ᵀ" : ""}`;
      throw new ShapeError(`matmul: inner sizes differ: ${mark(a, transposeA)} x ${mark(b, transposeB)}`);
    }
    const batch = broadcast("matmul", [spec(a.shape.slice(0, -2)), spec(b.shape.slice(0, -2))]);
    return [spec([...batch, m, n])];
  },
  vjp([dy], [a, b], _, { transposeA: ta = false, transposeB: tb = false }, [wantA, wantB]) {
    if (!dy || !a || !b) return [];
    // a is [m, k]: da = dy bᵀ; stored transposed: daᵀ = b dyᵀ. Likewise for b.
    const da = () => (ta ? matmul(b, dy, { transposeA: tb, transposeB: true }) : matmul(dy, b, { transposeB: !tb }));
    const db = () => (tb ? matmul(dy, a, { transposeA: true, transposeB: ta }) : matmul(a, dy, { transposeA: !ta }));
    return [wantA ? reduceTo(da(), a.shape) : undefined, wantB ? reduceTo(db(), b.shape) : undefined];
  },
};
const lastTwo = (x: Spec, transposed: boolean): [number, number] => {
  const [rows, columns] = [at(x.shape, x.shape.length - 2), at(x.shape, x.shape.length - 1)];
  return transposed ? [columns, rows] : [rows, columns];
};
/** a [..., m, k] times b [..., k, n]; batch dimensions broadcast; transposeB: b is stored [..., n, k]. */
export const matmul = (a: Tensor, b: Tensor, attrs: Matmul = {}): Tensor => run1(matmulOp, [a, b], attrs);

export const linearOp: Op = {
  name: "linear",
  shapes(inputs) {
    count("linear", inputs, 2, 3);
    dtypes("linear", inputs, "fwf");
    const [x, w, bias] = [at(inputs, 0), at(inputs, 1), inputs[2]];
    if (x.shape.length === 0 || w.shape.length !== 2 || last(x) !== last(w))
      fail("linear", "x [..., in] x w [out, in]", inputs);
    if (bias && (bias.shape.length !== 1 || bias.shape[0] !== w.shape[0])) fail("linear", "bias must be [out]", inputs);
    return [spec([...x.shape.slice(0, -1), at(w.shape, 0)])];
  },
  fallback([x, w, bias]) {
    if (!x || !w) return [];
    const y = matmul(reshape(x, [rowsOf(x), last(x)]), cast(w, "f32"), { transposeB: true });
    return [reshape(bias ? add(y, bias) : y, [...x.shape.slice(0, -1), at(w.shape, 0)])];
  },
  vjp([dy], [x, w, bias], _, __, [wantX, wantW, wantBias]) {
    if (!dy || !x || !w) return [];
    const rows = reshape(dy, [rowsOf(dy), last(dy)]);
    return [
      wantX ? reshape(matmul(rows, cast(w, "f32")), x.shape) : undefined,
      wantW ? matmul(rows, reshape(x, [rowsOf(x), last(x)]), { transposeA: true }) : undefined,
      bias && wantBias ? reduceTo(rows, bias.shape) : undefined,
    ];
  },
};
/** x [..., in] times wᵀ, w [out, in] in f32, bf16 or f16, plus bias [out]: [..., out]. */
export const linear = (x: Tensor, w: Tensor, bias?: Tensor): Tensor => run1(linearOp, bias ? [x, w, bias] : [x, w], {});
