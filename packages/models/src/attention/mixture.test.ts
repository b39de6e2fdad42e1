// A mixture of attention heads against naive loops: any number of experts per token, padding, pieces on a cache, stored weights.
import { cast, concat, type Engine, random, slice, type Tensor, type Tree } from "@switchyard/core";
import type { Router, RouterPlugin } from "@switchyard/core/moe";
import { topK } from "@switchyard/routers/top-k";
import { describe, expect, it } from "vitest";
import type { MixtureAttention } from "../blueprint.ts";
import { makeEngine } from "../models.test-util.ts";
import { type MixtureWeights, naiveChoice, naiveMixture, times } from "../naive-attention.test-util.ts";
import { ropeTables, rotary } from "../rope.ts";
import type { Attended } from "./kind.ts";
import { mixtureAttention } from "./mixture.ts";

const width = 10;
const total = 7;

function optionsOf(change: Partial<MixtureAttention> = {}): MixtureAttention {
  const k = change.k ?? 2;
  return {
    ...{ kind: "mixture", experts: 5, k, kvHeads: 3, headSize: 4 },
    router: topK({ k, order: "topk-softmax" }),
    rope: rotary(undefined, { headSize: change.headSize ?? 4, theta: 30 }),
    ...change,
  };
}

interface Made {
  readonly on: Engine;
  readonly options: MixtureAttention;
  readonly router: Router | undefined;
  readonly params: Tree;
  readonly weights: MixtureWeights;
}

async function make(change: Partial<MixtureAttention> = {}, form: (x: Tensor) => Tensor = (x) => x): Promise<Made> {
  const on = makeEngine(64);
  const options = optionsOf(change);
  const draw = random(on, 2);
  const number = (name: string, shape: readonly number[]): Tensor =>
    on.tensor(
      draw.at(name).host(
        "normal",
        shape.reduce((a, b) => a * b, 1),
      ),
      shape,
    );
  const router = options.router.init({
    ...{ engine: on, width, experts: options.experts, layer: 0, layers: 1, random: draw.at("router") },
    shared: (_, create) => create(),
  });
  const { shapes } = mixtureAttention(options, width);
  const leaves = new Map(
    Object.entries(shapes).map(([name, shape]) => {
      const x = number(name, shape);
      return [name, shape.length > 1 ? form(x) : x];
    }),
  );
  const at = (name: string): Tensor => leaves.get(name) as Tensor;
  const weight = number("weight", [options.experts, width]);
  const read = async (x: Tensor): Promise<ArrayLike<number>> => cast(x, "f32").data();
  return {
    ...{ on, options, router },
    params: {
      router: { weight },
      experts: { input: at("experts.input"), output: at("experts.output") },
      kv: at("kv"),
      bias: at("bias"),
    },
    weights: {
      router: await read(weight),
      input: await read(at("experts.input")),
      output: await read(at("experts.output")),
      kv: await read(at("kv")),
      bias: await read(at("bias")),
    },
  };
}

interface Memory {
  keys?: Tensor;
  values?: Tensor;
}

function run(
  { on, options, router, params }: Made,
  hidden: Tensor,
  [from, to]: readonly [number, number],
  { memory, mask }: { memory?: Memory; mask?: Tensor } = {},
): Attended {
  const [batch = 0] = hidden.shape;
  const n = to - from;
  const tables = ropeTables(options.rope, { past: from, positions: n });
  const half = options.headSize / 2;
  const layout = { batch, sequence: n, past: from, ...(mask ? { mask } : {}) };
  return mixtureAttention(options, width, router).run(params, {
    hidden: slice(hidden, [0, from, 0], [batch, n, width]),
    layout,
    turns: { cos: on.tensor(tables.cos, [n, half]), sin: on.tensor(tables.sin, [n, half]) },
    cached: memory !== undefined,
    remember(keys, values) {
      if (!memory) return { keys, values };
      memory.keys = memory.keys ? concat([memory.keys, keys], 1) : keys;
      memory.values = memory.values ? concat([memory.values, values], 1) : values;
      return { keys: memory.keys, values: memory.values };
    },
    routerInput: (x) => ({
      ...{ hidden: x, layout, training: false, step: 0, pass: 0, layer: 0, layers: 1 },
      random: random(on, 0),
      buffers: [],
    }),
  });
}

async function rowsOf(x: Tensor): Promise<number[][]> {
  const data = await x.data();
  const size = x.shape.at(-1) ?? 1;
  return Array.from({ length: x.size / size }, (_, i) => Array.from(data.slice(i * size, (i + 1) * size)));
}
function expectClose(found: readonly (readonly number[])[], wanted: readonly (readonly number[])[], tolerance = 1e-10) {
  expect(found.length).toBe(wanted.length);
  for (const [i, row] of wanted.entries()) {
    for (const [j, x] of row.entries()) {
      expect(Math.abs((found[i]?.[j] ?? Number.NaN) - x), `${i}, ${j}`).toBeLessThan(tolerance);
    }
  }
}
const naiveOf = ({ experts, k, kvHeads, headSize, rope }: MixtureAttention) => ({
  ...{ experts, k, kvHeads, headSize },
  turns: { inverse: Array.from(rope.at(1).inverse), interleaved: rope.interleaved },
});
const tokens = (on: Engine, batch = 1): Tensor =>
  on.tensor(random(on, 4).host("normal", batch * total * width), [batch, total, width]);

describe("a mixture of attention heads equals the formulas", () => {
  it.each<[string, Partial<MixtureAttention>]>([
    ["two of five experts", {}],
    ["one expert", { k: 1 }],
    ["all experts", { k: 5 }],
    ["one head of keys", { kvHeads: 1, headSize: 6 }],
    ["the only expert", { k: 1, experts: 1 }],
    ["interleaved pairs", { rope: rotary(undefined, { headSize: 4, theta: 30, interleaved: true }) }],
  ])("%s", async (_, change) => {
    const made = await make(change);
    const hidden = tokens(made.on);
    const wanted = naiveMixture(made.weights, naiveOf(made.options), await rowsOf(hidden));
    expectClose(await rowsOf(run(made, hidden, [0, total]).output), wanted);
    for (const sizes of [
      [3, 2, 1, 1],
      [1, 1, 1, 1, 1, 1, 1],
    ]) {
      const memory: Memory = {};
      let from = 0;
      for (const size of sizes) {
        const { output } = run(made, hidden, [from, from + size], { memory });
        expectClose(await rowsOf(output), wanted.slice(from, from + size));
        from += size;
      }
      expect(memory.keys?.shape).toEqual([1, total, made.options.kvHeads, made.options.headSize]);
    }
  });

  it("two sequences at once", async () => {
    const made = await make();
    const hidden = tokens(made.on, 2);
    const all = await rowsOf(hidden);
    const found = await rowsOf(run(made, hidden, [0, total]).output);
    for (const row of [0, 1]) {
      const own = all.slice(row * total, (row + 1) * total);
      expectClose(found.slice(row * total, (row + 1) * total), naiveMixture(made.weights, naiveOf(made.options), own));
    }
  });

  it.each(["bf16", "f16"] as const)("matrices in %s", async (dtype) => {
    const made = await make({}, (x) => cast(x, dtype));
    const hidden = tokens(made.on);
    const wanted = naiveMixture(made.weights, naiveOf(made.options), await rowsOf(hidden));
    expectClose(await rowsOf(run(made, hidden, [0, total]).output), wanted);
  });
});

describe("a mixture of attention heads", () => {
  it("shows what its router decided", async () => {
    const made = await make();
    const hidden = tokens(made.on);
    const { routed } = run(made, hidden, [0, total]);
    if (routed?.plan.kind !== "sparse") throw new Error("expected a sparse plan");
    const ids = await rowsOf(routed.plan.experts);
    const weights = await rowsOf(routed.plan.weights);
    for (const [t, x] of (await rowsOf(hidden)).entries()) {
      const wanted = naiveChoice(times(made.weights.router, x, made.options.experts), made.options.k);
      expect(ids[t]).toEqual(wanted.map(([e]) => e));
      expectClose([weights[t] ?? []], [wanted.map(([, weight]) => weight)]);
    }
    expect(routed.logits?.shape).toEqual([total, made.options.experts]);
  });

  it("gives probabilities in the order of the slots, whose means over values are the outputs", async () => {
    const made = await make({ k: 2, kvHeads: 2 });
    const hidden = tokens(made.on);
    const memory: Memory = {};
    const attended = run(made, hidden, [0, total], { memory });
    const probabilities = attended.probabilities();
    expect(probabilities.shape).toEqual([1, 4, total, total]);
    const p = await probabilities.data();
    const values = await (memory.values as Tensor).data();
    const { options, weights } = made;
    const wanted = await rowsOf(attended.output);
    const inner = options.kvHeads * options.headSize;
    for (const [t, x] of (await rowsOf(hidden)).entries()) {
      let y = Array.from({ length: width }, (_, i) => weights.bias[i] as number);
      for (const [slot, [e, weight]] of naiveChoice(times(weights.router, x, 5), 2).entries()) {
        const found = Array.from({ length: inner }, (_, c) => {
          const head = slot * options.kvHeads + Math.floor(c / options.headSize);
          let sum = 0;
          for (let j = 0; j < total; j++) {
            sum += (p[(head * total + t) * total + j] as number) * (values[j * inner + c] as number);
          }
          return sum;
        });
        y = y.map((v, i) => v + weight * (times(weights.output, found, width, e * width)[i] as number));
      }
      expectClose([y], [wanted[t] ?? []]);
    }
  });

  it("padding asks no expert: it gets the bias alone, and real tokens do not see it", async () => {
    const made = await make();
    const hidden = tokens(made.on);
    const mask = made.on.tensor(
      Float32Array.from({ length: total }, (_, t) => (t < 2 ? 0 : 1)),
      [1, total],
    );
    const { output, routed } = run(made, hidden, [0, total], { mask });
    const found = await rowsOf(output);
    const { bias } = made.weights;
    expectClose(found.slice(0, 2), [Array.from(bias), Array.from(bias)]);
    if (routed?.plan.kind !== "sparse") throw new Error("expected a sparse plan");
    expect(Array.from((await routed.plan.experts.data()).slice(0, 4))).toEqual([-1, -1, -1, -1]);
    // Rotary positions are relative, so the rest is as if alone.
    const alone = naiveMixture(made.weights, naiveOf(made.options), (await rowsOf(hidden)).slice(2));
    expectClose(found.slice(2), alone);
  });

  it("refuses a router without slots, and to run without one", async () => {
    const made = await make();
    const dense: RouterPlugin = {
      ...made.options.router,
      init: (context) => ({
        ...made.options.router.init(context),
        route: (_, { hidden }) => ({
          plan: {
            kind: "dense",
            weights: made.on.tensor(new Float32Array(5 * (hidden.shape[0] ?? 0)), [hidden.shape[0] ?? 0, 5]),
          },
          losses: {},
        }),
      }),
    };
    const router = dense.init({
      ...{ engine: made.on, width, experts: 5, layer: 0, layers: 1, random: random(made.on, 0) },
      shared: (_, create) => create(),
    });
    expect(() => run({ ...made, router }, tokens(made.on), [0, total])).toThrow('gave a "dense" plan');
    expect(() => run({ ...made, router: undefined }, tokens(made.on), [0, total])).toThrow("made without its router");
    const { shapes } = mixtureAttention(made.options, width); // which tells its shapes all the same
    expect(Object.keys(shapes)).toEqual(["experts.input", "experts.output", "kv", "bias"]);
  });
});
