import { concat, type Tensor } from "@switchyard/core";
import { assignments, expertsPerToken, type Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { foundingFamilies } from "../test/families/founding.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, given, readVectors, results, sparse, tensor, unmet, type Values } from "../test/vectors.ts";
import { chooseReal, type NullExpertsOptions, nullCopies, nullExperts } from "./null-experts.ts";
import { topK } from "./top-k.ts";

// A token without a real expert has no weight at all.
const weights = (given: readonly number[]): boolean => {
  const total = given.reduce((sum, x) => sum + x, 0);
  return given.every((x) => x >= 0) && (total === 0 || Math.abs(total - 1) < 1e-12);
};
testRouter({ plugin: ({ k = 3 }) => nullExperts({ k }), weights });
testRouter({ plugin: ({ k = 3 }) => nullExperts({ k, form: "copies" }), weights });
testRouter({ plugin: ({ k = 2 }) => nullExperts({ k, rho: 1 }), weights: "sum to 1" });
// Fewer copies than slots: some real experts always run.
testRouter({
  plugin: ({ experts }) => nullExperts({ k: experts + nullCopies(experts, 0.8), rho: 0.8 }),
  weights: "sum to 1",
});

describe("nullExperts meets its vectors", () => {
  const { family, cases, tolerance } = readVectors("main-null-experts");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(given(foundingFamilies, family), one, tolerance)).toEqual([]);
  });
});

describe("nullExperts", () => {
  const on = float64();
  const draws = (tokens: number, columns: number, seed: number): number[][] => {
    let state = seed;
    const next = (): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.round((state / 2 ** 32) * 6 - 3) / 2; // coarse, so that there are ties
    };
    return Array.from({ length: tokens }, () => Array.from({ length: columns }, next));
  };
  const chosen = async (logits: Values, options: Parameters<typeof chooseReal>[1]): Promise<[number[], number[]]> => {
    const { ids, weights } = await results(on, () => {
      const plan = chooseReal(tensor(on, logits), options);
      return { ids: plan.experts, weights: plan.weights };
    });
    return [flat(ids), flat(weights)];
  };
  const select = (options: NullExpertsOptions, logits: Tensor, training = false): Routed =>
    selecting(on, nullExperts(options), (logits.shape[1] ?? 1) - (options.rho === 1 ? 0 : 1))(logits, { training });

  it.each([
    [4, 2, 4],
    [4, 6, 4],
    [5, 5, 1],
    [5, 6, 1],
    [3, 4, 9],
    [1, 1, 1],
    [1, 3, 2],
  ])("the threshold and the copies agree, ties included: %i experts, k = %i, %i copies", async (experts, k, copies) => {
    const logits = draws(23, experts + 1, experts * 100 + k);
    const [ids, weights] = await chosen(logits, { k, experts, copies });
    const [others, theirs] = await chosen(logits, { k, experts, copies, form: "copies" });
    const real = (list: number[]): number[][] =>
      Array.from({ length: 23 }, (_, t) => list.slice(t * k, (t + 1) * k).filter((e) => e < experts));
    expect(ids).toHaveLength(others.length);
    expect(real(ids)).toEqual(real(others));
    const positive = (list: number[]): number[] => list.filter((weight) => weight > 0);
    expect(positive(weights)).toEqual(positive(theirs).map((weight) => expect.closeTo(weight, 14)));
    logits.forEach((row, t) => {
      const beating = row.slice(0, experts).filter((logit) => logit >= (row[experts] ?? 0)).length;
      expect(real(ids)[t]).toHaveLength(Math.min(k, Math.max(beating, k - copies)));
    });
  });
  it("at rho = 1 it is plain top-k, bit for bit", async () => {
    const logits = draws(9, 5, 7);
    for (const training of [false, true]) {
      const found = await results(on, () => {
        const [mine, plain] = [
          select({ k: 2, rho: 1 }, tensor(on, logits), training),
          selecting(on, topK({ k: 2 }), 5)(tensor(on, logits), { training }),
        ].map(sparse);
        return { ids: mine?.experts, weights: mine?.weights, k: plain?.experts, w: plain?.weights } as Record<
          "ids" | "weights" | "k" | "w",
          Tensor
        >;
      });
      expect(found.ids).toEqual(found.k);
      expect(found.weights).toEqual(found.w);
    }
  });
  it("two real and two null experts for every token are top-2 exactly", async () => {
    const logits = draws(11, 6, 3).map((row) => row.map((x, e) => x + e / 100));
    const withNull = logits.map((row) => {
      const sorted = [...row].sort((a, b) => b - a);
      return [...row, ((sorted[1] ?? 0) + (sorted[2] ?? 0)) / 2];
    });
    const [ids, weights] = await chosen(withNull, { k: 4, experts: 6, copies: 6 });
    const plain = await results(on, () => {
      const { experts, weights } = sparse(selecting(on, topK({ k: 2 }), 6)(tensor(on, logits), {}));
      return { experts, weights };
    });
    expect(ids.filter((e) => e < 6)).toEqual(flat(plain.experts));
    flat(plain.weights).forEach((weight, i) => {
      expect(weights[Math.floor(i / 2) * 4 + (i % 2)]).toBeCloseTo(weight, 14);
    });
  });
  it("equal logits fill real slots first, and even loads have balance loss 1", async () => {
    const { ids, balance } = await results(on, () => {
      const routed = select({ k: 2 }, tensor(on, [[0, 0, 0]]), true);
      return { ids: sparse(routed).experts, balance: routed.losses.balance?.value as Tensor };
    });
    expect(flat(ids)).toEqual([0, 1]);
    expect(flat(balance)[0]).toBeCloseTo(1, 12);
    // Each of two tokens takes one real expert and one null: shares 1/4, 1/4, 1/2 of the slots.
    const even = await results(on, () => {
      const logits = tensor(on, [
        [1, -1, 0],
        [-1, 1, 0],
      ]);
      const routed = select({ k: 2 }, logits, true);
      return { balance: routed.losses.balance?.value as Tensor, nulls: routed.metrics?.nullRatio as Tensor };
    });
    expect(flat(even.nulls)).toEqual([0.5]);
    const total = Math.E + 1 / Math.E + 2;
    const [real, none] = [(Math.E + 1 / Math.E) / 2 / total, 1 / total];
    expect(flat(even.balance)[0]).toBeCloseTo(4 * (0.25 * real * 2 + 0.5 * none), 12);
  });
  it("losses are a mean over the layers and can be switched off", () => {
    on.scope(() => {
      const logits = tensor(on, draws(4, 4, 1));
      const of = (options: Partial<NullExpertsOptions>): Routed["losses"] => {
        const router = nullExperts({ k: 2, ...options }).init(routerContext(on, { experts: 3 }));
        const input = { ...routerInput(on, { hidden: logits, training: true }), layers: 4 };
        const routed = router.select?.(logits, input) as Routed;
        return routed.losses;
      };
      expect(of({}).balance?.weight).toBeCloseTo(0.005, 12);
      expect(of({}).zLoss?.weight).toBeCloseTo(0.00025, 12);
      expect(of({ balance: 0, zLoss: 0 })).toEqual({});
      return undefined;
    });
  });
  it("a load counted over the whole step replaces that of the batch", async () => {
    const { own, given: whole } = await results(on, () => {
      const logits = tensor(on, [[2, 1, 0]]);
      const select = selecting(on, nullExperts({ k: 1 }), 2);
      const globalLoad = tensor(on, [0, 0.5, 0.5]);
      return {
        own: select(logits, { training: true }).losses.balance?.value as Tensor,
        given: select(logits, { training: true, globalLoad }).losses.balance?.value as Tensor,
      };
    });
    const exps = [Math.exp(2), Math.E, 2];
    const total = exps.reduce((sum, x) => sum + x, 0);
    expect(flat(own)[0]).toBeCloseTo((4 * (exps[0] ?? 0)) / total, 12);
    expect(flat(whole)[0]).toBeCloseTo((4 * (0.5 * (exps[1] ?? 0) + 0.5)) / total, 12);
  });
  it("a higher null logit means fewer real experts", async () => {
    const { few, many } = await results(on, () => {
      const real = tensor(on, draws(50, 4, 9));
      const count = (none: number): Tensor => {
        const logits = concat(
          [
            real,
            tensor(
              on,
              Array.from({ length: 50 }, () => [none]),
            ),
          ],
          1,
        );
        const plan = sparse(select({ k: 3 }, logits));
        return expertsPerToken(assignments({ kind: "sparse", ...plan }, { tokens: 50, experts: 4 }));
      };
      return { few: count(1), many: count(-1) };
    });
    const mean = (values: Values): number => flat(values).reduce((sum, x) => sum + x, 0) / 50;
    expect(mean(few)).toBeLessThan(mean(many));
  });
  it("copies follow from rho, rounded", () => {
    expect([1, 0.5, 0.25, 0.67, 0.17].map((rho) => nullCopies(64, rho))).toEqual([0, 64, 192, 32, 312]);
  });
  it("refuses options that cannot be", () => {
    expect(() => nullExperts({ k: 2, rho: 0 })).toThrow("rho = 0; expected the share of real slots");
    expect(() => nullExperts({ k: 2, rho: 1.5 })).toThrow("rho = 1.5");
    expect(() => nullExperts({ k: 9 }).init(routerContext(on, { experts: 4 }))).toThrow(
      "k = 9 with 4 experts and 4 null copies (rho = 0.5); expected a whole number from 1 to 8",
    );
    expect(() => nullExperts({ k: 1, balance: -1 })).toThrow("balance = -1");
    const form = "both" as "copies";
    expect(() => nullExperts({ k: 1, form })).toThrow('form = "both"; expected "threshold" or "copies"');
  });
});
