// Learning-rate schedules: pure functions from the step to a factor of the optimiser's learning rate. They compose:
// warmUp(100, cosineDecay()).
import { ShapeError } from "../errors.ts";

/**
 * `step` counts from 0. `totalSteps` is Infinity while the number of steps is not fixed; every schedule here is then
 * at its plateau.
 */
export type Schedule = (step: number, totalSteps: number) => number;

/** Always 1. */
export const constantRate = (): Schedule => () => 1;

/** 0 before the first step, 1 from the last one on; 0 while the end is unknown. */
const progress = (step: number, totalSteps: number): number =>
  totalSteps <= 0 ? 1 : Math.min(1, Math.max(0, step / totalSteps));

const checkFraction = (name: string, option: string, value: number): void => {
  if (!(value >= 0 && value <= 1)) throw new ShapeError(`${name}: ${option} must lie in 0..1, found ${value}`);
};

/** From 1 at the first step down to `final` at totalSteps in a straight line. */
export function linearDecay({ final = 0 }: { final?: number } = {}): Schedule {
  checkFraction("linearDecay", "final", final);
  return (step, totalSteps) => 1 - (1 - final) * progress(step, totalSteps);
}

/**
 * From 1 at the first step down to `final` at totalSteps along half a cosine (1608.03983, equation 5, without
 * restarts).
 */
export function cosineDecay({ final = 0 }: { final?: number } = {}): Schedule {
  checkFraction("cosineDecay", "final", final);
  return (step, totalSteps) => final + ((1 - final) * (1 + Math.cos(Math.PI * progress(step, totalSteps)))) / 2;
}

/**
 * Warm-up, stable, decay (2404.06395): 1 until the last `decay` share of the steps, then down to `final`; put it inside
 * `warmUp`. The decay is linear or "1-sqrt" (2405.18392: 1 - sqrt(progress), better than linear there).
 */
export function wsd({
  decay = 0.1,
  final = 0,
  shape = "1-sqrt",
}: {
  decay?: number;
  final?: number;
  shape?: "linear" | "1-sqrt";
} = {}): Schedule {
  checkFraction("wsd", "decay", decay);
  checkFraction("wsd", "final", final);
  return (step, totalSteps) => {
    const start = totalSteps === Infinity ? Infinity : totalSteps * (1 - decay);
    if (step <= start) return 1;
    const done = progress(step - start, totalSteps - start);
    return 1 - (1 - final) * (shape === "linear" ? done : Math.sqrt(done));
  };
}

/**
 * Rises in a straight line over the first `steps` steps, (step + 1) / steps, then runs `after` over the steps that
 * remain.
 */
export function warmUp(steps: number, after: Schedule = constantRate()): Schedule {
  if (!(Number.isInteger(steps) && steps >= 0)) {
    throw new ShapeError(`warmUp: needs a whole number of steps from 0 up, found ${steps}`);
  }
  return (step, totalSteps) => (step < steps ? (step + 1) / steps : after(step - steps, totalSteps - steps));
}
