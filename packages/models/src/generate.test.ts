// Sampling: distribution, cuts, seeds, stop ids, limits, text that arrives in whole characters, and aborting.
import { type Engine, random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { beforeAll, describe, expect, it } from "vitest";
import { type GenerateOptions, generate } from "./generate.ts";
import { loudModel, makeEngine, naiveForward, plainTopK, readAll, smallConfig } from "./models.test-util.ts";
import { tokenizer } from "./tokenizer.ts";
import { trainTokenizer } from "./tokenizer-training.ts";
import { type Transformer, transformer } from "./transformer.ts";

let on: Engine;
let model: Transformer;
beforeAll(() => {
  on = makeEngine(64);
  model = loudModel(on, smallConfig);
});
const collect = async (options: GenerateOptions, on: Transformer = model) => {
  const ids: number[] = [];
  const logProbabilities: number[] = [];
  let text = "";
  for await (const token of generate(on, options)) {
    ids.push(token.id);
    logProbabilities.push(token.logProbability);
    text += token.text;
  }
  return { ids, logProbabilities, text };
};

describe("generate", () => {
  it("takes the most likely token at temperature 0 and reports its probability", async () => {
    const params = await readAll(model.params);
    const { ids, logProbabilities } = await collect({ prompt: [1, 2], maxNew: 4, temperature: 0 });
    const sequence = [1, 2];
    for (const [i, id] of ids.entries()) {
      const row = naiveForward(smallConfig, params, sequence, 2).at(-1) ?? [];
      const top = Math.max(...row);
      expect(id).toBe(row.indexOf(top));
      expect(logProbabilities[i]).toBeCloseTo(-Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0)), 9);
      sequence.push(id);
    }
    expect(ids.length).toBe(4);
  });

  it("draws the same with and without a cache, other things with another seed, and leaves nothing behind", async () => {
    const live = on.live();
    const options = { prompt: [5], maxNew: 10, temperature: 2 };
    const a = await collect({ ...options, seed: 1 });
    expect(await collect({ ...options, seed: 1, cache: false })).toEqual({
      ...a,
      logProbabilities: a.logProbabilities.map((x) => expect.closeTo(x, 9)),
    });
    expect((await collect({ ...options, seed: 2 })).ids).not.toEqual(a.ids);
    expect(on.live()).toBe(live);
  });

  const counts = async (options: Partial<GenerateOptions>, draws: number): Promise<number[]> => {
    const found = new Array<number>(13).fill(0);
    for (let seed = 0; seed < draws; seed++) {
      const { ids } = await collect({ prompt: [1, 2], maxNew: 1, seed, ...options });
      found[ids[0] ?? 0] = (found[ids[0] ?? 0] ?? 0) + 1;
    }
    return found;
  };
  it("samples the tempered distribution", async () => {
    const row = naiveForward(smallConfig, await readAll(model.params), [1, 2], 2).at(-1) ?? [];
    const weights = row.map((x) => Math.exp(x / 1.5));
    const total = weights.reduce((a, b) => a + b, 0);
    const found = await counts({ temperature: 1.5 }, 600);
    // Five standard deviations of a binomial count.
    for (const [id, w] of weights.entries()) {
      const p = w / total;
      expect(Math.abs((found[id] ?? 0) - 600 * p)).toBeLessThan(5 * Math.sqrt(600 * p * (1 - p)) + 1);
    }
  });

  it("cuts to the k most likely, and to the fewest that reach topP", async () => {
    const row = naiveForward(smallConfig, await readAll(model.params), [1, 2], 2).at(-1) ?? [];
    const order = [...row.keys()].sort((a, b) => (row[b] ?? 0) - (row[a] ?? 0));
    const used = async (options: Partial<GenerateOptions>) =>
      [...(await counts({ temperature: 1, ...options }, 80)).entries()].filter(([, n]) => n > 0).map(([id]) => id);
    expect(await used({ topK: 1 })).toEqual([order[0]]);
    for (const id of await used({ topK: 3, temperature: 5 })) expect(order.slice(0, 3)).toContain(id);
    expect(await used({ topP: 1e-9 })).toEqual([order[0]]);
    const exps = row.map((x) => Math.exp(x));
    const total = exps.reduce((a, b) => a + b, 0);
    let reached = 0;
    const nucleus = order.filter((id) => {
      const inside = reached < 0.6;
      reached += (exps[id] ?? 0) / total;
      return inside;
    });
    for (const id of await used({ topP: 0.6 })) expect(nucleus).toContain(id);
    expect((await used({ topP: 1, topK: 13 })).length).toBeGreaterThan(1);
  });

  it("ends at a stop id, at maxNew, or where the context is full", async () => {
    const { ids } = await collect({ prompt: [1, 2], temperature: 0, maxNew: 4 });
    const stop = ids[2] ?? -1;
    const until = ids.indexOf(stop);
    expect((await collect({ prompt: [1, 2], temperature: 0, stop: [stop] })).ids).toEqual(ids.slice(0, until));
    expect((await collect({ prompt: [1, 2], maxNew: 0 })).ids).toEqual([]);
    // 12 positions: the last of them still predicts one token.
    expect((await collect({ prompt: [1, 2] })).ids.length).toBe(11);
    expect((await collect({ prompt: new Array(12).fill(1) })).ids.length).toBe(1);
  });

  it("speaks text in whole characters", async () => {
    const words = tokenizer(await trainTokenizer([""], { vocabulary: 257 }));
    const wide = loudModel(on, { ...smallConfig, vocabulary: 257, context: 40 });
    const { ids, text } = await collect({ prompt: "é", tokenizer: words, maxNew: 30, temperature: 3 }, wide);
    const whole = new TextDecoder("utf-8", { ignoreBOM: true }).decode(words.bytes(ids));
    // A character left incomplete at the end is not shown.
    expect(whole.startsWith(text)).toBe(true);
    expect(whole.length - text.length).toBeLessThanOrEqual(1);
  });

  it("stops when aborted and when the reader leaves, freeing its cache", async () => {
    const live = on.live();
    const controller = new AbortController();
    let seen = 0;
    const run = async () => {
      for await (const _ of generate(model, { prompt: [1], signal: controller.signal })) {
        if (++seen === 2) controller.abort(new Error("enough"));
      }
    };
    await expect(run()).rejects.toThrow("enough");
    expect(seen).toBe(2);
    for await (const _ of generate(model, { prompt: [1] })) break;
    expect(on.live()).toBe(live);
  });

  it.each<[Partial<GenerateOptions>, RegExp]>([
    [{ prompt: [] }, /the prompt is empty/],
    [{ prompt: [13] }, /prompt id 13 is not in a vocabulary of 13/],
    [{ prompt: "text" }, /needs a tokenizer/],
    [{ prompt: new Array(13).fill(0) }, /13 tokens, but the context is 12/],
    [{ temperature: -1 }, /temperature is -1/],
    [{ topK: 0 }, /topK is 0/],
    [{ topP: 0 }, /topP is 0/],
    [{ maxNew: 1.5 }, /maxNew is 1.5/],
  ])("refuses %o", async (options, message) => {
    await expect(collect({ prompt: [1], ...options })).rejects.toThrow(message);
  });

  it("refuses a router that looks ahead", async () => {
    const router: RouterPlugin = { ...plainTopK(2), name: "peeking", causal: { training: false, evaluation: false } };
    const peeking = transformer(on, { ...smallConfig, router }, random(on, 1));
    await expect(collect({ prompt: [1] }, peeking)).rejects.toThrow(/router peeking .* it can neither generate text/);
    expect((await collect({ prompt: [1], maxNew: 3, allowNonCausal: true }, peeking)).ids).toHaveLength(3);
    const allowed = transformer(on, { ...smallConfig, router, allowNonCausal: true }, random(on, 1));
    expect((await collect({ prompt: [1], maxNew: 3 }, allowed)).ids).toHaveLength(3);
    await expect(collect({ prompt: [1], allowNonCausal: false }, allowed)).rejects.toThrow(/it can neither generate/);
  });
});
