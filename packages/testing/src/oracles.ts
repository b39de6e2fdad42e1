// Naive loops in float64 for every primitive and fused op, written from the equations and apart from any backend's
// code.
// They are slow on purpose: one output entry at a time, index arithmetic spelled out.
import { type HostArray, sizeOf } from "./arrays.ts";

const like = (x: HostArray, length: number): Float64Array | Int32Array =>
  x.data instanceof Int32Array ? new Int32Array(length) : new Float64Array(length);
const at = (x: HostArray, i: number): number => {
  const value = x.data[i];
  if (value === undefined) throw new RangeError(`oracle: entry ${i} of an array of ${x.data.length}`);
  return value;
};
const dim = (x: HostArray, axis: number): number => {
  const n = x.shape.at(axis);
  if (n === undefined) throw new RangeError(`oracle: axis ${axis} of a shape of rank ${x.shape.length}`);
  return n;
};
const float = (shape: readonly number[], fill: (i: number) => number): HostArray => {
  const data = new Float64Array(sizeOf(shape));
  for (let i = 0; i < data.length; i++) data[i] = fill(i);
  return { shape, data };
};
const int = (shape: readonly number[], fill: (i: number) => number): HostArray => {
  const data = new Int32Array(sizeOf(shape));
  for (let i = 0; i < data.length; i++) data[i] = fill(i);
  return { shape, data };
};

// ---------------------------------------------------------------- indices
const unravel = (flat: number, shape: readonly number[]): number[] => {
  const index = new Array<number>(shape.length).fill(0);
  let rest = flat;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    index[axis] = rest % (shape[axis] ?? 1);
    rest = Math.floor(rest / (shape[axis] ?? 1));
  }
  return index;
};
const ravel = (index: readonly number[], shape: readonly number[]): number =>
  index.reduce((flat, i, axis) => flat * (shape[axis] ?? 1) + i, 0);

/** NumPy's broadcasting of shapes. */
export function broadcastShape(...shapes: readonly (readonly number[])[]): number[] {
  const rank = Math.max(...shapes.map((shape) => shape.length));
  const result: number[] = [];
  for (let axis = 0; axis < rank; axis++) {
    let size = 1;
    for (const shape of shapes) {
      const n = shape[axis - rank + shape.length] ?? 1;
      if (n !== 1) size = n;
    }
    result.push(size);
  }
  return result;
}
/** Entry of x that a broadcast output index reads. */
const source = (index: readonly number[], shape: readonly number[]): number =>
  ravel(
    shape.map((n, axis) => (n === 1 ? 0 : (index[index.length - shape.length + axis] ?? 0))),
    shape,
  );

// ---------------------------------------------------------------- primitives
export const unary = (x: HostArray, f: (value: number) => number): HostArray => float(x.shape, (i) => f(at(x, i)));

export function binary(a: HostArray, b: HostArray, f: (a: number, b: number) => number, toFloat = false): HostArray {
  const shape = broadcastShape(a.shape, b.shape);
  const value = (i: number): number => {
    const index = unravel(i, shape);
    return f(at(a, source(index, a.shape)), at(b, source(index, b.shape)));
  };
  return a.data instanceof Int32Array && !toFloat ? int(shape, value) : float(shape, value);
}

export function where(condition: HostArray, a: HostArray, b: HostArray): HostArray {
  const shape = broadcastShape(condition.shape, a.shape, b.shape);
  const value = (i: number): number => {
    const index = unravel(i, shape);
    const from = at(condition, source(index, condition.shape)) !== 0 ? a : b;
    return at(from, source(index, from.shape));
  };
  return a.data instanceof Int32Array ? int(shape, value) : float(shape, value);
}

/** erf to float64 accuracy: the Maclaurin series near zero, the continued fraction of erfc (Lentz) elsewhere. */
export function erf(x: number): number {
  if (Number.isNaN(x)) return x;
  const z = Math.abs(x);
  if (z > 6) return Math.sign(x);
  if (z < 2.5) {
    let term = z;
    let sum = z;
    for (let n = 1; n < 200; n++) {
      term *= (-z * z) / n;
      sum += term / (2 * n + 1);
      if (Math.abs(term) < 1e-18) break;
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI);
  }
  // erfc(z) = exp(-z²)/√π · 1/(z + (1/2)/(z + 1/(z + (3/2)/(z + ...))))
  let tail = z;
  for (let n = 120; n >= 1; n--) tail = z + n / 2 / tail;
  return Math.sign(x) * (1 - Math.exp(-z * z) / (Math.sqrt(Math.PI) * tail));
}

export function transpose(x: HostArray, perm: readonly number[]): HostArray {
  const shape = perm.map((axis) => x.shape[axis] ?? 1);
  const data = like(x, x.data.length);
  for (let i = 0; i < data.length; i++) {
    const index = unravel(i, shape);
    const from = new Array<number>(perm.length).fill(0);
    perm.forEach((axis, position) => {
      from[axis] = index[position] ?? 0;
    });
    data[i] = at(x, ravel(from, x.shape));
  }
  return { shape, data };
}

export function slice(x: HostArray, start: readonly number[], size: readonly number[]): HostArray {
  const data = like(x, sizeOf(size));
  for (let i = 0; i < data.length; i++) {
    const index = unravel(i, size).map((position, axis) => position + (start[axis] ?? 0));
    data[i] = at(x, ravel(index, x.shape));
  }
  return { shape: [...size], data };
}

/** Zeros before and after, so many per axis. */
export function pad(x: HostArray, before: readonly number[], after: readonly number[]): HostArray {
  const shape = x.shape.map((n, axis) => n + (before[axis] ?? 0) + (after[axis] ?? 0));
  const data = like(x, sizeOf(shape));
  for (let i = 0; i < x.data.length; i++) {
    const index = unravel(i, x.shape).map((position, axis) => position + (before[axis] ?? 0));
    data[ravel(index, shape)] = at(x, i);
  }
  return { shape, data };
}

export function concat(parts: readonly HostArray[], axis: number): HostArray {
  const first = parts[0];
  if (first === undefined) throw new RangeError("oracle: concat of nothing");
  const shape = [...first.shape];
  shape[axis] = parts.reduce((total, part) => total + (part.shape[axis] ?? 0), 0);
  const data = like(first, sizeOf(shape));
  for (let i = 0; i < data.length; i++) {
    const index = unravel(i, shape);
    let position = index[axis] ?? 0;
    for (const part of parts) {
      const n = part.shape[axis] ?? 0;
      if (position < n) {
        index[axis] = position;
        data[i] = at(part, ravel(index, part.shape));
        break;
      }
      position -= n;
    }
  }
  return { shape, data };
}

/** An id outside 0..n-1 gives a row of zeros. */
export function takeRows(x: HostArray, ids: HostArray): HostArray {
  const row = x.shape.slice(1);
  const width = sizeOf(row);
  const data = like(x, ids.data.length * width);
  for (let i = 0; i < ids.data.length; i++) {
    const id = at(ids, i);
    if (id < 0 || id >= dim(x, 0)) continue;
    for (let j = 0; j < width; j++) data[i * width + j] = at(x, id * width + j);
  }
  return { shape: [...ids.shape, ...row], data };
}

export function addRows(x: HostArray, ids: HostArray, rows: number): HostArray {
  const row = x.shape.slice(1);
  const width = sizeOf(row);
  const data = new Float64Array(rows * width);
  for (let i = 0; i < ids.data.length; i++) {
    const id = at(ids, i);
    if (id < 0 || id >= rows) continue;
    for (let j = 0; j < width; j++) data[id * width + j] = (data[id * width + j] ?? 0) + at(x, i * width + j);
  }
  return { shape: [rows, ...row], data };
}

export function sumTo(x: HostArray, shape: readonly number[]): HostArray {
  const data = new Float64Array(sizeOf(shape));
  for (let i = 0; i < x.data.length; i++) {
    const target = source(unravel(i, x.shape), shape);
    data[target] = (data[target] ?? 0) + at(x, i);
  }
  return { shape: [...shape], data };
}

const rowsOf = (x: HostArray): { n: number; rows: number } => {
  const n = dim(x, -1);
  return { n, rows: n === 0 ? 0 : x.data.length / n };
};

export function maxLast(x: HostArray): HostArray {
  const { n } = rowsOf(x);
  return float([...x.shape.slice(0, -1), 1], (row) => {
    let best = at(x, row * n);
    for (let j = 1; j < n; j++) best = Math.max(best, at(x, row * n + j));
    return best;
  });
}

export function cumsum(
  x: HostArray,
  axis: number,
  options: { exclusive?: boolean; reverse?: boolean } = {},
): HostArray {
  const { exclusive = false, reverse = false } = options;
  const data = like(x, x.data.length);
  for (let i = 0; i < data.length; i++) {
    const index = unravel(i, x.shape);
    const position = index[axis] ?? 0;
    let sum = 0;
    for (let j = 0; j < (x.shape[axis] ?? 0); j++) {
      const before = reverse ? j > position : j < position;
      if (!before && !(j === position && !exclusive)) continue;
      index[axis] = j;
      sum += at(x, ravel(index, x.shape));
    }
    data[i] = sum;
  }
  return { shape: x.shape, data };
}

export function matmul(
  a: HostArray,
  b: HostArray,
  options: { transposeA?: boolean; transposeB?: boolean } = {},
): HostArray {
  const { transposeA = false, transposeB = false } = options;
  const m = dim(a, transposeA ? -1 : -2);
  const k = dim(a, transposeA ? -2 : -1);
  const n = dim(b, transposeB ? -2 : -1);
  const batchA = a.shape.slice(0, -2);
  const batchB = b.shape.slice(0, -2);
  const batch = broadcastShape(batchA, batchB);
  return float([...batch, m, n], (flat) => {
    const column = flat % n;
    const row = Math.floor(flat / n) % m;
    const index = unravel(Math.floor(flat / (m * n)), batch);
    const startA = source(index, batchA) * m * k;
    const startB = source(index, batchB) * k * n;
    let sum = 0;
    for (let i = 0; i < k; i++) {
      const left = at(a, startA + (transposeA ? i * m + row : row * k + i));
      const right = at(b, startB + (transposeB ? column * k + i : i * n + column));
      sum += left * right;
    }
    return sum;
  });
}

/** Positions of one row in order: NaN last whichever the direction, ties by the lower index. */
function order(values: readonly number[], descending: boolean): number[] {
  const positions = values.map((_, i) => i);
  return positions.sort((i, j) => {
    const a = values[i] ?? Number.NaN;
    const b = values[j] ?? Number.NaN;
    if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || i - j;
    if (a === b) return i - j;
    return a < b === descending ? 1 : -1;
  });
}
const rowValues = (x: HostArray, row: number, n: number): number[] => [...x.data.subarray(row * n, (row + 1) * n)];

export function topkIndices(x: HostArray, k: number): HostArray {
  const { n, rows } = rowsOf(x);
  const out: number[] = [];
  for (let row = 0; row < rows; row++) out.push(...order(rowValues(x, row, n), true).slice(0, k));
  return { shape: [...x.shape.slice(0, -1), k], data: Int32Array.from(out) };
}

export function argsort(x: HostArray, descending = false): HostArray {
  const { n, rows } = rowsOf(x);
  const out: number[] = [];
  for (let row = 0; row < rows; row++) out.push(...order(rowValues(x, row, n), descending));
  return { shape: x.shape, data: Int32Array.from(out) };
}

export const blockEnds = (ids: HostArray, count: number): HostArray =>
  int([count], (e) => [...ids.data].filter((id) => id >= 0 && id <= e).length);

// ---------------------------------------------------------------- pointwise
export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
export const silu = (x: number): number => x * sigmoid(x);
export const siluSlope = (x: number): number => sigmoid(x) * (1 + x * (1 - sigmoid(x)));
export const softplus = (x: number): number => (x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.log1p(Math.exp(x)));
export const relu = (x: number): number => (x > 0 ? x : 0);
const c = Math.sqrt(2 / Math.PI);
export const gelu = (x: number, tanh: boolean): number =>
  tanh ? 0.5 * x * (1 + Math.tanh(c * (x + 0.044715 * x ** 3))) : 0.5 * x * (1 + erf(x / Math.SQRT2));
export const geluSlope = (x: number, tanh: boolean): number => {
  if (!tanh) return 0.5 * (1 + erf(x / Math.SQRT2)) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI);
  const t = Math.tanh(c * (x + 0.044715 * x ** 3));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
};

/** silu(first half) * second half of the last axis. */
export function swiglu(x: HostArray): HostArray {
  const h = dim(x, -1) / 2;
  return float([...x.shape.slice(0, -1), h], (i) => {
    const row = Math.floor(i / h) * 2 * h;
    return silu(at(x, row + (i % h))) * at(x, row + h + (i % h));
  });
}
export function swigluGrad(x: HostArray, dy: HostArray): HostArray {
  const h = dim(x, -1) / 2;
  return float(x.shape, (i) => {
    const row = Math.floor(i / (2 * h));
    const j = i % (2 * h);
    const gate = at(x, row * 2 * h + (j % h));
    const up = at(x, row * 2 * h + h + (j % h));
    const d = at(dy, row * h + (j % h));
    return j < h ? d * up * siluSlope(gate) : d * silu(gate);
  });
}

// ---------------------------------------------------------------- rows
export function linear(x: HostArray, w: HostArray, bias?: HostArray): HostArray {
  const [out, inner] = [dim(w, 0), dim(w, 1)];
  return float([...x.shape.slice(0, -1), out], (flat) => {
    const o = flat % out;
    const row = Math.floor(flat / out);
    let sum = bias === undefined ? 0 : at(bias, o);
    for (let i = 0; i < inner; i++) sum += at(x, row * inner + i) * at(w, o * inner + i);
    return sum;
  });
}

const byRow = (x: HostArray, f: (row: readonly number[]) => readonly number[]): HostArray => {
  const { n, rows } = rowsOf(x);
  const data = new Float64Array(x.data.length);
  for (let row = 0; row < rows; row++) data.set(f(rowValues(x, row, n)), row * n);
  return { shape: x.shape, data };
};
const lse = (row: readonly number[]): number => {
  const top = Math.max(...row);
  if (top === Number.NEGATIVE_INFINITY) return top;
  return top + Math.log(row.reduce((sum, value) => sum + Math.exp(value - top), 0));
};

/** A row that is -inf throughout gives zeros. */
export const softmax = (x: HostArray): HostArray =>
  byRow(x, (row) => {
    const total = lse(row);
    return row.map((value) => (total === Number.NEGATIVE_INFINITY ? 0 : Math.exp(value - total)));
  });
export const softmaxGrad = (y: HostArray, dy: HostArray): HostArray => {
  const { n } = rowsOf(y);
  return float(y.shape, (i) => {
    const start = Math.floor(i / n) * n;
    let dot = 0;
    for (let j = 0; j < n; j++) dot += at(y, start + j) * at(dy, start + j);
    return at(y, i) * (at(dy, i) - dot);
  });
};
export const logSoftmax = (x: HostArray): HostArray =>
  byRow(x, (row) => {
    const total = lse(row);
    return row.map((value) => value - total);
  });
export const logSoftmaxGrad = (y: HostArray, dy: HostArray): HostArray => {
  const { n } = rowsOf(y);
  return float(y.shape, (i) => {
    const start = Math.floor(i / n) * n;
    let sum = 0;
    for (let j = 0; j < n; j++) sum += at(dy, start + j);
    return at(dy, i) - Math.exp(at(y, i)) * sum;
  });
};
export const logSumExp = (x: HostArray): HostArray => {
  const { n } = rowsOf(x);
  return float([...x.shape.slice(0, -1), 1], (row) => lse(rowValues(x, row, n)));
};

export const rmsNorm = (x: HostArray, w: HostArray, eps: number): HostArray =>
  byRow(x, (row) => {
    const mean = row.reduce((sum, value) => sum + value * value, 0) / row.length;
    return row.map((value, i) => (value / Math.sqrt(mean + eps)) * at(w, i));
  });
export const layerNorm = (x: HostArray, w: HostArray, b: HostArray, eps: number): HostArray =>
  byRow(x, (row) => {
    const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / row.length;
    return row.map((value, i) => ((value - mean) / Math.sqrt(variance + eps)) * at(w, i) + at(b, i));
  });

/** x [b, s, h, d]; cos and sin [s, r/2] or [b, s, r/2]: the first r entries of each head turn, the others pass. */
export function rope(
  x: HostArray,
  cos: HostArray,
  sin: HostArray,
  options: { interleaved?: boolean; inverse?: boolean } = {},
): HostArray {
  const [, s, h, d] = [dim(x, 0), dim(x, 1), dim(x, 2), dim(x, 3)];
  const half = dim(cos, -1);
  return float(x.shape, (i) => {
    const j = i % d;
    if (j >= 2 * half) return at(x, i);
    const start = i - j;
    const position = Math.floor(i / (d * h)) % s;
    const b = Math.floor(i / (d * h * s));
    const pair = options.interleaved ? Math.floor(j / 2) : j % half;
    const first = options.interleaved ? 2 * pair : pair;
    const second = options.interleaved ? 2 * pair + 1 : pair + half;
    const angle = (cos.shape.length === 3 ? b * s + position : position) * half + pair;
    const cosine = at(cos, angle);
    const sine = options.inverse ? -at(sin, angle) : at(sin, angle);
    const [p, q] = [at(x, start + first), at(x, start + second)];
    return j === first ? p * cosine - q * sine : q * cosine + p * sine;
  });
}

/** Losses [n] and log-sum-exp [n]; a label outside 0..v-1 has loss 0. */
export function crossEntropy(logits: HostArray, labels: HostArray): [HostArray, HostArray] {
  const [n, v] = [dim(logits, 0), dim(logits, 1)];
  const total = float([n], (i) => lse(rowValues(logits, i, v)));
  const loss = float([n], (i) => {
    const label = at(labels, i);
    return label < 0 || label >= v ? 0 : at(total, i) - at(logits, i * v + label);
  });
  return [loss, total];
}
export function crossEntropyGrad(logits: HostArray, labels: HostArray, total: HostArray, dloss: HostArray): HostArray {
  const v = dim(logits, 1);
  return float(logits.shape, (i) => {
    const row = Math.floor(i / v);
    const label = at(labels, row);
    if (label < 0 || label >= v) return 0;
    return at(dloss, row) * (Math.exp(at(logits, i) - at(total, row)) - (i % v === label ? 1 : 0));
  });
}

// ---------------------------------------------------------------- attention
export interface AttentionOptions {
  readonly causal: boolean;
  readonly scale: number;
  readonly window?: number;
}
/**
 * q [b, s, h, d], k and v [b, t, g, d] (g divides h), mask [b, t] -> out, lse [b, h, s], probabilities [b, h, s, t].
 */
export function attention(
  q: HostArray,
  k: HostArray,
  v: HostArray,
  mask: HostArray | undefined,
  options: AttentionOptions,
): [HostArray, HostArray, HostArray] {
  const [b, s, h, d] = [dim(q, 0), dim(q, 1), dim(q, 2), dim(q, 3)];
  const [t, g] = [dim(k, 1), dim(k, 2)];
  const out = new Float64Array(b * s * h * d);
  const sums = new Float64Array(b * h * s);
  const probabilities = new Float64Array(b * h * s * t);
  for (let batch = 0; batch < b; batch++)
    for (let head = 0; head < h; head++) {
      const group = Math.floor(head / (h / g));
      for (let i = 0; i < s; i++) {
        const position = t - s + i;
        const scores: number[] = [];
        for (let j = 0; j < t; j++) {
          const visible =
            (!options.causal || j <= position) &&
            (options.window === undefined || position - j < options.window) &&
            (mask === undefined || at(mask, batch * t + j) !== 0);
          let dot = 0;
          for (let e = 0; e < d; e++)
            dot += at(q, ((batch * s + i) * h + head) * d + e) * at(k, ((batch * t + j) * g + group) * d + e);
          scores.push(visible ? dot * options.scale : Number.NEGATIVE_INFINITY);
        }
        const total = scores.length === 0 ? Number.NEGATIVE_INFINITY : lse(scores);
        const row = (batch * h + head) * s + i;
        sums[row] = total;
        scores.forEach((score, j) => {
          const p = score === Number.NEGATIVE_INFINITY ? 0 : Math.exp(score - total);
          probabilities[row * t + j] = p;
          for (let e = 0; e < d; e++) {
            const to = ((batch * s + i) * h + head) * d + e;
            // A key that cannot be seen must not leak even if its value is NaN.
            if (p !== 0) out[to] = (out[to] ?? 0) + p * at(v, ((batch * t + j) * g + group) * d + e);
          }
        });
      }
    }
  return [
    { shape: q.shape, data: out },
    { shape: [b, h, s], data: sums },
    { shape: [b, h, s, t], data: probabilities },
  ];
}

// ---------------------------------------------------------------- routing
export function gatherLast(x: HostArray, ids: HostArray): HostArray {
  const [n, k] = [dim(x, -1), dim(ids, -1)];
  return float(ids.shape, (i) => {
    const id = at(ids, i);
    return id < 0 || id >= n ? 0 : at(x, Math.floor(i / k) * n + id);
  });
}
export function scatterLast(x: HostArray, ids: HostArray, size: number): HostArray {
  const k = dim(ids, -1);
  const data = new Float64Array(sizeOf(ids.shape.slice(0, -1)) * size);
  for (let i = 0; i < ids.data.length; i++) {
    const id = at(ids, i);
    if (id < 0 || id >= size) continue;
    const to = Math.floor(i / k) * size + id;
    data[to] = (data[to] ?? 0) + at(x, i);
  }
  return { shape: [...ids.shape.slice(0, -1), size], data };
}

export type TopkOrder = "softmax-topk-renormalise" | "softmax-topk" | "topk-softmax";
/** Weights [n, k], ids [n, k], the full softmax [n, E]. */
export function softmaxTopk(logits: HostArray, k: number, how: TopkOrder): [HostArray, HostArray, HostArray] {
  const probabilities = softmax(logits);
  const ids = topkIndices(logits, k);
  const chosen = gatherLast(probabilities, ids);
  const weights =
    how === "softmax-topk"
      ? chosen
      : how === "topk-softmax"
        ? softmax(gatherLast(logits, ids))
        : byRow(chosen, (row) => {
            const sum = row.reduce((total, value) => total + value, 0);
            return row.map((value) => value / sum);
          });
  return [weights, ids, probabilities];
}

/**
 * rows, slots [bound] and ends [count]: slots listed expert by expert, in flat order inside each; -1 after the last.
 */
export function dispatch(ids: HostArray, count: number, bound: number): [HostArray, HostArray, HostArray] {
  const k = dim(ids, 1);
  const slots: number[] = [];
  const ends: number[] = [];
  for (let e = 0; e < count; e++) {
    for (let slot = 0; slot < ids.data.length; slot++) if (at(ids, slot) === e) slots.push(slot);
    ends.push(slots.length);
  }
  const filled = int([bound], (i) => slots[i] ?? -1);
  return [
    int([bound], (i) => (slots[i] === undefined ? -1 : Math.floor((slots[i] ?? 0) / k))),
    filled,
    int([count], (e) => ends[e] ?? 0),
  ];
}

/** The block a row lies in, or -1 beyond the last end. */
const blockOf = (row: number, ends: HostArray): number => [...ends.data].findIndex((end) => row < end);

export function groupedMatmul(rows: HostArray, w: HostArray, ends: HostArray, transposed = false): HostArray {
  const [n, inner] = [dim(rows, 0), dim(rows, 1)];
  const out = dim(w, transposed ? 2 : 1);
  return float([n, out], (flat) => {
    const row = Math.floor(flat / out);
    const o = flat % out;
    const e = blockOf(row, ends);
    if (e < 0) return 0;
    let sum = 0;
    for (let i = 0; i < inner; i++)
      sum += at(rows, row * inner + i) * at(w, e * inner * out + (transposed ? i * out + o : o * inner + i));
    return sum;
  });
}
/** Stored weights: u8 codes, f32 scales (u8 exponents for mxfp4), u8 zeros; see core's QuantizedWeights. */
export interface StoredWeights {
  readonly codes: HostArray;
  readonly scales: HostArray;
  readonly zeros?: HostArray | undefined;
  readonly format: "int8" | "int4" | "mxfp4" | "fp8";
  readonly group: number;
  /** Lines that share a scale; fp8 alone. */
  readonly rows?: number | undefined;
}
/** Bytes taken apart bit by bit. */
export function dequantize({ codes, scales, zeros, format, group, rows = 1 }: StoredWeights): HostArray {
  const perByte = format === "int8" || format === "fp8" ? 1 : 2;
  const inner = dim(codes, -1) * perByte;
  const out = dim(codes, -2);
  return float([...codes.shape.slice(0, -1), inner], (i) => {
    const byte = at(codes, Math.floor(i / perByte));
    const code = perByte === 1 ? byte : i % 2 === 0 ? byte & 15 : byte >> 4;
    const line = Math.floor(i / inner);
    const scaleLine = Math.floor(line / out) * Math.ceil(out / rows) + Math.floor((line % out) / rows);
    const g = scaleLine * Math.ceil(inner / group) + Math.floor((i % inner) / group);
    const zero = zeros && at(zeros, g);
    switch (format) {
      case "int8":
        return (((code << 24) >> 24) - (((zero ?? 0) << 24) >> 24)) * at(scales, g);
      case "int4":
        return (code - (zero ?? 8)) * at(scales, g);
      case "mxfp4": {
        const [sign, exponent, mantissa] = [code >> 3, (code >> 1) & 3, code & 1];
        const magnitude = exponent === 0 ? mantissa / 2 : (1 + mantissa / 2) * 2 ** (exponent - 1);
        const scale = at(scales, g) === 255 ? Number.NaN : 2 ** (at(scales, g) - 127);
        return (sign === 1 ? -magnitude : magnitude) * scale;
      }
      case "fp8": {
        // Sign, four bits of exponent with bias 7, three of mantissa; all ones is NaN.
        const [sign, exponent, mantissa] = [code >> 7, (code >> 3) & 15, code & 7];
        if (exponent === 15 && mantissa === 7) return Number.NaN;
        const magnitude = exponent === 0 ? (mantissa / 8) * 2 ** -6 : (1 + mantissa / 8) * 2 ** (exponent - 7);
        return (sign === 1 ? -magnitude : magnitude) * at(scales, g);
      }
      default:
        throw new RangeError(`oracle: format ${format satisfies never}`);
    }
  });
}
export const quantizedLinear = (x: HostArray, w: StoredWeights): HostArray => linear(x, dequantize(w));
export const quantizedGroupedMatmul = (rows: HostArray, w: StoredWeights, ends: HostArray): HostArray =>
  groupedMatmul(rows, dequantize(w), ends);

export function groupedOuter(a: HostArray, b: HostArray, ends: HostArray): HostArray {
  const [p, q, count] = [dim(a, 1), dim(b, 1), dim(ends, 0)];
  const data = new Float64Array(count * p * q);
  for (let row = 0; row < dim(a, 0); row++) {
    const e = blockOf(row, ends);
    if (e < 0) continue;
    for (let i = 0; i < p; i++)
      for (let j = 0; j < q; j++) {
        const to = (e * p + i) * q + j;
        data[to] = (data[to] ?? 0) + at(a, row * p + i) * at(b, row * q + j);
      }
  }
  return { shape: [count, p, q], data };
}

export function combineRows(out: HostArray, weights: HostArray, slots: HostArray): HostArray {
  const [width, tokens, k] = [dim(out, 1), dim(weights, 0), dim(weights, 1)];
  const data = new Float64Array(tokens * width);
  for (let i = 0; i < slots.data.length; i++) {
    const slot = at(slots, i);
    if (slot < 0) continue;
    for (let j = 0; j < width; j++) {
      const to = Math.floor(slot / k) * width + j;
      data[to] = (data[to] ?? 0) + at(weights, slot) * at(out, i * width + j);
    }
  }
  return { shape: [tokens, width], data };
}
/** d-out [bound, width] and d-weights [tokens, k]; slots that nothing fills get 0. */
export function combineRowsGrad(
  out: HostArray,
  weights: HostArray,
  slots: HostArray,
  dy: HostArray,
): [HostArray, HostArray] {
  const [width, k] = [dim(out, 1), dim(weights, 1)];
  const dout = new Float64Array(out.data.length);
  const dweights = new Float64Array(weights.data.length);
  for (let i = 0; i < slots.data.length; i++) {
    const slot = at(slots, i);
    if (slot < 0) continue;
    const token = Math.floor(slot / k);
    for (let j = 0; j < width; j++) {
      dout[i * width + j] = at(weights, slot) * at(dy, token * width + j);
      dweights[slot] = (dweights[slot] ?? 0) + at(out, i * width + j) * at(dy, token * width + j);
    }
  }
  return [
    { shape: out.shape, data: dout },
    { shape: weights.shape, data: dweights },
  ];
}

/**
 * SwiGLU experts: y[t] = sum over j of weights[t, j] * down_e · swiglu(gateUp_e · x[t]), e = ids[t, j]; other ids add
 * nothing.
 */
export function moeExperts(
  hidden: HostArray,
  gateUp: HostArray,
  down: HostArray,
  ids: HostArray,
  weights: HostArray,
): HostArray {
  const [tokens, width, count, k] = [dim(hidden, 0), dim(hidden, 1), dim(gateUp, 0), dim(ids, 1)];
  const h = dim(down, 2);
  const data = new Float64Array(tokens * width);
  for (let t = 0; t < tokens; t++)
    for (let j = 0; j < k; j++) {
      const e = at(ids, t * k + j);
      if (e < 0 || e >= count) continue;
      const project = (r: number): number => {
        let sum = 0;
        for (let i = 0; i < width; i++) sum += at(gateUp, (e * 2 * h + r) * width + i) * at(hidden, t * width + i);
        return sum;
      };
      const inner = Array.from({ length: h }, (_, r) => silu(project(r)) * project(h + r));
      for (let o = 0; o < width; o++) {
        let sum = 0;
        for (let r = 0; r < h; r++) sum += at(down, (e * width + o) * h + r) * (inner[r] ?? 0);
        data[t * width + o] = (data[t * width + o] ?? 0) + at(weights, t * k + j) * sum;
      }
    }
  return { shape: [tokens, width], data };
}

// ---------------------------------------------------------------- optimisers
export interface AdamWOptions {
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  readonly correction1: number;
  readonly correction2: number;
}
export function adamw(
  param: HostArray,
  grad: HostArray,
  m: HostArray,
  v: HostArray,
  scale: HostArray,
  o: AdamWOptions,
): [HostArray, HostArray, HostArray] {
  const g = (i: number): number => at(grad, i) * at(scale, 0);
  const m2 = float(param.shape, (i) => o.beta1 * at(m, i) + (1 - o.beta1) * g(i));
  const v2 = float(param.shape, (i) => o.beta2 * at(v, i) + (1 - o.beta2) * g(i) ** 2);
  const p2 = float(param.shape, (i) => {
    const update = at(m2, i) / o.correction1 / (Math.sqrt(at(v2, i) / o.correction2) + o.eps);
    return at(param, i) - o.lr * (update + o.weightDecay * at(param, i));
  });
  return [p2, m2, v2];
}
export const sumSquares = (x: HostArray): HostArray =>
  float([], () => [...x.data].reduce((sum, value) => sum + value * value, 0));
