// What is printed: rates from times, spreads, reasons, and whether goals are met.
import { expect, it } from "vitest";
import { reached, tableText } from "./format.ts";

const summary = (median: number, min = median, max = median) => ({ median, min, max, count: 3 });

it("prints rates, times, errors, reasons and goals", () => {
  const wall = summary(0.02, 0.019, 0.025);
  const table = {
    case: "matmul",
    title: "a product",
    threads: 2,
    unit: "GFLOP/s",
    amounts: { ours: 1.5, peer: 1.5, broken: 1.5 },
    entries: [
      { name: "ours", timing: { name: "ours", samples: [], wall, cpu: summary(0.03), runs: 4 }, error: 0 },
      { name: "peer", timing: { name: "peer", samples: [], wall: summary(0.05), runs: 2 }, error: 1.25e-6 },
      { name: "broken", failed: "no such device" },
    ],
    figures: [
      { label: "ours : peer", value: summary(2.5, 2.4, 2.6), cpu: summary(2.45), goal: { least: 3 } },
      { label: "share", value: summary(0.05), goal: { most: 0.1 } },
    ],
  } as const;
  const text = tableText(table);
  expect(text.split("\n")).toEqual([
    "a product, 2 threads",
    "          GFLOP/s  ms: median (min to max)  CPUs busy   error",
    "  ours       75.0      20.0 (19.0 to 25.0)       1.50  0.0e+0",
    "  peer       30.0      50.0 (50.0 to 50.0)          -  1.3e-6",
    "  broken        -                        -          -       -  no such device",
    "  ours : peer = 2.50 (2.40 to 2.60), in CPU time 2.45   goal at least 3: missed",
    "  share = 0.0500 (0.0500 to 0.0500)   goal at most 0.1: reached",
  ]);
  expect(tableText(table, { ours: 2, peer: 1 })).toContain("\n  peer (1 thread)     30.0 ");
});

it("a goal is about the median; no goal, no verdict", () => {
  expect(reached({ label: "", value: summary(1, 0, 9), goal: { least: 0.9, most: 1.1 } })).toBe(true);
  expect(reached({ label: "", value: summary(1.2), goal: { least: 0.9, most: 1.1 } })).toBe(false);
  expect(reached({ label: "", value: summary(Number.NaN), goal: { least: 0 } })).toBe(false);
  expect(reached({ label: "", value: summary(1) })).toBeUndefined();
});
