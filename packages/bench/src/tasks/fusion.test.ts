// The fusion task: what its modalities tell alone and together.
import { describe, expect, test } from "vitest";
import { fusionTask } from "./fusion.ts";

/** Each token as a text, so that equal vectors are equal; "" where it is missing. */
function tokens(options: Parameters<typeof fusionTask>[0], count = 600): { label: number; shown: string[] }[] {
  const task = fusionTask({ noise: 0, ...options });
  const { features, labels, missing = new Float32Array() } = task.samples("training", 0, count);
  return Array.from(labels, (label, i) => ({
    label,
    shown: Array.from({ length: task.tokens }, (_, m) => {
      const from = (i * task.tokens + m) * task.features;
      const own = [...features.subarray(from, from + task.features)];
      if (missing[i * task.tokens + m] !== 1) return own.join();
      expect(own.every((x) => x === 0)).toBe(true);
      return "";
    }),
  }));
}

describe("fusionTask", () => {
  test.each([
    [2, 3],
    [3, 5],
    [4, 7],
  ])("of %i modalities any two tell which of %i classes it is", (modalities, classes) => {
    const samples = tokens({ modalities, classes, missing: 0 }, 1500);
    for (let a = 0; a < modalities; a++) {
      for (let b = a + 1; b < modalities; b++) {
        const seen = new Map<string, number>();
        for (const { label, shown } of samples) {
          const key = `${shown[a]} ${shown[b]}`;
          expect(seen.get(key) ?? label).toBe(label);
          seen.set(key, label);
        }
        expect(seen.size).toBe(classes * classes);
      }
    }
  });

  test("one modality alone tells nothing: with every symbol every class is about as frequent", () => {
    const samples = tokens({ missing: 0 }, 5000);
    for (let m = 0; m < 3; m++) {
      const counts = new Map<string, number[]>();
      for (const { label, shown } of samples) {
        const own = counts.get(shown[m] ?? "") ?? [0, 0, 0, 0, 0];
        own[label] = (own[label] ?? 0) + 1;
        counts.set(shown[m] ?? "", own);
      }
      expect(counts.size).toBe(5);
      for (const own of counts.values()) {
        const total = own.reduce((a, b) => a + b, 0);
        for (const count of own) expect(Math.abs(count / total - 0.2)).toBeLessThan(0.06);
      }
    }
  });

  test("about the asked share lacks exactly one modality", () => {
    const samples = tokens({ missing: 0.4 }, 2000);
    const gone = samples.map(({ shown }) => shown.filter((text) => text === "").length);
    expect(Math.max(...gone)).toBe(1);
    expect(Math.abs(gone.filter((n) => n === 1).length / 2000 - 0.4)).toBeLessThan(0.05);
    expect(tokens({ missing: 0 }).every(({ shown }) => !shown.includes(""))).toBe(true);
    expect(tokens({ missing: 1 }).every(({ shown }) => shown.includes(""))).toBe(true);
  });

  test("the same place gives the same samples, another place, split or seed others", () => {
    const one = fusionTask().samples("training", 3, 8);
    expect(fusionTask().samples("training", 3, 8)).toEqual(one);
    for (const other of [
      fusionTask().samples("training", 4, 8),
      fusionTask().samples("held-out", 3, 8),
      fusionTask({ seed: 1 }).samples("training", 3, 8),
    ]) {
      expect(other.features).not.toEqual(one.features);
    }
    expect(fusionTask().samples("training", 0, 0)).toMatchObject({ count: 0, features: new Float32Array() });
  });

  test("noise changes the numbers only", () => {
    const [plain, noisy] = [0, 0.5].map((noise) => fusionTask({ noise }).samples("training", 0, 50));
    const distance = noisy?.features.map((x, i) => x - (plain?.features[i] ?? 0)) ?? [];
    expect(noisy?.features).not.toEqual(plain?.features);
    expect(Math.max(...distance)).toBeLessThan(10);
  });

  test.each([
    [{ modalities: 1 }, "modalities = 1"],
    [{ classes: 4 }, "classes = 4; expected a prime above the 3 modalities"],
    [{ classes: 3 }, "classes = 3"],
    [{ missing: 2 }, "missing = 2"],
    [{ modalities: 2, classes: 3, missing: 0.1 }, "one alone tells nothing"],
  ])("%o is refused", (options, message) => {
    expect(() => fusionTask(options)).toThrow(message);
  });
});
