// Gated experts of every activation, with and without biases, over every form of weights, against naive loops.
import {
  cast,
  dequantize,
  type Engine,
  type QuantizedFormat,
  random,
  ShapeError,
  sum,
  type Tensor,
  type Tree,
  valueAndGrad,
} from "@switchyard/core";
import type { Layout } from "@switchyard/core/moe";
import { describe, expect, it } from "vitest";
import type { GateActivation } from "./blueprint.ts";
import { expertSet } from "./feed-forward.ts";
import { makeEngine } from "./models.test-util.ts";
import { leaf } from "./tree.ts";

const layout: Layout = { batch: 1, sequence: 1, past: 0 };
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const clamped = { kind: "clamped", limit: 1.25, alpha: 1.702 } as const;

/** From gate and up to what goes down, as the papers have it. */
function between(activation: GateActivation, gate: number, up: number): number {
  if (typeof activation !== "string") {
    const low = Math.min(gate, activation.limit);
    const near = Math.max(-activation.limit, Math.min(up, activation.limit));
    return (near + 1) * low * sigmoid(activation.alpha * low);
  }
  switch (activation) {
    case "silu":
      return gate * sigmoid(gate) * up;
    case "relu":
      return Math.max(gate, 0) * up;
    case "gelu":
      return (gate / 2) * (1 + erf(gate / Math.SQRT2)) * up;
    case "gelu-tanh":
      return (gate / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (gate + 0.044715 * gate ** 3))) * up;
    default:
      return activation satisfies never;
  }
}
/** By the series without cancellation (Abramowitz and Stegun 7.1.6). */
function erf(x: number): number {
  let term = x;
  let total = x;
  for (let n = 1; n < 200; n++) {
    term *= (2 * x * x) / (2 * n + 1);
    total += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * total;
}

interface Sizes {
  readonly count: number;
  readonly width: number;
  readonly hidden: number;
}
type Values = Readonly<Record<string, ArrayLike<number>>>;

function naive(values: Values, { width, hidden }: Sizes, activation: GateActivation, e: number, x: ArrayLike<number>) {
  const at = (name: string, i: number): number => values[name]?.[i] ?? 0;
  const times = (name: string, out: number, y: ArrayLike<number>): number[] =>
    Array.from({ length: out }, (_, r) => {
      let total = at(`${name}Bias`, e * out + r);
      for (let c = 0; c < y.length; c++) total += at(name, (e * out + r) * y.length + c) * (y[c] as number);
      return total;
    });
  const both = times("gateUp", 2 * hidden, x);
  const inner = Array.from({ length: hidden }, (_, i) =>
    between(activation, both[i] as number, both[hidden + i] as number),
  );
  return times("down", width, inner);
}

const shapesOf = ({ count, width, hidden }: Sizes, bias: boolean): Record<string, number[]> => ({
  gateUp: [count, 2 * hidden, width],
  down: [count, width, hidden],
  ...(bias ? { gateUpBias: [count, 2 * hidden], downBias: [count, width] } : {}),
});
function randomParams(on: Engine, sizes: Sizes, bias: boolean): Record<string, Tensor> {
  const draw = random(on, 7);
  return Object.fromEntries(
    Object.entries(shapesOf(sizes, bias)).map(([name, shape]) => {
      const n = shape.reduce((a, b) => a * b, 1);
      return [name, on.tensor(draw.at(name).host("normal", n), shape)];
    }),
  );
}
async function valuesOf(params: Readonly<Record<string, Tensor>>): Promise<Values> {
  return Object.fromEntries(
    await Promise.all(Object.entries(params).map(async ([name, x]) => [name, await cast(x, "f32").data()] as const)),
  );
}

/** Blocks of 2, 0 and 3 rows, and one behind the last. */
const ends = [2, 2, 5];
const rowCount = 6;

async function check(
  params: Tree,
  values: Values,
  options: Sizes & { activation: GateActivation; bias: boolean; on: Engine },
  tolerance = 1e-10,
): Promise<void> {
  const { activation, bias, on, width } = options;
  const x = random(on, 9).host("normal", rowCount * width);
  const experts = expertSet({ ...options, params });
  expect(experts.count).toBe(options.count);
  const e = on.tensor(Int32Array.from(ends), [ends.length]);
  const { output } = experts.apply(params, on.tensor(x, [rowCount, width]), e, layout);
  expect(output.shape).toEqual([rowCount, width]);
  const found = await output.data();
  for (let row = 0; row < rowCount; row++) {
    const expert = ends.findIndex((end) => row < end);
    const wanted =
      expert < 0
        ? new Array<number>(width).fill(0)
        : naive(values, options, activation, expert, x.subarray(row * width, (row + 1) * width));
    for (const [i, y] of wanted.entries()) {
      expect(Math.abs((found[row * width + i] as number) - y), `row ${row}, bias ${bias}`).toBeLessThan(tolerance);
    }
  }
}

const sizes = { count: 3, width: 5, hidden: 7 };
const activations: readonly GateActivation[] = ["silu", "gelu", "gelu-tanh", "relu", clamped];

describe("expertSet equals the formulas", () => {
  it.each(activations.flatMap((activation) => [false, true].map((bias) => ({ activation, bias }))))(
    "$activation, bias $bias",
    async ({ activation, bias }) => {
      const on = makeEngine(64);
      const params = randomParams(on, sizes, bias);
      await check(params, await valuesOf(params), { ...sizes, activation, bias, on });
    },
  );

  it.each(["bf16", "f16"] as const)("%s weights and biases", async (dtype) => {
    for (const activation of ["silu", clamped] as const) {
      const on = makeEngine(64);
      const params = Object.fromEntries(
        Object.entries(randomParams(on, sizes, true)).map(([name, x]) => [name, cast(x, dtype)]),
      );
      await check(params, await valuesOf(params), { ...sizes, activation, bias: true, on });
    }
  });

  const stored: readonly [format: QuantizedFormat, key: string, group: number, rows: number][] = [
    ["int8", "int8/32", 32, 1],
    ["int4", "int4/16", 16, 1],
    ["mxfp4", "mxfp4", 32, 1],
    ["fp8", "fp8/3x48", 48, 3],
  ];
  it.each(stored)("weights in %s", async (format, key, group, rows) => {
    const wide = { count: 3, width: 64, hidden: 32 };
    const on = makeEngine(64);
    const draw = random(on, 3);
    const nodes: Record<string, Tree> = {};
    const values: Record<string, ArrayLike<number>> = {};
    for (const name of ["gateUp", "down"] as const) {
      const [count = 0, out = 0, inner = 0] = shapesOf(wide, false)[name] ?? [];
      const bytes = count * out * inner * (format === "int8" || format === "fp8" ? 1 : 0.5);
      // Small codes: no NaN in fp8.
      const drawn = draw.at(name).host("uniform", bytes);
      const codes = on.tensor(
        Uint8Array.from(drawn, (u) => Math.floor(u * 100)),
        [count, out, (bytes / count / out) | 0],
      );
      const per = [count, Math.ceil(out / rows), Math.ceil(inner / group)];
      const n = per.reduce((a, b) => a * b, 1);
      const scales =
        format === "mxfp4"
          ? on.tensor(
              Uint8Array.from({ length: n }, (_, i) => 121 + (i % 4)),
              per,
            )
          : on.tensor(
              Float32Array.from({ length: n }, (_, i) => 0.001 * (1 + (i % 5))),
              per,
            );
      nodes[name] = { [key]: { codes, scales } };
      values[name] = await dequantize({ format, group, codes, scales, ...(rows > 1 ? { rows } : {}) }).data();
    }
    for (const activation of activations) {
      await check(nodes, values, { ...wide, activation, bias: false, on }, 1e-9);
    }
    const biases = randomParams(on, wide, true);
    const { gateUpBias, downBias } = biases as { gateUpBias: Tensor; downBias: Tensor };
    const params = { ...nodes, gateUpBias, downBias };
    const more = await valuesOf({ gateUpBias, downBias });
    await check(params, { ...values, ...more }, { ...wide, activation: clamped, bias: true, on }, 1e-9);
  });

  it("no rows, and one expert", async () => {
    const on = makeEngine(64);
    const one = { count: 1, width: 2, hidden: 1 };
    const params = randomParams(on, one, true);
    const experts = expertSet({ ...one, activation: clamped, bias: true, params });
    const { output } = experts.apply(
      params,
      on.tensor(new Float32Array(0), [0, 2]),
      on.tensor(Int32Array.of(0), [1]),
      layout,
    );
    expect(output.shape).toEqual([0, 2]);
  });
});

describe("expertSet", () => {
  it("is core's glu for plain floats only: that one runs as one op", () => {
    const on = makeEngine();
    const made = (activation: GateActivation, bias: boolean) =>
      expertSet({ ...sizes, activation, bias, params: randomParams(on, sizes, bias) });
    expect(made("silu", false).fused).toBeDefined();
    expect(made("relu", false).mixed).toBeDefined();
    expect(made("silu", true).fused).toBeUndefined();
    expect(made(clamped, false).mixed).toBeUndefined();
  });

  it("clips gate from above only, and up on both sides", async () => {
    const on = makeEngine(64);
    const one = { count: 1, width: 1, hidden: 1 };
    const outputs = await Promise.all(
      [
        [9, 0],
        [2, 0],
        [-9, 0],
        [1, 9],
        [1, -9],
      ].map(async ([gate = 0, up = 0]) => {
        const params = {
          gateUp: on.tensor(Float32Array.of(gate, up), [1, 2, 1]),
          down: on.tensor(Float32Array.of(1), [1, 1, 1]),
        };
        const experts = expertSet({ ...one, activation: { kind: "clamped", limit: 2, alpha: 1 }, bias: false, params });
        const x = on.tensor(Float32Array.of(1), [1, 1]);
        return (await experts.apply(params, x, on.tensor(Int32Array.of(1), [1]), layout).output.data())[0] as number;
      }),
    );
    const [nine, two, minus, high, low] = outputs as [number, number, number, number, number];
    expect(nine).toBe(two);
    expect(two).toBeCloseTo(2 * sigmoid(2), 12);
    expect(minus).toBeCloseTo(-9 * sigmoid(-9), 12);
    expect(high).toBeCloseTo(3 * sigmoid(1), 12);
    expect(low).toBeCloseTo(-sigmoid(1), 12);
  });

  it("tells an observer the inputs of both matrices", () => {
    const on = makeEngine();
    const params = randomParams(on, sizes, true);
    const experts = expertSet({ ...sizes, activation: clamped, bias: true, params });
    const seen: [string, readonly number[]][] = [];
    experts.apply(
      params,
      on.tensor(new Float32Array(4 * 5), [4, 5]),
      on.tensor(Int32Array.of(1, 2, 4), [3]),
      layout,
      (name, rows) => seen.push([name, rows.shape]),
    );
    expect(seen).toEqual([
      ["gateUp", [4, 5]],
      ["down", [4, 7]],
    ]);
  });

  it("refuses parameters that are missing or of another shape", () => {
    const on = makeEngine();
    const { gateUp, down } = randomParams(on, sizes, false) as { gateUp: Tensor; down: Tensor };
    const make = (params: Tree, bias = false) => expertSet({ ...sizes, activation: clamped, bias, params });
    expect(() => make({ gateUp })).toThrow(ShapeError);
    expect(() => make({ gateUp: down, down })).toThrow('experts: parameter "gateUp" is [3,5,7], expected [3,14,5]');
    expect(() => make({ gateUp, down }, true)).toThrow("gateUpBias");
  });

  it("has gradients, none beyond the limit", async () => {
    const on = makeEngine(64);
    const params = randomParams(on, sizes, true);
    const x = random(on, 9).host("normal", rowCount * sizes.width);
    const loss = (given: Tree): Tensor => {
      const engine = leaf(given, "down").engine;
      const experts = expertSet({ ...sizes, activation: clamped, bias: true, params: given });
      const rows = engine.tensor(x, [rowCount, sizes.width]);
      return sum(experts.apply(given, rows, engine.tensor(Int32Array.from(ends), [3]), layout).output);
    };
    const { grads } = valueAndGrad((given) => [loss(given), []], params);
    const found = await leaf(grads, "gateUpBias").data();
    const { shape } = leaf(params, "gateUpBias");
    const start = await leaf(params, "gateUpBias").data();
    const step = 1e-5;
    for (let i = 0; i < start.length; i++) {
      const at = async (shift: number): Promise<number> => {
        const moved = Float64Array.from(start, (v, j) => (j === i ? v + shift : v));
        return (await loss({ ...params, gateUpBias: on.tensor(moved, shape) }).data())[0] as number;
      };
      expect(found[i]).toBeCloseTo(((await at(step)) - (await at(-step))) / (2 * step), 5);
    }
    expect(found.some((v) => v === 0)).toBe(true); // an expert without rows, and clipped values
  });
});
