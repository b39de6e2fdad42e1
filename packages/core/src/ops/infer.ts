// Shape rules shared by many ops. Every refusal prints the op and the shapes.
import type { DType, Spec } from "../backend.ts";
import { ShapeError } from "../errors.ts";
import { at } from "../op.ts";
import { show } from "../tensor.ts";

export const fail = (name: string, why: string, inputs: readonly Spec[]): never => {
  throw new ShapeError(`${name}: ${why}: ${inputs.map(show).join(" x ")}`);
};

export const spec = (shape: readonly number[], dtype: DType = "f32"): Spec => ({ shape, dtype });

/** NumPy broadcasting. */
export function broadcast(name: string, inputs: readonly Spec[]): readonly number[] {
  const rank = Math.max(...inputs.map((x) => x.shape.length));
  const shape: number[] = [];
  for (let axis = 0; axis < rank; axis++) {
    let size = 1;
    for (const x of inputs) {
      const d = x.shape[axis - rank + x.shape.length] ?? 1;
      if (d === 1) continue;
      if (size !== 1 && size !== d) fail(name, "shapes do not broadcast", inputs);
      size = d;
    }
    shape.push(size);
  }
  return shape;
}

export const last = (x: Spec): number => x.shape.at(-1) ?? 1;

/** Product of all dimensions but the last. */
export const rowsOf = (x: Spec): number => x.shape.slice(0, -1).reduce((n, d) => n * d, 1);

export const same = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

/** Checks the dtypes of the inputs: "f", "i", "w" (weights: f32, bf16 or f16) or "?" (any) for each; a missing optional input is not checked. */
export function dtypes(name: string, inputs: readonly Spec[], wanted: string): void {
  inputs.forEach((x, i) => {
    const kind = wanted[i] ?? wanted.at(-1);
    const allowed = kind === "f" ? ["f32"] : kind === "i" ? ["i32"] : kind === "w" ? ["f32", "bf16", "f16"] : [x.dtype];
    if (!allowed.includes(x.dtype)) fail(name, `input ${i} must be ${allowed.join(" or ")}; cast() it`, inputs);
  });
}

export function count(name: string, inputs: readonly Spec[], fewest: number, most: number = fewest): void {
  if (inputs.length < fewest || inputs.length > most)
    fail(name, `needs ${fewest} inputs, got ${inputs.length}`, inputs);
}

export function rank(name: string, inputs: readonly Spec[], ranks: readonly number[]): void {
  ranks.forEach((r, i) => {
    if (at(inputs, i).shape.length !== r) fail(name, `input ${i} must have ${r} dimensions`, inputs);
  });
}

/** Shape rule of an op whose result is like its first input. */
export const likeFirst =
  (name: string): ((inputs: readonly Spec[]) => readonly Spec[]) =>
  (inputs) => {
    dtypes(name, inputs, "f");
    return [spec(at(inputs, 0).shape)];
  };
