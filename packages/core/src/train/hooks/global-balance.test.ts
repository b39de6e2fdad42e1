import { describe, expect, it } from "vitest";
import { cpu } from "../../cpu/index.ts";
import { engine } from "../../engine.ts";
import type { Routed } from "../../moe/plan.ts";
import { sgd } from "../optim.ts";
import type { TrainerOptions } from "../trainer.ts";
import { globalBalance } from "./global-balance.ts";
import { count, numbersOf, resumes, train } from "./hooks.test-util.ts";

const parts = 3;
const settings: Partial<TrainerOptions> = { optimiser: sgd({ learningRate: 0.5, momentum: 0 }) };

/** Three steps over the same texts, in three micro-batches or undivided. */
async function compared(options: Partial<TrainerOptions>, balance: number, hook: boolean) {
  const root = engine(cpu({ precision: 64 }));
  const hooks = () => (hook ? [globalBalance({ weight: 0.7 })] : []);
  const divided = train(hooks(), { ...settings, ...options, accumulate: parts }, { root, balance });
  const whole = train(hooks(), settings, { root, balance, sequences: parts });
  for (let step = 0; step < 3; step++) {
    await divided.step();
    await whole.step();
  }
  const [a, b] = [await numbersOf(divided.params), await numbersOf(whole.params)];
  const distance = Math.max(
    ...Object.entries(a).flatMap(([path, row]) => row.map((x, i) => Math.abs(x - (b[path]?.[i] ?? Number.NaN)))),
  );
  const losses = [divided, whole].map((run) => run.history.map((report) => Object.values(report.losses)[0] ?? 0));
  for (const run of [divided, whole]) run.dispose();
  return { distance, losses, live: root.live() };
}

describe("balance over the micro-batches of a step", () => {
  it.each([
    ["the routers' own loss", 0.7, false],
    ["the hook's loss", 0, true],
  ])("counted exactly, %s and its gradient are those of the undivided batch", async (_, balance, hook) => {
    const { distance, losses, live } = await compared({ globalBalance: "exact" }, balance, hook);
    expect(distance).toBeLessThan(1e-10);
    losses[0]?.forEach((loss, step) => void expect(loss).toBeCloseTo(losses[1]?.[step] ?? Number.NaN, 12));
    expect(losses[0]?.[0]).toBeGreaterThan(0.5);
    expect(live).toBe(0);
  });

  it.each([
    ["not at all", {}],
    ["as they come", { globalBalance: true }],
  ])("counted %s, they are not", async (_, options) => {
    expect((await compared(options, 0.7, false)).distance).toBeGreaterThan(1e-6);
    expect((await compared(options, 0, true)).distance).toBeGreaterThan(1e-6);
  });

  it("is counted with the draws of the step: the passes of a hook that asks for two", async () => {
    const root = engine(cpu());
    const seen: (readonly number[])[] = [];
    const waiting: Promise<unknown>[] = [];
    const run = train(
      [
        {
          name: "twice",
          passes: 2,
          loss(layers, { globalLoad }) {
            const load = globalLoad?.[0];
            const own = layers[0]?.metrics?.load;
            if (!load || !own) throw new Error("no load");
            waiting.push(Promise.all([load.data(), own.data()]).then(([a, b]) => seen.push([...a], [...b])));
            return layers[0]?.losses.balance?.value as never;
          },
        },
      ],
      { globalBalance: "exact", accumulate: 2 },
      { root, balance: 0.1 },
    );
    const report = await run.step();
    await Promise.all(waiting);
    expect(seen.length).toBe(2 * 2 * 2);
    const [first = []] = seen;
    // All passes are given the same loads, and these are the means of what the passes then did.
    for (let i = 0; i < seen.length; i += 2) expect(seen[i]).toEqual(first);
    const tokens = report.tokens * 2;
    first.forEach((share, e) => void expect(share).toBeCloseTo((report.loads[0]?.[e] ?? Number.NaN) / tokens, 6));
    run.dispose();
  });
});

describe("the hook globalBalance", () => {
  it("adds E Σ f P of every layer, and with normalizeByK that over k", async () => {
    const root = engine(cpu({ precision: 64 }));
    const probabilities = [0.5, 0.3, 0.2, 0.1, 0.7, 0.2, 0.25, 0.25, 0.5, 0.9, 0.05, 0.05];
    const load = [5, 2, 1];
    const layer = (): Routed => ({
      plan: { kind: "dense", weights: root.tensor(new Float64Array(12), [4, 3]) },
      losses: {},
      probabilities: root.tensor(Float64Array.from(probabilities), [4, 3]),
      metrics: { load: root.tensor(Float64Array.from(load), [3]) },
    });
    const mean = [0, 1, 2].map((e) => [0, 1, 2, 3].reduce((t, i) => t + (probabilities[i * 3 + e] ?? 0), 0) / 4);
    const expected = 3 * load.reduce((t, n, e) => t + (n / 4) * (mean[e] ?? 0), 0);
    const value = async (options: Parameters<typeof globalBalance>[0], layers: readonly Routed[], more = {}) =>
      (
        await globalBalance(options)
          .loss?.(layers, { step: 0, ...more })
          ?.data()
      )?.[0];
    expect(await value({ weight: 0.1 }, [layer(), layer()])).toBeCloseTo(0.1 * 2 * expected, 12);
    expect(await value({ weight: 1, normalizeByK: true }, [layer()])).toBeCloseTo(expected / 2, 12);
    // Layers without probabilities are left out; padding counts nothing.
    const { probabilities: _, ...bare } = layer();
    expect(await value({ weight: 1 }, [bare, layer()])).toBeCloseTo(expected, 12);
    const mask = root.tensor(Float64Array.of(1, 0, 1, 0), [2, 2]);
    const real = [0, 1, 2].map((e) => ((probabilities[e] ?? 0) + (probabilities[6 + e] ?? 0)) / 2);
    const masked = 3 * load.reduce((t, n, e) => t + (n / 2) * (real[e] ?? 0), 0);
    expect(await value({ weight: 1 }, [layer()], { mask })).toBeCloseTo(masked, 12);
    expect(() => globalBalance().loss?.([bare], { step: 0 })).toThrow("no layer has probabilities");
    const { metrics: __, ...silent } = layer();
    expect(() => globalBalance().loss?.([silent], { step: 0 })).toThrow("a load of none");
    expect(() => globalBalance({ weight: -1 })).toThrow("weight = -1");
  });

  it("evens out the loads", async () => {
    const worst = async (weight: number): Promise<number> => {
      const run = train([globalBalance({ weight })], { accumulate: 2, globalBalance: "exact", totalSteps: 30 });
      await run.run();
      const ratios = run.history
        .slice(-10)
        .flatMap(({ loads }) =>
          loads.map((load) => (Math.max(...load) * count) / Array.from(load).reduce((a, b) => a + b, 0)),
        );
      run.dispose();
      return ratios.reduce((a, b) => a + b, 0) / ratios.length;
    };
    const [without, balanced] = [await worst(0), await worst(2)];
    expect(balanced).toBeLessThan(without * 0.92);
  });

  it.each([true, "exact"] as const)("resumes bit for bit (globalBalance: %s)", (mode) =>
    resumes(() => globalBalance({ weight: 0.3 }), { accumulate: 2, globalBalance: mode }, 3),
  );
});
