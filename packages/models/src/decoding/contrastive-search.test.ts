// Contrastive search in naive loops over a scripted model, and on a transformer.
import { expect, it } from "vitest";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { contrastiveSearch } from "./contrastive-search.ts";
import { collect, idsOf, noise, scriptedModel, softmax } from "./decoding.test-util.ts";
import { greedy } from "./greedy.ts";

const on = makeEngine(64);
const say = (sequence: readonly number[]) => noise(6, 1, ...sequence);
const hidden = (sequence: readonly number[], layers: number) => noise(2, 2, layers, ...sequence);
const cosine = (a: readonly number[], b: readonly number[]): number => {
  const dot = (x: readonly number[], y: readonly number[]) => x.reduce((sum, v, i) => sum + v * (y[i] ?? 0), 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
};

function naive(
  prompt: readonly number[],
  count: number,
  { alpha, k, layers }: { alpha: number; k: number; layers: number },
) {
  const sequence = [...prompt];
  for (let i = 0; i < count; i++) {
    const p = softmax(say(sequence));
    const candidates = [...p.keys()].sort((a, b) => (p[b] ?? 0) - (p[a] ?? 0)).slice(0, k);
    const states = sequence.map((_, j) => hidden(sequence.slice(0, j + 1), layers));
    const scores = candidates.map((id) => {
      const likeness = Math.max(...states.map((state) => cosine(hidden([...sequence, id], layers), state)));
      return (1 - alpha) * (p[id] ?? 0) - alpha * likeness;
    });
    sequence.push(candidates[scores.indexOf(Math.max(...scores))] ?? -1);
  }
  return sequence.slice(prompt.length);
}

it("takes the candidate with the best score, whatever the chunks of the prompt", async () => {
  const live = on.live();
  const model = scriptedModel(on, { vocabulary: 6, layers: 3, say, hidden });
  let different = 0;
  for (const [alpha, candidates] of [
    [0.6, 5],
    [0.3, 2],
    [1, 6],
  ] as const) {
    const prompt = [1, 5, 2, 3, 3];
    const expected = naive(prompt, 10, { alpha, k: candidates, layers: 3 });
    const strategy = contrastiveSearch({ alpha, candidates });
    expect(await idsOf(model, { prompt, maxNew: 10, strategy })).toEqual(expected);
    expect(await idsOf(model, { prompt, maxNew: 10, strategy, prefillChunk: 2 })).toEqual(expected);
    expect(await idsOf(model, { prompt, maxNew: 10, strategy, cache: false })).toEqual(expected);
    if (expected.join() !== (await idsOf(model, { prompt, maxNew: 10, strategy: greedy() })).join()) different++;
  }
  expect(different).toBeGreaterThan(1);
  model.dispose();
  expect(on.live()).toBe(live);
});

it("is greedy where alpha is 0 or there is one candidate, up to the end of the context", async () => {
  const model = loudModel(on, smallConfig);
  const live = on.live();
  const greedily = await collect(model, { prompt: [3, 1, 4], strategy: greedy() });
  for (const options of [{ alpha: 0 }, { candidates: 1 }]) {
    const { ids, ending, tokens } = await collect(model, { prompt: [3, 1, 4], strategy: contrastiveSearch(options) });
    expect(ids).toEqual(greedily.ids);
    expect(ending).toBe("context");
    for (const [i, token] of tokens.entries()) {
      expect(token.logProbability).toBeCloseTo(greedily.tokens[i]?.logProbability ?? 0, 9);
    }
  }
  expect(await idsOf(model, { prompt: [3, 1, 4], strategy: contrastiveSearch() })).toHaveLength(10);
  expect(on.live()).toBe(live);
});

it("refuses options out of range", () => {
  expect(() => contrastiveSearch({ alpha: 1.2 })).toThrow(/contrastiveSearch: alpha is 1.2/);
  expect(() => contrastiveSearch({ candidates: 0 })).toThrow(/candidates is 0/);
});
