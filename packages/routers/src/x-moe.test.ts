import { autodiff, dispose, grad, isTensor, leaves, sum, type Tensor, watch } from "@switchyard/core";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { xMoEFamily } from "../test/families/field.ts";
import { flat, float64, lists, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { type XMoEOptions, xMoE } from "./x-moe.ts";

testRouter({ plugin: ({ k = 2 }) => xMoE({ k }), weights: "sum to at most 1", sizes: { width: 7 } });
testRouter({
  plugin: ({ k = 1 }) => xMoE({ k, gate: "sigmoid", temperature: 0.5 }),
  weights: (weights) => weights.every((weight) => weight > 0 && weight < 1),
  sizes: { width: 7 },
});
testRouter({
  plugin: ({ k = 1 }) => xMoE({ k, variant: "torchscale", dimension: 3 }),
  weights: "sum to at most 1",
});
testRouter({ plugin: ({ k = 2 }) => xMoE({ k, variant: "tutel", dimension: 4 }), weights: "sum to at most 1" });

describe("xMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("xmoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(xMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("xMoE", () => {
  const on = float64();
  const embeddings = async (options: XMoEOptions, experts: number): Promise<number[][]> => {
    const router = xMoE(options).init(routerContext(on, { experts }));
    const rows = (await lists(leaf(router.params, "embeddings"))) as number[][];
    for (const [name, x] of leaves(router.params)) if (name !== "embeddings") x.dispose();
    return rows;
  };
  const dot = (a: readonly number[], b: readonly number[]): number =>
    a.reduce((total, x, i) => total + x * (b[i] ?? 0), 0);

  it("embeddings start orthogonal with gain 0.32, in half as many dimensions as experts", async () => {
    const tall = await embeddings({}, 7);
    expect(tall.map((row) => row.length)).toEqual(new Array(7).fill(3));
    const columns = [0, 1, 2].map((j) => tall.map((row) => row[j] ?? 0));
    for (const [vectors, count] of [
      [columns, 3],
      [await embeddings({ dimension: 5 }, 2), 2],
    ] as const)
      for (let a = 0; a < count; a++)
        for (let b = 0; b < count; b++)
          expect(dot(vectors[a] ?? [], vectors[b] ?? [])).toBeCloseTo(a === b ? 0.32 ** 2 : 0, 12);
  });
  it("torchscale's embeddings have 16 dimensions and length 1.5", async () => {
    const rows = await embeddings({ variant: "torchscale" }, 5);
    expect(rows.map((row) => row.length)).toEqual(new Array(5).fill(16));
    for (const row of rows) expect(Math.hypot(...row)).toBeCloseTo(1.5, 12);
  });

  const logits = async (options: XMoEOptions, factor: number, logScale?: number): Promise<number[]> => {
    const router = xMoE({ dimension: 2, ...options }).init(routerContext(on, { experts: 2, width: 2 }));
    const found = await results(on, () => {
      const params = {
        projection: tensor(on, [
          [factor, 0],
          [0, factor],
        ]),
        embeddings: tensor(on, [
          [3, 0],
          [0, -5],
        ]),
        logScale: logScale === undefined ? leaf(router.params, "logScale") : tensor(on, logScale),
      };
      const routed = router.route(params, routerInput(on, { hidden: tensor(on, [[3, 4]]), experts: 2 }));
      return { logits: routed.logits as Tensor };
    });
    dispose(router.params);
    return flat(found.logits);
  };
  it("only directions count, but torchscale's tokens keep their length", async () => {
    for (const [variant, temperature] of [
      ["paper", 0.3],
      ["tutel", 0.5],
    ] as const)
      for (const factor of [1, 20]) {
        const [a, b] = await logits({ variant }, factor);
        expect(a).toBeCloseTo(0.6 / temperature, 10);
        expect(b).toBeCloseTo(-0.8 / temperature, 10);
      }
    expect(await logits({ variant: "torchscale" }, 2, 0)).toEqual([6, -8]);
  });
  it("Tutel's scale stops at 100, the paper's does not", async () => {
    expect((await logits({ variant: "tutel" }, 1, 7))[0]).toBeCloseTo(60, 8);
    expect((await logits({}, 1, 7))[0]).toBeCloseTo(0.6 * Math.exp(7), 8);
  });
  it("a frozen router gets no gradient, the tokens do", async () => {
    const reached = async (frozen: boolean): Promise<[boolean, boolean]> => {
      const router = xMoE({ frozen, k: 2 }).init(routerContext(on));
      const slopes = on.scope(() => {
        const watched = watch(autodiff(on), { params: router.params, hidden: tensor(on, [[1, -2, 3, 4, -5, 6]]) });
        if (!isTensor(watched.hidden)) throw new Error("hidden is one tensor");
        const routed = router.route(watched.params, routerInput(on, { hidden: watched.hidden, training: true }));
        return grad(sum(sparse(routed).weights), watched);
      });
      const nonzero = async (x: Tensor): Promise<boolean> => flat(await lists(x)).some((value) => value !== 0);
      const params = await Promise.all(leaves(slopes.params).map(([, x]) => nonzero(x)));
      dispose(router.params);
      return [params.some(Boolean), await nonzero(slopes.hidden)];
    };
    expect(await reached(false)).toEqual([true, true]);
    expect(await reached(true)).toEqual([false, true]);
  });
  it("refuses options that cannot be", () => {
    expect(() => xMoE({ temperature: 0 })).toThrow("xMoE: temperature = 0; expected a finite number above 0");
    expect(() => xMoE({ balanceTemperature: -1 })).toThrow("balanceTemperature = -1");
    expect(() => xMoE({ dimension: 1.5 })).toThrow("xMoE: dimension = 1.5; expected a whole number from 1");
    expect(() => xMoE({ balance: Number.NaN })).toThrow("balance = NaN");
    expect(() => xMoE({ gate: "relu" as "softmax" })).toThrow('gate = "relu"; expected "softmax" or "sigmoid"');
    expect(() => xMoE({ k: 6 }).init(routerContext(on))).toThrow("xMoE: k = 6 of 5 experts");
  });
});
