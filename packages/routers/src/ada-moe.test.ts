import { dispose, type Tensor } from "@switchyard/core";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { adaMoEFamily } from "../test/families/founding.ts";
import { selecting } from "../test/families/parts.ts";
import { flat, float64, lists, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { adaMoE } from "./ada-moe.ts";
import { leaf } from "./parts.ts";

// A token without a real expert has no weight at all.
const weights = (given: readonly number[]): boolean => {
  const total = given.reduce((sum, x) => sum + x, 0);
  return given.every((x) => x >= 0) && (total === 0 || Math.abs(total - 1) < 1e-12);
};
testRouter({ plugin: ({ k = 4 }) => adaMoE({ k, nullInit: "normal" }), weights });
testRouter({
  plugin: ({ k = 4 }) => adaMoE({ k, zLoss: 0.1 }),
  weights,
  skip: [
    {
      reason: "null experts start as copies of the real ones: their ties make the choice jump under any small change",
      tests: ["gradients of weights and losses agree with central differences"],
    },
  ],
});

describe("adaMoE meets its vectors", () => {
  const { cases, tolerance } = readVectors("adamoe");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(adaMoEFamily, one, tolerance)).toEqual([]);
  });
});

describe("adaMoE", () => {
  const on = float64();

  it("null experts start as copies of the real ones in turn, twice as many", async () => {
    const router = adaMoE({ k: 2 }).init(routerContext(on, { experts: 3, width: 2 }));
    const [weight, none] = [
      flat(await lists(leaf(router.params, "weight"))),
      flat(await lists(leaf(router.params, "null"))),
    ];
    expect(none).toEqual([...weight, ...weight]);
    dispose(router.buffers);
  });
  it("ties go to the real expert, and a token without one gets nothing", async () => {
    const { ids, weights } = await results(on, () => {
      const logits = tensor(on, [
        [1, 0, 1, 0],
        [-1, -2, 0, 1],
      ]);
      const { experts, weights } = sparse(selecting(on, adaMoE({ k: 2, nulls: 2 }), 2)(logits, {}));
      return { ids: experts, weights };
    });
    expect(flat(ids)).toEqual([0, 2, 3, 2]);
    expect(flat(weights)).toEqual([1, 0, 0, 0]);
  });
  it("the balance loss does not care which null expert is chosen, unless asked", async () => {
    const loss = async (chosen: number, balanceEachNull: boolean): Promise<number> => {
      const row = [0, 0, 0, 0].map((_, e) => (e === chosen ? 1 : 0));
      const { value } = await results(on, () => {
        const plugin = adaMoE({ k: 1, nulls: 2, balanceEachNull });
        const other = [1, 0, 0, 0];
        const routed = selecting(on, plugin, 2)(tensor(on, [row, other, [0, 0, 1, 0]]), { training: true });
        return { value: routed.losses.balance?.value as Tensor };
      });
      return flat(value)[0] ?? Number.NaN;
    };
    expect(await loss(2, false)).toBeCloseTo(await loss(3, false), 12);
    expect(Math.abs((await loss(2, true)) - (await loss(3, true)))).toBeGreaterThan(0.01);
  });
  it("refuses options that cannot be", () => {
    expect(() => adaMoE({ k: 2, nulls: 0 })).toThrow("nulls = 0; expected a whole number from 1");
    expect(() => adaMoE({ k: 7 }).init(routerContext(on, { experts: 2 }))).toThrow("adaMoE: k = 7 of 6 experts");
  });
});
