import { dispose, type Tensor } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { hashFamily } from "../test/families/classic.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type HashOptions, hash } from "./hash.ts";
import { balancedHash, frequentTokens, randomHash } from "./hash-parts.ts";

const skip = [
  {
    reason: "the table names experts by number, so that permuting parameters permutes nothing",
    tests: ["permuting the experts permutes the answer"],
  },
  {
    reason: "nothing is learned, so that no gradient is recorded",
    tests: ["gradients of weights and losses agree with central differences"],
  },
];
testRouter({ plugin: () => hash({ seed: 7 }), weights: "sum to 1", skip });
testRouter({ plugin: () => hash({ table: "balanced" }), weights: "sum to 1", skip });

describe("hash meets its vectors", () => {
  const { cases, tolerance } = readVectors("hash");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(hashFamily, one, tolerance)).toEqual([]);
  });
});

describe("hash", () => {
  const on = float64();
  const route = async (
    options: HashOptions,
    ids: readonly number[],
  ): Promise<{ experts: number[]; weights: number[] }> => {
    const router = hash(options).init(routerContext(on, { experts: 4 }));
    const found = await results(on, () => {
      const hidden = tensor(
        on,
        ids.map(() => [1, 2]),
      );
      const input = routerInput(on, { hidden, buffers: router.buffers });
      const plan = sparse(router.route({}, { ...input, tokenIds: on.tensor(Int32Array.from(ids), [ids.length]) }));
      return { experts: plan.experts, weights: plan.weights };
    });
    dispose(router.buffers);
    expect(on.live()).toBe(0);
    return { experts: flat(found.experts), weights: flat(found.weights) };
  };

  it("one id always has one expert; ids outside the vocabulary have none", async () => {
    const { experts, weights } = await route({ vocabulary: 5 }, [3, 1, 3, 5, -1, 4, 1]);
    const table = randomHash(5, 4, { seed: 0, layer: 0 });
    expect(experts).toEqual([table[3], table[1], table[3], -1, -1, table[4], table[1]]);
    expect(weights).toEqual([1, 1, 1, 0, 0, 1, 1]);
  });
  it("has an entry for every id of the model where no option says otherwise", () => {
    const size = (options: HashOptions): number | undefined => {
      const router = hash(options).init(routerContext(on, { vocabulary: 40 }));
      const { table } = router.buffers as { table: Tensor };
      dispose(router.buffers);
      return table.shape[0];
    };
    expect(size({})).toBe(40);
    expect(size({ vocabulary: 7 })).toBe(7);
    expect(() => size({ table: "balanced" })).toThrow("vocabulary = 40, but the context has counts of 13 token ids");
  });
  it("tables differ by seed and by layer, and fill the experts about evenly", () => {
    const table = randomHash(4000, 8, { seed: 1, layer: 0 });
    expect(randomHash(4000, 8, { seed: 1, layer: 0 })).toEqual(table);
    expect(randomHash(4000, 8, { seed: 2, layer: 0 })).not.toEqual(table);
    expect(randomHash(4000, 8, { seed: 1, layer: 1 })).not.toEqual(table);
    for (let e = 0; e < 8; e++) {
      expect(Math.abs(table.filter((x) => x === e).length - 500)).toBeLessThan(100);
    }
  });
  it("the balanced table evens out occurrences that a random one does not", () => {
    const counts = Float64Array.from({ length: 300 }, (_, id) => 1000 / (id + 1));
    const most = (table: Int32Array): number => {
      const load = [0, 0, 0, 0];
      table.forEach((e, id) => {
        load[e] = (load[e] ?? 0) + (counts[id] ?? 0);
      });
      return Math.max(...load) / (load.reduce((a, b) => a + b, 0) / 4);
    };
    expect(most(balancedHash(counts, 4))).toBeLessThan(1.01);
    expect(most(randomHash(300, 4, { seed: 0, layer: 0 }))).toBeGreaterThan(1.05);
  });
  it("an empty corpus and ties go by number", () => {
    expect([...balancedHash([], 3)]).toEqual([]);
    expect([...balancedHash([5, 5, 5, 5], 3)]).toEqual([0, 1, 2, 0]);
    expect([...frequentTokens([1, 1, 1, 1], 0.5)]).toEqual([1, 1, 0, 0]);
    expect([...frequentTokens([1, 1], 0)]).toEqual([0, 0]);
    expect(() => balancedHash([1, Number.NaN], 2)).toThrow("id 1 occurs NaN times");
  });
  it("refuses what it cannot do, and says what is missing", () => {
    const bare = ({ tokenCounts: _, ...context }: ReturnType<typeof routerContext>): typeof context => context;
    const context = bare(routerContext(on));
    expect(() => hash().init(context)).toThrow("pass vocabulary, such as 2048");
    expect(() => hash({ table: "balanced", vocabulary: 13 }).init(context)).toThrow('use table "random"');
    expect(() => hash({ table: "balanced", vocabulary: 5 }).init(routerContext(on))).toThrow("counts of 13 token ids");
    expect(() => hash({ vocabulary: 0 })).toThrow("vocabulary = 0");
    expect(() => hash({ seed: -1 })).toThrow("seed = -1");
    expect(() => hash(JSON.parse('{ "table": "learned" }'))).toThrow('expected "random" or "balanced"');
    on.scope(() => {
      const router = hash().init(routerContext(on));
      const { tokenIds: _, ...input } = routerInput(on, { hidden: tensor(on, [[1]]), buffers: router.buffers });
      expect(() => router.route({}, input)).toThrow("hand them over as input.tokenIds");
      const ids = (n: number) => ({ ...input, tokenIds: on.tensor(new Int32Array(n), [1, n]) });
      expect(() => router.route({}, ids(2))).toThrow("token ids are [1, 2], expected one for each of 1 tokens");
      expect(sparse(router.route({}, ids(1))).experts.shape).toEqual([1, 1]);
      return undefined;
    });
  });
});
