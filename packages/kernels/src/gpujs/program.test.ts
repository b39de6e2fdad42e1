// The texts of kernels, run as the JavaScript they are.
import { describe, expect, it } from "vitest";
import {
  broadcastStrides,
  divide,
  logarithm,
  positions,
  simplify,
  sourceOf,
  split,
  stridesOf,
  walkSizes,
} from "./program.ts";

/** The positions of each output element that the text of a walk computes. */
function walked(dims: readonly number[], strides: readonly (readonly number[])[]): number[][] {
  const operands = ["a", "b"].slice(0, strides.length);
  const walk = simplify({ dims, strides });
  const { sizes, text } = positions(walk.dims.length, operands);
  const body = `${text}\nreturn [${operands.map((x) => `at_${x}`).join(", ")}];`;
  const run = new Function("i", ...sizes, body);
  const params = walkSizes(walk, operands);
  const values = sizes.map((size) => params[size]);
  expect(values).not.toContain(undefined);
  const total = dims.reduce((n, d) => n * d, 1);
  return Array.from({ length: total }, (_, i) => run(i, ...values));
}

/** The same by counting through all coordinates. */
function counted(dims: readonly number[], strides: readonly (readonly number[])[]): number[][] {
  let places: number[][] = [strides.map(() => 0)];
  dims.forEach((size, axis) => {
    places = places.flatMap((place) =>
      Array.from({ length: size }, (_, j) => place.map((at, x) => at + j * (strides[x]?.[axis] ?? 0))),
    );
  });
  return places;
}

describe("walks", () => {
  const shapes: readonly (readonly [readonly number[], readonly number[], readonly number[]])[] = [
    [[], [], []],
    [[7], [7], []],
    [[3, 5], [5], [3, 1]],
    [
      [2, 3, 5],
      [2, 1, 5],
      [3, 1],
    ],
    [
      [2, 3, 4, 5],
      [2, 1, 4, 1],
      [1, 3, 1, 5],
    ],
    [
      [1, 4, 1, 3],
      [4, 1, 3],
      [1, 3],
    ],
  ];
  it.each(shapes)("find the operands of [%s] from [%s] and [%s]", (dims, a, b) => {
    const strides = [broadcastStrides(a, dims), broadcastStrides(b, dims)];
    expect(walked(dims, strides)).toEqual(counted(dims, strides));
  });

  it("find transposed elements", () => {
    const strides = stridesOf([2, 3, 4]);
    const permuted = [strides[2] ?? 0, strides[0] ?? 0, strides[1] ?? 0];
    expect(walked([4, 2, 3], [permuted])).toEqual(counted([4, 2, 3], [permuted]));
  });

  it("have as few axes as possible", () => {
    const row = (dims: readonly number[], b: readonly number[]) =>
      simplify({ dims, strides: [stridesOf(dims), broadcastStrides(b, dims)] });
    expect(row([2, 3, 5], [2, 3, 5])).toEqual({ dims: [30], strides: [[1], [1]] });
    expect(row([2, 3, 5], [])).toEqual({ dims: [30], strides: [[1], [0]] });
    expect(row([2, 3, 5], [5]).dims).toEqual([6, 5]);
    expect(row([2, 1, 5], [2, 1, 1])).toEqual({
      dims: [2, 5],
      strides: [
        [5, 1],
        [1, 0],
      ],
    });
  });
});

describe("whole division", () => {
  // floor() of a quotient that came out a little too small or too large, as on a GPU.
  it.each([0, -1, 1])("is exact where floor() lands %s beside the quotient", (by) => {
    const math = { floor: (x: number) => Math.floor(x) + by };
    const quotient = new Function("Math", "i", "n", `${divide("q", "i", "n")}\nreturn q;`);
    const both = new Function("Math", "i", "n", `${split("row", "column", "i", "n")}\nreturn [row, column];`);
    for (const n of [1, 2, 3, 7, 4097]) {
      for (const i of [0, 1, 2, 6, 7, 4096, 4097, 2 ** 24 - 1]) {
        expect(quotient(math, i, n)).toBe(Math.floor(i / n));
        expect(both(math, i, n)).toEqual([Math.floor(i / n), i % n]);
      }
    }
  });
});

describe("the logarithm", () => {
  it("of 0 is -infinity where the driver's is not", () => {
    const log = new Function("Math", "x", `${logarithm("y", "x")}\nreturn y;`);
    const math = { log: (x: number) => (x === 0 ? -88 : Math.log(x)), abs: Math.abs };
    expect([0, -0, 1, 0.5].map((x) => log(math, x))).toEqual([-Infinity, -Infinity, 0, Math.log(0.5)]);
  });
});

describe("sources", () => {
  it("take sizes as arguments or as constants", () => {
    const program = {
      name: "p",
      arrays: ["x"],
      sizes: ["n"],
      numbers: ["scale"],
      body: "\nreturn x[n - 1 - i] * scale;",
    };
    const asArgument = new Function(`return ${sourceOf(program, false)}`)();
    const asConstant = new Function(`return ${sourceOf(program, true)}`)();
    const self = { thread: { x: 1 }, constants: { n: 3 } };
    expect(asArgument.call(self, [4, 5, 6], 3, 2)).toBe(10);
    expect(asConstant.call(self, [4, 5, 6], 2)).toBe(10);
  });
});
