// The experts of muMoE: single experts' matrices, start values, what is never built, refusals. That they compute what their equations
// say is held by the suite of experts.
import { describe, expect, it } from "vitest";
import { counted } from "../counted.ts";
import { ShapeError, UnsupportedError } from "../errors.ts";
import { close, float64, floats, ids, noise, numbers } from "../moe/moe.test-util.ts";
import { linear } from "../ops/matmul.ts";
import { random } from "../random.ts";
import { dispose, leaves, mapTree, type Tensor } from "../tensor.ts";
import { muMoEExperts } from "./mu-moe.ts";

const layout = { batch: 1, sequence: 3, past: 0 };

describe("muMoEExperts", () => {
  it.each([
    ["cp", [6], 4, true],
    ["cp", [2, 3], 4, false],
    ["tr", [6], [2, 3, 4], true],
    ["tr", [3, 2], [2, 3, 4, 2], true],
  ] as const)("the matrix of one expert does what the expert does: %s, modes %j", async (form, modes, rank, bias) => {
    const e = float64();
    const sizes = { count: 6, width: 3, output: 5, form, modes, rank, bias } as const;
    const experts = muMoEExperts({ ...sizes, engine: e, random: random(e, 3) });
    expect(experts.layers).toEqual(["linear"]);
    const before = e.live();
    for (let n = 0; n < 6; n++) {
      const { matrix, bias: shift } = experts.expertMatrix(experts.params, n);
      expect(matrix.shape).toEqual([5, 3]);
      expect(shift?.shape).toEqual(bias ? [5] : undefined);
      const [found, expected] = e.scope(() => {
        const x = floats(e, noise(9, 5), [3, 3]);
        const ends = ids(
          e,
          Array.from({ length: 6 }, (_, i) => (i >= n ? 3 : 0)),
          [6],
        );
        return [linear(x, matrix, shift), experts.apply(experts.params, x, ends, layout).output] as const;
      });
      close(await numbers(found), await numbers(expected));
      dispose([matrix, found, expected, ...(shift ? [shift] : [])]);
    }
    expect(e.live()).toBe(before);
  });

  it("looks into each of two layers", () => {
    const e = float64();
    const experts = muMoEExperts({ count: 2, width: 3, hidden: 4, rank: 2, engine: e, random: random(e, 3) });
    expect(experts.layers).toEqual(["up", "down"]);
    expect(experts.expertMatrix(experts.params, 1).matrix.shape).toEqual([4, 3]);
    expect(experts.expertMatrix(experts.params, 1, "down").matrix.shape).toEqual([3, 4]);
    expect(() => experts.expertMatrix(experts.params, 1, "gate")).toThrow('no layer "gate"; the layers are up, down');
    expect(() => experts.expertMatrix(experts.params, 2)).toThrow("expert 2 of 2");
  });

  it("never builds a mixed matrix, and costs what its factors cost, not what its experts cost", async () => {
    const root = float64();
    const [count, width, rank, tokens] = [500, 32, 8, 6];
    const made = muMoEExperts({ count, width, rank, engine: root, random: random(root, 3) });
    const on = counted(root);
    const params = mapTree(made.params, (x) => on.tensor(new Float64Array(x.size), x.shape));
    on.scope(() => {
      const plan = {
        kind: "merge",
        groups: on.tensor(Int32Array.from([0, 1, 2, 3, 4, 5]), [tokens]),
        coefficients: [on.tensor(new Float64Array(tokens * count), [tokens, count])],
      } as const;
      made.mixed(params, on.tensor(new Float64Array(tokens * width), [tokens, width]), plan);
    });
    await on.settle();
    const flops = [...on.counts.values()].reduce((total, { flops }) => total + flops, 0);
    const factors = 2 * tokens * rank * (count + 2 * width);
    expect(flops).toBeGreaterThanOrEqual(factors);
    // Beside the products: sums and copies of [tokens, rank or width].
    expect(flops).toBeLessThan(factors + 4 * tokens * (rank + width) + rank);
    // Mixing the matrices would take tokens * count * width² multiplications.
    expect(flops).toBeLessThan((2 * tokens * count * width * width) / 50);
    dispose(params);
  });

  it("starts as the paper says: N(1, 1) for the first mode, ones for the second, uniform for inputs and outputs", async () => {
    const e = float64();
    const sizes = { count: 400, modes: [100, 4], width: 8, output: 6, engine: e, random: random(e, 5) } as const;
    const read = async (experts: { readonly params: Parameters<typeof leaves>[0] }) =>
      Object.fromEntries(
        await Promise.all(
          leaves(experts.params).map(async ([path, x]): Promise<[string, number[]]> => [path, await numbers(x)]),
        ),
      );
    const cp = await read(muMoEExperts({ ...sizes, rank: 30 }));
    const first = cp["shared.linearMode0"] ?? [];
    const mean = first.reduce((a, b) => a + b, 0) / first.length;
    const variance = first.reduce((a, b) => a + (b - mean) ** 2, 0) / first.length;
    expect(Math.abs(mean - 1)).toBeLessThan(0.1);
    expect(Math.abs(variance - 1)).toBeLessThan(0.1);
    expect(new Set(cp["shared.linearMode1"])).toEqual(new Set([1]));
    for (const [name, inputs] of [
      ["shared.linearInput", 9],
      ["shared.linearBias", 9],
      ["shared.linearOutput", 30],
    ] as const) {
      const largest = Math.max(...(cp[name] ?? []).map(Math.abs));
      expect(largest).toBeLessThanOrEqual(1 / Math.sqrt(inputs));
      expect(largest).toBeGreaterThan(0.8 / Math.sqrt(inputs));
    }
    const tr = await read(muMoEExperts({ ...sizes, form: "tr", rank: [2, 3, 2, 4] }));
    const slice = (tr["shared.linearMode0"] ?? []).slice(0, 6); // [2, 3]
    expect(slice.map((x) => x !== 0)).toEqual([true, false, false, false, true, false]);
    expect((tr["shared.linearMode1"] ?? []).slice(0, 6)).toEqual([1, 0, 0, 1, 0, 0]); // [3, 2]
  });

  it("refuses plans and options that do not fit", () => {
    const e = float64();
    const more = { width: 3, rank: 2, engine: e, random: random(e, 1) };
    const experts = muMoEExperts({ ...more, count: 6, modes: [2, 3] });
    const x = floats(e, noise(6), [2, 3]);
    const mix =
      (groups: number[], ...coefficients: Tensor[]) =>
      () =>
        experts.mixed(experts.params, x, { kind: "merge", groups: ids(e, groups, [groups.length]), coefficients });
    const [two, three] = [floats(e, [1, 0], [1, 2]), floats(e, [1, 0, 0], [1, 3])];
    expect(mix([0, 0], two, three)).not.toThrow();
    expect(mix([0, 0], two)).toThrow(UnsupportedError);
    expect(mix([0, 0], two)).toThrow("2 expert modes, the merge plan has 1");
    expect(mix([0, 0], three, two)).toThrow("coefficients of mode 0 are f32 [1, 3]");
    expect(mix([0], two, three)).toThrow("expected one per token");
    expect(() => muMoEExperts({ ...more, count: 5, modes: [2, 3] })).toThrow("make 6 experts");
    expect(() => muMoEExperts({ ...more, count: 2, modes: [] })).toThrow(ShapeError);
    expect(() => muMoEExperts({ ...more, count: 2, rank: [1, 2] })).toThrow("expected one whole number");
    expect(() => muMoEExperts({ ...more, count: 2, form: "tr", rank: [1, 2] })).toThrow("expected 3 whole numbers");
    expect(() => muMoEExperts({ ...more, count: 2, rank: 0 })).toThrow(ShapeError);
    expect(() => muMoEExperts({ ...more, count: 2, form: "tucker" as "cp" })).toThrow(UnsupportedError);
  });
});
