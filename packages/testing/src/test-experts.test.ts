// The suite of experts on the feed-forward experts of core, and on experts with one thing wrong each.
import {
  add,
  affine,
  concat,
  div,
  engine,
  mapTree,
  mean,
  mul,
  random,
  slice,
  square,
  stopGradient,
  sum,
  type Tensor,
} from "@switchyard/core";
import { cpu } from "@switchyard/core/cpu";
import { type Experts, ffn, glu } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import type { HostArray } from "./arrays.ts";
import { type ExpertsOptions, type ExpertsSuite, expertsCases } from "./experts-cases.ts";
import { testExperts } from "./test-experts.ts";

const hidden = 5;
const shift = { scale: 1, shift: 0.001 };
/** y = W_e x + b_e in plain loops. */
const product = (w: HostArray, e: number, x: readonly number[], bias?: HostArray): number[] => {
  const [, out = 0, inner = 0] = w.shape;
  return Array.from({ length: out }, (_, o) =>
    x.reduce((sum, v, i) => sum + v * (w.data[(e * out + o) * inner + i] ?? 0), bias?.data[e * out + o] ?? 0),
  );
};
const of = (params: ReadonlyMap<string, HostArray>, name: string): HostArray => {
  const x = params.get(name);
  if (!x) throw new Error(`no parameter ${name}`);
  return x;
};
const gated: ExpertsSuite["row"] = (params, e, x) => {
  const both = product(of(params, "gateUp"), e, x, params.get("gateUpBias"));
  const inner = both.slice(0, hidden).map((g, h) => (g / (1 + Math.exp(-g))) * (both[hidden + h] ?? 0));
  return product(of(params, "down"), e, inner, params.get("downBias"));
};
const plain: ExpertsSuite["row"] = (params, e, x) => {
  const inner = product(of(params, "up"), e, x, params.get("upBias")).map((v) => Math.max(v, 0) ** 2);
  return product(of(params, "down"), e, inner, params.get("downBias"));
};

testExperts({ name: "glu", make: (options) => glu({ ...options, hidden }), row: gated });
testExperts({ name: "glu with bias", make: (options) => glu({ ...options, hidden, bias: true }), row: gated });
testExperts({ name: "glu with gelu", make: (options) => glu({ ...options, hidden, activation: "gelu" }) });
testExperts({
  name: "ffn, squared, with bias",
  make: (options) => ffn({ ...options, hidden, squared: true, bias: true }),
  row: plain,
});

describe("the suite of experts can fail", () => {
  const failures = async (make: ExpertsSuite["make"], more: Partial<ExpertsSuite> = {}): Promise<string> => {
    const failed: string[] = [];
    for (const one of expertsCases({ name: "mutant", make, row: gated, ...more })) {
      if (one.reason !== undefined) continue;
      await one.run().catch((error: Error) => failed.push(`${one.name}: ${error.message}`));
    }
    return failed.join("\n");
  };
  const changed = (change: (experts: Experts, options: ExpertsOptions) => Partial<Experts>): ExpertsSuite["make"] => {
    return (options) => {
      const experts = glu({ ...options, hidden });
      return { ...experts, ...change(experts, options) };
    };
  };
  type Apply = Experts["apply"];
  const applied = (change: (apply: Apply, experts: Experts) => Apply): ExpertsSuite["make"] =>
    changed((experts) => ({ apply: change(experts.apply, experts) }));

  it("but not on right experts", async () => {
    expect(await failures(changed(() => ({})))).toBe("");
  });
  it("experts that use their own parameters", async () => {
    const found = await failures(
      applied(
        (apply, { params }) =>
          (_, ...rest) =>
            apply(params, ...rest),
      ),
    );
    expect(found).toMatch(/handed to apply are the ones that count.*experts made with other parameters: output/);
  });
  it("parameters of another expert", async () => {
    const next = (x: Tensor): Tensor => {
      const [count = 0, ...rest] = x.shape;
      const part = (from: number, n: number): Tensor => slice(x, [from, ...rest.map(() => 0)], [n, ...rest]);
      return count < 2 ? x : concat([part(1, count - 1), part(0, 1)], 0);
    };
    const found = await failures(
      applied(
        (apply) =>
          (params, ...rest) =>
            apply(mapTree(params, next), ...rest),
      ),
    );
    expect(found).toMatch(/each row gives what the plain loop gives: output/);
    expect(found).toMatch(/an expert is its own slice of the parameters: expert 0 alone/);
  });
  it("rows that see each other", async () => {
    const found = await failures(
      applied(
        (apply) =>
          (params, rows, ...rest) =>
            apply(params, add(rows, mean(rows)), ...rest),
      ),
    );
    expect(found).toMatch(/give what each gives alone: an expert without rows: output: entry/);
  });
  it("something beyond the last block", async () => {
    const found = await failures(
      applied((apply) => (...given) => ({ output: affine(apply(...given).output, shift) })),
    );
    expect(found).toMatch(/an entry beyond the last block is 0.001, expected 0/);
    expect(found).toMatch(/rows of which none belongs to an expert: the output is not zero/);
  });
  it("losses of rows that nobody has, or that are not numbers", async () => {
    const losing = (loss: (rows: Tensor) => Tensor): ExpertsSuite["make"] =>
      applied((apply) => (params, rows, ...rest) => ({
        ...apply(params, rows, ...rest),
        losses: { size: { value: loss(rows), weight: 0.1 } },
      }));
    expect(await failures(losing((rows) => sum(square(rows))))).toMatch(
      /other rows beyond the last block: loss size: entry \[\]/,
    );
    expect(await failures(losing((rows) => div(sum(mul(rows, 0)), rows.size)))).toMatch(
      /no rows: loss size is not finite/,
    );
    expect(await failures(losing((rows) => mul(rows, 0)))).toMatch(/loss size has the shape \[6, 3\]/);
  });
  it("a gradient that is cut", async () => {
    const found = await failures(
      applied(
        (apply) =>
          (params, rows, ...rest) =>
            apply(params, stopGradient(rows), ...rest),
      ),
    );
    expect(found).toMatch(/gradients of parameters and rows.*input 0, entry .*: autodiff gives 0, central/);
  });
  it("handles that are left", async () => {
    const kept: ExpertsSuite["make"] = (options) => {
      if ("engine" in options) options.engine.tensor(new Float32Array(1), [1]);
      return glu({ ...options, hidden });
    };
    expect(await failures(kept)).toMatch(/handles were left alive/);
  });
  it("mixtures of something else", async () => {
    const twice = changed(({ mixed }) => ({ mixed: (...given) => mul(mixed?.(...given) as Tensor, 2) }));
    const found = await failures(twice);
    expect(found).toMatch(/mixed with one-hot coefficients is that expert.*: mixed: entry/);
    expect(found).toMatch(/mixed is one expert whose parameters are the mixture: mixed: entry/);
    const shifted = changed(({ mixed }) => ({ mixed: (...given) => affine(mixed?.(...given) as Tensor, shift) }));
    expect(await failures(shifted)).toMatch(/mixed with one-hot/);
    const cut = changed(({ mixed }) => ({
      mixed: (params, hiddens, plan, layout) =>
        mixed?.(
          params,
          hiddens,
          { ...plan, coefficients: plan.coefficients.map((c) => stopGradient(c)) },
          layout,
        ) as Tensor,
    }));
    expect(await failures(cut)).toMatch(/gradients of mixed/);
  });
  it("a fused path of its own", async () => {
    const found = await failures(
      changed(({ fused }) => ({
        fused: (params, x, plan) => fused?.(params, x, { ...plan, weights: square(plan.weights) }) as Tensor,
      })),
    );
    expect(found).toMatch(/fused is dispatch, apply and combine: fused: entry/);
  });
  it("matrices that nobody is told of, and unknown ones", async () => {
    const silent = applied((apply) => (params, rows, ends, layout) => apply(params, rows, ends, layout));
    expect(await failures(silent)).toMatch(/observe was not told of gateUp, down, only of/);
    const invented = applied((apply) => (params, rows, ends, layout, observe) => {
      observe?.("sideways", rows, ends);
      return apply(params, rows, ends, layout, observe);
    });
    expect(await failures(invented)).toMatch(/observe was told of "sideways", which is no parameter/);
  });
  it("parameters that are not looked at", async () => {
    const trusting: ExpertsSuite["make"] = (options) => {
      if (!("params" in options)) return glu({ ...options, hidden });
      const { count, width, params } = options;
      const on = engine(cpu());
      const { apply, mixed } = glu({ count, width, hidden, engine: on, random: random(on, 1) });
      return { count, params, apply, ...(mixed ? { mixed } : {}) };
    };
    expect(await failures(trusting)).toMatch(/parameter gateUp one entry too long: expected a ShapeError, nothing/);
  });
  it("another count, or numbers that no seed gives", async () => {
    expect(await failures(changed(({ count }) => ({ count: count + 1 })))).toMatch(/count is 5, 4 experts/);
    let calls = 0;
    const drifting: ExpertsSuite["make"] = (options) =>
      glu({ ...options, hidden, ...("random" in options ? { random: options.random.at(calls++) } : {}) });
    expect(await failures(drifting)).toMatch(/made again: .gateUp: entry/);
  });
});
