// Sampling: distribution, cuts, seeds, stop ids, limits, text that arrives in whole characters, and aborting.
import { type Engine, random } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { beforeAll, describe, expect, it } from "vitest";
import { beam } from "./decoding/beam.ts";
import { collectRows, collect as collectText, scriptedModel } from "./decoding/decoding.test-util.ts";
import { type GenerateOptions, generate, generateBatch } from "./generate.ts";
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

  it("lets timers have their turn between tokens, though the backend never waits", async () => {
    const controller = new AbortController();
    setTimeout(() => controller.abort(new Error("heard")), 0);
    const made: number[] = [];
    const all = async (): Promise<void> => {
      for await (const { id } of generate(model, { prompt: [1], signal: controller.signal })) made.push(id);
    };
    await expect(all()).rejects.toThrow("heard");
    expect(made.length).toBeLessThan(model.context - 1);
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
    [{ stop: [2, 13] }, /stop id 13 is not in a vocabulary of 13: it would never come/],
    [{ stop: [-1] }, /stop id -1 is not/],
    [{ stop: [1.5] }, /stop id 1\.5 is not/],
    [{ maxNew: Number.NaN }, /maxNew is NaN/],
    [{ maxNew: Number.NEGATIVE_INFINITY }, /maxNew is -Infinity/],
    [{ prompt: "text" }, /needs a tokenizer/],
    [{ prompt: new Array(13).fill(0) }, /13 tokens, but the context is 12/],
    [{ temperature: -1 }, /temperature is -1/],
    [{ topK: 0 }, /topK is 0/],
    [{ topP: 0 }, /topP is 0/],
    [{ maxNew: 1.5 }, /maxNew is 1.5/],
    [{ seed: Number.NaN }, /seed is NaN, expected a whole number/],
    [{ seed: 0.5 }, /seed is 0.5, expected a whole number/],
    [{ minP: 2 }, /minP is 2/],
    [{ repetitionPenalty: -1 }, /repetitionPenalty is -1/],
    [{ prefillChunk: 0 }, /prefillChunk is 0, expected a whole number from 1/],
    [{ topLogProbabilities: 14 }, /topLogProbabilities is 14, expected a whole number from 0 to 13/],
    [{ stop: ["end"] }, /a stop string needs a tokenizer/],
    [{ strategy: beam(), topK: 3, minP: 0.1 }, /topK, minP would not reach the strategy "beam"/],
  ])("refuses %o", async (options, message) => {
    await expect(collect({ prompt: [1], ...options })).rejects.toThrow(message);
  });

  it("returns why it ended", async () => {
    const ends = async (options: Partial<GenerateOptions>) =>
      (await collectText(model, { prompt: [1, 2], temperature: 0, ...options })).ending;
    const { ids } = await collect({ prompt: [1, 2], temperature: 0, maxNew: 4 });
    expect(await ends({ maxNew: 3 })).toBe("maxNew");
    expect(await ends({ maxNew: 0 })).toBe("maxNew");
    expect(await ends({ maxNew: Number.POSITIVE_INFINITY })).toBe("context");
    expect(await ends({ stop: [ids[2] ?? -1] })).toBe("stopId");
    expect(await ends({})).toBe("context");
    expect(await ends({ maxNew: 11 })).toBe("maxNew");
  });

  it("tells the most likely tokens with each token", async () => {
    const { tokens } = await collectText(model, { prompt: [1, 2], temperature: 3, maxNew: 4, topLogProbabilities: 3 });
    const params = await readAll(model.params);
    const sequence = [1, 2];
    for (const { id, logProbability, top, ...rest } of tokens) {
      const row = naiveForward(smallConfig, params, sequence, 2).at(-1) ?? [];
      const logSum = Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0));
      const order = [...row.keys()].sort((a, b) => (row[b] ?? 0) - (row[a] ?? 0)).slice(0, 3);
      expect(logProbability).toBeCloseTo((row[id] ?? 0) - logSum, 9);
      expect(top).toEqual(
        order.map((one) => ({ id: one, logProbability: expect.closeTo((row[one] ?? 0) - logSum, 9) })),
      );
      expect(rest).toEqual({ text: "" });
      sequence.push(id);
    }
    expect(tokens).toHaveLength(4);
    expect((await collectText(model, { prompt: [1], maxNew: 1 })).tokens[0]).not.toHaveProperty("top");
  });

  it("runs a long prompt in chunks", async () => {
    const options = { prompt: [1, 2, 3, 4, 5, 6, 7], maxNew: 5, temperature: 2 };
    const { ids, logProbabilities } = await collect(options);
    for (const prefillChunk of [1, 3, 7, 100]) {
      const sizes: number[] = [];
      const counting = {
        ...model,
        step: (...[input, rest]: Parameters<typeof model.step>) => {
          sizes.push(input.shape[1] ?? 0);
          return model.step(input, rest);
        },
      };
      const found = await collect({ ...options, prefillChunk }, counting);
      expect(found.ids).toEqual(ids);
      for (const [i, x] of logProbabilities.entries()) expect(found.logProbabilities[i]).toBeCloseTo(x, 9);
      expect(Math.max(...sizes)).toBe(Math.min(prefillChunk, 7));
    }
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

it("gives text prompts the special tokens that the tokenizer wants in front", async () => {
  const files = await trainTokenizer([""], { vocabulary: 258, specialTokens: ["<s>"] });
  const single = [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }];
  const post_processor = { type: "TemplateProcessing", single, pair: single };
  const words = tokenizer({ ...files, tokenizer: { ...files.tokenizer, post_processor } });
  const seen: number[][] = [];
  const scripted = scriptedModel(on, {
    vocabulary: 258,
    context: 8,
    say: (sequence) => {
      seen.push([...sequence]);
      return new Array<number>(258).fill(0);
    },
  });
  for (const prompt of ["ab", words.encode("<s>ab")]) {
    await collectText(scripted, { prompt, tokenizer: words, maxNew: 1, temperature: 0 });
  }
  scripted.dispose();
  expect(seen.at(-1)).toEqual([0, ...words.encode("ab")]);
  expect(seen[0]?.length).toBeGreaterThan(0);
  expect(seen.slice(0, seen.length / 2)).toEqual(seen.slice(seen.length / 2));
});

describe("stop strings", () => {
  it("end the text before them, wherever token boundaries are", async () => {
    const words = tokenizer(await trainTokenizer([""], { vocabulary: 257 }));
    // Says one text, byte by byte, and goes on with dots.
    const says = (text: string) => {
      const bytes = words.encode(text);
      return scriptedModel(on, {
        vocabulary: 257,
        context: 64,
        say: (sequence) => {
          const next = bytes[sequence.length - 1] ?? words.encode(".")[0];
          return Array.from({ length: 257 }, (_, id) => (id === next ? 9 : 0));
        },
      });
    };
    const through = async (text: string, stop: (string | number)[]) => {
      const scripted = says(text);
      const prompt = words.encode("Q");
      const found = await collectText(scripted, { prompt, tokenizer: words, stop, maxNew: 12, temperature: 0 });
      scripted.dispose();
      expect(words.decode(found.ids).startsWith(found.text)).toBe(true);
      return { text: found.text, ending: found.ending, count: found.ids.length };
    };
    expect(await through("one\n\ntwo", ["\n\n"])).toEqual({ text: "one", ending: "stopString", count: 3 });
    expect(await through("one\n-two", ["\n\n"])).toEqual({ text: "one\n-two....", ending: "maxNew", count: 12 });
    expect(await through("né!é?", ["é?"])).toEqual({ text: "né!", ending: "stopString", count: 4 });
    expect(await through("abc", ["xyz", "bc", "c"])).toEqual({ text: "a", ending: "stopString", count: 1 });
    // Held back until the end, then given.
    expect(await through("ten dots...", ["......."])).toEqual({ text: "ten dots....", ending: "maxNew", count: 12 });
    const [c = 0] = words.encode("c");
    expect(await through("abcd", ["d", c])).toEqual({ text: "ab", ending: "stopId", count: 2 });
    await expect(through("abc", [""])).rejects.toThrow(/the stop string "" is in every text/);
  });
});

describe("generateBatch", () => {
  const prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]];

  it("gives each row what it gets alone, whatever the lengths", async () => {
    const live = on.live();
    for (const options of [
      { temperature: 0 },
      { temperature: 2, seed: 3 },
      { temperature: 2, seed: 3, prefillChunk: 2 },
    ]) {
      const { tokens } = await collectRows(generateBatch(model, { ...options, prompts, maxNew: 5 }), 4);
      for (const [row, prompt] of prompts.entries()) {
        const seed = (options.seed ?? 0) + row;
        const alone = await collect({ ...options, seed, prompt, maxNew: 5 });
        expect(tokens[row]?.map(({ id }) => id)).toEqual(alone.ids);
        for (const [i, x] of alone.logProbabilities.entries()) {
          expect(tokens[row]?.[i]?.logProbability).toBeCloseTo(x, 9);
        }
      }
    }
    expect(on.live()).toBe(live);
  });

  it("ends rows one by one, and goes on with the others where the longest is full", async () => {
    const sizes: number[] = [];
    const counting = {
      ...model,
      step: (...[input, rest]: Parameters<typeof model.step>) => {
        sizes.push(input.shape[0] ?? 0);
        return model.step(input, rest);
      },
    };
    const { ids, endings } = await collectRows(generateBatch(counting, { prompts, temperature: 0 }), 4);
    // 12 positions, the last of which still predicts one.
    expect(ids.map((row) => row.length)).toEqual([10, 12, 7, 11]);
    expect(endings).toEqual(["context", "context", "context", "context"]);
    expect(sizes.filter((n) => n === 4)).toHaveLength(7);
    expect(sizes.at(-1)).toBe(1);
    for (const [row, prompt] of prompts.entries()) {
      expect(ids[row]).toEqual((await collect({ prompt, temperature: 0 })).ids);
    }
    const [stop = -1] = ids[1]?.slice(2) ?? [];
    const early = await collectRows(generateBatch(model, { prompts, temperature: 0, stop: [stop] }), 4);
    expect(early.endings).toContain("stopId");
    for (const [row, whole] of ids.entries()) {
      const until = whole.indexOf(stop);
      expect(early.ids[row]).toEqual(until < 0 ? whole : whole.slice(0, until));
    }
  });

  it("has text per row, and nothing to do without prompts", async () => {
    const words = tokenizer(await trainTokenizer([""], { vocabulary: 257 }));
    const wide = loudModel(on, { ...smallConfig, vocabulary: 257, context: 20 });
    const texts = ["", ""];
    const options = { prompts: ["ab", "abcdef"], tokenizer: words, maxNew: 6, temperature: 3 };
    for await (const { row, text } of generateBatch(wide, options)) texts[row] += text;
    for (const [row, prompt] of options.prompts.entries()) {
      const { text } = await collectText(wide, { prompt, tokenizer: words, maxNew: 6, temperature: 3, seed: row });
      expect(texts[row]).toBe(text);
    }
    expect(await collectRows(generateBatch(model, { prompts: [] }), 0)).toEqual({ tokens: [], ids: [], endings: [] });
    await expect(collectRows(generateBatch(model, { prompts: [[1], []] }), 2)).rejects.toThrow(/the prompt is empty/);
  });

  it("frees the caches of all rows when the reader leaves", async () => {
    const live = on.live();
    for await (const { row } of generateBatch(model, { prompts })) if (row === 2) break;
    expect(on.live()).toBe(live);
  });
});
