// What holds for every strategy: a batch gives what each prompt alone gives, nothing leaks however it ends, failures are told.
import type { Engine } from "@switchyard/core";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { generate, generateBatch } from "../generate.ts";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { beam } from "./beam.ts";
import { collect, collectRows, idsOf, noise, type Script, scriptedModel } from "./decoding.test-util.ts";
import { decodingStrategies } from "./strategies.ts";
import type { DecodingModel, DecodingStrategy } from "./strategy.ts";

const amateurEngine = makeEngine(64);
const amateur = loudModel(amateurEngine, { ...smallConfig, width: 4, context: 12, router: topK({ k: 1 }) });
const answer = ({ ids }: { readonly ids: readonly number[] }) => `${(ids.at(-1) ?? 0) % 3}`;

/** Each by its name, with options that make it differ from greedy decoding. */
const made: { readonly [name in keyof typeof decodingStrategies]: (other: DecodingModel) => DecodingStrategy } = {
  greedy: () => decodingStrategies.greedy({ repetitionPenalty: 1.3 }),
  sample: () => decodingStrategies.sample({ temperature: 1.5, minP: 0.01 }),
  beam: () => decodingStrategies.beam({ width: 3 }),
  selfContrast: () => decodingStrategies.selfContrast({ sample: true, alpha: 0.01 }),
  contrastive: (other) => decodingStrategies.contrastive({ amateur: other, sample: true, alpha: 0.01 }),
  contrastiveSearch: () => decodingStrategies.contrastiveSearch({ candidates: 3 }),
  doLa: () => decodingStrategies.doLa({ temperature: 1 }),
  dynamicRouting: () => decodingStrategies.dynamicRouting({ threshold: 0.8 }),
  ensembleRouting: () => decodingStrategies.ensembleRouting({ k: 3, temperature: 2 }),
  selfConsistency: () => decodingStrategies.selfConsistency({ answer, samples: 4 }),
};
const all = Object.entries(made);
const each = all.map(([name, make]) => [name, make] as const);

describe.each(each)("%s", (name, make) => {
  const on = makeEngine(64);
  const model = loudModel(on, { ...smallConfig, router: topK({ k: 2 }) });

  it("has its name", () => {
    expect(make(amateur).name).toBe(name);
  });

  it("gives each row of a batch what it gets alone, and tells the same probabilities", async () => {
    const live = on.live();
    const prompts = [[3, 1], [4, 1, 5, 9, 2, 6], [7]];
    const options = { strategy: make(amateur), topLogProbabilities: 3, seed: 5, stop: [8] };
    // The longest fills the context first; the others go on without it.
    const { tokens, endings } = await collectRows(generateBatch(model, { ...options, prompts }), 3);
    const ends: string[] = [];
    for (const [row, prompt] of prompts.entries()) {
      const alone = await collect(model, { ...options, prompt, seed: 5 + row });
      expect(tokens[row]?.map(({ id }) => id)).toEqual(alone.ids);
      for (const [i, token] of alone.tokens.entries()) {
        const found = tokens[row]?.[i];
        expect(found?.logProbability).toBeCloseTo(token.logProbability, 9);
        expect(found?.top?.map(({ id }) => id)).toEqual(token.top?.map(({ id }) => id));
      }
      ends.push(alone.ending);
    }
    expect(endings).toEqual(ends);
    expect(on.live()).toBe(live);
  });

  it("gives the same with the prompt in chunks and without a cache", async () => {
    const options = { prompt: [4, 1, 5, 9, 2], maxNew: 5, seed: 3, strategy: make(amateur) };
    const ids = await idsOf(model, options);
    expect(ids.length).toBeGreaterThan(0);
    for (const prefillChunk of [1, 3]) expect(await idsOf(model, { ...options, prefillChunk })).toEqual(ids);
    expect(await idsOf(model, { ...options, cache: false })).toEqual(ids);
  });

  it("frees all it holds when the reader leaves, when aborted, and when a pass fails midway", async () => {
    const script: Script = {
      vocabulary: 6,
      layers: 4,
      say: (sequence, override) => noise(6, override ? 1 : 0, ...sequence),
      hidden: (sequence, layers) => noise(2, layers, ...sequence),
    };
    const engines: readonly Engine[] = [on, makeEngine(64)];
    const [, elsewhere = on] = engines;
    const live = () => engines.map((engine) => engine.live());
    const start = live();
    const run = async (change: Partial<Script>, options: { signal?: AbortSignal; leave?: boolean } = {}) => {
      const scripted = scriptedModel(on, { ...script, ...change });
      const other = scriptedModel(elsewhere, script);
      const { leave, ...rest } = options;
      try {
        const strategy = make(other);
        for await (const _ of generate(scripted, {
          prompt: [1, 2, 3, 4],
          maxNew: 6,
          prefillChunk: 2,
          strategy,
          ...rest,
        })) {
          if (leave) break;
        }
      } finally {
        scripted.dispose();
        other.dispose();
      }
    };
    await run({}, { leave: true });
    expect(live()).toEqual(start);

    for (const at of [1, 2, 3, 4]) {
      let passes = 0;
      const onStep = () => {
        if (++passes === at) throw new Error("the device is gone");
      };
      await expect(run({ onStep })).rejects.toThrow("the device is gone");
      expect(live()).toEqual(start);
    }

    for (const at of [1, 3]) {
      let passes = 0;
      const controller = new AbortController();
      const onStep = () => {
        if (++passes === at) controller.abort(new Error("enough"));
      };
      await expect(run({ onStep }, { signal: controller.signal })).rejects.toThrow("enough");
      expect(passes).toBe(at);
      expect(live()).toEqual(start);
    }

    let calls = 0;
    const say = (sequence: readonly number[]) =>
      ++calls > 4 ? [1, Number.NaN, 2, 3, 4, Number.NaN] : noise(6, ...sequence);
    await expect(run({ say })).rejects.toThrow(/logits are not finite: 2 of 6 are NaN, in row \d after \d+ tokens/);
    expect(live()).toEqual(start);
    const flat = run({ say: () => new Array<number>(6).fill(Number.NEGATIVE_INFINITY) });
    await expect(flat).rejects.toThrow(/the largest of 6 is -Infinity/);
    expect(live()).toEqual(start);
  });
});

it("is tested on every strategy there is", () => {
  expect(Object.keys(decodingStrategies)).toEqual(all.map(([name]) => name));
});

it("a strategy of one's own is an object with a name and start", async () => {
  const on = makeEngine(64);
  const scripted = scriptedModel(on, { say: (sequence) => noise(4, ...sequence) });
  const inner = beam({ width: 2 });
  const twice: DecodingStrategy = { name: "twice", start: (model, rows, options) => inner.start(model, rows, options) };
  const options = { prompt: [1], maxNew: 4 };
  expect(await idsOf(scripted, { ...options, strategy: twice })).toEqual(
    await idsOf(scripted, { ...options, strategy: inner }),
  );
  scripted.dispose();
});
