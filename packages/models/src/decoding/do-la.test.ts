// Contrasting layers in naive loops over a scripted model, and on a transformer.
import { expect, it } from "vitest";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { collect, idsOf, logSoftmax, noise, scriptedHead, scriptedModel } from "./decoding.test-util.ts";
import { type DoLaOptions, doLa, earlyLayers } from "./do-la.ts";
import { jensenShannon } from "./jensen-shannon.ts";

const on = makeEngine(64);
const V = 7;
const say = (sequence: readonly number[]) => noise(V, 1, ...sequence);
const hidden = (sequence: readonly number[], layers: number) => noise(2, 2, layers, ...sequence);
const early = (sequence: readonly number[], layers: number) =>
  scriptedHead(V).map((row) => row.reduce((sum, w, i) => sum + w * (hidden(sequence, layers)[i] ?? 0), 0));

function naive(
  prompt: readonly number[],
  count: number,
  { layers, alpha, penalty }: { layers: readonly number[]; alpha: number; penalty: number },
) {
  const sequence = [...prompt];
  const used = new Set<number>();
  for (let i = 0; i < count; i++) {
    const last = logSoftmax(say(sequence));
    const divergences = layers.map((layer) => jensenShannon(last, early(sequence, layer)));
    const layer = layers[divergences.indexOf(Math.max(...divergences))] ?? -1;
    used.add(layer);
    const base = logSoftmax(early(sequence, layer));
    const z = last.map((x, id) => {
      if (x < Math.log(alpha) + Math.max(...last)) return Number.NEGATIVE_INFINITY;
      const difference = x - (base[id] ?? 0);
      if (!sequence.includes(id)) return difference;
      return difference < 0 ? difference * penalty : difference / penalty;
    });
    sequence.push(z.indexOf(Math.max(...z)));
  }
  return { ids: sequence.slice(prompt.length), used };
}

const prompt = [1, 5, 2];
const maxNew = 14;

it("contrasts the last layer with the early one that differs most", async () => {
  const live = on.live();
  const model = scriptedModel(on, { vocabulary: V, layers: 10, say, hidden });
  const cases: [DoLaOptions, Parameters<typeof naive>[2]][] = [
    [{}, { layers: [0, 2, 4], alpha: 0.1, penalty: 1.2 }],
    [{ layers: "high" }, { layers: [6, 8], alpha: 0.1, penalty: 1.2 }],
    [
      { layers: [3], alpha: 0.02, repetitionPenalty: 1 },
      { layers: [3], alpha: 0.02, penalty: 1 },
    ],
    [
      { layers: [9, 1, 0], repetitionPenalty: 2 },
      { layers: [9, 1, 0], alpha: 0.1, penalty: 2 },
    ],
  ];
  for (const [options, expected] of cases) {
    const { ids, used } = naive(prompt, maxNew, expected);
    if (expected.layers.length > 1) expect(used.size).toBeGreaterThan(1);
    const strategy = doLa(options);
    for (const way of [{}, { prefillChunk: 1 }, { cache: false }]) {
      expect(await idsOf(model, { prompt, maxNew, strategy, ...way })).toEqual(ids);
    }
  }
  model.dispose();
  expect(on.live()).toBe(live);
});

it("looks at even layers, of deep models at twenty, and never at a tied embedding", async () => {
  expect(earlyLayers("low", { layers: 12, tied: false })).toEqual([0, 2, 4]);
  expect(earlyLayers("low", { layers: 12, tied: true })).toEqual([2, 4]);
  expect(earlyLayers("high", { layers: 9, tied: false })).toEqual([4, 6, 8]);
  expect(earlyLayers("low", { layers: 48, tied: false })).toEqual([0, 2, 4, 6, 8, 10, 12, 14, 16, 18]);
  expect(earlyLayers("high", { layers: 48, tied: true })).toEqual([28, 30, 32, 34, 36, 38, 40, 42, 44, 46]);
  expect(earlyLayers("low", { layers: 1, tied: true })).toEqual([0]);
  expect(earlyLayers("low", { layers: 3, tied: true })).toEqual([1]);
  expect(earlyLayers("high", { layers: 2, tied: true })).toEqual([1]);
  // The tied model of the first test's script does not read its embedding.
  const scripted = scriptedModel(on, { vocabulary: V, layers: 10, say, hidden });
  const strategy = doLa();
  const tied = await idsOf({ ...scripted, params: {} }, { prompt, maxNew, strategy });
  expect(tied).toEqual(naive(prompt, maxNew, { layers: [2, 4], alpha: 0.1, penalty: 1.2 }).ids);
  expect(tied).not.toEqual(await idsOf(scripted, { prompt, maxNew, strategy }));
  scripted.dispose();
});

it("runs on a transformer, where the last layer's head is the model's logits", async () => {
  const model = loudModel(on, { ...smallConfig, tieEmbeddings: false });
  const live = on.live();
  const { ids, tokens } = await collect(model, { prompt: [3, 1, 4], maxNew: 5, strategy: doLa({ layers: [1] }) });
  const sequence = [3, 1, 4];
  for (const [i, id] of ids.entries()) {
    const input = on.tensor(Int32Array.from(sequence), [1, sequence.length]);
    const states: number[][] = [];
    const reads: Promise<unknown>[] = [];
    const logits = await model.step(input, {
      watch: (what, x, layer) => {
        if (what !== "hidden") return;
        const after = model.head(x);
        reads.push(after.data().then((data) => (states[layer] = Array.from(data).slice(-model.vocabulary))));
      },
    });
    const said = Array.from(await logits.data());
    await Promise.all(reads);
    for (const [j, z] of (states[1] ?? []).entries()) expect(z).toBeCloseTo(said[j] ?? 0, 10);
    const [last, base] = [logSoftmax(said), logSoftmax(states[0] ?? [])];
    const z = last.map((x, j) => {
      const difference = x < Math.log(0.1) + Math.max(...last) ? Number.NEGATIVE_INFINITY : x - (base[j] ?? 0);
      if (!sequence.includes(j)) return difference;
      return difference < 0 ? difference * 1.2 : difference / 1.2;
    });
    expect(id).toBe(z.indexOf(Math.max(...z)));
    expect(tokens[i]?.logProbability).toBeCloseTo(last[id] ?? 0, 10);
    sequence.push(id);
    input.dispose();
    logits.dispose();
  }
  expect(on.live()).toBe(live);
});

it("refuses layers that are not there", async () => {
  const model = scriptedModel(on, { vocabulary: V, layers: 3, say, hidden });
  const run = (layers: readonly number[]) => idsOf(model, { prompt, maxNew: 1, strategy: doLa({ layers }) });
  await expect(run([3])).rejects.toThrow(/layers are \[3\]; expected some of 0 \(the embedding\) to 2/);
  await expect(run([])).rejects.toThrow(/layers are \[\]/);
  expect(() => doLa({ alpha: Number.NaN })).toThrow(/doLa: alpha is NaN/);
  model.dispose();
});
