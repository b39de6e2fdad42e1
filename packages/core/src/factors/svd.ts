// Thin singular value decomposition on the host, in float64: Householder QR with column pivoting, then one-sided Jacobi on the
// transposed triangle (Drmač and Veselić, 10.1137/050639193), which begins with the eigenvectors of its Gram matrix and so takes three
// sweeps where it took eleven. For conversions of weights, not for the forward pass.

import { ShapeError } from "../errors.ts";
import { at } from "../op.ts";
import { addTo, dot, reflect, reflectorOf, rotate, symmetricEigenvectors } from "./eigenvectors.ts";

/** A matrix on the host, row-major. */
export interface HostMatrix {
  readonly data: ArrayLike<number>;
  readonly rows: number;
  readonly columns: number;
}

/** matrix = u diag(s) vᵀ, rank = min(rows, columns). */
export interface Svd {
  /** `[rows, rank]`, row-major, orthonormal columns, also where singular values are 0. */
  readonly u: Float64Array;
  /** `[rank]`, descending, not negative. */
  readonly s: Float64Array;
  /** `[columns, rank]`, row-major, orthonormal columns. */
  readonly v: Float64Array;
  readonly rank: number;
}

/**
 * The thin singular value decomposition. Signs (and the bases of equal singular values) are as they come: compare products. Throws
 * ShapeError for data of another length or with numbers that are not finite.
 *
 * @example svd({ data: [3, 0, 0, 4], rows: 2, columns: 2 }).s // 4, 3
 */
export function svd(matrix: HostMatrix): Svd {
  const { data, rows, columns } = matrix;
  checkMatrix("svd", matrix);
  if (rows < columns) {
    const { u, s, v, rank } = svd(transposed(matrix));
    return { u: v, s, v: u, rank };
  }
  let largest = 0;
  for (let i = 0; i < data.length; i++) {
    const size = Math.abs(data[i] as number);
    if (!Number.isFinite(size)) throw new ShapeError(`svd: entry ${i} is ${data[i]}; expected finite numbers`);
    if (size > largest) largest = size;
  }
  // Columns as contiguous arrays, scaled so that squares neither overflow nor vanish.
  const scale = largest === 0 ? 1 : 2 ** Math.floor(Math.log2(largest));
  const a = Array.from({ length: columns }, (_, j) =>
    Float64Array.from({ length: rows }, (_, i) => (data[i * columns + j] as number) / scale),
  );
  const { order, reflectors } = pivotedQr(a); // a[j] now holds column j of R above and on the diagonal

  // Columns of L = Rᵀ: column i of L is row i of R. L V' = U' S gives A P = Q R = (Q V') S U'ᵀ.
  const l = Array.from({ length: columns }, (_, i) =>
    Float64Array.from({ length: columns }, (_, j) => (j < i ? 0 : (at(a, j)[i] as number))),
  );
  const turned = begin(l);
  jacobi(l, turned);

  const norms = l.map((column) => Math.sqrt(dot(column, column)));
  const ranking = norms.map((_, i) => i).sort((i, j) => at(norms, j) - at(norms, i) || i - j);
  const right = ranking.map((i) => {
    const norm = at(norms, i);
    return norm > tiny ? at(l, i).map((x) => x / norm) : new Float64Array(columns);
  });
  complete(right, ranking.filter((i) => at(norms, i) > tiny).length);

  const rank = columns;
  // V' beside zeros, to be multiplied by Q
  const left = ranking.map((i) => {
    const column = new Float64Array(rows);
    column.set(at(turned, i));
    return column;
  });
  for (let j = reflectors.length - 1; j >= 0; j--) reflect(left, at(reflectors, j), j);
  const [u, v, s] = [new Float64Array(rows * rank), new Float64Array(columns * rank), new Float64Array(rank)];
  ranking.forEach((i, k) => {
    const norm = at(norms, i);
    s[k] = norm > tiny ? norm * scale : 0;
    for (let row = 0; row < rows; row++) u[row * rank + k] = at(left, k)[row] as number;
    for (let j = 0; j < columns; j++) v[at(order, j) * rank + k] = at(right, k)[j] as number;
  });
  return { u, s, v, rank };
}

/** Throws ShapeError unless there are rows * columns numbers. */
export function checkMatrix(what: string, { data, rows, columns }: HostMatrix): void {
  if ([rows, columns].some((n) => !Number.isInteger(n) || n < 0) || data.length !== rows * columns) {
    throw new ShapeError(
      `${what}: ${data.length} numbers for a matrix of ${rows} x ${columns}; expected ${rows * columns}, row by row`,
    );
  }
}

/** Row-major, the other way round. */
export function transposed({ data, rows, columns }: HostMatrix): HostMatrix {
  const turned = new Float64Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) turned[j * rows + i] = data[i * columns + j] as number;
  }
  return { data: turned, rows: columns, columns: rows };
}

/** Norms of scaled columns below this are 0: their squares are no longer normal numbers. */
const tiny = 1e-150;

function swap<T>(list: T[], i: number, j: number): void {
  [list[i], list[j]] = [at(list, j), at(list, i)];
}

/** Overwrites the columns with those of R. Column order[j] of the matrix came to place j; Q is the product of the reflectors. */
function pivotedQr(a: Float64Array[]): {
  readonly order: readonly number[];
  readonly reflectors: readonly Float64Array[];
} {
  const order = a.map((_, j) => j);
  const reflectors: Float64Array[] = [];
  const squares = a.map((column) => dot(column, column));
  const sure = [...squares]; // of each column when its square was last summed: taking off from it loses digits
  for (let j = 0; j < a.length; j++) {
    let pivot = j;
    for (let c = j; c < a.length; c++) if (at(squares, c) > at(squares, pivot)) pivot = c;
    swap(a, j, pivot);
    for (const list of [order, squares, sure]) swap(list, j, pivot);
    const h = reflectorOf(at(a, j), j, tiny);
    reflect(a, h, j, j);
    for (let c = j; c < a.length; c++) {
      const column = at(a, c);
      squares[c] = at(squares, c) - (column[j] as number) ** 2;
      if (at(squares, c) < 1e-6 * at(sure, c)) squares[c] = sure[c] = dot(column, column, j + 1);
    }
    reflectors.push(h);
  }
  return { order, reflectors };
}

/** Columns of the triangle whose entries on the diagonal are further apart than this are not turned together in `begin`. */
const comparable = 1e-3;

/**
 * Turns the columns of the lower triangle to those that are nearly orthogonal already, by the eigenvectors of their products: as good
 * as squares of the values let them be, so only among columns of like size. Returns what the columns were multiplied with.
 */
function begin(l: Float64Array[]): Float64Array[] {
  const n = l.length;
  const turned: Float64Array[] = [];
  const sizes = l.map((column, i) => Math.abs(column[i] as number));
  for (let from = 0; from < n; from = turned.length) {
    const end = sizes.findIndex((size, i) => i > from && size < comparable * at(sizes, from));
    const own = l.slice(from, end < 0 ? n : end);
    const products = own.map((x, i) => Float64Array.from(own, (y, j) => (j < i ? 0 : dot(x, y, from + j))));
    for (const [k, vector] of symmetricEigenvectors(products, tiny).entries()) {
      const column = new Float64Array(n);
      for (const [i, x] of own.entries()) addTo(column, x, vector[i] as number, from + i);
      l[from + k] = column;
      const whole = new Float64Array(n);
      whole.set(vector, from);
      turned.push(whole);
    }
  }
  return turned;
}

/** Rotates pairs of columns until all are orthogonal; `follow` is rotated alike. */
function jacobi(l: readonly Float64Array[], follow: readonly Float64Array[]): void {
  const n = l.length;
  const close = Number.EPSILON * Math.max(n, 10);
  const squares = new Float64Array(n);
  for (let sweep = 0; sweep < 60; sweep++) {
    let rotated = false;
    // Followed through the rotations of a sweep, then measured anew.
    l.forEach((x, i) => {
      squares[i] = dot(x, x);
    });
    for (let p = 0; p < n - 1; p++) {
      const x = at(l, p);
      for (let q = p + 1; q < n; q++) {
        const alpha = squares[p] as number;
        const beta = squares[q] as number;
        if (alpha <= tiny * tiny || beta <= tiny * tiny) continue;
        const y = at(l, q);
        const gamma = dot(x, y);
        if (Math.abs(gamma) <= close * Math.sqrt(alpha) * Math.sqrt(beta)) continue;
        rotated = true;
        const zeta = (beta - alpha) / (2 * gamma);
        const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta));
        const c = 1 / Math.sqrt(1 + t * t);
        rotate(x, y, c, c * t);
        rotate(at(follow, p), at(follow, q), c, c * t);
        squares[p] = Math.max(alpha - t * gamma, 0);
        squares[q] = beta + t * gamma;
      }
    }
    if (!rotated) return;
  }
  throw new Error(`svd: the rotations of a matrix with ${n} columns did not settle in 60 sweeps`);
}

/** Replaces the columns from `known` on by unit vectors orthogonal to all before them. */
function complete(columns: Float64Array[], known: number): void {
  const n = columns.length;
  for (let k = known; k < n; k++) {
    let best = new Float64Array(n);
    // One of the axes always has at least sqrt((n - k) / n) of its length outside the span of k vectors.
    for (let axis = 0; axis < n && dot(best, best) < 0.5 / n; axis++) {
      best = new Float64Array(n);
      best[axis] = 1;
      for (let round = 0; round < 2; round++) {
        for (let j = 0; j < k; j++) {
          const column = at(columns, j);
          const share = dot(column, best);
          for (let i = 0; i < n; i++) best[i] = (best[i] as number) - share * (column[i] as number);
        }
      }
    }
    const norm = Math.sqrt(dot(best, best));
    columns[k] = best.map((x) => x / norm);
  }
}
