// Sums, maxima and running sums on both code paths, against plain loops in double precision: every plan of the stages,
// dispatches folded into three dimensions, tensors in several buffers, long sums, NaN and infinities.
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, ints, testGpu, uniform } from "../call.test-util.ts";
import { reduceKernels } from "./reduce.ts";

const f32 = (...shape: readonly number[]) => ({ shape, dtype: "f32" as const });
const i32 = (...shape: readonly number[]) => ({ shape, dtype: "i32" as const });
const size = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1);
const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number;

/** For each element of x the place it is added to. */
function sumOf({ shape, data }: Host, target: readonly number[]): { sums: number[]; magnitudes: number[] } {
  const padded = [...shape.map(() => 1), ...target].slice(-shape.length || shape.length + target.length);
  const [sums, magnitudes] = [0, 0].map(() => new Array<number>(size(target)).fill(0)) as [number[], number[]];
  data.forEach((value, flat) => {
    let [to, step, rest] = [0, 1, flat];
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      const n = shape[axis] as number;
      const kept = padded[axis] as number;
      if (kept !== 1) to += (rest % n) * step;
      step *= kept;
      rest = Math.floor(rest / n);
    }
    sums[to] = (sums[to] as number) + value;
    magnitudes[to] = (magnitudes[to] as number) + Math.abs(value);
  });
  return { sums, magnitudes };
}
/** Every entry within `allowed` of its own scale. */
function near(found: ArrayLike<number>, expected: readonly number[], scale: readonly number[], allowed = 5e-7): void {
  expect(found.length).toBe(expected.length);
  let worst = 0;
  expected.forEach((value, i) => {
    const error = Math.abs((found[i] as number) - value) / Math.max(1e-6, scale[i] as number);
    worst = Math.max(worst, Number.isNaN(error) ? high : error);
  });
  expect(worst).toBeLessThan(allowed);
}

/** Equal integers; the first that differ. A comparison of whole arrays would take minutes to show its difference. */
function same(found: ArrayLike<number>, expected: readonly number[]): void {
  expect(found.length).toBe(expected.length);
  const place = expected.findIndex((value, i) => value !== found[i]);
  expect(place, `${found[place]} in place of ${expected[place]}`).toBe(-1);
}

function runningSum(x: Host, axis: number, exclusive: boolean, reverse: boolean): number[] {
  const n = x.shape[axis] as number;
  const inner = size(x.shape.slice(axis + 1));
  const y = new Array<number>(x.data.length);
  for (let line = 0; line < x.data.length / n; line++) {
    let sum = 0;
    for (let step = 0; step < n; step++) {
      const place = reverse ? n - 1 - step : step;
      const i = (Math.floor(line / inner) * n + place) * inner + (line % inner);
      y[i] = exclusive ? sum : sum + (x.data[i] as number);
      sum += x.data[i] as number;
    }
  }
  return y;
}

describe.skipIf(!hasGpu).each([true, false])("sums, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
  const kernels = reduceKernels({ ...on, software });

  it.each<readonly [readonly number[], readonly number[]]>([
    [[20_011], []],
    [[1], []],
    [[], []],
    [[5, 1], [1]],
    [
      [3, 2],
      [3, 1],
    ],
    [
      [7, 61],
      [7, 1],
    ],
    [
      [3, 5, 257],
      [3, 5, 1],
    ],
    [
      [2, 9_001],
      [2, 1],
    ],
    [[3_001, 5], [5]],
    [[601, 3], [3]],
    [[1_033, 67], [67]],
    [[2, 67, 37], [37]],
    [[31, 9], [9]],
    [[33, 33_001], [33_001]],
    [
      [5, 131, 3],
      [5, 1, 3],
    ],
    [
      [2, 3, 4, 5],
      [2, 1, 4, 1],
    ],
    [
      [3, 70, 2, 41],
      [70, 1, 41],
    ],
    [[4, 0], []],
    [[4, 0], [0]],
    [
      [0, 4],
      [1, 4],
    ],
  ])("sumTo of %j to %j", async (shape, target) => {
    const x = uniform(shape.length + size(shape), shape);
    const [y] = await call(on, kernels.sumTo, [x], [f32(...target)], { shape: target });
    const { sums, magnitudes } = sumOf(x, target);
    near(y as Float32Array, sums, magnitudes);
  });

  it("sums a million elements of one sign to the last digits, the same every time", async () => {
    const x = floats(
      [1_000_003],
      uniform(1, [1_000_003]).data.map((value) => 1 + Math.abs(value)),
    );
    const [y] = await call(on, kernels.sumTo, [x], [f32()], { shape: [] });
    const { sums } = sumOf(x, []);
    near(y as Float32Array, sums, sums, 3e-7);
    const [again] = await call(on, kernels.sumTo, [x], [f32()], { shape: [] });
    expect(again).toEqual(y);
    const columns = { ...x, shape: [500_001, 2], data: x.data.subarray(0, 1_000_002) };
    const [two] = await call(on, kernels.sumTo, [columns], [f32(2)], { shape: [2] });
    near(two as Float32Array, sumOf(columns, [2]).sums, sumOf(columns, [2]).sums, 3e-7);
  });

  it("answers with the tensor itself where nothing is summed", () => {
    const x = on.upload(new Float32Array(6), f32(1, 2, 3));
    const handles = kernels.sumTo([{ ...f32(1, 2, 3), handle: x }], [f32(2, 3)], { shape: [2, 3] });
    expect(handles).toEqual([x]);
    on.free(x);
  });

  it("passes NaN and infinities on", async () => {
    const x = floats([4, 3], [nan, 1, 2, high, 1, 0, low, 1, 0, high, low, 0]);
    const [y] = await call(on, kernels.sumTo, [x], [f32(4, 1)], { shape: [4, 1] });
    expect(Array.from(y as Float32Array)).toEqual([nan, high, low, nan]);
  });

  it.each([[[]], [[1]], [[257, 3]], [[70_001]], [[0, 3]]])("sumSquares of %j", async (shape) => {
    const x = uniform(3, shape);
    const [y] = await call(on, kernels.sumSquares, [x], [f32()]);
    const expected = Array.from(x.data).reduce((sum, value) => sum + value * value, 0);
    near(y as Float32Array, [expected], [expected], 3e-7);
  });

  it("sums the squares of a tensor in several buffers", async () => {
    const small = testGpu({ maxStorageBufferBindingSize: 4096 });
    const x = uniform(4, [1_301, 3]);
    const [y] = await call(small, reduceKernels({ ...small, software }).sumSquares, [x], [f32()]);
    const expected = Array.from(x.data).reduce((sum, value) => sum + value * value, 0);
    near(y as Float32Array, [expected], [expected], 3e-7);
  });

  it.each([[[7]], [[1, 1]], [[11, 3]], [[37, 61]], [[3, 5, 257]], [[5, 20_011]]])("maxLast of %j", async (shape) => {
    const n = shape.at(-1) as number;
    const x = uniform(5, shape);
    // One row with NaN, one of -inf, one with +inf.
    const rows = x.data.length / n;
    if (rows > 3) {
      x.data[n - 1] = nan;
      x.data.fill(low, n, 2 * n);
      x.data[2 * n] = high;
    }
    const expected = Array.from({ length: rows }, (_, r) => Math.max(...x.data.subarray(r * n, (r + 1) * n)));
    const [y] = await call(on, kernels.maxLast, [x], [f32(...shape.slice(0, -1), 1)]);
    expect(Array.from(y as Float32Array)).toEqual(expected);
  });

  it.each<readonly [readonly number[], number, { exclusive?: boolean; reverse?: boolean }]>([
    [[7], 0, {}],
    [[1], 0, { exclusive: true }],
    [[5_003], 0, { reverse: true }],
    [[3, 2_049], 1, { exclusive: true }],
    [[2, 1_024, 3], 1, { exclusive: true, reverse: true }],
    [[301, 67], 0, {}],
    [[2, 301, 67], 1, { exclusive: true, reverse: true }],
    [[70, 9_001], 0, { reverse: true }],
    [[9, 0, 3], 1, {}],
  ])("cumsum of %j along %i, %j", async (shape, axis, attrs) => {
    const x = uniform(7, shape);
    const expected = runningSum(x, axis, attrs.exclusive ?? false, attrs.reverse ?? false);
    const [y] = await call(on, kernels.cumsum, [x], [f32(...shape)], { axis, ...attrs });
    const scale = runningSum({ ...x, data: x.data.map(Math.abs) }, axis, false, attrs.reverse ?? false);
    near(y as Float32Array, expected, scale, 1e-6);
    const whole = ints(
      shape,
      Array.from(x.data, (value) => Math.round(value * 1e6)),
    );
    const [counts] = await call(on, kernels.cumsum, [whole], [i32(...shape)], { axis, ...attrs });
    const exact = runningSum(whole, axis, attrs.exclusive ?? false, attrs.reverse ?? false);
    same(
      counts as Int32Array,
      exact.map((value) => value | 0),
    );
  });

  it.skipIf(software)("cumsum over more than one tile of tiles", async () => {
    const n = 1024 * 1024 + 1025;
    const x = ints(
      [n],
      uniform(8, [n]).data.map((value) => Math.round(1000 * value)),
    );
    const [y] = await call(on, kernels.cumsum, [x], [i32(n)], { axis: 0, exclusive: true, reverse: true });
    same(y as Int32Array, runningSum(x, 0, true, true));
  });
});
