// Replays a routing trace against caches of experts: how often an expert would have been in memory, and what is read. The
// decisions are those of expert-cache.ts, the same code that a streamed run decides by.
import { ShapeError } from "@switchyard/core";
import { belady, type EvictionPolicy, expertCache, expertPredictor, lfu, lru } from "../expert-cache.ts";
import type { TraceChunk, TraceHeader, TraceLayer } from "./format.ts";

/** What one forward pass needs of one layer: distinct experts, ascending. */
export interface ExpertRequest {
  /** Place in the header's `layers`. */
  readonly layer: number;
  readonly experts: readonly number[];
}

export type CachePolicy = (typeof cachePolicies)[number];
export const cachePolicies = ["lru", "lfu", "belady", "prefetch"] as const;

/**
 * The size of the cache: so many experts for each layer, or so many bytes for all layers together, where layers without
 * `expertBytes` beside others that have them are taken to stay in memory.
 */
export type CacheSize = { readonly expertsPerLayer: number } | { readonly memory: number };

export interface CacheCounts {
  /** Distinct experts of a layer in a pass, summed over the passes. */
  readonly requests: number;
  readonly hits: number;
  /** Experts that had to be loaded when they were needed: requests - hits. */
  readonly misses: number;
  /** Experts that were loaded ahead. */
  readonly prefetches: number;
  /** Those of them that the layer then needed in that pass. */
  readonly usefulPrefetches: number;
  /** hits / requests; 1 without requests. */
  readonly hitRate: number;
  /** Misses and prefetches times the bytes of an expert; null where the trace does not say those. */
  readonly bytesRead: number | null;
}

export interface CacheResult {
  readonly policy: CachePolicy;
  /** Experts per cache: of one layer, or of all where `shared`. */
  readonly capacity: number;
  readonly shared: boolean;
  readonly total: CacheCounts;
  /** In the order of the header's layers. */
  readonly layers: readonly CacheCounts[];
}

/**
 * What every pass needs of every layer, in the order of a run: padding counts where it has experts, null experts and empty
 * slots do not. Holds 8 bytes or so for each distinct expert of a pass and layer.
 */
export async function expertRequests(
  header: TraceHeader,
  chunks: AsyncIterable<TraceChunk> | Iterable<TraceChunk>,
): Promise<ExpertRequest[]> {
  const requests: ExpertRequest[] = [];
  let pass = -1;
  let needed: Set<number>[] = [];
  const close = (): void => {
    for (const [layer, ids] of needed.entries()) {
      if (ids.size > 0) requests.push({ layer, experts: [...ids].sort((a, b) => a - b) });
    }
  };
  for await (const chunk of chunks) {
    for (let token = 0; token < chunk.tokens; token++) {
      const own = chunk.pass[token] as number;
      if (own !== pass) {
        close();
        pass = own;
        needed = header.layers.map(
          ({ plan, experts }) => new Set(plan === "dense" ? Array.from({ length: experts }, (_, id) => id) : []),
        );
      }
      for (const [layer, { slots, experts: count, plan }] of header.layers.entries()) {
        if (plan === "dense") continue;
        const ids = chunk.layers[layer]?.experts;
        for (let slot = 0; slot < slots; slot++) {
          const id = ids?.[token * slots + slot] ?? -1;
          if (id >= 0 && id < count) needed[layer]?.add(id);
        }
      }
    }
  }
  close();
  return requests;
}

interface Tally {
  requests: number;
  hits: number;
  prefetches: number;
  useful: number;
}

const ratio = (hits: number, requests: number): number => (requests === 0 ? 1 : hits / requests);

/**
 * Replays requests against one policy and size, from an empty cache. "prefetch" is LRU that, after each layer, loads for the
 * next one as many experts as it needed last time, chosen by what followed these experts so far.
 * Throws ShapeError for sizes that are not whole numbers from 0, and for a memory without `expertBytes`.
 */
export function simulateCache(
  layers: readonly Pick<TraceLayer, "experts" | "expertBytes">[],
  given: readonly ExpertRequest[],
  { policy, size }: { readonly policy: CachePolicy; readonly size: CacheSize },
): CacheResult {
  const shared = "memory" in size;
  /** Layers whose experts the cache holds, in the order of a pass. */
  const cached = layers.flatMap((one, i) => (shared && one.expertBytes === undefined ? [] : [i]));
  const capacity = shared ? sharedCapacity(layers, size.memory) : size.expertsPerLayer;
  if (!(Number.isSafeInteger(capacity) && capacity >= 0)) {
    throw new ShapeError(`cache simulation: expertsPerLayer is ${capacity}, expected a whole number from 0`);
  }
  const unknown = given.find(({ layer }) => layers[layer] === undefined);
  if (unknown) throw new ShapeError(`cache simulation: a request for layer ${unknown.layer} of ${layers.length}`);
  const requests = given.filter(({ layer }) => cached.includes(layer));
  // In a shared cache every expert needs a number of its own.
  const stride = shared ? layers.reduce((most, { experts }) => Math.max(most, experts), 0) : 0;
  const keys = ({ layer, experts }: ExpertRequest): number[] => experts.map((id) => layer * stride + id);
  const makePolicy = (own: readonly ExpertRequest[]): EvictionPolicy =>
    policy === "belady" ? belady(own.map(keys)) : policy === "lfu" ? lfu() : lru();
  const single = shared ? [expertCache({ capacity, policy: makePolicy(requests) })] : undefined;
  const caches = layers.map(
    (_, layer) =>
      single?.[0] ?? expertCache({ capacity, policy: makePolicy(requests.filter((one) => one.layer === layer)) }),
  );
  const tallies = layers.map((): Tally => ({ requests: 0, hits: 0, prefetches: 0, useful: 0 }));
  const predictors = layers.map(() => expertPredictor());
  const latest = layers.map((): number => 0);
  let ahead: { readonly layer: number; readonly ids: ReadonlySet<number> } | undefined;
  let before: { readonly place: number; readonly keys: readonly number[] } | undefined;
  for (const request of requests) {
    const { layer } = request;
    const cache = caches[layer];
    const tally = tallies[layer];
    if (!cache || !tally) continue;
    const place = cached.indexOf(layer);
    const ids = keys(request);
    const { hits } = cache.need(ids);
    tally.requests += ids.length;
    tally.hits += hits.length;
    if (policy !== "prefetch") continue;
    if (ahead?.layer === layer) tally.useful += hits.filter((id) => ahead?.ids.has(id)).length;
    if (before && before.place === place - 1) predictors[layer]?.observe(before.keys, ids);
    before = { place, keys: ids };
    latest[layer] = ids.length;
    const following = cached[place + 1] ?? layers.length;
    const next = caches[following];
    const expected = predictors[following]?.predict(ids, latest[following] ?? 0) ?? [];
    ahead = { layer: following, ids: new Set((next?.prefetch(expected, shared ? ids : []) ?? []).map(({ id }) => id)) };
    const nextTally = tallies[following];
    if (nextTally) nextTally.prefetches += ahead.ids.size;
  }
  const counts = (tally: Tally, bytes: number | null): CacheCounts => ({
    requests: tally.requests,
    hits: tally.hits,
    misses: tally.requests - tally.hits,
    prefetches: tally.prefetches,
    usefulPrefetches: tally.useful,
    hitRate: ratio(tally.hits, tally.requests),
    bytesRead: bytes,
  });
  const perLayer = tallies.map((tally, i) => {
    const bytes = layers[i]?.expertBytes;
    if (bytes === undefined && shared) return counts(tally, 0);
    return counts(tally, bytes === undefined ? null : (tally.requests - tally.hits + tally.prefetches) * bytes);
  });
  const sum = (key: keyof Tally): number => tallies.reduce((total, tally) => total + tally[key], 0);
  const bytes = perLayer.reduce<number | null>(
    (total, { bytesRead }) => (total === null || bytesRead === null ? null : total + bytesRead),
    0,
  );
  const all = { requests: sum("requests"), hits: sum("hits"), prefetches: sum("prefetches"), useful: sum("useful") };
  return { policy, capacity, shared, total: counts(all, bytes), layers: perLayer };
}

/** Experts that fit into so many bytes; all must have one size. */
function sharedCapacity(layers: readonly Pick<TraceLayer, "expertBytes">[], memory: number): number {
  if (!(Number.isSafeInteger(memory) && memory >= 0)) {
    throw new ShapeError(`cache simulation: memory is ${memory} bytes, expected a whole number from 0`);
  }
  const sizes = new Set(layers.flatMap(({ expertBytes }) => expertBytes ?? []));
  const [bytes] = sizes;
  if (sizes.size !== 1 || bytes === undefined || bytes === 0) {
    const found = [...sizes].join(", ") || "unknown";
    throw new ShapeError(
      `cache simulation: a memory needs experts of one known size, found ${found} bytes; give expertBytes or expertsPerLayer`,
    );
  }
  return Math.floor(memory / bytes);
}
