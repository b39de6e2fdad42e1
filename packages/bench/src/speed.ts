// How fast every contender trains here, and how many steps that makes in a given time.
import { UnsupportedError } from "@switchyard/core";
import { trainingBatches } from "./batches.ts";
import { type ComparisonOptions, type HeldOut, type Prepared, startTrainer } from "./experiment.ts";

/** Seconds that a step of each contender takes, and that one batch of held-out text takes. */
export interface Speed {
  readonly step: number;
  readonly evaluation: number;
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
    const run = startTrainer(engine, subject, training, 0, 1000);
    try {
      for (let warm = 0; warm < 2 && !signal?.aborted; warm++) await run.step();
      const steps: number[] = [];
      for (let i = 0; i < 5 && !signal?.aborted; i++) steps.push(await timed(() => run.step()));
      const batch = prepared.heldOut.all[0]?.[0];
      const evaluations: number[] = [];
      for (let i = 0; i < 3 && batch !== undefined && !signal?.aborted; i++) {
        evaluations.push(await timed(() => run.evaluate([batch])));
      }
      speeds.push({ step: median(steps), evaluation: median(evaluations) });
    } finally {
      run.dispose();
    }
  }
  return speeds;
}

/**
 * Steps per run that fill `seconds` for all runs together, evaluations and samples included.
 * @throws UnsupportedError when not even ten steps fit.
 */
export function stepsThatFit(
  seconds: number,
  speeds: readonly Speed[],
  seeds: number,
  { heldOut }: Pick<Prepared, "heldOut">,
  checkpoints = 8,
): number {
  const batches = (list: HeldOut["all"]): number => list.reduce((sum, domain) => sum + domain.length, 0);
  const looks = batches(heldOut.all) + checkpoints * batches(heldOut.probe);
  const fixed = speeds.reduce((sum, { evaluation }) => sum + 1.15 * looks * evaluation, 0) * seeds;
  const perStep = speeds.reduce((sum, { step }) => sum + step, 0) * seeds;
  const steps = Math.floor((0.96 * seconds - fixed) / perStep);
  if (!(steps >= 10)) {
    throw new UnsupportedError(
      `${Math.max(0, Math.round(seconds))} seconds are too short for ${speeds.length * seeds} runs: ten steps and the evaluations need ` +
        `${Math.ceil((fixed + 10 * perStep) / 0.96)}; give more time, fewer routers or seeds, or a smaller size`,
    );
  }
  return steps;
}
