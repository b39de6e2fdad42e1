// Self-contrast decoding on a transformer: the must-pass properties of 2405.14507, and two naive passes as the oracle.
import { type Engine, ShapeError, UnsupportedError } from "@switchyard/core";
import type { RoutingOverride } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { generateBatch } from "../generate.ts";
import { loudModel, makeEngine, plainTopK, smallConfig } from "../models.test-util.ts";
import { collect, collectRows, idsOf, logSoftmax, noise, scriptedModel } from "./decoding.test-util.ts";
import { greedy } from "./greedy.ts";
import { selfContrast } from "./self-contrast.ts";
import type { DecodingModel } from "./strategy.ts";

const on = makeEngine(64);
const config = { ...smallConfig, context: 24 };
const model = loudModel(on, { ...config, router: topK({ k: 2 }) });
const prompts = [[3, 1], [4, 1, 5, 9, 2], [6], [12, 12, 0]];
const maxNew = 8;

/** Logits of the last position under a routing, the whole sequence computed anew. */
async function says(of: DecodingModel, sequence: readonly number[], override?: RoutingOverride): Promise<number[]> {
  const ids = of.engine.tensor(Int32Array.from(sequence), [1, sequence.length]);
  const logits = of.engine.scope(() => of.forward(of.params, ids, override ? { override: [override] } : {}).logits);
  const data = Array.from(await logits.data()).slice(-of.vocabulary);
  ids.dispose();
  logits.dispose();
  return data;
}

/** The formula of the paper with two full passes per token. */
async function naive(
  of: DecodingModel,
  prompt: readonly number[],
  { alpha, beta, rank, strong }: { alpha: number; beta: number; rank: number; strong?: RoutingOverride },
) {
  const sequence = [...prompt];
  const plausible: boolean[] = [];
  for (let i = 0; i < maxNew; i++) {
    const zs = await says(of, sequence, strong);
    const zw = await says(of, sequence, { ranks: [rank - 1] });
    const cutoff = Math.log(alpha) + Math.max(...zs);
    const z = zs.map((x, id) => (x >= cutoff ? (1 + beta) * x - beta * (zw[id] ?? 0) : Number.NEGATIVE_INFINITY));
    const id = z.indexOf(Math.max(...z));
    plausible.push((zs[id] ?? 0) >= cutoff);
    sequence.push(id);
  }
  return { ids: sequence.slice(prompt.length), plausible };
}

describe("selfContrast", () => {
  it("is the formula over two passes, for every rank and strength", async () => {
    const greedily = await idsOf(model, { prompt: prompts[1] ?? [], maxNew, strategy: greedy() });
    let different = 0;
    for (const [alpha, beta, rank, k] of [
      [0.1, 0.5, 2, undefined],
      [0.01, 0.9, 1, undefined],
      [0.05, 0.7, 5, undefined],
      [0.1, 2, 3, 3],
    ] as const) {
      const strong = k ? { k } : undefined;
      const strategy = selfContrast({ alpha, beta, weakRank: rank, ...(strong ? { strong } : {}) });
      const { ids, plausible } = await naive(model, prompts[1] ?? [], {
        alpha,
        beta,
        rank,
        ...(strong ? { strong } : {}),
      });
      expect(await idsOf(model, { prompt: prompts[1] ?? [], maxNew, strategy })).toEqual(ids);
      expect(await idsOf(model, { prompt: prompts[1] ?? [], maxNew, strategy, cache: false })).toEqual(ids);
      expect(plausible).not.toContain(false);
      if (ids.join() !== greedily.join()) different++;
    }
    expect(different).toBeGreaterThan(1);
  });

  it("is greedy where beta is 0, alpha is 1, or both passes are the same", async () => {
    const one = loudModel(on, { ...config, router: topK({ k: 1 }) });
    for (const prompt of prompts) {
      const greedily = await idsOf(model, { prompt, maxNew, strategy: greedy() });
      const contrasted = (options: Parameters<typeof selfContrast>[0]) =>
        idsOf(model, { prompt, maxNew, strategy: selfContrast(options) });
      expect(await contrasted({ beta: 0 })).toEqual(greedily);
      expect(await contrasted({ alpha: 1, beta: 0.9 })).toEqual(greedily);
      for (const beta of [0.1, 0.5, 3]) expect(await contrasted({ weak: { k: 2 }, beta })).toEqual(greedily);
      // A model with one expert per token and the weak pass of rank 1.
      const single = await idsOf(one, { prompt, maxNew, strategy: greedy() });
      expect(await idsOf(one, { prompt, maxNew, strategy: selfContrast({ weakRank: 1, beta: 0.8 }) })).toEqual(single);
    }
  });

  it("takes random experts as the weak routing, the same ones with a cache and without, for one seed", async () => {
    const [prompt = []] = prompts;
    const said = (random: number, cache: boolean) =>
      idsOf(model, { prompt, maxNew, cache, strategy: selfContrast({ weak: { random }, beta: 2 }) });
    const ids = await said(1, true);
    expect(await said(1, false)).toEqual(ids);
    const others = await Promise.all([2, 3, 4].map((seed) => said(seed, true)));
    expect(others.some((other) => other.join() !== ids.join())).toBe(true);
  });

  it("does not see a constant added to the weak logits, takes nothing implausible, and divides before it masks", async () => {
    const alpha = 0.3;
    for (let seed = 0; seed < 10; seed++) {
      const weakAt = (shift: number) =>
        scriptedModel(on, {
          vocabulary: 7,
          say: (sequence, override) =>
            noise(7, seed, override ? 1 : 0, ...sequence).map((z) => (override ? z + shift : z)),
        });
      const [plain, shifted] = [weakAt(0), weakAt(11)];
      const strategy = selfContrast({ alpha, beta: 1.5, temperatures: { strong: 2, weak: 0.5 } });
      const options = { prompt: [1], maxNew: 10, strategy };
      const { tokens, ids } = await collect(plain, { ...options, topLogProbabilities: 1 });
      expect(await idsOf(shifted, options)).toEqual(ids);
      const sequence = [1];
      for (const { id, logProbability, top } of tokens) {
        // Of the logits divided by 2, alpha bounds the difference to the largest.
        expect((logProbability - (top?.[0]?.logProbability ?? 0)) / 2).toBeGreaterThanOrEqual(Math.log(alpha) - 1e-12);
        expect(logProbability).toBeCloseTo(logSoftmax(noise(7, seed, 0, ...sequence))[id] ?? 0, 12);
        sequence.push(id);
      }
      plain.dispose();
      shifted.dispose();
    }
  });

  it("samples the softmax of what the contrast gives", async () => {
    const [strong, weak] = [
      [1, 0.5, -1, 0],
      [0, 1, 1, -1],
    ];
    const on = makeEngine(64);
    const scripted = scriptedModel(on, { say: (_, override) => (override ? weak : strong) });
    const [alpha, beta, draws] = [0.2, 0.5, 500];
    const counts = [0, 0, 0, 0];
    const strategy = selfContrast({ alpha, beta, sample: true });
    for (let seed = 0; seed < draws; seed++) {
      const [id = 0] = await idsOf(scripted, { prompt: [1], maxNew: 1, seed, strategy });
      counts[id] = (counts[id] ?? 0) + 1;
    }
    const z = strong.map((s, i) => (s >= Math.log(alpha) + 1 ? Math.exp((1 + beta) * s - beta * (weak[i] ?? 0)) : 0));
    const total = z.reduce((a, b) => a + b, 0);
    for (const [i, w] of z.entries()) {
      const p = w / total;
      expect(Math.abs((counts[i] ?? 0) - draws * p)).toBeLessThanOrEqual(5 * Math.sqrt(draws * p * (1 - p)));
    }
    expect(counts[2]).toBe(0);
  });

  it("runs strong and weak rows of all prompts as one batch with one cache", async () => {
    const seen: string[] = [];
    const scripted = scriptedModel(on, {
      say: (sequence, override) => noise(4, override ? 1 : 0, ...sequence),
      onStep: (rows, { override, cache }) => {
        seen.push(`${rows.map((row) => row.length)} ${override?.map((one) => one?.ranks?.[0] ?? "-")} ${!!cache}`);
      },
    });
    const strategy = selfContrast();
    const { ids } = await collectRows(generateBatch(scripted, { prompts: [[1], [2, 3]], maxNew: 3, strategy }), 2);
    expect(seen).toEqual(["2,2,2,2 -,-,1,1 true", "1,1,1,1 -,-,1,1 true", "1,1,1,1 -,-,1,1 true"]);
    expect(ids).toEqual([
      await idsOf(scripted, { prompt: [1], maxNew: 3, strategy }),
      await idsOf(scripted, { prompt: [2, 3], maxNew: 3, strategy }),
    ]);
    scripted.dispose();
  });

  it("never takes a stop id where that is asked for", async () => {
    const scripted = scriptedModel(on, { say: () => [9, 0, 1, 2] });
    const options = { prompt: [1], maxNew: 3, stop: [0] };
    expect((await collect(scripted, { ...options, strategy: selfContrast() })).ending).toBe("stopId");
    expect(await idsOf(scripted, { ...options, strategy: selfContrast({ forbidStopIds: true }) })).toEqual([3, 3, 3]);
    scripted.dispose();
  });

  it("refuses options out of range, and models it does not fit", async () => {
    expect(() => selfContrast({ alpha: 2 })).toThrow(/alpha is 2/);
    expect(() => selfContrast({ beta: -1 })).toThrow(ShapeError);
    expect(() => selfContrast({ weakRank: 0 })).toThrow(/weakRank is 0/);
    expect(() => selfContrast({ weakRank: 2, weak: { k: 1 } })).toThrow(/weakRank and weak/);
    const refused = (of: DecodingModel, options = {}) =>
      idsOf(of, { prompt: [1], maxNew: 2, strategy: selfContrast(options) });
    const live = on.live();
    await expect(refused(model, { weakRank: 6 })).rejects.toThrow(/ranks name 5 of 5/);
    const stubborn = (engine: Engine) => loudModel(engine, { ...config, router: plainTopK(2) });
    const other = makeEngine(64);
    await expect(refused(stubborn(other))).rejects.toThrow(/router of layer 0 takes no overrides/);
    const dense = scriptedModel(on, { routers: false, say: () => [1, 2, 3, 4] });
    await expect(refused(dense)).rejects.toThrow(/selfContrast: .* this model has no router/);
    await expect(refused(dense)).rejects.toThrow(UnsupportedError);
    dense.dispose();
    expect(on.live()).toBe(live);
  });
});
