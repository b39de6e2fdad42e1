// Fine-tuning checkpoints of every family, whole and by low-rank maps: the loss falls, what is frozen stays bit for bit, nothing leaks.
import {
  dispose,
  type Engine,
  engine,
  leaves,
  random,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import { adamw, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { beforeAll, describe, expect, it } from "vitest";
import type { LanguageModel } from "../model.ts";
import { makeEngine } from "../models.test-util.ts";
import { withLora } from "./lora.ts";
import { isLora, partOf, type TuningPart } from "./parts.ts";
import { changedParameters, tuned, tuningTask } from "./task.ts";
import { contents, families, familyModel, streamedModel, text } from "./tuning.test-util.ts";

let fast: Engine;
beforeAll(async () => {
  fast = engine(await wasm());
});

interface Trial {
  readonly trains: (path: string) => boolean;
  readonly rate?: number;
  readonly steps?: number;
}

/** Trains on one batch again and again; what is not trained must not change. Returns the losses and what did change. */
async function train(on: Engine, model: LanguageModel, { trains, rate = 2e-3, steps = 4 }: Trial) {
  const before = await contents(model.params);
  const buffers = await contents(model.buffers as Tree);
  const data = text(on);
  const task = tuningTask(model, { trains, batch: () => data.batch(0) });
  const run = trainer(on, task, { optimiser: adamw({ learningRate: rate }), clip: 1 });
  await run.run({ until: steps });
  const after = tuned(model, run.params, run.buffers);
  const now = await contents(after.params);
  const changed = [...now].filter(([path, x]) => before.get(path)?.some((v, i) => !Object.is(v, x[i])));
  expect([...now.keys()]).toEqual([...before.keys()]);
  for (const [path] of changed) expect(trains(path), `${path} was to stay`).toBe(true);
  expect(await contents(after.buffers as Tree)).toEqual(buffers);
  const losses = run.history.map(({ loss }) => loss);
  expect(run.history.every(({ losses: more }) => Object.keys(more).length === 0)).toBe(true);
  return { losses, changed: changed.map(([path]) => path), run, after };
}
const falls = ([first = Number.NaN, ...more]: readonly number[]): void => {
  expect(more.at(-1)).toBeLessThan(first);
};

describe("every family trains", () => {
  it.each(families)("%s: whole, and low-rank maps of experts, attention and router", async (name) => {
    const whole = await familyModel(name, fast);
    const held = fast.live();
    for (const parts of [["experts"], ["attention"], ["router"], ["experts", "attention", "router"]] as const) {
      const adapted = withLora(whole, { parts, rank: 2, random: random(fast, 3) });
      const { losses, changed, run } = await train(fast, adapted, { trains: isLora, rate: 1e-2 });
      falls(losses);
      expect(new Set(changed.map(partOf))).toEqual(new Set<TuningPart>(parts));
      const { arrays } = await run.snapshot();
      for (const array of Object.keys(arrays)) expect(array).toMatch(/\.lora\/2\.[ab]$/);
      run.dispose();
      expect(fast.live()).toBe(held);
    }
    const { losses, changed, after, run } = await train(fast, whole, { trains: () => true });
    falls(losses);
    // All but the experts that no token went to.
    expect(new Set(changed.map(partOf))).toEqual(new Set(leaves(whole.params).map(([path]) => partOf(path))));
    run.dispose();
    dispose([...after.buffers]);
    expect(fast.live()).toBe(0);
  });
});

describe("what is trained", () => {
  const on = makeEngine();

  it("is a flat record, on the reference backend as elsewhere", async () => {
    const model = await familyModel("granitemoe", on);
    const trains = (path: string): boolean => partOf(path) === "attention" || partOf(path) === "norms";
    const { losses, changed, run, after } = await train(on, model, { trains });
    falls(losses);
    expect(Object.keys(run.params).sort()).toEqual(changed.sort());
    expect(changed.every(trains)).toBe(true);
    run.dispose();
    // All else is the model's still.
    for (const [path, x] of leaves(after.params)) if (!trains(path)) x.dispose();
    expect(on.live()).toBe(0);
  });

  it("routers decide as in use, unless told otherwise; then they sample, lose and move their buffers", async () => {
    const data = text(on);
    const first = async (name: string, how: Parameters<typeof tuningTask>[1]) => {
      const model = await familyModel(name, on);
      const before = await contents(model.buffers as Tree);
      const task = tuningTask(model, how);
      const run = trainer(on, task, { optimiser: adamw({ learningRate: 1e-3 }) });
      const { losses, loss } = await run.step();
      const after = tuned(model, run.params, run.buffers);
      const moved = [...(await contents(after.buffers as Tree))].filter(
        ([path, x]) => `${x}` !== `${before.get(path)}`,
      );
      // Buffers that are the model's own did not change.
      const trained = changedParameters(model, run.params);
      expect([...trained.keys()].filter((path) => path.includes(".buffers."))).toEqual([]);
      dispose([...trained.values()]);
      const changed = changedParameters(model, run.params, run.buffers);
      const buffers = [...changed.keys()].filter((path) => path.includes(".buffers."));
      dispose([...changed.values()]);
      run.dispose();
      for (const [path, x] of leaves(after.params)) if (!how.trains(path)) x.dispose();
      dispose([...after.buffers]);
      expect(on.live()).toBe(0);
      return { losses: Object.keys(losses), loss, moved: moved.length, buffers };
    };
    const batches = { batch: () => data.batch(0) };
    const all = { trains: () => true, ...batches };
    const noRouter = { trains: (path: string) => partOf(path) !== "router", ...batches };
    const v3 = await first("deepseek_v3", all);
    expect(v3).toMatchObject({ losses: [], moved: 0, buffers: [] });
    const v3Moving = await first("deepseek_v3", { ...all, routing: "training" });
    expect(v3Moving.losses).toEqual(["balance"]);
    expect(v3Moving.moved).toBe(v3Moving.buffers.length);
    expect(v3Moving.buffers).toContain("layers.1.moe.buffers.bias");
    expect(v3Moving.loss).toBe(v3.loss);
    expect(await first("deepseek_v3", { ...noRouter, routing: "training" })).toMatchObject({ moved: 0, buffers: [] });

    const phi = await first("phimoe", noRouter);
    expect(phi.losses).toEqual([]);
    const sampled = await first("phimoe", { ...noRouter, routing: "training" });
    expect(sampled.losses).toEqual(["balance"]);
    expect(sampled.loss).not.toBe(phi.loss);
  });

  it("comes out by path, adapters added to their matrices, and goes with the caller's references", async () => {
    const model = await familyModel("olmoe", on);
    const adapted = withLora(model, { parts: ["attention"], rank: 2, random: random(on, 3) });
    const trains = (path: string): boolean => isLora(path) || path === "norm";
    const { changed, run, after } = await train(on, adapted, { trains });
    const held = on.live();
    const found = changedParameters(adapted, run.params, run.buffers);
    const paths = leaves(model.params).flatMap(([path]) => (/attention\.[qkvo]$/.test(path) ? [path] : []));
    expect([...found.keys()].sort()).toEqual([...paths, "norm"].sort());
    expect(changed).toContain("norm");
    for (const path of paths) {
      const x = found.get(path) as Tensor;
      const w = leaves(model.params).find(([one]) => one === path)?.[1] as Tensor;
      expect(x.shape).toEqual(w.shape);
      expect(Array.from(await x.data())).not.toEqual(Array.from(await w.data()));
    }
    const norm = leaves(after.params).find(([path]) => path === "norm")?.[1] as Tensor;
    expect(Array.from((await found.get("norm")?.data()) ?? [])).toEqual(Array.from(await norm.data()));
    dispose([...found.values()]);
    expect(on.live()).toBe(held);
    run.dispose();
    for (const [path, x] of leaves(model.params)) if (path !== "norm") x.dispose();
    expect(on.live()).toBe(0);
  });

  it("is refused in words where it cannot be", async () => {
    const { batch } = text(on);
    const model = await familyModel("mixtral", on);
    expect(() => tuningTask(model, { trains: () => false, batch })).toThrow("no parameter is trained");
    expect(() => tuned(model, { nothing: model.params })).toThrow('"nothing.embed" is no parameter of this model');
    expect(() => changedParameters(model, { nothing: model.params })).toThrow("is no parameter of this model");
    const stored = await familyModel("gpt_oss_mxfp4", fast, {});
    const whole = (): unknown => tuningTask(stored, { trains: () => true, batch });
    expect(whole).toThrow(UnsupportedError);
    expect(whole).toThrow(
      '"embed" is bf16 [256,64], and only f32 can be trained; load the model with weights: "f32", or train adapters beside it',
    );
    dispose([model.params, stored.params]);
    const streamed = await streamedModel(on);
    expect(() => tuningTask(streamed.model, { trains: () => true, batch })).toThrow(
      "the experts of this model are streamed",
    );
    expect(() => withLora(streamed.model, { parts: ["attention"], random: random(on, 1) })).toThrow("are streamed");
    await streamed.close();
    expect(on.live() + fast.live()).toBe(0);
  });
});
