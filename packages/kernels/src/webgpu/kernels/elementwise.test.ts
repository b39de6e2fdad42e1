// Elementwise kernels against naive loops in double precision: every way of broadcasting, accuracy in ulp, folded dispatches, split
// tensors, storage given away, and conversions compared with a search in the list of all numbers of a format.
import type { DType, Spec, TypedArray } from "@switchyard/core";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, host, ints, testGpu, uniform } from "../call.test-util.ts";
import type { OwnedGpu, WebgpuHandle } from "../device.ts";
import { elementwiseKernels } from "./elementwise.ts";

type Shape = readonly number[];
const sizeOf = (shape: Shape): number => shape.reduce((n, d) => n * d, 1);
const f32 = (shape: Shape): Spec => ({ shape, dtype: "f32" });

/** The element of x that entry `flat` of a result of this shape reads, one axis after the other. */
function read(x: Host, flat: number, shape: Shape): number {
  let rest = flat;
  let position = 0;
  let step = 1;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const own = x.shape[axis - shape.length + x.shape.length] ?? 1;
    const size = shape[axis] as number;
    if (own !== 1) position += (rest % size) * step;
    rest = Math.floor(rest / size);
    step *= own;
  }
  return x.data[position] as number;
}
const expected = (inputs: readonly Host[], shape: Shape, f: (...xs: number[]) => number): number[] =>
  Array.from({ length: sizeOf(shape) }, (_, i) => f(...inputs.map((x) => read(x, i, shape))));

/** Worst distance of f32 numbers to exact ones, in units of the last place of the exact ones; what a subnormal becomes is left open. */
function worstUlps(found: TypedArray, exact: readonly number[]): number {
  expect(found.length).toBe(exact.length);
  let worst = 0;
  for (let i = 0; i < exact.length; i++) {
    const [x, y] = [found[i] as number, exact[i] as number];
    if (Object.is(x, Math.fround(y)) || x === Math.fround(y)) continue;
    if (Math.abs(y) < 2 ** -126) {
      if (Math.abs(x) <= 2 ** -126) continue;
    }
    const unit = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(y))), -126) - 23);
    const distance = Number.isFinite(x) && Number.isFinite(Math.fround(y)) ? Math.abs(x - y) / unit : Infinity;
    if (distance > worst) worst = distance;
  }
  return worst;
}

const pairs: readonly (readonly [Shape, Shape])[] = [
  [[], []],
  [[7], [7]],
  [[1031], [1031]],
  [[13], []],
  [[], [13]],
  [[1], [1, 1]],
  [[1, 5], [5]],
  [[3, 5], [5]],
  [[3, 8], [8]],
  [[8], [3, 8]],
  [
    [3, 5],
    [3, 1],
  ],
  [
    [3, 8],
    [3, 1],
  ],
  [
    [3, 1],
    [1, 8],
  ],
  [
    [2, 3, 4, 5],
    [2, 1, 4, 1],
  ],
  [
    [2, 1, 3, 1, 8],
    [5, 1, 2, 1],
  ],
  [
    [2, 1, 3, 1, 2, 1],
    [1, 2, 1, 3, 1, 2],
  ],
  [[0], [1]],
  [[0, 5], [5]],
  [
    [3, 0],
    [3, 1],
  ],
];
const broadcast = (...shapes: readonly Shape[]): number[] => {
  const rank = Math.max(...shapes.map((s) => s.length));
  return Array.from({ length: rank }, (_, axis) => {
    const sizes = shapes.map((s) => s[axis - rank + s.length] ?? 1).filter((d) => d !== 1);
    return sizes[0] ?? 1;
  });
};

const drivers = [
  ["a graphics card", false],
  ["a processor", true],
] as const;
describe.skipIf(!hasGpu).each(drivers)("elementwise kernels as on %s", (_, software) => {
  if (!hasGpu) return;
  let gpu: OwnedGpu;
  let kernels: ReturnType<typeof elementwiseKernels>;
  beforeAll(() => {
    gpu = testGpu();
    kernels = elementwiseKernels({ ...gpu, software });
  });
  afterAll(() => gpu.dispose());
  const run = async (name: string, inputs: readonly Host[], shape: Shape, attrs = {}, dtype: DType = "f32") =>
    (await call(gpu, kernels[name], inputs, [{ shape, dtype }], attrs))[0] as TypedArray;

  it.each(pairs)("sub and where broadcast %j and %j", async (a, b) => {
    const shape = broadcast(a, b);
    const inputs = [uniform(1, a), uniform(2, b)];
    const difference = await run("sub", inputs, shape);
    expect([...difference]).toEqual(expected(inputs, shape, (x, y) => Math.fround(x - y)));
    const mask = floats(
      b,
      Array.from({ length: sizeOf(b) }, (_, i) => [0, 1, -0][i % 3] as number),
    );
    const three = [mask, ...inputs];
    expect([...(await run("where", three, shape))]).toEqual(expected(three, shape, (c, x, y) => (c !== 0 ? x : y)));
  });

  it("where takes three shapes, infinities and NaN; where of i32", async () => {
    const mask = floats([3, 1], [1, 0, Number.NaN]);
    const x = floats([2, 1, 4], [1, Number.NaN, 3, Number.POSITIVE_INFINITY, 5, 6, 7, 8]);
    const y = floats([], [Number.NEGATIVE_INFINITY]);
    const inputs = [mask, x, y];
    const pick = (c: number, a: number, b: number): number => (c !== 0 ? a : b);
    expect([...(await run("where", inputs, [2, 3, 4]))]).toEqual(expected(inputs, [2, 3, 4], pick));
    const integers = [
      floats([3], [0, 1, 0]),
      ints([3], [2147483647, -2147483648, 0x7fc00001]),
      ints([3], [-1, -2, 0x7f800001]),
    ];
    expect([...(await run("where", integers, [3], {}, "i32"))]).toEqual(expected(integers, [3], pick));
  });

  const specials = [0, -0, 1, -1, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, Number.NaN, 3];
  const grid = [floats([8, 1], specials), floats([8], specials)];
  it.each([
    ["add", (a: number, b: number) => a + b],
    ["mul", (a: number, b: number) => a * b],
    ["maximum", Math.max],
    ["less", (a: number, b: number) => (a < b ? 1 : 0)],
  ] as const)("%s of zeros, infinities and NaN", async (name, f) => {
    const found = await run(name, grid, [8, 8]);
    const exact = expected(grid, [8, 8], f);
    // The sign of a zero maximum is the device's choice.
    const unsigned = (x: number): number => (x === 0 ? 0 : x);
    expect(Array.from(found, unsigned)).toEqual(exact.map(unsigned));
  });
  it.each([
    ["add", (a: number, b: number) => (a + b) | 0],
    ["sub", (a: number, b: number) => (a - b) | 0],
    ["mul", Math.imul],
    ["maximum", Math.max],
    ["less", (a: number, b: number) => (a < b ? 1 : 0)],
  ] as const)("%s of i32 wraps round", async (name, f) => {
    const values = [0, 1, -1, 2147483647, -2147483648, 65537, -7];
    const inputs = [ints([7, 1], values), ints([7], values)];
    const found = await run(name, inputs, [7, 7], {}, name === "less" ? "f32" : "i32");
    expect([...found]).toEqual(expected(inputs, [7, 7], f));
  });
  it("div is accurate to 3 ulp", async () => {
    const inputs = [uniform(3, [37, 11]), uniform(4, [37, 11])];
    expect(
      worstUlps(
        await run("div", inputs, [37, 11]),
        expected(inputs, [37, 11], (a, b) => a / b),
      ),
    ).toBeLessThan(3);
  });
  it("refuses packed types and formats, with the reason", () => {
    const packed: Spec = { shape: [4], dtype: "bf16" };
    expect(kernels.add.unsupported?.([packed, packed], {})).toContain("bf16");
    expect(kernels.exp.unsupported?.([{ ...f32([4]), format: "panels" }], {})).toContain("panels");
  });

  // ---------------------------------------------------------------- functions of one variable
  const erf = (x: number): number => {
    const z = Math.abs(x);
    if (z > 6) return Math.sign(x);
    let [term, sum] = [z, z];
    for (let n = 1; n < 400; n++) {
      term *= (2 * z * z) / (2 * n + 1);
      sum += term;
    }
    return Math.sign(x) * (2 / Math.sqrt(Math.PI)) * Math.exp(-z * z) * sum;
  };
  const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
  const inner = (x: number): number => Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3);
  /** 1 / 16 to 16 with both signs, and dense near 0 and 1. */
  const spread = (low: number, high: number): number[] => {
    const list: number[] = [];
    for (let i = 0; i <= 1500; i++) list.push(Math.fround(low + ((high - low) * i) / 1500));
    for (let e = -30; e < 4; e += 0.37) list.push(Math.fround(2 ** e), Math.fround(1 + 2 ** e), -Math.fround(2 ** e));
    return list.filter((x) => x >= low && x <= high);
  };
  const inf = Number.POSITIVE_INFINITY;
  it.each([
    [
      "exp",
      Math.exp,
      6,
      [...spread(-103, 89), 0, -0, inf, -inf, Number.NaN, -104, 88.7, 88.73, 1000, -1000, 1e30, -1e30],
    ],
    ["log", Math.log, 2, [...spread(1e-6, 200), 0, -0, inf, Number.NaN, -1, -inf, 1e-30, 1e30, 3e38, 2 ** -126, 1e-42]],
    ["sqrt", Math.sqrt, 4, [...spread(0, 200), 0, inf, Number.NaN, -1, 1e-20, 3e38, 2 ** -126]],
    ["recip", (x: number) => 1 / x, 3, [...spread(0.001, 200), 0, -0, inf, -inf, Number.NaN, -2, 1e-30, -1e30]],
    ["tanh", Math.tanh, 4, [...spread(-12, 12), 0, inf, -inf, Number.NaN, 1e-6, 30, -30, 1e30]],
    ["erf", erf, 4, [...spread(-4.5, 4.5), 0, inf, -inf, Number.NaN, 1e-6, 9, -9, 1e30]],
    ["floor", Math.floor, 0, [...spread(-9, 9), 0, -0.5, inf, -inf, 1e6, 8388609]],
    ["sigmoid", sigmoid, 6, [...spread(-80, 80), 0, inf, -inf, Number.NaN, 1e30, -1e30]],
  ] as const)("%s is accurate", async (name, f, ulps, values) => {
    const x = floats([values.length], values);
    expect(worstUlps(await run(name, [x], x.shape), Array.from(x.data, f))).toBeLessThanOrEqual(ulps);
  });

  /** Differences over the larger of 1 and the expected value. */
  const worst = (found: TypedArray, exact: readonly number[]): number => {
    expect(found.length).toBe(exact.length);
    return Math.max(
      0,
      ...exact.map((y, i) =>
        Object.is(found[i], y) ? 0 : Math.abs((found[i] ?? Number.NaN) - y) / Math.max(1, Math.abs(y)),
      ),
    );
  };
  const phi = (x: number): number => (1 + erf(x / Math.SQRT2)) / 2;
  const density = (x: number): number => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);
  const tanhSlope = (x: number): number => {
    const t = Math.tanh(inner(x));
    return (1 + t) / 2 + (x / 2) * (1 - t * t) * Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x * x);
  };
  const values = [...spread(-20, 20), 0, 80, -80, 1e6, -1e6];
  it.each([
    ["relu", {}, (x: number) => Math.max(x, 0), undefined],
    ["silu", {}, (x: number) => x * sigmoid(x), (x: number) => sigmoid(x) * (1 + x * sigmoid(-x))],
    ["softplus", {}, (x: number) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))), undefined],
    ["gelu", { approximate: "none" }, (x: number) => x * phi(x), (x: number) => phi(x) + x * density(x)],
    ["gelu", { approximate: "tanh" }, (x: number) => (x / 2) * (1 + Math.tanh(inner(x))), tanhSlope],
    ["affine", { scale: -1.5, shift: 0.25 }, (x: number) => -1.5 * x + 0.25, undefined],
  ] as const)("%s %j and its gradient", async (name, attrs, f, slope) => {
    const x = floats([values.length], values);
    expect(worst(await run(name, [x], x.shape, attrs), Array.from(x.data, f))).toBeLessThan(1e-6);
    if (!slope) return;
    const dy = uniform(5, x.shape);
    // Far out the cube overflows f32 inside the tanh: there 1 - t * t is 0 only up to 1e3.
    const far = name === "gelu" && attrs.approximate === "tanh" ? 1e3 : 1e7;
    const inside = Float32Array.from(x.data, (v) => Math.max(-far, Math.min(far, v)));
    const found = await run(`${name}Grad`, [floats(x.shape, inside), dy], x.shape, attrs);
    expect(
      worst(
        found,
        Array.from(inside, (v, i) => (dy.data[i] ?? 0) * slope(v)),
      ),
    ).toBeLessThan(2e-6);
  });
  it("reluGrad stops the gradient at and below 0; relu keeps NaN", async () => {
    const x = floats([6], [-1, 0, -0, 2, inf, -inf]);
    const dy = floats([6], [1, 2, 3, 4, 5, 6]);
    expect([...(await run("reluGrad", [x, dy], [6]))]).toEqual([0, 0, 0, 4, 5, 0]);
    expect([...(await run("relu", [floats([3], [Number.NaN, inf, -inf])], [3]))]).toEqual([Number.NaN, inf, 0]);
  });
  it("keeps NaN in activations", async () => {
    const x = floats([2], [Number.NaN, 1]);
    for (const name of ["silu", "gelu"]) expect((await run(name, [x], [2]))[0]).toBeNaN();
  });

  it.each([[2], [5, 6], [2, 3, 16], [0, 4], [9, 66]])("swiglu of [%s, ...] and its gradient", async (...shape) => {
    const x = host(
      uniform(6, shape).data.map((v) => 4 * v),
      shape,
      "f32",
    );
    const h = (shape.at(-1) as number) / 2;
    const half = [...shape.slice(0, -1), h];
    const dy = uniform(7, half);
    const n = sizeOf(half);
    const gate = (i: number): number => x.data[Math.floor(i / h) * 2 * h + (i % h)] as number;
    const up = (i: number): number => x.data[Math.floor(i / h) * 2 * h + h + (i % h)] as number;
    const y = Array.from({ length: n }, (_, i) => gate(i) * sigmoid(gate(i)) * up(i));
    expect(worst(await run("swiglu", [x], half), y)).toBeLessThan(1e-6);
    const dx = new Array<number>(2 * n);
    for (let i = 0; i < n; i++) {
      const at = Math.floor(i / h) * 2 * h + (i % h);
      const s = sigmoid(gate(i));
      const d = dy.data[i] as number;
      dx[at] = d * up(i) * s * (1 + gate(i) * (1 - s));
      dx[at + h] = d * gate(i) * s;
    }
    expect(worst(await run("swigluGrad", [x, dy], shape), dx)).toBeLessThan(2e-6);
  });

  // ---------------------------------------------------------------- storage given away
  it("add works in the storage it was given, and not where another input lies there", () => {
    const spec = f32([5]);
    const [a, b] = [gpu.upload(Float32Array.of(1, 2, 3, 4, 5), spec), gpu.upload(Float32Array.of(1, 1, 1, 1, 1), spec)];
    const operand = (handle: WebgpuHandle) => ({ ...spec, handle });
    expect(kernels.add([operand(a), operand(b)], [{ ...spec, reuse: a }], {})).toEqual([a]);
    const [other] = kernels.add([operand(a), operand(a)], [{ ...spec, reuse: a }], {});
    expect(other).not.toBe(a);
    const [scaled] = (kernels.affine as typeof kernels.add)([operand(b)], [{ ...spec, reuse: b }], {
      scale: 3,
      shift: 1,
    });
    expect(scaled).toBe(b);
    return Promise.all([
      gpu.download(operand(a)),
      gpu.download(operand(other as WebgpuHandle)),
      gpu.download(operand(b)),
    ]).then(([sum, twice, line]) => {
      expect([...sum]).toEqual([2, 3, 4, 5, 6]);
      expect([...twice]).toEqual([4, 6, 8, 10, 12]);
      expect([...line]).toEqual([4, 4, 4, 4, 4]);
    });
  });

  // ---------------------------------------------------------------- small devices
  it("folds dispatches that exceed the workgroups of a dimension", async () => {
    const small = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
    const x = [uniform(8, [47, 61]), uniform(9, [61])];
    const [sum] = await call(small, elementwiseKernels({ ...small, software }).add, x, [f32([47, 61])]);
    expect([...(sum as TypedArray)]).toEqual(expected(x, [47, 61], (a, b) => Math.fround(a + b)));
    small.dispose();
  });

  describe("on a device that binds 4096 bytes at once", () => {
    let split: OwnedGpu;
    let table: typeof kernels;
    beforeAll(() => {
      split = testGpu({ maxStorageBufferBindingSize: 4096 });
      table = elementwiseKernels({ ...split, software });
    });
    afterAll(() => split.dispose());
    const shape = [37, 62];
    it.each([[shape], [[]], [[62]], [[37, 1]]])("sub of [37, 62] and %j", async (other) => {
      const inputs = [uniform(10, shape), uniform(11, other)];
      const [y] = await call(split, table.sub, inputs, [f32(shape)]);
      expect([...(y as TypedArray)]).toEqual(expected(inputs, shape, (a, b) => Math.fround(a - b)));
    });
    it("silu, and mul in place", async () => {
      const [x, b] = [uniform(12, shape), uniform(13, shape)];
      const [y] = await call(split, table.silu, [x], [f32(shape)]);
      expect(
        worst(
          y as TypedArray,
          Array.from(x.data, (v) => v * sigmoid(v)),
        ),
      ).toBeLessThan(1e-6);
      const [one, two] = [split.upload(x.data, x), split.upload(b.data, b)];
      expect(one.parts.length).toBe(3);
      const [product] = table.mul(
        [
          { ...f32(shape), handle: one },
          { ...f32(shape), handle: two },
        ],
        [{ ...f32(shape), reuse: one }],
        {},
      );
      expect(product).toBe(one);
      expect([...(await split.download({ ...f32(shape), handle: one }))]).toEqual(
        expected([x, b], shape, (a, c) => Math.fround(a * c)),
      );
    });
    it("adds a view that is split at other places", async () => {
      // As [37, 62] the parts hold 16 rows, as [2294] 1024 elements.
      const [x, b] = [uniform(14, shape), uniform(15, [37 * 62])];
      const [one, two] = [split.upload(x.data, x), split.upload(b.data, b)];
      const flat = [37 * 62];
      const [sum] = table.add(
        [
          { ...f32(flat), handle: one },
          { ...f32(flat), handle: two },
        ],
        [f32(flat)],
        {},
      );
      const found = await split.download({ ...f32(flat), handle: sum as WebgpuHandle });
      expect([...found]).toEqual(Array.from(x.data, (v, i) => Math.fround(v + (b.data[i] as number))));
    });
    it("says which op takes one buffer only, and keeps no storage", () => {
      const [wide, half, twice] = [f32([40, 62]), f32([40, 31]), f32([2, 10, 62])];
      const x = { ...wide, handle: split.upload(new Float32Array(40 * 62), wide) };
      const y = { ...twice, handle: split.upload(new Float32Array(2 * 10 * 62), twice) };
      const before = split.memory().used;
      expect(() => table.swiglu?.([x], [half], {})).toThrow(/swiglu.* lies in 3 buffers/);
      // The repeated operand must be whole; [10, 62] here stands for the first rows of x.
      expect(() => table.mul([y, { ...x, shape: [10, 62] }], [twice], {})).toThrow(/mul: .* lies in 3 buffers/);
      expect(split.memory().used).toBe(before);
    });
    it.each(["bf16", "f16", "u8"] as const)("casts f32 to %s and back, wherever the parts end", async (dtype) => {
      for (const own of [shape, [1033, 3], [331, 7]]) {
        const x = floats(
          own,
          Array.from({ length: sizeOf(own) }, (_, i) => (i * 37) % 251),
        );
        const [packed] = await call(split, table.cast, [x], [{ shape: own, dtype }], { dtype });
        const back = await call(split, table.cast, [host(packed as TypedArray, own, dtype)], [f32(own)], {
          dtype: "f32",
        });
        expect([...(back[0] as TypedArray)]).toEqual([...x.data]);
      }
    });
  });

  // ---------------------------------------------------------------- conversions
  /** All finite numbers >= 0 of a 16-bit format, by their bits. */
  const numbersOf = { f16: all(10, 15, 0x7c00), bf16: all(7, 127, 0x7f80) };
  function all(fraction: number, bias: number, count: number): number[] {
    return Array.from({ length: count }, (_, bits) => {
      const e = bits >> fraction;
      const m = bits % 2 ** fraction;
      return e === 0 ? m * 2 ** (1 - bias - fraction) : (1 + m / 2 ** fraction) * 2 ** (e - bias);
    });
  }
  /** The bits of the nearest number, found by searching; of two equally near ones the even. */
  function nearest(x: number, dtype: "f16" | "bf16"): number {
    const list = numbersOf[dtype];
    const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
    const a = Math.abs(x);
    let [low, high] = [0, list.length];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if ((list[middle] as number) <= a) low = middle;
      else high = middle;
    }
    const below = list[low] as number;
    // The number after the last one would be the next power of two.
    const above = list[low + 1] ?? 2 * below - (list[low - 1] as number);
    const up = a - below > above - a || (a - below === above - a && low % 2 === 1);
    return sign | (a === inf || up ? low + 1 - (a === inf ? low + 1 - list.length : 0) : low);
  }
  const bitsOf = (x: TypedArray): Uint32Array => new Uint32Array(x.buffer, x.byteOffset, x.length);

  it.each(["f16", "bf16"] as const)("widens all 65536 patterns of %s exactly", async (dtype) => {
    const every = Uint16Array.from({ length: 65536 }, (_, i) => i);
    const found = await run("cast", [host(every, [65536], dtype)], [65536], { dtype: "f32" });
    const list = numbersOf[dtype];
    const wrong: number[] = [];
    every.forEach((bits) => {
      const a = (bits & 0x7fff) === list.length ? inf : list[bits & 0x7fff];
      const y = a === undefined ? Number.NaN : bits & 0x8000 ? -a : a;
      if (!Object.is(found[bits], y)) wrong.push(bits);
    });
    expect(wrong).toEqual([]);
    // And back: the same bits, but of NaN only that it is one.
    const again = await run("cast", [host(found, [65536], "f32")], [65536], { dtype }, dtype);
    expect(every.filter((bits) => (bits & 0x7fff) <= list.length && again[bits] !== bits)).toHaveLength(0);
    expect(
      every.filter((bits) => (bits & 0x7fff) > list.length && (again[bits] as number) % 0x8000 <= list.length),
    ).toHaveLength(0);
  });
  it.each(["f16", "bf16"] as const)("rounds to the nearest %s at every midpoint and beside it", async (dtype) => {
    const list = numbersOf[dtype];
    const words: number[] = [];
    const word = new DataView(new ArrayBuffer(4));
    list.forEach((x, i) => {
      const next = list[i + 1] ?? 2 * x - (list[i - 1] as number);
      word.setFloat32(0, (x + next) / 2);
      const middle = word.getUint32(0);
      words.push(middle - 1, middle, middle + 1, 0x80000000 + middle);
    });
    words.push(0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffffffff, 0x7f7fffff, 0, 0x80000000, 1, 0x007fffff);
    const x = new Float32Array(Uint32Array.from(words, (w) => w >>> 0).buffer);
    const found = await run("cast", [host(x, [x.length], "f32")], [x.length], { dtype }, dtype);
    const wrong: string[] = [];
    x.forEach((value, i) => {
      const bits = found[i] as number;
      const fits = Number.isNaN(value) ? (bits & 0x7fff) > list.length : bits === nearest(value, dtype);
      if (!fits) wrong.push(`${value}: ${bits}`);
    });
    expect(wrong).toEqual([]);
  });
  const integers = [
    0, 1, -1, 255, 256, -256, 16777217, 16777219, -16777219, 33554435, 65519, 65520, 1052673, 2147483647, -2147483648,
  ];
  it.each(["f32", "f16", "bf16", "u8", "i32"] as const)("converts i32 to %s, rounded once", async (dtype) => {
    const found = await run("cast", [ints([15], integers)], [15], { dtype }, dtype);
    const one = (v: number): number =>
      dtype === "f32"
        ? Math.fround(v)
        : dtype === "u8"
          ? Math.min(255, Math.max(0, v))
          : dtype === "i32"
            ? v
            : nearest(v, dtype);
    // bf16: 1052673 = 2^20 + 2^12 + 1 lies just above a midpoint.
    expect([...found]).toEqual(integers.map(one));
  });
  it.each(["i32", "u8"] as const)("truncates f32 to %s, saturating", async (dtype) => {
    const x = [
      0,
      -0,
      0.99,
      -0.99,
      1.9,
      -1.9,
      254.9,
      255.9,
      256,
      1e6,
      8388609,
      16777216,
      2147483520,
      2147483648,
      3e9,
      -3e9,
      inf,
      -inf,
    ];
    const given = [...x, -2147483648, Number.NaN, 1e-40, -2147483520];
    const [low, high] = dtype === "i32" ? [-(2 ** 31), 2 ** 31 - 1] : [0, 255];
    const exact = given.map((v) =>
      Number.isNaN(v) ? 0 : Math.min(high, Math.max(low, Math.trunc(Math.fround(v)))) + 0,
    );
    expect([...(await run("cast", [floats([22], given)], [22], { dtype }, dtype))]).toEqual(exact);
  });
  it("converts among the packed types, with lengths that do not fill a word", async () => {
    const bytes = Uint8Array.from({ length: 255 }, (_, i) => i);
    for (const dtype of ["f16", "bf16"] as const) {
      const half = await run("cast", [host(bytes, [5, 51], "u8")], [5, 51], { dtype }, dtype);
      expect([...half]).toEqual(Array.from(bytes, (v) => nearest(v, dtype)));
      expect([...(await run("cast", [host(half, [255], dtype)], [255], { dtype: "u8" }, "u8"))]).toEqual([...bytes]);
      const other = dtype === "f16" ? "bf16" : "f16";
      const crossed = await run("cast", [host(half, [255], dtype)], [255], { dtype: other }, other);
      expect([...crossed]).toEqual(Array.from(bytes, (v) => nearest(v, other)));
    }
    expect([...(await run("cast", [host(bytes, [255], "u8")], [255], { dtype: "i32" }, "i32"))]).toEqual([...bytes]);
  });
  it("copies bits where the type stays", async () => {
    const bits = Uint32Array.of(0x7fc00001, 1, 0xff800000, 0x12345678);
    const x = new Float32Array(bits.buffer.slice(0));
    expect([...bitsOf(await run("cast", [host(x, [4], "f32")], [4], { dtype: "f32" }))]).toEqual([...bits]);
  });
});
