// What is read back from a forward pass: a task that routes by hand stands for the model.
import { type Engine, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import type { Plan, Routed } from "@switchyard/core/moe";
import type { Task } from "@switchyard/core/train";
import { describe, expect, test } from "vitest";
import type { TokenBatch } from "./batches.ts";
import { finalLayer, joined, type LayerChoices, layerRouting, type Moment, onlyTokens, watch } from "./probe.ts";

const batch: TokenBatch = { shape: [1, 3], ids: Int32Array.of(5, 6, 7), labels: Int32Array.of(6, 7, -1) };

function momentOf(host: Engine, layers: (host: Engine) => readonly Omit<Routed, "losses">[], experts: number): Moment {
  const task: Task<TokenBatch> = {
    params: {},
    routers: [],
    batch: () => batch,
    forward: (_params, _buffers, { ids }) => ({
      loss: host.tensor(Float32Array.of(0.5), []),
      logits: host.tensor(Float32Array.from(ids), [3, 1]),
      layers: layers(host).map((layer) => ({ ...layer, losses: {} })),
    }),
  };
  return { engine: host, task, params: {}, buffers: [], experts, step: 0, totalSteps: 1 };
}

const f32 = (host: Engine, values: number[], columns: number) =>
  host.tensor(Float32Array.from(values), [values.length / columns, columns]);
const i32 = (host: Engine, values: number[], columns: number) =>
  host.tensor(Int32Array.from(values), [values.length / columns, columns]);

describe("watch", () => {
  test("sparse and dense plans, with null experts, empty slots and missing probabilities", async () => {
    const host = engine(cpu());
    const before = host.live();
    const moment = momentOf(
      host,
      (on) => {
        const weights = f32(on, [0.75, 0.25, 1, 0, 0.5, 0.5], 2);
        return [
          {
            plan: { kind: "sparse", experts: i32(on, [0, 1, 1, -1, 2, 0], 2), weights },
            probabilities: f32(on, [0.6, 0.2, 0.2, 0, 1, 0, 0.25, 0.25, 0.5], 3), // the third column is a null expert
          },
          { plan: { kind: "sparse", experts: i32(on, [0, 1, 1, -1, 2, 0], 2), weights } },
          { plan: { kind: "dense", weights: f32(on, [0, 2, 3, 1, 0, 0], 2) } },
        ];
      },
      2,
    );
    const { nats, layers, decisions } = await watch(moment, batch);
    const traced = typeof decisions === "string" ? [] : decisions;
    expect(traced.map(({ plan, experts, nulls, slots }) => [plan, experts, nulls, slots])).toEqual([
      ["sparse", 2, 1, 2],
      ["sparse", 2, 0, 2],
      ["dense", 2, 0, 2],
    ]);
    expect([...(traced[0]?.probabilities ?? [])]).toHaveLength(9); // null experts have their column
    expect(traced[1]).not.toHaveProperty("probabilities");
    expect(nats).toBe(1); // a mean of 0.5 over two counted tokens
    const [first, second, third] = layers;
    expect([first?.k, [...(first?.ids ?? [])]]).toEqual([2, [0, 1, 1, -1, 2, 0]]);
    expect([...(first?.probabilities ?? [])].map((p) => Number(p.toFixed(6)))).toEqual([0.6, 0.2, 0, 1, 0.25, 0.25]);
    expect([...(second?.probabilities ?? [])]).toEqual([0.75, 0.25, 0, 1, 0.5, 0]);
    expect([third?.k, [...(third?.ids ?? [])]]).toEqual([2, [-1, 1, 0, 1, -1, -1]]);
    expect(host.live()).toBe(before);
  });

  test("for a trace, several paths of a layer stand beside each other, and a merge plan is a reason", async () => {
    const host = engine(cpu());
    const before = host.live();
    const sparse = (on: Engine): Plan => ({
      kind: "sparse",
      experts: i32(on, [0, -1, 1], 1),
      weights: f32(on, [1, 0.5, 0.25], 1),
    });
    const second = (on: Engine): Plan => ({ kind: "dense", weights: f32(on, [0, 2, 3, 1, 0, 0], 2) });
    const both = await watch(
      momentOf(host, (on) => [{ plan: sparse(on), more: [{ plan: second(on) }] }], 2),
      batch,
    );
    expect(both.decisions).toEqual([
      {
        plan: "dense",
        experts: 2,
        nulls: 0,
        slots: 3,
        ids: Int32Array.of(0, -1, 1, -1, 0, 1, 1, -1, -1),
        weights: Float32Array.of(1, 0, 2, 0, 3, 1, 0.25, 0, 0),
      },
    ]);
    expect(both.layers[0]?.k).toBe(1); // the records follow the first path
    const merge = (on: Engine): Plan => ({
      kind: "merge",
      groups: on.tensor(Int32Array.of(0, 0, 0), [3]),
      coefficients: [f32(on, [0.5, 0.5], 2)],
    });
    const merged = await watch(
      momentOf(host, (on) => [{ plan: sparse(on) }, { plan: merge(on) }], 2),
      batch,
    );
    expect(merged.decisions).toContain('which a plan of kind "merge" does not');
    expect(host.live()).toBe(before);
  });

  test("a plan that names no experts per token is refused, and nothing stays on the engine", async () => {
    const host = engine(cpu());
    const before = host.live();
    const plan = (on: Engine): Plan => ({
      kind: "expert-choice",
      tokens: i32(on, [0, 1], 1),
      weights: f32(on, [1, 1], 1),
    });
    await expect(
      watch(
        momentOf(host, (on) => [{ plan: plan(on) }], 2),
        batch,
      ),
    ).rejects.toThrow('a plan of kind "expert-choice" names none');
    expect(host.live()).toBe(before);
  });
});

const some = (k: number, ids: number[], experts = 3): LayerChoices => ({
  experts,
  k,
  ids: Int32Array.from(ids),
  weights: Float32Array.from(ids, (_, i) => i + 1),
  probabilities: Float32Array.from({ length: (ids.length / k) * experts }, (_, i) => i / 8),
});

describe("joined and onlyTokens", () => {
  test("narrower lists are filled up with empty slots", () => {
    const all = joined([some(1, [2, 0]), some(2, [0, 1])]);
    expect([all.k, [...all.ids], [...all.weights]]).toEqual([2, [2, -1, 0, -1, 0, 1], [1, 0, 2, 0, 1, 2]]);
    expect([...all.probabilities]).toEqual([0, 1, 2, 3, 4, 5, 0, 1, 2].map((x) => x / 8));
    expect(joined([])).toMatchObject({ experts: 0, k: 0 });
  });

  test("tokens are kept with their slots and probabilities", () => {
    const kept = onlyTokens(some(2, [0, 1, 1, 2, 2, 0]), (token) => token !== 1);
    expect([[...kept.ids], [...kept.weights]]).toEqual([
      [0, 1, 2, 0],
      [1, 2, 5, 6],
    ]);
    expect([...kept.probabilities]).toEqual([0, 1, 2, 6, 7, 8].map((x) => x / 8));
  });
});

test("layerRouting gathers the numbers of a layer", () => {
  const now = some(1, [0, 0, 1, 1]);
  const record = layerRouting(now, Uint8Array.of(0, 0, 1, 1), 2, some(1, [0, 2, 1, 2]));
  expect(record).toMatchObject({
    load: [
      [1, 0, 0],
      [0, 1, 0],
    ],
    expertsByDomain: [1, 1],
    imbalance: 1.5,
    dead: 1,
    specialisation: 1,
    expertsPerToken: 1,
    fluctuation: 0.5,
  });
  expect(layerRouting(now, Uint8Array.of(0, 0, 1, 1), 2)).not.toHaveProperty("fluctuation");
});

describe("finalLayer", () => {
  // Tokens of expert sets {0, 1}, {1, 2}, {1}, {0, null}.
  const probe = some(2, [0, 1, 1, 2, 1, -1, 0, 3]);

  test("who meets whom, as shares of each expert's tokens", async () => {
    const host = engine(cpu());
    const before = host.live();
    const { together, combinations } = await finalLayer(host, { probe, clean: probe, noised: probe });
    expect(together).toEqual([
      [1, 0.5, 0],
      [0.33333, 1, 0.33333],
      [0, 1, 1],
    ]);
    expect(combinations).toBeCloseTo(1 / 3, 5); // two of the three pairs meet, once each: the first does not reach 95 %
    expect(host.live()).toBe(before);
  });

  test("what noise changes: sets, overlap and first experts; the order within a set is not a change", async () => {
    const host = engine(cpu());
    const noised = some(2, [1, 0, 1, 0, 1, -1, 0, 3]);
    const found = await finalLayer(host, { probe, clean: probe, noised });
    expect(found.noised).toEqual({ sets: 0.25, overlap: 0.125, firsts: 0.25 });
    const still = await finalLayer(host, { probe, clean: probe, noised: probe });
    expect(still.noised).toEqual({ sets: 0, overlap: 0, firsts: 0 });
  });
});
