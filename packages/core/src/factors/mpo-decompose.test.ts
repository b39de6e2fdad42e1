// Matrix product operators on the host: exact with full bonds, best cuts with truncated ones, shapes, counts, refusals.
import { describe, expect, it } from "vitest";
import { ShapeError } from "../errors.ts";
import { noise } from "../moe/moe.test-util.ts";
import { mpoBonds, mpoDecompose, mpoParameterCount, mpoReconstruct } from "./mpo-decompose.ts";

const product = (dims: readonly number[]): number => dims.reduce((n, d) => n * d, 1);
const random = (inputDims: readonly number[], outputDims: readonly number[], seed = 1) => {
  const [rows, columns] = [product(inputDims), product(outputDims)];
  return { data: noise(rows * columns, seed), rows, columns };
};
const distance = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Math.sqrt(Array.from(a).reduce((total, x, i) => total + (x - (b[i] ?? Number.NaN)) ** 2, 0));

describe("mpoDecompose", () => {
  it.each([
    [
      [2, 2, 2],
      [2, 3, 2],
    ],
    [
      [3, 2],
      [1, 5],
    ],
    [[7], [5]],
    [
      [1, 1, 1],
      [2, 1, 3],
    ],
    [
      [3, 1, 2, 2],
      [1, 2, 2, 3],
    ],
    [
      [2, 2, 2, 2, 2],
      [2, 1, 3, 1, 2],
    ],
  ])("with full bonds reconstructs exactly: inputs %j, outputs %j", (inputDims, outputDims) => {
    const matrix = random(inputDims, outputDims);
    const { cores, bonds } = mpoDecompose(matrix, { inputDims, outputDims });
    expect(bonds).toEqual(mpoBonds({ inputDims, outputDims }));
    expect(cores.map(({ shape }) => shape)).toEqual(
      inputDims.map((i, k) => [[1, ...bonds][k], i, outputDims[k], [...bonds, 1][k]]),
    );
    const back = mpoReconstruct(cores);
    expect([back.rows, back.columns]).toEqual([matrix.rows, matrix.columns]);
    expect(distance(back.data, matrix.data)).toBeLessThan(1e-13);
  });

  it("reconstructs a product of two small matrices, a Kronecker product, with bonds of one", () => {
    const [a, b] = [noise(6, 2), noise(8, 3)]; // [2, 3] and [4, 2]
    const data = Array.from({ length: 8 * 6 }, (_, place) => {
      const [row, column] = [Math.floor(place / 6), place % 6];
      return (a[Math.floor(row / 4) * 3 + Math.floor(column / 2)] ?? NaN) * (b[(row % 4) * 2 + (column % 2)] ?? NaN);
    });
    const matrix = { data, rows: 8, columns: 6 };
    const { cores, singularValues } = mpoDecompose(matrix, { inputDims: [2, 4], outputDims: [3, 2], bond: 1 });
    expect(distance(mpoReconstruct(cores).data, data)).toBeLessThan(1e-14);
    expect(singularValues[0]?.[1]).toBeLessThan(1e-14);
  });

  it("loses, with one cut, exactly the singular values that were cut off", () => {
    const [inputDims, outputDims] = [
      [3, 4],
      [2, 3],
    ];
    const matrix = random(inputDims, outputDims);
    for (const bond of [1, 3, 5, 6]) {
      const { cores, singularValues, bonds } = mpoDecompose(matrix, { inputDims, outputDims, bond });
      expect(bonds).toEqual([bond]);
      const lost = Math.sqrt([...(singularValues[0] ?? [])].slice(bond).reduce((total, s) => total + s * s, 0));
      expect(distance(mpoReconstruct(cores).data, matrix.data)).toBeCloseTo(lost, 12);
    }
  });

  it("loses less the larger the bonds are", () => {
    const [inputDims, outputDims] = [
      [2, 3, 2],
      [2, 2, 3],
    ];
    const matrix = random(inputDims, outputDims);
    const errors = [1, 2, 3, 4, 6].map((bond) =>
      distance(mpoReconstruct(mpoDecompose(matrix, { inputDims, outputDims, bond }).cores).data, matrix.data),
    );
    errors.slice(1).forEach((error, i) => {
      expect(error).toBeLessThan(errors[i] ?? NaN);
    });
    expect(errors.at(-1)).toBeLessThan(1e-13);
  });

  it("takes a limit for each cut", () => {
    const sizes = { inputDims: [2, 3, 2], outputDims: [2, 2, 3], bond: [3, Infinity] };
    expect(mpoBonds(sizes)).toEqual([3, 6]);
    expect(mpoBonds({ ...sizes, bond: [1, Infinity] })).toEqual([1, 6]);
    expect(mpoDecompose(random(sizes.inputDims, sizes.outputDims), sizes).bonds).toEqual([3, 6]);
  });

  it("counts the parameters of the cores it makes, and the saving of sharing one", () => {
    const sizes = { inputDims: [2, 3, 2], outputDims: [2, 2, 3], bond: 3 };
    const { cores } = mpoDecompose(random(sizes.inputDims, sizes.outputDims), sizes);
    const [first = 0, second = 0, third = 0] = cores.map(({ data }) => data.length);
    expect(mpoParameterCount({ ...sizes, experts: 4 })).toEqual({
      unshared: 4 * (first + second + third),
      shared: second + 4 * (first + third),
    });
    expect(mpoParameterCount({ ...sizes, experts: 4, central: 0 }).shared).toBe(first + 4 * (second + third));
    // The paper's sizes, 768 x 3072: the central core holds most.
    const paper = { inputDims: [3, 4, 4, 4, 4], outputDims: [4, 4, 8, 6, 4] };
    expect(mpoBonds(paper)).toEqual([12, 192, 384, 16]);
    const { unshared, shared } = mpoParameterCount({ ...paper, experts: 8 });
    expect(unshared / shared).toBeGreaterThan(3);
  });

  it("refuses sizes that do not fit", () => {
    const matrix = random([2, 2], [3, 2]);
    const refuse = (sizes: Parameters<typeof mpoDecompose>[1], words: string): void => {
      expect(() => mpoDecompose(matrix, sizes)).toThrow(ShapeError);
      expect(() => mpoDecompose(matrix, sizes)).toThrow(words);
    };
    refuse({ inputDims: [2, 3], outputDims: [3, 2] }, "4 x 6 for dims [2, 3] x [3, 2]");
    refuse({ inputDims: [4], outputDims: [3, 2] }, "expected one of each per core");
    refuse({ inputDims: [], outputDims: [] }, "expected one of each per core");
    refuse({ inputDims: [2, 2], outputDims: [6, 0] }, "outputDims[1]");
    refuse({ inputDims: [2, 2], outputDims: [3, 2], bond: 0 }, "bond [0]");
    refuse({ inputDims: [2, 2], outputDims: [3, 2], bond: [2, 2] }, "expected 1 whole numbers");
    expect(() => mpoDecompose({ ...matrix, rows: 5 }, { inputDims: [2, 2], outputDims: [3, 2] })).toThrow("24 numbers");
    const { cores } = mpoDecompose(matrix, { inputDims: [2, 2], outputDims: [3, 2] });
    expect(() => mpoReconstruct(cores.slice(1))).toThrow("after a bond of 1");
    expect(() => mpoReconstruct(cores.slice(0, 1))).toThrow("leaves a bond");
  });
});
