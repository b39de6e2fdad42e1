// The trainer: forward, gradient, clipping, update, router buffers, report; snapshots that resume bit for bit. No
// model and no files in here.
import { autodiff, grad, lower, watch } from "../autodiff.ts";
import type { Engine } from "../engine.ts";
import { CheckpointError, ShapeError, UnsupportedError } from "../errors.ts";
import type { Json } from "../json.ts";
import type { Pass, Router, StepInfo, StepStatistics, TrainingHook } from "../moe/plan.ts";
import { at } from "../op.ts";
import { add, div, maximum, mul, where } from "../ops/elementwise.ts";
import { type Random, random } from "../random.ts";
import { release } from "../scope.ts";
import { leaves, mapTree, show, type Tensor, type Tree } from "../tensor.ts";
import type { Optimiser } from "./optim.ts";
import { constantRate, type Schedule } from "./schedule.ts";
import {
  encode,
  FORMAT,
  outline,
  outlined,
  readHead,
  revive,
  type SnapshotArray,
  type TrainerSnapshot,
} from "./snapshot.ts";
import { type BatchFacts, one, type Tally, tallyOf, tokenCount } from "./tally.ts";

/** What a task knows about the forward pass it is asked for. */
export interface PassInfo {
  /** Optimiser steps done so far. */
  readonly step: number;
  /** Absent while the number of steps is not fixed. */
  readonly totalSteps?: number;
  /** False in `evaluate`: nothing is drawn at random, no router loss is needed. */
  readonly training: boolean;
  /** 0, or the index of the repetition when a hook asks for several passes of the same batch (THOR). */
  readonly pass: number;
  /** Index of the batch within a step of gradient accumulation. */
  readonly microBatch: number;
  /** Keyed by (seed, step, pass, micro-batch): key it further by layer and name, `random.at(layer, "noise")`. */
  readonly random: Random;
  /** What the hooks' `beforeStep` returned, merged: `RouterInput.schedule`. */
  readonly schedule: Readonly<Record<string, number | boolean>>;
  /**
   * With `globalBalance`: one `[load]` per MoE layer, the tokens of each expert per token (top-k: they sum to k) in
   * this step's micro-batches so far, from the second one on, or with "exact" in all of them. `switchBalance({ load })`
   * takes it.
   */
  readonly globalLoad?: readonly Tensor[];
  /** Present when a hook observes: call it with the inputs of every expert matrix, rows sorted by expert. */
  readonly observe?: (parameter: string, layer: number, rows: Tensor, ends: Tensor) => void;
}

/** What is known about a batch beside the loss. Tensors are made inside the step's scope and die with it. */
export interface BatchInfo extends BatchFacts {
  /** Handed to hooks as StepInfo.labels. */
  readonly labels?: Tensor;
}

/** What is trained: parameters, data and the loss. */
export interface Task<B> {
  /**
   * f32, on the engine given to `trainer`, which takes them over: they change with every step, read `trainer.params`.
   */
  readonly params: Tree;
  /**
   * One per MoE layer, in order. Their buffers are taken over too; read `trainer.buffers`. Their `params` are not
   * looked at.
   */
  readonly routers: readonly Router[];
  /**
   * Batch `index` (counting from 0, one per micro-batch): the same index gives the same batch, so resuming needs no
   * data state. Host data, or tensors: called inside the step's scope, which frees them.
   */
  batch(index: number): B;
  /**
   * Runs the model. `params` are on the autodiff engine while training and on the plain engine in `evaluate`;
   * `buffers` (one tree per MoE layer) are always plain. `loss` is the mean over the batch's tokens, without router
   * losses; `layers` has one Routed per MoE layer, with `metrics.load` (tokens of each real expert, then of null
   * ones) as `moe()` adds it. Must be synchronous.
   */
  forward(params: Tree, buffers: readonly Tree[], batch: B, info: PassInfo): Pass;
  /** Labels, mask and token count of a batch, for hooks and reports. */
  info?(batch: B): BatchInfo;
}

export interface TrainerOptions {
  /** `adamw({ learningRate })` or `sgd({ learningRate })`. */
  readonly optimiser: Optimiser;
  /** Factor of the learning rate; default constantRate(). */
  readonly schedule?: Schedule;
  /** Steps in all; leave it out to measure the speed first, then call `setTotalSteps`. */
  readonly totalSteps?: number;
  /** Largest 2-norm of the whole gradient; default: no clipping. */
  readonly clip?: number;
  /** Batches per step, weighing equally; default 1. */
  readonly accumulate?: number;
  readonly hooks?: readonly TrainingHook[];
  /** Of everything random; default 0. */
  readonly seed?: number;
  /** Which parameters decay; default: those with two or more axes. */
  decay?(path: string, shape: readonly number[]): boolean;
  /**
   * Hands `globalLoad` to the routers while accumulating, so that balance is asked of the whole step (2501.11873):
   * `true` counts the micro-batches so far, as the paper's buffer does; "exact" counts all of them in a forward pass of
   * its own, which makes losses and gradients those of the undivided batch and a step about a third dearer. Default
   * false.
   */
  readonly globalBalance?: boolean | "exact";
}

/** One step in numbers. */
export interface StepReport {
  /** Index of the step, from 0. */
  readonly step: number;
  /** The task's loss: mean over micro-batches and passes. */
  readonly loss: number;
  /** What was differentiated: `loss` plus all `losses`. */
  readonly total: number;
  /** What each router loss (summed over layers, times its weight) and each hook's loss added to the total. */
  readonly losses: Readonly<Record<string, number>>;
  /** 2-norm of the whole gradient, before clipping. */
  readonly gradientNorm: number;
  readonly learningRate: number;
  /** Per MoE layer: tokens of each real expert, then of null ones, summed over the step. */
  readonly loads: readonly Float64Array[];
  /** Per MoE layer: the other metrics, averaged over the step's forward passes. */
  readonly metrics: readonly Readonly<Record<string, Float64Array>>[];
  /** Tokens trained on; repeated passes of the same batch count once. */
  readonly tokens: number;
  /** Wall time; the one number that a resumed run does not reproduce. */
  readonly seconds: number;
}

export interface RunOptions {
  /** Runs until this many steps are done in all; default: totalSteps. */
  readonly until?: number;
  /** Looked at between steps: an aborted run has finished its last step and can be saved. */
  readonly signal?: AbortSignal;
  onStep?(report: StepReport): void | Promise<void>;
  /** In steps. */
  readonly checkpointEvery?: number;
  onCheckpoint?(snapshot: TrainerSnapshot): void | Promise<void>;
}

/** Loads are summed over the batches, metrics averaged. */
export interface Evaluation {
  /** Mean over the batches, each weighing by its tokens. */
  readonly loss: number;
  readonly loads: readonly Float64Array[];
  readonly metrics: readonly Readonly<Record<string, Float64Array>>[];
  readonly tokens: number;
}

export interface Trainer<B> {
  /** Steps done. */
  readonly steps: number;
  readonly totalSteps: number | undefined;
  /** The current parameters, owned by the trainer: valid until the next step. */
  readonly params: Tree;
  /** The current buffers, one tree per MoE layer, owned by the trainer: valid until the next step. */
  readonly buffers: readonly Tree[];
  readonly history: readonly StepReport[];
  /**
   * One optimiser step.
   * @throws Error when the loss or the gradient is not finite: it names step, loss and gradient norm, and
   * parameters, buffers, optimiser and hook state are as they were before the step.
   * @throws DeviceError when the device failed: make a new engine and trainer, and `restore` the last snapshot.
   */
  step(): Promise<StepReport>;
  /**
   * Steps until the end, `until` or an abort; never rejects because of an abort. Lets timers and signals in between
   * steps.
   * @throws UnsupportedError when neither `until` nor totalSteps says where to end.
   */
  run(options?: RunOptions): Promise<"done" | "aborted">;
  /** Fixes the number of steps, once. */
  setTotalSteps(totalSteps: number): void;
  /**
   * Loss and loads of other batches with the current parameters, without gradients. Until it has ended, `step`,
   * `restore` and `dispose` are refused with UnsupportedError: they would change the parameters between two batches.
   */
  evaluate(batches: Iterable<B>): Promise<Evaluation>;
  /**
   * The state as it is at this call: a step may follow before the promise settles.
   * @throws DeviceError when the device failed; an older snapshot then resumes on a new engine.
   */
  snapshot(): Promise<TrainerSnapshot>;
  /**
   * Takes over a snapshot's state. `seed` and `totalSteps` come from the snapshot where the options leave them out.
   * @throws CheckpointError, before anything changes, when the snapshot does not fit this task and optimiser.
   */
  restore(snapshot: TrainerSnapshot): void;
  /** Frees parameters, buffers, optimiser and hook state. */
  dispose(): void;
}

interface Parameter {
  readonly path: string;
  tensor: Tensor;
  /** Empty until the first update of a parameter that was frozen at the start. */
  slots: readonly Tensor[];
  updates: number;
}

/**
 * A trainer of `task`. `engine` is the one the task's tensors live on; recording for gradients is added here.
 *
 * Each step is synchronous up to its one transfer (losses, loads, metrics and gradient norm in one vector), and the
 * update runs after it: what arrives decides the clipping, and a step that is not finite never reaches the
 * parameters.
 */
export function trainer<B>(engine: Engine, task: Task<B>, options: TrainerOptions): Trainer<B> {
  const { optimiser, schedule = constantRate(), clip = Infinity, accumulate = 1, hooks = [] } = options;
  const decays = options.decay ?? ((_: string, shape: readonly number[]) => shape.length > 1);
  checkOptions(options);
  const recording = autodiff(engine);
  const passes = Math.max(1, ...hooks.map((hook) => hook.passes ?? 1));

  let seed = options.seed ?? 0;
  let draws = random(engine, seed);
  let totalSteps = options.totalSteps;
  let steps = 0;
  let batches = 0;
  let history: StepReport[] = [];
  let buffers: readonly Tree[] = task.routers.map((router) => router.buffers);
  let busy = false;
  let evaluations = 0;
  let unusable: string | undefined;

  // A tensor that stands at several places of the tree (tied weights) is one parameter, named after the first.
  const parameters: Parameter[] = [];
  const places = new Map<string, Parameter>();
  for (const [path, tensor] of leaves(task.params)) {
    const known = parameters.find((p) => p.tensor === tensor);
    const parameter = known ?? { path, tensor, slots: [], updates: 0 };
    if (!known) parameters.push(parameter);
    places.set(path, parameter);
  }
  const treeOf = (leaf: (parameter: Parameter) => Tensor): Tree =>
    mapTree(task.params, (_, path) => leaf(places.get(path) as Parameter));

  /** Called inside a scope: hooks may compute their masks. */
  const maskOf = (path: string): Tensor | false | undefined => {
    let mask: Tensor | undefined;
    for (const hook of hooks) {
      const one = hook.updateMask?.(path);
      if (one === false) return false;
      if (one) mask = mask ? mul(mask, one) : one;
    }
    return mask;
  };
  const zeros = ({ tensor }: Parameter): Tensor[] =>
    optimiser.slots.map(() => engine.tensor(new Float32Array(tensor.size), tensor.shape));
  const trainable = (): Parameter[] => parameters.filter(({ path }) => maskOf(path) !== false);
  const atStart = engine.scope(() => trainable().map((parameter) => ({ parameter, slots: zeros(parameter) })));
  for (const { parameter, slots } of atStart) parameter.slots = slots;

  const progress = (): { step: number; totalSteps?: number } => ({
    step: steps,
    ...(totalSteps === undefined ? {} : { totalSteps }),
  });
  // The states that hooks had before the current step: kept until it is done, in case it fails.
  let before: readonly (Tree | undefined)[] = [];
  /** Calls into a hook. A state that it makes there outlives whatever scopes are open; the one in between is freed. */
  const within = <R>(hook: TrainingHook, call: () => R): R => {
    const old = hook.state;
    try {
      return call();
    } finally {
      for (const [, leaf] of leaves(hook.state ?? [])) release(leaf);
      replaced([old], [hook.state, ...before]);
    }
  };
  const observe: PassInfo["observe"] = (parameter, layer, rows, ends) => {
    for (const hook of hooks) within(hook, () => hook.observe?.(parameter, layer, lower(rows), lower(ends)));
  };
  const observing = hooks.some((hook) => hook.observe) ? { observe } : {};

  /** Forward and gradient of one micro-batch. The results outlive the scope it runs in; the graph does not. */
  const differentiate = (
    microBatch: number,
    params: readonly (readonly [Parameter, Tensor])[],
    settings: Pick<PassInfo, "schedule" | "globalLoad">,
    tally: Tally,
  ): { gradients: readonly Tensor[]; loads?: readonly Tensor[] | undefined } => {
    const batch = task.batch(batches + microBatch);
    const about = task.info?.(batch) ?? {};
    const { labels, mask } = about;
    const { globalLoad } = settings;
    const info: StepInfo = {
      ...progress(),
      ...(labels ? { labels } : {}),
      ...(mask ? { mask } : {}),
      ...(globalLoad ? { globalLoad } : {}),
    };
    const watched = new Map(params);
    const tree = treeOf((parameter) => watched.get(parameter) ?? parameter.tensor);
    const share = 1 / (accumulate * passes);
    const combining = hooks.find((hook) => hook.combine);
    const done: Pass[] = [];
    // Of each layer, then the number of tokens.
    let loads: readonly Tensor[] | undefined;
    let objective: Tensor | undefined;
    const include = (value: Tensor, weight: number, what: string): void => {
      const term = mul(one(value, what), weight);
      objective = objective ? add(objective, term) : term;
    };
    for (let pass = 0; pass < passes; pass++) {
      const out = task.forward(tree, buffers, batch, {
        ...progress(),
        ...settings,
        ...observing,
        training: true,
        pass,
        microBatch,
        random: draws.at(steps, pass, microBatch),
      });
      done.push(out);
      const load = tally.pass(out, share);
      if (options.globalBalance === true) loads = addAll(loads, lower([...load, tokenCount(out, about)]));
      if (pass === 0) tally.tokens(out, about);
      if (!combining) include(out.loss, share, "the task's loss");
      const extra = out.layers.flatMap(({ losses }) => Object.entries(losses));
      for (const hook of hooks) {
        const value = within(hook, () => hook.loss?.(out.layers, info));
        if (value) extra.push([hook.name, { value, weight: 1 }]);
      }
      for (const [name, { value, weight }] of extra) {
        if (weight === 0) continue;
        include(value, weight * share, `loss "${name}"`);
        tally.loss(name, value, weight * share);
      }
    }
    const combined = combining && within(combining, () => combining.combine?.(done, info));
    if (combined) {
      include(combined, 1 / accumulate, `what hook "${combining.name}" combined`);
      // Reported as what it adds to the mean of the passes' losses.
      tally.loss(combining.name, combined, 1 / accumulate);
      for (const { loss } of done) tally.loss(combining.name, loss, -share);
    }
    if (objective?.engine !== recording) {
      throw new UnsupportedError(
        `trainer: the loss does not depend on any trained parameter; forward must use the params it is given` +
          (params.length === 0 ? ", and hooks freeze every one of them" : ""),
      );
    }
    const watchedTensors = params.map(([, tensor]) => tensor);
    return { gradients: grad(objective, watchedTensors), loads };
  };

  /** What `globalLoad` is with "exact": the loads of a step that is about to be taken, with the same draws. */
  const countedLoads = (schedule: PassInfo["schedule"]): readonly Tensor[] | undefined => {
    // A single pass knows its own loads.
    if (options.globalBalance !== "exact" || accumulate * passes === 1) return undefined;
    const params = treeOf(({ tensor }) => tensor);
    const counted = (microBatch: number, pass: number): readonly Tensor[] => {
      const batch = task.batch(batches + microBatch);
      const random = draws.at(steps, pass, microBatch);
      const info = { ...progress(), schedule, training: true, pass, microBatch, random };
      const out = task.forward(params, buffers, batch, info);
      return [...tallyOf(task.routers.length).pass(out, 1), tokenCount(out, task.info?.(batch) ?? {})];
    };
    return engine.scope(() => {
      let loads: readonly Tensor[] | undefined;
      for (let microBatch = 0; microBatch < accumulate; microBatch++) {
        for (let pass = 0; pass < passes; pass++) {
          loads = addAll(
            loads,
            engine.scope(() => counted(microBatch, pass)),
          );
        }
      }
      return perToken(loads);
    });
  };

  /** Everything of a step before the transfer. */
  const forwardAndBackward = (
    tally: Tally,
  ): { gradients: readonly Tensor[]; active: readonly Parameter[]; vector: Tensor } =>
    engine.scope(() => {
      const settings = Object.assign({}, ...hooks.map((hook) => within(hook, () => hook.beforeStep?.(progress()))));
      const active = trainable();
      const params = active.map((parameter) => [parameter, watch(recording, parameter.tensor)] as const);
      let gradients: readonly Tensor[] | undefined;
      const exactly = countedLoads(settings);
      let loads: readonly Tensor[] | undefined;
      for (let microBatch = 0; microBatch < accumulate; microBatch++) {
        const found = engine.scope(() => {
          const globalLoad = exactly ?? perToken(loads);
          const given = { schedule: settings, ...(globalLoad ? { globalLoad } : {}) };
          const results = differentiate(microBatch, params, given, tally);
          return { ...results, parts: tally.parts };
        });
        gradients = addAll(gradients, found.gradients);
        if (found.loads) loads = addAll(loads, found.loads);
      }
      const final = active.map(({ path, tensor }, i) => {
        let gradient = at(gradients ?? [], i);
        for (const hook of hooks) {
          gradient = within(hook, () => hook.transformGradient?.(path, gradient, progress())) ?? gradient;
        }
        const mask = maskOf(path);
        if (mask) gradient = mul(gradient, mask);
        if (gradient.shape.join() === tensor.shape.join()) return gradient;
        throw new ShapeError(
          `trainer: hooks turned the gradient of "${path}", ${show(tensor)}, into ${show(gradient)}`,
        );
      });
      tally.norm(final);
      return { gradients: final, active, vector: tally.vector() };
    });

  /** Everything of a step after the transfer. From here on the old parameters are being overwritten. */
  const update = (
    active: readonly Parameter[],
    gradients: readonly Tensor[],
    { gradientNorm, learningRate }: { readonly gradientNorm: number; readonly learningRate: number },
  ): void => {
    unusable = `the update of step ${steps} failed half-way`;
    engine.scope(() => {
      const scale = engine.tensor(Float64Array.of(Math.min(1, clip / gradientNorm)), []);
      for (const [i, parameter] of active.entries()) {
        const { path, tensor, updates } = parameter;
        const given = parameter.slots;
        // One parameter after the other: what a mask needs beside the old values is freed before the next one is looked at.
        const { changed, slots } = engine.scope(() => {
          const mask = maskOf(path);
          const before = given.length > 0 ? given : zeros(parameter);
          const [value, ...moments] = optimiser.update(
            mask ? tensor : engine.give(tensor),
            engine.give(at(gradients, i)),
            before.map((slot) => (mask ? slot : engine.give(slot))),
            { scale, learningRate, decay: decays(path, tensor.shape), update: updates + 1 },
          ) as [Tensor, ...Tensor[]];
          if (!mask) return { changed: value, slots: moments };
          // With SGD decay enters the momentum, so the moments of what is frozen have to be kept too.
          const kept = moments.map((slot, j) => where(mask, slot, at(before, j)));
          return { changed: where(mask, value, tensor), slots: kept };
        });
        release(changed);
        for (const slot of slots) release(slot);
        tensor.dispose();
        for (const slot of given) slot.dispose();
        Object.assign(parameter, { tensor: changed, slots, updates: updates + 1 });
      }
    });
    unusable = undefined;
  };

  const usable = (what: string): void => {
    if (busy) throw new UnsupportedError(`trainer: ${what} while a step is running; await it first`);
    if (unusable) throw new UnsupportedError(`trainer: ${what}: ${unusable}; restore a snapshot or make a new trainer`);
  };
  /** For what changes parameters: an evaluation of several batches would mix old ones and new ones. */
  const undisturbed = (what: string): void => {
    if (busy) throw new UnsupportedError(`trainer: ${what} while a step is running; await it first`);
    if (evaluations > 0) throw new UnsupportedError(`trainer: ${what} while an evaluation is running; await it first`);
  };

  const step = async (): Promise<StepReport> => {
    usable("step");
    undisturbed("step");
    busy = true;
    const started = performance.now();
    before = hooks.map((hook) => hook.state);
    let changed = buffers;
    const tally = tallyOf(task.routers.length);
    let gradients: readonly Tensor[] = [];
    try {
      const found = forwardAndBackward(tally);
      gradients = found.gradients;
      await tally.read(found.vector);
      const { loss, losses, gradientNorm, tokens } = tally.result;
      const total = Object.values(losses).reduce((sum, value) => sum + value, loss);
      if (!Number.isFinite(total) || !Number.isFinite(gradientNorm)) {
        throw new Error(
          `step ${steps} is not finite: loss ${loss}, ${describe(losses)}gradient norm ${gradientNorm} ` +
            `(batches ${batches} to ${batches + accumulate - 1}); parameters, buffers and optimiser stay as before it. ` +
            "Lower the learning rate, warm up longer, or look for a log or a division by zero in the loss",
        );
      }
      const [loads, metrics] = [tally.loads(), tally.metrics()];
      const statistics: StepStatistics[] = loads.map((load, layer) => ({
        ...progress(),
        tokens: tokens * passes,
        load,
        metrics: at(metrics, layer),
      }));
      changed = engine.scope(() =>
        task.routers.map((router, layer) => {
          const old = at(buffers, layer);
          return router.afterStep ? router.afterStep(statistics, old) : old;
        }),
      );
      const learningRate = optimiser.learningRate * schedule(steps, totalSteps ?? Infinity);
      update(found.active, gradients, { gradientNorm, learningRate });
      replaced(buffers, changed);
      buffers = changed;
      hooks.forEach((hook, i) => {
        replaced([before[i]], [hook.state]);
      });
      const report: StepReport = {
        step: steps,
        loss,
        total,
        losses,
        gradientNorm,
        learningRate,
        loads,
        metrics,
        tokens,
        seconds: (performance.now() - started) / 1000,
      };
      history.push(report);
      steps++;
      batches += accumulate;
      return report;
    } catch (error) {
      replaced(changed, buffers);
      hooks.forEach((hook, i) => {
        replaced([hook.state], [before[i]]);
        setState(hook, before[i]);
      });
      throw error;
    } finally {
      for (const gradient of gradients) gradient.dispose();
      before = [];
      busy = false;
    }
  };

  const named = (): Record<string, Tensor> => {
    const all: Record<string, Tensor> = {};
    for (const { path, tensor, slots } of parameters) {
      all[`params.${path}`] = tensor;
      slots.forEach((slot, i) => {
        all[`optimiser.${optimiser.slots[i]}.${path}`] = slot;
      });
    }
    for (const [path, tensor] of leaves(buffers)) all[`buffers.${path}`] = tensor;
    for (const hook of hooks) {
      for (const [path, tensor] of leaves(hook.state ?? [])) all[`hooks.${hook.name}.${path}`] = tensor;
    }
    return all;
  };

  const snapshot = async (): Promise<TrainerSnapshot> => {
    usable("snapshot");
    const json: Json = {
      format: FORMAT,
      optimiser: optimiser.name,
      seed,
      steps,
      batches,
      totalSteps: totalSteps ?? null,
      updates: Object.fromEntries(parameters.map(({ path, updates }) => [path, updates])),
      slots: parameters.filter(({ slots }) => slots.length > 0).map(({ path }) => path),
      hooks: Object.fromEntries(hooks.map(({ name, state }) => [name, state ? outline(state, `hooks.${name}`) : null])),
      history: encode(history),
    };
    // All transfers are ordered before anything is awaited, so that a step started meanwhile cannot mix two states.
    const reads = Object.entries(named()).map(
      async ([name, x]) => [name, { data: await x.data(), shape: x.shape, dtype: x.dtype }] as const,
    );
    return { arrays: Object.fromEntries(await Promise.all(reads)), json };
  };

  const restore = ({ arrays, json }: TrainerSnapshot): void => {
    undisturbed("restore");
    const head = readHead(json);
    if (head.optimiser !== optimiser.name) {
      throw new CheckpointError(
        `restore: the snapshot is of a run with ${head.optimiser}, this trainer uses ${optimiser.name}`,
      );
    }
    // Names of all arrays, with what they must look like where this trainer knows.
    const expected = new Map<string, Tensor | undefined>();
    for (const { path, tensor } of parameters) {
      expected.set(`params.${path}`, tensor);
      if (!head.slots.includes(path)) continue;
      for (const slot of optimiser.slots) expected.set(`optimiser.${slot}.${path}`, tensor);
    }
    for (const [path, tensor] of leaves(buffers)) expected.set(`buffers.${path}`, tensor);
    for (const { name } of hooks) {
      const state = head.hooks[name];
      if (state === undefined) {
        throw new CheckpointError(
          `restore: the snapshot's run had no hook "${name}", only ${list(Object.keys(head.hooks))}`,
        );
      }
      for (const array of outlined(state)) expected.set(array, undefined);
    }
    const problems = [...expected].flatMap(([name, wanted]) => {
      const found = arrays[name];
      if (!found) return [`${name} is missing`];
      return wanted && show(wanted) !== show(found) ? [`${name} is ${show(found)}, expected ${show(wanted)}`] : [];
    });
    for (const name of Object.keys(arrays)) if (!expected.has(name)) problems.push(`${name} is not part of this run`);
    if (problems.length > 0) {
      throw new CheckpointError(`restore: the snapshot is of another model, router or hook: ${list(problems, 4)}`);
    }

    // Everything new is made before anything old goes, so that a failure leaves the trainer as it is.
    const made = engine.scope(() => {
      const make = (name: string): Tensor => {
        const { data, shape, dtype } = arrays[name] as SnapshotArray;
        return engine.tensor(data, shape, dtype);
      };
      return {
        parameters: parameters.map(({ path }) => ({
          tensor: make(`params.${path}`),
          slots: head.slots.includes(path) ? optimiser.slots.map((slot) => make(`optimiser.${slot}.${path}`)) : [],
          updates: head.updates[path] ?? 0,
        })),
        buffers: mapTree(buffers, (_, path) => make(`buffers.${path}`)),
        states: hooks.map(({ name }) => {
          const state = head.hooks[name] ?? null;
          return state === null ? undefined : revive(state, make);
        }),
      };
    });
    for (const tensor of Object.values(named())) tensor.dispose();
    parameters.forEach((parameter, i) => void Object.assign(parameter, made.parameters[i]));
    buffers = made.buffers;
    hooks.forEach((hook, i) => void setState(hook, made.states[i]));
    seed = options.seed ?? head.seed;
    draws = random(engine, seed);
    totalSteps = options.totalSteps ?? head.totalSteps ?? undefined;
    ({ steps, batches } = head);
    history = [...head.history] as StepReport[];
    unusable = undefined;
  };

  return {
    get steps() {
      return steps;
    },
    get totalSteps() {
      return totalSteps;
    },
    get params() {
      return treeOf(({ tensor }) => tensor);
    },
    get buffers() {
      return buffers;
    },
    get history() {
      return history;
    },
    step,

    async run({ until, signal, onStep, checkpointEvery, onCheckpoint } = {}) {
      let breath = performance.now();
      for (;;) {
        const end = until ?? totalSteps;
        if (end === undefined) {
          throw new UnsupportedError("trainer.run: nothing says where to end; pass until, or call setTotalSteps first");
        }
        if (steps >= end) return "done";
        if (signal?.aborted) return "aborted";
        const report = await step();
        await onStep?.(report);
        if (checkpointEvery && steps % checkpointEvery === 0) await onCheckpoint?.(await snapshot());
        // Awaiting what is already there never reaches the event loop, and a signal handler could not run.
        if (performance.now() - breath > 50) {
          await new Promise((resolve) => setTimeout(resolve, 0));
          breath = performance.now();
        }
      }
    },

    setTotalSteps(count) {
      if (totalSteps !== undefined) {
        throw new UnsupportedError(
          `trainer.setTotalSteps(${count}): the number of steps is fixed already, at ${totalSteps}`,
        );
      }
      if (!(Number.isInteger(count) && count >= 0)) {
        throw new ShapeError(`trainer.setTotalSteps: needs a whole number of steps, found ${count}`);
      }
      totalSteps = count;
    },

    async evaluate(some) {
      usable("evaluate");
      const tally = tallyOf(task.routers.length);
      const { result } = tally;
      const total = { loss: 0, tokens: 0 };
      let index = 0;
      evaluations++;
      try {
        for (const batch of some) {
          const params = treeOf(({ tensor }) => tensor);
          const vector = engine.scope(() => {
            const draw = draws.at("evaluate", index);
            const info = { ...progress(), training: false, pass: 0, microBatch: 0, random: draw, schedule: {} };
            const out = task.forward(params, buffers, batch, info);
            tally.pass(out, 1);
            tally.tokens(out, task.info?.(batch) ?? {});
            return tally.vector();
          });
          await tally.read(vector);
          total.loss += result.loss * result.tokens;
          total.tokens += result.tokens;
          Object.assign(result, { loss: 0, tokens: 0 });
          index++;
        }
      } finally {
        evaluations--;
      }
      if (total.tokens === 0) throw new ShapeError(`trainer.evaluate: ${index} batches without a single token`);
      return { ...total, loss: total.loss / total.tokens, loads: tally.loads(), metrics: tally.metrics() };
    },

    snapshot,
    restore,

    dispose() {
      undisturbed("dispose");
      for (const tensor of Object.values(named())) tensor.dispose();
      for (const hook of hooks) setState(hook, undefined); // a hook may go on to another trainer
      unusable = "it was disposed";
    },
  };
}

/** Sums tensor by tensor, into the storage of the first list where that is possible. */
const addAll = (sums: readonly Tensor[] | undefined, more: readonly Tensor[]): readonly Tensor[] =>
  sums?.map((x, i) => {
    const y = at(more, i);
    const total = add(x.engine.give(x), y);
    y.dispose();
    return total;
  }) ?? more;

/** Sums of loads, and last of tokens, as tokens of each expert per token. */
const perToken = (sums: readonly Tensor[] | undefined): readonly Tensor[] | undefined => {
  const tokens = sums?.at(-1);
  return tokens && sums?.slice(0, -1).map((load) => div(load, maximum(tokens, 1)));
};

const describe = (losses: Readonly<Record<string, number>>): string =>
  Object.entries(losses)
    .map(([name, value]) => `${name} ${value}, `)
    .join("");

/** Disposes the leaves of `old` that are not part of `now`. */
function replaced(old: readonly (Tree | undefined)[], now: readonly (Tree | undefined)[]): void {
  const kept = new Set(now.flatMap((tree) => leaves(tree ?? []).map(([, leaf]) => leaf)));
  for (const tree of old) for (const [, leaf] of leaves(tree ?? [])) if (!kept.has(leaf)) leaf.dispose();
}

function setState(hook: TrainingHook, state: Tree | undefined): void {
  if (hook.state === state) return;
  if (state === undefined) delete hook.state;
  else hook.state = state;
}

const list = (items: readonly string[], most = 8): string =>
  items.length === 0
    ? "none"
    : items.slice(0, most).join("; ") + (items.length > most ? `; and ${items.length - most} more` : "");

function checkOptions({ accumulate = 1, clip = Infinity, totalSteps = 0, hooks = [] }: TrainerOptions): void {
  const whole = (name: string, value: number, fewest: number): void => {
    if (Number.isInteger(value) && value >= fewest) return;
    throw new ShapeError(`trainer: ${name} must be a whole number from ${fewest} up, found ${value}`);
  };
  whole("accumulate", accumulate, 1);
  whole("totalSteps", totalSteps, 0);
  for (const { name, passes = 1 } of hooks) whole(`passes of hook "${name}"`, passes, 1);
  if (!(clip > 0)) throw new ShapeError(`trainer: clip must be above 0, found ${clip}`);
  const names = hooks.map(({ name }) => name);
  if (new Set(names).size < names.length)
    throw new ShapeError(`trainer: hooks need different names, found ${list(names)}`);
  const combining = hooks.filter((hook) => hook.combine).map(({ name }) => name);
  if (combining.length > 1)
    throw new UnsupportedError(`trainer: only one hook can combine passes, found ${list(combining)}`);
}
