// Eigenvectors of a symmetric matrix on the host, in float64: Householder tridiagonalisation, then the implicit QL algorithm with
// Wilkinson's shift (Golub and Van Loan, Matrix Computations, 8.3). svd.ts begins its rotations with them. Private.
import { at } from "../op.ts";

/** The sum of products of the entries from `from` on. */
export function dot(x: Float64Array, y: Float64Array, from = 0): number {
  let sum = 0;
  for (let i = from; i < x.length; i++) sum += (x[i] as number) * (y[i] as number);
  return sum;
}

/** x += share * y, on entries from `from` on. */
export function addTo(x: Float64Array, y: Float64Array, share: number, from = 0): void {
  for (let i = from; i < y.length; i++) x[i] = (x[i] as number) + share * (y[i] as number);
}

/** Every x -= 2 h (hᵀ x), on entries from `from` on; h has norm 1 there. Four at a time: half the time of one by one. */
export function reflect(columns: readonly Float64Array[], h: Float64Array, from: number, first = 0): void {
  let k = first;
  for (; k + 3 < columns.length; k += 4) {
    const [x, y, z, w] = [at(columns, k), at(columns, k + 1), at(columns, k + 2), at(columns, k + 3)];
    let a = 0;
    let b = 0;
    let c = 0;
    let d = 0;
    for (let i = from; i < h.length; i++) {
      const one = h[i] as number;
      a += one * (x[i] as number);
      b += one * (y[i] as number);
      c += one * (z[i] as number);
      d += one * (w[i] as number);
    }
    for (let i = from; i < h.length; i++) {
      const twice = 2 * (h[i] as number);
      x[i] = (x[i] as number) - a * twice;
      y[i] = (y[i] as number) - b * twice;
      z[i] = (z[i] as number) - c * twice;
      w[i] = (w[i] as number) - d * twice;
    }
  }
  for (; k < columns.length; k++) addTo(at(columns, k), h, -2 * dot(h, at(columns, k), from), from);
}

/** The h that reflects x, from `from` on, onto that axis: zeros where x is shorter than `tiny` there. */
export function reflectorOf(x: Float64Array, from: number, tiny: number): Float64Array {
  const h = new Float64Array(x.length);
  const norm = Math.sqrt(dot(x, x, from));
  if (norm <= tiny) return h;
  for (let i = from; i < x.length; i++) h[i] = x[i] as number;
  const head = x[from] as number;
  h[from] = head + (head < 0 ? -norm : norm);
  const length = Math.sqrt(dot(h, h, from));
  for (let i = from; i < x.length; i++) h[i] = (h[i] as number) / length;
  return h;
}

/** Column x becomes c x - s y, column y becomes s x + c y. */
export function rotate(x: Float64Array, y: Float64Array, c: number, s: number): void {
  for (let i = 0; i < x.length; i++) {
    const xi = x[i] as number;
    const yi = y[i] as number;
    x[i] = c * xi - s * yi;
    y[i] = s * xi + c * yi;
  }
}

/**
 * Orthonormal eigenvectors, in no particular order, of the symmetric matrix whose row i is `upper[i]`; only entries from the diagonal on
 * are read, and overwritten. Where the iteration does not settle in time (not seen yet) they are orthonormal and no more than near.
 */
export function symmetricEigenvectors(upper: readonly Float64Array[], tiny: number): Float64Array[] {
  const n = upper.length;
  const reflectors = tridiagonalise(upper, tiny);
  const diagonal = Float64Array.from(upper, (row, i) => row[i] as number);
  const beside = Float64Array.from(upper, (row, i) => row[i + 1] ?? 0); // beside[i] joins i and i + 1
  const vectors = Array.from({ length: n }, (_, i) => {
    const unit = new Float64Array(n);
    unit[i] = 1;
    return unit;
  });
  implicitQl(diagonal, beside, vectors);
  for (let k = reflectors.length - 1; k >= 0; k--) reflect(vectors, at(reflectors, k), k + 1);
  return vectors;
}

/** A becomes H A H ... with the reflectors H that are returned; the k-th works on entries from k + 1 on. */
function tridiagonalise(upper: readonly Float64Array[], tiny: number): Float64Array[] {
  const n = upper.length;
  const reflectors: Float64Array[] = [];
  for (let k = 0; k + 2 < n; k++) {
    const row = at(upper, k);
    const h = reflectorOf(row, k + 1, tiny);
    reflect([row], h, k + 1);
    // p = A h, of which every entry stands in the upper half
    const p = new Float64Array(n);
    for (let i = k + 1; i < n; i++) {
      const own = at(upper, i);
      addTo(p, own, h[i] as number, i);
      p[i] = (p[i] as number) + dot(own, h, i + 1);
    }
    // (I - 2hhᵀ) A (I - 2hhᵀ) = A - 2hwᵀ - 2whᵀ with w = p - (hᵀp) h
    addTo(p, h, -dot(h, p, k + 1), k + 1);
    for (let i = k + 1; i < n; i++) {
      const own = at(upper, i);
      const [hi, wi] = [2 * (h[i] as number), 2 * (p[i] as number)];
      for (let j = i; j < n; j++) {
        own[j] = (own[j] as number) - hi * (p[j] as number) - wi * (h[j] as number);
      }
    }
    reflectors.push(h);
  }
  return reflectors;
}

/** Turns the vectors to eigenvectors of the tridiagonal matrix, whose eigenvalues take the diagonal. */
function implicitQl(d: Float64Array, e: Float64Array, vectors: readonly Float64Array[]): void {
  const n = d.length;
  for (let l = 0; l < n; l++) {
    for (let round = 0; round < 60; round++) {
      let m = l; // the block l..m is joined by entries that are not negligible
      while (m + 1 < n) {
        const size = Math.abs(d[m] as number) + Math.abs(d[m + 1] as number);
        if (Math.abs(e[m] as number) <= Number.EPSILON * size) break;
        m++;
      }
      if (m === l) break;
      const [first, joint] = [d[l] as number, e[l] as number];
      const half = ((d[l + 1] as number) - first) / (2 * joint);
      const root = Math.hypot(half, 1);
      let g = (d[m] as number) - first + joint / (half + (half < 0 ? -root : root));
      let [s, c, p] = [1, 1, 0];
      let split = false;
      for (let i = m - 1; i >= l; i--) {
        const f = s * (e[i] as number);
        const b = c * (e[i] as number);
        const r = Math.hypot(f, g);
        e[i + 1] = r;
        if (r === 0) {
          d[i + 1] = (d[i + 1] as number) - p;
          e[m] = 0;
          split = true;
          break;
        }
        s = f / r;
        c = g / r;
        g = (d[i + 1] as number) - p;
        const turn = ((d[i] as number) - g) * s + 2 * c * b;
        p = s * turn;
        d[i + 1] = g + p;
        g = c * turn - b;
        rotate(at(vectors, i), at(vectors, i + 1), c, s);
      }
      if (split) continue;
      d[l] = (d[l] as number) - p;
      e[l] = g;
      e[m] = 0;
    }
  }
}
