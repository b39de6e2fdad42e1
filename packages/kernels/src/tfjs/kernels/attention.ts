// Rotary positions, attention and its gradient: causal, grouped queries, sliding window, padding mask. Scores are formed whole: TensorFlow.js has no
// fused attention. All products have three dimensions, [batch * kvHeads, ...], so that nothing is broadcast.
import type { Attention, AttentionGrad, Kernel, Rope } from "@switchyard/core";
import { type Device, matrixOf, zeros } from "../device.ts";
import type { TfTensor } from "../tf.ts";
import { log, select } from "./elementwise.ts";
import { safeMax } from "./normalise.ts";

interface Sizes {
  readonly batch: number;
  readonly sequence: number;
  readonly heads: number;
  readonly total: number;
  readonly kvHeads: number;
  /** Query heads per key head. */
  readonly group: number;
}

function sizesOf(q: TfTensor, k: TfTensor): Sizes {
  const [batch = 0, sequence = 0, heads = 0] = q.shape;
  const [, total = 0, kvHeads = 1] = k.shape;
  return { batch, sequence, heads, total, kvHeads, group: heads / kvHeads };
}

export function attentionKernels(device: Device): {
  readonly [P in "attention" | "attentionGrad" | "rope"]: Kernel<TfTensor>;
} {
  const { tf, kernel } = device;

  /** [batch, n, heads, d] -> [batch * kvHeads, group * n, d] */
  const byHead = (x: TfTensor, { batch, kvHeads }: Sizes): TfTensor => {
    const [, n = 0, heads = 0, d = 0] = x.shape;
    return tf.reshape(tf.transpose(x, [0, 2, 1, 3]), [batch * kvHeads, (heads / kvHeads) * n, d]);
  };
  /** The way back. */
  const byToken = (x: TfTensor, { batch }: Sizes, n: number, heads: number): TfTensor =>
    tf.transpose(tf.reshape(x, [batch, heads, n, x.shape.at(-1) ?? 0]), [0, 2, 1, 3]);

  /** Scaled scores [batch * kvHeads, group * sequence, total], -inf where hidden. */
  const scores = (
    q: TfTensor,
    k: TfTensor,
    mask: TfTensor | undefined,
    { causal, scale, window }: Omit<Attention, "probabilities">,
    sizes: Sizes,
  ): TfTensor => {
    const { batch, sequence, heads, total, kvHeads, group } = sizes;
    let y = tf.mul(tf.matMul(byHead(q, sizes), byHead(k, sizes), false, true), scale);
    // Added, not chosen: a sum broadcasts without a copy of the mask for each head.
    if (causal || window !== undefined) {
      const hidden = tf.tensor(visibility(sequence, total, causal, window), [1, sequence, total], "float32");
      y = tf.add(tf.reshape(y, [batch * heads, sequence, total]), hidden);
    }
    if (mask) {
      const hidden = select(device, tf.cast(mask, "bool"), 0, Number.NEGATIVE_INFINITY, mask.shape);
      y = tf.add(tf.reshape(y, [batch, heads * sequence, total]), tf.reshape(hidden, [batch, 1, total]));
    }
    return tf.reshape(y, [batch * kvHeads, group * sequence, total]);
  };

  return {
    rope: kernel<Rope>(({ x, attrs: { interleaved = false, inverse = false } }) => {
      const [input, cos, sin] = [x(0), x(1), x(2)];
      const [batch = 0, sequence = 0, heads = 0, d = 0] = input.shape;
      const half = cos.shape.at(-1) ?? 0;
      const { columns, turn } = rotation(d, half, interleaved);
      /** A table for each of d channels; those behind the turned ones get `rest`. */
      const table = (t: TfTensor, rest: number): TfTensor => {
        const flat = tf.pad(
          matrixOf(tf, t),
          [
            [0, 0],
            [0, 1],
          ],
          rest,
        ); // [positions, half + 1]
        const wide = tf.gather(flat, device.ints(columns, [d]), 1); // [positions, d]
        return tf.reshape(wide, [t.shape.length === 3 ? batch : 1, sequence, 1, d]);
      };
      // A product with 0, 1 and -1 exchanges the halves: slicing and joining short rows is slow here.
      const rows = tf.reshape(input, [batch * sequence * heads, d]);
      const turned = tf.reshape(tf.matMul(rows, tf.tensor(turn, [d, d], "float32")), input.shape);
      const shifted = tf.mul(turned, table(inverse ? tf.neg(sin) : sin, 0));
      return tf.add(tf.mul(input, table(cos, 1)), shifted);
    }),

    attention: kernel<Attention>(({ x, count, attrs, spec }) => {
      const [q, k, v] = [x(0), x(1), x(2)];
      const sizes = sizesOf(q, k);
      const { sequence, heads } = sizes;
      const s = scores(q, k, count === 4 ? x(3) : undefined, attrs, sizes);
      const top = safeMax(device, s);
      const e = tf.exp(tf.sub(s, top));
      const total = tf.sum(e, -1, true);
      const p = tf.div(e, tf.maximum(total, 1e-30));
      const out = byToken(tf.matMul(p, byHead(v, sizes)), sizes, sequence, heads);
      const lse = tf.add(log(device, total), top); // [batch * kvHeads, group * sequence, 1]
      const results = [out, tf.reshape(lse, [...spec(1).shape])];
      return attrs.probabilities ? [...results, tf.reshape(p, [...spec(2).shape])] : results;
    }),

    attentionGrad: kernel<AttentionGrad>(({ x, count, attrs, spec }) => {
      const [q, k, v] = [x(0), x(1), x(2)];
      const [out, lse, dout] = [x(count - 3), x(count - 2), x(count - 1)];
      const sizes = sizesOf(q, k);
      const { batch, sequence, heads, total, kvHeads, group } = sizes;
      if (q.size === 0 || k.size === 0 || v.size === 0) return [0, 1, 2].map((i) => zeros(tf, spec(i)));
      const s = scores(q, k, attrs.mask ? x(3) : undefined, attrs, sizes);
      const top = tf.reshape(lse, [batch * kvHeads, group * sequence, 1]);
      // A query that sees nothing has lse = -inf and all its scores -inf: probability 0.
      const p = tf.exp(tf.sub(s, select(device, tf.less(top, -3e38), 0, top, top.shape)));
      const [d, o] = [byHead(dout, sizes), byHead(out, sizes)];
      const dp = tf.matMul(d, byHead(v, sizes), false, true);
      const ds = tf.mul(tf.mul(p, tf.sub(dp, tf.sum(tf.mul(d, o), -1, true))), attrs.scale);
      return [
        byToken(tf.matMul(ds, byHead(k, sizes)), sizes, sequence, heads),
        byToken(tf.matMul(ds, byHead(q, sizes), true), sizes, total, kvHeads),
        byToken(tf.matMul(p, d, true), sizes, total, kvHeads),
      ];
    }),
  };
}

/**
 * For each of d channels its column in a table [..., half], `half` for those that stay as they are; and the matrix [d, d] that puts
 * the partner of each channel, with its sign, in its place.
 */
function rotation(
  d: number,
  half: number,
  interleaved: boolean,
): { readonly columns: Int32Array; readonly turn: Float32Array } {
  const columns = new Int32Array(d).fill(half);
  const turn = new Float32Array(d * d);
  for (let i = 0; i < half; i++) {
    const [a, b] = interleaved ? [2 * i, 2 * i + 1] : [i, i + half];
    columns[a] = i;
    columns[b] = i;
    turn[b * d + a] = -1;
    turn[a * d + b] = 1;
  }
  return { columns, turn };
}

/** 0 where query i, at position total - sequence + i, sees key j, else -inf: [sequence, total]. */
function visibility(sequence: number, total: number, causal: boolean, window = Number.POSITIVE_INFINITY): Float32Array {
  const hidden = new Float32Array(sequence * total);
  for (let i = 0; i < sequence; i++) {
    const position = total - sequence + i;
    for (let j = 0; j < total; j++) {
      const seen = (!causal || j <= position) && position - j < window;
      if (!seen) hidden[i * total + j] = Number.NEGATIVE_INFINITY;
    }
  }
  return hidden;
}
