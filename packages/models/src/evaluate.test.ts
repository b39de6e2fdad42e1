// Sliding windows against the recipe itself: every window computed whole, without a cache, in float64.
import { random } from "@switchyard/core";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type EvaluateProgress, evaluateText, evaluateTokens } from "./evaluate.ts";
import { loudModel, makeEngine, naiveForward, plainTopK, readAll, smallConfig } from "./models.test-util.ts";
import { tokenizer } from "./tokenizer.ts";
import { trainTokenizer } from "./tokenizer-training.ts";
import { transformer } from "./transformer.ts";

/** The recipe: windows at multiples of stride; of each, the tokens that no earlier one had count. */
async function naive(
  ids: readonly number[],
  context: number,
  stride: number,
): Promise<{ nats: number; scored: number[] }> {
  const params = await readAll(loudModel(makeEngine(64), smallConfig).params);
  let nats = 0;
  let previousEnd = 0;
  const scored: number[] = [];
  for (let begin = 0; begin < ids.length; begin += stride) {
    const end = Math.min(begin + context, ids.length);
    const window = ids.slice(begin, end);
    const logits = naiveForward(smallConfig, params, window, 2);
    for (let i = 1; i < window.length; i++) {
      if (begin + i < previousEnd) continue;
      const row = logits[i - 1] ?? [];
      const top = Math.max(...row);
      nats -= (row[window[i] ?? 0] ?? 0) - top - Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0));
      scored.push(begin + i);
    }
    previousEnd = end;
    if (end === ids.length) break;
  }
  return { nats, scored };
}

describe("evaluateTokens", () => {
  it("is the recipe, for all sizes of windows, strides and chunks", async () => {
    const engine = makeEngine(64);
    const model = loudModel(engine, smallConfig);
    const before = engine.live();
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.nat(12), { minLength: 2, maxLength: 30 }),
        fc
          .integer({ min: 2, max: 12 })
          .chain((context) => fc.tuple(fc.constant(context), fc.integer({ min: 1, max: context }))),
        fc.integer({ min: 1, max: 13 }),
        async (ids, [context, stride], chunk) => {
          const expected = await naive(ids, context, stride);
          const positions: number[] = [];
          const progress: EvaluateProgress[] = [];
          const found = await evaluateTokens(model, ids, {
            ...{ context, stride, chunk },
            bytesOf(id, position) {
              expect(id).toBe(ids[position]);
              positions.push(position);
              return 3;
            },
            onProgress: (one) => progress.push(one),
          });
          expect(positions).toEqual(expected.scored);
          expect(found.nats).toBeCloseTo(expected.nats, 9);
          const { scored, bytes, bitsPerByte = 0, bitsPerToken, perplexity, tokens } = found;
          expect([tokens, scored, bytes]).toEqual([ids.length, positions.length, 3 * positions.length]);
          expect(perplexity).toBeCloseTo(Math.exp(expected.nats / scored), 9);
          expect(bitsPerToken).toBeCloseTo(Math.log2(perplexity), 9);
          expect(bitsPerByte).toBeCloseTo(bitsPerToken / 3, 9);
          expect(progress.at(-1)).toMatchObject({ done: progress.at(-1)?.total, sofar: { nats: found.nats } });
          expect(engine.live()).toBe(before);
        },
      ),
      { numRuns: 25 },
    );
  });

  it("takes the model's context and half of it by default, and foretells all but the first token", async () => {
    const model = loudModel(makeEngine(64), smallConfig);
    const ids = Array.from({ length: 40 }, (_, i) => (7 * i) % 13);
    const found = await evaluateTokens(model, ids);
    const expected = await naive(ids, 12, 6);
    expect(found).toMatchObject({ tokens: 40, scored: 39, windows: 6 });
    expect(found.nats).toBeCloseTo(expected.nats, 9);
    expect("bitsPerByte" in found).toBe(false);
  });

  it.each([
    [[1], {}, /a text of 1 tokens has nothing to foretell/],
    [[1, 13], {}, /id 13 is not in a vocabulary of 13/],
    [[1, 2], { context: 13 }, /context is 13, expected a whole number from 2 to 12/],
    [[1, 2], { context: 4, stride: 5 }, /stride is 5, expected a whole number from 1 to 4/],
    [[1, 2], { chunk: 0 }, /chunk is 0/],
  ])("refuses %j %j", async (ids, options, message) => {
    await expect(evaluateTokens(loudModel(makeEngine(), smallConfig), ids, options)).rejects.toThrow(message);
  });

  it("refuses routers that look ahead and numbers that are none, and ends at a signal, freeing all", async () => {
    const engine = makeEngine();
    const ahead = { ...plainTopK(2), causal: { training: false, evaluation: false } };
    const looking = transformer(engine, { ...smallConfig, router: ahead }, random(engine, 1));
    const model = loudModel(engine, smallConfig);
    const before = engine.live();
    await expect(evaluateTokens(looking, [1, 2])).rejects.toThrow(/looking at later tokens/);
    const control = new AbortController();
    const ids = Array.from({ length: 30 }, () => 1);
    let passes = 0;
    const run = evaluateTokens(model, ids, {
      signal: control.signal,
      onProgress() {
        if (++passes === 2) control.abort(new Error("enough"));
      },
    });
    await expect(run).rejects.toThrow(/^enough$/);
    expect([passes, engine.live()]).toEqual([2, before]);
    const broken = { ...model, step: async () => engine.tensor(new Float32Array(13).fill(Number.NaN), [1, 1, 13]) };
    await expect(evaluateTokens(broken, [1, 2])).rejects.toThrow(/logits at position 1 are not finite/);
    expect(engine.live()).toBe(before);
  });
});

describe("evaluateText", () => {
  const text = "A whale ship was my Yale College and my Harvard. ".repeat(3);

  it("counts the bytes of what is foretold", async () => {
    const engine = makeEngine();
    const words = tokenizer(await trainTokenizer([text], { vocabulary: 280 }));
    const model = transformer(engine, { ...smallConfig, vocabulary: words.vocabulary, context: 64 }, random(engine, 1));
    const ids = words.encode(text);
    const found = await evaluateText(model, words, text, { stride: 5 });
    const all = new TextEncoder().encode(text).length;
    expect(found.bytes).toBe(all - words.bytes(ids.slice(0, 1)).length);
    expect(found.scored).toBe(ids.length - 1);
    const { nats } = await evaluateTokens(model, ids, { stride: 5 });
    expect(found.nats).toBe(nats);
    expect(found.bitsPerByte).toBeCloseTo(nats / Math.LN2 / (found.bytes ?? 0), 12);
  });

  it("gives perplexity where tokens are words, and says why there are no bits per byte", async () => {
    const vocab = { "[UNK]": 0, hello: 1, "##ing": 2, world: 3, ".": 4, "[CLS]": 5 };
    const words = tokenizer({
      tokenizer: {
        added_tokens: [{ id: 5, content: "[CLS]", special: true }],
        normalizer: null,
        pre_tokenizer: { type: "BertPreTokenizer" },
        post_processor: null,
        decoder: { type: "WordPiece", prefix: "##", cleanup: true },
        model: { type: "WordPiece", unk_token: "[UNK]", continuing_subword_prefix: "##", vocab },
      },
      config: {},
    });
    const model = loudModel(makeEngine(), smallConfig);
    const found = await evaluateText(model, words, "helloing world. hello world.");
    const { nats, perplexity } = await evaluateTokens(model, [1, 2, 3, 4, 1, 3, 4]);
    expect([found.tokens, found.nats, found.perplexity]).toEqual([7, nats, perplexity]);
    expect(found.withoutBytes).toMatch(/the tokens of this tokenizer are words/);
    expect(Object.keys(found)).not.toEqual(expect.arrayContaining(["bytes"]));
    expect(Object.keys(found)).not.toEqual(expect.arrayContaining(["bitsPerByte"]));
  });

  it("puts the checkpoint's own beginning before the text, which is then foretold whole", async () => {
    const engine = makeEngine();
    const files = await trainTokenizer([text], { vocabulary: 280 });
    const words = tokenizer(files);
    const [end = 0] = words.special.values();
    const marked = {
      ...words,
      encode: (given: string, { addSpecial = false } = {}) =>
        Int32Array.of(...(addSpecial ? [end, end] : []), ...words.encode(given), ...(addSpecial ? [end] : [])),
    };
    const model = transformer(engine, { ...smallConfig, vocabulary: words.vocabulary, context: 64 }, random(engine, 1));
    const found = await evaluateText(model, marked, text);
    expect(found.bytes).toBe(new TextEncoder().encode(text).length);
    expect(found.scored).toBe(words.encode(text).length + 2);
  });
});
