// Routers whose choice for a token depends on earlier tokens, in a language model: they learn, never see the future,
// and route a text written token by token as they route it whole.
import { type Engine, leaves, mul, random, sum, type Tensor, type Tree, valueAndGrad } from "@switchyard/core";
import type { Routed, RouterPlugin } from "@switchyard/core/moe";
import { adamw, trainer } from "@switchyard/core/train";
import { attentionAware, similarityAware } from "@switchyard/routers";
import { describe, expect, it } from "vitest";
import { generate } from "./generate.ts";
import { loudModel, makeEngine, smallConfig } from "./models.test-util.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { type Transformer, transformer } from "./transformer.ts";

const plugins: readonly [string, RouterPlugin][] = [
  ["similarityAware", similarityAware({ k: 2 })],
  ["similarityAware, logits, learned", similarityAware({ k: 2, mixing: "logits", similarity: "learned" })],
  ["similarityAware, low rank, neighbours", similarityAware({ k: 2, similarity: "low-rank", neighbours: 3 })],
  ["similarityAware, window", similarityAware({ k: 1, window: 3, renormalize: false })],
  ["attentionAware", attentionAware({ k: 2 })],
  ["attentionAware, min-entropy", attentionAware({ k: 2, headAggregation: "min-entropy" })],
  ["attentionAware, learned, logits", attentionAware({ k: 2, headAggregation: "learned", mixing: "logits" })],
];

// Sequences that count upwards modulo 11, from a start that depends on the index.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => value(i, 1)),
  };
};
const idsOf = (on: Engine, rows: readonly (readonly number[])[]): Tensor =>
  on.tensor(Int32Array.from(rows.flat()), [rows.length, rows[0]?.length ?? 0]);

interface Choice {
  readonly layer: number;
  /** Experts [tokens, k] and their weights. */
  readonly ids: readonly number[];
  readonly weights: readonly number[];
}
/** Reads the plan of a layer; the tensors may go as soon as this returns. */
async function choice(layer: number, { plan }: Routed): Promise<Choice> {
  if (plan.kind !== "sparse") throw new Error(`a sparse plan was expected, found ${plan.kind}`);
  const [ids, weights] = await Promise.all([plan.experts.data(), plan.weights.data()]);
  return { layer, ids: Array.from(ids), weights: Array.from(weights) };
}
async function routes(model: Transformer, rows: readonly (readonly number[])[], mask?: readonly number[]) {
  const { engine: on } = model;
  const found: Promise<Choice>[] = [];
  on.scope(() => {
    const padding = mask ? { mask: on.tensor(Float32Array.from(mask), [rows.length, rows[0]?.length ?? 0]) } : {};
    const { routed } = model.forward(model.params, idsOf(on, rows), padding);
    for (const [layer, one] of routed.entries()) found.push(choice(layer, one));
    return undefined;
  });
  return Promise.all(found);
}

describe.each(plugins)("%s in a language model", (_, router) => {
  it("learns", async () => {
    const on = makeEngine();
    const model = transformer(on, { ...smallConfig, width: 16, headSize: 4, hidden: 8, router }, random(on, 1));
    const run = trainer(on, languageModelTask(model, { batch }), { optimiser: adamw({ learningRate: 0.01 }), clip: 1 });
    const { loss } = await run.step();
    expect(loss).toBeCloseTo(Math.log(13), 0);
    const live = on.live();
    await run.run({ until: 25 });
    expect(on.live()).toBe(live);
    expect(run.history.at(-1)?.loss).toBeLessThan(0.6 * loss);
    run.dispose();
    expect(on.live()).toBe(0);
  });

  it("token by token is routed as in the whole pass, prompts of different lengths included", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, { ...smallConfig, router });
    const live = on.live();
    const rows = [
      [2, 11, 0, 5, 5, 8, 1],
      [9, 9, 9, 4, 7, 2, 3],
    ];
    // The second prompt is shorter: padded at the left.
    const mask = rows.map((row, i) => row.map((_, t) => Number(i === 0 || t >= 2)));
    const whole = await routes(model, rows, mask.flat());
    const k = (whole[0]?.ids.length ?? 0) / 14;
    for (const sizes of [
      [1, 1, 1, 1, 1, 1, 1],
      [3, 1, 1, 2],
    ]) {
      const cache = model.newCache(2);
      let at = 0;
      for (const size of sizes) {
        const ids = idsOf(
          on,
          rows.map((row) => row.slice(at, at + size)),
        );
        const real = on.tensor(Float32Array.from(mask.flatMap((row) => row.slice(0, at + size))), [2, at + size]);
        const found: Promise<Choice>[] = [];
        const trace = { record: (layer: number, routed: Routed) => void found.push(choice(layer, routed)) };
        (await model.step(ids, { cache, mask: real, trace })).dispose();
        for (const { layer, ids: experts, weights } of await Promise.all(found)) {
          const part = (values: readonly number[]): number[] =>
            [0, 1].flatMap((row) => values.slice((row * 7 + at) * k, (row * 7 + at + size) * k));
          expect(experts, `layer ${layer}, position ${at}`).toEqual(part(whole[layer]?.ids ?? []));
          const expected = part(whole[layer]?.weights ?? []);
          for (const [i, weight] of weights.entries()) expect(weight).toBeCloseTo(expected[i] ?? Number.NaN, 10);
        }
        for (const x of [ids, real]) x.dispose();
        at += size;
      }
      cache.dispose();
    }
    expect(on.live()).toBe(live);
  });

  it("later tokens change no route of earlier ones, bit for bit, in any layer", async () => {
    const model = loudModel(makeEngine(), { ...smallConfig, router });
    const text = [2, 11, 0, 5, 5, 8, 1];
    const before = await routes(model, [text]);
    const k = (before[0]?.ids.length ?? 0) / 7;
    for (let t = 0; t < 6; t++) {
      const after = await routes(model, [text.map((id, i) => (i > t ? (id + 6) % 13 : id))]);
      for (const [layer, { ids, weights }] of after.entries()) {
        expect(ids.slice(0, (t + 1) * k)).toEqual(before[layer]?.ids.slice(0, (t + 1) * k));
        expect(weights.slice(0, (t + 1) * k)).toEqual(before[layer]?.weights.slice(0, (t + 1) * k));
      }
      if (t < 3) expect(after).not.toEqual(before);
    }
  });

  it("writes the same with and without a cache, and after the cache was cut back and its rows exchanged", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, { ...smallConfig, router });
    const live = on.live();
    const write = async (cache: boolean): Promise<number[]> => {
      const ids: number[] = [];
      for await (const { id } of generate(model, { prompt: [5, 1], maxNew: 8, temperature: 2, seed: 4, cache }))
        ids.push(id);
      return ids;
    };
    expect(await write(true)).toEqual(await write(false));
    const cache = model.newCache(2);
    const logits = async (rows: readonly (readonly number[])[], options = {}): Promise<number[]> => {
      const ids = idsOf(on, rows);
      const last = await model.step(ids, options);
      const values = Array.from(await last.data());
      for (const x of [ids, last]) x.dispose();
      return values;
    };
    await logits(
      [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
      ],
      { cache },
    );
    cache.truncate(3);
    cache.reorder([1, 0, 1]);
    const next = await logits([[9], [10], [11]], { cache });
    const whole = await logits([
      [5, 6, 7, 9],
      [1, 2, 3, 10],
      [5, 6, 7, 11],
    ]);
    for (const [i, x] of next.entries()) expect(x).toBeCloseTo(whole[i] ?? Number.NaN, 9);
    cache.dispose();
    expect(on.live()).toBe(live);
  });

  it("has the gradients of finite differences, through the block before it too", async () => {
    const on = makeEngine(64);
    const model = loudModel(on, { ...smallConfig, width: 4, layers: 1, experts: 3, router });
    const ids = idsOf(on, [[1, 2, 3, 1, 7]]);
    const weights = on.tensor(random(on, 9).host("normal", 5 * 13), [1, 5, 13]);
    const loss = (params: Tree): Tensor => sum(mul(model.forward(params, ids, { training: true }).logits, weights));
    const { grads } = valueAndGrad((params: Tree) => [loss(params), []], model.params);
    const analytic = new Map(leaves(grads));
    const watched = leaves(model.params).filter(([path]) => /attention\.|router/.test(path));
    expect(watched.some(([path]) => path.endsWith("router.weight"))).toBe(true);
    for (const [path, x] of watched) {
      const values = Float64Array.from(await x.data());
      const index = (7 * path.length) % values.length;
      const moved = async (by: number): Promise<number> => {
        const changed = Float64Array.from(values);
        changed[index] = (changed[index] ?? 0) + by;
        const [value = 0] = await loss(swapped(model.params, x, on.tensor(changed, x.shape))).data();
        return value;
      };
      const numeric = ((await moved(1e-5)) - (await moved(-1e-5))) / 2e-5;
      const found = (await analytic.get(path)?.data())?.[index] ?? Number.NaN;
      expect(Math.abs(found - numeric) / Math.max(1, Math.abs(numeric)), path).toBeLessThan(1e-6);
    }
  });
});

const swapped = (tree: Tree, from: Tensor, to: Tensor): Tree => {
  if (tree === from) return to;
  if (Array.isArray(tree)) return tree.map((child: Tree) => swapped(child, from, to));
  if ("dtype" in tree) return tree;
  return Object.fromEntries(Object.entries(tree).map(([key, child]) => [key, swapped(child as Tree, from, to)]));
};

it("one head for the whole sequence looks ahead, and is refused", () => {
  const on = makeEngine();
  const router = attentionAware({ k: 2, headAggregation: "min-entropy", entropyOver: "sequence" });
  const model = transformer(on, { ...smallConfig, router }, random(on, 1));
  expect(() => model.forward(model.params, idsOf(on, [[1, 2]]), { training: true })).toThrow(
    /router attentionAware chooses experts by looking at later tokens/,
  );
});
