// Low-rank maps beside matrices in every form: nothing changes until they are trained, what they add is the product of B and A, and the
// merged matrices compute the same.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  dispose,
  type Engine,
  engine,
  isTensor,
  type Json,
  leaves,
  mapTree,
  random,
  ShapeError,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import { sgd, trainer } from "@switchyard/core/train";
import { wasm } from "@switchyard/kernels/wasm";
import { smear } from "@switchyard/routers/smear";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { architectures } from "../architectures/families.ts";
import { generate } from "../generate.ts";
import type { LanguageModel, ReadModelOptions } from "../model.ts";
import { makeEngine, smallConfig } from "../models.test-util.ts";
import { loadModel } from "../pretrained.ts";
import { randomCheckpoint } from "../random-checkpoint.ts";
import { lowRank } from "../stored-matrix.ts";
import { transformer } from "../transformer.ts";
import { branch } from "../tree.ts";
import { mergedLora, withLora } from "./lora.ts";
import { isLora, matrixPath, partOf, type TuningPart, tuningParts } from "./parts.ts";
import { tuned, tuningTask } from "./task.ts";
import { batch, contents, families, familyModel, fixtures, text } from "./tuning.test-util.ts";

/** The parts that have a matrix for an adapter. */
const adaptable = (model: LanguageModel): TuningPart[] => {
  const found = new Set(
    leaves(model.params).flatMap(([path, { shape }]) =>
      shape.length > 1 && !/(Bias|\.gate)$/.test(path) ? [partOf(path)] : [],
    ),
  );
  return tuningParts.filter((part) => found.has(part));
};

/** The model with random numbers instead of the zeros of every B; A and B are the caller's. */
function moved(model: LanguageModel): LanguageModel {
  const draw = random(model.engine, 8);
  const params = mapTree(model.params, (x, path) => {
    if (!isLora(path) || !path.endsWith(".b")) return x;
    x.dispose();
    const values = draw.at(path).host("normal", x.size);
    return model.engine.tensor(
      values.map((v) => v / 10),
      x.shape,
    );
  });
  return model.with({ params });
}
const adaptersOf = (model: LanguageModel): Tensor[] =>
  leaves(model.params).flatMap(([path, x]) => (isLora(path) ? [x] : []));

async function logitsOf(model: LanguageModel): Promise<ArrayLike<number>> {
  const { engine: on } = model;
  const y = on.scope(() => model.forward(model.params, on.tensor(batch.ids, batch.shape)).logits);
  const data = await y.data();
  y.dispose();
  return data;
}
async function stepped(model: LanguageModel): Promise<ArrayLike<number>> {
  const ids = model.engine.tensor(batch.ids, batch.shape);
  const y = await model.step(ids, { positions: "all" });
  const data = await y.data();
  dispose([ids, y]);
  return data;
}
const apart = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  expect(a.length).toBe(b.length);
  return Array.from(a, (x, i) => Math.abs(x - (b[i] ?? Number.NaN))).reduce((most, x) => (x <= most ? most : x), 0);
};

describe("low-rank maps in float64", () => {
  const on = makeEngine(64);
  it.each(families)("%s: beside every matrix", async (name) => {
    const model = await familyModel(name, on);
    const parts = adaptable(model);
    const held = on.live();
    const plain = await logitsOf(model);
    const fresh = withLora(model, { parts, rank: 3, alpha: 1.5, random: random(on, 2) });
    // With B zero nothing changes.
    expect(apart(await logitsOf(fresh), plain)).toBeLessThan(1e-12);
    expect(fresh.routing).toEqual(model.routing);
    for (const part of parts)
      expect(leaves(fresh.params).some(([path]) => isLora(path) && partOf(path) === part)).toBe(true);

    const adapted = moved(fresh);
    const merged = mergedLora(adapted);
    // W + 0.5 B A, entry by entry.
    for (const [path, sum] of merged) {
      const node = lowRank(branch(adapted.params, ...path.split(".")));
      if (!node || !isTensor(node.base)) throw new Error(`${path}: no low-rank map over floats`);
      expect(node.factor).toBe(0.5);
      const [w, a, b, found] = await Promise.all([node.base, node.a, node.b, sum].map((x) => x.data()));
      const [out = 0, inner = 0] = sum.shape.slice(-2);
      for (let e = 0; e < sum.size / (out * inner); e++) {
        for (const [i, j] of [
          [0, 0],
          [out - 1, inner - 1],
          [out >> 1, inner >> 1],
        ] as const) {
          let total = 0;
          for (let r = 0; r < 3; r++) total += (b?.[(e * out + i) * 3 + r] ?? 0) * (a?.[(e * 3 + r) * inner + j] ?? 0);
          const at = (e * out + i) * inner + j;
          expect(found?.[at]).toBeCloseTo((w?.[at] ?? Number.NaN) + 0.5 * total, 12);
        }
      }
    }
    const together = tuned(model, Object.fromEntries(merged));
    const logits = await logitsOf(adapted);
    expect(apart(logits, plain)).toBeGreaterThan(1e-3);
    expect(apart(logits, await logitsOf(together))).toBeLessThan(1e-10);
    expect(apart(await stepped(adapted), logits)).toBeLessThan(1e-10);
    dispose([...merged.values(), ...adaptersOf(adapted)]);
    expect(on.live()).toBe(held);
    dispose([model.params, ...model.buffers]);
  });

  it("generates with a cache what it generates without one", async () => {
    const model = await familyModel("deepseek_v3", on);
    const adapted = moved(withLora(model, { parts: ["attention", "router"], random: random(on, 2) }));
    const run = async (cache: boolean): Promise<number[]> => {
      const ids: number[] = [];
      for await (const { id } of generate(adapted, { prompt: [5, 6, 7, 8, 9, 10], maxNew: 6, temperature: 0, cache }))
        ids.push(id);
      return ids;
    };
    expect(await run(true)).toEqual(await run(false));
    dispose([model.params, ...model.buffers, ...adaptersOf(adapted)]);
  });

  it.each(["mixtral", "deepseek_v2", "jetmoe"])(
    "%s: of full rank it learns what the matrix itself would",
    async (name) => {
      const on = makeEngine(64);
      const model = await familyModel(name, on);
      const fresh = withLora(model, { parts: adaptable(model), rank: 64, alpha: 64, random: random(on, 2) });
      // A is the identity, so that B is the change of the matrix, and has its gradient.
      const ones = Object.fromEntries(
        leaves(fresh.params).flatMap(([path, { shape, size }]) => {
          if (!isLora(path) || !path.endsWith(".a")) return [];
          const inner = shape.at(-1) ?? 0;
          expect(inner).toBeLessThanOrEqual(64);
          const values = Float64Array.from({ length: size }, (_, i) =>
            Number(Math.floor(i / inner) % 64 === i % inner),
          );
          return [[path, on.tensor(values, shape)]];
        }),
      );
      const adapted = tuned(fresh, ones);
      const step = async (start: LanguageModel, trains: (path: string) => boolean) => {
        const task = tuningTask(start, { trains, batch: () => batch });
        const run = trainer(on, task, { optimiser: sgd({ learningRate: 0.1 }) });
        const { loss } = await run.step();
        return { loss, after: tuned(start, run.params) };
      };
      const low = await step(adapted, (path) => isLora(path) && path.endsWith(".b"));
      const sums = mergedLora(low.after);
      const before = await contents(model.params);
      const whole = await step(model, (path) => sums.has(path));
      const after = await contents(whole.after.params);
      expect(low.loss).toBeCloseTo(whole.loss, 12);
      for (const [path, sum] of sums) {
        const found = Array.from(await sum.data());
        expect(apart(found, after.get(path) ?? []), path).toBeLessThan(1e-12);
        expect(apart(found, before.get(path) ?? []), path).toBeGreaterThan(0);
      }
    },
  );

  it("draws A within 1/sqrt(in), B zero, and by the path", async () => {
    const model = await familyModel("mixtral", on);
    const adapted = withLora(model, { parts: ["experts"], rank: 2, random: random(on, 9) });
    const held = new Map(leaves(adapted.params));
    const a = held.get("layers.0.moe.experts.down.lora/2.a");
    const b = held.get("layers.0.moe.experts.down.lora/2.b");
    const [experts = 0, width = 0, hidden = 0] = held.get("layers.0.moe.experts.down.lora/2.base")?.shape ?? [];
    expect([a?.shape, b?.shape]).toEqual([
      [experts, 2, hidden],
      [experts, width, 2],
    ]);
    const values = Array.from((await a?.data()) ?? []);
    const bound = 1 / Math.sqrt(hidden);
    expect(Math.max(...values.map(Math.abs))).toBeLessThanOrEqual(bound);
    expect(Math.max(...values)).toBeGreaterThan(0.9 * bound);
    expect(new Set(values).size).toBeGreaterThan(values.length / 2);
    expect(Array.from((await b?.data()) ?? [1]).every((x) => x === 0)).toBe(true);
    dispose([model.params, ...adaptersOf(adapted)]);
  });

  it("stands beside all but the experts where a router mixes their parameters", async () => {
    const start = transformer(on, { ...smallConfig, router: smear(), allowNonCausal: true }, random(on, 1));
    const make = (parts: readonly TuningPart[]) => withLora(start, { parts, rank: 2, random: random(on, 2) });
    expect(() => make(["experts"])).toThrow("the router smear mixes the parameters of its experts");
    const adapted = make(["attention", "router"]);
    const ids = Int32Array.of(3, 1, 4, 1, 5);
    const logits = async (model: LanguageModel): Promise<ArrayLike<number>> => {
      const y = on.scope(() => model.forward(model.params, on.tensor(ids, [1, 5])).logits);
      return y.data().finally(() => y.dispose());
    };
    expect(apart(await logits(adapted), await logits(start))).toBeLessThan(1e-12);
    dispose([start.params, ...adaptersOf(adapted), ...start.buffers]);
    expect(on.live()).toBe(0);
  });

  it("leaves the bits of what nothing is added to", async () => {
    const model = await familyModel("mixtral", on);
    const path = "layers.0.moe.experts.down";
    const old = new Map(leaves(model.params)).get(path) as Tensor;
    const values = Float64Array.from(await old.data());
    values[0] = -0;
    const zero = on.tensor(values, old.shape);
    const start = tuned(model, { [path]: zero });
    const adapted = withLora(start, { parts: ["experts"], rank: 2, random: random(on, 9) });
    const merged = mergedLora(adapted, (one) => one === path);
    const found = Array.from((await merged.get(path)?.data()) ?? []);
    expect(Object.is(found[0], -0)).toBe(true);
    expect(found).toEqual(Array.from(values));
    // A B that is no number is not taken for nothing.
    const b = [...leaves(adapted.params)].find(([one]) => one === `${path}.lora/2.b`)?.[1] as Tensor;
    const broken = tuned(adapted, {
      [`${path}.lora/2.b`]: on.tensor(new Float64Array(b.size).fill(Number.NaN), b.shape),
    });
    const nothing = mergedLora(broken, (one) => one === path);
    expect((await nothing.get(path)?.data())?.every(Number.isNaN)).toBe(true);
    dispose([
      model.params,
      zero,
      ...merged.values(),
      ...nothing.values(),
      ...adaptersOf(broken),
      ...adaptersOf(adapted),
    ]);
    expect(on.live()).toBe(0);
  });

  it("refuses what it cannot do, in words", async () => {
    const model = await familyModel("mixtral", on);
    const held = on.live();
    const make = (options: Partial<Parameters<typeof withLora>[1]>) => () =>
      withLora(model, { parts: ["attention"], random: random(on, 1), ...options });
    expect(make({ rank: 0 })).toThrow(new ShapeError("withLora: rank is 0, expected a whole number from 1"));
    expect(make({ alpha: 0 })).toThrow(ShapeError);
    expect(make({ parts: ["dense"] })).toThrow(
      'withLora: this model has no matrix in "dense"; it has some in experts, attention, router, embed, head',
    );
    expect(make({ parts: ["norms"] })).toThrow('no matrix in "norms"');
    expect(make({ parts: [] })).toThrow("no matrix in no parts");
    expect(make({ parts: ["router", "gates" as TuningPart] })).toThrow('"gates" is no part');
    expect(on.live()).toBe(held);
    const adapted = make({})();
    expect(() => withLora(adapted, { parts: ["experts"], random: random(on, 1) })).toThrow(UnsupportedError);
    expect(() => lowRank({ "lora/x": {} })).toThrow(ShapeError);
    dispose([model.params, ...adaptersOf(adapted)]);
    expect(on.live()).toBe(0);
  });
});

describe("low-rank maps beside stored weights", () => {
  const folder = mkdtempSync(join(tmpdir(), "switchyard-lora-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  let on: Engine;
  beforeAll(async () => {
    on = engine(await wasm());
  });
  const packed = (bits: number): Json => ({
    quant_method: "compressed-tensors",
    format: "pack-quantized",
    config_groups: { group_0: { targets: ["Linear"], weights: { num_bits: bits, group_size: 8 } } },
    ignore: ["lm_head", "re:.*gate$"],
  });
  /** A checkpoint of a form that no recorded one has. */
  const made = async (name: string, more: { readonly [key: string]: Json }, dtype: "BF16" | "F16" | "F32") => {
    const config = { ...JSON.parse(readFileSync(`${fixtures}/mixtral/config.json`, "utf8")), ...more };
    const architecture = architectures.find(({ modelTypes }) => modelTypes.includes("mixtral"));
    if (!architecture) throw new Error("no mixtral");
    await randomCheckpoint(join(folder, name), { config, architecture }, { dtype, scale: 0.3 });
    return async (options: ReadModelOptions) => (await loadModel(join(folder, name), { engine: on, ...options })).model;
  };
  const forms: Record<string, () => Promise<(options: ReadModelOptions) => Promise<LanguageModel>>> = {
    bf16: () => made("bf16", {}, "BF16"),
    f16: () => made("f16", {}, "F16"),
    int8: () => made("int8", { quantization_config: packed(8) }, "F32"),
    int4: () => made("int4", { quantization_config: packed(4) }, "F32"),
    fp8: async () => (options) => familyModel("deepseek_v3_fp8", on, options),
    mxfp4: async () => (options) => familyModel("gpt_oss_mxfp4", on, options),
  };

  it.each(Object.keys(forms))(
    "%s stays as it is, and A and B get the gradients of the same numbers in f32",
    async (form) => {
      const load = await (forms[form] as (typeof forms)[string])();
      const results: { losses: number[]; params: Map<string, readonly number[]> }[] = [];
      for (const weights of ["stored", "f32"] as const) {
        const model = await load({ weights });
        const held = on.live();
        const before = await contents(model.params);
        const forms = new Set(
          leaves(model.params).map(([path, x]) => `${path.match(/\.(int|fp8|mxfp4)\w*/)?.[0].slice(1) ?? x.dtype}`),
        );
        expect(forms.has(form)).toBe(weights === "stored");
        const adapted = withLora(model, { parts: ["experts", "attention"], rank: 2, random: random(on, 3) });
        const data = text(on);
        const task = tuningTask(adapted, { trains: isLora, batch: () => data.batch(0) });
        const run = trainer(on, task, { optimiser: sgd({ learningRate: 0.1 }), clip: 1 });
        await run.run({ until: 4 });
        const losses = run.history.map(({ loss }) => loss);
        expect(losses.at(-1)).toBeLessThan(losses[0] ?? 0);
        results.push({ losses, params: await contents(run.params) });
        expect(await contents(model.params)).toEqual(before);
        run.dispose();
        expect(on.live()).toBe(held);
        dispose([model.params, ...model.buffers]);
        expect(on.live()).toBe(0);
      }
      const [stored, wide] = results;
      expect(apart(stored?.losses ?? [], wide?.losses ?? [0])).toBeLessThan(1e-4);
      for (const [path, values] of stored?.params ?? []) {
        expect(apart(values, wide?.params.get(path) ?? []), path).toBeLessThan(1e-4);
      }
    },
  );

  it("merges into the numbers that the codes stand for", async () => {
    const [codes, wide] = await Promise.all(
      (["stored", "f32"] as const).map(async (weights) => {
        const model = await familyModel("gpt_oss_mxfp4", on, { weights });
        return moved(withLora(model, { parts: ["experts"], rank: 2, random: random(on, 3) }));
      }),
    );
    if (!codes || !wide) throw new Error("two models");
    expect(
      leaves(codes.params).some(([path]) => /\.lora\/2\.base\.mxfp4\.codes$/.test(path) && partOf(path) === "experts"),
    ).toBe(true);
    const [a, b] = [mergedLora(codes), mergedLora(wide, (path) => path.includes(".down"))];
    expect([...b.keys()]).toEqual([...a.keys()].filter((path) => path.endsWith(".down")));
    for (const [path, x] of b) {
      expect(x.dtype).toBe("f32");
      expect(apart((await a.get(path)?.data()) ?? [], await x.data())).toBe(0);
    }
    dispose([codes.params, wide.params, ...a.values(), ...b.values()] as Tree[]);
    expect(on.live()).toBe(0);
  });
});

it("paths of adapters lead to their matrices", () => {
  expect(matrixPath("layers.0.attention.q.lora/0.5.a")).toBe("layers.0.attention.q");
  expect(matrixPath("layers.0.attention.q")).toBe("layers.0.attention.q");
  expect(isLora("layers.0.attention.q.lora/0.5.a")).toBe(true);
  expect(isLora("layers.0.attention.q.lora/2.base.int8/32.codes")).toBe(false);
  expect(isLora("layers.0.attention.q")).toBe(false);
});
