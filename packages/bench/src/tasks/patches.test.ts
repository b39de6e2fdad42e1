// The patches task: its pixels.
import { describe, expect, test } from "vitest";
import { patchesTask } from "./patches.ts";

/** The images of a batch as pixels[y][x]. */
function images(options: Parameters<typeof patchesTask>[0], count: number): { label: number; pixels: number[][] }[] {
  const task = patchesTask(options);
  const [height, width] = task.grid ?? [0, 0];
  const { features, labels } = task.samples("training", 0, count);
  expect(features).toHaveLength(count * height * width * 4);
  return Array.from(labels, (label, i) => ({
    label,
    pixels: Array.from({ length: 2 * height }, (_, y) =>
      Array.from({ length: 2 * width }, (__, x) => {
        const patch = Math.floor(y / 2) * width + Math.floor(x / 2);
        return features[(i * height * width + patch) * 4 + (y % 2) * 2 + (x % 2)] ?? Number.NaN;
      }),
    ),
  }));
}

describe("patchesTask", () => {
  test("lines, a chessboard and squares, each in both contrasts", () => {
    const drawn = new Set(
      images({ noise: 0, grid: [2, 2] }, 200).map(({ label, pixels }) => {
        const rows = pixels.map((row) => row.map((x) => (x > 0 ? "#" : ".")).join(""));
        return `${label} ${rows.join(" ")}`;
      }),
    );
    expect([...drawn].sort()).toEqual(
      [
        "0 #### .... #### ....",
        "0 .... #### .... ####",
        "1 #.#. #.#. #.#. #.#.",
        "1 .#.# .#.# .#.# .#.#",
        "2 #.#. .#.# #.#. .#.#",
        "2 .#.# #.#. .#.# #.#.",
        "3 ##.. ##.. ..## ..##",
        "3 ..## ..## ##.. ##..",
      ].sort(),
    );
  });

  test("the mean of every pixel is about 0 in each class", () => {
    const all = images({ grid: [2, 3] }, 4000);
    for (let label = 0; label < 4; label++) {
      const own = all.filter((one) => one.label === label);
      expect(own.length).toBeGreaterThan(800);
      for (let y = 0; y < 4; y++) {
        for (let x = 0; x < 6; x++) {
          const mean = own.reduce((total, { pixels }) => total + (pixels[y]?.[x] ?? Number.NaN), 0) / own.length;
          expect(Math.abs(mean)).toBeLessThan(0.13);
        }
      }
    }
  });

  test("the same place gives the same samples, another place, split or seed others", () => {
    const one = patchesTask().samples("training", 3, 8);
    expect(patchesTask().samples("training", 3, 8)).toEqual(one);
    for (const other of [
      patchesTask().samples("training", 4, 8),
      patchesTask().samples("held-out", 3, 8),
      patchesTask({ seed: 1 }).samples("training", 3, 8),
    ]) {
      expect(other.features).not.toEqual(one.features);
    }
  });

  test("a grid without patches is refused", () => {
    expect(() => patchesTask({ grid: [0, 4] })).toThrow("a grid of 0 x 4 patches");
  });
});
