// Long sums, sorts of more than a cache line, top-k that sorts: what the shared suite is too small for.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type WasmBackend, wasm } from "../backend.ts";
import { call, f32, floats, i32, integers, ints, uniform, worst } from "../call.test-util.ts";

let backend: WasmBackend;
beforeAll(async () => {
  backend = await wasm({ threads: 1 });
});
afterAll(() => backend.dispose());

describe("sums", () => {
  it("a million terms keep their precision", () => {
    const n = 1_000_003;
    const x = floats(
      Float32Array.from({ length: n }, (_, i) => 1 + (i % 10) / 10),
      n,
    );
    let [exact, squares] = [0, 0];
    for (const v of x.data) [exact, squares] = [exact + v, squares + v * v];
    expect(worst(call(backend, "sumTo", [x], [f32()], { shape: [] })[0] ?? [], [exact])).toBeLessThan(1e-7);
    expect(worst(call(backend, "sumSquares", [x], [f32()])[0] ?? [], [squares])).toBeLessThan(1e-7);
  });
  it.each([
    [[700, 5], [5]],
    [[130, 1_030], [1_030]],
    [
      [20_000, 3],
      [1, 3],
    ],
    [
      [3, 200, 7],
      [3, 1, 7],
    ],
    [
      [5, 150, 2, 9],
      [5, 1, 2, 1],
    ],
    [
      [4, 150],
      [4, 1],
    ],
    [[0, 3], [3]],
    [
      [3, 0],
      [3, 1],
    ],
    [
      [2, 3],
      [2, 3],
    ],
  ])("%j to %j", (shape, target) => {
    const x = uniform(1, ...shape);
    const expected = new Float64Array(target.reduce((n, d) => n * d, 1));
    x.data.forEach((value, flat) => {
      let [rest, at, step] = [flat, 0, 1];
      for (let axis = shape.length - 1; axis >= 0; axis--) {
        const size = shape[axis] ?? 1;
        const own = target[axis - shape.length + target.length] ?? 1;
        if (own !== 1) at += (rest % size) * step;
        step *= own;
        rest = Math.floor(rest / size);
      }
      expected[at] = (expected[at] ?? 0) + value;
    });
    expect(worst(call(backend, "sumTo", [x], [f32(...target)], { shape: target })[0] ?? [], expected)).toBeLessThan(
      1e-6,
    );
  });
});

describe("orders", () => {
  const order = (values: readonly number[], descending: boolean): number[] =>
    values
      .map((_, i) => i)
      .sort((i, j) => {
        const [a, b] = [values[i] as number, values[j] as number];
        if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b)) || i - j;
        return (descending ? b - a : a - b) || i - j;
      });

  it.each([false, true])(
    "argsort of 3000 floats with ties, zeros of both signs, NaN and infinities; descending: %s",
    (descending) => {
      const x = uniform(1, 2, 3_000);
      x.data.forEach((v, i) => {
        x.data[i] = i % 3 ? Math.round(v * 20) / 20 : v;
      });
      x.data.set([Number.NaN, 0, -0, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 0, -0, Number.NaN], 100);
      const [y] = call(backend, "argsort", [x], [i32(2, 3_000)], { descending });
      expect(Array.from(y?.subarray(0, 3_000) ?? [])).toEqual(order(Array.from(x.data.subarray(0, 3_000)), descending));
      expect(Array.from(y?.subarray(3_000) ?? [])).toEqual(order(Array.from(x.data.subarray(3_000)), descending));
    },
  );
  it.each([false, true])("argsort of whole numbers, negative ones too; descending: %s", (descending) => {
    const x = integers(1, -40_000, 40_000, 1, 500);
    x.data.set([-2147483648, 2147483647, 0, -1], 50);
    const [y] = call(backend, "argsort", [x], [i32(1, 500)], { descending });
    expect(Array.from(y ?? [])).toEqual(order(Array.from(x.data), descending));
  });
  it.each([1, 7, 32, 33, 90])("top %i of 90", (k) => {
    const x = uniform(1, 3, 90);
    x.data.forEach((v, i) => {
      x.data[i] = Math.round(v * 10);
    });
    x.data[3] = Number.NaN;
    const [y] = call(backend, "topkIndices", [x], [i32(3, k)], { k });
    const expected = [0, 1, 2].flatMap((r) =>
      order(Array.from(x.data.subarray(r * 90, r * 90 + 90)), true).slice(0, k),
    );
    expect(Array.from(y ?? [])).toEqual(expected);
  });
  it("dispatch cuts off at its bound", () => {
    const ids = ints([2, 0, 1, 2, -1, 0, 7, 1, 1, 2], 5, 2);
    const [rows, slots, ends] = call(backend, "dispatch", [ids], [i32(6), i32(6), i32(3)], { count: 3, bound: 6 });
    expect([rows, slots, ends].map((x) => Array.from(x ?? []))).toEqual([
      [0, 2, 1, 3, 4, 0],
      [1, 5, 2, 7, 8, 0],
      [2, 5, 6],
    ]);
  });
});
