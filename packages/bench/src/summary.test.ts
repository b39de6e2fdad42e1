// The table from runs whose numbers are known.
import { describe, expect, test } from "vitest";
import { exampleResults } from "../test/example.ts";
import { overSeedsText, shortCount, summarise, tableText } from "./summary.ts";

describe("summarise", () => {
  const { runs } = exampleResults([1, 2, 3], 2);

  test("one row per router, in order, with intervals over the seeds", () => {
    const rows = summarise(runs);
    expect(rows.map(({ router, seeds }) => [router, seeds])).toEqual([
      ["topK", 3],
      ["switchRouter", 3],
      ["reMoE", 3],
    ]);
    const bits = runs.slice(0, 3).map((run) => run.checkpoints.at(-1)?.bitsPerByte ?? 0);
    const mean = bits.reduce((a, b) => a + b) / 3;
    expect(rows[0]?.bitsPerByte.mean).toBeCloseTo(mean, 12);
    const deviation = Math.sqrt(bits.reduce((sum, x) => sum + (x - mean) ** 2, 0) / 2);
    expect(rows[0]?.bitsPerByte.halfWidth).toBeCloseTo((4.303 * deviation) / Math.sqrt(3), 10);
  });

  test("layers are averaged, dead experts summed, fluctuation taken over the whole training", () => {
    const [first] = runs;
    const [row] = summarise(runs.slice(0, 1));
    const last = first?.checkpoints.at(-1)?.layers ?? [];
    expect(row?.entropy).toEqual({ mean: ((last[0]?.entropy ?? 0) + (last[1]?.entropy ?? 0)) / 2 });
    expect(summarise(runs.filter(({ router }) => router === "switchRouter"))[0]?.dead.mean).toBe(2);
    const moved = (first?.checkpoints ?? [])
      .slice(1)
      .flatMap(({ layers }) => layers.map((l) => l.fluctuation ?? Number.NaN));
    expect(row?.fluctuation.mean).toBeCloseTo(moved.reduce((a, b) => a + b) / moved.length, 12);
  });

  test("no runs, no rows", () => expect(summarise([])).toEqual([]));
});

test("the text table lines up, baselines included", () => {
  const { summary, baselines } = exampleResults();
  const lines = tableText(summary, baselines).split("\n");
  expect(lines).toHaveLength(1 + 1 + 3 + 2);
  const [head = "", rule = "", topK = ""] = lines;
  expect(rule.length).toBe(head.length);
  expect(topK.length).toBe(head.length);
  const end = head.indexOf("bits/byte") + "bits/byte".length;
  expect(topK.slice(0, end)).toMatch(/^topK +2\.3\d\d$/);
  expect(lines.at(-1)?.slice(0, end)).toMatch(/^order-3 byte model +2\.130$/);
});

test("numbers as people read them", () => {
  expect([0, 999, 1000, 45_612, 999_499, 1_234_567].map(shortCount)).toEqual([
    "0",
    "999",
    "1.00k",
    "45.6k",
    "999k",
    "1.23M",
  ]);
  expect(overSeedsText({ mean: 2.3456 }, 3)).toBe("2.346");
  expect(overSeedsText({ mean: 2.3456, halfWidth: 0.0412 }, 2)).toBe("2.35 ± 0.04");
});
