import { dispose, engine } from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { withCapacity } from "@switchyard/core/wrappers";
import { routerContext, routerInput, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { tempered } from "./tempered.ts";

testRouter({ plugin: ({ k = 2 }) => tempered({ k }), weights: "sum to 1" });
testRouter({ plugin: ({ k = 2 }) => withCapacity(tempered({ k, zLoss: 0 }), { factor: 0.5 }), weights: "sum to 1" });

describe("tempered", () => {
  it("a hot token spreads its weight over its experts, a cold one does not", async () => {
    const on = engine(cpu({ precision: 64 }));
    const router = tempered({ k: 2 }).init(routerContext(on, { experts: 2, width: 2 }));
    const params = {
      weight: on.tensor(Float64Array.of(1, 0, -1, 0), [2, 2]),
      temperature: on.tensor(Float64Array.of(0, 1), [1, 2]),
    };
    const hidden = on.tensor(Float64Array.of(1, 20, 1, -20), [2, 2]);
    const { plan } = router.route(params, routerInput(on, { hidden, experts: 2 }));
    if (plan.kind !== "sparse") throw new Error("a sparse plan");
    const [hot = 0, , cold = 0] = await plan.weights.data();
    expect(hot).toBeCloseTo(1 / (1 + Math.exp(-2 / 20.1)), 6);
    expect(cold).toBeCloseTo(1, 6);
    dispose([router.params, params]);
  });
  it("refuses options that it has not, and values out of range", () => {
    expect(() => tempered({ floor: 0 })).toThrow("floor = 0; expected a number above 0");
    expect(() => tempered({ zLoss: -1 })).toThrow("zLoss = -1");
    expect(() => tempered({ heat: 1 } as object)).toThrow('there is no option "heat"; its options are k, floor, zLoss');
    expect(() => tempered({ k: 9 }).init(routerContext(engine(cpu())))).toThrow("k = 9 of 5 experts");
  });
});
