// The comparison: every router trains the same model on the same batches, and what its routing did is recorded on the way.
// Nothing here knows a model, a router or a backend: they come in as values. Runs in Node (files, memory for all records).
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Json } from "@switchyard/core";
import type { Trainer, TrainerSnapshot } from "@switchyard/core/train";
import * as v from "valibot";
import { countedBytes, countedTokens, type TokenBatch, trainingBatches } from "./batches.ts";
import {
  type Comparison,
  type ComparisonOptions,
  type Contender,
  type HeldOut,
  NOISE,
  type Prepared,
  type SnapshotFiles,
  startTrainer,
} from "./experiment.ts";
import {
  finalLayer,
  joined,
  type LayerChoices,
  layerRouting,
  type Moment,
  onlyTokens,
  type Watched,
  watch,
} from "./probe.ts";
import { type CheckpointRecord, checked, checkpointSchema, type FinalRouting, type RunResult } from "./results.ts";
import { writeSamples } from "./samples.ts";
import { removeFile } from "./store.ts";
import { joinDecisions, tokenPlaces, tracePath, writeTrace } from "./traces.ts";

const snapshotName = "interrupted.snapshot";
const saveEvery = 60; // seconds between snapshots that nobody asked for

/** What a snapshot holds beside the trainer's own state. */
interface RunState {
  readonly router: string;
  readonly seed: number;
  readonly seconds: number;
  readonly checkpoints: readonly CheckpointRecord[];
}

const stateSchema: v.GenericSchema<RunState> = v.object({
  router: v.string(),
  seed: v.number(),
  seconds: v.number(),
  checkpoints: v.array(checkpointSchema),
});

/** The steps after which loss and routing are recorded: 0, the last one, and evenly between. */
export function checkpointSteps(steps: number, checkpoints: number): readonly number[] {
  return [...new Set(Array.from({ length: checkpoints + 1 }, (_, i) => Math.round((i * steps) / checkpoints)))];
}

/** Trains and measures every router with every seed; continues an interrupted comparison from its snapshot. */
export async function compareRouters(options: ComparisonOptions, prepared: Prepared): Promise<Comparison> {
  const { contenders, seeds, folder, signal, done = [] } = options;
  const runs: RunResult[] = [];
  const pairs = contenders.flatMap((contender) => seeds.map((seed) => ({ contender, seed })));
  for (const [index, { contender, seed }] of pairs.entries()) {
    const earlier = done.find((run) => run.router === contender.name && run.seed === seed);
    const run = earlier ?? (await oneRun(options, prepared, contender, seed, { index, count: pairs.length }));
    if (run === undefined) return { status: "interrupted", runs };
    runs.push(run);
    if (earlier === undefined) {
      options.onRun?.(run);
      removeFile(join(folder, snapshotName));
      if (signal?.aborted && index + 1 < pairs.length) return { status: "interrupted", runs };
    }
  }
  return { status: "complete", runs };
}

/** The folder of a run's model: letters, digits and what else every file system takes. */
export const modelFolder = (router: string, seed: number): string => `${router.replace(/[^\w.=-]+/g, "_")}-seed${seed}`;

async function oneRun(
  options: ComparisonOptions,
  prepared: Prepared,
  contender: Contender,
  seed: number,
  place: { readonly index: number; readonly count: number },
): Promise<RunResult | undefined> {
  const { engine, training, steps, folder, signal, checkpoints: wanted = 8 } = options;
  const batch = trainingBatches(prepared.streams, { ...training, seed });
  const subject = contender.subject(seed, batch);
  const run = startTrainer(engine, subject, training, { seed, totalSteps: steps, hooks: contender.hooks?.() ?? [] });
  const file = join(folder, snapshotName);
  const model = modelFolder(contender.name, seed);
  try {
    let untraced: string | undefined;
    let before: readonly LayerChoices[] | undefined;
    const records: CheckpointRecord[] = [];
    let seconds = 0;
    const resumed = await resumable(options.snapshots, file, { router: contender.name, seed });
    if (resumed !== undefined) {
      run.restore(resumed.trainer);
      before = resumed.choices;
      records.push(...resumed.state.checkpoints);
      seconds = resumed.state.seconds;
    }
    const moment = (): Moment => ({
      engine,
      task: subject.task,
      params: run.params,
      buffers: run.buffers,
      experts: contender.experts,
      step: run.steps,
      totalSteps: steps,
    });
    let saved = performance.now();
    const save = async (): Promise<void> => {
      const state: RunState = { router: contender.name, seed, seconds, checkpoints: records };
      await options.snapshots.write(file, withRun(await run.snapshot(), before ?? [], state));
      saved = performance.now();
    };
    let stepSeconds = 0;
    for (const until of checkpointSteps(steps, wanted)) {
      if (records.some(({ step }) => step >= until)) continue;
      if (run.steps < until) {
        const status = await run.run({
          until,
          ...(signal === undefined ? {} : { signal }),
          onStep: (report) => {
            seconds += report.seconds;
            stepSeconds = stepSeconds === 0 ? report.seconds : 0.9 * stepSeconds + 0.1 * report.seconds;
            options.onStep?.({
              router: contender.name,
              seed,
              run: place.index,
              runs: place.count,
              step: report.step + 1,
              steps,
              loss: report.loss,
              tokensPerSecond: report.tokens / Math.max(1e-9, stepSeconds),
              secondsLeft: (steps - report.step - 1) * stepSeconds,
            });
          },
        });
        if (status === "aborted") {
          await save();
          return undefined;
        }
      }
      const last = until === steps;
      const { probe } = prepared.heldOut;
      const look = await lookAt(moment(), probe);
      const layers = look.choices.map((now, layer) => layerRouting(now, look.domains, probe.length, before?.[layer]));
      before = look.choices;
      const loss = last ? await measured(run, prepared) : lossOf(look.nats, probe, prepared);
      let trace: string | undefined;
      if (options.traces !== undefined) {
        const held = joinDecisions(probe, look.decisions);
        if (typeof held === "string") untraced = held;
        else {
          trace = tracePath(model, until, steps);
          await writeTrace(options, trace, {
            router: contender.name,
            seed,
            step: until,
            totalSteps: steps,
            domains: options.domains.map(({ name }) => name),
            ...tokenPlaces(probe),
            layers: held,
          });
        }
      }
      records.push({
        step: until,
        bitsPerByte: loss.bitsPerByte,
        perDomain: loss.perDomain,
        layers,
        ...(trace === undefined ? {} : { trace }),
      });
      if (signal?.aborted && !last) {
        await save();
        return undefined;
      }
      if (!last && performance.now() - saved > saveEvery * 1000) await save();
    }
    const final = await measureFinal(moment(), prepared);
    const samples = await writeSamples(options, subject, moment(), seed);
    await subject.save(run.params, run.buffers, join(folder, model));
    const tokens = run.history.reduce((sum, report) => sum + report.tokens, 0);
    return {
      router: contender.name,
      seed,
      experts: contender.experts,
      expertWidth: contender.expertWidth,
      parameters: subject.parameters,
      steps,
      tokens,
      seconds: rounded(seconds, 3),
      tokensPerSecond: rounded(tokens / Math.max(1e-9, seconds), 1),
      training: {
        bitsPerByte: run.history.map(({ loss, step }) => {
          const one = batch(step);
          return rounded(bits(loss * countedTokens(one), countedBytes(one, prepared.tokenBytes)), 5);
        }),
        learningRate: run.history.map(({ learningRate }) => rounded(learningRate, 8)),
      },
      checkpoints: records,
      final,
      samples,
      model,
      ...(untraced === undefined ? {} : { untraced }),
    };
  } finally {
    run.dispose();
  }
}

const rounded = (x: number, digits: number): number => Number(x.toFixed(digits));
const bits = (nats: number, bytes: number): number => nats / Math.LN2 / Math.max(1, bytes);
const mean = (values: readonly number[]): number => values.reduce((sum, x) => sum + x, 0) / Math.max(1, values.length);

interface Loss {
  readonly bitsPerByte: number;
  readonly perDomain: readonly number[];
}

function lossOf(nats: readonly number[], batches: HeldOut["all"], { tokenBytes }: Prepared): Loss {
  const perDomain = nats.map((sum, d) => {
    const bytes = (batches[d] ?? []).reduce((total, batch) => total + countedBytes(batch, tokenBytes), 0);
    return rounded(bits(sum, bytes), 5);
  });
  return { bitsPerByte: rounded(mean(perDomain), 5), perDomain };
}

/** Loss on all held-out text: nats of the tokens over the bytes of the text they stand for, every domain weighing the same. */
async function measured(run: Trainer<TokenBatch>, prepared: Prepared): Promise<Loss> {
  const nats: number[] = [];
  for (const batches of prepared.heldOut.all) {
    let sum = 0;
    for (const batch of batches) sum += (await run.evaluate([batch])).loss * countedTokens(batch);
    nats.push(sum);
  }
  return lossOf(nats, prepared.heldOut.all, prepared);
}

/** What a model does on batches of held-out text: nats per domain, and the choices of every layer for the counted tokens. */
interface Look {
  readonly nats: readonly number[];
  readonly choices: readonly LayerChoices[];
  /** The domain of each token. */
  readonly domains: Uint8Array;
  /** Of every batch, all positions: what a routing trace is made from. */
  readonly decisions: readonly Watched["decisions"][];
}

async function lookAt(moment: Moment, batches: HeldOut["probe"]): Promise<Look> {
  const nats: number[] = [];
  const labels: number[] = [];
  const parts: LayerChoices[][] = moment.task.routers.map(() => []);
  const decisions: Watched["decisions"][] = [];
  for (const [domain, list] of batches.entries()) {
    let sum = 0;
    for (const batch of list) {
      const watched = await watch(moment, batch);
      sum += watched.nats;
      decisions.push(watched.decisions);
      const counted = (token: number): boolean => (batch.labels[token] ?? -1) >= 0;
      for (const [layer, choices] of watched.layers.entries()) parts[layer]?.push(onlyTokens(choices, counted));
      for (let token = 0; token < batch.labels.length; token++) if (counted(token)) labels.push(domain);
    }
    nats.push(sum);
  }
  return { nats, choices: parts.map(joined), domains: Uint8Array.from(labels), decisions };
}

/** Routing at the end: co-activation on the probe, and the routes that its noised copy changes. */
async function measureFinal(moment: Moment, prepared: Prepared): Promise<FinalRouting> {
  const { probe, noised } = prepared.heldOut;
  const look = await lookAt(moment, noised);
  const clean = await lookAt(moment, probe);
  // Of the counted tokens, in their order: those whose own input was replaced tell nothing about the router.
  const replaced = noised.flatMap((list) =>
    list.flatMap((batch) => [...batch.replaced].filter((_, token) => (batch.labels[token] ?? -1) >= 0)),
  );
  const kept = (token: number): boolean => replaced[token] !== 1;
  const layers = await Promise.all(
    look.choices.map((changed, layer) => {
      const own = clean.choices[layer] ?? changed;
      return finalLayer(moment.engine, {
        probe: own,
        clean: onlyTokens(own, kept),
        noised: onlyTokens(changed, kept),
      });
    }),
  );
  return {
    noise: NOISE,
    bitsPerByte: {
      clean: lossOf(clean.nats, probe, prepared).bitsPerByte,
      noised: lossOf(look.nats, noised, prepared).bitsPerByte,
    },
    layers,
  };
}

const choicesName = "comparison.choices.";

/** The state of the run travels with the trainer's, and so do the choices of the last checkpoint: fluctuation compares with them. */
function withRun(snapshot: TrainerSnapshot, choices: readonly LayerChoices[], state: RunState): TrainerSnapshot {
  const extra = choices.map(({ ids, k, experts }, layer) => {
    const data = new Int32Array(ids.length + 2);
    data.set([experts, k]);
    data.set(ids, 2);
    return [`${choicesName}${layer}`, { data, shape: [data.length], dtype: "i32" as const }];
  });
  const run: Json = JSON.parse(JSON.stringify(state));
  return { json: { trainer: snapshot.json, run }, arrays: { ...snapshot.arrays, ...Object.fromEntries(extra) } };
}

async function resumable(snapshots: SnapshotFiles, file: string, wanted: Pick<RunState, "router" | "seed">) {
  if (!existsSync(file)) return undefined;
  const found = await snapshots.read(file);
  const { run: state } = checked(v.object({ run: stateSchema }), found.json, file);
  if (state.router !== wanted.router || state.seed !== wanted.seed) return undefined;
  const entries = Object.entries(found.arrays);
  const choices = entries
    .filter(([name]) => name.startsWith(choicesName))
    .sort(([a], [b]) => Number(a.slice(choicesName.length)) - Number(b.slice(choicesName.length)))
    .map(([, { data }]): LayerChoices => {
      const [experts = 0, k = 0] = data;
      const ids = Int32Array.from(data.subarray(2));
      return { experts, k, ids, weights: new Float32Array(ids.length), probabilities: new Float32Array(0) };
    });
  const arrays = Object.fromEntries(entries.filter(([name]) => !name.startsWith(choicesName)));
  const json = (found.json as { readonly trainer: Json }).trainer;
  return { state, trainer: { json, arrays }, choices: choices.length === 0 ? undefined : choices };
}
