// Beam search against all sequences there are, and against a naive one that keeps no cache.
import { ShapeError } from "@switchyard/core";
import { describe, expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { beam } from "./beam.ts";
import { collect, idsOf, logSoftmax, noise, scriptedModel } from "./decoding.test-util.ts";

const on = makeEngine(64);
const V = 4;
const say = (seed: number) => (sequence: readonly number[]) => noise(V, seed, ...sequence);
const prompt = [1, 2];
const stop = [0];

interface Text {
  readonly ids: readonly number[];
  readonly sum: number;
}
const continued = ({ ids, sum }: Text, seed: number): Text[] =>
  logSoftmax(say(seed)([...prompt, ...ids])).map((log, id) => ({ ids: [...ids, id], sum: sum + log }));
const over = ({ ids }: Text): boolean => ids.length > 0 && stop.includes(ids.at(-1) ?? -1);
const score = ({ ids, sum }: Text, penalty: number): number => sum / ids.length ** penalty;
const best = (texts: readonly Text[], penalty: number): Text =>
  texts.reduce((top, one) => (score(one, penalty) > score(top, penalty) ? one : top));
const withoutStop = (text: Text): number[] =>
  text.ids.filter((id, i) => !(i === text.ids.length - 1 && stop.includes(id)));

/** Every text that ends with a stop id or has `length` tokens. */
function everyText(seed: number, length: number): Text[] {
  let open: Text[] = [{ ids: [], sum: 0 }];
  const ended: Text[] = [];
  for (let i = 0; i < length; i++) {
    const next = open.flatMap((text) => continued(text, seed));
    ended.push(...next.filter(over));
    open = next.filter((text) => !over(text));
  }
  return [...ended, ...open];
}

/** The algorithm in plain lists, every text scored from its beginning. */
function naiveBeam(seed: number, options: { width: number; length: number; penalty: number; early?: boolean }): Text {
  const { width, length, penalty, early = false } = options;
  let open: Text[] = [{ ids: [], sum: 0 }];
  let ended: Text[] = [];
  for (let i = 1; i <= length; i++) {
    const all = open.flatMap((text) => continued(text, seed)).sort((a, b) => b.sum - a.sum);
    const kept = all.slice(0, 2 * width);
    const finished = kept.slice(0, width).filter((text) => over(text) || i === length);
    ended = [...ended, ...finished].sort((a, b) => score(b, penalty) - score(a, penalty)).slice(0, width);
    if (i === length) break;
    open = kept.filter((text) => !over(text)).slice(0, width);
    const bestOpen = (open[0]?.sum ?? Number.NEGATIVE_INFINITY) / i ** penalty;
    const worst = score(ended.at(-1) ?? { ids: [0], sum: Number.NEGATIVE_INFINITY }, penalty);
    if (ended.length === width && (early || bestOpen <= worst)) break;
  }
  return ended[0] as Text;
}

describe("beam", () => {
  it("finds the best of all texts where it is wide enough", async () => {
    const found = new Set<number>();
    for (let seed = 0; seed < 12; seed++) {
      for (const lengthPenalty of [0, 1, 2]) {
        const model = scriptedModel(on, { vocabulary: V, say: say(seed) });
        const expected = best(everyText(seed, 3), lengthPenalty);
        const ids = await idsOf(model, { prompt, maxNew: 3, stop, strategy: beam({ width: 64, lengthPenalty }) });
        expect(ids).toEqual(withoutStop(expected));
        found.add(expected.ids.length);
        model.dispose();
      }
    }
    expect([...found].sort()).toEqual([1, 2, 3]);
  });

  it("is the algorithm in plain lists at every width", async () => {
    let better = 0;
    for (let seed = 0; seed < 25; seed++) {
      const model = scriptedModel(on, { vocabulary: V, say: say(seed) });
      for (const [width, penalty, early] of [
        [1, 1, false],
        [2, 1, false],
        [3, 0, true],
        [3, 1.5, false],
        [5, -1, false],
      ] as const) {
        const expected = naiveBeam(seed, { width, length: 6, penalty, early });
        const strategy = beam({ width, lengthPenalty: penalty, earlyStopping: early });
        for (const cache of [true, false]) {
          expect(await idsOf(model, { prompt, maxNew: 6, stop, strategy, cache })).toEqual(withoutStop(expected));
        }
        const one = naiveBeam(seed, { width: 1, length: 6, penalty });
        if (score(expected, penalty) > score(one, penalty)) better++;
      }
      model.dispose();
    }
    expect(better).toBeGreaterThan(10);
  });

  it("says what the model gave each token, and how the text ended", async () => {
    const live = on.live();
    const model = scriptedModel(on, { vocabulary: V, say: say(3) });
    const options = { prompt, maxNew: 5, stop, topLogProbabilities: 2, strategy: beam({ width: 3 }) };
    const { tokens, ids, ending } = await collect(model, options);
    const sequence = [...prompt];
    for (const token of tokens) {
      const logs = logSoftmax(say(3)(sequence));
      expect(token.logProbability).toBeCloseTo(logs[token.id] ?? 0, 12);
      expect(token.top?.[0]?.logProbability).toBeCloseTo(Math.max(...logs), 12);
      expect(token.top).toHaveLength(2);
      sequence.push(token.id);
    }
    expect(ending).toBe(ids.length === 5 ? "maxNew" : "stopId");
    model.dispose();
    expect(on.live()).toBe(live);
  });

  it("leaves out what the model excludes, and refuses options out of range", async () => {
    const none = Number.NEGATIVE_INFINITY;
    const model = scriptedModel(on, { vocabulary: V, say: () => [none, 0, none, none] });
    expect(await idsOf(model, { prompt, maxNew: 3, strategy: beam({ width: 3 }) })).toEqual([1, 1, 1]);
    model.dispose();
    expect(() => beam({ width: 0 })).toThrow(/beam: width is 0/);
    expect(() => beam({ lengthPenalty: Number.NaN })).toThrow(ShapeError);
  });
});
