// Core's training hooks, and ReMoE's lambda, on a language model: what they promise holds in a real run.
import { type Engine, leaves, random } from "@switchyard/core";
import {
  adamw,
  esft,
  esftConfig,
  esftStatistics,
  globalBalance,
  normaliseScores,
  omoe,
  readExpertConfig,
  selectExperts,
  sgd,
  type TrainerOptions,
  trainer,
  writeExpertConfig,
} from "@switchyard/core/train";
import { reMoE } from "@switchyard/routers/re-moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import { makeEngine, readAll, smallConfig } from "./models.test-util.ts";
import { languageModelTask, type TextBatch } from "./task.ts";
import { type Transformer, transformer } from "./transformer.ts";
import type { TransformerConfig } from "./transformer-config.ts";

const sequence = 6;
/** Texts that count upwards modulo 11, `rows` of them from the given one on. */
const texts = (first: number, rows: number): TextBatch => {
  const value = (i: number, ahead: number): number =>
    ((first + Math.floor(i / sequence)) * 5 + (i % sequence) + ahead) % 11;
  const ids = (ahead: number) => Int32Array.from({ length: rows * sequence }, (_, i) => value(i, ahead));
  return { shape: [rows, sequence], ids: ids(0), labels: ids(1) };
};
const rows = 2;
const batch = (index: number): TextBatch => texts(index * rows, rows);
const config: TransformerConfig = { ...smallConfig, width: 16, headSize: 4, hidden: 8, router: topK({ k: 2 }) };
const modelOf = (on: Engine, router = config.router): Transformer =>
  transformer(on, { ...config, router }, random(on, 1));
const train = (
  model: Transformer,
  options: Partial<TrainerOptions> = {},
  data: { batch(index: number): TextBatch } = { batch },
) => trainer(model.engine, languageModelTask(model, data), { optimiser: adamw({ learningRate: 0.01 }), ...options });

describe("hooks on a language model", () => {
  it("reMoE: lambda brings the active experts from about half of all down to about k, and keeps them there", async () => {
    const on = makeEngine();
    const router = reMoE({ k: 1, lambda: 1e-3, alpha: 1.2 });
    const run = train(transformer(on, { ...config, experts: 8, router }, random(on, 1)));
    await run.run({ until: 80 });
    const perToken = run.history.map(
      ({ loads, tokens }) => loads.flatMap((load) => [...load]).reduce((a, b) => a + b, 0) / tokens / loads.length,
    );
    const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
    expect(mean(perToken.slice(0, 3))).toBeGreaterThan(3);
    expect(mean(perToken.slice(-30))).toBeGreaterThan(0.5);
    expect(mean(perToken.slice(-30))).toBeLessThan(1.5);
    // Up while there were too many, down after too few, by the factor alone.
    const lambdas = run.history.map(({ metrics }) => metrics[0]?.lambda?.[0] ?? Number.NaN);
    lambdas.slice(1).forEach((lambda, i) => {
      const sparse = (perToken[i] ?? Number.NaN) <= 1;
      expect(lambda / (lambdas[i] ?? Number.NaN)).toBeCloseTo(sparse ? 1 / 1.2 : 1.2, 4);
    });
    expect(run.history.at(-1)?.loss).toBeLessThan((run.history[0]?.loss ?? 0) / 2);
    run.dispose();
  });

  it("omoe learns with projected gradients and holds a projector for every expert matrix", async () => {
    const on = makeEngine();
    const hook = omoe({ accumulating: 3, orthogonal: 2 });
    const run = train(modelOf(on), { hooks: [hook], accumulate: 2 });
    await run.run({ until: 40 });
    expect(leaves(hook.state ?? []).map(([path, x]) => [path, x.shape])).toEqual(
      [0, 1].flatMap((layer) => [
        [`known.layers.${layer}.moe.experts.gateUp`, [5, 16, 16]],
        [`known.layers.${layer}.moe.experts.down`, [5, 8, 8]],
      ]),
    );
    expect(run.history.at(-1)?.loss).toBeLessThan((run.history[0]?.loss ?? 0) / 2);
    run.dispose();
    expect(on.live()).toBe(0);
  });

  it("esft: from the statistics of a model to a run that changes the chosen experts only, through its file", async () => {
    const on = makeEngine();
    const model = modelOf(on);
    const live = on.live();
    const statistics = esftStatistics({ experts: config.experts });
    for (let index = 0; index < 4; index++) {
      const { ids, shape } = batch(index);
      on.scope(() => statistics.add(model.forward(model.params, on.tensor(ids, shape)).routed, { batch: rows }));
    }
    const { gate, token } = await statistics.scores();
    expect(on.live()).toBe(live);
    for (const row of [...token, ...normaliseScores(gate)]) expect(row.reduce((a, b) => a + b, 0)).toBeCloseTo(1, 5);
    const chosen = selectExperts(token, 0.3);
    for (const ids of chosen) expect(ids.length).toBeLessThan(config.experts);

    const written = readExpertConfig(writeExpertConfig(esftConfig(chosen)));
    const before = await readAll(model.params);
    const hook = esft({ engine: on, config: written, params: model.params });
    const run = train(model, { hooks: [hook], optimiser: adamw({ learningRate: 0.02, weightDecay: 0.1 }) });
    await run.run({ until: 20 });
    const after = await readAll(run.params);
    const changed = new Set<string>();
    for (const [path, values] of after)
      values.forEach((value, i) => {
        if (value !== before.get(path)?.[i]) changed.add(`${path} ${Math.floor(i / (values.length / config.experts))}`);
      });
    const expected = chosen.flatMap((ids, layer) =>
      ids.flatMap((e) => ["gateUp", "down"].map((name) => `layers.${layer}.moe.experts.${name} ${e}`)),
    );
    expect([...changed].sort()).toEqual(expected.sort());
    expect(run.history.at(-1)?.loss).toBeLessThan((run.history[0]?.loss ?? 0) - 0.1);
    run.dispose();
  });

  it.each([
    ["topK's own loss", 0.5, []],
    ["globalBalance", 0, [globalBalance({ weight: 0.5 })]],
  ])("counted exactly, the balance of a step is that of the undivided batch (%s)", async (_, balance, hooks) => {
    const on = makeEngine(64);
    const options = { optimiser: sgd({ learningRate: 0.3, momentum: 0 }), hooks };
    const model = () => modelOf(on, topK({ k: 2, balance }));
    const divided = train(model(), { ...options, accumulate: 3, globalBalance: "exact" });
    const whole = train(model(), options, { batch: (index) => texts(index * 3 * rows, 3 * rows) });
    for (let step = 0; step < 3; step++) {
      const [a, b] = [await divided.step(), await whole.step()];
      expect(Object.keys(a.losses)).toContain(balance > 0 ? "balance" : "globalBalance");
      for (const [name, loss] of Object.entries(a.losses)) expect(loss).toBeCloseTo(b.losses[name] ?? Number.NaN, 10);
      expect(a.total).toBeCloseTo(b.total, 10);
    }
    const [a, b] = [await readAll(divided.params), await readAll(whole.params)];
    for (const [path, values] of a)
      values.forEach((value, i) => void expect(value).toBeCloseTo(b.get(path)?.[i] ?? Number.NaN, 10));
    for (const run of [divided, whole]) run.dispose();
    expect(on.live()).toBe(0);
  });
});
