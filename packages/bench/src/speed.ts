// How fast every contender trains here, and how many steps that makes in a given time.
import { UnsupportedError } from "@switchyard/core";
import { trainingBatches } from "./batches.ts";
import { type ComparisonOptions, type HeldOut, type Prepared, startTrainer } from "./experiment.ts";

/** Seconds that a training step takes, a batch of held-out text, and a token of a sample. */
export interface Speed {
  readonly step: number;
  readonly evaluation: number;
  readonly token: number;
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;

async function timed(body: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await body();
  return (performance.now() - start) / 1000;
}

/** Trains throw-away models for a few steps each, on the first batches, and measures. Runs that follow start anew. */
export async function measureSpeed(
  options: Pick<ComparisonOptions, "engine" | "contenders" | "training" | "signal">,
  prepared: Prepared,
): Promise<readonly Speed[]> {
  const { engine, contenders, training, signal } = options;
  const speeds: Speed[] = [];
  for (const contender of contenders) {
    const subject = contender.subject(0, trainingBatches(prepared.streams, { ...training, seed: 0 }));
    const run = startTrainer(engine, subject, training, {
      seed: 0,
      totalSteps: 1000,
      hooks: contender.hooks?.() ?? [],
    });
    try {
      for (let warm = 0; warm < 2 && !signal?.aborted; warm++) await run.step();
      const steps: number[] = [];
      for (let i = 0; i < 5 && !signal?.aborted; i++) steps.push(await timed(() => run.step()));
      const batch = prepared.heldOut.all[0]?.[0];
      const evaluations: number[] = [];
      for (let i = 0; i < 3 && batch !== undefined && !signal?.aborted; i++) {
        evaluations.push(await timed(() => run.evaluate([batch])));
      }
      const tokens: number[] = [];
      const prompt = prepared.streams[0]?.slice(0, 8) ?? new Int32Array(1);
      for (let i = 0; i < 2 && !signal?.aborted; i++) {
        tokens.push((await timed(() => subject.generate(run.params, run.buffers, prompt, 8, 0))) / 8);
      }
      speeds.push({ step: median(steps), evaluation: median(evaluations), token: Math.min(...tokens) });
    } finally {
      run.dispose();
    }
  }
  return speeds;
}

/** What a run does beside its training steps. */
export interface Extras {
  /** Batches of held-out text, over all evaluations. */
  readonly batches: number;
  /** Tokens of samples. */
  readonly tokens: number;
}

/** The extras of every run of a comparison with these settings. */
export function extrasOf(
  { heldOut }: Pick<Prepared, "heldOut">,
  { checkpoints = 8, sampleTokens = 100 }: Pick<ComparisonOptions, "checkpoints" | "sampleTokens">,
): Extras {
  const count = (list: HeldOut["all"]): number => list.reduce((sum, domain) => sum + domain.length, 0);
  return {
    batches: count(heldOut.all) + (checkpoints + 2) * count(heldOut.probe) + count(heldOut.noised),
    tokens: sampleTokens * heldOut.all.length,
  };
}

/**
 * Steps per run that fill `seconds` for all runs together, evaluations and samples included.
 * @throws UnsupportedError when not even ten steps fit.
 */
export function stepsThatFit(
  seconds: number,
  speeds: readonly Speed[],
  how: {
    readonly seeds: number;
    readonly extras: Extras;
    /** What the time is for, and what makes it enough, for the refusal. */
    readonly what?: string;
    readonly mend?: string;
  },
): number {
  const { seeds, extras, what = `${speeds.length * seeds} runs` } = how;
  const { mend = "give more time, fewer routers or seeds, or a smaller size" } = how;
  const sum = (of: (speed: Speed) => number): number => speeds.reduce((total, speed) => total + of(speed), 0) * seeds;
  const fixed = sum(({ evaluation, token }) => 1.1 * (extras.batches * evaluation + extras.tokens * token));
  const perStep = sum(({ step }) => step);
  const steps = Math.floor((0.97 * seconds - fixed) / perStep);
  if (!(steps >= 10)) {
    throw new UnsupportedError(
      `${Math.max(0, Math.round(seconds))} seconds are too short for ${what}: ten steps and the evaluations need ` +
        `${Math.ceil((fixed + 10 * perStep) / 0.97)}; ${mend}`,
    );
  }
  return steps;
}
