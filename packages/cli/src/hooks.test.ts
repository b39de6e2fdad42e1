// Core's training hooks on the wasm backend: a language model trains there as on the reference backend.
import { type Engine, engine, random } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { TrainingHook } from "@switchyard/core/moe";
import { adamw, esft, esftConfig, globalBalance, omoe, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { languageModelTask, type TextBatch, type Transformer, transformer } from "@switchyard/models";
import { topK } from "@switchyard/routers/top-k";
import { expect, it } from "vitest";

const config = {
  vocabulary: 13,
  width: 16,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  headSize: 4,
  experts: 5,
  hidden: 8,
  context: 12,
  router: topK({ k: 2 }),
};
/** Two texts that count upwards modulo 11. */
const batch = (index: number): TextBatch => {
  const value = (i: number, ahead: number): number => (index * 3 + Math.floor(i / 6) * 5 + (i % 6) + ahead) % 11;
  const ids = (ahead: number) => Int32Array.from({ length: 12 }, (_, i) => value(i, ahead));
  return { shape: [2, 6], ids: ids(0), labels: ids(1) };
};

const hooks: readonly [string, (model: Transformer) => TrainingHook][] = [
  ["omoe", () => omoe({ accumulating: 2 })],
  ["omoe with a rank", () => omoe({ accumulating: 2, rank: 2 })],
  ["esft", ({ engine, params }) => esft({ engine, params, config: esftConfig([[0, 3], [1]]) })],
  ["globalBalance", () => globalBalance()],
];

it.each(hooks)("%s does on wasm what it does on the reference backend", async (_, hookOf) => {
  const losses = async (on: Engine): Promise<number[]> => {
    const model = transformer(on, config, random(on, 1));
    const run = trainer(on, languageModelTask(model, { batch }), {
      optimiser: adamw({ learningRate: 0.01 }),
      hooks: [hookOf(model)],
      accumulate: 2,
      globalBalance: "exact",
    });
    await run.run({ until: 6 });
    run.dispose();
    expect(on.live()).toBe(0);
    return run.history.map(({ total }) => total);
  };
  const [found, expected] = [await losses(engine(await wasm({ threads: 1 }))), await losses(engine(cpu()))];
  found.forEach((loss, step) => void expect(loss).toBeCloseTo(expected[step] ?? Number.NaN, 3));
  expect(found[5]).not.toBe(found[0]);
});
