import {
  autodiff,
  dispose,
  grad,
  leaves,
  mul,
  random,
  reshape,
  sum,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { graphFamily } from "../test/families/graph.ts";
import { flat, float64, lists, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { type AttentionAwareOptions, attentionAware } from "./attention-aware.ts";
import { leaf } from "./parts.ts";
import { topK } from "./top-k.ts";

testRouter({ plugin: ({ k = 2 }) => attentionAware({ k }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => attentionAware({ k, headAggregation: "learned", bias: true, renormalize: false }),
  weights: "sum to at most 1",
});
testRouter({
  plugin: ({ k = 2 }) => attentionAware({ k, headAggregation: "min-entropy", mixing: "logits", selfWeight: 0.2 }),
  weights: "sum to 1",
});
testRouter({
  plugin: ({ k = 2 }) =>
    attentionAware({ k, headAggregation: "min-entropy", entropyOver: "sequence", detachAttention: true }),
  weights: "sum to 1",
});

describe("attentionAware meets its vectors", () => {
  const { cases, tolerance } = readVectors("main-graph-of-tokens");
  const own = cases.filter(({ id }) => id.startsWith("attention"));
  it.each(own.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(graphFamily, one, tolerance)).toEqual([]);
  });
});

const [length, heads, width, experts] = [9, 3, 4, 5];
const on = float64();
const table = (seed: number, rows: number, columns: number): number[][] => {
  const draws = random(on, seed).host("normal", rows * columns);
  return Array.from({ length: rows }, (_, i) => [...draws.subarray(i * columns, (i + 1) * columns)]);
};
const softmaxOf = (row: readonly number[]): number[] => {
  const e = row.map((x) => Math.exp(x - Math.max(...row)));
  const total = e.reduce((a, b) => a + b, 0);
  return e.map((x) => (total === 0 || Number.isNaN(x) ? 0 : x / total));
};
/** [heads][length][length]: what causal attention with padding gives, the heads ever sharper. */
const attentionOf = (real: readonly number[]): number[][][] =>
  Array.from({ length: heads }, (_, h) =>
    table(20 + h, length, length).map((row, i) =>
      softmaxOf(row.map((x, j) => (j <= i && real[j] === 1 ? x * (1 + h) : Number.NEGATIVE_INFINITY))),
    ),
  );
const u = table(1, length, width);
const weight = table(2, experts, width);
const entropyOf = (row: readonly number[]): number => -row.reduce((h, p) => h + (p > 0 ? p * Math.log(p) : 0), 0);

/** The head that each token uses, from loops. */
function quietest(A: readonly number[][][], real: readonly number[], over: "past" | "sequence"): number[] {
  return u.map((_, i) => {
    const until = over === "past" ? i : length - 1;
    const sums = A.map((head) =>
      head.reduce((total, row, t) => total + (t <= until && real[t] === 1 ? entropyOf(row) : 0), 0),
    );
    return sums.indexOf(Math.min(...sums));
  });
}
/** The mixed probabilities with weights [token][head], from loops. */
function naive(A: readonly number[][][], shares: readonly (readonly number[])[], logits = false): number[][] {
  const raw = u.map((x) => weight.map((row) => row.reduce((total, w, i) => total + w * (x[i] ?? 0), 0)));
  const own = logits ? raw : raw.map(softmaxOf);
  return u.map((_, i) => {
    const mixed = Array.from({ length: experts }, (_, e) =>
      A.reduce((total, head, h) => {
        const seen = (head[i] ?? []).reduce((inner, a, j) => inner + a * (own[j]?.[e] ?? 0), 0);
        return total + (shares[i]?.[h] ?? 0) * seen;
      }, 0),
    );
    return logits ? softmaxOf(mixed) : mixed;
  });
}
const close = (found: readonly number[], expected: readonly number[], tolerance = 1e-12): void => {
  expect(found.length).toBe(expected.length);
  const worst = found.reduce((most, x, i) => Math.max(most, Math.abs(x - (expected[i] ?? Number.NaN))), 0);
  expect(worst).toBeLessThanOrEqual(tolerance);
};
const c = [0.4, -1, 0.7];

describe("attentionAware agrees with loops over tokens and heads", () => {
  const even = (): number[][] => u.map(() => new Array(heads).fill(1 / heads));
  const one = (chosen: readonly number[]): number[][] =>
    chosen.map((h) => Array.from({ length: heads }, (_, i) => Number(i === h)));
  type Shares = (A: readonly number[][][], real: readonly number[]) => number[][];
  const cases: readonly [string, AttentionAwareOptions, Shares][] = [
    ["mean", { k: 2 }, even],
    ["mean, logits", { k: 2, mixing: "logits" }, even],
    ["learned", { k: 1, headAggregation: "learned" }, () => u.map(() => softmaxOf(c))],
    ["min-entropy", { k: 3, headAggregation: "min-entropy" }, (A, real) => one(quietest(A, real, "past"))],
    [
      "min-entropy over the sequence",
      { k: 5, headAggregation: "min-entropy", entropyOver: "sequence" },
      (A, real) => one(quietest(A, real, "sequence")),
    ],
  ];
  it.each(
    cases.flatMap(([name, ...rest]) =>
      [false, true].map((padded) => [name + (padded ? ", padded" : ""), ...rest, padded] as const),
    ),
  )("%s", async (_, options, shares, padded) => {
    const real = u.map((_, i) => Number(!padded || (i >= 2 && i < 8)));
    const A = attentionOf(real);
    const { ids, mixed } = await results(on, () => {
      const router = attentionAware(options).init(routerContext(on, { experts, width, heads }));
      const params = {
        weight: tensor(on, weight),
        ...(options.headAggregation === "learned" ? { heads: tensor(on, c) } : {}),
      };
      const attention = (): Tensor => reshape(tensor(on, A), [1, heads, length, length]);
      const input = routerInput(on, { hidden: tensor(on, u), ...(padded ? { mask: real } : {}) });
      const routed = router.route(params, { ...input, attention });
      return { ids: sparse(routed).experts, mixed: routed.probabilities as Tensor };
    });
    const expected = naive(A, shares(A, real), options.mixing === "logits");
    const rows = (values: Values): number[][] => (values as readonly Values[]).map(flat);
    for (const [i, row] of expected.entries()) {
      const order = [...row.keys()].sort((a, b) => (row[b] ?? 0) - (row[a] ?? 0) || a - b).slice(0, options.k);
      expect(rows(ids)[i]).toEqual(real[i] === 1 ? order : new Array(options.k).fill(-1));
      if (real[i] === 1) close(rows(mixed)[i] ?? [], row);
    }
  });

  it("the heads of the test differ along the sequence, and between past and sequence", () => {
    const real = u.map(() => 1);
    const past = quietest(attentionOf(real), real, "past");
    expect(new Set(past).size).toBeGreaterThan(1);
    expect(past).not.toEqual(quietest(attentionOf(real), real, "sequence"));
  });
});

describe("attentionAware", () => {
  const start = (options: Partial<AttentionAwareOptions>) =>
    attentionAware({ k: 2, ...options }).init(routerContext(on, { experts, width, heads }));
  const causal = attentionOf(u.map(() => 1));
  const attention = (): Tensor => reshape(tensor(on, causal), [1, heads, length, length]);

  it("is topK where every token attends to itself, and at selfWeight 1", async () => {
    const diagonal = (): Tensor =>
      tensor(on, [Array.from({ length: heads }, () => u.map((_, i) => u.map((_, j) => Number(i === j))))]);
    for (const [options, looks] of [
      [{}, diagonal],
      [{ headAggregation: "min-entropy" }, diagonal],
      [{ headAggregation: "learned", mixing: "logits" }, diagonal],
      [{ selfWeight: 1 }, attention],
    ] as const) {
      const found = await results(on, () => {
        const [own, plain] = [start(options), topK({ k: 2 }).init(routerContext(on, { experts, width }))];
        const input = { ...routerInput(on, { hidden: tensor(on, u) }), attention: looks };
        const [a, b] = [sparse(own.route(own.params, input)), sparse(plain.route(plain.params, input))];
        return { ids: a.experts, weights: a.weights, expected: b.experts, expectedWeights: b.weights };
      });
      expect(found.ids).toEqual(found.expected);
      close(flat(found.weights), flat(found.expectedWeights));
    }
  });

  it("goes on after cached tokens in pieces of any size", async () => {
    for (const headAggregation of ["mean", "min-entropy", "learned"] as const) {
      const router = start({ headAggregation });
      const pass = (from: number, size: number, cache?: Tree): { mixed: Tensor; cache: Tree | undefined } =>
        on.scope(() => {
          const seen = causal.map((head) => head.slice(from, from + size).map((row) => row.slice(0, from + size)));
          const input = {
            ...routerInput(on, {
              hidden: tensor(on, u.slice(from, from + size)),
              past: from,
              ...(cache ? { cache } : {}),
            }),
            attention: () => reshape(tensor(on, seen), [1, heads, size, from + size]),
          };
          const routed = router.route(router.params, input);
          return { mixed: routed.probabilities as Tensor, cache: routed.cache };
        });
      const whole = pass(0, length);
      const expected = flat(await lists(whole.mixed));
      dispose(whole.cache ?? []);
      for (const sizes of [
        [4, 5],
        [1, 1, 7],
        [8, 1],
      ]) {
        let cache: Tree | undefined;
        let from = 0;
        for (const size of sizes) {
          const step = pass(from, size, cache);
          if (cache) dispose(cache);
          cache = step.cache;
          close(flat(await lists(step.mixed)), expected.slice(from * experts, (from + size) * experts));
          from += size;
        }
        dispose(cache ?? []);
      }
      dispose(router.params);
    }
    expect(on.live()).toBe(0);
  });

  it("gradients flow into the attention, unless it is detached", async () => {
    for (const [detachAttention, flows] of [
      [false, true],
      [true, false],
    ] as const) {
      for (const headAggregation of ["mean", "min-entropy", "learned"] as const) {
        const slope = on.scope(() => {
          const router = start({ detachAttention, headAggregation });
          const watched = watch(autodiff(on), { params: router.params, attention: attention() });
          const input = routerInput(on, { hidden: tensor(on, u), training: true });
          const routed = router.route(watched.params, { ...input, attention: () => watched.attention });
          return grad(sum(mul(routed.probabilities as Tensor, tensor(on, [1, 2, 3, 4, 5]))), watched).attention;
        });
        expect(flat(await lists(slope)).some((x) => x !== 0)).toBe(flows);
      }
    }
  });

  it("adds a parameter per head only where their weights are learned", () => {
    for (const [headAggregation, expected] of [
      ["mean", ["weight 5,4"]],
      ["min-entropy", ["weight 5,4"]],
      ["learned", ["weight 5,4", "heads 3"]],
    ] as const) {
      const { params } = start({ headAggregation });
      expect(leaves(params).map(([path, x]) => `${path} ${x.shape}`)).toEqual(expected);
      dispose(params);
    }
  });

  it("learned heads start as their mean", async () => {
    const found = await results(on, () => {
      const [mean, learned] = [start({}), start({ headAggregation: "learned" })];
      const input = { ...routerInput(on, { hidden: tensor(on, u) }), attention };
      return {
        mean: mean.route(mean.params, input).probabilities as Tensor,
        learned: learned.route({ ...mean.params, heads: leaf(learned.params, "heads") }, input).probabilities as Tensor,
      };
    });
    close(flat(found.learned), flat(found.mean));
  });

  it("is not causal where all of a sequence chooses the head", () => {
    expect(attentionAware({ k: 2, headAggregation: "min-entropy" }).causal.training).toBe(true);
    expect(attentionAware({ k: 2, entropyOver: "sequence" }).causal.training).toBe(true);
    const whole = attentionAware({ k: 2, headAggregation: "min-entropy", entropyOver: "sequence" });
    expect(whole.causal).toEqual({ training: false, evaluation: false });
  });

  it("refuses what cannot be", () => {
    const router = start({});
    on.scope(() => {
      const { attention: _, ...without } = routerInput(on, { hidden: tensor(on, u) });
      expect(() => router.route(router.params, { ...without, layer: 3 })).toThrow(
        "attentionAware: layer 3 got no attention; put it behind a block",
      );
      expect(() => router.route(router.params, { ...without, attention: () => tensor(on, [[[[1]]]]) })).toThrow(
        "attention is [1,1,1,1], expected [batch, heads, sequence, past + sequence] = [1, heads, 9, 9]",
      );
      const later = routerInput(on, { hidden: tensor(on, u), past: 2 });
      expect(() => router.route(router.params, later)).toThrow("it got no cache of its own");
      const whole = start({ headAggregation: "min-entropy", entropyOver: "sequence" });
      expect(() => whole.route(whole.params, later)).toThrow(
        /asked to route after 2 cached tokens.*entropyOver: "past"/,
      );
      return undefined;
    });
    dispose(router.params);
    const wrong =
      (options: object): (() => unknown) =>
      () =>
        attentionAware({ k: 2, ...options });
    expect(wrong({ headAggregation: "max" })).toThrow(
      'attentionAware: headAggregation = "max"; expected "mean" or "min-entropy" or "learned"',
    );
    expect(wrong({ entropyOver: "all" })).toThrow(/entropyOver = "all"/);
    expect(wrong({ mixing: "x" })).toThrow(/attentionAware: mixing = "x"/);
    expect(() => attentionAware({ k: 9 }).init(routerContext(on))).toThrow("attentionAware: k = 9 of 5 experts");
    const { heads: __, ...headless } = routerContext(on);
    expect(() => attentionAware({ k: 1, headAggregation: "learned" }).init(headless)).toThrow(
      /does not say how many heads there are/,
    );
    expect(on.live()).toBe(0);
  });
});
