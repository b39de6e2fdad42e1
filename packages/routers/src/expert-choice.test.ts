import { dispose } from "@switchyard/core";
import type { Plan, Routed } from "@switchyard/core/moe";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { expertChoiceFamily } from "../test/families/first.ts";
import { flat, float64, readVectors, results, tensor, unmet } from "../test/vectors.ts";
import { expertChoice } from "./expert-choice.ts";

testRouter({
  plugin: ({ k = 2 }) => expertChoice({ capacityFactor: k }),
  // Of one expert; each is a probability.
  weights: (weights) => weights.every((weight) => weight > 0 && weight <= 1),
  skip: [
    {
      reason: "the number of places follows from all tokens of the batch, padding included",
      tests: ["a padded sequence equals the sequence alone"],
    },
  ],
});

describe("expertChoice meets its vectors", () => {
  const { cases, tolerance } = readVectors("expert-choice");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(expertChoiceFamily, one, tolerance)).toEqual([]);
  });
});

describe("expertChoice", () => {
  const plan = ({ plan: found }: Routed): Extract<Plan, { kind: "expert-choice" }> => {
    if (found.kind !== "expert-choice") throw new Error(`a plan of kind ${found.kind}`);
    return found;
  };
  const choose = async (
    logits: number[][],
    { capacityFactor = 1, mask }: { capacityFactor?: number; mask?: number[] } = {},
  ): Promise<{ tokens: number[]; weights: number[]; places: number }> => {
    const on = float64();
    const { tokens, weights } = await results(on, () => {
      const router = expertChoice({ capacityFactor }).init(routerContext(on, { experts: logits[0]?.length ?? 0 }));
      const input = routerInput(on, { hidden: tensor(on, logits), ...(mask ? { mask } : {}) });
      const found = plan(router.select?.(tensor(on, logits), input) as Routed);
      return { tokens: found.tokens, weights: found.weights };
    });
    return { tokens: flat(tokens), weights: flat(weights), places: flat(tokens).length / (logits[0]?.length ?? 1) };
  };
  const logits = [
    [5, 0],
    [4, 0],
    [3, 0],
    [2, 0],
  ];

  it("every expert has the same load, and takes its best tokens", async () => {
    const { tokens } = await choose(logits);
    // The second expert prefers the tokens that want the first one least.
    expect(tokens).toEqual([0, 1, 3, 2]);
  });
  it("places are rounded down, and never more than there are tokens", async () => {
    expect((await choose(logits.slice(0, 3))).places).toBe(1);
    expect((await choose(logits, { capacityFactor: 9 })).places).toBe(4);
    expect((await choose(logits.slice(0, 1))).places).toBe(0);
  });
  it("padding leaves places empty rather than taking them", async () => {
    const { tokens, weights } = await choose(logits, { mask: [0, 0, 0, 1] });
    expect(tokens).toEqual([3, -1, 3, -1]);
    expect(weights.map((w) => w > 0)).toEqual([true, false, true, false]);
  });
  it("ties go to the earlier token", async () => {
    expect(
      (
        await choose([
          [0, 0],
          [0, 0],
          [0, 0],
          [0, 0],
        ])
      ).tokens,
    ).toEqual([0, 1, 0, 1]);
  });
  it("refuses to decode with a cache, unless asked", () => {
    const on = float64();
    for (const decoding of [false, true]) {
      const router = expertChoice({ decoding }).init(routerContext(on));
      const route = (): unknown =>
        on.scope(() => {
          router.route(router.params, routerInput(on, { hidden: tensor(on, [[1, 2, 3, 4, 5, 6]]), past: 3 }));
          return undefined;
        });
      if (decoding) expect(route).not.toThrow();
      else expect(route).toThrow(/asked to route 1 new tokens after 3 cached ones.*decoding: true/);
      dispose(router.params);
    }
    expect(on.live()).toBe(0);
  });
  it("refuses a capacity factor that cannot be", () => {
    expect(() => expertChoice({ capacityFactor: Number.NaN })).toThrow("expertChoice: capacityFactor = NaN");
  });
});
