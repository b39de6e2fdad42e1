// Latent experts: conversions of trained experts, the saving of the fused path, refusals. That they compute what their equations say
// is held by the suite of experts.
import { describe, expect, it } from "vitest";
import { counted } from "../counted.ts";
import { ShapeError } from "../errors.ts";
import { denseToMoLAE } from "../factors/dense-to-molae.ts";
import { svd } from "../factors/svd.ts";
import { ffn, glu } from "../moe/experts.ts";
import { close, float64, floats, ids, noise, numbers } from "../moe/moe.test-util.ts";
import { cast } from "../ops/elementwise.ts";
import { random } from "../random.ts";
import { dispose, leaves, mapTree, type Tensor, type Tree } from "../tensor.ts";
import { molae, molaeToDense } from "./molae.ts";

const [count, width, hidden] = [4, 5, 3];
const layout = { batch: 1, sequence: 6, past: 0 };
const leaf = (tree: Tree, name: string): Promise<number[]> => {
  const found = leaves(tree).find(([path]) => path === name)?.[1];
  if (!found) throw new Error(`no ${name} among ${leaves(tree).map(([path]) => path)}`);
  return numbers(found);
};
const norm = (x: readonly number[]): number => Math.sqrt(x.reduce((t, v) => t + v * v, 0));

describe("denseToMoLAE", () => {
  it.each([
    ["glu", true, "latent"],
    ["glu", true, "full"],
    ["ffn", false, "latent"],
  ] as const)("with the full rank gives the same experts: %s with biases, down %s", async (_, gated, down) => {
    const e = float64();
    const sizes = { count, width, hidden, bias: true, activation: "silu", engine: e, random: random(e, 3) } as const;
    const dense = gated ? glu(sizes) : ffn(sizes);
    const biased = mapTree(dense.params, (x, path) =>
      path.endsWith("Bias") ? floats(e, noise(x.size, 7), x.shape) : x,
    );
    const before = e.live();
    const { params, report } = await denseToMoLAE(biased, { group: 2, latent: 5, down });
    expect(e.live() - before).toBe(leaves(params).length);
    const made = molae({ count, width, hidden, latent: 5, group: 2, gated, bias: true, down, params });
    const given = e.scope(() => {
      const x = floats(e, noise(30, 5), [6, 5]);
      const ends = ids(e, [1, 3, 3, 6], [4]);
      return [made.apply(params, x, ends, layout).output, dense.apply(biased, x, ends, layout).output];
    });
    const [found, expected] = await Promise.all(given.map(numbers));
    close(found ?? [], expected ?? [NaN]);
    expect(Object.keys(report).sort()).toEqual(
      [...(gated ? ["gate"] : []), ...(down === "latent" ? ["down"] : []), "up"].sort(),
    );
    for (const one of Object.values(report)) expect(one).toMatchObject({ relative: 0, parts: [0, 0] });
    const back = e.scope(() => molaeToDense(params));
    expect(
      leaves(back)
        .map(([path]) => path)
        .sort(),
    ).toEqual(
      leaves(biased)
        .map(([path]) => path)
        .sort(),
    );
    for (const [path] of leaves(biased)) close(await leaf(back, path), await leaf(biased, path));
  });

  it("truncated, is the best there is per group: the errors are the singular values cut off", async () => {
    const e = float64();
    const dense = ffn({ count, width, hidden, engine: e, random: random(e, 3) }).params;
    const { params, report } = await denseToMoLAE(dense, { group: 2, latent: 2 });
    const back = e.scope(() => molaeToDense(params));
    for (const name of ["up", "down"]) {
      const [given, made] = [await leaf(dense, name), await leaf(back, name)];
      const half = given.length / 2;
      [0, 1].forEach((g) => {
        const [a, b] = [given.slice(g * half, (g + 1) * half), made.slice(g * half, (g + 1) * half)];
        const error = norm(a.map((v, i) => v - (b[i] ?? NaN))) / norm(a);
        expect(report[name]?.parts[g]).toBeCloseTo(error, 12);
        const values = report[name]?.singularValues[g] ?? new Float64Array(0);
        expect(values.length).toBe(5);
        expect(error).toBeCloseTo(norm([...values].slice(2)) / norm([...values]), 12);
      });
      const all = norm(given.map((v, i) => v - (made[i] ?? NaN))) / norm(given);
      expect(report[name]?.relative).toBeCloseTo(all, 12);
    }
    // The stack of the first group's up matrices, as they lie one below the other.
    const stack = (await leaf(dense, "up")).slice(0, 2 * hidden * width);
    close([...(report.up?.singularValues[0] ?? [])], [...svd({ data: stack, rows: 2 * hidden, columns: width }).s]);
  });

  it("gives experts that share a matrix their group back without loss at a small latent", async () => {
    const e = float64();
    const one = noise(hidden * width, 2);
    const [up, down] = [
      floats(e, [...one, ...one.map((x) => -2 * x)], [2, hidden, width]),
      floats(e, noise(2 * width * hidden, 4), [2, width, hidden]),
    ];
    const { report } = await denseToMoLAE({ up, down }, { group: 2, latent: 3 });
    expect(report.up?.relative).toBe(0);
    expect(report.down?.relative).toBeGreaterThan(0.01);
    const { report: apart } = await denseToMoLAE({ up, down }, { group: 2, latent: 2, down: "full" });
    expect(apart.up?.relative).toBeGreaterThan(0.01);
    expect(apart.down).toBeUndefined();
  });

  it("reads weights in bf16", async () => {
    const e = float64();
    const wide = ffn({ count, width, hidden, engine: e, random: random(e, 3) }).params;
    const narrow = mapTree(wide, (x) => cast(x, "bf16"));
    const { params } = await denseToMoLAE(narrow, { group: 2, latent: 5 });
    const back = e.scope(() => molaeToDense(params));
    const rounded = e.scope(() => mapTree(narrow, (x) => cast(x, "f32")));
    for (const name of ["up", "down"]) close(await leaf(back, name), await leaf(rounded, name));
  });

  it("refuses groups and latents that do not fit", async () => {
    const e = float64();
    const dense = ffn({ count, width, hidden, engine: e, random: random(e, 3) }).params;
    await expect(denseToMoLAE(dense, { group: 3, latent: 2 })).rejects.toThrow("4 experts in groups of 3");
    await expect(denseToMoLAE(dense, { group: 1, latent: 4 })).rejects.toThrow("rank 3 at most");
    await expect(denseToMoLAE(dense, { group: 2, latent: 0 })).rejects.toThrow(ShapeError);
    await expect(denseToMoLAE({}, { group: 2, latent: 1 })).rejects.toThrow("no parameters");
    const { up } = dense as { up: Tensor };
    const holed = floats(e, [NaN, ...noise(count * width * hidden - 1)], [count, width, hidden]);
    const before = e.live();
    await expect(denseToMoLAE({ up, down: holed }, { group: 2, latent: 2 })).rejects.toThrow("entry 0 is NaN");
    expect(e.live()).toBe(before);
    const wrong = { count, width, hidden, latent: 2, down: JSON.parse('"whole"'), engine: e, random: random(e, 3) };
    expect(() => molae(wrong)).toThrow('down = "whole"; expected "latent" or "full"');
    await expect(denseToMoLAE(dense, { group: 2, ...wrong })).rejects.toThrow('down = "whole"');
  });
});

describe("molae", () => {
  it("multiplies with the shared maps once per token and group on the fused path", async () => {
    const root = float64();
    const sizes = { count: 8, width: 16, hidden: 2, latent: 4, group: 4 };
    const made = molae({ ...sizes, engine: root, random: random(root, 1) });
    const on = counted(root);
    const params = mapTree(made.params, (x) => on.tensor(new Float64Array(x.size), x.shape));
    // Five tokens with four experts each: two groups for tokens 0 and 1, one for the others, one slot empty: 7 pairs, 19 rows.
    const chosen = [0, 4, 1, 5, 7, 6, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 3, 2, -1, 1];
    on.scope(() => {
      made.fused?.(params, on.tensor(new Float64Array(5 * 16), [5, 16]), {
        kind: "sparse",
        experts: on.tensor(Int32Array.from(chosen), [5, 4]),
        weights: on.tensor(new Float64Array(20), [5, 4]),
      });
    });
    await on.settle();
    const { latent, hidden: inner } = sizes;
    const [maps, own] = [3 * 16 * latent, 3 * latent * inner];
    expect(on.counts.get("groupedMatmul")).toMatchObject({ calls: 6, flops: 2 * (7 * maps + 19 * own) });
    dispose(params);
  });

  it("keeps to the plan's bound, and takes no tokens and no slots", async () => {
    const e = float64();
    const made = molae({ count: 4, width: 3, hidden: 2, latent: 2, group: 2, engine: e, random: random(e, 1) });
    const run = (shape: readonly [number, number], bound?: number): Promise<number[]> =>
      numbers(
        e.scope(() => {
          const n = shape[0] * shape[1];
          const plan = {
            kind: "sparse",
            experts: ids(
              e,
              Array.from({ length: n }, (_, i) => (i % 3 === 0 ? i % 4 : -1)),
              shape,
            ),
            weights: floats(e, noise(n, 8), shape),
            ...(bound === undefined ? {} : { bound }),
          } as const;
          return made.fused?.(made.params, floats(e, noise(shape[0] * 3, 9), [shape[0], 3]), plan) as Tensor;
        }),
      );
    close(await run([4, 3], 4), await run([4, 3]));
    expect(await run([0, 2])).toEqual([]);
    expect(await run([2, 0])).toEqual([0, 0, 0, 0, 0, 0]);
  });

  it("has fewer parameters, and refuses what does not fit", () => {
    const e = float64();
    const more = { count: 4, width: 6, hidden: 4, engine: e, random: random(e, 1) };
    const size = (tree: Tree): number => leaves(tree).reduce((total, [, x]) => total + x.size, 0);
    const made = molae({ ...more, latent: 2 });
    expect(size(made.params)).toBe(3 * (4 * 4 * 2 + 2 * 6));
    expect(size(molae({ ...more, latent: 2, down: "full" }).params)).toBe(2 * (4 * 4 * 2 + 2 * 6) + 4 * 6 * 4);
    expect(() => molae({ ...more, latent: 2, group: 3 })).toThrow("choose a divisor of 4");
    expect(() => molae({ ...more, latent: 0 })).toThrow(ShapeError);
    expect(molae({ ...more, latent: 2, bias: true }).fused).toBeUndefined();
  });
});
