// Softmax and its relatives, cross entropy, norms, softmax with top-k and rope on both code paths, against plain loops
// in double precision: teams of every size, rows in pieces, dispatches folded into three dimensions, hidden, infinite
// and undefined entries.
import type { Spec, TypedArray } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, ints, testGpu, uniform } from "../call.test-util.ts";
import { normaliseKernels } from "./normalise.ts";

const f32 = (...shape: readonly number[]): Spec => ({ shape, dtype: "f32" });
const i32 = (...shape: readonly number[]): Spec => ({ shape, dtype: "i32" });
const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number;
const total = (row: readonly number[]): number => row.reduce((sum, value) => sum + value, 0);
const get = (list: ArrayLike<number>, i: number): number => list[i] as number;

const rowsOf = ({ shape, data }: Host): number[][] => {
  const n = shape.at(-1) as number;
  return Array.from({ length: data.length / n }, (_, r) => Array.from(data.subarray(r * n, (r + 1) * n)));
};
/** Numbers from -10 to 10 around another level in each row: what must be subtracted before exponentials. */
const logits = (seed: number, shape: readonly number[]): Host => {
  const n = shape.at(-1) as number;
  const levels = [0, -500, 90, 2000];
  return floats(
    shape,
    uniform(seed, shape).data.map((value, i) => 10 * value + get(levels, Math.floor(i / n) % 4)),
  );
};

function lseOf(row: readonly number[]): number {
  if (row.some((x) => Number.isNaN(x) || x === high)) return nan;
  const top = row.reduce((a, b) => Math.max(a, b), low);
  return top === low ? low : top + Math.log(total(row.map((x) => Math.exp(x - top))));
}
function softmaxOf(row: readonly number[]): number[] {
  const lse = lseOf(row);
  return row.map((x) => (lse === low ? 0 : Math.exp(x - lse)));
}

/** |found - expected| <= allowed * scale, where scale is the largest finite magnitude expected (at least `floor`). */
function near(found: TypedArray | undefined, expected: readonly number[], allowed = 1e-6, floor = 1e-3): void {
  const scale = expected.reduce((most, x) => (Number.isFinite(x) ? Math.max(most, Math.abs(x)) : most), floor);
  expect(found?.length).toBe(expected.length);
  let [worst, place] = [0, 0];
  expected.forEach((value, i) => {
    const other = get(found as TypedArray, i);
    if (Object.is(other, value) || other === value) return;
    const error = Math.abs(other - value) / scale;
    if (!(error <= worst)) [worst, place] = [Number.isNaN(error) ? high : error, i];
  });
  expect(worst, `at ${place}: ${found?.[place]}, expected ${expected[place]}`).toBeLessThanOrEqual(allowed);
}

const shapes = [[[7]], [[1, 1]], [[11, 3]], [[3, 37, 61]], [[5, 257]], [[3, 4_099]], [[2, 20_011]]];
const awkward = floats(
  [6, 3],
  [low, low, low, low, 2, low, 1, nan, 0, high, 0, low, -0.5, -1000, -2000, -3.3e38, -3.3e38, low],
);
const hidden = floats([3, 3], [low, 2, low, -0.5, -1000, -2000, 1, low, 1]);

describe.skipIf(!hasGpu).each([true, false])("rows, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
  const kernels = normaliseKernels({ ...on, software });

  describe("softmax", () => {
    it.each(shapes)("%j", async (shape) => {
      const x = logits(1, shape);
      const [softmax] = await call(on, kernels.softmax, [x], [x]);
      near(softmax, rowsOf(x).flatMap(softmaxOf));
      const [logSoftmax] = await call(on, kernels.logSoftmax, [x], [x]);
      const logs = rowsOf(x).flatMap((row) => {
        const lse = lseOf(row);
        return row.map((value) => value - lse);
      });
      near(logSoftmax, logs, 3e-7);
      const [lse] = await call(on, kernels.logSumExp, [x], [f32(...shape.slice(0, -1), 1)]);
      near(lse, rowsOf(x).map(lseOf), 2e-7);
    });

    it("of hidden, infinite and undefined entries", async () => {
      const [softmax] = await call(on, kernels.softmax, [awkward], [awkward]);
      const expected = [0, 0, 0, 0, 1, 0, nan, nan, nan, nan, nan, nan, 1, 0, 0, 0, 0, 0];
      near(softmax, expected);
      const [lse] = await call(on, kernels.logSumExp, [awkward], [f32(6, 1)]);
      expect(Array.from(lse as Float32Array)).toEqual([low, 2, nan, nan, -0.5, low]);
      const [logSoftmax] = await call(on, kernels.logSoftmax, [hidden], [hidden]);
      const half = -Math.LN2;
      near(logSoftmax, [low, 0, low, 0, -999.5, -1999.5, half, low, half], 1e-7);
    });

    it("of wide rows with hidden entries, NaN, or nothing else", async () => {
      const n = 16_411;
      const x = uniform(2, [4, n]);
      x.data.fill(low, 0, n - 1);
      x.data.fill(low, n, 2 * n);
      x.data[3 * n - 5] = nan;
      // Pieces of very different weight.
      for (let i = 0; i < n; i++) x.data[3 * n + i] = (20 * i) / n + get(x.data, 3 * n + i);
      const [softmax] = await call(on, kernels.softmax, [x], [x]);
      near(softmax, rowsOf(x).flatMap(softmaxOf));
      const [lse] = await call(on, kernels.logSumExp, [x], [f32(4, 1)]);
      near(lse, rowsOf(x).map(lseOf), 2e-7);
    });

    it.skipIf(software)("of a row with more pieces than a team has lanes", async () => {
      const n = 300 * 4096 + 5;
      const x = uniform(2, [1, n]);
      for (let i = 0; i < n; i++) x.data[i] = get(x.data, i) - (20 * i) / n;
      const [lse] = await call(on, kernels.logSumExp, [x], [f32(1, 1)]);
      near(lse, rowsOf(x).map(lseOf), 1e-7);
    });

    it("of nothing", async () => {
      const x = floats([3, 0], []);
      expect((await call(on, kernels.softmax, [x], [x]))[0]).toHaveLength(0);
      expect((await call(on, kernels.softmaxGrad, [x, x], [x]))[0]).toHaveLength(0);
    });

    it.each(shapes)("gradients %j", async (shape) => {
      const y = uniform(3, shape);
      const dy = uniform(4, shape);
      const [dys, ys] = [rowsOf(dy), rowsOf(y)];
      const [dx] = await call(on, kernels.softmaxGrad, [y, dy], [y]);
      const expected = ys.flatMap((row, r) => {
        const sum = total(row.map((value, i) => value * get(dys[r] ?? [], i)));
        return row.map((value, i) => value * (get(dys[r] ?? [], i) - sum));
      });
      near(dx, expected);
      const logs = floats(
        shape,
        y.data.map((value) => 20 * (value - 1)),
      );
      const [dlogits] = await call(on, kernels.logSoftmaxGrad, [logs, dy], [y]);
      const slopes = rowsOf(logs).flatMap((row, r) => {
        const sum = total(dys[r] ?? []);
        return row.map((value, i) => get(dys[r] ?? [], i) - Math.exp(value) * sum);
      });
      near(dlogits, slopes, 2e-6);
    });
  });

  describe("cross entropy", () => {
    it.each<readonly [number, number]>([
      [1, 1],
      [13, 2],
      [37, 61],
      [5, 1_031],
      [2, 150_001],
    ])("%i rows of %i", async (rows, n) => {
      const x = logits(5, [rows, n]);
      const labels = ints(
        [rows],
        Array.from(
          { length: rows },
          (_, r) => (r % 3 === 2 ? [-1, n, -7][r % 9 > 4 ? 1 : 0] : (r * 7919) % n) as number,
        ),
      );
      const [losses, lse] = await call(on, kernels.crossEntropy, [x, labels], [f32(rows), f32(rows)]);
      const lses = rowsOf(x).map(lseOf);
      const inside = (r: number): boolean => get(labels.data, r) >= 0 && get(labels.data, r) < n;
      near(lse, lses, 2e-7);
      const expected = rowsOf(x).map((row, r) => (inside(r) ? get(lses, r) - get(row, get(labels.data, r)) : 0));
      near(losses, expected, 5e-7);
      const dloss = uniform(6, [rows]);
      const total = floats([rows], lses);
      const [dx] = await call(on, kernels.crossEntropyGrad, [x, labels, total, dloss], [x]);
      const slopes = rowsOf(x).flatMap((row, r) =>
        row.map((value, i) => {
          if (!inside(r)) return 0;
          return (Math.exp(value - get(total.data, r)) - (i === labels.data[r] ? 1 : 0)) * get(dloss.data, r);
        }),
      );
      near(dx, slopes, 2e-6);
    });

    it("keeps the digits of losses near 0 and passes NaN on", async () => {
      const x = floats([4, 3], [12, 0, 1, 1000, 985, 990, nan, 1, 2, nan, 1, 2]);
      const labels = ints([4], [0, 0, 1, -1]);
      const [losses] = await call(on, kernels.crossEntropy, [x, labels], [f32(4), f32(4)]);
      const expected = [Math.log1p(Math.exp(-12) + Math.exp(-11)), Math.log1p(Math.exp(-15) + Math.exp(-10))];
      expect(Math.abs(get(losses as Float32Array, 0) / get(expected, 0) - 1)).toBeLessThan(5e-3);
      expect(Math.abs(get(losses as Float32Array, 1) / get(expected, 1) - 1)).toBeLessThan(5e-3);
      expect(Array.from(losses as Float32Array).slice(2)).toEqual([nan, 0]);
    });

    it("of no rows", async () => {
      const none = await call(on, kernels.crossEntropy, [floats([0, 5], []), ints([0], [])], [f32(0), f32(0)]);
      expect(none.map(({ length }) => length)).toEqual([0, 0]);
    });
  });

  describe("norms", () => {
    const eps = 1e-5;
    const sizes = [[[7]], [[11, 3]], [[1, 1]], [[2, 37, 61]], [[3, 5_003]], [[1_201, 67]], [[2_309, 9]]];
    const parts = (shape: readonly number[]) => {
      const n = shape.at(-1) as number;
      const [x, dy] = [uniform(7, shape), uniform(8, shape)];
      // No row near a constant: a layer norm would blow its rounding up.
      x.data.forEach((value, i) => {
        x.data[i] = value + (i % 2 === 0 ? 2 : -1) + (Math.floor(i / n) % 5);
      });
      return { n, x, dy, w: uniform(9, [n]), b: uniform(10, [n]) };
    };
    /** Sums over the rows of what each row gives. */
    const columns = (n: number, rows: readonly (readonly number[])[]): number[] =>
      Array.from({ length: n }, (_, c) => total(rows.map((row) => get(row, c))));

    it.each(sizes)("rmsNorm %j", async (shape) => {
      const { n, x, dy, w } = parts(shape);
      const dys = rowsOf(dy);
      const rows = rowsOf(x).map((row, r) => {
        const scale = 1 / Math.sqrt(total(row.map((value) => value * value)) / n + eps);
        const unit = row.map((value) => value * scale);
        const g = unit.map((_, i) => get(dys[r] ?? [], i) * get(w.data, i));
        const along = total(g.map((value, i) => value * get(unit, i))) / n;
        return {
          y: unit.map((value, i) => value * get(w.data, i)),
          dx: g.map((value, i) => (value - get(unit, i) * along) * scale),
          dw: unit.map((value, i) => value * get(dys[r] ?? [], i)),
        };
      });
      const [y] = await call(on, kernels.rmsNorm, [x, w], [x], { eps });
      near(
        y,
        rows.flatMap((row) => row.y),
      );
      const [dx, dw] = await call(on, kernels.rmsNormGrad, [x, w, dy], [x, w], { eps });
      near(
        dx,
        rows.flatMap((row) => row.dx),
        2e-6,
        1,
      );
      near(
        dw,
        columns(
          n,
          rows.map((row) => row.dw),
        ),
        2e-6,
      );
    });

    it.each(sizes)("layerNorm %j", async (shape) => {
      const { n, x, dy, w, b } = parts(shape);
      const dys = rowsOf(dy);
      const rows = rowsOf(x).map((row, r) => {
        const mean = total(row) / n;
        const centred = row.map((value) => value - mean);
        const scale = 1 / Math.sqrt(total(centred.map((value) => value * value)) / n + eps);
        const unit = centred.map((value) => value * scale);
        const g = unit.map((_, i) => get(dys[r] ?? [], i) * get(w.data, i));
        const [level, along] = [total(g) / n, total(g.map((value, i) => value * get(unit, i))) / n];
        return {
          y: unit.map((value, i) => value * get(w.data, i) + get(b.data, i)),
          dx: g.map((value, i) => (value - level - get(unit, i) * along) * scale),
          dw: unit.map((value, i) => value * get(dys[r] ?? [], i)),
        };
      });
      const [y] = await call(on, kernels.layerNorm, [x, w, b], [x], { eps });
      near(
        y,
        rows.flatMap((row) => row.y),
        2e-6,
      );
      const [dx, dw, db] = await call(on, kernels.layerNormGrad, [x, w, dy], [x, w, w], { eps });
      near(
        dx,
        rows.flatMap((row) => row.dx),
        3e-6,
        1,
      );
      near(
        dw,
        columns(
          n,
          rows.map((row) => row.dw),
        ),
        2e-6,
      );
      near(db, columns(n, dys), 2e-6);
    });

    it("keeps the digits of a layer norm far from 0", async () => {
      const n = 300;
      const x = floats(
        [2, n],
        uniform(11, [2, n]).data.map((value) => 4096 + Math.round(8 * value)),
      );
      const [w, b] = [floats([n], new Array(n).fill(1)), floats([n], new Array(n).fill(0))];
      const expected = rowsOf(x).flatMap((row) => {
        const mean = total(row) / n;
        const scale = 1 / Math.sqrt(total(row.map((value) => (value - mean) ** 2)) / n + eps);
        return row.map((value) => (value - mean) * scale);
      });
      const [y] = await call(on, kernels.layerNorm, [x, w, b], [x], { eps });
      // The mean itself is only good to 4096 * 2^-24, against a deviation of about 5.
      near(y, expected, 1e-4);
    });

    it("of no rows: weights without gradient", async () => {
      const [x, w] = [floats([0, 5], []), uniform(12, [5])];
      const [, dw] = await call(on, kernels.rmsNormGrad, [x, w, x], [x, w], { eps });
      expect(Array.from(dw as Float32Array)).toEqual([0, 0, 0, 0, 0]);
      const [, dw2, db] = await call(on, kernels.layerNormGrad, [x, w, x], [x, w, w], { eps });
      expect([...(dw2 as Float32Array), ...(db as Float32Array)]).toEqual(new Array(10).fill(0));
    });
  });

  describe.each(["softmax-topk-renormalise", "softmax-topk", "topk-softmax"] as const)("%s", (order) => {
    function expected(x: Host, k: number): { weights: number[]; ids: number[]; probabilities: number[] } {
      const rows = rowsOf(x).map((row) => {
        const rank = (value: number): number => (Number.isNaN(value) ? low : value);
        const ids = row
          .map((value, id) => ({ value, id }))
          .sort((a, b) => {
            const undefinedOnes = Number(Number.isNaN(a.value)) - Number(Number.isNaN(b.value));
            if (undefinedOnes !== 0 || rank(a.value) === rank(b.value)) return undefinedOnes || a.id - b.id;
            return rank(a.value) < rank(b.value) ? 1 : -1;
          })
          .map(({ id }) => id)
          .slice(0, k);
        const probabilities = softmaxOf(row);
        const chosen = ids.map((id) => get(probabilities, id));
        const weights =
          order === "softmax-topk"
            ? chosen
            : order === "topk-softmax"
              ? softmaxOf(ids.map((id) => get(row, id)))
              : chosen.map((value) => value / total(chosen));
        return { weights, ids, probabilities };
      });
      return {
        weights: rows.flatMap((row) => row.weights),
        ids: rows.flatMap((row) => row.ids),
        probabilities: rows.flatMap((row) => row.probabilities),
      };
    }
    async function check(x: Host, k: number): Promise<void> {
      const [n, experts] = x.shape as readonly [number, number];
      const found = await call(on, kernels.softmaxTopk, [x], [f32(n, k), i32(n, k), f32(n, experts)], { k, order });
      const { weights, ids, probabilities } = expected(x, k);
      expect(Array.from(found[1] as Int32Array)).toEqual(ids);
      near(found[0], weights);
      near(found[2], probabilities);
    }

    it.each<readonly [number, number, number]>([
      [37, 8, 2],
      [4, 5, 5],
      [3, 1, 1],
      [0, 4, 2],
      [67, 61, 6],
      [5, 128, 8],
      [3, 257, 257],
      [2, 1_024, 3],
    ])("%i tokens, %i experts, k %i", async (n, experts, k) => {
      await check(logits(n * experts, [n, experts]), k);
    });

    it("ties, both zeros, hidden, infinite and undefined logits", async () => {
      const rows = [
        [1, 1, 1, 1, 1],
        [0, -0, 2, 2, 0],
        [low, 1, low, 0, low],
        [low, low, low, low, low],
        [nan, 1, nan, 3, 2],
        [nan, nan, nan, nan, nan],
        [high, 1, 0, high, 2],
        [low, nan, low, low, nan],
      ];
      const x = floats([rows.length, 5], rows.flat());
      for (const k of [1, 2, 4, 5]) await check(x, k);
    });
  });

  it("refuses more experts than workgroup memory ranks", () => {
    expect(kernels.softmaxTopk.unsupported?.([f32(2, 1025)], { k: 1 })).toContain("1025 experts");
    expect(kernels.softmaxTopk.unsupported?.([f32(2, 1024)], { k: 1 })).toBeUndefined();
  });

  describe("rope", () => {
    const table = [
      [[2, 5, 3, 8], 8, false],
      [[2, 5, 3, 8], 8, true],
      [[3, 7, 2, 10], 6, false],
      [[1, 1, 1, 3], 2, true],
      [[2, 3, 2, 5], 0, false],
      [[2, 0, 2, 4], 4, false],
      [[2, 67, 4, 16], 16, true],
    ] as const;
    it.each(table)("%j, the first %i turn, a table per batch: %s", async (shape, turned, batched) => {
      const [batch, sequence, heads, d] = shape;
      const half = turned / 2;
      const x = uniform(13, shape);
      const tableShape = batched ? [batch, sequence, half] : [sequence, half];
      const angles = uniform(14, tableShape).data.map((value) => 3 * value);
      const tables = [floats(tableShape, angles.map(Math.cos)), floats(tableShape, angles.map(Math.sin))];
      for (const interleaved of [false, true]) {
        for (const inverse of [false, true]) {
          const expected = Array.from(x.data);
          for (let b = 0; b < batch; b++) {
            for (let s = 0; s < sequence; s++) {
              for (let h = 0; h < heads; h++) {
                for (let i = 0; i < half; i++) {
                  const start = ((b * sequence + s) * heads + h) * d;
                  const [first, second] = interleaved
                    ? [start + 2 * i, start + 2 * i + 1]
                    : [start + i, start + half + i];
                  const angle = get(angles, ((batched ? b * sequence : 0) + s) * half + i) * (inverse ? -1 : 1);
                  const [c, t] = [Math.cos(angle), Math.sin(angle)];
                  const [u, v] = [get(x.data, first), get(x.data, second)];
                  expected[first] = u * c - v * t;
                  expected[second] = v * c + u * t;
                }
              }
            }
          }
          const [y] = await call(on, kernels.rope, [x, ...tables], [x], { interleaved, inverse });
          near(y, expected, 3e-7);
        }
      }
    });
  });
});
