// A conversation that goes on with what it left behind says what it would say from the start, and runs its new tokens only.
import { existsSync, readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { RouterPlugin } from "@switchyard/core/moe";
import { attentionAware, expertChoice, similarityAware } from "@switchyard/routers";
import { describe, expect, it } from "vitest";
import { generateBatch } from "../generate.ts";
import type { LanguageModel } from "../model.ts";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { loadModel } from "../pretrained.ts";
import { beam } from "./beam.ts";
import { contrastive } from "./contrastive.ts";
import { contrastiveSearch } from "./contrastive-search.ts";
import { collect } from "./decoding.test-util.ts";
import { doLa } from "./do-la.ts";
import { dynamicRouting } from "./dynamic-routing.ts";
import { type PrefixCache, prefixCache } from "./prefix-cache.ts";
import { sample } from "./sample.ts";
import { selfConsistency } from "./self-consistency.ts";
import { selfContrast } from "./self-contrast.ts";
import type { DecodingStrategy } from "./strategy.ts";

const fixtures = fileURLToPath(new URL("../../test/fixtures/", import.meta.url));
const folders = readdirSync(fixtures).filter((name) => existsSync(`${fixtures}/${name}/golden.json`));
const text = (length: number, seed = 11): number[] => Array.from({ length }, (_, i) => (i * 37 + seed) % 256);

/** The model, and how many positions it was asked to run since the last look. */
function counting(model: LanguageModel) {
  let positions = 0;
  const step: LanguageModel["step"] = (ids, given) => {
    positions += ids.shape[1] ?? 0;
    return model.step(ids, given);
  };
  const run = (): number => {
    const found = positions;
    positions = 0;
    return found;
  };
  return { model: { ...model, step }, run };
}

interface Turn {
  readonly prompt: readonly number[];
  readonly maxNew?: number;
  readonly strategy?: DecodingStrategy;
}

/** The same turn with and without what is kept; gives how many tokens of the prompt were not run. */
async function turn(model: LanguageModel, prefix: PrefixCache, { prompt, maxNew = 4, strategy }: Turn) {
  const counted = counting(model);
  const how = { prompt, maxNew, ...(strategy ? { strategy } : { temperature: 0 }), prefillChunk: 5 };
  const before = prefix.reused;
  const fresh = await collect(counted.model, how);
  const all = counted.run();
  const kept = await collect(counted.model, { ...how, prefix });
  const spared = all - counted.run();
  expect(kept.ids).toEqual(fresh.ids);
  for (const [i, { logProbability }] of fresh.tokens.entries()) {
    expect(Math.abs((kept.tokens[i]?.logProbability ?? 0) - logProbability)).toBeLessThan(1e-5);
  }
  expect(prefix.reused - before).toBe(spared);
  return { ids: fresh.ids, spared };
}

describe("a conversation of three turns", () => {
  it.each(folders)("%s", async (name) => {
    const on = makeEngine();
    const { model, close } = await loadModel(`${fixtures}/${name}`, { engine: on });
    const live = on.live();
    const prefix = prefixCache();
    const first = text(9);
    const one = await turn(model, prefix, { prompt: first });
    expect(one.spared).toBe(0);
    // The last token of an answer was never run.
    const second = [...first, ...one.ids, ...text(6, 5)];
    const two = await turn(model, prefix, { prompt: second });
    expect(two.spared).toBe(9 + 3);
    // Said otherwise from the eighth token on.
    const third = [...first.slice(0, 7), ...text(6, 90)];
    expect((await turn(model, prefix, { prompt: third })).spared).toBe(7);
    expect(prefix.texts).toBe(1);
    prefix.dispose();
    expect(on.live()).toBe(live);
    await close();
  });

  const plugins: readonly [string, RouterPlugin][] = [
    ["similarityAware", similarityAware({ k: 2 })],
    ["similarityAware, neighbours", similarityAware({ k: 2, similarity: "low-rank", neighbours: 3 })],
    ["attentionAware", attentionAware({ k: 2 })],
    ["attentionAware, min-entropy", attentionAware({ k: 2, headAggregation: "min-entropy" })],
  ];
  it.each(plugins)("with a router that keeps what it saw: %s", async (_, router) => {
    const on = makeEngine();
    const model = loudModel(on, { ...smallConfig, context: 40, router });
    const live = on.live();
    for (const texts of [1, 2]) {
      const prefix = prefixCache({ texts });
      const ids = (length: number, seed: number): number[] => text(length, seed).map((id) => id % 13);
      const one = await turn(model, prefix, { prompt: ids(9, 1) });
      const next = [...ids(9, 1), ...one.ids, ...ids(5, 3)];
      expect((await turn(model, prefix, { prompt: next })).spared).toBe(12);
      expect((await turn(model, prefix, { prompt: [...next.slice(0, 10), 12, 12, 3] })).spared).toBe(10);
      expect(prefix.texts).toBe(texts);
      prefix.dispose();
      expect(on.live()).toBe(live);
    }
  });
});

describe("keeps", () => {
  const model = loudModel(makeEngine(), { ...smallConfig, context: 40 });
  const on = model.engine;
  const make = (prefix: PrefixCache, prompt: readonly number[]) => turn(model, prefix, { prompt });

  it("as many texts as it may, the latest used", async () => {
    const live = on.live();
    const prefix = prefixCache({ texts: 2 });
    const [a, b, c] = [
      [1, 1, 1, 1],
      [2, 2, 2, 2],
      [3, 3, 3, 3],
    ] as const;
    await make(prefix, a);
    await make(prefix, b);
    expect([prefix.texts, prefix.covers([...a, 7]), prefix.covers(b)]).toEqual([2, 4, 3]);
    // Part of a text that is kept is copied: it stays for others.
    expect((await make(prefix, [1, 1, 5, 5])).spared).toBe(2);
    expect([prefix.covers([...a, 7]), prefix.covers(b)]).toEqual([4, 0]);
    await make(prefix, c);
    expect([prefix.texts, prefix.covers(a), prefix.covers([...c, 7])]).toEqual([2, 2, 4]);
    prefix.dispose();
    expect([prefix.texts, prefix.bytes, on.live()]).toEqual([0, 0, live]);
    // What ends after that leaves nothing.
    expect((await make(prefix, a)).spared).toBe(0);
    expect([prefix.texts, on.live()]).toEqual([0, live]);
  });

  it("as many bytes as it may", async () => {
    const live = on.live();
    // Two layers of keys and values, 2 heads of 6 channels, 4 bytes each.
    const position = 2 * 2 * 2 * 6 * 4;
    const prefix = prefixCache({ texts: 9, bytes: 20 * position });
    await make(prefix, [1, 1, 1, 1]);
    expect(prefix.bytes).toBe(7 * position);
    await make(prefix, [2, 2, 2, 2]);
    await make(prefix, [3, 3, 3, 3]);
    expect([prefix.texts, prefix.bytes]).toEqual([2, 14 * position]);
    await make(
      prefix,
      text(19).map((id) => id % 13),
    );
    expect([prefix.texts, prefix.covers([3, 3, 3, 3])]).toEqual([2, 3]);
    prefix.dispose();
    const none = prefixCache({ bytes: position });
    await make(none, [1, 1]);
    expect([none.texts, on.live()]).toEqual([0, live]);
  });

  it("one of the same text", async () => {
    const prefix = prefixCache({ texts: 3 });
    for (let i = 0; i < 3; i++) expect((await make(prefix, [4, 5, 6])).spared).toBe(i === 0 ? 0 : 2);
    expect(prefix.texts).toBe(1);
    // A prompt of one token is run whatever is kept.
    expect((await make(prefix, [4])).spared).toBe(0);
    prefix.dispose();
  });

  it("what a text had run when it was left, in the prompt or after it", async () => {
    const live = on.live();
    const prefix = prefixCache();
    const prompt = text(12).map((id) => id % 13);
    const control = new AbortController();
    const failing: LanguageModel = {
      ...model,
      step: async (ids, given) => {
        if ((given?.cache?.length ?? 0) === 8) throw new Error("no more");
        return model.step(ids, given);
      },
    };
    await expect(collect(failing, { prompt, maxNew: 2, prefillChunk: 4, prefix })).rejects.toThrow("no more");
    expect(prefix.covers(prompt)).toBe(8);
    const running = generateBatch(model, { prompts: [prompt], signal: control.signal, prefix, temperature: 0 });
    await running.next();
    await running.next();
    control.abort();
    await expect(running.next()).rejects.toThrow();
    expect(prefix.covers([...prompt, 0])).toBe(12);
    expect((await make(prefix, [...prompt, 1])).spared).toBe(12);
    prefix.dispose();
    expect(on.live()).toBe(live);
  });
});

describe("runs the whole prompt", () => {
  it("where rotary positions depend on the length", async () => {
    const on = makeEngine();
    const { model, close } = await loadModel(`${fixtures}/phimoe`, { engine: on });
    const live = on.live();
    const prefix = prefixCache();
    await turn(model, prefix, { prompt: text(50) });
    // Its factors change after 64 positions: neither does a longer text take what a shorter one left,
    expect((await turn(model, prefix, { prompt: text(70) })).spared).toBe(0);
    expect((await turn(model, prefix, { prompt: text(58) })).spared).toBe(50);
    // nor the other way round, whether the prompt or the answer went beyond.
    prefix.dispose();
    for (const [length, maxNew] of [
      [70, 4],
      [60, 10],
    ] as const) {
      const other = prefixCache();
      await turn(model, other, { prompt: text(length), maxNew });
      expect(other.texts).toBe(0);
      expect((await turn(model, other, { prompt: text(30) })).spared).toBe(0);
      other.dispose();
    }
    expect(on.live()).toBe(live);
    await close();
  });

  it("for routers that look at later tokens", async () => {
    const router = expertChoice({ capacityFactor: 2, decoding: true });
    const model = loudModel(makeEngine(), { ...smallConfig, context: 40, router });
    const prefix = prefixCache();
    for (let i = 0; i < 2; i++) await collect(model, { prompt: [1, 2, 3], maxNew: 2, allowNonCausal: true, prefix });
    expect([prefix.texts, prefix.reused]).toEqual([0, 0]);
  });

  it("without a cache, and for strategies of several rows, or another routing", async () => {
    const on = makeEngine();
    const { model, close } = await loadModel(`${fixtures}/olmoe`, { engine: on });
    const amateur = await loadModel(`${fixtures}/olmoe`, { engine: on });
    const live = on.live();
    const prefix = prefixCache();
    const prompt = text(8);
    await turn(model, prefix, { prompt });
    const longer = [...prompt, 1, 2];
    for (const strategy of [
      ...[beam({ width: 2 }), selfContrast(), dynamicRouting(), doLa({ layers: [0] }), contrastiveSearch()],
      ...[sample({ temperature: 0, routing: { k: 1 } }), contrastive({ amateur: amateur.model })],
      selfConsistency({ samples: 2, answer: () => "one" }),
    ]) {
      const { ids } = await collect(model, { prompt: longer, maxNew: 3, strategy });
      const before = prefix.reused;
      expect((await collect(model, { prompt: longer, maxNew: 3, strategy, prefix })).ids).toEqual(ids);
      // The strong one of two models goes on from what was kept.
      expect([strategy.name, prefix.reused - before]).toEqual([strategy.name, strategy.name === "contrastive" ? 9 : 0]);
    }
    await collect(model, { prompt: longer, maxNew: 2, cache: false, prefix });
    expect((await turn(model, prefix, { prompt: [...longer, 3] })).spared).toBeGreaterThanOrEqual(10);
    prefix.dispose();
    expect(on.live()).toBe(live);
    await close();
    await amateur.close();
  });
});

it("is one model's, and says what it takes", async () => {
  const [one, other] = [loudModel(makeEngine(), smallConfig), loudModel(makeEngine(), smallConfig)];
  const prefix = prefixCache();
  await collect(one, { prompt: [1, 2], maxNew: 1, prefix });
  await expect(collect(other, { prompt: [1, 2], maxNew: 1, prefix })).rejects.toThrow(/another model's/);
  for (const texts of [-1, 1.5, Number.NaN]) expect(() => prefixCache({ texts })).toThrow(/texts is/);
  for (const bytes of [-1, Number.NaN]) expect(() => prefixCache({ bytes })).toThrow(/bytes is/);
});
