// Experts made from a dense network give its output again, in copies and in slices; new neurons replace as many as were asked for.
import { describe, expect, it } from "vitest";
import { cpu } from "../cpu/index.ts";
import { engine } from "../engine.ts";
import { random } from "../random.ts";
import { dispose, leaves, type Tensor, type Tree } from "../tensor.ts";
import { ffn, glu } from "./experts.ts";
import { layerInput, layerParams, moe, moeLayer } from "./layer.ts";
import { close, float64, floats, ids, noise, numbers } from "./moe.test-util.ts";
import type { Experts, RouterPlugin } from "./plan.ts";
import { type UpcycleOptions, upcycle } from "./upcycle.ts";

const e = float64();
const [width, hidden, tokens] = [3, 6, 4];
const fixed = (experts: readonly number[], weights: readonly number[]): RouterPlugin => ({
  name: "fixed",
  causal: { training: true, evaluation: true },
  needs: [],
  plans: ["sparse"],
  init: () => ({
    params: {},
    buffers: {},
    route: () => ({
      plan: {
        kind: "sparse",
        experts: ids(e, experts, [tokens, experts.length / tokens]),
        weights: floats(e, weights, [tokens, experts.length / tokens]),
      },
      losses: {},
    }),
  }),
});
async function output(experts: Experts, chosen: readonly number[], weights: readonly number[]): Promise<number[]> {
  const layer = moeLayer(fixed(chosen, weights), { engine: e, width }, { experts });
  const x = floats(e, noise(tokens * width), [tokens, width]);
  return numbers(e.scope(() => moe(layer, layerParams(layer), layerInput(layer, x)).output));
}
const made = (dense: Tree, options: Partial<UpcycleOptions> & { readonly count: number }): Tree =>
  e.scope(() => upcycle(dense, { random: random(e, 5), ...options }));
/** Biases of new experts are zero; these are not. */
const withBias = (params: Tree): Tree =>
  Object.fromEntries(
    leaves(params).map(([name, x], i) => [name, name.endsWith("Bias") ? floats(e, noise(x.size, i + 20), x.shape) : x]),
  );

describe.each([
  ["glu", glu],
  ["ffn", ffn],
] as const)("%s", (_, kind) => {
  const sizes = { width, bias: true };
  const dense = withBias(kind({ count: 1, hidden, ...sizes, engine: e, random: random(e, 1) }).params);
  const whole = kind({ count: 1, hidden, ...sizes, params: dense });
  const zeros = new Array<number>(tokens).fill(0);
  const ones = new Array<number>(tokens).fill(1);

  it("copies with weights that sum to 1 are the dense network", async () => {
    const experts = kind({ count: 4, hidden, ...sizes, params: made(dense, { count: 4 }) });
    const expected = await output(whole, zeros, ones);
    const weights = [0.25, 0.75, 0.5, 0.5, 1, 0, -1, 2];
    close(await output(experts, [0, 1, 2, 3, 3, 0, 1, 2], weights), expected);
  });
  it("one expert of every slice is the dense network, and `scale` makes up for weights that share 1", async () => {
    const expected = await output(whole, zeros, ones);
    const options = { count: 6, granularity: 3 };
    const own = { count: 6, hidden: hidden / 3, ...sizes };
    // Experts 0 and 3 hold the first third, 1 and 4 the second, 2 and 5 the last.
    const chosen = [0, 1, 2, 3, 4, 5, 5, 0, 4, 2, 1, 3];
    close(await output(kind({ ...own, params: made(dense, options) }), chosen, new Array(12).fill(1)), expected);
    close(
      await output(kind({ ...own, params: made(dense, { ...options, scale: 3 }) }), chosen, new Array(12).fill(1 / 3)),
      expected,
    );
  });
  it("draws the share of the neurons anew that was asked for, others in every expert", async () => {
    const changed = async (reinitialise: number): Promise<number[][]> => {
      const [was, now] = [made(dense, { count: 3 }), made(dense, { count: 3, reinitialise })];
      const downs = [was, now].map((tree) => new Map(leaves(tree)).get("down") as Tensor);
      const [a = [], b = []] = await Promise.all(downs.map(numbers)); // [3, width, hidden]
      return Array.from({ length: 3 }, (_, expert) =>
        Array.from({ length: hidden }, (_, j) =>
          Number(a[expert * width * hidden + j] !== b[expert * width * hidden + j]),
        ),
      );
    };
    const count = (row: readonly number[]): number => row.reduce((sum, x) => sum + x, 0);
    expect((await changed(0)).map(count)).toEqual([0, 0, 0]);
    expect((await changed(1)).map(count)).toEqual([hidden, hidden, hidden]);
    const some = await changed(0.3);
    expect(some.map(count)).toEqual([2, 2, 2]);
    expect(new Set(some.map((row) => row.join())).size).toBeGreaterThan(1);
  });
});

it("new neurons are as large as the old ones", async () => {
  const on = engine(cpu({ precision: 64 }));
  const dense = glu({ count: 1, width: 64, hidden: 64, engine: on, random: random(on, 1) }).params;
  const fresh = on.scope(() => upcycle(dense, { count: 2, reinitialise: 1, random: random(on, 2) }));
  const size = async (tree: Tree): Promise<Map<string, number>> =>
    new Map(
      await Promise.all(
        leaves(tree).map(async ([name, x]) => {
          const values = await numbers(x);
          return [name, Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length)] as const;
        }),
      ),
    );
  const [was, now] = [await size(dense), await size(fresh)];
  for (const [name, x] of now) expect(x / (was.get(name) ?? 0)).toBeCloseTo(1, 1);
  dispose([dense, fresh]);
  expect(on.live()).toBe(0);
});

it("refuses what does not fit", () => {
  const dense = ffn({ count: 1, width, hidden, engine: e, random: random(e, 1) }).params;
  const two = ffn({ count: 2, width, hidden, engine: e, random: random(e, 1) }).params;
  expect(() => made(dense, { count: 2, granularity: 4 })).toThrow("6 neurons do not split into 4 slices");
  expect(() => made(dense, { count: 0 })).toThrow("count 0 and granularity 1");
  expect(() => made(dense, { count: 2, reinitialise: 2 })).toThrow("reinitialise = 2; expected a share");
  expect(() => made(two, { count: 2 })).toThrow('"up" is f32 [2, 6, 3]; expected [1, rows, columns]');
  expect(() => made({ down: floats(e, [1], [1, 1, 1]) }, { count: 2 })).toThrow('"up" is missing among down');
});
