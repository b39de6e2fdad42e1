import { random, type Tensor } from "@switchyard/core";
import { ffn, moeLayer, type Routed } from "@switchyard/core/moe";
import { routerContext, testRouter } from "@switchyard/testing";
import { describe, expect, it } from "vitest";
import { selecting } from "../test/families/parts.ts";
import { moGEFamily } from "../test/families/structured.ts";
import { learn } from "../test/learning.ts";
import { flat, float64, readVectors, results, sparse, tensor, unmet } from "../test/vectors.ts";
import { type ExpertMap, groupPenalty, type MoGEOptions, mapOf, moge } from "./moge.ts";
import { topK } from "./top-k.ts";

testRouter({ plugin: ({ k = 2 }) => moge({ k }), weights: "sum to 1" });
testRouter({
  plugin: ({ k = 2 }) =>
    moge({ k, order: "softmax-topk", bias: true, penalty: 0.1, scores: "relu", kernel: "gaussian", padding: "torus" }),
  weights: "sum to at most 1",
});
testRouter({
  plugin: ({ k = 2, experts }) =>
    moge({ k, penalty: 0.1, size: experts < 4 ? 1 : 2, kernel: "gaussian", padding: "valid", normalise: true }),
  sizes: { experts: 6, width: 5 },
  weights: "sum to 1",
});

describe("moge meets its vectors", () => {
  const { cases, tolerance } = readVectors("moge");
  it.each(cases.map((one) => [one.id, one] as const))("%s", async (_, one) => {
    expect(await unmet(moGEFamily, one, tolerance)).toEqual([]);
  });
});

const on = float64();

describe("groupPenalty", () => {
  const penalty = async (z: number[][], options: Parameters<typeof groupPenalty>[1] = {}): Promise<number> =>
    flat((await results(on, () => ({ value: groupPenalty(tensor(on, z), options) }))).value)[0] ?? Number.NaN;
  /** Every position looks at all others and asks how far away they are. */
  const oracle = (z: readonly number[], { height = 1, kernel = "uniform", padding = "zero" }: ExpertMap): number => {
    const width = z.length / height;
    const apart = (a: number, b: number, size: number): number => {
      const straight = Math.abs(a - b);
      return padding === "torus" ? Math.min(straight, size - straight) : straight;
    };
    return z.reduce((total, _, i) => {
      const local = z.reduce((sum, value, j) => {
        const down = apart(Math.floor(i / width), Math.floor(j / width), height);
        const right = apart(i % width, j % width, width);
        if (down > 1 || right > 1) return sum;
        return sum + (kernel === "uniform" ? 1 : Math.exp(-(down * down + right * right) / 2)) * value * value;
      }, 0);
      return total + Math.sqrt(local + 1e-8);
    }, 0);
  };
  const row = [0.5, -1, 2, 0.25, 1.5, -0.75, 3, -2, 0.1, 0.9, -0.3, 1.1];
  it.each(
    [1, 2, 3, 4, 12].flatMap((height) =>
      (["uniform", "gaussian"] as const).flatMap((kernel) =>
        (["zero", "torus"] as const).map((padding) => [height, kernel, padding] as const),
      ),
    ),
  )("meets distances counted by hand: height %i, %s, %s", async (height, kernel, padding) => {
    const map = { height, kernel, padding };
    expect(await penalty([row], map)).toBeCloseTo(oracle(row, map), 10);
  });
  it("with the options of the released code meets its convolution in loops", async () => {
    for (const [size, sigma] of [
      [1, 1],
      [2, 0.2],
      [3, 0.7],
    ] as const) {
      const [height, width] = [3, 4];
      const center = Math.floor(size / 2);
      const filter = Array.from({ length: size * size }, (_, i) =>
        Math.exp((-0.5 / sigma ** 2) * ((Math.floor(i / size) - center) ** 2 + ((i % size) - center) ** 2)),
      );
      const all = filter.reduce((a, b) => a + b);
      const roots: number[] = [];
      for (let top = 0; top + size <= height; top++)
        for (let left = 0; left + size <= width; left++) {
          const local = filter.reduce((total, weight, i) => {
            const z = row[(top + Math.floor(i / size)) * width + left + (i % size)] ?? Number.NaN;
            return total + (weight / all) * z * z;
          }, 0);
          roots.push(Math.sqrt(local + 1e-8));
        }
      const wanted = roots.reduce((a, b) => a + b) / size / size / roots.length;
      const map = { height, size, sigma, kernel: "gaussian", padding: "valid", normalise: true } as const;
      expect(await penalty([row], map)).toBeCloseTo(wanted, 10);
    }
  });
  it("on a torus, all windows as large as the map see all of it", async () => {
    const norm = Math.sqrt(row.reduce((total, z) => total + z * z, 0) + 1e-8);
    expect(await penalty([row], { height: 3, size: 5, padding: "torus" })).toBeCloseTo(12 * norm, 10);
  });
  it("is the mean over the real tokens, and 0 without one", async () => {
    const other = row.map((value) => 2 * value + 0.1);
    const map = { height: 3 };
    const [a, b] = [oracle(row, map), oracle(other, map)];
    expect(await penalty([row, other], map)).toBeCloseTo((a + b) / 2, 10);
    const masked = { ...map, mask: tensor(on, [0, 1]) };
    expect(await penalty([row, other], masked)).toBeCloseTo(b, 10);
    expect(await penalty([row, other], { ...map, mask: tensor(on, [0, 0]) })).toBe(0);
    expect(await penalty([[4]])).toBeCloseTo(4, 6);
  });
  it("the same values cost less close together than far apart", async () => {
    const [close, apart] = [new Array<number>(25).fill(0), new Array<number>(25).fill(0)];
    for (const i of [6, 7, 11, 12]) close[i] = 1;
    for (const i of [6, 8, 16, 18]) apart[i] = 1;
    expect(await penalty([close], { padding: "torus" })).toBeLessThan(await penalty([apart], { padding: "torus" }));
  });
});

describe("moge", () => {
  const logits = [
    [2, 0.5, -1, 1],
    [0, -2, 1.5, 0.25],
  ];
  const training = (options: MoGEOptions): Promise<Record<string, unknown>> =>
    results(on, (): Readonly<Record<string, Tensor>> => {
      const routed = selecting(on, moge(options), 4)(tensor(on, logits), { training: true });
      const { experts, weights } = sparse(routed);
      return { experts, weights, ...values(routed) };
    });
  const values = ({ losses }: Routed): Record<string, Tensor> =>
    Object.fromEntries(Object.entries(losses).map(([name, { value }]) => [name, value]));

  it("routes as topK does and adds one loss", async () => {
    const found = await training({ k: 2, balance: 0.02 });
    const plain = await results(on, (): Readonly<Record<string, Tensor>> => {
      const routed = selecting(on, topK({ k: 2, balance: 0.02 }), 4)(tensor(on, logits), { training: true });
      const { experts, weights } = sparse(routed);
      return { experts, weights, ...values(routed) };
    });
    const { group, ...rest } = found;
    expect(rest).toEqual(plain);
    expect(group).toBeGreaterThan(0);
  });
  it("with relu, negative logits cost nothing", async () => {
    const positive = logits.map((row) => row.map((value) => Math.max(value, 0)));
    const wanted = await results(on, () => ({ value: groupPenalty(tensor(on, positive)) }));
    expect((await training({ k: 1, scores: "relu" })).group).toEqual(wanted.value);
    expect((await training({ k: 1 })).group).not.toEqual(wanted.value);
  });
  it("evaluation and a weight of 0 have no such loss", async () => {
    expect(await training({ k: 1, penalty: 0 })).not.toHaveProperty("group");
    const evaluated = on.scope(() => Object.keys(selecting(on, moge({ k: 1 }), 4)(tensor(on, logits), {}).losses));
    expect(evaluated).toEqual([]);
  });
  it("a strong penalty keeps the logits smaller than a weak one while the layer learns", async () => {
    const x = Array.from({ length: 10 }, (_, i) => [Math.sin(2 * i), Math.cos(i), 1]);
    const run = async (penalty: number) => {
      const experts = ffn({ count: 4, width: 3, hidden: 4, engine: on, random: random(on, 1) });
      const layer = moeLayer(moge({ k: 2, penalty }), { engine: on, width: 3 }, { experts });
      const also = ({ logits: z }: Routed): Tensor => groupPenalty(z as Tensor);
      return learn(on, layer, { x, target: x, steps: 50, rate: 0.3, also });
    };
    const [weak, strong] = [await run(1e-6), await run(0.1)];
    expect(strong.also.at(-1)).toBeLessThan(0.8 * (weak.also.at(-1) ?? 0));
    for (const { error } of [weak, strong]) expect(error.at(-1)).toBeLessThan(0.8 * (error[0] ?? 0));
  });
  it("the squarest map is taken unless a height is given", () => {
    expect([1, 2, 7, 8, 12, 64].map((n) => mapOf(n).height)).toEqual([1, 1, 1, 2, 3, 8]);
    expect(mapOf(12, { height: 2 })).toEqual({ height: 2, width: 6 });
  });
  it("refuses options that cannot be", () => {
    const context = routerContext(on, { experts: 4 });
    expect(() => moge({ k: 1, penalty: -1 })).toThrow("moge: penalty = -1");
    expect(() => moge({ k: 1, height: 1.5 })).toThrow("moge: height = 1.5");
    expect(() => moge({ k: 1, kernel: "flat" as "uniform" })).toThrow('kernel = "flat"');
    expect(() => moge({ k: 1, padding: "mirror" as "zero" })).toThrow('padding = "mirror"');
    expect(() => moge({ k: 1, scores: "gelu" as "relu" })).toThrow('scores = "gelu"');
    expect(() => moge({ k: 1, size: 0 })).toThrow("moge: size = 0");
    expect(() => moge({ k: 1, sigma: 0 })).toThrow("moge: sigma = 0");
    expect(() => moge({ k: 1, padding: "valid" }).init(context)).toThrow("no window of 3 x 3 fits the map of 2 x 2");
    expect(() => moge({ k: 1, height: 3 }).init(context)).toThrow("4 experts do not fill a map of height 3");
    expect(() => moge({ k: 5 }).init(context)).toThrow("moge: k = 5 of 4 experts");
  });
});
