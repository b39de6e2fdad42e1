// The transformer against naive loops, cached against uncached, step against forward, refusals, counts and live
// handles.
import {
  type Engine,
  leaves,
  mul,
  random,
  sum,
  type Tensor,
  type Tree,
  UnsupportedError,
  valueAndGrad,
} from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import { loudModel, makeEngine, naiveForward, plainTopK, readAll, smallConfig } from "./models.test-util.ts";
import { parameterCounts } from "./parameter-counts.ts";
import { type Transformer, transformer } from "./transformer.ts";
import { parameterShapes, type TransformerConfig } from "./transformer-config.ts";

const idsOf = (on: Engine, rows: readonly (readonly number[])[]): Tensor =>
  on.tensor(Int32Array.from(rows.flat()), [rows.length, rows[0]?.length ?? 0]);
const logitsOf = async (model: Transformer, rows: readonly (readonly number[])[], options = {}): Promise<number[]> => {
  const { logits } = model.forward(model.params, idsOf(model.engine, rows), options);
  return Array.from(await logits.data());
};
const close = (a: readonly number[], b: readonly number[], tolerance: number): void => {
  expect(a.length).toBe(b.length);
  let worst = 0;
  for (const [i, x] of a.entries()) worst = Math.max(worst, Math.abs(x - (b[i] ?? Number.NaN)));
  expect(worst).toBeLessThan(tolerance);
};

const variants: [string, Partial<TransformerConfig>, number][] = [
  ["grouped queries", {}, 2],
  ["one head of keys, plain head size", { kvHeads: 1, headSize: 2 }, 2],
  ["norms of heads, tied embeddings", { qkNorm: "head", tieEmbeddings: true, ropeTheta: 500 }, 2],
  ["norms of projections, clipped", { qkNorm: "projection", clipQkv: 0.7, normEps: 0.01 }, 2],
  ["shared experts, every expert", { sharedExperts: 2, router: plainTopK(5) }, 5],
  ["one expert, one layer", { experts: 1, layers: 1, router: plainTopK(1) }, 1],
];

describe("forward", () => {
  it.each(variants)("equals naive loops: %s", async (_, change, k) => {
    const on = makeEngine(64);
    const config = { ...smallConfig, ...change };
    const model = loudModel(on, config);
    const params = await readAll(model.params);
    const rows = [
      [1, 5, 12, 0, 7],
      [3, 3, 3, 9, 2],
    ];
    const expected = rows.flatMap((ids) => naiveForward(config, params, ids, k)).flat();
    expect(Math.max(...expected.map(Math.abs))).toBeGreaterThan(0.5);
    close(await logitsOf(model, rows), expected, 1e-9);
  });

  it("gives each layer's routing, and frees everything else", async () => {
    const on = makeEngine();
    const model = loudModel(on, smallConfig);
    const before = on.live();
    const ids = idsOf(on, [[1, 2, 3]]);
    on.scope(() => {
      const { logits, routed } = model.forward(model.params, ids);
      expect(logits.shape).toEqual([1, 3, 13]);
      expect(routed.map(({ plan }) => plan.kind)).toEqual(["sparse", "sparse"]);
    });
    ids.dispose();
    expect(on.live()).toBe(before);
  });

  it("ignores padding, on either side", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, smallConfig);
    const alone = await logitsOf(model, [[4, 1, 6]]);
    const mask = on.tensor(Float32Array.of(0, 0, 1, 1, 1, 1, 1, 1, 0, 0), [2, 5]);
    const both = await logitsOf(
      model,
      [
        [9, 9, 4, 1, 6],
        [4, 1, 6, 2, 2],
      ],
      { mask },
    );
    close(both.slice(2 * 13, 5 * 13), alone, 1e-9);
    close(both.slice(5 * 13, 8 * 13), alone, 1e-9);
  });

  it("has the gradients of finite differences", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, { ...smallConfig, qkNorm: "head", sharedExperts: 1, width: 4, layers: 1, experts: 3 });
    const ids = idsOf(on, [[1, 2, 3, 1]]);
    const weights = on.tensor(random(on, 9).host("normal", 4 * 13), [1, 4, 13]);
    const loss = (params: Tree): Tensor => sum(mul(model.forward(params, ids).logits, weights));
    const { grads } = valueAndGrad((params: Tree) => [loss(params), []], model.params);
    const analytic = new Map(leaves(grads));
    for (const [path, x] of leaves(model.params)) {
      const values = Float64Array.from(await x.data());
      const index = (7 * path.length) % values.length;
      const nudged = async (by: number): Promise<number> => {
        const changed = Float64Array.from(values);
        changed[index] = (changed[index] ?? 0) + by;
        const replacement = on.tensor(changed, x.shape);
        const [value = 0] = await loss(swap(model.params, x, replacement)).data();
        return value;
      };
      const numeric = ((await nudged(1e-5)) - (await nudged(-1e-5))) / 2e-5;
      const found = (await analytic.get(path)?.data())?.[index] ?? Number.NaN;
      expect(Math.abs(found - numeric) / Math.max(1, Math.abs(numeric)), path).toBeLessThan(1e-6);
    }
  });
});

const swap = (tree: Tree, from: Tensor, to: Tensor): Tree => {
  if (tree === from) return to;
  if (Array.isArray(tree)) return tree.map((child: Tree) => swap(child, from, to));
  if ("dtype" in tree) return tree;
  return Object.fromEntries(Object.entries(tree).map(([key, child]) => [key, swap(child as Tree, from, to)]));
};

describe("cache and step", () => {
  const prompt = [2, 11, 0, 5, 5, 8, 1];

  it("decodes as without a cache, in pieces of any size", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, smallConfig);
    const whole = await logitsOf(model, [prompt]);
    for (const sizes of [[1, 1, 1, 1, 1, 1, 1], [3, 4], [7], [6, 1]]) {
      const cache = model.newCache(1);
      const parts: number[] = [];
      let at = 0;
      for (const size of sizes) {
        parts.push(...(await logitsOf(model, [prompt.slice(at, at + size)], { cache })));
        at += size;
        expect(cache.length).toBe(at);
      }
      close(parts, whole, 1e-9);
      cache.dispose();
    }
  });

  it("step gives the last logits and leaves nothing behind", async () => {
    const on = makeEngine();
    const model = loudModel(on, { ...smallConfig, sharedExperts: 1 });
    const rows = [prompt, [...prompt].reverse()];
    const whole = await logitsOf(model, rows);
    const before = on.live();
    const ids = idsOf(on, rows);
    const last = await model.step(ids);
    expect(last.shape).toEqual([2, 13]);
    const found = Array.from(await last.data());
    expect(found).toEqual([...whole.slice(6 * 13, 7 * 13), ...whole.slice(13 * 13, 14 * 13)]);
    ids.dispose();
    last.dispose();
    expect(on.live()).toBe(before);
  });

  it("step with a cache equals forward with a cache, bit for bit", async () => {
    const on = makeEngine();
    const model = loudModel(on, smallConfig);
    const before = on.live();
    const [one, two] = [model.newCache(1), model.newCache(1)];
    for (const piece of [prompt.slice(0, 3), prompt.slice(3, 4), prompt.slice(4)]) {
      const ids = idsOf(on, [piece]);
      const last = await model.step(ids, { cache: one });
      const expected = on.scope(() => ({ logits: model.forward(model.params, ids, { cache: two }).logits }));
      expect(Array.from(await last.data())).toEqual(Array.from(await expected.logits.data()).slice(-13));
      for (const x of [ids, last, expected.logits]) x.dispose();
    }
    expect(one.length).toBe(7);
    one.dispose();
    two.dispose();
    expect(on.live()).toBe(before);
  });

  it("reorders, multiplies and truncates rows", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, smallConfig);
    const rows = [
      [1, 2, 3, 4],
      [5, 6, 7, 8],
    ];
    const cache = model.newCache(2);
    await logitsOf(model, rows, { cache });
    cache.truncate(3);
    cache.reorder([1, 1, 0]);
    const next = await logitsOf(model, [[9], [10], [11]], { cache });
    const expected = await logitsOf(model, [
      [5, 6, 7, 9],
      [5, 6, 7, 10],
      [1, 2, 3, 11],
    ]);
    close(
      next,
      [3, 7, 11].flatMap((i) => expected.slice(i * 13, (i + 1) * 13)),
      1e-9,
    );
    expect(() => cache.truncate(9)).toThrow(/cut to 9 positions, it holds 4/);
    expect(() => cache.reorder([3])).toThrow(/row 3 of a batch of 3/);
    cache.truncate(0);
    expect(cache.length).toBe(0);
    close(
      await logitsOf(model, rows.concat([[0, 0, 0, 0]]), { cache }),
      await logitsOf(model, rows.concat([[0, 0, 0, 0]])),
      1e-9,
    );
  });

  it("keeps the cache as it was when a pass fails half-way", async () => {
    const on = makeEngine();
    let fail = false;
    const inner = plainTopK(2);
    const router: RouterPlugin = {
      ...inner,
      init(context) {
        const made = inner.init(context);
        return {
          ...made,
          route(params, input) {
            if (fail && input.layer === 1) throw new Error("no route");
            return made.route(params, input);
          },
        };
      },
    };
    const model = loudModel(on, { ...smallConfig, router });
    const cache = model.newCache(1);
    await logitsOf(model, [[1, 2]], { cache });
    const live = on.live();
    fail = true;
    const ids = idsOf(on, [[3]]);
    expect(() => model.forward(model.params, ids, { cache })).toThrow("no route");
    await expect(model.step(ids, { cache })).rejects.toThrow("no route");
    ids.dispose();
    expect(cache.length).toBe(2);
    expect(on.live()).toBe(live);
    fail = false;
    close(await logitsOf(model, [[3]], { cache }), (await logitsOf(model, [[1, 2, 3]])).slice(-13), 1e-5);
  });
});

describe("what routers get", () => {
  it("carry from layer to layer, cache along the sequence, attention on demand, tokens and layout", async () => {
    const on = makeEngine(64);
    const seen: {
      layer: number;
      carried: boolean;
      past: number;
      cached: number;
      attention: number[];
      sums: number[];
      ids: number[];
    }[] = [];
    const inner = plainTopK(1);
    const router: RouterPlugin = {
      ...inner,
      needs: ["attention", "carry", "tokenIds"],
      init(context) {
        const made = inner.init(context);
        return {
          ...made,
          route(params, input) {
            const { batch, sequence, past } = input.layout;
            const p = input.attention?.() as Tensor;
            const total = on.tensor(new Float32Array(batch * (past + sequence)), [batch, past + sequence]);
            pending.push(
              Promise.all([p.data(), input.tokenIds?.data()]).then(([values, ids]) => {
                const rows = Array.from({ length: p.size / (past + sequence) }, (_, r) =>
                  Array.from(values.slice(r * (past + sequence), (r + 1) * (past + sequence))).reduce(
                    (a, b) => a + b,
                    0,
                  ),
                );
                seen.push({
                  layer: input.layer,
                  carried: input.carry !== undefined,
                  past,
                  cached: (input.cache as { total: Tensor } | undefined)?.total.shape[1] ?? 0,
                  attention: [...p.shape],
                  sums: rows,
                  ids: Array.from(ids ?? []),
                });
              }),
            );
            const routed = { ...made.route(params, input), carry: { hidden: input.hidden } };
            // At the third step it returns no new state: the earlier one stays.
            return past === 4 ? routed : { ...routed, cache: { total } };
          },
        };
      },
    };
    const pending: Promise<void>[] = [];
    const model = loudModel(on, { ...smallConfig, router });
    const live = on.live();
    const cache = model.newCache(1);
    for (const piece of [[1, 2, 3], [4], [5], [6]]) {
      const ids = idsOf(on, [piece]);
      (await model.step(ids, { cache })).dispose();
      ids.dispose();
    }
    await Promise.all(pending);
    expect(
      seen.map(({ layer, carried, past, cached, attention, ids }) => ({
        layer,
        carried,
        past,
        cached,
        attention,
        ids,
      })),
    ).toEqual([
      { layer: 0, carried: false, past: 0, cached: 0, attention: [1, 4, 3, 3], ids: [1, 2, 3] },
      { layer: 1, carried: true, past: 0, cached: 0, attention: [1, 4, 3, 3], ids: [1, 2, 3] },
      { layer: 0, carried: false, past: 3, cached: 3, attention: [1, 4, 1, 4], ids: [4] },
      { layer: 1, carried: true, past: 3, cached: 3, attention: [1, 4, 1, 4], ids: [4] },
      { layer: 0, carried: false, past: 4, cached: 4, attention: [1, 4, 1, 5], ids: [5] },
      { layer: 1, carried: true, past: 4, cached: 4, attention: [1, 4, 1, 5], ids: [5] },
      { layer: 0, carried: false, past: 5, cached: 4, attention: [1, 4, 1, 6], ids: [6] },
      { layer: 1, carried: true, past: 5, cached: 4, attention: [1, 4, 1, 6], ids: [6] },
    ]);
    for (const { sums } of seen) for (const total of sums) expect(total).toBeCloseTo(1, 9);
    cache.dispose();
    expect(on.live()).toBe(live);
  });

  it("one shared state per model", () => {
    const on = makeEngine();
    let made = 0;
    const router: RouterPlugin = {
      ...plainTopK(1),
      init(context) {
        const gru = context.shared("gru", () => ({ count: ++made, weight: on.tensor(new Float32Array(4), [4]) }));
        return {
          ...plainTopK(1).init(context),
          params: { weight: on.tensor(new Float32Array(40), [5, 8]), gru: gru.weight },
        };
      },
    };
    transformer(on, { ...smallConfig, router }, random(on, 1));
    transformer(on, { ...smallConfig, router }, random(on, 1));
    expect(made).toBe(2);
    const { routers, total } = parameterCounts({ ...smallConfig, router });
    expect(routers).toBe(2 * 40 + 4);
    expect(total).toBeGreaterThan(routers);
  });
});

describe("traces and hooks", () => {
  it("records every layer and names the matrices that experts read", async () => {
    const on = makeEngine();
    const model = loudModel(on, smallConfig);
    const layers: number[] = [];
    const loads: Promise<unknown>[] = [];
    const trace = {
      record(layer: number, routed: { metrics?: Readonly<Record<string, Tensor>> }) {
        layers.push(layer);
        if (routed.metrics?.load) loads.push(routed.metrics.load.data());
      },
    };
    const observed: string[] = [];
    const ids = idsOf(on, [[1, 2]]);
    model.forward(model.params, ids, {
      trace,
      observe: (parameter, layer, rows) => observed.push(`${layer} ${parameter} ${rows.shape[1]}`),
    });
    await model.step(ids, { trace });
    expect(layers).toEqual([0, 1, 0, 1]);
    expect((await Promise.all(loads)).length).toBe(4);
    expect(observed).toEqual([
      "0 layers.0.moe.experts.gateUp 8",
      "0 layers.0.moe.experts.down 7",
      "1 layers.1.moe.experts.gateUp 8",
      "1 layers.1.moe.experts.down 7",
    ]);
    const paths = new Set(leaves(model.params).map(([path]) => path));
    for (const line of observed) expect(paths.has(line.split(" ")[1] ?? "")).toBe(true);
  });
});

describe("parameters", () => {
  it("starts with small normals, smaller where they write into the residual stream", async () => {
    const on = makeEngine();
    const model = transformer(on, { ...smallConfig, width: 64, hidden: 32 }, random(on, 1));
    const spread = async (path: string): Promise<number> => {
      const values = Array.from((await new Map(leaves(model.params)).get(path)?.data()) ?? []);
      return Math.sqrt(values.reduce((total, x) => total + x * x, 0) / values.length);
    };
    expect(await spread("layers.1.attention.q")).toBeCloseTo(0.02, 2.5);
    expect(await spread("layers.1.attention.o")).toBeCloseTo(0.01, 2.5);
    expect(await spread("layers.1.moe.experts.down")).toBeCloseTo(0.01, 2.5);
    expect(await spread("norm")).toBe(1);
    const again = transformer(on, { ...smallConfig, width: 64, hidden: 32 }, random(on, 1));
    expect(await readAll(again.params)).toEqual(await readAll(model.params));
  });

  it.each(variants)("are counted without being made: %s", (_, change, k) => {
    const on = makeEngine();
    const config = { ...smallConfig, ...change };
    const model = transformer(on, config, random(on, 1));
    const total = leaves(model.params).reduce((n, [, x]) => n + x.size, 0);
    const counts = parameterCounts(config);
    expect(counts.total).toBe(total);
    expect(counts.active).toBe(total - counts.experts * (1 - k / config.experts));
    expect(parameterCounts(config, { expertsPerToken: config.experts }).active).toBe(total);
    for (const [path, shape] of parameterShapes(config)) {
      expect(new Map(leaves(model.params)).get(path)?.shape, path).toEqual(shape);
    }
  });

  it("can be exchanged for others of the same shapes", async () => {
    const on = makeEngine();
    const [a, b] = [loudModel(on, smallConfig), transformer(on, smallConfig, random(on, 8))];
    const moved = b.with({ params: a.params, buffers: a.buffers });
    expect(await logitsOf(moved, [[1, 2]])).toEqual(await logitsOf(a, [[1, 2]]));
    const other = transformer(on, { ...smallConfig, vocabulary: 14 }, random(on, 1));
    expect(() => b.with({ params: other.params })).toThrow(/parameter "embed" is \[14,8\], expected \[13,8\]/);
    expect(() => b.with({ buffers: [] })).toThrow(/0 buffers, expected .* and 2/);
  });
});

describe("refusals", () => {
  const on = makeEngine();
  it.each<[string, Partial<TransformerConfig>, RegExp]>([
    ["no layers", { layers: 0 }, /layers is 0, expected a whole number from 1/],
    ["an odd head", { headSize: 3 }, /headSize is 3, expected an even/],
    ["heads that do not divide", { kvHeads: 3 }, /4 heads cannot share 3/],
    ["a negative shared count", { sharedExperts: -1 }, /sharedExperts is -1/],
  ])("%s", (_, change, message) => {
    expect(() => transformer(on, { ...smallConfig, ...change }, random(on, 1))).toThrow(message);
  });

  it("sequences, masks, ids and caches that do not fit", () => {
    const model = loudModel(on, smallConfig);
    const run = (rows: number[][], options = {}) => model.forward(model.params, idsOf(on, rows), options);
    expect(() => run([new Array(13).fill(1)])).toThrow(/13 positions \(0 of them cached\), but context is 12/);
    expect(() => run([[1, 2]], { mask: on.tensor(new Float32Array(3), [1, 3]) })).toThrow(
      /mask is \[1,3\], expected .* \[1, 2\]/,
    );
    expect(() => run([[1]], { cache: model.newCache(2) })).toThrow(/the cache has 2 rows, the ids have 1/);
    expect(() => run([[1]], { cache: model.newCache(1), training: true })).toThrow(/a cache is for inference/);
    expect(() => model.forward(model.params, on.tensor(new Float32Array(2), [1, 2]))).toThrow(/ids must be i32/);
    const never = () => expect.fail("the cache was used");
    const foreign = { length: 0, append: never, reorder: never, truncate: never, dispose: never };
    expect(() => run([[1]], { cache: foreign })).toThrow(/another kind of model/);
  });

  it("overrides of routers in attention, of which there are none", async () => {
    const model = loudModel(on, smallConfig);
    const override = [{ k: 1, parts: ["attention"] as const }];
    await expect(model.step(idsOf(on, [[1]]), { override })).rejects.toThrow(
      /names the routers of attention, of which this model has none; leave parts out/,
    );
  });

  it("caches of other models, and disposed ones", async () => {
    const model = loudModel(on, smallConfig);
    const ids = idsOf(on, [[1, 2]]);
    const filled = async (change: Partial<TransformerConfig>) => {
      const other = loudModel(on, { ...smallConfig, ...change });
      const cache = other.newCache(1);
      (await other.step(ids, { cache })).dispose();
      return cache;
    };
    const deep = await filled({ layers: 3 });
    await expect(model.step(ids, { cache: deep })).rejects.toThrow(/of a model with 3 layers, this one has 2/);
    const wide = await filled({ headSize: 4 });
    await expect(model.step(ids, { cache: wide })).rejects.toThrow(
      /its keys of layer 0 have 2 heads of 4, those of this model 2 of 6: another model filled it/,
    );
    const many = await filled({ kvHeads: 4 });
    expect(() => model.forward(model.params, ids, { cache: many })).toThrow(/have 4 heads of 6, those of this model 2/);
    // What was refused is as it was.
    expect([deep.length, wide.length, many.length]).toEqual([2, 2, 2]);
    const own = await filled({});
    expect((await model.step(ids, { cache: own })).shape).toEqual([1, 13]);
    own.dispose();
    own.dispose();
    await expect(model.step(ids, { cache: own })).rejects.toThrow(
      /it was disposed; make another one with model\.newCache/,
    );
    expect(() => own.truncate(0)).toThrow(/disposed/);
    for (const cache of [deep, wide, many]) cache.dispose();
  });

  it("a step without tokens", async () => {
    const model = loudModel(on, smallConfig);
    const empty = on.tensor(new Int32Array(0), [1, 0]);
    await expect(model.step(empty)).rejects.toThrow(/at least one token/);
    expect(model.forward(model.params, empty).logits.shape).toEqual([1, 0, 13]);
  });

  it("routers that look ahead, in one clear sentence, unless allowed", async () => {
    const ahead: RouterPlugin = { ...plainTopK(2), name: "peeking", causal: { training: false, evaluation: true } };
    const model = loudModel(on, { ...smallConfig, router: ahead });
    const ids = idsOf(on, [[1, 2]]);
    expect(() => model.forward(model.params, ids, { training: true })).toThrow(UnsupportedError);
    expect(() => model.forward(model.params, ids, { training: true })).toThrow(
      /router peeking chooses experts by looking at later tokens, so training.*leaks the future.*allowNonCausal: true/,
    );
    expect(() => model.forward(model.params, ids)).not.toThrow();
    const never = loudModel(on, {
      ...smallConfig,
      router: { ...ahead, causal: { training: true, evaluation: false } },
    });
    await expect(never.step(ids)).rejects.toThrow(/it can neither generate text/);
    const allowed = loudModel(on, { ...smallConfig, router: ahead, allowNonCausal: true });
    expect(() => allowed.forward(allowed.params, ids, { training: true })).not.toThrow();
    expect(() => model.forward(model.params, ids, { training: true, allowNonCausal: true })).not.toThrow();
    expect(() => allowed.forward(allowed.params, ids, { training: true, allowNonCausal: false })).toThrow(/leaks/);
  });

  it("routers that ask for shared experts, where the config says otherwise", () => {
    const router = { ...plainTopK(2), name: "sharing", sharedExperts: 2 };
    const model = loudModel(on, { ...smallConfig, router });
    const shape = parameterShapes({ ...smallConfig, router }).get("layers.0.moe.shared.0.experts.down");
    expect(shape).toEqual([1, smallConfig.width, 2 * smallConfig.hidden]);
    expect(model.config.sharedExperts).toBe(2);
    expect(() => loudModel(on, { ...smallConfig, router, sharedExperts: 2 })).not.toThrow();
    expect(() => loudModel(on, { ...smallConfig, router, sharedExperts: 1 })).toThrow(
      /sharedExperts is 1, but router sharing asks for 2; leave it out/,
    );
  });

  it("routers that need more than text", () => {
    const needy: RouterPlugin = { ...plainTopK(1), name: "needy", needs: ["modalityIds"] };
    expect(() => transformer(on, { ...smallConfig, router: needy }, random(on, 1))).toThrow(
      /router needy needs "modalityIds", which a text model does not have/,
    );
  });
});
