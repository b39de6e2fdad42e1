// Decoding under a threshold on the routing, and with any number of experts, against passes with that override.
import type { RoutingOverride } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { expect, it } from "vitest";
import { loudModel, makeEngine, smallConfig } from "../models.test-util.ts";
import { collect, idsOf, logSoftmax, scriptedModel } from "./decoding.test-util.ts";
import { dynamicRouting } from "./dynamic-routing.ts";
import { ensembleRouting } from "./ensemble-routing.ts";
import { greedy } from "./greedy.ts";
import { sample } from "./sample.ts";
import type { DecodingStrategy } from "./strategy.ts";

const on = makeEngine(64);
const model = loudModel(on, { ...smallConfig, router: topK({ k: 2 }) });

it.each<[string, DecodingStrategy, RoutingOverride]>([
  ["dynamicRouting 0.5", dynamicRouting(), { threshold: 0.5 }],
  ["dynamicRouting 0.9, at most 2", dynamicRouting({ threshold: 0.9, k: 2 }), { threshold: 0.9, k: 2 }],
  ["ensembleRouting 3", ensembleRouting(), { k: 3 }],
  ["ensembleRouting 1", ensembleRouting({ k: 1 }), { k: 1 }],
  ["greedy, routed", greedy({ routing: { ranks: [2, 0] } }), { ranks: [2, 0] }],
])("%s takes the most likely token of passes under that override", async (_, strategy, override) => {
  const { ids, tokens } = await collect(model, { prompt: [3, 1], maxNew: 6, strategy });
  const sequence = [3, 1];
  for (const [i, id] of ids.entries()) {
    const input = on.tensor(Int32Array.from(sequence), [1, sequence.length]);
    const logits = await model.step(input, { override: [override] });
    const logs = logSoftmax(Array.from(await logits.data()));
    expect(id).toBe(logs.indexOf(Math.max(...logs)));
    expect(tokens[i]?.logProbability).toBeCloseTo(logs[id] ?? 0, 10);
    sequence.push(id);
    input.dispose();
    logits.dispose();
  }
});

it("with as many experts as trained is greedy decoding; sampling draws what sample draws", async () => {
  const options = { prompt: [5, 2], maxNew: 6 };
  expect(await idsOf(model, { ...options, strategy: ensembleRouting({ k: 2 }) })).toEqual(
    await idsOf(model, { ...options, strategy: greedy() }),
  );
  const hot = { temperature: 2, topP: 0.95 };
  expect(await idsOf(model, { ...options, seed: 4, strategy: ensembleRouting({ k: 2, ...hot }) })).toEqual(
    await idsOf(model, { ...options, seed: 4, strategy: sample(hot) }),
  );
});

it("refuses numbers out of range and models without routers", async () => {
  expect(() => dynamicRouting({ threshold: 1.1 })).toThrow(/dynamicRouting: threshold is 1.1/);
  expect(() => ensembleRouting({ k: 0 })).toThrow(/ensembleRouting: k is 0/);
  const live = on.live();
  await expect(idsOf(model, { prompt: [1], strategy: ensembleRouting({ k: 6 }) })).rejects.toThrow(/k = 6, but only 5/);
  const dense = scriptedModel(on, { routers: false, say: () => [1, 2, 3, 4] });
  for (const strategy of [dynamicRouting(), ensembleRouting(), sample({ routing: { k: 1 } })]) {
    await expect(idsOf(dense, { prompt: [1], strategy })).rejects.toThrow(/this model has no router/);
  }
  dense.dispose();
  expect(on.live()).toBe(live);
});
