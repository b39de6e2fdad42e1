import {
  autodiff,
  dispose,
  type Engine,
  engine,
  entropyLast,
  grad,
  leaves,
  mul,
  random,
  reshape,
  softmax,
  sum,
  type Tensor,
  type Tree,
  watch,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { type Routed, routingChange } from "@switchyard/core/moe";
import { floats, routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { graphFamily } from "../test/families/graph.ts";
import {
  flat,
  float64,
  given,
  lists,
  readVectors,
  results,
  sparse,
  tensor,
  unmet,
  type Values,
} from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { entropyBounds, type SimilarityAwareOptions, similarityAware, similarityGraph } from "./similarity-aware.ts";
import { topK } from "./top-k.ts";

testRouter({ plugin: ({ k = 2 }) => similarityAware({ k }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => similarityAware({ k, mixing: "logits", similarity: "learned", selfWeight: 0.3, bias: true }),
  weights: "sum to 1",
});
testRouter({
  plugin: ({ k = 2 }) =>
    similarityAware({ k, similarity: "low-rank", rank: 2, neighbours: 3, renormalize: false, balance: 0.1 }),
  weights: "sum to at most 1",
});
testRouter({ plugin: ({ k = 3 }) => similarityAware({ k, window: 2, temperature: 1 }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => similarityAware({ k, window: 4, neighbours: 2, mixing: "logits", zLoss: 0 }),
  weights: "sum to 1",
});
testRouter({ plugin: ({ k = 2 }) => similarityAware({ k, causal: false }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => similarityAware({ k, causal: false, neighbours: 2, similarity: "learned" }),
  weights: "sum to 1",
});

describe("similarityAware meets its vectors", () => {
  const { cases, tolerance } = readVectors("main-graph-of-tokens");
  const own = cases.filter(({ id }) => !id.startsWith("attention"));
  it.each(own.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(graphFamily, one, tolerance)).toEqual([]);
  });
});

/** Draws of a normal distribution, in rows. */
const normals = (on: Engine, seed: number, rows: number, columns: number): number[][] => {
  const draws = random(on, seed).host("normal", rows * columns);
  return Array.from({ length: rows }, (_, i) => [...draws.subarray(i * columns, (i + 1) * columns)]);
};
const dot = (a: readonly number[], b: readonly number[]): number =>
  a.reduce((total, x, i) => total + x * (b[i] ?? 0), 0);
const softmaxOf = (row: readonly number[]): number[] => {
  const top = Math.max(...row);
  if (top === Number.NEGATIVE_INFINITY) return row.map(() => 0);
  const e = row.map((x) => Math.exp(x - top));
  const total = e.reduce((a, b) => a + b, 0);
  return e.map((x) => x / total);
};

interface Naive extends Omit<SimilarityAwareOptions, "similarity" | "temperature"> {
  readonly temperature: number;
  readonly weight: readonly (readonly number[])[];
  /** W_s itself. */
  readonly Ws: readonly (readonly number[])[];
  readonly real?: readonly number[];
}
/** The mixed probabilities of one sequence, token by token from the equations. */
function naive(u: readonly (readonly number[])[], options: Naive): number[][] {
  const { weight, Ws, temperature, causal = true, window = Infinity, neighbours = Infinity, selfWeight = 0 } = options;
  const logits = u.map((x) => weight.map((row) => dot(row, x)));
  const own = options.mixing === "logits" ? logits : logits.map(softmaxOf);
  return u.map((x, i) => {
    const scores = u.map((y, j) => {
      const visible = (!causal || j <= i) && i - j < window && options.real?.[j] !== 0;
      return visible
        ? dot(
            x,
            Ws.map((row) => dot(row, y)),
          ) / temperature
        : Number.NEGATIVE_INFINITY;
    });
    const order = [...scores.keys()].sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b);
    const kept = new Set(order.slice(0, Math.min(neighbours, u.length)));
    const S = softmaxOf(scores.map((score, j) => (kept.has(j) ? score : Number.NEGATIVE_INFINITY)));
    const mixed = (own[i] ?? []).map(
      (r, e) => selfWeight * r + (1 - selfWeight) * S.reduce((total, s, j) => total + s * (own[j]?.[e] ?? 0), 0),
    );
    return options.mixing === "logits" ? softmaxOf(mixed) : mixed;
  });
}
const close = (found: readonly number[], expected: readonly number[], tolerance = 1e-12): void => {
  expect(found.length).toBe(expected.length);
  const worst = found.reduce((most, x, i) => Math.max(most, Math.abs(x - (expected[i] ?? Number.NaN))), 0);
  expect(worst).toBeLessThanOrEqual(tolerance);
};

type Rows = readonly (readonly number[])[];
interface Call {
  readonly u: Rows;
  readonly batch?: number;
  readonly mask?: readonly number[];
  readonly experts?: number;
  /** Instead of the router's own. */
  readonly params?: Readonly<Record<string, Rows>>;
}
/** Runs a router on rows of one or more sequences and reads what `pick` takes from the answer. */
async function route<N extends string>(
  options: SimilarityAwareOptions,
  { u, batch = 1, mask, experts = 4, params }: Call,
  pick: (routed: Routed) => Record<N, Tensor>,
): Promise<Record<N, number[]>> {
  const on = float64();
  const found = await results(on, () => {
    const router = similarityAware(options).init(routerContext(on, { experts, width: u[0]?.length ?? 0 }));
    const given = Object.entries(params ?? {}).map(([name, rows]) => [name, tensor(on, rows)]);
    const input = routerInput(on, { hidden: tensor(on, u), batch, ...(mask ? { mask } : {}) });
    return pick(router.route(params ? Object.fromEntries(given) : router.params, input));
  });
  expect(on.live()).toBe(0);
  return Object.fromEntries(Object.entries<Values>(found).map(([name, x]) => [name, flat(x)])) as Record<N, number[]>;
}
const all = (routed: Routed): Record<"ids" | "weights" | "mixed", Tensor> => ({
  ids: sparse(routed).experts,
  weights: sparse(routed).weights,
  mixed: routed.probabilities as Tensor,
});

describe("similarityAware agrees with loops over tokens", () => {
  const on = float64();
  const width = 6;
  const u = normals(on, 1, 11, width);
  const weight = normals(on, 2, 4, width);
  const matrix = normals(on, 3, width, width);
  const P = normals(on, 4, 2, width);
  const eye = matrix.map((row, i) => row.map((_, j) => Number(i === j)));
  const PtP = eye.map((row, i) => row.map((_, j) => P.reduce((total, p) => total + (p[i] ?? 0) * (p[j] ?? 0), 0)));

  const options: readonly [string, SimilarityAwareOptions, Readonly<Record<string, Rows>>, Rows, number][] = [
    ["identity", { k: 2 }, {}, eye, width / 2],
    ["learned", { k: 1, similarity: "learned" }, { similarity: matrix }, matrix, Math.sqrt(width)],
    ["low rank", { k: 3, similarity: "low-rank", rank: 2 }, { similarity: P }, PtP, Math.sqrt(width)],
    ["a temperature", { k: 2, temperature: 0.7 }, {}, eye, 0.7],
    ["logits", { k: 4, mixing: "logits" }, {}, eye, width / 2],
    ["both directions", { k: 2, causal: false }, {}, eye, width / 2],
    ["self weight", { k: 2, selfWeight: 0.25 }, {}, eye, width / 2],
    ["self weight of logits", { k: 2, selfWeight: 0.25, mixing: "logits" }, {}, eye, width / 2],
    ["neighbours", { k: 2, neighbours: 3 }, {}, eye, width / 2],
    ["neighbours in both directions", { k: 2, neighbours: 3, causal: false }, {}, eye, width / 2],
    ["a window", { k: 2, window: 4 }, {}, eye, width / 2],
    ["neighbours in a window", { k: 2, window: 5, neighbours: 2 }, {}, eye, width / 2],
  ];
  it.each(options)("%s", async (_, chosen, more, Ws, temperature) => {
    const { ids, weights, mixed } = await route(chosen, { u, params: { weight, ...more } }, all);
    const expected = naive(u, { ...chosen, temperature, weight, Ws });
    close(mixed, expected.flat());
    expected.forEach((row, i) => {
      const order = [...row.keys()].sort((a, b) => (row[b] ?? 0) - (row[a] ?? 0) || a - b).slice(0, chosen.k);
      expect(ids.slice(i * chosen.k, (i + 1) * chosen.k)).toEqual(order);
      const total = order.reduce((sum, e) => sum + (row[e] ?? 0), 0);
      close(
        weights.slice(i * chosen.k, (i + 1) * chosen.k),
        order.map((e) => (row[e] ?? 0) / total),
      );
    });
  });

  it.each(options)("%s, with padding on both sides, which gets nothing", async (_, chosen, more, Ws, temperature) => {
    const real = u.map((_, i) => Number(i >= 2 && i < 9));
    const { ids, weights, mixed } = await route(chosen, { u, params: { weight, ...more }, mask: real }, all);
    const expected = naive(u, { ...chosen, temperature, weight, Ws, real });
    close(mixed.slice(2 * 4, 9 * 4), expected.slice(2, 9).flat());
    for (const i of [0, 1, 9, 10]) {
      expect(ids.slice(i * chosen.k, (i + 1) * chosen.k)).toEqual(new Array(chosen.k).fill(-1));
      expect(weights.slice(i * chosen.k, (i + 1) * chosen.k)).toEqual(new Array(chosen.k).fill(0));
    }
  });

  it.each([
    ["neighbours", { k: 2, neighbours: 5 }],
    ["a window", { k: 2, window: 20 }],
    ["a window longer than a block", { k: 2, window: 150 }],
    ["neighbours in a window", { k: 2, window: 140, neighbours: 3 }],
    ["neighbours in both directions", { k: 2, neighbours: 5, causal: false }],
  ] as const)("in blocks: %s", async (_, chosen) => {
    const long = normals(on, 5, 300, 3);
    const gates = weight.map((row) => row.slice(0, 3));
    const mask = long.map((_, i) => Number(i !== 130 && i < 290));
    const { mixed } = await route(chosen, { u: long, params: { weight: gates }, mask }, all);
    const Ws = eye.slice(0, 3).map((row) => row.slice(0, 3));
    close(mixed, naive(long, { ...chosen, temperature: 1.5, weight: gates, Ws, real: mask }).flat());
  });
});

describe("similarityAware", () => {
  const on = float64();
  const u = normals(on, 11, 14, 6);
  const own = async (
    options: SimilarityAwareOptions,
    call: Partial<Call> = {},
  ): Promise<Record<"ids" | "weights" | "mixed", number[]>> => route(options, { u, ...call }, all);

  it("never mixes sequences: a batch is its rows", async () => {
    for (const options of [{ k: 2 }, { k: 2, neighbours: 2 }, { k: 2, window: 3 }, { k: 2, causal: false }]) {
      const both = await own(options, { batch: 2 });
      const [first, second] = [await own(options, { u: u.slice(0, 7) }), await own(options, { u: u.slice(7) })];
      expect(both.ids).toEqual([...first.ids, ...second.ids]);
      expect(both.mixed).toEqual([...first.mixed, ...second.mixed]);
    }
  });

  it("is topK where a token sees itself only", async () => {
    const plain = await results(on, () => {
      const router = topK({ k: 2 }).init(routerContext(on, { experts: 4, width: 6 }));
      const routed = router.route(router.params, routerInput(on, { hidden: tensor(on, u) }));
      return { ids: sparse(routed).experts, weights: sparse(routed).weights };
    });
    for (const options of [
      { k: 2, window: 1 },
      { k: 2, window: 1, mixing: "logits" },
      { k: 2, selfWeight: 1 },
      { k: 2, selfWeight: 1, mixing: "logits" },
    ] as const) {
      const { ids, weights } = await own(options);
      expect(ids).toEqual(flat(plain.ids));
      close(weights, flat(plain.weights));
    }
  });

  it("limits that nothing exceeds change nothing", async () => {
    const free = await own({ k: 2 });
    for (const options of [
      { k: 2, neighbours: 14 },
      { k: 2, window: 14 },
      { k: 2, window: 99, neighbours: 99 },
    ]) {
      const limited = await own(options);
      expect(limited.ids).toEqual(free.ids);
      close(limited.mixed, free.mixed);
    }
  });

  it("at a high temperature gives every token the mean of what it sees", async () => {
    const base = await route({ k: 1 }, { u }, ({ logits }) => ({ r: softmax(logits as Tensor) }));
    const { mixed } = await own({ k: 1, temperature: 1e12 });
    const means = u.map((_, i) =>
      [0, 1, 2, 3].map((e) => {
        const seen = Array.from({ length: i + 1 }, (_, j) => base.r[j * 4 + e] ?? 0);
        return seen.reduce((a, b) => a + b, 0) / (i + 1);
      }),
    );
    close(mixed, means.flat(), 1e-9);
  });

  it("mixed entropy lies between its bounds, and both are met", async () => {
    const bounds = async (temperature: number): Promise<[number[], number[], number[]]> => {
      const found = await results(on, () => {
        const hidden = reshape(tensor(on, u), [1, 14, 6]);
        const graph = similarityGraph(hidden, hidden, { causal: true, temperature });
        const r = softmax(reshape(tensor(on, normals(on, 12, 14, 4)), [1, 14, 4]));
        const router = similarityAware({ k: 1, temperature }).init(routerContext(on, { experts: 4, width: 6 }));
        const { probabilities, logits } = router.route(router.params, routerInput(on, { hidden: tensor(on, u) }));
        const own = reshape(softmax(logits as Tensor), [1, 14, 4]);
        return {
          entropy: entropyLast(probabilities as Tensor),
          ...entropyBounds(graph, own),
          // Rows of S that look at one token only meet both bounds.
          ...Object.fromEntries(
            Object.entries(
              entropyBounds(similarityGraph(hidden, hidden, { causal: true, temperature, window: 1 }), r),
            ).map(([name, x]) => [`alone ${name}`, x]),
          ),
        };
      });
      close(flat(given(found, "alone lower")), flat(given(found, "alone upper")));
      return [flat(found.lower), flat(found.entropy), flat(found.upper)];
    };
    for (const temperature of [0.05, 1, 3, 100]) {
      const [lower, entropy, upper] = await bounds(temperature);
      entropy.forEach((h, i) => {
        expect(h).toBeGreaterThanOrEqual((lower[i] ?? Number.NaN) - 1e-12);
        expect(h).toBeLessThanOrEqual((upper[i] ?? Number.NaN) + 1e-12);
      });
    }
  });

  it("a learned similarity starts where the identity stands, a low-rank one on average", async () => {
    const width = 64;
    const wide = normals(on, 13, 9, width);
    const identity = await own({ k: 2 }, { u: wide });
    close((await own({ k: 2, similarity: "learned" }, { u: wide })).mixed, identity.mixed, 1e-9);
    const router = similarityAware({ k: 1, similarity: "low-rank", rank: 50 }).init(routerContext(on, { width }));
    const P = [...(await leaf(router.params, "similarity").data())];
    expect(P.length).toBe(50 * width);
    const diagonal = P.reduce((total, p) => total + p * p, 0) / width;
    expect(diagonal * Math.sqrt(width)).toBeCloseTo(2, 0);
    dispose(router.params);
    const plain = similarityAware({ k: 1, similarity: "low-rank" }).init(routerContext(on, { width: 20 }));
    expect(leaves(plain.params).map(([path, x]) => `${path} ${x.shape}`)).toEqual(["weight 5,20", "similarity 2,20"]);
    dispose(plain.params);
  });

  it("goes on after cached tokens in pieces of any size, padding at the left included", async () => {
    const mask = [0, 0, 1, 1, 1, 1, 1];
    for (const options of [
      { k: 2 },
      { k: 2, mixing: "logits", similarity: "learned" },
      { k: 2, neighbours: 2, similarity: "low-rank" },
      { k: 2, window: 3 },
    ] as const) {
      const whole = await own(options, { u: u.slice(0, 7), mask });
      const router = similarityAware(options).init(routerContext(on, { experts: 4, width: 6 }));
      for (const sizes of [
        [3, 4],
        [1, 1, 5],
        [6, 1],
      ]) {
        let cache: Tree | undefined;
        let at = 0;
        for (const size of sizes) {
          const step = on.scope(() => {
            const call = { hidden: tensor(on, u.slice(at, at + size)), past: at, mask: mask.slice(0, at + size) };
            const routed = router.route(router.params, routerInput(on, { ...call, ...(cache ? { cache } : {}) }));
            return { cache: routed.cache, ids: sparse(routed).experts, mixed: routed.probabilities as Tensor };
          });
          if (cache) dispose(cache);
          cache = step.cache;
          expect(flat(await lists(step.ids))).toEqual(whole.ids.slice(2 * at, 2 * (at + size)));
          close(flat(await lists(step.mixed)), whole.mixed.slice(4 * at, 4 * (at + size)));
          at += size;
        }
        if (cache) dispose(cache);
      }
      dispose(router.params);
    }
    expect(on.live()).toBe(0);
  });

  it("training keeps no cache", () => {
    const router = similarityAware({ k: 1 }).init(routerContext(on));
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, u), training: true });
      expect(router.route(router.params, input).cache).toBeUndefined();
      return undefined;
    });
    dispose(router.params);
  });

  it("refuses to go on without what it saw before", () => {
    const router = similarityAware({ k: 1 }).init(routerContext(on));
    const both = similarityAware({ k: 1, causal: false }).init(routerContext(on));
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, u), past: 3 });
      expect(() => router.route(router.params, input)).toThrow(
        "similarityAware: 3 tokens of 1 sequences are cached, but it got no cache of its own; hand on",
      );
      const cache = { keys: tensor(on, [[[1, 2, 3, 4, 5, 6]]]), values: tensor(on, [[[1, 2, 3, 4, 5]]]) };
      expect(() => router.route(router.params, { ...input, cache })).toThrow('"keys" of its own cache is [1,1,6]');
      expect(() => both.route(both.params, input)).toThrow(/asked to route after 3 cached tokens/);
      return undefined;
    });
    dispose([router.params, both.params]);
  });

  it("refuses options that cannot be", () => {
    const wrong =
      (options: object): (() => unknown) =>
      () =>
        similarityAware({ k: 2, ...options });
    expect(wrong({ mixing: "both" })).toThrow('similarityAware: mixing = "both"; expected "probabilities" or "logits"');
    expect(wrong({ similarity: "cosine" })).toThrow(/similarity = "cosine"; expected "identity" or "learned" or/);
    expect(wrong({ temperature: 0 })).toThrow("similarityAware: temperature = 0; expected a number above 0");
    expect(wrong({ neighbours: 0 })).toThrow("similarityAware: neighbours = 0; expected a whole number from 1");
    expect(wrong({ window: 1.5 })).toThrow(/window = 1.5/);
    expect(wrong({ rank: 2 })).toThrow('rank = 2 with similarity "identity"; only "low-rank" has one');
    expect(wrong({ window: 3, causal: false })).toThrow(/window = 3 counts back from a token, and causal is false/);
    expect(wrong({ selfWeight: 1.1 })).toThrow("selfWeight = 1.1; expected a share from 0 to 1");
    expect(wrong({ balance: -1 })).toThrow("similarityAware: balance = -1; expected a finite number from 0");
    expect(() => similarityAware({ k: 6 }).init(routerContext(on))).toThrow("similarityAware: k = 6 of 5 experts");
    expect(on.live()).toBe(0);
  });
});

/** The reference backend, and the size of the largest tensor that an op of it made. */
function measured(): { readonly on: Engine; largest(): number } {
  const inner = cpu({ precision: 64 });
  let largest = 0;
  const kernels = Object.entries(inner.kernels).map(([name, kernel]) => [
    name,
    kernel &&
      Object.assign((...[inputs, specs, attrs]: Parameters<typeof kernel>) => {
        for (const { shape } of specs)
          largest = Math.max(
            largest,
            shape.reduce((n, d) => n * d, 1),
          );
        return kernel(inputs, specs, attrs);
      }, kernel),
  ]);
  const backend: typeof inner = { ...inner, kernels: Object.fromEntries(kernels) };
  return { on: engine(backend), largest: () => largest };
}

describe("with a limit no tensor is as large as sequence x sequence, gradients included", () => {
  const length = 400;
  it.each<[string, Partial<SimilarityAwareOptions>, boolean]>([
    ["a window", { window: 10 }, true],
    ["neighbours", { neighbours: 4 }, true],
    ["neighbours in both directions", { neighbours: 4, causal: false }, true],
    ["no limit", {}, false],
  ])("%s", async (_, options, small) => {
    const { on, largest } = measured();
    const slopes = on.scope(() => {
      const router = similarityAware({ k: 1, similarity: "learned", ...options }).init(routerContext(on, { width: 3 }));
      const watched = watch(autodiff(on), { params: router.params, hidden: tensor(on, normals(on, 1, length, 3)) });
      const { hidden } = watched;
      const input = { ...routerInput(on, { hidden: floats([length, 3], new Float64Array(3 * length)) }), hidden };
      const { plan, probabilities } = router.route(watched.params, { ...input, training: true });
      if (plan.kind !== "sparse") throw new Error("a sparse plan was expected");
      return grad(sum(mul(probabilities as Tensor, tensor(on, [1, 2, 3, 4, 5]))), watched);
    });
    const found = flat(await lists(leaf(slopes.params, "similarity")));
    expect(found.some((x) => x !== 0)).toBe(true);
    dispose(slopes);
    expect(on.live()).toBe(0);
    if (small) expect(largest()).toBeLessThan((length * length) / 2);
    else expect(largest()).toBeGreaterThanOrEqual(length * length);
  });
});

// Tokens of 64 sequences of 16, each of two of eight topics; how many tokens get other experts when noise is added.
describe("input noise moves fewer tokens to other experts than under topK", () => {
  const [width, experts, sequences, length] = [12, 8, 64, 16];
  const rates = async (seed: number): Promise<Record<"topK" | "probabilities" | "logits", number>> => {
    const on = float64();
    const draw = random(on, seed);
    const centres = normals(on, seed, experts, width);
    const topics = draw.at("topics").host("uniform", sequences * 2);
    const sides = draw.at("sides").host("uniform", sequences * length);
    const noise = (name: string, scale: number): Float64Array =>
      draw
        .at(name)
        .host("normal", sequences * length * width)
        .map((z) => z * scale);
    const spread = noise("spread", 0.7);
    const clean = Float64Array.from({ length: sequences * length * width }, (_, i) => {
      const token = Math.floor(i / width);
      const side = (sides[token] ?? 0) < 0.5 ? 0 : 1;
      const topic = Math.floor((topics[2 * Math.floor(token / length) + side] ?? 0) * experts);
      return (centres[topic]?.[i % width] ?? 0) + (spread[i] ?? 0);
    });
    const extra = noise("noise", 0.3);
    const noisy = clean.map((x, i) => x + (extra[i] ?? 0));
    const weight = draw
      .at("weight")
      .host("normal", experts * width)
      .map((z) => 0.6 * z);
    const plugins = {
      topK: topK({ k: 2 }),
      probabilities: similarityAware({ k: 2, temperature: 6, causal: false }),
      logits: similarityAware({ k: 2, temperature: 6, causal: false, mixing: "logits" }),
    };
    const entries = Object.entries(plugins).map(async ([name, plugin]) => {
      const { sets } = await results(on, () => {
        const router = plugin.init(routerContext(on, { experts, width }));
        const ids = (data: Float64Array): Tensor => {
          const hidden = floats([sequences * length, width], data);
          const params = { weight: on.tensor(weight, [experts, width]) };
          return sparse(router.route(params, routerInput(on, { hidden, batch: sequences }))).experts;
        };
        return { sets: routingChange(ids(clean), ids(noisy), { experts }).sets };
      });
      return [name, flat(sets)[0] ?? Number.NaN] as const;
    });
    return Object.fromEntries(await Promise.all(entries)) as Record<"topK" | "probabilities" | "logits", number>;
  };
  it("by a quarter and more", async () => {
    const seeds = await Promise.all([1, 2, 3].map(rates));
    const mean = (name: "topK" | "probabilities" | "logits"): number =>
      seeds.reduce((total, one) => total + one[name], 0) / seeds.length;
    expect(mean("topK")).toBeGreaterThan(0.2);
    expect(mean("probabilities")).toBeLessThan(0.75 * mean("topK"));
    expect(mean("logits")).toBeLessThan(0.75 * mean("topK"));
  });
});
