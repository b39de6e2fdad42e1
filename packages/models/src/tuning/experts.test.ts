// ESFT on loaded models: relevance scores against loops over the recorded routing, and rows of experts that were not chosen.
import { dispose, type Engine, engine, leaves, random, ShapeError } from "@switchyard/core";
import type { Routed } from "@switchyard/core/moe";
import { adamw, type ExpertConfig, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { beforeAll, describe, expect, it } from "vitest";
import type { LanguageModel } from "../model.ts";
import { makeEngine } from "../models.test-util.ts";
import type { TextBatch } from "../task.ts";
import { tensorsIn } from "../tree.ts";
import { chooseExperts, onlyExperts, trainsExperts } from "./experts.ts";
import { withLora } from "./lora.ts";
import { isLora, layerOf, partOf } from "./parts.ts";
import { changedParameters, tuned, tuningTask } from "./task.ts";
import { batch, contents, familyModel, streamedModel, text } from "./tuning.test-util.ts";

const other: TextBatch = {
  shape: [1, 4],
  ids: Int32Array.of(200, 7, 7, 91),
  labels: Int32Array.of(7, 7, 91, 3),
};
const batches = [batch, other];

/** Mean over samples of the mean over their tokens, of the gates and of the share of choices, from the plans of a whole pass. */
async function naiveScores(model: LanguageModel): Promise<Map<number, { gate: number[]; token: number[] }>> {
  const found = new Map<number, { gate: number[]; token: number[] }>();
  let samples = 0;
  for (const { ids, shape, mask } of batches) {
    const { engine: on } = model;
    const routed = on.scope(() => {
      const given = mask ? { mask: on.tensor(mask, shape) } : {};
      return model.forward(model.params, on.tensor(ids, shape), given).routed;
    }) as readonly Routed[];
    for (const [place, { layer, part, experts }] of model.routing.entries()) {
      if (part !== "feedForward") continue;
      const plan = routed[place]?.plan;
      if (plan?.kind !== "sparse") throw new Error("not sparse");
      const [chosen, weights] = [await plan.experts.data(), await plan.weights.data()];
      const k = plan.experts.shape[1] ?? 0;
      const scores = found.get(layer) ?? { gate: Array(experts).fill(0), token: Array(experts).fill(0) };
      found.set(layer, scores);
      for (let row = 0; row < shape[0]; row++) {
        const tokens = Array.from({ length: shape[1] }, (_, i) => row * shape[1] + i).filter((t) => mask?.[t] !== 0);
        for (const t of tokens)
          for (let slot = 0; slot < k; slot++) {
            const [e = 0, w = 0] = [chosen[t * k + slot], weights[t * k + slot]];
            scores.gate[e] = (scores.gate[e] ?? 0) + w / tokens.length;
            scores.token[e] = (scores.token[e] ?? 0) + 1 / k / tokens.length;
          }
      }
    }
    dispose([...tensorsIn([...routed])]);
    samples += shape[0];
  }
  for (const scores of found.values())
    for (const list of Object.values(scores)) for (const [e, x] of list.entries()) list[e] = x / samples;
  return found;
}

/** The fewest experts by falling score whose sum reaches p. */
function naiveChoice(scores: readonly number[], p: number): number[] {
  const order = scores.map((_, e) => e).sort((a, b) => (scores[b] ?? 0) - (scores[a] ?? 0) || a - b);
  const taken: number[] = [];
  for (let sum = 0; sum < p && taken.length < scores.length; sum += scores[taken.at(-1) ?? 0] ?? 0)
    taken.push(order[taken.length] ?? 0);
  return taken;
}

describe("chooseExperts", () => {
  const on = makeEngine();
  // Dense layers before the first routed one; routers in attention; weights that do not sum to 1; biases.
  it.each(["deepseek_v2", "jetmoe", "olmoe", "gpt_oss"])("%s: as loops over the routing have it", async (name) => {
    const model = await familyModel(name, on);
    const held = on.live();
    const naive = await naiveScores(model);
    expect(on.live()).toBe(held);
    for (const [by, p] of [
      ["gate", undefined],
      ["gate", 0.45],
      ["token", undefined],
      ["token", 0.6],
    ] as const) {
      const config = await chooseExperts(model, batches, { by, ...(p === undefined ? {} : { p }) });
      const expected = [...naive].map(([layer, scores]) => {
        const sum = by === "gate" ? scores.gate.reduce((a, b) => a + b, 0) : 1;
        const limit = p ?? (by === "gate" ? 0.1 : 0.2);
        return [
          `${layer}`,
          naiveChoice(
            scores[by].map((x) => x / sum),
            limit,
          ),
        ];
      });
      expect(config).toEqual({
        experts: Object.fromEntries(expected),
        shared_experts: false,
        non_expert_modules: false,
      });
    }
    expect(on.live()).toBe(held);
    dispose([model.params, ...model.buffers]);
  });

  it("chooses the same where experts are streamed", async () => {
    const model = await familyModel("mixtral", on);
    const streamed = await streamedModel(on);
    expect(await chooseExperts(streamed.model, batches, { p: 0.5 })).toEqual(
      await chooseExperts(model, batches, { p: 0.5 }),
    );
    await streamed.close();
    dispose(model.params);
  });

  it("refuses in words", async () => {
    const model = await familyModel("mixtral", on);
    await expect(chooseExperts(model, [])).rejects.toThrow(ShapeError);
    await expect(chooseExperts(model, batches, { p: 2 })).rejects.toThrow("p = 2");
    await expect(chooseExperts(model, batches, { by: "load" as "gate" })).rejects.toThrow('expected "gate" or "token"');
    dispose(model.params);
    expect(on.live()).toBe(0);
  });
});

describe("training chosen experts", () => {
  let fast: Engine;
  beforeAll(async () => {
    fast = engine(await wasm());
  });
  const rows = (values: readonly number[], count: number): string[] => {
    const size = values.length / count;
    return Array.from({ length: count }, (_, e) => values.slice(e * size, (e + 1) * size).join());
  };

  it.each([
    ["mixtral", false],
    ["gpt_oss", false],
    ["deepseek_v3", true],
    ["jetmoe", true],
  ] as const)("%s (adapters: %s): rows of all others stay bit for bit", async (name, adapters) => {
    const base = await familyModel(name, fast);
    const data = text(fast);
    const config = await chooseExperts(base, [data.batch(0)], { by: "token", p: 0.5 });
    const model = adapters
      ? withLora(base, { parts: ["experts", "attention"], rank: 2, random: random(fast, 5) })
      : base;
    const named = trainsExperts(config);
    const trains = (path: string): boolean => named(path) && (!adapters || isLora(path));
    const before = await contents(model.params);
    const task = tuningTask(model, { trains, batch: () => data.batch(0) });
    const paths = leaves(task.params).map(([path]) => path);
    expect(paths.length).toBeGreaterThan(0);
    expect(paths.every((path) => partOf(path) === "experts")).toBe(true);
    const run = trainer(fast, task, {
      optimiser: adamw({ learningRate: 1e-2, weightDecay: 0.1 }),
      hooks: [onlyExperts(model, config, task.params)],
    });
    await run.run({ until: 4 });
    expect(run.history.at(-1)?.loss).toBeLessThan(run.history[0]?.loss ?? 0);
    const after = tuned(model, run.params, run.buffers);
    const shapes = new Map(leaves(after.params).map(([path, x]) => [path, x.shape]));
    let moved = 0;
    for (const [path, values] of await contents(after.params)) {
      const old = before.get(path) ?? [];
      if (!trains(path)) {
        expect(values, path).toEqual(old);
        continue;
      }
      const count = shapes.get(path)?.[0] ?? 0;
      const chosen = config.experts[layerOf(path) ?? ""] ?? [];
      expect(chosen.length).toBeLessThan(count);
      const [now, was] = [rows(values, count), rows(old, count)];
      for (const [e, row] of now.entries()) {
        if (chosen.includes(e)) moved += row === was[e] ? 0 : 1;
        else expect(row, `${path}, expert ${e}`).toBe(was[e]);
      }
    }
    expect(moved).toBeGreaterThan(0);
    const changed = changedParameters(model, run.params, run.buffers);
    expect([...changed.keys()].every((path) => partOf(path) === "experts")).toBe(true);
    // Without adapters the trainer took the model's own experts over.
    const originals = adapters ? await contents(base.params) : new Map<string, readonly number[]>();
    for (const [path, x] of adapters ? changed : []) {
      const count = x.shape[0] ?? 0;
      const [now, was] = [rows(Array.from(await x.data()), count), rows(originals.get(path) ?? [], count)];
      const chosen = config.experts[layerOf(path) ?? ""] ?? [];
      for (const [e, row] of now.entries()) if (!chosen.includes(e)) expect(row, `${path}, expert ${e}`).toBe(was[e]);
      expect(chosen.some((e) => now[e] !== was[e])).toBe(true);
    }
    dispose([...changed.values()]);
    run.dispose();
    for (const [path, x] of leaves(after.params)) if (!trains(path)) x.dispose();
    dispose([...base.buffers]);
    expect(fast.live()).toBe(0);
  });

  it("resumes bit for bit from a snapshot that holds what is trained and nothing else", async () => {
    const base = await familyModel("deepseek_v3", fast);
    const data = text(fast);
    const config = await chooseExperts(base, [data.batch(0)], { by: "token", p: 0.5 });
    const begin = () => {
      const model = withLora(base, { parts: ["experts", "router"], rank: 2, random: random(fast, 5) });
      const named = trainsExperts({ ...config, non_expert_modules: true });
      const task = tuningTask(model, { trains: (path) => isLora(path) && named(path), batch: data.batch });
      const hooks = [onlyExperts(model, { ...config, non_expert_modules: true }, task.params)];
      return { task, run: trainer(fast, task, { optimiser: adamw({ learningRate: 1e-2 }), hooks, seed: 2 }) };
    };
    const straight = begin();
    await straight.run.run({ until: 2 });
    const snapshot = await straight.run.snapshot();
    const trained = leaves(straight.task.params).length;
    expect(Object.keys(snapshot.arrays)).toHaveLength(3 * trained);
    await straight.run.run({ until: 4 });
    const resumed = begin();
    resumed.run.restore(snapshot);
    await resumed.run.run({ until: 4 });
    expect(await contents(resumed.run.params)).toEqual(await contents(straight.run.params));
    const losses = ({ run }: typeof resumed): number[] => run.history.map(({ loss }) => loss);
    expect(losses(resumed)).toEqual(losses(straight));
    straight.run.dispose();
    resumed.run.dispose();
    dispose([base.params, ...base.buffers]);
    expect(fast.live()).toBe(0);
  });

  it("takes shared experts and all other modules where the config says so", async () => {
    const model = await familyModel("deepseek_v3", fast);
    const config: ExpertConfig = { experts: { 1: [0], 2: [1] }, shared_experts: true, non_expert_modules: false };
    const parts = (one: ExpertConfig): Set<string> =>
      new Set(leaves(model.params).flatMap(([path]) => (trainsExperts(one)(path) ? [partOf(path)] : [])));
    expect(parts(config)).toEqual(new Set(["experts", "shared"]));
    expect(parts({ ...config, shared_experts: false, non_expert_modules: true })).toEqual(
      new Set(["experts", "dense", "attention", "router", "embed", "head", "norms"]),
    );
    const task = tuningTask(model, { trains: () => true, batch: () => batch });
    const wrong = { ...config, experts: { 1: [0], 2: [99] } };
    expect(() => onlyExperts(model, wrong, task.params)).toThrow("trains expert 99 of block 2");
    dispose([model.params, ...model.buffers]);
  });
});
