import { describe, expect, it } from "vitest";
import { cpu } from "../cpu/index.ts";
import { engine } from "../engine.ts";
import type { Tensor } from "../tensor.ts";
import { adamw, type Optimiser, sgd } from "./optim.ts";

const root = engine(cpu({ precision: 64 }));
const start = [0.5, -1.25, 2, 0, 3e-3];
const gradientAt = (step: number): number[] =>
  start.map((x, i) => Math.sin(7 * i + 3 * step) * 10 ** (i - 2) + 0.1 * x);

async function steps(optimiser: Optimiser, decay: boolean, scales: readonly number[]): Promise<number[][]> {
  const shape = [5, 1];
  let param = root.tensor(Float64Array.from(start), shape);
  let slots: Tensor[] = optimiser.slots.map(() => root.tensor(new Float64Array(5), shape));
  const seen: number[][] = [];
  for (const [step, factor] of scales.entries()) {
    const gradient = root.tensor(Float64Array.from(gradientAt(step)), shape);
    const scale = root.tensor(Float64Array.of(factor), []);
    const info = { scale, learningRate: optimiser.learningRate / (step + 1), decay, update: step + 1 };
    const [next, ...state] = optimiser.update(
      root.give(param),
      root.give(gradient),
      slots.map((slot) => root.give(slot)),
      info,
    );
    param = next as Tensor;
    slots = state;
    scale.dispose();
    seen.push([...(await param.data())]);
  }
  param.dispose();
  for (const slot of slots) slot.dispose();
  return seen;
}

const scales = [1, 0.25, 1, 0.5];
const expectClose = (found: number[][], wanted: number[][]): void => {
  found.forEach((row, i) => {
    row.forEach((x, j) => void expect(Math.abs(x - (wanted[i]?.[j] as number))).toBeLessThan(1e-12));
  });
  expect(found.length).toBe(wanted.length);
};

describe("adamw", () => {
  it.each([true, false])("equals the formula in plain numbers, decay %s", async (decay) => {
    const [lr0, b1, b2, eps, wd] = [0.1, 0.8, 0.95, 1e-6, 0.3];
    const p = [...start];
    const m = start.map(() => 0);
    const v = start.map(() => 0);
    const wanted = scales.map((scale, step) => {
      const [t, lr] = [step + 1, lr0 / (step + 1)];
      for (const [i, raw] of gradientAt(step).entries()) {
        const g = raw * scale;
        m[i] = b1 * (m[i] as number) + (1 - b1) * g;
        v[i] = b2 * (v[i] as number) + (1 - b2) * g * g;
        const [mHat, vHat] = [(m[i] as number) / (1 - b1 ** t), (v[i] as number) / (1 - b2 ** t)];
        const before = p[i] as number;
        p[i] = before - (lr * mHat) / (Math.sqrt(vHat) + eps) - (decay ? lr * wd * before : 0);
      }
      return [...p];
    });
    const optimiser = adamw({ learningRate: lr0, beta1: b1, beta2: b2, eps, weightDecay: wd });
    expectClose(await steps(optimiser, decay, scales), wanted);
  });

  it("decays apart from the gradient: without one the parameter shrinks and the moments stay 0", async () => {
    const [param, m, v] = [
      root.tensor(Float64Array.of(2), [1]),
      root.tensor(new Float64Array(1), [1]),
      root.tensor(new Float64Array(1), [1]),
    ];
    const info = { scale: root.tensor(Float64Array.of(1), []), learningRate: 0.1, decay: true, update: 1 };
    const results = adamw({ weightDecay: 0.5 }).update(param, root.tensor(new Float64Array(1), [1]), [m, v], info);
    expect(await Promise.all(results.map(async (x) => [...(await x.data())]))).toEqual([[2 - 0.1 * 0.5 * 2], [0], [0]]);
  });
});

describe("sgd", () => {
  it.each([
    { nesterov: false, momentum: 0.9, weightDecay: 0.01 },
    { nesterov: true, momentum: 0.9, weightDecay: 0.01 },
    { nesterov: false, momentum: 0, weightDecay: 0 },
  ])("equals the formula in plain numbers: %o", async (options) => {
    const { nesterov, momentum, weightDecay } = options;
    const p = [...start];
    const velocity = start.map(() => 0);
    const wanted = scales.map((scale, step) => {
      for (const [i, raw] of gradientAt(step).entries()) {
        const g = raw * scale + weightDecay * (p[i] as number);
        velocity[i] = momentum * (velocity[i] as number) + g;
        const direction = nesterov ? g + momentum * (velocity[i] as number) : (velocity[i] as number);
        p[i] = (p[i] as number) - (0.05 / (step + 1)) * direction;
      }
      return [...p];
    });
    expectClose(await steps(sgd({ learningRate: 0.05, ...options }), true, scales), wanted);
  });
});

describe("optimisers", () => {
  it.each([adamw(), sgd()])("$name leaves nothing behind of what it is given", async (optimiser) => {
    const before = root.live();
    await steps(optimiser, true, scales);
    expect(root.live()).toBe(before);
  });

  it("refuse options out of range", () => {
    expect(() => adamw({ learningRate: -1 })).toThrow(
      "adamw: learningRate must be a finite number from 0 up, found -1",
    );
    expect(() => adamw({ beta2: 1 })).toThrow("adamw: beta2 must be at least 0 and below 1, found 1");
    expect(() => sgd({ momentum: Number.NaN })).toThrow("sgd: momentum must be at least 0 and below 1, found NaN");
  });
});
