import { softmax, type Tensor } from "@switchyard/core";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { moecFamily } from "../test/families/ensemble.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, readVectors, results, slopes, sparse, tensor, unmet } from "../test/vectors.ts";
import { clusterSpread, clusterValue, type MoecOptions, moec } from "./moec.ts";

// Six experts in two clusters; other sizes of the suite have one expert, or three in three clusters of one.
const clusters = (experts: number): number => (experts === 6 ? 2 : experts);
const sizes = { experts: 6, width: 4 };
testRouter({
  plugin: ({ experts, k = 2 }) => moec({ k, clusters: clusters(experts), zLoss: 0.001 }),
  weights: "sum to at most 1",
  sizes,
});
testRouter({
  plugin: ({ experts, k = 1 }) =>
    moec({ k, clusters: clusters(experts), clusterLoss: "difference", mu: 1, whole: experts === 6 }),
  weights: "sum to at most 1",
  sizes,
});

describe("moec meets its vectors", () => {
  const { cases, tolerance } = readVectors("moec");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(moecFamily, one, tolerance)).toEqual([]);
  });
});

describe("moec", () => {
  const on = float64();
  /** Which experts are open in each of some layers. */
  const open = async (options: MoecOptions, experts: number, training = true): Promise<boolean[][]> =>
    Promise.all(
      Array.from({ length: 40 }, async (_, layer) => {
        const { p } = await results(on, () => {
          const logits = tensor(on, [new Array<number>(experts).fill(0), new Array<number>(experts).fill(1)]);
          return { p: selecting(on, moec(options), experts)(logits, { training, layer }).probabilities as Tensor };
        });
        const rows = flat(p).map((value) => value > 0);
        expect(rows.slice(experts)).toEqual(rows.slice(0, experts)); // the same for every token
        return rows.slice(0, experts);
      }),
    );
  const count = (row: readonly boolean[], from = 0, to = row.length): number =>
    row.slice(from, to).filter(Boolean).length;

  it("dropout closes its share of every cluster, each expert in turn", async () => {
    const layers = await open({ clusters: 2, dropout: 0.5 }, 8);
    for (const row of layers) expect([count(row, 0, 4), count(row, 4, 8)]).toEqual([2, 2]);
    for (let e = 0; e < 8; e++) {
      const times = layers.filter((row) => row[e]).length;
      expect(times).toBeGreaterThan(8);
      expect(times).toBeLessThan(32);
    }
  });
  it("whatever the share, one expert of a cluster stays, or one cluster", async () => {
    for (const row of await open({ clusters: 2, dropout: 1 }, 6))
      expect([count(row, 0, 3), count(row, 3)]).toEqual([1, 1]);
    for (const row of await open({ clusters: 3, dropout: 1, whole: true }, 6)) expect(count(row)).toBe(2);
    for (const row of await open({ clusters: 6, dropout: 1 }, 6)) expect(count(row)).toBe(6);
  });
  it("whole closes whole clusters", async () => {
    const layers = await open({ clusters: 4, dropout: 0.5, whole: true }, 8);
    for (const row of layers) {
      expect(count(row)).toBe(4);
      for (let m = 0; m < 4; m++) expect(row[2 * m]).toBe(row[2 * m + 1]);
    }
    expect(new Set(layers.map(String)).size).toBeGreaterThan(3);
  });
  it("nothing is closed in evaluation, or with dropout 0", async () => {
    for (const row of await open({ clusters: 2 }, 6, false)) expect(count(row)).toBe(6);
    for (const row of await open({ clusters: 2, dropout: 0 }, 6)) expect(count(row)).toBe(6);
  });
  it("a token whose expert is closed takes the best open sibling", async () => {
    const logits = [[5, 4, 0, -1]];
    for (let layer = 0; layer < 8; layer++) {
      const { ids } = await results(on, () => {
        const routed = selecting(on, moec({ clusters: 2 }), 4)(tensor(on, logits), { training: true, layer });
        return { ids: sparse(routed).experts };
      });
      expect([0, 1]).toContain(flat(ids)[0]);
    }
  });
  it("the losses fall as clusters become alike inside and unlike between them, and have gradients", async () => {
    const loss = async (p: readonly number[][], form: "ratio" | "difference"): Promise<number> => {
      const { value } = await results(on, () => ({
        value: clusterValue(clusterSpread(tensor(on, p), { clusters: 2 }), form),
      }));
      return flat(value)[0] ?? Number.NaN;
    };
    const [mixed, clustered] = [[[0.4, 0.1, 0.4, 0.1]], [[0.4, 0.4, 0.1, 0.1]]];
    for (const form of ["ratio", "difference"] as const)
      expect(await loss(clustered, form)).toBeLessThan(await loss(mixed, form));
    expect(await loss(clustered, "ratio")).toBe(0);
    expect(await loss(clustered, "difference")).toBeCloseTo(-0.0225, 12);
    const slope = flat(
      await slopes(on, [[1, 0, 1, 0.5]], (x) => clusterValue(clusterSpread(softmax(x), { clusters: 2 }), "difference")),
    );
    expect(slope.every((value) => Math.abs(value) > 1e-4)).toBe(true);
  });
  it("padding enters no cluster loss, and no tokens give 0", async () => {
    const found = await results(on, () => {
      const [p, q] = [
        [0.5, 0.1, 0.3, 0.1],
        [0.1, 0.2, 0.3, 0.4],
      ] as const;
      const alone = clusterSpread(tensor(on, [p]), { clusters: 2 });
      const padded = clusterSpread(tensor(on, [p, q]), { clusters: 2, mask: tensor(on, [1, 0]) });
      const none = clusterSpread(on.tensor(new Float64Array(0), [0, 4]), { clusters: 2 });
      return { a: alone.intra, b: alone.inter, c: padded.intra, d: padded.inter, e: none.intra, f: none.inter };
    });
    expect([found.c, found.d]).toEqual([found.a, found.b]);
    expect([found.e, found.f]).toEqual([0, 0]);
  });
  it("one cluster has no cluster loss", () => {
    on.scope(() => {
      const logits = tensor(on, [[1, 2, 3, 4]]);
      const { losses } = selecting(on, moec({ clusters: 1 }), 4)(logits, { training: true });
      expect(Object.keys(losses)).toEqual(["balance"]);
      return undefined;
    });
  });
  it("refuses options that cannot be", () => {
    const make = (options: MoecOptions, experts: number) => () => moec(options).init(routerContext(on, { experts }));
    expect(make({}, 5)).toThrow("5 experts do not split into 2 clusters; choose a number");
    expect(make({ k: 4 }, 6)).toThrow("k = 4, but dropout = 0.5 leaves 2 of 6 experts open");
    expect(make({ k: 7 }, 6)).toThrow("k = 7 of 6 experts");
    expect(make({ clusters: 0 }, 6)).toThrow("clusters = 0; expected a whole number from 1");
    expect(make({ dropout: 1.5 }, 6)).toThrow("dropout = 1.5; expected a share");
    expect(make({ clusterLoss: "sum" as "ratio" }, 6)).toThrow('clusterLoss = "sum"');
    expect(() => on.scope(() => clusterSpread(tensor(on, [[1, 2, 3]]), { clusters: 2 }))).toThrow(
      "3 experts do not split",
    );
  });
});
