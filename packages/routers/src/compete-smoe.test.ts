import { add, autodiff, dispose, grad, leaves, lower, mul, random, sum, type Tensor, watch } from "@switchyard/core";
import { ffn, layerInput, layerParams, moe, moeLayer } from "@switchyard/core/moe";
import { generator, gradientCheck, routerContext, routerInput, testRouter, uniform } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { competeSMoEFamily } from "../test/families/ensemble.ts";
import { flat, float64, readVectors, results, tensor, unmet } from "../test/vectors.ts";
import {
  type CompeteSMoEOptions,
  competeSMoE,
  competeSMoESchedule,
  competition,
  competitionSteps,
  distillationLosses,
  outputDiversity,
} from "./compete-smoe.ts";

const competing = { input: () => ({ schedule: { "competeSMoE.0": true } }), weights: "sum to 1" } as const;
testRouter({ plugin: ({ k = 2 }) => competeSMoE({ k }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 3 }) => competeSMoE({ k, hybrid: 0.2 }), ...competing });
testRouter({ plugin: ({ k = 2 }) => competeSMoE({ k, version: "v1" }), ...competing });
testRouter({ plugin: ({ k = 2 }) => competeSMoE({ k, version: "v1", distance: "kl" }), ...competing });

describe("competeSMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("competesmoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(competeSMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("competeSMoE", () => {
  const on = float64();
  const x = [
    [1, -2],
    [0.5, 3],
    [-1, 0.2],
  ];
  const make = (options: CompeteSMoEOptions = {}) => {
    const experts = ffn({ count: 4, width: 2, hidden: 5, engine: on, random: random(on, 1) });
    return moeLayer(competeSMoE(options), { engine: on, width: 2 }, { experts });
  };
  const call = (layer: ReturnType<typeof make>, params: ReturnType<typeof layerParams>, compete: boolean) =>
    moe(layer, params, layerInput(layer, tensor(on, x), { training: true, schedule: { "competeSMoE.0": compete } }));

  it("asks for all experts only where it competes, and only in training", () => {
    const router = competeSMoE().init(routerContext(on));
    const asked: string[] = [];
    on.scope(() => {
      const hidden = on.tensor(new Float64Array(6), [1, 6]);
      for (const training of [true, false])
        for (const schedule of [undefined, {}, { "competeSMoE.1": true }, { "competeSMoE.0": true }]) {
          const input = routerInput(on, { hidden, training });
          const everyExpert = (): Tensor => {
            asked.push(`${training} ${JSON.stringify(schedule)}`);
            return on.tensor(new Float64Array(30).fill(1), [1, 5, 6]);
          };
          const routed = router.route(router.params, { ...input, everyExpert, ...(schedule ? { schedule } : {}) });
          expect(routed.expertOutputs === undefined).toBe(!training || schedule?.["competeSMoE.0"] !== true);
        }
      const { everyExpert: _, ...without } = routerInput(on, { hidden, training: true });
      expect(() => router.route(router.params, { ...without, schedule: { "competeSMoE.0": true } })).toThrow(
        "layer 0 is to compete at step 0, but nobody supplies everyExpert()",
      );
      return undefined;
    });
    expect(asked).toEqual(['true {"competeSMoE.0":true}']);
    dispose(router.params);
  });
  it("tells in its metrics whether it competed", async () => {
    const layer = make();
    const found = await results(on, () => {
      const metric = (compete: boolean): Tensor => {
        const { metrics } = call(layer, layerParams(layer), compete).routed;
        if (!metrics?.competition) throw new Error("no metric");
        return metrics.competition;
      };
      return { yes: metric(true), no: metric(false) };
    });
    expect(found).toEqual({ yes: 1, no: 0 });
    dispose(layerParams(layer));
  });
  it("a competition trains the router by distillation alone, and the experts by everything else", () => {
    const layer = make({ balance: 0, diversity: 0.01 });
    on.scope(() => {
      const reach = (pick: "output" | "distillation" | "diversity"): Record<string, boolean> => {
        const params = watch(autodiff(on), layerParams(layer));
        const { output, routed } = call(layer, params, true);
        const goal = pick === "output" ? sum(output) : routed.losses[pick]?.value;
        if (!goal) throw new Error(`no ${pick}`);
        return Object.fromEntries(
          leaves(grad(goal, params)).map(([path, g]) => [path, on.read(g).some((v) => v !== 0)]),
        );
      };
      expect(reach("output")).toEqual({ "router.weight": false, "experts.up": true, "experts.down": true });
      expect(reach("distillation")).toEqual({ "router.weight": true, "experts.up": false, "experts.down": false });
      expect(reach("diversity")).toEqual({ "router.weight": false, "experts.up": true, "experts.down": true });
      return undefined;
    });
    dispose(layerParams(layer));
  });
  it("with all experts winning, weights and output are those of the affinities", async () => {
    const layer = make({ k: 4 });
    const found = await results(on, () => {
      const { output, routed } = call(layer, layerParams(layer), true);
      const outputs = routed.expertOutputs as Tensor; // [3, 4, 2]
      return { output, outputs };
    });
    const outputs = found.outputs as number[][][];
    outputs.forEach((own, t) => {
      const a = own.map((y) => y.reduce((total, v) => total + Math.log(1 + Math.exp(v)), 0) / 2);
      const total = a.reduce((p, q) => p + q);
      [0, 1].forEach((d) => {
        const wanted = own.reduce((y, row, e) => y + ((a[e] ?? 0) / total) * (row[d] ?? 0), 0);
        expect((found.output as number[][])[t]?.[d]).toBeCloseTo(wanted, 12);
      });
    });
    dispose(layerParams(layer));
  });
  it("ties go to the lower expert; outputs of zeros stay finite, gradient too", () => {
    on.scope(() => {
      for (const version of ["v1", "v2"] as const) {
        const zeros = watch(autodiff(on), on.tensor(new Float64Array(2 * 4 * 3), [2, 4, 3]));
        const { experts, weights } = competition(zeros, { k: 2, version });
        expect([...on.read(lower(experts))]).toEqual([0, 1, 0, 1]);
        const goal = add(sum(mul(weights, 2)), outputDiversity(zeros, experts));
        expect(on.read(grad(goal, zeros)).every(Number.isFinite)).toBe(true);
      }
      return undefined;
    });
  });
  it.each(["v1", "v2"] as const)(
    "%s: weights, affinities and diversity have the slopes of their definitions",
    async (version) => {
      const { checked } = await gradientCheck(
        ([outputs]) => {
          const { affinity, experts, weights } = competition(outputs as Tensor, { k: 2, version });
          return [affinity, weights, outputDiversity(outputs as Tensor, experts)];
        },
        [uniform(generator("competition"), [3, 4, 5], -2, 2)],
      );
      expect(checked).toBe(60);
    },
  );
  it("the divergence is 0 where the router foresees the outcome, and larger else", async () => {
    const distance = async (logits: readonly number[]): Promise<number> => {
      const { value } = await results(on, () => {
        const outcome = {
          affinity: tensor(on, [[0, 0, 0]]),
          experts: on.tensor(Int32Array.of(2, 0), [1, 2]),
          weights: tensor(on, [[0.75, 0.25]]),
        };
        return { value: distillationLosses(tensor(on, [logits]), outcome, { version: "v1", distance: "kl" }).all };
      });
      return flat(value)[0] ?? Number.NaN;
    };
    expect(await distance([Math.log(0.25), -60, Math.log(0.75)])).toBeCloseTo(0, 12);
    expect(await distance([0, 0, 0])).toBeCloseTo(0.75 * Math.log(0.75 * 3) + 0.25 * Math.log(0.25 * 3), 12);
  });
  it("alike outputs have the diversity 1, orthogonal ones 0, opposite ones -1; padding does not count", async () => {
    const of = async (
      outputs: number[][][],
      options: { official?: boolean; mask?: number[] } = {},
    ): Promise<number> => {
      const { value } = await results(on, () => {
        const n = outputs.length;
        const { mask, ...rest } = options;
        const ids = on.tensor(
          Int32Array.from({ length: 2 * n }, (_, i) => i % 2),
          [n, 2],
        );
        const value = outputDiversity(tensor(on, outputs), ids, {
          ...rest,
          ...(mask ? { mask: tensor(on, mask) } : {}),
        });
        return { value };
      });
      return flat(value)[0] ?? Number.NaN;
    };
    const [alike, across, against] = [
      [
        [1, 2],
        [2, 4],
      ],
      [
        [1, 2],
        [-2, 1],
      ],
      [
        [1, 2],
        [-1, -2],
      ],
    ];
    expect(await of([alike])).toBeCloseTo(1, 12);
    expect(await of([across])).toBeCloseTo(0, 12);
    expect(await of([against])).toBeCloseTo(-1, 12);
    expect(await of([alike], { official: true })).toBeCloseTo(0.5, 12);
    expect(await of([alike, against], { mask: [1, 0] })).toBeCloseTo(1, 12);
  });
  it("refuses options that cannot be", () => {
    expect(() => competeSMoE({ k: 6 }).init(routerContext(on))).toThrow("competeSMoE: k = 6 of 5 experts");
    expect(() => competeSMoE({ distance: "kl" })).toThrow('distance = "kl" with version "v2"');
    expect(() => competeSMoE({ version: "v1", hybrid: 0.2 })).toThrow('hybrid = 0.2 with version "v1"');
    expect(() => competeSMoE({ version: "v1", diversity: 0.2 })).toThrow('diversity = 0.2 with version "v1"');
    expect(() => competeSMoE({ version: "v3" as "v2" })).toThrow('version = "v3"');
    expect(() => competeSMoE({ zLoss: -1 })).toThrow("zLoss = -1");
  });
});

describe("competitionSteps", () => {
  const all = (table: readonly (readonly number[])[]): number => table.reduce((n, row) => n + row.length, 0);

  it("leaves warm-up alone, keeps about the rate and never the limit", () => {
    const table = competitionSteps({ layers: 6, steps: 4000, rate: 0.2, warmUp: 0.1, most: 3 });
    expect(table).toHaveLength(4000);
    expect(all(table.slice(0, 400))).toBe(0);
    expect(table.slice(400, 440).some((row) => row.length > 0)).toBe(true);
    expect(Math.max(...table.map((row) => row.length))).toBe(3);
    for (const row of table) expect([...new Set(row)].sort((a, b) => a - b)).toEqual(row);
    for (let layer = 0; layer < 6; layer++) {
      const own = table.filter((row) => row.includes(layer)).length;
      expect(Math.abs(own / 3600 - 0.2)).toBeLessThan(0.03);
    }
  });
  it("moves what does not fit to the nearest earlier step with room, else to the nearest later one", () => {
    const options = { layers: 5, steps: 200, rate: 0.4, warmUp: 0 };
    const wish = competitionSteps({ ...options, most: 5 });
    // The rule, followed layer by layer on plain sets.
    const rows = Array.from({ length: 200 }, () => new Set<number>());
    for (let layer = 0; layer < 5; layer++)
      wish.forEach((row, step) => {
        if (!row.includes(layer)) return;
        const order = [...Array(step + 1).keys()]
          .reverse()
          .concat([...Array(199 - step).keys()].map((i) => step + 1 + i));
        const to = order.find((j) => (rows[j]?.size ?? 9) < 2 && !rows[j]?.has(layer));
        if (to !== undefined) rows[to]?.add(layer);
      });
    const table = competitionSteps({ ...options, most: 2 });
    expect(table).toEqual(rows.map((row) => [...row]));
    expect(all(table)).toBeGreaterThan(380);
    expect(table).not.toEqual(wish);
  });
  it("at rate 1 fills every step up to the limit, at rate 0 and without room nothing", () => {
    expect(competitionSteps({ layers: 5, steps: 4, rate: 1, warmUp: 0 })).toEqual(new Array(4).fill([0, 1, 2]));
    expect(all(competitionSteps({ layers: 5, steps: 400, rate: 0 }))).toBe(0);
    expect(all(competitionSteps({ layers: 5, steps: 400, most: 0 }))).toBe(0);
    expect(competitionSteps({ layers: 5, steps: 0 })).toEqual([]);
  });
  it("is fixed by the seed", () => {
    const options = { layers: 3, steps: 300 };
    expect(competitionSteps(options)).toEqual(competitionSteps({ ...options, seed: 0 }));
    expect(competitionSteps(options)).not.toEqual(competitionSteps({ ...options, seed: 1 }));
  });
});

describe("competeSMoESchedule", () => {
  it("hands each step its layers, whatever the order in which it is asked", () => {
    const options = { layers: 4, rate: 0.3, seed: 2 };
    const table = competitionSteps({ ...options, steps: 60 });
    const [hook, other] = [competeSMoESchedule(options), competeSMoESchedule(options)];
    for (const step of [59, 0, 30, 12]) {
      const given = hook.beforeStep?.({ step, totalSteps: 60 });
      expect(given).toEqual(Object.fromEntries((table[step] ?? []).map((layer) => [`competeSMoE.${layer}`, true])));
      expect(other.beforeStep?.({ step, totalSteps: 60 })).toEqual(given);
    }
    expect(hook.beforeStep?.({ step: 60, totalSteps: 60 })).toEqual({});
    expect(hook.state).toBeUndefined();
  });
  it("needs to know the number of steps, its own option first", () => {
    expect(() => competeSMoESchedule({ layers: 1 }).beforeStep?.({ step: 0 })).toThrow("give the trainer totalSteps");
    const always = competeSMoESchedule({ layers: 1, rate: 1, warmUp: 0, steps: 2 });
    expect(always.beforeStep?.({ step: 1, totalSteps: 9 })).toEqual({ "competeSMoE.0": true });
    expect(always.beforeStep?.({ step: 2, totalSteps: 9 })).toEqual({});
  });
  it("refuses options that cannot be", () => {
    expect(() => competeSMoESchedule({ layers: -1 })).toThrow("layers = -1; expected a whole number from 0");
    expect(() => competeSMoESchedule({ layers: 1, rate: 2 })).toThrow("rate = 2; expected 0 to 1");
    expect(() => competeSMoESchedule({ layers: 1, warmUp: -1 })).toThrow("warmUp = -1");
    expect(() => competeSMoESchedule({ layers: 1, most: 0.5 })).toThrow("most = 0.5");
    expect(() => competeSMoESchedule({ layers: 1, seed: 0.5 })).toThrow("seed = 0.5");
  });
});
