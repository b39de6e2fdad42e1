// Every kind of plan through the whole layer, against plain loops, with gradients and awkward sizes.
import { describe, expect, test } from "vitest";
import { autodiff, watch } from "../autodiff.ts";
import type { Engine } from "../engine.ts";
import { ShapeError, UnsupportedError } from "../errors.ts";
import { mul } from "../ops/elementwise.ts";
import { sum } from "../ops/reduce.ts";
import { reshape } from "../ops/shape.ts";
import { random } from "../random.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { glu } from "./experts.ts";
import { layerInput, layerParams, type MoEOptions, moe, moeLayer } from "./layer.ts";
import {
  addTo,
  close,
  compare,
  fixedRouter,
  float64,
  floats,
  gluRow,
  ids,
  noise,
  numbers,
  routerInput,
  row,
  sigmoid,
} from "./moe.test-util.ts";
import type { Experts, Layout, MoELayer, Plan, Routed, RouterContext, RouterInput, RouterPlugin } from "./plan.ts";

const width = 3;
const hidden = 2;
type Weights = { readonly gateUp: Tensor; readonly down: Tensor };
const expertShapes = (experts: number) => ({ gateUp: [experts, 2 * hidden, width], down: [experts, width, hidden] });

/** Runs moe with SwiGLU experts whose parameters are the given tensors. */
function run(
  x: Weights & { readonly tokens: Tensor },
  count: number,
  decide: Parameters<typeof fixedRouter>[0],
  rest: { layout?: Partial<Layout>; options?: MoEOptions; shared?: MoELayer["shared"] } = {},
) {
  const params = { gateUp: x.gateUp, down: x.down };
  const layer: MoELayer = {
    router: fixedRouter(decide),
    experts: glu({ count, width, hidden, params }),
    ...(rest.shared ? { shared: rest.shared } : {}),
  };
  return moe(layer, layerParams(layer), routerInput(x.tokens, rest.layout), rest.options);
}

const unfused: MoEOptions = { observe: () => undefined };

describe("sparse plans", () => {
  const cases: { name: string; tokens: number; experts: number; k: number; chosen: number[]; bound?: number }[] = [
    { name: "two of four", tokens: 5, experts: 4, k: 2, chosen: [0, 3, 3, 2, 0, 1, 1, 2, 2, 1] },
    { name: "no tokens", tokens: 0, experts: 3, k: 2, chosen: [] },
    { name: "one token, one expert", tokens: 1, experts: 1, k: 1, chosen: [0] },
    { name: "an expert without tokens", tokens: 3, experts: 3, k: 1, chosen: [2, 0, 2] },
    { name: "all tokens to one expert", tokens: 7, experts: 5, k: 1, chosen: [3, 3, 3, 3, 3, 3, 3] },
    { name: "k = all", tokens: 2, experts: 3, k: 3, chosen: [0, 1, 2, 2, 0, 1] },
    {
      name: "variable k, a token without experts",
      tokens: 4,
      experts: 3,
      k: 3,
      chosen: [1, -1, 2, -1, -1, -1, 0, 1, 2, -1, 2, -1],
    },
    { name: "null experts", tokens: 3, experts: 2, k: 2, chosen: [0, 2, 3, 1, 2, 3] },
    { name: "nothing but null experts", tokens: 2, experts: 2, k: 1, chosen: [2, 5] },
    {
      name: "a static bound",
      tokens: 4,
      experts: 3,
      k: 3,
      chosen: [1, -1, 2, -1, -1, -1, 0, 1, 2, -1, 2, -1],
      bound: 7,
    },
    { name: "a bound with room to spare", tokens: 3, experts: 2, k: 2, chosen: [0, -1, -1, -1, 1, -1], bound: 5 },
    { name: "one expert twice", tokens: 2, experts: 2, k: 2, chosen: [1, 1, 0, 1] },
  ];
  const oracle =
    (tokens: number, experts: number, k: number, chosen: readonly number[]) =>
    (x: {
      tokens: readonly number[];
      weights: readonly number[];
      gateUp: readonly number[];
      down: readonly number[];
    }) => {
      const y = new Array<number>(tokens * width).fill(0);
      chosen.forEach((e, slot) => {
        if (e < 0 || e >= experts) return;
        const t = Math.floor(slot / k);
        addTo(y, t * width, gluRow(x, e, row(x.tokens, t, width), hidden), x.weights[slot] ?? Number.NaN);
      });
      return y;
    };

  for (const [way, options] of [
    ["fused", {}],
    ["stage by stage", unfused],
  ] as const) {
    test.each(cases)(`${way}: $name`, async ({ tokens, experts, k, chosen, bound }) => {
      await compare({
        shapes: { tokens: [tokens, width], weights: [tokens, k], ...expertShapes(experts) },
        forward: (x, e) => {
          const plan: Plan = {
            kind: "sparse",
            experts: ids(e, chosen, [tokens, k]),
            weights: x.weights,
            ...(bound === undefined ? {} : { bound }),
          };
          return run(x, experts, () => ({ plan }), { options }).output;
        },
        oracle: oracle(tokens, experts, k, chosen),
      });
    });
  }

  test("padding sends no token to an expert, gets zeros and no gradient", async () => {
    const chosen = [0, 1, 1, 2, 0, 2, 2, 1, 1, 0, 0, 1];
    const mask = [1, 1, 0, 1, 1, 0, 0, 1]; // [2, 1 + 3]: the first column lies in the cache
    const kept = chosen.map((e, slot) => ([1, 0, 1, 0, 0, 1][Math.floor(slot / 2)] === 1 ? e : -1));
    await compare({
      shapes: { tokens: [6, width], weights: [6, 2], ...expertShapes(3) },
      forward: (x, e) => {
        const layout = { batch: 2, sequence: 3, past: 1, mask: floats(e, mask, [2, 4]) };
        const plan: Plan = { kind: "sparse", experts: ids(e, chosen, [6, 2]), weights: x.weights };
        return run(x, 3, () => ({ plan }), { layout }).output;
      },
      oracle: oracle(6, 3, 2, kept),
    });
  });

  test("combine: false gives the outputs per slot, unweighted, zeros for empty slots", async () => {
    const chosen = [1, -1, 0, 1, 2, 0];
    await compare({
      shapes: { tokens: [3, width], ...expertShapes(2) },
      forward: (x, e) => {
        const plan: Plan = { kind: "sparse", experts: ids(e, chosen, [3, 2]), weights: floats(e, noise(6), [3, 2]) };
        const { output } = run(x, 2, () => ({ plan }), { options: { combine: false } });
        expect(output.shape).toEqual([3, 2, width]);
        return output;
      },
      oracle: (x) =>
        chosen.flatMap((e, slot) =>
          e < 0 || e > 1 ? [0, 0, 0] : gluRow(x, e, row(x.tokens, Math.floor(slot / 2), width), hidden),
        ),
    });
  });

  test("k = all equals the dense plan, and permuting the experts permutes nothing else", async () => {
    const e = float64();
    const [tokens, experts] = [4, 3];
    const x = floats(e, noise(tokens * width), [tokens, width]);
    const weights = noise(tokens * experts, 2);
    const gateUp = noise(experts * 2 * hidden * width, 3);
    const down = noise(experts * width * hidden, 4);
    const order = [2, 0, 1];
    const permuted = (flat: number[]) => order.flatMap((o) => row(flat, o, flat.length / experts));
    const all = { tokens: x, gateUp: floats(e, gateUp, [3, 4, 3]), down: floats(e, down, [3, 3, 2]) };
    const moved = {
      tokens: x,
      gateUp: floats(e, permuted(gateUp), [3, 4, 3]),
      down: floats(e, permuted(down), [3, 3, 2]),
    };
    const dense = run(all, 3, () => ({ plan: { kind: "dense", weights: floats(e, weights, [4, 3]) } })).output;
    const sparse = (used: typeof all, chosen: number[]) =>
      run(used, 3, () => ({
        plan: {
          kind: "sparse",
          experts: ids(e, Array.from({ length: 4 }, () => chosen).flat(), [4, 3]),
          weights: floats(e, weights, [4, 3]),
        },
      })).output;
    const expected = await numbers(dense);
    close(await numbers(sparse(all, [0, 1, 2])), expected);
    close(await numbers(sparse(moved, [1, 2, 0])), expected);
  });
});

describe("dense plans", () => {
  test.each([
    { tokens: 3, experts: 2, columns: 2, mask: undefined },
    { tokens: 0, experts: 2, columns: 2, mask: undefined },
    { tokens: 1, experts: 5, columns: 5, mask: undefined },
    { tokens: 4, experts: 2, columns: 3, mask: undefined }, // the third column is a null expert
    { tokens: 5, experts: 3, columns: 3, mask: [1, 0, 1, 1, 0] },
  ])("$tokens tokens, $experts experts, $columns columns, mask $mask", async ({ tokens, experts, columns, mask }) => {
    await compare({
      shapes: { tokens: [tokens, width], weights: [tokens, columns], ...expertShapes(experts) },
      forward: (x, e) => {
        const layout = mask ? { mask: floats(e, mask, [1, tokens]) } : {};
        return run(x, experts, () => ({ plan: { kind: "dense", weights: x.weights } }), { layout }).output;
      },
      oracle: (x) => {
        const y = new Array<number>(tokens * width).fill(0);
        for (let t = 0; t < tokens; t++) {
          if (mask?.[t] === 0) continue;
          for (let e = 0; e < experts; e++) {
            addTo(y, t * width, gluRow(x, e, row(x.tokens, t, width), hidden), x.weights[t * columns + e] ?? 0);
          }
        }
        return y;
      },
    });
  });
});

describe("expert-choice plans", () => {
  test.each([
    { name: "plain", tokens: 5, experts: 3, capacity: 2, chosen: [0, 4, 1, 4, 4, 2], mask: undefined },
    {
      name: "empty places and an empty expert",
      tokens: 4,
      experts: 3,
      capacity: 2,
      chosen: [3, -1, -1, -1, -1, 0],
      mask: undefined,
    },
    { name: "no tokens", tokens: 0, experts: 2, capacity: 0, chosen: [], mask: undefined },
    { name: "no capacity", tokens: 2, experts: 2, capacity: 0, chosen: [], mask: undefined },
    { name: "padding", tokens: 3, experts: 2, capacity: 3, chosen: [0, 1, 2, 2, 0, 1], mask: [1, 0, 1] },
  ])("$name", async ({ tokens, experts, capacity, chosen, mask }) => {
    await compare({
      shapes: { tokens: [tokens, width], weights: [experts, capacity], ...expertShapes(experts) },
      forward: (x, e) => {
        const layout = mask ? { mask: floats(e, mask, [1, tokens]) } : {};
        const plan: Plan = { kind: "expert-choice", tokens: ids(e, chosen, [experts, capacity]), weights: x.weights };
        return run(x, experts, () => ({ plan }), { layout }).output;
      },
      oracle: (x) => {
        const y = new Array<number>(tokens * width).fill(0);
        chosen.forEach((t, place) => {
          if (t < 0 || mask?.[t] === 0) return;
          const e = Math.floor(place / capacity);
          addTo(y, t * width, gluRow(x, e, row(x.tokens, t, width), hidden), x.weights[place] ?? 0);
        });
        return y;
      },
    });
  });
});

describe("slots plans", () => {
  test.each([
    { batch: 2, sequence: 3, experts: 2, slots: 2, mask: undefined },
    { batch: 1, sequence: 1, experts: 3, slots: 1, mask: undefined },
    { batch: 2, sequence: 0, experts: 2, slots: 1, mask: undefined },
    { batch: 2, sequence: 3, experts: 2, slots: 1, mask: [1, 1, 0, 0, 1, 1] },
  ])("batch $batch, sequence $sequence, $experts experts of $slots slots, mask $mask", async (sizes) => {
    const { batch, sequence, experts, slots, mask } = sizes;
    const total = experts * slots;
    await compare({
      shapes: {
        tokens: [batch * sequence, width],
        dispatch: [batch, sequence, total],
        combine: [batch, sequence, total],
        ...expertShapes(experts),
      },
      forward: (x, e) => {
        const layout = { batch, sequence, ...(mask ? { mask: floats(e, mask, [batch, sequence]) } : {}) };
        return run(x, experts, () => ({ plan: { kind: "slots", dispatch: x.dispatch, combine: x.combine } }), {
          layout,
        }).output;
      },
      oracle: (x) => {
        const y = new Array<number>(batch * sequence * width).fill(0);
        for (let b = 0; b < batch; b++) {
          for (let slot = 0; slot < total; slot++) {
            const mixed = new Array<number>(width).fill(0);
            for (let s = 0; s < sequence; s++) {
              const t = b * sequence + s;
              if (mask?.[t] !== 0) addTo(mixed, 0, row(x.tokens, t, width), x.dispatch[t * total + slot] ?? 0);
            }
            const out = gluRow(x, Math.floor(slot / slots), mixed, hidden);
            for (let s = 0; s < sequence; s++) {
              const t = b * sequence + s;
              if (mask?.[t] !== 0) addTo(y, t * width, out, x.combine[t * total + slot] ?? 0);
            }
          }
        }
        return y;
      },
    });
  });

  test("slots that do not divide among the experts are refused with the sizes", () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const odd = floats(e, noise(9), [1, 3, 3]);
    expect(() => run(x, 2, () => ({ plan: { kind: "slots", dispatch: odd, combine: odd } }))).toThrow(
      /3 tokens and 2 experts/,
    );
  });
});

describe("merge plans", () => {
  test.each([
    { tokens: 5, experts: 3, groups: 2, of: [0, 1, 1, 0, -1], mask: undefined },
    { tokens: 1, experts: 2, groups: 1, of: [0], mask: undefined },
    { tokens: 0, experts: 2, groups: 1, of: [], mask: undefined },
    { tokens: 4, experts: 2, groups: 3, of: [2, 2, 0, 0], mask: [1, 0, 1, 1] }, // a group without tokens
  ])("$tokens tokens in $groups groups, mask $mask", async ({ tokens, experts, groups, of, mask }) => {
    await compare({
      shapes: { tokens: [tokens, width], coefficients: [groups, experts], ...expertShapes(experts) },
      forward: (x, e) => {
        const layout = mask ? { mask: floats(e, mask, [1, tokens]) } : {};
        const plan: Plan = { kind: "merge", groups: ids(e, of, [tokens]), coefficients: [x.coefficients] };
        return run(x, experts, () => ({ plan }), { layout }).output;
      },
      oracle: (x) => {
        const y = new Array<number>(tokens * width).fill(0);
        of.forEach((group, t) => {
          if (group < 0 || mask?.[t] === 0) return;
          const mix = (flat: readonly number[]) => {
            const size = flat.length / experts;
            const mixed = new Array<number>(size).fill(0);
            for (let e = 0; e < experts; e++)
              addTo(mixed, 0, row(flat, e, size), x.coefficients[group * experts + e] ?? 0);
            return mixed;
          };
          addTo(
            y,
            t * width,
            gluRow({ gateUp: mix(x.gateUp), down: mix(x.down) }, 0, row(x.tokens, t, width), hidden),
            1,
          );
        });
        return y;
      },
    });
  });

  test("one-hot coefficients are that expert", async () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const merged = run(x, 2, () => ({
      plan: { kind: "merge", groups: ids(e, [0, 0, 0], [3]), coefficients: [floats(e, [0, 1], [1, 2])] },
    })).output;
    const routed = run(x, 2, () => ({
      plan: { kind: "sparse", experts: ids(e, [1, 1, 1], [3, 1]), weights: floats(e, [1, 1, 1], [3, 1]) },
    })).output;
    close(await numbers(merged), await numbers(routed));
  });

  test("two expert modes and experts that cannot be mixed are refused with the reason", () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const one = floats(e, [0.5, 0.5], [1, 2]);
    const plan: Plan = { kind: "merge", groups: ids(e, [0, 0, 0], [3]), coefficients: [one, one] };
    expect(() => run(x, 2, () => ({ plan }))).toThrow(/one expert mode, the merge plan has 2/);
    const { mixed: _, ...unmixable } = glu({ count: 2, width, hidden, params: { gateUp: x.gateUp, down: x.down } });
    const layer: MoELayer = { router: fixedRouter(() => ({ plan })), experts: unmixable };
    expect(() => moe(layer, layerParams(layer), routerInput(x.tokens))).toThrow(UnsupportedError);
  });
});

const weightsOn = (e: Engine, experts: number) => ({
  tokens: floats(e, noise(3 * width), [3, width]),
  gateUp: floats(e, noise(experts * 2 * hidden * width, 2), [experts, 2 * hidden, width]),
  down: floats(e, noise(experts * width * hidden, 3), [experts, width, hidden]),
});

describe("shared experts", () => {
  test.each([
    { shared: 1, gated: false, mask: undefined },
    { shared: 1, gated: true, mask: undefined },
    { shared: 2, gated: true, mask: undefined },
    { shared: 2, gated: false, mask: [1, 0, 1] },
    { shared: 1, gated: true, mask: [0, 1, 1] },
  ])("$shared of them, gated $gated, mask $mask", async ({ shared, gated, mask }) => {
    const chosen = [1, 0, 1];
    const sharedShapes = {
      sharedGateUp: [shared, 2 * hidden, width],
      sharedDown: [shared, width, hidden],
      gate: [1, width],
    };
    await compare({
      shapes: { tokens: [3, width], ...expertShapes(2), ...sharedShapes },
      forward: (x, e) => {
        const params = { gateUp: x.sharedGateUp, down: x.sharedDown };
        const plan: Plan = {
          kind: "sparse",
          experts: ids(e, chosen, [3, 1]),
          weights: floats(e, [1, -2, 0.5], [3, 1]),
        };
        return run(x, 2, () => ({ plan }), {
          layout: mask ? { mask: floats(e, mask, [1, 3]) } : {},
          shared: [{ experts: glu({ count: shared, width, hidden, params }), ...(gated ? { gate: x.gate } : {}) }],
        }).output;
      },
      oracle: (x) => {
        const y = new Array<number>(3 * width).fill(0);
        chosen.forEach((e, t) => {
          if (mask?.[t] === 0) return;
          const token = row(x.tokens, t, width);
          addTo(y, t * width, gluRow(x, e, token, hidden), [1, -2, 0.5][t] ?? 0);
          const gate = gated ? sigmoid(token.reduce((total, v, i) => total + v * (x.gate[i] ?? 0), 0)) : 1;
          for (let s = 0; s < shared; s++) {
            addTo(y, t * width, gluRow({ gateUp: x.sharedGateUp, down: x.sharedDown }, s, token, hidden), gate);
          }
        });
        return y;
      },
    });
  });
});

describe("what routers may hand over", () => {
  const chosen = [1, -1, 0, 2, 1, 1];

  test("rows and further paths", async () => {
    await compare({
      shapes: {
        tokens: [3, width],
        rows: [3, width],
        other: [3, width],
        weights: [3, 2],
        gates: [3, 2],
        ...expertShapes(2),
      },
      forward: (x, e) => {
        const plan: Plan = { kind: "sparse", experts: ids(e, chosen, [3, 2]), weights: x.weights };
        const dense: Plan = { kind: "dense", weights: x.gates };
        return run(x, 2, () => ({ plan, rows: x.rows, more: [{ plan: dense, rows: x.other }] })).output;
      },
      oracle: (x) => {
        const y = new Array<number>(3 * width).fill(0);
        chosen.forEach((e, slot) => {
          const t = Math.floor(slot / 2);
          if (e >= 0 && e < 2) addTo(y, t * width, gluRow(x, e, row(x.rows, t, width), hidden), x.weights[slot] ?? 0);
          addTo(y, t * width, gluRow(x, slot % 2, row(x.other, t, width), hidden), x.gates[slot] ?? 0);
        });
        return y;
      },
    });
  });

  const lookups: {
    name: string;
    plan: (e: Engine, weights: Tensor) => Plan;
    uses: (place: number) => [t: number, e: number];
  }[] = [
    {
      name: "sparse",
      plan: (e, weights) => ({ kind: "sparse", experts: ids(e, chosen, [3, 2]), weights }),
      uses: (slot) => [Math.floor(slot / 2), chosen[slot] ?? -1],
    },
    { name: "dense", plan: (_, weights) => ({ kind: "dense", weights }), uses: (i) => [Math.floor(i / 2), i % 2] },
    {
      name: "expert-choice",
      plan: (e, weights) => ({
        kind: "expert-choice",
        tokens: ids(e, [2, -1, 0, 1, 0, 2], [2, 3]),
        weights: reshape(weights, [2, 3]),
      }),
      uses: (place) => [[2, -1, 0, 1, 0, 2][place] ?? -1, Math.floor(place / 3)],
    },
  ];
  test.each(lookups)("everyExpert, handed back as expertOutputs of a $name plan", async ({ plan, uses }) => {
    await compare({
      shapes: { tokens: [3, width], weights: [3, 2], ...expertShapes(2) },
      forward: (x, e) => {
        const decided = run(x, 2, (input) => {
          const outputs = input.everyExpert?.();
          if (outputs === undefined) throw new Error("everyExpert is missing");
          expect(outputs.shape).toEqual([3, 2, width]);
          expect(input.everyExpert?.()).toBe(outputs); // computed once
          return { plan: plan(e, x.weights), expertOutputs: outputs };
        });
        return decided.output;
      },
      oracle: (x) => {
        const y = new Array<number>(3 * width).fill(0);
        for (let i = 0; i < 6; i++) {
          const [t, e] = uses(i);
          if (t < 0 || e < 0 || e > 1) continue;
          addTo(y, t * width, gluRow(x, e, row(x.tokens, t, width), hidden), x.weights[i] ?? 0);
        }
        return y;
      },
    });
  });

  test("losses of experts and shared experts arrive under their names, the router's metrics win", async () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const base = glu({ count: 2, width, hidden, params: { gateUp: x.gateUp, down: x.down } });
    const reconstructing: Experts = {
      count: 2,
      params: base.params,
      apply: (params, rows, ends, layout) => ({
        ...base.apply(params, rows, ends, layout),
        losses: { reconstruction: { value: sum(mul(rows, rows)), weight: 0.1 } },
      }),
    };
    const plan: Plan = { kind: "sparse", experts: ids(e, [0, 1, -1], [3, 1]), weights: floats(e, [1, 1, 1], [3, 1]) };
    const decided: Partial<Routed> & { plan: Plan } = {
      plan,
      losses: { balance: { value: floats(e, [2], []), weight: 1 } },
      metrics: { untouched: floats(e, [7], []), mine: floats(e, [8], []) },
    };
    const layer: MoELayer = {
      router: fixedRouter(() => decided),
      experts: reconstructing,
      shared: [{ experts: reconstructing }],
    };
    const { routed } = moe(layer, layerParams(layer), routerInput(x.tokens));
    expect(Object.keys(routed.losses).sort()).toEqual(["balance", "experts.reconstruction", "shared.0.reconstruction"]);
    const squares = (rows: number[]) => rows.reduce((total, v) => total + v * v, 0);
    const value = async (name: string) => numbers(routed.losses[name]?.value ?? x.tokens);
    close(await value("experts.reconstruction"), [squares(noise(9).slice(0, 6))]);
    // Every shared expert sees every token.
    close(await value("shared.0.reconstruction"), [2 * squares(noise(9))]);
    expect(await numbers(routed.metrics?.mine ?? x.tokens)).toEqual([8]);
    expect(await numbers(routed.metrics?.load ?? x.tokens)).toEqual([1, 1]);
    expect(await numbers(routed.metrics?.untouched ?? x.tokens)).toEqual([7]);
  });

  test("metrics are left out on request; null experts are counted behind the real ones", async () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const plan: Plan = { kind: "sparse", experts: ids(e, [0, 2, 3], [3, 1]), weights: floats(e, [1, 1, 1], [3, 1]) };
    const probabilities = floats(e, new Array(12).fill(0.25), [3, 4]);
    const { routed } = run(x, 2, () => ({ plan, probabilities }));
    expect(await numbers(routed.metrics?.load ?? x.tokens)).toEqual([1, 0, 1, 1]);
    close(await numbers(routed.metrics?.entropy ?? x.tokens), [Math.log(4)]);
    close(await numbers(routed.metrics?.entropyOfMean ?? x.tokens), [Math.log(4)]);
    expect(run(x, 2, () => ({ plan }), { options: { metrics: false } }).routed.metrics).toBeUndefined();
  });

  test("observe sees the inputs of every matrix of the routed experts, without empty rows counted", async () => {
    const e = float64();
    const x = weightsOn(e, 2);
    const plan: Plan = {
      kind: "expert-choice",
      tokens: ids(e, [2, -1, 0, 1], [2, 2]),
      weights: floats(e, noise(4), [2, 2]),
    };
    const seen: Record<string, Promise<number[]>[]> = {};
    run(x, 2, () => ({ plan }), {
      options: {
        observe: (name, rows, ends) => {
          seen[name] = [numbers(rows), numbers(ends)];
        },
      },
    });
    expect(Object.keys(seen).sort()).toEqual(["down", "gateUp"]);
    const [rows, ends] = await Promise.all(seen.gateUp ?? []);
    expect(ends).toEqual([1, 3]);
    const all = noise(9);
    close(rows?.slice(0, 9) ?? [], [...row(all, 2, 3), ...row(all, 0, 3), ...row(all, 1, 3)]);
  });
});

describe("refusals", () => {
  const e = float64();
  const x = weightsOn(e, 2);
  const plan: Plan = { kind: "sparse", experts: ids(e, [0, 1, 0], [3, 1]), weights: floats(e, [1, 1, 1], [3, 1]) };
  const experts = glu({ count: 2, width, hidden, params: { gateUp: x.gateUp, down: x.down } });

  test("hidden states that do not fit the layout", () => {
    expect(() => run(x, 2, () => ({ plan }), { layout: { batch: 2, sequence: 2 } })).toThrow(
      /hidden is f32 \[3, 3\], expected .* \[4, width\]/,
    );
  });
  test("a mask of the wrong length", () => {
    expect(() => run(x, 2, () => ({ plan }), { layout: { past: 1, mask: floats(e, [1, 1, 1], [1, 3]) } })).toThrow(
      /expected \[batch, past \+ sequence\] = \[1, 4\]/,
    );
  });
  test("parameters without the router's branch", () => {
    const layer: MoELayer = { router: fixedRouter(() => ({ plan })), experts };
    expect(() => moe(layer, { experts: experts.params }, routerInput(x.tokens))).toThrow(/parameters lack "router"/);
  });
  test("ids that are not i32, or not of the weights' shape", () => {
    const wrong: Plan = { ...plan, experts: ids(e, [0, 1], [2, 1]) };
    expect(() => run(x, 2, () => ({ plan: wrong }), { options: unfused })).toThrow(ShapeError);
    expect(() => run(x, 2, () => ({ plan: { ...plan, experts: plan.weights } }), { options: unfused })).toThrow(/i32/);
  });
  test("plans for another number of tokens", () => {
    const dense: Plan = { kind: "dense", weights: floats(e, noise(4), [2, 2]) };
    expect(() => run(x, 2, () => ({ plan: dense }))).toThrow(/f32 \[2, 2\] for tokens f32 \[3, 3\]/);
    const merge: Plan = { kind: "merge", groups: ids(e, [0, 0], [2]), coefficients: [floats(e, [1, 0], [1, 2])] };
    expect(() => run(x, 2, () => ({ plan: merge }))).toThrow(/expected one per token/);
  });
  test("combine: false with a plan that has no slots per token, or with shared experts", () => {
    const choice: Plan = { kind: "expert-choice", tokens: ids(e, [0, 1], [2, 1]), weights: floats(e, [1, 1], [2, 1]) };
    expect(() => run(x, 2, () => ({ plan: choice }), { options: { combine: false } })).toThrow(/expert-choice/);
    expect(() => run(x, 2, () => ({ plan }), { options: { combine: false }, shared: [{ experts }] })).toThrow(/shared/);
  });
  test("a routing override, but only on its layers", () => {
    const layer: MoELayer = { router: fixedRouter(() => ({ plan })), experts };
    const call = (layers: number[]) =>
      moe(layer, layerParams(layer), {
        ...routerInput(x.tokens),
        training: false,
        layers: 2,
        override: [{ k: 1, layers }],
      });
    expect(() => call([0])).toThrow(
      /layer 0 got a routing override, and its router does not choose experts by scores alone/,
    );
    expect(call([1]).output.shape).toEqual([3, width]);
  });

  const context = (changes: Partial<RouterContext> = {}): RouterContext => ({
    engine: e,
    width,
    experts: 2,
    layer: 0,
    layers: 1,
    random: random(e, 1),
    shared: (_, make) => make(),
    ...changes,
  });
  const plugin = (changes: Partial<RouterPlugin>): RouterPlugin => ({
    name: "fixed",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["sparse"],
    init: () => fixedRouter(() => ({ plan })),
    ...changes,
  });
  test("moeLayer: sizes, host routers on devices that cannot block, mixing without mixed()", () => {
    const { mixed: _, ...unmixable } = experts;
    expect(moeLayer(plugin({}), context(), { experts }).experts).toBe(experts);
    expect(() => moeLayer(plugin({}), context({ experts: 3 }), { experts })).toThrow(
      /made for 3 experts, the layer has 2/,
    );
    const device: Engine = { ...e, name: "device", canBlock: false };
    expect(() => moeLayer(plugin({ needs: ["host"] }), context({ engine: device }), { experts })).toThrow(
      /device cannot block/,
    );
    expect(moeLayer(plugin({ needs: ["host"] }), context(), { experts }).experts).toBe(experts);
    expect(() => moeLayer(plugin({ plans: ["merge"] }), context(), { experts: unmixable })).toThrow(UnsupportedError);
  });
});

test("layerInput and moeLayer fill in what a layer by itself does not say", async () => {
  const e = float64();
  const seen: RouterContext[] = [];
  const inputs: RouterInput[] = [];
  const experts = glu({ engine: e, random: random(e, 1), count: 3, width: 4, hidden: 2 });
  const buffers = { bias: floats(e, [1, 2, 3], [3]) };
  const plugin: RouterPlugin = {
    name: "spy",
    causal: { training: true, evaluation: true },
    needs: [],
    plans: ["dense"],
    init(context) {
      seen.push(context);
      return {
        params: {},
        buffers,
        route(_, input) {
          inputs.push(input);
          return { plan: { kind: "dense", weights: floats(e, new Array(6).fill(0.5), [2, 3]) }, losses: {} };
        },
      };
    },
  };
  const layer = moeLayer(plugin, { engine: e, width: 4 }, { experts });
  const [context] = seen;
  expect(context).toMatchObject({ experts: 3, layer: 0, layers: 1, width: 4 });
  expect(context?.shared("one", () => ({ made: 1 }))).toBe(context?.shared("one", () => ({ made: 2 })));
  const hidden = floats(e, [1, 0, 0, 0, 0, 1, 0, 0], [2, 4]);
  const { output } = moe(layer, layerParams(layer), layerInput(layer, hidden, { training: true }));
  expect(output.shape).toEqual([2, 4]);
  expect(inputs[0]).toMatchObject({ training: true, step: 0, layout: { batch: 1, sequence: 2, past: 0 } });
  expect(inputs[0]?.buffers).toBe(buffers);
});

test("a step leaves nothing alive but its results, with and without gradients recorded", () => {
  const e = float64();
  const x = weightsOn(e, 2);
  const plan: Plan = { kind: "sparse", experts: ids(e, [0, 1, 0], [3, 1]), weights: floats(e, [1, 1, 1], [3, 1]) };
  const before = e.live();
  const plain = run(x, 2, () => ({ plan }));
  plain.output.dispose();
  for (const metric of Object.values(plain.routed.metrics ?? {})) metric.dispose();
  expect(e.live()).toBe(before);
  e.scope(() => {
    const watched = watch(autodiff(e), x as Tree) as typeof x;
    run(watched, 2, () => ({ plan }));
  });
  expect(e.live()).toBe(before);
});
