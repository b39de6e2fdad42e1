// Rotary positions and attention: causal, grouped-query, sliding window, padding mask.
import { vjpOfFallback } from "../autodiff.ts";
import { at, type Op, run, run1 } from "../op.ts";
import type { Tensor } from "../tensor.ts";
import { add, exp, less, mul, neg, sub, where } from "./elementwise.ts";
import { count, dtypes, fail, last, rank, same, spec } from "./infer.ts";
import { matmul } from "./matmul.ts";
import { logSumExp, softmax } from "./normalise.ts";
import { sum, sumLast } from "./reduce.ts";
import { concat, hostConstant, reshape, slice, transpose } from "./shape.ts";

export interface Rope {
  /** Pairs (0, 1), (2, 3), ... instead of (0, r/2), (1, r/2 + 1), ... (Hugging Face). */
  readonly interleaved?: boolean;
  /** Turn back: the gradient. */
  readonly inverse?: boolean;
}
export const ropeOp: Op<Rope> = {
  name: "rope",
  shapes(inputs) {
    count("rope", inputs, 3);
    dtypes("rope", inputs, "f");
    const [x, cos, sin] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    const positions = cos.shape.slice(0, -1);
    const fits = same(positions, x.shape.slice(0, 2)) || same(positions, x.shape.slice(1, 2));
    if (x.shape.length !== 4 || !fits || !same(cos.shape, sin.shape) || 2 * last(cos) > last(x)) {
      fail("rope", "x [batch, sequence, heads, d], cos and sin [sequence, r/2] or [batch, sequence, r/2]", inputs);
    }
    return [spec(x.shape)];
  },
  fallback([x, cos, sin], { interleaved = false, inverse = false }) {
    if (!x || !cos || !sin) return [];
    const half = last(cos);
    const d = last(x);
    const table = (t: Tensor) => reshape(t, [...t.shape.slice(0, -1), 1, half]);
    const [c, s] = [table(cos), inverse ? neg(table(sin)) : table(sin)];
    const part = (from: number, n: number) => slice(x, [0, 0, 0, from], [...x.shape.slice(0, 3), n]);
    let [a, b]: [Tensor, Tensor] = [part(0, half), part(half, half)];
    if (interleaved) {
      const pairs = reshape(part(0, 2 * half), [...x.shape.slice(0, 3), half, 2]);
      const pick = (i: number) =>
        reshape(slice(pairs, [0, 0, 0, 0, i], [...x.shape.slice(0, 3), half, 1]), [...x.shape.slice(0, 3), half]);
      [a, b] = [pick(0), pick(1)];
    }
    const [u, v] = [sub(mul(a, c), mul(b, s)), add(mul(b, c), mul(a, s))];
    const column = (t: Tensor) => reshape(t, [...t.shape, 1]);
    const turned = interleaved
      ? reshape(concat([column(u), column(v)], -1), [...x.shape.slice(0, 3), 2 * half])
      : concat([u, v], -1);
    return [2 * half === d ? turned : concat([turned, part(2 * half, d - 2 * half)], -1)];
  },
  vjp: ([dy], [, cos, sin], _, attrs) => [
    dy && cos && sin && run1(ropeOp, [dy, cos, sin], { ...attrs, inverse: !attrs.inverse }),
  ],
};
/** Rotates the first r of d channels of x [batch, sequence, heads, d] by tables [(batch,) sequence, r/2] (2104.09864). The tables get no gradient. */
export const rope = (x: Tensor, cos: Tensor, sin: Tensor, attrs: Rope = {}): Tensor =>
  run1(ropeOp, [x, cos, sin], attrs);

export interface Attention {
  readonly causal: boolean;
  readonly scale: number;
  /** A query sees the `window` latest positions, itself included. */
  readonly window?: number;
  /** Also return the probabilities [batch, heads, sequence, total]. */
  readonly probabilities?: boolean;
}
export interface AttentionGrad extends Omit<Attention, "probabilities"> {
  readonly mask: boolean;
}

/** [batch, n, heads, d] -> [batch, kvHeads, group, n, d] */
const byHead = (x: Tensor, kvHeads: number): Tensor => {
  const [b, n, heads, d] = dims(x);
  return transpose(reshape(x, [b, n, kvHeads, heads / Math.max(kvHeads, 1), d]), [0, 2, 3, 1, 4]);
};
/** The way back. */
const byToken = (x: Tensor): Tensor => {
  const [b, kv, group, n, d] = x.shape as readonly [number, number, number, number, number];
  return reshape(transpose(x, [0, 3, 1, 2, 4]), [b, n, kv * group, d]);
};
const dims = (x: Tensor): readonly [number, number, number, number] =>
  x.shape as readonly [number, number, number, number];

/** Scaled scores [batch, kvHeads, group, sequence, total], -inf where hidden. */
function scores(
  q: Tensor,
  k: Tensor,
  mask: Tensor | undefined,
  { causal, scale, window }: Attention | AttentionGrad,
): Tensor {
  const [batch, sequence] = dims(q);
  const [, total, kvHeads] = dims(k);
  let y = mul(matmul(byHead(q, kvHeads), byHead(k, kvHeads), { transposeB: true }), scale);
  if (causal || window !== undefined) {
    const visible = new Float32Array(sequence * total);
    for (let i = 0; i < sequence; i++) {
      const position = total - sequence + i;
      for (let j = 0; j < total; j++) {
        const seen = (!causal || j <= position) && (window === undefined || position - j < window);
        visible[i * total + j] = seen ? 1 : 0;
      }
    }
    y = where(hostConstant(q, visible, [sequence, total]), y, -Infinity);
  }
  return mask ? where(reshape(mask, [batch, 1, 1, 1, total]), y, -Infinity) : y;
}

export const attentionGradOp: Op<AttentionGrad> = {
  name: "attentionGrad",
  shapes: ([q, k, v]) => (q && k && v ? [spec(q.shape), spec(k.shape), spec(v.shape)] : []),
  fallback(inputs, attrs) {
    const [q, k, v] = [at(inputs, 0), at(inputs, 1), at(inputs, 2)];
    const mask = attrs.mask ? inputs[3] : undefined;
    const [out, lse, dout] = [
      at(inputs, inputs.length - 3),
      at(inputs, inputs.length - 2),
      at(inputs, inputs.length - 1),
    ];
    const [batch, sequence, heads] = dims(q);
    const kvHeads = at(k.shape, 2);
    const s = scores(q, k, mask, attrs);
    const top = reshape(lse, [batch, kvHeads, heads / Math.max(kvHeads, 1), sequence, 1]);
    // A query that sees nothing has lse = -inf and all its scores -inf: probability 0.
    const p = exp(sub(s, where(less(top, -3e38), 0, top)));
    const [d, o] = [byHead(dout, kvHeads), byHead(out, kvHeads)];
    const ds = mul(mul(p, sub(matmul(d, byHead(v, kvHeads), { transposeB: true }), sumLast(mul(d, o)))), attrs.scale);
    const overGroup = (x: Tensor) => byToken(reshape(sum(x, [2]), [x.shape[0] ?? 0, kvHeads, 1, ...x.shape.slice(3)]));
    return [
      byToken(matmul(ds, byHead(k, kvHeads))),
      overGroup(matmul(ds, byHead(q, kvHeads), { transposeA: true })),
      overGroup(matmul(p, d, { transposeA: true })),
    ];
  },
};

export const attentionOp: Op<Attention> = {
  name: "attention",
  shapes(inputs, { probabilities = false }) {
    count("attention", inputs, 3, 4);
    dtypes("attention", inputs, "f");
    rank("attention", inputs, [4, 4, 4]);
    const [q, k, v, mask] = [at(inputs, 0), at(inputs, 1), at(inputs, 2), inputs[3]];
    const [batch, sequence, heads, d] = q.shape as readonly [number, number, number, number];
    const [kBatch, total, kvHeads, kd] = k.shape as readonly [number, number, number, number];
    if (batch !== kBatch || d !== kd || !same(k.shape.slice(0, 3), v.shape.slice(0, 3))) {
      fail("attention", "q [batch, sequence, heads, d], k and v [batch, total, kvHeads, d]", inputs);
    }
    if (kvHeads === 0 || heads % kvHeads !== 0) fail("attention", "heads must be a multiple of kvHeads", inputs);
    if (total < sequence) fail("attention", "fewer keys than queries", inputs);
    if (mask && !same(mask.shape, [batch, total])) fail("attention", "the mask must be [batch, total]", inputs);
    const lse = spec([batch, heads, sequence]);
    const out = spec([batch, sequence, heads, last(v)]);
    return probabilities ? [out, lse, spec([batch, heads, sequence, total])] : [out, lse];
  },
  fallback([q, k, v, mask], attrs) {
    if (!q || !k || !v) return [];
    const [batch, sequence, heads] = dims(q);
    const [, total, kvHeads] = dims(k);
    const s = scores(q, k, mask, attrs);
    const p = softmax(s);
    const out = byToken(matmul(p, byHead(v, kvHeads)));
    const lse = s.size === 0 ? sum(s, [4]) : logSumExp(s);
    const results = [out, reshape(lse, [batch, heads, sequence])];
    return attrs.probabilities ? [...results, reshape(p, [batch, heads, sequence, total])] : results;
  },
  vjp(dys, inputs, ys, attrs) {
    const [dout, dlse, dprobabilities] = dys;
    if (dlse || dprobabilities) return vjpOfFallback(attentionOp, dys, inputs, attrs);
    if (!dout) return [];
    const { probabilities: _, ...rest } = attrs;
    return run(attentionGradOp, [...inputs, at(ys, 0), at(ys, 1), dout], { ...rest, mask: inputs.length === 4 });
  },
};
/**
 * softmax(q kᵀ scale) v, per head. q [batch, sequence, heads, d], k and v [batch, total, kvHeads, d], mask [batch, total] with 0 for
 * padding. Query i stands at position total - sequence + i. A query that sees nothing gives zeros and lse = -inf.
 */
export const attention = (
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: Attention & { readonly mask?: Tensor },
): { readonly output: Tensor; readonly lse: Tensor; readonly probabilities?: Tensor } => {
  const { mask, ...attrs } = options;
  const ys = run(attentionOp, mask ? [q, k, v, mask] : [q, k, v], attrs);
  const probabilities = ys[2];
  return { output: at(ys, 0), lse: at(ys, 1), ...(probabilities ? { probabilities } : {}) };
};
