// Dense products against loops in float64: every layout, size around tiles, few rows and few columns, slices of k,
// batches that broadcast, storage types, split tensors, folded dispatches, f16 arithmetic.
import { describe, expect, it } from "vitest";
import { webgpu } from "../backend.ts";
import { call, floats, type Host, hasGpu, testGpu, uniform } from "../call.test-util.ts";
import { matmulKernels } from "./matmul.ts";
import { addBias, numberOf, product, type Side, stored, worst } from "./products.test-util.ts";

const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
/** [rows, columns], or its transpose where told. */
const matrix = (seed: number, rows: number, columns: number, transposed: boolean): { host: Host; side: Side } => {
  const x = uniform(seed, transposed ? [columns, rows] : [rows, columns]);
  return { host: x, side: (i, j) => numberOf(x, transposed ? j * rows + i : i * columns + j) };
};

describe.skipIf(!hasGpu).each([true, false])("matmul, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 5 });
  const { matmul } = matmulKernels({ ...on, software });

  // Below, at and above the few-row kernel, the tile, the block of sums; lines that begin on vectors, and not.
  it.each([
    [1, 1, 1, "kr"],
    [1, 13, 1031, "kk rk rr"],
    [1, 36, 2060, "kk kr rr"],
    [2, 9, 7, "kk"],
    [3, 36, 260, "kr"],
    [8, 36, 260, "kk"],
    [8, 33, 31, "rr"],
    [37, 5, 64, "kr"],
    [33, 67, 31, "kk kr rr"],
    [36, 36, 2060, "rk kr"],
    [7, 5, 0, "kr"],
    [5, 0, 3, "kr"],
    [0, 5, 3, "kr"],
  ])("%i x %i by %i, %s", async (m, n, k, layouts) => {
    for (const [left, right] of layouts.split(" ")) {
      const [transposeA, transposeB] = [left === "r", right === "k"];
      const a = matrix(m + 7, m, k, transposeA);
      const b = matrix(n + 11, k, n, transposeB);
      const [y] = await call(on, matmul, [a.host, b.host], [f32(m, n)], { transposeA, transposeB });
      expect(worst(y, product(m, n, k, a.side, b.side))).toBeLessThan(1e-6);
    }
  });

  it.each([
    [[3], [3]],
    [[3], []],
    [[], [3]],
    [
      [2, 1, 3],
      [1, 4, 1],
    ],
    [
      [2, 1, 3, 1],
      [1, 2, 1, 2],
    ],
    [[0], [1]],
  ])("batch %j by %j", async (left, right) => {
    const [m, n, k] = [11, 10, 12];
    const shape: number[] = [];
    const rank = Math.max(left.length, right.length);
    for (let axis = 0; axis < rank; axis++) {
      const [d, e] = [left[axis - rank + left.length] ?? 1, right[axis - rank + right.length] ?? 1];
      shape.push(d === 1 ? e : d);
    }
    const [a, b] = [uniform(1, [...left, m, k]), uniform(2, [...right, k, n])];
    const [y] = await call(on, matmul, [a, b], [f32(...shape, m, n)]);
    const count = shape.reduce((x, d) => x * d, 1);
    const expected = Array.from({ length: count }, (_, flat) => {
      const place = (own: readonly number[]): number => {
        let [rest, at, step] = [flat, 0, 1];
        for (let axis = rank - 1; axis >= 0; axis--) {
          const d = own[axis - rank + own.length] ?? 1;
          at += d === 1 ? 0 : (rest % (shape[axis] ?? 1)) * step;
          step *= d;
          rest = Math.floor(rest / (shape[axis] ?? 1));
        }
        return at;
      };
      const [i, j] = [place(left), place(right)];
      return [
        ...product(
          m,
          n,
          k,
          (r, c) => numberOf(a, (i * m + r) * k + c),
          (r, c) => numberOf(b, (j * k + r) * n + c),
        ),
      ];
    }).flat();
    expect(worst(y, Float64Array.from(expected))).toBeLessThan(1e-6);
  });
});

describe.skipIf(!hasGpu).each([true, false])("linear, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu();
  const { linear } = matmulKernels({ ...on, software });

  it.each(["f32", "bf16", "f16"] as const)("%s", async (dtype) => {
    for (const [rows, inner, out] of [
      [1, 264, 19],
      [1, 37, 5],
      [4, 12, 3],
      [21, 40, 33],
      // Few columns, and slices of a long sum.
      [21, 37, 5],
      [2, 1100, 5],
    ] as const) {
      const x = uniform(1, [rows, inner]);
      const w = stored(uniform(2, [out, inner]), dtype);
      const bias = uniform(3, [out]);
      const inputs = rows === 4 ? [x, w] : [x, w, bias];
      const [y] = await call(on, linear, inputs, [f32(rows, out)]);
      const expected = product(
        rows,
        out,
        inner,
        (i, k) => numberOf(x, i * inner + k),
        (k, j) => numberOf(w, j * inner + k),
      );
      if (rows !== 4) addBias(expected, bias);
      expect(worst(y, expected)).toBeLessThan(1e-6);
    }
  });
});

describe.skipIf(!hasGpu)("split tensors", () => {
  if (!hasGpu) return;
  it.each([true, false])("linear and its gradients, software %s", async (software) => {
    const on = testGpu({ maxStorageBufferBindingSize: 1024 });
    const { matmul, linear } = matmulKernels({ ...on, software });
    const [rows, inner, out] = [9, 22, 61];
    const x = uniform(1, [rows, inner]);
    const [w, dy] = [uniform(2, [out, inner]), uniform(3, [rows, out])];
    const bias = uniform(4, [out]);
    const X: Side = (i, j) => numberOf(x, i * inner + j);
    const W: Side = (i, j) => numberOf(w, i * inner + j);
    const Y: Side = (i, j) => numberOf(dy, i * out + j);
    for (const dtype of ["f32", "bf16"] as const) {
      const narrow = stored(w, dtype);
      const [y] = await call(on, linear, [x, narrow, bias], [f32(rows, out)]);
      const expected = product(rows, out, inner, X, (k, j) => numberOf(narrow, j * inner + k));
      addBias(expected, bias);
      expect(worst(y, expected)).toBeLessThan(1e-6);
    }
    const [dx] = await call(on, matmul, [dy, w], [f32(rows, inner)]);
    expect(worst(dx, product(rows, inner, out, Y, W))).toBeLessThan(1e-6);
    const [dw] = await call(on, matmul, [dy, x], [f32(out, inner)], { transposeA: true });
    expect(
      worst(
        dw,
        product(out, inner, rows, (i, k) => Y(k, i), X),
      ),
    ).toBeLessThan(1e-6);
    // Few columns, rows and result split.
    const tall = uniform(5, [300, 4]);
    const [short] = await call(on, matmul, [tall, uniform(6, [4, 3])], [f32(300, 3)]);
    const small = uniform(6, [4, 3]);
    const back = product(
      300,
      3,
      4,
      (i, k) => numberOf(tall, i * 4 + k),
      (k, j) => numberOf(small, k * 3 + j),
    );
    expect(worst(short, back)).toBeLessThan(1e-6);
  });

  it("refuses a batch in several buffers, with the limit", async () => {
    const on = testGpu({ maxStorageBufferBindingSize: 1024 });
    const { matmul } = matmulKernels(on);
    const a = on.upload(uniform(1, [4, 12, 12]).data, f32(4, 12, 12));
    const inputs = [a, a].map((handle) => ({ ...f32(4, 12, 12), handle }));
    expect(() => matmul(inputs, [f32(4, 12, 12)], {})).toThrow(/matmul.*2304 bytes.*at most 1024/);
  });
});

// Native f16: SwiftShader has none, lavapipe and every current GPU do.
const halfGpu = hasGpu && testGpu().f16;
if (hasGpu && !halfGpu) console.warn("f16 arithmetic is not tested: this adapter lacks shader-f16");
describe.skipIf(!halfGpu).each([true, false])("f16 arithmetic, software %s", (software) => {
  if (!halfGpu) return;
  const [rows, inner, out] = [37, 1031, 6];
  const run = async (arithmetic: "f16" | "f32", x: Host, w: Host) => {
    const on = testGpu();
    const { linear } = matmulKernels({ ...on, software, arithmetic });
    const [y] = await call(on, linear, [x, w], [f32(rows, out)]);
    return y;
  };
  const exact = (x: Host, w: Host): Float64Array =>
    product(
      rows,
      out,
      inner,
      (i, k) => numberOf(x, i * inner + k),
      (k, j) => numberOf(w, j * inner + k),
    );

  it("adds up short sums in f32: whole numbers stay exact", async () => {
    const whole = (seed: number, shape: readonly number[]): Host =>
      floats(
        shape,
        uniform(seed, shape).data.map((v) => Math.round(v * 3)),
      );
    const [x, w] = [whole(1, [rows, inner]), whole(2, [out, inner])];
    const y = await run("f16", x, w);
    expect(worst(y, exact(x, w))).toBe(0);
    expect(Math.max(...exact(x, w).map(Math.abs))).toBeGreaterThan(64);
  });
  it("rounds products to f16, and nothing else", async () => {
    const [x, w] = [uniform(3, [rows, inner]), stored(uniform(4, [out, inner]), "f16")];
    const difference = worst(await run("f16", x, w), exact(x, w));
    expect(difference).toBeGreaterThan(1e-5);
    expect(difference).toBeLessThan(2e-3);
    expect(worst(await run("f32", x, w), exact(x, w))).toBeLessThan(1e-6);
  });
});
describe.skipIf(!hasGpu || halfGpu)("without shader-f16", () => {
  if (!hasGpu) return;
  it("f16 arithmetic is refused with the reason", async () => {
    await expect(webgpu({ device: testGpu().device, arithmetic: "f16" })).rejects.toThrow(
      /needs the feature "shader-f16"/,
    );
  });
});
