import { describe, expect, it } from "vitest";
import { cpu } from "../../cpu/index.ts";
import { type Engine, engine } from "../../engine.ts";
import { glu } from "../../moe/experts.ts";
import { layerParams, moe, moeLayer } from "../../moe/layer.ts";
import type { Plan, Routed } from "../../moe/plan.ts";
import { random } from "../../random.ts";
import { adamw, sgd } from "../optim.ts";
import {
  type ExpertConfig,
  esft,
  esftConfig,
  esftPart,
  esftStatistics,
  normaliseScores,
  readExpertConfig,
  selectExperts,
  writeExpertConfig,
} from "./esft.ts";
import { count, numbersOf, resumes, smallTask, train } from "./hooks.test-util.ts";

const float64 = (): Engine => engine(cpu({ precision: 64 }));
const sparse = (e: Engine, experts: readonly number[], weights: readonly number[], k: number): Routed => {
  const shape = [experts.length / k, k];
  const plan: Plan = {
    kind: "sparse",
    experts: e.tensor(Int32Array.from(experts), shape),
    weights: e.tensor(Float64Array.from(weights), shape),
  };
  return { plan, losses: {} };
};
const closeTo = (found: readonly (readonly number[])[], expected: readonly (readonly number[])[]): void => {
  expect(found.map((row) => row.length)).toEqual(expected.map((row) => row.length));
  found.flat().forEach((x, i) => void expect(x).toBeCloseTo(expected.flat()[i] ?? Number.NaN, 12));
};

describe("the relevance of experts", () => {
  // Two samples of 3 and 1 real tokens, 3 experts, k = 2; the token behind the second sample's first ones is padding.
  const ids = [0, 1, 0, 2, 1, 0, 2, 1, 0, 1, 0, 1];
  const gates = [0.6, 0.2, 0.5, 0.1, 0.4, 0.3, 0.9, 0.05, 9, 9, 9, 9];
  const mask = [1, 1, 1, 1, 0, 0];

  it("is the mean over samples of the mean over their tokens, without padding", async () => {
    const e = float64();
    const statistics = esftStatistics({ experts: 3 });
    statistics.add([sparse(e, ids, gates, 2)], { batch: 2, mask: e.tensor(Float64Array.from(mask), [2, 3]) });
    const { gate, token } = await statistics.scores();
    closeTo(gate, [[(0.6 + 0.5 + 0.3) / 3 / 2, ((0.2 + 0.4) / 3 + 0.05) / 2, (0.1 / 3 + 0.9) / 2]]);
    closeTo(token, [[3 / 2 / 3 / 2, (2 / 2 / 3 + 1 / 2) / 2, (1 / 2 / 3 + 1 / 2) / 2]]);
  });

  it("is the same in several passes, each sample by itself", async () => {
    const e = float64();
    const together = esftStatistics({ experts: 3 });
    together.add([sparse(e, ids, gates, 2)], { batch: 2, mask: e.tensor(Float64Array.from(mask), [2, 3]) });
    const apart = esftStatistics({ experts: 3 });
    apart.add([sparse(e, ids.slice(0, 6), gates.slice(0, 6), 2)], { batch: 1 });
    apart.add([sparse(e, ids.slice(6, 8), gates.slice(6, 8), 2)], { batch: 1 });
    // A sample of padding only is none.
    apart.add([sparse(e, [0, 1], [1, 1], 2)], { batch: 1, mask: e.tensor(new Float64Array(1), [1, 1]) });
    closeTo((await apart.scores()).gate, (await together.scores()).gate);
    closeTo((await apart.scores()).token, (await together.scores()).token);
  });

  it("weighs all tokens alike where the samples are pooled", async () => {
    const e = float64();
    const statistics = esftStatistics({ experts: 3, mean: "tokens" });
    statistics.add([sparse(e, ids, gates, 2)], { batch: 2, mask: e.tensor(Float64Array.from(mask), [2, 3]) });
    closeTo((await statistics.scores()).gate, [[1.4 / 4, 0.65 / 4, 1 / 4]]);
  });

  it("leaves out empty slots, null experts and gates of 0, and takes dense plans", async () => {
    const e = float64();
    const statistics = esftStatistics({ experts: 2 });
    const dense: Plan = { kind: "dense", weights: e.tensor(Float64Array.of(0.5, 0, 0.25, 1), [2, 2]) };
    statistics.add([sparse(e, [0, -1, 2, 1], [0.5, 7, 7, 0], 2), { plan: dense, losses: {} }], { batch: 1 });
    closeTo((await statistics.scores()).gate, [
      [0.25, 0],
      [0.375, 0.5],
    ]);
    closeTo((await statistics.scores()).token, [
      [0.25, 0],
      [0.5, 0.25],
    ]);
  });

  it("comes from the forward passes of a layer", async () => {
    const e = float64();
    const draws = random(e, 3);
    const layer = moeLayer(
      {
        name: "first",
        causal: { training: true, evaluation: true },
        needs: [],
        plans: ["sparse"],
        init: () => ({ params: {}, buffers: {}, route: () => sparse(e, [0, 2, 2], [1, 1, 1], 1) }),
      },
      { engine: e, width: 2 },
      { experts: glu({ count: 3, width: 2, hidden: 2, engine: e, random: draws }) },
    );
    const { routed } = moe(layer, layerParams(layer), {
      hidden: draws.at("x").normal([3, 2]),
      layout: { batch: 1, sequence: 3, past: 0 },
      training: false,
      step: 0,
      pass: 0,
      layer: 0,
      layers: 1,
      random: draws,
      buffers: {},
    });
    const statistics = esftStatistics({ experts: 3 });
    statistics.add([routed], { batch: 1 });
    closeTo((await statistics.scores()).token, [[1 / 3, 0, 2 / 3]]);
  });

  it("says what is wrong", async () => {
    const e = float64();
    const one = sparse(e, [0, 1], [1, 1], 2);
    expect(() => esftStatistics({ experts: 0 })).toThrow("experts = 0");
    expect(() => esftStatistics({ experts: 2, mean: "layers" as "tokens" })).toThrow('mean = "layers"');
    const statistics = esftStatistics({ experts: 2 });
    await expect(statistics.scores()).rejects.toThrow("no sample with a token was added yet");
    expect(() => statistics.add([], { batch: 1 })).toThrow("without MoE layers");
    expect(() => statistics.add([one], { batch: 2 })).toThrow("1 tokens do not split into 2 samples");
    const wrong = e.tensor(Float64Array.of(1, 1), [2]);
    expect(() => statistics.add([one], { batch: 1, mask: wrong })).toThrow("one entry per token");
    statistics.add([one], { batch: 1 });
    expect(() => statistics.add([one, one], { batch: 1 })).toThrow("2 MoE layers, the passes before had 1");
    const slots: Routed = {
      plan: {
        kind: "merge",
        groups: one.plan.kind === "sparse" ? one.plan.experts : e.tensor(new Int32Array(0), [0]),
        coefficients: [],
      },
      losses: {},
    };
    expect(() => statistics.add([slots], { batch: 1 })).toThrow('kind "merge"');
  });
});

describe("the selection", () => {
  it("takes experts by falling score up to p, the crossing one included; ties go to the lower expert", () => {
    expect(selectExperts([[0.1, 0.4, 0.3, 0.2]], 0.5)).toEqual([[1, 2]]);
    expect(selectExperts([[0.1, 0.4, 0.3, 0.2]], 0.4)).toEqual([[1]]);
    expect(selectExperts([[0.25, 0.25, 0.25, 0.25]], 0.6)).toEqual([[0, 1, 2]]);
    expect(selectExperts([[0.5, 0.5]], 0)).toEqual([[]]);
    expect(selectExperts([[0.2, 0.2]], 1)).toEqual([[0, 1]]);
    expect(() => selectExperts([[1]], 1.1)).toThrow("p = 1.1");
  });

  it("divides scores by their sum over experts, or over layers as the released code does", () => {
    const scores = [
      [1, 3],
      [3, 0],
    ];
    closeTo(normaliseScores(scores), [
      [0.25, 0.75],
      [1, 0],
    ]);
    closeTo(normaliseScores(scores, { over: "layers" }), [
      [0.25, 1],
      [0.75, 0],
    ]);
    closeTo(normaliseScores([[0, 0]]), [[0, 0]]);
    expect(() => selectExperts([[1], [0.5, Number.NaN]], 0.5)).toThrow("the score of expert 1 in layer 1 is NaN");
  });
});

describe("the file expert_cfg", () => {
  it("is written and read as the released code does", () => {
    const config = esftConfig([[3, 0], []], { blocks: [1, 2], nonExpertModules: true });
    const written = '{"experts":{"1":[3,0],"2":[]},"shared_experts":false,"non_expert_modules":true}';
    expect(writeExpertConfig(config)).toBe(written);
    expect(readExpertConfig(written)).toEqual(config);
    expect(readExpertConfig('{"experts": {"0": [1]}}')).toEqual(esftConfig([[1]]));
    expect(() => esftConfig([[1], [2]], { blocks: [1, 1] })).toThrow("one different number each");
    expect(() => esftConfig([[1]], { blocks: [0.5] })).toThrow("one different number each");
    expect(() => esftConfig([[1], [2, 2]])).toThrow("layer 1 has [2,2]; expected different whole numbers from 0");
    const long = Array.from({ length: 1000 }, () => 7);
    expect(() => esftConfig([long])).toThrow(/has \[[7,]+\.\.\.; expected/);
  });

  it.each([
    ["{", "no JSON"],
    ["[]", "the file is [], not a record"],
    ["{}", '"experts" is undefined'],
    ['{"experts":{"a":[]}}', 'the layer "a" is not a number'],
    ['{"experts":{"1":[0.5]}}', "layer 1 has [0.5], not different ids"],
    ['{"experts":{"1":[2,2]}}', "layer 1 has [2,2], not different ids"],
    ['{"experts":{"01":[1]}}', 'the layer "01" is not a number'],
    ['{"experts":{"__proto__":[1]}}', 'the layer "__proto__" is not a number'],
    ['{"experts":{"1":{"length":2}}}', 'layer 1 has {"length":2}, not different ids'],
    ['{"experts":{"1":[-1]}}', "layer 1 has [-1], not different ids"],
    ['{"experts":{"1":[1e300]}}', "layer 1 has [1e+300], not different ids"],
    ['{"experts":[[0]]}', '"experts" is [[0]], not a record'],
    ['{"experts":{},"non_expert_modules":null}', '"non_expert_modules" is null, not true or false'],
    ['{"experts":{},"shared_experts":1}', '"shared_experts" is 1, not true or false'],
  ])("refuses %s", (text, message) => {
    expect(() => readExpertConfig(text)).toThrow(message);
  });
});

describe("the hook esft", () => {
  const config = esftConfig([[1, 4], [0]]);
  const hookOf = (e: Engine, given: ExpertConfig = config) =>
    esft({ engine: e, config: given, params: smallTask(e).params });
  const sizeOf = (path: string): number => (path.endsWith("gateUp") ? 2 * 4 * 6 : 6 * 4);
  const isTrained = (path: string, i: number, given: ExpertConfig = config): boolean => {
    const layer = /^layers\.(\d)\.moe\.experts/.exec(path)?.[1];
    return layer !== undefined && (given.experts[layer]?.includes(Math.floor(i / sizeOf(path))) ?? false);
  };

  it.each([
    ["layers.3.moe.experts.down", { part: "experts", block: 3 }],
    ["experts.up", { part: "experts", block: 0 }],
    ["layers.3.moe.experts.shared.core", { part: "shared" }],
    ["layers.3.moe.experts.lora.shared.a", { part: "shared" }],
    ["layers.3.moe.shared.0.experts.down", { part: "shared" }],
    ["layers.3.moe.router.weight", { part: "other" }],
    ["embed", { part: "other" }],
  ])("knows what %s is", (path, part) => {
    expect(esftPart(path)).toEqual(part);
  });

  it.each([
    ["adamw", adamw({ learningRate: 0.05, weightDecay: 0.3 })],
    ["sgd", sgd({ learningRate: 0.05, momentum: 0.9, weightDecay: 0.3 })],
  ])("changes the chosen experts only, decay and moments included (%s)", async (_, optimiser) => {
    const root = engine(cpu());
    const hook = hookOf(root);
    const live = root.live();
    const run = train([hook], { optimiser, accumulate: 2 }, { root });
    const before = await numbersOf(run.params);
    await run.run({ until: 6 });
    const after = await numbersOf(run.params);
    for (const [path, values] of Object.entries(after)) {
      values.forEach((value, i) => {
        if (!isTrained(path, i)) expect(value, `${path} ${i}`).toBe(before[path]?.[i]);
      });
    }
    for (const [path, ids] of [
      ["layers.0.moe.experts.down", [1, 4]],
      ["layers.1.moe.experts.gateUp", [0]],
    ] as const) {
      const changed = Array.from({ length: count }, (_, e) => e).filter((e) =>
        after[path]
          ?.slice(e * sizeOf(path), (e + 1) * sizeOf(path))
          .some((v, i) => v !== before[path]?.[e * sizeOf(path) + i]),
      );
      expect(changed).toEqual(ids);
    }
    const { arrays } = await run.snapshot();
    const moments = Object.entries(arrays).filter(([name]) => name.startsWith("optimiser."));
    expect(moments.length).toBe(4 * optimiser.slots.length); // none for whole tensors that are frozen
    for (const [name, { data }] of moments) {
      const path = name.split(".").slice(2).join(".");
      for (const [i, value] of data.entries()) if (!isTrained(path, i)) expect(value).toBe(0);
    }
    expect(run.history.at(-1)?.loss).toBeLessThan(run.history[0]?.loss ?? 0);
    run.dispose();
    expect(root.live()).toBe(live);
  });

  it("trains shared experts and other modules where the config says so", async () => {
    const root = engine(cpu());
    const all = esftConfig([Array.from({ length: count }, (_, e) => e), []], { nonExpertModules: true });
    const hook = hookOf(root, all);
    expect(hook.updateMask?.("layers.0.moe.experts.down")).toBeUndefined();
    expect(hook.updateMask?.("layers.1.moe.experts.down")).toBe(false);
    expect(hook.updateMask?.("layers.1.moe.router.weight")).toBeUndefined();
    const tree = { layers: [{ shared: [{ experts: { up: root.tensor(Float32Array.of(1), [1]) } }] }] };
    const shared = (sharedExperts: boolean) =>
      esft({ engine: root, config: esftConfig([], { sharedExperts }), params: tree }).updateMask?.(
        "layers.0.shared.0.experts.up",
      );
    expect([shared(true), shared(false)]).toEqual([undefined, false]);
  });

  it("trains as a run without it where everything is chosen", async () => {
    const root = engine(cpu());
    const every = Array.from({ length: count }, (_, e) => e);
    const run = train([hookOf(root, esftConfig([every, every], { nonExpertModules: true }))], {}, { root });
    const plain = train([], {}, { root });
    await run.run({ until: 3 });
    await plain.run({ until: 3 });
    expect(await numbersOf(run.params)).toEqual(await numbersOf(plain.params));
    for (const one of [run, plain]) one.dispose();
  });

  it("resumes bit for bit", () => {
    const e = engine(cpu());
    return resumes(() => hookOf(e), { accumulate: 2 }, 4, e);
  });

  it("says what does not fit", () => {
    const e = engine(cpu());
    const refused = (given: ExpertConfig) => () => hookOf(e, given);
    expect(refused(esftConfig([[0]]))).toThrow('no entry for block 1 of "layers.1.moe.experts.gateUp", only for 0');
    expect(refused(esftConfig([[0], [5]]))).toThrow("trains expert 5 of block 1");
    const doubled = hookOf(e, { ...config, experts: { 0: Array.from({ length: count }, () => 2), 1: [] } });
    const mask = doubled.updateMask?.("layers.0.moe.experts.down");
    if (!mask) throw new Error("one expert is trained, so there is a mask");
    expect(mask.size).toBe(count);
    expect(refused(esftConfig([[0], [1], [2]]))).toThrow("names block 2; the experts are in 0, 1");
    expect(() => hookOf(e).updateMask?.("layers.9.x")).toThrow('parameter "layers.9.x" was not among the params');
  });

  it("leaves nothing to train where the config freezes all, and the trainer says so", async () => {
    const root = engine(cpu());
    const run = train([hookOf(root, esftConfig([[], []]))], {}, { root });
    await expect(run.step()).rejects.toThrow("hooks freeze every one of them");
    run.dispose();
  });
});
