// A small model with one Mixture-of-Experts layer, trained on a task with core's trainer. Everything around the layer is linear, so
// that whatever a task asks beyond that is learned by the experts and their router (a linear model cannot do better than guessing
// where the mean of every number is the same for all classes, for cross entropy is convex):
//   h = W_in features + b (modalities: each token from all of its sample; patches: each from its own, by place)
//   logits = W_out mean over tokens of (h + moe(h)) + b

import {
  add,
  affine,
  crossEntropy,
  dispose,
  type Engine,
  isTensor,
  linear,
  mean,
  type Random,
  random,
  reshape,
  type Tensor,
  type Tree,
  UnsupportedError,
} from "@switchyard/core";
import {
  type Experts,
  glu,
  layerParams,
  type MoELayer,
  moe,
  moeLayer,
  type Pass,
  type RouterPlugin,
  type TrainingHook,
} from "@switchyard/core/moe";
import { adamw, type PassInfo, type Task, trainer } from "@switchyard/core/train";
import type { Samples, SampleTask } from "./sample-task.ts";

export interface TrainTaskOptions {
  readonly task: SampleTask;
  readonly router: RouterPlugin;
  readonly engine: Engine;
  readonly steps: number;
  /** Default: `experts` SwiGLU experts of 16 inside. */
  makeExperts?(sizes: { readonly engine: Engine; readonly random: Random; readonly width: number }): Experts;
  /** Default 4. */
  readonly experts?: number;
  /** Width of the tokens; default 16. */
  readonly width?: number;
  /** Samples of each step; default 32. */
  readonly batch?: number;
  /** Of AdamW; default 0.01. */
  readonly learningRate?: number;
  readonly hooks?: readonly TrainingHook[];
  /** Samples for the accuracy; default 256. */
  readonly heldOut?: number;
  /** Of parameters and training; the samples have the task's own. Default 0. */
  readonly seed?: number;
}

/** Of the held-out samples: how many there are, and the share whose class was told. */
export interface Accuracy {
  readonly samples: number;
  readonly accuracy: number;
}

export interface TrainedTask {
  /** Cross entropy of each step's batch in nats, without the router's losses. */
  readonly losses: readonly number[];
  /** Cross entropy of the held-out samples, in evaluation; ln(classes) is what guessing gives. */
  readonly heldOutLoss: number;
  /** Share of the held-out samples whose class was told. */
  readonly accuracy: number;
  /** What guessing gives: 1 / classes. */
  readonly chance: number;
  /** Held-out samples with a missing token and without. */
  readonly missing: Accuracy;
  readonly complete: Accuracy;
}

/**
 * Trains a model of one Mixture-of-Experts layer with this router, and evaluates it. The same options give the same numbers on the same
 * backend. Throws UnsupportedError for a router that needs what these tasks do not have.
 *
 * @example const { losses, accuracy } = await trainTask({ task: patchesTask(), router: softMoE(), engine, steps: 60 });
 */
export async function trainTask(options: TrainTaskOptions): Promise<TrainedTask> {
  const { task, router, engine, steps, batch = 32, learningRate = 0.01, hooks = [], heldOut = 256, seed = 0 } = options;
  const lacking = router.needs.find((need) => ["tokenIds", "attention", "target"].includes(need));
  if (lacking !== undefined || (router.needs.includes("modalityIds") && !task.modalities)) {
    throw new UnsupportedError(
      `trainTask: router ${router.name} needs "${lacking ?? "modalityIds"}", which the task "${task.name}" does not have; ` +
        "use another task or router",
    );
  }
  const model = modelOf(options);
  const training: Task<Samples> = {
    params: model.params,
    routers: [model.layer.router],
    batch: (index) => task.samples("training", index, batch),
    forward: model.forward,
    info: ({ count }) => ({ tokens: count }),
  };
  const run = trainer(engine, training, {
    optimiser: adamw({ learningRate }),
    totalSteps: steps,
    clip: 1,
    hooks,
    seed,
  });
  try {
    await run.run();
    const samples = task.samples("held-out", 0, heldOut);
    const info: PassInfo = {
      step: steps,
      totalSteps: steps,
      training: false,
      pass: 0,
      microBatch: 0,
      random: random(engine, seed),
      schedule: {},
    };
    const found = engine.scope(() => {
      const { logits, loss } = model.forward(run.params, run.buffers, samples, info);
      return { logits, loss };
    });
    const [values, [heldOutLoss = Number.NaN]] = await Promise.all([found.logits.data(), found.loss.data()]);
    dispose(found);
    const right = Array.from(
      samples.labels,
      (label, i) => label === best(values.subarray(i * task.classes, (i + 1) * task.classes)),
    );
    const lacks = Array.from(right, (_, i) =>
      (samples.missing ?? []).slice(i * task.tokens, (i + 1) * task.tokens).some((gone) => gone !== 0),
    );
    const share = (wanted: (i: number) => boolean): Accuracy => {
      const own = right.filter((_, i) => wanted(i));
      return { samples: own.length, accuracy: own.filter(Boolean).length / Math.max(own.length, 1) };
    };
    return {
      losses: run.history.map(({ loss }) => loss),
      heldOutLoss,
      accuracy: share(() => true).accuracy,
      chance: 1 / task.classes,
      missing: share((i) => lacks[i] ?? false),
      complete: share((i) => !lacks[i]),
    };
  } finally {
    run.dispose();
  }
}

interface TaskModel {
  readonly layer: MoELayer;
  readonly params: Tree;
  forward(params: Tree, buffers: readonly Tree[], batch: Samples, info: PassInfo): Pass;
}

function modelOf({
  task,
  router,
  engine,
  width = 16,
  experts: count = 4,
  seed = 0,
  ...options
}: TrainTaskOptions): TaskModel {
  const { tokens, features, classes } = task;
  const draw = random(engine, seed).at("task model");
  const inner = 16;
  const experts =
    options.makeExperts?.({ engine, random: draw.at("experts"), width }) ??
    glu({ count, width, hidden: inner, engine, random: draw.at("experts") });
  const always = router.sharedExperts ?? 0;
  const shared =
    always > 0
      ? [{ experts: glu({ count: 1, width, hidden: inner * always, engine, random: draw.at("shared") }) }]
      : undefined;
  const layer = moeLayer(
    router,
    { engine, width, random: draw.at("router") },
    { experts, ...(shared ? { shared } : {}) },
  );
  // Modalities are mixed on the way in: the only place where a token hears of the others.
  const [inputs, outputs] = task.modalities ? [tokens * features, tokens * width] : [features, width];
  const normal = (name: string, rows: number, columns: number): Tensor =>
    engine.scope(() => affine(draw.at(name).normal([rows, columns]), { scale: 1 / Math.sqrt(columns), shift: 0 }));
  const zeros = (shape: readonly number[]): Tensor =>
    engine.tensor(new Float32Array(shape.reduce((n, d) => n * d, 1)), shape);
  const params = {
    in: normal("in", outputs, inputs),
    place: zeros([tokens, width]),
    layer: layerParams(layer),
    out: normal("out", classes, width),
    outBias: zeros([classes]),
  };

  return {
    layer,
    params,
    forward(
      tree,
      [buffers],
      batch,
      { training, step, totalSteps, pass, random: draws, schedule, globalLoad, observe },
    ) {
      const { count: samples } = batch;
      const rows = samples * tokens;
      const given = engine.tensor(batch.features, task.modalities ? [samples, inputs] : [rows, inputs]);
      const embedded = reshape(linear(given, leaf(tree, "in")), [samples, tokens, width]);
      const hidden = reshape(add(embedded, leaf(tree, "place")), [rows, width]);
      const [load] = globalLoad ?? [];
      const { output, routed } = moe(
        layer,
        branch(tree, "layer"),
        {
          hidden,
          layout: { batch: samples, sequence: tokens, past: 0 },
          training,
          step,
          ...(totalSteps === undefined ? {} : { totalSteps }),
          pass,
          layer: 0,
          layers: 1,
          random: draws,
          buffers: buffers ?? layer.router.buffers,
          schedule,
          ...(load ? { globalLoad: load } : {}),
          ...(task.modalities
            ? {
                modalityIds: engine.tensor(
                  Int32Array.from({ length: rows }, (_, i) => i % tokens),
                  [rows],
                ),
              }
            : {}),
          ...(batch.missing ? { missing: engine.tensor(batch.missing, [rows]) } : {}),
        },
        observe ? { observe: (name, x, ends) => observe(`layer.experts.${name}`, 0, x, ends) } : {},
      );
      const pooled = mean(reshape(add(hidden, output), [samples, tokens, width]), [1]); // [samples, width]
      const logits = linear(pooled, leaf(tree, "out"), leaf(tree, "outBias"));
      const { losses } = crossEntropy(logits, engine.tensor(batch.labels, [samples]));
      return { loss: mean(losses), logits, layers: [routed] };
    },
  };
}

function best(values: ArrayLike<number>): number {
  let found = 0;
  for (let i = 1; i < values.length; i++) if ((values[i] ?? 0) > (values[found] ?? 0)) found = i;
  return found;
}

function branch(tree: Tree, name: string): Tree {
  const found = isTensor(tree) ? undefined : Object.entries(tree).find(([key]) => key === name)?.[1];
  if (found === undefined) throw new UnsupportedError(`trainTask: the parameters lack "${name}"`);
  return found;
}

function leaf(tree: Tree, name: string): Tensor {
  const found = branch(tree, name);
  if (!isTensor(found)) throw new UnsupportedError(`trainTask: "${name}" is no tensor`);
  return found;
}
