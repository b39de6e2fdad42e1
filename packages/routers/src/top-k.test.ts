import { dispose, leaves, softmax, sum, type Tensor } from "@switchyard/core";
import { mixtralBalance, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { topKFamily } from "../test/families/first.ts";
import { flat, float64, lists, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { leaf } from "./parts.ts";
import { type TopKOptions, topK } from "./top-k.ts";

testRouter({ plugin: ({ k = 2 }) => topK({ k }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) => topK({ k, order: "softmax-topk", balance: 0.1, normalizeByK: true }),
  weights: "sum to at most 1",
});
testRouter({ plugin: ({ k = 3 }) => topK({ k, order: "topk-softmax", bias: true }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => topK({ k, order: "sigmoid", zLoss: 0 }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 4 }) => topK({ k, topP: 0.4 }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 4 }) => topK({ k, topP: 0.4, order: "softmax-topk" }), weights: "sum to at most 1" });

describe("topK meets its vectors", () => {
  const { cases, tolerance } = readVectors("topk");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(topKFamily, one, tolerance)).toEqual([]);
  });
});

describe("topK", () => {
  const logits = [
    [1, 3, 2, 3],
    [0, 0, 0, 0],
    [-9, -1, -2, -1000],
  ];
  /** Runs `select` on logits [3, 4] and reads what `pick` takes from the answer. */
  async function select<N extends string>(
    options: TopKOptions,
    pick: (routed: Routed) => Record<N, Tensor>,
    training = true,
  ): Promise<Record<N, number[]>> {
    const on = float64();
    const found = await results(on, () => {
      const router = topK(options).init(routerContext(on, { experts: 4 }));
      const input = routerInput(on, { hidden: tensor(on, logits), training });
      if (!router.select) throw new Error("topK has select");
      return pick(router.select(tensor(on, logits), input));
    });
    expect(on.live()).toBe(0);
    return Object.fromEntries(
      Object.entries<ReturnType<typeof JSON.parse>>(found).map(([name, x]) => [name, flat(x)]),
    ) as Record<N, number[]>;
  }
  const loss = (routed: Routed, name: string): Tensor => {
    const found = routed.losses[name];
    if (!found) throw new Error(`no loss "${name}", there are ${Object.keys(routed.losses).join(", ")}`);
    return found.value;
  };

  it("breaks ties by the lower expert", async () => {
    const { ids } = await select({ k: 2 }, (routed) => ({ ids: sparse(routed).experts }));
    expect(ids).toEqual([1, 3, 0, 1, 1, 2]);
  });
  it("topP keeps the expert that crosses the sum, and at most k", async () => {
    // Equal probabilities of 1/4: two reach 0.5 exactly, three are needed for 0.51.
    const kept = async (topP: number, k: number): Promise<number[]> =>
      (await select({ k, topP, order: "softmax-topk" }, (routed) => ({ ids: sparse(routed).experts }))).ids.slice(
        k,
        2 * k,
      );
    expect(await kept(0.5, 4)).toEqual([0, 1, -1, -1]);
    expect(await kept(0.51, 4)).toEqual([0, 1, 2, -1]);
    expect(await kept(1, 4)).toEqual([0, 1, 2, 3]);
    expect(await kept(1e-9, 4)).toEqual([0, -1, -1, -1]);
    expect(await kept(0.51, 2)).toEqual([0, 1]);
  });
  it("the balance loss of even routing is k, or 1 divided by k", async () => {
    const on = float64();
    for (const [normalizeByK, expected] of [
      [false, 2],
      [true, 1],
    ] as const) {
      const { balance } = await results(on, () => {
        // Four experts, each chosen by two of four tokens; probabilities even by symmetry.
        const even = tensor(on, [
          [1, 1, 0, 0],
          [0, 1, 1, 0],
          [0, 0, 1, 1],
          [1, 0, 0, 1],
        ]);
        const router = topK({ k: 2, normalizeByK }).init(routerContext(on, { experts: 4 }));
        const input = routerInput(on, { hidden: even, training: true });
        const routed = router.select?.(even, input);
        if (!routed) throw new Error("topK has select");
        return { balance: loss(routed, "balance") };
      });
      expect(flat(balance)[0]).toBeCloseTo(expected, 12);
    }
  });
  it("of one layer the balance loss is Hugging Face's", async () => {
    const on = float64();
    const hf = on.scope(() => mixtralBalance([tensor(on, logits)], { k: 2 }));
    const { balance } = await select({ k: 2 }, (routed) => ({ balance: loss(routed, "balance") }));
    expect(balance[0]).toBeCloseTo(flat(await lists(hf))[0] ?? Number.NaN, 12);
  });
  it("uses the load of the whole step where the trainer knows it", async () => {
    const on = float64();
    const value = async (load?: number[]): Promise<number> => {
      const { balance } = await results(on, () => {
        const router = topK({ k: 2 }).init(routerContext(on, { experts: 4 }));
        const input = routerInput(on, { hidden: tensor(on, logits), training: true });
        const routed = router.select?.(tensor(on, logits), {
          ...input,
          ...(load ? { globalLoad: tensor(on, load) } : {}),
        });
        if (!routed) throw new Error("topK has select");
        return { balance: loss(routed, "balance") };
      });
      return flat(balance)[0] ?? Number.NaN;
    };
    expect(await value([0.5, 0.5, 0.5, 0.5])).toBeCloseTo(2, 12);
    expect(await value()).not.toBeCloseTo(2, 3);
  });
  it("has losses in training only, and none whose weight is 0", async () => {
    const names = async (options: TopKOptions, training: boolean): Promise<string[]> => {
      let found: string[] = [];
      await select(
        options,
        (routed) => {
          found = Object.keys(routed.losses);
          return { total: sum(routed.logits as Tensor) };
        },
        training,
      );
      return found;
    };
    expect(await names({ k: 2 }, true)).toEqual(["balance", "zLoss"]);
    expect(await names({ k: 2, balance: 0, zLoss: 0 }, true)).toEqual([]);
    expect(await names({ k: 2 }, false)).toEqual([]);
  });
  it("the bias enters the choice and the weights, as in gpt-oss", async () => {
    const on = float64();
    const router = topK({ k: 1, bias: true, order: "topk-softmax" }).init(routerContext(on, { experts: 3, width: 2 }));
    expect(leaves(router.params).map(([path, x]) => `${path} ${x.shape}`)).toEqual(["weight 3,2", "bias 3"]);
    const { ids, all } = await results(on, () => {
      const params = {
        weight: tensor(on, [
          [0, 0],
          [1, 0],
          [0, 1],
        ]),
        bias: tensor(on, [2.5, 0, 0]),
      };
      const routed = router.route(
        params,
        routerInput(on, {
          hidden: tensor(on, [
            [2, 0],
            [3, 0],
          ]),
        }),
      );
      return { ids: sparse(routed).experts, all: softmax(routed.logits as Tensor) };
    });
    expect(flat(ids)).toEqual([0, 1]);
    expect(flat(all)[0]).toBeCloseTo(Math.exp(2.5) / (Math.exp(2.5) + Math.exp(2) + 1), 12);
    dispose(router.params);
  });
  it("starts at a standard deviation of 0.02", async () => {
    const on = float64();
    const router = topK({ k: 1 }).init(routerContext(on, { experts: 40, width: 100 }));
    const values = [...(await leaf(router.params, "weight").data())];
    const deviation = Math.sqrt(values.reduce((total, value) => total + value * value, 0) / values.length);
    expect(deviation).toBeGreaterThan(0.019);
    expect(deviation).toBeLessThan(0.021);
    dispose(router.params);
  });
  it("refuses options that cannot be", () => {
    const on = float64();
    expect(() => topK({ k: 3 }).init(routerContext(on, { experts: 2 }))).toThrow(
      "topK: k = 3 of 2 experts; expected a whole number from 1 to 2",
    );
    expect(() => topK({ k: 1.5 }).init(routerContext(on))).toThrow(/k = 1.5/);
    expect(() => topK({ k: 0 }).init(routerContext(on))).toThrow(/k = 0/);
    expect(() => topK({ k: 2, topP: 0 })).toThrow(/topP = 0/);
    expect(() => topK({ k: 2, topP: 1.1 })).toThrow(/topP = 1.1/);
    expect(() => topK({ k: 2, topP: 0.5, order: "sigmoid" })).toThrow(/order "sigmoid" has none/);
    expect(() => topK({ k: 2, balance: -1 })).toThrow("topK: balance = -1; expected a finite number from 0");
    expect(on.live()).toBe(0);
  });
  it("names the tensor that is missing", () => {
    const on = float64();
    const router = topK({ k: 2 }).init(routerContext(on));
    on.scope(() => {
      const input = routerInput(on, { hidden: tensor(on, [[1, 2, 3, 4, 5, 6]]) });
      expect(() => router.route({ gate: input.hidden }, input)).toThrow(/no tensor "weight", found gate/);
      return undefined;
    });
    dispose(router.params);
  });
});
