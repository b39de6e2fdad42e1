// What Hugging Face's generate gives on a recorded checkpoint: beam search with its scores, repetition penalties, the cuts of sampling.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { makeEngine } from "../models.test-util.ts";
import { loadModel } from "../pretrained.ts";
import { type BeamOptions, beam } from "./beam.ts";
import { idsOf, startAlone } from "./decoding.test-util.ts";
import { greedy } from "./greedy.ts";
import { picker, type SamplingOptions } from "./pick.ts";
import type { DecodingModel } from "./strategy.ts";

type Case = { readonly prompt: readonly number[]; readonly ids: readonly number[] } & (
  | { readonly kind: "greedy"; readonly repetitionPenalty?: number }
  | ({ readonly kind: "beam"; readonly stop: readonly number[]; readonly score: number } & BeamOptions)
);
interface Processors {
  readonly logits: readonly number[];
  readonly sequence: readonly number[];
  readonly options: SamplingOptions;
  readonly probabilities: readonly number[];
}

const folder = new URL("../../test/fixtures/", import.meta.url);
const recorded: { readonly cases: readonly Case[]; readonly processors: readonly Processors[] } = JSON.parse(
  await readFile(fileURLToPath(new URL("decoding.json", folder)), "utf8"),
);

describe("generate of Hugging Face", () => {
  let model: DecodingModel;
  let close: () => Promise<void>;
  beforeAll(async () => {
    ({ model, close } = await loadModel(fileURLToPath(new URL("olmoe", folder)), { engine: makeEngine() }));
  });
  afterAll(() => close());

  it.each(recorded.cases.map((one, i) => [i, one] as const))("case %i", async (_, one) => {
    const { prompt, ids } = one;
    if (one.kind === "greedy") {
      const { repetitionPenalty = 1 } = one;
      expect(await idsOf(model, { prompt, maxNew: 12, strategy: greedy({ repetitionPenalty }) })).toEqual(ids);
      return;
    }
    const { stop, score, width = 4, lengthPenalty = 1, earlyStopping = false } = one;
    const strategy = beam({ width, lengthPenalty, earlyStopping });
    const state = startAlone(strategy, model, { prompt, limit: 12, stopIds: stop });
    const [found] = await state.next();
    state.dispose();
    const tokens = found?.tokens ?? [];
    expect(tokens.map(({ id }) => id)).toEqual(ids);
    const sum = tokens.reduce((total, { logProbability }) => total + logProbability, 0);
    expect(sum / tokens.length ** lengthPenalty / score).toBeCloseTo(1, 4);
  });
});

describe("logits processors of Hugging Face", () => {
  it.each(recorded.processors.map((one, i) => [i, one] as const))("leave what may be drawn, case %i", (_, one) => {
    const { logits, sequence, options, probabilities } = one;
    const pick = picker("sample", options);
    const draw = (uniform: number) => pick(Float64Array.from(logits), sequence, () => uniform);
    // Where one token's share of [0, 1) ends the next one's begins.
    const order = [...probabilities.keys()].sort((a, b) => (probabilities[b] ?? 0) - (probabilities[a] ?? 0));
    let end = 0;
    for (const id of order) {
      const p = probabilities[id] ?? 0;
      // The recorded logits are rounded to six digits.
      if (p < 1e-3) break;
      expect(draw(end + p * 0.01)).toBe(id);
      end += p;
      expect(draw(end - p * 0.01)).toBe(id);
    }
    expect(end).toBeGreaterThan(0.99);
  });
});
