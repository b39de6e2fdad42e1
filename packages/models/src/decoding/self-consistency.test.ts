// Voting over samples: which sample wins, what is reported, and that samples are what each would be alone.
import { random } from "@switchyard/core";
import { expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { collect, idsOf, noise, scriptedModel } from "./decoding.test-util.ts";
import { greedy } from "./greedy.ts";
import { sample } from "./sample.ts";
import { type ConsistencyReport, selfConsistency } from "./self-consistency.ts";
import { selfContrast } from "./self-contrast.ts";

const on = makeEngine(64);
const say = (sequence: readonly number[]) => noise(5, 3, ...sequence).map((z) => z / 3);
/** The last token, unless it is 0. */
const answer = ({ ids }: { readonly ids: readonly number[] }) => (ids.at(-1) === 0 ? undefined : `${ids.at(-1)}`);

it("gives the first sample with the answer that most samples have", async () => {
  const live = on.live();
  const model = scriptedModel(on, { vocabulary: 5, say });
  let moved = 0;
  for (let seed = 0; seed < 10; seed++) {
    let told: ConsistencyReport | undefined;
    const report = (one: ConsistencyReport) => {
      told = one;
    };
    const strategy = selfConsistency({ answer, samples: 9, strategy: sample({ temperature: 1.5 }), report });
    const { ids, ending } = await collect(model, { prompt: [1, 2], maxNew: 4, seed, strategy });
    const samples = told?.samples ?? [];
    expect(samples).toHaveLength(9);
    const votes = new Map<string, number>();
    for (const one of samples) if (one.answer) votes.set(one.answer, (votes.get(one.answer) ?? 0) + 1);
    expect(told?.vote?.votes).toBe(Math.max(...votes.values()));
    expect(ids).toEqual(samples.find((one) => one.answer === told?.vote?.answer)?.ids);
    expect(ending).toBe("maxNew");
    if (ids.join() !== samples[0]?.ids.join()) moved++;
    // Sample 3, drawn by hand.
    const draws = random(on, seed).at("sample", 3);
    const sequence = [1, 2];
    for (let i = 0; i < 4; i++) {
      const weights = say(sequence).map((z) => Math.exp(z / 1.5));
      const drawn = (draws.at("generate", i).host("uniform", 1)[0] ?? 0) * weights.reduce((a, b) => a + b, 0);
      const order = [...weights.keys()].sort((a, b) => (weights[b] ?? 0) - (weights[a] ?? 0));
      const until = (n: number) => order.slice(0, n + 1).reduce((sum, id) => sum + (weights[id] ?? 0), 0);
      sequence.push(order.find((_, n) => drawn < until(n)) ?? -1);
    }
    expect(samples[3]?.ids).toEqual(sequence.slice(2));
  }
  expect(moved).toBeGreaterThan(0);
  model.dispose();
  expect(on.live()).toBe(live);
});

it("takes the first sample where none has an answer, and ends samples at stop ids", async () => {
  const model = scriptedModel(on, { vocabulary: 5, say });
  let told: ConsistencyReport | undefined;
  const options = {
    samples: 6,
    report(one: ConsistencyReport) {
      told = one;
    },
  };
  const none = selfConsistency({ ...options, answer: () => undefined });
  const { ids, ending } = await collect(model, { prompt: [1], maxNew: 12, stop: [2], strategy: none });
  expect(told?.vote).toBeUndefined();
  expect(ids).toEqual(told?.samples[0]?.ids);
  expect(new Set(told?.samples.map((one) => one.ids.length)).size).toBeGreaterThan(1);
  for (const one of told?.samples ?? []) expect(one.ids).not.toContain(2);
  expect(ending).toBe(ids.length === 12 ? "maxNew" : "stopId");
  model.dispose();
});

it("runs over any strategy, a prompt of many samples only once", async () => {
  const rows: number[] = [];
  const model = scriptedModel(on, {
    vocabulary: 5,
    say: (sequence, override) => noise(5, override ? 1 : 0, ...sequence),
    onStep: (ids) => rows.push(ids.length),
  });
  const same = selfConsistency({ answer, samples: 3, strategy: greedy() });
  expect(await idsOf(model, { prompt: [1, 4], maxNew: 3, strategy: same })).toEqual(
    await idsOf(model, { prompt: [1, 4], maxNew: 3, temperature: 0 }),
  );
  expect(rows).toEqual([1, 3, 3, 1, 1, 1]);
  const contrasted = selfConsistency({ answer, samples: 3, strategy: selfContrast({ sample: true }) });
  rows.length = 0;
  expect(await idsOf(model, { prompt: [1, 4], maxNew: 3, strategy: contrasted })).toHaveLength(3);
  expect(rows).toEqual([2, 6, 6]);
  model.dispose();
  expect(() => selfConsistency({ answer, samples: 0 })).toThrow(/samples is 0/);
});
