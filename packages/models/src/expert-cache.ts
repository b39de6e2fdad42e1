// Which experts stay in memory: a cache over ids with exchangeable policies, and a predictor for loading ahead. Only
// bookkeeping: it says what to load and what to drop, and holds no weights, so that a simulation decides exactly as a run.
import { ShapeError } from "@switchyard/core";

/** Chooses what leaves. Deterministic: equal histories give equal choices. */
export interface EvictionPolicy {
  readonly name: string;
  /** Is told of every group that is needed, before it is served: distinct ids in ascending order. */
  used(ids: readonly number[]): void;
  /** The one of `candidates` (at least one) that leaves. */
  victim(candidates: readonly number[]): number;
}

/** The candidate with the smallest rank; ranks are compared entry by entry, then by id. */
function smallest(candidates: readonly number[], rank: (id: number) => readonly [number, number]): number {
  let best = candidates[0] as number;
  let bestRank = rank(best);
  for (const id of candidates) {
    const own = rank(id);
    const order = own[0] - bestRank[0] || own[1] - bestRank[1] || id - best;
    if (order < 0) [best, bestRank] = [id, own];
  }
  return best;
}

/** Least recently used; within one group the lower id counts as older. */
export function lru(): EvictionPolicy {
  const last = new Map<number, number>();
  let time = 0;
  return {
    name: "lru",
    used(ids) {
      time++;
      for (const id of ids) last.set(id, time);
    },
    victim: (candidates) => smallest(candidates, (id) => [last.get(id) ?? 0, 0]),
  };
}

/** Least frequently used over the whole history, also while an expert was away; equal counts: least recently used. */
export function lfu(): EvictionPolicy {
  const counts = new Map<number, number>();
  const last = new Map<number, number>();
  let time = 0;
  return {
    name: "lfu",
    used(ids) {
      time++;
      for (const id of ids) {
        counts.set(id, (counts.get(id) ?? 0) + 1);
        last.set(id, time);
      }
    },
    victim: (candidates) => smallest(candidates, (id) => [counts.get(id) ?? 0, last.get(id) ?? 0]),
  };
}

/**
 * Belady's optimum (10.1147/sj.52.0078): what is needed again latest leaves. It knows `future`, every group in order; no
 * policy that loads on demand has fewer misses. Throws ShapeError when the groups that come are more than those foretold.
 */
export function belady(future: readonly (readonly number[])[]): EvictionPolicy {
  const times = new Map<number, number[]>();
  for (const [time, ids] of future.entries()) {
    for (const id of new Set(ids)) {
      const own = times.get(id);
      if (own) own.push(time);
      else times.set(id, [time]);
    }
  }
  const passed = new Map<number, number>();
  let time = 0;
  const next = (id: number): number => times.get(id)?.[passed.get(id) ?? 0] ?? Number.POSITIVE_INFINITY;
  return {
    name: "belady",
    used(ids) {
      if (time === future.length) throw new ShapeError(`belady: group ${time} came, but only ${time} were foretold`);
      for (const id of ids) {
        if (next(id) !== time) throw new ShapeError(`belady: ${id} came in group ${time}, which was not foretold`);
        passed.set(id, (passed.get(id) ?? 0) + 1);
      }
      time++;
    },
    // Two that never come again are equal: -Infinity - -Infinity would be NaN, so the largest number stands for never.
    victim: (candidates) => smallest(candidates, (id) => [-Math.min(next(id), Number.MAX_VALUE), 0]),
  };
}

/** One expert to read: `evict` leaves before it; without `kept` it is used and not stored. */
export interface ExpertLoad {
  readonly id: number;
  readonly evict?: number;
  readonly kept: boolean;
}

export interface ExpertCache {
  readonly capacity: number;
  /** Experts held. */
  readonly size: number;
  has(id: number): boolean;
  /**
   * One layer asks for the experts of one pass (any order, repetitions allowed). `hits` were there; `loads` are to be carried
   * out in their order. Up to `capacity` experts are all there afterwards; of more, use the hits first and each load
   * when it comes, because later ones may take its place.
   */
  need(ids: Iterable<number>): { readonly hits: readonly number[]; readonly loads: readonly ExpertLoad[] };
  /**
   * Loads experts that are expected next, most likely first. Takes no place of those `inUse` (the layer that is computing, where
   * layers share the cache) or of others that this call expects, and stops when no place is left.
   */
  prefetch(ids: Iterable<number>, inUse?: Iterable<number>): readonly ExpertLoad[];
  /** One that was to be loaded and could not be: it is not there. */
  forget(id: number): void;
}

/** An empty cache of `capacity` experts, 0 or more. Throws ShapeError for another capacity. */
export function expertCache({
  capacity,
  policy,
}: {
  readonly capacity: number;
  readonly policy: EvictionPolicy;
}): ExpertCache {
  if (!(Number.isSafeInteger(capacity) && capacity >= 0)) {
    throw new ShapeError(`expertCache: capacity is ${capacity}, expected a whole number from 0`);
  }
  const held = new Set<number>();
  const without = (pinned: ReadonlySet<number>): number[] => [...held].filter((id) => !pinned.has(id));
  const place = (id: number, evict: number | undefined): ExpertLoad => {
    if (evict !== undefined) held.delete(evict);
    held.add(id);
    return evict === undefined ? { id, kept: true } : { id, evict, kept: true };
  };
  return {
    capacity,
    get size() {
      return held.size;
    },
    has: (id) => held.has(id),
    need(ids) {
      const group = [...new Set(ids)].sort((a, b) => a - b);
      const current = new Set(group);
      policy.used(group);
      const hits = group.filter((id) => held.has(id));
      const loads: ExpertLoad[] = [];
      for (const id of group) {
        if (hits.includes(id)) continue;
        if (capacity === 0) {
          loads.push({ id, kept: false });
          continue;
        }
        if (held.size < capacity) {
          loads.push(place(id, undefined));
          continue;
        }
        // Others leave first; when the group alone is too large, its members compete, the new one among them.
        const others = without(current);
        const leaves = policy.victim(others.length > 0 ? others : [...held, id]);
        loads.push(leaves === id ? { id, kept: false } : place(id, leaves));
      }
      return { hits, loads };
    },
    forget(id) {
      held.delete(id);
    },
    prefetch(ids, inUse = []) {
      const pinned = new Set(inUse);
      const loads: ExpertLoad[] = [];
      for (const id of new Set(ids)) {
        const there = held.has(id);
        pinned.add(id);
        if (there) continue;
        if (held.size < capacity) {
          loads.push(place(id, undefined));
          continue;
        }
        const others = without(pinned);
        if (others.length === 0) break;
        loads.push(place(id, policy.victim(others)));
      }
      return loads;
    },
  };
}

/** Learns, while it runs, which experts of a layer follow which of the layer before. */
export interface ExpertPredictor {
  /** Both layers' experts of one pass. */
  observe(before: readonly number[], after: readonly number[]): void;
  /** Up to `count` experts that followed `before` most often, most frequent first (equal: lower id); none that never did. */
  predict(before: readonly number[], count: number): number[];
}

/** A predictor for one pair of neighbouring layers, by counts of co-occurrence. */
export function expertPredictor(): ExpertPredictor {
  const counts = new Map<number, Map<number, number>>();
  return {
    observe(before, after) {
      for (const b of new Set(before)) {
        const row = counts.get(b) ?? new Map<number, number>();
        counts.set(b, row);
        for (const a of new Set(after)) row.set(a, (row.get(a) ?? 0) + 1);
      }
    },
    predict(before, count) {
      const scores = new Map<number, number>();
      for (const b of new Set(before)) {
        for (const [a, n] of counts.get(b) ?? []) scores.set(a, (scores.get(a) ?? 0) + n);
      }
      const ranked = [...scores].sort(([a, n], [b, m]) => m - n || a - b);
      return ranked.slice(0, count).map(([id]) => id);
    },
  };
}
