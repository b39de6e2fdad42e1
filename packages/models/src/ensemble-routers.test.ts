// thor, competeSMoE and moec with their hooks in a language model: they learn, do what they say in the real trainer,
// and resume bit for bit. smear, which looks ahead: refused unless allowed, and decoding with the prompt's mixture.
import { random } from "@switchyard/core";
import type { RouterPlugin, TrainingHook } from "@switchyard/core/moe";
import { adamw, type Trainer, trainer } from "@switchyard/core/train";
import { competeSMoE, moec, smear, thor } from "@switchyard/routers";
import { competeSMoESchedule, competitionSteps } from "@switchyard/routers/compete-smoe";
import { thorHook } from "@switchyard/routers/thor";
import { describe, expect, it } from "vitest";
import { generate } from "./generate.ts";
import { makeEngine, readAll, smallConfig } from "./models.test-util.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { type Transformer, transformer } from "./transformer.ts";

// Sequences that count upwards modulo 11, from a start that depends on the index; the last row ends with padding.
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  const real = (i: number): boolean => i < 10;
  return {
    shape: [2, 6],
    ids: Int32Array.from({ length: 12 }, (_, i) => value(i, 0)),
    labels: Int32Array.from({ length: 12 }, (_, i) => (real(i) ? value(i, 1) : -1)),
    mask: Float32Array.from({ length: 12 }, (_, i) => Number(real(i))),
  };
};

interface Setting {
  readonly router: RouterPlugin;
  readonly hooks?: () => readonly TrainingHook[];
  readonly allowNonCausal?: boolean;
  readonly experts?: number;
}
const start = ({
  router,
  hooks,
  allowNonCausal = false,
  experts = 5,
}: Setting): { model: Transformer; run: Trainer<TextBatch> } => {
  const on = makeEngine();
  const config = { ...smallConfig, width: 16, headSize: 4, hidden: 8, experts, router, allowNonCausal };
  const model = transformer(on, config, random(on, 1));
  const run = trainer(on, languageModelTask(model, { batch }), {
    optimiser: adamw({ learningRate: 0.01 }),
    totalSteps: 25,
    clip: 1,
    seed: 3,
    hooks: hooks?.() ?? [],
  });
  return { model, run };
};

const schedule = { layers: 2, rate: 0.4, warmUp: 0.2, most: 1, seed: 1 };
const settings: readonly [string, Setting][] = [
  ["thor", { router: thor(), hooks: () => [thorHook()] }],
  [
    "thor, strongly consistent, ensemble",
    { router: thor({ evaluation: "ensemble" }), hooks: () => [thorHook({ alpha: 5 })] },
  ],
  ["competeSMoE", { router: competeSMoE({ hybrid: 0.2 }), hooks: () => [competeSMoESchedule(schedule)] }],
  ["competeSMoE v1", { router: competeSMoE({ version: "v1" }), hooks: () => [competeSMoESchedule(schedule)] }],
  ["competeSMoE without schedule", { router: competeSMoE() }],
  ["moec", { router: moec({ k: 2, clusters: 3 }), experts: 6 }],
  [
    "moec, difference, whole clusters",
    { router: moec({ clusters: 2, clusterLoss: "difference", whole: true }), experts: 6 },
  ],
  ["smear", { router: smear(), allowNonCausal: true }],
  ["smear with noise", { router: smear({ expertDropout: 0.2, epsilon: 0.1, jitter: 0.1 }), allowNonCausal: true }],
];

const numbers = (run: Trainer<TextBatch>) => run.history.map(({ seconds: _, ...report }) => report);

describe.each(settings)("%s", (_, setting) => {
  it("learns, and leaves nothing behind", async () => {
    const { model, run } = start(setting);
    const { engine: on } = model;
    const { loss } = await run.step();
    const live = on.live();
    await run.run();
    expect(on.live()).toBe(live);
    expect(run.history.at(-1)?.loss).toBeLessThan(0.7 * loss);
    const [one, two] = [await run.evaluate([batch(3)]), await run.evaluate([batch(3)])];
    expect(two.loss).toBe(one.loss);
    run.dispose();
    expect(on.live()).toBe(0);
  });

  it("resumes bit for bit", async () => {
    const [{ run: whole }, { run: half }, { run: resumed }] = [start(setting), start(setting), start(setting)];
    await whole.run({ until: 14 });
    await half.run({ until: 8 });
    resumed.restore(await half.snapshot());
    await resumed.run({ until: 14 });
    expect(await readAll(resumed.params)).toEqual(await readAll(whole.params));
    expect(numbers(resumed)).toEqual(numbers(whole));
  });
});

describe("thor in the trainer", () => {
  it("runs each batch twice, each pass through one expert of every layer, mostly two different ones", async () => {
    const { run } = start({ router: thor(), hooks: () => [thorHook()] });
    await run.run();
    const used = run.history.flatMap(({ loads }) => loads.map((load) => [...load].filter((n) => n > 0)));
    expect(used).toHaveLength(2 * 25);
    for (const counts of used) expect([[20], [10, 10]]).toContainEqual(counts); // 10 real tokens, two passes
    // Of five experts both draws are the same one time in five.
    const different = used.filter((counts) => counts.length === 2).length;
    expect(different).toBeGreaterThan(30);
    expect(different).toBeLessThan(48);
    for (const expert of [0, 1, 2, 3, 4])
      expect(run.history.some(({ loads }) => (loads[0]?.[expert] ?? 0) > 0)).toBe(true);
  });
  it("the total is both losses and alpha times the consistency, which alpha lowers", async () => {
    const consistency = async (alpha: number): Promise<number[]> => {
      const { run } = start({ router: thor(), hooks: () => [thorHook({ alpha })] });
      await run.run();
      return run.history.map(({ total, loss }) => (total - 2 * loss) / alpha);
    };
    const late = (values: readonly number[]): number => values.slice(-8).reduce((a, b) => a + b) / 8;
    const [free, bound] = [await consistency(1e-3), await consistency(20)];
    for (const value of bound) expect(value).toBeGreaterThanOrEqual(0);
    expect(late(free)).toBeGreaterThan(0);
    expect(late(bound)).toBeLessThan(0.5 * late(free));
  });
  it("generates the same with and without a cache", async () => {
    const { model, run } = start({ router: thor(), hooks: () => [thorHook()] });
    await run.run();
    const trained = model.with({ params: run.params, buffers: run.buffers });
    const texts: number[][] = [];
    for (const cache of [true, false]) {
      const ids: number[] = [];
      for await (const { id } of generate(trained, { prompt: [3, 4], maxNew: 6, temperature: 0, cache })) ids.push(id);
      texts.push(ids);
    }
    expect(texts[0]).toHaveLength(6);
    expect(texts[0]).toEqual(texts[1]);
  });
});

describe("competeSMoE in the trainer", () => {
  it("competes in the scheduled layers and steps and in no others, nor in evaluation", async () => {
    const { run } = start({ router: competeSMoE(), hooks: () => [competeSMoESchedule(schedule)] });
    await run.run();
    const table = competitionSteps({ ...schedule, steps: 25 });
    const found = run.history.map(({ metrics }) =>
      metrics.flatMap(({ competition }, layer) => (competition?.[0] === 1 ? [layer] : [])),
    );
    expect(found).toEqual(table);
    expect(table.flat().length).toBeGreaterThan(5);
    expect(table.some((row) => row.length === 0)).toBe(true);
    for (const [step, { losses }] of run.history.entries())
      expect(losses.distillation !== undefined).toBe((table[step]?.length ?? 0) > 0);
    const { metrics } = await run.evaluate([batch(1)]);
    expect(metrics.map(({ competition }) => competition)).toEqual([undefined, undefined]);
  });
  it("cannot be scheduled in a run without an end", async () => {
    const { model } = start({ router: competeSMoE() });
    const run = trainer(model.engine, languageModelTask(model, { batch }), {
      optimiser: adamw({ learningRate: 0.01 }),
      hooks: [competeSMoESchedule({ layers: 2 })],
    });
    await expect(run.step()).rejects.toThrow("give the trainer totalSteps, or the hook steps");
  });
});

describe("smear in a language model", () => {
  it("is refused, in training and in generation, unless that is wanted", async () => {
    const { run } = start({ router: smear() });
    await expect(run.step()).rejects.toThrow(/smear chooses experts by looking at later tokens.*allowNonCausal: true/);
  });
  it("decodes with a cache only where asked, and then with the mixture of the prompt", async () => {
    const text = async (router: RouterPlugin, cache: boolean, maxNew: number): Promise<number[]> => {
      const { model, run } = start({ router, allowNonCausal: true });
      await run.run();
      const trained = model.with({ params: run.params, buffers: run.buffers });
      const ids: number[] = [];
      for await (const { id } of generate(trained, { prompt: [3, 4, 5], maxNew, temperature: 0, cache })) ids.push(id);
      return ids;
    };
    expect(await text(smear(), false, 4)).toHaveLength(4);
    await expect(text(smear(), true, 4)).rejects.toThrow(/1 new tokens after 3 cached ones.*decoding: true/);
    const decoded = await text(smear({ decoding: true }), true, 4);
    expect(decoded).toHaveLength(4);
    // The first token follows from the prompt alone.
    expect(decoded[0]).toBe((await text(smear(), false, 1))[0]);
  });
});
