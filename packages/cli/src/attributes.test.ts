// What null experts (2601.15370) and Expert Race (2503.16057) are for, trained at toy size: experts go to the tokens that
// need them, and the error is no larger than that of token choice with as many experts per token.
import { type Engine, engine } from "@switchyard/core";
import type { RouterPlugin } from "@switchyard/core/moe";
import { wasm } from "@switchyard/kernels/wasm";
import { expertRace, nullExperts } from "@switchyard/routers";
import { expect, test } from "vitest";
import { type Outcome, trainOn } from "./attributes.test-util.ts";

const timeout = 300_000;
const seeds = [1, 2, 3];
const mean = (values: readonly number[]): number => values.reduce((total, x) => total + x, 0) / values.length;
const error = (runs: readonly Outcome[]): number => mean(runs.map((run) => run.error));

async function trained(
  on: Engine,
  plugin: () => RouterPlugin,
  how: { readonly difficulties: readonly number[]; readonly steps: number; readonly fresh: number },
): Promise<Outcome[]> {
  const runs: Outcome[] = [];
  for (const seed of seeds) {
    const run = await trainOn(on, plugin(), { seed, ...how });
    expect(run.history.at(-1)?.loss).toBeLessThan(0.5 * (run.history[0]?.loss ?? 0));
    runs.push(run);
  }
  return runs;
}

test("null experts leave easy tokens with fewer experts and do better than top-k at equal expected compute", {
  timeout,
}, async () => {
  const on = engine(await wasm({ threads: 1 }));
  // Three quarters of the tokens ("vision") need no expert at all, the others ("text") three.
  const how = { difficulties: [0.75, 0, 0, 0.25], steps: 600, fresh: 8192 };
  const plain = await trained(on, () => nullExperts({ k: 2, rho: 1 }), how);
  const sparse = await trained(on, () => nullExperts({ k: 4, rho: 0.5 }), how);
  expect(error(sparse)).toBeLessThan(error(plain));
  for (const { perToken, byDifficulty, share } of sparse) {
    expect(Math.abs(perToken - 2)).toBeLessThanOrEqual(0.3);
    expect(byDifficulty[3]).toBeGreaterThan(1.5 * (byDifficulty[0] ?? 0));
    expect(share[0]).toBeLessThanOrEqual(0.6);
  }
  expect(on.live()).toBe(0);
});

test("in a race hard tokens win more experts within the budget, and the similarity loss balances best", {
  timeout,
}, async () => {
  const on = engine(await wasm({ threads: 1 }));
  const how = { difficulties: [0.25, 0.15, 0.2, 0.2, 0.2], steps: 450, fresh: 4096 };
  const race = { k: 2, momentum: 0.98, similarity: 0 };
  const choice = await trained(on, () => expertRace({ ...race, strategy: "token" }), how);
  const none = await trained(on, () => expertRace(race), how);
  const balance = await trained(on, () => expertRace({ ...race, balance: 0.01 }), how);
  const similarity = await trained(on, () => expertRace({ ...race, similarity: 0.01 }), how);
  const threshold = await trained(on, () => expertRace({ ...race, similarity: 0.01, training: "threshold" }), how);

  for (const runs of [none, balance, similarity, threshold])
    for (const { perToken, byDifficulty } of runs) {
      expect(Math.abs(perToken - 2)).toBeLessThanOrEqual(0.1);
      byDifficulty.slice(1).forEach((n, i) => {
        expect(n).toBeGreaterThan(byDifficulty[i] ?? 0);
      });
      expect(byDifficulty[4]).toBeGreaterThan(1.5 * (byDifficulty[0] ?? 0));
    }
  for (const { byDifficulty } of choice) for (const n of byDifficulty) expect(n).toBe(2);
  const violation = (runs: readonly Outcome[]): number =>
    mean(runs.map(({ load }) => Math.max(...load) / mean(load) - 1));
  expect(violation(similarity)).toBeLessThan(violation(balance));
  expect(violation(balance)).toBeLessThan(violation(none));
  expect(error(similarity)).toBeLessThanOrEqual(error(choice));
  // The causal form, for language models, does not fall behind.
  expect(error(threshold)).toBeLessThanOrEqual(error(choice));
  expect(on.live()).toBe(0);
});

test("a race whose layers learn to predict the target: that loss falls too", { timeout }, async () => {
  const on = engine(await wasm({ threads: 1 }));
  const how = { seed: 1, difficulties: [0.25, 0.15, 0.2, 0.2, 0.2], steps: 200, fresh: 256 };
  const { history } = await trainOn(on, expertRace({ k: 2, target: 12, perLayer: 0.1 }), how);
  const [first, last] = [history[0], history.at(-1)];
  expect(last?.loss).toBeLessThan(0.5 * (first?.loss ?? 0));
  expect(last?.losses.perLayer).toBeLessThan(0.8 * (first?.losses.perLayer ?? 0));
  expect(on.live()).toBe(0);
});
