// Low-rank experts: how new ones start, ranks that differ, the frozen map beside them, what is refused. The suite of experts
// holds them to the rest.
import { describe, expect, test } from "vitest";
import { autodiff, grad, watch } from "../autodiff.ts";
import { ShapeError, UnsupportedError } from "../errors.ts";
import { close, float64, floats, ids, noise, numbers } from "../moe/moe.test-util.ts";
import type { Plan } from "../moe/plan.ts";
import { mul } from "../ops/elementwise.ts";
import { sum } from "../ops/reduce.ts";
import { random } from "../random.ts";
import { dispose, type Tensor, type Tree } from "../tensor.ts";
import { heterogeneous } from "./heterogeneous.ts";
import { adaptedLinear, hydraLora, lora } from "./lora.ts";

const [width, out, tokens] = [3, 2, 4];
const layout = { batch: 1, sequence: tokens, past: 0 };
const branch = (tree: Tree, name: string): Tree => (tree as Readonly<Record<string, Tree>>)[name] as Tree;
const leaf = (tree: Tree, name: string): Tensor => branch(tree, name) as Tensor;

test("new experts give zeros: A within 1/sqrt(width), B zero", async () => {
  const e = float64();
  const { params, apply } = lora({ count: 3, width: 16, rank: 8, alpha: 16, engine: e, random: random(e, 1) });
  const a = await numbers(leaf(params, "a"));
  expect(a.length).toBe(3 * 8 * 16);
  expect(Math.max(...a.map(Math.abs))).toBeLessThanOrEqual(0.25);
  expect(Math.max(...a)).toBeGreaterThan(0.23);
  expect(Math.min(...a)).toBeLessThan(-0.23);
  expect(new Set(await numbers(leaf(params, "b")))).toEqual(new Set([0]));
  const y = apply(params, floats(e, noise(32), [2, 16]), ids(e, [1, 1, 2], [3]), layout).output;
  expect(new Set(await numbers(y))).toEqual(new Set([0]));
});

test("one A stands under shared, and B has the output's width", () => {
  const e = float64();
  const { params } = lora({ count: 3, width, out, rank: 2, sharedA: true, engine: e, random: random(e, 1) });
  expect(leaf(branch(params, "shared"), "a").shape).toEqual([2, width]);
  expect(leaf(params, "b").shape).toEqual([3, out, 2]);
});

test("what lies beyond an expert's rank is never seen and gets no gradient", async () => {
  const e = float64();
  const ranks = [1, 3];
  const experts = lora({
    count: 2,
    width,
    out,
    rank: ranks,
    alpha: 2,
    params: { a: floats(e, noise(18, 1), [2, 3, width]), b: floats(e, noise(12, 2), [2, out, 3]) },
  });
  const rows = floats(e, noise(6, 3), [2, width]);
  const ends = ids(e, [1, 2], [2]);
  const [slopes, y] = e.scope(() => {
    const watched = watch(autodiff(e), experts.params);
    const found = experts.apply(watched, rows, ends, layout).output;
    return [grad(sum(mul(found, found)), watched), mul(experts.apply(experts.params, rows, ends, layout).output, 1)];
  });
  const [a, b] = [await numbers(leaf(slopes, "a")), await numbers(leaf(slopes, "b"))];
  // Expert 0 has rank 1: rows 1 and 2 of its A, columns 1 and 2 of its B.
  expect(a.slice(3, 9)).toEqual([0, 0, 0, 0, 0, 0]);
  expect([1, 2, 4, 5].map((i) => b[i])).toEqual([0, 0, 0, 0]);
  expect(a.slice(0, 3).every((v) => v !== 0) && a.slice(9).every((v) => v !== 0)).toBe(true);

  // The same as one set for each rank, without padding.
  const [allA, allB] = [noise(18, 1), noise(12, 2)];
  const thin = {
    a: floats(e, allA.slice(0, 3), [1, 1, width]),
    b: floats(
      e,
      [0, 3].map((i) => allB[i] ?? 0),
      [1, out, 1],
    ),
  };
  const thick = { a: floats(e, allA.slice(9), [1, 3, width]), b: floats(e, allB.slice(6), [1, out, 3]) };
  const split = heterogeneous({
    thin: lora({ count: 1, width, out, rank: 1, alpha: 2, params: thin }),
    thick: lora({ count: 1, width, out, rank: 3, alpha: 2, params: thick }),
  });
  close(await numbers(split.apply(split.params, rows, ends, layout).output), await numbers(y));
});

describe("adaptedLinear", () => {
  const setup = () => {
    const e = float64();
    const params = { a: floats(e, noise(6, 1), [2, 1, width]), b: floats(e, noise(4, 2), [2, out, 1]) };
    const experts = lora({ count: 2, width, out, rank: 1, alpha: 3, params });
    const base = { weight: floats(e, noise(6, 3), [out, width]), bias: floats(e, noise(2, 4), [out]) };
    return { e, params, experts, base, hidden: floats(e, noise(tokens * width, 5), [tokens, width]) };
  };
  /** W x + bias + Σ w (α / r) B A x in loops; `weights [tokens][2]`. */
  const loops = (weights: readonly (readonly number[])[]): number[] => {
    const [x, a, b, w, bias] = [noise(tokens * width, 5), noise(6, 1), noise(4, 2), noise(6, 3), noise(2, 4)];
    const dot = (m: readonly number[], row: number, t: number): number =>
      [0, 1, 2].reduce((total, i) => total + (m[row * width + i] ?? 0) * (x[t * width + i] ?? 0), 0);
    return weights.flatMap((own, t) =>
      [0, 1].map((o) =>
        own.reduce(
          (total, weight, e) => total + weight * 3 * (b[e * out + o] ?? 0) * dot(a, e, t),
          dot(w, o, t) + (bias[o] ?? 0),
        ),
      ),
    );
  };
  const weights = [
    [0.5, -2],
    [0, 0],
    [1, 0],
    [0, 0.25],
  ];

  test("adds weighted experts to the frozen map, for sparse and dense plans; a token without expert keeps the map", async () => {
    const { e, params, experts, base, hidden } = setup();
    const plans: Plan[] = [
      { kind: "dense", weights: floats(e, weights.flat(), [tokens, 2]) },
      {
        kind: "sparse",
        experts: ids(e, [0, 1, -1, 2, 0, -1, 1, -1], [tokens, 2]),
        weights: floats(e, [0.5, -2, 7, 7, 1, 7, 0.25, 7], [tokens, 2]),
      },
    ];
    for (const plan of plans) {
      const { output } = adaptedLinear(hidden, base, { experts, params, plan, layout });
      close(await numbers(output), loops(weights));
    }
  });

  test("a merge plan mixes the experts", async () => {
    const { e, params, experts, base, hidden } = setup();
    const plan = {
      kind: "merge",
      groups: ids(e, [1, -1, 0, 0], [tokens]),
      coefficients: [floats(e, [1, 0, 0, 1], [2, 2])],
    } as const;
    const { output } = adaptedLinear(hidden, base, { experts, params, plan, layout });
    close(
      await numbers(output),
      loops([
        [0, 1],
        [0, 0],
        [1, 0],
        [1, 0],
      ]),
    );
  });

  test("the map gets no gradient, hidden states and adapters do", async () => {
    const { e, params, experts, base, hidden } = setup();
    const before = e.live();
    const slopes = e.scope(() => {
      const all = watch(autodiff(e), { base, params, hidden });
      const plan = { kind: "dense", weights: floats(e, weights.flat(), [tokens, 2]) } as const;
      const { output } = adaptedLinear(all.hidden, all.base, { experts, params: all.params, plan, layout });
      return grad(sum(mul(output, output)), all);
    });
    expect(new Set(await numbers(slopes.base.weight))).toEqual(new Set([0]));
    expect(new Set(await numbers(slopes.base.bias))).toEqual(new Set([0]));
    for (const x of [slopes.hidden, slopes.params.a, slopes.params.b])
      expect((await numbers(x)).every((value) => value !== 0)).toBe(true);
    dispose(slopes);
    expect(e.live()).toBe(before);
  });

  test("refuses slots, and a mixture of experts that cannot mix", () => {
    const { e, params, experts, base, hidden } = setup();
    const slots = { kind: "slots", dispatch: hidden, combine: hidden } as const;
    expect(() => adaptedLinear(hidden, base, { experts, params, plan: slots, layout })).toThrow(UnsupportedError);
    const plan = { kind: "merge", groups: ids(e, [0, 0, 0, 0], [tokens]), coefficients: [] } as const;
    const stiff = { count: 2, params, apply: experts.apply };
    expect(() => adaptedLinear(hidden, base, { experts: stiff, params, plan, layout })).toThrow(
      /needs experts with mixed/,
    );
  });
});

test("impossible sizes are refused", () => {
  const e = float64();
  const from = { engine: e, random: random(e, 1) };
  expect(() => lora({ count: 0, width, rank: 1, ...from })).toThrow("lora: count = 0; expected a whole number from 1");
  expect(() => lora({ count: 2, width, rank: 1.5, ...from })).toThrow("rank = 1.5");
  expect(() => lora({ count: 2, width, rank: [1, 0], ...from })).toThrow("rank[1] = 0");
  expect(() => lora({ count: 2, width, rank: [1], ...from })).toThrow("1 ranks for 2 experts");
  expect(() => lora({ count: 2, width, rank: 1, alpha: Number.NaN, ...from })).toThrow("alpha = NaN");
  expect(() => hydraLora({ count: 2, width, rank: 1, heads: 0, ...from })).toThrow("hydraLora: heads = 0");
  const params = { a: floats(e, noise(6), [2, 1, width]) };
  expect(() => lora({ count: 2, width, rank: 1, params })).toThrow(
    'lora: parameter "b" is missing, expected [2, 3, 1]',
  );
  expect(() => lora({ count: 2, width, rank: 1, params })).toThrow(ShapeError);
  expect(e.live()).toBe(1);
});
