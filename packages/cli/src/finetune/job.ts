// The job behind `switchyard finetune`: text, model, what of it is trained, steps, snapshots, and the tuned checkpoint measured as it was saved. It
// only wires packages together.
import { randomUUID } from "node:crypto";
import { existsSync, rmSync, statSync } from "node:fs";
import { join, resolve } from "node:path";
import { readText, writeWhole } from "@switchyard/bench";
import { UnsupportedError } from "@switchyard/core";
import {
  adamw,
  type ExpertConfig,
  readExpertConfig,
  type Schedule,
  trainer,
  writeExpertConfig,
} from "@switchyard/core/train";
import { type CheckpointSummary, readSnapshot, writeSnapshot } from "@switchyard/models";
import { changedParameters, saveTuned, type TunedProgress } from "@switchyard/models/tuning";
import { count, shownBytes } from "../arguments.ts";
import { type ModelArguments, modelName, needTokenizer, type OpenModel, withModel } from "../model-arguments.ts";
import { summaryOf } from "../recording.ts";
import { type JobContext, measure } from "./context.ts";
import { batchesOf, cutText, type Material, readMaterial, stepsOfEpoch } from "./data.ts";
import { checkFit, checkTypes } from "./fit.ts";
import { chosenExperts, planOf } from "./plan.ts";
import { type Done, type FinetuneResult, finetuneFile, resultOf, trainedParts } from "./result.ts";
import { complete, type Request, type Settings, sameSettings, shown } from "./settings.ts";
import {
  checkOwner,
  checksum,
  checkTarget,
  makeState,
  NotOwner,
  readState,
  removeState,
  type State,
  snapshotPath,
  writeState,
} from "./state.ts";
import { measuredSteps, NotFinite, orNote, rateOf, train } from "./steps.ts";

export type Outcome =
  | { readonly status: "complete"; readonly result: FinetuneResult }
  /** A snapshot was kept. */
  | { readonly status: "interrupted"; readonly steps: number; readonly of: number }
  /** Before there was anything to keep. */
  | { readonly status: "stopped" };

const modelOf = (
  settings: Pick<Settings, "router" | "followLinks" | "backend">,
  folder: string,
  threads?: number,
): ModelArguments => ({
  folder,
  backend: settings.backend,
  threads,
  memory: undefined,
  policy: undefined,
  router: settings.router,
  followLinks: settings.followLinks,
});

/** Fine-tunes. @throws the packages' errors, each one clear line. */
export async function finetuneJob(request: Request, context: JobContext): Promise<Outcome> {
  const started = performance.now();
  const { out, asked, resume, threads } = request;
  const { signal, bar } = context;
  const run = randomUUID();
  const earlier = resume ? readState(out) : undefined;
  if (earlier) sameSettings(asked, earlier.settings, out);
  const source = shown(earlier?.settings.source ?? asked.source ?? "");
  const fresh = !existsSync(out);
  if (!earlier) checkTarget(source, out, request.replace);
  const how = earlier?.settings ?? { backend: "wasm" as const, followLinks: false, ...asked };
  const model = modelOf(how, source, threads);
  const summary = await summaryOf(model);
  checkFit(summary, { ...how, source });
  const material = readMaterial(how);
  const named = asked.experts === undefined ? undefined : readExpertConfig(readText(shown(asked.experts)));
  const changed = (what: string): UnsupportedError =>
    new UnsupportedError(`--resume: ${what} has changed since the run in ${out} was started; start a new run`);
  if (earlier && earlier.text !== material.sha256) throw changed("the text");
  if (earlier?.experts && named && writeExpertConfig(named) !== writeExpertConfig(earlier.experts)) {
    throw changed(shown(asked.experts ?? ""));
  }
  const elapsed = (): number => (earlier?.seconds ?? 0) + (performance.now() - started) / 1000;
  /** From then on OUT holds something of this run. */
  let began = false;
  /** Steps in the latest snapshot. */
  let latest: { readonly steps: number; readonly of: number } | undefined;
  // A place that cannot be written to is noticed before any work is done.
  if (!earlier) makeState(out);
  try {
    const sum = await checksum(source, { signal, onProgress: (done, all) => bar.update("Checksums", done, all) });
    bar.end();
    if (earlier && earlier.source !== sum) throw changed(`the checkpoint ${source}`);
    const weights = how.lora ? ("stored" as const) : ("f32" as const);
    const begin = (state: State): void => {
      // Another run may have begun there meanwhile.
      if (!earlier) checkTarget(source, out, request.replace);
      began = true;
      context.begin();
      writeState(out, state);
    };
    const saved = (steps: number, of: number): void => {
      latest = { steps, of };
    };
    const done = await withModel(
      model,
      (open) =>
        tuneOpen(open, { request, run, earlier, material, named, sum, summary, elapsed, begin, saved }, context),
      { weights },
    );
    if ("status" in done) return done;
    const { state, text } = done;
    const title = "Measuring what was saved";
    const after = await withModel(
      modelOf({ ...how, followLinks: false }, out, threads),
      (open) => measure(open.model, text, { length: state.settings.length, title }, context),
      { weights },
    );
    const result = resultOf({ ...done, target: resolve(out), after, seconds: elapsed(), threads });
    if (state.experts) writeWhole(join(out, "expert_cfg.json"), [writeExpertConfig(state.experts)]);
    // That of an earlier tuning, which came along with the checkpoint.
    else if (statSync(join(out, "expert_cfg.json"), { throwIfNoEntry: false })?.isFile()) {
      rmSync(join(out, "expert_cfg.json"));
    }
    writeWhole(join(out, finetuneFile), [`${JSON.stringify(result, null, 2)}\n`]);
    removeState(out, run, false);
    return { status: "complete", result };
  } catch (error) {
    bar.end();
    if (began && (latest === undefined || error instanceof NotFinite || error instanceof NotOwner)) {
      removeState(out, run, fresh);
      latest = undefined;
    }
    // What fails while a run is stopped, such as its last snapshot, is told.
    if (!signal.aborted || error !== signal.reason) {
      if (latest !== undefined) {
        context.note(`What was trained is kept. Continue with: switchyard finetune --resume ${out}`);
      }
      throw error;
    }
    return latest === undefined ? { status: "stopped" } : { status: "interrupted", ...latest };
  } finally {
    if (!began && !earlier) removeState(out, run, fresh);
  }
}

const stages = {
  checking: "Looking for changes",
  writing: "Writing",
  comparing: "Comparing",
  checksums: "Checksums",
} as const satisfies Readonly<Record<TunedProgress["stage"], string>>;

interface Job {
  readonly request: Request;
  /** Names this process in what OUT holds. */
  readonly run: string;
  readonly earlier: State | undefined;
  readonly material: Material;
  /** By --experts. */
  readonly named: ExpertConfig | undefined;
  /** SHA-256 of the source. */
  readonly sum: string;
  readonly summary: CheckpointSummary;
  elapsed(): number;
  /** Makes the unfinished run in OUT. */
  begin(state: State): void;
  /** Told how many steps the latest snapshot holds. */
  saved(steps: number, of: number): void;
}

async function tuneOpen(open: OpenModel, job: Job, context: JobContext): Promise<Done | Outcome> {
  const { request, run: owner, earlier, material, named, sum, summary, elapsed, begin, saved } = job;
  const { out, asked } = request;
  const { note, signal } = context;
  const { model } = open;
  const settings = earlier?.settings ?? complete(asked, model);
  if (settings.length > model.context) {
    throw new UnsupportedError(`--length is ${settings.length}, but the model's context is ${model.context}`);
  }
  const tokenizer =
    settings.ids === undefined ? needTokenizer(open, "--text", "Give token ids: --ids FILE") : undefined;
  const { length, holdOut: share } = settings;
  const text = cutText(material, { share, length, vocabulary: model.vocabulary, tokenizer });
  const batch = batchesOf(text, settings);
  const experts = earlier?.experts ?? named ?? (await chosenExperts(model, settings, { text, batch }, context));
  const plan = planOf(model, settings, { experts, batch });
  const trained = trainedParts(plan.task.params, { experts, total: summary.parameters.total });
  checkTypes(
    summary,
    trained.parts.map(({ part }) => part),
    shown(settings.source),
  );
  const names = text.files.map(({ name }) => name);
  note(
    `${modelName(open)} on ${names.length > 4 ? `${names.length} files` : names.join(", ")}: ${text.training.length} tokens to train on, ` +
      `${text.files.reduce((n, { heldOut }) => n + heldOut, 0)} held out`,
  );
  const measured = performance.now();
  const before =
    earlier?.before ?? (await measure(model, text, { length, title: "Measuring the model as it is" }, context));
  const measuring = earlier ? 0 : (performance.now() - measured) / 1000;

  // While the speed is measured nothing is learned.
  let rate: Schedule = () => 0;
  const run = trainer(model.engine, plan.task, {
    // Without decay an expert that no token chose keeps its bytes.
    optimiser: adamw({ learningRate: settings.learningRate, weightDecay: 0 }),
    schedule: (step, total) => rate(step, total),
    clip: 1,
    seed: settings.seed,
    hooks: plan.hooks,
  });
  try {
    if (earlier && existsSync(snapshotPath(out))) {
      run.restore(await readSnapshot(snapshotPath(out)));
      saved(run.steps, earlier.steps);
    }
    const steps =
      earlier?.steps ?? settings.steps ?? (await measuredSteps(run, { settings, text, measuring, elapsed }, context));
    if (steps === undefined) return { status: "stopped" };
    rate = rateOf(steps);
    if (run.totalSteps === undefined) run.setTotalSteps(steps);
    const created = earlier?.created ?? new Date().toISOString();
    const state = (): State => ({
      schema: "switchyard/finetune-state/1",
      run: owner,
      settings,
      steps,
      text: material.sha256,
      source: sum,
      before,
      ...(experts ? { experts } : {}),
      created,
      seconds: elapsed(),
    });
    begin(state());
    const rounds = steps / stepsOfEpoch(text.training.length, settings);
    note(
      `${count(steps, "step")} of ${settings.rows} x ${length} tokens, ${rounds.toFixed(rounds < 10 ? 1 : 0)} times through the text; ` +
        `held-out loss ${before.loss.toFixed(4)}`,
    );
    const save = async (): Promise<void> => {
      checkOwner(out, owner);
      await writeSnapshot(snapshotPath(out), await run.snapshot());
      saved(run.steps, steps);
      writeState(out, state());
    };
    const status = await train(run, { steps, settings, save, every: request.snapshotEvery }, context);
    if (status === "aborted") {
      await save();
      return { status: "interrupted", steps: run.steps, of: steps };
    }
    // What was trained then outlives a failure to save the checkpoint.
    await orNote(save, context);
    checkOwner(out, owner);
    const changed = changedParameters(plan.model, run.params, run.buffers);
    try {
      const certificate = await saveTuned(settings.source, out, changed, {
        routers: open.plugins,
        followLinks: settings.followLinks,
        replace: true,
        signal,
        onProgress: ({ stage, done, total }) => context.bar.update(stages[stage], done, total, shownBytes(total)),
      });
      context.bar.end();
      return { state: state(), trained, history: [...run.history], certificate, model: modelName(open), text };
    } finally {
      for (const x of changed.values()) x.dispose();
    }
  } finally {
    run.dispose();
  }
}
