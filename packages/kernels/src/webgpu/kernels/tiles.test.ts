// Every tile gives the same bits, and the right ones: blocks that are cut off on both sides, lines along k and across
// it.
import { describe, expect, it } from "vitest";
import { call, floats, hasGpu, testGpu, uniform } from "../call.test-util.ts";
import { matmulKernels } from "./matmul.ts";
import { numberOf, product, type Side, worst } from "./products.test-util.ts";
import { classKey, fits, tiles } from "./tiles.ts";

const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });

describe.skipIf(!hasGpu)("tiles", () => {
  if (!hasGpu) return;
  // k ends inside a block of sums, and inside a quad.
  it.each([
    ["kk", 260],
    ["rr", 263],
  ] as const)("give the same bits, %s", async (layouts, k) => {
    const [m, n] = [72, 68];
    const transposed = layouts === "rr";
    const a = uniform(1, transposed ? [k, m] : [m, k]);
    const b = uniform(2, transposed ? [k, n] : [n, k]);
    const left: Side = (i, l) => numberOf(a, transposed ? l * m + i : i * k + l);
    const right: Side = (l, j) => numberOf(b, transposed ? l * n + j : j * k + l);
    const key = classKey({ kind: "dense", layouts, format: "f32", m, n, k, count: 1 });
    const on = testGpu();
    let first: Float32Array | undefined;
    for (const tile of tiles) {
      const { name } = tile;
      // A device of the least limits has no room for the largest.
      if (!fits(tile, on.limits)) continue;
      const { matmul } = matmulKernels({ ...on, software: false, tiles: { [key]: name } });
      const before = on.pipelines();
      const attrs = { transposeA: transposed, transposeB: !transposed };
      const [y] = await call(on, matmul, [a, b], [f32(m, n)], attrs);
      expect(on.pipelines()).toBe(before + 1);
      if (first) expect(y, name).toEqual(first);
      else {
        first = y as Float32Array;
        expect(worst(y, product(m, n, k, left, right))).toBeLessThan(1e-6);
      }
    }
  });

  it("few rows do not depend on how many there are", async () => {
    const on = testGpu();
    const { linear } = matmulKernels({ ...on, software: false });
    const [w, x] = [uniform(1, [10, 64]), uniform(2, [3, 64])];
    const [three] = await call(on, linear, [x, w], [f32(3, 10)]);
    const [one] = await call(on, linear, [floats([1, 64], x.data.subarray(64, 128)), w], [f32(1, 10)]);
    expect(one).toEqual(three?.slice(10, 20));
  });
});
