// Experts as matrix product operators: conversions of trained experts, the two ways to evaluate, what is shared, refusals. That they
// compute what their equations say is held by the suite of experts.
import { describe, expect, it } from "vitest";
import { autodiff, grad, watch } from "../autodiff.ts";
import { counted } from "../counted.ts";
import { cpu } from "../cpu/index.ts";
import { engine } from "../engine.ts";
import { ShapeError } from "../errors.ts";
import { denseToMpo } from "../factors/dense-to-mpo.ts";
import { mpoParameterCount } from "../factors/mpo-decompose.ts";
import { ffn, glu } from "../moe/experts.ts";
import { close, float64, floats, ids, noise, numbers } from "../moe/moe.test-util.ts";
import type { Experts } from "../moe/plan.ts";
import { sum } from "../ops/reduce.ts";
import { random } from "../random.ts";
import { dispose, leaves, mapTree, type Tensor } from "../tensor.ts";
import { mpo, mpoToDense } from "./mpo.ts";

const form = { widthDims: [3, 2], hiddenDims: [2, 4] };
const layout = { batch: 1, sequence: 6, past: 0 };
const ends = [2, 2, 6];
const rows = noise(36, 5);
const outputOf = (e: ReturnType<typeof float64>, experts: Experts): Promise<number[]> =>
  numbers(e.scope(() => experts.apply(experts.params, floats(e, rows, [6, 6]), ids(e, ends, [3]), layout).output));

describe("denseToMpo", () => {
  it.each([
    ["ffn", false],
    ["glu", true],
  ] as const)("makes of one dense network experts that all give what it gives: %s with biases", async (_, gated) => {
    const e = float64();
    const sizes = { width: 6, hidden: 8, bias: true, activation: "silu", engine: e, random: random(e, 3) } as const;
    const dense = gated ? glu({ count: 1, ...sizes }) : ffn({ count: 1, ...sizes });
    const biased = mapTree(dense.params, (x, path) =>
      path.endsWith("Bias") ? floats(e, noise(x.size, 7), x.shape) : x,
    );
    const before = e.live();
    const { params, report } = await denseToMpo(biased, { ...form, count: 3 });
    expect(e.live() - before).toBe(leaves(params).length);
    const experts = mpo({ count: 3, ...form, gated, bias: true, activation: "silu", params });
    const one = e.scope(() => dense.apply(biased, floats(e, rows, [6, 6]), ids(e, [6], [1]), layout).output);
    close(await outputOf(e, experts), await numbers(one));
    for (const name of [gated ? "gateUp" : "up", "down"]) {
      expect(report[name]).toMatchObject({ relative: 0, parts: [0] });
    }
    // And back: the same matrices.
    const back = e.scope(() => mpoToDense(params, { ...form, count: 3, gated }));
    for (const [path, x] of leaves(back)) {
      const wanted = await numbers(leaves(biased).find(([name]) => name === path)?.[1] as Tensor);
      close(await numbers(x), [...wanted, ...wanted, ...wanted]);
    }
  });

  it("decomposes the mean of several experts, and says how far each is from it", async () => {
    const e = float64();
    const dense = ffn({ count: 2, width: 6, hidden: 8, bias: true, engine: e, random: random(e, 3) });
    const upBias = floats(e, noise(16, 4), [2, 8]);
    const { params, report } = await denseToMpo({ ...(dense.params as object), upBias }, { ...form, count: 3 });
    const back = e.scope(() => mpoToDense(params, { ...form, count: 3 })) as { up: Tensor; upBias: Tensor };
    const given = await numbers((dense.params as { up: Tensor }).up);
    const mean = Array.from({ length: 48 }, (_, i) => ((given[i] ?? NaN) + (given[48 + i] ?? NaN)) / 2);
    close(await numbers(back.up), [...mean, ...mean, ...mean]);
    const biases = await numbers(upBias);
    const meanBias = Array.from({ length: 8 }, (_, i) => ((biases[i] ?? NaN) + (biases[8 + i] ?? NaN)) / 2);
    close(await numbers(back.upBias), [...meanBias, ...meanBias, ...meanBias]);
    const norm = (x: readonly number[]): number => Math.sqrt(x.reduce((t, v) => t + v * v, 0));
    const own = [0, 1].map((i) => given.slice(48 * i, 48 * (i + 1)));
    close(
      [...(report.up?.parts ?? [])],
      own.map((w) => norm(w.map((v, i) => v - (mean[i] ?? NaN))) / norm(w)),
    );
    const differences = own.flatMap((w) => w.map((v, i) => v - (mean[i] ?? NaN)));
    expect(report.up?.relative).toBeCloseTo(norm(differences) / norm(given), 10);
  });

  it("with truncated bonds has fewer parameters and reports the error of the matrices it made", async () => {
    const e = float64();
    const dense = ffn({ count: 1, width: 6, hidden: 8, engine: e, random: random(e, 3) });
    const cut = { ...form, bond: 4, count: 3 };
    const { params, report } = await denseToMpo(dense.params, cut);
    const back = e.scope(() => mpoToDense(params, cut)) as { up: Tensor };
    const [made, given] = [await numbers(back.up), await numbers((dense.params as { up: Tensor }).up)];
    const square = (x: readonly number[]): number => x.reduce((t, v) => t + v * v, 0);
    const error = Math.sqrt(square(given.map((v, i) => v - (made[i] ?? NaN))) / square(given));
    expect(report.up?.relative).toBeCloseTo(error, 12);
    expect(error).toBeGreaterThan(0.01);
    expect(report.up?.bonds).toEqual([4]);
    expect(report.up?.singularValues[0]?.length).toBe(6);
    const { shared } = mpoParameterCount({ inputDims: [3, 2], outputDims: [2, 4], bond: 4, experts: 3 });
    const own = leaves(params).filter(([path]) => path.startsWith("up") || path.startsWith("shared.up"));
    expect(own.reduce((total, [, x]) => total + x.size, 0)).toBe(shared);
  });

  it("refuses other params and dims that do not fit", async () => {
    const e = float64();
    const dense = ffn({ count: 1, width: 6, hidden: 8, engine: e, random: random(e, 3) }).params;
    await expect(denseToMpo({ up: floats(e, [1], [1]) }, { ...form, count: 2 })).rejects.toThrow(
      "expected those of glu or ffn",
    );
    await expect(denseToMpo(dense, { ...form, hiddenDims: [2, 3], count: 2 })).rejects.toThrow("up is [1, 8, 6]");
    await expect(denseToMpo(dense, { ...form, count: 0 })).rejects.toThrow(ShapeError);
    const { up } = dense as { up: Tensor };
    const before = e.live();
    const holed = floats(e, [NaN, ...noise(47)], [1, 6, 8]);
    await expect(denseToMpo({ up, down: holed }, { ...form, count: 2 })).rejects.toThrow("entry 0 is NaN");
    expect(e.live()).toBe(before + 1);
    await expect(denseToMpo({ up, down: up }, { ...form, count: 2 })).rejects.toThrow("do not belong together");
  });
});

describe("mpo", () => {
  it("takes the way with fewer multiplications for that number of rows", async () => {
    const root = engine(cpu());
    const sizes = { count: 3, widthDims: [8, 1, 8], hiddenDims: [8, 2, 8], bond: 8 };
    const made = mpo({ ...sizes, engine: root, random: random(root, 1) });
    const flops = async (evaluation: "auto" | "reconstruct" | "contract", n: number): Promise<number> => {
      const watching = counted(root);
      const params = mapTree(made.params, (x) => watching.tensor(new Float32Array(x.size), x.shape));
      const experts = mpo({ ...sizes, evaluation, params });
      watching.scope(() => {
        const x = watching.tensor(new Float32Array(n * 64), [n, 64]);
        const blocks = watching.tensor(Int32Array.of(n, n, n), [3]);
        experts.apply(params, x, blocks, { batch: 1, sequence: n, past: 0 });
      });
      await watching.settle();
      dispose(params);
      const products = ["matmul", "groupedMatmul"].map((name) => watching.counts.get(name)?.flops ?? 0);
      return products.reduce((a, b) => a + b, 0);
    };
    for (const [n, cheaper, dearer] of [
      [1, "contract", "reconstruct"],
      [2000, "reconstruct", "contract"],
    ] as const) {
      const [auto, best, other] = [await flops("auto", n), await flops(cheaper, n), await flops(dearer, n)];
      expect(auto).toBe(best);
      expect(best).toBeLessThan(other);
    }
    dispose(made.params);
  });

  it("starts with matrices of variance 1 / inputs", async () => {
    const e = float64();
    const sizes = { widthDims: [4, 4, 2], hiddenDims: [4, 2, 8], bond: 6, count: 40 };
    const made = mpo({ ...sizes, engine: e, random: random(e, 2) });
    const { up, down } = e.scope(() => mpoToDense(made.params, sizes)) as { up: Tensor; down: Tensor };
    for (const [x, inputs] of [
      [up, 32],
      [down, 64],
    ] as const) {
      const values = await numbers(x);
      const variance = values.reduce((t, v) => t + v * v, 0) / values.length;
      expect(variance * inputs).toBeGreaterThan(0.4);
      expect(variance * inputs).toBeLessThan(2.5);
    }
  });

  it("sends the gradients of all experts into the one central core", async () => {
    const e = float64();
    const made = mpo({ count: 3, ...form, engine: e, random: random(e, 2) });
    const slopes = e.scope(() => {
      const params = watch(autodiff(e), made.params);
      const { output } = made.apply(params, floats(e, rows, [6, 6]), ids(e, ends, [3]), layout);
      return grad(sum(output), params);
    });
    const found = new Map(leaves(slopes));
    expect(found.get("shared.upCentral")?.shape).toEqual([6, 2, 4, 1]);
    for (const value of await numbers(found.get("shared.upCentral") as Tensor)) expect(value).not.toBe(0);
    // Expert 1 has no row.
    const own = await numbers(found.get("up0") as Tensor);
    const part = own.length / 3;
    expect(own.slice(part, 2 * part).every((x) => x === 0)).toBe(true);
    expect(own.slice(0, part).every((x) => x !== 0)).toBe(true);
  });

  it("refuses what does not fit", () => {
    const e = float64();
    const more = { count: 2, engine: e, random: random(e, 1) };
    expect(() => mpo({ ...more, widthDims: [6], hiddenDims: [8] })).toThrow("expected at least two");
    expect(() => mpo({ ...more, ...form, central: 2 })).toThrow("with core 2 shared");
    expect(() => mpo({ ...more, ...form, count: 0 })).toThrow(ShapeError);
    expect(() => mpo({ ...more, widthDims: [3, 2], hiddenDims: [2, 2, 2] })).toThrow("one of each per core");
    const made = mpo({ ...more, ...form });
    expect(() => made.apply(made.params, floats(e, [1, 2], [2, 1]), ids(e, [1, 2], [2]), layout)).toThrow("[n, 6]");
  });
});
