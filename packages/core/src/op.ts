// Operators are values: a name, a shape rule, optionally a composite of smaller ops and a gradient. Running them is the engine's job.
import type { Spec } from "./backend.ts";
import { ShapeError } from "./errors.ts";
import type { Tensor } from "./tensor.ts";

// biome-ignore lint/complexity/noBannedTypes: most ops have no attributes at all
export interface Op<A = {}> {
  readonly name: string;
  /** One spec per result; throws ShapeError that prints the shapes. */
  shapes(inputs: readonly Spec[], attrs: A): readonly Spec[];
  /** Composite of smaller ops; absent: a primitive. */
  fallback?(inputs: readonly Tensor[], attrs: A): readonly Tensor[];
  /**
   * Gradients of the inputs from those of the results. `wanted` tells which inputs need one; others may stay undefined.
   * An op without vjp is differentiated through its fallback; a primitive without vjp has no gradient.
   */
  vjp?(
    dys: readonly (Tensor | undefined)[],
    inputs: readonly Tensor[],
    ys: readonly Tensor[],
    attrs: A,
    wanted: readonly boolean[],
  ): readonly (Tensor | undefined)[];
  /** reuses[i]: the input whose storage result i may take over when the caller gave it away (optimiser updates, cache appends). */
  readonly reuses?: readonly (number | undefined)[];
}

/** Runs an op on the outermost engine among its inputs. */
export function run<A>(op: Op<A>, inputs: readonly Tensor[], attrs: A): readonly Tensor[] {
  let top = inputs[0]?.engine;
  for (const x of inputs) if (top === undefined || x.engine.level > top.level) top = x.engine;
  if (top === undefined) throw new ShapeError(`${op.name}: needs at least one input`);
  return top.run(op, inputs, attrs);
}

/** Like `run`, for ops with one result. */
export function run1<A>(op: Op<A>, inputs: readonly Tensor[], attrs: A): Tensor {
  return first(run(op, inputs, attrs));
}

export const first = <T>(list: readonly T[]): T => at(list, 0);

/** list[i] of a list that is known to be long enough. */
export function at<T>(list: readonly T[], i: number): T {
  const item = list[i];
  if (item === undefined) throw new RangeError(`item ${i} of a list of ${list.length} is missing`);
  return item;
}
