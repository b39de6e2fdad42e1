// The expert cache against naive simulators that share no code with it, and against the best of all possible choices.
import { ShapeError } from "@switchyard/core";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { belady, type EvictionPolicy, expertCache, expertPredictor, lfu, lru } from "./expert-cache.ts";

const groups = fc.array(fc.uniqueArray(fc.nat(5), { maxLength: 4 }), { maxLength: 14 });

/** Misses of each group. */
function missesOf(policy: EvictionPolicy, capacity: number, history: readonly (readonly number[])[]): number[] {
  const cache = expertCache({ capacity, policy });
  return history.map((ids) => cache.need(ids).loads.length);
}
const total = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

/** LRU and LFU over a plain list, for groups that fit: the whole history is searched anew at each eviction. */
function naive(kind: "lru" | "lfu", capacity: number, history: readonly (readonly number[])[]): number[] {
  let held: number[] = [];
  return history.map((ids, now) => {
    const past = history.slice(0, now + 1);
    const uses = (id: number): number => past.filter((one) => one.includes(id)).length;
    const age = (id: number): number => past.findLastIndex((one) => one.includes(id));
    const missing = ids.filter((id) => !held.includes(id));
    const others = held.filter((id) => !ids.includes(id));
    const worst = (a: number, b: number): number =>
      (kind === "lfu" ? uses(a) - uses(b) : 0) || age(a) - age(b) || a - b;
    const room = capacity - ids.length;
    held = [...ids, ...others.sort(worst).slice(Math.max(0, others.length - room))];
    return missing.length;
  });
}

/** The fewest misses of any choices: every subset that may remain is followed. */
function fewest(capacity: number, history: readonly (readonly number[])[]): number {
  const subsets = (ids: readonly number[], size: number): number[][] =>
    size === 0 || ids.length === 0
      ? [[]]
      : [...subsets(ids.slice(1), size - 1).map((rest) => [ids[0] as number, ...rest]), ...subsets(ids.slice(1), size)];
  let states = new Map<string, number>([["", 0]]);
  for (const ids of history) {
    const next = new Map<string, number>();
    for (const [state, cost] of states) {
      const held = state === "" ? [] : state.split(",").map(Number);
      const paid = cost + ids.filter((id) => !held.includes(id)).length;
      const fits = ids.length <= capacity;
      const others = held.filter((id) => !ids.includes(id));
      const kept = fits
        ? subsets(others, capacity - ids.length).map((rest) => [...ids, ...rest])
        : subsets(ids, capacity);
      for (const one of kept) {
        const key = one.sort((a, b) => a - b).join();
        next.set(key, Math.min(next.get(key) ?? Number.POSITIVE_INFINITY, paid));
      }
    }
    states = next;
  }
  return Math.min(...states.values());
}

describe("expertCache", () => {
  it.each(["lru", "lfu"] as const)("%s decides as a naive simulator", (kind) => {
    fc.assert(
      fc.property(groups, fc.integer({ min: 4, max: 7 }), (history, capacity) => {
        expect(missesOf(kind === "lru" ? lru() : lfu(), capacity, history)).toEqual(naive(kind, capacity, history));
      }),
      { seed: 1, numRuns: 300 },
    );
  });

  it("belady has the fewest misses that are possible, and LRU and LFU never fewer", () => {
    fc.assert(
      fc.property(groups, fc.nat(6), (history, capacity) => {
        const best = total(missesOf(belady(history), capacity, history));
        expect(best).toBe(fewest(capacity, history));
        expect(total(missesOf(lru(), capacity, history))).toBeGreaterThanOrEqual(best);
        expect(total(missesOf(lfu(), capacity, history))).toBeGreaterThanOrEqual(best);
      }),
      { seed: 2, numRuns: 300 },
    );
  });

  it("its loads lead to what it holds, and a group that fits is there", () => {
    fc.assert(
      fc.property(groups, fc.nat(6), fc.constantFrom(lru, lfu), (history, capacity, make) => {
        const cache = expertCache({ capacity, policy: make() });
        const held = new Set<number>();
        for (const ids of history) {
          const { hits, loads } = cache.need(ids);
          expect([...hits, ...loads.map(({ id }) => id)].sort()).toEqual([...ids].sort());
          for (const id of hits) expect(held.has(id)).toBe(true);
          for (const { id, evict, kept } of loads) {
            expect(held.has(id)).toBe(false);
            if (evict !== undefined) expect(held.delete(evict)).toBe(true);
            if (kept) held.add(id);
            expect(held.size).toBeLessThanOrEqual(capacity);
          }
          if (ids.length <= capacity) for (const id of ids) expect(cache.has(id)).toBe(true);
          for (let id = 0; id < 6; id++) expect(cache.has(id)).toBe(held.has(id));
          expect(cache.size).toBe(held.size);
        }
      }),
      { seed: 3 },
    );
  });

  it("holds nothing at capacity 0, and misses each expert once when all fit", () => {
    const history = [[0, 1], [1, 2], [0], [2]];
    expect(missesOf(lru(), 0, history)).toEqual([2, 2, 1, 1]);
    expect(missesOf(lfu(), 3, history)).toEqual([2, 1, 0, 0]);
    expect(missesOf(lru(), 1, [[4], [4], [5], [4]])).toEqual([1, 0, 1, 1]);
    expect(() => expertCache({ capacity: -1, policy: lru() })).toThrow(ShapeError);
    expect(() => expertCache({ capacity: 1.5, policy: lru() })).toThrow(/capacity is 1.5/);
  });

  it("loads ahead without touching what is in use", () => {
    const cache = expertCache({ capacity: 3, policy: lru() });
    cache.need([7]);
    cache.need([0, 1]);
    expect(cache.prefetch([1, 2, 3], [0, 1])).toEqual([{ id: 2, evict: 7, kept: true }]);
    expect([0, 1, 2, 3, 7].filter((id) => cache.has(id))).toEqual([0, 1, 2]);
    expect(cache.need([2, 4])).toEqual({ hits: [2], loads: [{ id: 4, evict: 0, kept: true }] });
    expect(expertCache({ capacity: 0, policy: lru() }).prefetch([1])).toEqual([]);
    expect(expertCache({ capacity: 2, policy: lru() }).prefetch([5, 5, 6])).toEqual([
      { id: 5, kept: true },
      { id: 6, kept: true },
    ]);
  });

  it("forgets what could not be loaded, and only that", () => {
    const cache = expertCache({ capacity: 2, policy: lru() });
    expect(cache.need([1, 2]).loads.map(({ id }) => id)).toEqual([1, 2]);
    cache.forget(2);
    cache.forget(9);
    expect([cache.size, cache.has(1), cache.has(2)]).toEqual([1, true, false]);
    expect(cache.need([1, 2])).toEqual({ hits: [1], loads: [{ id: 2, kept: true }] });
  });

  it("belady refuses what was not foretold", () => {
    const policy = belady([[1], [2]]);
    policy.used([1]);
    expect(() => policy.used([3])).toThrow(/3 came in group 1/);
    policy.used([2]);
    expect(() => policy.used([])).toThrow(ShapeError);
  });
});

describe("expertPredictor", () => {
  it("ranks by how often experts followed", () => {
    const predictor = expertPredictor();
    expect(predictor.predict([0], 3)).toEqual([]);
    predictor.observe([0, 1], [5]);
    predictor.observe([0], [4, 5]);
    predictor.observe([2], [6, 3]);
    expect(predictor.predict([0], 3)).toEqual([5, 4]);
    expect(predictor.predict([0, 2], 3)).toEqual([5, 3, 4]);
    expect(predictor.predict([2], 1)).toEqual([3]);
  });
});
