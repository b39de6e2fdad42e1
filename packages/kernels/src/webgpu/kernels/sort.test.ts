// Orders and dispatch on both code paths, against Array.prototype.sort and plain loops: rows around the sizes of tiles and bins,
// ties, NaN, several levels of every scan, and dispatches folded into three dimensions.
import { describe, expect, it } from "vitest";
import { call, floats, type Host, hasGpu, ints, testGpu, uniform } from "../call.test-util.ts";
import { recordLists, sortKernels } from "./sort.ts";

const f = (x: Host): readonly number[] => Array.from(x.data);
const i32 = (...shape: number[]) => ({ shape, dtype: "i32" as const });

/** Stable order of one row; NaN last both ways. */
function orderOf(row: readonly number[], descending: boolean): number[] {
  return row
    .map((value, i) => ({ value, i }))
    .sort((a, b) => {
      const [x, y] = [Number.isNaN(a.value), Number.isNaN(b.value)];
      if (x || y) return Number(x) - Number(y) || a.i - b.i;
      if (a.value === b.value) return a.i - b.i;
      return a.value < b.value === descending ? 1 : -1;
    })
    .map(({ i }) => i);
}
function ordersOf(x: Host, descending: boolean, k?: number): number[] {
  const n = x.shape.at(-1) ?? 1;
  const rows = x.data.length / Math.max(1, n);
  return Array.from({ length: rows }, (_, r) =>
    orderOf(f(x).slice(r * n, (r + 1) * n), descending).slice(0, k ?? n),
  ).flat();
}
/** Integers from `low` up to `high`, without it. */
const integers = (seed: number, shape: readonly number[], low: number, high: number): Host =>
  ints(
    shape,
    Array.from(uniform(seed, shape).data, (x) => Math.min(high - 1, low + Math.floor(((x + 1) / 2) * (high - low)))),
  );
/** Many ties, both zeros, infinities and NaN. */
const awkward = (seed: number, shape: readonly number[]): Host =>
  floats(
    shape,
    f(integers(seed, shape, -6, 7)).map((v) =>
      v === 6
        ? Number.NaN
        : v === -6
          ? Number.NEGATIVE_INFINITY
          : v === 5
            ? Number.POSITIVE_INFINITY
            : v === 0
              ? -0
              : v / 3,
    ),
  );

/** rows, slots and ends, by a list per expert. */
function dispatchOf(ids: readonly number[], k: number, count: number, bound: number): number[][] {
  const filled = Array.from({ length: count }, (): number[] => []);
  ids.forEach((id, slot) => {
    filled[id]?.push(slot);
  });
  const slots = filled.flat().slice(0, bound);
  while (slots.length < bound) slots.push(-1);
  const ends: number[] = [];
  for (const list of filled) ends.push((ends.at(-1) ?? 0) + list.length);
  const rows = slots.map((slot) => (slot < 0 ? -1 : Math.floor(slot / k)));
  return [rows, slots, ends.map((end) => Math.min(bound, end))];
}

describe.skipIf(!hasGpu).each([true, false])("orders, software %s", (software) => {
  if (!hasGpu) return;
  const on = testGpu({ maxComputeWorkgroupsPerDimension: 3 });
  const gpu = { ...on, software };
  const kernels = sortKernels(gpu);

  it.each([
    [[5, 1], 1],
    [[7, 8], 2],
    [[3, 64], 6],
    [[9, 67], 67],
    [[2, 513], 8],
    [[2, 1500], 3],
    [[1, 5003], 50],
    [[2, 4500], 128],
    [[1, 2600], 1300],
    [[0, 5], 2],
    [[5], 0],
  ] as const)("top-k of %j, k %i", async (shape, k) => {
    for (const x of [uniform(1, shape), awkward(2, shape)]) {
      const [found] = await call(on, kernels.topkIndices, [x], [i32(...shape.slice(0, -1), k)], { k });
      expect(Array.from(found ?? [])).toEqual(ordersOf(x, true, k));
    }
  });

  it.each([[[4, 1]], [[3, 70]], [[2, 300]], [[1, 3001]], [[3, 2050]], [[2, 0]]] as const)(
    "argsort of %j",
    async (shape) => {
      const odd = ints(
        shape,
        f(integers(4, shape, -3, 3)).map((v) => (v === 2 ? 2147483647 : v === -3 ? -2147483648 : v)),
      );
      for (const x of [uniform(1, shape), awkward(2, shape), odd]) {
        for (const descending of [false, true]) {
          const [found] = await call(on, kernels.argsort, [x], [i32(...shape)], { descending });
          expect(Array.from(found ?? []), `${x.dtype} ${descending}`).toEqual(ordersOf(x, descending));
        }
      }
    },
  );

  it.each([
    [[2, 67], 7],
    [[1, 3000], 1],
    [[1, 3000], 300],
    [[3, 2500], 70_000],
  ] as const)("argsort of %j below %i", async (shape, bound) => {
    const ids = integers(3, shape, 0, bound);
    for (const x of [ids, floats(shape, ids.data)]) {
      for (const descending of [false, true]) {
        const [found] = await call(on, kernels.argsort, [x], [i32(...shape)], { descending, bound });
        expect(Array.from(found ?? []), `${x.dtype} ${descending}`).toEqual(ordersOf(x, descending));
      }
    }
  });

  it.each([
    [0, 3],
    [1031, 37],
    [9000, 5],
    [9000, 2500],
    [200, 20_000],
    [5, 0],
  ])("block ends of %i ids among %i", async (n, count) => {
    const ids = integers(n, [n], -2, count + 3);
    const [found] = await call(on, kernels.blockEnds, [ids], [i32(count)], { count });
    const ends = new Int32Array(count);
    for (const id of ids.data) if (id >= 0 && id < count) ends[id] = (ends[id] ?? 0) + 1;
    for (let e = 1; e < count; e++) ends[e] = (ends[e] ?? 0) + (ends[e - 1] ?? 0);
    expect(found).toEqual(ends);
  });

  it.each([
    [0, 2, 3, 0],
    [1, 1, 1, 1],
    [7, 2, 4, 14],
    [100, 3, 300, 211],
    [700, 3, 8, 2100],
    [1500, 2, 65, 1234],
    [2000, 8, 1000, 16_000],
    [20, 2, 5000, 40],
    [1100, 2, 70_000, 2000],
  ])("dispatch of %i x %i to %i, bound %i", async (tokens, k, count, bound) => {
    const ids = integers(tokens + count, [tokens, k], -2, count + 2);
    const specs = [i32(bound), i32(bound), i32(count)];
    const found = await call(on, kernels.dispatch, [ids], specs, { count, bound });
    expect(found.map((x) => Array.from(x))).toEqual(dispatchOf(f(ids), k, count, bound));
  });

  it.each([
    [0, 4],
    [37, 5],
    [3000, 9],
    [2500, 40_000],
  ])("lists of %i ids to %i", async (n, count) => {
    const ids = integers(n, [n], -1, count + 2);
    const list = on.upload(ids.data, ids);
    const { order, starts } = recordLists(gpu, list, n, count);
    const [ordered, started] = await Promise.all([
      on.download({ ...i32(n), handle: order }),
      on.download({ ...i32(count + 1), handle: starts }),
    ]);
    for (const handle of [list, order, starts]) on.free(handle);
    const [, slots = [], ends = []] = dispatchOf(f(ids), 1, count, n);
    expect(Array.from(started ?? [])).toEqual([0, ...ends]);
    const filled = ends.at(-1) ?? 0;
    expect(Array.from(ordered ?? []).slice(0, filled)).toEqual(slots.slice(0, filled));
  });
});
