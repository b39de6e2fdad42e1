// The closed part of a backend: every primitive against a naive loop, with awkward sizes, ties, NaN and infinities.
import {
  add,
  addRows,
  argsort,
  blockEnds,
  cast,
  concat,
  cumsum,
  erf,
  exp,
  floor,
  less,
  log,
  matmul,
  maximum,
  maxLast,
  mul,
  recip,
  reshape,
  slice,
  sqrt,
  sumTo,
  type Tensor,
  takeRows,
  tanh,
  topkIndices,
  transpose,
  where,
} from "@switchyard/core";
import { floats, generator, type HostArray, integers, ints, sizeOf, uniform } from "../arrays.ts";
import * as oracle from "../oracles.ts";
import { type BackendCase, compare } from "./case.ts";

const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number;
const show = (...shapes: readonly (readonly number[])[]): string =>
  shapes.map((shape) => (shape.length === 0 ? "scalar" : shape.join("x"))).join(" ");
const get = <T>(list: readonly T[], i: number): T => {
  const item = list[i];
  if (item === undefined) throw new RangeError(`case: input ${i} is missing`);
  return item;
};

type Binary = (a: Tensor, b: Tensor) => Tensor;

/** Every way two shapes can meet, and sizes around SIMD widths and tiles. */
const pairs: readonly (readonly [readonly number[], readonly number[]])[] = [
  [[], []],
  [[1], [1]],
  [[7], [7]],
  [[64], [64]],
  [[1031], [1031]],
  [[3, 5], [5]],
  [[5], [3, 5]],
  [
    [3, 5],
    [1, 5],
  ],
  [
    [3, 5],
    [3, 1],
  ],
  [
    [3, 1],
    [1, 5],
  ],
  [
    [2, 3, 5],
    [3, 1],
  ],
  [
    [2, 1, 5],
    [1, 3, 1],
  ],
  [
    [2, 3, 4, 5],
    [2, 1, 4, 1],
  ],
  [[3, 5], []],
  [[], [3, 5]],
  [[0], [0]],
  [[0, 5], [5]],
  [
    [3, 0],
    [3, 1],
  ],
  [[33, 17], [17]],
  [
    [33, 17],
    [33, 1],
  ],
];

function binaries(): BackendCase[] {
  const table: readonly [string, Binary, (a: number, b: number) => number, boolean][] = [
    ["add", add, (a, b) => a + b, true],
    ["mul", mul, (a, b) => a * b, true],
    ["maximum", maximum, Math.max, true],
    ["less", less, (a, b) => (a < b ? 1 : 0), false],
  ];
  return table.flatMap(([name, run, f, differentiable]) => {
    const toFloat = name === "less";
    const values = pairs.flatMap(([a, b]) => {
      const next = generator(`${name} ${show(a, b)}`);
      const inputs = [uniform(next, a), uniform(next, b)];
      const small = sizeOf(a) + sizeOf(b) <= 40;
      return compare(`${name}/broadcast ${show(a, b)}`, {
        inputs,
        run: ([x, y]) => run(x as Tensor, y as Tensor),
        expect: ([x, y]) => oracle.binary(x as HostArray, y as HostArray, f, toFloat),
        ...(differentiable && small ? { gradient: [0, 1] } : {}),
      });
    });
    const next = generator(`${name} integers`);
    const ids = compare(`${name}/i32 4x7 7`, {
      inputs: [integers(next, [4, 7], -9, 9), integers(next, [7], -9, 9)],
      run: ([x, y]) => run(x as Tensor, y as Tensor),
      expect: ([x, y]) => oracle.binary(x as HostArray, y as HostArray, f, toFloat),
    });
    const a = floats([8], [0, -0, high, low, 1, -1, high, 3]);
    const b = floats([8], [1, 0, 1, 1, high, low, high, 3]);
    const infinite = compare(`${name}/infinities 8`, {
      // 0 * inf is NaN everywhere; it is left to the oracle, which computes it too.
      inputs: [a, b],
      run: ([x, y]) => run(x as Tensor, y as Tensor),
      expect: ([x, y]) => oracle.binary(x as HostArray, y as HostArray, f, toFloat),
    });
    return [...values, ...ids, ...infinite];
  });
}

function wheres(): BackendCase[] {
  const shapes: readonly (readonly (readonly number[])[])[] = [
    [[7], [7], [7]],
    [[3, 1], [3, 5], [5]],
    [[5], [3, 1], [2, 1, 1]],
    [[], [3], [3]],
    [[3], [], []],
    [[0, 4], [4], []],
    [[9, 33], [9, 33], [1]],
  ];
  const values = shapes.flatMap((three) => {
    const next = generator(`where ${show(...three)}`);
    const [condition, a, b] = [get(three, 0), get(three, 1), get(three, 2)];
    const mask = floats(
      condition,
      Array.from({ length: sizeOf(condition) }, () => (next() < 0.5 ? 1 : 0)),
    );
    return compare(`where/broadcast ${show(...three)}`, {
      inputs: [mask, uniform(next, a), uniform(next, b)],
      run: ([m, x, y]) => where(m as Tensor, x as Tensor, y as Tensor),
      expect: ([m, x, y]) => oracle.where(m as HostArray, x as HostArray, y as HostArray),
      ...(sizeOf(a) + sizeOf(b) <= 40 ? { gradient: [1, 2] } : {}),
    });
  });
  return [
    ...values,
    ...compare("where/i32 5", {
      inputs: [floats([5], [1, 0, 1, 0, 0]), ints([5], [1, 2, 3, 4, 5]), ints([5], [-1, -2, -3, -4, -5])],
      run: ([m, x, y]) => where(m as Tensor, x as Tensor, y as Tensor),
      expect: ([m, x, y]) => oracle.where(m as HostArray, x as HostArray, y as HostArray),
    }),
    ...compare("where/hides NaN of the other side 4", {
      inputs: [floats([4], [1, 0, 1, 0]), floats([4], [1, nan, high, nan]), floats([4], [nan, 2, nan, low])],
      run: ([m, x, y]) => where(m as Tensor, x as Tensor, y as Tensor),
      expect: ([m, x, y]) => oracle.where(m as HostArray, x as HostArray, y as HostArray),
    }),
  ];
}

function unaries(): BackendCase[] {
  const table: readonly [string, (x: Tensor) => Tensor, (x: number) => number, number, number, number[]][] = [
    ["recip", recip, (x) => 1 / x, 0.25, 4, [0, high, low, -2]],
    ["exp", exp, Math.exp, -6, 6, [low, high, 0, -104, 1000]],
    ["log", log, Math.log, 0.05, 9, [0, high, 1, 1e-30, 1e30]],
    ["sqrt", sqrt, Math.sqrt, 0.05, 9, [0, high, 1, 1e-20]],
    ["tanh", tanh, Math.tanh, -4, 4, [low, high, 0, 30, -30, 1e-4]],
    ["erf", erf, oracle.erf, -3.5, 3.5, [low, high, 0, 9, -9, 1e-4]],
    ["floor", floor, Math.floor, -5, 5, [0, -0.5, 2, -3, 1e6]],
  ];
  return table.flatMap(([name, run, f, from, to, special]) => {
    const cases = [[], [1], [7], [0], [4, 0], [5, 13], [1031]].flatMap((shape) =>
      compare(`${name}/values ${show(shape)}`, {
        inputs: [uniform(generator(`${name} ${show(shape)}`), shape, from, to)],
        run: ([x]) => run(x as Tensor),
        expect: ([x]) => oracle.unary(x as HostArray, f),
        ...(sizeOf(shape) <= 7 && name !== "floor" ? { gradient: [0] } : {}),
        slack: 2,
      }),
    );
    // One value per row keeps a huge result from widening the tolerance of a small one.
    const edges = special.flatMap((value) =>
      compare(`${name}/of ${value}`, {
        inputs: [floats([1], [value])],
        run: ([x]) => run(x as Tensor),
        expect: ([x]) => oracle.unary(x as HostArray, (v) => single(f(v))),
        slack: 2,
      }),
    );
    return [...cases, ...edges];
  });
}
/** Devices may flush denormals: results below the smallest normal f32 count as 0. */
const single = (value: number): number => (Math.abs(value) < 1.2e-38 ? 0 : value);

function casts(): BackendCase[] {
  return [
    ...compare("cast/f32 to i32 truncates 8", {
      inputs: [floats([8], [0, 1.9, -1.9, 2.5, -2.5, 1000000, -7, 0.4])],
      run: ([x]) => cast(x as Tensor, "i32"),
      expect: () => ints([8], [0, 1, -1, 2, -2, 1000000, -7, 0]),
    }),
    ...compare("cast/i32 to f32 5", {
      inputs: [ints([5], [0, 1, -1, 16777216, -8])],
      run: ([x]) => cast(x as Tensor, "f32"),
      expect: () => floats([5], [0, 1, -1, 16777216, -8]),
    }),
    ...compare("cast/f32 to u8 and back 4", {
      inputs: [floats([4], [0, 1, 7, 255])],
      run: ([x]) => cast(cast(x as Tensor, "u8"), "f32"),
      expect: () => floats([4], [0, 1, 7, 255]),
    }),
    ...compare("cast/empty 0", {
      inputs: [floats([0], [])],
      run: ([x]) => cast(x as Tensor, "i32"),
      expect: () => ints([0], []),
    }),
    ...compare("cast/f32 to f32 passes gradients 3", {
      inputs: [floats([3], [1, -2, 0.5])],
      run: ([x]) => mul(cast(x as Tensor, "f32"), x as Tensor),
      expect: ([x]) => oracle.unary(x as HostArray, (v) => v * v),
      gradient: [0],
    }),
    // Ties go to the even neighbour: 1 + 2^-11 lies between 1 and 1 + 2^-10 in f16.
    ...compare("cast/f32 to f16 rounds to nearest even 6", {
      inputs: [floats([6], [1 + 2 ** -11, 1 + 3 * 2 ** -11, 65504, 70000, 2 ** -24, -0.1])],
      run: ([x]) => cast(cast(x as Tensor, "f16"), "f32"),
      expect: () => floats([6], [1, 1 + 2 ** -9, 65504, high, 2 ** -24, -0.0999755859375]),
    }),
    ...compare("cast/f32 to bf16 rounds to nearest even 5", {
      inputs: [floats([5], [1 + 2 ** -8, 1 + 3 * 2 ** -8, 3.0, high, -0.1])],
      run: ([x]) => cast(cast(x as Tensor, "bf16"), "f32"),
      expect: () => floats([5], [1, 1 + 2 ** -6, 3.0, high, -0.10009765625]),
    }),
  ];
}

function shapes(): BackendCase[] {
  const next = generator("shapes");
  const reshapes: readonly (readonly [readonly number[], readonly number[]])[] = [
    [[6], [2, 3]],
    [[2, 3, 5], [30]],
    [[1], []],
    [
      [0, 3],
      [5, 0],
    ],
    [
      [4, 1, 7],
      [7, 4],
    ],
  ];
  const perms: readonly (readonly [readonly number[], readonly number[]])[] = [
    [
      [5, 7],
      [1, 0],
    ],
    [
      [33, 17],
      [1, 0],
    ],
    [
      [2, 3, 5],
      [2, 0, 1],
    ],
    [
      [2, 3, 5],
      [0, 2, 1],
    ],
    [
      [2, 3, 4, 5],
      [0, 2, 1, 3],
    ],
    [
      [2, 3, 4, 5],
      [3, 1, 0, 2],
    ],
    [
      [2, 3],
      [0, 1],
    ],
    [
      [0, 4],
      [1, 0],
    ],
    [[7], [0]],
    [[], []],
  ];
  const slices: readonly (readonly [readonly number[], readonly number[], readonly number[]])[] = [
    [[7], [2], [3]],
    [
      [5, 7],
      [1, 2],
      [3, 4],
    ],
    [
      [5, 7],
      [0, 6],
      [5, 1],
    ],
    [
      [5, 7],
      [4, 0],
      [1, 7],
    ],
    [
      [2, 3, 5],
      [1, 0, 2],
      [1, 3, 3],
    ],
    [
      [5, 7],
      [2, 3],
      [0, 4],
    ],
    [[3], [3], [0]],
    [
      [0, 3],
      [0, 1],
      [0, 2],
    ],
  ];
  const concats: readonly (readonly [readonly (readonly number[])[], number])[] = [
    [[[3], [4]], 0],
    [
      [
        [2, 3],
        [2, 1],
        [2, 5],
      ],
      1,
    ],
    [
      [
        [2, 3],
        [0, 3],
        [4, 3],
      ],
      0,
    ],
    [
      [
        [2, 3, 4],
        [2, 2, 4],
      ],
      1,
    ],
    [[[5, 2]], 0],
    [[[0], [0]], 0],
  ];
  return [
    ...reshapes.flatMap(([from, to]) =>
      compare(`reshape/${show(from)} to ${show(to)}`, {
        inputs: [uniform(next, from)],
        run: ([x]) => reshape(x as Tensor, to),
        expect: ([x]) => ({ shape: to, data: (x as HostArray).data }),
        gradient: [0],
      }),
    ),
    ...perms.flatMap(([shape, perm]) =>
      compare(`transpose/${perm.join("")} of ${show(shape)}`, {
        inputs: [uniform(next, shape)],
        run: ([x]) => transpose(x as Tensor, perm),
        expect: ([x]) => oracle.transpose(x as HostArray, perm),
        ...(sizeOf(shape) <= 40 ? { gradient: [0] } : {}),
      }),
    ),
    ...compare("transpose/i32 3x4", {
      inputs: [integers(next, [3, 4], -9, 9)],
      run: ([x]) => transpose(x as Tensor, [1, 0]),
      expect: ([x]) => oracle.transpose(x as HostArray, [1, 0]),
    }),
    ...slices.flatMap(([shape, start, size]) =>
      compare(`slice/${show(size)} at ${start.join(",")} of ${show(shape)}`, {
        inputs: [uniform(next, shape)],
        run: ([x]) => slice(x as Tensor, start, size),
        expect: ([x]) => oracle.slice(x as HostArray, start, size),
        gradient: [0],
      }),
    ),
    ...compare("slice/i32 5", {
      inputs: [ints([5], [1, 2, 3, 4, 5])],
      run: ([x]) => slice(x as Tensor, [1], [3]),
      expect: () => ints([3], [2, 3, 4]),
    }),
    ...concats.flatMap(([parts, axis]) =>
      compare(`concat/axis ${axis} of ${show(...parts)}`, {
        inputs: parts.map((shape) => uniform(next, shape)),
        run: (xs) => concat(xs, axis),
        expect: (xs) => oracle.concat(xs, axis),
        gradient: parts.map((_, i) => i),
      }),
    ),
    ...compare("concat/i32 2 3", {
      inputs: [ints([2], [1, -1]), ints([3], [5, 6, 7])],
      run: (xs) => concat(xs, 0),
      expect: (xs) => oracle.concat(xs, 0),
    }),
  ];
}

function rows(): BackendCase[] {
  const next = generator("rows");
  const takes: readonly (readonly [readonly number[], readonly number[], readonly number[]])[] = [
    [[5, 3], [4], [4, 0, 4, 2]],
    [
      [5, 3],
      [2, 2],
      [1, -1, 5, 3],
    ],
    [[5], [3], [2, -1, 0]],
    [[3, 2, 4], [2], [2, 1]],
    [[4, 17], [7], [0, 0, 0, 3, 3, 1, 2]],
    [[0, 3], [2], [-1, 0]],
    [[5, 3], [0], []],
    [[5, 0], [2], [1, 2]],
  ];
  const adds: readonly (readonly [readonly number[], readonly number[], number])[] = [
    [[4, 3], [1, 1, 0, 2], 3],
    [[4, 3], [-1, 2, 3, 7], 4],
    [[5], [0, 0, 0, 0, 0], 2],
    [[3, 2, 4], [2, 0, 2], 3],
    [[7, 17], [0, 1, 0, 1, 6, 5, 0], 7],
    [[0, 3], [], 2],
    [[2, 3], [0, 1], 0],
  ];
  return [
    ...takes.flatMap(([shape, idShape, ids]) =>
      compare(`takeRows/${ids.join(",") || "none"} of ${show(shape)}`, {
        inputs: [uniform(next, shape), ints(idShape, ids)],
        run: ([x, i]) => takeRows(x as Tensor, i as Tensor),
        expect: ([x, i]) => oracle.takeRows(x as HostArray, i as HostArray),
        ...(sizeOf(shape) <= 40 ? { gradient: [0] } : {}),
      }),
    ),
    ...compare("takeRows/i32 4x2", {
      inputs: [integers(next, [4, 2], -9, 9), ints([3], [3, -1, 1])],
      run: ([x, i]) => takeRows(x as Tensor, i as Tensor),
      expect: ([x, i]) => oracle.takeRows(x as HostArray, i as HostArray),
    }),
    ...compare("takeRows/NaN stays in its row 3x2", {
      inputs: [floats([3, 2], [1, 2, nan, high, 5, 6]), ints([3], [2, -1, 0])],
      run: ([x, i]) => takeRows(x as Tensor, i as Tensor),
      expect: ([x, i]) => oracle.takeRows(x as HostArray, i as HostArray),
    }),
    ...adds.flatMap(([shape, ids, n]) =>
      compare(`addRows/${ids.join(",") || "none"} to ${n} of ${show(shape)}`, {
        inputs: [uniform(next, shape), ints([ids.length], ids)],
        run: ([x, i]) => addRows(x as Tensor, i as Tensor, n),
        expect: ([x, i]) => oracle.addRows(x as HostArray, i as HostArray, n),
        ...(sizeOf(shape) <= 40 ? { gradient: [0] } : {}),
      }),
    ),
    ...compare("addRows/NaN of a dropped row is dropped 3x2", {
      inputs: [floats([3, 2], [1, 2, nan, high, 5, 6]), ints([3], [1, -1, 1])],
      run: ([x, i]) => addRows(x as Tensor, i as Tensor, 2),
      expect: ([x, i]) => oracle.addRows(x as HostArray, i as HostArray, 2),
    }),
  ];
}

function reductions(): BackendCase[] {
  const next = generator("reductions");
  const sums: readonly (readonly [readonly number[], readonly number[]])[] = [
    [[7], []],
    [[7], [1]],
    [[3, 5], [5]],
    [
      [3, 5],
      [1, 5],
    ],
    [
      [3, 5],
      [3, 1],
    ],
    [[3, 5], []],
    [
      [2, 3, 5],
      [3, 1],
    ],
    [
      [2, 3, 4, 5],
      [2, 1, 4, 1],
    ],
    [
      [3, 5],
      [3, 5],
    ],
    [[0, 5], [5]],
    [
      [3, 0],
      [3, 1],
    ],
    [[33, 70], [70]],
    [
      [33, 70],
      [33, 1],
    ],
    [[1031], []],
  ];
  const sumCases = sums.flatMap(([from, to]) =>
    compare(`sumTo/${show(to)} from ${show(from)}`, {
      inputs: [uniform(next, from)],
      run: ([x]) => sumTo(x as Tensor, to),
      expect: ([x]) => oracle.sumTo(x as HostArray, to),
      ...(sizeOf(from) <= 40 ? { gradient: [0] } : {}),
      slack: 3,
    }),
  );
  const maxima = [[7], [1], [3, 5], [2, 3, 17], [0, 4], [9, 67]].flatMap((shape) =>
    compare(`maxLast/values ${show(shape)}`, {
      inputs: [uniform(next, shape)],
      run: ([x]) => maxLast(x as Tensor),
      expect: ([x]) => oracle.maxLast(x as HostArray),
      ...(sizeOf(shape) <= 40 ? { gradient: [0] } : {}),
    }),
  );
  const sweeps: readonly (readonly [readonly number[], number, { exclusive?: boolean; reverse?: boolean }, string])[] =
    [
      [[7], 0, {}, ""],
      [[7], 0, { exclusive: true }, " exclusive"],
      [[7], 0, { reverse: true }, " reverse"],
      [[7], 0, { exclusive: true, reverse: true }, " exclusive reverse"],
      [[3, 5], 0, {}, ""],
      [[3, 5], 1, {}, ""],
      [[2, 3, 4], 1, { exclusive: true }, " exclusive"],
      [[2, 3, 4], 1, { reverse: true }, " reverse"],
      [[1, 1], 1, { exclusive: true }, " exclusive"],
      [[0, 3], 0, {}, ""],
      [[3, 0], 1, {}, ""],
      [[5, 67], 1, {}, ""],
    ];
  const sweepCases = sweeps.flatMap(([shape, axis, options, label]) => [
    ...compare(`cumsum/axis ${axis}${label} of ${show(shape)}`, {
      inputs: [uniform(next, shape)],
      run: ([x]) => cumsum(x as Tensor, { axis, ...options }),
      expect: ([x]) => oracle.cumsum(x as HostArray, axis, options),
      ...(sizeOf(shape) <= 40 ? { gradient: [0] } : {}),
      slack: 2,
    }),
  ]);
  return [
    ...sumCases,
    ...maxima,
    ...compare("maxLast/infinities 3x3", {
      inputs: [floats([3, 3], [low, low, low, low, 2, low, high, 0, low])],
      run: ([x]) => maxLast(x as Tensor),
      expect: ([x]) => oracle.maxLast(x as HostArray),
    }),
    ...sweepCases,
    ...compare("cumsum/i32 3x5", {
      inputs: [integers(next, [3, 5], -9, 9)],
      run: ([x]) => cumsum(x as Tensor, { axis: 1, exclusive: true }),
      expect: ([x]) => oracle.cumsum(x as HostArray, 1, { exclusive: true }),
    }),
  ];
}

function matmuls(): BackendCase[] {
  const sizes: readonly (readonly [number, number, number])[] = [
    [1, 1, 1],
    [5, 7, 3],
    [4, 8, 16],
    [1, 17, 5],
    [17, 1, 5],
    [5, 17, 1],
    [2, 64, 3],
    [33, 31, 29],
    [65, 34, 67],
    [3, 600, 5],
    [70, 300, 41],
    [0, 4, 3],
    [4, 0, 3],
    [4, 3, 0],
  ];
  const modes = [
    ["plain", {}],
    ["transposeA", { transposeA: true }],
    ["transposeB", { transposeB: true }],
    ["transposeA transposeB", { transposeA: true, transposeB: true }],
  ] as const;
  const plain = sizes.flatMap(([m, k, n]) =>
    modes.flatMap(([label, options]) => {
      const next = generator(`matmul ${label} ${m} ${k} ${n}`);
      const a = uniform(next, "transposeA" in options ? [k, m] : [m, k]);
      const b = uniform(next, "transposeB" in options ? [n, k] : [k, n]);
      return compare(`matmul/${label} ${m}x${k}x${n}`, {
        inputs: [a, b],
        run: ([x, y]) => matmul(x as Tensor, y as Tensor, options),
        expect: ([x, y]) => oracle.matmul(x as HostArray, y as HostArray, options),
        ...(m * k * n <= 110 ? { gradient: [0, 1] } : {}),
        slack: 2,
      });
    }),
  );
  const batches: readonly (readonly [readonly number[], readonly number[]])[] = [
    [[2], [2]],
    [[3], []],
    [[], [3]],
    [
      [2, 1],
      [1, 3],
    ],
    [[2, 3], [3]],
    [[0], [0]],
    [[1], [4]],
  ];
  const batched = batches.flatMap(([left, right]) =>
    (["plain", "transposeB"] as const).flatMap((label) => {
      const next = generator(`matmul batch ${show(left, right)}`);
      const options = label === "plain" ? {} : { transposeB: true };
      return compare(`matmul/batch ${label} ${show(left, right)}`, {
        inputs: [uniform(next, [...left, 2, 3]), uniform(next, [...right, ...(label === "plain" ? [3, 5] : [5, 3])])],
        run: ([x, y]) => matmul(x as Tensor, y as Tensor, options),
        expect: ([x, y]) => oracle.matmul(x as HostArray, y as HostArray, options),
        gradient: [0, 1],
        slack: 2,
      });
    }),
  );
  const next = generator("matmul NaN");
  const poisoned = uniform(next, [5, 6]);
  poisoned.data[2 * 6 + 3] = nan;
  return [
    ...plain,
    ...batched,
    ...compare("matmul/NaN stays in its row 5x6x7", {
      inputs: [poisoned, uniform(next, [6, 7])],
      run: ([x, y]) => matmul(x as Tensor, y as Tensor),
      expect: ([x, y]) => oracle.matmul(x as HostArray, y as HostArray),
    }),
    ...compare("matmul/NaN stays in its column 5x6x7", {
      inputs: [uniform(next, [5, 6]), poisonColumn(uniform(next, [6, 7]), 7, 4)],
      run: ([x, y]) => matmul(x as Tensor, y as Tensor),
      expect: ([x, y]) => oracle.matmul(x as HostArray, y as HostArray),
    }),
  ];
}
const poisonColumn = (x: HostArray, width: number, column: number): HostArray => {
  for (let i = column; i < x.data.length; i += width) x.data[i] = nan;
  return x;
};

function orders(): BackendCase[] {
  const next = generator("orders");
  const ties = floats([4, 6], [1, 1, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 0, 3, 3, 0, 3, -1, -1, -2, -1, -2, -3, -1]);
  const odd = floats([3, 5], [nan, 1, low, high, nan, low, nan, low, low, 0, nan, nan, nan, nan, nan]);
  const zeros = floats([1, 4], [0, -0, 0, -0]);
  const inputs: readonly (readonly [string, HostArray, number])[] = [
    ["values 3x5", uniform(next, [3, 5]), 2],
    ["all 3x5", uniform(next, [3, 5]), 5],
    ["one of one 4x1", uniform(next, [4, 1]), 1],
    ["none 3x5", uniform(next, [3, 5]), 0],
    ["no rows 0x5", uniform(next, [0, 5]), 3],
    ["vector 17", uniform(next, [17]), 4],
    ["wide 2x3x131", uniform(next, [2, 3, 131]), 9],
    ["wide all 2x131", uniform(next, [2, 131]), 131],
    ["ties 4x6", ties, 4],
    ["all tied, all taken 4x6", ties, 6],
    ["NaN last 3x5", odd, 5],
    ["NaN last 3x5 k 2", odd, 2],
    ["signed zeros tie 1x4", zeros, 4],
  ];
  const tops = inputs.flatMap(([label, x, k]) =>
    compare(`topkIndices/${label}`, {
      inputs: [x],
      run: ([t]) => topkIndices(t as Tensor, k),
      expect: ([t]) => oracle.topkIndices(t as HostArray, k),
    }),
  );
  const sorted = [
    ["values 3x5", uniform(next, [3, 5])],
    ["one 4x1", uniform(next, [4, 1])],
    ["no rows 0x5", uniform(next, [0, 5])],
    ["empty rows 3x0", uniform(next, [3, 0])],
    ["wide 2x131", uniform(next, [2, 131])],
    ["ties 4x6", ties],
    ["NaN last 3x5", odd],
    ["signed zeros tie 1x4", zeros],
    ["i32 3x40", integers(next, [3, 40], -5, 5)],
    ["i32 large 1x9", ints([1, 9], [2147483647, -2147483648, 0, 1, -1, 16777217, 16777216, 2147483646, 5])],
  ] as const;
  const sorts = sorted.flatMap(([label, x]) =>
    [false, true].flatMap((descending) =>
      compare(`argsort/${descending ? "descending" : "ascending"} ${label}`, {
        inputs: [x],
        run: ([t]) => argsort(t as Tensor, { descending }),
        expect: ([t]) => oracle.argsort(t as HostArray, descending),
      }),
    ),
  );
  const bounded = integers(next, [2, 67], 0, 7);
  return [
    ...tops,
    ...sorts,
    ...[false, true].flatMap((descending) =>
      compare(`argsort/bound 7 ${descending ? "descending" : "ascending"} 2x67`, {
        inputs: [bounded],
        run: ([t]) => argsort(t as Tensor, { descending, bound: 7 }),
        expect: ([t]) => oracle.argsort(t as HostArray, descending),
      }),
    ),
  ];
}

function ends(): BackendCase[] {
  const table: readonly (readonly [string, readonly number[], number])[] = [
    ["every expert", [2, 0, 1, 2, 2, 1], 3],
    ["an expert without rows", [0, 2, 2, 0], 3],
    ["all to one", [3, 3, 3, 3, 3], 5],
    ["empty slots and nulls", [-1, 4, 0, 9, -1, 1], 4],
    ["no rows", [], 3],
    ["one expert", [0, 0, -1], 1],
    ["no experts", [0, 1], 0],
  ];
  const next = generator("blockEnds");
  return [
    ...table.flatMap(([label, ids, count]) =>
      compare(`blockEnds/${label}`, {
        inputs: [ints([ids.length], ids)],
        run: ([x]) => blockEnds(x as Tensor, count),
        expect: ([x]) => oracle.blockEnds(x as HostArray, count),
      }),
    ),
    ...compare("blockEnds/many 1031 of 37", {
      inputs: [integers(next, [1031], -1, 38)],
      run: ([x]) => blockEnds(x as Tensor, 37),
      expect: ([x]) => oracle.blockEnds(x as HostArray, 37),
    }),
  ];
}

export const primitiveCases = (): BackendCase[] => [
  ...binaries(),
  ...wheres(),
  ...unaries(),
  ...casts(),
  ...shapes(),
  ...rows(),
  ...reductions(),
  ...matmuls(),
  ...orders(),
  ...ends(),
];
