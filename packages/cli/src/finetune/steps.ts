// The steps of a fine-tuning run: how many fit into a time, the rate they learn at, and taking them.
import { stepsThatFit } from "@switchyard/bench";
import { CheckpointError, DeviceError, UnsupportedError } from "@switchyard/core";
import { cosineDecay, type Schedule, type Trainer, warmUp } from "@switchyard/core/train";
import type { TextBatch } from "@switchyard/models";
import type { JobContext } from "./context.ts";
import { stepsOfEpoch, type TuningText } from "./data.ts";
import type { Settings } from "./settings.ts";

/** The learning rate was too high: going on would only repeat it. */
export class NotFinite extends UnsupportedError {}

/** A twentieth of the steps up, then along a cosine down to a tenth. */
export const rateOf = (steps: number): Schedule =>
  warmUp(Math.max(1, Math.round(0.05 * steps)), cosineDecay({ final: 0.1 }));

/** Lets steps that do not stay finite, or do not fit into memory, say what to do about it. */
async function mendable<T>(settings: Settings, act: () => Promise<T>): Promise<T> {
  try {
    return await act();
  } catch (cause) {
    if (DeviceError.isInstance(cause) && /out of memory/i.test(cause.message)) {
      const [reason = ""] = cause.message.split(". ");
      throw new UnsupportedError(
        `a step of ${settings.rows} x ${settings.length} tokens does not fit (${reason}); fewer --rows or a shorter --length need less`,
        { cause },
      );
    }
    const [, step] = (cause instanceof Error && /^step (\d+) is not finite/.exec(cause.message)) || [];
    if (step === undefined) throw cause;
    const lower = Number((settings.learningRate / 10).toPrecision(1));
    throw new NotFinite(
      `the loss is no longer a number after step ${step}: the learning rate ${settings.learningRate} is too high for this model; ` +
        `start again with a lower one, such as --lr ${lower}`,
      { cause },
    );
  }
}

/** Steps for the time that was given, from the speed of a few; what they did is undone. Undefined where it was stopped. */
export async function measuredSteps(
  run: Trainer<TextBatch>,
  job: {
    readonly settings: Settings;
    readonly text: TuningText;
    /** Seconds that the held-out text takes. */
    readonly measuring: number;
    elapsed(): number;
  },
  { note, signal }: JobContext,
): Promise<number | undefined> {
  const { settings, text, measuring, elapsed } = job;
  const whole = Math.ceil(3 * stepsOfEpoch(text.training.length, settings));
  note("Measuring the speed ...");
  const start = await run.snapshot();
  const seconds: number[] = [];
  // The first steps are slower than the others.
  for (let i = 0; i < 6 && !signal.aborted; i++) {
    const { seconds: took } = await mendable(settings, () => run.step());
    if (i > 0) seconds.push(took);
    await new Promise((done) => setTimeout(done, 0));
  }
  if (signal.aborted) return undefined;
  run.restore(start);
  const step = seconds.sort((a, b) => a - b)[seconds.length >> 1] ?? 0;
  const speed = { step, evaluation: measuring, token: 0 };
  const fit = (time: number): number =>
    stepsThatFit(time - elapsed(), [speed], {
      seeds: 1,
      extras: { batches: 1, tokens: 0 },
      what: "this model and text",
      mend: "give more time, fewer --rows or a shorter --length",
    });
  if (settings.time !== undefined) return fit(settings.time);
  const most = 600;
  return whole * step + 2 * measuring < most ? whole : Math.min(whole, fit(most));
}

/** Saves a snapshot. A disk without room for it is no reason to end a run that may need none. */
export async function orNote(save: () => Promise<void>, { note }: JobContext): Promise<void> {
  try {
    await save();
  } catch (error) {
    if (!CheckpointError.isInstance(error)) throw error;
    note(`No snapshot: ${error.message}. Training goes on; it could not be resumed from here.`);
  }
}

/** Takes the steps that are left, saving now and then. */
export async function train(
  run: Pick<Trainer<TextBatch>, "run">,
  job: {
    readonly steps: number;
    readonly settings: Settings;
    readonly every: number;
    save(): Promise<void>;
  },
  context: JobContext,
): Promise<"done" | "aborted"> {
  const { training, signal } = context;
  const { steps, settings, every, save } = job;
  let saved = performance.now();
  // Running means: single batches and steps scatter.
  let pace = 0;
  let shown: number | undefined;
  const status = await mendable(settings, () =>
    run.run({
      until: steps,
      signal,
      async onStep({ step, loss, tokens, seconds }) {
        pace = pace === 0 ? seconds : 0.9 * pace + 0.1 * seconds;
        shown = shown === undefined ? loss : 0.9 * shown + 0.1 * loss;
        const speed = Math.round(tokens / Math.max(1e-9, pace));
        const figures = `${step + 1}/${steps}  loss ${shown.toFixed(3)}  ${speed} tokens/s`;
        training.update("Training", step + 1, steps, figures);
        if (performance.now() - saved < every * 1000 || step + 1 === steps) return;
        await orNote(save, context);
        saved = performance.now();
      },
    }),
  );
  training.end();
  return status;
}
