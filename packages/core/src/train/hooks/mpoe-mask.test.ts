// The gradient mask of MPOE in the real trainer: which central cores move in which step, seeds, resuming, freezing, refusals.
import { describe, expect, it } from "vitest";
import { cpu } from "../../cpu/index.ts";
import { engine } from "../../engine.ts";
import { ShapeError, UnsupportedError } from "../../errors.ts";
import { mpo } from "../../experts/mpo.ts";
import type { TrainingHook } from "../../moe/plan.ts";
import { sgd } from "../optim.ts";
import type { TrainerOptions } from "../trainer.ts";
import { count, type ModelOptions, numbersOf, stateOf, train } from "./hooks.test-util.ts";
import { mpoeMask } from "./mpoe-mask.ts";

const experts: ModelOptions["experts"] = (from) =>
  mpo({ count, widthDims: [3, 1, 2], hiddenDims: [1, 2, 2], bond: 3, ...from });
const run = (hooks: readonly TrainingHook[], options: Partial<TrainerOptions> = {}) =>
  train(hooks, options, { root: engine(cpu()), experts });
const plain = { optimiser: sgd({ learningRate: 0.01, momentum: 0 }) };

/** For each parameter the steps in which it changed, as a word of 0 and 1. */
async function moves(
  hook: TrainingHook,
  steps = 16,
  options: Partial<TrainerOptions> = {},
): Promise<Map<string, string>> {
  const one = run([hook], { ...plain, ...options });
  const found = new Map<string, string>();
  let before = await numbersOf(one.params);
  for (let step = 0; step < steps; step++) {
    await one.step();
    const after = await numbersOf(one.params);
    for (const [path, values] of Object.entries(after)) {
      const moved = values.some((x, i) => x !== before[path]?.[i]);
      found.set(path, (found.get(path) ?? "") + Number(moved));
    }
    before = after;
  }
  one.dispose();
  return found;
}
const central = (layer: number, name: string): string => `layers.${layer}.moe.experts.shared.${name}Central`;
const word = (found: ReadonlyMap<string, string>, layer: number, name = "up"): string =>
  found.get(central(layer, name)) ?? "absent";

describe("mpoeMask", () => {
  it("masks the central cores of a layer together, once per step, each layer by itself, and nothing else", async () => {
    const found = await moves(mpoeMask({ probability: 0.5, seed: 3 }));
    for (const layer of [0, 1]) {
      expect(word(found, layer, "up")).toBe(word(found, layer, "down"));
      expect(word(found, layer)).toMatch(/^[01]{16}$/);
      expect(word(found, layer)).toContain("0");
      expect(word(found, layer)).toContain("1");
    }
    expect(word(found, 0)).not.toBe(word(found, 1));
    for (const [path, steps] of found)
      if (!path.endsWith("Central")) expect([path, steps]).toEqual([path, "1".repeat(16)]);
  });

  it("draws from the seed, once per step whatever the number of micro-batches", async () => {
    const one = await moves(mpoeMask({ seed: 3 }));
    const again = await moves(mpoeMask({ seed: 3 }), 16, { accumulate: 2 });
    const other = await moves(mpoeMask({ seed: 4 }));
    for (const layer of [0, 1]) expect(word(again, layer)).toBe(word(one, layer));
    expect(word(other, 0) + word(other, 1)).not.toBe(word(one, 0) + word(one, 1));
  });

  it("masks the given share of the steps", () => {
    const on = engine(cpu());
    const gradient = on.tensor(Float32Array.of(1), [1]);
    for (const probability of [0, 0.2, 0.9, 1]) {
      const hook = mpoeMask({ probability });
      let masked = 0;
      for (let step = 0; step < 500; step++) {
        on.scope(() => {
          if (hook.transformGradient?.(central(0, "up"), gradient, { step }) !== gradient) masked++;
        });
      }
      expect(Math.abs(masked / 500 - probability)).toBeLessThan(probability % 1 === 0 ? 1e-9 : 0.06);
    }
  });

  it("with probability 0 trains as without it", async () => {
    const [masked, without] = [run([mpoeMask({ probability: 0 })]), run([])];
    await masked.run({ until: 4 });
    await without.run({ until: 4 });
    expect(await numbersOf(masked.params)).toEqual(await numbersOf(without.params));
  });

  it("resumes bit for bit at every step", async () => {
    const make = () => run([mpoeMask({ probability: 0.4, seed: 9 })]);
    const whole = make();
    const snapshots = [];
    for (let step = 0; step < 5; step++) {
      snapshots.push(await whole.snapshot());
      await whole.step();
    }
    const expected = await stateOf(whole);
    for (const snapshot of snapshots) {
      const resumed = make();
      resumed.restore(snapshot);
      await resumed.run({ until: 5 });
      expect(await stateOf(resumed)).toEqual(expected);
    }
  });

  it("frozen, leaves the central cores alone: no update, no decay, no moments", async () => {
    const one = run([mpoeMask({ frozen: true })]);
    const before = await numbersOf(one.params);
    await one.run({ until: 3 });
    const after = await numbersOf(one.params);
    for (const [path, values] of Object.entries(after)) {
      if (path.endsWith("Central")) expect(values).toEqual(before[path]);
      else expect(values).not.toEqual(before[path]);
    }
    const moments = Object.keys((await one.snapshot()).arrays).filter((name) => name.startsWith("optimiser."));
    expect(moments.some((name) => name.endsWith("up0"))).toBe(true);
    expect(moments.filter((name) => name.endsWith("Central"))).toEqual([]);
  });

  it("takes other names of cores, and finds those of experts that stand alone", async () => {
    const on = engine(cpu());
    const gradient = on.tensor(Float32Array.of(2), [1]);
    const mask = mpoeMask({ probability: 1 });
    const named = mpoeMask({ probability: 1, layerOf: (path) => (path === "core" ? "only" : undefined) });
    const masked = on.scope(() => mask.transformGradient?.("shared.upCentral", gradient, { step: 0 }));
    expect([...((await masked?.data()) ?? [])]).toEqual([0]);
    expect(mask.transformGradient?.("shared.up", gradient, { step: 0 })).toBe(gradient);
    expect(mask.transformGradient?.("core", gradient, { step: 0 })).toBe(gradient);
    const own = on.scope(() => named.transformGradient?.("core", gradient, { step: 0 }));
    expect([...((await own?.data()) ?? [])]).toEqual([0]);
  });

  it("refuses a probability that is none, and a model without central cores", async () => {
    for (const probability of [-0.1, 1.1, Number.NaN]) expect(() => mpoeMask({ probability })).toThrow(ShapeError);
    const one = train([mpoeMask()]);
    await one.step();
    await expect(one.step()).rejects.toThrow(UnsupportedError);
    await expect(one.step()).rejects.toThrow("the model has no central core");
  });
});
