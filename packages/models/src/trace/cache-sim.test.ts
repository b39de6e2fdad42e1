// Cache predictions from traces: requests read off by hand, counts against a run written out plainly, every policy and size.
import { ShapeError } from "@switchyard/core";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { cachePolicies, type ExpertRequest, expertRequests, simulateCache } from "./cache-sim.ts";
import type { TraceChunk, TraceHeader } from "./format.ts";
import { chunkOf, headerOf } from "./trace.test-util.ts";

const layers = [
  { experts: 4, expertBytes: 100 },
  { experts: 4, expertBytes: 100 },
];
const requests = fc
  .array(fc.tuple(fc.uniqueArray(fc.nat(3), { minLength: 1 }), fc.uniqueArray(fc.nat(3), { minLength: 1 })), {
    maxLength: 12,
  })
  .map((passes) =>
    passes.flatMap((own): ExpertRequest[] =>
      own.map((experts, layer) => ({ layer, experts: experts.sort((a, b) => a - b) })),
    ),
  );

describe("expertRequests", () => {
  it("unites the tokens of a pass, also over chunks, and leaves out null experts and empty slots", async () => {
    const header: TraceHeader = headerOf({
      layers: [
        { index: 0, experts: 3, nulls: 2, slots: 2, plan: "sparse" },
        { index: 1, experts: 2, slots: 1, plan: "dense" },
      ],
    });
    const chunk = (first: number, pass: number[], experts: number[]): TraceChunk => ({
      ...chunkOf(header, pass.length),
      first,
      pass: Uint32Array.from(pass),
      layers: [{ experts: Int32Array.from(experts) }, { experts: new Int32Array(pass.length).fill(-1) }],
    });
    const chunks = [chunk(0, [0, 0], [2, -1, 0, 4]), chunk(2, [0, 1, 3], [1, 2, -1, 3, 0, 0])];
    expect(await expertRequests(header, chunks)).toEqual([
      { layer: 0, experts: [0, 1, 2] },
      { layer: 1, experts: [0, 1] },
      { layer: 1, experts: [0, 1] },
      { layer: 0, experts: [0] },
      { layer: 1, experts: [0, 1] },
    ]);
  });
});

describe("simulateCache", () => {
  it("counts what a plain LRU list per layer has", () => {
    fc.assert(
      fc.property(requests, fc.constantFrom(0, 4), (all, capacity) => {
        const { total, layers: each } = simulateCache(layers, all, {
          policy: "lru",
          size: { expertsPerLayer: capacity },
        });
        let [asked, hits] = [0, 0];
        for (const layer of [0, 1]) {
          const held = new Set<number>();
          let own = 0;
          for (const request of all.filter((one) => one.layer === layer)) {
            for (const id of request.experts) {
              asked++;
              if (held.has(id)) own++;
              if (capacity > 0) held.add(id);
            }
          }
          expect(each[layer]?.hits).toBe(own);
          hits += own;
        }
        expect([total.requests, total.hits, total.misses]).toEqual([asked, hits, asked - hits]);
        expect(total.bytesRead).toBe((asked - hits) * 100);
      }),
      { seed: 4 },
    );
  });

  it("keeps to the rules for every policy and size", () => {
    fc.assert(
      fc.property(requests, fc.nat(9), fc.boolean(), (all, capacity, shared) => {
        const size = shared ? { memory: capacity * 100 + 99 } : { expertsPerLayer: capacity };
        const results = cachePolicies.map((policy) => simulateCache(layers, all, { policy, size }));
        for (const { capacity: found, shared: one, total, layers: each } of results) {
          expect([found, one]).toEqual([capacity, shared]);
          expect(total.requests).toBe(all.reduce((sum, { experts }) => sum + experts.length, 0));
          expect(total.hits + total.misses).toBe(total.requests);
          expect(total.usefulPrefetches).toBeLessThanOrEqual(total.prefetches);
          expect(total.bytesRead).toBe((total.misses + total.prefetches) * 100);
          for (const key of ["requests", "hits", "misses", "prefetches", "usefulPrefetches"] as const) {
            expect(each.reduce((sum, layer) => sum + layer[key], 0)).toBe(total[key]);
          }
        }
        const [leastRecent, leastFrequent, best, ahead] = results.map(({ total }) => total);
        expect(best?.misses).toBeLessThanOrEqual(leastRecent?.misses ?? -1);
        expect(best?.misses).toBeLessThanOrEqual(leastFrequent?.misses ?? -1);
        // Whatever is loaded ahead is read, so no policy reads less than the best one.
        expect(best?.bytesRead).toBeLessThanOrEqual(ahead?.bytesRead ?? -1);
      }),
      { seed: 5 },
    );
  });

  it("loads ahead what followed before", () => {
    // Layer 1 follows layer 0: 0 -> 2, 1 -> 3. One place per layer: LRU misses all, prefetching finds the pairs seen once.
    const all = [0, 1, 0, 1, 0, 1].flatMap((id) => [
      { layer: 0, experts: [id] },
      { layer: 1, experts: [id + 2] },
    ]);
    const size = { expertsPerLayer: 1 };
    expect(simulateCache(layers, all, { policy: "lru", size }).total.hits).toBe(0);
    const { layers: each } = simulateCache(layers, all, { policy: "prefetch", size });
    expect(each[0]?.hits).toBe(0);
    expect(each[1]).toEqual({
      requests: 6,
      hits: 4,
      misses: 2,
      prefetches: 4,
      usefulPrefetches: 4,
      hitRate: 4 / 6,
      bytesRead: 600,
    });
  });

  it("leaves layers without bytes alone where others have them", () => {
    const some = [{ experts: 4, expertBytes: 100 }, { experts: 9 }, { experts: 4, expertBytes: 100 }];
    const all = Array.from({ length: 12 }, (_, i) => ({ layer: i % 3, experts: [i % 4, (i + 2) % 4].toSorted() }));
    const without = all.filter(({ layer }) => layer !== 1).map((one) => ({ ...one, layer: one.layer / 2 }));
    const alone = some.filter(({ expertBytes }) => expertBytes !== undefined);
    for (const policy of cachePolicies) {
      for (const memory of [100, 300, 500]) {
        const found = simulateCache(some, all, { policy, size: { memory } });
        const expected = simulateCache(alone, without, { policy, size: { memory } });
        expect(found.total).toEqual(expected.total);
        expect(found.layers.filter((_, i) => i !== 1)).toEqual(expected.layers);
        expect(found.layers[1]).toMatchObject({ requests: 0, hits: 0, bytesRead: 0 });
      }
    }
  });

  it("refuses sizes that make no sense and knows when bytes are unknown", () => {
    const run = (
      size: Parameters<typeof simulateCache>[2]["size"],
      over: Parameters<typeof simulateCache>[0] = layers,
    ) => simulateCache(over, [{ layer: 0, experts: [1] }], { policy: "lru", size });
    expect(() => run({ expertsPerLayer: -1 })).toThrow(/expertsPerLayer is -1/);
    expect(() => run({ memory: 0.5 })).toThrow(/memory is 0.5 bytes/);
    expect(() => run({ memory: 5 }, [{ experts: 4 }])).toThrow(/found unknown bytes; give expertBytes/);
    expect(() => run({ memory: 5 }, [...layers, { experts: 4, expertBytes: 7 }])).toThrow(ShapeError);
    expect(() => run({ expertsPerLayer: 1 }, [])).toThrow(/layer 0 of 0/);
    expect(run({ expertsPerLayer: 1 }, [{ experts: 4 }]).total).toMatchObject({ misses: 1, bytesRead: null });
    expect(simulateCache(layers, [], { policy: "belady", size: { expertsPerLayer: 1 } }).total.hitRate).toBe(1);
  });
});
