// Routers that do not fit a language model, trained for real on tasks that are no text: every router of the package that the command
// refuses, and those that choose within the batch.
import { fusionTask, patchesTask, type TrainedTask, trainTask } from "@switchyard/bench/tasks";
import { type Engine, engine } from "@switchyard/core";
import { convAdapter } from "@switchyard/core/experts";
import type { RouterPlugin } from "@switchyard/core/moe";
import { wasm } from "@switchyard/kernels/wasm";
import * as routers from "@switchyard/routers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { causalRouters, routerNames } from "./routers.ts";

let on: Engine;
let close: () => void = () => undefined;
beforeAll(async () => {
  const backend = await wasm({ threads: 1 });
  on = engine(backend);
  close = () => backend.dispose?.();
});
afterAll(() => close());

type Factory = (options: object) => RouterPlugin;
const factories = new Map<string, Factory>(
  Object.entries(routers).filter((entry): entry is [string, Factory] => typeof entry[1] === "function"),
);

/** Further options to train with, beside the defaults of those that the command refuses. */
const others: readonly (readonly [name: string, options: object])[] = [
  ["expertRace", { k: 2 }],
  ["expertRace", { k: 2, strategy: "token" }],
  ["expertRace", { k: 2, strategy: "expert" }],
  ["expertRace", { k: 2, strategy: "bl" }],
  ["expertRace", { k: 2, strategy: "be" }],
  ["expertRace", { k: 2, strategy: "le" }],
  ["sinkhorn", { k: 2 }],
  ["gshard", { order: "choices" }],
  ["gshard", { order: "tokens" }],
  ["base", {}],
  ["smear", {}],
  ["softMoE", { slots: 3, normalise: false }],
  ["viMoE", { k: 1 }],
  ["moeFFD", { level: "token" }],
  ["moeFFD", { level: "image" }],
  ["fuseMoE", { k: 2, design: "disjoint", modalities: 2, gate: "gaussian" }],
];
const refused = routerNames.filter((name) => !causalRouters().includes(name));
const asked = [
  ...refused.map((name): readonly [string, object] => [name, name === "fuseMoE" ? { k: 2, modalities: 3 } : { k: 2 }]),
  ...others,
];
const cases = [...new Map(asked.map((one) => [`${one[0]} ${JSON.stringify(one[1])}`, one] as const))].map(
  ([label, [name, options]]) => [label, name, options] as const,
);

function made(name: string, options: object): RouterPlugin {
  const make = factories.get(name);
  if (!make) throw new Error(`@switchyard/routers has no ${name}; it has ${[...factories.keys()].join(", ")}`);
  return make(options);
}

/** The loss fell clearly, and classes of samples never seen are told better than by guessing. */
function learned({ losses, accuracy, heldOutLoss, chance }: TrainedTask): void {
  const mean = (some: readonly number[]): number => some.reduce((a, b) => a + b, 0) / some.length;
  expect(losses.every(Number.isFinite)).toBe(true);
  expect(mean(losses.slice(-5))).toBeLessThan(0.6 * mean(losses.slice(0, 3)));
  expect(heldOutLoss).toBeLessThan(0.7 * Math.log(1 / chance));
  expect(accuracy).toBeGreaterThan(chance + 0.4);
}

const patches = { task: patchesTask({ grid: [3, 4] }), steps: 40, batch: 24 };
const fusion = { task: fusionTask(), steps: 150, batch: 40 };

describe("every router that a language model refuses, and those that choose within the batch, learn", () => {
  test("the refused ones are found", () => {
    for (const name of ["softMoE", "expertChoice", "fuseMoE"]) expect(refused).toContain(name);
    expect(refused).not.toContain("topK");
  });

  test.each(cases)("%s", async (_, name, options) => {
    const router = made(name, options);
    const before = on.live();
    const task = router.needs.includes("modalityIds") ? fusion : patches;
    learned(await trainTask({ ...task, router, engine: on }));
    expect(on.live()).toBe(before);
  });
});

test("moeFFD sends whole images to convolution adapters", async () => {
  const { grid = [0, 0] } = patches.task;
  const router = routers.moeFFD({ level: "image" });
  const trained = await trainTask({
    ...patches,
    router,
    engine: on,
    makeExperts: ({ width, ...initial }) => convAdapter({ width, grid, hidden: 6, ...initial }),
  });
  learned(trained);
});

describe("a missing modality", () => {
  const withMissing = (router: RouterPlugin): Promise<TrainedTask> => trainTask({ ...fusion, router, engine: on });

  test("is made up for by the two others, with the learned vector in its place", async () => {
    const trained = await withMissing(routers.fuseMoE({ k: 2, modalities: 3 }));
    learned(trained);
    expect(trained.missing.samples).toBeGreaterThan(40);
    expect(trained.missing.accuracy).toBeGreaterThan(trained.chance + 0.4);
    expect(trained.complete.accuracy).toBeGreaterThan(trained.chance + 0.4);
  });

  test("leaves the class to chance where it is one of two", async () => {
    const task = fusionTask({ modalities: 2, classes: 3, missing: 0 });
    // Trained on both, asked with the second one gone.
    const gone = {
      ...task,
      samples: (...place: Parameters<typeof task.samples>): ReturnType<typeof task.samples> => {
        const samples = task.samples(...place);
        if (place[0] === "training") return samples;
        const second = (i: number): boolean => Math.floor(i / task.features) % 2 === 1;
        const features = samples.features.map((x, i) => (second(i) ? 0 : x));
        return { ...samples, features, missing: Float32Array.from({ length: 2 * samples.count }, (_, i) => i % 2) };
      },
    };
    const router = routers.fuseMoE({ k: 2, modalities: 2 });
    const options = { router, engine: on, steps: 100, batch: 32 };
    expect((await trainTask({ ...options, task })).accuracy).toBeGreaterThan(0.9);
    const { missing } = await trainTask({ ...options, task: gone });
    expect(missing.samples).toBe(256);
    expect(Math.abs(missing.accuracy - 1 / 3)).toBeLessThan(0.12);
  });
});
