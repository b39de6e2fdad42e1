// Patches: small images of one of four textures, cut into patches of 2 x 2 pixels. Where a texture begins and which way its contrast
// goes is random, so that the mean of every pixel is the same for all classes: a linear model gets no lower loss than guessing.
import { ShapeError } from "@switchyard/core";
import { draws } from "./draws.ts";
import type { SampleTask } from "./sample-task.ts";

export interface PatchesOptions {
  /** Patches: [height, width]; default [4, 4]. */
  readonly grid?: readonly [number, number];
  /** Standard deviation of what is added to every pixel; default 0.3. */
  readonly noise?: number;
  /** Default 0. */
  readonly seed?: number;
}

/** Height at (y, x) of each class: lines lying and standing, a chessboard, and one of squares as large as a patch. */
const textures: readonly ((y: number, x: number) => number)[] = [
  (y) => y,
  (_, x) => x,
  (y, x) => y + x,
  (y, x) => Math.floor(y / 2) + Math.floor(x / 2),
];

/** Pixels are +1 or -1 plus noise; a patch is its four pixels by rows, a sample its patches by rows. */
export function patchesTask(options: PatchesOptions = {}): SampleTask {
  const { grid = [4, 4], noise = 0.3, seed = 0 } = options;
  const [height, width] = grid;
  if (![height, width].every((n) => Number.isInteger(n) && n > 0)) {
    throw new ShapeError(`patchesTask: a grid of ${height} x ${width} patches; expected whole numbers from 1`);
  }
  return {
    name: "patches",
    classes: textures.length,
    tokens: height * width,
    features: 4,
    grid,
    samples(split, index, count) {
      const random = draws(seed, `${split} ${index}`);
      const labels = Int32Array.from({ length: count }, () => random.below(textures.length));
      const features: number[] = [];
      for (const label of labels) {
        const [shift, texture] = [random.below(2), textures[label]];
        for (let patch = 0; patch < height * width; patch++) {
          for (let pixel = 0; pixel < 4; pixel++) {
            const y = 2 * Math.floor(patch / width) + (pixel >> 1);
            const x = 2 * (patch % width) + (pixel & 1);
            const bright = ((texture?.(y, x) ?? 0) + shift) % 2 === 0 ? 1 : -1;
            features.push(bright + noise * random.normal());
          }
        }
      }
      return { count, features: Float32Array.from(features), labels };
    },
  };
}
