// The trainer on a device that answers late and out of order, as a GPU does: the same numbers as on one that blocks,
// and a device that fails in the middle.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Backend, Kernel } from "../backend.ts";
import { counted } from "../counted.ts";
import { cpu } from "../cpu/index.ts";
import type { CpuHandle } from "../cpu/storage.ts";
import { type Engine, engine } from "../engine.ts";
import { DeviceError } from "../errors.ts";
import { applyCapacity } from "../moe/capacity.ts";
import { glu } from "../moe/experts.ts";
import { layerParams, moe } from "../moe/layer.ts";
import { switchBalance, zLoss } from "../moe/losses.ts";
import type { Pass, Router, StepStatistics, TrainingHook } from "../moe/plan.ts";
import { add, mul } from "../ops/elementwise.ts";
import { groupedMatmul, softmaxTopk } from "../ops/experts.ts";
import { linear } from "../ops/matmul.ts";
import { crossEntropy } from "../ops/normalise.ts";
import type { AdamwAttrs } from "../ops/optimiser.ts";
import { mean, sum } from "../ops/reduce.ts";
import { takeRows } from "../ops/rows.ts";
import { type Random, random } from "../random.ts";
import type { Tensor, Tree } from "../tensor.ts";
import { adamw } from "./optim.ts";
import { cosineDecay } from "./schedule.ts";
import type { TrainerSnapshot } from "./snapshot.ts";
import { type Evaluation, type StepReport, type Task, type Trainer, trainer } from "./trainer.ts";

// ---------------------------------------------------------------- the device
interface Device {
  readonly root: Engine;
  /** Downloads that have not settled. */
  pending(): number;
  /**
   * What happened so far. `alone`: the downloads that began while no other was pending. `freed` and `overwritten`: to
   * handles with a download pending.
   */
  readonly seen: {
    downloads: number;
    alone: number[];
    freed: number;
    overwritten: number;
    outOfOrder: number;
    afterFailure: number;
  };
  /** Handles that the backend holds. */
  held(): number;
  /** Lets `n` downloads pass; the next one fails, and everything from then on. */
  failAfter(n: number, how?: "rejects" | "throws"): DeviceError;
  /** Fails now. */
  lose(): DeviceError;
}

/** The reference backend with results written over the storage that is given away, as devices do. */
function inPlace(): {
  readonly backend: Backend<CpuHandle>;
  readonly written: Set<(handle: CpuHandle) => void>;
  held(): number;
} {
  const reference = cpu();
  const written = new Set<(handle: CpuHandle) => void>();
  const over = (kernel: Kernel<CpuHandle>): Kernel<CpuHandle> =>
    Object.assign<Kernel<CpuHandle>, Pick<Kernel<CpuHandle>, "unsupported">>(
      (inputs, results, attrs) =>
        kernel(inputs, results, attrs).map((handle, i) => {
          const target = results[i]?.reuse;
          if (!target?.data || !handle.data || target === handle) return handle;
          for (const tell of written) tell(target);
          target.data.set(handle.data);
          reference.free(handle);
          return target;
        }),
      kernel.unsupported ? { unsupported: kernel.unsupported } : {},
    );
  // As the fallback, but one kernel: only then is there storage to take over.
  const update: Kernel<CpuHandle> = (inputs, results, { lr, beta1, beta2, eps, weightDecay, ...o }: AdamwAttrs) => {
    const read = (i: number): Float32Array => Float32Array.from(inputs[i]?.handle.data ?? []);
    const [param, gradient, m, v, scale] = [read(0), read(1), read(2), read(3), read(4)];
    const g = gradient.map((x) => x * (scale[0] as number));
    const m2 = m.map((x, i) => beta1 * x + (1 - beta1) * (g[i] as number));
    const v2 = v.map((x, i) => beta2 * x + (1 - beta2) * (g[i] as number) ** 2);
    const p2 = param.map((x, i) => {
      const move = (m2[i] as number) / o.correction1 / (Math.sqrt((v2[i] as number) / o.correction2) + eps);
      return x - lr * (move + weightDecay * x);
    });
    return [p2, m2, v2].map((data, i) => reference.upload(data, results[i] ?? { shape: [], dtype: "f32" }));
  };
  const kernels = Object.fromEntries(
    Object.entries({ ...reference.kernels, adamw: update }).map(([name, kernel]) => [
      name,
      // A view must stay one.
      name === "reshape" || !kernel ? kernel : over(kernel),
    ]),
  ) as Backend<CpuHandle>["kernels"];
  return { backend: { ...reference, kernels }, written, held: reference.live };
}

const blocking = (): Engine => engine(inPlace().backend);

/** The same kernels; downloads take one to six turns of the event loop. */
function late(seed = 1): Device {
  const { backend, written, held } = inPlace();
  const { downloadSync, ...rest } = backend;
  if (!downloadSync) throw new Error("the reference backend blocks");
  const seen: Device["seen"] = { downloads: 0, alone: [], freed: 0, overwritten: 0, outOfOrder: 0, afterFailure: 0 };
  const reading = new Map<CpuHandle, number>();
  const settled: number[] = [];
  let state = seed;
  const turns = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return 1 + ((state >>> 16) % 6);
  };
  let failAt = Number.POSITIVE_INFINITY;
  let how: "rejects" | "throws" = "rejects";
  let failure = new DeviceError("the device was lost; restore the last snapshot");
  let lost = false;
  const check = (): void => {
    if (!lost) return;
    seen.afterFailure++;
    throw failure;
  };
  written.add((handle) => {
    if (reading.has(handle)) seen.overwritten++;
  });
  const macrotask = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
  const guarded = Object.fromEntries(
    Object.entries(rest.kernels).map(([name, kernel]) => [
      name,
      kernel &&
        Object.assign<Kernel<CpuHandle>, Pick<Kernel<CpuHandle>, "unsupported">>(
          (...call) => {
            check();
            return kernel(...call);
          },
          kernel.unsupported ? { unsupported: kernel.unsupported } : {},
        ),
    ]),
  ) as Backend<CpuHandle>["kernels"];
  const root = engine<CpuHandle>({
    ...rest,
    name: "late",
    kernels: guarded,
    upload(data, spec) {
      check();
      return rest.upload(data, spec);
    },
    download(x) {
      check();
      const index = seen.downloads++;
      if (reading.size === 0) seen.alone.push(index);
      if (index === failAt && how === "throws") {
        lost = true;
        throw failure;
      }
      // The copy on the device's queue: as the elements are now.
      const copy = downloadSync(x);
      reading.set(x.handle, (reading.get(x.handle) ?? 0) + 1);
      const arrive = async () => {
        for (let left = turns(); left > 0; left--) await macrotask();
        const others = (reading.get(x.handle) ?? 0) - 1;
        if (others > 0) reading.set(x.handle, others);
        else reading.delete(x.handle);
        if (settled.some((other) => other > index)) seen.outOfOrder++;
        settled.push(index);
        if (index === failAt) lost = true;
        if (lost) throw failure;
        return copy;
      };
      return arrive();
    },
    free(handle) {
      if (reading.has(handle)) seen.freed++;
      rest.free(handle);
    },
  });
  return {
    root,
    seen,
    held,
    pending: () => reading.size,
    lose() {
      lost = true;
      return failure;
    },
    failAfter(n, way = "rejects") {
      failAt = seen.downloads + n;
      how = way;
      failure = new DeviceError(`the device was lost in download ${n}; restore the last snapshot`);
      return failure;
    },
  };
}

// ---------------------------------------------------------------- what is trained
const [vocabulary, width, count, sequence, depth] = [7, 4, 3, 6, 2];
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

/** Noisy top-2 with a capacity that drops, two router losses, and a bias in its buffers. */
const makeRouter = (root: Engine, draws: Random): Router => ({
  params: { weight: draws.at("router").normal([count, width]) },
  buffers: { bias: root.tensor(new Float32Array(count), [count]) },
  route(params, { hidden, random, layer, buffers, training }) {
    const noise = training ? mul(random.at(layer, "noise").normal([sequence, count]), 0.3) : 0;
    const logits = add(add(linear(hidden, leaf(params, "weight")), leaf(buffers, "bias")), noise);
    const { weights, ids, probabilities } = softmaxTopk(logits, { k: 2, order: "softmax-topk" });
    const { plan, dropped } = applyCapacity(
      { kind: "sparse", experts: ids, weights },
      { experts: count, policy: "probability", k: 2, factor: 1 },
    );
    return {
      plan,
      logits,
      losses: {
        balance: { value: switchBalance({ probabilities, experts: ids }), weight: 0.02 },
        z: { value: zLoss(logits), weight: 0.01 },
      },
      metrics: { dropped, importance: mean(probabilities, [0]) },
    };
  },
  afterStep(layers: readonly StepStatistics[], buffers: Tree) {
    const { load, tokens } = layers[0] as StepStatistics;
    const signs = load.map((x) => Math.sign((tokens * 2) / count - x) * 0.02);
    return { bias: add(leaf(buffers, "bias"), root.tensor(signs, [count])) };
  },
});

function makeTask(root: Engine): Task<Batch> {
  const draws = random(root, 17);
  const layers = Array.from({ length: depth }, (_, i) => ({
    router: makeRouter(root, draws.at(i)),
    experts: glu({ count, width, hidden: 3, engine: root, random: draws.at("experts", i) }),
  }));
  const embedding = draws.at("embedding").normal([vocabulary, width]);
  return {
    params: { embedding, layers: layers.map(layerParams) },
    routers: layers.map(({ router }) => router),
    batch: text,
    forward(params, buffers, { ids, labels }, info): Pass {
      let hidden = takeRows(leaf(params, "embedding"), root.tensor(ids, [sequence])); // [sequence, width]
      const routed = layers.map((layer, i) => {
        const place = { hidden, layout: { batch: 1, sequence, past: 0 }, layer: i, layers: depth };
        const { globalLoad: _, ...rest } = info;
        const result = moe(
          layer,
          leaf(params, "layers", `${i}`),
          { ...rest, ...place, buffers: buffers[i] as Tree },
          info.observe ? { observe: (name, rows, ends) => info.observe?.(name, i, rows, ends) } : {},
        );
        hidden = add(hidden, result.output);
        return result.routed;
      });
      const logits = linear(hidden, leaf(params, "embedding"));
      return { loss: mean(crossEntropy(logits, root.tensor(labels, [sequence])).losses), logits, layers: routed };
    },
  };
}

/** State that grows in forward passes. */
const counting = (): TrainingHook => {
  const hook: TrainingHook = {
    name: "sums",
    observe(parameter, layer, rows) {
      if (parameter !== "gateUp" || layer !== 1) return;
      const before = hook.state && leaf(hook.state, "sum");
      const more = sum(rows, [0]); // [width]
      hook.state = { sum: before ? add(before, more) : more };
    },
  };
  return hook;
};
const make = (root: Engine, optimiser = adamw({ learningRate: 0.02, weightDecay: 0.1 })): Trainer<Batch> =>
  trainer(root, makeTask(root), {
    optimiser,
    schedule: cosineDecay(),
    totalSteps: 6,
    clip: 1,
    accumulate: 2,
    seed: 5,
    hooks: [counting()],
  });
const timeless = (history: readonly StepReport[]) => history.map(({ seconds: _, ...report }) => report);
const held = [text(50), text(51), text(52)];

interface Outcome {
  readonly history: ReturnType<typeof timeless>;
  readonly evaluation: Evaluation;
  readonly arrays: TrainerSnapshot["arrays"];
}
/** To the end, with a checkpoint every second step and an evaluation after it. */
async function session(
  made: Trainer<Batch>,
  keep: (snapshot: TrainerSnapshot) => void = () => undefined,
): Promise<Outcome> {
  await made.run({
    checkpointEvery: 2,
    onCheckpoint: async (snapshot) => {
      keep(snapshot);
      await made.evaluate(held);
    },
  });
  const evaluation = await made.evaluate(held);
  const { arrays } = await made.snapshot();
  return { history: timeless(made.history), evaluation, arrays };
}
let whole: Outcome;
beforeAll(async () => {
  whole = await session(make(blocking()));
});

// ---------------------------------------------------------------- no promise is left alone
const unhandled: unknown[] = [];
const note = (reason: unknown): void => void unhandled.push(reason);
beforeAll(() => void process.on("unhandledRejection", note));
afterAll(() => void process.off("unhandledRejection", note));
/** Longer than any download takes, and one turn more for rejections nobody handles. */
async function quiet({ pending }: Device): Promise<void> {
  for (let i = 0; i < 10; i++) await new Promise((resolve) => setImmediate(resolve));
  expect(pending()).toBe(0);
  expect(unhandled).toEqual([]);
}

describe("a device that answers late", () => {
  it.each([1, 2, 3])("trains and evaluates bit for bit as one that blocks (order %i)", async (seed) => {
    expect(blocking().canBlock).toBe(true);
    const device = late(seed);
    expect(device.root.canBlock).toBe(false);
    const made = make(device.root);
    expect(await session(made)).toEqual(whole);
    // Not trivially equal: assignments were dropped, both losses counted, buffers and the hook's state changed.
    expect(whole.history.some(({ metrics }) => (metrics[0]?.dropped?.[0] ?? 0) > 0)).toBe(true);
    expect(whole.history[0]?.losses).toMatchObject({ balance: expect.any(Number), z: expect.any(Number) });
    expect(whole.arrays["buffers.0.bias"]?.data.some((x) => x !== 0)).toBe(true);
    expect(Object.keys(whole.arrays)).toContain("hooks.sums.sum");
    expect(new Set(whole.history.map(({ loss }) => loss)).size).toBe(6);
    // Awaiting each call leaves no read pending when something is freed or overwritten; their answers did cross.
    expect(device.seen).toMatchObject({ freed: 0, overwritten: 0, afterFailure: 0 });
    expect(device.seen.outOfOrder).toBeGreaterThan(0);
    made.dispose();
    await quiet(device);
    expect([device.root.live(), device.held()]).toEqual([0, 0]);
  });

  it("delivers a snapshot as of its call, though steps overwrite and free what is being read", async () => {
    const device = late();
    const made = make(device.root);
    await made.run({ until: 2 });
    const first = await made.snapshot();
    const saving = made.snapshot();
    await made.run({ until: 4 });
    expect(device.seen.overwritten).toBeGreaterThan(0);
    expect(device.seen.freed).toBeGreaterThan(0);
    expect(await saving).toEqual(first);
    // Read until the last moment.
    const [again, evaluation] = [made.snapshot(), await made.evaluate(held)];
    const expected = await made.snapshot();
    expect(await again).toEqual(expected);
    const last = made.snapshot();
    made.dispose();
    expect(await last).toEqual(expected);
    expect(evaluation.tokens).toBe(3 * sequence);
    await quiet(device);
    expect([device.root.live(), device.held()]).toEqual([0, 0]);
  });

  it("delivers what was read before it was freed or given away", async () => {
    const { root, seen, pending } = late();
    const x = root.tensor(Float32Array.of(1, 2), [2]);
    const [once, twice] = [x.data(), x.data()];
    x.dispose();
    const y = root.tensor(Float32Array.of(3, 4), [2]);
    const third = y.data();
    const z = add(root.give(y), root.tensor(Float32Array.of(1, 1), [2]));
    expect([seen.freed, seen.overwritten, pending()]).toEqual([1, 1, 2]);
    const read = await Promise.all([once, twice, third, z.data()]);
    expect(read.map((values) => [...values])).toEqual([
      [1, 2],
      [1, 2],
      [3, 4],
      [4, 5],
    ]);
  });

  it("is not stepped, restored or disposed of in the middle of an evaluation", async () => {
    const device = late();
    const made = make(device.root);
    await made.run({ until: 2 });
    const [snapshot, alone] = [await made.snapshot(), await made.evaluate(held)];
    const both = [made.evaluate(held), made.evaluate(held)];
    await expect(made.step()).rejects.toThrow("trainer: step while an evaluation is running; await it first");
    expect(() => made.restore(snapshot)).toThrow("restore while an evaluation is running");
    expect(() => made.dispose()).toThrow("dispose while an evaluation is running");
    expect(await Promise.all(both)).toEqual([alone, alone]);
    const step = made.step();
    await expect(made.evaluate(held)).rejects.toThrow("evaluate while a step is running");
    expect((await step).step).toBe(2);
    await quiet(device);
  });
});

describe("a device that fails", () => {
  it("rejects the running call with its error, wherever it is, and the last snapshot resumes", async () => {
    const { root, seen } = late();
    const dry = make(root);
    await dry.snapshot();
    const [start, beginnings] = [seen.downloads, seen.alone.length];
    await session(dry);
    // The transfers of all steps and evaluations, the first of each snapshot, and some more of those.
    const single = seen.alone.slice(beginnings).map((index) => index - start);
    expect(single.length).toBe(6 + 4 * held.length + 4);
    const some = Array.from({ length: Math.floor((seen.downloads - start) / 9) }, (_, i) => 9 * i + 5);
    const resumed = new Map<number, number>();
    const since = new Set<number>();
    for (const [i, n] of [...single, ...some].entries()) {
      const device = late(n + 1);
      const made = make(device.root);
      let last = await made.snapshot();
      const failure = device.failAfter(n, i % 2 === 0 ? "rejects" : "throws");
      const running = session(made, (snapshot) => {
        last = snapshot;
      });
      await expect(running).rejects.toBe(failure);
      await quiet(device);
      // Whatever is asked next fails in the same way, and nothing is made up.
      const [before, history] = [made.steps, timeless(made.history)];
      expect(history).toEqual(whole.history.slice(0, before));
      for (const call of [() => made.step(), () => made.evaluate(held), () => made.snapshot()]) {
        await expect(call()).rejects.toBe(failure);
      }
      expect([made.steps, timeless(made.history)]).toEqual([before, history]);
      await quiet(device);
      made.dispose();
      expect([device.root.live(), device.held()]).toEqual([0, 0]);

      const saved = JSON.parse(JSON.stringify(last.json)) as { steps: number };
      resumed.set(saved.steps, (resumed.get(saved.steps) ?? 0) + 1);
      since.add(before - saved.steps);
      // Resuming is the same from every snapshot of the same step: once per step is enough.
      if (resumed.get(saved.steps) !== 1) continue;
      const fresh = late(100 + n);
      const second = make(fresh.root);
      second.restore({ ...last, json: saved });
      expect(await session(second)).toEqual(whole);
      await quiet(fresh);
    }
    // Failures hit before the first checkpoint, between them and after the last; in steps and in a snapshot's reads.
    expect([...resumed.keys()].sort()).toEqual([0, 2, 4, 6]);
    expect([...since].sort()).toEqual([0, 1, 2]);
  });

  it("in the middle of an update leaves a trainer that says so", async () => {
    const device = late();
    const good = adamw({ learningRate: 0.02, weightDecay: 0.1 });
    let updates = Number.NEGATIVE_INFINITY;
    const made = make(device.root, {
      ...good,
      update(...inputs) {
        if (++updates === 2) device.lose();
        return good.update(...inputs);
      },
    });
    await made.run({ until: 2 });
    const snapshot = await made.snapshot();
    updates = 0;
    const failure = await made.step().catch((error: unknown) => error);
    expect(DeviceError.isInstance(failure)).toBe(true);
    await expect(made.step()).rejects.toThrow("the update of step 2 failed half-way; restore a snapshot or make a new");
    await expect(made.snapshot()).rejects.toThrow("the update of step 2 failed half-way");
    expect(() => made.restore(snapshot)).toThrow(failure as Error);
    made.dispose();
    expect([device.root.live(), device.held()]).toEqual([0, 0]);
    await quiet(device);
    const fresh = late(7);
    const second = make(fresh.root);
    second.restore(snapshot);
    expect(await session(second)).toEqual(whole);
    await quiet(fresh);
  });

  it("frees what counting held back", async () => {
    const device = late();
    const c = counted(device.root);
    const rows = c.tensor(new Float32Array(6), [3, 2]);
    const w = c.tensor(new Float32Array(8), [2, 2, 2]);
    const ends = c.tensor(Int32Array.of(1, 3), [2]);
    c.scope(() => void [groupedMatmul(rows, w, ends), groupedMatmul(rows, w, ends)]);
    const failure = device.failAfter(0);
    await expect(c.settle()).rejects.toBe(failure);
    for (const x of [rows, w, ends]) x.dispose();
    expect([device.root.live(), device.held()]).toEqual([0, 0]);
    await quiet(device);
  });
});
