// Experts of few dimensions: the reconstruction loss by hand, how many parameters, what is refused; adapters and prompts: how new
// ones start. The suite of experts holds them to the rest.
import { describe, expect, test } from "vitest";
import { ShapeError } from "../errors.ts";
import { close, float64, floats, ids, noise, numbers, row } from "../moe/moe.test-util.ts";
import { random } from "../random.ts";
import { leaves, type Tensor, type Tree } from "../tensor.ts";
import { adapter } from "./adapter.ts";
import { lowDimensional } from "./low-dimensional.ts";
import { prompt } from "./prompt.ts";

const layout = { batch: 1, sequence: 4, past: 0 };
const size = (params: Tree): number => leaves(params).reduce((total, [, x]) => total + x.size, 0);

describe("lowDimensional", () => {
  test("the reconstruction loss is the mean squared error of the rows that an expert has", async () => {
    const e = float64();
    const [count, width, low, hidden, n] = [2, 3, 2, 2, 4];
    for (const encoder of ["shared", "own"] as const) {
      const { params, apply } = lowDimensional({
        count,
        width,
        low,
        hidden,
        encoder,
        engine: e,
        random: random(e, 1),
      });
      const found = new Map(leaves(params));
      const at = async (name: string): Promise<number[]> =>
        numbers(found.get(encoder === "shared" ? `shared.${name}` : name) as Tensor);
      const [enc, dec, x] = [await at("encoder"), await at("decoder"), noise(n * width)];
      const { losses } = apply(params, floats(e, x, [n, width]), ids(e, [1, 3], [2]), layout);
      let total = 0;
      for (const [t, expert] of [0, 1, 1].entries()) {
        const first = encoder === "shared" ? 0 : expert * low * width;
        const own = row(x, t, width);
        const code = [0, 1].map((i) => own.reduce((sum, v, j) => sum + v * (enc[first + i * width + j] ?? 0), 0));
        for (const [j, v] of own.entries()) {
          const back = code.reduce((sum, c, i) => sum + c * (dec[first + j * low + i] ?? 0), 0);
          total += (back - v) ** 2;
        }
      }
      const loss = losses?.reconstruction;
      if (!loss) throw new Error("no reconstruction loss");
      close(await numbers(loss.value), [total / 3]);
      expect(loss.weight).toBe(0.1);
    }
  });

  test("is 0 where the tokens lie in the space that the encoder keeps, and absent with weight 0", async () => {
    const e = float64();
    const params = {
      shared: { encoder: floats(e, [1, 0, 0, 0, 1, 0], [2, 3]), decoder: floats(e, [1, 0, 0, 1, 0, 0], [3, 2]) },
      up: floats(e, noise(4), [1, 2, 2]),
      down: floats(e, noise(4), [1, 2, 2]),
    };
    const sizes = { count: 1, width: 3, low: 2, hidden: 2, bias: false, params };
    const rows = floats(e, [1, 2, 0, -3, 4, 0], [2, 3]);
    const { losses } = lowDimensional(sizes).apply(params, rows, ids(e, [2], [1]), layout);
    expect(await numbers(losses?.reconstruction?.value as Tensor)).toEqual([0]);
    expect(lowDimensional({ ...sizes, reconstruction: 0 }).apply(params, rows, ids(e, [2], [1]), layout).losses).toBe(
      undefined,
    );
  });

  test("only encoder and decoder grow with the width", () => {
    const e = float64();
    const from = { engine: e, random: random(e, 1) };
    const count = 4;
    const grown = (encoder: "shared" | "own"): number => {
      const at = (width: number): number =>
        size(lowDimensional({ count, width, low: 2, hidden: 8, encoder, ...from }).params);
      return (at(64) - at(32)) / 32;
    };
    expect(grown("shared")).toBe(2 * 2);
    expect(grown("own")).toBe(count * 2 * 2);
  });

  test("impossible sizes are refused", () => {
    const e = float64();
    const sizes = { count: 2, width: 4, low: 2, hidden: 3, engine: e, random: random(e, 1) };
    expect(() => lowDimensional({ ...sizes, low: 5 })).toThrow("low = 5 of width 4");
    expect(() => lowDimensional({ ...sizes, reconstruction: -1 })).toThrow("reconstruction = -1");
    expect(() => lowDimensional({ ...sizes, out: 0 })).toThrow("out = 0");
    expect(() => lowDimensional({ ...sizes, encoder: "none" as "own" })).toThrow('encoder = "none"');
    expect(e.live()).toBe(0);
  });
});

describe("adapter", () => {
  test("new weights stay within gain sqrt(6 / (in + out)), biases are zero", async () => {
    const e = float64();
    const { params } = adapter({ count: 2, width: 20, hidden: 4, bias: true, engine: e, random: random(e, 1) });
    const bound = 1e-4 * Math.sqrt(6 / 24);
    const all = new Map(leaves(params));
    for (const name of ["down", "up"]) {
      const found = (await numbers(all.get(name) as Tensor)).map(Math.abs);
      expect(Math.max(...found)).toBeLessThanOrEqual(bound);
      expect(Math.max(...found)).toBeGreaterThan(0.9 * bound);
    }
    for (const name of ["downBias", "upBias"])
      expect(new Set(await numbers(all.get(name) as Tensor))).toEqual(new Set([0]));
  });
  test("impossible sizes are refused", () => {
    const e = float64();
    const sizes = { count: 2, width: 4, engine: e, random: random(e, 1) };
    expect(() => adapter({ ...sizes, hidden: 0 })).toThrow("adapter: hidden = 0");
    expect(() => adapter({ ...sizes, scale: Number.POSITIVE_INFINITY })).toThrow(ShapeError);
  });
});

describe("prompt", () => {
  test("new ones give zeros, and their gate moves them", async () => {
    const e = float64();
    const { params, apply } = prompt({ count: 2, width: 4, heads: 2, length: 3, engine: e, random: random(e, 1) });
    const rows = floats(e, noise(8), [2, 4]);
    const output = async (given: Tree): Promise<number[]> =>
      numbers(apply(given, rows, ids(e, [1, 2], [2]), layout).output);
    expect(new Set(await output(params))).toEqual(new Set([0]));
    const opened = { ...(params as Readonly<Record<string, Tensor>>), gate: floats(e, [1, 0, 0, 0], [2, 2]) };
    const moved = await output(opened);
    // Expert 0, head 0 alone.
    expect(moved.map((value) => value !== 0)).toEqual([true, true, false, false, false, false, false, false]);
  });
  test("heads must divide the width", () => {
    const e = float64();
    const sizes = { count: 2, width: 4, engine: e, random: random(e, 1) };
    expect(() => prompt({ ...sizes, heads: 3 })).toThrow("prompt: 3 heads of width 4");
    expect(() => prompt({ ...sizes, heads: 2, length: 0 })).toThrow("length = 0");
  });
});
