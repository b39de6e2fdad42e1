// Latent attention against naive loops; its two forms against one another; what it remembers.
import {
  cast,
  concat,
  counted,
  dequantize,
  type Engine,
  random,
  slice,
  sum,
  type Tensor,
  type Tree,
  valueAndGrad,
} from "@switchyard/core";
import { describe, expect, it } from "vitest";
import type { LatentAttention } from "../blueprint.ts";
import { makeEngine } from "../models.test-util.ts";
import { type LatentWeights, naiveLatent } from "../naive-attention.test-util.ts";
import { ropeTables, rotary } from "../rope.ts";
import { leaf } from "../tree.ts";
import type { Attended } from "./kind.ts";
import { latentAttention } from "./latent.ts";

const width = 11;
const rope = rotary(undefined, { headSize: 4, theta: 40, interleaved: true });
const base: LatentAttention = {
  ...{ kind: "latent", heads: 3, queryRank: 7, rank: 5, nopeSize: 6, ropeSize: 4, valueSize: 9 },
  ...{ scale: 0.4, normEps: 1e-6, rope },
};
const variants: readonly [name: string, options: LatentAttention][] = [
  ["a bottleneck of queries", base],
  ["plain queries", { ...base, queryRank: undefined }],
  ["biases", { ...base, bias: true }],
  ["biases, plain queries", { ...base, queryRank: undefined, bias: true }],
  ["one head", { ...base, heads: 1, valueSize: 1 }],
  ["pairs of halves", { ...base, rope: rotary(undefined, { headSize: 4, theta: 40 }) }],
];

function parameters(on: Engine, options: LatentAttention): Record<string, Tensor> {
  const draw = random(on, 2);
  return Object.fromEntries(
    Object.entries(latentAttention(options, width).shapes).map(([name, shape]) => [
      name,
      on.tensor(
        draw.at(name).host(
          "normal",
          shape.reduce((a, b) => a * b, 1),
        ),
        shape,
      ),
    ]),
  );
}

/** A cache of one layer, as the decoder keeps it, over any engine. */
interface Remembered {
  keys?: Tensor;
  values?: Tensor;
}

interface Pass {
  readonly on: Engine;
  readonly params: Tree;
  readonly options: LatentAttention;
  readonly batch: number;
  readonly padding?: readonly number[];
}

/** Runs positions from..to of `hidden [batch, total, width]` on what is remembered. */
function runPiece(
  { on, params, options, batch, padding }: Pass,
  hidden: Tensor,
  [from, to]: readonly [number, number],
  memory?: Remembered,
): Attended {
  const n = to - from;
  const half = options.ropeSize / 2;
  const rows = (padding ?? [0]).map((before) =>
    ropeTables(options.rope, {
      past: Math.max(0, from - before),
      positions: n - Math.min(n, Math.max(0, before - from)),
    }),
  );
  const table = (name: "cos" | "sin"): Tensor => {
    if (!padding) return on.tensor((rows[0] as (typeof rows)[number])[name], [n, half]);
    const all = new Float64Array(batch * n * half);
    for (const [row, one] of rows.entries()) all.set(one[name], (row + 1) * n * half - one[name].length);
    return on.tensor(all, [batch, n, half]);
  };
  const mask =
    padding &&
    on.tensor(
      Float32Array.from(padding.flatMap((before) => Array.from({ length: to }, (_, t) => (t < before ? 0 : 1)))),
      [batch, to],
    );
  return latentAttention(options, width).run(params, {
    hidden: slice(hidden, [0, from, 0], [batch, n, width]),
    layout: { batch, sequence: n, past: from, ...(mask ? { mask } : {}) },
    turns: { cos: table("cos"), sin: table("sin") },
    cached: memory !== undefined,
    remember(keys, values) {
      if (!memory) return { keys, values };
      const join = (old: Tensor | undefined, x: Tensor): Tensor => (old ? concat([old, x], 1) : x);
      memory.keys = join(memory.keys, keys);
      memory.values = join(memory.values, values);
      return { keys: memory.keys, values: memory.values };
    },
    routerInput: () => {
      throw new Error("there is no router here");
    },
  });
}

async function rowsOf(x: Tensor): Promise<number[][]> {
  const data = await x.data();
  const size = x.shape.at(-1) ?? 1;
  return Array.from({ length: x.size / size }, (_, i) => Array.from(data.slice(i * size, (i + 1) * size)));
}
async function weightsOf(params: Record<string, Tensor>): Promise<LatentWeights> {
  const entries = await Promise.all(
    Object.entries(params).map(async ([name, x]) => [name, await cast(x, "f32").data()]),
  );
  return Object.fromEntries(entries);
}
function expectClose(found: readonly (readonly number[])[], wanted: readonly (readonly number[])[], tolerance: number) {
  expect(found.length).toBe(wanted.length);
  for (const [i, row] of wanted.entries()) {
    for (const [j, x] of row.entries())
      expect(Math.abs((found[i]?.[j] ?? Number.NaN) - x), `${i}, ${j}`).toBeLessThan(tolerance);
  }
}
const naiveOf = ({
  heads,
  rank,
  nopeSize,
  ropeSize,
  valueSize,
  scale,
  rope: { at, interleaved },
}: LatentAttention) => ({
  ...{ heads, rank, nope: nopeSize, rope: ropeSize, value: valueSize, scale },
  turns: { inverse: Array.from(at(1).inverse), interleaved },
});

const total = 8;
/** All at once, then pieces of every size on what is remembered; small pieces late in a sequence take the absorbed form. */
const cuts: readonly (readonly number[])[] = [[8], [7, 1], [5, 2, 1], [1, 1, 1, 1, 1, 1, 1, 1], [3, 5]];

describe("latent attention equals the formulas", () => {
  it.each(variants)("%s", async (_, options) => {
    const on = makeEngine(64);
    const params = parameters(on, options);
    const hidden = on.tensor(random(on, 4).host("normal", total * width), [1, total, width]);
    const wanted = naiveLatent(await weightsOf(params), naiveOf(options), await rowsOf(hidden));
    const pass = { on, params, options, batch: 1 };
    expectClose(await rowsOf(runPiece(pass, hidden, [0, total]).output), wanted, 1e-10);
    for (const sizes of cuts) {
      const memory: Remembered = {};
      let from = 0;
      for (const size of sizes) {
        const { output } = runPiece(pass, hidden, [from, from + size], memory);
        expectClose(await rowsOf(output), wanted.slice(from, from + size), 1e-10);
        from += size;
      }
    }
  });

  it("rows that start with padding are computed as if alone, in both forms", async () => {
    const on = makeEngine(64);
    const params = parameters(on, base);
    const padding = [0, 3, 5];
    const hidden = on.tensor(random(on, 4).host("normal", 3 * total * width), [3, total, width]);
    const weights = await weightsOf(params);
    const all = await rowsOf(hidden);
    const pass = { on, params, options: base, batch: 3, padding };
    for (const sizes of cuts) {
      const memory: Remembered = {};
      let from = 0;
      for (const size of sizes) {
        const found = await rowsOf(runPiece(pass, hidden, [from, from + size], memory).output);
        for (const [row, before] of padding.entries()) {
          const own = naiveLatent(weights, naiveOf(base), all.slice(row * total, (row + 1) * total), before);
          for (let t = Math.max(from, before); t < from + size; t++) {
            expectClose([found[row * size + t - from] ?? []], [own[t] ?? []], 1e-10);
          }
        }
        from += size;
      }
    }
  });
});

describe("latent attention", () => {
  it("remembers the latent and one rotary key for all heads, nothing else", () => {
    const on = makeEngine();
    const memory: Remembered = {};
    const hidden = on.tensor(new Float32Array(2 * total * width), [2, total, width]);
    const pass = { on, params: parameters(on, base), options: base, batch: 2 };
    runPiece(pass, hidden, [0, 6], memory);
    runPiece(pass, hidden, [6, 8], memory);
    expect(memory.keys?.shape).toEqual([2, total, 1, base.ropeSize]);
    expect(memory.values?.shape).toEqual([2, total, 1, base.rank]);
  });

  it("expands where most positions are new, and not what is remembered for a single token", () => {
    const on = counted(makeEngine());
    const wide: LatentAttention = { ...base, nopeSize: 30, valueSize: 40 };
    const params = parameters(on, wide);
    const hidden = on.tensor(new Float32Array(total * width), [1, total, width]);
    const memory: Remembered = {};
    const grouped = [
      [0, 6],
      [6, 7],
      [7, 8],
    ].map(([from = 0, to = 0]) => {
      const before = on.counts.get("groupedMatmul")?.calls ?? 0;
      runPiece({ on, params, options: wide, batch: 1 }, hidden, [from, to], memory);
      return (on.counts.get("groupedMatmul")?.calls ?? 0) - before;
    });
    expect(grouped).toEqual([0, 2, 2]); // the absorbed form has one product on each side of attention
  });

  it("has the same probabilities in both forms", async () => {
    const on = makeEngine(64);
    const params = parameters(on, base);
    const hidden = on.tensor(random(on, 4).host("normal", total * width), [1, total, width]);
    const pass = { on, params, options: base, batch: 1 };
    const whole = runPiece(pass, hidden, [0, total]).probabilities();
    expect(whole.shape).toEqual([1, base.heads, total, total]);
    const memory: Remembered = {};
    runPiece(pass, hidden, [0, total - 1], memory);
    const last = runPiece(pass, hidden, [total - 1, total], memory).probabilities();
    expect(last.shape).toEqual([1, base.heads, 1, total]);
    const wanted = (await rowsOf(whole)).filter((_, i) => i % total === total - 1);
    expectClose(await rowsOf(last), wanted, 1e-12);
    for (const row of wanted) expect(row.reduce((a, b) => a + b)).toBeCloseTo(1, 12);
  });

  it.each(["bf16", "f16"] as const)("takes matrices in %s in both forms", async (dtype) => {
    const on = makeEngine(64);
    const params = Object.fromEntries(
      Object.entries(parameters(on, base)).map(([name, x]) => [name, x.shape.length === 2 ? cast(x, dtype) : x]),
    );
    await expectBoth(on, params, await weightsOf(params));
  });

  // Blocks of 3 lines end where the keys of a head do, those of 4 do not, and for the last sizes only the counts would fit.
  it.each<[string, number, Partial<LatentAttention>, number]>([
    ["fp8 in blocks of 4 lines", 4, {}, 0],
    ["fp8 in blocks of 3 lines", 3, {}, 1],
    ["fp8 in lines", 1, {}, 1],
    ["fp8 in blocks of 4 lines, heads of 6", 4, { heads: 1, nopeSize: 3, valueSize: 3 }, 0],
    ["int8", 0, {}, 1],
  ])("takes matrices in %s in both forms", async (_, rows, change, stored) => {
    const on = counted(makeEngine(64));
    const options = { ...base, ...change };
    const floats = parameters(on, options);
    const weights: Record<string, ArrayLike<number>> = {};
    const params: Record<string, Tree> = {};
    for (const [i, [name, x]] of Object.entries(floats).entries()) {
      const [out = 0, inner] = x.shape;
      if (inner === undefined) {
        [params[name], weights[name]] = [x, await x.data()];
        continue;
      }
      const codes = on.tensor(
        Uint8Array.from(random(on, i).host("uniform", out * inner), (u) => (u < 0.5 ? 0 : 128) + Math.floor(u * 90)),
        [out, inner],
      );
      if (name === "o" || rows === 0) {
        const scales = on.tensor(new Float32Array(out).fill(0.01), [out, 1]);
        params[name] = { [`int8/${inner}`]: { codes, scales } };
        weights[name] = await dequantize({ format: "int8", group: inner, codes, scales }).data();
        continue;
      }
      const group = 3;
      const blocks = [Math.ceil(out / rows), Math.ceil(inner / group)] as const;
      const scales = on.tensor(
        Float32Array.from({ length: blocks[0] * blocks[1] }, (_, j) => 0.05 * (1 + (j % 3))),
        blocks,
      );
      params[name] = { [`fp8/${rows}x${group}`]: { codes, scales } };
      weights[name] = await dequantize({ format: "fp8", group, rows, codes, scales }).data();
    }
    await expectBoth(on, params, weights as Readonly<typeof weights> & LatentWeights, options);
    // Without widening the lines of the values, where the cut meets blocks: once in each pass of the absorbed form.
    const before = on.counts.get("quantizedGroupedMatmul")?.calls ?? 0;
    const memory: Remembered = {};
    const hidden = on.tensor(new Float32Array(total * width), [1, total, width]);
    const pass = { on, params, options, batch: 1 };
    runPiece(pass, hidden, [0, total - 1], memory);
    runPiece(pass, hidden, [total - 1, total], memory);
    expect((on.counts.get("quantizedGroupedMatmul")?.calls ?? 0) - before).toBe(stored);
  });

  it("has gradients", async () => {
    const on = makeEngine(64);
    const params = parameters(on, base);
    const hidden = random(on, 4).host("normal", total * width);
    const loss = (given: Tree): Tensor => {
      const engine = leaf(given, "o").engine;
      const x = engine.tensor(hidden, [1, total, width]);
      return sum(runPiece({ on: engine, params: given, options: base, batch: 1 }, x, [0, total]).output);
    };
    const { grads } = valueAndGrad((given) => [loss(given), []], params);
    for (const name of ["qUp", "kvUp", "kvDown"]) {
      const { shape } = leaf(params, name);
      const start = await leaf(params, name).data();
      const found = await leaf(grads, name).data();
      for (const i of [0, 7, start.length - 1]) {
        const at = async (shift: number): Promise<number> => {
          const moved = Float64Array.from(start, (v, j) => (j === i ? v + shift : v));
          return (await loss({ ...params, [name]: on.tensor(moved, shape) }).data())[0] as number;
        };
        expect(found[i]).toBeCloseTo(((await at(1e-5)) - (await at(-1e-5))) / 2e-5, 5);
      }
    }
  });

  it("refuses another number of turned channels", () => {
    expect(() => latentAttention({ ...base, ropeSize: 6 }, width)).toThrow(
      "latent attention: ropeSize is 6, but 4 channels are turned",
    );
  });
});

/** A whole pass, and tokens one by one on what is remembered, against the oracle. */
async function expectBoth(on: Engine, params: Tree, weights: LatentWeights, options = base): Promise<void> {
  const hidden = on.tensor(random(on, 4).host("normal", total * width), [1, total, width]);
  const wanted = naiveLatent(weights, naiveOf(options), await rowsOf(hidden));
  const pass = { on, params, options, batch: 1 };
  expectClose(await rowsOf(runPiece(pass, hidden, [0, total]).output), wanted, 1e-9);
  const memory: Remembered = {};
  for (let t = 0; t < total; t++) {
    expectClose(await rowsOf(runPiece(pass, hidden, [t, t + 1], memory).output), [wanted[t] ?? []], 1e-9);
  }
}
