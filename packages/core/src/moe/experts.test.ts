// Expert sets against plain loops, with their gradients: activations, biases, mixing, initial values, refusals.
import { describe, expect, test } from "vitest";
import { ShapeError } from "../errors.ts";
import { random } from "../random.ts";
import type { Tree } from "../tensor.ts";
import { type Activation, ffn, glu } from "./experts.ts";
import { addTo, compare, float64, ids, names, noise, numbers, row, sigmoid } from "./moe.test-util.ts";

const [width, hidden, count] = [3, 2, 4];
const layout = { batch: 1, sequence: 5, past: 0 };
const tokens = 5;
// Expert 0 has rows 0 and 1, expert 1 none, expert 2 rows 2 and 3, expert 3 none; row 4 is behind the last block.
const ends = [2, 2, 4, 4];
const expertOf = [0, 0, 2, 2, -1];

const erf = (x: number): number => {
  // Series: enough digits for the small arguments used here.
  let [term, total] = [x, x];
  for (let n = 1; n < 60; n++) {
    term *= (-x * x) / n;
    total += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * total;
};
const act: { readonly [A in Activation]: (x: number) => number } = {
  silu: (x) => x * sigmoid(x),
  gelu: (x) => x * 0.5 * (1 + erf(x / Math.SQRT2)),
  "gelu-tanh": (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu: (x) => Math.max(x, 0),
};
const product = (
  w: readonly number[],
  e: number,
  out: number,
  x: readonly number[],
  bias?: readonly number[],
): number[] =>
  Array.from({ length: out }, (_, o) =>
    x.reduce((sum, v, i) => sum + v * (w[(e * out + o) * x.length + i] ?? Number.NaN), bias?.[e * out + o] ?? 0),
  );

const all: readonly Activation[] = ["silu", "gelu", "gelu-tanh", "relu"];
const variants = all.flatMap((activation) => [false, true].map((bias) => ({ activation, bias })));

describe("glu", () => {
  test.each(variants)("$activation, bias $bias", async ({ activation, bias }) => {
    await compare({
      shapes: {
        rows: [tokens, width],
        gateUp: [count, 2 * hidden, width],
        down: [count, width, hidden],
        gateUpBias: [count, 2 * hidden],
        downBias: [count, width],
      },
      forward: ({ rows, gateUp, down, gateUpBias, downBias }, e) => {
        const params: Tree = { gateUp, down, ...(bias ? { gateUpBias, downBias } : {}) };
        const experts = glu({ count, width, hidden, activation, bias, params });
        return experts.apply(params, rows, ids(e, ends, [count]), layout).output;
      },
      oracle: (x) =>
        expertOf.flatMap((e, i) => {
          if (e < 0) return [0, 0, 0];
          const both = product(x.gateUp, e, 2 * hidden, row(x.rows, i, width), bias ? x.gateUpBias : undefined);
          const inner = both.slice(0, hidden).map((g, h) => act[activation](g) * (both[hidden + h] ?? 0));
          return product(x.down, e, width, inner, bias ? x.downBias : undefined);
        }),
    });
  });

  test("only plain SwiGLU experts declare the fused path", () => {
    const e = float64();
    const sizes = { count, width, hidden, engine: e, random: random(e, 1) };
    expect(glu(sizes).fused).toBeDefined();
    expect(glu({ ...sizes, bias: true }).fused).toBeUndefined();
    expect(glu({ ...sizes, activation: "gelu" }).fused).toBeUndefined();
  });
});

describe("ffn", () => {
  test.each([
    ...variants.map((v) => ({ ...v, squared: false })),
    { activation: "relu" as const, bias: true, squared: true },
  ])("$activation, bias $bias, squared $squared", async ({ activation, bias, squared }) => {
    await compare({
      shapes: {
        rows: [tokens, width],
        up: [count, hidden, width],
        down: [count, width, hidden],
        upBias: [count, hidden],
        downBias: [count, width],
      },
      forward: ({ rows, up, down, upBias, downBias }, e) => {
        const params: Tree = { up, down, ...(bias ? { upBias, downBias } : {}) };
        const experts = ffn({ count, width, hidden, activation, squared, bias, params });
        return experts.apply(params, rows, ids(e, ends, [count]), layout).output;
      },
      oracle: (x) =>
        expertOf.flatMap((e, i) => {
          if (e < 0) return [0, 0, 0];
          const pre = product(x.up, e, hidden, row(x.rows, i, width), bias ? x.upBias : undefined);
          const inner = pre.map((v) => act[activation](v) ** (squared ? 2 : 1));
          return product(x.down, e, width, inner, bias ? x.downBias : undefined);
        }),
    });
  });

  test("mixed: biases are mixed like matrices", async () => {
    const groups = [1, 0, 1, -1];
    await compare({
      shapes: {
        rows: [4, width],
        coefficients: [2, count],
        up: [count, hidden, width],
        down: [count, width, hidden],
        upBias: [count, hidden],
        downBias: [count, width],
      },
      forward: ({ rows, coefficients, ...params }, e) => {
        const experts = ffn({ count, width, hidden, activation: "silu", bias: true, params });
        const plan = { kind: "merge" as const, groups: ids(e, groups, [4]), coefficients: [coefficients] };
        const mixed = experts.mixed?.(params, rows, plan, layout);
        if (mixed === undefined) throw new Error("ffn must have mixed()");
        return mixed;
      },
      oracle: (x) =>
        groups.flatMap((group, t) => {
          if (group < 0) return [0, 0, 0];
          const mix = (flat: readonly number[]) => {
            const sum = new Array<number>(flat.length / count).fill(0);
            for (let e = 0; e < count; e++)
              addTo(sum, 0, row(flat, e, sum.length), x.coefficients[group * count + e] ?? 0);
            return sum;
          };
          const inner = product(mix(x.up), 0, hidden, row(x.rows, t, width), mix(x.upBias)).map(act.silu);
          return product(mix(x.down), 0, width, inner, mix(x.downBias));
        }),
    });
  });
});

describe("parameters", () => {
  test("fresh ones: same seed same numbers, spread 1/sqrt(inputs), biases zero", async () => {
    const e = float64();
    const before = e.live();
    const make = (seed: number) =>
      glu({ count: 8, width: 16, hidden: 32, bias: true, engine: e, random: random(e, seed) }).params;
    const params = make(3);
    expect(names(params).sort()).toEqual(["down", "downBias", "gateUp", "gateUpBias"]);
    expect(e.live() - before).toBe(4);
    const leaf = (tree: Tree, name: string) =>
      numbers((tree as Record<string, Parameters<typeof numbers>[0]>)[name] ?? fail());
    const spread = (xs: number[]) => Math.sqrt(xs.reduce((total, x) => total + x * x, 0) / xs.length);
    expect(spread(await leaf(params, "gateUp")) * Math.sqrt(16)).toBeCloseTo(1, 1);
    expect(spread(await leaf(params, "down")) * Math.sqrt(32)).toBeCloseTo(1, 1);
    expect(spread(await leaf(params, "gateUpBias"))).toBe(0);
    expect(await leaf(make(3), "gateUp")).toEqual(await leaf(params, "gateUp"));
    expect(await leaf(make(4), "gateUp")).not.toEqual(await leaf(params, "gateUp"));
  });

  test("given ones must have the names and sizes asked for", () => {
    const e = float64();
    const up = e.tensor(Float64Array.from(noise(24)), [4, 2, 3]);
    const down = e.tensor(Float64Array.from(noise(24)), [4, 3, 2]);
    expect(ffn({ count, width, hidden, params: { up, down } }).params).toEqual({ up, down });
    expect(() => ffn({ count, width, hidden, params: { up, down: up } })).toThrow(
      /"down" is f32 \[4, 2, 3\], expected \[4, 3, 2\]/,
    );
    expect(() => ffn({ count, width, hidden, bias: true, params: { up, down } })).toThrow(/"upBias" is missing/);
    expect(() => ffn({ count: 0, width, hidden, params: { up, down } })).toThrow(ShapeError);
    const experts = ffn({ count, width, hidden, params: { up, down } });
    expect(() => experts.apply({ up }, up, e.tensor(new Int32Array(4), [4]), layout)).toThrow(ShapeError);
  });
});

const fail = (): never => {
  throw new Error("the parameter is missing");
};
