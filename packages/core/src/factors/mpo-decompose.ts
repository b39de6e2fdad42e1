// Matrix product operators on the host, in float64 (MPOE 2203.01104, section 3.1): a matrix [i1 .. in, j1 .. jn] as a chain of cores
// [left bond, in, out, right bond], by truncated singular value decompositions from left to right, and back.
import { ShapeError } from "../errors.ts";
import { checkSizes } from "../experts/parts.ts";
import { at } from "../op.ts";
import { sizeOf } from "../tensor.ts";
import { checkMatrix, type HostMatrix, svd } from "./svd.ts";

export interface MpoDims {
  /** Factors of the number of inputs, one per core. */
  readonly inputDims: readonly number[];
  /** Factors of the number of outputs, one per core. */
  readonly outputDims: readonly number[];
}
export interface MpoSizes extends MpoDims {
  /** Largest bond, for all cuts or for each from left to right; default: nothing is cut off. */
  readonly bond?: number | readonly number[];
}

/** One core, row-major. */
export interface MpoCore {
  /** [left bond, in, out, right bond] */
  readonly shape: readonly [number, number, number, number];
  readonly data: Float64Array;
}

export interface MpoDecomposition {
  readonly cores: readonly MpoCore[];
  /** The bond of each cut, from left to right. */
  readonly bonds: readonly number[];
  /** All singular values of each cut, those cut off included. */
  readonly singularValues: readonly Float64Array[];
}

/** The core in the middle, which holds most parameters: what MPOE shares. */
export const middleCore = (cores: number): number => Math.floor(cores / 2);

/** The bond of each cut. Throws ShapeError for sizes that do not fit. */
export function mpoBonds({ inputDims, outputDims, bond = Infinity }: MpoSizes): readonly number[] {
  const n = inputDims.length;
  if (n < 1 || outputDims.length !== n) {
    throw new ShapeError(
      `mpo: ${n} input dims [${inputDims.join(", ")}] and ${outputDims.length} output dims [${outputDims.join(", ")}]; ` +
        "expected one of each per core",
    );
  }
  for (const [name, dims] of Object.entries({ inputDims, outputDims })) {
    for (const [i, d] of dims.entries()) checkSizes("mpo", { [`${name}[${i}]`]: d });
  }
  const limits = typeof bond === "number" ? new Array<number>(n - 1).fill(bond) : bond;
  if (limits.length !== n - 1 || limits.some((d) => !(d >= 1) || (d !== Infinity && !Number.isInteger(d)))) {
    throw new ShapeError(`mpo: bond [${limits.join(", ")}]; expected ${n - 1} whole numbers from 1, one per cut`);
  }
  const whole = sizeOf(inputDims) * sizeOf(outputDims);
  const bonds: number[] = [];
  let [left, before] = [1, 1];
  for (let k = 0; k + 1 < n; k++) {
    const own = at(inputDims, k) * at(outputDims, k);
    before *= own;
    left = Math.min(left * own, whole / before, at(limits, k));
    bonds.push(left);
  }
  return bonds;
}

/** [left bond, in, out, right bond] of each core. */
export function mpoShapes(sizes: MpoSizes): readonly (readonly [number, number, number, number])[] {
  const bonds = [1, ...mpoBonds(sizes), 1];
  return sizes.inputDims.map((i, k) => [at(bonds, k), i, at(sizes.outputDims, k), at(bonds, k + 1)] as const);
}

/**
 * Parameters of `experts` matrices: `unshared` with all cores of their own, `shared` with one `central` core (default: the middle one)
 * for all of them. With bonds b_k: Σ_k b_{k-1} i_k j_k b_k each (2203.01104, eq. 2).
 */
export function mpoParameterCount(sizes: MpoSizes & { readonly experts: number; readonly central?: number }): {
  readonly unshared: number;
  readonly shared: number;
} {
  const { experts, central = middleCore(sizes.inputDims.length) } = sizes;
  const cores = mpoShapes(sizes).map(sizeOf);
  const each = cores.reduce((total, n) => total + n, 0);
  const common = at(cores, central);
  return { unshared: experts * each, shared: common + experts * (each - common) };
}

/**
 * The cores of a matrix with Π inputDims rows and Π outputDims columns. Each cut keeps its largest singular values; without `bond` the
 * product of the cores is the matrix. Cores are not unique: compare products. Throws ShapeError where sizes do not fit.
 *
 * @example mpoDecompose({ data, rows: 768, columns: 3072 }, { inputDims: [3, 4, 4, 4, 4], outputDims: [4, 4, 8, 6, 4], bond: 64 })
 */
export function mpoDecompose(matrix: HostMatrix, sizes: MpoSizes): MpoDecomposition {
  checkMatrix("mpoDecompose", matrix);
  const { inputDims, outputDims } = sizes;
  const bonds = mpoBonds(sizes);
  if (sizeOf(inputDims) !== matrix.rows || sizeOf(outputDims) !== matrix.columns) {
    throw new ShapeError(
      `mpoDecompose: a matrix of ${matrix.rows} x ${matrix.columns} for dims [${inputDims.join(", ")}] x ` +
        `[${outputDims.join(", ")}], which make ${sizeOf(inputDims)} x ${sizeOf(outputDims)}`,
    );
  }
  let rest = interleaved(matrix.data, sizes, false);
  const cores: MpoCore[] = [];
  const singularValues: Float64Array[] = [];
  let left = 1;
  bonds.forEach((kept, k) => {
    const rows = left * at(inputDims, k) * at(outputDims, k);
    const columns = rest.length / rows;
    const { u, s, v, rank } = svd({ data: rest, rows, columns });
    const core = new Float64Array(rows * kept);
    for (let i = 0; i < rows; i++) for (let q = 0; q < kept; q++) core[i * kept + q] = u[i * rank + q] as number;
    rest = new Float64Array(kept * columns);
    for (let q = 0; q < kept; q++) {
      for (let j = 0; j < columns; j++) rest[q * columns + j] = (s[q] as number) * (v[j * rank + q] as number);
    }
    cores.push({ shape: [left, at(inputDims, k), at(outputDims, k), kept], data: core });
    singularValues.push(s);
    left = kept;
  });
  const last = bonds.length;
  cores.push({ shape: [left, at(inputDims, last), at(outputDims, last), 1], data: rest });
  return { cores, bonds, singularValues };
}

/** The matrix that the cores stand for. Throws ShapeError where neighbouring bonds differ. */
export function mpoReconstruct(cores: readonly MpoCore[]): HostMatrix {
  let product = Float64Array.of(1);
  let bond = 1;
  for (const { shape, data } of cores) {
    const [left, i, j, right] = shape;
    if (left !== bond || data.length !== sizeOf(shape)) {
      throw new ShapeError(
        `mpoReconstruct: a core [${shape.join(", ")}] of ${data.length} numbers after a bond of ${bond}`,
      );
    }
    const [rows, columns] = [product.length / bond, i * j * right];
    const next = new Float64Array(rows * columns);
    for (let row = 0; row < rows; row++) {
      for (let q = 0; q < bond; q++) {
        const x = product[row * bond + q] as number;
        for (let c = 0; c < columns; c++) {
          const to = row * columns + c;
          next[to] = (next[to] as number) + x * (data[q * columns + c] as number);
        }
      }
    }
    product = next;
    bond = right;
  }
  if (bond !== 1) throw new ShapeError(`mpoReconstruct: the last core leaves a bond of ${bond}; expected 1`);
  const sizes = { inputDims: cores.map(({ shape }) => shape[1]), outputDims: cores.map(({ shape }) => shape[2]) };
  return {
    data: interleaved(product, sizes, true),
    rows: sizeOf(sizes.inputDims),
    columns: sizeOf(sizes.outputDims),
  };
}

/** [i1 .. in, j1 .. jn] -> [i1, j1, .. in, jn], or `back`. */
function interleaved(
  data: ArrayLike<number>,
  { inputDims, outputDims }: MpoDims,
  back: boolean,
): Float64Array<ArrayBuffer> {
  const columns = sizeOf(outputDims);
  const moved = new Float64Array(data.length);
  for (let place = 0; place < data.length; place++) {
    let [row, column] = [Math.floor(place / columns), place % columns];
    let [to, stride] = [0, 1];
    for (let k = inputDims.length - 1; k >= 0; k--) {
      const [i, j] = [at(inputDims, k), at(outputDims, k)];
      to += stride * ((row % i) * j + (column % j));
      stride *= i * j;
      [row, column] = [Math.floor(row / i), Math.floor(column / j)];
    }
    if (back) moved[place] = data[to] as number;
    else moved[to] = data[place] as number;
  }
  return moved;
}
