// Grouped products and whole experts against loops in float64: blocks of every size around the border between the two
// kernels, experts without rows, rows behind the last block, storage types, folded indirect dispatches, weights split
// between experts; and that what a block gets depends on nothing but its own rows.
import type { Kernel } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, ints, testGpu, uniform } from "../call.test-util.ts";
import type { WebgpuHandle } from "../device.ts";
import { expertKernels } from "./experts.ts";
import { numberOf, stored, worst } from "./products.test-util.ts";

const f32 = (...shape: number[]) => ({ shape, dtype: "f32" as const });
const endsOf = (sizes: readonly number[]): Host => {
  let end = 0;
  return ints(
    [sizes.length],
    sizes.map((size) => {
      end += size;
      return end;
    }),
  );
};
/** Rows of which those behind the last block are NaN. */
function rowsOf(seed: number, n: number, width: number, ends: Host): Host {
  const x = uniform(seed, [n, width]);
  const data = Float32Array.from(x.data);
  data.fill(Number.NaN, Number(ends.data.at(-1)) * width);
  return floats([n, width], data);
}
/** y[i, j] = sum over l of rows[i, l] w(e, j, l) for the expert e of row i; zeros behind the last block. */
function grouped(rows: Host, ends: Host, n: number, w: (e: number, j: number, l: number) => number): Float64Array {
  const [total = 0, k = 0] = rows.shape;
  const y = new Float64Array(total * n);
  let i = 0;
  ends.data.forEach((end, e) => {
    for (; i < Math.min(end, total); i++) {
      for (let j = 0; j < n; j++) {
        for (let l = 0; l < k; l++) y[i * n + j] = (y[i * n + j] ?? 0) + numberOf(rows, i * k + l) * w(e, j, l);
      }
    }
  });
  return y;
}

const everySize = [3, 0, 1, 9, 2, 8, 35, 4, 5, 0, 6, 7];

describe.skipIf(!hasGpu).each([true, false])("grouped products, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 5 });
  const { groupedMatmul, groupedOuter } = expertKernels({ ...on, software });

  it.each([
    ["f32", everySize, 86, 20, 13],
    ["bf16", [0, 5, 1, 12], 22, 16, 12],
    ["f16", [0, 5, 1, 12], 18, 20, 9],
    ["f32", [0, 0, 0], 5, 20, 13],
    ["f32", [0, 12, 0], 12, 20, 13],
    ["f32", [1], 1, 20, 13],
    ["f32", [2, 1], 3, 0, 13],
    ["f32", [0, 0], 0, 20, 13],
  ] as const)("%s, blocks of %j in %i rows, %i to %i", async (dtype, sizes, n, width, out) => {
    const ends = endsOf(sizes);
    const experts = sizes.length;
    const w = stored(uniform(2, [experts, out, width]), dtype);
    const rows = rowsOf(1, n, width, ends);
    const [y] = await call(on, groupedMatmul, [rows, w, ends], [f32(n, out)]);
    const weight = (e: number, j: number, l: number): number => numberOf(w, (e * out + j) * width + l);
    expect(worst(y, grouped(rows, ends, out, weight))).toBeLessThan(1e-6);

    // The gradient of such a layer: of its rows, and of its weights.
    const dy = rowsOf(3, n, out, ends);
    const [dx] = await call(on, groupedMatmul, [dy, w, ends], [f32(n, width)], { transposed: true });
    expect(
      worst(
        dx,
        grouped(dy, ends, width, (e, j, l) => weight(e, l, j)),
      ),
    ).toBeLessThan(1e-6);
    if (dtype !== "f32") return;
    const [dw] = await call(on, groupedOuter, [dy, rows, ends], [f32(experts, out, width)]);
    const expected = new Float64Array(experts * out * width);
    let i = 0;
    ends.data.forEach((end, e) => {
      for (; i < end; i++) {
        for (let p = 0; p < out * width; p++) {
          const [j, l] = [Math.floor(p / width), p % width];
          const at = e * out * width + p;
          expected[at] = (expected[at] ?? 0) + numberOf(dy, i * out + j) * numberOf(rows, i * width + l);
        }
      }
    });
    expect(worst(dw, expected)).toBeLessThan(1e-6);
  });

  it("gives a block the same bits, whatever else is in the call", async () => {
    const [width, out] = [20, 13];
    const sizes = [1, 2, 3, 4, 5, 8, 9, 40];
    const ends = endsOf(sizes);
    const total = Number(ends.data.at(-1));
    const rows = rowsOf(1, total, width, ends);
    const w = uniform(2, [sizes.length, out, width]);
    const [all] = await call(on, groupedMatmul, [rows, w, ends], [f32(total, out)]);
    for (const [e, size] of sizes.entries()) {
      const start = Number(ends.data[e]) - size;
      const own = floats([size, width], Float32Array.from(rows.data).subarray(start * width, (start + size) * width));
      const weight = floats(
        [1, out, width],
        Float32Array.from(w.data).subarray(e * out * width, (e + 1) * out * width),
      );
      const [y] = await call(on, groupedMatmul, [own, weight, ints([1], [size])], [f32(size, out)]);
      expect(y, `block of ${size}`).toEqual(all?.slice(start * out, (start + size) * out));
    }
  });

  it("with weights split between experts", async () => {
    const small = testGpu({ maxStorageBufferBindingSize: 3000 });
    const kernels = expertKernels({ ...small, software });
    const [width, out] = [20, 13];
    const sizes = [2, 0, 12, 1, 9, 3, 0];
    const ends = endsOf(sizes);
    const n = 30;
    const rows = rowsOf(1, n, width, ends);
    // 1040 bytes per expert: two to a buffer.
    const w = uniform(2, [sizes.length, out, width]);
    const [y] = await call(small, kernels.groupedMatmul, [rows, w, ends], [f32(n, out)]);
    expect(
      worst(
        y,
        grouped(rows, ends, out, (e, j, l) => numberOf(w, (e * out + j) * width + l)),
      ),
    ).toBeLessThan(1e-6);
    const dy = rowsOf(3, n, out, ends);
    const [whole] = await call(on, groupedOuter, [dy, rows, ends], [f32(sizes.length, out, width)]);
    const [split] = await call(small, kernels.groupedOuter, [dy, rows, ends], [f32(sizes.length, out, width)]);
    expect(split).toEqual(whole);
  });
});

describe.skipIf(!hasGpu).each([true, false])("moeExperts, software %s", (software) => {
  if (!hasGpu) return;
  const run = async (
    kernel: Kernel<WebgpuHandle>,
    on: ReturnType<typeof testGpu>,
    dtype: "f32" | "bf16",
    [tokens, k, experts, width, hidden]: readonly [number, number, number, number, number],
    bound?: number,
  ): Promise<number> => {
    const x = uniform(1, [tokens, width]);
    const gateUp = stored(uniform(2, [experts, 2 * hidden, width]), dtype);
    const down = stored(uniform(3, [experts, width, hidden]), dtype);
    // Expert 1 serves most tokens, expert 2 none, some slots nobody.
    const ids = ints(
      [tokens, k],
      Array.from({ length: tokens * k }, (_, i) =>
        i % 11 === 3 ? -1 : i % 3 === 0 ? 1 : i % 7 === 2 ? experts - 1 : 0,
      ),
    );
    const weights = uniform(4, [tokens, k]);
    const [y] = await call(
      on,
      kernel,
      [x, gateUp, down, ids, weights],
      [f32(tokens, width)],
      bound === undefined ? {} : { bound },
    );
    const kept = [...ids.data.keys()]
      .filter((slot) => Number(ids.data[slot]) >= 0)
      .sort((s, t) => Number(ids.data[s]) - Number(ids.data[t]) || s - t)
      .slice(0, bound);
    const expected = new Float64Array(tokens * width);
    for (const slot of kept) {
      const [e, token] = [Number(ids.data[slot]), Math.floor(slot / k)];
      const dot = (line: number): number => {
        let sum = 0;
        for (let l = 0; l < width; l++)
          sum += numberOf(x, token * width + l) * numberOf(gateUp, (e * 2 * hidden + line) * width + l);
        return sum;
      };
      const inner = Array.from({ length: hidden }, (_, h) => {
        const gate = dot(h);
        return (gate / (1 + Math.exp(-gate))) * dot(hidden + h);
      });
      for (let c = 0; c < width; c++) {
        const out = inner.reduce((sum, value, h) => sum + value * numberOf(down, (e * width + c) * hidden + h), 0);
        const at = token * width + c;
        expected[at] = (expected[at] ?? 0) + out * numberOf(weights, slot);
      }
    }
    return worst(y, expected);
  };

  it.each([
    ["f32", [1, 2, 4, 12, 8]],
    ["f32", [40, 3, 5, 12, 8]],
    ["bf16", [9, 2, 4, 18, 7]],
    ["f32", [0, 2, 4, 12, 8]],
  ] as const)("%s, %j", async (dtype, sizes) => {
    const on = testGpu({ maxComputeWorkgroupsPerDimension: 5 });
    expect(await run(expertKernels({ ...on, software }).moeExperts, on, dtype, sizes)).toBeLessThan(2e-6);
  });
  it("bound below the slots; weights split between experts", async () => {
    const on = testGpu({ maxStorageBufferBindingSize: 2048 });
    const { moeExperts } = expertKernels({ ...on, software });
    expect(await run(moeExperts, on, "f32", [13, 2, 5, 12, 8], 17)).toBeLessThan(2e-6);
  });
});
