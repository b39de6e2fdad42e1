// Contrastive decoding with a second model as the amateur.
import { expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { contrastive } from "./contrastive.ts";
import { collect, idsOf, noise, scriptedModel } from "./decoding.test-util.ts";

const on = makeEngine(64);
const elsewhere = makeEngine(32);
const says = (who: number) => (sequence: readonly number[]) => noise(6, who, ...sequence);

it("is the formula over both models, each with its own cache and engine", async () => {
  const model = scriptedModel(on, { vocabulary: 6, say: says(1) });
  const amateur = scriptedModel(elsewhere, { vocabulary: 6, say: says(2) });
  const [alpha, beta] = [0.05, 0.8];
  for (const cache of [true, false]) {
    const sequence = [4, 2];
    const { ids } = await collect(model, {
      prompt: [4, 2],
      maxNew: 12,
      cache,
      strategy: contrastive({ amateur, alpha, beta }),
    });
    for (const id of ids) {
      const [s, w] = [says(1)(sequence), says(2)(sequence)];
      const z = s.map((x, i) => (x >= Math.log(alpha) + Math.max(...s) ? (1 + beta) * x - beta * (w[i] ?? 0) : -1e9));
      expect(id).toBe(z.indexOf(Math.max(...z)));
      sequence.push(id);
    }
    expect(ids).toHaveLength(12);
  }
  expect(await idsOf(model, { prompt: [4, 2], maxNew: 12, strategy: contrastive({ amateur: model }) })).toEqual(
    await idsOf(model, { prompt: [4, 2], maxNew: 12, temperature: 0 }),
  );
});

it("refuses another vocabulary, and says which model's context is full", async () => {
  const model = scriptedModel(on, { vocabulary: 6, say: says(1) });
  const small = scriptedModel(elsewhere, { vocabulary: 5, say: () => [1, 2, 3, 4, 5] });
  const short = scriptedModel(elsewhere, { vocabulary: 6, context: 4, say: says(2) });
  const run = (amateur: typeof small) =>
    idsOf(model, { prompt: [1, 2], maxNew: 9, strategy: contrastive({ amateur }) });
  await expect(run(small)).rejects.toThrow(/a vocabulary of 6, the amateur one of 5/);
  const live = [on.live(), elsewhere.live()];
  await expect(run(short)).rejects.toThrow(/contrastive \(amateur\): 5 tokens, but the context of the model is 4/);
  expect([on.live(), elsewhere.live()]).toEqual(live);
  expect(() => contrastive({ amateur: small, alpha: -1 })).toThrow(/alpha is -1/);
});
