import { describe, expect, it } from "vitest";
import { cpu } from "../cpu/index.ts";
import { type Engine, engine } from "../engine.ts";
import { glu } from "../moe/experts.ts";
import { layerParams, moe } from "../moe/layer.ts";
import { switchBalance } from "../moe/losses.ts";
import type { Loss, Pass, Routed, Router, StepStatistics, TrainingHook } from "../moe/plan.ts";
import { add, mul, sub } from "../ops/elementwise.ts";
import { softmaxTopk } from "../ops/experts.ts";
import { linear } from "../ops/matmul.ts";
import { crossEntropy } from "../ops/normalise.ts";
import { mean, sum } from "../ops/reduce.ts";
import { takeRows } from "../ops/rows.ts";
import { reshape } from "../ops/shape.ts";
import { type Random, random } from "../random.ts";
import { dispose, leaves, type Tensor, type Tree } from "../tensor.ts";
import { adamw, sgd } from "./optim.ts";
import { cosineDecay, warmUp } from "./schedule.ts";
import { type PassInfo, type StepReport, type Task, type Trainer, type TrainerOptions, trainer } from "./trainer.ts";

// A language model of two MoE layers on a made-up text: embedding (tied with the head), noisy top-k routing with a
// bias and a
// lambda that live in buffers, experts of which some stay without a token.
const [vocabulary, width, count, sequence] = [11, 6, 5, 7];

interface Batch {
  readonly ids: Int32Array;
  readonly labels: Int32Array;
}
const text = (index: number): Batch => {
  const ids = Int32Array.from({ length: sequence + 1 }, (_, i) => (index * 5 + i * i + i * (index % 3)) % vocabulary);
  return { ids: ids.slice(0, sequence), labels: ids.slice(1) };
};

const leaf = (tree: Tree, ...path: string[]): Tensor =>
  path.reduce<Tree>((node, key) => (node as Record<string, Tree>)[key] as Tree, tree) as Tensor;

function makeRouter(root: Engine, draws: Random): Router {
  return {
    params: { weight: draws.at("router").normal([count, width]) },
    buffers: { bias: root.tensor(new Float32Array(count), [count]), lambda: root.tensor(Float32Array.of(0.01), []) },
    route(params, { hidden, random, layer, buffers, training, globalLoad }) {
      const noise = training ? mul(random.at(layer, "noise").normal([sequence, count]), 0.3) : 0;
      const logits = add(add(linear(hidden, leaf(params, "weight")), leaf(buffers, "bias")), noise);
      const { weights, ids, probabilities } = softmaxTopk(logits, { k: 2, order: "softmax-topk" });
      const balance = switchBalance({ probabilities, experts: ids, ...(globalLoad ? { load: globalLoad } : {}) });
      return {
        plan: { kind: "sparse", experts: ids, weights },
        logits,
        losses: { balance: { value: mul(balance, leaf(buffers, "lambda")), weight: 0.5 } },
        metrics: { importance: mean(probabilities, [0]), lambda: leaf(buffers, "lambda") },
      };
    },
    // As DeepSeek's bias and ReMoE's lambda: from the loads of this layer, and of all layers.
    afterStep(layers: readonly StepStatistics[], buffers: Tree) {
      const own = layers[0] as StepStatistics;
      const signs = own.load.map((load) => Math.sign((own.tokens * 2) / count - load) * 0.01);
      const dead = layers.some(({ load }) => load.includes(0));
      return {
        bias: add(leaf(buffers, "bias"), root.tensor(signs, [count])),
        lambda: mul(leaf(buffers, "lambda"), dead ? 1.2 : 1 / 1.2),
      };
    },
  };
}

interface Options {
  /** Changes the loss of a forward pass. */
  readonly loss?: (loss: Tensor, info: PassInfo) => Tensor;
  readonly batch?: (index: number) => Batch;
  readonly noise?: boolean;
  readonly layers?: number;
}

function makeTask(root: Engine, { loss: change, batch = text, layers: depth = 2 }: Options = {}): Task<Batch> {
  const draws = random(root, 17);
  const embedding = draws.at("embedding").normal([vocabulary, width]);
  const layers = Array.from({ length: depth }, (_, i) => {
    const experts = glu({ count, width, hidden: 4, engine: root, random: draws.at("experts", i) });
    return { router: makeRouter(root, draws.at(i)), experts };
  });
  const head = { embedding, scale: root.tensor(Float32Array.of(1), [1]) };
  return {
    params: { embedding, head, layers: layers.map(layerParams) },
    routers: layers.map(({ router }) => router),
    batch,
    info: ({ labels }) => ({ labels: root.tensor(labels, [labels.length]) }),
    forward(params, buffers, { ids, labels }, info): Pass {
      const n = ids.length;
      let hidden = takeRows(leaf(params, "embedding"), root.tensor(ids, [n])); // [n, width]
      const routed = layers.map((layer, i) => {
        const own = leaf(params, "layers", `${i}`);
        const result = moe(
          layer,
          own,
          {
            ...info,
            hidden,
            layout: { batch: 1, sequence: n, past: 0 },
            layer: i,
            layers: depth,
            buffers: buffers[i] as Tree,
            ...(info.globalLoad?.[i] ? { globalLoad: info.globalLoad[i] } : { globalLoad: undefined as never }),
          },
          info.observe
            ? { observe: (name, rows, ends) => info.observe?.(`layers.${i}.experts.${name}`, i, rows, ends) }
            : {},
        );
        hidden = add(hidden, result.output);
        return result.routed;
      });
      const logits = linear(mul(hidden, leaf(params, "head", "scale")), leaf(params, "head", "embedding"));
      const loss = mean(crossEntropy(logits, root.tensor(labels, [n])).losses);
      return { loss: change ? change(loss, info) : loss, logits, layers: routed };
    },
  };
}

const base: TrainerOptions = {
  optimiser: adamw({ learningRate: 0.02, weightDecay: 0.1 }),
  schedule: warmUp(3, cosineDecay()),
  totalSteps: 10,
  clip: 1,
  seed: 5,
};
const make = (options: Partial<TrainerOptions> = {}, task: Options = {}, root = engine(cpu())) => {
  const made = trainer(root, makeTask(root, task), { ...base, ...options });
  return { root, made };
};
const values = async (tree: Tree): Promise<Record<string, number[]>> =>
  Object.fromEntries(
    await Promise.all(
      leaves(tree).map(async ([path, x]): Promise<[string, number[]]> => [path, [...(await x.data())]]),
    ),
  );
const timeless = (history: readonly StepReport[]) => history.map(({ seconds: _, ...report }) => report);
const distance = (a: Record<string, number[]>, b: Record<string, number[]>): number => {
  expect(Object.keys(a)).toEqual(Object.keys(b));
  return Math.max(
    ...Object.entries(a).flatMap(([path, row]) => row.map((x, i) => Math.abs(x - (b[path]?.[i] as number)))),
  );
};
const stateOf = async (one: Trainer<Batch>) => {
  const { arrays } = await one.snapshot();
  return { arrays, buffers: await values(one.buffers), history: timeless(one.history) };
};

describe("a step", () => {
  it("learns, and reports what happened", async () => {
    const { made } = make({ totalSteps: 60 });
    expect(await made.run()).toBe("done");
    const [first, last] = [made.history[0] as StepReport, made.history.at(-1) as StepReport];
    expect(made.history.length).toBe(60);
    expect(last.loss).toBeLessThan(first.loss * 0.8);
    expect(first).toMatchObject({ step: 0, tokens: sequence });
    expect(first.learningRate).toBeCloseTo(0.02 / 3, 12);
    expect(first.loads.map((load) => load.reduce((a, b) => a + b, 0))).toEqual([2 * sequence, 2 * sequence]);
    expect(first.losses.balance).toBeGreaterThan(0);
    expect(first.total).toBeCloseTo(first.loss + (first.losses.balance as number), 12);
    expect(first.metrics.map((metrics) => Object.keys(metrics).sort())[1]).toContain("importance");
    expect(first.metrics[0]?.importance?.reduce((a, b) => a + b, 0)).toBeCloseTo(1, 5);
    expect(first.metrics[0]?.load).toBeUndefined();
    expect(first.gradientNorm).toBeGreaterThan(0);
  });

  it("leaves no tensor behind and reads the device once", async () => {
    const backend = cpu();
    let transfers = 0;
    const root = engine({
      ...backend,
      download(x) {
        transfers++;
        return backend.download(x);
      },
    });
    const { made } = make({ accumulate: 2 }, {}, root);
    const live = root.live();
    for (let step = 1; step <= 4; step++) {
      await made.step();
      expect(root.live()).toBe(live);
      expect(transfers).toBe(step);
    }
    made.dispose();
    expect(root.live()).toBe(0);
    await expect(made.step()).rejects.toThrow("it was disposed");
  });

  it("equals the formulas: gradient by finite differences, norm, clipping, one sgd update", async () => {
    const root = engine(cpu({ precision: 64 }));
    const task = makeTask(root, { layers: 1 });
    const one = trainer(root, task, { optimiser: sgd({ learningRate: 0.1, momentum: 0 }), clip: 0.5, seed: 5 });
    const before = await values(one.params);
    const objective = async (path: string, i: number, delta: number): Promise<number> => {
      const tree = makeTask(root, { layers: 1 });
      const changed = Object.fromEntries(
        leaves(tree.params).map(([name, x]) => {
          const data = Float64Array.from(before[name] as number[]);
          // The head's embedding is the embedding.
          if (name === path || (path === "embedding" && name === "head.embedding"))
            data[i] = (data[i] as number) + delta;
          return [name, root.tensor(data, x.shape)];
        }),
      );
      const params = {
        embedding: changed.embedding,
        head: { embedding: changed["head.embedding"], scale: changed["head.scale"] },
        layers: [
          {
            router: { weight: changed["layers.0.router.weight"] },
            experts: { gateUp: changed["layers.0.experts.gateUp"], down: changed["layers.0.experts.down"] },
          },
        ],
      } as Tree;
      const info = {
        step: 0,
        training: true,
        pass: 0,
        microBatch: 0,
        schedule: {},
        random: random(root, 5).at(0, 0, 0),
      };
      const { loss, layers } = tree.forward(
        params,
        tree.routers.map((r) => r.buffers),
        text(0),
        info,
      );
      const { value, weight } = (layers[0] as Routed).losses.balance as Loss;
      return ((await loss.data())[0] as number) + weight * ((await value.data())[0] as number);
    };
    const gradients: Record<string, number[]> = {};
    for (const path of [
      "embedding",
      "head.scale",
      "layers.0.router.weight",
      "layers.0.experts.gateUp",
      "layers.0.experts.down",
    ]) {
      const row: number[] = [];
      for (let i = 0; i < (before[path] as number[]).length; i++) {
        row.push(((await objective(path, i, 1e-5)) - (await objective(path, i, -1e-5))) / 2e-5);
      }
      gradients[path] = row;
    }
    const norm = Math.sqrt(
      Object.values(gradients)
        .flat()
        .reduce((s, g) => s + g * g, 0),
    );
    const report = await one.step();
    expect(report.total).toBeCloseTo(await objective("embedding", 0, 0), 10);
    expect(norm).toBeGreaterThan(0.5);
    expect(report.gradientNorm).toBeCloseTo(norm, 6);
    const after = await values(one.params);
    for (const [path, row] of Object.entries(gradients)) {
      row.forEach((g, i) => {
        expect(after[path]?.[i]).toBeCloseTo((before[path]?.[i] as number) - (0.1 * 0.5 * g) / norm, 7);
      });
    }
    expect(after["head.embedding"]).toEqual(after.embedding);
  });

  it("accumulates to the same step as one big batch", async () => {
    // Without noise and without a balance loss, which look at one micro-batch at a time.
    const quiet = (root: Engine, batch: (index: number) => Batch): Task<Batch> => {
      const task = makeTask(root, { batch });
      const routers = task.routers.map((router) => ({ ...router, afterStep: (_: unknown, buffers: Tree) => buffers }));
      return {
        ...task,
        routers,
        forward(params, buffers, some, info) {
          const out = task.forward(params, buffers, some, { ...info, training: false });
          return { ...out, layers: out.layers.map((routed) => ({ ...routed, losses: {} })) };
        },
      };
    };
    const join = (index: number): Batch => {
      const parts = [0, 1, 2].map((i) => text(index * 3 + i));
      return {
        ids: Int32Array.from(parts.flatMap(({ ids }) => [...ids])),
        labels: Int32Array.from(parts.flatMap(({ labels }) => [...labels])),
      };
    };
    const root = engine(cpu({ precision: 64 }));
    const small = trainer(root, quiet(root, text), { ...base, accumulate: 3 });
    const big = trainer(root, quiet(root, join), base);
    for (let i = 0; i < 3; i++) {
      const [a, b] = [await small.step(), await big.step()];
      expect(a.loss).toBeCloseTo(b.loss, 10);
      expect(a.gradientNorm).toBeCloseTo(b.gradientNorm, 10);
      expect(a.loads).toEqual(b.loads);
      expect(a.tokens).toBe(3 * sequence);
      expect(a.tokens).toBe(b.tokens);
    }
    expect(distance(await values(small.params), await values(big.params))).toBeLessThan(1e-8);
  });

  it("hands the loads of earlier micro-batches on where that is asked for", async () => {
    const seen: (number[] | undefined)[] = [];
    const root = engine(cpu());
    const task = makeTask(root);
    const pending: Promise<unknown>[] = [];
    const spying: Task<Batch> = {
      ...task,
      forward(params, buffers, batch, info) {
        const at = seen.push(undefined) - 1;
        const data = info.globalLoad?.[1]?.data();
        const note = (found: ArrayLike<number>): void => {
          seen[at] = Array.from(found);
        };
        if (data) pending.push(data.then(note));
        return task.forward(params, buffers, batch, info);
      },
    };
    const one = trainer(root, spying, { ...base, accumulate: 3, globalBalance: true });
    const { loads } = await one.step();
    await Promise.all(pending);
    expect(seen[0]).toBeUndefined();
    expect(seen[1]?.reduce((a, b) => a + b, 0)).toBeCloseTo(2, 5);
    expect(seen[2]?.reduce((a, b) => a + b, 0)).toBeCloseTo(2, 5);
    expect(loads[1]?.reduce((a, b) => a + b, 0)).toBe(3 * 2 * sequence);
    const plain = make({ accumulate: 3 }).made;
    expect((await plain.step()).losses.balance).not.toBe(one.history[0]?.losses.balance);
  });

  it("leaves everything as it was when the loss or the gradient is not finite", async () => {
    for (const poison of [Number.NaN, Infinity]) {
      let poisoned = false;
      const root = engine(cpu());
      let calls = 0;
      const hook: TrainingHook = {
        name: "counting",
        loss(layers) {
          hook.state = { calls: root.tensor(Int32Array.of(++calls), [1]) };
          return mul(mean((layers[0] as Routed).logits as Tensor), 0);
        },
      };
      const bad: Options["loss"] = (loss, { microBatch }) => (poisoned && microBatch === 1 ? mul(loss, poison) : loss);
      const { made } = make({ hooks: [hook], accumulate: 2 }, { loss: bad }, root);
      await made.run({ until: 2 });
      const [before, live] = [await stateOf(made), root.live()];
      poisoned = true;
      await expect(made.step()).rejects.toThrow(
        /^step 2 is not finite: loss (NaN|Infinity), .*balance .*gradient norm NaN .*batches 4 to 5/,
      );
      expect(await stateOf(made)).toEqual(before);
      expect(root.live()).toBe(live);
      expect([...(await leaf(hook.state as Tree, "calls").data())]).toEqual([4]);
      poisoned = false;
      // And the run goes on as if nothing had happened.
      await made.run();
      const calm = make({ accumulate: 2 }).made;
      await calm.run();
      expect(made.history.map(({ loss }) => loss)).toEqual(calm.history.map(({ loss }) => loss));
    }
  });

  it("does not stumble over a loss of weight 0", async () => {
    const root = engine(cpu());
    const task = makeTask(root);
    const one = trainer(
      root,
      {
        ...task,
        forward(params, buffers, batch, info) {
          const out = task.forward(params, buffers, batch, info);
          const off = { value: mul(out.loss, Infinity), weight: 0 };
          return { ...out, layers: out.layers.map((routed) => ({ ...routed, losses: { off } })) };
        },
      },
      base,
    );
    expect((await one.step()).losses).toEqual({});
  });

  it("says what is wrong with a task", async () => {
    const root = engine(cpu());
    const task = makeTask(root);
    const failing = (change: (pass: Pass) => Pass) =>
      trainer(
        root,
        {
          ...task,
          params: { w: root.tensor(Float32Array.of(1), [1]), ...(task.params as object) },
          forward: (...inputs) => change(task.forward(...inputs)),
        },
        base,
      ).step();
    const live = root.live();
    await expect(failing((pass) => ({ ...pass, layers: [] }))).rejects.toThrow(
      "forward returned 0 MoE layers, the task has 2 routers",
    );
    await expect(failing((pass) => ({ ...pass, loss: pass.logits }))).rejects.toThrow(
      "the task's loss must be one number, it is f32 [7, 11]; average or sum it first",
    );
    await expect(
      failing((pass) => ({ ...pass, layers: pass.layers.map(({ metrics: _, ...routed }) => routed) })),
    ).rejects.toThrow("MoE layer 0 has no metrics.load; run it through moe(), or add expertLoad(plan)");
    await expect(
      failing((pass) => ({
        ...pass,
        loss: root.tensor(Float32Array.of(1), []),
        layers: pass.layers.map((r) => ({ ...r, losses: {} })),
      })),
    ).rejects.toThrow("the loss does not depend on any trained parameter");
    expect(root.live()).toBeGreaterThan(live);
    expect(() => trainer(root, task, { ...base, accumulate: 0 })).toThrow(
      "accumulate must be a whole number from 1 up, found 0",
    );
    expect(() => trainer(root, task, { ...base, clip: -1 })).toThrow("clip must be above 0, found -1");
    expect(() => trainer(root, task, { ...base, hooks: [{ name: "a" }, { name: "a" }] })).toThrow(
      "hooks need different names",
    );
  });

  it("refuses a second step at the same time", async () => {
    const { made } = make();
    const [first, second, snapshot] = await Promise.allSettled([made.step(), made.step(), made.snapshot()]);
    expect(first).toMatchObject({ status: "fulfilled", value: { step: 0 } });
    expect(second).toMatchObject({ reason: { message: expect.stringContaining("step while a step is running") } });
    expect(snapshot).toMatchObject({
      reason: { message: expect.stringContaining("snapshot while a step is running") },
    });
    expect((await made.step()).step).toBe(1);
  });

  it("trains nothing of a model without MoE layers but its parameters", async () => {
    const { made } = make({ totalSteps: 2 }, { layers: 0 });
    expect(await made.run()).toBe("done");
    expect(made.history[1]).toMatchObject({ loads: [], metrics: [], losses: {} });
  });
});

describe("resuming", () => {
  it.each([
    { name: "adamw", optimiser: adamw({ learningRate: 0.02 }), accumulate: 1 },
    {
      name: "sgd, accumulating",
      optimiser: sgd({ learningRate: 0.1, nesterov: true, weightDecay: 0.01 }),
      accumulate: 2,
    },
  ])("equals the uninterrupted run bit for bit: $name", async ({ optimiser, accumulate }) => {
    // State that grows during forward passes, as OMoE's projectors do.
    const hookOf = (): TrainingHook => {
      const hook: TrainingHook = {
        name: "observer",
        observe(parameter, layer, rows) {
          if (parameter !== "layers.1.experts.gateUp" || layer !== 1) return;
          const [before] = ((hook.state as { sums?: Tensor[] } | undefined)?.sums ?? []) as Tensor[];
          const more = sum(rows, [0]); // [width]
          hook.state = { sums: [before ? add(before, more) : more] };
        },
        // The state matters for what follows.
        transformGradient(parameter, gradient) {
          if (parameter !== "head.scale") return gradient;
          return add(gradient, mul(reshape(sum((hook.state as { sums: Tensor[] }).sums[0] as Tensor), [1]), 1e-3));
        },
      };
      return hook;
    };
    const options = { optimiser, accumulate };
    const whole = make({ ...options, hooks: [hookOf()] }).made;
    await whole.run();

    const first = make({ ...options, hooks: [hookOf()] }).made;
    await first.run({ until: 5 });
    const { arrays, json } = await first.snapshot();
    // The first run goes on, which must not change what was saved.
    await first.run({ until: 7 });

    const second = make({ ...options, hooks: [hookOf()] });
    await second.made.step();
    const live = second.root.live();
    second.made.restore({ arrays, json: JSON.parse(JSON.stringify(json)) });
    expect(second.root.live()).toBe(live);
    expect(second.made.steps).toBe(5);
    await second.made.run();

    expect(await stateOf(second.made)).toEqual(await stateOf(whole));
    expect(second.made.history.length).toBe(10);
    expect(Object.keys((await whole.snapshot()).arrays)).toContain("hooks.observer.sums.0");
    // Not trivially equal: noise, lambda and dead experts all took part.
    expect(new Set(whole.history.map(({ metrics }) => metrics[1]?.lambda?.[0])).size).toBeGreaterThan(3);
    expect(whole.history.some(({ loads }) => loads.some((load) => load.includes(0)))).toBe(true);
  });

  it("takes seed and number of steps from the snapshot where the options leave them out", async () => {
    const whole = make().made;
    await whole.run({ until: 3 });
    const snapshot = await whole.snapshot();
    const root = engine(cpu());
    const { seed: _, totalSteps: __, ...rest } = base;
    const second = trainer(root, makeTask(root), rest);
    expect(second.totalSteps).toBeUndefined();
    second.restore(snapshot);
    expect(second.totalSteps).toBe(10);
    await second.run();
    await whole.run();
    expect(timeless(second.history)).toEqual(timeless(whole.history));
    const other = make({ seed: 6 }).made;
    other.restore(snapshot);
    await other.run();
    expect(timeless(other.history)).not.toEqual(timeless(whole.history));
  });

  it("keeps numbers that JSON does not have", async () => {
    const root = engine(cpu());
    const task = makeTask(root);
    const odd: Task<Batch> = {
      ...task,
      forward(params, buffers, batch, info) {
        const out = task.forward(params, buffers, batch, info);
        const odds = root.tensor(Float32Array.of(Number.NaN, Infinity, -Infinity, -0), [4]);
        return { ...out, layers: out.layers.map((routed) => ({ ...routed, metrics: { ...routed.metrics, odds } })) };
      },
    };
    const one = trainer(root, odd, base);
    await one.step();
    const { arrays, json } = await one.snapshot();
    const history = structuredClone(one.history);
    one.restore({ arrays, json: JSON.parse(JSON.stringify(json)) });
    expect(one.history).toEqual(history);
    expect(Object.is(one.history[0]?.metrics[0]?.odds?.[3], 0)).toBe(true);
  });

  it("refuses a snapshot of something else before anything changes", async () => {
    const { root, made } = make();
    await made.run({ until: 2 });
    const good = await made.snapshot();
    const { made: target, root: other } = make();
    await target.step();
    const [before, live] = [await stateOf(target), other.live()];
    const json = good.json as Record<string, never>;
    const without = (name: string) => Object.fromEntries(Object.entries(good.arrays).filter(([key]) => key !== name));
    const small = { data: new Float32Array(1), shape: [1], dtype: "f32" as const };
    const cases: [() => void, string][] = [
      [() => target.restore({ ...good, arrays: without("params.embedding") }), "params.embedding is missing"],
      [
        () => target.restore({ ...good, arrays: without("optimiser.v.head.scale") }),
        "optimiser.v.head.scale is missing",
      ],
      [() => target.restore({ ...good, arrays: without("buffers.1.bias") }), "buffers.1.bias is missing"],
      [
        () => target.restore({ ...good, arrays: { ...good.arrays, "params.more": small } }),
        "params.more is not part of this run",
      ],
      [
        () => target.restore({ ...good, arrays: { ...good.arrays, "params.embedding": small } }),
        "params.embedding is f32 [1], expected f32 [11, 6]",
      ],
      [
        () =>
          target.restore({
            ...good,
            arrays: { ...good.arrays, "params.head.scale": { ...small, data: new Float32Array(2) } },
          }),
        "needs 1 elements, the data has 2",
      ],
      [() => target.restore({ ...good, json: { ...json, format: "x" } }), "not a trainer snapshot of this version"],
      [() => target.restore({ ...good, json: null }), "not a trainer snapshot of this version"],
      [() => target.restore({ ...good, json: { ...json, steps: "2" } }), 'damaged: "steps" is "2"'],
      [() => make({ optimiser: sgd() }).made.restore(good), "a run with adamw, this trainer uses sgd"],
      [() => make({ hooks: [{ name: "thor" }] }).made.restore(good), 'had no hook "thor", only none'],
      [() => make({}, { layers: 1 }).made.restore(good), "is not part of this run"],
    ];
    for (const [attempt, message] of cases) expect(attempt).toThrow(message);
    expect(await stateOf(target)).toEqual(before);
    expect(other.live()).toBe(live);
    target.restore(good);
    expect(timeless(target.history)).toEqual(timeless(made.history));
    expect(root.live()).toBeGreaterThan(0);
  });

  it("recovers by a snapshot from an update that failed half-way", async () => {
    let failing = false;
    const good = adamw({ learningRate: 0.02, weightDecay: 0.1 });
    let updates = 0;
    const optimiser = {
      ...good,
      update(...inputs: Parameters<typeof good.update>) {
        if (failing && ++updates === 3) throw new Error("out of memory");
        return good.update(...inputs);
      },
    };
    const { root, made } = make({ optimiser });
    await made.run({ until: 2 });
    const snapshot = await made.snapshot();
    const live = root.live();
    failing = true;
    await expect(made.step()).rejects.toThrow("out of memory");
    await expect(made.step()).rejects.toThrow("the update of step 2 failed half-way; restore a snapshot");
    failing = false;
    made.restore(snapshot);
    expect(root.live()).toBe(live);
    await made.run();
    const whole = make().made;
    await whole.run();
    expect(await stateOf(made)).toEqual(await stateOf(whole));
  });
});

describe("run", () => {
  it("stops at an abort between steps and goes on afterwards", async () => {
    const { made } = make();
    const control = new AbortController();
    const outcome = await made.run({
      signal: control.signal,
      onStep: ({ step }) => {
        if (step === 3) control.abort();
      },
    });
    expect(outcome).toBe("aborted");
    expect(made.steps).toBe(4);
    expect(await made.run({ signal: AbortSignal.abort() })).toBe("aborted");
    expect(made.steps).toBe(4);
    expect(await made.run()).toBe("done");
    expect(await made.run({ signal: AbortSignal.abort() })).toBe("done");
    const whole = make().made;
    await whole.run();
    expect(timeless(made.history)).toEqual(timeless(whole.history));
  });

  it("lets timers in while it is busy", async () => {
    const { made } = make({ totalSteps: 100_000 });
    const control = new AbortController();
    setTimeout(() => control.abort(), 1);
    expect(await made.run({ signal: control.signal })).toBe("aborted");
    expect(made.steps).toBeLessThan(100_000);
  });

  it("makes checkpoints that resume", async () => {
    const { made } = make();
    const steps: unknown[] = [];
    await made.run({
      checkpointEvery: 4,
      onCheckpoint({ json }) {
        steps.push((json as Record<string, unknown>).steps);
      },
    });
    expect(steps).toEqual([4, 8]);
  });

  it("passes errors of its callbacks on and stays usable", async () => {
    const { made } = make();
    const fail = () => {
      throw new Error("disk full");
    };
    await expect(made.run({ checkpointEvery: 2, onCheckpoint: fail })).rejects.toThrow("disk full");
    expect(made.steps).toBe(2);
    expect(await made.run()).toBe("done");
  });

  it("needs an end, which can be fixed once", async () => {
    const { totalSteps: _, ...open } = base;
    const root = engine(cpu());
    const one = trainer(root, makeTask(root), open);
    await expect(one.run()).rejects.toThrow("pass until, or call setTotalSteps first");
    expect(await one.run({ until: 4 })).toBe("done");
    // While the end is unknown, the cosine stays at its top.
    expect(one.history[3]?.learningRate).toBe(0.02);
    expect(() => one.setTotalSteps(2.5)).toThrow("needs a whole number of steps, found 2.5");
    one.setTotalSteps(8);
    expect(() => one.setTotalSteps(9)).toThrow("the number of steps is fixed already, at 8");
    expect(await one.run()).toBe("done");
    expect(one.steps).toBe(8);
    expect(one.history[7]?.learningRate).toBeLessThan(0.01);
    expect(((await one.snapshot()).json as Record<string, unknown>).totalSteps).toBe(8);
  });
});

describe("hooks", () => {
  it("run several passes of the same batch and combine them", async () => {
    const seen: number[] = [];
    const hook: TrainingHook = {
      name: "agreement",
      passes: 2,
      beforeStep: ({ step }) => ({ even: step % 2 === 0 }),
      combine([first, second], info) {
        seen.push(first?.logits.size ?? 0, info.labels?.size ?? 0);
        const difference = sub((first as Pass).logits, (second as Pass).logits);
        return add(add((first as Pass).loss, (second as Pass).loss), mean(mul(difference, difference)));
      },
    };
    const passes: [number, unknown][] = [];
    const { root, made } = make(
      { hooks: [hook], accumulate: 2 },
      {
        loss(loss, { pass, schedule }) {
          passes.push([pass, schedule.even]);
          return loss;
        },
      },
    );
    const live = root.live();
    const report = await made.step();
    await made.step();
    expect(passes).toEqual([0, 1, 0, 1].map((p) => [p, true]).concat([0, 1, 0, 1].map((p) => [p, false])));
    expect(seen.slice(0, 2)).toEqual([sequence * vocabulary, sequence]);
    expect(root.live()).toBe(live);
    expect(report.tokens).toBe(2 * sequence);
    expect(report.loads[0]?.reduce((a, b) => a + b, 0)).toBe(2 * 2 * 2 * sequence);
    // Combined = loss1 + loss2 + disagreement = 2 * mean loss + disagreement; the hook's share is what exceeds the
    // mean loss.
    expect(report.losses.agreement).toBeGreaterThan(report.loss);
    expect(report.total).toBeCloseTo(
      report.loss + (report.losses.agreement as number) + (report.losses.balance as number),
      6,
    );
    expect(() => make({ hooks: [hook, { ...hook, name: "again" }] })).toThrow("only one hook can combine passes");
  });

  it("freeze parameters, moments and decay included", async () => {
    const hook: TrainingHook = {
      name: "frozen",
      updateMask: (path) => (path.includes("experts") || path === "embedding" ? false : undefined),
    };
    const { made } = make({ hooks: [hook] });
    const before = await values(made.params);
    await made.run({ until: 3 });
    const after = await values(made.params);
    for (const path of Object.keys(before)) {
      const frozen = path.includes("experts") || path.includes("embedding");
      if (frozen) expect(after[path]).toEqual(before[path]);
      else expect(after[path]).not.toEqual(before[path]);
    }
    expect(
      Object.keys((await made.snapshot()).arrays)
        .filter((name) => name.startsWith("optimiser"))
        .sort(),
    ).toEqual(
      ["head.scale", "layers.0.router.weight", "layers.1.router.weight"]
        .flatMap((path) => [`optimiser.m.${path}`, `optimiser.v.${path}`])
        .sort(),
    );
    const resumed = make({ hooks: [hook] }).made;
    resumed.restore(await made.snapshot());
    await resumed.run();
    await made.run();
    expect(await stateOf(resumed)).toEqual(await stateOf(made));
    const all: TrainingHook = { name: "all", updateMask: () => false };
    await expect(make({ hooks: [all] }).made.step()).rejects.toThrow("hooks freeze every one of them");
  });

  it("freeze parts of a parameter with a mask that broadcasts", async () => {
    const root = engine(cpu());
    const mask = root.tensor(Float32Array.of(0, 1, 0, 1, 1), [5, 1, 1]);
    const path = "layers.0.experts.gateUp";
    const hook: TrainingHook = { name: "esft", updateMask: (name) => (name === path ? mask : undefined) };
    const { made } = make({ hooks: [hook] }, {}, root);
    const before = await values(made.params);
    const live = root.live();
    await made.run({ until: 4 });
    expect(root.live()).toBe(live);
    const after = await values(made.params);
    const { arrays } = await made.snapshot();
    const size = (before[path] as number[]).length / 5;
    for (let e = 0; e < 5; e++) {
      const part = (row: ArrayLike<number>) => Array.from(row).slice(e * size, (e + 1) * size);
      const moments = part(arrays[`optimiser.m.${path}`]?.data as Float32Array);
      if (e === 0 || e === 2) {
        expect(part(after[path] as number[])).toEqual(part(before[path] as number[]));
        expect(moments.every((x) => x === 0)).toBe(true);
      } else expect(part(after[path] as number[])).not.toEqual(part(before[path] as number[]));
    }
  });

  it("can thaw a parameter later, whose moments then start at zero", async () => {
    let step = 0;
    const hook: TrainingHook = {
      name: "thaw",
      beforeStep(info) {
        step = info.step;
        return {};
      },
      updateMask: (path) => (path === "embedding" && step < 2 ? false : undefined),
    };
    const { made } = make({ hooks: [hook] });
    const before = await values(made.params);
    await made.run({ until: 2 });
    expect((await values(made.params)).embedding).toEqual(before.embedding);
    await made.run({ until: 3 });
    const after = await values(made.params);
    // The first AdamW update moves each entry by the learning rate, whatever the gradient's size (but for decay and
    // eps).
    const rate = made.history[2]?.learningRate as number;
    const moved = after.embedding?.map((x, i) =>
      Math.abs(x - (before.embedding?.[i] as number) * (1 - rate * 0.1)),
    ) as number[];
    const touched = moved.filter((x) => x > rate / 2);
    expect(touched.length).toBeGreaterThan(0);
    for (const x of touched) expect(x).toBeCloseTo(rate, 4);
  });

  it("transform gradients, and say which one they got wrong", async () => {
    const zero: TrainingHook = { name: "zero", transformGradient: (_, gradient) => mul(gradient, 0) };
    expect((await make({ hooks: [zero] }).made.step()).gradientNorm).toBe(0);
    const wrong: TrainingHook = {
      name: "wrong",
      transformGradient: (path, gradient) => (path === "embedding" ? sum(gradient) : gradient),
    };
    const { root, made } = make({ hooks: [wrong] });
    const [before, live] = [await stateOf(made), root.live()];
    await expect(made.step()).rejects.toThrow('turned the gradient of "embedding", f32 [11, 6], into f32 []');
    expect(await stateOf(made)).toEqual(before);
    expect(root.live()).toBe(live);
  });

  it("add losses over all layers", async () => {
    const hook: TrainingHook = {
      name: "logits",
      loss: (layers, { labels }) => {
        expect(labels?.size).toBe(sequence);
        return mul(add(mean(layers[0]?.logits as Tensor), mean(layers[1]?.logits as Tensor)), 3);
      },
    };
    const [plain, hooked] = [make().made, make({ hooks: [hook] }).made];
    const [a, b] = [await plain.step(), await hooked.step()];
    expect(b.loss).toBe(a.loss);
    expect(b.losses.balance).toBe(a.losses.balance);
    expect(b.losses.logits).not.toBe(0);
    expect(b.total).toBeCloseTo(a.total + (b.losses.logits as number), 6);
    expect(b.gradientNorm).not.toBe(a.gradientNorm);
  });
});

describe("evaluate", () => {
  it("is the loss without noise and without a change, weighing batches by their tokens", async () => {
    const { root, made } = make();
    await made.run({ until: 2 });
    const [before, live] = [await stateOf(made), root.live()];
    const short: Batch = { ids: Int32Array.of(1, 2, 3), labels: Int32Array.of(2, 3, 4) };
    const all = await made.evaluate([text(50), short]);
    const [long, brief] = [await made.evaluate([text(50)]), await made.evaluate([short])];
    expect(all.tokens).toBe(sequence + 3);
    expect(all.loss).toBeCloseTo((long.loss * sequence + brief.loss * 3) / (sequence + 3), 6);
    expect(all.loads[1]).toEqual(long.loads[1]?.map((x, i) => x + (brief.loads[1]?.[i] as number)));
    expect(all.metrics[0]?.importance?.[0]).toBeCloseTo(
      ((long.metrics[0]?.importance?.[0] as number) + (brief.metrics[0]?.importance?.[0] as number)) / 2,
      6,
    );
    expect(await made.evaluate([text(50)])).toEqual(long);
    expect(await stateOf(made)).toEqual(before);
    expect(root.live()).toBe(live);
    await expect(made.evaluate([])).rejects.toThrow("0 batches without a single token");
  });

  it("counts real tokens only", async () => {
    const root = engine(cpu());
    const task = makeTask(root);
    const masked: Task<Batch> = {
      ...task,
      info: ({ ids }) => ({
        mask: root.tensor(
          Float32Array.from(ids, (_, i) => (i < 4 ? 1 : 0)),
          [1, ids.length],
        ),
      }),
    };
    const one = trainer(root, masked, base);
    expect((await one.evaluate([text(1), text(2)])).tokens).toBe(8);
    expect((await one.step()).tokens).toBe(4);
    const counted = trainer(root, { ...makeTask(root), info: () => ({ tokens: 3 }) }, base);
    expect((await counted.step()).tokens).toBe(3);
  });
});

it("frees what belongs to the caller only when told", () => {
  const { root, made } = make();
  expect(root.live()).toBeGreaterThan(0);
  dispose(made.params);
  made.dispose();
  expect(root.live()).toBe(0);
});
