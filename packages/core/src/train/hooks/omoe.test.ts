import { describe, expect, it } from "vitest";
import { cpu } from "../../cpu/index.ts";
import { type Engine, engine } from "../../engine.ts";
import { lowDimensional } from "../../experts/low-dimensional.ts";
import type { TrainingHook } from "../../moe/plan.ts";
import { leaves, type Tensor, type Tree } from "../../tensor.ts";
import { count, hidden, type ModelOptions, numbersOf, resumes, train, width } from "./hooks.test-util.ts";
import { omoe, otherProjectors, projectByFactors, projectGradient, updateFactors, updateProjectors } from "./omoe.ts";

const float64 = (): Engine => engine(cpu({ precision: 64 }));
const noise = (n: number, seed: number): Float64Array =>
  Float64Array.from({ length: n }, (_, i) => Math.sin((i + 1) * 12.9898 + seed * 78.233) * 1.7);
const numbers = async (x: Tensor): Promise<number[]> => [...(await x.data())];
const eye = (e: Engine, experts: number, d: number): Tensor =>
  e.tensor(
    Float64Array.from({ length: experts * d * d }, (_, i) => Number((i % (d * d)) % (d + 1) === 0)),
    [experts, d, d],
  );
const alpha = 1e-3;

/** I - A (AᵀA + αI)⁻¹ Aᵀ by Gauss-Jordan elimination, for one expert; `inputs` are the columns of A. */
function closedForm(inputs: readonly (readonly number[])[]): number[][] {
  const n = inputs.length;
  const d = inputs[0]?.length ?? 0;
  const dot = (a: readonly number[], b: readonly number[]): number => a.reduce((t, v, i) => t + v * (b[i] ?? 0), 0);
  // [AᵀA + αI | Aᵀ] -> [I | (AᵀA + αI)⁻¹ Aᵀ]
  const rows = inputs.map((x, i) => [...inputs.map((y, j) => dot(x, y) + (i === j ? alpha : 0)), ...x]);
  for (let p = 0; p < n; p++) {
    const pivot = rows[p] as number[];
    const scale = pivot[p] as number;
    for (let c = 0; c < pivot.length; c++) pivot[c] = (pivot[c] as number) / scale;
    rows.forEach((row, r) => {
      const factor = row[p] as number;
      if (r !== p) for (let c = 0; c < row.length; c++) row[c] = (row[c] as number) - factor * (pivot[c] as number);
    });
  }
  return Array.from({ length: d }, (_, i) =>
    Array.from({ length: d }, (_, j) => {
      const back = inputs.reduce((t, x, a) => t + (x[i] ?? 0) * (rows[a]?.[n + j] ?? 0), 0);
      return Number(i === j) - back;
    }),
  );
}

/** Means per expert, `[experts, 1, d]` each. */
const meansOf = (e: Engine, steps: number, experts: number, d: number): Tensor[] =>
  Array.from({ length: steps }, (_, s) => e.tensor(noise(experts * d, s + 1), [experts, 1, d]));
const inputsOf = async (means: readonly Tensor[], expert: number): Promise<number[][]> =>
  Promise.all(means.map(async (x) => (await numbers(x)).slice(expert * (x.shape[2] ?? 0)).slice(0, x.shape[2])));
const closeTo = (found: readonly number[], expected: readonly number[], by = 1e-9): void => {
  expect(found.length).toBe(expected.length);
  expect(Math.max(0, ...found.map((x, i) => Math.abs(x - (expected[i] ?? Number.NaN))))).toBeLessThan(by);
};

describe("projectors", () => {
  it.each([
    [1, 3],
    [3, 5],
    [7, 5],
  ])("after %i inputs of %i numbers are those of the closed form", async (steps, d) => {
    const e = float64();
    const means = meansOf(e, steps, 2, d);
    const last = means.reduce((p, x) => updateProjectors(p, x, alpha), eye(e, 2, d));
    const expected = [closedForm(await inputsOf(means, 0)), closedForm(await inputsOf(means, 1))].flat(2);
    closeTo(await numbers(last), expected, 1e-7);
  });

  it("stay as they are for an input of zeros, the expert without a token", async () => {
    const e = float64();
    const [x] = meansOf(e, 1, 2, 4);
    const before = updateProjectors(eye(e, 2, 4), x as Tensor, alpha);
    const after = updateProjectors(before, e.tensor(new Float64Array(8), [2, 1, 4]), alpha);
    expect(await numbers(after)).toEqual(await numbers(before));
  });

  it("of the others are averaged; a single expert has none and its gradient stays", async () => {
    const e = float64();
    const p = e.tensor(noise(3 * 4, 3), [3, 2, 2]);
    const [a, b, c] = [0, 1, 2].map((i) => Array.from(noise(12, 3)).slice(i * 4, i * 4 + 4)) as [
      number[],
      number[],
      number[],
    ];
    const mean = (x: number[], y: number[]): number[] => x.map((v, i) => (v + (y[i] ?? 0)) / 2);
    closeTo(await numbers(otherProjectors(p)), [...mean(b, c), ...mean(a, c), ...mean(a, b)]);
    const gradient = e.tensor(noise(6, 4), [1, 3, 2]);
    const alone = updateProjectors(eye(e, 1, 2), e.tensor(noise(2, 5), [1, 1, 2]), alpha);
    closeTo(await numbers(projectGradient(gradient, alone)), [...noise(6, 4)]);
    const factors = updateFactors(e.tensor(new Float64Array(2), [1, 1, 2]), e.tensor(noise(2, 5), [1, 1, 2]), alpha);
    closeTo(await numbers(projectByFactors(gradient, factors)), [...noise(6, 4)]);
  });

  it("as factors of rank r give the same gradients for up to r inputs", async () => {
    const e = float64();
    const [experts, d, out] = [3, 7, 2];
    const gradient = e.tensor(noise(experts * out * d, 9), [experts, out, d]);
    for (const steps of [1, 2, 4]) {
      const means = meansOf(e, steps, experts, d);
      const full = means.reduce((p, x) => updateProjectors(p, x, alpha), eye(e, experts, d));
      const none = e.tensor(new Float64Array(experts * 4 * d), [experts, 4, d]);
      const factors = means.reduce((f, x) => updateFactors(f, x, alpha), none);
      const found = await numbers(projectByFactors(gradient, factors));
      closeTo(found, await numbers(projectGradient(gradient, full)));
    }
  });

  it("as factors keep the strongest directions beyond the rank, and never leave 0..1", async () => {
    const e = float64();
    const d = 5;
    const strong = [Float64Array.of(3, 0, 0, 0, 0), Float64Array.of(0, 2, 0, 0, 0)];
    const weak = Float64Array.of(0, 0, 0.001, 0, 0);
    const none = e.tensor(new Float64Array(2 * d), [1, 2, d]);
    const factors = [strong[0], weak, strong[1]].reduce(
      (f, x) => updateFactors(f, e.tensor(x as Float64Array, [1, 1, d]), alpha),
      none as Tensor,
    );
    const rows = await numbers(factors);
    const covered = Array.from({ length: d }, (_, j) => (rows[j] ?? 0) ** 2 + (rows[d + j] ?? 0) ** 2);
    closeTo(covered, [9 / 9.001, 4 / 4.001, 0, 0, 0]);
    // |F v|² <= |v|² for some v after many inputs.
    const many = meansOf(e, 40, 1, d).reduce((f, x) => updateFactors(f, x, alpha), none as Tensor);
    const m = await numbers(many);
    for (let s = 0; s < 20; s++) {
      const v = noise(d, 100 + s);
      const length = v.reduce((t, x) => t + x * x, 0);
      const along = [0, 1].reduce((t, r) => t + v.reduce((u, x, j) => u + x * (m[r * d + j] ?? 0), 0) ** 2, 0);
      expect(along).toBeLessThanOrEqual(length * (1 + 1e-9));
    }
  });
});

describe("the hook omoe", () => {
  const matrices = [0, 1].flatMap((layer) => ["gateUp", "down"].map((name) => `layers.${layer}.moe.experts.${name}`));
  /** Notes what the hook does to the gradients, and the mean inputs that the trainer shows it. */
  function spied(hook: TrainingHook): {
    readonly hook: TrainingHook;
    readonly gradients: { readonly step: number; readonly name: string; before: number[]; after: number[] }[];
    readonly seen: { readonly name: string; rows: number[]; ends: number[] }[];
    settle(): Promise<void>;
  } {
    const gradients: { step: number; name: string; before: number[]; after: number[] }[] = [];
    const seen: { name: string; rows: number[]; ends: number[] }[] = [];
    const waiting: Promise<unknown>[] = [];
    const read = <N extends string>(x: Tensor, into: Record<N, number[]>, as: N): void => {
      waiting.push(
        numbers(x).then((values) => {
          into[as] = values;
        }),
      );
    };
    const inner = { observe: hook.observe?.bind(hook), transform: hook.transformGradient?.bind(hook) };
    hook.observe = (parameter, layer, rows, ends) => {
      const one = { name: parameter, rows: [] as number[], ends: [] as number[] };
      seen.push(one);
      read(rows, one, "rows");
      read(ends, one, "ends");
      inner.observe?.(parameter, layer, rows, ends);
    };
    hook.transformGradient = (name, gradient, info) => {
      const result = inner.transform?.(name, gradient, info) ?? gradient;
      const one = { step: info.step, name, before: [] as number[], after: [] as number[] };
      gradients.push(one);
      read(gradient, one, "before");
      read(result, one, "after");
      return result;
    };
    return { hook, gradients, seen, settle: async () => void (await Promise.all(waiting)) };
  }

  /** Naive: mean rows per expert of what was observed for one matrix, over micro-batches. */
  function naiveMeans(seen: readonly { rows: number[]; ends: number[] }[], d: number): number[][] {
    return Array.from({ length: count }, (_, e) => {
      const total = new Array<number>(d).fill(0);
      let n = 0;
      for (const { rows, ends } of seen)
        for (let i = e === 0 ? 0 : (ends[e - 1] as number); i < (ends[e] as number); i++, n++)
          for (let j = 0; j < d; j++) total[j] = (total[j] as number) + (rows[i * d + j] as number);
      return total.map((x) => x / Math.max(n, 1));
    });
  }

  it("leaves accumulating steps alone and projects the gradients of orthogonal ones by the others' closed forms", async () => {
    const root = engine(cpu({ precision: 64 }));
    const spy = spied(omoe({ accumulating: 2, orthogonal: 1 }));
    const run = train([spy.hook], { accumulate: 2 }, { root });
    for (let step = 0; step < 4; step++) await run.step();
    await spy.settle();

    for (const { step, name, before, after } of spy.gradients) {
      if (step !== 2 || !matrices.includes(name)) expect(after).toEqual(before);
    }
    for (const name of matrices) {
      const d = name.endsWith("down") ? hidden : width;
      const own = spy.seen.filter((one) => one.name === name);
      expect(own.length).toBe(8); // every micro-batch is shown; the hook takes those of steps 0, 1 and 3
      const perStep = [naiveMeans(own.slice(0, 2), d), naiveMeans(own.slice(2, 4), d)];
      const projectors = Array.from({ length: count }, (_, e) =>
        closedForm(perStep.map((means) => means[e] as number[]).filter((x) => x.some((v) => v !== 0))),
      ).map((p) =>
        p.length > 0 ? p : Array.from({ length: d }, (_, i) => Array.from({ length: d }, (_, j) => +(i === j))),
      );
      const found = spy.gradients.find((one) => one.step === 2 && one.name === name);
      const { before = [], after = [] } = found ?? {};
      const out = before.length / count / d;
      const expected = before.map((_, i) => {
        const [e, row, j] = [Math.floor(i / (out * d)), Math.floor(i / d) % out, i % d];
        let total = 0;
        for (let other = 0; other < count; other++)
          if (other !== e)
            for (let a = 0; a < d; a++)
              total += (before[(e * out + row) * d + a] as number) * (projectors[other]?.[a]?.[j] ?? Number.NaN);
        return total / (count - 1);
      });
      closeTo(after, expected, 1e-8);
      expect(Math.max(...after.map((x, i) => Math.abs(x - (before[i] as number))))).toBeGreaterThan(1e-6);
    }
    run.dispose();
  });

  it("holds one projector per expert and matrix between steps, and with a rank only so many directions", async () => {
    const full = omoe();
    const some = omoe({ rank: 2 });
    for (const hook of [full, some]) {
      const run = train([hook], {});
      await run.step();
      const shapes = Object.fromEntries(leaves(hook.state ?? []).map(([path, x]) => [path, x.shape]));
      const square = (d: number): number[] => [count, hook === full ? d : 2, d];
      expect(shapes).toEqual(
        Object.fromEntries(matrices.map((name) => [`known.${name}`, square(name.endsWith("down") ? hidden : width)])),
      );
      run.dispose();
    }
  });

  it("learns, and a rank of at least the accumulating steps gives the same run", async () => {
    const settings = { root: engine(cpu({ precision: 64 })) };
    const full = train([omoe({ accumulating: 2 })], {}, settings);
    const factors = train([omoe({ accumulating: 2, rank: 4 })], {}, settings);
    await full.run({ until: 6 });
    await factors.run({ until: 6 });
    const [a, b] = [await numbersOf(full.params), await numbersOf(factors.params)];
    for (const [path, values] of Object.entries(a)) closeTo(b[path] ?? [], values, 1e-7);
    await full.run({ until: 20 });
    expect(full.history.at(-1)?.loss).toBeLessThan((full.history[0]?.loss ?? 0) * 0.8);
    for (const run of [full, factors]) run.dispose();
    expect(settings.root.live()).toBe(0);
  });

  it.each([
    ["with projectors", {}],
    ["with factors", { rank: 2 }],
  ])("resumes bit for bit %s, from accumulating and orthogonal steps", (_, extra) =>
    resumes(() => omoe({ accumulating: 2, orthogonal: 2, ...extra }), { accumulate: 2 }),
  );

  it("takes only the matrices it is told to", async () => {
    const hook = omoe({ matches: (parameter) => parameter.endsWith("down") });
    const run = train([hook]);
    await run.step();
    expect(leaves(hook.state as Tree).map(([path]) => path)).toEqual(
      matrices.filter((name) => name.endsWith("down")).map((name) => `known.${name}`),
    );
    run.dispose();
  });

  it("leaves what experts share alone", async () => {
    const hook = omoe({ accumulating: 1 });
    const experts: ModelOptions["experts"] = (from) => lowDimensional({ count, width, low: 2, hidden: 3, ...from });
    const run = train([hook], {}, { experts });
    await run.run({ until: 2 });
    const own = ["up", "down"].flatMap((name) => [0, 1].map((layer) => `known.layers.${layer}.moe.experts.${name}`));
    expect(
      leaves(hook.state as Tree)
        .map(([path]) => path)
        .sort(),
    ).toEqual(own.sort());
    run.dispose();
  });

  it("starts anew in another trainer after the first was disposed", async () => {
    const hook = omoe({ accumulating: 1 });
    const settings = { root: engine(cpu()) };
    for (let round = 0; round < 2; round++) {
      const run = train([hook], {}, settings);
      await run.run({ until: 2 });
      run.dispose();
      expect(hook.state).toBeUndefined();
    }
    expect(settings.root.live()).toBe(0);
  });

  it("forgets what a frozen matrix was shown", async () => {
    const hook = omoe();
    const frozen: TrainingHook = { name: "frozen", updateMask: (p) => (p.endsWith("down") ? false : undefined) };
    const run = train([hook, frozen]);
    for (let step = 0; step < 2; step++) await run.step();
    expect(leaves(hook.state as Tree).filter(([path]) => path.startsWith("known")).length).toBe(2);
    expect(
      leaves(hook.state as Tree).filter(([path]) => path.startsWith("seen") && path.endsWith("count")).length,
    ).toBe(2);
    run.dispose();
  });

  it("says when nothing was observed", async () => {
    const run = train([omoe({ accumulating: 1 })], {}, { observed: false });
    await run.step();
    await expect(run.step()).rejects.toThrow("no expert matrix was observed in the steps before");
    run.dispose();
  });

  it.each([
    [{ accumulating: 0 }, "accumulating = 0"],
    [{ orthogonal: 1.5 }, "orthogonal = 1.5"],
    [{ rank: 0 }, "rank = 0"],
    [{ alpha: 0 }, "alpha = 0"],
  ])("refuses %j", (options, message) => {
    expect(() => omoe(options)).toThrow(message);
  });

  it("refuses a gradient that does not fit what was observed", async () => {
    const e = float64();
    const gradient = e.tensor(new Float64Array(12), [2, 2, 3]);
    expect(() => projectGradient(gradient, eye(e, 2, 4))).toThrow("its inputs are those of [2, out, 4]");
    expect(() => projectByFactors(gradient, e.tensor(new Float64Array(8), [2, 1, 4]))).toThrow("[2, out, 4]");
  });
});
